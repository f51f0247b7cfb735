"""Connections, hop by hop: a socket, the pinned host key, one key of the user's. Never a command."""

from __future__ import annotations

import base64
import logging
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import paramiko
from fabric.config import Config
from fabric.connection import Connection
from paramiko.common import MSG_CHANNEL_REQUEST

from cluster.errors import InputError
from cluster.ssh.faults import DroppedError, at, translated, unreachable
from cluster.ssh.keys import Keys
from cluster.ssh.route import Hop, Limits
from cluster.trust import SSH_PORT, HostKey, pinned, unknown

# paramiko's threads log tracebacks of ordinary ends; without a handler Python would print them.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

ATTEMPTS = 4  # one, and three more for a server that drops new connections (MaxStartups)
PATIENCE = 15.0  # seconds without any answer through a jump host until the machine counts as lost
WINDOW = 8 * 1024 * 1024  # what the machine may send before we have read it; read whole, since paramiko moves the rest

# paramiko prefers CTR with a separate MAC; GCM is one pass, and faster.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
RSA = ("rsa-sha2-512", "rsa-sha2-256")
ECDSA = ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")
KEY_TYPES = ("ssh-ed25519", *ECDSA, "ssh-rsa")

T = TypeVar("T")


def connect(way: tuple[Hop, ...], known_hosts: Path, limits: Limits, stack: ExitStack) -> paramiko.Transport:
    """Connect hop by hop; `stack` closes all of it, the last first."""
    before: paramiko.Transport | None = None
    with ExitStack() as undo:
        for hop in way:
            before = _connect_hop(hop, before, known_hosts, limits, undo)
        stack.push(undo.pop_all())
    if before is None:
        raise InputError("a way without a hop")
    return before


def _connect_hop(
    hop: Hop, before: paramiko.Transport | None, known_hosts: Path, limits: Limits, undo: ExitStack
) -> paramiko.Transport:
    keys = tuple(key for key in pinned(known_hosts, hop.key_name) if key.type in KEY_TYPES)
    if not keys:
        raise at(hop, unknown(hop.node))

    def attempt() -> paramiko.Transport:
        connection = _connection(hop, keys, limits)
        undo.callback(connection.client.close)
        connection.connect_kwargs["sock"] = reach(hop, before, limits)
        connection.open()
        transport: paramiko.Transport = connection.transport
        return transport

    transport = insist(hop, limits, attempt)
    transport.set_keepalive(5)
    if before or hop.proxy:
        threading.Thread(target=_watch, args=(transport,), daemon=True).start()
    return transport


def insist(hop: Hop, limits: Limits, attempt: Callable[[], T]) -> T:
    """Attempt, and again where a busy server drops a new connection at once; never when it was slow or saw a key."""
    for round_ in range(1, ATTEMPTS):
        began = time.monotonic()
        try:
            with translated(hop):
                return attempt()
        except DroppedError:
            if time.monotonic() - began >= limits.banner:
                raise
        time.sleep(random.SystemRandom().uniform(0.1, 0.3) * 2**round_)
    with translated(hop):
        return attempt()


def _connection(hop: Hop, keys: tuple[HostKey, ...], limits: Limits) -> Connection:
    """Fabric's connection, not yet open: our socket, our keys, no configuration file and no gateway of its own."""
    connection = Connection(
        host=hop.host,
        user=hop.user,
        port=hop.port,
        config=Config(lazy=True, ssh_config=paramiko.SSHConfig()),
        gateway=False,
        forward_agent=False,
        connect_kwargs={
            "banner_timeout": limits.banner,
            "auth_timeout": limits.auth,
            "channel_timeout": PATIENCE,
            "transport_factory": transports(tuple(key.type for key in keys), limits),
            "auth_strategy": Keys(hop),
        },
    )
    client = connection.client
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    # The name that paramiko will look for; it differs from ours where ~/.ssh/config gives another HostName.
    name = hop.host if hop.port == SSH_PORT else f"[{hop.host}]:{hop.port}"
    for key in keys:
        public = paramiko.PKey.from_type_string(key.type, base64.b64decode(key.base64))
        client.get_host_keys().add(name, key.type, public)
    return connection


def transports(types: tuple[str, ...], limits: Limits) -> Callable[..., paramiko.Transport]:
    """Makes transports that ask for these types of host key only: so another type is no mismatch."""
    wanted = [name for kind in types for name in (RSA if kind == "ssh-rsa" else (kind,))]

    def make(sock: socket.socket, **_options: object) -> paramiko.Transport:
        transport = _Transport(sock, default_window_size=WINDOW)
        transport.handshake_timeout = limits.banner
        transport.banner_timeout = limits.banner
        security = transport.get_security_options()
        security.key_types = wanted
        security.ciphers = CIPHERS
        return transport

    return make


def reach(hop: Hop, before: paramiko.Transport | None, limits: Limits) -> socket.socket | paramiko.Channel:
    """Something that carries bytes to the hop: TCP, a channel of the jump host before it, or a ProxyCommand."""
    if not before:
        return _proxy(hop.proxy) if hop.proxy else _dial_tcp(hop, limits)
    try:
        return before.open_channel("direct-tcpip", (hop.host, hop.port), ("", 0), timeout=hop.timeout)
    except paramiko.ChannelException as error:
        raise unreachable(
            hop,
            "the jump host cannot connect to it",
            detail=(str(error.text),),
            next_step="is sshd running there, is the address right as seen from the jump host, "
            "and may it forward (AllowTcpForwarding)?",
        ) from error


def _dial_tcp(hop: Hop, limits: Limits) -> socket.socket:
    """Connect to the first of the host's addresses that answers, each with its share of the time."""
    deadline = time.monotonic() + hop.timeout
    found = socket.getaddrinfo(hop.host, hop.port, type=socket.SOCK_STREAM)
    for index, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            _notice_death(sock, limits.dead)
            sock.settimeout(max(0.1, (deadline - time.monotonic()) / (len(found) - index)))
            sock.connect(address)
        except OSError:
            sock.close()
            if index == len(found) - 1:
                raise
        else:
            return sock
    raise socket.gaierror(socket.EAI_NONAME, "no address")


def _notice_death(sock: socket.socket, seconds: float) -> None:
    """Let the kernel end a connection whose peer is silent; paramiko's own keepalive never waits for an answer."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    step = max(1, int(seconds / 3))
    wanted = {"TCP_KEEPIDLE": step, "TCP_KEEPINTVL": step, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": int(seconds * 1000)}
    for name, value in wanted.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _proxy(command: str) -> socket.socket:
    """A ProxyCommand on a socket pair. It only carries bytes: the machine's key is verified as without it."""
    ours, theirs = socket.socketpair()
    with theirs:
        line = ["sh", "-c", f"exec {command}"]
        pipe = theirs.fileno()
        # In a session of its own: Ctrl-C is for us, and what then stops the run goes over this very connection.
        process = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True)
    # Reaps it when our end of the pair is closed.
    threading.Thread(target=process.wait, daemon=True).start()
    return ours


def _watch(transport: paramiko.Transport) -> None:
    """Ask for an answer now and then: behind a jump host the kernel cannot tell that the machine is gone."""
    while transport.is_active():
        timer = threading.Timer(PATIENCE, transport.close)
        timer.daemon = True
        timer.start()
        with suppress(OSError, EOFError, paramiko.SSHException):
            transport.global_request("keepalive@openssh.com", wait=True)
        timer.cancel()
        transport.join(2)


def _hear_request(channel: paramiko.Channel, message: paramiko.Message) -> None:
    ahead = paramiko.Message(message.get_remainder())
    if ahead.get_text() == "exit-signal":
        ahead.get_boolean()
        channel.exit_status = 128 + _signal_number(ahead.get_text())
        channel.status_event.set()
        return
    paramiko.Channel._handle_request(channel, message)  # type: ignore[attr-defined]  # noqa: SLF001


class _Transport(paramiko.Transport):
    """paramiko's, that also hears by which signal a command ended.

    The name of its table is private: paramiko is pinned, and tests/loopback holds it.
    """

    _channel_handler_table = {  # noqa: RUF012
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]  # noqa: SLF001
        MSG_CHANNEL_REQUEST: _hear_request,
    }


def _signal_number(name: str) -> int:
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        return 127

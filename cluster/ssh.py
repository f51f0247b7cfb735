"""A machine over SSH, by Fabric and paramiko; the only file that names them. Never a judgment on what it answers.

Trust: keys come from the pinned file alone, on every hop; nobody is asked and nothing is added (`cluster.trust`).
Hops are resolved here, not by Fabric, which would visit a ProxyJump list backwards and accept any key on the way.
"""

from __future__ import annotations

import base64
import getpass
import glob
import logging
import os
import random
import select
import shlex
import signal
import socket
import subprocess
import tempfile
import termios
import threading
import time
import tty as terminal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import paramiko
from fabric.config import Config
from fabric.connection import Connection
from paramiko.auth_strategy import AuthFailure
from paramiko.common import MSG_CHANNEL_REQUEST
from paramiko.pkey import PublicBlob, UnknownKeyType
from paramiko.ssh_exception import IncompatiblePeer, MessageOrderError, PartialAuthentication, UnableToAuthenticate

from cluster.command import Command, Result, describe, script
from cluster.errors import ClusterError, EngineError, InputError, NodeError, UnreachableError, UntrustedError
from cluster.transport import Channel, Sink
from cluster.trust import SSH_PORT, Address, HostKey, changed, pinned, unknown

if TYPE_CHECKING:
    from typing_extensions import Buffer

# paramiko's threads log tracebacks of ordinary ends; without a handler Python would print them.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

USER_CONFIG = Path("~/.ssh/config")
SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
DEFAULT_IDENTITIES = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")

SESSIONS = 8  # sshd allows ten per connection (MaxSessions)
LASTING_SESSIONS = 4  # of these, for what may last: the rest is always free for short commands
CHUNK = 256 * 1024
PACKET = 32 * 1024 - 64  # what sshd takes in one packet, less paramiko's own margin
WINDOW = 8 * 1024 * 1024  # what the machine may send before we have read it; read whole, since paramiko moves the rest
NOT_FOUND = 127  # a shell's exit status where there is no such program
LONGEST_WIRE = 131_000  # one argument of the login shell: Linux's MAX_ARG_STRLEN
MOST_HOPS = 8
ATTEMPTS = 4  # one, and three more for a server that drops new connections (MaxStartups)
PATIENCE = 15.0  # seconds without any answer through a jump host until the machine counts as lost

# paramiko prefers CTR with a separate MAC; GCM is one pass, and faster.
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
_RSA = ("rsa-sha2-512", "rsa-sha2-256")
_ECDSA = ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")
_KEY_TYPES = ("ssh-ed25519", *_ECDSA, "ssh-rsa")

T = TypeVar("T")
E = TypeVar("E", bound=NodeError)

# What each of paramiko's errors means to a user, where nothing better is known; a test holds the list complete.
MEANINGS: dict[type[paramiko.SSHException], str] = {
    paramiko.SSHException: "the SSH connection failed",
    paramiko.AuthenticationException: "permission denied",
    paramiko.PasswordRequiredException: "the key is locked by a passphrase",
    paramiko.BadAuthenticationType: "the server takes no public keys",
    PartialAuthentication: "the server asks for more than a key",
    UnableToAuthenticate: "permission denied",
    AuthFailure: "permission denied",
    paramiko.ChannelException: "the server opens no more sessions",
    paramiko.BadHostKeyException: "the host key is not the pinned one",
    IncompatiblePeer: "the server and this program have no algorithm in common",
    paramiko.ProxyCommandFailure: "the ProxyCommand failed",
    paramiko.CouldNotCanonicalize: "the host name cannot be made canonical, as ~/.ssh/config asks",
    paramiko.ConfigParseError: "~/.ssh/config cannot be read",
    MessageOrderError: "the server broke the order of the key exchange",
}

# Runs a command and reads the session's standard input beside it. The input's end, by our hand or because the
# connection broke, is the command's end: without a terminal sshd would let it run on.
# $1: how many bytes of the input belong to the command. The group is ours alone: sshd gave us a session of our own.
_WATCHED = """\
exec 3<&0 </dev/null
{ sh -c 'echo "$PPID"'
  [ "$1" = 0 ] || head -c "$1" <&3
  exec >/dev/null 2>&1
  while read -r line <&3; do :; done
  trap '' TERM; kill -s TERM -- "-$$"; sleep 2; kill -s KILL -- "-$$"
} | { read -r watcher; shift; "$@" 3<&-; code=$?; kill -s KILL "$watcher"; exit "$code"; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long each step of a connection may take, in seconds, and how soon a dead one is noticed."""

    connect: float = 5.0
    banner: float = 5.0
    auth: float = 5.0
    dead: float = 6.0


LIMITS = Limits()


class SshTransport:
    """A machine over SSH, with keys that are pinned in `known_hosts`; the Transport contract.

    Sessions share a connection, at most eight; what may last (stream, send, interact, dial) takes at most four of
    them and opens further connections, so that a short command never waits for a log that is followed.
    """

    def __init__(
        self, address: Address, *, known_hosts: Path, limits: Limits = LIMITS, ssh_config: Path = USER_CONFIG
    ) -> None:
        self.node = address.node
        self._address, self._ssh_config = address, ssh_config
        self._known_hosts, self._limits = known_hosts, limits
        self._links: list[_Link] = []
        self._lock = threading.Lock()

    def open(self) -> None:
        """Connect now; harmless when connected."""
        self._link(lasting=False)

    def run(self, command: Command, *, timeout: float | None = None) -> Result:
        """Run a command to its end; no end within `timeout` seconds is an `UnreachableError`."""
        with self._session(command.shell()) as session, session.deadline(timeout, command):
            return session.exchange((command.stdin,))

    def send(self, command: Command, chunks: Iterable[bytes]) -> Result:
        """Run a command with `chunks` as its standard input; what it leaves unread when it ends is dropped."""
        with self._session(command.shell(), lasting=True) as session:
            return session.exchange(chunks)

    def stream(self, command: Command, sink: Sink, *, stop: Callable[[], bool]) -> int:
        """Hand over standard output as it comes, until the command's end or `stop()`; standard error is dropped."""
        watched = script(_WATCHED, str(len(command.stdin)), *command.argv)
        with self._session(watched.shell(), lasting=True) as session:
            threading.Thread(target=session.feed, args=((command.stdin,),), daemon=True).start()
            threading.Thread(target=session.drain_errors, daemon=True).start()
            while not stop():
                data = session.receive(wait=0.1)
                if data:
                    sink(data)
                elif data is not None:
                    return session.code()
            session.hang_up()
            return -1

    def interact(self, command: Command, *, tty: bool) -> int:
        """Run a command on the user's own standard streams; with `tty`, on a terminal like theirs."""
        with self._session(command.shell(), lasting=True, tty=tty) as session:
            return session.converse(tty=tty)

    def dial_docker(self) -> Channel:
        """A socket whose other end is the machine's Docker Engine, as the docker command there finds it."""
        stack = ExitStack()
        line = Command(argv=("docker", "system", "dial-stdio")).shell()
        return _dial(stack.enter_context(self._session(line, lasting=True)), stack.close)

    def close(self) -> None:
        """Let go of the machine. What runs there goes on."""
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()

    @contextmanager
    def _session(self, line: str, *, lasting: bool = False, tty: bool = False) -> Iterator[_Session]:
        link = self._link(lasting=lasting)
        with ExitStack() as stack:
            if lasting:
                stack.callback(self._let_go, link)
            stack.enter_context(link.sessions)
            session = link.begin(_wire(line), tty=tty)
            stack.callback(session.close)
            yield session

    def _link(self, *, lasting: bool) -> _Link:
        with self._lock:
            for link in [link for link in self._links if not link.alive]:
                self._links.remove(link)
                link.close()
            for link in self._links:
                if not lasting or link.lasting < LASTING_SESSIONS:
                    break
            else:
                way = route(self._address, self._ssh_config, self._limits)
                link = _Link(way, self._known_hosts, self._limits)
                self._links.append(link)
            link.lasting += lasting
            return link

    def _let_go(self, link: _Link) -> None:
        with self._lock:
            link.lasting -= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One connection on the way to a node, with everything that ~/.ssh/config has to say on it."""

    node: str
    jump: bool
    key_name: str
    host: str
    port: int
    user: str
    identities: tuple[str, ...]
    only_identities: bool
    proxy: str | None
    timeout: float

    @property
    def where(self) -> str:
        """The place, for an error."""
        place = f"{self.host}:{self.port}" if ":" not in self.host else f"[{self.host}]:{self.port}"
        return f"node {self.node}, jump host {place}" if self.jump else f"node {self.node} ({place})"


class _Link:
    """One connection, hop by hop."""

    def __init__(self, way: tuple[Hop, ...], known_hosts: Path, limits: Limits) -> None:
        self.sessions = threading.BoundedSemaphore(SESSIONS)
        self.lasting = 0
        self._hop = way[-1]
        self._stack = ExitStack()
        self._transport = _connect(way, known_hosts, limits, self._stack)

    @property
    def alive(self) -> bool:
        """Whether it can still carry a session."""
        return self._transport.is_active()

    def begin(self, wire: str, *, tty: bool) -> _Session:
        """Start a command in a session of its own."""
        with _translated(self._hop):
            channel = self._transport.open_session(window_size=WINDOW, timeout=PATIENCE)
            try:
                if tty:
                    width, height = _terminal_size()
                    channel.get_pty(os.environ.get("TERM", "xterm"), width, height)
                channel.exec_command(wire)
            except BaseException:
                channel.close()
                raise
        return _Session(channel=channel, hop=self._hop)

    def close(self) -> None:
        """Close it and the jump hosts' connections."""
        self._stack.close()


@dataclass(kw_only=True)
class _Session:
    """One command that runs: its streams and its end."""

    channel: paramiko.Channel
    hop: Hop
    late: UnreachableError | None = None
    errors: list[bytes] = field(default_factory=list)

    @contextmanager
    def deadline(self, seconds: float | None, command: Command) -> Iterator[None]:
        """Close the session when it lasts too long; its readers then see an end, and `code` says why."""
        if seconds is None:
            yield
            return

        def end() -> None:
            self.late = _unreachable(
                self.hop,
                f"no answer within {seconds:g} s",
                detail=(f"asked: {describe(command.argv)}",),
                next_step="look at the machine's load and disks; the command may still be running there",
            )
            self.channel.close()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def exchange(self, chunks: Iterable[bytes]) -> Result:
        """Feed the command and hear it to its end, all three streams at once."""
        output: list[bytes] = []
        readers = [
            threading.Thread(target=self.drain_output, args=(output,), daemon=True),
            threading.Thread(target=self.drain_errors, daemon=True),
        ]
        for reader in readers:
            reader.start()
        self.feed(chunks)
        self._shut()
        for reader in readers:
            reader.join()
        return Result(code=self.code(), stdout=b"".join(output), stderr=b"".join(self.errors))

    def feed(self, chunks: Iterable[bytes]) -> None:
        """Write to standard input, as fast as it is read; stop without a word when the command has ended."""
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                try:
                    sent = self.channel.send(bytes(view[:PACKET]))
                except TimeoutError:  # `receive` bounds every wait on the channel
                    continue
                except (OSError, EOFError, paramiko.SSHException):
                    return
                if not sent:
                    return
                view = view[sent:]

    def drain_output(self, pieces: list[bytes]) -> None:
        """Collect standard output to its end."""
        while data := _patiently(self.channel.recv):
            pieces.append(data)

    def drain_errors(self) -> None:
        """Collect standard error to its end."""
        while data := _patiently(self.channel.recv_stderr):
            self.errors.append(data)

    def receive(self, *, wait: float) -> bytes | None:
        """Some standard output; empty at its end, None when there was none within `wait` seconds."""
        self.channel.settimeout(wait)
        try:
            return self.channel.recv(WINDOW)
        except TimeoutError:
            return None

    def code(self) -> int:
        """Wait for the exit status; an end without one is a lost connection, however normal it looks."""
        status = self.channel.recv_exit_status()
        if self.late:
            raise self.late
        if status < 0:
            raise _lost(self.hop)
        return status

    def hang_up(self) -> None:
        """End standard input, which ends a watched command, and wait for its end, though not for long."""
        self._shut()
        patience = time.monotonic() + 3
        while time.monotonic() < patience and self.receive(wait=0.1) != b"":
            pass
        self.channel.status_event.wait(1)

    def converse(self, *, tty: bool) -> int:
        """Pass bytes between the command and our own standard streams."""
        reader = None if tty else threading.Thread(target=self._copy_errors, daemon=True)
        if reader:
            reader.start()
        with _raw_terminal(active=tty):
            threading.Thread(target=self._copy_input, daemon=True).start()
            size = _terminal_size()
            while (data := self.receive(wait=0.2)) != b"":
                if data:
                    _write_all(1, data)
                if tty and size != (size := _terminal_size()):
                    with suppress(paramiko.SSHException):
                        self.channel.resize_pty(*size)
        if reader:
            reader.join()
        return self.code()

    def close(self) -> None:
        """End it."""
        # A dead connection cannot be told, and need not be.
        with suppress(OSError, EOFError, paramiko.SSHException):
            self.channel.close()

    def _shut(self) -> None:
        with suppress(OSError, EOFError, paramiko.SSHException):
            self.channel.shutdown_write()

    def _copy_input(self) -> None:
        # Waits with a bound, so that no keystroke is swallowed after the command's end.
        with suppress(OSError, ValueError):
            while not self.channel.closed:
                if select.select([0], [], [], 0.2)[0]:
                    data = os.read(0, CHUNK)
                    if not data:
                        break
                    self.feed((data,))
        self._shut()

    def _copy_errors(self) -> None:
        while data := _patiently(self.channel.recv_stderr):
            _write_all(2, data)


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


# --- the way to a node ------------------------------------------------------------------------------------------------


def hops(address: Address, *, ssh_config: Path = USER_CONFIG) -> tuple[Address, ...]:
    """Every machine on the way to a node, the node last: whose keys must be pinned, in the order to pin them."""
    return tuple(place for place, _ in _way(address, _config_text(ssh_config), MOST_HOPS))


def route(address: Address, ssh_config: Path, limits: Limits) -> tuple[Hop, ...]:
    """The way to a node, with ~/.ssh/config read into it."""
    way = _way(address, _config_text(ssh_config), MOST_HOPS)
    return tuple(_hop(place, options, limits, jump=place is not way[-1][0]) for place, options in way)


def _way(address: Address, text: str, most: int) -> tuple[tuple[Address, dict[str, object]], ...]:
    if not most:
        raise InputError(
            f"the way to node {address.node} has more than {MOST_HOPS} jump hosts",
            next_step="look for a ProxyJump in ~/.ssh/config that leads back to itself",
        )
    options = _options(address, text)
    jump = address.jump
    if jump is None and isinstance(said := options.get("proxyjump"), str):
        # A pattern such as `Host *` also matches the jump host, which must not be its own way.
        last_hop = _options(_jump(said.rpartition(",")[2], address), text)
        jump = None if _place(last_hop) == _place(options) else said
    # `none` turns a ProxyJump of the configuration off, there as in ssh.
    if jump is None or jump.lower() == "none":
        return ((address, options),)
    before, _, last = jump.rpartition(",")
    via = replace(_jump(last, address), jump=before or None)
    return (*_way(via, text, most - 1), (replace(address, jump=jump), options | {"proxycommand": None}))


def _place(options: dict[str, object]) -> tuple[str, int]:
    return str(options["hostname"]), int(str(options.get("port") or SSH_PORT))


def _jump(text: str, address: Address) -> Address:
    """A jump host from its text. One that the inventory names is reached by the inventory's key."""
    user, _, place = text.strip().removeprefix("ssh://").rpartition("@")
    host, port = place, ""
    if place.startswith("["):
        host, _, port = place[1:].partition("]")
        port = port.removeprefix(":")
    elif place.count(":") == 1:
        host, _, port = place.partition(":")
    if not host or not (port.isdecimal() or not port) or host.startswith("-"):
        raise InputError(f"{text!r} is no jump host for node {address.node}", next_step="write user@host:port")
    identity = address.identity_file if address.jump else None
    return Address(
        node=address.node, host=host, port=int(port) if port else None, user=user or None, identity_file=identity
    )


def _options(address: Address, text: str) -> dict[str, object]:
    # The first value counts, so what the inventory says stands first, as on ssh's command line.
    said = [f"Port {address.port}"] if address.port else []
    said += [f"User {address.user}"] if address.user else []
    try:
        return dict(paramiko.SSHConfig.from_text("\n".join([*said, text])).lookup(address.host))
    except (paramiko.SSHException, ValueError, KeyError) as error:
        raise InputError(f"~/.ssh/config cannot be used for {address.host}: {error}") from error


def _hop(address: Address, options: dict[str, object], limits: Limits, *, jump: bool) -> Hop:
    files = options.get("identityfile")
    said = [address.identity_file] if address.identity_file else []
    said += [str(file) for file in files] if isinstance(files, list) else []
    seconds = str(options.get("connecttimeout") or "")
    host, port = _place(options)
    proxy = options.get("proxycommand")
    return Hop(
        node=address.node,
        jump=jump,
        key_name=address.key_name,
        host=host,
        port=port,
        user=str(options.get("user") or getpass.getuser()),
        identities=tuple(said) or DEFAULT_IDENTITIES,
        only_identities=str(options.get("identitiesonly")).lower() == "yes",
        proxy=str(proxy) if proxy else None,
        timeout=float(seconds) if seconds.isdecimal() else limits.connect,
    )


def _config_text(user_config: Path) -> str:
    texts = (_read_config(path.expanduser(), MOST_HOPS) for path in (user_config, SYSTEM_CONFIG))
    # `Host *` ends the last block of one file before the next begins.
    return "\nHost *\n".join(texts)


def _read_config(path: Path, depth: int) -> str:
    """A configuration with its `Include`s put in, which paramiko would pass over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if depth else []
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise InputError(f"the SSH configuration cannot be read: {error.strerror}", where=str(path)) from error
    text, block = [], "Host *"
    for line in lines:
        keyword, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        if keyword.lower() == "include":
            included = (_read_config(file, depth - 1) for file in _included(rest, path.parent))
            text += [*included, block]
            continue
        if keyword.lower() in ("host", "match"):
            block = line
        text.append(line)
    return "\n".join(text)


def _included(patterns: str, folder: Path) -> Iterator[Path]:
    for pattern in shlex.split(patterns):
        yield from map(Path, sorted(glob.glob(str(folder / Path(pattern).expanduser()))))  # noqa: PTH207


# --- connecting -------------------------------------------------------------------------------------------------------


def _connect(way: tuple[Hop, ...], known_hosts: Path, limits: Limits, stack: ExitStack) -> paramiko.Transport:
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
    keys = tuple(key for key in pinned(known_hosts, hop.key_name) if key.type in _KEY_TYPES)
    if not keys:
        raise _at(hop, unknown(hop.node))

    def attempt() -> paramiko.Transport:
        connection = _connection(hop, keys, limits)
        undo.callback(connection.client.close)
        connection.connect_kwargs["sock"] = _socket(hop, before, limits)
        connection.open()
        transport: paramiko.Transport = connection.transport
        return transport

    transport = _insist(hop, limits, attempt)
    transport.set_keepalive(5)
    if before or hop.proxy:
        threading.Thread(target=_watch, args=(transport,), daemon=True).start()
    return transport


def _insist(hop: Hop, limits: Limits, attempt: Callable[[], T]) -> T:
    """Try again where a busy server drops a new connection at once; never where it was slow, or has seen a key."""
    for round_ in range(1, ATTEMPTS):
        began = time.monotonic()
        try:
            with _translated(hop):
                return attempt()
        except _DroppedError:
            if time.monotonic() - began >= limits.banner:
                raise
        time.sleep(random.SystemRandom().uniform(0.1, 0.3) * 2**round_)
    with _translated(hop):
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
            "transport_factory": _factory(tuple(key.type for key in keys), limits),
            "auth_strategy": _Keys(hop),
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


def _factory(types: tuple[str, ...], limits: Limits) -> Callable[..., paramiko.Transport]:
    """Makes transports that ask for these types of host key only: so another type is no mismatch."""
    wanted = [name for kind in types for name in (_RSA if kind == "ssh-rsa" else (kind,))]

    def make(sock: socket.socket, **_options: object) -> paramiko.Transport:
        transport = _Transport(sock, default_window_size=WINDOW)
        transport.handshake_timeout = limits.banner
        transport.banner_timeout = limits.banner
        security = transport.get_security_options()
        security.key_types = wanted
        security.ciphers = _CIPHERS
        return transport

    return make


def _socket(hop: Hop, before: paramiko.Transport | None, limits: Limits) -> socket.socket | paramiko.Channel:
    if not before:
        return _proxy(hop.proxy) if hop.proxy else _dial_tcp(hop, limits)
    try:
        return before.open_channel("direct-tcpip", (hop.host, hop.port), ("", 0), timeout=hop.timeout)
    except paramiko.ChannelException as error:
        raise _unreachable(
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
    with theirs, tempfile.TemporaryFile() as said:
        line = ["sh", "-c", f"exec {command}"]
        process = subprocess.Popen(line, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=said)
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


@dataclass(frozen=True, slots=True)
class _Keys:
    """Authentication by key: each key is offered once, in OpenSSH's order, and nothing else is tried."""

    hop: Hop

    def authenticate(self, transport: paramiko.Transport) -> None:
        """Offer the keys; called by paramiko, after the host key was verified."""
        tried: list[str] = []
        agent = _agent()
        try:
            for name, key in self._offers(agent, tried):
                tried.append(name)
                if self._offer(transport, key):
                    return
        finally:
            if agent:
                agent.close()
        raise self._denied(tuple(tried))

    def _offer(self, transport: paramiko.Transport, key: paramiko.PKey) -> bool:
        try:
            rest = transport.auth_publickey(self.hop.user, key)
        except paramiko.BadAuthenticationType as error:
            raise self._refused("the server takes no public keys", str(error)) from error
        except (OSError, EOFError, paramiko.SSHException) as error:
            if "timeout" in str(error):
                raise self._refused("no answer to a key", "") from error
            if not transport.is_active():
                raise self._refused("the server closed the connection while keys were offered", "") from error
            return False
        if rest:
            raise self._refused(f"the server asks for more than a key: {', '.join(rest)}", "")
        return True

    def _offers(self, agent: paramiko.Agent | None, tried: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
        held = {key.asbytes(): key for key in agent.get_keys()} if agent else {}
        offered: set[bytes] = set()
        for file in self.hop.identities:
            key = _load_key(file, held)
            if isinstance(key, str):
                if key:
                    tried.append(f"{file} ({key})")
            elif key.asbytes() not in offered:
                offered.add(key.asbytes())
                yield file, key
        for blob, key in held.items():
            if blob not in offered and not self.hop.only_identities:
                yield f"agent: {key.comment}", key

    def _denied(self, tried: tuple[str, ...]) -> UnreachableError:
        hop = self.hop
        return _unreachable(
            hop,
            f"permission denied for user {hop.user!r}",
            detail=(f"tried keys: {', '.join(tried) or 'none were found'}",),
            next_step=f"ssh-copy-id {hop.user}@{hop.host}, or set user or identity_file for {hop.node} in cluster.yaml",
        )

    def _refused(self, what: str, detail: str) -> UnreachableError:
        advice = f"{_try_ssh(self.hop)}; too many keys in the agent are a common cause"
        return _unreachable(self.hop, what, detail=(detail,) if detail else (), next_step=advice)


def _agent() -> paramiko.Agent | None:
    try:
        return paramiko.Agent()
    except (paramiko.SSHException, OSError):
        return None


def _load_key(file: str, held: dict[bytes, paramiko.AgentKey]) -> paramiko.PKey | str:
    """The key in a file, or the agent's copy of it; else why not, in words (empty: a default that is not there)."""
    path = Path(file).expanduser()
    with suppress(OSError, ValueError, paramiko.SSHException):
        public = PublicBlob.from_file(f"{path}.pub")
        if public.key_blob in held:
            return held[public.key_blob]
    try:
        return paramiko.PKey.from_path(path)
    except FileNotFoundError:
        return "" if file in DEFAULT_IDENTITIES else "no such file"
    except OSError as error:
        return error.strerror or "unreadable"
    except TypeError:  # cryptography's word for a passphrase that is missing
        return "locked by a passphrase: run ssh-add"
    except (ValueError, paramiko.SSHException, UnknownKeyType):
        return "not a key that can be used here"


# --- host keys --------------------------------------------------------------------------------------------------------


def scan_host_keys(
    address: Address, *, known_hosts: Path, limits: Limits = LIMITS, ssh_config: Path = USER_CONFIG
) -> tuple[HostKey, ...]:
    """The keys that a machine shows, one of each type; nobody is authenticated and nothing is asked of it.

    Jump hosts on the way must be pinned already: scan and pin `hops(address)` in their order.
    """
    way = route(address, ssh_config, limits)
    with ExitStack() as stack:
        before = _connect(way[:-1], known_hosts, limits, stack) if way[1:] else None
        families = (("ssh-ed25519",), _ECDSA, ("ssh-rsa",))
        shown = [_shown(way[-1], family, before, limits) for family in families]
    return tuple(key for key in shown if key)


def _shown(hop: Hop, types: tuple[str, ...], before: paramiko.Transport | None, limits: Limits) -> HostKey | None:
    """The machine's key of one of these types, if it has one."""

    def attempt() -> HostKey | None:
        transport = _factory(types, limits)(_socket(hop, before, limits))
        try:
            transport.start_client()
            return _key(hop, transport.get_remote_server_key())
        except IncompatiblePeer as error:
            if "host key" in str(error):
                return None
            raise
        finally:
            transport.close()

    return _insist(hop, limits, attempt)


def _key(hop: Hop, key: paramiko.PKey) -> HostKey:
    return HostKey(name=hop.key_name, type=key.get_name(), base64=key.get_base64())


# --- errors -----------------------------------------------------------------------------------------------------------


class _DroppedError(UnreachableError):
    """The server closed a new connection before anyone was authenticated: worth another try."""


@contextmanager
def _translated(hop: Hop) -> Iterator[None]:
    """The seam: no exception of socket, paramiko or Fabric goes further."""
    try:
        yield
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise translate(hop, error) from error


def translate(hop: Hop, error: BaseException) -> NodeError:
    """What an error of the connection means to a user."""
    # paramiko makes a sentence of whatever happened while it waited for the banner; the event is in the context.
    if type(error) is paramiko.SSHException and "banner" in str(error):
        return _no_banner(hop, error.__context__)
    match error:
        case paramiko.BadHostKeyException():
            return _at(hop, changed(hop.node, (_key(hop, error.expected_key),), (_key(hop, error.key),)))
        case IncompatiblePeer() if "host key" in str(error):
            gone = UntrustedError(
                hop.node,
                "the machine shows no host key of the pinned type any more; nothing was sent",
                next_step="find out why; if the machine was reinstalled, run `launcher trust --replace`",
            )
            return _at(hop, gone)
        case paramiko.SSHException():
            what = next(MEANINGS[kind] for kind in type(error).__mro__ if kind in MEANINGS)
            return _unreachable(hop, what, detail=(str(error),), next_step=_ADVICE.get(type(error)) or _try_ssh(hop))
        case EOFError() | ConnectionResetError() | BrokenPipeError():
            return _dropped(hop)
    return _not_connected(hop, error)


_ADVICE: dict[type[BaseException], str] = {
    paramiko.ChannelException: "raise MaxSessions in the machine's sshd_config to its default of 10",
}


def _no_banner(hop: Hop, event: BaseException | None) -> NodeError:
    if not isinstance(event, TimeoutError):
        return _dropped(hop)
    return _unreachable(
        hop,
        "sshd accepts the connection but says nothing",
        next_step="sshd or the machine hangs: look at its console; or another service listens on that port",
    )


def _dropped(hop: Hop) -> _DroppedError:
    error = _DroppedError(
        hop.node,
        "the server closed the connection before authentication",
        next_step="sshd may be busy (MaxStartups), penalise this address (PerSourcePenalties) or deny it by a firewall",
    )
    error.where = hop.where
    return error


def _not_connected(hop: Hop, error: BaseException) -> UnreachableError:
    match error:
        case socket.gaierror():
            return _unreachable(
                hop,
                f"the name {hop.host!r} was not found",
                detail=(str(error.strerror),),
                next_step="write the address into cluster.yaml, or look at DNS and /etc/hosts",
            )
        case ConnectionRefusedError():
            return _unreachable(
                hop,
                f"the connection to port {hop.port} was refused",
                next_step=f"start sshd on the machine, or set the right port for {hop.node} in cluster.yaml",
            )
        case TimeoutError():
            return _unreachable(
                hop,
                f"no answer within {hop.timeout:g} s (timed out)",
                next_step="is the machine on, is the address right, does a firewall drop port 22?",
            )
    return _unreachable(hop, "no connection", detail=(str(error),), next_step=_try_ssh(hop))


def _lost(hop: Hop) -> UnreachableError:
    return _unreachable(
        hop,
        "the connection was lost",
        next_step="look at the machine and the network; what ran there may have gone on",
    )


def _unreachable(hop: Hop, what: str, *, detail: tuple[str, ...] = (), next_step: str) -> UnreachableError:
    return _at(hop, UnreachableError(hop.node, what, detail=detail, next_step=next_step))


def _at(hop: Hop, error: E) -> E:
    error.where = hop.where
    return error


def _try_ssh(hop: Hop) -> str:
    port = "" if hop.port == SSH_PORT else f" -p {hop.port}"
    return f"try: ssh -v{port} {hop.user}@{hop.host}"


# --- bytes ------------------------------------------------------------------------------------------------------------


def _wire(line: str) -> str:
    """A line for the login shell, whichever it is: fish, csh and zsh quote otherwise than POSIX does.

    They agree on single quotes around letters and simple signs, so all else travels as printf's octal numbers.
    """
    wire = f"""exec sh -c 'eval "exec $(printf "$0")"' '{line.translate(_OCTAL)}'"""
    if len(wire.encode()) > LONGEST_WIRE:
        raise InputError(
            f"the command is {len(wire.encode())} bytes long when quoted; at most {LONGEST_WIRE} can be sent",
            next_step="put long arguments into a file",
        )
    return wire


_OCTAL = str.maketrans({"\\": r"\134", "\n": r"\012", "!": r"\041", "'": r"\047", "%": "%%"})


class _Dialed(socket.socket):
    """Our end of a socket pair; at the end of the bytes it says whether that was the end, or a failure."""

    failure: ClusterError | None = None

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Receive; a failed dial is an error, not an end."""
        data = super().recv(size, flags)
        if not data and self.failure:
            raise self.failure
        return data

    def recv_into(self, buffer: Buffer, size: int = 0, flags: int = 0, /) -> int:
        """Receive into a buffer, as `makefile` does."""
        count = super().recv_into(buffer, size, flags)
        if not count and self.failure:
            raise self.failure
        return count


def _dial(session: _Session, release: Callable[[], None]) -> _Dialed:
    """A real socket for a session: an HTTP client wants more of a socket than a paramiko channel can do."""
    pair, theirs = socket.socketpair()
    ours = _Dialed(fileno=pair.detach())
    threading.Thread(target=_pump_down, args=(session, theirs, ours), daemon=True).start()
    threading.Thread(target=_pump_up, args=(session, theirs, release), daemon=True).start()
    return ours


def _pump_down(session: _Session, theirs: socket.socket, ours: _Dialed) -> None:
    errors = threading.Thread(target=session.drain_errors, daemon=True)
    errors.start()
    with suppress(OSError):
        while data := _patiently(session.channel.recv):
            theirs.sendall(data)
    errors.join(1)
    session.channel.status_event.wait(1)
    ours.failure = _failure(session)
    with suppress(OSError):
        theirs.shutdown(socket.SHUT_WR)


def _failure(session: _Session) -> NodeError | None:
    """Why the dial ended, where it did not end well."""
    status = session.channel.exit_status
    if status > 0:
        said = Result(code=status, stdout=b"", stderr=b"".join(session.errors)).tail()
        what = "there is no docker command" if status == NOT_FOUND else "the Docker engine cannot be reached"
        advice = f"see `docker info` as {session.hop.user} on the machine: is it installed, running and permitted?"
        return _at(session.hop, EngineError(session.hop.node, what, detail=said, next_step=advice))
    return None if session.channel.get_transport().is_active() else _lost(session.hop)


def _pump_up(session: _Session, theirs: socket.socket, release: Callable[[], None]) -> None:
    with theirs:
        with suppress(OSError):
            while data := theirs.recv(CHUNK):
                session.feed((data,))
        with suppress(OSError, EOFError, paramiko.SSHException):
            session.channel.shutdown_write()
        # The user is done with writing, but may still read: the session lasts until both ends are shut.
        hung_up = select.poll()
        hung_up.register(theirs, 0)
        hung_up.poll()
    release()


def _patiently(read: Callable[[int], bytes]) -> bytes:
    while True:
        try:
            return read(WINDOW)
        except TimeoutError:
            continue


def _terminal_size() -> tuple[int, int]:
    try:
        return os.get_terminal_size(0)
    except OSError:
        return (80, 24)


@contextmanager
def _raw_terminal(*, active: bool) -> Iterator[None]:
    if not active or not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    try:
        terminal.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]

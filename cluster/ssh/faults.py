"""What an error of the connection means to a user: the seam that no exception of paramiko or socket passes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import paramiko
from paramiko.auth_strategy import AuthFailure
from paramiko.ssh_exception import IncompatiblePeer, MessageOrderError, PartialAuthentication, UnableToAuthenticate

from cluster.errors import NodeError, UnreachableError, UntrustedError
from cluster.ssh.route import Hop
from cluster.trust import SSH_PORT, HostKey, changed

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


class DroppedError(UnreachableError):
    """The server closed a new connection before anyone was authenticated: worth another try."""


@contextmanager
def translated(hop: Hop) -> Iterator[None]:
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
            return at(hop, changed(hop.node, (read_key(hop, error.expected_key),), (read_key(hop, error.key),)))
        case IncompatiblePeer() if "host key" in str(error):
            gone = UntrustedError(
                hop.node,
                "the machine shows no host key of the pinned type any more; nothing was sent",
                next_step="find out why; if the machine was reinstalled, run `launcher trust --replace`",
            )
            return at(hop, gone)
        case paramiko.SSHException():
            what = next(MEANINGS[kind] for kind in type(error).__mro__ if kind in MEANINGS)
            return unreachable(hop, what, detail=(str(error),), next_step=_ADVICE.get(type(error)) or try_ssh(hop))
        case EOFError() | ConnectionResetError() | BrokenPipeError():
            return _dropped(hop)
    return _not_connected(hop, error)


_ADVICE: dict[type[BaseException], str] = {
    paramiko.ChannelException: "raise MaxSessions in the machine's sshd_config to its default of 10",
}


def _no_banner(hop: Hop, event: BaseException | None) -> NodeError:
    if not isinstance(event, TimeoutError):
        return _dropped(hop)
    return unreachable(
        hop,
        "sshd accepts the connection but says nothing",
        next_step="sshd or the machine hangs: look at its console; or another service listens on that port",
    )


def _dropped(hop: Hop) -> DroppedError:
    error = DroppedError(
        hop.node,
        "the server closed the connection before authentication",
        next_step="sshd may be busy (MaxStartups), penalise this address (PerSourcePenalties) or deny it by a firewall",
    )
    error.where = hop.where
    return error


def _not_connected(hop: Hop, error: BaseException) -> UnreachableError:
    match error:
        case socket.gaierror():
            return unreachable(
                hop,
                f"the name {hop.host!r} was not found",
                detail=(str(error.strerror),),
                next_step="write the address into cluster.yaml, or look at DNS and /etc/hosts",
            )
        case ConnectionRefusedError():
            return unreachable(
                hop,
                f"the connection to port {hop.port} was refused",
                next_step=f"start sshd on the machine, or set the right port for {hop.node} in cluster.yaml",
            )
        case TimeoutError():
            return unreachable(
                hop,
                f"no answer within {hop.timeout:g} s (timed out)",
                next_step="is the machine on, is the address right, does a firewall drop port 22?",
            )
    return unreachable(hop, "no connection", detail=(str(error),), next_step=try_ssh(hop))


def lost(hop: Hop) -> UnreachableError:
    """The error for a connection that ended under a command."""
    return unreachable(
        hop,
        "the connection was lost",
        next_step="look at the machine and the network; what ran there may have gone on",
    )


def unreachable(hop: Hop, what: str, *, detail: tuple[str, ...] = (), next_step: str) -> UnreachableError:
    """An error that names the hop."""
    return at(hop, UnreachableError(hop.node, what, detail=detail, next_step=next_step))


def at(hop: Hop, error: E) -> E:
    """The error, with the hop for its place."""
    error.where = hop.where
    return error


def try_ssh(hop: Hop) -> str:
    """What a user can do where we know no better."""
    port = "" if hop.port == SSH_PORT else f" -p {hop.port}"
    return f"try: ssh -v{port} {hop.user}@{hop.host}"


def read_key(hop: Hop, key: paramiko.PKey) -> HostKey:
    """A key of paramiko's as ours, under the name that it would be pinned by."""
    return HostKey(name=hop.key_name, type=key.get_name(), base64=key.get_base64())

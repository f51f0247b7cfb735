"""A command as a socket: how the Docker Engine of a machine is spoken to. Never what is said."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import paramiko

from cluster.command import Result
from cluster.errors import ClusterError, EngineError, NodeError
from cluster.ssh.faults import at, lost
from cluster.ssh.session import CHUNK, Session, patiently

if TYPE_CHECKING:
    from typing_extensions import Buffer

NOT_FOUND = 127  # a shell's exit status where there is no such program


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


def dial(session: Session, release: Callable[[], None]) -> _Dialed:
    """A real socket for a session: an HTTP client wants more of a socket than a paramiko channel can do."""
    pair, theirs = socket.socketpair()
    ours = _Dialed(fileno=pair.detach())
    threading.Thread(target=_pump_down, args=(session, theirs, ours), daemon=True).start()
    threading.Thread(target=_pump_up, args=(session, theirs, release), daemon=True).start()
    return ours


def _pump_down(session: Session, theirs: socket.socket, ours: _Dialed) -> None:
    errors = threading.Thread(target=session.drain_errors, daemon=True)
    errors.start()
    with suppress(OSError):
        while data := patiently(session.channel.recv):
            theirs.sendall(data)
    errors.join(1)
    session.channel.status_event.wait(1)
    ours.failure = _failure(session)
    with suppress(OSError):
        theirs.shutdown(socket.SHUT_WR)


def _failure(session: Session) -> NodeError | None:
    """Why the dial ended, where it did not end well."""
    status = session.channel.exit_status
    if status > 0:
        said = Result(code=status, stdout=b"", stderr=b"".join(session.errors)).tail()
        what = "there is no docker command" if status == NOT_FOUND else "the Docker engine cannot be reached"
        advice = f"see `docker info` as {session.hop.user} on the machine: is it installed, running and permitted?"
        return at(session.hop, EngineError(session.hop.node, what, detail=said, next_step=advice))
    return None if session.channel.get_transport().is_active() else lost(session.hop)


def _pump_up(session: Session, theirs: socket.socket, release: Callable[[], None]) -> None:
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

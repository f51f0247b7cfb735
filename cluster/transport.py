"""The seam to a machine: run, stream, send, interact, dial. Two hands stand behind it: `ssh` and `local`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from cluster.command import Command, Result

Sink = Callable[[bytes], None]


class Channel(Protocol):
    """A two-way stream of bytes with the manners of a socket: what an HTTP client needs of one."""

    def sendall(self, data: bytes, /) -> None:
        """Send all of it."""

    def recv(self, size: int, /) -> bytes:
        """Receive up to `size` bytes; empty at the end."""

    def settimeout(self, seconds: float | None, /) -> None:
        """How long `recv` may wait; None for ever."""

    def close(self) -> None:
        """End both directions."""


class Transport(Protocol):
    """One machine, reachable. Safe to use from several threads at once.

    Every call raises `UnreachableError` when the machine does not answer (any more) and `UntrustedError` when it is
    not the machine that was pinned. A command that merely fails is a `Result`, not an error.
    """

    node: str

    @property
    def user(self) -> str:
        """The login name on the machine, as far as we know it without asking there."""

    def open(self) -> None:
        """Connect now, so that a dead node is found before anything is asked of it. Harmless when connected."""

    def run(self, command: Command, *, timeout: float | None = None) -> Result:
        """Run a command to its end. A `timeout` in seconds turns silence into `UnreachableError`."""

    def send(self, command: Command, chunks: Iterable[bytes]) -> Result:
        """Run a command with `chunks` as its standard input: for what is long. The command sees the end of it."""

    def stream(self, command: Command, sink: Sink, *, stop: Callable[[], bool]) -> int:
        """Run a command and hand over its standard output as it comes, until its end or until `stop()` is true.

        Gives back the exit status, or -1 when stopped (the command is then ended on the machine too).
        """

    def pipe(self, command: Command, chunks: Iterable[bytes], sink: Sink) -> int:
        """Run a command with `chunks` as its standard input, and hand over its standard output meanwhile.

        Both as they come: who waits for a word before the next chunk gets it. Gives back the exit status. The
        command's standard input ends when the machine or the connection is gone, too.
        """

    def interact(self, command: Command, *, tty: bool) -> int:
        """Run a command on the user's own standard streams; gives back the exit status."""

    def dial_docker(self) -> Channel:
        """A fresh channel on which the machine's Docker Engine speaks its HTTP API."""

    def close(self) -> None:
        """Let go of the machine. What runs there goes on."""

"""One connection, and one command on it: its streams and its end. Never which command."""

from __future__ import annotations

import os
import select
import termios
import threading
import time
import tty as terminal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import paramiko

from cluster.command import Command, Result, describe
from cluster.errors import InputError, UnreachableError
from cluster.ssh.connect import PATIENCE, WINDOW, connect
from cluster.ssh.faults import lost, translated, unreachable
from cluster.ssh.route import Hop, Limits

SESSIONS = 8  # sshd allows ten per connection (MaxSessions)
PACKET = 32 * 1024 - 64  # what sshd takes in one packet, less paramiko's own margin
CHUNK = 256 * 1024
LONGEST_WIRE = 131_000  # one argument of the login shell: Linux's MAX_ARG_STRLEN


class Link:
    """One connection, hop by hop."""

    def __init__(self, way: tuple[Hop, ...], known_hosts: Path, limits: Limits) -> None:
        self.sessions = threading.BoundedSemaphore(SESSIONS)
        self.lasting = 0
        self._hop = way[-1]
        self._stack = ExitStack()
        self._transport = connect(way, known_hosts, limits, self._stack)

    @property
    def alive(self) -> bool:
        """Whether it can still carry a session."""
        return self._transport.is_active()

    def begin(self, wire: str, *, tty: bool) -> Session:
        """Start a command in a session of its own."""
        with translated(self._hop):
            channel = self._transport.open_session(window_size=WINDOW, timeout=PATIENCE)
            try:
                if tty:
                    width, height = _terminal_size()
                    channel.get_pty(os.environ.get("TERM", "xterm"), width, height)
                channel.exec_command(wire)
            except BaseException:
                channel.close()
                raise
        return Session(channel=channel, hop=self._hop)

    def close(self) -> None:
        """Close it and the jump hosts' connections."""
        self._stack.close()


@dataclass(kw_only=True)
class Session:
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
            self.late = unreachable(
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
        self.pour(chunks)
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

    def pour(self, chunks: Iterable[bytes]) -> None:
        """Feed the command all there is, and end its standard input."""
        self.feed(chunks)
        self._shut()

    def drain_output(self, pieces: list[bytes]) -> None:
        """Collect standard output to its end."""
        while data := patiently(self.channel.recv):
            pieces.append(data)

    def drain_errors(self) -> None:
        """Collect standard error to its end."""
        while data := patiently(self.channel.recv_stderr):
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
            raise lost(self.hop)
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
        while data := patiently(self.channel.recv_stderr):
            _write_all(2, data)


def wire_line(line: str) -> str:
    """A line for the login shell, whichever it is: fish, csh and zsh quote otherwise than POSIX does.

    They agree on single quotes around letters and simple signs, so all else travels as printf's octal numbers.
    """
    wire = f"""exec sh -c 'eval "exec $(printf "$0")"' '{line.translate(OCTAL)}'"""
    if len(wire.encode()) > LONGEST_WIRE:
        raise InputError(
            f"the command is {len(wire.encode())} bytes long when quoted; at most {LONGEST_WIRE} can be sent",
            next_step="put long arguments into a file",
        )
    return wire


OCTAL = str.maketrans({"\\": r"\134", "\n": r"\012", "!": r"\041", "'": r"\047", "%": "%%"})


def patiently(read: Callable[[int], bytes]) -> bytes:
    """Read, however often `receive` on the same channel bounds the wait."""
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

"""This machine, by subprocess: the same contract as a machine over SSH, without one."""

from __future__ import annotations

import errno
import functools
import json
import os
import pwd
import selectors
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cluster.command import Command, Result, describe
from cluster.errors import EngineError, InputError, UnreachableError
from cluster.transport import Channel, Sink

CHUNK = 256 * 1024
GRACE = 2.0  # seconds between asking a command to end and ending it
NOT_FOUND, NOT_PERMITTED = 127, 126  # a shell's exit statuses for a program that cannot be started

DOCKER_SOCKET = Path("/var/run/docker.sock")


class LocalTransport:
    """This machine under a node's name; the Transport contract.

    Each command gets a session of its own, as sshd gives it one: Ctrl-C on our terminal does not reach it, and its
    whole process group can be ended.
    """

    def __init__(self, node: str) -> None:
        self.node = node

    @property
    def user(self) -> str:
        """Who we are here; the number where it has no name."""
        try:
            return pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            return str(os.geteuid())

    def open(self) -> None:
        """Do nothing: it is here."""

    def run(self, command: Command, *, timeout: float | None = None) -> Result:
        """Run a command to its end; no end within `timeout` seconds is an `UnreachableError`."""
        with _started(command) as process:
            if isinstance(process, Result):
                return process
            try:
                output, errors = process.communicate(command.stdin, timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise UnreachableError(
                    self.node,
                    f"no answer within {timeout:g} s",
                    detail=(f"asked: {describe(command.argv)}",),
                    next_step="look at the machine's load and disks",
                ) from error
            return Result(code=_code(process), stdout=output, stderr=errors)

    def send(self, command: Command, chunks: Iterable[bytes]) -> Result:
        """Run a command with `chunks` as its standard input; what it leaves unread when it ends is dropped."""
        with _started(command) as process:
            if isinstance(process, Result):
                return process
            output: list[bytes] = []
            errors: list[bytes] = []
            readers = [_reader(process.stdout, output), _reader(process.stderr, errors)]
            _feed(process, chunks)
            for reader in readers:
                reader.join()
            process.wait()
            return Result(code=_code(process), stdout=b"".join(output), stderr=b"".join(errors))

    def stream(self, command: Command, sink: Sink, *, stop: Callable[[], bool]) -> int:
        """Hand over standard output as it comes, until the command's end or `stop()`; standard error is dropped."""
        with _started(command, errors=subprocess.DEVNULL) as process:
            if isinstance(process, Result):
                return process.code
            threading.Thread(target=_feed, args=(process, (command.stdin,)), daemon=True).start()
            with selectors.DefaultSelector() as ready:
                ready.register(_stdout(process), selectors.EVENT_READ)
                while not stop():
                    if not ready.select(0.1):
                        continue
                    data = os.read(_stdout(process), CHUNK)
                    if not data:
                        process.wait()
                        return _code(process)
                    sink(data)
            return -1

    def pipe(self, command: Command, chunks: Iterable[bytes], sink: Sink) -> int:
        """Feed a command while its standard output is handed over; standard error is dropped."""
        with _started(command, errors=subprocess.DEVNULL) as process:
            if isinstance(process, Result):
                return process.code
            threading.Thread(target=_feed, args=(process, chunks), daemon=True).start()
            while data := os.read(_stdout(process), CHUNK):
                sink(data)
            process.wait()
            return _code(process)

    def interact(self, command: Command, *, tty: bool) -> int:  # noqa: ARG002
        """Run a command on the user's own standard streams; it shares them with us, terminal and all."""
        try:
            process = subprocess.Popen(command.argv)
        except OSError as error:
            result = _not_started(command, error)
            os.write(2, result.stderr)
            return result.code
        with _deaf_to_interrupts():
            process.wait()
        return _code(process)

    def dial_docker(self) -> Channel:
        """A socket of this machine's Docker Engine, the one that the docker command speaks to.

        DOCKER_HOST's, else the chosen context's, else the system's, else the user's own (rootless).
        """
        path = self._docker_socket()
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            raise self._no_engine(path, error) from error
        return sock

    def close(self) -> None:
        """Do nothing: it stays here."""

    def _docker_socket(self) -> Path:
        said = os.environ.get("DOCKER_HOST")
        if host := said or self._context_host:
            scheme, _, path = host.partition("://")
            if scheme != "unix":
                what = f"DOCKER_HOST={host}" if said else f"the Docker context at {host}"
                cure = "unset DOCKER_HOST" if said else "docker context use default"
                raise EngineError(
                    self.node,
                    f"{what} is no local socket",
                    next_step=f"{cure}, or list that machine as a node of its own in cluster.yaml",
                )
            return Path(path)
        rootless = Path(os.environ.get("XDG_RUNTIME_DIR", "/nonexistent")) / "docker.sock"
        return rootless if rootless.exists() and not DOCKER_SOCKET.exists() else DOCKER_SOCKET

    @functools.cached_property
    def _context_host(self) -> str | None:
        """Where the docker command's own context leads; it is asked only if one has been chosen."""
        chosen = os.environ.get("DOCKER_CONTEXT") or _configured_context()
        if chosen in (None, "", "default"):
            return None
        ask = Command(argv=("docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"))
        result = self.run(ask, timeout=10)
        return result.text.strip() if result.ok else None

    def _no_engine(self, path: Path, error: OSError) -> EngineError:
        if isinstance(error, PermissionError):
            return EngineError(
                self.node,
                f"no permission to use the Docker engine at {path}",
                next_step="ask for membership in the group docker (it is as powerful as root), or use rootless Docker",
            )
        return EngineError(
            self.node,
            "no Docker engine on this machine",
            detail=(f"{path}: {error.strerror}",),
            next_step="start Docker, set DOCKER_HOST to its socket, or use `engine: process`",
        )


def _configured_context() -> str | None:
    folder = Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser()
    try:
        said = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return said.get("currentContext") if isinstance(said, dict) else None


@contextmanager
def _started(command: Command, *, errors: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes] | Result]:
    """A process in a group of its own, which does not outlive the block; a result where it cannot be started."""
    command.shell()  # refuses what could not go over SSH either
    try:
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            start_new_session=True,
        )
    except OSError as error:
        yield _not_started(command, error)
        return
    try:
        yield process
    finally:
        _end(process)


def _not_started(command: Command, error: OSError) -> Result:
    """What a shell says of a program that it cannot start."""
    if error.errno == errno.E2BIG:
        raise InputError(
            f"the command {command.argv[0]!r} is too long", next_step="put long arguments into a file"
        ) from error
    code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_PERMITTED
    return Result(code=code, stdout=b"", stderr=f"sh: {command.argv[0]}: {error.strerror}\n".encode())


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        _signal(process, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            with suppress(OSError):
                stream.close()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _code(process: subprocess.Popen[bytes]) -> int:
    code = process.returncode
    return code if code >= 0 else 128 - code


def _stdout(process: subprocess.Popen[bytes]) -> int:
    return process.stdout.fileno() if process.stdout else -1


def _reader(stream: IO[bytes] | None, pieces: list[bytes]) -> threading.Thread:
    def read() -> None:
        # ValueError: closed meanwhile, because the block around it was left.
        with suppress(OSError, ValueError):
            while stream and (data := stream.read(CHUNK)):
                pieces.append(data)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _feed(process: subprocess.Popen[bytes], chunks: Iterable[bytes]) -> None:
    """Write to standard input and end it; stop without a word when the command reads no more."""
    stdin = process.stdin
    if stdin is None:
        return
    for chunk in chunks:
        view = memoryview(chunk)
        try:
            while view:
                view = view[stdin.write(view) :]
        except (OSError, ValueError):
            break
    with suppress(OSError):
        stdin.close()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C is for the command on the terminal, not for us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

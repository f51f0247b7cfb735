"""A real sshd on 127.0.0.1, for one test: its own host key, port, log and list of keys. Never the machine's own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SSHD = Path("/usr/sbin/sshd")
LOCALHOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sshd:
    """A running server."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]
    host: str = LOCALHOST

    @property
    def log(self) -> str:
        """What it has logged, at DEBUG1."""
        return (self.folder / "sshd.log").read_text(errors="replace")

    @property
    def attempts(self) -> int:
        """How many authentications were asked of it."""
        return self.log.count("userauth-request for user")

    @property
    def commands(self) -> int:
        """How many commands it has been given."""
        return self.log.count("Starting session: ")

    def host_key(self, kind: str = "ed25519") -> str:
        """Its public key: type and base64."""
        return " ".join((self.folder / f"host_{kind}.pub").read_text().split()[:2])

    def freeze(self) -> None:
        """Let it hang: the kernel goes on accepting connections, nobody answers."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it with every connection it has."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
        self.drop()
        self.process.terminate()
        self.process.wait()

    def drop(self) -> None:
        """Break the connections that it has, from its side."""
        for child in self._children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def _children(self) -> list[int]:
        with suppress(FileNotFoundError):
            task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            return [int(word) for word in task.read_text().split()]
        return []


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key pair."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", str(path)], check=True, timeout=30
    )
    return path


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_sshd(
    folder: Path,
    *,
    authorized: Path,
    port: int | None = None,
    kinds: tuple[str, ...] = ("ed25519",),
    options: tuple[str, ...] = (),
    host: str = LOCALHOST,
    before: tuple[str, ...] = (),
) -> Iterator[Sshd]:
    """Run a server that lets the holder of one key in, as the user who runs the test; `before` are words before it."""
    folder.mkdir(parents=True, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on its empty folder when root starts it
    for kind in kinds:
        if not (folder / f"host_{kind}").exists():
            make_key(folder / f"host_{kind}", kind)
    port = port or free_port()
    config = [
        f"Port {port}",
        f"ListenAddress {host}",
        *(f"HostKey {folder}/host_{kind}" for kind in kinds),
        f"AuthorizedKeysFile {authorized}.pub",
        "UsePAM no",
        "StrictModes no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PidFile none",
        "LogLevel DEBUG1",
        "MaxStartups 100",
        *options,
    ]
    (folder / "sshd_config").write_text("\n".join(config) + "\n")
    line = [*before, str(SSHD), "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")]
    server = Sshd(port=port, folder=folder, process=subprocess.Popen(line), host=host)
    try:
        _wait_for(server)
        yield server
    finally:
        server.stop()


def _wait_for(server: Sshd) -> None:
    for _ in range(200):
        with suppress(OSError):
            if "Server listening on" in server.log:
                return
        if server.process.poll() is not None:
            raise AssertionError(server.log)
        time.sleep(0.02)
    raise AssertionError("sshd does not listen")

"""Nodes on the loopback network: each an address of its own with a real sshd, behind it a real Docker engine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.dockerd import DockerEngine
from cluster.fleet import Machine
from cluster.local import LocalTransport
from cluster.ssh import SshTransport
from launcher.stages.relay import Road
from tests.loopback.images import docker
from tests.loopback.sshd import Sshd, running_sshd

if TYPE_CHECKING:
    from tests.loopback.conftest import Site


class Dockerd:
    """A second Docker engine: its own data, socket and containerd; no network, no iptables."""

    def __init__(self, folder: Path, *, driver: str | None = "vfs") -> None:
        self.folder = folder
        self._driver = driver
        self.socket = folder / "docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; skip where that is not possible."""
        program = shutil.which("dockerd")
        if program is None:
            pytest.skip("there is no dockerd here: apt install docker.io")
        # In a network of its own: at its start an engine without a bridge removes the docker0 of the one beside it.
        line = ["unshare", "--net", program, "--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec"]
        line += ["--pidfile", f"{self.folder}/pid", "-H", f"unix://{self.socket}"]
        line += ["--storage-driver", self._driver] if self._driver else []  # else the best that it can have
        line += ["--bridge", "none", "--iptables=false", "--ip-masq=false"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(line, stdout=log, stderr=log)
        for _ in range(1000):
            if self.say("version").returncode == 0:
                return
            if self._process.poll() is not None:
                pytest.skip("a second dockerd does not start here")
            time.sleep(0.02)
        raise AssertionError((self.folder / "log").read_text())

    def say(self, *argv: str) -> subprocess.CompletedProcess[bytes]:
        """Ask it something."""
        return docker("-H", f"unix://{self.socket}", *argv, check=False)

    def images(self) -> list[str]:
        """All that it has, with a name or without."""
        return self.say("images", "-aq", "--no-trunc").stdout.decode().split()

    def clear(self) -> None:
        """Remove every image."""
        for image in self.images():
            self.say("rmi", "-f", image)

    def left_over(self) -> list[Path]:
        """What it keeps of an archive that it could not take in, once it has had time to clear up."""
        end = time.monotonic() + 10
        while left := [one for one in (self.folder / "data" / "tmp").rglob("*") if one.is_file()]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return left

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        assert self._process
        self._process.kill()
        self._process.wait()
        with suppress(OSError, ValueError):
            os.kill(int((self.folder / "exec/containerd/containerd.pid").read_text()), signal.SIGKILL)
        for left in ("pid", "exec/containerd/containerd.pid"):
            (self.folder / left).unlink(missing_ok=True)
        self._unmount()

    def stop(self) -> None:
        """End it in order."""
        if self._process and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)
        self._unmount()

    def _unmount(self) -> None:
        """An engine leaves mounts behind: its data on themselves when it is killed, the network of its containers."""
        for path in (self.folder / "data", *(self.folder / "exec" / "netns").glob("*")):
            while subprocess.run(["umount", str(path)], capture_output=True, check=False).returncode == 0:
                pass


class HereButThere(LocalTransport):
    """This machine, with another engine."""

    def __init__(self, socket: Path, node: str = "there") -> None:
        super().__init__(node)
        self._there = socket

    def _docker_socket(self) -> Path:
        return self._there


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine as the launcher sees it, and what stands behind it."""

    machine: Machine
    road: Road
    sshd: Sshd
    dockerd: Dockerd

    @property
    def kept(self) -> list[Path]:
        """What lies in the folder of transfers."""
        return sorted(Path(self.road.folder).glob("*"))


@contextmanager
def nodes_of(folder: Path, engines: list[Dockerd], site: Site) -> Iterator[list[Node]]:
    """One node for every engine, at 127.0.0.2, 127.0.0.3, …; the engines keep no image afterwards."""
    with ExitStack() as stack:
        made = []
        for number, dockerd in enumerate(engines):
            name, host = f"gpu-{number + 1}", f"127.0.0.{number + 2}"
            # HOME: the start-up files of whoever runs the tests have nothing to do with a node.
            options = (f"SetEnv DOCKER_HOST=unix://{dockerd.socket} HOME={folder}",)
            server = stack.enter_context(running_sshd(folder / name, authorized=site.key, host=host, options=options))
            transport = reach(site, server, name)
            machine = Machine(name=name, transport=transport, engine=DockerEngine(transport))
            stack.callback(machine.transport.close)
            stack.callback(machine.engine.close)
            stack.callback(dockerd.clear)
            road = Road(folder=str(folder / name / "ship"), address=host)
            made.append(Node(machine=machine, road=road, sshd=server, dockerd=dockerd))
        yield made


def reach(site: Site, server: Sshd, name: str) -> SshTransport:
    """A transport to a server, whose key is pinned."""
    return site.reach(site.trust(site.address(server)))

"""Several agents on loopback addresses as the nodes of one run, and a relay between them that loses or cuts."""

from __future__ import annotations

import os
import random
import secrets
import selectors
import shutil
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conftest import INSIDE, Bench, Ended

QUICK = {"beat": 0.2, "grace": 3.0, "hang_timeout": None}

# A launch.py that starts local ranks and, as torchrun does, ends the others when one ends badly; with launch.py's own
# eye for deaths, which it has from the real one beside it.
LAUNCH = """
import os, signal, subprocess, sys, time
import real_launch
real_launch.die_with_parent()
count, base = int(os.environ["COUNT"]), int(os.environ["RANK_BASE"])
deaths = real_launch.Deaths()
def start(local):
    mine = {"RANK": str(base + local), "LOCAL_RANK": str(local), "WORLD_SIZE": os.environ["LAUNCHER_WORLD_SIZE"]}
    return subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | mine, start_new_session=True)
ranks = [start(local) for local in range(count)]
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
while any(rank.poll() is None for rank in ranks) and not asked and not any(rank.poll() for rank in ranks):
    time.sleep(0.1)
for rank in ranks:
    rank.poll() is None and rank.terminate()
until = time.monotonic() + float(os.environ["PET_SHUTDOWN_TIMEOUT"])
while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
    time.sleep(0.05)
for rank in ranks:
    rank.poll() is None and rank.kill()
    rank.wait()
sys.exit(143 if asked else 1 if any(rank.returncode for rank in ranks) else 0)
"""


class Gang:
    """A run on several nodes. `relayed`: what the guards send goes through a relay that can lose and cut it."""

    def __init__(self, folder: Path, *, nodes: int, ranks: int = 1, relayed: bool = False, **guard: Any) -> None:
        self.names = [f"node-{letter}" for letter in "abcdef"[:nodes]]
        self.addresses = [(f"127.0.0.{number + 1}", _free_port()) for number in range(nodes)]
        self.settings = {**QUICK, **guard}
        self.key, self.ranks = secrets.token_hex(32), ranks
        self.meeting = folder / "meeting"
        self.meeting.mkdir()
        self.benches = [Bench(folder / name) for name in self.names]
        self.relay = Relay(self.addresses) if relayed else None

    def start(self, number: int, script: str, *, key: str | None = None, **run: Any) -> None:
        """Start one node's agent."""
        bench = self.benches[number]
        files = bench.folder / "files"
        files.mkdir(parents=True)
        (files / "guard.key").write_text((key or self.key) + "\n")
        shutil.copy(INSIDE / "launch.py", files / "real_launch.py")
        env = {"RANK_BASE": str(number * self.ranks), "MEETING": str(self.meeting), **run.pop("env", {})}
        whole = {
            "node": self.names[number],
            "machine_rank": number,
            "world_size": len(self.names) * self.ranks,
            "guard": {"peers": self._peers(number), **self.settings},
            "stop_grace": 2,
            **run,
        }
        bench.start(script, ranks=self.ranks, env=env, **{"launch": LAUNCH, **whole})

    def start_all(self, script: str, **run: Any) -> None:
        """Start all nodes, and wait for them."""
        for number in range(len(self.names)):
            self.start(number, script, **run)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Until every rank has said so, and the guards have met."""
        for bench in self.benches:
            bench.wait_for(Ready(bench, self.ranks))
        time.sleep(4 * float(self.settings["beat"]))

    def _peers(self, number: int) -> list[dict[str, object]]:
        seen = self.addresses if self.relay is None else self.relay.addresses_for(number)
        return [
            {"node": name, "address": host, "port": port} for name, (host, port) in zip(self.names, seen, strict=True)
        ]

    def pid(self, rank: int) -> int:
        """A rank's process."""
        for pid, words, command in self._processes(rank // self.ranks):
            if f"RANK={rank}".encode() in words and b"bootstrap.py" in command:
                return pid
        raise AssertionError(f"rank {rank} is not there")

    def signal_node(self, number: int, what: signal.Signals) -> None:
        """To every process of a node, the agent first."""
        os.kill(self.benches[number].agents[0].pid, what)
        for pid, _, _ in self._processes(number):
            os.kill(pid, what)

    def _processes(self, number: int) -> list[tuple[int, list[bytes], bytes]]:
        found = []
        mark = f"MARK={self.benches[number].folder}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
                if mark in words:
                    found.append((int(entry.name), words, (entry / "cmdline").read_bytes()))
            except OSError:
                continue
        return found

    def end(self, *numbers: int) -> list[Ended]:
        """Wait for these nodes' ends; all when none is named."""
        return [self.benches[one].end(self.benches[one].agents[0]) for one in numbers or range(len(self.names))]

    def close(self) -> None:
        """Leave nothing behind, and see that nothing was left."""
        for number, bench in enumerate(self.benches):
            for agent in bench.agents:
                if agent.poll() is None:
                    self.signal_node(number, signal.SIGCONT)
                    agent.kill()
                agent.communicate()
            bench.wait_for(Cleared(bench))
        if self.relay is not None:
            self.relay.close()


@dataclass
class Ready:
    """Whether all ranks of a node have said so."""

    bench: Bench
    ranks: int

    def __call__(self) -> bool:
        log = self.bench.folder / "out" / "node.log"
        return log.exists() and log.read_text().count(" ready\n") == self.ranks


@dataclass
class Cleared:
    """Whether nothing of a node lives."""

    bench: Bench

    def __call__(self) -> bool:
        return self.bench.living() == []


class Relay:
    """Passes datagrams on between nodes: to each of them every other one seems to have an address of the relay's."""

    def __init__(self, addresses: list[tuple[str, int]]) -> None:
        self.loss = 0.0
        self.cut: set[int] = set()  # nodes of which nothing comes and to which nothing goes
        self._addresses = addresses
        self._selector = selectors.DefaultSelector()
        self._ways: dict[tuple[int, int], socket.socket] = {}
        for source in range(len(addresses)):
            for target in range(len(addresses)):
                if source != target:
                    way = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    way.bind(("127.0.0.1", 0))
                    self._ways[source, target] = way
                    self._selector.register(way, selectors.EVENT_READ, (source, target))
        self._chance = random.Random(35)  # noqa: S311 - chance, and the same each time
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._pass_on)
        self._thread.start()

    def addresses_for(self, number: int) -> list[tuple[str, int]]:
        """Every node's address as this node shall know it; its own is its own."""
        return [
            one if target == number else self._ways[number, target].getsockname()
            for target, one in enumerate(self._addresses)
        ]

    def close(self) -> None:
        """Stop."""
        self._over.set()
        self._thread.join()
        for way in self._ways.values():
            way.close()
        self._selector.close()

    def _pass_on(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(0.1):
                source, target = key.data
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                if self._chance.random() >= self.loss and not self.cut & {source, target}:
                    self._ways[source, target].sendto(data, self._addresses[target])


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

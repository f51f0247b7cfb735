"""Runs of the real agent in real processes; the job behind it is a small script instead of accelerate."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher import render

TIMES = {"beat": 2.0, "grace": 60.0, "hang_timeout": None}
INSIDE = Path(__file__).parents[2] / "launcher" / "inside"

# A launch.py that starts local ranks as torchrun does: each in a session of its own, under bootstrap.py.
FAKE_LAUNCH = """
import os, signal, subprocess, sys
count = int(os.environ["COUNT"])
def start(rank):
    env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    return subprocess.Popen([sys.executable, *sys.argv[1:]], env=env, start_new_session=True)
ranks = [start(rank) for rank in range(count)]
def stop(*_):
    for rank in ranks:
        rank.terminate()
signal.signal(signal.SIGTERM, stop)
print("started", count, flush=True)
sys.exit(max(rank.wait() for rank in ranks))
"""


@dataclass
class Ended:
    """What a run left."""

    status: int
    printed: str
    out: Path

    @property
    def exit(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "exit.json").read_text()))

    @property
    def records(self) -> list[tuple[str, str]]:
        lines = (self.out / "node.log").read_text().removesuffix("\n").split("\n")
        return [(rank, text) for _time, rank, text in (line.split(" ", 2) for line in lines)]

    def said(self, rank: str) -> list[str]:
        return [text for who, text in self.records if who == rank]


@dataclass
class Bench:
    """Starts agents, and knows afterwards whether anything of theirs still lives."""

    folder: Path
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self,
        script: str,
        *arguments: str,
        ranks: int = 1,
        launch: str | None = FAKE_LAUNCH,
        request: list[str] | None = None,
        stdout: int | None = subprocess.PIPE,
        **run: Any,
    ) -> subprocess.Popen[bytes]:
        files, out, work = (self.folder / name for name in ("files", "out", "work"))
        for path in (files, out, work):
            path.mkdir(exist_ok=True)
        for name in render.INSIDE:
            shutil.copy(INSIDE / name, files / name)
        if launch is not None:
            (files / "launch.py").write_text(launch)
        (work / "job.py").write_text(script)
        document = {
            "run": "run-1",
            "node": "node-a",
            "machine_rank": 0,
            "world_size": ranks,
            "local_processes": ranks,
            "launch": request or [str(files / "bootstrap.py"), "job.py", *arguments],
            "env": {"COUNT": str(ranks), "MARK": str(self.folder)} | run.pop("env", {}),
            "workdir": str(work),
            "files": str(files),
            "out": str(out),
            "secrets": [],
            "secrets_dir": str(self.folder / "secrets"),
            "backend": None,
            "nvme": [],
            "stop_grace": 5,
            "guard": {"peers": [], **TIMES},
        }
        path = self.folder / "run.json"
        path.write_text(json.dumps(document | run))
        # Copied and run there, as on a node: they must not need anything else of ours.
        argv = [sys.executable, str(files / "agent.py"), str(path)]
        self.agents.append(subprocess.Popen(argv, stdout=stdout, stderr=stdout))
        return self.agents[-1]

    def end(self, agent: subprocess.Popen[bytes]) -> Ended:
        printed = agent.communicate(timeout=120)[0] or b""
        return Ended(status=agent.returncode, printed=printed.decode(), out=self.folder / "out")

    def run(self, script: str, *arguments: str, **run: Any) -> Ended:
        return self.end(self.start(script, *arguments, **run))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "it never came to that"
            time.sleep(0.02)

    def wait_for_lines(self, *texts: str) -> None:
        """Until each of them stands in the log."""
        log = self.folder / "out" / "node.log"
        self.wait_for(lambda: log.exists() and all(text in log.read_text() for text in texts))

    def living(self) -> list[str]:
        """Commands of the processes that carry our mark in their environment."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"MARK={self.folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    for agent in made.agents:
        if agent.poll() is None:
            for _twice in range(2):
                agent.send_signal(signal.SIGTERM)
        agent.communicate()
    assert made.living() == []

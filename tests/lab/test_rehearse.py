"""`launcher rehearse`: a job of the user's own, and every fault, on this machine without containers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from tests.lab.conftest import eventually, make_user

JOB = """
import time, torch
from accelerate import Accelerator
accelerator = Accelerator()
for step in range(1000):
    accelerator.reduce(torch.ones(1))
    if accelerator.is_main_process:
        print("step", step, flush=True)
    time.sleep(0.2)
"""


def left(mark: str) -> list[str]:
    """The processes in whose environment this stands."""
    found = []
    for one in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in one.read_bytes():
                found.append(one.parent.name)
        except OSError:
            continue
    return found


def test_every_fault_ends_the_run_and_is_told_rightly(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").touch()
    user = make_user(tmp_path / "project", tmp_path / "cluster.yaml")
    (user.home / "job.py").write_text(JOB)
    mark = f"REHEARSED={os.getpid()}"
    said = user.launcher("rehearse", "--after", "1", "--env", mark, "--json", "job.py")
    assert said.code == 0, said.err + said.out
    seen = {one["fault"]: one for one in json.loads(said.out)["faults"]}
    assert {name: (one["code"], one["expected"]) for name, one in seen.items()} == {
        "stop": (130, True),
        "crash": (1, True),
        "hang": (1, True),
        "node": (1, True),
    }
    assert seen["crash"]["cause"] == "node node-2, rank 1: killed by SIGKILL"
    assert all(0 < one["seconds"] < 60 for one in seen.values())
    assert left(mark) == []
    assert list(Path("/tmp").glob("launcher-rehearsal-*")) == []
    assert list((user.home / ".state/rehearsals/clusters").iterdir()) == []


def test_ctrl_c_ends_the_whole_rehearsal(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").touch()
    user = make_user(tmp_path / "project", tmp_path / "cluster.yaml")
    (user.home / "job.py").write_text(JOB)
    mark = f"INTERRUPTED={os.getpid()}"
    running = user.begin("rehearse", "--after", "600", "--env", mark, "job.py")
    logs = user.home / ".state/rehearsals"
    eventually(lambda: any(b" step " in path.read_bytes() for path in logs.rglob("logs/*.log")), "the job's first step")
    os.killpg(running.pid, signal.SIGINT)
    said = user.end(running)
    assert (said.code, said.err.count("---")) == (130, 1), said.err
    assert left(mark) == []
    assert list(Path("/tmp").glob("launcher-rehearsal-*")) == []


def test_a_job_that_is_over_too_soon_is_told_and_its_logs_stay(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").touch()
    user = make_user(tmp_path / "project", tmp_path / "cluster.yaml")
    (user.home / "job.py").write_text("print('done', flush=True)\n")
    said = user.launcher("rehearse", "--fault", "crash", "--after", "60", "job.py")
    assert said.code == 1
    assert said.first == "error: the job had ended before it could be tried: crash"
    assert "| done" in said.out
    (kept,) = (user.home / ".state/rehearsals/clusters").iterdir()
    assert str(kept) in said.err
    assert any(b"done" in path.read_bytes() for path in kept.rglob("logs/node-1.log"))
    subprocess.run(["rm", "-rf", str(kept)], check=True)

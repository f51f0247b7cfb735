"""Whole runs by the real command line on this machine, twice: two nodes, without SSH and Docker."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.lab.conftest import User, eventually, of_processes

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="not installed: accelerate"),
]


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    """Somebody whose cluster is this machine, as two nodes."""
    home = tmp_path / "project"
    home.mkdir()
    inventory = of_processes("twice", "first", "second", state=tmp_path / "nodes")
    (home / "cluster.yaml").write_text(yaml.safe_dump(inventory))
    (home / ".launcherignore").write_text(".state/\n")
    made = User(home=home, inventory=home / "cluster.yaml", environment={"OMP_NUM_THREADS": "1"})
    yield made
    assert made.launcher("down").code == 0


def free_port() -> str:
    """One that nobody else on this machine is about to take, as the usual one may be."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def write(user: User, script: str) -> None:
    (user.home / "job.py").write_text("import os, signal, time\nfrom pathlib import Path\n" + script)


DIE = """
import torch.distributed as dist
dist.barrier()
restart = os.environ.get("LAUNCHER_RESTART")
print("attempt", restart, "of", os.environ["LAUNCHER_RUN"])
if not (restart and {learns}):
    if os.environ["RANK"] == "0":
        time.sleep(600)
    if {saves}:
        Path(os.environ["LAUNCHER_CHECKPOINTS"], "step-5").touch()
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
"""


def test_a_run_that_was_killed_is_started_again_and_finds_what_it_saved(user: User) -> None:
    write(user, DIE.format(learns=True, saves=True))
    said = user.launcher("run", "--port", free_port(), "--max-restarts", "1", "job.py")
    assert said.code == 0, said.err
    assert "node second, rank 1: killed by SIGKILL" in said.err
    assert "starting again in 10 s (restart 1 of 1): it may be over the next time" in said.err
    first, again = (
        {line.split(" | ")[1] for line in said.out.splitlines() if f"attempt {which} " in line}
        for which in ("None", "1")
    )
    assert {line.split()[-1] for line in first} == {line.split()[-1] for line in again}  # one LAUNCHER_RUN for both


def test_a_restart_that_comes_no_further_is_the_last(user: User) -> None:
    write(user, DIE.format(learns=False, saves=False))
    said = user.launcher("run", "--port", free_port(), "--max-restarts", "5", "job.py")
    assert said.code == 1, said.err
    assert said.first == "error: node second, rank 1: killed by SIGKILL"
    assert "not started again: the last restart wrote no checkpoint" in said.err
    assert said.err.count("starting again") == 1


def test_an_error_of_the_script_is_not_tried_again(user: User) -> None:
    write(user, "if os.environ['RANK'] == '0':\n    time.sleep(600)\nimport transformerz\n")
    said = user.launcher("run", "--port", free_port(), "--max-restarts", "5", "job.py")
    assert said.code == 1
    assert "ModuleNotFoundError: No module named 'transformerz'" in said.first
    assert "not started again: the script itself ended so, and would again" in said.err
    assert "next: pip install transformerz, in the environment that the launcher is installed in" in said.err


def test_f21_a_run_that_nobody_watches_ends_on_both_nodes_and_says_why(user: User, tmp_path: Path) -> None:
    write(user, "Path(os.environ['LAUNCHER_CHECKPOINTS'], 'pid').write_text(str(os.getpid()))\ntime.sleep(600)\n")
    begun = user.launcher("run", "--port", free_port(), "--detach", "job.py")
    assert begun.code == 0, begun.err
    assert "ends on every node when it ends on one" in begun.err
    pids = [tmp_path / "nodes/twice" / node / "checkpoints/pid" for node in ("first", "second")]
    eventually(lambda: all(path.exists() and path.read_text() for path in pids), "both ranks", seconds=240)
    outs = [path for node in ("first", "second") for path in (tmp_path / "nodes/twice" / node / "runs").glob("*/out")]
    os.kill(int(pids[1].read_text()), signal.SIGKILL)
    eventually(lambda: all((out / "exit.json").exists() for out in outs), "both ends", seconds=30)
    said = user.launcher("attach")
    assert (said.code, said.first) == (1, "error: node second, rank 1: killed by SIGKILL")

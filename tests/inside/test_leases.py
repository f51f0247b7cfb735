"""Two runs side by side by the real command line on this machine: three nodes, without SSH and Docker."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.lab.conftest import User, eventually, of_processes

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="not installed: accelerate"),
]
JOB = """
import os, time
from pathlib import Path
import torch.distributed as dist
dist.barrier()
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "is", os.environ["LAUNCHER_NODE"], flush=True)
end = Path(os.environ["LAUNCHER_CHECKPOINTS"], "end")
while not end.exists():
    time.sleep(0.1)
"""


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    """Somebody whose cluster is this machine, as three nodes."""
    home = tmp_path / "project"
    home.mkdir()
    inventory = of_processes("thrice", "one", "two", "three", state=tmp_path / "nodes")
    (home / "cluster.yaml").write_text(yaml.safe_dump(inventory))
    (home / ".launcherignore").write_text(".state/\n")
    (home / "job.py").write_text(JOB)
    made = User(home=home, inventory=home / "cluster.yaml", environment={"OMP_NUM_THREADS": "1"})
    yield made
    assert made.launcher("down").code == 0


def detach(user: User, nodes: str) -> str:
    """Start a run that nobody watches on these nodes; its id."""
    begun = user.launcher("run", "--port", "auto", "--detach", "--json", "--nodes", nodes, "job.py")
    assert begun.code == 0, begun.err
    return str(json.loads(begun.out)["run"])


def test_two_runs_live_side_by_side_and_each_is_asked_for_by_its_id(user: User, tmp_path: Path) -> None:
    pair, alone = detach(user, "three,one"), detach(user, "two")

    status = user.launcher("status")
    assert [line.split()[3] for line in status.out.splitlines()[2:5]] == [pair, alone, pair]
    assert f"\nrun {pair}: watch" in status.out or f"\nrun {pair}: start" in status.out
    assert f"last run {alone}: start" in status.out

    held = user.launcher("run", "--port", "auto", "--nodes", "two,three", "job.py")
    assert held.code == 7
    assert held.first.startswith(f"error: node two: run {alone} is under way, started by ")

    for words in (("attach",), ("stop",), ("logs",)):
        several = user.launcher(*words)
        assert (several.code, several.first) == (2, "error: 2 runs are under way: which one is meant?")
        assert {f"  {pair} on three, one", f"  {alone} on two"} <= set(several.err.splitlines())

    def ranks(run: str) -> set[str]:
        said = user.launcher("logs", run).out.splitlines()
        return {line.split(" | ")[1] for line in said if " | rank " in line}

    eventually(lambda: ranks(pair) == {"rank 0 of 2 is three", "rank 1 of 2 is one"}, "the pair at work", seconds=240)
    eventually(lambda: ranks(alone) == {"rank 0 of 1 is two"}, "the other one at work", seconds=240)

    stopped = user.launcher("stop", alone)
    assert (stopped.code, stopped.err) == (0, "stopped from outside (launcher stop, or down); nothing of it is left\n")
    assert user.launcher("stop", alone).err == f"run {alone} is not under way\n"
    assert user.launcher("attach", alone).code == 2

    watching = user.begin("attach")  # there is only one now
    for node in ("one", "three"):
        (tmp_path / "nodes/thrice" / node / "checkpoints/end").touch()
    said = user.end(watching)
    assert said.code == 0, said.err
    assert "| rank 1 of 2 is one" in said.out

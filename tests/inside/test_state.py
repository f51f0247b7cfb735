"""Runs whose launcher loses its disk, or its run: by the real command line on this machine, without SSH and Docker."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher.record import Memory
from tests.lab.conftest import User, eventually, of_processes

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="not installed: accelerate"),
]
JOB = """
import os, time
from pathlib import Path
end = Path(os.environ["LAUNCHER_CHECKPOINTS"], "end")
print("at work", flush=True)
while not end.exists():
    time.sleep(0.1)
    print("x" * 1000, flush=True)
print("at its end", flush=True)
"""


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    """Somebody whose cluster is this machine."""
    home = tmp_path / "project"
    home.mkdir()
    inventory = of_processes("once", "one", state=tmp_path / "nodes")
    (home / "cluster.yaml").write_text(yaml.safe_dump(inventory))
    (home / ".launcherignore").write_text(".state/\n")
    (home / "job.py").write_text(JOB)
    made = User(home=home, inventory=home / "cluster.yaml", environment={"OMP_NUM_THREADS": "1"})
    yield made
    assert made.launcher("down").code == 0


def end(user: User) -> Path:
    """The file with which the job is told to end."""
    return user.home.parent / "nodes/once/one/checkpoints/end"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB for the state folder; where none can be mounted the test is skipped."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "launcher-test", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> None:
    """Leave no room at all, not even behind the last event."""
    for path in place.rglob("events.jsonl"):
        with path.open("ab") as file:
            file.write(b"\n" * (-path.stat().st_size % 4096))
    with (place / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(itertools.repeat(b"\0" * 4096))


def test_f45_on_a_full_disk_no_run_starts_and_one_under_way_goes_on(user: User, small: Path) -> None:
    here = {"LAUNCHER_STATE": str(small / "state")}
    assert user.launcher("up", environment=here).code == 0
    fill(small)
    refused = user.launcher("run", "--port", "auto", "job.py", environment=here)
    assert (refused.code, "this cannot be written: No space left on device" in refused.first) == (1, True), refused.err
    assert "under way" not in user.launcher("status", environment=here).out

    (small / "filler").unlink()
    running = user.begin("run", "--port", "auto", "job.py", environment=here)
    state = Memory(small / "state").cluster("once")
    eventually(lambda: any(b"at work" in line for run in state.runs() for _, line in run.merged()), "work", seconds=240)
    fill(small)
    end(user).touch()
    said = user.end(running)
    assert said.code == 0, said.err
    assert "No space left on device; the run goes on" in said.err
    (run,) = (run for run in state.runs() if run.mirrored())
    assert run.load_plan() is not None
    assert run.state().run == run.run

    (small / "filler").unlink()
    later = user.launcher("logs", run.run, environment=here)
    assert (later.code, later.out.count("at its end")) == (0, 1), later.err


def test_s27_what_was_planned_is_done_or_refused_with_what_has_changed(user: User) -> None:
    planned = user.launcher("up", "--dry-run", "--json")
    assert planned.code == 0, planned.err
    (user.home / "plan.json").write_text(planned.out)
    whole = user.inventory.read_text()
    user.inventory.write_text(whole.replace("slots: 1", "slots: 2"))
    refused = user.launcher("up", "--plan", "plan.json")
    assert refused.code == 2
    assert refused.first == "error: plan.json: this is not what would be done now; nothing was changed"
    assert "  nodes.one.slots: was 1, is 2\n" in refused.err
    assert not (user.home.parent / "nodes").exists()
    user.inventory.write_text(whole)
    done = user.launcher("up", "--plan", "plan.json")
    assert (done.code, "started one" in done.err) == (0, True), done.err
    again = user.launcher("up", "--plan", "plan.json")
    assert (again.code, "nothing to do" in again.err) == (0, True), again.err


def test_f49_an_owner_that_comes_back_after_its_run_was_taken_over_touches_nothing(user: User) -> None:
    running = user.begin("run", "--port", "auto", "job.py")
    eventually(lambda: user.heard(b"at work") > 0, "work", seconds=240)
    os.kill(running.pid, signal.SIGSTOP)
    assert user.launcher("stop").code == 0
    begun = user.launcher("run", "--port", "auto", "--detach", "--json", "job.py")
    assert begun.code == 0, begun.err
    run = json.loads(begun.out)["run"]
    os.kill(running.pid, signal.SIGCONT)
    os.kill(running.pid, signal.SIGINT)
    said = user.end(running)
    assert (said.code, "Traceback" in said.err) == (130, False), said.err

    status = json.loads(user.launcher("status", "--json").out)
    assert [(node["state"], node["run"]) for node in status["nodes"]] == [("running", run)]
    watching = user.begin("attach", run)
    end(user).touch()
    said = user.end(watching)
    assert (said.code, "| at its end" in said.out) == (0, True), said.err

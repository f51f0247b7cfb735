"""F42: the launcher is killed at the points of its way, and what it leaves is told rightly and can be cleared away.

One machine and its processes, without SSH and Docker: every command takes a second there. The points are found by a
run that counts them (tests/testbed/dying.py). LAUNCHER_TEST_CRASHES=all takes them all, else those after which
something has changed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.lab.conftest import ROOT, User, make_user

INVENTORY = {
    "name": "crash",
    "accelerator": "cpu",
    "engine": "process",
    "nodes": [{"name": "here", "host": "localhost", "transport": "local", "slots": 1}],
}
JOB = """
import os, pathlib, time
for step in range(5):
    print("step", step, flush=True)
    time.sleep(0.1)
pathlib.Path(os.environ["LAUNCHER_CHECKPOINTS"], os.environ["LAUNCHER_RUN"]).touch()
"""
RUN = ("run", "--detach", "--port", "auto", "job.py")
CHANGING = re.compile(r"after (\w+\.(send|create|start|stop|remove|emit|save_plan)) ")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[User]:
    """A user with a cluster of one machine, which nobody else has heard of."""
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(INVENTORY))
    made = make_user(tmp_path / "project", path)
    (made.home / "job.py").write_text(JOB)
    made.environment["HOME"] = str(tmp_path)
    yield made
    made.launcher("down")
    assert left(made) == []


def points(user: User, *argv: str) -> list[str]:
    """The points of a command, which is carried out."""
    listed = user.home.parent / "points.txt"  # not among what is sent to the nodes
    listed.write_text("")
    assert dying(user, "", *argv) == 0
    found = dict.fromkeys(listed.read_text().splitlines())
    if os.environ.get("LAUNCHER_TEST_CRASHES") == "all":
        return list(found)
    return [point for point in found if CHANGING.match(point)]


def dying(user: User, point: str, *argv: str) -> int:
    """Run a command that is killed at this point; how it ended."""
    return subprocess.run(
        [sys.executable, "-m", "tests.testbed.dying", "../points.txt", point, *argv],
        cwd=user.home,
        env={**os.environ, **user.environment, "LAUNCHER_STATE": str(user.home / ".state"), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
    ).returncode


def left(user: User) -> list[str]:
    """What there is of containers and of secrets."""
    home = Path(user.environment["HOME"])
    shm = Path("/dev/shm").glob("launcher-crash-*")
    return [str(path) for path in (*home.glob(".launcher/crash/here/processes/*"), *shm)]


def finished(user: User, run: str) -> bool:
    return Path(user.environment["HOME"], ".launcher/crash/here/checkpoints", run).exists()


def newest(user: User) -> str:
    return max(path.name for path in (user.home / ".state/clusters/crash/runs").iterdir())


def test_an_up_that_was_killed_is_completed_by_the_next(alone: User) -> None:
    for point in points(alone, "up"):
        assert alone.launcher("down").code == 0
        assert dying(alone, point, "up") == -9, point
        status = alone.launcher("status")
        assert (status.code, "Traceback" in status.err) == (0, False), point
        up = alone.launcher("up")
        assert up.code == 0, f"{point}: {up.err}"
    down = alone.launcher("down")
    assert (down.code, left(alone)) == (0, []), down.err


def test_a_run_goes_on_or_was_never_started_wherever_its_launcher_is_killed(alone: User) -> None:
    assert (alone.launcher(*RUN).code, alone.launcher("attach").code) == (0, 0)  # from now on its code is there
    for point in points(alone, *RUN):
        alone.launcher("stop")
        assert dying(alone, point, *RUN) == -9, point
        run = newest(alone)
        status = alone.launcher("status").out
        attached = alone.launcher("attach")
        # What the verdict must be, by what the job itself has done.
        if finished(alone, run):
            assert ("running" in status, attached.code) == (True, 0), f"{point}: {status}"
            assert [line for line in attached.out.splitlines() if "step" in line][-1].endswith("step 4"), point
        elif "never started" in status:
            told = f"error: node here: run {run} was not started there: the launcher that began it is gone"
            assert (attached.code, attached.first) == (4, told), point
        else:
            assert (run in status) == ("nothing of it is left on the nodes" in status), f"{point}: {status}"
            assert (attached.code, "is under way" in attached.first) == (2, True), point
        again = alone.launcher(*RUN)
        assert (again.code, alone.launcher("attach").code) == (0, 0), f"{point}: {again.err}"
        assert finished(alone, newest(alone)), point


@pytest.mark.parametrize("command", ["stop", "down"])
def test_ending_a_run_can_be_killed_and_done_again(alone: User, command: str) -> None:
    alone.launcher(*RUN)
    for point in points(alone, command):
        assert alone.launcher(*RUN).code == 0
        assert dying(alone, point, command) == -9, point
        again = alone.launcher(command)
        assert again.code == 0, f"{point}: {again.err}"
        assert alone.launcher("status").out.count("running") == 0, point

"""F46: two commands at the same moment. One has the cluster, and the other says who that is, or finds the work done.

Three nodes in containers, and this machine as three without SSH and Docker. Both commands have loaded and wait at a
gate; one of them then goes on a moment later, by chance. LAUNCHER_TEST_RACES is how many there are of each kind,
LAUNCHER_TEST_SEED makes the moments those of an earlier time.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.lab.conftest import Note, Said, User, make_user, of_processes

RACES = int(os.environ.get("LAUNCHER_TEST_RACES", "3"))
SEED = int(os.environ.get("LAUNCHER_TEST_SEED") or random.SystemRandom().randrange(10**6))
RUN = ("run", "--detach", "--port", "auto", "job.py")
ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
_GATE = "import sys, time; from launcher.cli import main; time.sleep(float(sys.stdin.readline())); main()"

pytestmark = pytest.mark.timeout(1800 + 120 * RACES)


@pytest.fixture(params=["process", "docker"])
def racer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[User]:
    """A user of three nodes; what is not up at the end of a test is brought up for the next one."""
    if request.param == "docker":
        user: User = request.getfixturevalue("user")
    else:
        path = tmp_path / "cluster.yaml"
        inventory = of_processes("thrice", "one", "two", "three", state=tmp_path / "nodes")
        path.write_text(yaml.safe_dump(inventory))
        user = make_user(tmp_path / "project", path)
        user.environment["HOME"] = str(tmp_path)
    (user.home / "job.py").write_text("import time\ntime.sleep(600)\n")
    yield user
    user.launcher("stop")
    assert user.launcher("up" if request.param == "docker" else "down").code == 0


def race(user: User, *commands: tuple[str, ...], delays: tuple[float, ...]) -> list[Said]:
    """Start commands at the same moment, but for these seconds; what each of them said."""
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", _GATE, *argv],
            cwd=user.home,
            env={**os.environ, **user.environment, "LAUNCHER_STATE": str(user.home / ".state")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for argv in commands
    ]
    user.begun += begun
    time.sleep(0.5)
    for one, delay in zip(begun, delays, strict=True):
        assert one.stdin
        one.stdin.write(f"{delay}\n".encode())
        one.stdin.flush()
    return [user.end(one) for one in begun]


def rows(user: User) -> list[dict[str, object]]:
    told = user.launcher("status", "--json")
    assert told.code == 0, told.err
    found: list[dict[str, object]] = json.loads(told.out)["nodes"]
    return found


def moments(most: float) -> Iterator[tuple[float, float]]:
    """For each race, how much later the first and the second one begins."""
    chance = random.Random(SEED)  # noqa: S311 - the same again is the point
    for number in range(RACES):
        late = chance.uniform(0, most)
        yield (0.0, late) if number % 2 else (late, 0.0)


def test_f46_two_ups_are_as_good_as_one(racer: User, note: Note) -> None:
    begun = time.monotonic()
    for delays in moments(0.3):
        assert racer.launcher("down").code == 0
        said = race(racer, ("up",), ("up",), delays=delays)
        assert [(one.code, one.first) for one in said] == [(0, ""), (0, "")], f"seed {SEED}, {delays}"
        assert [row["up"] for row in rows(racer)] == [True, True, True], f"seed {SEED}, {delays}"
        assert racer.launcher("up").err.endswith("is up: 3 nodes; nothing to do\n")
    note(f"{RACES} times two `up` (seed {SEED})", "both: the cluster is up", time.monotonic() - begun)


def test_f46_an_up_and_a_down_leave_all_nodes_up_or_none(racer: User, note: Note) -> None:
    begun, outcomes = time.monotonic(), Counter[str]()
    for delays, first in zip(moments(1.0), itertools.cycle(("up", "down", "down")), strict=False):
        assert racer.launcher(first).code == 0
        up, down = race(racer, ("up",), ("down",), delays=delays)
        assert (up.code in (0, 7), down.code) == (True, 0), f"seed {SEED}, {delays}: {up.err}{down.err}"
        stands = {row["up"] for row in rows(racer)}
        assert len(stands) == 1, f"seed {SEED}, {delays}: {up.err}{down.err}"
        assert up.code == 0 or stands == {False}
        outcomes["up" if stands == {True} else "down"] += 1
    told = ", ".join(f"{count} times {name}" for name, count in sorted(outcomes.items()))
    note(f"{RACES} times `up` and `down` (seed {SEED})", f"in the end: {told}", time.monotonic() - begun)


def test_f46_of_two_runs_one_starts_and_the_other_names_it(racer: User, note: Note) -> None:
    begun, last = time.monotonic(), ""
    for number, delays in enumerate(moments(0.5)):
        if number % 2:  # else what they race for is the idle containers, too
            assert racer.launcher("up").code == 0
        said = race(racer, RUN, RUN, delays=delays)
        assert sorted(one.code for one in said) == [0, 7], f"seed {SEED}, {delays}: {[one.err for one in said]}"
        winner, loser = sorted(said, key=lambda one: one.code)
        run = ID.findall(winner.err)[0]
        assert re.match(rf"error: node \S+: run {run} is under way, started by \S+@\S+, since 20", loser.first)
        assert {row["run"] for row in rows(racer)} == {run}, f"seed {SEED}, {delays}"
        last = loser.first
        assert racer.launcher("stop").code == 0
        assert {row["run"] for row in rows(racer)} == {None}
        assert racer.launcher("down").code == 0
    note(f"{RACES} times two `run` (seed {SEED})", ID.sub("RUN", last), time.monotonic() - begun)


def test_f46_a_run_and_a_down_leave_all_of_the_run_or_nothing(racer: User, note: Note) -> None:
    begun, outcomes = time.monotonic(), Counter[int]()
    for delays in moments(2.0):
        assert racer.launcher("up").code == 0
        run, down = race(racer, RUN, ("down",), delays=delays)
        assert (run.code in (0, 7), down.code) == (True, 0), f"seed {SEED}, {delays}: {run.err}{down.err}"
        found = rows(racer)
        assert len({(row["up"], row["run"], row["state"]) for row in found}) == 1, f"seed {SEED}, {delays}: {found}"
        assert run.code == 0 or found[0]["run"] is None, run.err
        outcomes[run.code] += 1
        racer.launcher("stop")
    told = ", ".join(f"exit {code}: {count} times" for code, count in sorted(outcomes.items()))
    note(f"{RACES} times `run` and `down` (seed {SEED})", told, time.monotonic() - begun)

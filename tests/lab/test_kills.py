"""F42: the launcher is killed at moments that nobody chose, and what it leaves is told rightly and can be cleared away.

A moment is any of the whole length of `up`, `run`, `stop` and `down`, by chance. One node in a container, by SSH and
with its own Docker engine, and this machine without either; there something light stands where a job imports torch
and Accelerate, which takes most of a short run's time and has no part in this. LAUNCHER_TEST_KILLS is how many kills
there are on each, LAUNCHER_TEST_SEED makes the moments those of an earlier time. (tests/lab/test_crashes.py goes
through chosen points.)
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from tests.lab.conftest import Note, Said, User, eventually, make_user
from tests.testbed import lab as testbed

KILLS = int(os.environ.get("LAUNCHER_TEST_KILLS", "6"))
SEED = int(os.environ.get("LAUNCHER_TEST_SEED") or random.SystemRandom().randrange(10**6))
STEPS = 8
# Argument: the code with which it ends. It says itself how far it came, where no launcher has a hand in it.
JOB = f"""
import os, pathlib, sys, time
mine = pathlib.Path(os.environ["LAUNCHER_CHECKPOINTS"], os.environ["LAUNCHER_RUN"])
mine.with_suffix(".begun").touch()
for step in range({STEPS}):
    print("step", step, flush=True)
    time.sleep(0.1)
mine.with_suffix(f".{{sys.argv[1]}}").touch()
sys.exit(int(sys.argv[1]))
"""
# One process in place of torchrun's, started the same way.
LIGHT = {
    "accelerate/__init__.py": "PartialState = dict\n",
    "accelerate/commands/launch.py": """
import os, signal, subprocess, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
class launch_command_parser:
    def parse_args(self, argv):
        return argv[next(at for at, word in enumerate(argv) if word.endswith("bootstrap.py")):]
def launch_command(argv):
    def told(number, _):
        rank.terminate()
        rank.wait()
        raise SignalException(number)
    rank = subprocess.Popen([sys.executable, *argv], env=os.environ | dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"))
    signal.signal(signal.SIGTERM, told)
    sys.exit(rank.wait())
""",
    "torch/distributed/elastic/multiprocessing/api.py": """
class SignalException(Exception):
    def __init__(self, sigval):
        self.sigval = sigval
""",
    "torch/distributed/elastic/multiprocessing/errors.py": "class ChildFailedError(Exception): pass\n",
}
COMMANDS = {"up": 3, "run": 3, "run --detach": 4, "stop": 1, "down": 1}  # and how often each comes, of twelve
AFTERWARDS = ("attach", "stop", "up", "run")
PHASES = {"0": "done", "3": "failed"}  # of a job, by its code
CODES = {"0": 0, "3": 1}  # the job's own, and the command's that watches it to its end


@dataclass(frozen=True, slots=True)
class Standing:
    """A container, as its engine says and not as the launcher does."""

    role: str
    run: str | None
    state: str  # created, running, exited
    code: int | None = None


class Node(Protocol):
    """The one node, seen without the launcher."""

    def standing(self) -> list[Standing]: ...
    def marks(self) -> set[str]:
        """What the jobs have written down of themselves."""

    def processes(self) -> list[str]:
        """What runs there of ours, in containers or not."""


def _lives(pid: int) -> bool:
    """Whether there is such a process, and no mere remainder of one that nobody has waited for."""
    told = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(told) and not told.startswith("Z")


@dataclass(frozen=True)
class Here:
    """This machine and its processes."""

    home: Path

    def standing(self) -> list[Standing]:
        found = []
        for spec in self.home.glob(".launcher/kill/here/processes/[!.]*/*/spec.json"):
            labels = json.loads(spec.read_text())["labels"]
            state, code = "created", None
            if (spec.parent / "exit.json").exists():
                state, code = "ended", json.loads((spec.parent / "exit.json").read_text())["code"]
            elif (spec.parent / "keeper.json").exists():
                keeper = json.loads((spec.parent / "keeper.json").read_text())["pid"]
                state, code = ("running", None) if _lives(keeper) else ("ended", 137)
            found.append(Standing(labels["launcher.role"], labels.get("launcher.run"), state, code))
        return found

    def marks(self) -> set[str]:
        return {path.name for path in self.home.glob(".launcher/kill/here/checkpoints/2*.*")}

    def processes(self) -> list[str]:
        told = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
        return [line for line in told.splitlines() if f"{self.home}/.launcher" in line]


@dataclass(frozen=True)
class There:
    """A node in a container."""

    name: str

    def standing(self) -> list[Standing]:
        ids = testbed.run(self.name, "docker", "ps", "-aq", "--filter", "label=launcher.cluster=kill").split()
        told = testbed.run(self.name, "docker", "inspect", *ids, check=False) if ids else "[]"
        found = []
        for one in json.loads(told[: told.rindex("]") + 1]):  # one that is gone meanwhile is told of at the end
            labels, state = one["Config"]["Labels"], one["State"]
            name = {"exited": "ended"}.get(state["Status"], state["Status"])
            code = state["ExitCode"] if name == "ended" else None
            found.append(Standing(labels["launcher.role"], labels.get("launcher.run"), name, code))
        return found

    def marks(self) -> set[str]:
        return set(testbed.run(self.name, "ls", "/mnt/checkpoints").split())

    def processes(self) -> list[str]:
        told = testbed.run(self.name, "ps", "-eo", "user=,args=")
        return [line for line in told.splitlines() if line.startswith(("ml ", "1000 "))]


@dataclass
class Scene:
    """Whoever is killed, somebody elsewhere who then looks, and the node as it is."""

    user: User
    stranger: User
    node: Node
    lengths: dict[str, float] = field(default_factory=dict)

    def argv(self, command: str, code: str) -> tuple[str, ...]:
        words = tuple(command.split())
        light = f"PYTHONPATH={self.user.environment['HOME']}/light"
        return (*words, "--port", "auto", "--env", light, "job.py", code) if words[0] == "run" else words

    def runs(self) -> set[str]:
        """The runs of which the user has a record."""
        return {path.name for path in self.user.home.glob(".state/clusters/kill/runs/*")}

    def last(self, by: User) -> dict[str, Any] | None:
        told: dict[str, Any] | None = json.loads(by.launcher("status", "--json").out)["last_run"]
        return told


@pytest.fixture(params=["process", "docker"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    path, node = tmp_path / "cluster.yaml", Here(tmp_path)
    inventory: dict[str, Any] = {
        "name": "kill",
        "accelerator": "cpu",
        "engine": "process",
        "nodes": [{"name": "here", "host": "localhost", "transport": "local", "slots": 1}],
    }
    made: Node = node
    if request.param == "docker":
        user: User = request.getfixturevalue("user")
        inventory = yaml.safe_load(user.inventory.read_text())
        first = inventory["nodes"][0]
        inventory |= {"name": "kill", "nodes": [{**first, "slots": 1}]}
        made = There(first["name"])
    else:
        for name, text in LIGHT.items():
            (tmp_path / "light" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "light" / name).write_text(text)
    path.write_text(yaml.safe_dump(inventory))
    users = [make_user(tmp_path / name, path) for name in ("project", "elsewhere")]
    for one in users:
        (one.home / "job.py").write_text(JOB)
        one.environment["HOME"] = str(tmp_path)
        if request.param == "docker":
            assert one.launcher("trust", "--yes").code == 0
    yield Scene(users[0], users[1], made)
    users[1].launcher("down")
    assert made.standing() == []


def kill(scene: Scene, command: str, code: str, after: float) -> bool:
    """Start a command and kill it after so many seconds; whether it was still there."""
    running = scene.user.begin(*scene.argv(command, code))
    try:
        running.wait(after)
    except subprocess.TimeoutExpired:
        running.kill()
    running.communicate()
    return running.returncode == -9


def told_rightly(scene: Scene, by: User) -> Standing | None:
    """Somebody asks for the status, and must be told what is; gives back what is of the run."""
    while True:
        before = scene.node.standing()
        said = by.launcher("status", "--json")
        assert said.code == 0, said.err
        if scene.node.standing() == before:
            break
    (row,) = json.loads(said.out)["nodes"]
    idle = [one for one in before if one.role == "node"]
    runs = [one for one in before if one.role == "run"]
    assert (len(idle) <= 1, len(runs) <= 1) == (True, True), before
    assert row["up"] == any(one.state == "running" for one in idle), (row, before)
    run = runs[0] if runs else Standing("run", None, "")
    state = {"": None, "created": "never started"}.get(run.state, run.state)
    assert (row["run"], row["state"], row["code"]) == (run.run, state, run.code), (row, before)
    return runs[0] if runs else None


def remembered_rightly(scene: Scene, run: Standing | None) -> str:
    """What the one that was killed had written down must be true of the job; gives back the phase."""
    last = scene.last(scene.user)
    assert last
    assert last["run"] == max(scene.runs())
    marks, phase = scene.node.marks(), str(last["phase"])
    true = next((true for code, true in PHASES.items() if f"{last['run']}.{code}" in marks), None)
    assert phase == true or (phase not in PHASES.values() and not (true and run is None)), (last, marks)
    return phase


def afterwards(scene: Scene, action: str, by: User, run: Standing | None, code: str, *, ended: bool) -> None:
    """Come back to what was left, from elsewhere. `ended`: what was killed was itself to end the run."""
    said = by.launcher(*scene.argv("run --detach" if action == "run" else action, code))
    marks = scene.node.marks()
    finished = run is not None and f"{run.run}.{code}" in marks
    if action == "attach":
        assert_attached(said, run, code, finished=finished, ended=ended)
    elif action == "stop":
        assert (said.code, [one for one in scene.node.standing() if one.role == "run"]) == (0, []), said.err
    elif action == "up":
        assert said.code == 0, said.err
        assert [one.state for one in scene.node.standing() if one.role == "node"] == ["running"]
    elif said.code == 7:
        assert run, said.err
        assert run.state != "created", said.err
        assert f": run {run.run} is under way, started by " in said.first, said.err
    else:
        assert said.code == 0, said.err
    assert not (run and run.state == "created") or f"{run.run}.begun" not in marks


def assert_attached(said: Said, run: Standing | None, code: str, *, finished: bool, ended: bool) -> None:
    if run is None:
        assert (said.code, "is under way" in said.first) == (2, True), said.err
    elif run.state == "created":
        assert (said.code, "the launcher that began it is gone" in said.first) == (4, True), said.err
    elif finished:
        # A run whose end was told already is not come back to.
        assert said.code in (CODES[code], 2), said.err
        steps = re.findall(r"\| step (\d+)", said.out)
        assert said.code == 2 or [int(step) for step in steps] == list(range(STEPS)), said.out
    else:
        assert ended, said.err
        assert said.code in (130, 2), said.err


def assert_nothing_left(scene: Scene, before: list[str]) -> None:
    down = scene.stranger.launcher("down")
    assert (down.code, scene.node.standing()) == (0, []), down.err
    known = {re.sub(r"^\s*\d+ ", "", line) for line in before}

    def left() -> list[str]:
        return [line for line in scene.node.processes() if re.sub(r"^\s*\d+ ", "", line) not in known]

    eventually(lambda: not left(), f"no process of ours is left: {left()}", seconds=15)


def one_kill(scene: Scene, command: str, chance: random.Random) -> str | None:
    """Kill a command at some moment and look at everything; the phase it was in, None when it had ended before."""
    code, quiet = chance.choice(list(CODES)), scene.node.processes()
    length, known = scene.lengths[command], scene.runs()
    if command in ("stop", "down") or chance.random() < 0.5:
        assert scene.user.launcher("up").code == 0
    if command in ("stop", "down"):
        assert scene.user.launcher(*scene.argv("run --detach", code)).code == 0
        known = scene.runs()
    killed = kill(scene, command, code, chance.uniform(0, length))
    by = chance.choice([scene.user, scene.stranger])
    run = told_rightly(scene, by)
    new = scene.runs() - known
    phase = remembered_rightly(scene, run) if new or command == "stop" else "look"
    ended = command in ("stop", "down")
    afterwards(scene, chance.choice(AFTERWARDS), by, run, code, ended=ended)
    assert_nothing_left(scene, quiet)
    return phase if killed else None


@pytest.mark.timeout(1800 + 120 * KILLS)
def test_f42_a_launcher_that_is_killed_at_any_moment_leaves_what_can_be_told_and_cleared(
    scene: Scene, note: Note
) -> None:
    begun, chance = time.monotonic(), random.Random(SEED)  # noqa: S311 - the same again is the point
    for command in ("up", "run", "run --detach", "stop", "down"):
        started = time.monotonic()
        assert scene.user.launcher(*scene.argv(command, "0")).code == 0
        scene.lengths[command] = time.monotonic() - started
    moments, wrong, kills = Counter[str](), [], 0
    names, weights = list(COMMANDS), list(COMMANDS.values())
    while kills < KILLS:
        (command,) = chance.choices(names, weights)
        try:
            phase = one_kill(scene, command, chance)
        except AssertionError as error:
            wrong.append(f"kill {kills + 1}, {command}: {error}")
            sys.stderr.write(f"{wrong[-1]}\n")
            scene.stranger.launcher("down")
            phase = "wrong"
        if phase is not None:
            kills += 1
            moments[command if command in ("up", "stop", "down") else f"{command}, {phase}"] += 1
            sys.stderr.write(f"{kills} kills (seed {SEED}), {kills - len(wrong)} right; {command}, {phase}\n")
    told = f"{KILLS - len(wrong)} of {KILLS} verdicts right, 0 orphans"
    by_moment = "; ".join(f"{name}: {count}" for name, count in sorted(moments.items()))
    note(f"{KILLS} kills at any moment (seed {SEED}): {by_moment}", told, time.monotonic() - begun)
    assert wrong == []

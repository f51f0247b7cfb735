"""The lab ring's fixtures: three real nodes, and the real command line as a user would call it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.testbed import lab as testbed

ROOT = Path(__file__).parents[2]
PREFIX = os.environ.get("LAUNCHER_TEST_LAB", "ring")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("LAUNCHER_TEST_FAULTS") != "all":  # `make faults` tries them all
        left = [item for item in items if item.get_closest_marker("thorough")]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]
    for item in items:
        if Path(item.path).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.lab)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(1800))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End what a failed test has left running: the next one would find its nodes taken, and fail as well."""
    report = yield
    user = getattr(item, "funcargs", {}).get("user")
    if report.failed and isinstance(user, User):
        user.give_up()
    return report


Note = Callable[[str, str, float], None]


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """For the table of faults: what was done, what was told, and after how many seconds."""

    def keep(done: str, told: str, seconds: float) -> None:
        request.node.user_properties.append(("fault", (done, told.removeprefix("error: "), seconds)))

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of faults, with every fault that was tried."""
    rows = [
        (re.sub(r".*test_(f\d+)?.*", lambda found: (found[1] or "").upper(), report.nodeid), *figure, outcome)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, figure in getattr(report, "user_properties", ())
        if name == "fault" and report.when == "call"
    ]
    if rows:
        terminalreporter.section("faults")
        terminalreporter.write_line("| fault | what was done | what was told | seconds | |\n|---|---|---|---|---|")
        for fault, done, told, seconds, outcome in rows:
            terminalreporter.write_line(f"| {fault} | {done} | {told} | {seconds:.1f} | {outcome} |")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the command line answered."""

    code: int
    out: str
    err: str

    @property
    def first(self) -> str:
        """The first line of the error."""
        return next((line for line in self.err.splitlines() if line.startswith("error: ")), "")


@dataclass(slots=True, kw_only=True)
class User:
    """Somebody with a working directory and a memory, who calls `launcher`."""

    home: Path
    inventory: Path
    environment: dict[str, str] = field(default_factory=dict)
    begun: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)
    earlier: set[Path] = field(default_factory=set, repr=False)

    def begin(self, *argv: str, environment: Mapping[str, str] = {}) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own: a signal reaches it and nobody else."""
        self.earlier = set(self._logs())
        running = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", *argv],
            cwd=self.home,
            env={**os.environ, **self.environment, "LAUNCHER_STATE": str(self.home / ".state"), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.begun.append(running)
        return running

    def _logs(self) -> Iterator[Path]:
        return (self.home / ".state").rglob("logs/*.log")

    def new_logs(self) -> set[Path]:
        """The logs, by node and by rank, of what has begun since the last command did."""
        return set(self._logs()) - self.earlier

    def heard(self, said: bytes, *, node: str = "*") -> int:
        """How often this is in the logs of what has begun since the last command did."""
        return sum(path.read_bytes().count(said) for path in self.new_logs() if path.match(f"{node}.log"))

    def give_up(self) -> None:
        """End whatever commands are still there, and the run that they have left."""
        for running in self.begun:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.communicate()
        self.launcher("stop")

    def launcher(self, *argv: str, environment: Mapping[str, str] = {}) -> Said:
        """Run a command to its end."""
        return self.end(self.begin(*argv, environment=environment))

    def end(self, running: subprocess.Popen[bytes]) -> Said:
        """Wait for a command's end."""
        try:
            out, err = running.communicate(timeout=900)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
        return Said(code=running.returncode, out=out.decode(), err=err.decode())

    def write(self, **changes: object) -> Path:
        """Another inventory beside the first, with these top-level keys in place of its own."""
        data = {**yaml.safe_load(self.inventory.read_text()), **changes}
        path = self.home / f"changed-{time.monotonic_ns()}.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path


def of_processes(name: str, *nodes: str, state: Path) -> dict[str, object]:
    """An inventory whose nodes are this machine, one process each; `state` is their folder."""
    return {
        "name": name,
        "accelerator": "cpu",
        "engine": "process",
        "defaults": {"slots": 1, "paths": {"state": str(state)}},
        "nodes": [{"name": node, "host": "localhost", "transport": "local"} for node in nodes],
    }


def make_user(home: Path, inventory: Path) -> User:
    """A user with a copy of the example, the inventory at hand."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(inventory, home / "cluster.yaml")
    shutil.copytree(ROOT / "examples", home / "examples", dirs_exist_ok=True)
    shutil.copytree(Path(__file__).parent / "jobs", home / "jobs", dirs_exist_ok=True)
    (home / ".launcherignore").write_text(".state/\nout/\n")
    return User(home=home, inventory=home / "cluster.yaml")


@pytest.fixture(scope="session")
def lab() -> Iterator[testbed.Lab]:
    """Three nodes; they are removed at the end, with everything on them."""
    made = testbed.up(prefix=PREFIX)
    yield made
    if not os.environ.get("LAUNCHER_TEST_KEEP_LAB"):
        testbed.down(prefix=PREFIX)


@pytest.fixture(scope="session")
def user(lab: testbed.Lab, tmp_path_factory: pytest.TempPathFactory) -> User:
    """A user whose cluster is up: trusted, image on every node, node containers running."""
    made = make_user(tmp_path_factory.mktemp("user") / "project", lab.inventory)
    trusted = made.launcher("trust", "--yes")
    assert trusted.code == 0, trusted.err
    up = made.launcher("up")
    assert up.code == 0, up.err
    return made


def containers(node: str, *, role: str = "") -> list[str]:
    """The names of our containers on a node, ended ones too, asked of its own engine."""
    wanted = ["--filter", f"label=launcher.role={role}"] if role else ["--filter", "label=launcher.cluster"]
    return testbed.run(node, "docker", "ps", "-a", *wanted, "--format", "{{.Names}}").split()


def eventually(true: Callable[[], bool], what: str, *, seconds: float = 60) -> None:
    """Wait for something that another process brings about."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)

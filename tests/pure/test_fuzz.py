"""Whatever is done to a file, it is read or refused: with its place, and never with a traceback.

LAUNCHER_FUZZ=N takes N mutations of each kind of file instead of some hundred, and others each time.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import document
from cluster.errors import ClusterError, InputError
from cluster.inventory import read_inventory
from launcher.events import NodeEnded, NodeStarted, RunBegan, RunEnded, StageBegan, to_json
from launcher.job import Job
from launcher.jobfile import read_job_file
from launcher.lints import lint_text
from launcher.plan import make_plan
from launcher.record import RunRecord
from launcher.views import text as views
from launcher.zero import check
from tests.pure import given as things

ROOT = Path(__file__).parents[2]
COUNT = int(os.environ.get("LAUNCHER_FUZZ", "100"))
PIECES = [
    *("", " ", "  ", "\t", ":", ": ", "- ", "#", "{", "}", "[", "]", ",", "'", '"', "|", ">", "&a ", "*a", "!!int "),
    *("no", "null", "~", "010", "-1", "0", "65536", "1e9", ".nan", "NaN", "\0", "\r", "\ufeff", "\u202e", "ü"),
    *("\n---\n", "<<: ", "%", "@", "$(id)", "-x", "/", "/etc", "..", "host", "name: lab\n", '"\\ud800"', '"\\0"'),
    *("true", '"auto"', '"a"', "[]", "{}", "9" * 5000, "1e999", "-0.0"),
]

fuzz = settings(
    max_examples=COUNT,
    derandomize="LAUNCHER_FUZZ" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def mutations(draw: st.DrawFn, *seeds: str) -> str:
    """One of the files, cut, doubled and sprinkled with what breaks readers."""
    lines = [
        line for line in draw(st.sampled_from(seeds)).splitlines(keepends=True) if not line.lstrip().startswith("#")
    ]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        line = lines[at]
        column = draw(st.integers(0, len(line)))
        piece = draw(st.sampled_from(PIECES))
        cut = draw(st.integers(0, 6))
        kind = draw(st.integers(0, 3))
        lines[at] = {0: line[:column] + piece + line[column + cut :], 1: line + line, 2: "", 3: "  " + line}[kind]
        if ":" in line and draw(st.booleans()):
            comma = "," if line.rstrip().endswith(",") else ""
            lines[at] = line.split(":")[0] + ": " + piece + comma + "\n"
    return "".join(lines)


def refused(error: ClusterError, name: str) -> None:
    """A refusal has its place in the file, in words of ours."""
    assert re.fullmatch(rf"{re.escape(name)}(:\d+:\d+)?|--[a-z0-9-]+( [^\n]*)?", error.where or ""), error.where
    assert not re.search("pydantic|Traceback|Expecting", str(error))


INVENTORY = (ROOT / "configs/cluster.yaml").read_text()
JOB = (ROOT / "configs/job.yaml").read_text()
DEEPSPEED = [path.read_text() for path in sorted(ROOT.glob("configs/deepspeed/*.json"))]
ACCELERATE = [path.read_text() for path in sorted(ROOT.glob("configs/accelerate/*.yaml"))]


@fuzz
@given(mutations(INVENTORY))
def test_an_inventory(text: str) -> None:
    try:
        read_inventory(document.read(text, "cluster.yaml"), home=Path("/home/anna"))
    except InputError as error:
        refused(error, "cluster.yaml")


@fuzz
@given(
    mutations(JOB, "script: train.py\nstage: 2\nset: {zero_optimization.overlap_comm: true}\naio: {block_size: 1}\n")
)
def test_a_job_file(text: str) -> None:
    try:
        said = read_job_file(document.read(text, "job.yaml"))
        check(Job(script=said.script or "train.py", settings=said.settings), accelerator="cuda")
    except ClusterError as error:
        refused(error, "job.yaml")


@pytest.mark.parametrize(("name", "seeds"), [("ds.json", DEEPSPEED), ("accelerate.yaml", ACCELERATE)])
@fuzz
@given(data=st.data())
def test_a_configuration(name: str, seeds: list[str], data: st.DataObject) -> None:
    try:
        lint_text(data.draw(mutations(*seeds)), name=name, world_size=4)
    except InputError as error:
        refused(error, name)


EVENTS = "".join(
    to_json(event) + "\n"
    for event in (
        RunBegan(time=1.5, run="run-1", cluster="lab", nodes=("a", "b"), world_size=4, command=("train.py", "--fast")),
        StageBegan(time=2.0, stage="watch"),
        NodeStarted(time=2.5, node="a", container="c0ffee"),
        NodeEnded(time=9.0, node="a", code=1),
        RunEnded(time=9.5, code=1, cause="node a: exit 1"),
    )
)


def plan_text(folder: Path) -> str:
    inventory = things.inventory()
    facts = things.all_facts(inventory)
    record = RunRecord(folder)
    record.save_plan(make_plan(inventory, Job(script="train.py"), facts, image="x", run_id="run-1", code="c0de"))
    return json.dumps(json.loads((folder / "plan.json").read_text()), indent=1)


@fuzz
@given(mutations(EVENTS))
def test_what_is_remembered_of_a_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "events.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
    state = RunRecord(tmp_path).state()
    views.state_line(state, now=100.0)
    json.dumps(views.state_data(state))
    views.run_table([views.run_row("lab", state)])


@fuzz
@given(st.data())
def test_a_remembered_plan(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("plan")
    text = data.draw(mutations(plan_text(folder)))
    (folder / "plan.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    plan = RunRecord(folder).load_plan()
    assert plan is None or views.plan_text(plan)

"""What is rehearsed, and what must come of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import rehearse
from launcher.events import RunEnded
from launcher.job import Job
from launcher.plan import Plan, make_plan
from launcher.rehearsal import FAULTS, Fault, Seen, choose, is_expected, make_inventory
from launcher.views import text
from tests.pure import given


def plan(tmp_path: Path) -> Plan:
    inventory = make_inventory(tmp_path, name="rehearsal-1", count=2, slots=2, engine="process")
    return make_plan(inventory, Job(script="a.py"), given.all_facts(inventory), image="x", run_id="run-1", code="c0de")


def test_the_stage_is_this_machine_several_times(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert (made.accelerator, made.world_size, made.master) == ("cpu", 4, "127.0.0.1")
    assert [node.name for node in made.nodes] == ["node-1", "node-2"]
    assert len({node.root for node in made.nodes}) == 2
    assert all(Path(node.host.nvme[0]).is_dir() for node in made.nodes)


@pytest.mark.parametrize(
    ("name", "code", "cause", "right"),
    [
        ("stop", 130, "stopped from outside (launcher stop, or down)", True),
        ("stop", 0, "", False),
        ("crash", 1, "node node-2, rank 3: killed by SIGKILL", True),
        ("crash", 1, "node node-1, rank 0: exit 1: RuntimeError: Connection closed by peer", False),
        ("hang", 1, "node node-2, rank 3: is stopped (SIGSTOP); no progress: no process wrote anything", True),
        ("node", 1, "node node-2: exit 137", True),
        ("node", 1, "node node-1: exit 1", False),
    ],
)
def test_a_fault_must_be_told_rightly(tmp_path: Path, name: str, code: int, cause: str, *, right: bool) -> None:
    (fault,) = choose((name,))
    assert is_expected(plan(tmp_path), fault, RunEnded(time=1.0, code=code, cause=cause)) == right


def test_the_command_line_knows_every_fault() -> None:
    assert tuple(fault.name for fault in FAULTS) == rehearse.FAULTS
    assert choose(()) == FAULTS
    assert [fault.name for fault in choose(("node", "stop"))] == ["stop", "node"]


def test_what_came_of_it_is_a_table() -> None:
    fault = Fault(name="crash", what="the last rank is killed")
    seen = Seen(fault=fault, run="run-1", code=1, cause="node a: exit 1", seconds=2.51, expected=True)
    early = Seen(fault=fault, run="run-2", code=0, cause="", seconds=None, expected=False)
    assert text.rehearsed_text([seen, early]).splitlines() == [
        "FAULT  WHAT IS DONE             ENDED AFTER  EXIT  WHAT IS TOLD",
        "crash  the last rank is killed  2.5 s        1     node a: exit 1",
        "crash  the last rank is killed  before it    0     done  (not as it should be)",
    ]
    assert text.rehearsed_data(seen)["seconds"] == 2.51

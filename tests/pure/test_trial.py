"""The verdicts of `launcher test`: a node is well only if it ended well and said so."""

from __future__ import annotations

from typing import Any

from launcher.events import Failure, NodeEnded
from launcher.job import Job
from launcher.plan import Plan, make_plan
from launcher.state import RunState
from launcher.views.trial import verdict_text, verdicts
from tests.pure import given

LOG = [
    ("gpu-01", b"2026-11-23T06:00:00.1Z 0 ok rng_sync_check (0.1 s)"),
    ("gpu-02", b"2026-11-23T06:00:00.2Z 8 ok rng_sync_check (0.1 s)"),
    ("gpu-01", b"2026-11-23T06:00:00.3Z 0 ok test_trigger (0.1 s)"),
    ("gpu-01", b"2026-11-23T06:00:00.4Z 3 okay, said a library; passed by"),
    ("gpu-01", b"2026-11-23T06:00:00.5Z - "),
    ("gpu-01", b"torn"),
    ("gpu-01", b"2026-11-23T06:00:00.6Z 0 passed 2 checks"),
]


def plan(nodes: int = 2, **fields: Any) -> Plan:
    inventory = given.inventory(nodes=nodes, **fields)
    facts = given.all_facts(inventory)
    return make_plan(inventory, Job(script="trial.py"), facts, image="sha256:feed", run_id="run-1", code="c0de")


def ends(*those: NodeEnded) -> RunState:
    return RunState(ends={end.node: end for end in those})


def test_a_node_that_said_so_is_well_and_the_failed_one_is_told_with_its_rank() -> None:
    failure = Failure(
        rank=9,
        exit_code=1,
        signal=None,
        time=1.0,
        type="CheckFailed",
        message="dl_preparation_check: AssertionError: x",
    )
    state = ends(
        NodeEnded(time=1.0, node="gpu-01", code=0), NodeEnded(time=1.0, node="gpu-02", code=1, failures=(failure,))
    )
    rows = verdicts(plan(), state, LOG)
    assert rows == [
        {"node": "gpu-01", "ranks": [0, 7], "ok": True, "checks": 2, "wrong": None},
        {
            "node": "gpu-02",
            "ranks": [8, 15],
            "ok": False,
            "checks": 1,
            "wrong": "rank 9: exit 1: CheckFailed: dl_preparation_check: AssertionError: x",
        },
    ]
    assert verdict_text(rows) == (
        "node gpu-01: ok, ranks 0-7, 2 checks passed\n"
        "node gpu-02: failed, ranks 8-15, 1 check passed; "
        "rank 9: exit 1: CheckFailed: dl_preparation_check: AssertionError: x"
    )


def test_an_exit_code_of_0_alone_is_no_proof() -> None:
    state = ends(NodeEnded(time=1.0, node="gpu-01", code=0), NodeEnded(time=1.0, node="gpu-02", code=0))
    _, second = verdicts(plan(), state, LOG)
    assert (second["ok"], second["wrong"]) == (False, "it ended without having said that all checks were passed")


def test_a_node_of_which_nothing_was_heard_is_not_well() -> None:
    rows = verdicts(plan(nodes=1, defaults={"slots": 1}), RunState(), [])
    assert verdict_text(rows) == "node gpu-01: failed, rank 0, 0 checks passed; nobody knows how it ended"

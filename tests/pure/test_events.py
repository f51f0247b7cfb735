"""Events: what is written is what is read, and what cannot be read is passed over."""

from __future__ import annotations

import dataclasses
import json
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.events import (
    KINDS,
    CheckpointPlaced,
    CheckpointVerified,
    CodeArrived,
    Event,
    Failure,
    NodeEnded,
    NodeStarted,
    RunBegan,
    RunEnded,
    StageBegan,
    from_json,
    to_json,
)

FAILURE = Failure(rank=5, exit_code=137, signal="SIGKILL", time=1000.5, type=None, message="")
EVENTS = (
    RunBegan(
        time=1.0, run="run-1", cluster="lab", nodes=("gpu-01", "gpu-02"), world_size=16, command=("train.py", "a b", "")
    ),
    StageBegan(time=2.0, stage="start"),
    CodeArrived(time=3.0, node="gpu-01", digest="c0de", bytes=12345),
    NodeStarted(time=4.0, node="gpu-01", container="0123abcd"),
    NodeEnded(time=5.0, node="gpu-01", code=137, oom=True, failures=(FAILURE, dataclasses.replace(FAILURE, rank=None))),
    NodeEnded(time=5.5, node="gpu-02", code=1, stopped=True, lost="lost: no answer"),
    NodeEnded(
        time=5.6,
        node="gpu-03",
        code=143,
        stopped=True,
        others=(NodeEnded(time=5.0, node="gpu-01", code=137, failures=(FAILURE,)),),
    ),
    RunEnded(time=6.0, code=1, cause="node gpu-01, rank 5: killed by SIGKILL"),
    CheckpointVerified(time=7.0, unit="run-1/step-00000100", nodes=("gpu-01", "gpu-02"), bytes=1 << 40),
    CheckpointVerified(time=7.5, unit="run-1/step-00000100", nodes=("gpu-01",), bytes=3, flaws=("torn: latest",)),
    CheckpointPlaced(
        time=8.0, how="gathered", unit="run-1/step-00000100", place="gpu-01", folder="gathered/run-1", bytes=7
    ),
)


def test_there_is_one_of_each_kind_here() -> None:
    assert {type(event) for event in EVENTS} == set(KINDS)


def test_every_kind_is_known_to_the_reader() -> None:
    named = {kind.__name__ for kind in Event.__subclasses__()}  # by name: slots make every class twice
    assert {kind.__name__ for kind in KINDS} == named


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_it_was(event: Event) -> None:
    assert from_json(to_json(event)) == event


def test_an_event_is_one_line_of_json_that_names_its_kind() -> None:
    assert json.loads(to_json(StageBegan(time=2.0, stage="start"))) == {
        "event": "StageBegan",
        "time": 2.0,
        "stage": "start",
    }


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=40))
def test_whatever_a_rank_said_last_stays_one_line_that_any_file_can_hold(message: str) -> None:
    event = NodeEnded(time=1.0, node="gpu-01", code=1, failures=(dataclasses.replace(FAILURE, message=message),))
    line = to_json(event)
    assert len(line.splitlines()) == 1
    assert from_json(line.encode().decode()) == event


@pytest.mark.parametrize(
    "line",
    [
        "",
        " ",
        "null",
        "1",
        '"text"',
        "[]",
        "{}",
        '{"event": "StageBegan"}',
        '{"event": "StageBegan", "time": 1.0}',
        '{"event": "StageBegan", "time": 1.0, "stage": "start", "colour": "of a newer version"}',
        '{"event": "NodeWept", "time": 1.0}',
        '{"event": null}',
        '{"event": ["StageBegan"]}',
        '{"event": "NodeEnded", "time": 1.0, "node": "a", "code": 1, "failures": [1]}',
        '{"event": "NodeEnded", "time": 1.0, "node": "a", "code": 1, "failures": 1}',
        '{"event": "Event", "time": 1.0}',
        "[" * 100_000,
        "9" * 5000,
        "\0",
    ],
)
def test_what_is_no_event_of_ours_is_passed_over(line: str) -> None:
    assert from_json(line) is None


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_line_torn_anywhere_is_passed_over(event: Event) -> None:
    line = to_json(event)
    assert [from_json(line[:length]) for length in range(len(line))] == [None] * len(line)


def test_lists_come_back_as_tuples_wherever_the_events_say_so() -> None:
    for kind in KINDS:
        for name, hint in get_type_hints(kind).items():
            assert "list" not in str(hint), f"{kind.__name__}.{name}: values are tuples"

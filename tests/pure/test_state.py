"""The state of a run, and which failure was the first: readings of events alone."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.events import (
    CodeArrived,
    Event,
    Failure,
    NodeEnded,
    NodeStarted,
    RunBegan,
    RunEnded,
    StageBegan,
)
from launcher.state import RunState, first_cause, fold, node_end

BEGAN = RunBegan(
    time=100.0, run="run-1", cluster="lab", nodes=("gpu-01", "gpu-02"), world_size=16, command=("train.py", "--fast")
)
RANK_3 = "rank 3: killed by SIGKILL"
ECHOED = "it was stopped, or broke off, because another node had failed"
PEER = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.12]:38822"


def test_nothing_told_is_nothing_known() -> None:
    assert fold(()) == RunState()
    assert not RunState().is_over


def test_a_run_is_what_its_events_amount_to() -> None:
    ends = {name: NodeEnded(time=130.0, node=name, code=0) for name in ("gpu-01", "gpu-02")}
    events: list[Event] = [
        BEGAN,
        StageBegan(time=101.0, stage="prepare"),
        CodeArrived(time=102.0, node="gpu-01", digest="c0de", bytes=1),
        StageBegan(time=103.0, stage="start"),
        NodeStarted(time=104.0, node="gpu-01", container="a"),
        NodeStarted(time=104.5, node="gpu-02", container="b"),
        StageBegan(time=105.0, stage="watch"),
        *ends.values(),
        RunEnded(time=131.0, code=0),
    ]
    known = RunState(
        run="run-1",
        cluster="lab",
        nodes=("gpu-01", "gpu-02"),
        world_size=16,
        command=("train.py", "--fast"),
        phase="watch",
        began=100.0,
        started=("gpu-01", "gpu-02"),
    )
    assert fold(events[:7]) == known
    assert not fold(events[:-1]).is_over
    done = fold(events)
    assert done.is_over
    assert (done.phase, done.code, done.cause, done.ended, done.ends) == ("done", 0, "", 131.0, ends)


@pytest.mark.parametrize(("code", "phase"), [(0, "done"), (1, "failed"), (137, "failed"), (130, "stopped")])
def test_how_a_run_ended_is_its_phase(code: int, phase: str) -> None:
    assert fold([BEGAN, RunEnded(time=131.0, code=code, cause="why")]).phase == phase


def test_an_event_that_says_nothing_of_the_state_leaves_it() -> None:
    assert fold([BEGAN, CodeArrived(time=1.0, node="a", digest="b", bytes=1)]) == fold([BEGAN])


def failure(**fields: Any) -> Failure:
    return Failure(**{"rank": 0, "exit_code": 1, "signal": None, "time": 10.0, "type": None, "message": "", **fields})


def end(node: str, *failures: Failure, **fields: Any) -> NodeEnded:
    return NodeEnded(**{"time": 50.0, "node": node, "code": 1, "failures": failures, **fields})


def cause(*ends: NodeEnded) -> tuple[str, str] | None:
    return first_cause({one.node: one for one in ends})


def echo(**fields: Any) -> Failure:
    return failure(**{"type": "RuntimeError", "message": PEER, **fields})


def killed(**fields: Any) -> Failure:
    return failure(**{"signal": "SIGKILL", "exit_code": 137, **fields})


def test_a_run_that_ended_well_has_no_cause() -> None:
    assert cause() is None
    assert cause(end("gpu-01", code=0), end("gpu-02", code=0)) is None


def test_the_killed_rank_is_the_cause_even_if_its_echo_was_earlier() -> None:
    assert cause(end("gpu-01", echo(rank=0, time=9.0)), end("gpu-02", killed(rank=5, time=12.0))) == (
        "gpu-02",
        "node gpu-02, rank 5: killed by SIGKILL",
    )


@pytest.mark.parametrize(
    "message",
    [
        PEER,
        "Connection reset by peer",
        "[Errno 32] Broken pipe",
        "Socket Timeout",
        "Connection refused",
        "NCCL error: remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error or a remote error",
        "Timed out waiting 1800000ms for recv operation to complete",
        "The store connection was lost",
        "Heartbeat monitor timed out!",
    ],
)
def test_what_a_rank_says_of_anothers_death_is_an_echo(message: str) -> None:
    own = failure(rank=9, time=99.0, type="ValueError", message="loss is nan")
    heard = failure(rank=0, time=1.0, type="RuntimeError", message=message)
    assert cause(end("gpu-01", heard), end("gpu-02", own)) == (
        "gpu-02",
        "node gpu-02, rank 9: exit 1: ValueError: loss is nan",
    )


def test_an_abort_with_an_echo_is_an_echo_and_another_signal_never() -> None:
    abort = echo(rank=0, time=1.0, signal="SIGABRT", exit_code=134)
    assert cause(end("gpu-01", abort), end("gpu-02", killed(rank=3, time=2.0))) == (
        "gpu-02",
        "node gpu-02, rank 3: killed by SIGKILL",
    )
    segfault = echo(rank=0, time=1.0, signal="SIGSEGV", exit_code=139)
    assert cause(end("gpu-01", segfault), end("gpu-02", killed(rank=3, time=2.0))) == (
        "gpu-01",
        "node gpu-01, rank 0: killed by SIGSEGV",
    )


def test_of_several_the_earliest_is_the_cause() -> None:
    later, earlier = killed(rank=1, time=12.0), failure(rank=8, time=11.0, type="ValueError", message="bad batch")
    assert cause(end("gpu-01", later), end("gpu-02", earlier)) == (
        "gpu-02",
        "node gpu-02, rank 8: exit 1: ValueError: bad batch",
    )


def test_of_one_moment_the_lowest_rank_is_the_cause() -> None:
    both = killed(rank=3, time=12.0), killed(rank=2, time=12.0), killed(rank=None, time=13.0)
    assert cause(end("gpu-01", *both)) == ("gpu-01", "node gpu-01, rank 2: killed by SIGKILL")
    again = killed(rank=2, time=12.0), killed(rank=2, time=12.0)
    assert cause(end("gpu-01", *again)) == ("gpu-01", "node gpu-01, rank 2: killed by SIGKILL")


def test_where_all_are_echoes_the_earliest_must_do() -> None:
    assert cause(end("gpu-01", echo(rank=0, time=3.0)), end("gpu-02", echo(rank=8, time=2.0))) == (
        "gpu-02",
        f"node gpu-02, rank 8: exit 1: RuntimeError: {PEER}",
    )


def test_memory_is_the_cause_whatever_the_ranks_said() -> None:
    oom = end("gpu-02", killed(rank=5, time=20.0), oom=True, code=137)
    assert cause(end("gpu-01", echo(rank=0, time=3.0)), oom) == (
        "gpu-02",
        "node gpu-02: out of memory: the kernel killed it at the container's limit",
    )


def test_a_lost_node_is_the_cause_where_the_others_only_echo() -> None:
    lost = end("gpu-02", lost="lost: no answer within 10 s, silent for 60 s", time=120.0)
    assert cause(end("gpu-01", echo(rank=0, time=3.0), time=60.0), lost) == (
        "gpu-02",
        "node gpu-02: lost: no answer within 10 s, silent for 60 s",
    )


def test_a_lost_node_is_not_the_cause_where_a_rank_failed_by_itself() -> None:
    lost = end("gpu-02", lost="lost: no answer", time=5.0)
    own = failure(rank=0, time=99.0, type="ValueError", message="bad batch")
    assert cause(end("gpu-01", own), lost) == ("gpu-01", "node gpu-01, rank 0: exit 1: ValueError: bad batch")


def test_an_end_that_nobody_explained_is_its_exit_code() -> None:
    assert cause(end("gpu-02", code=137, time=9.0), end("gpu-01", code=1, time=10.0)) == (
        "gpu-02",
        "node gpu-02: exit 137",
    )


def test_a_node_that_was_told_to_stop_is_no_cause() -> None:
    stopped = end("gpu-01", killed(rank=0, time=1.0), stopped=True, code=143)
    assert cause(stopped) is None
    assert cause(stopped, end("gpu-02", failure(rank=8, time=9.0, exit_code=3))) == (
        "gpu-02",
        "node gpu-02, rank 8: exit 3",
    )


def test_a_clock_that_is_off_cannot_hide_the_cause_among_echoes() -> None:
    early_echo = end("gpu-01", echo(rank=0, time=-3600.0))
    assert cause(early_echo, end("gpu-02", killed(rank=8, time=10.0))) == (
        "gpu-02",
        "node gpu-02, rank 8: killed by SIGKILL",
    )


def test_a_rank_that_left_by_sys_exit_is_its_code_alone() -> None:
    left = failure(rank=4, exit_code=3, type="SystemExit", message="3")
    assert cause(end("gpu-01", left)) == ("gpu-01", "node gpu-01, rank 4: exit 3")


def test_a_failure_of_no_rank_is_the_launchs_own() -> None:
    own = failure(rank=None, type="ValueError", message="the config is wrong")
    assert cause(end("gpu-01", own)) == ("gpu-01", "node gpu-01: exit 1: ValueError: the config is wrong")


def test_a_long_message_becomes_one_short_line() -> None:
    told = cause(end("gpu-01", failure(type="ValueError", message="first\n  second\t" + "x" * 500)))
    assert told is not None
    said = told[1].removeprefix("node gpu-01, rank 0: exit 1: ValueError: ")
    assert said.startswith("first second xxx")
    assert (len(said), said[-1]) == (200, "…")


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (end("gpu-01", code=0), ""),
        (end("gpu-01", failure(rank=3, time=2.0, signal="SIGKILL"), failure(rank=4, time=1.0, message=PEER)), RANK_3),
        (end("gpu-01", failure(rank=None, type="ValueError", message="None:29500")), "exit 1: ValueError: None:29500"),
        (end("gpu-01", code=137, oom=True), "out of memory: the kernel killed it at the container's limit"),
        (end("gpu-01", failure(message=PEER)), ECHOED),
        (end("gpu-01", code=143, stopped=True), ECHOED),
        (end("gpu-01", failure(signal="SIGTERM"), code=143, stopped=True), ECHOED),
        (end("gpu-01", failure(rank=3, signal="SIGTERM"), code=143), "rank 3: killed by SIGTERM"),
        (end("gpu-01", lost="lost: no answer, silent for 60 s"), "lost: no answer, silent for 60 s"),
        (end("gpu-01", code=3), "exit 3"),
    ],
)
def test_how_one_node_ended_in_its_own_words(one: NodeEnded, said: str) -> None:
    assert node_end(one) == said

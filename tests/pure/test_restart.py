"""Whether a run is started again: rules, and what is worth it without any."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import InputError
from launcher.events import Failure, NodeEnded
from launcher.restart import LONGEST_DELAY, Decision, Policy, judge, read_policy

THREE = Policy(restarts=3)


def ends(*failures: dict[str, Any], **said: Any) -> dict[str, NodeEnded]:
    usual = {"rank": 1, "exit_code": 1, "signal": None, "time": 10.0, "type": None, "message": ""}
    made = tuple(Failure(**{**usual, **failure}) for failure in failures)
    end = NodeEnded(**{"time": 20.0, "node": "b", "code": 1, "failures": made, **said})
    return {"a": NodeEnded(time=20.0, node="a", code=143, stopped=True), "b": end}


def decide(
    found: dict[str, NodeEnded],
    policy: Policy = THREE,
    *,
    done: int = 0,
    matched: bool | None = None,
    new: bool = False,
) -> Decision:
    return judge(policy, found, done=done, matched=matched, progressed=new)


KILLED = {"signal": "SIGKILL", "exit_code": 137}


@pytest.mark.parametrize(
    "failure",
    [
        KILLED,
        {"signal": "SIGSEGV", "exit_code": 139},
        {"type": "Hang", "message": "no progress: no process of any node wrote anything for 30 s"},
        {"type": "RuntimeError", "message": "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]"},
        {"type": "RuntimeError", "message": "CUDA error: uncorrectable ECC error encountered"},
        {"type": "DistBackendError", "message": "NCCL error in: ..., unhandled system error"},
        {"type": "ConnectionError", "message": "could not fetch the model"},
    ],
    ids=lambda failure: str(failure.get("type") or failure["signal"]),
)
def test_what_may_be_over_the_next_time_is_tried_again(failure: dict[str, Any]) -> None:
    assert decide(ends(failure)) == Decision(again=True, why="it may be over the next time", delay=10.0)


@pytest.mark.parametrize(
    "failure",
    [
        {"type": "ModuleNotFoundError", "message": "No module named 'transformerz'"},
        {"type": "SystemExit", "exit_code": 2, "message": "2"},
        {"type": "ValueError", "message": "no such tokenizer"},
        {"type": "RuntimeError", "message": "mat1 and mat2 shapes cannot be multiplied"},
        {"exit_code": 3},
    ],
    ids=lambda failure: str(failure.get("type")),
)
def test_what_the_script_itself_did_is_not(failure: dict[str, Any]) -> None:
    assert decide(ends(failure)) == Decision(again=False, why="the script itself ended so, and would again")


@pytest.mark.parametrize(
    "found",
    [
        ends({"type": "OutOfMemoryError", "message": "CUDA out of memory. Tried to allocate 20.00 GiB"}),
        ends({"type": "RuntimeError", "message": "CUDA error: out of memory"}),
        ends({"type": "MemoryError"}),
        ends(KILLED, oom=True),
    ],
)
def test_memory_that_ran_out_is_not_tried_again(found: dict[str, NodeEnded]) -> None:
    assert decide(found) == Decision(again=False, why="memory that ran out once runs out again")


def test_a_lost_node_is_waited_for() -> None:
    assert decide(ends(lost="lost: silent for 60 s")) == Decision(again=True, why="a node was lost", delay=10.0)


def test_a_run_that_was_stopped_is_not_started_again() -> None:
    assert decide(ends(code=143, stopped=True)) == Decision(again=False, why="nothing failed")


def test_without_restarts_there_are_none() -> None:
    assert decide(ends(KILLED), Policy()) == Decision(again=False, why="no restarts were asked for")


def test_the_restarts_are_counted_and_wait_longer_each_time() -> None:
    many = Policy(restarts=10)
    delays = [decide(ends(KILLED), many, done=done, new=True).delay for done in range(10)]
    assert delays == [10, 20, 40, 80, 160, 300, 300, 300, 300, LONGEST_DELAY]
    assert decide(ends(KILLED), many, done=10, new=True).why == "it was started again 10 times"


def test_a_restart_that_made_no_progress_is_the_last() -> None:
    assert decide(ends(KILLED), done=1).why == "the last restart wrote no checkpoint: one more would come no further"
    assert decide(ends(KILLED), done=1, new=True).again


def test_the_users_rules_win_and_the_first_of_them() -> None:
    policy = read_policy(3, ["3=restart", "137=fail", "3=fail"], [])
    assert decide(ends({"exit_code": 3}), policy).again
    assert decide(ends(KILLED), policy) == Decision(again=False, why="exit code 137 says so (--on-exit)")


@pytest.mark.parametrize("says", [True, False])
def test_a_line_of_the_log_wins_over_everything(says: bool) -> None:
    policy = read_policy(3, ["137=fail", "3=restart"], [])
    assert decide(ends(KILLED), policy, matched=says).again is says


def test_rules_are_read() -> None:
    assert read_policy(2, ["17=restart", "2=fail"], ["a=b=restart", "loss is nan=fail"]) == Policy(
        restarts=2, on_exit=((17, True), (2, False)), on_log=(("a=b", True), ("loss is nan", False))
    )


@pytest.mark.parametrize(
    "text", ["", "=", "3", "3=", "=restart", "3=maybe", "x=restart", "0=fail", "256=fail", "²=fail"]
)
def test_a_bad_exit_rule_is_refused(text: str) -> None:
    with pytest.raises(InputError) as refused:
        read_policy(1, [text], [])
    assert refused.value.where == "--on-exit"
    assert refused.value.next_step


@pytest.mark.parametrize("text", ["", "x", "=fail", "(=restart", "x=again"])
def test_a_bad_log_rule_is_refused(text: str) -> None:
    with pytest.raises(InputError) as refused:
        read_policy(1, [], [text])
    assert refused.value.where == "--on-log"

"""The first cause where nodes also tell of each other. What each says of itself alone: test_state.py."""

from __future__ import annotations

from typing import Any

from launcher.inside.cause import HANG, first_cause

SILENT = "lost: silent for 60 s on the training network"


def report(node: str, **said: Any) -> dict[str, Any]:
    usual = {"time": 50.0, "code": 143, "stopped": True, "oom": False, "lost": "", "failures": [], "others": []}
    return {"node": node, **usual, **said}


def failed(node: str, *failures: dict[str, Any], **said: Any) -> dict[str, Any]:
    return report(node, code=1, stopped=False, failures=list(failures), **said)


def lost(node: str, **said: Any) -> dict[str, Any]:
    return report(node, **{"code": 1, "stopped": False, "lost": SILENT, "time": 20.0, **said})


def failure(**said: Any) -> dict[str, Any]:
    return {"rank": 3, "exit_code": 137, "signal": "SIGKILL", "time": 10.0, "type": None, "message": "", **said}


def cause(*reports: dict[str, Any]) -> str | None:
    found = first_cause(reports)
    return found and found[1]


def test_one_node_is_enough_to_know_what_another_one_told() -> None:
    assert cause(report("a", others=[failed("b", failure())])) == "node b, rank 3: killed by SIGKILL"


def test_a_nodes_own_word_wins_over_what_was_heard_of_it() -> None:
    heard = report("a", others=[failed("b", failure(signal=None, exit_code=1, message="Broken pipe"))])
    assert cause(heard, failed("b", failure(rank=4))) == "node b, rank 4: killed by SIGKILL"


def test_what_a_node_told_before_we_lost_it_is_its_word() -> None:
    gone = report("b", code=1, stopped=False, lost="lost: no answer, silent for 60 s", time=120.0)
    assert cause(report("a", others=[failed("b", failure())]), gone) == "node b, rank 3: killed by SIGKILL"
    assert cause(report("a", code=0, stopped=False, others=[report("b", code=0, stopped=False)]), gone) is None


def test_a_node_that_the_others_lost_is_the_cause() -> None:
    reports = [report("a", others=[lost("c"), report("b")]), report("b", others=[lost("c"), report("a")])]
    assert cause(*reports) == f"node c: {SILENT}"
    assert cause(*reports, report("c", others=[lost("a"), lost("b")])) == f"node c: {SILENT}"


def test_of_two_that_lost_each_other_neither_is_blamed() -> None:
    both = report("a", others=[lost("b")]), report("b", others=[lost("a", time=21.0)])
    assert cause(*both) == f"nodes a and b lost each other: {SILENT}"


def test_only_one_of_two_tells_of_the_loss() -> None:
    assert cause(report("a", others=[lost("b")])) == f"node b: {SILENT}"


def test_an_echo_is_not_the_cause_where_a_node_was_lost() -> None:
    echo = failure(signal=None, exit_code=1, message="Connection closed by peer")
    assert cause(failed("a", echo, others=[lost("b")])) == f"node b: {SILENT}"


def test_who_failed_by_itself_was_not_lost_for_nothing() -> None:
    reports = [report("a", others=[lost("b")]), failed("b", failure())]
    assert cause(*reports) == "node b, rank 3: killed by SIGKILL"


def test_a_hang_is_told_in_its_own_words_and_is_no_echo() -> None:
    why = "no progress: no process of any node wrote anything for 30 s"
    general = failure(rank=None, signal=None, exit_code=1, type=HANG, message=why)
    assert cause(failed("a", general), report("b")) == f"node a: {why}"
    blamed = failure(rank=5, signal=None, exit_code=1, type=HANG, message=f"is stopped (SIGSTOP); {why}", time=1.0)
    assert cause(failed("a", general), failed("b", blamed)) == f"node b, rank 5: is stopped (SIGSTOP); {why}"
    peers = failure(rank=None, signal=None, exit_code=1, type=HANG, message="a heartbeat of a peer", time=1.0)
    assert cause(failed("a", peers, others=[lost("b")])) == "node a: a heartbeat of a peer"


def test_when_all_were_told_to_stop_there_is_none() -> None:
    assert cause(report("a", others=[report("b")]), report("b", others=[report("a")])) is None

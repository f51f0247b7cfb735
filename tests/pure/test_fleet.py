"""Many machines at once: everyone is heard before anyone is judged."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from cluster.command import Result
from cluster.engine import Engine
from cluster.errors import CommandError, EngineError, NodeError, UnreachableError
from cluster.fleet import WIDTH, Answers, Machine, address_of, ask_facts, closing, connect, each
from cluster.transport import Transport
from cluster.trust import Address
from tests.pure import given

NOTHING = Result(code=0, stdout=b"", stderr=b"")


@dataclass
class Scripted:
    """As much of both hands as is asked for here; every command has the same answer."""

    answer: Result
    calls: list[str] = field(default_factory=list)

    def open(self) -> None:
        self.calls.append("open")

    def run(self, *_: object, **__: object) -> Result:
        self.calls.append("run")
        return self.answer

    def close(self) -> None:
        self.calls.append("close")


def machine(name: str = "gpu-01", answer: Result = NOTHING) -> Machine:
    hands = Scripted(answer)
    return Machine(name=name, transport=cast(Transport, hands), engine=cast(Engine, hands))


MACHINES = tuple(machine(f"gpu-{number:02d}") for number in range(1, 4))


def test_every_machine_answers_by_its_name() -> None:
    assert each(MACHINES, lambda one: one.name[-1]) == Answers(good={"gpu-01": "1", "gpu-02": "2", "gpu-03": "3"})
    assert each((), lambda one: one.name) == Answers()


def test_a_nodes_error_is_an_answer_beside_the_others() -> None:
    def act(one: Machine) -> str:
        if one.name == "gpu-02":
            raise CommandError(one.name, "it burns")
        return "well"

    answers = each(MACHINES, act)
    assert answers.good == {"gpu-01": "well", "gpu-03": "well"}
    assert [str(error) for error in answers.bad.values()] == ["node gpu-02: it burns"]


def test_any_other_error_is_a_bug_and_crashes() -> None:
    with pytest.raises(ZeroDivisionError):
        each(MACHINES, lambda _one: 1 // 0)


def test_all_errors_are_told_as_one_and_a_common_cure_once() -> None:
    def act(one: Machine) -> str:
        raise EngineError(one.name, "Docker is down", next_step="start it")

    with pytest.raises(EngineError) as caught:
        each(MACHINES, act).all_or_raise()
    assert str(caught.value).splitlines() == [
        "node gpu-01: Docker is down",
        "  node gpu-02: Docker is down",
        "  node gpu-03: Docker is down",
        "  next: start it",
    ]


def test_a_later_answer_of_a_node_counts_instead() -> None:
    lost, full = UnreachableError("b", "no answer"), CommandError("c", "no room")
    first: Answers[int] = Answers(good={"a": 1, "d": 4}, bad={"b": lost, "c": full})
    assert first.then(Answers(good={"c": 3}, bad={"d": lost})) == Answers(
        good={"a": 1, "c": 3}, bad={"b": lost, "d": lost}
    )
    assert first.then(Answers()) == first


def test_where_nothing_is_bad_the_answers_are_given() -> None:
    assert Answers(good={"gpu-01": 1}).all_or_raise() == {"gpu-01": 1}


def test_who_does_not_answer_in_time_is_unreachable_and_the_others_count() -> None:
    release = threading.Event()

    def act(one: Machine) -> str:
        if one.name == "gpu-02":
            release.wait()
        return "well"

    try:
        answers = each(MACHINES[1:2], act, deadline=0.0)
    finally:
        release.set()
    assert answers.good == {}
    assert str(answers.bad["gpu-02"]) == "node gpu-02: no answer within 0 s"
    assert isinstance(answers.bad["gpu-02"], UnreachableError)


def test_who_waited_for_a_turn_when_the_deadline_passed_does_nothing_later() -> None:
    release, acted = threading.Event(), []
    many = tuple(machine(f"n{number:03d}") for number in range(WIDTH + 5))

    def act(one: Machine) -> None:
        acted.append(one.name)
        release.wait()

    before = set(threading.enumerate())
    try:
        answers = each(many, act, deadline=0.0)
        running = set(threading.enumerate()) - before
    finally:
        release.set()
    for thread in running:
        thread.join()
    assert set(answers.bad) == {one.name for one in many}
    assert len(acted) <= WIDTH


def test_no_more_than_the_width_act_at_once() -> None:
    lock, now, most = threading.Lock(), 0, 0
    many = tuple(machine(f"n{number:03d}") for number in range(3 * WIDTH))

    def act(_one: Machine) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        with lock:
            now -= 1

    assert len(each(many, act).good) == len(many)
    assert most <= WIDTH


def test_machines_are_let_go_of_whatever_happened() -> None:
    one = machine()
    with pytest.raises(NodeError), closing((one,)):
        raise NodeError("gpu-01", "it burns")
    assert cast(Scripted, one.transport).calls == ["close", "close"]


def test_who_hangs_at_the_end_is_left_and_the_others_are_let_go_of() -> None:
    release, hung, other = threading.Event(), machine("gpu-01"), machine("gpu-02")
    cast(Scripted, hung.engine).close = release.wait  # type: ignore[assignment, method-assign]
    before = set(threading.enumerate())
    try:
        with closing((hung, other)):
            pass
        left = set(threading.enumerate()) - before
    finally:
        release.set()
    for thread in left:
        thread.join()
    assert len(left) == 1
    assert cast(Scripted, other.transport).calls == ["close", "close"]


def test_facts_are_asked_for_in_one_round_trip() -> None:
    one = machine(answer=Result(code=0, stdout=b"hello\n\n--8<-- fact system\nuser=ml\n", stderr=b""))
    facts = ask_facts(one, paths=(), peers=(), engine="docker")
    assert facts.system.user == "ml"
    assert cast(Scripted, one.transport).calls == ["open", "run"]


def test_an_account_that_may_not_run_commands_is_told_as_such() -> None:
    nologin = Result(code=1, stdout=b"This account is currently not available.\n", stderr=b"")
    with pytest.raises(CommandError) as caught:
        ask_facts(machine(answer=nologin), paths=(), peers=(), engine="docker")
    assert str(caught.value).splitlines() == [
        "node gpu-01: the survey ended with exit code 1",
        "  This account is currently not available.",
        "  next: the account must be able to run commands with sh",
    ]


def test_connecting_reaches_nobody_yet() -> None:
    inventory = given.inventory(nodes=2, defaults={"user": "ml", "port": 2222, "jump": "ada@bastion.example"})
    machines = connect(inventory, known_hosts=Path("/nowhere/known_hosts"))
    with closing(machines):
        assert [one.name for one in machines] == ["gpu-01", "gpu-02"]
    assert address_of(inventory.nodes[0]) == Address(
        node="gpu-01", host="10.0.0.11", port=2222, user="ml", identity_file=None, jump="ada@bastion.example"
    )

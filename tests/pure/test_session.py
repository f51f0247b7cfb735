"""Some of the nodes: what a session with these alone is, which runs stand there, and how spares stand in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.container import (
    LABEL_CLUSTER,
    LABEL_NODE,
    LABEL_NODES,
    LABEL_OWNER,
    LABEL_ROLE,
    LABEL_RUN,
    Container,
    ContainerSpec,
    ContainerState,
)
from cluster.errors import InputError, LockedError, UnreachableError
from cluster.fleet import Machine
from launcher import execute
from launcher.attempts import with_spares
from launcher.converge import converge
from launcher.events import RunEnded
from launcher.job import Job
from launcher.plan import Plan, make_plan
from launcher.record import Memory
from launcher.session import Seen, Session, narrowed, nodes_of, run_containers
from launcher.stages.start import start_run
from tests.pure import given
from tests.pure.doubles import FileTransport, MemoryEngine

RUN, OTHER = "20261126-170512-a01b", "20261126-180000-b01b"


class Heard:
    """A voice that is remembered."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Lab:
    """Machines in memory, and a session with them."""

    def __init__(self, folder: Path, *, nodes: int = 4, **fields: Any) -> None:
        inventory = given.inventory(nodes=nodes, **fields)
        names = [node.name for node in inventory.nodes]
        self.transports = {name: FileTransport(name) for name in names}
        self.engines = {name: MemoryEngine(name) for name in names}
        (self.digest,) = {engine.put_image(b"image") for engine in self.engines.values()}
        self.voice = Heard()
        self.now = Session(
            inventory=inventory,
            memory=Memory(folder).cluster("lab"),
            machines=[Machine(name=name, transport=self.transports[name], engine=self.engines[name]) for name in names],
            voice=self.voice,
        )

    def plan(self, *names: str, run: str = RUN) -> Plan:
        """The plan of a run on these nodes."""
        inventory = narrowed(self.now, names).inventory
        numbers = {node.name: number for number, node in enumerate(self.now.inventory.nodes, 1)}
        facts = {name: given.facts(numbers[name]) for name in names}
        return make_plan(inventory, Job(script="train.py"), facts, image=self.digest, run_id=run)

    def start(self, *names: str, run: str = RUN) -> None:
        """Start a run's containers on these nodes."""
        plan = self.plan(*names, run=run)
        start_run(narrowed(self.now, names).machines, plan, {})

    def lose(self, *names: str) -> None:
        """These nodes answer no more."""
        for name in names:
            self.transports[name].faults.at("open", *[UnreachableError(name, "no route to host")] * 9)

    def standing(self) -> dict[str, str]:
        """Which run has a container where."""
        found = {name: engine.find({}) for name, engine in self.engines.items()}
        return {node: run for run, nodes in run_containers(found).items() for node in nodes}


def names(now: Session) -> list[str]:
    assert [machine.name for machine in now.machines] == [node.name for node in now.inventory.nodes]
    return [machine.name for machine in now.machines]


def test_nodes_are_taken_in_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    some = narrowed(lab.now, ["gpu-03", "gpu-01"])
    assert names(some) == ["gpu-03", "gpu-01"]
    assert some.whole is lab.now
    plan = lab.plan("gpu-03", "gpu-01")
    assert [(node.name, node.rank) for node in plan.nodes] == [("gpu-03", 0), ("gpu-01", 1)]
    assert (plan.master, plan.world_size) == ("10.0.0.13", 16)


def test_all_nodes_are_the_session_itself_and_spares_are_left_out(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    assert narrowed(lab.now) is lab.now
    lab = Lab(tmp_path, spares=["gpu-02", "gpu-04"])
    assert names(narrowed(lab.now)) == ["gpu-01", "gpu-03"]
    assert names(narrowed(lab.now, ["gpu-04"])) == ["gpu-04"]


def test_a_run_on_some_nodes_leaves_idle_containers_that_know_of_all(tmp_path: Path) -> None:
    lab = Lab(tmp_path, nodes=2)
    idle = [
        Container(
            id=name,
            name=name,
            image=image,
            state=ContainerState.RUNNING,
            labels={LABEL_ROLE: "node", LABEL_NODE: name},
        )
        for name, image in (("gpu-01", lab.digest), ("gpu-02", "sha256:another"))
    ]
    facts = given.all_facts(lab.now.inventory)

    def missing(now: Session) -> tuple[str, ...]:
        some = {machine.name for machine in now.machines}
        found = {one.id: (one,) for one in idle if one.id in some}
        seen = Seen(facts=facts, found=found, digests=dict.fromkeys(found, lab.digest))
        return converge(now, seen, tag="tag", job=Job(script=""), dry_run=True)[0].started

    assert missing(lab.now) == ("gpu-01", "gpu-02")
    assert missing(narrowed(lab.now, ["gpu-01"])) == ()
    assert missing(narrowed(lab.now, ["gpu-02"])) == ("gpu-02",)


def test_runs_on_disjoint_nodes_stand_side_by_side_and_a_common_node_is_held(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.start("gpu-02", "gpu-01")
    with pytest.raises(LockedError, match=f"run {RUN} is under way") as held:
        lab.start("gpu-04", "gpu-03", "gpu-02", run=OTHER)
    assert (held.value.exit_code, held.value.where) == (7, "node gpu-02")
    assert lab.standing() == {"gpu-01": RUN, "gpu-02": RUN}
    lab.start("gpu-04", "gpu-03", run=OTHER)
    assert lab.standing() == {"gpu-01": RUN, "gpu-02": RUN, "gpu-03": OTHER, "gpu-04": OTHER}


def test_a_name_that_is_given_away_and_not_yet_listed_is_asked_for_again(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.engines["gpu-01"].faults.at("create", *[LockedError("a container of that name is already there")] * 2)
    lab.start("gpu-01", "gpu-02")
    assert lab.standing() == {"gpu-01": RUN, "gpu-02": RUN}


def test_a_run_whose_container_is_taken_away_before_its_start_says_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    one = lab.engines["gpu-01"]
    one.faults.at("start", lambda: one.remove(one.find({})[0].id))
    with pytest.raises(LockedError, match="was removed before it could start"):
        lab.start("gpu-01", "gpu-02")
    assert lab.standing() == {}


def test_of_several_runs_one_must_be_named(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.start("gpu-02", "gpu-01")
    lab.start("gpu-03", run=OTHER)
    with pytest.raises(InputError) as several:
        execute.stop(lab.now)
    assert str(several.value).splitlines() == [
        "2 runs are under way: which one is meant?",
        f"  {RUN} on gpu-02, gpu-01",
        f"  {OTHER} on gpu-03",
        f"  next: name it, as {OTHER}",
    ]
    with pytest.raises(InputError):
        execute.choose_run(lab.now, None)
    assert execute.choose_run(lab.now, RUN) == RUN
    with pytest.raises(InputError, match="run 20261126-170512-ffff is not under way"):
        execute.attach(lab.now, "20261126-170512-ffff", show=lambda *_: None)
    lab.engines["gpu-03"].end(lab.engines["gpu-03"].find({LABEL_RUN: OTHER})[0].id, 0)
    assert execute.choose_run(lab.now, None) == RUN


def test_what_a_run_that_is_over_has_left_is_cleared_away_by_the_next_stop(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.start("gpu-01", "gpu-02")
    lab.start("gpu-03", run=OTHER)
    lab.now.memory.run(RUN).emit(RunEnded(time=2, code=1, cause="node gpu-02: lost"))
    assert execute.choose_run(lab.now, None) == OTHER
    for name in ("gpu-01", "gpu-02"):
        (one,) = lab.engines[name].find({LABEL_RUN: RUN})
        lab.engines[name].end(one.id, 143)
    with pytest.raises(InputError, match="is not under way"):
        execute.attach(lab.now, RUN, show=lambda *_: None)
    assert execute.stop(lab.now, RUN) is None
    assert lab.standing() == {"gpu-03": OTHER}


def test_what_still_lives_of_a_run_that_is_over_is_ended_as_well(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.start("gpu-01", "gpu-02")
    lab.start("gpu-03", run=OTHER)
    lab.now.memory.run(RUN).emit(RunEnded(time=2, code=1, cause="node gpu-02: lost"))
    assert execute.choose_run(lab.now, None) == OTHER
    assert execute.stop(lab.now, "20261126-170512-ffff") is None
    assert lab.standing() == {"gpu-03": OTHER}


def test_a_run_tells_its_nodes(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.start("gpu-02", "gpu-01")
    (one,) = lab.engines["gpu-01"].find({LABEL_RUN: RUN})
    assert nodes_of({"gpu-01": one}) == ("gpu-02", "gpu-01")
    assert nodes_of({"gpu-01": replace(one, labels={})}) == nodes_of({}) == ()


def test_a_node_that_does_not_answer_makes_room_for_a_spare_at_its_rank(tmp_path: Path) -> None:
    lab = Lab(tmp_path, nodes=5, spares=["gpu-04", "gpu-05"])
    now = narrowed(lab.now)
    assert with_spares(now) is now
    lab.lose("gpu-01", "gpu-04")
    assert names(with_spares(now)) == ["gpu-05", "gpu-02", "gpu-03"]
    assert lab.voice.lines == ["node gpu-01 does not answer: the spare gpu-05 takes its place (no route to host)"]


def test_a_spare_that_has_a_run_is_none_and_without_one_all_is_as_it_was(tmp_path: Path) -> None:
    lab = Lab(tmp_path, nodes=3, spares=["gpu-03"])
    labels = {LABEL_CLUSTER: "lab", LABEL_OWNER: "ml", LABEL_ROLE: "run", LABEL_RUN: OTHER, LABEL_NODES: "gpu-03"}
    taken = lab.engines["gpu-03"].create(ContainerSpec(name="run", image=lab.digest, argv=(), labels=labels))
    lab.engines["gpu-03"].start(taken)
    lab.lose("gpu-02")
    now = narrowed(lab.now)
    assert names(with_spares(now)) == ["gpu-01", "gpu-02"]
    lab.engines["gpu-03"].end(taken, 0)
    assert names(with_spares(now)) == ["gpu-01", "gpu-03"]

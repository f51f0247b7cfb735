"""A session: one command's dealings with one cluster, and one look at all of its machines.

Everything that a command needs is here as a value: the inventory, the machines, the memory, and the ears (`Voice`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.container import (
    LABEL_CLUSTER,
    LABEL_NODES,
    LABEL_OWNER,
    LABEL_ROLE,
    LABEL_RUN,
    Container,
    ContainerState,
)
from cluster.errors import CommandError, InputError
from cluster.facts import NodeFacts
from cluster.fleet import Answers, Machine, ask_facts, closing, connect, each
from cluster.inventory import Inventory
from launcher import checks, operator, render
from launcher.image import Progress
from launcher.record import ClusterMemory

LOOK_DEADLINE = 30.0  # seconds for every node to answer one look, connecting included


class Voice(Protocol):
    """What the user hears while something is done; `views.live.Teller` stands behind it."""

    def say(self, text: str) -> None:
        """One line about what was done."""

    def warn(self, finding: checks.Finding) -> None:
        """A finding that does not forbid the start."""

    def building(self, progress: Progress) -> None:
        """Where the image's build is."""

    def shipping(self, node: str, taken: int, total: int) -> None:
        """How many bytes of the image a node has taken, of about how many."""

    def carrying(self, name: str, taken: int, total: int, left: float | None) -> None:
        """How many bytes of so many have arrived somewhere, and about how many seconds the rest will take."""

    def done(self) -> None:
        """What was being shown as progress is over."""


@contextmanager
def showing(voice: Voice) -> Iterator[None]:
    """Whatever happens, the progress that was shown is put away."""
    try:
        yield
    finally:
        voice.done()


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One command's dealings with one cluster, or with some of its nodes; `whole` is then the one with all of them."""

    inventory: Inventory
    memory: ClusterMemory
    machines: Sequence[Machine]
    voice: Voice
    whole: Session | None = None


@contextmanager
def session(inventory: Inventory, memory: ClusterMemory, voice: Voice) -> Iterator[Session]:
    """Machines that connect when they are first asked, and are let go of at the end."""
    machines = connect(inventory, known_hosts=memory.known_hosts)
    with closing(machines):
        yield Session(inventory=inventory, memory=memory, machines=machines, voice=voice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one look at the cluster found: facts, containers, and the image's digest on every node."""

    facts: Mapping[str, NodeFacts]
    found: Mapping[str, tuple[Container, ...]]
    digests: Mapping[str, str | None]


def look(now: Session, *, tag: str, keep: bool = True) -> Seen:
    """Ask every node everything at once; all must answer. With `keep` the facts are remembered."""
    inventory = now.inventory
    nodes = {node.name: node for node in inventory.nodes}

    def ask(machine: Machine) -> tuple[NodeFacts, tuple[Container, ...], str | None]:
        facts = ask_facts(
            machine,
            paths=checks.paths_to_ask(inventory, nodes[machine.name]),
            peers=checks.peers_to_ask(inventory),
            engine=inventory.engine,
        )
        if facts.docker.error and inventory.engine == "docker":
            return facts, (), None  # the findings will say so, beside whatever else is wrong
        return facts, machine.engine.find(ours(now, machine)), machine.engine.image_id(tag) if tag else None

    asked = each(now.machines, ask, deadline=LOOK_DEADLINE).all_or_raise()
    facts = {node: one for node, (one, _, _) in asked.items()}
    if keep:
        now.memory.save_facts({**now.memory.load_facts(), **facts})
    return Seen(
        facts=facts,
        found={node: containers for node, (_, containers, _) in asked.items()},
        digests={node: digest for node, (_, _, digest) in asked.items()},
    )


def ours(now: Session, machine: Machine, **labels: str) -> dict[str, str]:
    """The labels by which a machine's containers are ours: this cluster's, started by the user that we are there."""
    return {LABEL_CLUSTER: now.inventory.name, LABEL_OWNER: machine.transport.user, **labels}


def find_ours(now: Session, *, run: str | None = None) -> Answers[tuple[Container, ...]]:
    """Our containers on every node, by label alone; with `run` only that run's. Silence is an answer, too."""

    def ask(machine: Machine) -> tuple[Container, ...]:
        machine.transport.open()
        return machine.engine.find(ours(now, machine, **({LABEL_RUN: run} if run else {})))

    return each(now.machines, ask, deadline=LOOK_DEADLINE)


def run_containers(found: Mapping[str, tuple[Container, ...]]) -> dict[str, dict[str, Container]]:
    """The containers of runs that stand on the nodes: by run, the oldest first, and by node."""
    runs: dict[str, dict[str, Container]] = {}
    for node, containers in found.items():
        for one in containers:
            if one.labels.get(LABEL_ROLE) == render.ROLE_RUN:
                runs.setdefault(one.labels.get(LABEL_RUN, ""), {})[node] = one
    return dict(sorted(runs.items()))


def is_under_way(containers: Mapping[str, Container]) -> bool:
    """Whether a run lives on any of its nodes, or is about to."""
    return any(
        one.is_live or (one.state is ContainerState.CREATED and not operator.never_starts(one))
        for one in containers.values()
    )


def nodes_of(containers: Mapping[str, Container]) -> tuple[str, ...]:
    """The names of all nodes of a run by its containers on some of them; empty where those do not tell."""
    told = (one.labels.get(LABEL_NODES, "") for one in containers.values())
    return next((tuple(names.split(",")) for names in told if names), ())


def idle_container(now: Session, machine: Machine) -> Container:
    """A machine's node container; `CommandError` when it is not up."""
    machine.transport.open()
    found = machine.engine.find(ours(now, machine, **{LABEL_ROLE: render.ROLE_NODE}))
    live = [one for one in found if one.is_live]
    if not live:
        raise CommandError(machine.name, "it is not up", next_step="launcher up")
    return live[0]


def narrowed(now: Session, names: Sequence[str] = ()) -> Session:
    """The session with these nodes alone, in this order; with all but the spares where none is named."""
    names = tuple(names) or now.inventory.workers
    if names == tuple(machine.name for machine in now.machines):
        return now
    nodes = {node.name: node for node in now.inventory.nodes}
    chosen = {"nodes": tuple(nodes[name] for name in names), "spares": ()}
    return replace(
        now,
        inventory=now.inventory.model_copy(update=chosen),
        machines=choose_machines(now, names),
        whole=now.whole or now,
    )


def choose_machines(now: Session, names: tuple[str, ...]) -> tuple[Machine, ...]:
    """The machines of these names, all when there are none; `InputError` for one that is not in the inventory."""
    known = {machine.name: machine for machine in now.machines}
    for name in names:
        if name not in known:
            raise InputError(f"there is no node {name!r}", next_step=f"the nodes are: {', '.join(known)}")
    return tuple(known[name] for name in names) or tuple(now.machines)

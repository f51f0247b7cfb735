"""Start: the run's containers on all nodes, or on none."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from cluster.command import Command
from cluster.container import (
    LABEL_CLUSTER,
    LABEL_OPERATOR,
    LABEL_ROLE,
    LABEL_RUN,
    Container,
    ContainerSpec,
    ContainerState,
)
from cluster.errors import CommandError, EngineError, LockedError
from cluster.fleet import Machine, each
from launcher import operator, render
from launcher.plan import Plan
from launcher.stages.prepare import is_removed

SECRETS_COMPLETE = ".complete"  # the agent waits for this file
LISTED = 5.0  # seconds from the giving away of a container's name to its being listed


def refuse_foreign(found: Mapping[str, tuple[Container, ...]]) -> None:
    """`LockedError` when a run is under way on any of the nodes."""
    for node, containers in found.items():
        for one in containers:
            if one.labels.get(LABEL_ROLE) == render.ROLE_RUN and one.is_live:
                raise _held(node, one)


def _held(node: str, by: Container) -> LockedError:
    """Who has the node, from which machine, since when: a run's id begins with its time, in UTC."""
    run = by.labels.get(LABEL_RUN, "")
    who = f", started by {by.labels[LABEL_OPERATOR]}" if by.labels.get(LABEL_OPERATOR) else ""
    with suppress(ValueError):
        who += time.strftime(", since %Y-%m-%d %H:%M:%S UTC", time.strptime(run[:15], "%Y%m%d-%H%M%S"))
    return LockedError(
        f"run {run} is under way{who} (container {by.name})",
        where=f"node {node}",
        next_step=f"launcher attach {run} to watch it, launcher stop {run} to end it",
    )


def start_run(machines: Sequence[Machine], plan: Plan, secrets: Mapping[str, str]) -> Mapping[str, str]:
    """Create all containers, then start all; gives back their ids by node.

    The names are the lock: whoever makes the first container has the run, so of two operators who want the same nodes
    one wins, in whatever order they name them. When one container cannot be had, those that were made are removed
    again.
    """
    first, *others = sorted(machines, key=lambda machine: machine.name)
    nodes = {node.name: node for node in plan.nodes}
    made: dict[str, str] = {}

    def create(machine: Machine) -> None:
        made[machine.name] = _create(machine, render.run_container(plan, nodes[machine.name]))

    def start(machine: Machine) -> str:
        container = made[machine.name]
        try:
            machine.engine.start(container)
        except EngineError as error:
            if not is_removed(machine, container):
                raise
            raise LockedError(
                "the run's container was removed before it could start: somebody says launcher down, or stop",
                where=f"node {machine.name}",
                next_step="launcher run, when that is done",
            ) from error
        if plan.job.secrets:
            _hand_over(machine, container, nodes[machine.name].job.secrets, secrets)
        return container

    try:
        each([first], create).all_or_raise()
        each(others, create).all_or_raise()
        return each(machines, start).all_or_raise()
    except BaseException:
        undo_run(machines, plan)
        raise


def undo_run(machines: Sequence[Machine], plan: Plan) -> None:
    """Remove this run's containers, by label: also one that was still being made when the start was given up."""

    def undo(machine: Machine) -> None:
        for one in machine.engine.find({LABEL_CLUSTER: plan.cluster, LABEL_RUN: plan.run}):
            machine.engine.remove(one.id)

    each(machines, undo, deadline=15)


def _create(machine: Machine, spec: ContainerSpec) -> str:
    """Make the container; what an earlier run left of it makes room, if it has ended or will never start.

    An engine gives the name away before it lists the container: who has it is known a moment later.
    """
    end = time.monotonic() + LISTED
    while True:
        try:
            return machine.engine.create(spec)
        except LockedError as taken:
            holders = machine.engine.find(render.kin(spec))
            for one in holders:
                if not _is_stale(one):
                    raise _held(machine.name, one) from taken
                machine.engine.remove(one.id)
            if time.monotonic() > end:
                taken.next_step = (
                    "launcher attach to watch the run that holds it, launcher down to remove what was left"
                )
                raise
        time.sleep(0.1)


def _is_stale(one: Container) -> bool:
    return one.state is ContainerState.ENDED or operator.never_starts(one)


def _hand_over(machine: Machine, container: str, folder: str, secrets: Mapping[str, str]) -> None:
    """Fill the container's tmpfs over standard input: the values are in no argv, environment, inspect or disk."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, value in (*secrets.items(), (SECRETS_COMPLETE, "")):
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(value.encode()), 0o400
            tar.addfile(header, io.BytesIO(value.encode()))
    told = machine.engine.execute(container, Command(argv=("tar", "-oxf", "-", "-C", folder), stdin=archive.getvalue()))
    if not told.ok:
        raise CommandError(machine.name, "the secrets cannot be handed over", detail=told.tail(2))

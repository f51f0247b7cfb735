"""Prepare: directories and rendered files on the nodes, and the idle node containers of `up`."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Mapping, Sequence

from cluster.command import Result, script
from cluster.container import LABEL_CLUSTER, LABEL_PLAN, LABEL_ROLE, Container, ContainerSpec, ContainerState
from cluster.errors import CommandError, EngineError, LockedError
from cluster.fleet import Machine, each
from launcher import operator, render
from launcher.plan import NodePlan, Plan

PATIENCE = 10.0  # seconds that another `up` may take from making an idle container to its start
REMOVAL = 2.0  # seconds that an engine may take to remove a container that has not started

# A run's folder arrives beside its final name and is then renamed: it is never seen half.
_PUT = """
set -eu; umask 077
folder=$1; fresh=$1.fresh.$$; shift
mkdir -p "$@" "$(dirname "$folder")"
trap 'rm -rf "$fresh"' EXIT
mkdir "$fresh"; tar -xf - -C "$fresh"
mv "$fresh" "$folder"
"""
# The node's own folder stays, file by file: a container that another `up` has just started holds it.
_PUT_NODE = """
set -eu; umask 077
folder=$1; fresh=$1.fresh.$$; shift
mkdir -p "$@" "$folder"
trap 'rm -rf "$fresh"' EXIT
mkdir "$fresh"; tar -xf - -C "$fresh"
mv -f "$fresh"/* "$folder"
"""


def put_run(machine: Machine, plan: Plan, node: NodePlan, *, key: str) -> None:
    """Write the run's folder on a node: the rendered files, and an empty log that can be followed at once.

    `key` signs what the nodes' guards tell each other. It is in no plan: only here, in a file that only its user reads.
    """
    rendered = {f"files/{name}": text for name, text in render.files(plan, node).items()}
    rendered["files/guard.key"] = key + "\n"
    folder = node.host.files.rpartition("/")[0]
    made = machine.transport.send(
        script(_PUT, folder, node.host.checkpoints), (_archive({**rendered, "out/node.log": ""}),)
    )
    _check(machine.name, made, folder)


def nodes_up(
    machines: Sequence[Machine], plan: Plan, found: Mapping[str, tuple[Container, ...]], *, partly: bool = False
) -> dict[str, NodePlan]:
    """The nodes whose idle container is missing, ended, or was made for something else.

    A plan of some of the nodes (`partly`) is no reason to make those anew that have its image: they know of all nodes.
    """
    missing = {}
    for machine, node in zip(machines, plan.nodes, strict=True):
        wanted = render.node_container(plan, node).labels[LABEL_PLAN]
        live = [one for one in found[machine.name] if one.labels.get(LABEL_ROLE) == render.ROLE_NODE and one.is_live]
        if not any(one.labels.get(LABEL_PLAN) == wanted or (partly and one.image == plan.image) for one in live):
            missing[machine.name] = node
    return missing


def start_nodes(machines: Sequence[Machine], plan: Plan, missing: Mapping[str, NodePlan]) -> None:
    """Write these nodes' files and start their idle containers anew."""

    def act(machine: Machine) -> None:
        node = missing[machine.name]
        made = machine.transport.send(
            script(_PUT_NODE, node.host.files, node.host.checkpoints), (_archive(render.node_files(plan, node)),)
        )
        _check(machine.name, made, node.root)
        _start_idle(machine, render.node_container(plan, node))

    each([machine for machine in machines if machine.name in missing], act).all_or_raise()


def _start_idle(machine: Machine, spec: ContainerSpec) -> None:
    """Have the idle container live: of several who want it at the same moment one makes it, the others wait for it."""
    end = time.monotonic() + PATIENCE
    while True:
        waits = time.monotonic() < end
        for one in machine.engine.find(render.kin(spec)):
            if one.is_live and one.labels.get(LABEL_PLAN) == spec.labels[LABEL_PLAN]:
                return
            if not (waits and one.state is ContainerState.CREATED and not operator.never_starts(one)):
                machine.engine.remove(one.id)
        try:
            container = machine.engine.create(spec)
        except LockedError as taken:  # it is being made, or somebody else's for good
            if not waits:
                taken.next_step = "another user of this node has a cluster of this name: choose another name"
                raise
            time.sleep(0.1)
            continue
        try:
            machine.engine.start(container)
            return
        except EngineError:
            if not waits or not is_removed(machine, container):
                raise


def is_removed(machine: Machine, container: str) -> bool:
    """Whether somebody has removed a container that did not start, or is about to: that takes an engine a moment."""
    end = time.monotonic() + REMOVAL
    while any(one.id == container for one in machine.engine.find({LABEL_CLUSTER: ""})):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _archive(files: Mapping[str, str]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, text in files.items():
            content = text.encode()
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(content), 0o600
            archive.addfile(header, io.BytesIO(content))
    return made.getvalue()


def _check(node: str, made: Result, folder: str) -> None:
    if made.ok:
        return
    said = made.tail(2)
    full = any("No space left" in line for line in said)
    raise CommandError(
        node,
        f"no space left at {folder}" if full else f"{folder} cannot be written",
        detail=said,
        next_step="free some space there" if full else "set paths.state in the inventory to a folder of this user",
    )

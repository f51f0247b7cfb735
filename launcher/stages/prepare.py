"""Prepare: directories and rendered files on the nodes, and the idle node containers of `up`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence

from cluster.command import Result, script
from cluster.container import LABEL_PLAN, LABEL_ROLE, Container
from cluster.errors import CommandError, LockedError
from cluster.fleet import Machine, each
from launcher import render
from launcher.plan import NodePlan, Plan

# A folder arrives beside its final name and is then renamed: it is never seen half.
_PUT = """
set -eu; umask 077
folder=$1; fresh=$1.fresh.$$; shift
mkdir -p "$@" "$(dirname "$folder")"
trap 'rm -rf "$fresh"' EXIT
mkdir "$fresh"; tar -xf - -C "$fresh"
rm -rf "$folder.old"; if [ -e "$folder" ]; then mv "$folder" "$folder.old"; fi
mv "$fresh" "$folder"; rm -rf "$folder.old"
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
            script(_PUT, node.host.files, node.host.checkpoints), (_archive(render.node_files(plan, node)),)
        )
        _check(machine.name, made, node.root)
        spec = render.node_container(plan, node)
        for stale in machine.engine.find(render.kin(spec)):
            if stale.is_live and stale.labels.get(LABEL_PLAN) == spec.labels[LABEL_PLAN]:
                return  # another `up` was faster
            machine.engine.remove(stale.id)
        try:
            machine.engine.start(machine.engine.create(spec))
        except LockedError as taken:
            taken.next_step = "another user of this node has a cluster of this name: choose another name"
            raise

    each([machine for machine in machines if machine.name in missing], act).all_or_raise()


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

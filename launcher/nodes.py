"""What is done with the machines apart from runs: remove what is ours, run a command, ask, open a shell."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.command import Command, Result
from cluster.container import LABEL_ROLE
from cluster.errors import CommandError, NodeError
from cluster.fleet import Machine, each
from launcher import render
from launcher.session import Session, choose_machines, idle_container, ours

ROUNDS = 20  # how often `down` looks again, while others bring something up


def down(now: Session) -> Mapping[str, tuple[str, ...]]:
    """Remove every container of ours, a live run in order; their names by node. A lost node holds nothing up.

    It ends when one look finds none anywhere: of an `up` at the same moment nothing stays, or all that comes later.
    """

    def act(machine: Machine) -> tuple[str, ...]:
        machine.transport.open()
        found = machine.engine.find(ours(now, machine))
        for one in found:
            if one.is_live and one.labels.get(LABEL_ROLE) == render.ROLE_RUN:
                machine.engine.stop(one.id, grace=render.engine_grace(one.labels))
            machine.engine.remove(one.id)
        return tuple(one.name for one in found)

    gone: dict[str, tuple[str, ...]] = {machine.name: () for machine in now.machines}
    for number in range(ROUNDS):
        time.sleep(0.2 if number > 1 else 0)  # the engine is at it, or somebody else
        found = each(now.machines, act).all_or_raise()
        if not any(found.values()):
            return gone
        gone = {node: tuple(dict.fromkeys((*gone[node], *found[node]))) for node in gone}
    node, names = next((node, names) for node, names in found.items() if names)
    raise NodeError(node, f"these do not go: {', '.join(names)}")


def run_inside(now: Session, names: tuple[str, ...], argv: tuple[str, ...]) -> Mapping[str, Result]:
    """Run a command in the node containers, everywhere or on the named nodes."""

    def act(machine: Machine) -> Result:
        return machine.engine.execute(idle_container(now, machine).id, Command(argv=argv))

    return each(choose_machines(now, names), act).all_or_raise()


def ask_environment(now: Session) -> Mapping[str, dict[str, Any]]:
    """What a job finds on every node, {section: {name: value}} by node, asked in the node containers."""
    script = (Path(__file__).parent / "inside" / "environment.py").read_bytes()

    def act(machine: Machine) -> dict[str, Any]:
        container = idle_container(now, machine)
        answer = machine.engine.execute(container.id, Command(argv=("python3", "-"), stdin=script))
        try:
            said = json.loads(answer.text)
        except ValueError:
            said = None
        if not answer.ok or not isinstance(said, dict):
            raise CommandError(
                machine.name,
                f"the container does not tell its environment (exit {answer.code})",
                detail=answer.tail(),
                next_step="launcher shell, then python3 -c 'import torch, accelerate, deepspeed'",
            )
        return {"image": {"id": container.image}, **said}

    return each(now.machines, act).all_or_raise()


def shell(now: Session, name: str | None, argv: tuple[str, ...], *, tty: bool) -> int:
    """Put the user inside a node's container."""
    machine = choose_machines(now, (name,) if name else ())[0]
    inside = machine.engine.interactive(idle_container(now, machine).id, argv, tty=tty)
    return machine.transport.interact(inside, tty=tty)

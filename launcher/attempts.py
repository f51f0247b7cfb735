"""Attempts: a run that failed is started again, as far as its policy and its progress allow. Each is a run of its own.

The command that owns the run drives this; a detached run has nobody to start it again.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.command import script
from cluster.container import LABEL_RUN
from cluster.errors import LockedError, NodeError
from cluster.fleet import Machine, each
from launcher.events import RunEnded
from launcher.execute import Launch, abandon, follow, make_run_id, start
from launcher.job import Job
from launcher.plan import Plan
from launcher.record import RunRecord
from launcher.restart import Decision, Policy, judge
from launcher.session import Session, find_ours, is_under_way, narrowed, ours, run_containers
from launcher.stages.logs import Show

_SEARCHED = 4 << 20  # bytes at the end of each node's log in which --on-log looks
# Written since the run's files were put there: a checkpoint, or a part of one.
_WRITTEN = 'find "$1" -type f -newer "$2" 2>/dev/null | head -n 1'

Prepare = Callable[[Session, Job, str], Launch]


def carry_through(
    now: Session,
    launch: Launch,
    policy: Policy,
    *,
    prepare: Prepare,
    secrets: Mapping[str, str],
    show: Show,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[str, RunEnded]:
    """Run it to its end, again where that is worth it; the id of the last attempt, and how that ended.

    `prepare(now, job, run_id)` looks and judges anew. An attempt begins only when nothing of the one before is left on
    any node that answers; for nodes that do not, spares stand in as far as there are any.
    """
    first, done = launch.plan.run, 0
    while True:
        record = now.memory.run(launch.plan.run)
        end = _attempt(now, launch, record, secrets=secrets, show=show)
        decision = _decide(now, launch.plan, policy, record, end, done=done)
        if not decision.again:
            if policy.restarts and end.code == 1:
                now.voice.say(f"not started again: {decision.why}")
            return launch.plan.run, end
        now.voice.say(f"run {launch.plan.run}: {end.cause}")
        _prove_gone(now, launch.plan)
        now, launch, done = _again(now, launch, policy, decision, first=first, done=done, prepare=prepare, sleep=sleep)


def _attempt(now: Session, launch: Launch, record: RunRecord, *, secrets: Mapping[str, str], show: Show) -> RunEnded:
    try:
        containers = start(now, launch, record, secrets=secrets)
        return follow(now, launch.plan, record, containers, show=show, own=True)
    except KeyboardInterrupt:
        abandon(now, launch.plan)
        raise


def _decide(now: Session, plan: Plan, policy: Policy, record: RunRecord, end: RunEnded, *, done: int) -> Decision:
    if end.code != 1 or not policy.restarts:
        return Decision(again=False, why=end.cause)
    return judge(
        policy,
        record.state().ends,
        done=done,
        matched=matched(policy, [record.mirror(node.name) for node in plan.nodes]),
        progressed=_progressed(now, plan),
    )


def _again(
    now: Session,
    launch: Launch,
    policy: Policy,
    decision: Decision,
    *,
    first: str,
    done: int,
    prepare: Prepare,
    sleep: Callable[[float], None],
) -> tuple[Session, Launch, int]:
    """The next launch with its nodes, and how many restarts there were with it; one costs a node's silence, too."""
    delay = decision.delay
    while True:
        done += 1
        now.voice.say(f"starting again in {delay:.0f} s (restart {done} of {policy.restarts}): {decision.why}")
        sleep(delay)
        now = with_spares(now)
        job = dataclasses.replace(launch.plan.job, resumes=first, restart=done)
        try:
            return now, prepare(now, job, make_run_id()), done
        except NodeError as error:
            if done >= policy.restarts:
                raise
            now.voice.say(f"warning: {error.where}: {error.what}")
            delay *= 2


def with_spares(now: Session) -> Session:
    """The same nodes, but a spare that is free in the place of each that does not answer, as far as there are any."""
    lost = find_ours(now).bad
    whole = now.whole or now
    spares = [name for name in whole.inventory.spares if name not in {machine.name for machine in now.machines}]
    if not lost or not spares:
        return now
    stands = find_ours(narrowed(whole, spares)).good
    free = [name for name in stands if not any(map(is_under_way, run_containers({name: stands[name]}).values()))]
    instead = dict(zip(lost, free, strict=False))
    for node, spare in instead.items():
        now.voice.say(f"node {node} does not answer: the spare {spare} takes its place ({lost[node].what})")
    return narrowed(whole, [instead.get(machine.name, machine.name) for machine in now.machines])


def _prove_gone(now: Session, plan: Plan) -> None:
    """Nothing of this attempt is left on any node that answers; else `LockedError`."""

    def look(machine: Machine) -> None:
        labels = ours(now, machine, **{LABEL_RUN: plan.run})
        for one in machine.engine.find(labels):
            machine.engine.remove(one.id)
        if machine.engine.find(labels):
            raise LockedError(
                f"run {plan.run} is still there, so it is not started again",
                where=f"node {machine.name}",
                next_step="launcher down",
            )

    for error in each(now.machines, look, deadline=30).bad.values():
        now.voice.say(f"warning: {error.where}: {error.what}; what is left there is swept when it answers again")


def _progressed(now: Session, plan: Plan) -> bool:
    """Whether the attempt has written anything where checkpoints go, on any node that answers."""
    nodes = {node.name: node for node in plan.nodes}

    def look(machine: Machine) -> bool:
        host = nodes[machine.name].host
        found = machine.transport.run(script(_WRITTEN, host.checkpoints, host.files), timeout=60)
        return bool(found.text.strip())

    return any(each(now.machines, look, deadline=90).good.values())


def matched(policy: Policy, logs: list[Path]) -> bool | None:
    """What the first --on-log rule says that meets a line at the end of any node's log; None where none does."""
    if not policy.on_log:
        return None
    lines = [line for path in logs if path.exists() for line in _end(path)]
    return next((again for pattern, again in policy.on_log if any(re.search(pattern, line) for line in lines)), None)


def _end(path: Path) -> list[str]:
    """What ranks and torchrun said last, without time and rank."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _SEARCHED))
        lines = file.read().decode(errors="replace").split("\n")
    return [line.split(" ", 2)[-1] for line in lines]

"""Execute: one run from judgment to its end, and coming back to one that is under way. Policy only; the stages act."""

from __future__ import annotations

import re
import secrets as random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.container import LABEL_DETACHED, LABEL_OUT, LABEL_RUN, Container, ContainerState
from cluster.errors import ClusterError, CommandError, InputError
from cluster.fleet import Answers, Machine, each
from launcher import checks, ladder, operator, render, zero
from launcher.converge import Converged, converge, image_tag, told
from launcher.events import CodeArrived, Emit, Event, NodeEnded, NodeStarted, RunBegan, RunEnded, StageBegan
from launcher.job import NODE_GRACE, Job
from launcher.ladder import Question
from launcher.plan import Plan, choose_port, make_plan, node_root, stays_here
from launcher.record import RunRecord
from launcher.session import (
    LOOK_DEADLINE,
    Seen,
    Session,
    find_ours,
    is_under_way,
    look,
    nodes_of,
    ours,
    run_containers,
)
from launcher.snapshot import Snapshot
from launcher.stages.code import send_code
from launcher.stages.evidence import fetch_evidence
from launcher.stages.logs import Mirror, Show
from launcher.stages.prepare import put_run
from launcher.stages.start import refuse_foreign, start_run
from launcher.stages.tidy import tidy
from launcher.stages.watch import Detached, Watched, watch
from launcher.state import INTERRUPTED

# The script of `launcher test`. It is a snapshot of its own: of the user's code nothing is needed.
START_DEADLINE = 60.0  # seconds from a container that was made to its start, by the launcher that is starting the run
INSIDE, TRIAL = Path(__file__).parent / "inside", "trial.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A run that is ready to start: everything that was judged, nothing yet done on the nodes."""

    plan: Plan
    seen: Seen
    tag: str
    snapshot: Snapshot
    todo: tuple[str, ...] = ()


def prepare(
    now: Session,
    job: Job,
    snapshot: Snapshot,
    *,
    run_id: str,
    port: int | None,
    any_port: bool,
    question: Question | None = None,
    ignored: tuple[str, ...] = (),
    dry_run: bool = False,
) -> Launch:
    """Look and judge; bring up what is not up. After this only the start itself can fail.

    `question` is the model that the ladder is asked about where the job leaves the stage to it.
    """
    zero.check(job, accelerator=now.inventory.accelerator)
    model = ladder.check_question(question) if job.settings.stage == "auto" else None
    tag = image_tag(now.inventory)
    seen = look(now, tag=tag, keep=not dry_run)
    refuse_foreign(seen.found if dry_run else _sweep(now, seen.found))
    first = seen.facts[now.inventory.nodes[0].name]
    every = (now.whole or now).inventory
    span = len(every.nodes) if stays_here(every) else 1
    meeting = choose_port(first, seed=run_id, span=span) if any_port else port or now.inventory.master_port
    found = checks.findings(now.inventory, seen.facts, port=meeting, nvme=zero.needs_nvme(job))
    for finding in checks.judge(found, ignored=(*ignored, *checks.STANDING)):
        now.voice.warn(finding)
    base: tuple[Converged, tuple[str, ...]] | None = None
    if model is not None:
        base = _bring_up(now, seen, tag=tag, dry_run=dry_run)  # the model is tried in the first node's container
        job = ladder.choose_stage(now, job, seen.facts, model)
        zero.check(job, accelerator=now.inventory.accelerator)
    named = any(node.paths.checkpoints for node in now.inventory.nodes)  # it may be a shared folder
    job = zero.settled(job, nodes=len(now.inventory.nodes), shared=named)
    plan = make_plan(
        now.inventory,
        job,
        seen.facts,
        run_id=run_id,
        image=tag,
        code=snapshot.digest,
        port=meeting,
        operator=operator.name(),
        starter=operator.starter(),
    )
    for warning in _warnings(plan):
        now.voice.say(f"warning: {warning}")
    done, todo = base or _bring_up(now, seen, tag=tag, dry_run=dry_run)
    plan = replace(plan, image=done.plan.image)
    return Launch(plan=plan, seen=seen, tag=tag, snapshot=snapshot, todo=todo)


def _bring_up(now: Session, seen: Seen, *, tag: str, dry_run: bool) -> tuple[Converged, tuple[str, ...]]:
    base, todo = converge(now, seen, tag=tag, job=Job(script=""), dry_run=dry_run)
    if base.changed and not dry_run:
        now.voice.say(f"cluster {now.inventory.name} was not up: {told(base)}")
    return base, todo


def _warnings(plan: Plan) -> tuple[str, ...]:
    """What the user should know of the DeepSpeed configuration, now that the nodes are known; an error is raised."""
    slots = tuple(node.slots for node in plan.nodes)
    nvme = plan.nodes[0].job.nvme or None
    accelerator: zero.Accelerator = "cpu" if plan.accelerator == "cpu" else "cuda"
    return zero.judge(zero.lints(plan.job, accelerator=accelerator, slots=slots, nvme=nvme))


def start(
    now: Session,
    launch: Launch,
    record: RunRecord,
    *,
    secrets: Mapping[str, str],
    clock: Callable[[], float] = time.time,
) -> Mapping[str, str]:
    """Send code and files, then start the run's containers on all nodes or on none; their ids by node."""
    plan, emit = launch.plan, record.emit
    record.save_plan(plan)
    emit(
        RunBegan(
            time=clock(),
            run=plan.run,
            cluster=plan.cluster,
            nodes=tuple(node.name for node in plan.nodes),
            world_size=plan.world_size,
            command=(plan.job.script, *plan.job.args),
            starter=plan.starter,
        )
    )
    nodes = {node.name: node for node in plan.nodes}
    key = random.token_hex(32)
    try:
        emit(StageBegan(time=clock(), stage="prepare"))

        def send(machine: Machine) -> None:
            node = nodes[machine.name]
            sent = send_code(machine.transport, launch.snapshot, f"{node.root}/store")
            put_run(machine, plan, node, key=key)
            emit(CodeArrived(time=clock(), node=machine.name, digest=launch.snapshot.digest, bytes=sent.bytes_sent))

        each(now.machines, send).all_or_raise()
        emit(StageBegan(time=clock(), stage="start"))
        containers = start_run(now.machines, plan, secrets)
    except BaseException as error:
        emit(RunEnded(time=clock(), code=getattr(error, "exit_code", 130), cause=_first_line(error)))
        raise
    for node, container in containers.items():
        _emitting(now, record)(NodeStarted(time=clock(), node=node, container=container))
    return containers


def _emitting(now: Session, record: RunRecord) -> Emit:
    """Write events down while a run goes on: it does not end because this machine's disk is full."""

    def emit(event: Event) -> None:
        try:
            record.emit(event)
        except ClusterError as error:
            now.voice.say(f"warning: {error.where}: {error.what}; the run goes on")

    return emit


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def follow(
    now: Session, plan: Plan, record: RunRecord, containers: Mapping[str, str], *, show: Show, own: bool
) -> RunEnded:
    """Watch a run to its end and write down how it ended."""
    machines = {machine.name: machine for machine in now.machines}
    parts = [
        Watched(
            machine=machines[node.name],
            container=containers[node.name],
            out=node.host.out,
            mirror=record.mirror(node.name),
            grace=plan.job.grace + render.MARGIN,
            node_grace=plan.job.node_grace,
        )
        for node in plan.nodes
        if node.name in containers
    ]
    emit = _emitting(now, record)
    emit(StageBegan(time=time.time(), stage="watch"))
    end = watch(parts, emit=emit, show=show, own=own, clear=True)
    _keep_evidence(parts, record)
    nodes = {node.name: node for node in plan.nodes}
    # Whoever does not answer is tidied after another run.
    each(now.machines, lambda machine: tidy(machine, nodes[machine.name]), deadline=60)
    return end


def carry_out(
    now: Session, launch: Launch, record: RunRecord, *, show: Show, secrets: Mapping[str, str] = {}
) -> RunEnded:
    """A run from its start to its end; Ctrl-C leaves nothing of it."""
    try:
        with leaving_on_signals():
            containers = start(now, launch, record, secrets=secrets)
            return follow(now, launch.plan, record, containers, show=show, own=True)
    except KeyboardInterrupt:
        abandon(now, launch.plan)
        raise


def make_run_id(*, clock: Callable[[], float] = time.time) -> str:
    """A new run's id: sorts by time, and two operators do not meet."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(clock()))}-{random.token_hex(2)}"


_RUN = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")


def choose_run(now: Session, run_id: str | None) -> str:
    """The run that is meant: the named one, the one under way, the newest that is known here."""
    if run_id:
        return check_run(run_id)
    live = _standing(now, find_ours(now).good)
    known = [record.run for record in now.memory.runs() if record.state().run or record.mirrored()]
    if live or known:
        return live or known[-1]
    raise InputError(f"no run of cluster {now.inventory.name} is known", next_step="launcher run SCRIPT")


def check_run(run_id: str) -> str:
    """The id; `InputError` when it is none."""
    if not _RUN.fullmatch(run_id):
        raise InputError(f"{run_id!r} is no run", next_step="launcher ls shows the runs that are known here")
    return run_id


def _standing(now: Session, found: Mapping[str, tuple[Container, ...]]) -> str | None:
    """The run that is under way, else the newest that has ended and was not cleared away; `InputError` for several.

    What is left of a run that is over, on a node that was given up, counts only while it lives, and beside no other.
    """
    runs = _not_over(now, found)
    live = [run for run, containers in runs.items() if is_under_way(containers)]
    live = [run for run in live if not now.memory.run(run).state().is_over] or live
    if len(live) > 1:
        raise InputError(
            f"{len(live)} runs are under way: which one is meant?",
            detail=tuple(f"{run} on {', '.join(nodes_of(runs[run]) or runs[run])}" for run in live),
            next_step=f"name it, as {live[-1]}",
        )
    return live[0] if live else max(runs, default=None)


def _named(now: Session, found: Mapping[str, tuple[Container, ...]], run_id: str | None) -> str | None:
    """The run that is meant among those that stand on the nodes; None where there is none."""
    if run_id is None:
        return _standing(now, found)
    return run_id if run_id in _not_over(now, found) else None


def _not_over(now: Session, found: Mapping[str, tuple[Container, ...]]) -> dict[str, dict[str, Container]]:
    """The runs that stand on the nodes, but for those whose end was told here already."""
    return {
        run: containers
        for run, containers in run_containers(found).items()
        if is_under_way(containers) or not now.memory.run(run).state().is_over
    }


def _silent(found: Answers[tuple[Container, ...]], nodes: Sequence[str]) -> Answers[tuple[Container, ...]]:
    """The same answers, without the silence of those that have no part in a run on `nodes` (empty: nobody knows)."""
    return replace(found, bad={node: error for node, error in found.bad.items() if not nodes or node in nodes})


def _sweep(
    now: Session, found: Mapping[str, tuple[Container, ...]], *, but: str = ""
) -> Mapping[str, tuple[Container, ...]]:
    """Clear away what is left of runs that are over, on nodes that did not answer when they ended; what then stands.

    Over is what was told to be, here: of what others have started, and of what nobody has watched, nothing is touched.
    """
    runs = {run: containers for run, containers in run_containers(found).items() if run != but}
    over = {run for run in runs if now.memory.run(run).state().is_over}

    def left(node: str) -> list[Container]:
        return [runs[run][node] for run in over if node in runs[run]]

    def clear(machine: Machine) -> None:
        for one in left(machine.name):
            if one.is_live:
                machine.engine.stop(one.id, grace=render.engine_grace(one.labels))
            machine.engine.remove(one.id)

    each([machine for machine in now.machines if left(machine.name)], clear).all_or_raise()
    return {node: tuple(one for one in ones if one not in left(node)) for node, ones in found.items()}


def show_logs(now: Session, run_id: str, *, show: Show, follow: bool) -> None:
    """Print a run's log from its beginning; with `follow` go on until it ends or the user leaves.

    What is mirrored here is shown also when its node does not answer; a warning says so.
    """
    record = now.memory.run(run_id)
    every = find_ours(now, run=run_id)
    containers = _of_run(every.good, run_id)
    found = _silent(every, nodes_of(containers) or tuple(_planned_folders(record)))
    if follow and containers:
        with suppress(Detached):
            _follow_found(now, containers, record, show=show)
        return
    out = {**_planned_folders(record), **{node: one.labels[LABEL_OUT] for node, one in containers.items()}}
    if not out:
        out = _asked_folders(now, run_id)

    def fetch(machine: Machine) -> None:
        Mirror(machine, out=out[machine.name], path=record.mirror(machine.name), show=lambda *_line: None).finish()

    reached = [machine for machine in now.machines if machine.name in found.good and machine.name in out]
    each(reached, fetch, deadline=300)
    for error in found.bad.values():
        now.voice.say(f"warning: {error.where}: {error.what}; what is shown of it may end early")
    if not record.mirrored():
        raise InputError(f"no node has a log of run {run_id}", next_step="launcher ls shows what is known here")
    _print(record, record.mirrored(), show)


def _print(record: RunRecord, until: Mapping[str, int], show: Show) -> None:
    """What is mirrored here already, in the order of time over all nodes."""
    for node, line in record.merged(until):
        show(node, line)


def attach(now: Session, run_id: str | None = None, *, show: Show) -> tuple[str, RunEnded]:
    """Watch a run under way to its end, the only one where none is named; raises `Detached` when the user leaves.

    Nodes that do not answer are left out: how their part ended, their guards told the others.
    """
    found = find_ours(now)
    asked, run_id = run_id, _named(now, found.good, run_id)
    if run_id is None:
        found.all_or_raise()
        raise InputError(
            f"run {asked} is not under way" if asked else f"no run of cluster {now.inventory.name} is under way",
            next_step=f"launcher logs {asked}" if asked else "launcher logs shows the last one",
        )
    record = now.memory.run(run_id)
    for node, error in _silent(found, nodes_of(_of_run(found.good, run_id))).bad.items():
        now.voice.say(f"warning: {error.where}: {error.what}; what the others heard of it must do")
        record.emit(NodeEnded(time=time.time(), node=node, code=1, lost=f"lost: {error.what}"))
    return run_id, _follow_found(now, _of_run(found.good, run_id), record, show=show)


def stop(now: Session, run_id: str | None = None) -> RunEnded | None:
    """End a run under way, in order, on every node that answers, and clear it away; None when there is none.

    It is the only one where none is named. The nodes that do not answer are told of at the end.
    """
    found = find_ours(now)
    run_id = _named(now, found.good, run_id)
    _sweep(now, found.good, but=run_id or "")
    if run_id is None:
        found.all_or_raise()
        return None
    record = now.memory.run(run_id)
    nodes = nodes_of(_of_run(found.good, run_id))
    containers = _without_unstarted(now, _of_run(found.good, run_id))

    def end(machine: Machine) -> None:
        one = containers[machine.name]
        machine.engine.stop(one.id, grace=render.engine_grace(one.labels))

    each([machine for machine in now.machines if machine.name in containers], end).all_or_raise()
    if containers:
        ended = _follow_found(now, containers, record, show=lambda _node, _line: None, own=True)
    else:
        ended = RunEnded(time=time.time(), code=INTERRUPTED, cause="it had not been started")
        record.emit(ended)
    _silent(found, nodes).all_or_raise()
    return ended


def _without_unstarted(now: Session, containers: Mapping[str, Container]) -> Mapping[str, Container]:
    """Remove those that were made and not started: they have no end to wait for."""
    unstarted = {node: one for node, one in containers.items() if one.state is ContainerState.CREATED}
    there = [machine for machine in now.machines if machine.name in unstarted]
    each(there, lambda machine: machine.engine.remove(unstarted[machine.name].id)).all_or_raise()
    return {node: one for node, one in containers.items() if node not in unstarted}


def _await_start(now: Session, containers: Mapping[str, Container]) -> None:
    """Wait for what was made to be started; `CommandError` when nobody will."""
    end = time.monotonic() + START_DEADLINE
    waiting = {node: one for node, one in containers.items() if one.state is ContainerState.CREATED}
    while waiting:
        node, one = next(iter(waiting.items()))
        gone = operator.never_starts(one)
        if gone or time.monotonic() > end:
            why = "the launcher that began it is gone" if gone else f"it has been ready for {START_DEADLINE:.0f} s"
            raise CommandError(
                node,
                f"run {one.labels[LABEL_RUN]} was not started there: {why}",
                next_step="launcher stop clears it away",
            )
        time.sleep(0.5)
        there = [machine for machine in now.machines if machine.name in waiting]
        found = each(there, lambda machine: machine.engine.find(ours(now, machine)), deadline=LOOK_DEADLINE).good
        ids = {one.id for one in waiting.values()}
        waiting = {
            node: one
            for node, ones in found.items()
            for one in ones
            if one.id in ids and one.state is ContainerState.CREATED
        }


def abandon(now: Session, plan: Plan) -> None:
    """End a run whose start or watch was interrupted, and leave nothing of it."""

    def end(machine: Machine) -> None:
        for one in machine.engine.find(ours(now, machine, **{LABEL_RUN: plan.run})):
            machine.engine.stop(one.id, grace=render.engine_grace(one.labels))
            machine.engine.remove(one.id)

    each(now.machines, end, deadline=plan.job.grace + 30)


def _of_run(found: Mapping[str, tuple[Container, ...]], run_id: str) -> Mapping[str, Container]:
    return {
        node: one for node, containers in found.items() for one in containers if one.labels.get(LABEL_RUN) == run_id
    }


def _follow_found(
    now: Session, containers: Mapping[str, Container], record: RunRecord, *, show: Show, own: bool = False
) -> RunEnded:
    """Come back to a run: show what is mirrored here, then go on from there."""
    _await_start(now, containers)
    plan = record.load_plan()
    patience = plan.job.node_grace if plan else NODE_GRACE
    shown = record.mirrored()
    _print(record, shown, show)
    parts = [
        Watched(
            machine=machine,
            container=containers[machine.name].id,
            out=containers[machine.name].labels[LABEL_OUT],
            mirror=record.mirror(machine.name),
            grace=render.engine_grace(containers[machine.name].labels),
            start=shown.get(machine.name, 0),
            node_grace=patience,
        )
        for machine in now.machines
        if machine.name in containers
    ]
    detached = any(LABEL_DETACHED in one.labels for one in containers.values())
    lost = {node: end for node, end in record.state().ends.items() if end.lost and node not in containers}
    emit = _emitting(now, record)
    end = watch(parts, emit=emit, show=show, own=own, clear=own or detached, lost=lost)
    _keep_evidence(parts, record)
    return end


def _keep_evidence(parts: Sequence[Watched], record: RunRecord) -> None:
    """Of a run that failed, bring what tells why; a node that is lost is not asked again."""
    state = record.state()
    if state.phase != "failed":
        return
    there = {part.machine.name: part for part in parts if not state.ends[part.machine.name].lost}

    def fetch(machine: Machine) -> None:
        fetch_evidence(machine, out=there[machine.name].out, folder=record.evidence)

    each([part.machine for part in there.values()], fetch, deadline=60)


def _planned_folders(record: RunRecord) -> dict[str, str]:
    plan = record.load_plan()
    return {} if plan is None else {node.name: node.host.out for node in plan.nodes}


def _asked_folders(now: Session, run_id: str) -> dict[str, str]:
    """Where the nodes keep the output of a run that was started elsewhere and is over."""
    facts = look(now, tag="", keep=False).facts
    return {
        node.name: f"{node_root(now.inventory, node, facts[node.name])}/runs/{run_id}/out"
        for node in now.inventory.nodes
    }


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP leave a run to itself: the terminal is gone, the job is not."""

    def leave(_number: int, _frame: object) -> None:
        raise Detached

    # What is ignored stays ignored: under nohup nobody's hanging up is meant.
    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

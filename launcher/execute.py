"""Execute: one run from judgment to its end, and coming back to one that is under way. Policy only; the stages act."""

from __future__ import annotations

import re
import secrets as random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cluster.container import LABEL_RUN, Container
from cluster.errors import InputError
from cluster.fleet import Machine, each
from launcher import checks, zero
from launcher.converge import converge, image_tag, told
from launcher.events import CodeArrived, NodeStarted, RunBegan, RunEnded, StageBegan
from launcher.job import Job
from launcher.plan import Plan, choose_port, make_plan, node_root
from launcher.record import RunRecord
from launcher.session import Seen, Session, find_ours, live_run, look
from launcher.snapshot import Snapshot
from launcher.stages.code import send_code
from launcher.stages.logs import Mirror, Show
from launcher.stages.prepare import put_run
from launcher.stages.start import refuse_foreign, start_run
from launcher.stages.watch import Detached, Watched, watch


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
    ignored: tuple[str, ...] = (),
    dry_run: bool = False,
) -> Launch:
    """Look and judge; bring up what is not up. After this only the start itself can fail."""
    zero.check(job, accelerator=now.inventory.accelerator)
    tag = image_tag(now.inventory)
    seen = look(now, tag=tag)
    refuse_foreign(seen.found)
    first = seen.facts[now.inventory.nodes[0].name]
    wanted = port or now.inventory.master_port
    meeting = choose_port(wanted, first, seed=run_id) if any_port else wanted
    found = checks.findings(now.inventory, seen.facts, port=meeting, nvme=zero.needs_nvme(job))
    for finding in checks.judge(found, ignored=ignored):
        now.voice.warn(finding)
    base, todo = converge(now, seen, tag=tag, job=Job(script=""), dry_run=dry_run)
    if base.changed and not dry_run:
        now.voice.say(f"cluster {now.inventory.name} was not up: {told(base)}")
    plan = make_plan(
        now.inventory, job, seen.facts, run_id=run_id, image=base.plan.image, code=snapshot.digest, port=meeting
    )
    return Launch(plan=plan, seen=seen, tag=tag, snapshot=snapshot, todo=todo)


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
        )
    )
    nodes = {node.name: node for node in plan.nodes}
    try:
        emit(StageBegan(time=clock(), stage="prepare"))

        def send(machine: Machine) -> None:
            node = nodes[machine.name]
            sent = send_code(machine.transport, launch.snapshot, f"{node.root}/store")
            put_run(machine, plan, node)
            emit(CodeArrived(time=clock(), node=machine.name, digest=launch.snapshot.digest, bytes=sent.bytes_sent))

        each(now.machines, send).all_or_raise()
        emit(StageBegan(time=clock(), stage="start"))
        containers = start_run(now.machines, plan, secrets)
    except BaseException as error:
        emit(RunEnded(time=clock(), code=getattr(error, "exit_code", 130), cause=_first_line(error)))
        raise
    for node, container in containers.items():
        emit(NodeStarted(time=clock(), node=node, container=container))
    return containers


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
        )
        for node in plan.nodes
        if node.name in containers
    ]
    record.emit(StageBegan(time=time.time(), stage="watch"))
    end = watch(parts, emit=record.emit, show=show, own=own)
    record.emit(end)
    return end


def make_run_id(*, clock: Callable[[], float] = time.time) -> str:
    """A new run's id: sorts by time, and two operators do not meet."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(clock()))}-{random.token_hex(2)}"


_RUN = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")


def choose_run(now: Session, run_id: str | None) -> str:
    """The run that is meant: the named one, the one under way, the newest that is known here."""
    if run_id:
        if not _RUN.fullmatch(run_id):
            raise InputError(f"{run_id!r} is no run", next_step="launcher ls shows the runs that are known here")
        return run_id
    live = live_run(find_ours(now))
    runs = now.memory.runs()
    if live or runs:
        return live or runs[-1].run
    raise InputError(f"no run of cluster {now.inventory.name} is known", next_step="launcher run SCRIPT")


def show_logs(now: Session, run_id: str, *, show: Show, follow: bool) -> None:
    """Print a run's log from its beginning; with `follow` go on until it ends or the user leaves."""
    record = now.memory.run(run_id)
    containers = _containers(now, run_id)
    if follow and containers:
        _print_mirrors(record, show)
        with suppress(Detached):
            _follow_found(now, run_id, containers, show=show)
        return
    out = _out_folders(now, run_id)
    mirrors = [
        Mirror(machine, out=out[machine.name], path=record.mirror(machine.name), show=lambda *_line: None)
        for machine in now.machines
    ]
    each(now.machines, _Finish(now.machines, mirrors), deadline=60)
    if not any(record.merged()):
        raise InputError(f"no node has a log of run {run_id}", next_step="launcher ls shows what is known here")
    _print_mirrors(record, show)


class _Finish:
    def __init__(self, machines: Sequence[Machine], mirrors: Sequence[Mirror]) -> None:
        self._mirrors = {machine.name: mirror for machine, mirror in zip(machines, mirrors, strict=True)}

    def __call__(self, machine: Machine) -> None:
        self._mirrors[machine.name].finish()


def _print_mirrors(record: RunRecord, show: Show) -> None:
    """What is mirrored here already, in the order of time over all nodes."""
    for node, line in record.merged():
        show(node, line)


def attach(now: Session, *, show: Show) -> tuple[str, RunEnded]:
    """Watch the run under way to its end; raises `Detached` when the user leaves."""
    found = find_ours(now)
    run_id = live_run(found)
    if run_id is None:
        raise InputError(
            f"no run of cluster {now.inventory.name} is under way", next_step="launcher logs shows the last one"
        )
    _print_mirrors(now.memory.run(run_id), show)
    return run_id, _follow_found(now, run_id, _of_run(found, run_id), show=show)


def _containers(now: Session, run_id: str) -> Mapping[str, str]:
    return _of_run(find_ours(now, run=run_id), run_id)


def _of_run(found: Mapping[str, tuple[Container, ...]], run_id: str) -> Mapping[str, str]:
    return {
        node: one.id for node, containers in found.items() for one in containers if one.labels.get(LABEL_RUN) == run_id
    }


def _follow_found(now: Session, run_id: str, containers: Mapping[str, str], *, show: Show) -> RunEnded:
    record = now.memory.run(run_id)
    out = _out_folders(now, run_id)
    parts = [
        Watched(
            machine=machine,
            container=containers[machine.name],
            out=out[machine.name],
            mirror=record.mirror(machine.name),
        )
        for machine in now.machines
        if machine.name in containers
    ]
    end = watch(parts, emit=record.emit, show=show, own=False)
    record.emit(end)
    return end


def _out_folders(now: Session, run_id: str) -> Mapping[str, str]:
    """Where every node keeps the run's output: by its plan, or where it was started elsewhere by asking the nodes."""
    plan = now.memory.run(run_id).load_plan()
    if plan is not None:
        return {node.name: node.host.out for node in plan.nodes}
    facts = look(now, tag=image_tag(now.inventory)).facts
    return {
        node.name: f"{node_root(now.inventory, node, facts[node.name])}/runs/{run_id}/out"
        for node in now.inventory.nodes
    }


def stop(now: Session, *, grace: float) -> RunEnded | None:
    """End the run under way, in order, on every node, and clear it away; None when there is none."""
    found = find_ours(now)
    run_id = live_run(found)
    if run_id is None:
        return None
    containers = _of_run(found, run_id)

    def end(machine: Machine) -> None:
        if machine.name in containers:
            machine.engine.stop(containers[machine.name], grace=grace)

    each(now.machines, end, deadline=grace + 30).all_or_raise()
    return _follow_found(now, run_id, containers, show=lambda _node, _line: None)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP leave a run to itself: the terminal is gone, the job is not."""

    def leave(_number: int, _frame: object) -> None:
        raise Detached

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

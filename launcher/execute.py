"""The order of things: survey, judge, converge, run, watch. Policy only; the stages act, the plan decides.

`Session` holds what every command needs: the inventory, the machines, the memory, and the ears (`Voice`).
"""

from __future__ import annotations

import json
import secrets as random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.command import Command, Result
from cluster.container import LABEL_CLUSTER, LABEL_ROLE, LABEL_RUN, Container
from cluster.engine import Engine
from cluster.errors import CommandError, ImageError, InputError, NodeError
from cluster.facts import NodeFacts
from cluster.fleet import Machine, ask_facts, closing, connect, each
from cluster.inventory import Inventory
from launcher import checks, render, zero
from launcher.events import CodeArrived, NodeStarted, RunBegan, RunEnded, StageBegan
from launcher.image import Progress
from launcher.job import Job
from launcher.plan import Plan, choose_port, make_plan, node_root
from launcher.record import ClusterMemory, RunRecord
from launcher.snapshot import Snapshot
from launcher.stages.code import send_code
from launcher.stages.logs import Mirror, Show
from launcher.stages.prepare import nodes_up, put_run, start_nodes
from launcher.stages.ship import lacking, ship_image
from launcher.stages.start import refuse_foreign, start_run
from launcher.stages.watch import Detached, Watched, watch

LOOK_DEADLINE = 30.0  # seconds for every node to answer one look, connecting included


class Voice(Protocol):
    """What the user hears while something is done. Views stand behind it; `Silence` hears nothing."""

    def say(self, text: str) -> None:
        """One line about what was done."""

    def warn(self, finding: checks.Finding) -> None:
        """A finding that does not forbid the start."""

    def building(self, progress: Progress) -> None:
        """Where the image's build is."""

    def shipping(self, node: str, taken: int) -> None:
        """How many bytes of the image a node has taken."""

    def done(self) -> None:
        """What was being shown as progress is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One command's dealings with one cluster."""

    inventory: Inventory
    memory: ClusterMemory
    machines: Sequence[Machine]
    voice: Voice


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


def look(now: Session, *, tag: str) -> Seen:
    """Ask every node everything at once; all must answer."""
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
        return facts, machine.engine.find({LABEL_CLUSTER: inventory.name}), machine.engine.image_id(tag)

    asked = each(now.machines, ask, deadline=LOOK_DEADLINE).all_or_raise()
    facts = {node: one for node, (one, _, _) in asked.items()}
    now.memory.save_facts(facts)
    return Seen(
        facts=facts,
        found={node: containers for node, (_, containers, _) in asked.items()},
        digests={node: digest for node, (_, _, digest) in asked.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Converged:
    """What `up` did: nothing at all, or these."""

    plan: Plan
    built: bool = False
    shipped: Mapping[str, int]
    started: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything had to be done."""
        return self.built or bool(self.shipped) or bool(self.started)


def up(now: Session, *, ignored: tuple[str, ...] = (), dry_run: bool = False) -> tuple[Converged, tuple[str, ...]]:
    """Converge the machines; gives back what was done, or with `dry_run` what would be."""
    tag = image_tag(now.inventory)
    seen = look(now, tag=tag)
    for finding in checks.judge(checks.findings(now.inventory, seen.facts), ignored=ignored):
        now.voice.warn(finding)
    return converge(now, seen, tag=tag, job=Job(script=""), dry_run=dry_run)


def converge(
    now: Session, seen: Seen, *, tag: str, job: Job, dry_run: bool = False
) -> tuple[Converged, tuple[str, ...]]:
    """Image, directories, configurations, node containers: only what is missing."""
    digest, built, todo = _have_image(now, seen, tag=tag, dry_run=dry_run)
    missing_image = lacking(seen.digests, digest) if digest else tuple(seen.digests)
    shipped: Mapping[str, int] = {}
    if missing_image and dry_run:
        todo += tuple(f"send the image {tag} to {node}" for node in missing_image)
    elif missing_image:
        shipped = _ship(now, seen, tag=tag, digest=digest or "", to=missing_image)
    plan = make_plan(now.inventory, job, seen.facts, image=digest or tag)
    missing = nodes_up(now.machines, plan, seen.found)
    if dry_run:
        todo += tuple(f"write the configuration and start the container of {node}" for node in missing)
    else:
        start_nodes(now.machines, plan, missing)
    return Converged(plan=plan, built=built, shipped=shipped, started=tuple(missing)), todo


def image_tag(inventory: Inventory) -> str:
    """The name of the image that the inventory asks for."""
    if inventory.engine == "process":
        from cluster.processes import IMAGE

        return IMAGE
    if inventory.image.use:
        return inventory.image.use
    from launcher.stages.build import read_recipe  # here: it loads the Docker SDK

    return read_recipe(inventory.image, inventory.flavour).tag


def _have_image(now: Session, seen: Seen, *, tag: str, dry_run: bool) -> tuple[str | None, bool, tuple[str, ...]]:
    """The digest that all nodes shall have, building it where that is needed."""
    digests = set(seen.digests.values())
    if len(digests) == 1 and None not in digests:
        return digests.pop(), False, ()
    from cluster.dockerd import DockerEngine
    from cluster.local import LocalTransport
    from launcher.stages.build import build_image, read_recipe

    here = DockerEngine(LocalTransport("this machine"))
    try:
        try:
            present = here.image_id(tag)
        except NodeError:
            present = None
            if None not in digests or len(digests - {None}) != 1:
                raise
        if present:
            return present, False, ()
        held = digests - {None}
        if len(held) == 1:
            return held.pop(), False, ()
        if now.inventory.image.use:
            if here.pull(tag):
                return here.image_id(tag), False, ()
            raise ImageError(
                here.node, f"the image {tag} is not there and cannot be pulled", next_step=f"docker load or pull {tag}"
            )
        if dry_run:
            return None, True, (f"build the image {tag}",)
        now.voice.say(f"building {tag}")
        digest = build_image(here, read_recipe(now.inventory.image, now.inventory.flavour), now.voice.building)
        now.voice.done()
        return digest, True, ()
    finally:
        here.close()


def _ship(now: Session, seen: Seen, *, tag: str, digest: str, to: Sequence[str]) -> Mapping[str, int]:
    """From this machine if it has the digest, else from a node that has it."""
    from cluster.dockerd import DockerEngine
    from cluster.local import LocalTransport

    here = DockerEngine(LocalTransport("this machine"))
    holder = next((machine for machine in now.machines if seen.digests[machine.name] == digest), None)
    try:
        source = here if holder is None or _has(here, digest) else holder.engine
        targets = [machine for machine in now.machines if machine.name in to]
        named = [machine for machine in targets if _has(machine.engine, digest)]
        for machine in named:  # the digest is there under another name: nothing needs to travel
            machine.engine.tag(digest, tag)
        rest = [machine for machine in targets if machine not in named]
        if rest:
            now.voice.say(f"sending {tag} to {', '.join(machine.name for machine in rest)}")
        taken = ship_image(source, rest, tag=tag, digest=digest, progress=now.voice.shipping)
        now.voice.done()
        return taken
    finally:
        here.close()


def _has(engine: Engine, digest: str) -> bool:
    try:
        return engine.image_id(digest) is not None
    except NodeError:
        return False


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


def told(base: Converged) -> str:
    """What was done, in words."""
    parts = []
    if base.built:
        parts.append("built the image")
    if base.shipped:
        parts.append(f"sent it to {', '.join(base.shipped)}")
    if base.started:
        parts.append(f"started {', '.join(base.started)}")
    return "; ".join(parts) or "nothing to do"


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
        emit(RunEnded(time=clock(), code=getattr(error, "exit_code", 130), cause=str(error).splitlines()[0]))
        raise
    for node, container in containers.items():
        emit(NodeStarted(time=clock(), node=node, container=container))
    return containers


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


def find_ours(now: Session, *, run: str | None = None) -> Mapping[str, tuple[Container, ...]]:
    """Our containers on every node, by label alone; with `run` only that run's."""
    labels = {LABEL_CLUSTER: now.inventory.name, **({LABEL_RUN: run} if run else {})}

    def ask(machine: Machine) -> tuple[Container, ...]:
        machine.transport.open()
        return machine.engine.find(labels)

    return each(now.machines, ask, deadline=30).all_or_raise()


def live_run(found: Mapping[str, tuple[Container, ...]]) -> str | None:
    """The id of the run that is under way, or has ended and not been cleared away."""
    runs = [
        (one.is_live, one.labels.get(LABEL_RUN, ""))
        for containers in found.values()
        for one in containers
        if one.labels.get(LABEL_ROLE) == render.ROLE_RUN
    ]
    return max(runs)[1] if runs else None


def stop(now: Session, *, grace: float) -> Mapping[str, tuple[str, ...]]:
    """End the run on every node, in order; who watches it clears it away. Gives back what was stopped, by node."""

    def act(machine: Machine) -> tuple[str, ...]:
        machine.transport.open()
        found = machine.engine.find({LABEL_CLUSTER: now.inventory.name, LABEL_ROLE: render.ROLE_RUN})
        live = [one for one in found if one.is_live]
        for one in live:
            machine.engine.stop(one.id, grace=grace)
        return tuple(one.name for one in live)

    return each(now.machines, act, deadline=grace + 30).all_or_raise()


def down(now: Session, *, grace: float) -> Mapping[str, tuple[str, ...]]:
    """Remove every container of this cluster, by label; gives back their names by node."""

    def act(machine: Machine) -> tuple[str, ...]:
        machine.transport.open()
        found = machine.engine.find({LABEL_CLUSTER: now.inventory.name})
        for one in found:
            if one.is_live and one.labels.get(LABEL_ROLE) == render.ROLE_RUN:
                machine.engine.stop(one.id, grace=grace)
            machine.engine.remove(one.id)
        left = machine.engine.find({LABEL_CLUSTER: now.inventory.name})
        if left:
            raise NodeError(machine.name, f"these do not go: {', '.join(one.name for one in left)}")
        return tuple(one.name for one in found)

    return each(now.machines, act, deadline=grace + 60).all_or_raise()


def choose_machines(now: Session, names: tuple[str, ...]) -> tuple[Machine, ...]:
    """The machines of these names, all when there are none; `InputError` for one that is not in the inventory."""
    known = {machine.name: machine for machine in now.machines}
    for name in names:
        if name not in known:
            raise InputError(f"there is no node {name!r}", next_step=f"the nodes are: {', '.join(known)}")
    return tuple(known[name] for name in names) or tuple(now.machines)


def make_run_id(*, clock: Callable[[], float] = time.time) -> str:
    """A new run's id: sorts by time, and two operators do not meet."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(clock()))}-{random.token_hex(2)}"


def plan_only(now: Session, job: Job) -> Plan:
    """The plan by the last survey if there is one, else by a new one; changes nothing."""
    zero.check(job, accelerator=now.inventory.accelerator)
    facts = now.memory.load_facts()
    tag = image_tag(now.inventory)
    if {node.name for node in now.inventory.nodes} - set(facts):
        facts = look(now, tag=tag).facts
    return make_plan(now.inventory, job, facts, image=tag)


def choose_run(now: Session, run_id: str | None) -> str:
    """The run that is meant: the named one, the one under way, the newest that is known here."""
    if run_id:
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


def run_inside(now: Session, names: tuple[str, ...], argv: tuple[str, ...]) -> Mapping[str, Result]:
    """Run a command in the node containers, everywhere or on the named nodes."""

    def act(machine: Machine) -> Result:
        return machine.engine.execute(_idle(now, machine), Command(argv=argv))

    return each(choose_machines(now, names), act).all_or_raise()


def shell(now: Session, name: str | None, argv: tuple[str, ...], *, tty: bool) -> int:
    """Put the user inside a node's container."""
    machine = choose_machines(now, (name,) if name else ())[0]
    return machine.transport.interact(machine.engine.interactive(_idle(now, machine), argv, tty=tty), tty=tty)


def _idle(now: Session, machine: Machine) -> str:
    machine.transport.open()
    labels = {LABEL_CLUSTER: now.inventory.name, LABEL_ROLE: render.ROLE_NODE}
    live = [one.id for one in machine.engine.find(labels) if one.is_live]
    if not live:
        raise CommandError(machine.name, "it is not up", next_step="launcher up")
    return live[0]


def build_here(asked: Mapping[str, object], *, flavour: str, voice: Voice) -> tuple[str, str, bool]:
    """Build the image on this machine; its tag, its digest, and whether anything had to be built."""
    from cluster.dockerd import DockerEngine
    from cluster.inventory import ImageRecipe
    from cluster.local import LocalTransport
    from launcher.stages.build import build_image, read_recipe

    given = {name: str(value) if isinstance(value, Path) else value for name, value in asked.items() if value}
    try:
        recipe = read_recipe(ImageRecipe.model_validate_json(json.dumps(given)), "cpu" if flavour == "cpu" else "cuda")
    except ValueError as error:
        raise InputError(str(error).splitlines()[-1].strip(), where="launcher image build") from None
    here = DockerEngine(LocalTransport("this machine"))
    try:
        before = here.image_id(recipe.tag)
        digest = build_image(here, recipe, voice.building)
        voice.done()
        return recipe.tag, digest, before is None
    finally:
        here.close()


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

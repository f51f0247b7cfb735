"""Converge: what `up` does, and `run` where it was not done. Only what is missing, however often it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.engine import Engine
from cluster.errors import ImageError, InputError, LockedError, NodeError
from cluster.facts import NodeFacts
from cluster.fleet import Machine
from cluster.inventory import HERE, Inventory
from launcher import checks, image, operator, zero
from launcher.errors import PlanError
from launcher.job import Job
from launcher.plan import NodePlan, Plan, choose_address, make_plan, node_root, stays_here
from launcher.session import Seen, Session, Voice, choose_machines, find_ours, look, showing
from launcher.stages.prepare import nodes_up, start_nodes
from launcher.stages.relay import Road
from launcher.stages.ship import lacking, ship_image

if TYPE_CHECKING:
    from cluster.dockerd import DockerEngine
    from launcher.stages.build import Recipe

ROUNDS = 3  # how often `up` puts back what somebody takes away meanwhile


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


def up(
    now: Session,
    *,
    ignored: tuple[str, ...] = (),
    dry_run: bool = False,
    check: Callable[[Plan], None] | None = None,
) -> tuple[Converged, tuple[str, ...]]:
    """Converge the machines; gives back what was done, or with `dry_run` what would be.

    `check` is shown the plan as `dry_run` would give it, before anything is done; it may refuse it.
    """
    tag = image_tag(now.inventory)
    seen = look(now, tag=tag, keep=not dry_run)
    for finding in checks.judge(checks.findings(now.inventory, seen.facts), ignored=ignored):
        now.voice.warn(finding)
    if check is not None:
        check(converge(now, seen, tag=tag, job=Job(script=""), dry_run=True)[0].plan)
    return converge(now, seen, tag=tag, job=Job(script=""), dry_run=dry_run)


def converge(
    now: Session, seen: Seen, *, tag: str, job: Job, dry_run: bool = False
) -> tuple[Converged, tuple[str, ...]]:
    """Image, directories, configurations, node containers: only what is missing."""
    have = _have_image(now, seen, tag=tag, dry_run=dry_run)
    digest, todo = have.digest, have.todo
    if digest and have.on:  # from there it goes to the others
        seen = replace(seen, digests={**seen.digests, have.on: digest})
    missing_image = lacking(seen.digests, digest) if digest else tuple(seen.digests)
    shipped: Mapping[str, int] = {}
    if missing_image and dry_run:
        todo += tuple(f"send the image {tag} to {node}" for node in missing_image)
    elif missing_image:
        shipped = ship(now, seen, tag=tag, digest=digest or "", to=missing_image)
    plan = make_plan(
        now.inventory,
        job,
        seen.facts,
        image=digest or tag,
        operator=operator.name(),
        starter=operator.starter(),
    )
    missing = nodes_up(now.machines, plan, seen.found, partly=now.whole is not None)
    if dry_run:
        todo += tuple(f"write the configuration and start the container of {node}" for node in missing)
    elif missing:
        _start_missing(now, plan, missing)
    return Converged(plan=plan, built=have.built, shipped=shipped, started=tuple(missing)), todo


def _start_missing(now: Session, plan: Plan, missing: Mapping[str, NodePlan]) -> None:
    """Start the idle containers until one look finds all of them: a `down` at the same moment leaves all or none.

    It goes on until it finds none; who gives up is this, with `LockedError`.
    """
    for _ in range(ROUNDS):
        start_nodes(now.machines, plan, missing)
        missing = nodes_up(now.machines, plan, find_ours(now).all_or_raise(), partly=now.whole is not None)
        if not missing:
            return
    raise LockedError(
        "the idle container does not stay: somebody takes the cluster down, or brings it up by another inventory",
        where=f"node {next(iter(missing))}",
        next_step="launcher status, then launcher up",
    )


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


def image_tag(inventory: Inventory) -> str:
    """The name of the image that the inventory asks for."""
    return image_tags(inventory)[0]


def image_tags(inventory: Inventory) -> tuple[str, ...]:
    """The same, and the name of the image of ours that it stands on, where it has a layer of the user's."""
    if inventory.engine == "process":
        from cluster.processes import IMAGE

        return (IMAGE,)
    if inventory.image.use:
        return (inventory.image.use,)
    from launcher.stages.build import read_recipe  # here: it loads the Docker SDK

    return read_recipe(inventory.image, inventory.flavour).tags


@dataclass(frozen=True, slots=True, kw_only=True)
class _Had:
    """The digest that all nodes shall have (none in a dry run), and the node where it has just come about."""

    digest: str | None
    on: str | None = None
    built: bool = False
    todo: tuple[str, ...] = ()


def _have_image(now: Session, seen: Seen, *, tag: str, dry_run: bool) -> _Had:
    """Find the image, or build it where that is needed: here, or on a node."""
    digests = set(seen.digests.values())
    if len(digests) == 1 and None not in digests:
        return _Had(digest=digests.pop())
    held = digests - {None}
    theirs = {node.name: seen.facts[node.name].system.arch for node in now.inventory.nodes}
    with _engine_here() as here:
        try:
            ours, silent = here.architecture(), None
        except NodeError as error:
            ours, silent = None, error
        name, why = image.choose_builder(now.inventory.image.build_on, here=ours, nodes=theirs)
        if ours and (name == HERE or ours in theirs.values()) and (digest := here.image_id(tag)):
            return _Had(digest=digest)
        if len(held) == 1:
            return _Had(digest=held.pop())
        if name == HERE and silent:
            raise silent
        machine = None if name == HERE else _builder(now, name, chosen=bool(why))
        return _make_image(now, machine, here, tag=tag, why=why, dry_run=dry_run)


def _make_image(
    now: Session, machine: Machine | None, here: DockerEngine, *, tag: str, why: str, dry_run: bool
) -> _Had:
    """Build the image, or pull a ready one, on a node or here."""
    from launcher.stages.build import read_recipe

    asked, on = now.inventory.image, machine.name if machine else None
    verb, at = "pull" if asked.use else "build", f" on {on}" if on else ""
    if dry_run:
        return _Had(digest=None, built=True, todo=(f"{verb} the image {tag}{at}",))
    now.voice.say(f"{verb}ing {tag}{at}{f': {why}' if why else ''}")
    engine = _hand(machine) if machine else here
    if not asked.use:
        digest, built = _build(engine, read_recipe(asked, now.inventory.flavour), now.voice)
        return _Had(digest=digest, on=on, built=built)
    if engine.pull(tag):
        return _Had(digest=engine.image_id(tag), on=on)
    raise ImageError(
        engine.node, f"the image {tag} is not there and cannot be pulled", next_step=f"docker load or pull {tag}"
    )


def _builder(now: Session, name: str, *, chosen: bool) -> Machine:
    """The machine of this name; where nobody has named it, rather one that has the image below."""
    if chosen:
        under = image_tags(now.inventory)[1:]
        having = (machine for machine in now.machines if any(_has(machine.engine, one) for one in under))
        if machine := next(having, None):
            return machine
    return choose_machines(now.whole or now, (name,))[0]


def _hand(machine: Machine) -> DockerEngine:
    from cluster.dockerd import DockerEngine

    if not isinstance(machine.engine, DockerEngine):
        raise InputError(f"{machine.name} runs jobs without Docker: no image can be built there")
    return machine.engine


@contextmanager
def _engine_here() -> Iterator[DockerEngine]:
    from cluster.dockerd import DockerEngine
    from cluster.local import LocalTransport

    engine = DockerEngine(LocalTransport("this machine"))
    try:
        yield engine
    finally:
        engine.close()


def ship(now: Session, seen: Seen, *, tag: str, digest: str, to: Sequence[str]) -> Mapping[str, int]:
    """Send an image from this machine if it has the digest, else from a node that has it; bytes by node."""
    from cluster.shelf import Shelf

    everyone = (now.whole or now).machines
    holder = next((machine for machine in everyone if seen.digests.get(machine.name) == digest), None)
    with _engine_here() as here:
        if holder is None or _has(here, digest):
            holder = None
        targets = [machine for machine in now.machines if machine.name in to]
        named = [machine for machine in targets if _has(machine.engine, digest)]
        for machine in named:  # the digest is there under another name: nothing needs to travel
            machine.engine.tag(digest, tag)
        rest = [machine for machine in targets if machine not in named]
        if rest:
            now.voice.say(f"sending {tag} to {', '.join(machine.name for machine in rest)}")
        with showing(now.voice):
            return ship_image(
                holder or here,
                rest,
                tag=tag,
                digest=digest,
                progress=now.voice.shipping,
                shelf=Shelf(now.memory.shelf),
                roads=roads(now.inventory, seen.facts),
            )


def roads(inventory: Inventory, facts: Mapping[str, NodeFacts]) -> dict[str, Road]:
    """Where every node keeps what is sent to it, and how the others reach it."""
    alone = stays_here(inventory)
    found = {}
    for node in inventory.nodes:
        try:
            address = choose_address(node, facts[node.name], alone=alone)
        except PlanError:  # it is fed from here, then
            address = None
        found[node.name] = Road(folder=f"{node_root(inventory, node, facts[node.name])}/ship", address=address)
    return found


def _has(engine: Engine, digest: str) -> bool:
    try:
        return engine.image_id(digest) is not None
    except NodeError:
        return False


def build_here(
    asked: Mapping[str, object], *, flavour: str, voice: Voice, dry_run: bool = False
) -> tuple[str, str | None, bool]:
    """Build the image on this machine; its tag, its digest, and whether anything had to be built.

    With `dry_run` nothing is built, and the digest is None where the image is not there.
    """
    recipe = _read_options(asked, flavour)
    with _engine_here() as here:
        return (recipe.tag, *_build(here, recipe, voice, dry_run=dry_run))


def build_there(
    now: Session, node: str, asked: Mapping[str, object], *, flavour: str, dry_run: bool = False
) -> tuple[str, str | None, bool]:
    """The same on a node."""
    recipe = _read_options(asked, flavour)
    return (recipe.tag, *_build(_hand(choose_machines(now, (node,))[0]), recipe, now.voice, dry_run=dry_run))


def _build(engine: DockerEngine, recipe: Recipe, voice: Voice, *, dry_run: bool = False) -> tuple[str | None, bool]:
    from launcher.stages.build import build_image

    before = engine.image_id(recipe.tag)
    if dry_run:
        return before, False
    with showing(voice):
        return build_image(engine, recipe, voice.building), before is None


def _read_options(asked: Mapping[str, object], flavour: str) -> Recipe:
    """The recipe that the options of `launcher image build` describe."""
    from cluster.complaints import judge_options
    from cluster.inventory import ImageRecipe
    from launcher.stages.build import read_recipe

    given = {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}
    judged = judge_options(given, ImageRecipe, options={"packages": "--package"})
    try:
        return read_recipe(judged, "cpu" if flavour == "cpu" else "cuda")
    except InputError as error:
        if not error.place:
            raise
        raise InputError(error.what, where=f"--{error.place[-1]}", next_step=error.next_step) from error


def plan_only(now: Session, job: Job) -> Plan:
    """The plan by a new survey, or by the last one where a node does not answer; changes nothing."""
    zero.check(job, accelerator=now.inventory.accelerator)
    try:
        facts = look(now, tag="").facts
    except NodeError as error:
        facts = now.memory.load_facts()
        if {node.name for node in now.inventory.nodes} - set(facts):
            raise
        now.voice.say(f"warning: {error.where}: {error.what}; this is what the last survey found")
    return make_plan(now.inventory, job, facts, image=image_tag(now.inventory), run_id="RUN", code="CODE")

"""Converge: what `up` does, and `run` where it was not done. Only what is missing, however often it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.engine import Engine
from cluster.errors import ImageError, InputError, LockedError, NodeError
from cluster.facts import NodeFacts
from cluster.inventory import Inventory
from launcher import checks, operator, zero
from launcher.errors import PlanError
from launcher.job import Job
from launcher.plan import NodePlan, Plan, choose_address, make_plan, node_root, stays_here
from launcher.session import Seen, Session, Voice, find_ours, look, showing
from launcher.stages.prepare import nodes_up, start_nodes
from launcher.stages.relay import Road
from launcher.stages.ship import lacking, ship_image

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
    digest, built, todo = _have_image(now, seen, tag=tag, dry_run=dry_run)
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
    return Converged(plan=plan, built=built, shipped=shipped, started=tuple(missing)), todo


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
        if dry_run:
            return None, True, (f"{'pull' if now.inventory.image.use else 'build'} the image {tag}",)
        if now.inventory.image.use:
            if here.pull(tag):
                return here.image_id(tag), False, ()
            raise ImageError(
                here.node, f"the image {tag} is not there and cannot be pulled", next_step=f"docker load or pull {tag}"
            )
        now.voice.say(f"building {tag}")
        recipe = read_recipe(now.inventory.image, now.inventory.flavour)
        with showing(now.voice):
            return build_image(here, recipe, now.voice.building), True, ()
    finally:
        here.close()


def ship(now: Session, seen: Seen, *, tag: str, digest: str, to: Sequence[str]) -> Mapping[str, int]:
    """Send an image from this machine if it has the digest, else from a node that has it; bytes by node."""
    from cluster.dockerd import DockerEngine
    from cluster.local import LocalTransport
    from cluster.shelf import Shelf

    here = DockerEngine(LocalTransport("this machine"))
    holder = next((machine for machine in now.machines if seen.digests[machine.name] == digest), None)
    try:
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
    finally:
        here.close()


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


def build_here(asked: Mapping[str, object], *, flavour: str, voice: Voice) -> tuple[str, str, bool]:
    """Build the image on this machine; its tag, its digest, and whether anything had to be built."""
    from cluster.complaints import judge_options
    from cluster.dockerd import DockerEngine
    from cluster.inventory import ImageRecipe
    from cluster.local import LocalTransport
    from launcher.stages.build import build_image, read_recipe

    given = {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}
    judged = judge_options(given, ImageRecipe, options={"packages": "--package"})
    try:
        recipe = read_recipe(judged, "cpu" if flavour == "cpu" else "cuda")
    except InputError as error:
        if not error.place:
            raise
        raise InputError(error.what, where=f"--{error.place[-1]}", next_step=error.next_step) from error
    here = DockerEngine(LocalTransport("this machine"))
    try:
        before = here.image_id(recipe.tag)
        with showing(voice):
            digest = build_image(here, recipe, voice.building)
        return recipe.tag, digest, before is None
    finally:
        here.close()


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

"""Images at hand: what is on which machine, what may go, why it is another one; sent, saved to a file, loaded."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.archive import CHUNK, compose, content_digest, unpack
from cluster.engine import Engine
from cluster.errors import ClusterError, ImageError, InputError, IntegrityError, NodeError
from cluster.fleet import Answers, Machine, each
from cluster.layers import Held, shared
from cluster.shelf import Shelf
from launcher import image, layer
from launcher.converge import image_tags, ship
from launcher.session import LOOK_DEADLINE, Session, look
from launcher.stages.ship import lacking, read_layers

HERE = "this machine"
OURS = "launcher/"
_SWEEP = r"""
rm -f -- "$1"/*.new; [ -e "$1/lock" ] || rm -f -- "$1"/*.part
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An image of ours on a machine."""

    machine: str
    held: Held
    used: bool  # by a container, live or not
    current: bool  # the one that the inventory asks for
    below: bool = False  # one of these two stands on it

    @property
    def name(self) -> str:
        """What a person calls it."""
        return next(iter(self.held.tags), "") or f"{OURS}?"

    @property
    def may_go(self) -> bool:
        """Whether nothing speaks for keeping it: all its names are ours, nobody uses it, and nobody asks for it.

        What another image of ours stands on stays with that one: without its name it would be built again.
        """
        kept = self.used or self.current or self.below
        return not kept and all(tag.startswith(OURS) for tag in self.held.tags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What is on which machine; `lacks` says of machines without the current image what they lack of it."""

    tag: str
    images: tuple[Kept, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)
    silent: Mapping[str, NodeError] = field(default_factory=dict)


def listing(now: Session, *, wanted: Collection[str] = ()) -> Listing:
    """Ask every node, and this machine where it has an engine. `wanted`: names that other clusters ask for."""
    tag, *under = image_tags(now.inventory)
    with _here() as here:
        machines = [*now.machines, *([here] if here else [])]
        seen = each(machines, _look_at, deadline=LOOK_DEADLINE)
    asked = {tag, *wanted} - {*under}
    kept = tuple(
        Kept(machine=name, held=one, used=one.id in used, current=bool(asked & {*one.tags, one.id}))
        for name, (held, used) in seen.good.items()
        for one in held
        if _is_ours(one, tag)
    )
    kept = tuple(replace(one, below=_is_below(one, kept, under)) for one in kept)
    return Listing(tag=tag, images=kept, lacks=_lacks(seen, tag), silent=seen.bad)


def _look_at(machine: Machine) -> tuple[tuple[Held, ...], frozenset[str]]:
    return machine.engine.held(), frozenset(one.image for one in machine.engine.find({}))


def _is_below(one: Kept, kept: Sequence[Kept], under: Sequence[str]) -> bool:
    stays = {other.held.labels.get(layer.BASE) for other in kept if other.used or other.current}
    return bool({*under, *stays} & {*one.held.tags})


def _is_ours(one: Held, tag: str) -> bool:
    return image.FINGERPRINT in one.labels or tag in (*one.tags, one.id)


def _lacks(seen: Answers[tuple[tuple[Held, ...], frozenset[str]]], tag: str) -> dict[str, str]:
    """What is missing where, in words."""
    everywhere = {name: held for name, (held, _) in seen.good.items()}
    holders = {one.id: one for held in everywhere.values() for one in held if tag in one.tags}
    lacks = {}
    for name, held in everywhere.items():
        mine = next((one for one in held if tag in one.tags), None)
        if mine is not None and len(holders) > 1:
            lacks[name] = f"has {mine.id[7:19]} under this name, others have another one"
        elif mine is None and holders:
            layers = next(iter(holders.values())).layers
            lacks[name] = f"lacks {len(layers) - shared(layers, held)} of {len(layers)} layers"
        elif mine is None:
            lacks[name] = "lacks it; nobody has it"
    return lacks


def prune(now: Session, *, wanted: Collection[str], dry_run: bool) -> tuple[Listing, tuple[Kept, ...], int]:
    """Remove images of ours that nobody needs, on every machine, and what transfers have left.

    Gives back what was there, what went, and how many bytes of layers went from this machine's shelf.
    """
    before = listing(now, wanted=wanted)
    going = tuple(one for one in before.images if one.may_go)
    if dry_run:
        return before, going, 0

    def act(machine: Machine) -> tuple[Kept, ...]:
        return tuple(one for one in going if one.machine == machine.name and _remove(machine.engine, one.held))

    with _here() as here:
        machines = [*now.machines, *([here] if here else [])]
        able = [machine for machine in machines if machine.name not in before.silent]
        gone = each(able, act).all_or_raise()
    each([machine for machine in now.machines if machine.name not in before.silent], _sweeper(now)).all_or_raise()
    current = [layer for one in before.images if one.current for layer in one.held.layers]
    freed = Shelf(now.memory.shelf).trim(keep=current, limit=0)
    return before, tuple(one for ones in gone.values() for one in ones), freed


def _remove(engine: Engine, held: Held) -> bool:
    """By its names, one after another; the last takes the image along. The engine refuses where it is used."""
    return all(engine.remove_image(name) for name in held.tags or (held.id,))


def _sweeper(now: Session) -> Callable[[Machine], None]:
    from cluster.command import script
    from launcher.converge import roads

    facts = now.memory.load_facts()
    known = {node.name for node in now.inventory.nodes} <= set(facts)
    folders = {name: road.folder for name, road in roads(now.inventory, facts).items()} if known else {}

    def sweep(machine: Machine) -> None:
        if machine.name in folders:
            machine.transport.run(script(_SWEEP, folders[machine.name]))

    return sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """What makes the recipe's image another one than an image that is there."""

    tag: str
    before: str = ""  # the image that it is compared with; empty where there is none
    machine: str = ""
    present: bool = False  # the recipe's own image is somewhere
    changes: tuple[str, ...] = ()


def why(now: Session, *, against: str | None = None) -> Why:
    """Compare the recipe with the newest other image of its flavour, or with the one that is named."""
    if now.inventory.image.use:
        raise InputError(
            f"the inventory uses the ready image {now.inventory.image.use}: it has no recipe of ours",
            next_step="leave image.use out to have one built",
        )
    from launcher.stages.build import read_recipe

    recipe = read_recipe(now.inventory.image, now.inventory.flavour)
    found = listing(now).images
    present = any(recipe.tag in one.held.tags for one in found)
    others = [one for one in found if recipe.tag not in one.held.tags and _is_meant(one.held, against, recipe.labels)]
    if against and not others:
        raise InputError(f"no image {against!r} of ours is on any machine", next_step="launcher image ls shows them")
    if not others:
        return Why(tag=recipe.tag, present=present)
    newest = max(others, key=lambda one: one.held.created)
    before, after = image.read_parts(newest.held.labels), image.read_parts(recipe.labels) or {}
    changes = image.explain(before, after) if before is not None else ("it was built before this was written down",)
    return Why(tag=recipe.tag, before=newest.name, machine=newest.machine, present=present, changes=changes)


def _is_meant(held: Held, against: str | None, labels: Mapping[str, str]) -> bool:
    if against:
        return against in (*held.tags, held.id) or held.id.removeprefix("sha256:").startswith(against)
    if not held.tags:  # a stage that a builder has left: it says of itself what the image below it says
        return False
    return held.labels.get("launcher.flavour") == labels["launcher.flavour"]


def ship_named(now: Session, name: str) -> tuple[str, Mapping[str, int]]:
    """Bring any image, by its name, from this machine (or a node that has it) to every node; its digest, and bytes."""
    seen = look(now, tag=name)
    with _here() as here:
        digest = here.engine.image_id(name) if here else None
    held = {one for one in seen.digests.values() if one}
    if digest is None and len(held) != 1:
        what = f"the image {name} is on neither this machine nor a node" if not held else f"nodes disagree on {name}"
        raise ImageError(HERE, what, next_step=f"docker pull {name}, or docker load it, on this machine")
    digest = digest or held.pop()
    missing = lacking(seen.digests, digest)
    return digest, ship(now, seen, tag=name, digest=digest, to=missing) if missing else {}


def save(shelf: Shelf, path: Path, *, name: str, progress: Callable[[int, int], None]) -> str:
    """Write an image of this machine into one file that `docker load` takes, too; its digest.

    The file is whole and verified before it has its name.
    """
    with _here() as here:
        if here is None:
            raise ImageError(HERE, "there is no Docker engine here", next_step="run this where the image was built")
        held = here.engine.image(name)
        if held is None:
            raise ImageError(
                HERE, f"the image {name} is not there", next_step="launcher image build, or docker pull it"
            )
        if held.layers and here.engine.store() == "classic":
            # So that all are on the shelf, verified.
            read_layers(here.engine, held, shelf, have=0, progress=lambda _, taken, total: progress(taken, total))
            config = shelf.config(held.id)
            assert config is not None
            archive = compose(config, held.layers, [shelf.layer(layer) for layer in held.layers], tags=(name,))
            _write(path, archive.chunks(), lambda done: progress(done, archive.size))
        else:
            total = here.engine.image_bytes(held.id)
            _write(path, here.engine.save(name), lambda done: progress(done, total))
        return held.id


def load(path: Path, *, progress: Callable[[int, int], None]) -> tuple[str, tuple[str, ...]]:
    """Take an image of a file in, after all of it has been verified; its digest and names."""
    try:
        total = path.stat().st_size
        found = unpack(_file(path, lambda done: progress(done, 2 * total)), content_digest, where=str(path))
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror or error}", where=str(path)) from error
    with _here() as here:
        if here is None:
            raise ImageError(HERE, "there is no Docker engine here to load it", next_step="start Docker here")
        here.engine.load(_file(path, lambda done: progress(total + done, 2 * total)))
        names = found.tags or (found.digest,)
        arrived = {here.engine.image_id(one) or "nothing" for one in names}
        if here.engine.store() == "classic" and arrived != {found.digest}:
            said = ", ".join(sorted(arrived))
            raise IntegrityError(f"the engine made {said} of it, the file says {found.digest}", where=str(path))
    return arrived.pop(), found.tags


def _file(path: Path, hear: Callable[[int], None]) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
            done += len(chunk)
            hear(done)


def _write(path: Path, chunks: Iterator[bytes], hear: Callable[[int], None]) -> None:
    """Beside it, to the disk, then under its name."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    done = 0
    try:
        with fresh.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
                done += len(chunk)
                hear(done)
            file.flush()
            os.fsync(file.fileno())
        with fresh.open("rb") as written:
            unpack(iter(lambda: written.read(CHUNK), b""), content_digest, where=str(path))
        fresh.replace(path)
    except OSError as error:
        raise ClusterError(
            f"the file cannot be written: {error.strerror or error}", where=str(path), next_step="make room there"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def _here() -> Iterator[Machine | None]:
    """This machine, where it has a Docker engine."""
    from cluster.dockerd import DockerEngine
    from cluster.local import LocalTransport

    transport = LocalTransport(HERE)
    engine = DockerEngine(transport)
    try:
        try:
            engine.version()
        except NodeError:
            yield None
            return
        yield Machine(name=HERE, transport=transport, engine=engine)
    finally:
        engine.close()


def table(found: Listing) -> Sequence[tuple[str, ...]]:
    """The listing's rows: machine, image, digest, size, state."""
    rows = [
        (one.machine, one.name, one.held.id[7:19], f"{one.held.size / 1e6:.0f} MB", state(one)) for one in found.images
    ]
    rows += [(name, found.tag, "-", "-", text) for name, text in found.lacks.items()]
    return rows + [(name, "?", "?", "?", error.what) for name, error in found.silent.items()]


def state(one: Kept) -> str:
    """What keeps an image, or that nothing does."""
    reasons = (("current", one.current), ("in use", one.used), ("below another", one.below))
    words = [word for word, true in reasons if true]
    return ", ".join(words) or ("may go" if one.may_go else "has another name")

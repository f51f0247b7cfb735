"""Checkpoints of nodes that share no file system: which there are, whether they are whole, and in one place.

Who holds what is asked anew every time; what it should be is what the nodes wrote down while they trained
(`inside/manifest.py`). `shards` judges, `stages.carry` brings; here is the order of things, and what is refused.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.errors import InputError, IntegrityError, NodeError
from cluster.fleet import each
from launcher import shards
from launcher.events import CheckpointPlaced, CheckpointVerified, Event
from launcher.session import LOOK_DEADLINE, Session, choose_machines, idle_container
from launcher.shards import Candidate, Flaw, Listing
from launcher.stages import carry
from launcher.stages.carry import Place

ROUNDS = 4  # looks at what has arrived: lines drop
EXPORTED = "exported"  # below a checkpoints folder: converted weights
SHOWN_FLAWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One checkpoint of the cluster: the nodes' own parts, and whole copies of it by place."""

    unit: str
    parts: tuple[Listing, ...]
    copies: tuple[Listing, ...]
    flaws: tuple[Flaw, ...]

    @property
    def listings(self) -> tuple[Listing, ...]:
        """The nodes' parts, or where there are none any more the copies."""
        return self.parts or self.copies

    @property
    def step(self) -> int:
        """The step at which it was written; -1 when nothing tells."""
        return max(shards.step_of(one) for one in self.listings)

    @property
    def modified(self) -> float:
        """When it was last written, in seconds since 1970 by the nodes' clocks."""
        return max(one.modified for one in self.listings)

    @property
    def tag(self) -> str:
        """DeepSpeed's tag."""
        return self.listings[0].tag

    @property
    def style(self) -> str:
        """Who wrote it: accelerate, deepspeed, or plain."""
        return self.listings[0].style

    @property
    def bytes(self) -> int:
        """All parts together."""
        return sum(one.bytes for one in self.listings)

    @property
    def world_size(self) -> int:
        """How many processes wrote it."""
        manifests = shards.manifests_of(self.listings)
        paths = (part.path for one in self.listings for part in one.parts)
        return manifests[0].world_size if manifests else shards.read_layout(paths).world_size

    @property
    def is_universal(self) -> bool:
        """Whether it is for any number of processes."""
        return shards.is_universal(self.listings[0])

    @property
    def fatal(self) -> tuple[Flaw, ...]:
        """The flaws that forbid its use."""
        return tuple(filter(shards.is_fatal, self.flaws))


# --- which there are -----------------------------------------------------------------------------------------------


def places(now: Session, names: tuple[str, ...] = ()) -> tuple[Place, ...]:
    """The nodes as places, by their idle containers; `NodeError` for one that is not up or does not answer."""
    machines = choose_machines(now, names)
    containers = each(machines, lambda machine: idle_container(now, machine).id).all_or_raise()
    return tuple(carry.place_of(machine, containers[machine.name]) for machine in machines)


def reached(now: Session) -> tuple[tuple[Place, ...], Mapping[str, NodeError]]:
    """The nodes that answer and are up, as places; and what is wrong with the others."""
    containers = each(now.machines, lambda machine: idle_container(now, machine).id, deadline=LOOK_DEADLINE)
    found = (carry.place_of(one, containers.good[one.name]) for one in now.machines if one.name in containers.good)
    return tuple(found), containers.bad


def kept(at: Sequence[Place], run: str | None = None) -> tuple[Kept, ...]:
    """Every checkpoint (of one run), the oldest first; judged by names, sizes and manifests alone."""
    found = each(at, lambda place: carry.list_units(place, brief=True)).all_or_raise()
    mine = [one for listings in found.values() for one in listings]
    units = dict.fromkeys(shards.origin(one.unit) for one in mine if _belongs(one, run))
    made = (_kept(unit, mine) for unit in units)
    return tuple(sorted(made, key=lambda one: (one.modified, one.step, one.unit)))


def _belongs(listing: Listing, run: str | None) -> bool:
    unit = shards.origin(listing.unit)
    said = {shards.run_of(unit), *(manifest.run for manifest in listing.manifests)}
    return not unit.startswith(f"{EXPORTED}/") and (run is None or run in said or unit.startswith(f"{run.strip('/')}/"))


def _kept(unit: str, listings: Iterable[Listing]) -> Kept:
    mine = [one for one in listings if shards.origin(one.unit) == unit]
    parts = tuple(one for one in mine if one.unit == unit)
    copies = tuple(one for one in mine if one.unit != unit)
    judged = (shards.judge(shards.manifests_of(parts), parts),) if parts else tuple(map(shards.judge_copy, copies))
    return Kept(unit=unit, parts=parts, copies=copies, flaws=min(judged, key=len))


def choose(
    now: Session, at: Sequence[Place], *, run: str | None, tag: str | None, read: bool = False
) -> tuple[Kept, tuple[str, ...]]:
    """The checkpoint that is meant, with all that its manifests say; and why it is not the newest, where it is not.

    With a `tag` that one, whatever is wrong with it. Else the newest that verifies as far as names, sizes, steps and
    manifests tell, and with `read` by every byte; IntegrityError when there is none.
    """
    named = _of_newest_run(now, kept(at, run), run)
    if tag is not None:
        meant = [one for one in named if shards.is_meant(one.unit, one.tag, tag)]
        if not meant:
            names = ", ".join(posixpath.basename(one.unit) for one in named[-8:])
            raise InputError(f"there is no checkpoint {tag!r}", next_step=f"the newest are: {names}")
        return in_full(at, meant[-1], read=read), ()
    latest = {
        posixpath.dirname(one.unit): listing.latest
        for one in named
        for listing in one.parts
        if listing.latest is not None
    }
    known = {one.unit: one for one in named if not one.is_universal}
    while True:
        candidates = [
            Candidate(
                unit=one.unit, tag=one.tag, style=one.style, step=one.step, modified=one.modified, flaws=one.fatal
            )
            for one in known.values()
        ]
        choice = shards.choose_unit(candidates, latest=latest)
        if choice is None:
            raise _nothing_whole(tuple(known.values()))
        full = in_full(at, known[choice.unit], read=read)
        if not full.fatal:
            mended = tuple(f"{full.unit}/{flaw.path}: {flaw.what}" for flaw in full.flaws)
            return full, (*choice.why, *mended)
        known[choice.unit] = full


def _of_newest_run(now: Session, found: tuple[Kept, ...], run: str | None) -> tuple[Kept, ...]:
    if not found:
        of = f" of {run}" if run else ""
        raise InputError(
            f"cluster {now.inventory.name} has no checkpoint{of}",
            next_step="launcher checkpoint ls shows all that there are",
        )
    newest = shards.run_of(found[-1].unit)
    return found if run else tuple(one for one in found if shards.run_of(one.unit) == newest)


def _nothing_whole(found: tuple[Kept, ...]) -> IntegrityError:
    newest = found[-1]
    return broken(newest.unit, newest.fatal)


def broken(unit: str, flaws: Sequence[Flaw], *, next_step: str | None = None) -> IntegrityError:
    """The refusal of a checkpoint, every flaw in a line of its own."""
    more = len(flaws) - SHOWN_FLAWS
    return IntegrityError(
        f"the checkpoint {unit} is not whole",
        detail=(*map(str, flaws[:SHOWN_FLAWS]), *((f"and {more} more",) if more > 0 else ())),
        next_step=next_step or _cure(unit, flaws),
    )


def _cure(unit: str, flaws: Sequence[Flaw]) -> str:
    if flaws and all(flaw.kind == "unsealed" for flaw in flaws):
        return f"launcher checkpoint verify --seal {shards.run_of(unit)} --tag {posixpath.basename(unit)}"
    return "launcher checkpoint ls shows the others"


def in_full(at: Sequence[Place], one: Kept, *, read: bool = False, whole: bool = False) -> Kept:
    """The same with every hash of its manifests; with `read` also those of the files as they are now."""

    def ask(place: Place) -> tuple[Listing, ...]:
        units = [listing.unit for listing in (*one.parts, *one.copies) if listing.place == place.name]
        if not units:
            return ()
        return carry.hash_units(place, units, whole=whole) if read else carry.list_units(place, units)

    found = each(at, ask).all_or_raise()
    return _kept(one.unit, [listing for listings in found.values() for listing in listings])


# --- whether it is whole -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """One checkpoint, read again where it lies; `copies` are the flaws of its whole copies by place."""

    kept: Kept
    flaws: tuple[Flaw, ...]
    copies: Mapping[str, tuple[Flaw, ...]]
    sealed: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong anywhere."""
        return not self.flaws and not any(self.copies.values())


def verify(
    now: Session,
    *,
    run: str | None = None,
    tag: str | None = None,
    every: bool = False,
    seal: bool = False,
    clock: Callable[[], float] = time.time,
) -> tuple[Verified, ...]:
    """Read checkpoints again on all nodes at once and judge them: the newest of the run, the named one, or `every` one.

    With `seal` nodes that wrote nothing down do it now, where what they hold is whole by its form: from then on that
    is what they had.
    """
    at = places(now)
    named = _of_newest_run(now, kept(at, run), run)
    if tag is not None:
        meant = tuple(one for one in named if shards.is_meant(one.unit, one.tag, tag))
        if not meant:
            raise InputError(f"there is no checkpoint {tag!r}", next_step="launcher checkpoint ls")
    else:
        meant = named if every else named[-1:]
    elsewhere = _contents(at)
    return tuple(_verify(now, at, one, elsewhere, seal=seal, clock=clock) for one in meant)


def cure_of(found: Sequence[Verified]) -> str:
    """What can be done about checkpoints that do not verify."""
    return _cure(found[-1].kept.unit, found[-1].flaws)


def _contents(at: Sequence[Place]) -> shards.Contents:
    """What every file of every checkpoint is, by its hashes: so that a strayed one is known."""
    found = each(at, lambda place: carry.list_units(place, blind=True)).all_or_raise()
    return shards.contents(one for listings in found.values() for one in listings)


def _verify(
    now: Session,
    at: Sequence[Place],
    one: Kept,
    elsewhere: shards.Contents,
    *,
    seal: bool,
    clock: Callable[[], float],
) -> Verified:
    full = in_full(at, one, read=True, whole=seal)
    sealed: tuple[str, ...] = ()
    if seal:
        full, sealed = _seal(at, full, clock=clock)
    flaws = shards.judge(shards.manifests_of(full.parts), full.parts, elsewhere=elsewhere) if full.parts else ()
    copies = {copy.place: shards.judge_copy(copy, elsewhere=elsewhere) for copy in full.copies}
    names = tuple(listing.place for listing in full.listings)
    all_flaws = (*flaws, *(flaw for found in copies.values() for flaw in found))
    remember(
        now,
        CheckpointVerified(
            time=clock(), unit=one.unit, nodes=names, bytes=full.bytes, flaws=tuple(map(str, all_flaws))
        ),
    )
    return Verified(kept=full, flaws=flaws, copies=copies, sealed=sealed)


def _seal(at: Sequence[Place], full: Kept, *, clock: Callable[[], float]) -> tuple[Kept, tuple[str, ...]]:
    """Let the silent nodes write down what they hold, if its form is whole and nothing else is wrong."""
    silent = [one for one in full.parts if one.parts and not one.manifests and not one.spoilt]
    if not silent or any(flaw.kind != "unsealed" and shards.is_fatal(flaw) for flaw in full.flaws):
        return full, ()
    by_name = {place.name: place for place in at}
    run = next((one.run for one in shards.manifests_of(full.parts)), None)
    made = {}
    for listing in silent:
        manifest = shards.late_manifest(listing, world_size=full.world_size, made=clock(), run=run)
        text = shards.write_manifest(manifest)
        carry.put_manifest(by_name[listing.place], listing.unit, node=listing.place, text=text)
        made[listing.place] = (manifest, text)
    parts = tuple(
        replace(
            one,
            manifests=(*one.manifests, made[one.place][0]),
            texts=(*one.texts, (shards.manifest_name(one.place), made[one.place][1])),
        )
        if one.place in made
        else one
        for one in full.parts
    )
    return _kept(full.unit, (*parts, *full.copies)), tuple(made)


def remember(now: Session, event: CheckpointVerified | CheckpointPlaced) -> None:
    """Write it into the run's record, where there is one here."""
    record = now.memory.run(shards.run_of(event.unit))
    if record.folder.is_dir():
        record.emit(event)


def last_verified(events: Iterable[Event]) -> dict[str, CheckpointVerified]:
    """The last verification of every unit."""
    return {event.unit: event for event in events if isinstance(event, CheckpointVerified)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """The newest checkpoint that verifies: where its parts lie (`unit` below each node's checkpoints folder), and the
    places that hold a whole copy; `why` tells of newer ones that were passed over."""

    run: str
    unit: str
    tag: str
    step: int
    world_size: int
    nodes: Mapping[str, tuple[int, ...]]  # the ranks of each node
    copies: tuple[str, ...]
    why: tuple[str, ...]


def newest_verified(now: Session, *, run: str | None = None, read: bool = False) -> Newest | None:
    """What a run can go on from, by node; None when there is nothing. With `read` every byte of it is read again."""
    at = places(now)
    if not kept(at, run):
        return None
    try:
        one, why = choose(now, at, run=run, tag=None, read=read)
    except IntegrityError:
        return None
    manifests = shards.manifests_of(one.listings)
    return Newest(
        run=manifests[0].run,
        unit=one.unit,
        tag=one.tag,
        step=one.step,
        world_size=one.world_size,
        nodes={manifest.node: manifest.ranks for manifest in manifests},
        copies=tuple(copy.place for copy in one.copies),
        why=why,
    )

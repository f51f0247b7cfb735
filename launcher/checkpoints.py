"""Checkpoints of nodes that share no file system: which there are, whether they are whole, and in one place.

Who holds what is asked anew every time; what it should be is what the nodes wrote down while they trained
(`inside/manifest.py`). `shards` judges, `stages.carry` brings; here is the order of things, and what is refused.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from cluster.errors import InputError, IntegrityError, NodeError, PreconditionError
from cluster.fleet import each
from launcher import shards
from launcher.events import CheckpointPlaced, CheckpointVerified, Event
from launcher.session import Session, choose_machines, idle_container, showing
from launcher.shards import Candidate, Flaw, Listing, Piece, Wanted
from launcher.stages import carry
from launcher.stages.carry import HERE, Place

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
    containers = each(machines, lambda machine: idle_container(now, machine)).all_or_raise()
    return tuple(carry.place_of(machine, containers[machine.name]) for machine in machines)


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
    judged = (shards.judge(shards.manifests_of(parts), parts),) if parts else tuple(map(_judge_copy, copies))
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
        return _in_full(at, meant[-1], read=read), ()
    latest = {posixpath.dirname(one.unit): listing.latest for one in named for listing in one.parts if listing.latest}
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
        full = _in_full(at, known[choice.unit], read=read)
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


def _in_full(at: Sequence[Place], one: Kept, *, read: bool = False, whole: bool = False) -> Kept:
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
    full = _in_full(at, one, read=True, whole=seal)
    sealed: tuple[str, ...] = ()
    if seal:
        full, sealed = _seal(at, full, clock=clock)
    flaws = shards.judge(shards.manifests_of(full.parts), full.parts, elsewhere=elsewhere) if full.parts else ()
    copies = {copy.place: shards.judge(copy.manifests, (copy,), elsewhere=elsewhere) for copy in full.copies}
    names = tuple(listing.place for listing in full.listings)
    all_flaws = (*flaws, *(flaw for found in copies.values() for flaw in found))
    _remember(
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
    made = {}
    for listing in silent:
        manifest = shards.late_manifest(listing, world_size=full.world_size, made=clock())
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


def _remember(now: Session, event: CheckpointVerified | CheckpointPlaced) -> None:
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


# --- to one place, and from one to all -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A whole checkpoint in one place: `folder` below its checkpoints folder; `sent` of its `bytes` had to travel."""

    unit: str
    place: str
    folder: str
    bytes: int
    sent: int
    seconds: float
    notes: tuple[str, ...] = ()


def gather(
    now: Session, *, run: str | None = None, tag: str | None = None, to: str, clock: Callable[[], float] = time.time
) -> Placed:
    """Bring every node's part of a checkpoint to one place: a node's name, or a folder on this machine.

    What verifies by its manifests is taken; every piece is hashed on arrival and all of it once more before it gets
    its name. IntegrityError names what is not whole; nothing is shown then, and an earlier copy stays as it is.
    """
    at = places(now)
    one, notes = choose(now, at, run=run, tag=tag)
    if one.fatal:
        raise broken(one.unit, one.fatal)
    target = destination(at, to)
    return gather_to(now, at, one, target, notes=notes, clock=clock)


def destination(at: Sequence[Place], to: str) -> Place:
    """The place that a user names: a node, or else a folder here, which is made."""
    node = next((place for place in at if place.name == to), None)
    if node is not None:
        return node
    folder = Path(to).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"this is neither a node nor a folder that can be used: {error.strerror}",
            where=to,
            next_step=f"the nodes are: {', '.join(place.name for place in at)}",
        ) from None
    return carry.place_here(folder.resolve())


def gather_to(
    now: Session,
    at: Sequence[Place],
    one: Kept,
    target: Place,
    *,
    notes: tuple[str, ...] = (),
    clock: Callable[[], float] = time.time,
) -> Placed:
    """The same for a checkpoint that was chosen, with its manifests in full."""
    began = clock()
    sources = one.listings
    manifests = shards.manifests_of(sources)
    wanted = shards.wanted_files(manifests, sources)
    folder = f"{shards.GATHERED}/{one.unit}"
    texts = dict(text for listing in sources for text in listing.texts)
    inside, beside = _latest(one)
    by_name = {place.name: place for place in at}
    routes = {listing.place: (by_name[listing.place], listing.unit) for listing in sources}
    sent = 0
    if not _is_there(target, folder, wanted):
        sent = deliver(now, routes, (target,), folder, wanted, piece=manifests[0].piece)[target.name]
        carry.show(target, folder, wanted, texts={**texts, **inside}, beside=beside)
    size = sum(file.bytes for file in wanted)
    how = "gathered"
    return _placed(
        now,
        how=how,
        unit=one.unit,
        at=target,
        folder=folder,
        size=size,
        sent=sent,
        began=began,
        notes=notes,
        clock=clock,
    )


def where(place: Place, folder: str) -> str:
    """A folder as its user would name it: absolute here, below the checkpoints folder on a node."""
    return f"{place.folder}/{folder}" if place.folder else folder


def _latest(one: Kept) -> tuple[dict[str, str], dict[str, str]]:
    """The file `latest` as it must be: (in the unit, beside the unit)."""
    if one.style == "accelerate":
        said = next((listing.latest for listing in one.listings if listing.latest), one.tag)
        tag = said if not any(flaw.kind == "latest" for flaw in one.flaws) else one.tag
        return {"latest": tag}, {}
    return {}, {"latest": one.tag} if one.style == "deepspeed" else {}


def _is_there(target: Place, folder: str, wanted: Sequence[Wanted]) -> bool:
    """Whether exactly this is there already, by its bytes."""
    there = carry.hash_units(target, [folder])
    if not there:
        return False
    found = {part.path: part.pieces for part in there[0].parts}
    return found == {one.path: one.pieces for one in wanted} and not there[0].odd and bool(there[0].manifests)


def deliver(
    now: Session,
    routes: Mapping[str, tuple[Place, str]],
    targets: Sequence[Place],
    folder: str,
    wanted: Sequence[Wanted],
    *,
    piece: int,
) -> dict[str, int]:
    """Bring all these files to `folder` at every target, from the places that hold them; the bytes that each took.

    `routes` says for each holder its place and the unit there. All holders send at once. After a line dropped it goes
    on with what is lacking; what has arrived counts, from an earlier command too.
    """
    sent = dict.fromkeys((target.name for target in targets), 0)
    suspects: set[tuple[str, str, int]] = set()
    failed: dict[str, NodeError] = {}
    with showing(now.voice):
        for _ in range(ROUNDS):
            ready = each(targets, lambda place: carry.make_ready(place, folder, wanted)).all_or_raise()
            missing = {target.name: shards.lacking(wanted, ready[target.name].have, piece=piece) for target in targets}
            if not any(missing.values()):
                return sent
            for target in targets:
                _check_room(target, missing[target.name], free=ready[target.name].free)
            meter = _Meter(now, sent, missing)
            bad, failed = _round(routes, targets, folder, missing, meter)
            if again := suspects & bad:
                raise _damaged(again, {name: unit for name, (_, unit) in routes.items()})
            suspects |= bad
    if failed:
        first = next(iter(failed.values()))
        first.next_step = first.next_step or "the same command goes on from where it was"
        raise first
    raise _damaged(suspects, {name: unit for name, (_, unit) in routes.items()})


def _check_room(target: Place, missing: Sequence[tuple[Wanted, tuple[Piece, ...]]], *, free: int) -> None:
    needed = sum(piece.length for _, pieces in missing for piece in pieces)
    if needed > free:
        raise PreconditionError(
            f"there is no room for it: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            where=target.folder or f"node {target.name}",
            next_step="free some space there, or name another place; what was there stays as it is",
        )


def _round(
    routes: Mapping[str, tuple[Place, str]],
    targets: Sequence[Place],
    folder: str,
    missing: Mapping[str, tuple[tuple[Wanted, tuple[Piece, ...]], ...]],
    meter: _Meter,
) -> tuple[set[tuple[str, str, int]], dict[str, NodeError]]:
    """Send everything once; gives back what came damaged (holder, path, offset), and who failed."""
    # Targets that lack the same are fed from one reading.
    groups: dict[tuple[tuple[str, tuple[Piece, ...]], ...], list[Place]] = {}
    for target in targets:
        near = target.name if target.name in routes else None
        shares = tuple(sorted(shards.assign(missing[target.name], near=near).items()))
        groups.setdefault(shares, []).append(target)
    jobs = [
        _Job(name=f"{holder} to {group[0].name}", holder=holder, pieces=pieces, targets=tuple(group))
        for shares, group in groups.items()
        for holder, pieces in shares
    ]
    bad: set[tuple[str, str, int]] = set()
    failed: dict[str, NodeError] = {}

    def act(job: _Job) -> None:
        source, unit = routes[job.holder]
        answers = carry.carry(source, unit, job.pieces, job.targets, folder, progress=meter.add)
        for name, answer in answers.items():
            if name != job.holder:
                meter.note(name, job.pieces)
            if isinstance(answer, NodeError):
                failed[name] = answer
            else:
                bad.update((job.holder, path, offset) for path, offset in answer)

    failed |= each(jobs, act, width=max(1, len(jobs))).bad
    return bad, failed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One holder's part of a round."""

    name: str
    holder: str
    pieces: tuple[Piece, ...]
    targets: tuple[Place, ...]


class _Meter:
    """Counts what arrives, and tells of it with the seconds that are left."""

    def __init__(
        self,
        now: Session,
        sent: dict[str, int],
        missing: Mapping[str, tuple[tuple[Wanted, tuple[Piece, ...]], ...]],
    ) -> None:
        self._voice = now.voice
        self._sent = sent
        self._total = sum(piece.length for files in missing.values() for _, pieces in files for piece in pieces)
        self._taken = 0
        self._began = time.monotonic()
        self._lock = Lock()

    def add(self, count: int) -> None:
        """So many bytes more."""
        with self._lock:
            self._taken += count
            spent = time.monotonic() - self._began
            left = (self._total - self._taken) * spent / self._taken if self._taken and spent > 1 else None
            self._voice.carrying("checkpoint", self._taken, self._total, left)

    def note(self, target: str, pieces: Sequence[Piece]) -> None:
        """These were sent to a target."""
        with self._lock:
            self._sent[target] += sum(piece.length for piece in pieces)


def _damaged(bad: Iterable[tuple[str, str, int]], units: Mapping[str, str]) -> IntegrityError:
    flaws = sorted(
        {
            str(Flaw(kind="changed", place=holder, path=path, what=f"not what it was, at byte {offset:,}"))
            for holder, path, offset in bad
        }
    )
    unit = shards.origin(next(iter(units.values())))
    return IntegrityError(
        f"the checkpoint {unit} is not what its nodes had; nothing of it was shown",
        detail=tuple(flaws[:SHOWN_FLAWS]),
        next_step="launcher checkpoint verify names all of it; --tag takes another one",
    )


def scatter(
    now: Session, source: str, *, to: tuple[str, ...] = (), clock: Callable[[], float] = time.time
) -> tuple[Placed, ...]:
    """Put a whole checkpoint onto all nodes, or these: verified, and under its name in one step on each.

    `source` is a folder here, or NODE:FOLDER below that node's checkpoints folder, as `gather` names them.
    """
    began = clock()
    at = places(now)
    holder, folder = _source(at, source)
    listing = whole_at(holder, folder)
    manifests = listing.manifests
    wanted = shards.wanted_files(manifests, (listing,))
    unit = manifests[0].unit if not shards.is_universal(listing) else shards.origin(folder)
    goal = f"{shards.GATHERED}/{unit}"
    targets = [place for place in at if place.name in (to or [one.name for one in at])]
    choose_machines(now, to)  # refuses a name that is none
    rest = [place for place in targets if not _is_there(place, goal, wanted)]
    sent = dict.fromkeys((place.name for place in targets), 0)
    inside, beside = _latest(Kept(unit=unit, parts=(), copies=(listing,), flaws=()))
    if shards.is_universal(listing):
        inside |= {"latest_universal": listing.tag}
    if rest:
        sent |= deliver(now, {holder.name: (holder, folder)}, rest, goal, wanted, piece=manifests[0].piece)
        texts = {**dict(listing.texts), **inside}
        each(rest, lambda place: carry.show(place, goal, wanted, texts=texts, beside=beside)).all_or_raise()
    size = sum(one.bytes for one in wanted)
    return tuple(
        _placed(
            now,
            how="scattered",
            unit=unit,
            at=one,
            folder=goal,
            size=size,
            sent=sent[one.name],
            began=began,
            clock=clock,
        )
        for one in targets
    )


def _source(at: Sequence[Place], source: str) -> tuple[Place, str]:
    node, colon, folder = source.partition(":")
    if colon and (place := next((one for one in at if one.name == node), None)):
        return place, shards.check_path(folder.strip("/"))
    path = Path(source).expanduser().resolve()
    if not path.is_dir():
        raise InputError(
            "there is no such folder here, nor is it NODE:FOLDER",
            where=source,
            next_step="launcher checkpoint gather tells where it put one",
        )
    return carry.place_here(path.parent), path.name


def whole_at(place: Place, folder: str) -> Listing:
    """A whole checkpoint at one place, read again; IntegrityError when it is not."""
    found = carry.hash_units(place, [folder])
    if not found or not found[0].manifests:
        raise InputError(
            "this is no checkpoint that was gathered",
            where=where(place, folder) if place.folder else f"{place.name}:{folder}",
            next_step="launcher checkpoint gather makes one",
        )
    flaws = [flaw for flaw in _judge_copy(found[0]) if shards.is_fatal(flaw)]
    if flaws:
        raise broken(folder, flaws, next_step="gather it again")
    return found[0]


def _judge_copy(listing: Listing) -> tuple[Flaw, ...]:
    return shards.judge(listing.manifests, (listing,))


# --- made of it ----------------------------------------------------------------------------------------------------


def export(
    now: Session,
    *,
    run: str | None = None,
    tag: str | None = None,
    to: str,
    dtype: str,
    form: str,
    max_shard_size: str,
    clock: Callable[[], float] = time.time,
) -> Placed:
    """Turn a ZeRO checkpoint into plain weights, where its shards are; the result goes to a node or a folder here.

    Where no node has all shards, each makes an extract of its own (a third of their bytes at most, and what does not
    interest is left out), and these are put together on the node that has the most, or on the one that is named.
    The shards are read and verified first.
    """
    began = clock()
    at = places(now)
    one, notes = choose(now, at, run=run, tag=tag, read=True)
    if one.fatal:
        raise broken(one.unit, one.fatal)
    if shards.read_layout(part.path for listing in one.listings for part in listing.parts).stage is None:
        raise InputError(
            f"{one.unit} was written without DeepSpeed: its weights are plain already",
            next_step="launcher checkpoint gather",
        )
    target = destination(at, to)
    goal = f"{EXPORTED}/{one.unit}-{dtype}"
    options = ("--dtype", dtype, "--format", form, "--max-shard-size", max_shard_size)
    alone = _who_has_all_shards(one, prefer=target.name)
    by_name = {place.name: place for place in at}
    extracted = 0
    if alone is not None:
        place = by_name[alone.place]
        said = f"{place.name} has all shards of {one.unit}: converted there"
        carry.make_ready(place, goal, ())
        carry.export(place, shard_folder(alone), carry.partial(goal), "--tag", one.tag, *options)
    else:
        place = target if target.name in by_name else by_name[max(one.parts, key=lambda part: part.bytes).place]
        extracted = _assemble(now, at, one, place, goal, dtype=dtype, options=options)
        said = f"extracted on every node and put together on {place.name}: {extracted:,} bytes travelled for it"
    result = replace(carry.arriving(place, goal), place=place.name)
    sent = extracted
    if place == target:
        carry.show(place, goal, carry.as_wanted(result), texts={}, beside={})
    else:
        sent += _hand_over(now, place, target, goal, result)
    return _placed(
        now,
        how="exported",
        unit=one.unit,
        at=target,
        folder=goal,
        size=result.bytes,
        sent=sent,
        began=began,
        notes=(*notes, said),
        clock=clock,
    )


def shard_folder(listing: Listing) -> str:
    """The folder in which DeepSpeed finds the tag."""
    return listing.unit if listing.style == "accelerate" else posixpath.dirname(listing.unit)


def _who_has_all_shards(one: Kept, *, prefer: str) -> Listing | None:
    """A listing with every file that DeepSpeed needs, of the preferred place if it can be."""
    needed = {(part.path, part.pieces) for part in _all_shards(one)}
    have = [
        listing
        for listing in (*one.parts, *one.copies)
        if needed <= {(part.path, part.pieces) for part in listing.parts}
    ]
    return next((listing for listing in have if listing.place == prefer), have[0] if have else None)


def _all_shards(one: Kept) -> list[shards.Part]:
    return [
        part
        for manifest in shards.manifests_of(one.listings)
        for part in manifest.parts
        if shards.is_shard(part.path) and not posixpath.basename(part.path).startswith("random_states_")
    ]


def _assemble(
    now: Session, at: Sequence[Place], one: Kept, place: Place, goal: str, *, dtype: str, options: tuple[str, ...]
) -> int:
    """Let every node extract what it has, bring that to one, and put it together there; the bytes that travelled."""
    extracts = f"{goal}-extracts"
    listings = {part.place: part for part in one.parts if any(shards.is_shard(file.path) for file in part.parts)}
    makers = [maker for maker in at if maker.name in listings]

    def extract(maker: Place) -> Listing:
        carry.make_ready(maker, extracts, ())
        file = f"{carry.partial(extracts)}/{maker.name}.safetensors"
        folder = shard_folder(listings[maker.name])
        carry.export(maker, "extract", folder, "--out", file, "--tag", one.tag, "--dtype", dtype)
        return replace(carry.arriving(maker, extracts), place=maker.name)

    try:
        made = each(makers, extract).all_or_raise()
        wanted = [file for listing in made.values() for file in carry.as_wanted(listing)]
        routes = {maker.name: (maker, made[maker.name].unit) for maker in makers}
        sent = deliver(now, routes, (place,), extracts, wanted, piece=shards.PIECE)[place.name]
        files = [f"{carry.partial(extracts)}/{file.path}" for file in wanted]
        carry.make_ready(place, goal, ())
        carry.export(place, "assemble", *files, carry.partial(goal), *options)
        return sent
    finally:
        each([*makers, place], lambda one_: carry.drop(one_, extracts))


def _hand_over(now: Session, place: Place, target: Place, goal: str, result: Listing) -> int:
    """Bring what was made at a place, and has no name there, to another one."""
    wanted = carry.as_wanted(result)
    sent = deliver(now, {place.name: (place, result.unit)}, (target,), goal, wanted, piece=shards.PIECE)
    carry.show(target, goal, wanted, texts={}, beside={})
    carry.drop(place, goal)
    return sent[target.name]


def universal(
    now: Session,
    *,
    run: str | None = None,
    tag: str | None = None,
    to: str | None = None,
    clock: Callable[[], float] = time.time,
) -> Placed:
    """Turn a checkpoint into DeepSpeed's universal form, for any number of processes, by its own tool on a node.

    It lies beside the gathered one, with `-universal` at the end of its name; `scatter` puts it onto all nodes.
    """
    began = clock()
    at = places(now)
    one, notes = choose(now, at, run=run, tag=tag)
    if one.fatal:
        raise broken(one.unit, one.fatal)
    if shards.read_layout(part.path for listing in one.listings for part in listing.parts).stage in (None, 0):
        raise InputError(
            f"{one.unit} was written without ZeRO; it needs no other form for another number of processes",
            next_step="launcher checkpoint gather, then scatter",
        )
    prefer = destination(at, to) if to else None
    if prefer is not None and prefer.name == HERE:
        raise InputError(
            "DeepSpeed is needed where this is done, and only nodes have it",
            where=to,
            next_step=f"the nodes are: {', '.join(place.name for place in at)}",
        )
    place, unit, said = _whole_somewhere(now, at, one, prefer=prefer, clock=clock)
    name = f"{one.unit}-universal"
    goal = f"{shards.GATHERED}/{name}"
    carry.make_ready(place, goal, ())
    carry.make_universal(place, unit, carry.partial(goal), shards=one.tag if one.style == "accelerate" else "")
    result = replace(carry.arriving(place, goal, whole=True), place=place.name, unit=goal, style=one.style)
    new_tag = one.tag if one.style == "accelerate" else posixpath.basename(name)
    manifest = replace(
        shards.late_manifest(
            result, world_size=one.world_size, made=clock(), run=_run_id(one), ranks=range(one.world_size)
        ),
        tag=new_tag,
        latest=None,
    )
    texts = {shards.manifest_name(place.name): shards.write_manifest(manifest)}
    pointers = {"latest": new_tag, "latest_universal": new_tag}
    inside, beside = (pointers, {}) if one.style == "accelerate" else ({}, {"latest_universal": new_tag})
    carry.show(place, goal, carry.as_wanted(result), texts={**texts, **inside}, beside=beside)
    return _placed(
        now,
        how="universal",
        unit=one.unit,
        at=place,
        folder=goal,
        size=result.bytes,
        sent=0,
        began=began,
        notes=(*notes, *said),
        clock=clock,
    )


def _run_id(one: Kept) -> str:
    manifests = shards.manifests_of(one.listings)
    return manifests[0].run if manifests else shards.run_of(one.unit)


def _placed(
    now: Session,
    *,
    how: str,
    unit: str,
    at: Place,
    folder: str,
    size: int,
    sent: int,
    began: float,
    clock: Callable[[], float],
    notes: tuple[str, ...] = (),
) -> Placed:
    """Write down that it lies there."""
    ended = clock()
    there = where(at, folder)
    _remember(now, CheckpointPlaced(time=ended, how=how, unit=unit, place=at.name, folder=there, bytes=sent))
    return Placed(unit=unit, place=at.name, folder=there, bytes=size, sent=sent, seconds=ended - began, notes=notes)


def _whole_somewhere(
    now: Session, at: Sequence[Place], one: Kept, *, prefer: Place | None, clock: Callable[[], float]
) -> tuple[Place, str, tuple[str, ...]]:
    """A node that has all of a checkpoint, and where, and what was done for it; gathers where there is none."""
    wanted = shards.wanted_files(shards.manifests_of(one.listings), one.listings)
    holders = {listing.place: listing for listing in (*one.parts, *one.copies) if _has_all(listing, wanted)}
    by_name = {place.name: place for place in at}
    first = [prefer.name] if prefer is not None and prefer.name in holders else []
    for name in (*first, *holders):
        listing = holders[name]
        if listing in one.copies and not _is_there(by_name[name], listing.unit, wanted):
            continue
        return by_name[name], listing.unit, (f"{name} has all of {one.unit}: it is done there",)
    sizes = {place.name: sum(part.bytes for part in one.parts if part.place == place.name) for place in at}
    place = prefer if prefer is not None and prefer.name in by_name else by_name[max(sizes, key=lambda n: sizes[n])]
    gathered = gather_to(now, at, one, place, clock=clock)
    note = f"gathered {one.unit} on {place.name} first: {gathered.sent:,} bytes travelled"
    return place, f"{shards.GATHERED}/{one.unit}", (note,)


def _has_all(listing: Listing, wanted: Sequence[Wanted]) -> bool:
    there = {part.path: part.bytes for part in listing.parts}
    return all(there.get(one.path) == one.bytes for one in wanted)

"""Gathering: checkpoints to one place, and from one place onto all nodes: verified, resumable, whole or not at all.

What is brought grows beside its name (`inside/carry.py`), and every piece of it is hashed where it arrives. A command
that was interrupted is simply given again.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from cluster.errors import InputError, IntegrityError, NodeError, PreconditionError
from cluster.fleet import each
from launcher import shards
from launcher.checkpoints import SHOWN_FLAWS, Kept, broken, choose, places, remember
from launcher.events import CheckpointPlaced
from launcher.session import Session, choose_machines, showing
from launcher.shards import Flaw, Listing, Piece, Wanted
from launcher.stages import carry
from launcher.stages.carry import Place

ROUNDS = 4  # looks at what has arrived: lines drop


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
    inside, beside = pointers(one.style, tag_of(one), universal=one.is_universal)
    by_name = {place.name: place for place in at}
    routes = {listing.place: (by_name[listing.place], listing.unit) for listing in sources}
    sent = 0
    if not is_there(target, folder, wanted):
        sent = deliver(now, routes, (target,), folder, wanted, piece=manifests[0].piece)[target.name]
        carry.show(target, folder, wanted, texts={**texts, **inside}, beside=beside)
    size = sum(file.bytes for file in wanted)
    return placed(
        now,
        how="gathered",
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


def pointers(style: str, tag: str, *, universal: bool) -> tuple[dict[str, str], dict[str, str]]:
    """The files that name the tag: (in the unit, beside the unit)."""
    names = ("latest_universal",) if universal else ("latest",)
    if style == "accelerate":
        return dict.fromkeys((*names, "latest"), tag), {}
    return {}, dict.fromkeys(names, tag) if style == "deepspeed" else {}


def tag_of(one: Kept) -> str:
    """What `latest` says, or where that is wrong what it should."""
    said = next((listing.latest for listing in one.listings if listing.latest), None)
    wrong = said is None or any(flaw.kind == "latest" for flaw in one.flaws) or one.style != "accelerate"
    return one.tag if wrong or said is None else said.strip()


def is_there(target: Place, folder: str, wanted: Sequence[Wanted]) -> bool:
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
            try:
                for target in targets:
                    _check_room(target, missing[target.name], free=ready[target.name].free)
            except PreconditionError:
                for target in targets:
                    if not any(ready[target.name].have.values()):  # else the same command goes on from there
                        carry.drop(target, folder)
                raise
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
    choose_machines(now, to)  # refuses a name that is none
    at = places(now)
    holder, folder = _source(at, source)
    listing = whole_at(holder, folder)
    manifests = listing.manifests
    wanted = shards.wanted_files(manifests, (listing,))
    unit = manifests[0].unit
    goal = f"{shards.GATHERED}/{unit}"
    targets = [place for place in at if place.name in (to or [one.name for one in at])]
    rest = [place for place in targets if not is_there(place, goal, wanted)]
    sent = dict.fromkeys((place.name for place in targets), 0)
    universal_ = shards.is_universal(listing)
    tag = posixpath.basename(unit) if listing.style == "deepspeed" else listing.tag
    inside, beside = pointers(listing.style, tag, universal=universal_)
    if rest:
        sent |= deliver(now, {holder.name: (holder, folder)}, rest, goal, wanted, piece=manifests[0].piece)
        texts = {**dict(listing.texts), **inside}
        each(rest, lambda place: carry.show(place, goal, wanted, texts=texts, beside=beside)).all_or_raise()
    size = sum(one.bytes for one in wanted)
    return tuple(
        placed(
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
    flaws = [flaw for flaw in shards.judge_copy(found[0]) if shards.is_fatal(flaw)]
    if flaws:
        raise broken(folder, flaws, next_step="gather it again")
    return found[0]


def placed(
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
    remember(now, CheckpointPlaced(time=ended, how=how, unit=unit, place=at.name, folder=there, bytes=sent))
    return Placed(unit=unit, place=at.name, folder=there, bytes=size, sent=sent, seconds=ended - began, notes=notes)

"""Conversion: what is made of a checkpoint, on the node where its shards are: plain weights, or the universal form."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cluster.errors import InputError
from cluster.fleet import each
from launcher import shards
from launcher.checkpoints import EXPORTED, Kept, broken, choose, places
from launcher.gathering import Placed, deliver, destination, gather_to, is_there, placed, pointers
from launcher.session import Session
from launcher.shards import Listing, Wanted
from launcher.stages import carry
from launcher.stages.carry import HERE, Place


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
        with _dropping(place, goal):
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
    return placed(
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


@contextmanager
def _dropping(place: Place, unit: str) -> Iterator[None]:
    """A place where something is made; it leaves nothing when that fails."""
    carry.make_ready(place, unit, ())
    try:
        yield
    except BaseException:
        carry.drop(place, unit)
        raise


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
        with _dropping(place, goal):
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
    with _dropping(place, goal):
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
    inside, beside = pointers(one.style, new_tag, universal=True)
    carry.show(place, goal, carry.as_wanted(result), texts={**texts, **inside}, beside=beside)
    return placed(
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
        if listing in one.copies and not is_there(by_name[name], listing.unit, wanted):
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

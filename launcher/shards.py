"""Shards: what a checkpoint must contain, what it does contain, and how the two differ. Values only, no disk.

A *unit* is one checkpoint, as a path below a checkpoints folder. How its files are named, with Accelerate 1.15 and
DeepSpeed 0.19 (their `save_state` and `save_checkpoint`):

    <run>/step-00000100/                    Accelerate: one unit, the tag below it is always the same
        latest                              the tag; only the first node writes it, and not atomically
        pytorch_model/<shards>
        random_states_<rank>.pkl            of every process, written when all shards of all processes are there
    <run>/<tag>/<shards>                    DeepSpeed alone: every tag is a unit; `latest` lies above it

    mp_rank_MM_model_states.pt                                     stages 0 to 2, by the first process
    zero_pp_rank_R_mp_rank_MM_model_states.pt                      stage 3, by every process
    [bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt               stages 1 to 3, by every process
    offloaded_tensors/rankRR/…                                     what was offloaded to NVMe

Without a shared file system every node holds only what its own processes wrote. While it trains, each node writes down
what it holds (`inside/manifest.py`); that statement, a manifest, is what everything here is judged by. Steps and world
sizes are those that the files themselves tell; no pickle is ever loaded for it.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import IntegrityError

GATHERED = "gathered"  # below a checkpoints folder: units that are whole in one place
LONGEST_PATH, LONGEST_NAME = 1024, 255
PIECE = 8 * 1024 * 1024  # bytes that are hashed together, as in inside/manifest.py and inside/carry.py

_OPTIM = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d\d)_?optim_states\.pt")
_MODEL_3 = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d\d)_model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d\d)_model_states\.pt")
_RANDOM = re.compile(r"random_states_(\d+)\.pkl")
_OFFLOADED = re.compile(r"(?:^|/)offloaded_tensors/rank(\d+)/")
_TAG = re.compile(r"[^/\x00-\x1f\x7f]{1,200}")

# Of which unit, and of which file of it, a content is; by the hashes of its pieces.
Contents = Mapping[tuple[str, ...], tuple[str, str]]
Kind = Literal["missing", "torn", "changed", "foreign", "mixed", "refused", "unsealed", "latest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a unit. `pieces` are the SHA-256 of its pieces, None where nobody has read it.

    `step` and `world` are what the file itself tells of the optimizer's step and the number of processes; `sound`
    whether its outer form is whole (a torch file is a zip archive with its table at the end); `zeros` whether it is
    nothing but zero bytes.
    """

    path: str
    bytes: int
    pieces: tuple[str, ...] | None = None
    sha256: str = ""
    modified: float = 0.0
    step: int | None = None
    world: int | None = None
    sound: bool = True
    zeros: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one node had of one unit when it was quiet: stated once, and sealed by its own hash.

    `ranks` are the processes of that node, `piece` the bytes of one piece, `latest` what that file said there, `made`
    the time by the node's clock in seconds since 1970.
    """

    node: str
    run: str
    unit: str
    tag: str
    ranks: tuple[int, ...]
    world_size: int
    piece: int
    made: float
    latest: str | None
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What one place holds of one unit now.

    `odd` are entries that are no plain files, with what they are; `spoilt` the manifests that cannot be read; `texts`
    those that can, by their files' names, byte for byte.
    """

    place: str
    unit: str
    style: str
    tag: str
    latest: str | None
    parts: tuple[Part, ...]
    manifests: tuple[Manifest, ...] = ()
    odd: tuple[tuple[str, str], ...] = ()
    spoilt: tuple[str, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(part.bytes for part in self.parts)

    @property
    def modified(self) -> float:
        """When it was last written, by that node's clock."""
        return max((part.modified for part in self.parts), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flaw:
    """One thing that is not as it must be: of which kind, where, which file, and in words."""

    kind: Kind
    place: str
    path: str
    what: str

    def __str__(self) -> str:
        where = f"node {self.place}: " if self.place else ""
        return f"{self.kind}: {where}{self.path}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a unit is made, read from the names of its files: the ZeRO stage (None: no DeepSpeed), the degrees.

    Stages of a pipeline leave no trace in names, so the data-parallel degree is not always all by the other one.
    """

    stage: int | None
    world_size: int
    data_parallel: int
    model_parallel: int
    prefix: str  # of the optimizer's files: "" or "bf16_"
    folder: str  # in which the shards lie, "" or "pytorch_model/"
    universal: bool = False


# --- what it must contain ------------------------------------------------------------------------------------------


def rank_of(path: str) -> int | None:
    """The data-parallel rank (with one model-parallel rank: the process) whose file this is; None: nobody's own."""
    name = posixpath.basename(path)
    for pattern, group in ((_OPTIM, 2), (_MODEL_3, 1), (_RANDOM, 1)):
        if match := pattern.fullmatch(name):
            return int(match[group])
    match = _OFFLOADED.search(path)
    return int(match[1]) if match else None


def is_shard(path: str) -> bool:
    """Whether this is a file that DeepSpeed or Accelerate makes for one process."""
    return rank_of(path) is not None or bool(_MODEL.fullmatch(posixpath.basename(path)))


def read_layout(paths: Iterable[str], *, world_size: int | None = None, data_parallel: int | None = None) -> Layout:
    """How a unit with these files is made; what is not known of it the highest rank that is there tells."""
    names = sorted(paths)
    optim = [match for path in names if (match := _OPTIM.fullmatch(posixpath.basename(path)))]
    third = [match for path in names if (match := _MODEL_3.fullmatch(posixpath.basename(path)))]
    model = [match for path in names if (match := _MODEL.fullmatch(posixpath.basename(path)))]
    shards = [path for path in names if is_shard(path) and not _RANDOM.fullmatch(posixpath.basename(path))]
    folders = Counter(posixpath.dirname(path.partition("offloaded_tensors/")[0]) for path in shards)
    folder = folders.most_common(1)[0][0] if folders else ""
    degrees = (
        [int(match[3]) for match in optim] + [int(match[2]) for match in third] + [int(match[1]) for match in model]
    )
    parallel = max(degrees, default=0) + 1
    ranks = [rank for path in names if (rank := rank_of(path)) is not None]
    stage = 3 if third else 1 if optim else 0 if model else None
    world = world_size or (data_parallel * parallel if data_parallel else max(ranks, default=0) + 1)
    return Layout(
        stage=stage,
        world_size=world,
        data_parallel=data_parallel or world // parallel,
        model_parallel=parallel,
        prefix="bf16_" if sum(bool(match[1]) for match in optim) * 2 > len(optim) else "",
        folder=f"{folder}/" if folder else "",
        universal=any(path.startswith(f"{folder}/zero/" if folder else "zero/") for path in names),
    )


def required(layout: Layout, paths: Iterable[str]) -> tuple[str, ...]:
    """The files without which such a unit cannot be loaded, sorted; `paths` say whether it is Accelerate's."""
    if layout.universal:
        return ()
    needed = set(_needed_shards(layout))
    if any(_RANDOM.fullmatch(posixpath.basename(path)) for path in paths):
        needed |= {f"random_states_{rank}.pkl" for rank in range(layout.world_size)}
    return tuple(sorted(needed, key=_natural))


def _needed_shards(layout: Layout) -> Iterator[str]:
    if layout.stage is None:
        return
    for model in range(layout.model_parallel):
        if layout.stage != 3:  # noqa: PLR2004 - ZeRO-3
            yield f"{layout.folder}mp_rank_{model:02d}_model_states.pt"
        for rank in range(layout.data_parallel):
            which = f"zero_pp_rank_{rank}_mp_rank_{model:02d}"
            if layout.stage == 3:  # noqa: PLR2004
                yield f"{layout.folder}{which}_model_states.pt"
            if layout.stage:
                yield f"{layout.folder}{layout.prefix}{which}_optim_states.pt"


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path)]


# --- what a node says ----------------------------------------------------------------------------------------------


def check_path(path: object) -> str:
    """A path that may be created below a folder; IntegrityError for one that leads out of it or hides something."""
    if not isinstance(path, str) or not path or len(path) > LONGEST_PATH:
        raise IntegrityError("a file without a usable name")
    names = path.split("/")
    if any(name in ("", ".", "..") or len(name.encode(errors="replace")) > LONGEST_NAME for name in names):
        raise IntegrityError(f"the path {path[:200]!r} leads out of its folder")
    if not path.isprintable() or "\\" in path:
        raise IntegrityError(f"the path {path[:200]!r} holds control characters")
    return path


def read_listings(place: str, text: str) -> tuple[Listing, ...]:
    """What `inside/manifest.py list` or `hash` printed; IntegrityError for what no node of ours would say."""
    try:
        said = json.loads(text)
        return tuple(_listing(place, one) for one in said["units"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            "the node's list of its checkpoints cannot be read",
            where=f"node {place}",
            detail=(f"{type(error).__name__}: {str(error)[:200]}",),
        ) from None


def _listing(place: str, said: Mapping[str, Any]) -> Listing:
    manifests, spoilt, texts = [], [], []
    for name, text in said["manifests"].items():
        manifest = read_manifest(text)
        if manifest is None or manifest_name(manifest.node) != name:
            spoilt.append(check_path(name))
        else:
            manifests.append(manifest)
            texts.append((name, text))
    odd = [(str(path)[:LONGEST_PATH], str(what)) for path, what in said["odd"]]
    parts = []
    for one in said["parts"]:
        try:
            parts.append(_part(one))
        except IntegrityError as error:
            odd.append((str(one.get("path"))[:LONGEST_PATH], error.what))
    return Listing(
        place=place,
        unit=said["unit"] if said["unit"] == "." else check_path(said["unit"]),
        style=str(said["style"]),
        tag=str(said["tag"]),
        latest=said["latest"] if said["latest"] is None else str(said["latest"]),
        parts=tuple(parts),
        manifests=tuple(manifests),
        odd=tuple(odd),
        spoilt=tuple(spoilt),
        texts=tuple(texts),
    )


def _part(said: Mapping[str, Any]) -> Part:
    pieces = said.get("pieces")
    return Part(
        path=check_path(said["path"]),
        bytes=_count(said["bytes"]),
        pieces=None if pieces is None else tuple(_digest(one) for one in pieces),
        sha256=_digest(said["sha256"]) if said.get("sha256") else "",
        modified=float(said.get("modified") or 0.0),
        step=None if said.get("step") is None else int(said["step"]),
        world=None if said.get("world") is None else int(said["world"]),
        sound=bool(said.get("sound", True)),
        zeros=bool(said.get("zeros", False)),
    )


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value


def _digest(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is no SHA-256")
    return value


def manifest_name(node: str) -> str:
    """The file of a node's manifest, in the unit."""
    return f".launcher-manifest.{node}.json"


def read_manifest(text: str) -> Manifest | None:
    """A manifest; None for one that is torn, changed, or no manifest at all."""
    try:
        said = json.loads(text)
        if said.pop("seal") != seal_of(said):
            return None
        parts = tuple(_part(one) for one in said["parts"])
        piece, world = _count(said["piece"]), _count(said["world_size"])
        if any(len(part.pieces or ()) != pieces_in(part.bytes, piece) for part in parts):
            return None
        return Manifest(
            node=str(said["node"]),
            run=str(said["run"]),
            unit=str(said["unit"]),
            tag=str(said["tag"]),
            ranks=tuple(sorted(_count(rank) for rank in said["ranks"])),
            world_size=world,
            piece=piece,
            made=float(said["made"]),
            latest=None if said["latest"] is None else str(said["latest"]),
            parts=parts,
        )
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError, IntegrityError):
        return None


def write_manifest(manifest: Manifest) -> str:
    """The text of a manifest's file, the same as `inside/manifest.py` writes."""
    parts = [
        {
            "path": part.path,
            "bytes": part.bytes,
            "pieces": list(part.pieces or ()),
            "sha256": part.sha256,
            "modified": part.modified,
            "step": part.step,
            "world": part.world,
        }
        for part in manifest.parts
    ]
    said: dict[str, Any] = {
        "version": 1,
        "node": manifest.node,
        "run": manifest.run,
        "unit": manifest.unit,
        "tag": manifest.tag,
        "ranks": list(manifest.ranks),
        "world_size": manifest.world_size,
        "piece": manifest.piece,
        "made": manifest.made,
        "latest": manifest.latest,
        "parts": parts,
    }
    return json.dumps({**said, "seal": seal_of(said)}) + "\n"


def seal_of(said: Mapping[str, Any]) -> str:
    """The hash of all that a manifest says."""
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def pieces_in(length: int, piece: int) -> int:
    """How many pieces a file of this length has; an empty one has none."""
    return -(-length // piece)


# --- judgment ------------------------------------------------------------------------------------------------------


def judge(
    manifests: Sequence[Manifest],
    listings: Sequence[Listing],
    *,
    elsewhere: Contents | None = None,
) -> tuple[Flaw, ...]:
    """What is wrong with one unit that is meant to be whole, all places together; empty when nothing is.

    `manifests` are what the nodes said they had, `listings` what there is now: with hashes where it was read again,
    without them as far as names, sizes and steps tell. `elsewhere` names what a content is, where it is
    known: then a file that changed is seen to be another step's, or another run's.
    """
    known = elsewhere or {}
    good, flaws = _agreeing(manifests, listings)
    flaws += [
        Flaw(kind="torn", place=one.place, path=name, what="this manifest is torn or was changed")
        for one in listings
        for name in one.spoilt
    ]
    flaws += [
        Flaw(kind="refused", place=one.place, path=path, what=f"{what}; only plain files are taken")
        for one in listings
        for path, what in one.odd
    ]
    flaws += _unsealed(good, listings)
    flaws += _compare(good, listings, known)
    flaws += _surplus(good, listings, known)
    flaws += _absent(good, listings)
    flaws += _other_steps(good, listings)
    flaws += [Flaw(kind="latest", place="", path="latest", what=what) for what in _latest_flaws(good, listings)]
    return tuple(dict.fromkeys(flaws))


def judge_copy(listing: Listing, *, elsewhere: Contents | None = None) -> tuple[Flaw, ...]:
    """What is wrong with a unit that is meant to be whole in one place."""
    return judge(listing.manifests, (listing,), elsewhere=elsewhere)


def is_fatal(flaw: Flaw) -> bool:
    """Whether a unit with this flaw is not to be used; what `latest` says can be mended."""
    return flaw.kind != "latest"


def _agreeing(manifests: Sequence[Manifest], listings: Sequence[Listing]) -> tuple[list[Manifest], list[Flaw]]:
    """The manifests that speak of one and the same unit; those that do not are somebody else's."""
    if not manifests:
        return [], []
    units = {origin(one.unit) for one in listings}
    votes = Counter((one.run, one.unit, one.world_size) for one in manifests)
    run, unit, world = max(votes, key=lambda vote: (vote[1] in units, votes[vote], vote))
    good, flaws = [], []
    for one in manifests:
        if (one.run, one.unit, one.world_size) == (run, unit, world):
            good.append(one)
            continue
        kind: Kind = "mixed" if one.run == run and one.world_size == world else "foreign"
        others = f"the others are of {unit}, {world} processes"
        flaws.append(
            Flaw(
                kind=kind,
                place=_where(one, listings),
                path=manifest_name(one.node),
                what=f"it is of {one.unit} with {one.world_size} processes; {others}",
            )
        )
    return good, flaws


def _where(manifest: Manifest, listings: Sequence[Listing]) -> str:
    """Where a manifest was found: on its node, or where everything was gathered."""
    return next((one.place for one in listings if manifest in one.manifests), manifest.node)


def _unsealed(manifests: Sequence[Manifest], listings: Sequence[Listing]) -> list[Flaw]:
    """Places that hold something and have said nothing of it."""
    flaws = [
        Flaw(
            kind="unsealed",
            place=one.place,
            path=one.unit,
            what="this node never wrote down what it holds, so there is nothing to compare with",
        )
        for one in listings
        if one.parts and not one.manifests and not one.spoilt
    ]
    flaws += [
        Flaw(kind="torn", place=one.place, path=part.path, what="it ends before its end, or is empty")
        for one in listings
        if not one.manifests
        for part in one.parts
        if not part.sound
    ]
    if manifests:
        left = set(range(manifests[0].world_size)).difference(*(one.ranks for one in manifests))
        quiet = {one.place for one in listings if one.parts and not one.manifests}
        if left and not quiet:
            said = ", ".join(map(str, sorted(left)))
            path = manifest_name("*")
            flaws.append(Flaw(kind="missing", place="", path=path, what=f"nobody speaks for the ranks {said}"))
    return flaws


def _compare(manifests: Sequence[Manifest], listings: Sequence[Listing], known: Contents) -> Iterator[Flaw]:
    """Every file that a manifest names against what there is."""
    for manifest in manifests:
        place = _where(manifest, listings)
        there = {part.path: part for one in listings if one.place == place for part in one.parts}
        for part in manifest.parts:
            yield from _difference(part, there.get(part.path), place, known, manifest)


def _difference(said: Part, found: Part | None, place: str, known: Contents, manifest: Manifest) -> Iterator[Flaw]:
    if found is None:
        yield Flaw(kind="missing", place=place, path=said.path, what=f"it had {said.bytes:,} bytes")
    elif said.bytes and (found.bytes == 0 or found.zeros):
        what = "it is empty" if found.bytes == 0 else "it holds nothing but zeros"
        yield Flaw(kind="torn", place=place, path=said.path, what=f"{what}; it had {said.bytes:,} bytes")
    elif found.pieces and found.pieces != said.pieces and found.pieces in known:
        yield _strayed(known[found.pieces], place, said.path, manifest)
    elif found.bytes != said.bytes:
        kind: Kind = "torn" if found.bytes < said.bytes else "changed"
        what = f"it has {found.bytes:,} bytes; it had {said.bytes:,}"
        yield Flaw(kind=kind, place=place, path=said.path, what=what)
    elif found.pieces is not None and found.pieces != said.pieces:
        first = next(index for index, (a, b) in enumerate(zip(said.pieces or (), found.pieces, strict=True)) if a != b)
        end = min(said.bytes, (first + 1) * manifest.piece)
        what = f"its content changed, first in the bytes {first * manifest.piece:,} to {end:,}"
        yield Flaw(kind="changed", place=place, path=said.path, what=what)


def _strayed(true: tuple[str, str], place: str, path: str, manifest: Manifest) -> Flaw:
    """A file whose content is known to be another one's."""
    unit, name = true
    kind: Kind = "mixed" if unit != manifest.unit and run_of(unit) == run_of(manifest.unit) else "foreign"
    return Flaw(kind=kind, place=place, path=path, what=f"it is {name} of {unit}")


def _surplus(manifests: Sequence[Manifest], listings: Sequence[Listing], known: Contents) -> Iterator[Flaw]:
    """What is there and was never said to be."""
    said = {(_where(one, listings), part.path) for one in manifests for part in one.parts}
    # A copy of what another node holds does no harm: nodes may share a file system.
    contents = {(part.path, part.bytes, part.pieces) for one in manifests for part in one.parts}
    lengths = {(part.path, part.bytes) for one in manifests for part in one.parts}
    for one in listings:
        if not any(_where(manifest, listings) == one.place for manifest in manifests):
            continue
        for part in one.parts:
            same = (
                (part.path, part.bytes) in lengths
                if part.pieces is None
                else (part.path, part.bytes, part.pieces) in contents
            )
            if (one.place, part.path) in said or same:
                continue
            yield _foreign(part, one.place, manifests[0], known)


def _foreign(part: Part, place: str, manifest: Manifest, known: Contents) -> Flaw:
    if part.pieces and part.pieces in known:
        return _strayed(known[part.pieces], place, part.path, manifest)
    rank = rank_of(part.path)
    if rank is not None and rank >= manifest.world_size:
        what = f"it is of rank {rank}, and there are {manifest.world_size} processes"
    else:
        what = "it was not there when this node wrote down what it holds"
    return Flaw(kind="foreign", place=place, path=part.path, what=what)


def _absent(manifests: Sequence[Manifest], listings: Sequence[Listing]) -> Iterator[Flaw]:
    """What such a unit needs and nobody has, or has ever said to have had."""
    if any(is_universal(one) for one in listings):
        return
    paths = {part.path for one in listings for part in one.parts}
    said = {part.path for one in manifests for part in one.parts}
    layout = read_layout(
        paths | said,
        world_size=manifests[0].world_size if manifests else None,
        data_parallel=_told_world(manifests, listings),
    )
    nodes = {rank: one.node for one in manifests for rank in one.ranks}
    for path in required(layout, paths | said):
        if path in paths or path in said:
            continue  # `_compare` has told of it
        rank = rank_of(path)
        place = nodes.get(rank, "") if rank is not None and layout.model_parallel == 1 else ""
        yield Flaw(kind="missing", place=place, path=path, what=_needed_by(layout))


def _needed_by(layout: Layout) -> str:
    how = "without DeepSpeed" if layout.stage is None else f"of ZeRO stage {_stage_name(layout.stage)}"
    return f"a checkpoint {how} with {layout.world_size} processes has it"


def _stage_name(stage: int) -> str:
    return "1 or 2" if stage == 1 else str(stage)


def _other_steps(manifests: Sequence[Manifest], listings: Sequence[Listing]) -> Iterator[Flaw]:
    """Files that tell of another step, or of another number of processes, than the rest does.

    Like is compared with like: what `random_states` count are micro batches.
    """
    if any(is_universal(one) for one in listings):
        return
    for random in (False, True):
        told = [
            (one.place, part)
            for one in listings
            for part in one.parts
            if part.step is not None and bool(_RANDOM.fullmatch(posixpath.basename(part.path))) == random
        ]
        usual = _most(part.step for _, part in told)
        for place, part in told:
            if part.step != usual:
                what = f"it is of step {part.step}; the others are of step {usual}"
                yield Flaw(kind="mixed", place=place, path=part.path, what=what)
    usual = _told_world(manifests, listings)
    for one in listings:
        for part in one.parts:
            if part.world not in (None, usual):
                what = f"it is of a run with {part.world} data-parallel processes; this one had {usual}"
                yield Flaw(kind="foreign", place=one.place, path=part.path, what=what)


def _told_world(manifests: Sequence[Manifest], listings: Sequence[Listing]) -> int | None:
    """The number of data-parallel processes, as most files tell it, or told it once."""
    said = [part.world for manifest in manifests for part in manifest.parts]
    return _most([*said, *(part.world for listing in listings for part in listing.parts)])


def _most(values: Iterable[int | None]) -> int | None:
    """The most frequent; of several the largest, since what was left behind is older."""
    count = Counter(value for value in values if value is not None)
    return max(count, key=lambda value: (count[value], value), default=None)


def is_universal(listing: Listing) -> bool:
    """Whether this is what DeepSpeed's `ds_to_universal` makes: for any number of processes."""
    return read_layout(part.path for part in listing.parts).universal


# --- `latest`, and which unit is the newest ------------------------------------------------------------------------


def _latest_flaws(manifests: Sequence[Manifest], listings: Sequence[Listing]) -> Iterator[str]:
    """What is wrong with the file `latest` of a unit that Accelerate wrote."""
    if not any(one.style == "accelerate" for one in listings):
        return
    tags = {posixpath.dirname(part.path) for one in listings for part in one.parts if is_shard(part.path)} - {""}
    found = [one.latest for one in listings if one.latest is not None]
    if any(one.latest is not None for one in manifests) and not found:
        yield "it is missing"
    for text in found:
        if why := latest_fault(text, tags):
            yield why


def latest_fault(latest: str | None, tags: Iterable[str]) -> str:
    """What is wrong with what `latest` says, when these tags are there; empty when nothing is."""
    there = set(tags)
    if latest is None:
        return "it is missing"
    said = latest.strip()
    if not said:
        return "it is empty"
    if said in there:
        return ""
    if not _TAG.fullmatch(said) or any(tag.startswith(said) for tag in there):
        return f"it is torn: {said[:40]!r}"
    return f"it points to {said[:80]!r}, which is not there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The unit to take, and why it is not the one that was expected."""

    unit: str
    why: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A unit among others: `step` for its age, `flaws` that forbid its use."""

    unit: str
    tag: str
    style: str
    step: int
    modified: float
    flaws: tuple[Flaw, ...]


def choose_unit(candidates: Sequence[Candidate], *, latest: Mapping[str, str | None]) -> Choice | None:
    """The newest unit that verifies; None when none does.

    `latest` holds what that file says in every folder with units of DeepSpeed's own style. Where it says the tag of
    one that verifies, that is the one meant; where it does not, the newest is, and the choice says why.
    """
    newest = sorted(candidates, key=lambda one: (one.modified, one.step, one.unit), reverse=True)
    sound = [one for one in newest if not one.flaws]
    if not sound:
        return None
    folder = posixpath.dirname(newest[0].unit)
    if newest[0].style == "deepspeed":
        beside = [one for one in newest if one.style == "deepspeed" and posixpath.dirname(one.unit) == folder]
        said = latest.get(folder)
        why = latest_fault(said, [one.tag for one in beside])
        if not why:
            meant = next(one for one in beside if one.tag == (said or "").strip())
            if not meant.flaws:
                return Choice(unit=meant.unit)
            return Choice(unit=sound[0].unit, why=(f"{folder}/latest: {meant.tag} does not verify", *_words(meant)))
        return Choice(unit=sound[0].unit, why=(f"{folder}/latest: {why}",))
    passed = newest[: newest.index(sound[0])]
    return Choice(unit=sound[0].unit, why=tuple(word for one in passed for word in _words(one)))


def _words(one: Candidate) -> tuple[str, ...]:
    more = f" (and {len(one.flaws) - 1} more)" if len(one.flaws) > 1 else ""
    return (f"{one.unit} does not verify: {one.flaws[0]}{more}",) if one.flaws else ()


def origin(unit: str) -> str:
    """The unit that this one is, or is a whole copy of."""
    return unit.removeprefix(f"{GATHERED}/")


def run_of(unit: str) -> str:
    """The folder that all checkpoints of one run lie in; with Accelerate's and the example's habits the run's id."""
    return origin(unit).partition("/")[0]


def step_of(listing: Listing) -> int:
    """The step that the files tell, else the number at the end of the name; -1 for none."""
    told = _most(part.step for part in listing.parts if not _RANDOM.fullmatch(posixpath.basename(part.path)))
    if told is not None:
        return told
    match = re.search(r"(\d+)\D*$", posixpath.basename(listing.unit))
    return int(match[1]) if match else -1


def is_meant(unit: str, tag: str, asked: str) -> bool:
    """Whether the user means this unit: by its name, its whole path, its tag, or the number of its step."""
    name = posixpath.basename(unit)
    number = re.search(r"(\d+)$", name)
    return asked in (unit, origin(unit), name, tag) or bool(
        asked.isdecimal() and number and int(number[1]) == int(asked)
    )


# --- what has to travel --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A file that the whole unit has, with its hashes and the places from which it can be had."""

    path: str
    bytes: int
    pieces: tuple[str, ...]
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some bytes of a file, and their hash."""

    path: str
    offset: int
    length: int
    sha256: str


def wanted_files(manifests: Sequence[Manifest], listings: Sequence[Listing]) -> tuple[Wanted, ...]:
    """Every file of the unit once, by path. Of two nodes' different files of one name (not shards, whose names
    differ) the one of the lowest rank is taken."""
    chosen: dict[str, Wanted] = {}
    for manifest in sorted(manifests, key=lambda one: min(one.ranks, default=0)):
        place = _where(manifest, listings)
        for part in manifest.parts:
            before = chosen.get(part.path)
            if before is None:
                chosen[part.path] = Wanted(path=part.path, bytes=part.bytes, pieces=part.pieces or (), holders=(place,))
            elif before.pieces == part.pieces and place not in before.holders:
                chosen[part.path] = Wanted(
                    path=part.path, bytes=part.bytes, pieces=before.pieces, holders=(*before.holders, place)
                )
    return tuple(chosen[path] for path in sorted(chosen))


def lacking(
    wanted: Iterable[Wanted], have: Mapping[str, Sequence[str]], *, piece: int
) -> tuple[tuple[Wanted, tuple[Piece, ...]], ...]:
    """The pieces that are not there yet, by file; `have` holds the hashes of what is there already."""
    found = []
    for one in wanted:
        there = have.get(one.path, ())
        pieces = tuple(
            Piece(path=one.path, offset=index * piece, length=min(piece, one.bytes - index * piece), sha256=sha256)
            for index, sha256 in enumerate(one.pieces)
            if index >= len(there) or there[index] != sha256
        )
        if pieces:
            found.append((one, pieces))
    return tuple(found)


def assign(
    missing: Iterable[tuple[Wanted, tuple[Piece, ...]]], *, near: str | None = None
) -> dict[str, tuple[Piece, ...]]:
    """Which place sends what: what lies at the destination itself (`near`) from there, the rest evenly."""
    shares: dict[str, list[Piece]] = {}
    loads: Counter[str] = Counter()
    for one, pieces in sorted(missing, key=lambda pair: (-pair[0].bytes, pair[0].path)):
        holder = near if near in one.holders else min(one.holders, key=lambda place: (loads[place], place))
        assert holder is not None
        shares.setdefault(holder, []).extend(pieces)
        loads[holder] += sum(piece.length for piece in pieces)
    return {holder: tuple(pieces) for holder, pieces in shares.items()}


def manifests_of(listings: Iterable[Listing]) -> tuple[Manifest, ...]:
    """Every manifest that lies there, once."""
    return tuple(dict.fromkeys(manifest for one in listings for manifest in one.manifests))


def contents(listings: Iterable[Listing]) -> Contents:
    """Which file of which unit a content is, as the manifests of all these places say."""
    return {
        part.pieces: (manifest.unit, part.path)
        for one in listings
        for manifest in one.manifests
        for part in manifest.parts
        if part.pieces and is_shard(part.path)
    }


def late_manifest(
    listing: Listing,
    *,
    world_size: int,
    made: float,
    run: str | None = None,
    ranks: Iterable[int] | None = None,
) -> Manifest:
    """What a place would have written down of what it holds now; `listing` must have been read in full.

    Whose `ranks` these are is told by the files, where it is not said.
    """
    own = sorted({rank for part in listing.parts if (rank := rank_of(part.path)) is not None})
    return Manifest(
        node=listing.place,
        run=run_of(listing.unit) if run is None else run,
        unit=origin(listing.unit),
        tag=listing.tag,
        ranks=tuple(own if ranks is None else ranks) or (0,),
        world_size=world_size,
        piece=PIECE,
        made=made,
        latest=listing.latest if listing.style == "accelerate" else None,
        parts=listing.parts,
    )

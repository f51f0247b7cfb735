"""The weights of a DeepSpeed checkpoint as files that every program reads, copied from where they lie in the shards.

Usage: export.py CHECKPOINT_DIR OUT_DIR [options]       the whole checkpoint lies here
       export.py extract CHECKPOINT_DIR --out FILE      what the shards that lie here know of the weights, in one file
       export.py assemble EXTRACT... OUT_DIR [options]  the same as the first, from the extracts of all nodes
Options: --tag TAG  --dtype fp32|bf16|fp16  --format safetensors|bin  --max-shard-size 5GB  --exclude-frozen
         --allow MODULE.CLASS  --json; `extract --out -` writes to standard output

Reads checkpoints of ZeRO stage 1, 2 and 3 as DeepSpeed 0.19 writes them, and of stage 0. What comes out has the names,
shapes, values, shards and file names of DeepSpeed's own `zero_to_fp32`, with three differences: frozen parameters of
stage 1, which that leaves out, are there; tied parameters may be written as safetensors (each name with a copy); and
partitions on NVMe are read from the `offloaded_tensors` of the checkpoint.

Nothing is loaded. The pickles in the shards are read by an unpickler that knows tensors as places in files, and a few
harmless names beside; every other class is refused and none is ever imported. Tensors are then copied through a small
buffer, so the memory needed is that of the names. Only where numbers change their type is numpy imported, never torch.

An extract is a safetensors file: `g/RANK/GROUP` are a rank's flat master partitions, `f/RANK/NAME` its part of a frozen
parameter, `b/NAME` a buffer; its metadata `export` says what they belong to. It is at most a third of the shards.

Files grow in OUT_DIR.partial (in OUT_DIR/.export.partial, when OUT_DIR exists) and get their names when all are whole
and on the disk. With --json standard output carries lines {"event": "begin"|"progress"|"done"|"error", ...}.
Exit codes: 0 done; 2 bad input; 4 no room to write; 7 another export writes there; 8 shards that are missing, torn,
foreign or of unknown content; 130 interrupted.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import enum
import fcntl
import functools
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, NoReturn

CHUNK = 256 * 1024  # one copy; it stays in the processor's cache
ALIGNMENT = 64  # of a storage in torch's files
OPEN_AT_ONCE = 128  # shards
UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
EXTRACT = 1  # the version of our extracts
BAD_INPUT, NO_ROOM, LOCKED, INTEGRITY, INTERRUPTED = 2, 4, 7, 8, 130
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NO_STAGE = 0
PARTITIONED_STAGE = 3  # from here on the parameters themselves are in parts, too

OPTIM = re.compile(r"(?P<prefix>(?:bf16_|fp16_)?zero_pp_rank_)(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")

Shape = tuple[int, ...]


class Refusal(Exception):
    """What stops an export: the message names the file, the code is the exit code."""

    def __init__(self, message: str, *, code: int = INTEGRITY) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(BaseException):
    """A signal asked us to stop."""


# Values: tensors that are places in files.


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtype:
    """A type of numbers: as safetensors, torch and torch's storages name it; size in bytes."""

    name: str
    torch: str
    storage: str | None
    size: int
    floating: bool = False


# In the order of safetensors, which sorts the tensors of a file by it.
DTYPES = (
    Dtype(name="BOOL", torch="bool", storage="BoolStorage", size=1),
    Dtype(name="U8", torch="uint8", storage="ByteStorage", size=1),
    Dtype(name="I8", torch="int8", storage="CharStorage", size=1),
    Dtype(name="F8_E5M2", torch="float8_e5m2", storage=None, size=1, floating=True),
    Dtype(name="F8_E4M3", torch="float8_e4m3fn", storage=None, size=1, floating=True),
    Dtype(name="I16", torch="int16", storage="ShortStorage", size=2),
    Dtype(name="U16", torch="uint16", storage=None, size=2),
    Dtype(name="F16", torch="float16", storage="HalfStorage", size=2, floating=True),
    Dtype(name="BF16", torch="bfloat16", storage="BFloat16Storage", size=2, floating=True),
    Dtype(name="I32", torch="int32", storage="IntStorage", size=4),
    Dtype(name="U32", torch="uint32", storage=None, size=4),
    Dtype(name="F32", torch="float32", storage="FloatStorage", size=4, floating=True),
    Dtype(name="C64", torch="complex64", storage="ComplexFloatStorage", size=8),
    Dtype(name="F64", torch="float64", storage="DoubleStorage", size=8, floating=True),
    Dtype(name="I64", torch="int64", storage="LongStorage", size=8),
    Dtype(name="U64", torch="uint64", storage=None, size=8),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
WANTED = {"fp32": BY_NAME["F32"], "bf16": BY_NAME["BF16"], "fp16": BY_NAME["F16"]}


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of bytes in a file."""

    file: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lying:
    """A tensor as it lies in a file: strides in elements, start in bytes. `mark` is DeepSpeed's id for a partition."""

    file: Path
    start: int
    dtype: Dtype
    shape: Shape
    strides: Shape
    mark: object = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        return self.numel == 0 or all(
            stride == usual
            for length, stride, usual in zip(self.shape, self.strides, strides_of(self.shape), strict=True)
            if length != 1
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A tensor as it is to be written: its bytes, one stretch after the other, told when they are needed.

    Where `strides` is set, the only stretch is what the tensor spans, and must be put into order.
    """

    dtype: Dtype
    shape: Shape
    stretches: Callable[[], Iterable[Stretch]]
    strides: Shape | None = None
    parameter: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def strides_of(shape: Shape) -> Shape:
    """Row after row."""
    return tuple(itertools.accumulate((max(length, 1) for length in shape[:0:-1]), int.__mul__, initial=1))[::-1][
        : len(shape)
    ]


def span(shape: Shape, strides: Shape) -> int:
    """Elements from the first to the last, inclusive."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def whole(lying: Lying, *, parameter: bool = False) -> Whole:
    """A tensor that lies in one piece."""
    straight = lying.contiguous
    length = lying.numel if straight else span(lying.shape, lying.strides)
    only = Stretch(lying.file, lying.start, length * lying.dtype.size)
    return Whole(
        dtype=lying.dtype,
        shape=lying.shape,
        stretches=lambda: (only,),
        strides=None if straight else lying.strides,
        parameter=parameter,
    )


class Flats:
    """Flat tensors, thought of as one."""

    def __init__(self, flats: Sequence[Lying], *, of: str) -> None:
        self.flats = flats
        self.of = of
        self.ends = list(itertools.accumulate(flat.numel for flat in flats))
        types = {flat.dtype.name for flat in flats}
        if len(types) > 1:
            raise Refusal(f"{flats[-1].file}: {of} is {flats[-1].dtype.name} here and {flats[0].dtype.name} elsewhere")
        bent = next((flat for flat in flats if not flat.contiguous), None)
        if bent is not None:
            raise Refusal(f"{bent.file}: a part of {of} is not contiguous")

    @property
    def numel(self) -> int:
        return self.ends[-1] if self.ends else 0

    def cut(self, start: int, count: int) -> Iterator[Stretch]:
        """`count` elements from `start` on."""
        at = bisect.bisect_right(self.ends, start)
        while count:
            flat = self.flats[at]
            skipped = start - (self.ends[at] - flat.numel)
            taken = min(count, flat.numel - skipped)
            if taken:
                yield Stretch(flat.file, flat.start + skipped * flat.dtype.size, taken * flat.dtype.size)
            at, start, count = at + 1, start + taken, count - taken


# A checkpoint, or the part of it that lies here.


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the model file says: the names and shapes that the flat partitions are made of, in their order.

    `first` is whether it is rank 0's, the only one that knows the shared names and whose buffers count.
    """

    shapes: tuple[dict[str, Shape], ...]
    frozen: dict[str, Shape]
    shared: dict[str, str]
    buffers: dict[str, Lying]
    steps: int | None
    first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One rank's flat master partitions; `paddings` are elements after each parameter, group by group."""

    label: str
    groups: tuple[Lying, ...]
    paddings: tuple[tuple[int, ...], ...] | None
    step: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The ranks that lie here. `fragments` are frozen parameters: parts by rank under stage 3, else whole under 0."""

    label: str
    stage: int
    world_size: int
    ranks: dict[int, Rank]
    fragments: dict[int, dict[str, Lying]]
    model: Model | None
    dtype: str = "fp32"  # what an extract was rounded to


# Reading pickles without obeying them.


class Inert:
    """In the place of an object that we do not need: it takes what it is given, keeps nothing and does nothing."""

    def __new__(cls, *_args: object, **_named: object) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_args: object, **_named: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass

    def __setitem__(self, _key: object, _value: object) -> None:
        pass

    def append(self, _item: object) -> None:
        """As lists do."""

    def extend(self, _items: object) -> None:
        """As lists do."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage of torch in its file: start and size in bytes."""

    file: Path
    start: int
    size: int
    dtype: Dtype


def rebuild_v3(*view: Any) -> Lying:
    """As torch's: a tensor is a view of a storage; the offset is in elements."""
    storage, offset, size, stride, _requires_grad, _hooks, dtype, *metadata = view
    shape, strides = tuple(map(int, size)), tuple(map(int, stride))
    if any(metadata) or len(shape) != len(strides) or min((offset, *shape, *strides), default=0) < 0:
        raise ValueError(f"a tensor that is no plain view: {offset} {shape} {strides} {metadata}")
    if (offset + span(shape, strides)) * dtype.size > storage.size:
        raise ValueError("a tensor larger than its storage")
    start = storage.start + offset * dtype.size
    return Lying(file=storage.file, start=start, dtype=dtype, shape=shape, strides=strides)


def rebuild_v2(storage: Storage, offset: int, size: Shape, stride: Shape, *more: Any) -> Lying:
    """As torch's: the type is the storage's."""
    return rebuild_v3(storage, offset, size, stride, None, None, storage.dtype, *more[2:])


def rebuild_from_type(function: Callable[..., Lying], _kind: object, view: tuple[Any, ...], state: object) -> Lying:
    """As torch's, for a tensor with attributes: DeepSpeed hangs its ds_id on the partitions."""
    attributes = state[0] if isinstance(state, tuple) and state else state
    mark = attributes.get("ds_id") if isinstance(attributes, Mapping) else None
    return replace(function(*view), mark=mark)


def first(data: Lying, *_more: object) -> Lying:
    """A parameter is its tensor."""
    return data


class Stage(enum.IntEnum):
    """DeepSpeed's ZeroStageEnum."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


def member(of: object, name: str) -> object:
    """The getattr by which some versions of Python pickle an enum's members, and nothing else's."""
    if of is Stage:
        return Stage[name]
    if of is Inert:
        return Inert()
    raise unknown("builtins.getattr")


def unknown(name: str) -> Refusal:
    """The refusal of a class or function."""
    return Refusal(
        f"holds {name}, which is not known to be harmless; nothing of it was run\n"
        f"  next: if you know why it is there, --allow {name} reads past it (it is still not imported)"
    )


PLAIN = (set, frozenset, list, dict, tuple, int, float, bool, str, bytearray, complex, slice, range)
KNOWN: dict[tuple[str, str], object] = {
    **{("builtins", kind.__name__): kind for kind in PLAIN},
    **{("torch", dtype.torch): dtype for dtype in DTYPES},
    **{("torch", dtype.storage): dtype for dtype in DTYPES if dtype.storage},
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_factory: {},
    ("_codecs", "encode"): lambda text, _encoding="latin1": text.encode("latin1"),
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *where: ":".join(map(str, where)),
    ("torch", "Tensor"): None,
    ("torch.nn.parameter", "Parameter"): None,
    ("torch.storage", "UntypedStorage"): BY_NAME["U8"],
    ("torch.serialization", "_get_layout"): str,
    ("torch._utils", "_rebuild_tensor"): rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): first,
    ("torch._utils", "_rebuild_parameter_with_state"): first,
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_from_type,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): Stage,
    ("builtins", "getattr"): member,
}
# Classes that people and DeepSpeed keep beside the weights; of these nothing is needed.
BESIDE = re.compile(
    r"deepspeed\.[\w.]+ \w+|argparse Namespace|datetime \w+|enum \w+|pathlib \w+|types SimpleNamespace|uuid UUID"
    r"|decimal Decimal|numpy(\.[\w.]+)? \w+|copyreg _reconstructor|builtins object|collections (deque|Counter)"
)
OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Unpickler(pickle.Unpickler):
    """Reads what torch.save pickled. It finds no class but the known ones, and imports nothing."""

    def __init__(self, raw: IO[bytes], *, storages: Callable[[str], tuple[Path, int, int]], allowed: frozenset[str]):
        super().__init__(raw)
        self.storages = storages
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        module = OLD_NAMES.get(module, module)
        if f"{module}.{name}" in self.allowed:
            return Inert
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if BESIDE.fullmatch(f"{module} {name}"):
            return Inert
        raise unknown(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(dtype, Dtype):
            raise ValueError(f"refers to {kind!r}")
        file, start, size = self.storages(str(key))
        if numel * dtype.size > size:
            raise ValueError(f"storage {key} is shorter than it says")
        return Storage(file, start, numel * dtype.size, dtype)


def read_shard(file: Path, *, allowed: frozenset[str]) -> dict[str, Any]:
    """What torch.save wrote there, with every tensor as a place in the file."""
    try:
        with file.open("rb") as raw, zipfile.ZipFile(raw) as archive:
            content = unpickle(archive, raw, file=file, allowed=allowed)
    except FileNotFoundError:
        raise Refusal(f"{file}: is missing") from None
    except OSError as error:
        raise Refusal(f"{file}: cannot be read: {error.strerror or error}") from None
    except Refusal as refusal:
        raise Refusal(f"{file}: {refusal}", code=refusal.code) from None
    except Exception as error:  # bytes that are no checkpoint can fail in any way
        raise Refusal(f"{file}: is torn or no file of torch.save: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise Refusal(f"{file}: holds no checkpoint but a {type(content).__name__}")
    return content


def unpickle(archive: zipfile.ZipFile, raw: BinaryIO, *, file: Path, allowed: frozenset[str]) -> Any:
    """The one pickle of the archive."""
    inside = {entry.filename: entry for entry in archive.infolist()}
    [pickled] = [name for name in inside if name.endswith("/data.pkl") and name.count("/") == 1]
    folder = pickled.removesuffix("data.pkl")
    order = archive.read(f"{folder}byteorder").decode() if f"{folder}byteorder" in inside else sys.byteorder
    if order != sys.byteorder:
        raise Refusal(f"was written on a {order}-endian machine")
    size = os.fstat(raw.fileno()).st_size

    @functools.cache
    def storage(key: str) -> tuple[Path, int, int]:
        return (file, *place(raw, inside[f"{folder}data/{key}"], size=size))

    with archive.open(stored(inside[pickled])) as stream:
        return Unpickler(stream, storages=storage, allowed=allowed).load()


def stored(entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """An entry as torch writes it: as it is, not compressed."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise ValueError(f"{entry.filename} is compressed or encrypted")
    return entry


def place(raw: BinaryIO, entry: zipfile.ZipInfo, *, size: int) -> tuple[int, int]:
    """Start and length of an entry's bytes in the file, by its local header."""
    header = os.pread(raw.fileno(), 30, stored(entry).header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", header)
    start = entry.header_offset + 30 + name + extra
    if signature != b"PK\3\4" or start + entry.file_size > size:
        raise ValueError(f"{entry.filename} is not where it should be")
    return start, entry.file_size


# Reading a checkpoint folder.


def find_folder(checkpoint: Path, tag: str | None) -> Path:
    """The folder of the tag, by default of the one that `latest` names."""
    if not checkpoint.is_dir():
        raise Refusal(f"{checkpoint}: is no folder", code=BAD_INPUT)
    tags = sorted(path.parent.name for path in checkpoint.glob("*/*_model_states.pt"))
    known = ", ".join(dict.fromkeys(tags)) or "none"
    if tag is None:
        latest = checkpoint / "latest"
        try:
            tag = latest.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise Refusal(f"{latest}: is missing; name the checkpoint by --tag: {known}") from None
        except UnicodeDecodeError:
            tag = ""
        if not tag:
            raise Refusal(f"{latest}: is torn; name the checkpoint by --tag: {known}")
    folder = checkpoint / tag
    if Path(tag).is_absolute() or ".." in Path(tag).parts or not folder.is_dir():
        raise Refusal(f"{checkpoint}: holds no checkpoint {tag!r}; it holds: {known}")
    return folder


def read_folder(folder: Path, *, allowed: frozenset[str], complete: bool) -> Part:
    """The ranks in a tag's folder: all of them, or (for an extract) those that lie here."""
    optim, models, prefix = sort_files(folder)
    if not optim:
        return read_plain(folder, models, allowed=allowed)
    read = {rank: read_rank(file, allowed=allowed) for rank, file in sorted(optim.items())}
    stage, world_size = same_everywhere({rank: told for rank, (told, _held) in read.items()}, optim)
    expected = range(world_size) if complete else optim
    for rank in expected:
        if rank not in optim:
            missing = folder / f"{prefix}{rank}_mp_rank_00_optim_states.pt"
            raise Refusal(f"{missing}: is missing; the world size is {world_size}, by {optim[min(optim)].name}")
    names = {rank: f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in expected}
    if stage < PARTITIONED_STAGE:
        names = {0: "mp_rank_00_model_states.pt"}
    for name in sorted(models - set(names.values())):
        raise Refusal(f"{folder / name}: is foreign: there is no shard of stage {stage} that belongs to it")
    here = {rank: name for rank, name in names.items() if complete or stage >= PARTITIONED_STAGE or name in models}
    found = {
        rank: read_model(folder / name, stage=stage, first=rank == 0 and 0 in optim, allowed=allowed)
        for rank, name in here.items()
    }
    lead = found[min(found)][0] if found else None
    for rank, (model, _fragments) in found.items():
        agree(model, lead, what=str(folder / names[rank]))
    ranks = {rank: held for rank, (_told, held) in read.items()}
    if stage >= PARTITIONED_STAGE and lead is not None:
        ranks = {rank: unswapped(held, rank=rank, model=lead, world_size=world_size) for rank, held in ranks.items()}
    fragments = {rank: held for rank, (_model, held) in found.items()}
    return Part(label=str(folder), stage=stage, world_size=world_size, ranks=ranks, fragments=fragments, model=lead)


def sort_files(folder: Path) -> tuple[dict[int, Path], set[str], str]:
    """The shards by rank, the names of the model files, and how the shards' names begin."""
    optim: dict[int, Path] = {}
    models: set[str] = set()
    prefixes: dict[str, Path] = {}
    for file in sorted(folder.glob("*_states.pt")):
        match = OPTIM.fullmatch(file.name) or MODEL.fullmatch(file.name)
        if file.name.startswith(("layer_", "expp_rank_")) or (match and int(match["mp"])):
            raise Refusal(
                f"{file}: is of a pipeline, of tensor parallelism or of experts; only data parallelism is exported\n"
                "  next: convert it with DeepSpeed's ds_to_universal",
                code=BAD_INPUT,
            )
        if match is None:
            raise Refusal(f"{file}: is foreign: DeepSpeed names no shard like this")
        if file.name.endswith("_optim_states.pt"):
            prefixes.setdefault(match["prefix"], file)
            optim[int(match["rank"])] = file
        else:
            models.add(file.name)
    if len(prefixes) > 1:
        one, other = list(prefixes.values())[:2]
        raise Refusal(f"{other}: is foreign beside {one.name}: two trainings, of different precision")
    return optim, models, next(iter(prefixes), "")


def read_rank(file: Path, *, allowed: frozenset[str]) -> tuple[tuple[int, int], Rank]:
    """What a shard says of stage and world size, and one rank's partitions."""
    state = read_shard(file, allowed=allowed).get("optimizer_state_dict")
    if not isinstance(state, dict) or "partition_count" not in state:
        raise Refusal(f"{file}: is no ZeRO shard")
    counts = state["partition_count"]
    counts = set(counts) if isinstance(counts, list) else {counts}
    if len(counts) != 1 or "ds_zero_partition_groups" in state:
        raise Refusal(
            f"{file}: partitions parameters over different groups of ranks, as experts are\n"
            "  next: convert it with DeepSpeed's ds_to_universal",
            code=BAD_INPUT,
        )
    # BF16_Optimizer does not say its stage; its partitions are those of stage 1.
    stage = int(state.get("zero_stage", 1))
    key = "fp32_flat_groups" if stage >= PARTITIONED_STAGE else "single_partition_of_fp32_groups"
    groups = state.get(key)
    if stage not in (1, 2, 3) or not isinstance(groups, list) or not all(isinstance(one, Lying) for one in groups):
        raise Refusal(f"{file}: has no {key} of a ZeRO stage {stage}")
    paddings = state.get("param_alignment_paddings")
    rank = Rank(
        label=str(file),
        groups=tuple(groups),
        paddings=None if paddings is None else tuple(tuple(map(int, group)) for group in paddings),
        step=step_of(state),
    )
    return (stage, int(counts.pop())), rank


def same_everywhere(told: Mapping[int, tuple[int, int]], files: Mapping[int, Path]) -> tuple[int, int]:
    """The stage and the world size, which every shard must know the same."""
    lead = min(told)
    stage, world_size = told[lead]
    for rank, (other_stage, other_size) in told.items():
        if (other_stage, other_size) != (stage, world_size):
            raise Refusal(
                f"{files[rank]}: is foreign: stage {other_stage} and world size {other_size}, where "
                f"{files[lead].name} has stage {stage} and world size {world_size}"
            )
        if rank >= world_size:
            raise Refusal(f"{files[rank]}: is foreign: the world size is {world_size}, by {files[lead].name}")
    return stage, world_size


def read_model(file: Path, *, stage: int, first: bool, allowed: frozenset[str]) -> tuple[Model, dict[str, Lying]]:
    """A model file: the names behind the partitions, and the frozen parameters that it holds."""
    state = read_shard(file, allowed=allowed)
    if not isinstance(state.get("module"), dict) or not isinstance(state.get("buffer_names"), list):
        raise Refusal(f"{file}: is no model file of DeepSpeed")
    if state.get("ds_autoep_layers") or state.get("autoep_layers"):
        raise Refusal(f"{file}: has experts of AutoEP; convert it with ds_to_universal", code=BAD_INPUT)
    shapes = tuple({name: tuple(shape) for name, shape in group.items()} for group in state.get("param_shapes") or ())
    shared = dict(state.get("shared_params") or {})
    module = {name: value for name, value in state["module"].items() if isinstance(value, Lying)}
    buffers = {name: module[name] for name in module if name in set(state["buffer_names"])}
    fragments = dict(state.get("frozen_param_fragments") or {})
    frozen = {name: tuple(shape) for name, shape in (state.get("frozen_param_shapes") or {}).items()}
    if stage < PARTITIONED_STAGE:
        # Stage 1 lists no frozen parameters. They are what remains in the module, whole.
        trained = {name for group in shapes for name in group}
        rest = {name: module[name] for name in module if name not in {*buffers, *trained, *shared}}
        fragments = rest | fragments
        frozen = {name: lying.shape for name, lying in rest.items()} | frozen
    steps: int | None = state.get("global_steps")
    model = Model(
        shapes=shapes,
        frozen=frozen,
        shared=shared,
        buffers=buffers,
        first=first,
        steps=steps,
    )
    return model, fragments


def read_plain(folder: Path, models: set[str], *, allowed: frozenset[str]) -> Part:
    """A checkpoint without ZeRO: the model file has all weights, as they were trained."""
    file = folder / "mp_rank_00_model_states.pt"
    if not models:
        raise Refusal(f"{folder}: holds no shards (*_optim_states.pt) of a DeepSpeed checkpoint")
    state = read_shard(file, allowed=allowed) if file.name in models else {}
    if not state or state.get("param_shapes") is not None:
        raise Refusal(f"{folder}: its *_optim_states.pt are missing, all of them")
    module = state.get("module")
    if not isinstance(module, dict):
        raise Refusal(f"{file}: is no model file of DeepSpeed")
    weights = {name: value for name, value in module.items() if isinstance(value, Lying)}
    buffers = {name: value for name, value in weights.items() if name in set(state.get("buffer_names") or ())}
    fragments = {name: value for name, value in weights.items() if name not in buffers}
    frozen = {name: lying.shape for name, lying in fragments.items()}
    model = Model(shapes=(), frozen=frozen, shared={}, buffers=buffers, steps=state.get("global_steps"), first=True)
    return Part(label=str(folder), stage=NO_STAGE, world_size=0, ranks={}, fragments={0: fragments}, model=model)


def unswapped(held: Rank, *, rank: int, model: Model, world_size: int) -> Rank:
    """Partitions that were on NVMe when they were saved lie in files of their own, which may be longer than they."""
    folder = Path(held.label).parent / "offloaded_tensors" / f"rank{rank:02d}"
    if not folder.is_dir() or len(held.groups) != len(model.shapes):
        return held
    groups = []
    for group, shapes in zip(held.groups, model.shapes, strict=True):
        numel = sum(share(shape, world_size) for shape in shapes.values())
        file = folder / f"{group.mark}.tensor.swp"
        if group.numel or not numel:
            groups.append(group)
        elif file.is_file() and file.stat().st_size >= numel * group.dtype.size:
            groups.append(Lying(file=file, start=0, dtype=group.dtype, shape=(numel,), strides=(1,)))
        else:
            raise Refusal(f"{file}: is {'torn' if file.exists() else 'missing'}: a partition lies there, off the shard")
    return replace(held, groups=tuple(groups))


def step_of(state: Mapping[str, Any]) -> float | None:
    """The optimizer's step, to tell shards of different moments apart; None where it keeps none."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    if "base_optimizer_state_step" in state:
        return float(state["base_optimizer_state_step"])
    held: Iterable[Any] = base if isinstance(base, list) else ()
    if isinstance(base, dict) and isinstance(base.get("state"), dict):
        held = base["state"].values()
    for one in held:
        step = one.get("step") if isinstance(one, dict) else None
        if isinstance(step, (int, float)):
            return float(step)
        if isinstance(step, Lying) and step.numel == 1 and step.dtype.name in ("F32", "I64"):
            with step.file.open("rb") as raw:
                code = "f" if step.dtype.name == "F32" else "q"
                return float(struct.unpack(code, os.pread(raw.fileno(), step.dtype.size, step.start))[0])
    return None


def agree(model: Model, other: Model | None, *, what: str) -> None:
    """Model files of one checkpoint differ in nothing but buffers and fragments."""
    assert other is not None
    for field in ("shapes", "frozen", "steps"):
        if getattr(model, field) != getattr(other, field):
            told = f": step {model.steps} and step {other.steps}" if field == "steps" else f": other {field}"
            raise Refusal(f"{what}: is foreign: it does not fit the model file of the first rank{told}")


# From partitions to tensors, as DeepSpeed's zero_to_fp32 does it.


def check(part: Part) -> Model:
    """That all of it is here and belongs together; answers with the model that counts."""
    if part.model is None:
        raise Refusal(f"{part.label}: nobody has the model file (of rank 0)")
    missing = sorted(set(range(part.world_size)) - set(part.ranks))
    if missing:
        raise Refusal(f"{part.label}: rank {', '.join(map(str, missing))} of {part.world_size} is missing")
    lead = part.ranks[0] if part.ranks else None
    for rank in part.ranks.values():
        assert lead is not None
        if rank.step != lead.step:
            raise Refusal(f"{rank.label}: is of step {rank.step}, where {lead.label} is of step {lead.step}")
        if len(rank.groups) != len(lead.groups) or rank.paddings != lead.paddings:
            raise Refusal(f"{rank.label}: is foreign: its parameter groups are not those of {lead.label}")
        if part.stage >= PARTITIONED_STAGE:
            for one, other in zip(rank.groups, lead.groups, strict=True):
                if one.numel != other.numel:
                    raise Refusal(f"{rank.label}: has {one.numel} elements where {lead.label} has {other.numel}")
    return part.model


def tensors_of(part: Part, *, exclude_frozen: bool) -> dict[str, Whole]:
    """Every tensor by its name, in DeepSpeed's order: buffers, frozen, trained, shared."""
    model = check(part)
    found = {name: whole(lying) for name, lying in model.buffers.items()}
    if not exclude_frozen or part.stage == NO_STAGE:
        found |= frozen(part, model)
    found |= partitioned(part, model) if part.stage >= PARTITIONED_STAGE else flattened(part, model)
    for name, source in model.shared.items():
        if source in found:
            found[name] = found[source]
    return found


def frozen(part: Part, model: Model) -> Iterator[tuple[str, Whole]]:
    """Frozen parameters: one fragment per rank under stage 3, else whole."""
    ranks = sorted(part.fragments) if part.stage >= PARTITIONED_STAGE else [0]
    for name, shape in model.frozen.items():
        fragments = [part.fragments[rank].get(name) for rank in ranks]
        pieces = [fragment for fragment in fragments if fragment is not None]
        numel = math.prod(shape)
        if len(pieces) != len(fragments) or sum(piece.numel for piece in pieces) < numel:
            raise Refusal(f"{part.label}: the frozen parameter {name} was not saved (offloaded parameters are not)")
        if len(pieces) == 1 and pieces[0].shape == shape:
            yield name, whole(pieces[0], parameter=True)
        else:
            flats = Flats(pieces, of=name)
            yield name, made(shape, pieces[0].dtype, functools.partial(flats.cut, 0, numel))


def made(shape: Shape, dtype: Dtype, stretches: Callable[[], Iterable[Stretch]]) -> Whole:
    """A parameter out of pieces."""
    return Whole(dtype=dtype, shape=shape, stretches=stretches, parameter=True)


def flattened(part: Part, model: Model) -> Iterator[tuple[str, Whole]]:
    """Stages 1 and 2: a group is one long vector, cut into one partition per rank."""
    ranks = [part.ranks[rank] for rank in sorted(part.ranks)]
    groups = len(ranks[0].groups) if ranks else 0
    if groups != len(model.shapes):
        raise Refusal(f"{part.label}: the model file knows {len(model.shapes)} parameter groups, the shards {groups}")
    for number, shapes in enumerate(model.shapes):
        flats = Flats([rank.groups[number] for rank in ranks], of=f"parameter group {number}")
        paddings = ranks[0].paddings[number] if ranks[0].paddings is not None else (0,) * len(shapes)
        if len(paddings) != len(shapes):
            raise Refusal(f"{part.label}: {len(paddings)} paddings for {len(shapes)} parameters of group {number}")
        at = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            numel = math.prod(shape)
            yield name, made(shape, flats.flats[0].dtype, functools.partial(flats.cut, at, numel))
            at += numel
            if at > flats.numel:
                raise Refusal(f"{ranks[-1].label}: is too short for {name}")
            at += padding
        # The end is padded to twice the world size, or the padding was taken off.
        step = 2 * part.world_size
        if -(-at // step) != -(-flats.numel // step):
            raise Refusal(f"{part.label}: group {number} has {flats.numel} elements, its parameters are {at}")


def partitioned(part: Part, model: Model) -> Iterator[tuple[str, Whole]]:
    """Stage 3: every parameter is cut into one share per rank; a rank's shares follow each other in its groups."""
    flats = [Flats(part.ranks[rank].groups, of=f"rank {rank}'s partition") for rank in sorted(part.ranks)]
    shapes = {name: shape for group in model.shapes for name, shape in group.items()}
    at = 0
    for name, shape in shapes.items():
        yield name, made(shape, flats[0].flats[0].dtype, functools.partial(shares, flats, at, math.prod(shape)))
        at += share(shape, part.world_size)
    if at != flats[0].numel:
        raise Refusal(f"{part.label}: a rank holds {flats[0].numel} elements, its shares of the parameters are {at}")


def shares(flats: Sequence[Flats], at: int, numel: int) -> Iterator[Stretch]:
    """A parameter of `numel` elements, whose shares begin at `at` in every rank's partition."""
    each = share((numel,), len(flats))
    for flat in flats:
        length = min(each, numel)
        yield from flat.cut(at, length)
        numel -= length


def share(shape: Shape, world_size: int) -> int:
    """Elements of a rank's share under stage 3; the last ones may be padding."""
    return -(-math.prod(shape) // world_size)


# Extracts.


def extract_of(part: Part) -> tuple[dict[str, Whole], dict[str, str]]:
    """The tensors of an extract, and its metadata."""
    named = {f"g/{rank}/{at}": group for rank, held in part.ranks.items() for at, group in enumerate(held.groups)}
    named |= {f"f/{rank}/{name}": one for rank, held in part.fragments.items() for name, one in held.items()}
    model = part.model
    if model is not None and (model.first or part.stage < PARTITIONED_STAGE):
        named |= {f"b/{name}": lying for name, lying in model.buffers.items()}
    told = {
        "version": EXTRACT,
        "stage": part.stage,
        "world_size": part.world_size,
        "dtype": part.dtype,
        "ranks": {
            rank: {"groups": len(held.groups), "paddings": held.paddings, "step": held.step}
            for rank, held in part.ranks.items()
        },
        "fragments": {rank: list(held) for rank, held in part.fragments.items()},
        "model": None
        if model is None
        else {
            "shapes": model.shapes,
            "frozen": model.frozen,
            "shared": model.shared,
            "buffers": list(model.buffers) if f"b/{next(iter(model.buffers), '')}" in named else [],
            "steps": model.steps,
            "first": model.first,
        },
    }
    return {name: whole(lying) for name, lying in named.items()}, {"export": json.dumps(told)}


def read_extract(file: Path) -> Part:
    """The part of a checkpoint that an extract holds."""
    try:
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(min(length, os.fstat(raw.fileno()).st_size)))
        told = json.loads(header.pop("__metadata__")["export"])
        lying = {name: entry_of(entry, file=file, begin=8 + length) for name, entry in header.items()}
        end = max((one.start + one.numel * one.dtype.size for one in lying.values()), default=8 + length)
        part = part_of(told, lying, label=str(file))
    except FileNotFoundError:
        raise Refusal(f"{file}: is missing") from None
    except (OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise Refusal(f"{file}: is torn or no extract: {type(error).__name__}: {error}") from error
    if told["version"] != EXTRACT:
        raise Refusal(f"{file}: is an extract of version {told['version']}; this reads version {EXTRACT}")
    if end != file.stat().st_size:
        raise Refusal(f"{file}: is torn: {file.stat().st_size} bytes of {end}")
    return part


def entry_of(entry: Mapping[str, Any], *, file: Path, begin: int) -> Lying:
    """A tensor of a safetensors file."""
    shape = tuple(map(int, entry["shape"]))
    start = begin + int(entry["data_offsets"][0])
    return Lying(file=file, start=start, dtype=BY_NAME[entry["dtype"]], shape=shape, strides=strides_of(shape))


def part_of(told: Mapping[str, Any], lying: Mapping[str, Lying], *, label: str) -> Part:
    """From an extract's metadata and tensors."""
    model = told["model"]
    return Part(
        label=label,
        stage=told["stage"],
        world_size=told["world_size"],
        dtype=told["dtype"],
        ranks={
            int(rank): Rank(
                label=f"{label}, rank {rank}",
                groups=tuple(lying[f"g/{rank}/{at}"] for at in range(held["groups"])),
                paddings=held["paddings"] and tuple(map(tuple, held["paddings"])),
                step=held["step"],
            )
            for rank, held in told["ranks"].items()
        },
        fragments={
            int(rank): {name: lying[f"f/{rank}/{name}"] for name in names} for rank, names in told["fragments"].items()
        },
        model=model
        and Model(
            shapes=tuple({name: tuple(shape) for name, shape in group.items()} for group in model["shapes"]),
            frozen={name: tuple(shape) for name, shape in model["frozen"].items()},
            shared=model["shared"],
            buffers={name: lying[f"b/{name}"] for name in model["buffers"]},
            steps=model["steps"],
            first=model["first"],
        ),
    )


def merged(parts: Sequence[Part]) -> Part:
    """One checkpoint out of the extracts of all nodes."""
    lead = parts[0]
    ranks: dict[int, Rank] = {}
    fragments: dict[int, dict[str, Lying]] = {}
    models = sorted((part for part in parts if part.model), key=lambda part: not (part.model and part.model.first))
    for part in parts:
        for field in ("stage", "world_size", "dtype"):
            if getattr(part, field) != getattr(lead, field):
                told = (
                    f"{field.replace('_', ' ')} {getattr(part, field)}, where {lead.label} has {getattr(lead, field)}"
                )
                raise Refusal(f"{part.label}: is foreign: {told}")
        for rank, held in part.ranks.items():
            if rank in ranks:
                raise Refusal(f"{held.label}: is also in {ranks[rank].label}")
            ranks[rank] = held
    for part in models:
        assert part.model is not None
        agree(part.model, models[0].model, what=part.label)
        for rank, named in part.fragments.items():
            fragments.setdefault(rank, named)
    return Part(
        label=", ".join(part.label for part in parts),
        stage=lead.stage,
        world_size=lead.world_size,
        ranks=ranks,
        fragments=fragments,
        model=models[0].model if models else None,
        dtype=lead.dtype,
    )


# Writing.


class Shards:
    """The files that are read from, some of them open; `told` hears how many bytes were taken."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self.told = told
        self.buffer = memoryview(bytearray(CHUNK))
        self._open: OrderedDict[Path, int] = OrderedDict()

    def chunks(self, stretch: Stretch) -> Iterator[memoryview]:
        """The bytes, through one small buffer: a chunk is gone when the next is asked for."""
        for at in range(0, stretch.length, CHUNK):
            chunk = self.buffer[: stretch.length - at]
            filled = 0
            while filled < len(chunk):
                try:
                    count = os.preadv(self._descriptor(stretch.file), [chunk[filled:]], stretch.start + at + filled)
                except OSError as error:
                    raise Refusal(f"{stretch.file}: cannot be read: {error.strerror}") from None
                if not count:
                    raise Refusal(f"{stretch.file}: became shorter while it was read")
                filled += count
            yield chunk

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            if len(self._open) >= OPEN_AT_ONCE:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(file, os.O_RDONLY)
        self._open.move_to_end(file)
        return self._open[file]

    def bytes_of(self, tensor: Whole, dtype: Dtype) -> Iterator[memoryview]:
        """A tensor's bytes as numbers of `dtype`, each rounded once."""
        chunks: Iterator[memoryview] = itertools.chain.from_iterable(map(self.chunks, tensor.stretches()))
        if tensor.strides is not None:
            chunks = iter([ordered(bytearray().join(chunks), tensor)])
        for chunk in chunks:
            taken = chunk if tensor.dtype == dtype else rounded(chunk, tensor.dtype, dtype)
            yield taken
            self.told(len(taken))


def ordered(spanned: bytearray, tensor: Whole) -> memoryview:
    """A tensor that does not lie row after row; rare (a transposed buffer) and taken into memory."""
    strides = [stride * tensor.dtype.size for stride in tensor.strides or ()]
    kind = f"V{tensor.dtype.size}"
    return memoryview(numpy().ndarray(tensor.shape, dtype=kind, buffer=spanned, strides=strides).tobytes())


def numpy() -> Any:
    """Seldom needed, and 10 MiB where torch would be 150."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else it makes a thread per processor, for nothing
    import numpy  # noqa: ICN001 - this is where the name ends

    return numpy


def rounded(raw: memoryview, source: Dtype, target: Dtype) -> memoryview:
    """Numbers of another type: each becomes the nearest one, of two equally near ones the even, as torch does it."""
    np = numpy()
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2"}
    if source.name == "BF16":
        numbers = (np.frombuffer(raw, "u2").astype("u4") << 16).view("f4")
    elif source.name in kinds:
        numbers = np.frombuffer(raw, kinds[source.name])
    else:
        raise Refusal(f"{source.torch} cannot be made {target.torch} here", code=BAD_INPUT)
    with np.errstate(all="ignore"):  # too large for the type is infinite, without a word
        numbers = numbers.astype("f4", copy=False)
        if target.name != "BF16":
            return memoryview(numbers.astype(kinds[target.name], copy=False).data).cast("B")
        bits = numbers.view("u4")
        halves = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("u2")
        halves[np.isnan(numbers)] = 0x7FC0
        return memoryview(halves.data).cast("B")


class Progress:
    """How far it is: JSON lines, or one line on a terminal that is written over."""

    def __init__(self, *, as_json: bool, stream: Any = None) -> None:
        self.as_json = as_json
        self.stream = stream or sys.stdout
        self.began = self.told = time.monotonic()
        self.total = self.done = 0
        self.terminal = not as_json and sys.stderr.isatty()

    def say(self, event: str, **told: object) -> None:
        """One JSON line."""
        if self.as_json:
            print(json.dumps({"event": event, **told}), file=self.stream, flush=True)

    def begin(self, total: int, **told: object) -> None:
        """Before the first byte."""
        self.total = total
        self.say("begin", bytes=total, **told)

    def add(self, count: int) -> None:
        """Bytes were written."""
        self.done += count
        now = time.monotonic()
        if now - self.told < 0.5 and self.done < self.total:  # noqa: PLR2004 - twice a second
            return
        self.told = now
        self.say("progress", bytes=self.done, total=self.total)
        if self.terminal:
            share = 100 * self.done // max(self.total, 1)
            print(f"\rexport: {share} % of {readable(self.total)}\033[K", end="", file=sys.stderr, flush=True)

    def end(self, sentence: str, **told: object) -> None:
        """The summary."""
        seconds = round(time.monotonic() - self.began, 3)
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr)
        self.say("done", bytes=self.done, seconds=seconds, **told)
        if not self.as_json:
            print(f"{sentence}, {readable(self.done)} in {seconds:.1f} s", file=self.stream, flush=True)


def readable(size: int) -> str:
    """Bytes for people."""
    unit, scale = next(((unit, scale) for unit, scale in UNITS.items() if size >= scale), ("bytes", 1))
    return f"{size / scale:.1f} {unit}" if scale > 1 else f"{size} bytes"


def target_of(tensor: Whole, dtype: Dtype) -> Dtype:
    """Numbers with a fraction become the wanted type, all others stay."""
    return dtype if tensor.dtype.floating else tensor.dtype


Put = Callable[[memoryview], object]


def write_safetensors(
    put: Put, tensors: Mapping[str, Whole], *, types: Mapping[str, Dtype], metadata: Mapping[str, str], shards: Shards
) -> None:
    """A safetensors file, byte for byte as safetensors itself would write it.

    https://huggingface.co/docs/safetensors/index#format
    """
    order = sorted(tensors, key=lambda name: (-DTYPES.index(types[name]), name.encode()))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        end = at + tensors[name].numel * types[name].size
        header[name] = {"dtype": types[name].name, "shape": tensors[name].shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    put(memoryview(len(text).to_bytes(8, "little") + text))
    for name in order:
        for chunk in shards.bytes_of(tensors[name], types[name]):
            put(chunk)


def write_bin(raw: BinaryIO, tensors: Mapping[str, Whole], *, types: Mapping[str, Dtype], shards: Shards) -> None:
    """A file as torch.save writes a dict of tensors: a zip of one pickle and one entry per storage."""
    keys: dict[int, str] = {}
    for tensor in tensors.values():
        keys.setdefault(id(tensor), str(len(keys)))
    content = b"\x80\2}(" + b"".join(
        plain(name) + pickled(tensor, types[name], keys[id(tensor)]) for name, tensor in tensors.items()
    )
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(entry_for("archive/data.pkl"), content + b"u.")
        archive.writestr(entry_for("archive/byteorder"), sys.byteorder)
        for name, tensor in tensors.items():
            key = keys.pop(id(tensor), None)
            if key is None:
                continue  # its storage has been written, under another name
            size = tensor.numel * types[name].size
            entry = entry_for(f"archive/data/{key}", size=size, at=raw.tell())
            with archive.open(entry, "w", force_zip64=True) as stream:
                for chunk in shards.bytes_of(tensor, types[name]):
                    stream.write(chunk)
        archive.writestr(entry_for("archive/version"), "3\n")


def entry_for(name: str, *, size: int = 0, at: int | None = None) -> zipfile.ZipInfo:
    """A zip entry of no date; with `at` (where its header begins) padded so that its bytes are aligned."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = size
    if at is not None:
        zip64 = 20  # what zipfile adds to the header of an entry that may be large
        gap = -(at + 30 + len(name) + zip64 + 4) % ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
    return entry


def plain(value: object) -> bytes:
    """The pickle of a value, to be put into another."""
    return pickle.dumps(value, 2)[2:-1]


def pickled(tensor: Whole, dtype: Dtype, key: str) -> bytes:
    """The pickle of a tensor: torch's function, and the storage by its key."""
    storage = b"(" + plain("storage") + b"ctorch\n%s\n" % str(dtype.storage).encode()
    storage += plain(key) + plain("cpu") + plain(tensor.numel) + b"tQ"
    view = plain(0) + plain(tensor.shape) + plain(strides_of(tensor.shape)) + b"\x89"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"ccollections\nOrderedDict\n)RtR"


def split(sizes: Mapping[str, int], same: Mapping[str, int], *, limit: int) -> tuple[list[list[str]], int]:
    """Names by file, and all bytes, as huggingface_hub splits a state dict.

    Tensors go one after the other into a file until it is full; those that are `same` stay together and count once.
    """
    files: list[list[str]] = []
    current: list[str] = []
    filled = total = 0
    homes: dict[int, list[str]] = {}
    followers: dict[int, list[str]] = {}
    for name, size in sizes.items():
        if same[name] in homes:
            followers[same[name]].append(name)
            continue
        total += size
        if size > limit:
            files.append([name])
            homes[same[name]] = files[-1]
        else:
            if filled + size > limit:
                files.append(current)
                current, filled = [], 0
            current.append(name)
            filled += size
            homes[same[name]] = current
        followers[same[name]] = []
    if current:
        files.append(current)
    for one, names in followers.items():
        homes[one].extend(names)
    return files, total


class Landing:
    """Where files grow until all are whole; when that fails nothing of it remains.

    A folder that does not exist yet appears as a whole; in one that exists the files appear one by one, in order. With
    `name` (of the only file) the folder is made if need be, and others may write there at the same time.
    """

    def __init__(self, out: Path, *, name: str = "") -> None:
        self.out = out
        if out.exists() and not out.is_dir():
            raise Refusal(f"{out}: is no folder", code=BAD_INPUT)
        inside = name or out.exists()
        self.work = out / f".{name or 'export'}.partial" if inside else out.with_name(f"{out.name}.partial")
        self.made: list[Path] = []
        self.files: list[Path] = []
        self.lock: int | None = None

    def __enter__(self) -> Landing:
        self.made = [path for path in (self.work, *self.work.parents) if not path.exists()]
        try:
            with self.guard(self.work):
                self._take()
        except BaseException:
            self._leave_nothing()
            raise
        return self

    def _take(self) -> None:
        """Make the folder ours. What is in it was left by an export that was killed."""
        self.work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.work, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"{self.work}: another export writes there now", code=LOCKED) from None
        except OSError:
            pass  # there are file systems without locks
        self.lock = descriptor
        for left in self.work.iterdir():
            left.unlink()

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A new file; on the disk when this ends."""
        path = self.work / name
        with self.guard(path), path.open("xb", buffering=0) as raw:
            yield raw
            os.fsync(raw.fileno())
        self.files.append(path)

    @contextlib.contextmanager
    def guard(self, path: Path) -> Iterator[None]:
        """No room, or whatever else keeps us from writing."""
        try:
            yield
        except OSError as error:
            raise Refusal(f"{path}: cannot be written: {error.strerror}", code=NO_ROOM) from None

    def room_for(self, size: int) -> None:
        """That so many bytes will fit."""
        free = shutil.disk_usage(self.work).free
        if size > free:
            told = f"{readable(size)} ({size} bytes) are needed and {readable(free)} are free"
            raise Refusal(f"{self.out}: no room: {told}", code=NO_ROOM)

    def publish(self) -> None:
        """Give the files their names. From here on nothing interrupts."""
        ignore_signals()
        with self.guard(self.out):
            if self.work.parent == self.out:
                for path in self.files:
                    path.rename(self.out / path.name)
                self.work.rmdir()
                sync(self.out)
            else:
                sync(self.work)
                self.work.rename(self.out)
                sync(self.out.parent)
        self.made = []

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._leave_nothing()
        elif self.lock is not None:
            os.close(self.lock)

    def _leave_nothing(self) -> None:
        """Remove what we made, and nothing of another's."""
        ignore_signals()
        if self.lock is not None:
            shutil.rmtree(self.work, ignore_errors=True)
            os.close(self.lock)
        for path in self.made:
            with contextlib.suppress(OSError):
                path.rmdir()


def sync(folder: Path) -> None:
    """The names in a folder, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# The three ways to call it.


def deliver(part: Part, given: argparse.Namespace, progress: Progress) -> None:
    """Write the tensors of a complete checkpoint."""
    dtype = WANTED[given.dtype]
    if part.dtype not in ("fp32", given.dtype):
        told = f"was rounded to {part.dtype} when it was extracted; {given.dtype} cannot be had from it"
        raise Refusal(f"{part.label}: {told}", code=BAD_INPUT)
    tensors = tensors_of(part, exclude_frozen=given.exclude_frozen)
    if not tensors:
        raise Refusal(f"{part.label}: there is no tensor in it")
    types = {name: target_of(tensor, dtype) for name, tensor in tensors.items()}
    sizes = {name: tensor.numel * types[name].size for name, tensor in tensors.items()}
    # Tensors without elements are all the same to torch: they share no memory, at no address.
    same = {name: id(tensor) if sizes[name] else 0 for name, tensor in tensors.items()}
    names, total = split(sizes, same, limit=given.max_shard_size)
    stem, suffix = ("model", "safetensors") if given.format == "safetensors" else ("pytorch_model", "bin")
    files = [
        f"{stem}.{suffix}" if len(names) == 1 else f"{stem}-{number:05d}-of-{len(names):05d}.{suffix}"
        for number in range(1, len(names) + 1)
    ]
    refuse_beside(given.out_dir, stem=stem, suffix=suffix)
    unfit = next((name for name in tensors if given.format == "bin" and types[name].storage is None), None)
    if unfit is not None:
        raise Refusal(f"{unfit} is {types[unfit].torch}, for which only --format safetensors is made", code=BAD_INPUT)
    unique = {id(tensor): tensor for tensor in tensors.values()}
    parameters = sum(tensor.numel for tensor in unique.values() if tensor.parameter)
    written = sum(sizes.values()) if given.format == "safetensors" else total
    shards = Shards(progress.add)
    with Landing(given.out_dir) as landing:
        landing.room_for(written)
        progress.begin(
            written, tensors=len(tensors), parameters=parameters, stage=part.stage, world_size=part.world_size
        )
        for file, held in zip(files, names, strict=True):
            here = {name: tensors[name] for name in held}
            with landing.file(file) as raw:
                if given.format == "bin":
                    write_bin(raw, here, types=types, shards=shards)
                else:
                    put = writing(raw.fileno())
                    write_safetensors(put, here, types=types, metadata={"format": "pt"}, shards=shards)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: file for file, held in zip(files, names, strict=True) for name in held},
            }
            with landing.file(f"{stem}.{suffix}.index.json") as raw:
                raw.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        landing.publish()
    note = notes(part, tensors)
    sentence = (
        f"{given.out_dir}: {len(tensors)} tensors, {parameters} parameters as {given.dtype}{note and f' ({note})'}"
    )
    progress.end(sentence, tensors=len(tensors), parameters=parameters, files=files, note=note or None)


def notes(part: Part, tensors: Mapping[str, Whole]) -> str:
    """What the user should know of the result."""
    half = any(tensor.dtype.size < WANTED["fp32"].size for tensor in tensors.values() if tensor.dtype.floating)
    if part.stage == NO_STAGE and half:
        return "without ZeRO: the weights as trained, in 16 bits"
    return ""


def refuse_beside(out: Path, *, stem: str, suffix: str) -> None:
    """Weights that are there already would be mixed with ours."""
    found = sorted(out.glob(f"{stem}*.{suffix}*")) if out.is_dir() else []
    if found:
        raise Refusal(f"{found[0]}: is there already; name another folder, or remove it", code=BAD_INPUT)


def writing(descriptor: int) -> Put:
    """Bytes into a file."""

    def put(chunk: memoryview) -> None:
        at = 0
        while at < len(chunk):
            at += os.write(descriptor, chunk[at:])

    return put


def export(given: argparse.Namespace, progress: Progress) -> None:
    """A whole checkpoint that lies here."""
    folder = find_folder(given.checkpoint, given.tag)
    deliver(read_folder(folder, allowed=frozenset(given.allow), complete=True), given, progress)


def assemble(given: argparse.Namespace, progress: Progress) -> None:
    """A whole checkpoint, from the extracts of all nodes."""
    deliver(merged([read_extract(file) for file in given.extracts]), given, progress)


def extract(given: argparse.Namespace, progress: Progress) -> None:
    """What the shards here know of the weights, into one file or stream."""
    folder = find_folder(given.checkpoint, given.tag)
    part = replace(read_folder(folder, allowed=frozenset(given.allow), complete=False), dtype=given.dtype)
    tensors, metadata = extract_of(part)
    wanted = WANTED[given.dtype]
    # Never made longer: what was kept in 16 bits is moved in 16 bits.
    types = {
        name: wanted if tensor.dtype.floating and tensor.dtype.size > wanted.size else tensor.dtype
        for name, tensor in tensors.items()
    }
    total = sum(tensor.numel * types[name].size for name, tensor in tensors.items())
    told: dict[str, Any] = {"stage": part.stage, "world_size": part.world_size, "ranks": sorted(part.ranks)}

    def write(descriptor: int) -> None:
        progress.begin(total, tensors=len(tensors), **told)
        shards = Shards(progress.add)
        write_safetensors(writing(descriptor), tensors, types=types, metadata=metadata, shards=shards)

    if given.out == Path("-"):
        try:
            write(1)
        except OSError as error:
            raise Refusal(f"standard output: {error.strerror}", code=NO_ROOM) from None
    else:
        with Landing(given.out.parent, name=given.out.name) as landing:
            landing.room_for(total)
            with landing.file(given.out.name) as raw:
                write(raw.fileno())
            landing.publish()
    ranks = ", ".join(map(str, told["ranks"])) or "none"
    progress.end(f"{given.out}: ranks {ranks} of {part.world_size} as {given.dtype}", tensors=len(tensors), **told)


def size_of(text: str) -> int:
    """From `5GB` to bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(TB|GB|MB|KB)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * UNITS.get((match[2] or "").upper(), 1)) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 5GB or 800MB")
    return size


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; `act` is what to do."""
    way = argv[0] if argv and argv[0] in ("extract", "assemble") else "export"
    parser = argparse.ArgumentParser(prog="export.py" if way == "export" else f"export.py {way}", allow_abbrev=False)
    if way == "assemble":
        parser.add_argument("extracts", type=Path, nargs="+", metavar="EXTRACT")
    else:
        parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR")
        parser.add_argument("--tag", help="which checkpoint (default: the one that `latest` names)")
        parser.add_argument("--allow", action="append", default=[], metavar="MODULE.CLASS", help="read past this class")
    if way == "extract":
        parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="- is standard output")
    else:
        parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
        parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
        parser.add_argument("--max-shard-size", type=size_of, default=size_of("5GB"), metavar="SIZE")
        parser.add_argument("--exclude-frozen", action="store_true", help="only what was trained, and buffers")
    parser.add_argument("--dtype", choices=tuple(WANTED), default="fp32")
    parser.add_argument("--json", action="store_true", help="JSON lines on standard output")
    given = parser.parse_args(argv[way != "export" :])
    given.act = {"export": export, "extract": extract, "assemble": assemble}[way]
    return given


def ignore_signals() -> None:
    """What is short and must be done is done."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def interrupt(_number: int, _frame: object) -> NoReturn:
    """Leave what is being done, through every clean-up."""
    raise Interrupted


def main(argv: Sequence[str]) -> int:
    """Do it, and answer with the exit code."""
    given = parse(argv)
    for number in STOPPING:
        signal.signal(number, interrupt)
    piped = getattr(given, "out", None) == Path("-")
    progress = Progress(as_json=given.json, stream=sys.stderr if piped else None)
    try:
        given.act(given, progress)
    except Refusal as refusal:
        progress.say("error", message=str(refusal), code=refusal.code)
        print(f"export: {refusal}", file=sys.stderr)
        return refusal.code
    except Interrupted:
        print("export: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

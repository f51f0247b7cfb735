"""The ladder: bytes per GPU, per host and per NVMe of every rung, and the lowest rung that fits. Values only.

What is held is what DeepSpeed 0.19 and torch 2.13 allocate, read from their source and held against runs by
tests/oracle and tests/benchmarks/ladder.py. P: parameters; n: processes; p: the bytes of a weight in the job's
precision. Where the bytes come from:

ZeRO-1, 2     runtime/zero/stage_1_and_2.py: all weights, flat (p·P); fp32 master weights of the own n-th, also where
              p is 4; the bucket, `reduce_bucket_size` elements, from the first gradient to the end of backward, twice
              with overlap_comm; a flat copy of what is in it at each reduction; at stage 2 the gradients of the
              tensors in the own n-th, at stage 1 all until backward ends; in the step a flat copy of the gradients
              and one in fp32
ZeRO-3        runtime/zero/stage3.py: the own n-th of each tensor, and its master weights, also where p is 4 (a device
              and its name, which are compared there, are never equal); the bucket and a flat buffer for the n-th of
              the gradients, always; runtime/zero/partitioned_param_coordinator.py: the gathered tensors, prefetched
              ones, and those that are used again within max_reuse_distance; one process alone gathers nothing
offload       the same files: on the host master weights, gradients in fp32, a buffer of p·P/n for weights or
              gradients; on the GPU copies of the shares that are gathered or, by one process alone, of whole tensors,
              and of each gradient on its way to the host, with its norm in fp64; runtime/swap_tensor/: `buffer_count`
              pinned buffers of the largest sub-group (optimizer), or of `buffer_size` elements (parameters), for each
              process; on the disk 16 bytes a parameter (master, gradient, two moments) and p
plain DDP     torch.nn.parallel: fp32 weights, gradients, and, with two processes or more, buckets as large as the
              gradients (gradient_as_bucket_view is off)
optimizers    Zhao et al. 2020 call it K = 12 for Adam in mixed precision (ZeRO, arXiv:1910.02054, section 3.1)
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import InputError
from launcher.errors import PlanError
from launcher.model import Gradient, Model, Use

Place = Literal["gpu", "cpu", "nvme"]
GIB = 1 << 30

MASTER = 4  # bytes of a master weight, of its gradient, and of each moment
NORM = 8  # gradient norms are taken in fp64 (runtime/zero/utils.py, get_norm_dtype)
NORM_CHUNK = 250_000_000  # elements at a time (runtime/zero/stage3.py, _constant_buffered_norm2)
STAGE_3 = 3

# What a process takes that holds nothing yet. On the GPU: the CUDA context with its kernels, and NCCL's channels; on
# the host: Python, torch, DeepSpeed and CUDA's libraries. Reserves by rule of thumb, larger than what is usual.
CONTEXT = GIB
PROCESS = 3 * GIB
# What the caching allocator loses between its blocks, and what kernels take for themselves, as a share of the rest.
SLACK = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """States of one parameter, and what a step takes besides: as a share of the states' tensors, by `foreach` kernels
    over all tensors (torch, on GPUs), and by a loop over them (torch, on CPUs). A fused kernel takes nothing."""

    states: int
    foreach: int = 0
    loop: int = 0


# torch.optim/*.py and deepspeed/ops/*: the tensors that each keeps in `state`. 1-bit Adam adds two error buffers of its
# compression. Its name in a DeepSpeed file, in lower case.
OPTIMIZERS: Mapping[str, Optimizer] = {
    "sgd": Optimizer(states=0),
    "momentum": Optimizer(states=1),
    "adam": Optimizer(states=2, foreach=1, loop=2),
    "adamw": Optimizer(states=2, foreach=1, loop=2),
    "fusedadam": Optimizer(states=2),
    "cpuadam": Optimizer(states=2),
    "lion": Optimizer(states=1),
    "adagrad": Optimizer(states=1, foreach=1, loop=1),
    "lamb": Optimizer(states=2),
    "onebitadam": Optimizer(states=4),
    "zerooneadam": Optimizer(states=4),
    "onebitlamb": Optimizer(states=4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A step of the ladder: the ZeRO stage, and where optimizer and parameters live. Stage 0 is plain DDP."""

    stage: int
    optimizer_on: Place = "gpu"
    params_on: Place = "gpu"

    @property
    def name(self) -> str:
        """As it is spoken of."""
        words = ["DDP" if self.stage == 0 else f"ZeRO-{self.stage}"]
        named = {"cpu": "CPU", "nvme": "NVMe"}
        if self.optimizer_on != "gpu":
            words.append(f"optimizer on {named[self.optimizer_on]}")
        if self.params_on != "gpu":
            words.append(f"parameters on {named[self.params_on]}")
        return " + ".join(words)


def make_rung(stage: int, *, optimizer: str = "none", params: str = "none") -> Rung:
    """The rung of these settings (`none`, `cpu`, `nvme`); `PlanError` where DeepSpeed has none such."""
    if params != "none" and stage != STAGE_3:
        raise PlanError(f"ZeRO stage {stage} leaves the parameters on the GPU", next_step="offload them at stage 3")
    if optimizer != "none" and stage == 0:
        raise PlanError("plain training leaves the optimizer on the GPU", next_step="offload it at stage 1, 2 or 3")
    if optimizer == "nvme" and stage != STAGE_3:
        raise PlanError(f"ZeRO stage {stage} offloads the optimizer to the CPU alone", next_step="use cpu, or stage 3")
    places: dict[str, Place] = {"none": "gpu", "cpu": "cpu", "nvme": "nvme"}
    return Rung(stage=stage, optimizer_on=places[optimizer], params_on=places[params])


# From the cheapest in communication to the dearest: what stays on the GPUs comes before what leaves them.
LADDER = (
    Rung(stage=0),
    Rung(stage=1),
    Rung(stage=2),
    Rung(stage=3),
    Rung(stage=1, optimizer_on="cpu"),
    Rung(stage=2, optimizer_on="cpu"),
    Rung(stage=3, optimizer_on="cpu"),
    Rung(stage=3, optimizer_on="cpu", params_on="cpu"),
    Rung(stage=3, optimizer_on="nvme"),
    Rung(stage=3, optimizer_on="nvme", params_on="cpu"),
    Rung(stage=3, optimizer_on="nvme", params_on="nvme"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the model is trained. Sizes are in elements, and DeepSpeed's defaults (runtime/zero/config.py)."""

    precision: str = "no"
    optimizer: str = "adamw"
    moments: int = MASTER  # bytes of each; 2 with bf16_optimizer_states
    accumulation: int = 1
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None  # None: at stage 3
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    persistence_threshold: int = 100_000
    sub_group_size: int = 1_000_000_000
    optimizer_buffers: int = 4
    param_buffers: int = 5
    param_buffer_size: int = 100_000_000
    max_in_cpu: int = 1_000_000_000

    @property
    def item(self) -> int:
        """Bytes of a weight where the weights are cast."""
        return 4 if self.precision == "no" else 2

    def overlaps(self, stage: int) -> bool:
        """Whether reductions overlap with the backward."""
        return stage == STAGE_3 if self.overlap_comm is None else self.overlap_comm


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine: its GPUs (processes, where CPUs train), the memory of the smallest; its RAM; free bytes of NVMe."""

    name: str
    gpus: int
    gpu_memory: int
    memory: int
    nvme: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines, and the reserves. Where CPUs train, what would be on a GPU is in the host's memory."""

    hosts: tuple[Host, ...]
    cpu: bool = False
    context: int = CONTEXT
    process: int = PROCESS
    slack: float = SLACK

    @property
    def world(self) -> int:
        """All processes."""
        return sum(host.gpus for host in self.hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some bytes of one process, and what they are for; `lasting`: also between two steps."""

    place: Place
    name: str
    bytes: int
    lasting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What a rung takes for each process, part by part, in the moment when that place holds the most."""

    rung: Rung
    parts: tuple[Part, ...]

    def on(self, place: Place) -> int:
        """Bytes of one process at a place."""
        return sum(part.bytes for part in self.parts if part.place == place)

    def states(self, place: Place) -> int:
        """Those of them that last from step to step: the model states, and what is allocated once."""
        return sum(part.bytes for part in self.parts if part.place == place and part.lasting)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """What a rung lacks on one machine."""

    host: str
    resource: str
    needed: int
    there: int

    @property
    def missing(self) -> int:
        """Bytes too few."""
        return self.needed - self.there


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A rung on a cluster: what it takes, per GPU, per host (the host that is asked the most) and its NVMe."""

    weight: Weight
    gpu: int
    host: int
    nvme: int
    short: tuple[Shortfall, ...]

    @property
    def fits(self) -> bool:
        """Whether every machine has what it takes."""
        return not self.short


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The lowest rung that fits, or None; why the one below it does not; what to say to who asked for another one."""

    verdicts: tuple[Verdict, ...]
    chosen: Verdict | None
    why: str
    asked: str = ""


def choose(model: Model, recipe: Recipe, cluster: Cluster, *, asked: Rung | None = None) -> Choice:
    """The lowest rung of the ladder that fits; with `asked` also whether what was asked for is enough, or too much."""
    verdicts = tuple(judge(rung, model, recipe, cluster) for rung in LADDER)
    place = next((index for index, verdict in enumerate(verdicts) if verdict.fits), None)
    chosen = None if place is None else verdicts[place]
    below = verdicts[-1] if place is None else verdicts[place - 1] if place else None
    return Choice(
        verdicts=verdicts,
        chosen=chosen,
        why="" if below is None else f"{below.weight.rung.name} does not fit: {_lacks(below)}",
        asked="" if asked is None else _answer(asked, chosen, judge(asked, model, recipe, cluster)),
    )


def _lacks(verdict: Verdict) -> str:
    worst = max(verdict.short, key=lambda one: one.missing)
    return (
        f"{worst.host} lacks {worst.missing:,} bytes of {worst.resource} "
        f"({show_bytes(worst.needed)} of {show_bytes(worst.there)})"
    )


def _answer(asked: Rung, chosen: Verdict | None, verdict: Verdict) -> str:
    if not verdict.fits:
        return f"{asked.name}, as asked for, does not fit: {_lacks(verdict)}"
    if chosen is None or chosen.weight.rung == asked or asked not in LADDER:
        return ""
    return f"{asked.name}, as asked for, is more than is needed: {chosen.weight.rung.name} fits, and is faster"


def judge(rung: Rung, model: Model, recipe: Recipe, cluster: Cluster) -> Verdict:
    """What a rung takes of each machine, and what is missing."""
    weight = weigh(rung, model, recipe, cluster)
    gpu, ram, nvme = weight.on("gpu"), weight.on("cpu"), weight.on("nvme")
    short: list[Shortfall] = []
    for host in cluster.hosts:
        needs = (
            ("GPU memory", 0 if cluster.cpu else gpu, host.gpu_memory),
            ("host memory", host.gpus * (ram + (gpu if cluster.cpu else 0)), host.memory),
            ("NVMe", host.gpus * nvme, host.nvme),
        )
        short += [
            Shortfall(host=host.name, resource=resource, needed=needed, there=there)
            for resource, needed, there in needs
            if needed > there
        ]
    most = max((host.gpus for host in cluster.hosts), default=0)
    return Verdict(
        weight=weight,
        gpu=gpu,
        host=most * (ram + (gpu if cluster.cpu else 0)),
        nvme=most * nvme,
        short=tuple(short),
    )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)([mgt])(?:i?b)?", re.IGNORECASE)


def read_size(text: str, *, where: str) -> int:
    """Bytes, in powers of 1024: `80g`, `1.5t`, `512m`."""
    match = _SIZE.fullmatch(text)
    if not match or float(match[1]) == 0:
        raise InputError(f"{text!r} is no size", where=where, next_step="such as 80g or 1.5t")
    return int(float(match[1]) * (1 << {"m": 20, "g": 30, "t": 40}[match[2].lower()]))


def show_bytes(count: int) -> str:
    """Bytes for the eyes, in powers of 1024."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"


# --- what is held ----------------------------------------------------------------------------------------------------

Bytes = dict[str, int]


def weigh(rung: Rung, model: Model, recipe: Recipe, cluster: Cluster) -> Weight:
    """What one process of a rung holds, on its GPU, in its host's memory and on its NVMe."""
    job = _Job(rung=rung, model=model, recipe=recipe, cluster=cluster)
    nvme: Bytes = {}
    if rung.stage == 0:
        static, moment = _plain(job)
        host = _built(job)
    elif rung.stage < STAGE_3:
        static, moment = _flat(job)
        host = _flat_host(job)
    else:
        static, moment = _sharded(job)
        host, nvme = _sharded_host(job), _sharded_nvme(job)
    lost = int((sum(static.values()) + sum(moment.values())) * cluster.slack)
    built = host.pop(BUILDING, 0)
    parts = (
        *_parts("gpu", static, lasting=True),
        *_parts("gpu", moment | {"fragmentation": lost, "context": cluster.context}, lasting=False),
        *_parts("cpu", host, lasting=True),
        *_parts("cpu", {BUILDING: max(0, built - sum(host.values())), "process": cluster.process}, lasting=False),
        *_parts("nvme", nvme, lasting=True),
    )
    return Weight(rung=rung, parts=parts)


BUILDING = "building the model"


def _parts(place: Place, found: Bytes, *, lasting: bool) -> Iterator[Part]:
    return (Part(place=place, name=name, bytes=count, lasting=lasting) for name, count in found.items() if count)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """The question, and the sizes that follow from it."""

    rung: Rung
    model: Model
    recipe: Recipe
    cluster: Cluster

    @property
    def world(self) -> int:
        return self.cluster.world

    @property
    def item(self) -> int:
        return self.recipe.item

    @property
    def optimizer(self) -> Optimizer:
        return OPTIMIZERS[self.recipe.optimizer]

    @property
    def states(self) -> int:
        """Bytes of all states of one parameter."""
        return self.optimizer.states * self.recipe.moments

    @property
    def temporaries(self) -> int:
        """How many copies of a master weight a step makes, where it runs on the device."""
        return self.optimizer.loop if self.cluster.cpu else self.optimizer.foreach

    @property
    def offloads(self) -> bool:
        return self.rung.optimizer_on != "gpu"

    @property
    def gathers(self) -> bool:
        """Whether a module's tensors are fetched, under ZeRO-3, before it runs: one process has them, on its GPU."""
        return self.world > 1 or self.rung.params_on != "gpu"

    @property
    def accumulates(self) -> bool:
        return self.recipe.accumulation > 1

    @property
    def trained(self) -> int:
        return sum(self.model.optimized)

    @property
    def frozen(self) -> int:
        return self.model.parameters - self.trained

    @property
    def flat_share(self) -> int:
        """Elements of one process under ZeRO-1 and 2: the flat tensor is padded to two elements for each process."""
        return 2 * math.ceil(self.trained / (2 * self.world))

    @property
    def share(self) -> int:
        """Trained elements of one process under ZeRO-3: each tensor is padded to the processes."""
        return sum(math.ceil(count / self.world) for count in self.model.optimized)

    @property
    def all_share(self) -> int:
        """Elements of one process under ZeRO-3, those that are not trained among them."""
        return sum(math.ceil(count / self.world) for count in self.model.tensors)

    @property
    def trained_tensors(self) -> tuple[int, ...]:
        """Numbers of the tensors that are trained."""
        return tuple(index for index, trained in enumerate(self.model.trained) if trained)

    def owners(self, rank: int) -> Mapping[int, int]:
        """Elements of the tensors that reach into a process's share under ZeRO-1 and 2, by the tensor's number.

        A tensor on a border is held whole by both sides.
        """
        low, high = rank * self.flat_share, (rank + 1) * self.flat_share
        found: dict[int, int] = {}
        start = 0
        for tensor in self.trained_tensors:
            end = start + self.model.tensors[tensor]
            if start < high and low < end:
                found[tensor] = self.model.tensors[tensor]
            start = end
        return found

    @property
    def whole_share(self) -> int:
        """Elements of the tensors that reach into a share, for the process for which these are the most."""
        totals = [0] * self.world
        start = 0
        for count in self.model.optimized:
            end = start + count
            for rank in range(start // self.flat_share, (end - 1) // self.flat_share + 1):
                totals[rank] += count
            start = end
        return max(totals)

    @property
    def sub_group(self) -> int:
        """Elements of the largest sub-group: tensors are added until the size is reached, so it may be passed."""
        size = self.recipe.sub_group_size
        most = group = 0
        for count in self.model.optimized:
            group += math.ceil(count / self.world)
            if group >= size:
                most, group = max(most, group), 0
        return max(most, group)

    @property
    def persistent(self) -> frozenset[int]:
        """Tensors that ZeRO-3 gathers once and keeps."""
        limit = self.recipe.persistence_threshold
        return frozenset(index for index, count in enumerate(self.model.tensors) if count <= limit)

    def pinned(self, count: int) -> int:
        """Pinned memory: torch's allocator for it rounds up to a power of two (ATen/core/CachingHostAllocator.h)."""
        return count if self.cluster.cpu or count == 0 else 1 << (count - 1).bit_length()


class _Peak:
    """Of many moments, the one that holds the most."""

    def __init__(self) -> None:
        self.parts: Bytes = {}

    def see(self, *moment: Bytes) -> None:
        """One moment; what is named twice is added."""
        if sum(sum(some.values()) for some in moment) <= sum(self.parts.values()):
            return
        self.parts = {}
        for some in moment:
            for name, count in some.items():
                self.parts[name] = self.parts.get(name, 0) + count


# Plain DDP


def _plain(job: _Job) -> tuple[Bytes, Bytes]:
    trained = job.trained
    static = {
        "parameters": MASTER * job.model.parameters + job.model.buffers,
        "optimizer": job.states * trained,
        "buckets": MASTER * trained if job.world > 1 else 0,
    }
    peak = _Peak()
    gradients = MASTER * trained if job.accumulates else 0
    for event in job.model.autocast:
        peak.see({"activations": event.peak, "gradients": gradients})
        if isinstance(event, Gradient) and not job.accumulates:
            gradients += MASTER * job.model.tensors[event.tensor]
        peak.see({"activations": event.level, "gradients": gradients})
    stepped = max(job.model.optimized, default=0) if job.cluster.cpu else trained
    peak.see({"gradients": MASTER * trained, "step": job.temporaries * MASTER * stepped})
    return static, peak.parts


def _built(job: _Job) -> Bytes:
    """Each process builds the model in the host's memory, in fp32, before it goes to the GPU."""
    return {} if job.cluster.cpu else {BUILDING: MASTER * job.model.parameters}


# ZeRO-1 and 2


class _Bucket:
    """Gradients on their way to the reduction: filled until the next would not fit."""

    def __init__(self, job: _Job) -> None:
        self.size = job.recipe.reduce_bucket_size
        self.tensors: list[int] = []
        self.elements = 0
        self.beside = 0  # elements of a gradient that is larger than the bucket, and stays where it is
        self.most = 0

    def is_full_for(self, count: int) -> bool:
        return self.elements > 0 and self.elements + count > self.size

    def put(self, tensor: int, count: int) -> None:
        self.tensors.append(tensor)
        self.elements += count
        if count > self.size:
            self.beside = count
        else:
            self.most = max(self.most, self.elements)

    def empty(self) -> None:
        self.tensors, self.elements, self.beside = [], 0, 0


def _flat(job: _Job) -> tuple[Bytes, Bytes]:
    item, share = job.item, job.flat_share
    static = {"parameters": item * (job.world * share + job.frozen) + job.model.buffers}
    largest = max(job.model.optimized, default=0)
    if job.offloads:
        static["staging"] = item * largest
    else:
        static["master weights"] = MASTER * share
        static["optimizer"] = job.states * share
    passing = _FlatPass(job)
    passing.run()
    peak = passing.peak
    if not job.offloads:
        own = {"own gradients": item * job.whole_share}
        is_kept = not passing.early and not job.accumulates  # at stage 1, until the step is done
        bucket = {"buckets": passing.held.get("buckets", 0) if is_kept else 0}
        peak.see(bucket, own, {"step": NORM * largest})
        peak.see(bucket, own, {"step": (item + (MASTER if item != MASTER else 0)) * share})
        peak.see(bucket, {"step": (1 + job.temporaries) * MASTER * share})
    return static, peak.parts


class _FlatPass:
    """A forward and backward under ZeRO-1 or 2, as the process sees it that has the most.

    On a GPU the room for the own gradients is taken whole, at the first reduction; where CPUs train it is taken as it
    is written: soonest by the last process at stage 2, whose tensors have their gradients first, and by the first
    process at stage 1, which reduces in the order of the tensors.
    """

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.peak = _Peak()
        self.bucket = _Bucket(job)
        self.held: Bytes = {}
        self.level = 0
        self.early = job.rung.stage > 1 or job.recipe.overlaps(job.rung.stage)
        whole = job.whole_share
        self.own = {} if job.offloads else job.owners(0 if not self.early else job.world - 1)
        self.room = 0 if job.offloads or job.cluster.cpu else job.item * whole
        if job.accumulates:
            self.held["gradients"] = job.item * (job.trained if job.rung.stage == 1 else 0 if job.offloads else whole)

    def run(self) -> None:
        for event in self.job.model.cast:
            self.peak.see({"activations": event.peak}, self.held)
            self.level = event.level
            if isinstance(event, Gradient):
                self._take(event.tensor)
            self._see()
        if not self.early:
            for tensor in self.job.trained_tensors:
                count = self.job.model.tensors[tensor]
                self._reduce(tensor)
                if count <= self.bucket.size:
                    self._add("gradients", -self.job.item * count)
                self._see()
        self._flush()

    def _take(self, tensor: int) -> None:
        if self.early:
            self._reduce(tensor)
            return
        self._allocate()
        if not self.job.accumulates:
            self._add("gradients", self.job.item * self.job.model.tensors[tensor])

    def _reduce(self, tensor: int) -> None:
        count = self.job.model.tensors[tensor]
        if self.bucket.is_full_for(count):
            self._flush()
        self.bucket.put(tensor, count)
        self._allocate()

    def _allocate(self) -> None:
        copies = 2 if self.job.recipe.overlaps(self.job.rung.stage) else 1
        size = self.bucket.most if self.job.cluster.cpu else self.bucket.size
        self.held["buckets"] = copies * self.job.item * size
        if self.early:
            self.held["large gradients"] = self.job.item * self.bucket.beside

    def _flush(self) -> None:
        item = self.job.item
        if self.job.world > 1 or not self.bucket.beside:
            self._see({"reduction": item * self.bucket.elements})
        sizes = {tensor: item * self.job.model.tensors[tensor] for tensor in self.bucket.tensors}
        if self.job.offloads and sizes:
            self._see({"conversion": NORM * max(sizes.values()) // item})
        written = sum(size for tensor, size in sizes.items() if tensor in self.own)
        if self.job.cluster.cpu:
            self._add("own gradients", written)
        else:
            self.held["own gradients"] = self.room
        if not self.early and self.bucket.beside and written:
            self._add("gradients", -item * self.bucket.beside)
        self._see()
        self.bucket.empty()
        self.held["large gradients"] = 0

    def _add(self, name: str, count: int) -> None:
        self.held[name] = self.held.get(name, 0) + count

    def _see(self, spike: Bytes | None = None) -> None:
        self.peak.see({"activations": self.level}, self.held, spike or {})


def _flat_host(job: _Job) -> Bytes:
    if not job.offloads:
        return _built(job)
    share, item = job.flat_share, job.item
    kept = {
        "master weights": job.pinned(MASTER * share),
        "gradients": job.pinned(MASTER * share),
        "optimizer": job.states * share,
        "staging": job.pinned(item * share) + job.pinned(item * max(job.model.optimized, default=0)),
    }
    if job.accumulates:
        kept["accumulated gradients"] = item * job.whole_share
    return kept | _built(job)


# ZeRO-3


def _sharded(job: _Job) -> tuple[Bytes, Bytes]:
    item = job.item
    passing = _ShardedPass(job)
    passing.run()
    size = passing.bucket.most if job.cluster.cpu else job.recipe.reduce_bucket_size
    static = {
        "parameters": job.model.buffers + (item * job.all_share if job.rung.params_on == "gpu" else 0),
        "persistent parameters": item * sum(job.model.tensors[one] for one in job.persistent) if job.gathers else 0,
        "buckets": item * size,
    }
    peak = passing.peak
    if not job.offloads:
        static["master weights"] = MASTER * job.share
        static["optimizer"] = job.states * job.share
        static["gradients"] = item * job.share
        group = job.sub_group
        peak.see({"step": NORM * math.ceil(max(job.model.optimized, default=0) / job.world)})
        peak.see({"step": (item + (MASTER if item != MASTER else 0)) * group})
        peak.see({"step": (1 + job.temporaries) * MASTER * group})
    return static, peak.parts


@dataclass(slots=True)
class _Flight:
    """Tensors that are gathered ahead, in one buffer. The first that is waited for lets all be copied out of it, and it
    stays until the last one is."""

    bytes: int
    pending: set[int]
    landed: bool = False


class _ShardedPass:
    """What is gathered, and what waits to be reduced, in one forward and backward under ZeRO-3."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.peak = _Peak()
        self.bucket = _Bucket(job)
        self.held: Bytes = {}
        self.level = 0
        self.uses = [event.tensors for event in job.model.cast if isinstance(event, Use)]
        self.next = _next_uses(self.uses, job.model.tensors)
        self.queue = deque((step, tensor) for step, tensors in enumerate(self.uses) for tensor in tensors)
        self.step = 0
        self.live: set[int] = set(job.persistent)
        self.passed: dict[int, int] = {}  # the last use of a tensor that the prefetcher has gone by
        self.flights: list[_Flight] = []
        self.leaving: set[int] = set()

    def run(self) -> None:
        for event in self.job.model.cast:
            self.peak.see({"activations": event.peak}, self.held)
            self.level = event.level
            if isinstance(event, Gradient):
                self._reduce(event.tensor)
            elif self.job.gathers:
                self._use(event.tensors)
            self._see()
        self._flush()

    def _see(self, spike: Bytes | None = None) -> None:
        self.peak.see({"activations": self.level}, self.held, spike or {})

    def _whole(self, tensors: Iterable[int]) -> int:
        """Bytes of gathered tensors: each is padded to the processes."""
        world = self.job.world
        return self.job.item * sum(world * math.ceil(self.job.model.tensors[one] / world) for one in tensors)

    def _copies(self, tensors: Iterable[int]) -> int:
        """Bytes of the own shares, copied from the host's memory to the GPU to be gathered from there."""
        if self.job.rung.params_on == "gpu" or self.job.cluster.cpu or self.job.world == 1:
            return 0
        return self._whole(tensors) // self.job.world

    def _use(self, tensors: tuple[int, ...]) -> None:
        if self.step:
            self._release(self.step - 1)
        wanted = {one for one in tensors if one not in self.live}
        self.live |= wanted
        self._tell()
        flat = self._whole(wanted) if len(wanted) > 1 and self.job.world > 1 else 0
        self._see({"gathering": flat + self._copies(wanted)})
        self._land(tensors)
        self._prefetch()
        self._tell()
        self.step += 1

    def _land(self, tensors: tuple[int, ...]) -> None:
        """What is used now has been waited for."""
        for flight in self.flights:
            if not flight.pending.isdisjoint(tensors):
                flight.landed = True
                self._tell()
                self._see()
                flight.pending.difference_update(tensors)
        self.flights = [flight for flight in self.flights if flight.pending]

    def _prefetch(self) -> None:
        while self.queue and self.queue[0][0] <= self.step:
            self.queue.popleft()
        recipe, sizes = self.job.recipe, self.job.model.tensors
        room = min(recipe.max_live_parameters - sum(sizes[one] for one in self.live), recipe.prefetch_bucket_size)
        ahead: set[int] = set()
        count = 0
        while self.queue and count < room:
            step, one = self.queue.popleft()
            self.passed[one] = step
            if one not in self.live:
                ahead.add(one)
                self.live.add(one)
                count += sizes[one]
        if len(ahead) > 1 and self.job.world > 1:
            self.flights.append(_Flight(bytes=self._whole(ahead), pending=ahead))

    def _release(self, step: int) -> None:
        """Let go of what a module used, unless it is used again soon, or the prefetcher counts on it.

        On a GPU it is only free when the streams that read it have come so far (`Tensor.record_stream`), while the
        program has gone on: it is counted until the next module is done.
        """
        let_go = set()
        for one in self.uses[step]:
            distance = self.next[step].get(one)
            if one in self.job.persistent or self.passed.get(one, -1) > self.step:
                continue
            if distance is None or distance >= self.job.recipe.max_reuse_distance:
                let_go.add(one)
        self.live -= let_go
        if let_go and not self.job.cluster.cpu:
            self.leaving = let_go

    def _tell(self) -> None:
        """What flies lies in its buffer; what has landed in its copies, beside the buffer."""
        flying = sum(flight.bytes for flight in self.flights)
        in_air = {one for flight in self.flights if not flight.landed for one in flight.pending}
        self.held["prefetch"] = flying
        self.held["gathered parameters"] = self._whole((self.live | self.leaving) - self.job.persistent - in_air)

    def _reduce(self, tensor: int) -> None:
        count = self.job.model.tensors[tensor]
        if self.bucket.is_full_for(count):
            self._flush()
        self.bucket.put(tensor, count)
        self.held["large gradients"] = self.job.item * self.bucket.beside

    def _flush(self) -> None:
        counts = [self.job.model.tensors[one] for one in self.bucket.tensors]
        alone = len(counts) == 1 and counts[0] % self.job.world == 0  # reduced where it is, not in a flat copy
        reduction = 0 if alone else self.job.item * self.bucket.elements
        self._see({"reduction": reduction})
        if self.job.offloads and counts:
            largest = math.ceil(max(counts) / self.job.world)
            self._see({"reduction": reduction, "conversion": self._leaving(largest)})
        self.bucket.empty()
        self.held["large gradients"] = 0

    def _leaving(self, count: int) -> int:
        """Bytes of one gradient's share on its way to the host: its copy, and its norm in fp64, then itself in fp32."""
        item = self.job.item
        copy = 0 if self.job.cluster.cpu else item * count
        return copy + max(NORM * min(count, NORM_CHUNK), MASTER * count if item != MASTER else 0)


def _next_uses(uses: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> list[dict[int, int]]:
    """For every use and each of its tensors: the elements that are read until that tensor is read again."""
    before = [0]
    for tensors in uses:
        before.append(before[-1] + sum(sizes[one] for one in tensors))
    found: list[dict[int, int]] = []
    later: dict[int, int] = {}
    for step in reversed(range(len(uses))):
        found.append({one: before[later[one]] - before[step + 1] for one in uses[step] if one in later})
        later |= dict.fromkeys(uses[step], step)
    return found[::-1]


def _sharded_host(job: _Job) -> Bytes:
    """What ZeRO-3 keeps in the host's memory; under zero.Init no process ever holds the whole model."""
    item, share = job.item, job.share
    kept: Bytes = {}
    if job.rung.optimizer_on == "cpu":
        kept["master weights"] = MASTER * share
        kept["gradients"] = sum(map(job.pinned, _sub_groups(job, MASTER))) + job.pinned(item * share)
        kept["optimizer"] = job.states * share
    elif job.rung.optimizer_on == "nvme":
        buffers = job.recipe.optimizer_buffers * MASTER * job.sub_group
        kept["gradients"] = job.pinned(item * share)
        kept["swap buffers"] = buffers + job.states * job.sub_group  # new states are unpinned in the first step
    if job.rung.params_on == "cpu":
        kept["parameters"] = job.pinned(item * job.all_share)
    elif job.rung.params_on == "nvme":
        kept["parameters"] = job.pinned(item * min(job.all_share, job.recipe.max_in_cpu))
        kept["parameter buffers"] = item * job.recipe.param_buffers * job.recipe.param_buffer_size
    return kept


def _sub_groups(job: _Job, item: int) -> list[int]:
    """Bytes of each sub-group."""
    groups: list[int] = []
    group = 0
    for count in job.model.optimized:
        group += item * math.ceil(count / job.world)
        if group >= item * job.recipe.sub_group_size:
            groups.append(group)
            group = 0
    return [*groups, group] if group else groups


def _sharded_nvme(job: _Job) -> Bytes:
    kept: Bytes = {}
    if job.rung.optimizer_on == "nvme":
        kept["master weights"] = MASTER * job.share
        kept["gradients"] = MASTER * job.share
        kept["optimizer"] = job.states * job.share
    if job.rung.params_on == "nvme":
        kept["parameters"] = job.item * job.all_share
    return kept

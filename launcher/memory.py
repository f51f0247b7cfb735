"""The ladder: bytes per GPU, per host and per NVMe of every rung, and the lowest rung that fits. Values only.

What is held is what DeepSpeed 0.19 and torch 2.13 allocate, read from their source and held against runs by
tests/oracle and tests/benchmarks/ladder.py. P: parameters; n: processes; p: the bytes of a weight in the job's
precision. Where the bytes come from:

ZeRO-1, 2     runtime/zero/stage_1_and_2.py: all weights, flat (p·P); fp32 master weights of the own n-th, also where
              p is 4; the bucket, `reduce_bucket_size` elements, from the first gradient to the end of backward, twice
              with overlap_comm; a flat copy of what is in it at each reduction; at stage 2 the gradients of the
              tensors in the own n-th, at stage 1 all until backward ends; in the step a flat copy of the gradients
              and one in fp32
ZeRO-3        runtime/zero/stage3.py: the own n-th of each tensor; of the master weights only where p is 2; the bucket
              and a flat buffer for the n-th of the gradients, always; runtime/zero/partitioned_param_coordinator.py:
              the gathered tensors, prefetched ones, and those that are used again within max_reuse_distance
offload       the same files: on the host master weights, gradients in fp32, a buffer of p·P/n for weights or
              gradients; runtime/swap_tensor/: `buffer_count` pinned buffers of the largest sub-group (optimizer), or
              of `buffer_size` elements (parameters), for each process; on the disk 16 bytes a parameter (master,
              gradient, two moments) and p
plain DDP     torch.nn.parallel: fp32 weights, gradients, and, with two processes or more, buckets as large as the
              gradients (gradient_as_bucket_view is off)
optimizers    Zhao et al. 2020 call it K = 12 for Adam in mixed precision (ZeRO, arXiv:1910.02054, section 3.1)
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.errors import InputError
from launcher.errors import PlanError
from launcher.model import Event, Gradient, Model, Use

Place = Literal["gpu", "cpu", "nvme"]
GIB = 1 << 30

MASTER = 4  # bytes of a master weight, of its gradient, and of each moment
NORM = 8  # gradient norms are taken in fp64 (runtime/zero/utils.py, get_norm_dtype)
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
    if LADDER.index(chosen.weight.rung) < LADDER.index(asked):
        return f"{asked.name}, as asked for, is more than is needed: {chosen.weight.rung.name} fits, and is faster"
    return ""


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
    if not match:
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


def _most(*moments: Bytes) -> Bytes:
    """The moment that holds the most."""
    return max(moments, key=lambda one: sum(one.values()))


@dataclass(slots=True)
class _Held:
    """What a stage holds beside its static part, as the events go by; `spike` lasts only for a moment."""

    held: Bytes = field(default_factory=dict)
    spike: Bytes = field(default_factory=dict)

    def add(self, name: str, count: int) -> None:
        self.held[name] = self.held.get(name, 0) + count


def _replay(events: Sequence[Event], held: _Held, feed: Callable[[Event], None], end: Callable[[], None]) -> Bytes:
    """The moment of a forward and backward in which the most is held."""
    best: Bytes = {}
    most = -1

    def consider(activations: int, spike: Bytes) -> None:
        nonlocal best, most
        total = activations + sum(held.held.values()) + sum(spike.values())
        if total > most:
            most = total
            best = {"activations": activations, **held.held}
            for name, count in spike.items():
                best[name] = best.get(name, 0) + count

    for event in events:
        consider(event.peak, {})
        held.spike = {}
        feed(event)
        consider(event.level, held.spike)
    held.spike = {}
    end()
    consider(events[-1].level if events else 0, held.spike)
    return best


# Plain DDP


def _plain(job: _Job) -> tuple[Bytes, Bytes]:
    trained = job.trained
    static = {
        "parameters": MASTER * job.model.parameters + job.model.buffers,
        "optimizer": job.states * trained,
        "buckets": MASTER * trained if job.world > 1 else 0,
    }
    held = _Held({"gradients": MASTER * trained if job.accumulates else 0})

    def feed(event: Event) -> None:
        if isinstance(event, Gradient) and not job.accumulates:
            held.add("gradients", MASTER * job.model.tensors[event.tensor])

    passing = _replay(job.model.autocast, held, feed, lambda: None)
    stepped = max(job.model.optimized, default=0) if job.cluster.cpu else trained
    step = {"gradients": MASTER * trained, "step": job.temporaries * MASTER * stepped}
    return static, _most(passing, step)


def _built(job: _Job) -> Bytes:
    """Each process builds the model in the host's memory, in fp32, before it goes to the GPU."""
    return {} if job.cluster.cpu else {BUILDING: MASTER * job.model.parameters}


# ZeRO-1 and 2


class _Bucket:
    """Gradients on their way to the reduction: filled until the next would not fit."""

    def __init__(self, job: _Job) -> None:
        self.item = job.item
        self.size = job.recipe.reduce_bucket_size
        self.elements = 0
        self.beside = 0  # elements of a gradient that is larger than the bucket, and stays where it is
        self.most = 0

    def is_full_for(self, count: int) -> bool:
        return self.elements > 0 and self.elements + count > self.size

    def put(self, count: int) -> None:
        self.elements += count
        if count > self.size:
            self.beside = count
        else:
            self.most = max(self.most, self.elements)

    def empty(self) -> int:
        """Elements that were in it."""
        went, self.elements, self.beside = self.elements, 0, 0
        return went


def _flat(job: _Job) -> tuple[Bytes, Bytes]:
    item, share = job.item, job.flat_share
    static = {
        "parameters": item * (2 * job.world * math.ceil(job.trained / (2 * job.world)) + job.frozen) + job.model.buffers
    }
    if job.offloads:
        static["staging"] = item * max(job.model.optimized, default=0)
    else:
        static["master weights"] = MASTER * share
        static["optimizer"] = job.states * share
    passing = _flat_passing(job)
    if job.offloads:
        return static, passing
    own = item * _tensors_of_a_share(job)
    largest = max(job.model.optimized, default=0)
    wide = MASTER * share if item != MASTER else 0
    norm = {"gradients": own, "step": NORM * largest}
    copied = {"gradients": own + item * share + wide}
    step = {"gradients": MASTER * share, "step": job.temporaries * MASTER * share}
    return static, _most(passing, norm, copied, step)


def _flat_passing(job: _Job) -> Bytes:
    """Forward and backward under ZeRO-1 or 2."""
    item, tensors = job.item, job.model.tensors
    bucket = _Bucket(job)
    own = 0 if job.offloads else item * _tensors_of_a_share(job)
    early = job.rung.stage > 1 or job.recipe.overlaps(job.rung.stage)
    held = _Held()
    if job.accumulates:
        held.add("gradients", item * job.trained if job.rung.stage == 1 else own)

    def allocate() -> None:
        copies = 2 if job.recipe.overlaps(job.rung.stage) else 1
        size = bucket.most if job.cluster.cpu else job.recipe.reduce_bucket_size
        held.held["buckets"] = copies * item * size + item * bucket.beside

    def flush() -> None:
        large = bucket.beside
        went = bucket.empty()
        held.spike = {"reduction": item * max(went, large)}
        if job.offloads:
            held.spike["conversion"] = (MASTER + NORM) * max(job.model.optimized, default=0)
        held.held["own gradients"] = own

    def reduce(count: int) -> None:
        if bucket.is_full_for(count):
            flush()
        bucket.put(count)
        allocate()

    def feed(event: Event) -> None:
        if not isinstance(event, Gradient):
            return
        if early:
            reduce(tensors[event.tensor])
        else:
            allocate()
            if not job.accumulates:
                held.add("gradients", item * tensors[event.tensor])

    def end() -> None:
        if early:
            flush()
            return
        # At stage 1 all gradients go through the bucket now: the first time that it is full, the most is held.
        for count in job.model.optimized:
            if bucket.is_full_for(count):
                break
            bucket.put(count)
        moved = bucket.elements - bucket.beside
        held.held["gradients"] -= item * moved
        allocate()
        flush()

    return _replay(job.model.cast, held, feed, end)


def _tensors_of_a_share(job: _Job) -> int:
    """Elements of the tensors that reach into a share, for the process for which these are the most."""
    share = job.flat_share
    start = 0
    totals = [0] * job.world
    for count in job.model.optimized:
        end = start + count
        for rank in range(start // share, min(job.world - 1, (end - 1) // share) + 1):
            totals[rank] += count
        start = end
    return max(totals)


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
        kept["accumulated gradients"] = item * _tensors_of_a_share(job)
    return kept | _built(job)


# ZeRO-3


def _sharded(job: _Job) -> tuple[Bytes, Bytes]:
    item = job.item
    static = {
        "persistent parameters": item * sum(job.model.tensors[one] for one in job.persistent) if job.world > 1 else 0,
        "buckets": item * job.recipe.reduce_bucket_size,
    }
    static["parameters"] = job.model.buffers + (item * job.all_share if job.rung.params_on == "gpu" else 0)
    if not job.offloads:
        static["master weights"] = MASTER * job.share if item != MASTER or job.rung.params_on != "gpu" else 0
        static["optimizer"] = job.states * job.share
        static["gradients"] = item * job.share
    sharding = _Sharding(job)
    passing = _replay(job.model.cast, sharding.held, sharding.feed, sharding.flush)
    if job.cluster.cpu:
        static["buckets"] = item * sharding.bucket.most
    if job.offloads:
        return static, passing
    group = job.sub_group
    wide = MASTER * group if item != MASTER else 0
    norm = {"step": NORM * math.ceil(max(job.model.optimized, default=0) / job.world)}
    copied = {"step": item * group + wide}
    step = {"step": (1 + job.temporaries) * MASTER * group}
    return static, _most(passing, norm, copied, step)


@dataclass(slots=True)
class _Flight:
    """Tensors that are gathered ahead, in one buffer. The first that is waited for lets all be copied out of it, and it
    stays until the last one is."""

    bytes: int
    pending: set[int]
    landed: bool = False


class _Sharding:
    """What is gathered, and what waits to be reduced, in one forward and backward under ZeRO-3."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.held = _Held()
        self.bucket = _Bucket(job)
        self.uses = [event.tensors for event in job.model.cast if isinstance(event, Use)]
        self.next = _next_uses(self.uses, job.model.tensors)
        self.queue = deque((step, tensor) for step, tensors in enumerate(self.uses) for tensor in tensors)
        self.step = 0
        self.live: set[int] = set(job.persistent)
        self.flights: list[_Flight] = []

    def feed(self, event: Event) -> None:
        if isinstance(event, Gradient):
            self._reduce(self.job.model.tensors[event.tensor])
        elif self.job.world > 1:
            self._use(event.tensors)

    def _whole(self, tensors: Iterable[int]) -> int:
        """Bytes of gathered tensors: each is padded to the processes."""
        world = self.job.world
        return self.job.item * sum(world * math.ceil(self.job.model.tensors[one] / world) for one in tensors)

    def _use(self, tensors: tuple[int, ...]) -> None:
        if self.step:
            self._release(self.step - 1)
        wanted = {one for one in tensors if one not in self.live}
        self.live |= wanted
        self.held.spike = {"gathering": self._whole(wanted) if len(wanted) > 1 else 0}
        self._land(tensors)
        self._prefetch()
        self._tell()
        self.step += 1

    def _land(self, tensors: Iterable[int]) -> None:
        """What is used now has been waited for."""
        for flight in self.flights:
            if not flight.pending.isdisjoint(tensors):
                flight.landed = True
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
            _, one = self.queue.popleft()
            if one not in self.live:
                ahead.add(one)
                self.live.add(one)
                count += sizes[one]
        if len(ahead) > 1:
            self.flights.append(_Flight(bytes=self._whole(ahead), pending=set(ahead)))

    def _release(self, step: int) -> None:
        """Let go of what a module used, unless it is used again soon."""
        for one in self.uses[step]:
            distance = self.next[step].get(one)
            if one not in self.job.persistent and (distance is None or distance >= self.job.recipe.max_reuse_distance):
                self.live.discard(one)

    def _tell(self) -> None:
        self.held.held["gathered parameters"] = self._whole(self.live - self.job.persistent)
        self.held.held["prefetch"] = sum(flight.bytes for flight in self.flights if flight.landed)

    def _reduce(self, count: int) -> None:
        if self.bucket.is_full_for(count):
            self.flush()
        self.bucket.put(count)
        self.held.held["large gradients"] = self.job.item * self.bucket.beside

    def flush(self) -> None:
        went = self.bucket.empty()
        self.held.held["large gradients"] = 0
        self.held.spike = {"reduction": self.job.item * went}


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

"""What is trained, as far as memory is concerned: tensors, and what is held at each moment of a forward and backward.

A model comes of a simulation (`read_simulation`: inside/simulate.py ran it on fake tensors), or of a bare number of
parameters (`guess_model`: a transformer of ordinary proportions, by formula).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A module begins its forward, or its backward, and reads `tensors` (numbers of tensors of the model).

    `peak` and `level`: bytes of everything but parameters, buffers and gradients; the most since the event before
    this one, and now.
    """

    tensors: tuple[int, ...]
    peak: int
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """The gradient of one tensor is there; `peak` and `level` as in `Use`."""

    tensor: int
    peak: int
    level: int


Event = Use | Gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Elements of each tensor, in the order of the model's `parameters()`; whether each is trained; events.

    `cast` are the events where all weights have the job's precision, as under ZeRO, `autocast` those of plain mixed
    precision, whose weights are fp32. `buffers` in bytes. `simulated`: they were counted, not estimated.
    """

    tensors: tuple[int, ...]
    trained: tuple[bool, ...]
    cast: tuple[Event, ...]
    autocast: tuple[Event, ...]
    buffers: int = 0
    simulated: bool = True

    @property
    def parameters(self) -> int:
        """All elements."""
        return sum(self.tensors)

    @property
    def optimized(self) -> tuple[int, ...]:
        """Elements of each tensor that is trained."""
        return tuple(count for count, trained in zip(self.tensors, self.trained, strict=True) if trained)

    @property
    def largest_module(self) -> int:
        """Elements of the module that owns the most: what ZeRO-3 gathers at once."""
        uses = (event.tensors for event in self.cast if isinstance(event, Use))
        return max((sum(self.tensors[one] for one in tensors) for tensors in uses), default=0)

    @property
    def activations(self) -> int:
        """The most that is held beside parameters, buffers and gradients, where the weights are cast."""
        return max((event.peak for event in self.cast), default=0)


def read_simulation(said: Mapping[str, Any], *, where: str) -> Model:
    """The answer of inside/simulate.py; `InputError` with what it says kept the model from being run."""
    if "error" in said:
        raise InputError(
            f"this model cannot be simulated: {said['error']}",
            where=where,
            next_step="give --parameters instead of it: the activations are then estimated",
        )
    modules = _gathered(said["modules"], {index for kind, index, *_ in said["cast"] if kind == "use"})
    return Model(
        tensors=tuple(count for count, _ in said["tensors"]),
        trained=tuple(trained for _, trained in said["tensors"]),
        cast=tuple(_events(said["cast"], modules)),
        autocast=tuple(_events(said["autocast"], modules)),
        buffers=said["buffers"],
    )


def _gathered(said: Sequence[tuple[str, Sequence[int]]], used: Collection[int]) -> list[tuple[int, ...]]:
    """The tensors that ZeRO-3 gathers when a module is used: its own, and those of modules within it that are never
    called, as nn.MultiheadAttention reads the weight of its `out_proj` (DeepSpeed's "external parameters")."""
    numbers = {name: number for number, (name, _) in enumerate(said)}
    found = [list(tensors) for _, tensors in said]
    for number, (name, tensors) in enumerate(said):
        owner = name
        while owner and numbers[owner] not in used:
            owner = owner.rpartition(".")[0]
        if numbers[owner] != number:
            found[numbers[owner]] += tensors
    return [tuple(dict.fromkeys(tensors)) for tensors in found]


def _events(said: Sequence[Sequence[Any]], modules: Sequence[tuple[int, ...]]) -> Iterator[Event]:
    for kind, index, peak, level in said:
        if kind == "grad":
            yield Gradient(tensor=index, peak=peak, level=level)
        else:
            yield Use(tensors=modules[index] if index >= 0 else (), peak=peak, level=level)


_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmbt]?)", re.IGNORECASE)


def read_count(text: str, *, where: str) -> int:
    """A number of parameters: `7B`, `350M`, `1.3b`, `124439808`."""
    match = _COUNT.fullmatch(text)
    count = int(float(match[1]) * 1000 ** " kmbt".index(match[2].lower() or " ")) if match else 0
    if not count:
        raise InputError(f"{text!r} is no number of parameters", where=where, next_step="such as 7B or 350M")
    return count


# --- a bare number of parameters -------------------------------------------------------------------------------------

ASPECT = 128  # width / depth: 128 in a Llama 7B and 13B, 102 at 70B, 64 in a GPT-2
VOCABULARY = 50_000


def guess_model(parameters: int, *, micro_batch: int, sequence: int, checkpointing: bool, item: int) -> Model:
    """A decoder of ordinary proportions with about so many parameters; `item` is the bytes of one activation.

    A layer of width h has 12 h² parameters; embedding and head have h times the vocabulary each. At two bytes,
    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198, eq. 1),
    count 34·s·b·h bytes a layer that are kept for backward, and 5·a·s²·b of attention scores, which no fused attention
    keeps (Dao et al. 2022, arXiv:2205.14135). That is s·b·h·(16·item + 2); here it is 21, since layers of today have
    a gated feed-forward part and norms in fp32: a simulated Llama keeps 44·s·b·h. With checkpointing the input of each
    layer is kept, s·b·h·item, and one layer is computed again. At the end there are the logits, in fp32 too, their
    log-probabilities and their gradients.
    """
    depth = max(1, round((parameters / (12 * ASPECT**2)) ** (1 / 3)))
    width = max(1, round((parameters / (12 * depth)) ** 0.5 / 64)) * 64
    vocabulary = max(1, min(VOCABULARY, parameters // (6 * width)))
    table = vocabulary * width
    layer = max(2, (parameters - 2 * table) // depth)
    halves = (layer // 3, layer - layer // 3)  # attention, and the rest
    tensors = (table, *(half for _ in range(depth) for half in halves), table)
    batch = micro_batch * sequence
    inside = batch * width * (21 * item + 2)
    kept = batch * width * item if checkpointing else inside
    events = tuple(
        _transformer(
            depth, inside=inside, kept=kept, moving=8 * batch * width * item, logits=batch * vocabulary * (item + 16)
        )
    )
    return Model(tensors=tensors, trained=(True,) * len(tensors), cast=events, autocast=events, simulated=False)


def _transformer(depth: int, *, inside: int, kept: int, moving: int, logits: int) -> Iterator[Event]:
    """Forward and backward over an embedding, `depth` layers of two modules, and a head."""
    last = 2 * depth + 1
    yield Use(tensors=(0,), peak=0, level=0)
    for module in range(1, last):
        held = kept * (module - 1) // 2
        yield Use(tensors=(module,), peak=held + inside - kept, level=held)
    held = kept * depth
    yield Use(tensors=(last,), peak=held + inside - kept, level=held)
    yield Use(tensors=(last,), peak=held + logits, level=held + logits)
    yield Gradient(tensor=last, peak=held + logits, level=held)
    again = inside if kept < inside else 0  # computed a second time, from what was kept
    for module in reversed(range(1, last)):
        held = kept * (module - 1) // 2 + kept // 2
        yield Use(tensors=(module,), peak=held + again + moving, level=held + again)
        yield Gradient(tensor=module, peak=held + again + moving, level=kept * (module - 1) // 2)
    yield Use(tensors=(0,), peak=moving, level=moving)
    yield Gradient(tensor=0, peak=moving, level=0)
    yield Use(tensors=(), peak=0, level=0)

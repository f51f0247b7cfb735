"""What has to travel so that nodes have an image, from where, and which way. Never the sending."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Way = Literal["direct", "relay"]
Source = Literal["push", "save"]

# Below this a transfer that breaks may begin anew, and a chain costs more than it saves: its connections take a second.
SMALL = 48 << 20
SLOWER = 4  # a push that compresses, beside a save: 75 and 18 s a GB were measured
FEW = 8  # what is less than this part of an image is a small change
ENOUGH = 2  # neighbours that have failed a node


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Nodes that lack the same: all layers from number `have` on."""

    have: int
    nodes: tuple[str, ...]


def batches(have: Mapping[str, int]) -> tuple[Batch, ...]:
    """Who gets what together; those who lack least come first, since they are done soonest."""
    counts = sorted(set(have.values()), reverse=True)
    return tuple(Batch(have=count, nodes=tuple(node for node, its in have.items() if its == count)) for count in counts)


def choose_source(*, size: int, new: int, compressed: int) -> Source:
    """How to get layers from an engine; all in bytes, unpacked.

    `save` reads the whole image of `size`. `push` reads only what is asked for; but of layers that the engine has never
    pushed, `compressed`, it makes gzip first, by one core, four times as slowly. Where little is `new`, those layers
    have been here with an earlier image, and will be with later ones: this one push pays for all that follow.
    """
    is_quicker = SLOWER * compressed <= size
    return "push" if is_quicker or new <= size // FEW else "save"


def choose_way(size: int, nodes: Sequence[str]) -> Way:
    """How an archive of `size` bytes gets to these nodes: to each from here, or kept on the nodes and handed on."""
    return "relay" if size * len(nodes) > SMALL else "direct"


def order(have: Mapping[str, int]) -> tuple[str, ...]:
    """The chain: who has most bytes already is first, so that nobody waits for a node that has less than itself."""
    return tuple(sorted(have, key=lambda node: -have[node]))


def next_source(node: str, chain: Sequence[str], *, able: Collection[str], tried: Collection[str]) -> str | None:
    """From whom a node takes its bytes: the nearest before it in the chain; None for this machine.

    `able` can give, `tried` have failed this node. After two of them it is fed from here: whatever keeps nodes from
    each other, a firewall most likely, would cost a wait with each.
    """
    if len(tried) >= ENOUGH:
        return None
    before = chain[: chain.index(node)]
    return next((one for one in reversed(before) if one in able and one not in tried), None)

"""What has to travel so that nodes have an image, from where, and which way. Never the sending."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Way = Literal["direct", "relay"]
Source = Literal["push", "save"]

# Below this a transfer that breaks may begin anew, and a chain costs more than it saves: its connections take a second.
SMALL = 48 << 20
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


def choose_source(*, have: int) -> Source:
    """How to get layers from an engine that nobody has read yet.

    `save` reads the whole image, at a second per 60 MB; `push` only what is asked for, but where the engine has never
    pushed a layer it compresses that first, by one core, at a quarter of the speed. A node that has nothing needs the
    whole anyway. A node that has the lower layers will get other upper ones again: the first push pays for all later.
    """
    return "push" if have else "save"


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

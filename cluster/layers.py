"""Images as values: what an engine holds, layer by layer, and what of an image it lacks. Never the moving of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

# classic: Docker's own store; takes an archive that lacks layers which it has. containerd: Docker's other one; wants
# every layer, and calls an image by the digest of its manifest instead of its configuration's. other: podman and such.
Store = Literal["classic", "containerd", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An image that an engine has. `layers` are the digests of its layers' contents, the lowest first."""

    id: str
    tags: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    size: int = 0  # bytes, unpacked
    labels: dict[str, str] = field(default_factory=dict)
    created: str = ""  # RFC 3339


def shared(layers: Sequence[str], held: Iterable[Held]) -> int:
    """How many of the lowest layers an engine has already.

    It keeps a layer by all that is below it, so only a common beginning counts; and who has one has all below it.
    """
    return max((_common(layers, one.layers) for one in held), default=0)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count

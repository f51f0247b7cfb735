"""Events: what happened to a run, as values. The only memory; everything shown later is read from them.

Each is one JSON line `{"event": "NodeEnded", "time": 1700000000.1, …}`; unknown events of a newer version are skipped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened at `time` (seconds since 1970, our clock)."""

    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBegan(Event):
    """A launch was planned: these nodes in the order of their ranks."""

    run: str
    cluster: str
    nodes: tuple[str, ...]
    world_size: int
    command: tuple[str, ...]
    starter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBegan(Event):
    """One of build, ship, prepare, start, watch, stop."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeArrived(Event):
    """A node has the snapshot; `bytes` had to be sent for it."""

    node: str
    digest: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStarted(Event):
    """A node's container runs."""

    node: str
    container: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one rank ended badly, as its own node saw it."""

    rank: int | None
    exit_code: int
    signal: str | None
    time: float
    type: str | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEnded(Event):
    """A node's container ended. `stopped` when it was told to, `oom` when the kernel killed it for memory.

    `others` is what the node's guard heard of the other nodes. Times of failures are by the first node's clock, as far
    as the guards could find out how the clocks differ.
    """

    node: str
    code: int
    oom: bool = False
    stopped: bool = False
    lost: str = ""
    failures: tuple[Failure, ...] = ()
    others: tuple[NodeEnded, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """The run is over on every node; `cause` is the first cause when it did not end well."""

    code: int
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointVerified(Event):
    """A checkpoint of the run was read again on these nodes; `flaws` is empty when all of it was as it had been."""

    unit: str
    nodes: tuple[str, ...]
    bytes: int
    flaws: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPlaced(Event):
    """A whole checkpoint, or what was made of it, lies at `place` in `folder`; `bytes` had to be sent for it.

    `how` is one of gathered, scattered, exported, universal.
    """

    how: str
    unit: str
    place: str
    folder: str
    bytes: int


KINDS: tuple[type[Event], ...] = (
    RunBegan,
    StageBegan,
    CodeArrived,
    NodeStarted,
    NodeEnded,
    RunEnded,
    CheckpointVerified,
    CheckpointPlaced,
)
Emit = Callable[[Event], None]


def to_json(event: Event) -> str:
    """One line, without its end."""
    # In ASCII: a rank's last words may hold lone surrogates, which no file can, and what some take for a line's end.
    return json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)})


def from_json(line: str) -> Event | None:
    """The event of a line; None for a torn line, or an event of a newer version."""
    try:
        said: dict[str, Any] = json.loads(line)
        name = said.pop("event")
        kind = next(kind for kind in KINDS if kind.__name__ == name)
        return kind(**_values(said))
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError):
        return None


def _values(said: dict[str, Any]) -> dict[str, Any]:
    """The fields of an event, from lists to tuples, and what is itself of several fields."""
    made = {field: tuple(value) if isinstance(value, list) else value for field, value in said.items()}
    if "failures" in said:
        made["failures"] = tuple(Failure(**failure) for failure in said["failures"])
    if "others" in said:
        made["others"] = tuple(NodeEnded(**_values(other)) for other in said["others"])
    return made

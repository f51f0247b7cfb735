"""The state of a run: a reading of its events. The live view and the report after a crash use the same function."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

from launcher.events import Event, NodeEnded, NodeStarted, RunBegan, RunEnded, StageBegan
from launcher.inside import cause


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What is known of one run. `phase` is the stage it is in, then "done", "failed" or "stopped"."""

    run: str = ""
    cluster: str = ""
    nodes: tuple[str, ...] = ()
    world_size: int = 0
    command: tuple[str, ...] = ()
    starter: str = ""
    phase: str = "planned"
    began: float = 0.0
    ended: float | None = None
    started: tuple[str, ...] = ()
    ends: Mapping[str, NodeEnded] = field(default_factory=dict)
    code: int | None = None
    cause: str = ""

    @property
    def is_over(self) -> bool:
        """Whether the run has ended on every node, and this was told."""
        return self.code is not None


def fold(events: Iterable[Event]) -> RunState:
    """The state that these events amount to."""
    return functools.reduce(after, events, RunState())


def after(state: RunState, event: Event) -> RunState:
    """The state after one more event."""
    if isinstance(event, RunBegan):
        return replace(
            state,
            run=event.run,
            cluster=event.cluster,
            nodes=event.nodes,
            world_size=event.world_size,
            command=event.command,
            starter=event.starter,
            began=event.time,
        )
    if isinstance(event, StageBegan):
        return replace(state, phase=event.stage)
    if isinstance(event, NodeStarted):
        return replace(state, started=(*state.started, event.node))
    if isinstance(event, NodeEnded):
        return replace(state, ends={**state.ends, event.node: event})
    if isinstance(event, RunEnded):
        phase = "done" if event.code == 0 else "stopped" if event.code == INTERRUPTED else "failed"
        return replace(state, code=event.code, cause=event.cause, ended=event.time, phase=phase)
    return state


INTERRUPTED = 130


def first_cause(ends: Mapping[str, NodeEnded]) -> tuple[str, str] | None:
    """The node that failed first and how, in one line; None when every node ended well or was told to stop."""
    return cause.first_cause(asdict(end) for end in ends.values())


def node_end(end: NodeEnded) -> str:
    """How one node ended, in a line that does not name it; empty when it ended well."""
    return cause.node_end(asdict(end))

"""The state of a run: a reading of its events. The live view and the report after a crash use the same function."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from launcher.events import Event, Failure, NodeEnded, NodeStarted, RunBegan, RunEnded, StageBegan


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What is known of one run. `phase` is the stage it is in, then "done", "failed" or "stopped"."""

    run: str = ""
    cluster: str = ""
    nodes: tuple[str, ...] = ()
    world_size: int = 0
    command: tuple[str, ...] = ()
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

# What a rank says when it was another one that died: never the first cause while there is any other.
_ECHO = re.compile(
    r"connection (closed|reset) by|broken pipe|connection refused|socket (timeout|closed)|remote process exited"
    r"|timed out waiting|store.*(lost|closed)|heartbeat|nccl.*(abort|remote error)|peer",
    re.IGNORECASE,
)


def first_cause(ends: Mapping[str, NodeEnded]) -> tuple[str, str] | None:
    """The node that failed first and how, in one line; None when every node ended well or was told to stop.

    Of all failures of all nodes the earliest that is not merely an echo of another one's death; else the earliest end
    that nobody could explain (a lost node), whose echo the others may be. A signal or an out-of-memory kill is never
    an echo: no collective dies of one.
    """
    bad = [end for end in ends.values() if end.code != 0 and not end.stopped]
    failures = sorted(_each(bad), key=_earliest)
    silent = [(end.time, end.node, _end(end)) for end in bad if not end.oom and not end.failures]
    if failures and not (silent and _is_echo(*failures[0])):
        end, failure = failures[0]
        return end.node, _failure(failure, end)
    return min(silent)[1:] if silent else None


def node_end(end: NodeEnded) -> str:
    """How one node ended, in a line that does not name it; empty when it ended well."""
    if end.code == 0:
        return ""
    failures = sorted(_each([end]), key=_earliest)
    if failures and not _is_echo(*failures[0]):
        failure = failures[0][1]
        return f"{'' if failure.rank is None else f'rank {failure.rank}: '}{_how(failure, end)}"
    if failures or end.stopped:
        return "it was stopped, or broke off, because another node had failed"
    return end.lost or f"exit {end.code}"


def _earliest(one: tuple[NodeEnded, Failure]) -> tuple[bool, float, str, int]:
    end, failure = one
    return _is_echo(end, failure), failure.time, end.node, -1 if failure.rank is None else failure.rank


def _each(bad: Iterable[NodeEnded]) -> Iterable[tuple[NodeEnded, Failure]]:
    return [(end, failure) for end in bad if not end.oom for failure in end.failures] + [
        (end, Failure(rank=None, exit_code=end.code, signal=None, time=0.0, type=None, message=""))
        for end in bad
        if end.oom
    ]


def _is_echo(end: NodeEnded, failure: Failure) -> bool:
    return not end.oom and failure.signal in (None, "SIGABRT") and bool(_ECHO.search(failure.message))


def _failure(failure: Failure, end: NodeEnded) -> str:
    rank = f", rank {failure.rank}" if failure.rank is not None else ""
    return f"node {end.node}{rank}: {_how(failure, end)}"


def _how(failure: Failure, end: NodeEnded) -> str:
    if end.oom:
        return "out of memory: the kernel killed it at the container's limit"
    if failure.signal:
        return f"killed by {failure.signal}"
    if failure.type == "SystemExit":  # its message is the code again, or was printed by Python already
        return f"exit {failure.exit_code}"
    said = ": ".join(part for part in (failure.type, _one_line(failure.message)) if part)
    return f"exit {failure.exit_code}{': ' + said if said else ''}"


def _end(end: NodeEnded) -> str:
    if end.lost:
        return f"node {end.node}: {end.lost}"
    return f"node {end.node}: exit {end.code}"


def _one_line(text: str, *, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"

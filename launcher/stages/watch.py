"""Watch: one run on all nodes as one thing, from its start (or from wherever we come in) to its end.

Per node two threads: one waits for the container's end, one follows its log. The log on the node is the only source;
its mirror here is the cursor, so that nothing is lost or repeated, however often the line drops or we are restarted.
A silent node is not a failed one: only after its `node_grace` is it given up.
"""

from __future__ import annotations

import json
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.command import Command
from cluster.container import LABEL_CLUSTER, LABEL_NODE, LABEL_OWNER, LABEL_ROLE, Container, ContainerState
from cluster.errors import EngineError, Interrupted, NodeError
from cluster.fleet import Machine, each
from launcher.events import Emit, Failure, NodeEnded, RunEnded, StageBegan
from launcher.inside import cause
from launcher.job import NODE_GRACE
from launcher.render import ROLE_NODE
from launcher.stages.logs import Mirror, Show
from launcher.state import INTERRUPTED, first_cause

RETRY = 1.0  # seconds between two attempts to reach it again
KILLED = 137  # the code of a container that was killed, as one is that is removed
RESTARTED = "Docker, or the machine, was restarted or stopped there: that ends its containers"
PATIENCE = 3.0  # seconds that a node has to end what it was told to end, before a third Ctrl-C leaves it


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """One node's part of the run: its container, and where its log is on the node and here."""

    machine: Machine
    container: str
    out: str
    mirror: Path
    grace: float
    start: int = 0  # how much of the log has been shown already, in bytes
    node_grace: float = NODE_GRACE  # seconds of silence before the node is given up


class Detached(Interrupted):
    """The user left; the run goes on."""

    def __init__(self) -> None:
        super().__init__(
            "left; the run goes on by itself", next_step="launcher attach, launcher logs -f, launcher stop"
        )


def watch(
    parts: Sequence[Watched],
    *,
    emit: Emit,
    show: Show,
    own: bool,
    clear: bool,
    lost: Mapping[str, NodeEnded] | None = None,
    clock: Callable[[], float] = time.time,
) -> RunEnded:
    """Follow the run to its end on every node, stop the others when one ends badly, and say how it ended.

    `show(node, line)` hears every complete log line. When the command owns the run, Ctrl-C stops it in order, a second
    one ends it at once, a third one leaves what cannot be stopped; else Ctrl-C raises `Detached`. With `clear` the
    containers are removed at the end; else they stay for their owner to see. `lost` are nodes of the run that cannot be
    watched.
    """
    ends: dict[str, NodeEnded] = {}
    arrivals: queue.SimpleQueue[NodeEnded | BaseException | None] = queue.SimpleQueue()
    followers = [Mirror(part.machine, out=part.out, path=part.mirror, show=show, start=part.start) for part in parts]
    stopping = by_user = False
    interrupts, told = 0, 0.0
    with _interrupts(arrivals):
        for part, follower in zip(parts, followers, strict=True):
            threading.Thread(target=_await, args=(part, follower, arrivals, clock), daemon=True).start()
        while len(ends) < len(parts):
            try:
                # Short waits: a signal just before a long one would be noticed only after it.
                arrived = arrivals.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(arrived, BaseException):
                raise arrived
            if arrived is None and not own:
                for follower in followers:
                    follower.leave()
                raise Detached
            if arrived is None:
                interrupts += 1
                if interrupts > 2 and time.monotonic() - told > PATIENCE:  # noqa: PLR2004 - asked, told, and not gone
                    raise _left(parts, ends)
                told = time.monotonic()
                by_user = by_user or not stopping
                stopping = True
                _stop(parts, ends, now=interrupts > 1)
                if interrupts == 1:
                    emit(StageBegan(time=clock(), stage="stop"))
                continue
            ends[arrived.node] = arrived
            if arrived.code != 0 and not stopping:
                stopping = True
                _stop(parts, ends, now=False)
            emit(arrived)
    end = _verdict({**(lost or {}), **ends}, interrupted=by_user, now=clock())
    emit(end)  # first: who is killed in between leaves a run whose end is known, not one of which nothing is left
    if clear:
        _clear(parts)
    return end


@contextmanager
def _interrupts(arrivals: queue.SimpleQueue[NodeEnded | BaseException | None]) -> Iterator[None]:
    """Ctrl-C arrives as None, like everything else that happens: so it comes at no wrong moment."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda _number, _frame: arrivals.put(None))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _verdict(ends: Mapping[str, NodeEnded], *, interrupted: bool, now: float) -> RunEnded:
    if interrupted:
        return RunEnded(time=now, code=INTERRUPTED, cause="stopped by the user")
    first = first_cause(ends)
    if first is not None:
        return RunEnded(time=now, code=1, cause=first[1])
    if any(end.stopped for end in ends.values()):
        return RunEnded(time=now, code=INTERRUPTED, cause="stopped from outside (launcher stop, or down)")
    return RunEnded(time=now, code=0)


def _left(parts: Sequence[Watched], ends: Mapping[str, NodeEnded]) -> Interrupted:
    nodes = [part.machine.name for part in parts if part.machine.name not in ends]
    return Interrupted(
        f"left; the run could not be stopped on {', '.join(nodes)}",
        next_step="launcher down, as soon as they answer again",
    )


def _stop(parts: Sequence[Watched], ends: Mapping[str, NodeEnded], *, now: bool) -> None:
    """Ask those that still run to end, all at once; their waiting threads will see the end."""
    for part in parts:
        if part.machine.name not in ends:
            grace = 0.0 if now else part.grace
            threading.Thread(target=_stop_one, args=(part, ends, grace), daemon=True).start()


def _stop_one(part: Watched, ends: Mapping[str, NodeEnded], grace: float) -> None:
    while part.machine.name not in ends:
        try:
            part.machine.engine.stop(part.container, grace=grace)
            return
        except NodeError:
            time.sleep(RETRY)  # not to be reached just now: the waiting thread gives it up, or it comes back


def _clear(parts: Sequence[Watched]) -> None:
    each([part.machine for part in parts], _Clear(parts), deadline=15)


class _Clear:
    def __init__(self, parts: Sequence[Watched]) -> None:
        self._ids = {part.machine.name: part.container for part in parts}

    def __call__(self, machine: Machine) -> None:
        machine.engine.remove(self._ids[machine.name])


def _await(
    part: Watched,
    follower: Mirror,
    arrivals: queue.SimpleQueue[NodeEnded | BaseException | None],
    clock: Callable[[], float],
) -> None:
    follower.start()
    try:
        arrivals.put(_end_of(part, follower, clock))
    except BaseException as error:  # noqa: BLE001 - a bug: it must be heard of, or the watch would wait for ever
        arrivals.put(error)


def _end_of(part: Watched, follower: Mirror, clock: Callable[[], float]) -> NodeEnded:
    engine, silent_since = part.machine.engine, None
    while True:
        try:
            if silent_since is not None:
                engine.version()  # it answers again: this silence is over
                silent_since = None
            end = _read_end(part, engine.wait(part.container), clock())
            follower.finish()
            return end
        except NodeError as error:
            now = time.monotonic()
            silent_since = silent_since or now
            # The engine itself went away (restarted, removed): the container may be gone for good.
            gone = _gone(part, clock()) if isinstance(error, EngineError) else None
            if gone is None and now - silent_since <= part.node_grace:
                time.sleep(RETRY)
                continue
            if isinstance(error, EngineError):
                follower.finish()
            follower.leave()
            lost = f"lost: {error.what}, silent for {part.node_grace:.0f} s"
            return gone or NodeEnded(time=clock(), node=part.machine.name, code=1, lost=lost)


def _gone(part: Watched, now: float) -> NodeEnded | None:
    """How the run ended here when its container is no longer there; None while that cannot be said."""
    try:
        end = read_exit(part.machine.name, _exit_json(part), now=now)
        if end:
            return end
        found = part.machine.engine.find({})
    except NodeError:
        return None
    if any(one.id == part.container for one in found):
        return None
    return NodeEnded(time=now, node=part.machine.name, code=137, stopped=True)


def _read_end(part: Watched, ended: Container, now: float) -> NodeEnded:
    code = 1 if ended.code is None else ended.code
    end = read_exit(part.machine.name, _exit_json(part), now=now, code=code, oom=ended.oom)
    if (end is None or end.stopped) and _restarted(part, ended):
        why = Failure(rank=None, exit_code=code or 1, signal=None, time=now, type=cause.RESTART, message=RESTARTED)
        return NodeEnded(time=now, node=part.machine.name, code=code or 1, failures=(why,))
    if end:
        return end
    # The agent itself did not live to say it: what the container printed last is all there is.
    last = part.machine.engine.logs(part.container, tail=3).strip().splitlines() if code else []
    lost = f"exit {code}: {last[-1]}" if last else ""
    return NodeEnded(time=now, node=part.machine.name, code=code, oom=ended.oom, lost=lost)


def _restarted(part: Watched, ended: Container) -> bool:
    """Whether the node's idle container has ended as well: nobody else ends that one, but kills and removes it."""
    labels = {name: ended.labels.get(name, "") for name in (LABEL_CLUSTER, LABEL_OWNER, LABEL_NODE)}
    idle = part.machine.engine.find({**labels, LABEL_ROLE: ROLE_NODE})
    return any(one.state is ContainerState.ENDED and one.code != KILLED for one in idle)


def _exit_json(part: Watched) -> str:
    return part.machine.transport.run(Command(argv=("cat", f"{part.out}/exit.json")), timeout=10).text


def read_exit(node: str, text: str, *, now: float, code: int | None = None, oom: bool = False) -> NodeEnded | None:
    """The agent's exit.json as an event, None where it is missing or torn; `code` and `oom` are the engine's word."""
    try:
        said = json.loads(text)
        own = int(said["code"])
        ahead = float(said.get("clock") or 0)
        return NodeEnded(
            time=now,
            node=node,
            code=own if code is None else code,
            oom=oom or bool(said.get("oom")),
            stopped=bool(said.get("stopped")),
            failures=_failures(said, ahead=ahead),
            others=tuple(_heard_of(other, ahead=ahead) for other in said.get("others") or ()),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _failures(said: Mapping[str, Any], *, ahead: float) -> tuple[Failure, ...]:
    return tuple(
        Failure(
            rank=one.get("rank"),
            exit_code=int(one.get("exit_code") or 1),
            signal=one.get("signal"),
            time=float(one.get("time") or 0) - ahead,
            type=one.get("type"),
            message=str(one.get("message") or ""),
        )
        for one in said.get("failures") or ()
    )


def _heard_of(said: Mapping[str, Any], *, ahead: float) -> NodeEnded:
    return NodeEnded(
        time=float(said["time"]) - ahead,
        node=str(said["node"]),
        code=int(said["code"]),
        oom=bool(said.get("oom")),
        stopped=bool(said.get("stopped")),
        lost=str(said.get("lost") or ""),
        failures=_failures(said, ahead=ahead),
    )

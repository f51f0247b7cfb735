"""Watch: one run on all nodes as one thing, from its start (or from wherever we come in) to its end.

Per node two threads: one waits for the container's end, one follows its log. The log on the node is the only source;
its mirror here is the cursor, so that nothing is lost or repeated, however often the line drops or we are restarted.
A silent node is not a failed one: only after `GRACE` seconds is it given up.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.command import Command
from cluster.container import Container
from cluster.errors import EngineError, Interrupted, NodeError, UnreachableError
from cluster.fleet import Machine, each
from launcher import render
from launcher.events import Emit, Failure, NodeEnded, RunEnded, StageBegan
from launcher.stages.logs import Mirror, Show
from launcher.state import INTERRUPTED, first_cause

GRACE = 60.0  # seconds of silence before a node is given up
RETRY = 1.0  # seconds between two attempts to reach it again


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """One node's part of the run: its container, and where its log is on the node and here."""

    machine: Machine
    container: str
    out: str
    mirror: Path


class Detached(Interrupted):
    """The user left; the run goes on."""

    def __init__(self) -> None:
        super().__init__(
            "left; the run goes on by itself", next_step="launcher attach, launcher logs -f, launcher stop"
        )


def watch(
    parts: Sequence[Watched], *, emit: Emit, show: Show, own: bool, clock: Callable[[], float] = time.time
) -> RunEnded:
    """Follow the run to its end on every node, stop the others when one ends badly, and say how it ended.

    `show(node, line)` hears every complete log line. When the command owns the run, Ctrl-C stops it in order and a
    second one ends it at once; else Ctrl-C raises `Detached`. The containers are removed at the end.
    """
    ends: dict[str, NodeEnded] = {}
    arrivals: queue.Queue[NodeEnded] = queue.Queue()
    followers = [Mirror(part.machine, out=part.out, path=part.mirror, show=show) for part in parts]
    for part, follower in zip(parts, followers, strict=True):
        threading.Thread(target=_await, args=(part, follower, arrivals, clock), daemon=True).start()
    stopping = interrupted = 0
    while len(ends) < len(parts):
        try:
            end = arrivals.get(timeout=0.2)
        except queue.Empty:
            continue
        except KeyboardInterrupt:
            if not own:
                for follower in followers:
                    follower.leave()
                raise Detached from None
            interrupted += 1
            if interrupted == 1:
                emit(StageBegan(time=clock(), stage="stop"))
            stopping += 1
            _stop(parts, ends, grace=render.STOP_GRACE if interrupted == 1 else 0)
            continue
        ends[end.node] = end
        emit(end)
        if end.code != 0 and not stopping:
            stopping += 1
            _stop(parts, ends, grace=render.STOP_GRACE)
    _clear(parts)
    return _verdict(ends, interrupted=bool(interrupted), now=clock())


def _verdict(ends: Mapping[str, NodeEnded], *, interrupted: bool, now: float) -> RunEnded:
    if interrupted:
        return RunEnded(time=now, code=INTERRUPTED, cause="stopped by the user")
    cause = first_cause(ends)
    if cause is not None:
        return RunEnded(time=now, code=1, cause=cause[1])
    if any(end.stopped for end in ends.values()):
        return RunEnded(time=now, code=INTERRUPTED, cause="stopped from outside (launcher stop, or down)")
    return RunEnded(time=now, code=0)


def _stop(parts: Sequence[Watched], ends: Mapping[str, NodeEnded], *, grace: float) -> None:
    """Ask those that still run to end, all at once; their waiting threads will see the end."""
    for part in parts:
        if part.machine.name not in ends:
            threading.Thread(target=_stop_one, args=(part, grace), daemon=True).start()


def _stop_one(part: Watched, grace: float) -> None:
    try:
        part.machine.engine.stop(part.container, grace=grace)
    except NodeError:
        return  # unreachable: the waiting thread knows, and says so


def _clear(parts: Sequence[Watched]) -> None:
    each([part.machine for part in parts], _Clear(parts), deadline=15)


class _Clear:
    def __init__(self, parts: Sequence[Watched]) -> None:
        self._ids = {part.machine.name: part.container for part in parts}

    def __call__(self, machine: Machine) -> None:
        machine.engine.remove(self._ids[machine.name])


def _await(part: Watched, follower: Mirror, arrivals: queue.Queue[NodeEnded], clock: Callable[[], float]) -> None:
    follower.start()
    silent_since: float | None = None
    while True:
        try:
            ended = part.machine.engine.wait(part.container)
            follower.finish()
            arrivals.put(_read_end(part, ended, clock()))
            return
        except UnreachableError as error:
            now = time.monotonic()
            silent_since = silent_since or now
            if now - silent_since > GRACE:
                follower.leave()
                lost = f"lost: {error.what}, silent for {GRACE:.0f} s"
                arrivals.put(NodeEnded(time=clock(), node=part.machine.name, code=1, lost=lost))
                return
            time.sleep(RETRY)
        except EngineError as error:
            # The engine itself went away (restarted, removed): the container may be gone for good.
            gone = _gone(part)
            if gone is None:
                time.sleep(RETRY)
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since <= GRACE:
                    continue
            follower.finish()
            arrivals.put(gone or NodeEnded(time=clock(), node=part.machine.name, code=1, lost=f"lost: {error.what}"))
            return


def _gone(part: Watched) -> NodeEnded | None:
    """How the run ended here when its container is no longer there; None while that cannot be said."""
    try:
        exit_json = part.machine.transport.run(Command(argv=("cat", f"{part.out}/exit.json")), timeout=10)
        if exit_json.ok:
            return read_exit(part.machine.name, exit_json.text, now=time.time())
        found = part.machine.engine.find({})
    except NodeError:
        return None
    if any(one.id == part.container for one in found):
        return None
    return NodeEnded(time=time.time(), node=part.machine.name, code=137, stopped=True)


def _read_end(part: Watched, ended: Container, now: float) -> NodeEnded:
    said = part.machine.transport.run(Command(argv=("cat", f"{part.out}/exit.json")), timeout=10)
    end = read_exit(part.machine.name, said.text, now=now, code=ended.code or 0, oom=ended.oom)
    if said.ok or end.code == 0:
        return end
    # The agent itself did not live to say it: what the container printed last is all there is.
    last = part.machine.engine.logs(part.container, tail=3).strip().splitlines()
    return NodeEnded(
        time=now, node=end.node, code=end.code, oom=end.oom, lost=f"exit {end.code}: {last[-1]}" if last else ""
    )


def read_exit(node: str, text: str, *, now: float, code: int | None = None, oom: bool = False) -> NodeEnded:
    """The agent's exit.json as an event; `code` and `oom` are the engine's own word."""
    try:
        said = json.loads(text)
    except ValueError:
        said = {}
    failures = tuple(
        Failure(
            rank=one.get("rank"),
            exit_code=int(one.get("exit_code") or 1),
            signal=one.get("signal"),
            time=float(one.get("time") or 0),
            type=one.get("type"),
            message=str(one.get("message") or ""),
        )
        for one in said.get("failures") or ()
    )
    return NodeEnded(
        time=now,
        node=node,
        code=int(said.get("code") or 0) if code is None else code,
        oom=oom,
        stopped=bool(said.get("stopped")),
        failures=failures,
    )

"""Relay: an archive goes to many nodes as to one. Each keeps it in a file and hands it on while it grows.

The first node of the chain is fed from here, every other one fetches from the one before it, node to node. Between
nodes the bytes go over an sshd that each node runs for this one transfer, as its own user: it shows a key that was
made a moment ago and pinned by us, lets in the keys that the other nodes made a moment ago, and those can read this
one file and do nothing else. The keys lie in memory, never travel, and are worth nothing once that sshd has ended,
which is when our connection to the node does. Nobody's authorized_keys is touched. See docs/decisions/010.

A node that goes is routed around: who fetched from it goes on from the one before, at the byte where it was. What a
node has of an archive stays when the transfer breaks, so the next one goes on there.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from cluster.command import Result, script
from cluster.errors import CommandError, ImageError, NodeError, UnreachableError
from cluster.fleet import Answers, Machine
from launcher.delta import next_source, order
from launcher.errors import BusyError
from launcher.stages.relay_scripts import FEED, HELD, LOAD, RELAY, SAVE

Progress = Callable[[str, int, int], None]

PREFIX = b"launcher: "  # what an account's start-up files print is none of ours
READY = 60.0  # seconds for every node to make its keys
TICK = 5.0  # seconds between two signs of life from us; a node that hears none for a minute puts everything away
GOODBYE = 5.0  # seconds for all nodes to put their keys away
_WORD = re.compile(r"[A-Za-z0-9_.+/=$-]+")  # what nodes say of themselves goes to other nodes
_SPARE = 64 << 20  # bytes that stay free on a node's disk


class Parcel(Protocol):
    """What is sent: the same bytes whenever it has the same name."""

    @property
    def name(self) -> str:
        """By which a node goes on with what it has."""

    @property
    def size(self) -> int:
        """Bytes."""

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on."""

    def digest(self) -> str:
        """SHA-256 of all of them, in hex."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """An archive that lies on a node, and cannot be fed from here."""

    node: str
    name: str
    size: int
    hashed: str

    def digest(self) -> str:
        return self.hashed

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        raise CommandError(self.node, f"it cannot hand on its image (from byte {start} on)")


def save_there(machine: Machine, road: Road, *, digest: str) -> Saved:
    """Let a node save an image that it has into its folder, so that others can fetch it."""
    name = f"saved-{digest.rpartition(':')[2][:32]}"
    said = machine.transport.send(script(SAVE, road.folder, name, digest), ())
    match said.text.split()[-3:]:  # an account's start-up files may have said something before
        case [size, hashed, "-"] if said.ok and size.isdigit():
            return Saved(node=machine.name, name=name, size=int(size), hashed=hashed)
        case _:
            raise ImageError(machine.name, "the image cannot be saved there", detail=said.tail())


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """Where a node keeps what is being sent, and its address for the other nodes (none: it stands alone)."""

    folder: str
    address: str | None = None


def relay(
    parcel: Parcel,
    machines: Sequence[Machine],
    roads: Mapping[str, Road],
    progress: Progress,
    *,
    source: Machine | None = None,
) -> Answers[int]:
    """Bring an archive to these machines' engines; gives back the bytes that each one took.

    From here, or from `source`, a node that has it in its folder. One machine that fails does not hold the others up.
    """
    chain = _Chain(parcel, machines, roads, progress, source=source)
    try:
        chain.run()
    finally:
        chain.close()
    wanted = {machine.name for machine in machines}
    return Answers(
        good={node: taken for node, taken in chain.sent.items() if node in wanted},
        bad={node: error for node, error in chain.failed.items() if node in wanted},
    )


@dataclass(kw_only=True)
class _Node:
    machine: Machine
    road: Road
    orders: queue.Queue[bytes | None] = field(default_factory=queue.Queue)
    at: int = 0
    first: int = 0  # where it was when it began
    ready: bool = False
    user: str = ""
    port: str = "-"
    host_key: str = "-"
    client_key: str = "-"
    whole: bool = False
    source: str | None = None
    turn: int = 0  # the number of its source, of all that it has had
    tried: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def gives(self) -> bool:
        """Whether others can fetch from it."""
        return self.port != "-"

    @property
    def takes(self) -> bool:
        """Whether it can fetch from others."""
        return self.client_key != "-"


class _Chain:
    """The state of one transfer. Threads put events into a queue; one thread takes them out and decides."""

    def __init__(
        self,
        parcel: Parcel,
        machines: Sequence[Machine],
        roads: Mapping[str, Road],
        progress: Progress,
        *,
        source: Machine | None,
    ) -> None:
        everyone = (source, *machines) if source else tuple(machines)
        self._parcel = parcel
        self._source = source.name if source else None
        self._nodes = {
            # One alone needs no keys.
            one.name: _Node(
                machine=one, road=roads[one.name] if everyone[1:] else replace(roads[one.name], address=None)
            )
            for one in everyone
        }
        self._progress = progress
        self._events: queue.Queue[Callable[[], None]] = queue.Queue()
        self._order: tuple[str, ...] = ()
        self._sessions: list[threading.Thread] = []
        self._hashed: Future[str] = Future()
        self.sent: dict[str, int] = {}
        self.failed: dict[str, NodeError] = {}

    def run(self) -> None:
        threading.Thread(target=self._hash, daemon=True).start()
        self._sessions = [self._start(node, partial(self._attend, node)) for node in self._nodes.values()]
        self._decide_until(lambda: all(node.ready for node in self._open()), seconds=READY)
        for node in self._open():
            if not node.ready:
                self._lose(node, UnreachableError(node.name, f"no answer within {READY:g} s"))
        self._begin()
        self._decide_until(lambda: not self._open())

    def close(self) -> None:
        """Let every node put its keys away; who has loaded drops the file, the others keep what they have."""
        for node in self._nodes.values():
            if node.name in self.sent:
                node.orders.put(b"done\n")
            node.orders.put(None)
        end = time.monotonic() + GOODBYE
        for session in self._sessions:
            session.join(max(0.0, end - time.monotonic()))

    def _open(self) -> list[_Node]:
        """Nodes of which it is not known yet how it ends with them."""
        return [node for name, node in self._nodes.items() if name not in self.sent and name not in self.failed]

    def _decide_until(self, true: Callable[[], bool], *, seconds: float = float("inf")) -> None:
        end = time.monotonic() + seconds
        while not true() and time.monotonic() < end:
            with suppress(queue.Empty):  # short waits keep Ctrl-C prompt
                self._events.get(timeout=0.5)()

    # What the threads do: each gives back what there is to decide after it

    def _start(self, node: _Node, act: Callable[[], Callable[[], None]]) -> threading.Thread:
        def run() -> None:
            try:
                then = act()
            except NodeError as error:
                then = partial(self._lose, node, error)
            except BaseException as error:  # noqa: BLE001 - a bug, or this machine's trouble: it ends the transfer
                then = partial(_throw, error)
            self._events.put(then)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _attend(self, node: _Node) -> Callable[[], None]:
        """One node's session, to its end."""
        words = (node.road.folder, self._parcel.name, str(self._parcel.size), node.road.address or "")
        left = b""

        def hear(data: bytes) -> None:
            nonlocal left
            *lines, left = (left + data).split(b"\n")
            for line in lines:
                if line.startswith(PREFIX):
                    said = line[len(PREFIX) :].decode(errors="replace").split()
                    self._events.put(partial(self._heard, node, said))

        code = node.machine.transport.pipe(script(RELAY, *words), _orders(node.orders), hear)
        return partial(self._lose, node, _ended(node, code))

    def _feed(self, node: _Node, at: int) -> Callable[[], None]:
        """Send the archive from here, from byte `at` on."""

        def chunks() -> Iterator[bytes]:
            for chunk in self._parcel.chunks(at):
                if node.name in self.failed:
                    return
                yield chunk

        command = script(FEED, self._file(node), str(at), str(self._parcel.size))
        said = node.machine.transport.send(command, chunks())
        return partial(self._fed, node, said)

    def _hash(self) -> None:
        try:
            self._hashed.set_result(self._parcel.digest())
        except BaseException as error:  # noqa: BLE001 - for who asks for the hash
            self._hashed.set_exception(error)

    def _load(self, node: _Node) -> Callable[[], None]:
        said = node.machine.transport.send(script(LOAD, self._file(node), self._hashed.result()), ())
        return partial(self._loaded, node, said)

    def _file(self, node: _Node) -> str:
        return f"{node.road.folder}/{self._parcel.name}.part"

    # What is decided

    def _begin(self) -> None:
        nodes = self._open()
        self._order = order({node.name: node.at for node in nodes})
        for node in nodes:
            for other in nodes:
                if other is not node and other.takes and node.gives:
                    node.orders.put(f"allow {other.client_key} {other.road.address}\n".encode())
        for name in self._order:
            node = self._nodes[name]
            if node.at == self._parcel.size:
                self._is_whole(node)
            else:
                self._assign(node)

    def _assign(self, node: _Node) -> None:
        able = {other.name for other in self._nodes.values() if other.gives and other.name not in self.failed}
        name = next_source(node.name, self._order, able=able, tried=node.tried) if node.takes else None
        node.source = name
        node.turn += 1
        if name is None:
            self._start(node, partial(self._feed, node, node.at))
            return
        other = self._nodes[name]
        node.orders.put(f"from {node.turn} {other.road.address} {other.port} {other.user} {other.host_key}\n".encode())

    def _heard(self, node: _Node, words: list[str]) -> None:
        match words:
            case ["ready", at, free, user, port, host_key, client_key] if all(map(_WORD.fullmatch, words[3:])):
                node.at = node.first = int(at)
                node.user, node.port, node.host_key, node.client_key = user, port, host_key, client_key
                node.ready = True
                if free.isdigit() and int(free) * 1024 < self._parcel.size - node.at + _SPARE:
                    what = f"no room in {node.road.folder} for the {self._parcel.size - node.at} bytes that it lacks"
                    self._lose(node, CommandError(node.name, what, next_step="make room there, or set paths.state"))
            case ["at", at]:
                node.at = max(node.at, int(at))
                if node.name != self._source:
                    self._progress(node.name, node.at, self._parcel.size)
            case ["whole"]:
                self._is_whole(node)
            case ["broken", turn, at, *_] if int(turn) == node.turn and node in self._open():
                node.at = int(at)
                node.tried |= {node.source} if node.source else set()
                self._assign(node)

    def _fed(self, node: _Node, said: Result) -> None:
        if said.ok:
            self._is_whole(node)
            return
        what = f"the image cannot be kept in {node.road.folder}"
        self._lose(node, CommandError(node.name, what, detail=said.tail(), next_step="make room there"))

    def _is_whole(self, node: _Node) -> None:
        if node.whole or node not in self._open():
            return
        node.whole, node.at = True, self._parcel.size
        if node.name == self._source:
            self.sent[node.name] = 0
            return
        self._progress(node.name, node.at, self._parcel.size)
        self._start(node, partial(self._load, node))

    def _loaded(self, node: _Node, said: Result) -> None:
        if said.ok:
            self.sent[node.name] = self._parcel.size - node.first
            return
        detail = said.tail()
        self._lose(node, ImageError(node.name, "the image does not load", detail=detail, next_step="run it again"))

    def _lose(self, node: _Node, error: NodeError) -> None:
        """A node is out; who fetched from it turns to another one, without waiting to notice."""
        if node not in self._open():
            return
        self.failed[node.name] = error
        node.orders.put(None)
        for other in self._open():
            if other.source == node.name and not other.whole:
                other.orders.put(f"stop {other.turn}\n".encode())


def _throw(error: BaseException) -> None:
    raise error


def _orders(lines: queue.Queue[bytes | None]) -> Iterator[bytes]:
    """What a node is told, as it comes; and now and then that we are still there."""
    while True:
        try:
            line = lines.get(timeout=TICK)
        except queue.Empty:
            line = b"tick\n"
        if line is None:
            return
        yield line


def _ended(node: _Node, code: int) -> NodeError:
    if code == HELD:
        return BusyError(node.name, "another command is sending an image to it", next_step="wait for that one to end")
    return CommandError(
        node.name,
        f"the transfer ended with status {code}",
        next_step=f"see whether {node.road.folder} can be written to",
    )

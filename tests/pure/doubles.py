"""Doubles that stand at our own seams: an engine whose containers are values, a machine that consists of files.

`tests/loopback/test_engine.py` holds the engine to the contract of the real ones.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from cluster.command import Command, Result
from cluster.container import Container, ContainerSpec, ContainerState
from cluster.errors import ClusterError, EngineError, ImageError, LockedError, UnreachableError
from cluster.layers import Held, Store
from cluster.transport import Channel, Sink

KILLED, TERMINATED = 137, 143


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a container's main process does: ends with `code` at once, or (None) goes on until it is stopped."""

    code: int | None = None
    says: str = ""
    deaf: bool = False  # to SIGTERM
    oom: bool = False


class Faults:
    """What goes wrong, and when: by the name of the method that is called."""

    def __init__(self) -> None:
        self._due: dict[str, list[ClusterError | Callable[[], object]]] = defaultdict(list)
        self._lock = threading.Lock()
        self.calls: list[str] = []

    def at(self, method: str, *what: ClusterError | Callable[[], object]) -> None:
        """The next calls of a method each raise an error, or first do something."""
        self._due[method].extend(what)

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._due.clear()

    def meet(self, method: str) -> None:
        """A method is called."""
        with self._lock:
            self.calls.append(method)
            due = self._due[method].pop(0) if self._due[method] else None
        if isinstance(due, ClusterError):
            raise due
        if due is not None:
            due()


@dataclass(slots=True)
class _Kept:
    spec: ContainerSpec
    now: Container
    program: Program
    ended: threading.Event = field(default_factory=threading.Event)
    removed: bool = False


class MemoryEngine:
    """An engine without processes. `programs` says what an argv does; one that is not there goes on until stopped."""

    def __init__(
        self, node: str = "gpu-01", *, programs: Mapping[tuple[str, ...], Program] | None = None, slices: int = 4
    ) -> None:
        self.node = node
        self.faults = Faults()
        self.images: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.image_labels: dict[str, dict[str, str]] = {}
        self.kind: Store = "other"
        self._programs, self._slices = programs or {}, slices
        self._containers: dict[str, _Kept] = {}
        self._lock = threading.RLock()
        self._count = 0

    def version(self) -> str:
        self.faults.meet("version")
        return "memory"

    # Images: bytes, whose digest is that of the bytes

    def image_id(self, name: str) -> str | None:
        self.faults.meet("image_id")
        return self.tags.get(name) or (name if name in self.images else None)

    def image_bytes(self, name: str) -> int:
        found = self.image_id(name)
        return len(self.images[found]) if found else 0

    def build(
        self,
        context: BinaryIO,
        *,
        tag: str,
        arguments: Mapping[str, str],  # noqa: ARG002 - the seam's
        labels: Mapping[str, str],  # noqa: ARG002
        network: str | None,  # noqa: ARG002
        tell: Callable[[Mapping[str, object]], None],
    ) -> str:
        self.faults.meet("build")
        tell({"stream": "Step 1/1 : FROM scratch\n"})
        self.tags[tag] = self.put_image(context.read())
        return self.tags[tag]

    def put_image(self, archive: bytes) -> str:
        """Have an image."""
        digest = "sha256:" + hashlib.sha256(archive).hexdigest()
        self.images[digest] = archive
        return digest

    def save(self, name: str) -> Iterator[bytes]:
        self.faults.meet("save")
        digest = self.image_id(name)
        if digest is None:
            raise ImageError(self.node, f"no image {name}")
        archive = self.images[digest]
        size = max(1, -(-len(archive) // self._slices))
        for start in range(0, len(archive), size):
            self.faults.meet("save slice")
            yield archive[start : start + size]

    def load(self, chunks: Iterable[bytes]) -> None:
        self.faults.meet("load")
        pieces = []
        for chunk in chunks:
            self.faults.meet("load slice")
            pieces.append(chunk)
        self.put_image(b"".join(pieces))

    def tag(self, image: str, name: str) -> None:
        self.faults.meet("tag")
        if image not in self.images:
            raise ImageError(self.node, f"no image {image}")
        self.tags[name] = image

    def image(self, name: str) -> Held | None:
        self.faults.meet("image")
        digest = self.tags.get(name, name)
        if digest not in self.images:
            return None
        return Held(
            id=digest,
            tags=tuple(name for name, of in self.tags.items() if of == digest),
            size=len(self.images[digest]),
            labels=self.image_labels.get(digest, {}),
        )

    def held(self) -> tuple[Held, ...]:
        self.faults.meet("held")
        return tuple(found for digest in tuple(self.images) if (found := self.image(digest)))

    def store(self) -> Store:
        self.faults.meet("store")
        return self.kind

    def push(self, image: str, *, reference: str, user: str, secret: str) -> None:  # noqa: ARG002 - the seam's
        self.faults.meet("push")
        raise ImageError(self.node, "an engine in memory pushes nothing")

    def remove_image(self, name: str) -> bool:
        self.faults.meet("remove_image")
        digest = self.tags.get(name, name)
        others = [tag for tag, of in self.tags.items() if of == digest and tag != name]
        if digest not in self.images or (not others and self._is_used(digest)):
            return False
        self.tags.pop(name, None)
        if not others:
            del self.images[digest]
        return True

    def _is_used(self, digest: str) -> bool:
        return any(self.tags.get(kept.spec.image, kept.spec.image) == digest for kept in self._containers.values())

    # Containers

    def create(self, spec: ContainerSpec) -> str:
        self.faults.meet("create")
        if self.image_id(spec.image) is None:
            raise ImageError(self.node, f"the image {spec.image} is not there")
        with self._lock:
            if any(kept.spec.name == spec.name for kept in self._containers.values()):
                raise LockedError(f"a container named {spec.name} is already there", where=f"node {self.node}")
            self._count += 1
            container = f"{spec.name}-{self._count}"
            now = Container(
                id=container,
                name=spec.name,
                image=spec.image,
                state=ContainerState.CREATED,
                labels=dict(spec.labels),
            )
            self._containers[container] = _Kept(spec, now, self._programs.get(spec.argv, Program()))
        return container

    def start(self, container: str) -> None:
        self.faults.meet("start")
        kept = self._must_have(container)
        kept.now = replace(kept.now, state=ContainerState.RUNNING, started="2026-02-23T06:00:26Z")
        if kept.program.code is not None:
            self.end(container, kept.program.code)

    def end(self, container: str, code: int) -> None:
        """The container's main process ends, for whatever reason."""
        with self._lock:
            kept = self._containers.get(container)
            if kept and kept.now.is_live:
                kept.now = replace(kept.now, state=ContainerState.ENDED, code=code, oom=kept.program.oom)
                kept.ended.set()

    def find(self, labels: Mapping[str, str]) -> tuple[Container, ...]:
        self.faults.meet("find")
        with self._lock:
            seen = [kept.now for kept in self._containers.values()]
        return tuple(
            one
            for one in seen
            if all(one.labels.get(key) == value if value else key in one.labels for key, value in labels.items())
        )

    def wait(self, container: str) -> Container:
        self.faults.meet("wait")
        kept = self._must_have(container)
        kept.ended.wait()
        if kept.removed:
            raise EngineError(self.node, f"the container {container} was removed")
        return kept.now

    def stop(self, container: str, *, grace: float) -> None:
        self.faults.meet("stop")
        kept = self._containers.get(container)
        if kept is None or not kept.now.is_live:
            return
        if not kept.program.deaf:
            self.end(container, TERMINATED)
        kept.ended.wait(grace)
        self.end(container, KILLED)

    def remove(self, container: str) -> None:
        self.faults.meet("remove")
        with self._lock:
            kept = self._containers.pop(container, None)
        if kept:
            kept.removed = True
            kept.ended.set()

    def logs(self, container: str, *, tail: int) -> str:
        self.faults.meet("logs")
        kept = self._containers.get(container)
        return "".join(kept.program.says.splitlines(keepends=True)[-tail:]) if kept else ""

    def execute(self, container: str, command: Command) -> Result:
        self.faults.meet("execute")
        kept = self._containers.get(container)
        if kept is None or not kept.now.is_live:
            return Result(code=1, stdout=b"", stderr=b"not running\n")
        if command.argv == ("cat",):
            return Result(code=0, stdout=command.stdin, stderr=b"")
        known = self._programs.get(command.argv)
        if known is None or known.code is None:
            return Result(code=127, stdout=b"", stderr=b"no such program\n")
        return Result(code=known.code, stdout=known.says.encode(), stderr=b"")

    def interactive(self, container: str, argv: tuple[str, ...], *, tty: bool) -> Command:  # noqa: ARG002
        return Command(argv=("enter", container, *argv))

    def close(self) -> None:
        self.faults.meet("close")

    def _must_have(self, container: str) -> _Kept:
        with self._lock:
            if container not in self._containers:
                raise EngineError(self.node, f"no container {container}")
            return self._containers[container]


class FileTransport:
    """A machine that consists of files, and can `cat` and `tail` them. `cuts` says where a stream breaks."""

    def __init__(
        self, node: str = "gpu-01", *, files: dict[str, bytes] | None = None, cuts: Cuts | None = None
    ) -> None:
        self.node = node
        self.user = "ml"
        self.faults = Faults()
        self.files = files if files is not None else {}
        self._cuts = cuts or Cuts(0)

    def open(self) -> None:
        self.faults.meet("open")

    def run(self, command: Command, *, timeout: float | None = None) -> Result:  # noqa: ARG002
        self.faults.meet("run")
        if command.argv[0] == "true":
            return Result(code=0, stdout=b"", stderr=b"")
        content = self.files.get(command.argv[-1])
        if command.argv[0] != "cat" or content is None:
            return Result(code=1, stdout=b"", stderr=f"{command}: no such file\n".encode())
        return Result(code=0, stdout=content, stderr=b"")

    def send(self, command: Command, chunks: Iterable[bytes]) -> Result:
        raise NotImplementedError

    def stream(self, command: Command, sink: Sink, *, stop: Callable[[], bool]) -> int:
        self.faults.meet("stream")
        tail, option, start, *follow, path = command.argv
        assert (tail, option, start[:1]) == ("tail", "-c", "+"), command
        if path not in self.files:
            return 1
        at, end = int(start[1:]) - 1, self._cuts.next(len(self.files[path]) - int(start[1:]) + 1)
        while not stop():
            left = self.files[path][at:] if end is None else self.files[path][at : at + end]
            for chunk in self._cuts.chunks(left):
                sink(chunk)
            if end is not None:
                raise UnreachableError(self.node, "the connection was lost")
            at += len(left)
            if not follow:
                return 0
            time.sleep(0.001)
        return -1

    def pipe(self, command: Command, chunks: Iterable[bytes], sink: Sink) -> int:
        raise NotImplementedError

    def interact(self, command: Command, *, tty: bool) -> int:
        raise NotImplementedError

    def dial_docker(self) -> Channel:
        raise NotImplementedError

    def close(self) -> None:
        self.faults.meet("close")


class Cuts:
    """Where streams break: `count` times, each time at a place that the seed says; then never again."""

    def __init__(self, count: int, *, seed: int = 0) -> None:
        self.left = count
        self._random = random.Random(seed)  # noqa: S311 - to be the same every time is the point

    def next(self, length: int) -> int | None:
        """How many of the bytes come before the stream breaks; None when it does not."""
        if self.left == 0:
            return None
        self.left -= 1
        return self._random.randint(0, max(0, length) // (self.left + 1))

    def chunks(self, data: bytes) -> Sequence[bytes]:
        """The pieces in which bytes arrive."""
        places = sorted(self._random.randint(0, len(data)) for _ in range(min(20, len(data))))
        return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]

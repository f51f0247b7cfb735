"""Ship: nodes that lack the image get it streamed from one that has it, all at once, and verified by digest.

The archive travels by digest, without a name: what was interrupted has none, and the tag is given only to the digest
that was meant.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from cluster.engine import Engine
from cluster.errors import ImageError
from cluster.fleet import Machine, each

Progress = Callable[[str, int, int], None]  # node, bytes that it has taken, bytes in all (about)
# A slow node may lag this many chunks (1 MiB each) behind the source before it slows the others down.
_SLACK = 64


def lacking(digests: Mapping[str, str | None], wanted: str) -> tuple[str, ...]:
    """The nodes that do not have exactly this digest under the image's name."""
    return tuple(node for node, digest in digests.items() if digest != wanted)


def ship_image(
    source: Engine, machines: Sequence[Machine], *, tag: str, digest: str, progress: Progress
) -> Mapping[str, int]:
    """Send the image to these machines; gives back the bytes that each one took.

    The source is read once, however many take it. One that fails does not hold the others up.
    """
    if not machines:
        return {}
    total = source.image_bytes(digest)
    pipes = {machine.name: _Pipe() for machine in machines}
    broken: list[BaseException] = []
    threading.Thread(target=_read, args=(source, digest, tuple(pipes.values()), broken), daemon=True).start()

    def take(machine: Machine) -> int:
        pipe = pipes[machine.name]
        taken = 0

        def chunks() -> Iterator[bytes]:
            nonlocal taken
            for chunk in pipe:
                taken += len(chunk)
                yield chunk
                progress(machine.name, taken, total)

        try:
            machine.engine.load(chunks())
        finally:
            pipe.leave()
        arrived = machine.engine.image_id(digest)
        if arrived != digest:
            raise ImageError(
                machine.name,
                f"the image did not arrive as {digest}",
                next_step="let all nodes use the same image store (containerd's names images by another digest)",
            )
        machine.engine.tag(digest, tag)
        return taken

    # All at once, however many they are: who has not begun to take would hold the source up.
    answers = each(machines, take, width=len(machines))
    if broken:
        raise broken[0]  # once, not as every taking node's own
    return answers.all_or_raise()


class _Pipe:
    """A bounded queue of chunks; ends with None, or with the error of the reading side."""

    def __init__(self) -> None:
        self._chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=_SLACK)
        self._left = threading.Event()

    def put(self, chunk: bytes | BaseException | None) -> None:
        while not self._left.is_set():
            try:
                self._chunks.put(chunk, timeout=0.5)
                return
            except queue.Full:
                continue

    @property
    def is_left(self) -> bool:
        """Whether nobody takes any more."""
        return self._left.is_set()

    def leave(self) -> None:
        """The taking side is gone."""
        self._left.set()

    def __iter__(self) -> Iterator[bytes]:
        while (chunk := self._chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk


def _read(source: Engine, digest: str, pipes: tuple[_Pipe, ...], broken: list[BaseException]) -> None:
    end: BaseException | None = None
    try:
        for chunk in source.save(digest):
            for pipe in pipes:
                pipe.put(chunk)
            if all(pipe.is_left for pipe in pipes):
                return
    except BaseException as error:  # noqa: BLE001 - every taking side must hear of it
        broken.append(error)
        end = error
    for pipe in pipes:
        pipe.put(end)

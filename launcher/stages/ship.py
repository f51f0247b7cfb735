"""Ship: nodes that lack the image get the layers that they lack, all at once, and verified by digest.

An archive travels by digest, without a name: what was interrupted has none, and the tag is given only to the digest
that was meant. Where layers cannot be told apart, the whole image is streamed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cluster.archive import Archive, compose, file_archive, unpack
from cluster.engine import Engine
from cluster.errors import CommandError, ImageError, NodeError
from cluster.fleet import Answers, Machine, each
from cluster.layers import Held, Store, shared
from cluster.registry import USER, receiving
from cluster.shelf import Shelf
from launcher.delta import batches, choose_source, choose_way
from launcher.stages.relay import Parcel, Road, relay, save_there

Progress = Callable[[str, int, int], None]  # node, bytes that it has taken, bytes in all (about)
# A slow node may lag this many chunks (1 MiB each) behind the source before it slows the others down.
_SLACK = 64


def lacking(digests: Mapping[str, str | None], wanted: str) -> tuple[str, ...]:
    """The nodes that do not have exactly this digest under the image's name."""
    return tuple(node for node, digest in digests.items() if digest != wanted)


def ship_image(
    source: Engine | Machine,
    machines: Sequence[Machine],
    *,
    tag: str,
    digest: str,
    progress: Progress,
    shelf: Shelf | None = None,
    roads: Mapping[str, Road] | None = None,
) -> Mapping[str, int]:
    """Send the image to these machines; gives back the bytes that each one took.

    `source` is this machine's engine, or a node. With a shelf, on which layers are kept from one time to the next,
    only the layers that a machine lacks travel; with roads, much for many goes from machine to machine. One that fails
    does not hold the others up.
    """
    if not machines:
        return {}
    errand = _Errand(tag=tag, digest=digest, shelf=shelf, roads=roads or {}, progress=progress)
    if isinstance(source, Machine):
        return _from_node(source, machines, errand).all_or_raise()
    image = source.image(digest)
    if shelf is None or image is None:
        return _stream(source, machines, errand).all_or_raise()
    store = source.store()
    looked = each(machines, lambda machine: _have(machine, image, store))
    answers: Answers[int] = Answers(bad=looked.bad)
    for batch in batches(looked.good):
        takers = [machine for machine in machines if machine.name in batch.nodes]
        if store == "classic" and image.layers:
            answers = answers.then(_send_parts(source, image, takers, shelf, errand, have=batch.have))
        else:
            answers = answers.then(_send_whole(source, takers, shelf, errand))
    shelf.trim(keep=image.layers)
    return answers.all_or_raise()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Errand:
    """The image that is meant, the name that it gets when it is whole, and what there is to bring it along with."""

    tag: str
    digest: str
    shelf: Shelf | None
    roads: Mapping[str, Road]
    progress: Progress


def read_layers(source: Engine, image: Held, shelf: Shelf, *, have: int, progress: Progress) -> Archive:
    """An archive of the image without its first `have` layers; what is not on the shelf is had from the engine."""
    wanted = image.layers[have:]
    if not _is_kept(shelf, image, wanted) and _source(shelf, image, wanted) == "push":
        # An engine that cannot reach us (rootless, in a network of its own) can still save.
        with suppress(ImageError), receiving(shelf, wanted=wanted) as registry:
            source.push(image.id, reference=registry.reference, user=USER, secret=registry.secret)
    if not _is_kept(shelf, image, wanted):
        unpacked = unpack(_told(source, image, progress), shelf.put, where=f"node {source.node}")
        if unpacked.digest != image.id:
            raise ImageError(source.node, f"the engine saved another image than {image.id}: {unpacked.digest}")
        shelf.put_config(unpacked.config)
    config = shelf.config(image.id)
    files = [None] * have + [shelf.layer(layer) for layer in wanted]
    if config is None or None in files[have:]:
        raise ImageError(source.node, "the layers that were read are gone again", next_step="run it again")
    return compose(config, image.layers, files)


def _is_kept(shelf: Shelf, image: Held, wanted: Sequence[str]) -> bool:
    return shelf.config(image.id) is not None and all(shelf.layer(layer) for layer in wanted)


def _source(shelf: Shelf, image: Held, wanted: Sequence[str]) -> str:
    sizes = {layer: size for layer in image.layers if (size := shelf.size(layer)) is not None}
    new = max(0, image.size - sum(sizes.values())) if len(sizes) < len(set(image.layers)) else 0
    again = sum(
        size
        for layer, size in sizes.items()
        if not shelf.is_known(layer) or (layer in wanted and not shelf.layer(layer))
    )
    return choose_source(size=image.size, new=new, compressed=new + again)


def _told(source: Engine, image: Held, progress: Progress) -> Iterator[bytes]:
    """The saved image; that it is being read is told under its own node's name."""
    taken = 0
    for chunk in source.save(image.id):
        yield chunk
        taken += len(chunk)
        progress(source.node, taken, max(taken, image.size))


def _have(machine: Machine, image: Held, store: Store) -> int:
    """How many of the image's layers are there; `ImageError` where the image would be called by another digest."""
    its = machine.engine.store()
    if "containerd" in (its, store) and its != store:
        raise ImageError(
            machine.name,
            f"its engine's image store is {its}, that of the machine which the image comes from is {store}: "
            "they call an image by different digests",
            next_step="let all machines use the same store (containerd's shows in docker info as driver-type)",
        )
    return shared(image.layers, machine.engine.held()) if its == "classic" else 0


def _send_parts(
    source: Engine, image: Held, machines: Sequence[Machine], shelf: Shelf, errand: _Errand, *, have: int
) -> Answers[int]:
    archive = read_layers(source, image, shelf, have=have, progress=errand.progress)
    sent = _deliver(archive, machines, errand)
    refused = [one for one in machines if isinstance(sent.bad.get(one.name), ImageError)]
    if not refused:
        return sent
    # Our copy may be damaged, or what a node had may have been removed meanwhile: that is looked at, once.
    damaged = shelf.scrub(image.layers[have:])
    looked = each(refused, lambda machine: _have(machine, image, "classic"))
    now = min(looked.good.values(), default=have)
    if not damaged and now >= have:
        return sent
    archive = read_layers(source, image, shelf, have=min(now, have), progress=errand.progress)
    return sent.then(_deliver(archive, refused, errand))


def _send_whole(source: Engine, machines: Sequence[Machine], shelf: Shelf, errand: _Errand) -> Answers[int]:
    """As the engine saves it: what goes from node to node must first be a file."""
    able = [machine.name for machine in machines if machine.name in errand.roads]
    if choose_way(source.image_bytes(errand.digest), able) == "direct":
        return _stream(source, machines, errand)
    with shelf.whole(errand.digest, source.save(errand.digest)) as path:
        return _deliver(file_archive(path), machines, errand)


def _deliver(archive: Archive, machines: Sequence[Machine], errand: _Errand) -> Answers[int]:
    """The quickest way; a node that cannot keep an archive in a file is sent it straight into its engine."""
    able = [machine for machine in machines if machine.name in errand.roads]
    if choose_way(archive.size, [machine.name for machine in able]) == "direct":
        return _direct(archive, machines, errand)
    relayed = _relay(archive, able, errand)
    left = [one for one in machines if one.name not in relayed.good and _may_try_again(relayed.bad.get(one.name))]
    return relayed.then(_direct(archive, left, errand))


def _from_node(source: Machine, machines: Sequence[Machine], errand: _Errand) -> Answers[int]:
    """From a node to nodes, past this machine; what cannot go that way is streamed through it."""
    if source.name not in errand.roads:
        return _stream(source.engine, machines, errand)
    try:
        saved = save_there(source, errand.roads[source.name], digest=errand.digest)
    except NodeError:
        return _stream(source.engine, machines, errand)
    relayed = _relay(saved, machines, errand, source=source)
    left = [one for one in machines if one.name in relayed.bad and _may_try_again(relayed.bad[one.name])]
    return relayed.then(_stream(source.engine, left, errand))


def _relay(
    parcel: Parcel, machines: Sequence[Machine], errand: _Errand, *, source: Machine | None = None
) -> Answers[int]:
    relayed = relay(parcel, machines, errand.roads, errand.progress, source=source)
    settled = each([one for one in machines if one.name in relayed.good], lambda one: _settle(one, errand))
    return relayed.then(Answers(bad=settled.bad))


def _may_try_again(error: NodeError | None) -> bool:
    """Whether another way may help: not where a node is gone, or somebody else is at work on it."""
    return error is None or isinstance(error, CommandError | ImageError)


def _direct(archive: Archive, machines: Sequence[Machine], errand: _Errand) -> Answers[int]:
    """From here to each, all at once."""

    def load(machine: Machine) -> int:
        taken = 0

        def chunks() -> Iterator[bytes]:
            nonlocal taken
            for chunk in archive.chunks():
                taken += len(chunk)
                yield chunk
                errand.progress(machine.name, taken, archive.size)

        machine.engine.load(chunks())
        _settle(machine, errand)
        return taken

    return each(machines, load, width=max(1, len(machines)))


def _settle(machine: Machine, errand: _Errand) -> None:
    """Give the image its name, if it is the one that was meant."""
    if machine.engine.image_id(errand.digest) != errand.digest:
        raise ImageError(
            machine.name,
            f"the image did not arrive as {errand.digest}",
            next_step="let all nodes use the same image store (containerd's names images by another digest)",
        )
    machine.engine.tag(errand.digest, errand.tag)


def _stream(source: Engine, machines: Sequence[Machine], errand: _Errand) -> Answers[int]:
    """The whole image, as the engine saves it. The source is read once, however many take it."""
    if not machines:
        return Answers()
    total = source.image_bytes(errand.digest)
    pipes = {machine.name: _Pipe() for machine in machines}
    broken: list[BaseException] = []
    threading.Thread(target=_read, args=(source, errand.digest, tuple(pipes.values()), broken), daemon=True).start()

    def take(machine: Machine) -> int:
        pipe = pipes[machine.name]
        taken = 0

        def chunks() -> Iterator[bytes]:
            nonlocal taken
            for chunk in pipe:
                taken += len(chunk)
                yield chunk
                errand.progress(machine.name, taken, total)

        try:
            machine.engine.load(chunks())
        finally:
            pipe.leave()
        _settle(machine, errand)
        return taken

    # All at once, however many they are: who has not begun to take would hold the source up.
    answers = each(machines, take, width=len(machines))
    if broken:
        raise broken[0]  # once, not as every taking node's own
    return answers


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

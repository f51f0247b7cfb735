"""Shipping an image: from one real engine to another, whatever breaks; and to many nodes at once, on doubles."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.dockerd import DockerEngine
from cluster.errors import EngineError, ImageError, UnreachableError
from cluster.fleet import WIDTH, Machine
from cluster.layers import Store
from cluster.local import LocalTransport
from cluster.shelf import Shelf
from launcher.stages.ship import lacking, ship_image
from tests.loopback.images import IMAGE_LABEL, Tiny, docker, inspect, make_image, make_layer
from tests.loopback.nodes import Dockerd, HereButThere
from tests.pure.doubles import FileTransport, MemoryEngine

TAG = "launcher-test/shipped:1"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dockerd]:
    """The engine that the image is sent to."""
    other = Dockerd(tmp_path_factory.mktemp("dockerd"))
    try:
        other.start()
        yield other
    finally:
        other.stop()


@pytest.fixture
def there(other: Dockerd) -> Iterator[Machine]:
    """A machine that has no image at all."""
    transport = HereButThere(other.socket)
    engine = DockerEngine(transport)
    yield Machine(name="there", transport=transport, engine=engine)
    engine.close()
    other.clear()


class Source(DockerEngine):
    """This machine's engine; `spoil` does something to the archive that it sends."""

    def __init__(self, spoil: Callable[[Iterator[bytes]], Iterable[bytes]] = iter) -> None:
        super().__init__(LocalTransport("here"))
        self.spoil = spoil
        self.read = self.pushed = 0

    def save(self, name: str) -> Iterator[bytes]:
        self.read += 1
        yield from self.spoil(super().save(name))

    def push(self, *args: Any, **options: Any) -> None:
        super().push(*args, **options)
        self.pushed += 1


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    yield source
    source.close()


def ship(source: Source, there: Machine, digest: str) -> int:
    """Send the image; how many bytes it took."""
    return ship_image(source, [there], tag=TAG, digest=digest, progress=lambda *_: None)["there"]


class TestBetweenEngines:
    def test_it_arrives_whole_under_its_name(self, source: Source, there: Machine, tiny: Tiny) -> None:
        told: list[tuple[str, int, int]] = []
        taken = ship_image(source, [there], tag=TAG, digest=tiny.digest, progress=lambda *now: told.append(now))
        assert there.engine.image_id(TAG) == there.engine.image_id(tiny.digest) == tiny.digest
        assert told[-1] == ("there", taken["there"], source.image_bytes(tiny.digest))
        assert [taken for _, taken, _ in told] == sorted(taken for _, taken, _ in told)

    @pytest.mark.parametrize("percent", [0, 1, 50, 99])
    def test_a_reader_that_breaks_leaves_nothing(
        self, source: Source, there: Machine, other: Dockerd, tiny: Tiny, percent: int
    ) -> None:
        archive = b"".join(source.save(tiny.digest))

        def broken(_: Iterator[bytes]) -> Iterator[bytes]:
            yield archive[: len(archive) * percent // 100]
            raise UnreachableError("here", "the connection was lost")

        source.spoil = broken
        with pytest.raises(UnreachableError, match="node here: the connection was lost"):
            ship(source, there, tiny.digest)
        assert other.images() == []
        assert other.left_over() == []
        source.spoil = iter
        ship(source, there, tiny.digest)
        assert other.images() == [tiny.digest]

    def test_an_engine_that_dies_while_it_takes_leaves_nothing(
        self, source: Source, there: Machine, other: Dockerd, tiny: Tiny
    ) -> None:
        archive = b"".join(source.save(tiny.digest))

        def dying(_: Iterator[bytes]) -> Iterator[bytes]:
            half = len(archive) // 2
            yield archive[:half]
            other.kill()
            yield archive[half:]

        source.spoil = dying
        try:
            with pytest.raises(EngineError) as caught:
                ship(source, there, tiny.digest)
            assert caught.value.node == "there"
        finally:
            other.start()
        assert other.images() == []
        source.spoil = iter
        ship(source, there, tiny.digest)
        assert there.engine.image_id(TAG) == tiny.digest

    def test_another_image_than_was_meant_gets_no_name(self, source: Source, there: Machine, tiny: Tiny) -> None:
        name = f"launcher-test/other:{tiny.mark}"
        docker(
            "import", "-c", f"LABEL {IMAGE_LABEL}={tiny.mark}", "-c", "LABEL other=yes", "-", name, stdin=b"\0" * 1024
        )
        source.spoil = lambda _: DockerEngine(LocalTransport("here")).save(inspect(name)["Id"])
        with pytest.raises(ImageError, match=f"the image did not arrive as {tiny.digest}") as caught:
            ship(source, there, tiny.digest)
        assert caught.value.exit_code == 5
        assert there.engine.image_id(TAG) is None

    @pytest.mark.parametrize("seed", range(6))
    def test_a_changed_archive_is_never_a_usable_wrong_image(
        self, source: Source, there: Machine, tiny: Tiny, seed: int
    ) -> None:
        archive = bytearray(b"".join(source.save(tiny.digest)))
        archive[random.Random(seed).randrange(len(archive))] ^= 0xFF  # noqa: S311 - the same every time
        source.spoil = lambda _: [bytes(archive)]
        with suppress(EngineError):
            ship(source, there, tiny.digest)
        if there.engine.image_id(tiny.digest):  # what was changed is no part of the image
            layers = inspect(tiny.digest)["RootFS"]
            assert layers_of(there, tiny.digest) == layers

    def test_what_is_there_already_is_sent_without_harm(self, source: Source, there: Machine, tiny: Tiny) -> None:
        ship(source, there, tiny.digest)
        ship(source, there, tiny.digest)
        assert there.engine.image_id(TAG) == tiny.digest


class Layered:
    """Images with a large lower layer and a small upper one, on this machine's engine."""

    def __init__(self, folder: Path, mark: str) -> None:
        self.mark = mark
        self._shelf = Shelf(folder / "maker")
        self._base = make_layer("base", random.Random(11).randbytes(2 << 20))  # noqa: S311 - the same every time
        self.made: list[str] = []

    def make(self, code: str) -> str:
        """An image whose upper layer holds this; its digest."""
        digest, archive = make_image(self._shelf, [self._base, make_layer("code", code.encode())], mark=self.mark)
        docker("load", "-q", stdin=b"".join(archive.chunks()))
        docker("tag", digest, f"launcher-test/layered:{len(self.made)}-{self.mark}")
        self.made.append(digest)
        return digest


@pytest.fixture
def layered(tmp_path: Path, tiny: Tiny) -> Iterator[Layered]:
    layered = Layered(tmp_path, tiny.mark)
    yield layered
    for digest in layered.made:
        docker("rmi", "-f", digest, check=False)


class TestOnlyWhatIsMissing:
    @pytest.fixture
    def shelf(self, tmp_path: Path) -> Shelf:
        return Shelf(tmp_path / "shelf")

    def ship(self, source: Source, there: Machine, digest: str, shelf: Shelf) -> int:
        sent = ship_image(source, [there], tag=TAG, digest=digest, progress=lambda *_: None, shelf=shelf)
        assert there.engine.image_id(TAG) == digest
        return sent["there"]

    def test_a_new_upper_layer_travels_alone(
        self, source: Source, there: Machine, layered: Layered, shelf: Shelf
    ) -> None:
        first, second, third = (layered.make(code) for code in ("one", "two", "three"))
        assert self.ship(source, there, first, shelf) > 2 << 20
        assert self.ship(source, there, second, shelf) < 20_000
        assert self.ship(source, there, third, shelf) < 20_000
        assert source.read == 1, "only the first one was saved whole; what came later was pushed"
        assert layers_of(there, third) == inspect(third)["RootFS"]

    def test_an_image_of_known_layers_is_its_configuration(
        self, source: Source, there: Machine, layered: Layered, shelf: Shelf
    ) -> None:
        digest = layered.make("one")
        self.ship(source, there, digest, shelf)
        name = f"launcher-test/labelled:{layered.mark}"
        docker("build", "-q", "-t", name, "--label", "more=yes", "-", stdin=f"FROM {digest}\n".encode())
        layered.made.append(inspect(name)["Id"])
        assert self.ship(source, there, inspect(name)["Id"], shelf) < 10_000

    def test_an_engine_that_cannot_push_to_us_saves(
        self, source: Source, there: Machine, layered: Layered, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = (layered.make(code) for code in ("one", "two"))
        self.ship(source, there, first, shelf)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            nobody = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr("cluster.registry.Registry.reference", f"{nobody}/launcher/layers")
        assert self.ship(source, there, second, shelf) < 20_000
        assert source.read == 2

    def test_the_shelf_alone_is_enough(self, source: Source, there: Machine, layered: Layered, shelf: Shelf) -> None:
        digest = layered.make("one")
        self.ship(source, there, digest, shelf)
        there.engine.remove_image(TAG)
        self.ship(source, there, digest, shelf)
        assert source.read == 1

    def test_layers_that_are_damaged_on_the_shelf_make_no_image(
        self, source: Source, there: Machine, other: Dockerd, layered: Layered, shelf: Shelf
    ) -> None:
        digest = layered.make("one")
        self.ship(source, there, digest, shelf)
        other.clear()
        for path in (shelf.folder / "layers").iterdir():
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
        self.ship(source, there, digest, shelf)
        assert there.engine.image_id(digest) == digest
        assert (source.read, source.pushed) == (1, 1), "what was damaged was had anew from the engine"

    def test_another_image_than_was_meant_is_not_shelved(
        self, source: Source, there: Machine, other: Dockerd, layered: Layered, shelf: Shelf
    ) -> None:
        meant, wrong = layered.make("one"), layered.make("two")
        source.spoil = lambda _: DockerEngine(LocalTransport("here")).save(wrong)
        with pytest.raises(ImageError, match="the engine saved another image"):
            self.ship(source, there, meant, shelf)
        assert other.images() == []


def layers_of(there: Machine, digest: str) -> object:
    assert isinstance(there.engine, DockerEngine)
    return there.engine._client.inspect_image(digest)["RootFS"]


def fleet(*engines: MemoryEngine) -> list[Machine]:
    return [Machine(name=engine.node, transport=FileTransport(engine.node), engine=engine) for engine in engines]


def send(source: MemoryEngine, digest: str, *engines: MemoryEngine) -> dict[str, int]:
    return dict(ship_image(source, fleet(*engines), tag=TAG, digest=digest, progress=lambda *_: None))


class TestToMany:
    def test_the_source_is_read_once(self) -> None:
        source, nodes = MemoryEngine("source"), [MemoryEngine(f"gpu-{n}") for n in range(5)]
        digest = source.put_image(b"an image" * 100)
        assert send(source, digest, *nodes) == {node.node: 800 for node in nodes}
        assert source.faults.calls.count("save") == 1
        assert [node.tags for node in nodes] == [{TAG: digest}] * 5

    def test_nobody_asks_for_nothing(self) -> None:
        source = MemoryEngine("source")
        assert send(source, "sha256:1") == {}
        assert source.faults.calls == []

    def test_more_nodes_than_a_fan_out_is_wide_and_more_chunks_than_a_pipe_is_long(self) -> None:
        source, nodes = MemoryEngine("source", slices=300), [MemoryEngine(f"gpu-{n}") for n in range(WIDTH + 8)]
        digest = source.put_image(bytes(3000))
        assert set(send(source, digest, *nodes).values()) == {3000}

    def test_one_that_fails_does_not_hold_the_others_up(self) -> None:
        source, nodes = MemoryEngine("source", slices=300), [MemoryEngine(f"gpu-{n}") for n in range(3)]
        digest = source.put_image(bytes(range(250)) * 12)
        full = ImageError("gpu-1", "the image does not load: no space left on device")
        nodes[1].faults.at("load slice", lambda: None, full)
        with pytest.raises(ImageError, match="no space left"):
            send(source, digest, *nodes)
        assert [node.tags for node in nodes] == [{TAG: digest}, {}, {TAG: digest}]
        assert nodes[1].images == {}

    def test_one_that_is_slow_does_not_hold_the_others_up(self) -> None:
        source, slow, quick = MemoryEngine("source", slices=50), MemoryEngine("slow"), MemoryEngine("quick")
        digest = source.put_image(bytes(5000))
        done = threading.Event()
        quick.faults.at("tag", done.set)
        slow.faults.at("load slice", lambda: done.wait(60) or pytest.fail("the quick one waited for the slow one"))
        assert send(source, digest, slow, quick) == {"slow": 5000, "quick": 5000}

    def test_a_source_that_breaks_is_told_once(self) -> None:
        source, nodes = MemoryEngine("source"), [MemoryEngine(f"gpu-{n}") for n in range(3)]
        digest = source.put_image(bytes(1000))
        source.faults.at("save slice", lambda: None, UnreachableError("source", "the connection was lost"))
        with pytest.raises(UnreachableError) as caught:
            send(source, digest, *nodes)
        assert str(caught.value) == "node source: the connection was lost"
        assert [(node.images, node.tags) for node in nodes] == [({}, {})] * 3

    def test_a_source_that_nobody_takes_from_is_not_read_on(self) -> None:
        source, nodes = MemoryEngine("source", slices=10_000), [MemoryEngine(f"gpu-{n}") for n in range(2)]
        digest = source.put_image(bytes(10_000))
        for node in nodes:
            node.faults.at("load", EngineError(node.node, "the Docker engine does not answer"))
        with pytest.raises(EngineError):
            send(source, digest, *nodes)
        assert source.faults.calls.count("save slice") < 1000

    def test_a_bug_of_one_is_heard_of(self) -> None:
        source, node = MemoryEngine("source"), MemoryEngine("gpu-1")

        def bug() -> None:
            raise ZeroDivisionError

        node.faults.at("load slice", bug)
        with pytest.raises(ZeroDivisionError):
            send(source, source.put_image(b"x"), node)


class TestStores:
    """An engine that keeps images otherwise would call them by another digest: that is told before anything is sent."""

    @pytest.mark.parametrize(("here", "there"), [("classic", "containerd"), ("containerd", "other")])
    def test_of_two_kinds_are_refused(self, tmp_path: Path, here: Store, there: Store) -> None:
        source, nodes = MemoryEngine("source"), [MemoryEngine("gpu-1"), MemoryEngine("gpu-2")]
        source.kind = nodes[1].kind = here
        nodes[0].kind = there
        digest = source.put_image(b"an image" * 100)
        with pytest.raises(ImageError, match="they call an image by different digests") as caught:
            ship_image(
                source, fleet(*nodes), tag=TAG, digest=digest, progress=lambda *_: None, shelf=Shelf(tmp_path / "shelf")
            )
        assert caught.value.node == "gpu-1"
        assert "load" not in nodes[0].faults.calls
        assert nodes[1].tags == {TAG: digest}, "the other one has it"


def test_who_lacks_the_image() -> None:
    digests = {"a": "sha256:1", "b": None, "c": "sha256:2"}
    assert lacking(digests, "sha256:1") == ("b", "c")

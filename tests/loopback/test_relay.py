"""From node to node: real sshds at three addresses, a real engine behind each; whatever breaks, nothing is left."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.archive import Archive, compose
from cluster.dockerd import DockerEngine
from cluster.errors import CommandError, ImageError, NodeError, UnreachableError
from cluster.fleet import Answers
from cluster.layers import Store
from cluster.shelf import Shelf
from launcher.errors import BusyError
from launcher.stages.relay import Road, relay, save_there
from launcher.stages.ship import ship_image
from tests.loopback.conftest import Site
from tests.loopback.images import make_image, make_layer
from tests.loopback.nodes import Dockerd, Node, nodes_of
from tests.loopback.test_transport import eventually

MB = 1 << 20
LAYER = 8 * MB


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Dockerd]]:
    engines = [Dockerd(tmp_path_factory.mktemp("dockerd")) for _ in range(3)]
    try:
        for engine in engines:
            engine.start()
        yield engines
    finally:
        for engine in engines:
            engine.stop()


@pytest.fixture
def nodes(tmp_path: Path, engines: list[Dockerd], site: Site) -> Iterator[list[Node]]:
    before = _relays()
    with nodes_of(tmp_path, engines, site) as nodes:
        yield nodes
    assert eventually(lambda: _relays() == before), "keys or servers of a transfer are left"


@dataclass(frozen=True)
class Image:
    digest: str
    archive: Archive


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image of one layer that does not shrink."""
    noise = random.Random(7).randbytes(LAYER)  # noqa: S311 - the same every time
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    digest, archive = make_image(shelf, [make_layer("weights", noise)], mark="relay")
    return Image(digest=digest, archive=archive)


class Slow:
    """An archive that is read at a pace; something happens when it comes to a byte: once, or (`always`) every time."""

    def __init__(
        self,
        archive: Archive,
        *,
        seconds: float = 0.0,
        at: int = -1,
        then: Callable[[], object] = int,
        always: bool = False,
    ) -> None:
        self.name, self.size = archive.name, archive.size
        self.read = 0
        self.starts: list[int] = []
        self._archive, self._pause = archive, seconds / (archive.size / (128 * 1024))
        self._at, self._then, self._always = at, then, always
        self._met = threading.Event()

    def digest(self) -> str:
        return self._archive.digest()

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        self.starts.append(start)
        done = start
        for chunk in self._archive.chunks(start):
            for at in range(0, len(chunk), 128 * 1024):
                if 0 <= self._at <= done and (self._always or not self._met.is_set()):
                    self._met.set()
                    self._then()
                piece = chunk[at : at + 128 * 1024]
                time.sleep(self._pause)
                yield piece
                done += len(piece)
                self.read += len(piece)


def send(parcel: Slow | Archive, nodes: list[Node], *, roads: dict[str, Road] | None = None) -> Answers[int]:
    return relay(
        parcel,
        [node.machine for node in nodes],
        roads or {node.machine.name: node.road for node in nodes},
        lambda *_: None,
    )


def images(nodes: list[Node]) -> list[list[str]]:
    return [node.dockerd.images() for node in nodes]


def _relays() -> tuple[list[str], list[int]]:
    """The keys and servers of transfers on this machine."""
    keys = sorted(path.name for path in Path("/dev/shm").glob("launcher-??????????"))
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            program, *words = process.read_bytes().split(b"\0")
            servers = program.endswith(b"sshd") and any(b"/launcher-" in word for word in words)
            if servers or any(word.endswith(b"/serve") for word in words[:1]):
                found.append(int(process.parent.name))
    return keys, sorted(found)


class TestThreeNodes:
    def test_all_get_it_and_it_leaves_here_once(self, nodes: list[Node], image: Image) -> None:
        told: list[tuple[str, int, int]] = []
        parcel = Slow(image.archive)
        answers = relay(
            parcel,
            [node.machine for node in nodes],
            {node.machine.name: node.road for node in nodes},
            lambda *now: told.append(now),
        )
        assert answers == Answers(good={node.machine.name: parcel.size for node in nodes})
        assert images(nodes) == [[image.digest]] * 3
        assert (parcel.read, parcel.starts) == (parcel.size, [0])
        assert [node.kept for node in nodes] == [[]] * 3
        for node in nodes:
            mine = [taken for name, taken, total in told if name == node.machine.name and total == parcel.size]
            assert mine == sorted(mine)
            assert mine[-1] == parcel.size

    def test_one_alone_needs_no_keys(self, nodes: list[Node], image: Image) -> None:
        seen: list[object] = []
        parcel = Slow(image.archive, at=MB, then=lambda: seen.append(_relays()[1]))
        assert send(parcel, nodes[:1]).good == {"gpu-1": parcel.size}
        assert seen == [[]]

    def test_a_node_that_has_it_hands_it_on_past_this_machine(self, nodes: list[Node], image: Image) -> None:
        first, *others = nodes
        assert send(image.archive, [first]).bad == {}
        saved = save_there(first.machine, first.road, digest=image.digest)
        roads = {node.machine.name: node.road for node in nodes}
        answers = relay(saved, [one.machine for one in others], roads, lambda *_: None, source=first.machine)
        assert answers == Answers(good={"gpu-2": saved.size, "gpu-3": saved.size})
        assert images(nodes) == [[image.digest]] * 3
        assert [node.kept for node in nodes] == [[]] * 3

    def test_what_a_node_has_not_cannot_be_saved_there(self, nodes: list[Node]) -> None:
        with pytest.raises(ImageError, match="the image cannot be saved there"):
            save_there(nodes[0].machine, nodes[0].road, digest="sha256:" + "0" * 64)
        assert nodes[0].kept == []


class TestAnImageThatIsNotTakenApart:
    class Opaque(DockerEngine):
        """An engine that does not say what its layers are; a large image."""

        def store(self) -> Store:
            return "other"

        def image_bytes(self, name: str) -> int:  # noqa: ARG002
            return 1 << 30

    def test_goes_from_node_to_node_as_it_was_saved(self, nodes: list[Node], image: Image, tmp_path: Path) -> None:
        first, *others = nodes
        assert send(image.archive, [first]).bad == {}
        source = self.Opaque(first.machine.transport)
        shelf = Shelf(tmp_path / "shelf")
        sent = ship_image(
            source,
            [node.machine for node in others],
            tag="launcher-test/whole:1",
            digest=image.digest,
            progress=lambda *_: None,
            shelf=shelf,
            roads=_roads(nodes),
        )
        source.close()
        assert sorted(sent) == ["gpu-2", "gpu-3"]
        for node in others:
            assert node.machine.engine.image_id("launcher-test/whole:1") == image.digest
        assert [path for path in shelf.folder.rglob("*") if path.is_file()] == []


class TestANodeGoes:
    def test_in_the_middle_and_is_routed_around(self, nodes: list[Node], image: Image) -> None:
        parcel = Slow(image.archive, seconds=4, at=LAYER // 2, then=nodes[1].sshd.stop)
        answers = send(parcel, nodes)
        assert sorted(answers.good) == ["gpu-1", "gpu-3"]
        assert isinstance(answers.bad["gpu-2"], UnreachableError)
        assert images(nodes) == [[image.digest], [], [image.digest]]
        assert parcel.starts == [0], "the last one went on from the first, not from here"

    def test_at_the_head_and_the_next_goes_on_from_here_where_it_was(self, nodes: list[Node], image: Image) -> None:
        def stop() -> None:
            assert eventually(lambda: any(path.stat().st_size for path in nodes[1].kept if path.suffix == ".part"))
            nodes[0].sshd.stop()

        parcel = Slow(image.archive, seconds=4, at=LAYER // 2, then=stop)
        answers = send(parcel, nodes)
        assert sorted(answers.good) == ["gpu-2", "gpu-3"]
        assert images(nodes) == [[], [image.digest], [image.digest]]
        first, second = parcel.starts
        assert first == 0
        assert second > 0
        assert eventually(lambda: _relays()[1] == [])

    def test_whose_engine_is_dead_and_the_others_get_it(
        self, nodes: list[Node], engines: list[Dockerd], image: Image
    ) -> None:
        engines[1].kill()
        try:
            answers = send(image.archive, nodes)
        finally:
            engines[1].start()
        assert sorted(answers.good) == ["gpu-1", "gpu-3"]
        assert isinstance(answers.bad["gpu-2"], ImageError)
        assert images(nodes) == [[image.digest], [], [image.digest]]


class TestACut:
    @pytest.mark.parametrize("percent", [1, 50, 99])
    def test_leaves_no_image_and_is_gone_on_from(self, nodes: list[Node], image: Image, percent: int) -> None:
        cut = image.archive.size * percent // 100

        def lose() -> None:
            raise UnreachableError("gpu-1", "the connection was lost")

        answers = send(Slow(image.archive, seconds=1, at=cut, then=lose, always=True), nodes[:2])
        assert sorted(answers.bad) == ["gpu-1", "gpu-2"]
        assert images(nodes) == [[]] * 3
        assert [node.dockerd.left_over() for node in nodes] == [[]] * 3
        again = Slow(image.archive)
        answers = send(again, nodes[:2])
        assert sorted(answers.good) == ["gpu-1", "gpu-2"]
        assert images(nodes[:2]) == [[image.digest]] * 2
        assert again.read <= image.archive.size - cut + 512 * 1024, "what has arrived is not sent again"
        assert [node.kept for node in nodes] == [[]] * 3

    def test_by_the_death_of_the_launcher_leaves_no_key_and_no_server(
        self, nodes: list[Node], image: Image, site: Site
    ) -> None:
        before = _relays()
        launcher = subprocess.Popen(
            [sys.executable, "-c", ORPHAN, str(site.folder), str(site.key), json.dumps(_told(nodes, image))],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert launcher.stdout
        assert launcher.stdout.readline() == b"half\n"
        assert _relays()[0] != before[0]
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()
        assert eventually(lambda: _relays() == before)
        assert images(nodes) == [[]] * 3
        assert sorted(send(image.archive, nodes).good) == ["gpu-1", "gpu-2", "gpu-3"]
        assert [node.kept for node in nodes] == [[]] * 3

    def test_by_the_death_of_the_relay_itself_leaves_no_key_and_no_server(
        self, nodes: list[Node], image: Image
    ) -> None:
        before = _relays()

        def kill() -> None:
            os.kill(int((Path(nodes[1].road.folder) / "lock").read_text().split()[0]), signal.SIGKILL)

        answers = send(Slow(image.archive, seconds=3, at=LAYER // 2, then=kill), nodes)
        assert sorted(answers.good) == ["gpu-1", "gpu-3"]
        assert eventually(lambda: _relays() == before)
        assert send(image.archive, nodes[1:2]).bad == {}, "the lock of a dead one is no lock"

    def test_what_is_kept_but_wrong_is_refused_and_then_sent_anew(self, nodes: list[Node], image: Image) -> None:
        node = nodes[0]
        Path(node.road.folder).mkdir()
        (Path(node.road.folder) / f"{image.archive.name}.part").write_bytes(bytes(LAYER // 2))
        answers = send(image.archive, [node])
        assert isinstance(answers.bad["gpu-1"], ImageError)
        assert answers.bad["gpu-1"].detail == ("what has come is not what was sent",)
        assert (node.dockerd.images(), node.kept) == ([], [])
        assert send(image.archive, [node]).good == {"gpu-1": image.archive.size}

    def test_what_a_neighbour_has_put_into_it_is_not_loaded(
        self, nodes: list[Node], image: Image, tmp_path: Path
    ) -> None:
        """A node that is not ours any more hands on an image of its own, under a name that others use."""
        shelf = Shelf(tmp_path / "shelf")
        layer = shelf.put([make_layer("evil", b"evil")])
        config = json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer]}}).encode()
        evil = b"".join(compose(config, [layer], [shelf.layer(layer)], tags=("debian:latest",)).chunks())
        there = Path(nodes[0].road.folder) / f"{image.archive.name}.part"

        def swap() -> None:
            there.write_bytes(evil + bytes(LAYER // 2 - len(evil)))

        answers = send(Slow(image.archive, seconds=3, at=LAYER // 2, then=swap), nodes)
        assert "gpu-1" in answers.bad
        for node in nodes:
            assert set(node.dockerd.images()) <= {image.digest}

    def test_what_another_archive_left_goes(self, nodes: list[Node], image: Image) -> None:
        folder = Path(nodes[0].road.folder)
        folder.mkdir()
        (folder / "0123456789abcdef.part").write_bytes(bytes(1000))
        assert send(image.archive, nodes[:1]).bad == {}
        assert nodes[0].kept == []


class TestWhatDoesNotFit:
    def test_a_node_that_cannot_give_is_passed_over(self, nodes: list[Node], image: Image) -> None:
        """Its address is not its own, so it cannot listen there; nor can it fetch from there."""
        roads = {node.machine.name: node.road for node in nodes}
        roads["gpu-1"] = replace(roads["gpu-1"], address="192.0.2.1")
        parcel = Slow(image.archive)
        assert sorted(send(parcel, nodes, roads=roads).good) == ["gpu-1", "gpu-2", "gpu-3"]
        assert len(parcel.starts) == 2, "the second is fed from here, the third by the second"

    def test_nodes_that_cannot_reach_each_other_are_fed_from_here(self, nodes: list[Node], image: Image) -> None:
        roads = {name: replace(road, address=None) for name, road in _roads(nodes).items()}
        parcel = Slow(image.archive)
        assert sorted(send(parcel, nodes, roads=roads).good) == ["gpu-1", "gpu-2", "gpu-3"]
        assert parcel.starts == [0, 0, 0]

    def test_two_at_once_are_one_too_many(self, nodes: list[Node], image: Image) -> None:
        second: list[NodeError] = []
        parcel = Slow(image.archive, at=MB, then=lambda: second.extend(send(image.archive, nodes[:1]).bad.values()))
        assert send(parcel, nodes[:1]).bad == {}
        assert [type(error) for error in second] == [BusyError]
        assert second[0].exit_code == 7

    def test_a_disk_that_is_too_small_is_told_before_a_byte_is_sent(self, nodes: list[Node], image: Image) -> None:
        parcel = Slow(image.archive)
        parcel.size = 1 << 60
        answers = send(parcel, nodes[:1])
        assert isinstance(answers.bad["gpu-1"], CommandError)
        assert "no room in" in str(answers.bad["gpu-1"])
        assert parcel.starts == []


class TestTheServerBetweenNodes:
    def test_lets_in_nobody_else_and_gives_nothing_else(self, nodes: list[Node], image: Image, site: Site) -> None:
        said: dict[str, tuple[int, bytes]] = {}

        def try_it() -> None:
            server = next(path for path in _keys() if _address(path) == "127.0.0.2")
            client = next(path for path in _keys() if _address(path) == "127.0.0.3") / "client"
            for name, key, own, words in (
                ("the user's own key", site.key, "127.0.0.3", ("0",)),
                ("another address", client, "127.0.0.9", ("0",)),
                ("no number", client, "127.0.0.3", ("id",)),
                ("a number and more", client, "127.0.0.3", ("0; id",)),
                ("a leading zero", client, "127.0.0.3", ("010",)),
                ("a forwarding", client, "127.0.0.3", ("-W", "127.0.0.1:22")),
                ("the bytes", client, "127.0.0.3", ("0",)),
            ):
                said[name] = _ssh(key, server, own, *words)

        assert send(Slow(image.archive, seconds=4, at=LAYER // 3, then=try_it), nodes).bad == {}
        assert said == {
            "the user's own key": (255, b""),
            "another address": (255, b""),
            "no number": (64, b""),
            "a number and more": (64, b""),
            "a leading zero": (64, b""),
            "a forwarding": (255, b""),
            "the bytes": (0, b"manifest.json"),
        }


def _keys() -> list[Path]:
    return list(Path("/dev/shm").glob("launcher-??????????"))


def _address(keys: Path) -> str:
    return (keys / "config").read_text().partition("ListenAddress ")[2].split()[0]


def _ssh(key: Path, server: Path, own: str, *words: str) -> tuple[int, bytes]:
    """What somebody gets who asks a node's server: the exit status, or the first bytes."""
    known = server.parent / f"{server.name}-known"
    known.write_text(f"peer {(server / 'host.pub').read_text()}")
    (port,) = re.findall(r"^Server listening on \S+ port (\d+)", (server / "log").read_text(), re.MULTILINE)[-1:]
    options = ["-o", "HostKeyAlias=peer", "-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=yes"]
    options += ["-o", "BatchMode=yes", "-o", "LogLevel=QUIET"]
    where = (_address(server), *words) if len(words) == 1 else (*words, _address(server))
    asked = subprocess.Popen(
        ["ssh", "-F", "/dev/null", "-T", "-i", str(key), "-b", own, "-p", port, *options, *where],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert asked.stdout
    got = asked.stdout.read(13)
    asked.stdout.close()
    if got:
        asked.kill()
    code = asked.wait(60)
    known.unlink()
    return (0 if got else code), got


def _roads(nodes: list[Node]) -> dict[str, Road]:
    return {node.machine.name: node.road for node in nodes}


# A launcher that is killed when half of it has been sent.
ORPHAN = """
import json, sys
from pathlib import Path
from cluster.archive import Archive, compose
from cluster.dockerd import DockerEngine
from cluster.fleet import Machine
from launcher.stages.relay import Road, relay
from tests.loopback.conftest import Site
from tests.loopback.test_relay import Slow

folder, key, told = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
site = Site(folder=folder, key=key)
from cluster.trust import Address
machines, roads = [], {}
for one in told["nodes"]:
    address = Address(node=one["name"], host=one["host"], port=one["port"], identity_file=str(key))
    transport = site.reach(address)
    machines.append(Machine(name=one["name"], transport=transport, engine=DockerEngine(transport)))
    roads[one["name"]] = Road(folder=one["folder"], address=one["host"])
pieces = tuple(bytes.fromhex(piece) if fixed else Path(piece) for piece, fixed in told["pieces"])
archive = Archive(pieces=pieces, sizes=tuple(told["sizes"]))
half = archive.size // 2
relay(Slow(archive, seconds=20, at=half, then=lambda: print("half", flush=True)), machines, roads, lambda *_: None)
"""


def _told(nodes: list[Node], image: Image) -> dict[str, object]:
    return {
        "nodes": [
            {
                "name": node.machine.name,
                "host": node.sshd.host,
                "port": node.sshd.port,
                "folder": node.road.folder,
            }
            for node in nodes
        ],
        "pieces": [
            (piece.hex(), True) if isinstance(piece, bytes) else (str(piece), False) for piece in image.archive.pieces
        ],
        "sizes": image.archive.sizes,
    }

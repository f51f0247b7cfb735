"""The commands about images, called as a user calls them: on two nodes and a machine with engines of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.inventory import load_inventory
from cluster.shelf import Shelf
from launcher.image import FINGERPRINT, PARTS
from launcher.stages.build import read_recipe
from tests.loopback.conftest import Site
from tests.loopback.images import docker, make_image, make_layer
from tests.loopback.nodes import Dockerd, Node, nodes_of

ROOT = Path(__file__).parents[2]
PROGRESS = re.compile(r"  \S+ \d+/\d+ MB")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """A user with an inventory of two nodes, and an engine on this machine."""

    folder: Path
    nodes: list[Node]
    here: Dockerd

    def __call__(self, *words: str, code: int = 0) -> str:
        """Call the program; what it wrote, the second stream after the first."""
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *words],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "LAUNCHER_STATE": str(self.folder / "state"),
                "DOCKER_HOST": f"unix://{self.here.socket}",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert done.returncode == code, done.stdout + done.stderr
        told = [line for line in done.stderr.splitlines(keepends=True) if not PROGRESS.match(line)]
        return done.stdout + "".join(told)

    def json(self, *words: str) -> Any:
        """Call the program for data."""
        return json.loads(self(*words, "--json").partition("\n}")[0] + "\n}")

    def image(self, *engines: Dockerd, tag: str | None, code: str = "x", **labels: str) -> str:
        """Give engines a small image; its digest."""
        digest, archive = make_image(
            Shelf(self.folder / "maker"),
            [make_layer("base", b"base" * 5000), make_layer("code", code.encode())],
            mark="desk",
            labels=labels,
        )
        for engine in engines:
            docker("-H", f"unix://{engine.socket}", "load", "-q", stdin=b"".join(archive.chunks()))
            if tag:
                engine.say("tag", digest, tag)
        return digest

    @property
    def tag(self) -> str:
        """The image that the inventory asks for."""
        inventory = load_inventory(self.folder / "cluster.yaml")
        return read_recipe(inventory.image, inventory.flavour).tag


@pytest.fixture
def desk(tmp_path: Path, engines: list[Dockerd], site: Site) -> Iterator[Desk]:
    here, *others = engines
    with nodes_of(tmp_path / "nodes", others, site) as nodes:
        folder = tmp_path / "desk"
        known = folder / "state" / "clusters" / "lab" / "known_hosts"
        known.parent.mkdir(parents=True)
        known.write_bytes(site.known_hosts.read_bytes())
        lines = ["name: lab", "accelerator: cpu", f"defaults: {{identity_file: {site.key}}}", "nodes:"]
        lines += [
            f"  - {{name: {node.machine.name}, host: {node.sshd.host}, port: {node.sshd.port}, "
            f"address: {node.sshd.host}, paths: {{state: {tmp_path}/launcher}}}}"
            for node in nodes
        ]
        (folder / "cluster.yaml").write_text("\n".join(lines) + "\n")
        yield Desk(folder=folder, nodes=nodes, here=here)
    here.clear()


def ours(parts: dict[str, str] | None = None, *, flavour: str = "cpu") -> dict[str, str]:
    """Labels of an image that we have built."""
    told = {} if parts is None else {PARTS: json.dumps(parts)}
    return {FINGERPRINT: "0" * 64, "launcher.flavour": flavour, **told}


class TestShip:
    def test_any_image_goes_to_every_node_and_a_second_time_nothing_does(self, desk: Desk) -> None:
        digest = desk.image(desk.here, tag="site/eval:3")
        said = desk.json("image", "ship", "site/eval:3")
        assert (said["image"], said["digest"], sorted(said["sent"])) == ("site/eval:3", digest, ["gpu-1", "gpu-2"])
        for node in desk.nodes:
            assert node.machine.engine.image_id("site/eval:3") == digest
        assert desk("image", "ship", "site/eval:3") == "site/eval:3: every node has it\n"

    def test_what_one_node_has_goes_to_the_other(self, desk: Desk) -> None:
        digest = desk.image(desk.nodes[1].dockerd, tag="site/eval:4")
        assert list(desk.json("image", "ship", "site/eval:4")["sent"]) == ["gpu-1"]
        assert desk.nodes[0].machine.engine.image_id("site/eval:4") == digest
        assert desk.here.images() == []

    def test_what_nobody_has_is_told_with_the_cure(self, desk: Desk) -> None:
        assert desk("image", "ship", "site/none:1", code=5).splitlines() == [
            "error: node this machine: the image site/none:1 is on neither this machine nor a node",
            "  next: docker pull site/none:1, or docker load it, on this machine",
        ]


class TestFiles:
    def test_an_image_travels_in_a_file(self, desk: Desk) -> None:
        digest = desk.image(desk.here, tag="site/eval:5", code="the code")
        said = desk.json("image", "save", "image.tar", "site/eval:5")
        assert (said["digest"], said["bytes"]) == (digest, (desk.folder / "image.tar").stat().st_size)
        desk.here.clear()
        assert desk("image", "load", "image.tar") == "site/eval:5 is here\n"
        assert desk.here.images() == [digest]

    def test_an_engine_takes_the_file_without_us(self, desk: Desk) -> None:
        digest = desk.image(desk.here, tag="site/eval:6")
        desk("image", "save", "image.tar", "site/eval:6")
        desk.here.clear()
        desk.here.say("load", "-q", "-i", str(desk.folder / "image.tar"))
        assert desk.here.images() == [digest]
        assert desk.here.say("image", "inspect", "site/eval:6").returncode == 0

    def test_a_damaged_file_is_not_loaded(self, desk: Desk) -> None:
        desk.image(desk.here, tag="site/eval:7")
        desk("image", "save", "image.tar", "site/eval:7")
        desk.here.clear()
        path = desk.folder / "image.tar"
        with tarfile.open(path) as archive:
            at = next(one.offset_data for one in archive if one.name.endswith("layer.tar"))
        content = bytearray(path.read_bytes())
        content[at + 30] ^= 1
        path.write_bytes(content)
        said = desk("image", "load", "image.tar", code=8)
        assert said.startswith("error: image.tar: ")
        assert desk.here.images() == []
        path.write_bytes(content[: len(content) // 2])
        desk("image", "load", "image.tar", code=8)
        assert desk.here.images() == []

    def test_what_cannot_be_written_or_read_is_one_message_and_leaves_nothing(self, desk: Desk) -> None:
        desk.image(desk.here, tag="site/eval:8")
        said = desk("image", "save", "nowhere/image.tar", "site/eval:8", code=1)
        assert said.startswith("error: nowhere/image.tar: the file cannot be written")
        assert "cannot be read" in desk("image", "load", "missing.tar", code=2)
        desk("image", "save", "other.tar", "site/none:1", code=5)
        assert sorted(path.name for path in desk.folder.iterdir()) == ["cluster.yaml", "maker", "state"]


class TestListing:
    def test_every_machine_is_told_of_and_what_it_lacks(self, desk: Desk) -> None:
        digest = desk.image(desk.here, desk.nodes[0].dockerd, tag=desk.tag, **ours())
        old = desk.image(desk.nodes[1].dockerd, tag="launcher/cpu:old", code="older", **ours())
        desk.image(desk.nodes[1].dockerd, tag="site/eval:9", code="theirs")
        said = desk.json("image", "ls")
        assert said["image"] == desk.tag
        assert {(one["machine"], one["digest"], one["state"]) for one in said["images"]} == {
            ("this machine", digest, "current"),
            ("gpu-1", digest, "current"),
            ("gpu-2", old, "may go"),
        }
        assert said["lacks"] == {"gpu-2": "lacks 1 of 2 layers"}
        lines = desk("image", "ls").splitlines()
        assert lines[0].split() == ["machine", "image", "digest", "size", "state"]
        assert len(lines) == 5

    def test_a_node_that_is_silent_is_told_beside_the_others(self, desk: Desk) -> None:
        desk.nodes[1].sshd.stop()
        said = desk.json("image", "ls")
        assert list(said["silent"]) == ["gpu-2"]
        assert said["lacks"] == {"this machine": "lacks it; nobody has it", "gpu-1": "lacks it; nobody has it"}


class TestPruning:
    def test_only_what_is_ours_and_needed_by_nobody_goes(self, desk: Desk) -> None:
        node, other = (one.dockerd for one in desk.nodes)
        current = desk.image(node, other, desk.here, tag=desk.tag, **ours())
        gone = [
            desk.image(node, tag="launcher/cpu:old", code="old", **ours()),
            desk.image(node, tag=None, code="without a name", **ours()),
        ]
        used = desk.image(node, tag="launcher/cpu:used", code="used", **ours())
        node.say("create", "--name", "keeps", used, "sh")
        theirs = desk.image(node, tag="site/mine:1", code="named by somebody", **ours())
        foreign = desk.image(node, tag="launcher/fake:1", code="not built by us")
        try:
            told = desk("image", "prune", "--dry-run").splitlines()
            assert len(told) == 2
            assert all(line.startswith("gpu-1: would remove launcher/") for line in told)
            assert {*gone} < {*node.images()}
            said = desk.json("image", "prune")
            assert sorted(one["digest"] for one in said["gone"]) == sorted(gone)
            assert {*node.images()} == {current, used, theirs, foreign}
            assert desk("image", "prune") == "nothing to remove\n"
        finally:
            node.say("rm", "-f", "keeps")
        assert desk.json("image", "prune")["gone"][0]["digest"] == used
        assert other.images() == desk.here.images() == [current]

    def test_what_a_broken_transfer_left_goes(self, desk: Desk) -> None:
        desk.image(desk.here, tag="site/eval:1")
        desk("image", "ship", "site/eval:1")  # so that the nodes are known here
        folder = desk.folder.parent / "launcher" / "lab" / "gpu-1" / "ship"
        folder.mkdir(parents=True)
        (folder / "abc.part").write_bytes(bytes(1000))
        desk("image", "prune")
        assert list(folder.iterdir()) == []


class TestWhy:
    def test_a_changed_recipe_is_explained_part_by_part(self, desk: Desk) -> None:
        inventory = load_inventory(desk.folder / "cluster.yaml")
        recipe = read_recipe(inventory.image, inventory.flavour)
        parts = json.loads(recipe.labels[PARTS])
        before = {**parts, "file Dockerfile": "another", "argument BASE": "debian:trixie-slim", "file gone.sh": "1"}
        desk.image(desk.nodes[0].dockerd, tag="launcher/cpu:before", **ours(before))
        desk.image(desk.nodes[0].dockerd, tag="launcher/cuda:x", code="x", **ours({}, flavour="cuda"))
        said = desk.json("image", "why")
        assert said == {
            "image": desk.tag,
            "present": False,
            "before": "launcher/cpu:before",
            "machine": "gpu-1",
            "changes": [
                "argument BASE: changed (debian:trixie-slim -> debian:bookworm-slim)",
                "file Dockerfile: changed",
                "file gone.sh: removed",
            ],
        }
        assert desk("image", "why").splitlines()[0] == f"{desk.tag} has to be built"

    def test_an_image_of_before_the_parts_were_kept_says_so(self, desk: Desk) -> None:
        desk.image(desk.here, tag="launcher/cpu:before", **ours())
        assert desk("image", "why", "launcher/cpu:before").splitlines()[2:] == [
            "  it was built before this was written down"
        ]

    def test_what_is_nowhere_cannot_be_compared_with(self, desk: Desk) -> None:
        assert desk("image", "why").splitlines()[1:] == ["  there is no other one"]
        assert "no image 'launcher/cpu:none' of ours is on any machine" in desk(
            "image", "why", "launcher/cpu:none", code=2
        )

    def test_a_ready_image_has_no_recipe(self, desk: Desk) -> None:
        path = desk.folder / "cluster.yaml"
        path.write_text(path.read_text() + "image: {use: 'site/eval:3'}\n")
        assert "it has no recipe of ours" in desk("image", "why", code=2)

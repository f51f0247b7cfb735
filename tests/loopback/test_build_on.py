"""An image that is built on a node, by the node's own engine over SSH, and goes from there to the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.loopback.desk import Desk
from tests.loopback.images import rootfs
from tests.loopback.nodes import Dockerd
from tests.loopback.test_layer import ask, make_below, put_below, run

IMAGE = "flavour: cpu, dockerfile: image/Dockerfile"


@pytest.fixture(scope="module")
def below() -> bytes:
    """The build context of what stands in for our image."""
    return make_below(rootfs(), {})


@pytest.fixture
def site_desk(desk: Desk) -> Iterator[Desk]:
    """A user with a Dockerfile, whose nodes need not be fit for training."""
    folder = desk.folder / "image"
    folder.mkdir()
    (folder / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\nCOPY said /\n")
    (folder / "said").write_text("built\n")
    path = desk.folder / "cluster.yaml"
    path.write_text(path.read_text() + "container: {ulimits: {stack: 67108864}}\n")  # memlock is not everybody's
    yield desk
    for one in (*(node.dockerd for node in desk.nodes), desk.here):
        for container in one.say("ps", "-aq").stdout.decode().split():
            one.say("rm", "-f", container)


@pytest.fixture
def nowhere(site_desk: Desk, tmp_path: Path) -> Desk:
    """The same user where this machine has no engine."""
    return replace(site_desk, here=Dockerd(tmp_path / "none"))


def has(desk: Desk, tag: str) -> list[str]:
    """The nodes that have it."""
    return [node.machine.name for node in desk.nodes if node.machine.engine.image_id(tag)]


def test_the_context_goes_to_the_node_and_the_image_from_there_to_the_others(site_desk: Desk, below: bytes) -> None:
    recipe = ask(site_desk, IMAGE)
    first, other = site_desk.nodes
    put_below(recipe, below, first.machine.engine)
    words = ("image", "build", "--flavour", "cpu", "--dockerfile", "image/Dockerfile", "--build-on", "gpu-1")
    said = site_desk.json(*words)
    assert (said["tag"], said["built"]) == (recipe.tag, True)
    assert said["digest"] == first.machine.engine.image_id(recipe.tag)
    assert site_desk.json(*words)["built"] is False
    assert run(first.dockerd, recipe.tag, "cat", "/said") == "built"
    assert (has(site_desk, recipe.tag), site_desk.here.images()) == (["gpu-1"], [])
    assert list(site_desk.json("image", "ship", recipe.tag)["sent"]) == ["gpu-2"]
    assert other.machine.engine.image_id(recipe.tag) == said["digest"]
    assert site_desk.here.images() == []


def test_the_inventory_says_where_and_up_does_it(site_desk: Desk, below: bytes) -> None:
    recipe = ask(site_desk, f"{IMAGE}, build_on: gpu-2")
    put_below(recipe, below, site_desk.nodes[1].machine.engine)
    assert f"build the image {recipe.tag} on gpu-2" in site_desk("up", "--dry-run")
    said = site_desk("up")
    assert f"building {recipe.tag} on gpu-2\n" in said
    assert "built the image; sent it to gpu-1; started gpu-1, gpu-2" in said
    assert (has(site_desk, recipe.tag), site_desk.here.images()) == (["gpu-1", "gpu-2"], [])
    assert "nothing to do" in site_desk("up")


def test_without_an_engine_here_the_node_that_has_what_is_below_builds(nowhere: Desk, below: bytes) -> None:
    recipe = ask(nowhere, IMAGE)
    put_below(recipe, below, nowhere.nodes[1].machine.engine)
    assert f"building {recipe.tag} on gpu-2: this machine has no Docker engine\n" in nowhere("up")
    assert has(nowhere, recipe.tag) == ["gpu-1", "gpu-2"]


def test_this_machine_can_be_insisted_on(nowhere: Desk) -> None:
    recipe = ask(nowhere, f"{IMAGE}, build_on: here")
    said = nowhere("up", code=4)
    assert "error: node this machine: " in said
    assert has(nowhere, recipe.tag) == []


def test_a_node_that_is_none_is_refused_before_anything_is_asked(site_desk: Desk) -> None:
    said = site_desk("image", "build", "--build-on", "gpu-7", code=2)
    assert said.splitlines() == [
        "error: there is no node 'gpu-7'",
        "  next: the nodes are: gpu-1, gpu-2",
    ]
    path = site_desk.folder / "cluster.yaml"
    path.write_text(path.read_text() + "image: {build_on: gpu-7}\n")
    line = len(path.read_text().splitlines())
    assert f"error: cluster.yaml:{line}:9: image.build_on 'gpu-7' is none of the nodes" in site_desk("up", code=2)

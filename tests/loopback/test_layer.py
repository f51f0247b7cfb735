"""The user's layer on real engines: built on a small image in our image's place, sent, listed, explained, removed."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cluster.dockerd import DockerEngine
from cluster.engine import Engine
from cluster.inventory import load_inventory
from launcher.image import context_folder, read_pins
from launcher.images import HERE
from launcher.layer import BASE
from launcher.stages.build import Recipe, read_recipe
from tests.loopback.desk import Desk
from tests.loopback.images import packages_folder, python_rootfs, rootfs
from tests.loopback.nodes import Dockerd, HereButThere

TORCH = read_pins((context_folder() / "requirements.txt").read_text())["torch"]
BELOW = b"""
FROM scratch
ADD rootfs.tar more.tar /
ENV PATH=/opt/venv/bin:/bin
USER launcher
WORKDIR /home/launcher
"""


@pytest.fixture(scope="module")
def below() -> bytes:
    """The build context of what stands in for our image: a shell, Python and pip, and a torch by name."""
    about = f"{packages_folder()}/torch-{TORCH}.dist-info"
    torch = {f"{about}/METADATA": metadata("torch", TORCH).encode(), f"{about}/RECORD": b"", f"{about}/INSTALLER": b"-"}
    return make_below(python_rootfs(), torch)


def make_below(rootfs: bytes, files: Mapping[str, bytes]) -> bytes:
    users = {"etc/passwd": b"root:x:0:0::/root:/bin/sh\nlauncher:x:1000:1000::/home/launcher:/bin/sh\n"}
    return make_tar({"Dockerfile": BELOW, "rootfs.tar": rootfs, "more.tar": make_tar({**users, **files})})


@pytest.fixture
def folder(desk: Desk) -> Path:
    """Where the user has wheels and a requirements file; no index is asked."""
    wheels = desk.folder / "wheels"
    wheels.mkdir()
    for version in ("1", "2"):
        write_wheel(wheels, "labtool", version)
    write_wheel(wheels, "needy", "1", needs="torch==0.1")
    (desk.folder / "requirements.txt").write_text("--no-index\n")
    return desk.folder


def make_tar(files: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return made.getvalue()


def metadata(name: str, version: str, needs: str = "") -> str:
    required = f"Requires-Dist: {needs}\n" if needs else ""
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}"


def write_wheel(folder: Path, name: str, version: str, *, needs: str = "") -> None:
    """A wheel with one module, and perhaps a requirement."""
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{about}/METADATA": metadata(name, version, needs),
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{about}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in {**files, f"{about}/RECORD": record}.items():
            wheel.writestr(file, text)


def ask(desk: Desk, image: str) -> Recipe:
    """Write what the inventory says of the image, and read what is to be built."""
    path = desk.folder / "cluster.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("image:")]
    path.write_text("\n".join([*lines, f"image: {{{image}}}"]) + "\n")
    inventory = load_inventory(path)
    return read_recipe(inventory.image, inventory.flavour)


@pytest.fixture
def here(desk: Desk) -> Iterator[DockerEngine]:
    """This machine's engine, past the program."""
    engine = DockerEngine(HereButThere(desk.here.socket))
    yield engine
    engine.close()


def put_below(recipe: Recipe, context: bytes, engine: Engine) -> None:
    """Have the stand-in on an engine under the name of the image that the layer stands on."""
    under = recipe.under
    assert under is not None
    engine.build(
        io.BytesIO(context), tag=under.tag, arguments={}, labels=under.labels, network="none", tell=lambda _: None
    )


def run(engine: Dockerd, image: str, *argv: str) -> str:
    """Run something in an image, as the user that it says."""
    done = engine.say("run", "--rm", "--network", "none", image, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def states(desk: Desk) -> dict[tuple[str, str], str]:
    """What `image ls` says of every image that has a name, and of those that have none."""
    found = desk.json("image", "ls")["images"]
    return {(one["machine"], (one["names"] or [one["digest"]])[0]): one["state"] for one in found}


def unnamed(desk: Desk) -> list[str]:
    """The digests of our images on this machine that have no name: what a builder leaves."""
    found = desk.json("image", "ls")["images"]
    return [one["digest"] for one in found if one["machine"] == "this machine" and not one["names"]]


PACKAGES = "flavour: cpu, wheels: wheels, requirements: requirements.txt, packages: ['labtool==%s']"
BUILD = ("image", "build", "--flavour", "cpu", "--wheels", "wheels", "--requirements", "requirements.txt")


def test_packages_are_put_on_top_and_alone_travel_to_nodes_that_have_what_is_below(
    desk: Desk, here: DockerEngine, folder: Path, below: bytes
) -> None:
    recipe = ask(desk, PACKAGES % 1)
    put_below(recipe, below, here)
    assert desk.json(*BUILD, "--package", "labtool==1", "--dry-run") == {
        "tag": recipe.tag,
        "digest": None,
        "built": False,
    }
    assert desk.json(*BUILD, "--package", "labtool==1") == {
        "tag": recipe.tag,
        "digest": (digest := here.image_id(recipe.tag)),
        "built": True,
    }
    assert desk.json(*BUILD, "--package", "labtool==1")["built"] is False
    tried = ("python3", "-c", "import labtool, getpass; print(labtool.version, getpass.getuser())")
    assert run(desk.here, recipe.tag, *tried) == "1 launcher"

    whole = desk.json("image", "ship", recipe.tags[1])["sent"]
    sent = desk.json("image", "ship", recipe.tag)["sent"]
    assert sorted(sent) == ["gpu-1", "gpu-2"]
    for node in desk.nodes:
        assert node.machine.engine.image_id(recipe.tag) == digest
        assert run(node.dockerd, recipe.tag, *tried) == "1 launcher"
        assert sent[node.machine.name] * 50 < whole[node.machine.name]


def test_a_layer_is_listed_explained_and_removed_and_what_it_stands_on_stays(
    desk: Desk, here: DockerEngine, folder: Path, below: bytes
) -> None:
    recipe = ask(desk, PACKAGES % 1)
    put_below(recipe, below, here)
    desk(*BUILD, "--package", "labtool==1")
    assert {name: state for name, state in states(desk).items() if name[1] in recipe.tags} == {
        (HERE, recipe.tag): "current",
        (HERE, recipe.tags[1]): "below another",
    }
    said = desk(*BUILD, "--package", "needy", code=5)
    assert "the image does not build" in said
    assert (
        "ask for versions that go together, and with the image's own torch, deepspeed, accelerate, which stay" in said
    )
    stages = unnamed(desk)
    assert stages, "the builder leaves its stages, those of the build that failed among them"

    other = ask(desk, PACKAGES % 2)
    assert other.tags[1] == recipe.tags[1]
    assert desk.json("image", "why") == {
        "image": other.tag,
        "present": False,
        "before": recipe.tag,
        "machine": HERE,
        "changes": [
            "layer: file packages.txt: changed",  # it holds the requirements, too
            "layer: package labtool==1: removed",
            "layer: package labtool==2: added",
        ],
    }
    assert desk.json("image", "why", stages[0])["before"] == "launcher/?"

    ask(desk, PACKAGES % 1)
    gone = desk.json("image", "prune")["gone"]
    assert {one["digest"] for one in gone} >= {*stages}
    assert states(desk) == {(HERE, recipe.tag): "current", (HERE, recipe.tags[1]): "below another"}
    assert run(desk.here, recipe.tag, "python3", "-c", "import labtool; print(labtool.version)") == "1"
    ask(desk, PACKAGES % 2)
    assert [one["image"] for one in desk.json("image", "prune")["gone"]] == [recipe.tag]
    assert states(desk) == {(HERE, recipe.tags[1]): "below another"}


def test_a_dockerfile_of_the_users_is_built_and_leaves_the_user_that_it_found(desk: Desk, here: DockerEngine) -> None:
    folder = desk.folder
    (folder / "image").mkdir()
    (folder / "image" / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\nUSER root\nWORKDIR /tmp\nCOPY tool /bin/\n")
    (folder / "image" / "tool").write_text("#!/bin/sh\nid -un; pwd\n")
    (folder / "image" / "tool").chmod(0o755)
    recipe = ask(desk, "flavour: cpu, dockerfile: image/Dockerfile")
    put_below(recipe, make_below(rootfs(), {}), here)
    assert desk.json("image", "build", "--flavour", "cpu", "--dockerfile", "image/Dockerfile")["tag"] == recipe.tag
    assert run(desk.here, recipe.tag, "tool").split() == ["launcher", "/home/launcher"]
    built = here.image(recipe.tag)
    assert built is not None
    assert built.labels[BASE] == recipe.tags[1]

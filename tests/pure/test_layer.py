"""The user's layer as a value: what it is made of, what is refused, and its name beside the image below."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest

from cluster.dockerd import context_files
from cluster.document import read
from cluster.errors import InputError
from cluster.inventory import ImageRecipe, read_inventory
from launcher.image import FINGERPRINT, Recipe, context_folder, explain, read_parts, write_context
from launcher.layer import BASE, Layer, arguments, check_dockerfile, cure, load_packages, read_requirements
from launcher.stages.build import Recipe as Read
from launcher.stages.build import read_recipe

PLAIN = ImageRecipe()


def contents(recipe: Read) -> dict[str, bytes]:
    made = io.BytesIO()
    write_context(recipe.entries, made, folders=recipe.folders)
    made.seek(0)
    with tarfile.open(fileobj=made) as archive:
        files = {one.name: archive.extractfile(one) for one in archive}
    return {name: file.read() for name, file in files.items() if file}


def refusal(recipe: ImageRecipe) -> InputError:
    with pytest.raises(InputError) as caught:
        read_recipe(recipe, "cpu")
    return caught.value


def test_an_image_without_a_layer_is_what_it_was() -> None:
    recipe = read_recipe(PLAIN, "cpu")
    assert (recipe.under, recipe.tags) == (None, (recipe.tag,))


def test_a_layer_leaves_the_image_below_as_it_is_and_every_change_makes_another_one(tmp_path: Path) -> None:
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("einops\n")
    base = read_recipe(PLAIN, "cpu").tag
    recipes = [
        read_recipe(ImageRecipe(packages=("einops",)), "cpu"),
        read_recipe(ImageRecipe(packages=("einops==0.8.1",)), "cpu"),
        read_recipe(ImageRecipe(apt=("ffmpeg",)), "cpu"),
        read_recipe(ImageRecipe(requirements=wanted, apt=("ffmpeg",)), "cpu"),
    ]
    assert all(re.fullmatch(rf"{base}-[0-9a-f]{{12}}", recipe.tag) for recipe in recipes)
    assert len({recipe.tag for recipe in recipes}) == len(recipes)
    assert {recipe.tags[1:] for recipe in recipes} == {(base,)}
    assert {recipe.labels[BASE] for recipe in recipes} == {base}
    assert len({recipe.labels[FINGERPRINT] for recipe in recipes}) == len(recipes)
    assert read_recipe(ImageRecipe(packages=("einops",)), "cpu").tag == recipes[0].tag
    other = read_recipe(ImageRecipe(packages=("einops",), base="debian:13"), "cpu")
    assert other.tag.rpartition("-")[2] != recipes[0].tag.rpartition("-")[2]


def test_the_context_of_packages_holds_lists_and_the_versions_that_stay(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("torch-2.13.0+cpu-cp311.whl", "nvidia_nccl-2-py3.whl", "lab-1-py3.whl"):
        (wheels / name).write_bytes(b"wheel")
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("# ours\n--pre\nrich")
    recipe = read_recipe(
        ImageRecipe(packages=("lab", "einops"), requirements=wanted, apt=("tree",), wheels=wheels), "cpu"
    )
    found = contents(recipe)
    assert sorted(found) == [
        *("Dockerfile", "apt.sh", "apt.txt", "constraints.txt", "packages.sh", "packages.txt", "wheels/lab-1-py3.whl")
    ]
    assert found["apt.txt"] == b"tree\n"
    assert found["packages.txt"] == b"# ours\n--pre\nrich\nlab\neinops\n"
    pins = dict(line.split("==") for line in found["constraints.txt"].decode().splitlines())
    assert list(pins) == ["torch", "deepspeed", "accelerate"]
    assert f"torch=={pins['torch']}\n" in (context_folder() / "requirements.txt").read_text()


def test_wheels_are_sent_only_for_packages(tmp_path: Path) -> None:
    (tmp_path / "lab-1-py3.whl").write_bytes(b"wheel")
    entries = load_packages(context_folder(), Layer(apt=("tree",)), flavour="cpu", wheels=tmp_path)
    assert "wheels/lab-1-py3.whl" not in [entry.name for entry in entries]


def test_every_argument_is_declared_in_the_layers_dockerfile() -> None:
    text = (context_folder() / "layer" / "Dockerfile").read_text()
    declared = set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    assert {"BASE", *arguments(Recipe(pip_index="i", apt_mirror="m"))} == declared
    assert not re.search(r"--mount=|<<|--link|--chmod|^# *syntax=", text, re.MULTILINE)
    check_dockerfile(text, "Dockerfile")


def test_the_layer_ends_as_the_image_below_does() -> None:
    below = (context_folder() / "Dockerfile").read_text()
    ending = "\nUSER launcher\nWORKDIR /home/launcher\n"
    assert ending in below
    assert (context_folder() / "layer" / "Dockerfile").read_text().endswith(ending)


@pytest.mark.parametrize("line", ["-r more.txt", "--requirement=more.txt", "-c pins.txt", "-e .", "./lab", "/lab", "."])
def test_a_requirements_file_stands_alone(line: str) -> None:
    with pytest.raises(InputError) as caught:
        read_requirements(f"einops\n  {line}\n", "requirements.txt")
    assert caught.value.where == "requirements.txt:2:3"


def test_a_requirements_file_may_have_options_comments_and_hashes() -> None:
    text = "--extra-index-url https://pypi.example/simple\neinops==0.8.1 \\\n    --hash=sha256:00\n# -r nothing\n.x\n"
    assert read_requirements(text, "requirements.txt") == text


def test_a_file_that_is_not_there_is_told_by_its_key(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    said = refusal(ImageRecipe(requirements=gone))
    assert (said.what, said.place) == (f"there is no file {gone}", ("image", "requirements"))
    assert refusal(ImageRecipe(dockerfile=gone / "Dockerfile")).place == ("image", "dockerfile")
    gone.write_bytes(b"\xff\xfe")
    assert refusal(ImageRecipe(requirements=gone)).what == f"{gone} is not UTF-8"


@pytest.fixture
def dockerfile(tmp_path: Path) -> Path:
    folder = tmp_path / "image"
    (folder / "lib").mkdir(parents=True)
    path = folder / "Dockerfile.train"
    path.write_text("ARG BASE\nFROM ${BASE}\nUSER root\nCOPY lib/ /lib/")
    (folder / "lib" / "tool").write_text("#!/bin/sh\n")
    (folder / "lib" / "data").write_text("data")
    (folder / "large.bin").write_bytes(bytes(3000))
    (folder / ".dockerignore").write_text("# not for the build\n*.bin\n")
    return path


def test_a_dockerfile_of_the_users_comes_with_its_folder_and_ends_as_the_image_below(dockerfile: Path) -> None:
    (dockerfile.parent / "lib" / "tool").chmod(0o755)
    written = dockerfile.read_bytes()
    recipe = read_recipe(ImageRecipe(dockerfile=dockerfile), "cpu")
    assert recipe.dockerfile == "Dockerfile.train"
    assert contents(recipe) == {
        "Dockerfile.train": written + b"\nUSER launcher\nWORKDIR /home/launcher\n",
        "lib/data": b"data",
        "lib/tool": b"#!/bin/sh\n",
    }
    assert [entry.name for entry in recipe.entries if entry.executable] == ["lib/tool"]
    assert context_files(dockerfile.parent, dockerfile.name)[0] == ".dockerignore"


def test_what_a_dockerfile_can_copy_decides_its_name(dockerfile: Path) -> None:
    def name() -> str:
        return read_recipe(ImageRecipe(dockerfile=dockerfile), "cpu").tag

    seen = [name()]
    (dockerfile.parent / "large.bin").write_bytes(b"left out")
    assert name() == seen[0]
    (dockerfile.parent / "lib" / "data").write_text("other")
    seen.append(name())
    (dockerfile.parent / "lib" / "tool").chmod(0o755)
    seen.append(name())
    dockerfile.write_text("ARG BASE\nFROM ${BASE}\n")
    seen.append(name())
    assert len(set(seen)) == len(seen)


def test_what_cannot_be_sent_is_told(dockerfile: Path) -> None:
    (dockerfile.parent / "lib" / "link").symlink_to("data")
    assert "only files and folders can go into the build" in str(refusal(ImageRecipe(dockerfile=dockerfile)))
    (dockerfile.parent / "lib" / "link").unlink()
    with (dockerfile.parent / "lib" / "huge").open("wb") as file:
        file.truncate(600 << 20)
    assert "the folder weighs 600 MiB" in str(refusal(ImageRecipe(dockerfile=dockerfile)))


@pytest.mark.parametrize(
    "text",
    [
        "ARG BASE\nFROM ${BASE}\n",
        "# syntax\n\narg BASE=x\nfrom $BASE as ours\nRUN true\nFROM ours\n",
        "ARG X\nARG BASE\nFROM debian AS made\nRUN make \\\n  # why\n  all\nFROM --platform=linux/amd64 ${BASE}\nRUN x",
    ],
)
def test_a_good_dockerfile_is_taken(text: str) -> None:
    check_dockerfile(text, "Dockerfile")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "Dockerfile:1:1"),
        ("FROM ${BASE}\n", "Dockerfile:1:1"),
        ("ARG BASE\nFROM debian\n", "Dockerfile:2:1"),
        ("ARG BASE\nFROM ${BASE} AS ours\nFROM debian\n", "Dockerfile:3:1"),
        ("FROM debian AS x\nARG BASE\nFROM ${BASE}\n", "Dockerfile:3:1"),
        ("ARG BASE\nRUN a \\\n  b\nFROM", "Dockerfile:4:1"),
    ],
)
def test_a_dockerfile_that_does_not_stand_on_ours_is_refused(text: str, where: str) -> None:
    with pytest.raises(InputError) as caught:
        check_dockerfile(text, "Dockerfile")
    assert caught.value.where == where


def test_a_changed_layer_is_explained_by_what_was_asked_for() -> None:
    def parts(recipe: ImageRecipe) -> dict[str, str]:
        return read_parts(read_recipe(recipe, "cpu").labels) or {}

    one = parts(ImageRecipe(packages=("einops",), apt=("tree",)))
    other = parts(ImageRecipe(packages=("einops==0.8.1",), apt=("tree",), pip_index="https://pypi.example"))
    assert explain(one, other) == (
        "argument PIP_INDEX_URL: added (https://pypi.example)",
        "layer: argument PIP_INDEX_URL: added (https://pypi.example)",
        "layer: package einops: removed",
        "layer: package einops==0.8.1: added",
    )
    assert "layer: package einops: added" in explain(parts(PLAIN), one)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ERROR: ResolutionImpossible: for help visit", "torch, deepspeed, accelerate"),
        ("lab 1 has requirement numpy<2, but you have numpy 2.4.6.", "torch, deepspeed, accelerate"),
        ("E: Unable to locate package tre", "image.apt"),
        ("ERROR: No matching distribution found for einop", "image.pip_index"),
    ],
)
def test_a_layer_that_does_not_build_comes_with_a_cure(line: str, said: str) -> None:
    assert said in (cure(["Reading package lists...", line]) or "")
    assert cure(["Segmentation fault"]) is None


def test_paths_of_the_inventory_are_meant_from_its_folder() -> None:
    text = "name: lab\nimage: {dockerfile: image/Dockerfile}\nnodes: [{name: n1, host: a}]\n"
    assert read_inventory(read(text, "/site/cluster.yaml")).image.dockerfile == Path("/site/image/Dockerfile")

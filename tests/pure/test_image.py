"""The image as a value: the same recipe, the same name; a changed one, another."""

from __future__ import annotations

import io
import re
import runpy
import tarfile
from pathlib import Path
from types import MappingProxyType

import pytest

from cluster.errors import InputError
from launcher.image import (
    Entry,
    Progress,
    Recipe,
    base_tag,
    build_arguments,
    choose_builder,
    choose_wheels,
    context_folder,
    explain,
    fingerprint,
    labels,
    load_context,
    make_entry,
    parts,
    read_parts,
    read_pins,
    read_progress,
    tag,
    write_context,
)

ROOT = Path(__file__).parents[2]
CPU = Recipe(flavour="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "docker"
    made.mkdir()
    (made / "Dockerfile").write_text("FROM scratch\n")
    (made / "requirements.txt").write_text("torch==2.13.0\n")
    (made / "base.sh").write_text("not for the builder\n")
    (made / "locks").mkdir()
    (made / "locks" / "torch.txt").write_text("numpy==2.4.6\n")
    return made


def names(entries: tuple[Entry, ...]) -> list[str]:
    return [entry.name for entry in entries]


def name_of(folder: Path, recipe: Recipe, *, base_id: str | None = None) -> str:
    entries = load_context(folder, recipe)
    return tag(recipe.flavour, fingerprint(entries, build_arguments(recipe), base_id=base_id))


def test_the_image_and_the_local_extra_pin_the_same_versions() -> None:
    pinned = read_pins((context_folder() / "requirements.txt").read_text())
    # tomllib is younger than Python 3.10: the extra is read as text.
    project = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^local = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert extra is not None
    local = read_pins("\n".join(re.findall(r'"([^"]+)"', extra[1])))
    assert local == {name: version for name, version in pinned.items() if name not in {"safetensors", "py-spy"}}


class TestLocks:
    """What pip installs into the image, by docker/locks/."""

    LOCKS = MappingProxyType({path.stem: path.read_text() for path in (ROOT / "docker" / "locks").glob("*.txt")})

    def test_they_hold_what_the_requirements_pin(self) -> None:
        pinned = read_pins((ROOT / "docker" / "requirements.txt").read_text())
        locked = {name: version.split()[0] for lock in self.LOCKS.values() for name, version in read_pins(lock).items()}
        assert {name: locked.get(name) for name in pinned} == pinned

    @pytest.mark.parametrize("name", sorted(LOCKS))
    def test_every_package_has_hashes(self, name: str) -> None:
        blocks = re.findall(r"^(\S+==\S+).*\n((?:[ \t]+.*\n)*)", self.LOCKS[name], re.MULTILINE)
        assert blocks
        assert [package for package, hashes in blocks if "--hash=sha256:" not in hashes] == []
        assert len(blocks) == len(re.findall(r"^\S", self.LOCKS[name], re.MULTILINE))

    def test_a_package_stands_in_one_lock(self) -> None:
        # A package may have two rows there, for two releases of Python.
        named = [each for lock in self.LOCKS.values() for each in {*re.findall(r"^(\S+)==", lock, re.MULTILINE)}]
        assert sorted(named) == sorted(set(named))

    def test_the_dockerfile_copies_each(self) -> None:
        dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
        assert {name for name in self.LOCKS if f" locks/{name}.txt" in dockerfile} == set(self.LOCKS)

    def test_only_the_cuda_flavour_asks_for_what_gpus_need(self) -> None:
        for name in ("tools", "torch", "build", "deepspeed", "jobs"):
            found = re.findall(r"^((?:torch|triton|nvidia|cuda)[-=].*)==", self.LOCKS[name], re.MULTILINE)
            assert [package for package in found if package != "nvidia-ml-py"] == []  # small, and pure Python


def test_the_architectures_that_are_asked_for_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docker")  # as a script finds what lies beside it
    wanted = runpy.run_path(str(ROOT / "docker" / "architectures.py"))["wanted"]
    assert wanted("8.0;9.0+PTX") == ["sm_80", "sm_90", "compute_90"]
    assert wanted("10.0 12.0+PTX") == ["sm_100", "sm_120", "compute_120"]


def test_the_docker_folder_is_no_package() -> None:
    # With an __init__.py it would shadow the Docker SDK for everything that runs in the root of a checkout.
    assert not list((ROOT / "docker").rglob("__init__.py"))


def test_the_dockerfile_keeps_to_the_classic_builder() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert not re.search(r"--mount=|<<|--link|--chmod|^# *syntax=", dockerfile, re.MULTILINE)


def test_the_table_of_ops_is_what_the_issue_asks_for() -> None:
    ops = runpy.run_path(str(ROOT / "docker" / "proof.py"))["ops"]
    table = (ROOT / "docker" / "ops.txt").read_text()
    assert set(ops(table, "cpu")) >= {"async_io", "cpu_adam", "pin_memory", "deepspeed_shm_comm"}
    assert set(ops(table, "cuda")) >= {"async_io", "cpu_adam", "pin_memory", "fused_adam"}
    assert ops(table, "tpu") == []


def test_every_argument_we_pass_is_declared_in_the_dockerfile() -> None:
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE))
    everything = Recipe(base="b", pip_index="i", apt_mirror="m", cuda_architectures="9.0", toolkit=True)
    assert set(build_arguments(everything)) <= declared


def test_only_what_was_chosen_becomes_an_argument() -> None:
    assert build_arguments(CPU, base="launcher/base:bookworm") == {
        "BASE": "launcher/base:bookworm",
        "FLAVOUR": "cpu",
        "GPUS": "void",
    }
    assert build_arguments(
        Recipe(base="debian:13", pip_index="https://pip.example/simple", apt_mirror="http://apt")
    ) == {
        "BASE": "debian:13",
        "FLAVOUR": "cuda",
        "PIP_INDEX_URL": "https://pip.example/simple",
        "APT_MIRROR": "http://apt",
        "CUDA_ARCHITECTURES": "8.0;8.6;8.9;9.0;10.0;12.0+PTX",
        "GPUS": "all",
    }


def test_an_unchanged_recipe_has_the_same_name_and_every_change_another(folder: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").write_bytes(b"one")
    authority = tmp_path / "site.pem"
    authority.write_text("certificate")
    first = name_of(folder, CPU)
    seen = [
        first,
        name_of(folder, CPU, base_id="sha256:1"),
        name_of(folder, Recipe(flavour="cpu", ca_bundle=authority)),
        name_of(folder, Recipe(flavour="cpu", wheels=wheels)),
        name_of(folder, Recipe(flavour="cpu", base="debian:13")),
        name_of(folder, Recipe(flavour="cuda")),
        name_of(folder, Recipe(flavour="cuda", cuda_architectures="9.0")),
        name_of(folder, Recipe(flavour="cuda", toolkit=True)),
    ]
    assert re.fullmatch(r"launcher/cpu:[0-9a-f]{12}", first)
    assert len(set(seen)) == len(seen)
    assert name_of(folder, CPU) == first
    assert name_of(folder, Recipe(flavour="cpu", cuda_architectures="9.0")) == first
    (wheels / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").write_bytes(b"two")
    assert name_of(folder, Recipe(flavour="cpu", wheels=wheels)) not in seen
    (folder / "locks" / "torch.txt").write_text("numpy==2.4.7\n")
    assert (locked := name_of(folder, CPU)) not in seen
    (folder / "Dockerfile").write_text("FROM something\n")
    assert name_of(folder, CPU) not in {*seen, locked}


def test_the_context_holds_the_folder_the_certificates_and_the_wheels(folder: Path, tmp_path: Path) -> None:
    authorities = tmp_path / "ca"
    authorities.mkdir()
    (authorities / "site.crt").write_text("certificate")
    (authorities / "README").write_text("not a certificate")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").write_bytes(b"wheel")
    (wheels / "notes.txt").write_text("not a wheel")
    entries = load_context(folder, Recipe(flavour="cpu", ca_bundle=authorities, wheels=wheels))
    assert names(entries) == [
        "Dockerfile",
        "ca/site.crt",
        "locks/torch.txt",
        "requirements.txt",
        "wheels/torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl",
    ]


def test_the_tar_is_the_same_everywhere_and_tells_nothing_about_its_maker(folder: Path) -> None:
    first, second = io.BytesIO(), io.BytesIO()
    write_context(load_context(folder, CPU), first)
    (folder / "Dockerfile").touch()
    write_context(load_context(folder, CPU), second)
    assert first.getvalue() == second.getvalue()
    first.seek(0)
    with tarfile.open(fileobj=first) as archive:
        told = [(one.name, one.isdir(), one.mode, one.uid, one.uname, one.mtime) for one in archive]
    assert told == [
        ("ca", True, 0o755, 0, "root", 0),
        ("wheels", True, 0o755, 0, "root", 0),
        ("Dockerfile", False, 0o644, 0, "root", 0),
        ("locks/torch.txt", False, 0o644, 0, "root", 0),
        ("requirements.txt", False, 0o644, 0, "root", 0),
    ]


@pytest.mark.parametrize(
    ("flavour", "chosen"),
    [
        ("cpu", ["deepspeed-0.19.8.tar.gz", "numpy-2.4.6-cp311.whl", "torch-2.13.0+cpu-cp311.whl"]),
        ("cuda", ["deepspeed-0.19.8.tar.gz", "numpy-2.4.6-cp311.whl", "nvidia_nvjitlink-13.0-py3.whl"]),
    ],
)
def test_a_wheel_folder_may_serve_both_flavours_and_older_images(flavour: str, chosen: list[str]) -> None:
    found = [
        "README.md",
        "deepspeed-0.18.0.tar.gz",
        "deepspeed-0.19.8.tar.gz",
        "numpy-2.4.6-cp311.whl",
        "nvidia_nvjitlink-13.0-py3.whl",
        "torch-2.12.0+cpu-cp311.whl",
        "torch-2.13.0+cpu-cp311.whl",
    ]
    pins = {"torch": "2.13.0", "deepspeed": "0.19.8"}
    assert list(choose_wheels(found, pins=pins, flavour="cpu" if flavour == "cpu" else "cuda")) == chosen


def test_a_path_that_is_not_there_is_said_before_anything_is_built(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wheel folder does not exist"):
        load_context(folder, Recipe(flavour="cpu", wheels=tmp_path / "gone"))
    with pytest.raises(InputError, match="no CA certificate"):
        load_context(folder, Recipe(flavour="cpu", ca_bundle=tmp_path / "gone.pem"))
    with pytest.raises(InputError, match="no Dockerfile"):
        load_context(tmp_path, CPU)


def test_the_builders_messages_become_progress() -> None:
    said: list[dict[str, object]] = [
        {"stream": "Step 2/9 : RUN sh torch.sh"},
        {"stream": "\n"},
        {"stream": " ---> Running in 7c06\n"},
        {"stream": "\x1b[91mCollecting torch\n\x1b[0m"},
        {"status": "Downloading", "id": "a1b2", "progress": "[=>  ] 1MB/3MB"},
        {"aux": {"ID": "sha256:1"}},
    ]
    seen = [Progress()]
    for message in said:
        seen.append(read_progress(message, after=seen[-1]))
    assert [(one.step, one.total, one.text) for one in seen[1:]] == [
        (2, 9, ""),
        (2, 9, ""),
        (2, 9, "---> Running in 7c06"),
        (2, 9, "Collecting torch"),
        (2, 9, "a1b2 Downloading [=>  ] 1MB/3MB"),
        (2, 9, "a1b2 Downloading [=>  ] 1MB/3MB"),
    ]
    assert {one.instruction for one in seen[1:]} == {"RUN sh torch.sh"}


def test_the_base_is_named_after_the_script_that_makes_it() -> None:
    assert base_tag(b"one") == base_tag(b"one") != base_tag(b"two")
    assert base_tag(b"one", suite="trixie").startswith("launcher/base:trixie-")


class TestWhy:
    """A changed fingerprint is explained by what it was made of."""

    def test_the_labels_tell_the_parts(self) -> None:
        entries = (make_entry("Dockerfile", b"FROM scratch"), make_entry("apt.sh", b""))
        told = parts(entries, {"BASE": "debian:bookworm-slim"})
        assert told == {
            "format": "1",
            "argument BASE": "debian:bookworm-slim",
            "file Dockerfile": entries[0].digest[:16],
            "file apt.sh": entries[1].digest[:16],
        }
        assert read_parts(labels("cpu", "0" * 64, told)) == told

    @pytest.mark.parametrize("label", [{}, {"launcher.parts": "torn {"}, {"launcher.parts": "[]"}])
    def test_labels_that_tell_nothing_are_none(self, label: dict[str, str]) -> None:
        assert read_parts(label) is None

    def test_the_same_parts_need_no_explanation(self) -> None:
        assert explain({"format": "1"}, {"format": "1"}) == ()

    def test_every_part_that_differs_is_one_line(self) -> None:
        before = {"format": "1", "argument BASE": "a", "argument OLD": "x", "file gone": "1", "file same": "2"}
        after = {"format": "2", "argument BASE": "b", "argument NEW": "y", "file new": "3", "file same": "2"}
        assert explain(before, after) == (
            "argument BASE: changed (a -> b)",
            "argument NEW: added (y)",
            "argument OLD: removed (x)",
            "file gone: removed",
            "file new: added",
            "format: changed",
        )


@pytest.mark.parametrize(
    ("asked", "here", "builder", "why"),
    [
        (None, "x86_64", "here", ""),
        (None, None, "gpu-01", "this machine has no Docker engine"),
        (None, "aarch64", "gpu-01", "this machine is aarch64, gpu-01 is x86_64"),
        ("here", "aarch64", "here", ""),
        ("here", None, "here", ""),
        ("gpu-02", "x86_64", "gpu-02", ""),
    ],
)
def test_the_image_is_built_where_it_was_asked_for_or_else_where_it_can_be(
    asked: str | None, here: str | None, builder: str, why: str
) -> None:
    assert choose_builder(asked, here=here, nodes={"gpu-01": "x86_64", "gpu-02": "x86_64"}) == (builder, why)

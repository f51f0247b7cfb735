"""A package that a job lacks: what its failure says, and the line that brings it."""

from __future__ import annotations

import pytest

from cluster.document import read
from cluster.inventory import Inventory, read_inventory
from launcher.events import Failure, NodeEnded
from launcher.imports import PROJECTS, cure, packages


def inventory(more: str = "") -> Inventory:
    return read_inventory(read(f"name: lab\nnodes: [{{name: n1, host: a}}]\n{more}", "/site/cluster.yaml"))


def ends(message: str, *, kind: str = "ModuleNotFoundError") -> dict[str, NodeEnded]:
    failed = Failure(rank=0, exit_code=1, signal=None, time=5.0, type=kind, message=message)
    return {"n1": NodeEnded(time=6.0, node="n1", code=1, failures=(failed,))}


def said(
    message: str = "No module named 'einops'",
    *,
    kind: str = "ModuleNotFoundError",
    more: str = "",
    code: tuple[str, ...] = ("train.py",),
    beside: tuple[str, ...] = (),
) -> str | None:
    return cure(ends(message, kind=kind), inventory(more), code=code, beside=beside, file="lab.yaml")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("No module named 'einops'", ("einops",)),
        ("No module named 'cv2'", ("opencv-python-headless",)),
        ("No module named 'sklearn'", ("scikit-learn",)),
        ("No module named 'google.protobuf'", ("protobuf",)),
        ("No module named 'transformers.models.new'", ()),  # the package is there: another release of it may help
        ("No module named 'tkinter'", ()),
        ("No module named 'apex'", ()),
        ("cannot import name 'Trainer' from 'transformers'", ()),
        (
            "This modeling file requires the following packages that were not found in your environment: einops, timm. "
            "Run `pip install einops timm`",
            ("einops", "timm"),
        ),
        ("Using low_cpu_mem_usage requires accelerate: 'pip install -U accelerate>=0.26'", ("accelerate>=0.26",)),
        ("`pip install git+https://example.org/x`", ()),
    ],
)
def test_the_package_is_named_as_pip_knows_it(message: str, wanted: tuple[str, ...]) -> None:
    assert packages(message) == wanted


def test_the_table_holds_only_names_that_differ() -> None:
    assert [name for name, project in PROJECTS.items() if name == project] == []


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("", 'image.packages: ["einops"] in lab.yaml, then run it again'),
        ("image: {packages: ['trl>=0.20']}", 'image.packages: ["trl>=0.20", "einops"] in lab.yaml, then run it again'),
        ("image: {use: 'site/ours:1'}", "put einops into the image site/ours:1"),
        ("image: {dockerfile: image/Dockerfile}", "RUN pip install einops in Dockerfile"),
    ],
)
def test_the_line_is_that_of_the_image_that_the_job_runs_in(more: str, line: str) -> None:
    assert line in (said(more=more) or "")


def test_without_an_image_it_is_pips_own_command() -> None:
    process = read_inventory(
        read("name: lab\nengine: process\nnodes: [{name: n1, host: a, transport: local}]\n", "cluster.yaml")
    )
    told = cure(ends("No module named 'cv2'"), process, code=(), beside=(), file="cluster.yaml")
    assert told == "pip install opencv-python-headless, in the environment that the launcher is installed in"


@pytest.mark.parametrize("path", ["einops.py", "src/einops.py", "src/einops/layers.py", "einops/__init__.py"])
def test_what_the_job_brings_itself_is_no_package(path: str) -> None:
    assert said(code=("train.py", path)) is None
    assert said(beside=(path,)) == (
        "einops is of yours, but left out of what the nodes get: look at .gitignore and .launcherignore"
    )


def test_a_folder_of_data_is_no_module() -> None:
    assert said("No module named 'wandb'", code=("train.py", "wandb/run-1/log.txt")) is not None


@pytest.mark.parametrize("kind", ["RuntimeError", "SystemExit", None])
def test_another_failure_has_no_such_line(kind: str | None) -> None:
    assert said(kind=kind or "") is None
    assert cure({}, inventory(), code=(), beside=(), file="cluster.yaml") is None


def test_only_the_first_failure_of_a_run_counts() -> None:
    killed = Failure(rank=1, exit_code=-9, signal="SIGKILL", time=4.0, type=None, message="")
    before = NodeEnded(time=6.0, node="n0", code=1, failures=(killed,))
    later = ends("No module named 'einops'")
    assert cure({"n0": before, **later}, inventory(), code=(), beside=(), file="cluster.yaml") is None

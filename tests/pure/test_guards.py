"""Guards: what must stay as it is, unless somebody argues for the change by editing this file."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from launcher.cli import ROOMS  # importing it registers all commands
from launcher.cli.options import launcher

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "launcher")
CODE = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
INSIDE = ROOT / "launcher" / "inside"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, at the top or anywhere inside."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def importers(library: str) -> set[str]:
    """Who imports a library: files, or the package that is its room."""
    found = {path for path in CODE if any(name.split(".")[0] == library for name in imported(path))}
    return {"cluster/ssh/" if path.parent.name == "ssh" else name_of(path) for path in found}


# The house


def test_every_module_stands_on_its_storey() -> None:
    checked = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("library", "seams"),
    [
        ("fabric", {"cluster/ssh/"}),
        ("paramiko", {"cluster/ssh/"}),
        ("docker", {"cluster/dockerd.py"}),
        ("requests", {"cluster/dockerd.py"}),
        ("yaml", {"cluster/document.py", "launcher/render.py"}),
        ("pathspec", {"launcher/snapshot.py"}),
        ("rich", {"launcher/views/live.py"}),
        ("torch", {f"launcher/inside/{name}.py" for name in ("launch", "environment", "simulate", "trial")}),
        ("transformers", {"launcher/inside/simulate.py"}),
        ("accelerate", {f"launcher/inside/{name}.py" for name in ("launch", "bootstrap", "environment", "trial")}),
        ("deepspeed", {f"launcher/inside/{name}.py" for name in ("bootstrap", "environment")}),
    ],
)
def test_a_library_has_its_seam_and_is_known_nowhere_else(library: str, seams: set[str]) -> None:
    assert importers(library) == seams


def test_only_the_border_knows_pydantic_and_only_the_command_line_knows_click() -> None:
    assert importers("pydantic") | importers("pydantic_core") <= {
        "cluster/allowed.py",
        "cluster/complaints.py",
        "cluster/inventory.py",
        "launcher/jobfile.py",
        "launcher/record.py",
    }
    assert all(name.startswith("launcher/cli/") for name in importers("click"))


# They lie beside each other on a node.
BESIDE = {"cause", "guard", "stacks"}


@pytest.mark.parametrize("path", sorted(INSIDE.glob("*.py")), ids=lambda path: path.stem)
def test_what_runs_in_a_container_needs_nothing_of_ours(path: Path) -> None:
    known = {*sys.stdlib_module_names, "torch", "accelerate", "deepspeed", "transformers", "numpy"} | BESIDE
    assert {name.split(".")[0] for name in imported(path)} <= known


def test_the_docker_folder_is_no_package_or_it_would_hide_the_sdk() -> None:
    assert not (ROOT / "docker" / "__init__.py").exists()


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_a_module_is_named_for_what_it_is(path: Path) -> None:
    banned = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc", "core", "lib"}
    assert not banned & {part.strip("_") for part in path.relative_to(ROOT).with_suffix("").parts}


# The code


def test_only_what_runs_in_a_container_prints() -> None:
    calls = [
        f"{name_of(path)}:{node.lineno}"
        for path in CODE
        if path.parent != INSIDE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_doubles_stand_at_our_own_seams_and_nothing_is_mocked() -> None:
    mocks = {name_of(path) for path in (*CODE, *TESTS) for name in imported(path) if "mock" in name.split(".")}
    assert mocks == set()


def test_no_host_key_is_ever_taken_unseen() -> None:
    loose = re.compile(r"AutoAddPolicy|WarningPolicy|StrictHostKeyChecking=(?!yes)|UserKnownHostsFile=/dev/null")
    found = {
        f"{name_of(path)}: {node.id if isinstance(node, ast.Name) else node.attr}"
        for path in CODE
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Name) and loose.search(node.id))
        or (isinstance(node, ast.Attribute) and loose.search(node.attr))
    }
    options = {
        f"{name_of(path)}: {node.value}"
        for path in CODE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.search(r"StrictHostKeyChecking[= ](?!yes)|UserKnownHostsFile[= ]/dev/null", node.value)
    }
    assert found | options == set()


def test_nothing_is_ever_run_by_a_shell_that_is_not_quoted_by_us() -> None:
    shells = [
        f"{name_of(path)}:{node.lineno}"
        for path in CODE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.keyword) and node.arg == "shell" and getattr(node.value, "value", False) is True
    ]
    assert shells == []


def test_s14_no_archive_is_ever_unpacked_by_python() -> None:
    """Where a member goes is decided by us, member by member, or by tar on a node in a folder of its own."""
    unpacks = [
        f"{name_of(path)}:{node.lineno}"
        for path in CODE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr in ("extractall", "extract", "unpack_archive")
    ]
    assert unpacks == []


def test_s05_what_speaks_ssh_is_pinned_to_a_release_without_terrapin() -> None:
    pins = dict(re.findall(r'"(fabric|paramiko)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert sorted(pins) == ["fabric", "paramiko"]
    assert tuple(map(int, pins["paramiko"].split("."))) >= (3, 4)
    assert version("paramiko") == pins["paramiko"]


# The command line: it grows only by an argued change of this list.
CLUSTER, JSON = "-c/--cluster", "--json"
JOB = (
    *("--stage", "--offload-optimizer", "--offload-param", "--precision", "--micro-batch", "--accumulation"),
    *("--clipping", "--optimizer", "--learning-rate", "--weight-decay", "--scheduler", "--way", "--zero3-init"),
    *("--gather-16bit", "--reduce-bucket-size", "--allgather-bucket-size", "--prefetch-bucket-size"),
    *("--sub-group-size", "--overlap-comm", "--aio", "--moe-leaf", "--set", "--ds-config", "--accelerate-config"),
    *("--job", "--grace", "--env"),
)
MODEL = ("--parameters", "--model", "--model-from", "--sequence", "--checkpointing")
TAG = "--tag/--step"
COMMANDS = {
    "init": ("HOSTS", "-o/--output", "--name", "-i/--identity-file", "--yes"),
    "trust": ("CLUSTER", "--yes", "--replace"),
    "up": ("CLUSTER", "--engine", "--dry-run", "--plan", "--ignore", JSON),
    "plan": (CLUSTER, *JOB, *MODEL, "--gpu-memory", "--gpus", "--nodes", "--host-memory", "--nvme", JSON),
    "run": (
        *(CLUSTER, *JOB, *MODEL, "--nodes", "--engine", "--port", "--secret", "--secrets-file", "--snapshot-limit"),
        *("--node-grace", "--hang-timeout", "--max-restarts", "--on-exit", "--on-log", "-d/--detach", "--dry-run"),
        *("--ignore", JSON),
        *("SCRIPT", "ARGS"),
    ),
    "status": (CLUSTER, JSON),
    "ls": (JSON,),
    "logs": (CLUSTER, "-f/--follow", "--since", "--rank", "RUN_ID"),
    "attach": (CLUSTER, JSON, "RUN_ID"),
    "stop": (CLUSTER, "RUN_ID"),
    "exec": (CLUSTER, "--node", "ARGV"),
    "shell": (CLUSTER, "NODE", "ARGV"),
    "env": (CLUSTER, JSON, "NAME"),
    "test": (CLUSTER, *JOB, "--ignore", JSON, "NAME"),
    "rehearse": (*JOB, "--nodes", "--slots", "--fault", "--after", "--engine", "--secret", JSON, "SCRIPT", "ARGS"),
    "down": (CLUSTER, "NAME"),
    "checkpoint ls": (CLUSTER, JSON, "RUN"),
    "checkpoint verify": (CLUSTER, TAG, "--all", "--seal", JSON, "RUN"),
    "checkpoint gather": (CLUSTER, TAG, "--to", JSON, "RUN"),
    "checkpoint scatter": (CLUSTER, "--to", JSON, "SOURCE"),
    "checkpoint export": (CLUSTER, TAG, "--dtype", "--format", "--max-shard-size", "--to", JSON, "RUN"),
    "checkpoint universal": (CLUSTER, TAG, "--to", JSON, "RUN"),
    "config show": (CLUSTER, *JOB, JSON, "NODE"),
    "config check": (JSON, "--world-size", "FILE"),
    "config new": (*JOB, "--force", "FILE"),
    "config convert": ("-o/--output", "--force", "FILE"),
    "image ls": (CLUSTER, JSON),
    "image build": (
        *("--flavour", "--base", "--ca-bundle", "--pip-index", "--apt-mirror", "--wheels", "--cuda-architectures"),
        *("--toolkit", "--build-network", "--package", "--requirements", "--apt", "--dockerfile", "--build-on"),
        *("--dry-run", CLUSTER, JSON),
    ),
    "image ship": (CLUSTER, "NAME", JSON),
    "image save": (CLUSTER, "FILE", "NAME", JSON),
    "image load": ("FILE", JSON),
    "image prune": (CLUSTER, "--dry-run", JSON),
    "image why": (CLUSTER, "NAME", JSON),
    "schema": (),
    "completion": ("SHELL_NAME",),
}
# These show no example yet, and these options say nothing of themselves.


def leaves(group: click.Group, *, above: tuple[str, ...] = ()) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name in group.list_commands(click.Context(group)):
        command = group.commands[name]
        if isinstance(command, click.Group):
            found |= leaves(command, above=(*above, name))
        else:
            found[" ".join((*above, name))] = command
    return found


LEAVES = leaves(launcher)


def test_the_commands_and_their_options_are_these() -> None:
    assert {command.callback.__module__ for command in LEAVES.values() if command.callback} == {
        room.__name__ for room in ROOMS
    }
    assert list(LEAVES) == list(COMMANDS)
    shown = {
        name: tuple(
            "/".join(sorted(one.opts, key=len)) if isinstance(one, click.Option) else str(one.name).upper()
            for one in command.params
        )
        for name, command in LEAVES.items()
    }
    assert shown == COMMANDS


@pytest.mark.parametrize("name", LEAVES)
def test_a_commands_help_ends_with_an_example(name: str, request: pytest.FixtureRequest) -> None:
    help_text = LEAVES[name].help or ""
    lines = [line.strip() for line in help_text.splitlines()]
    assert lines[0].endswith(".")
    assert any(line.startswith(("launcher ", 'eval "$(launcher ')) for line in lines)


def test_every_option_says_what_it_is_for() -> None:
    silent = {
        f"{name} {option.opts[-1]}"
        for name, command in LEAVES.items()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    }
    assert not silent


# main() leaves by os._exit; what it had loaded by then is told on standard error.
LISTING = """
import os, sys
leave = os._exit
def listing(code):
    print(*sys.modules, file=sys.stderr, flush=True)
    leave(code)
os._exit = listing
sys.argv = ["launcher", "--help"]
from launcher.cli import main
main()
"""


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    heavy = {"torch", "fabric", "paramiko", "docker", "pydantic", "pydantic_core", "yaml", "rich", "requests"}
    told = subprocess.run([sys.executable, "-c", LISTING], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(told.stderr.split())
    assert "click" in loaded
    assert not heavy & loaded

"""The embedded example on one machine, in a container: the same inventory, another engine."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.lab.conftest import ROOT, Note, User, make_user
from tests.lab.secrecy import check_that_a_secret_is_nowhere
from tests.testbed import lab as testbed


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """The embedded example's cluster, under a name of its own."""

    name: str
    user: User


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    """It is up, in a container; at the end nothing of it is left."""
    data = yaml.safe_load((ROOT / "examples/local.yaml").read_text())
    name = f"local-{uuid.uuid4().hex[:8]}"  # somebody may be using the example itself
    recipe = testbed.image_options(os.environ)
    limits = {"ulimits": {"stack": 64 << 20}}  # memlock cannot be raised everywhere that tests run
    path = tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump({**data, "name": name, "image": recipe, "container": limits}))
    user = make_user(tmp_path / "project", path)
    user.environment["HOME"] = str(tmp_path)
    try:
        up = user.launcher("up", "--engine", "docker")
        assert up.code == 0, up.err
        yield Local(name=name, user=user)
    finally:
        down = user.launcher("down")
    assert (down.code, "1 container removed" in down.err) == (0, True), down.err
    listed = ["docker", "ps", "--all", "--filter", f"label=launcher.cluster={name}", "--format", "{{.Names}}"]
    assert subprocess.run(listed, capture_output=True, text=True, check=True).stdout == ""


def test_the_local_example_runs_in_a_container(local: Local, tmp_path: Path) -> None:
    run = local.user.launcher("run", "--stage", "3", "--port", "auto", "examples/train.py", "--steps", "4")
    assert run.code == 0, run.err
    assert "[runc]" not in run.err  # whether the machine's is old is told by `up` alone
    assert "reloaded: loss" in run.out
    assert list(tmp_path.glob(f".launcher/{local.name}/local/checkpoints/*/final/model.safetensors"))


def test_s10_a_secret_is_nowhere_on_one_machine(local: Local, tmp_path: Path, note: Note) -> None:
    checkpoints = tmp_path / ".launcher" / local.name / "local" / "checkpoints"
    check_that_a_secret_is_nowhere(
        local.user, cluster=local.name, processes=2, nodes=(), checkpoints=str(checkpoints), note=note
    )

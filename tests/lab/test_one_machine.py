"""The embedded example on one machine, in a container: the same inventory, another engine."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import yaml

from tests.lab.conftest import ROOT, make_user
from tests.testbed import lab as testbed


def test_the_local_example_runs_in_a_container(tmp_path: Path) -> None:
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
        run = user.launcher("run", "--stage", "3", "--port", "auto", "examples/train.py", "--steps", "4")
        assert run.code == 0, run.err
        assert "reloaded: loss" in run.out
        assert list(tmp_path.glob(f".launcher/{name}/local/checkpoints/*/final/model.safetensors"))
    finally:
        down = user.launcher("down")
    assert (down.code, "1 container removed" in down.err) == (0, True), down.err
    listed = ["docker", "ps", "--all", "--filter", f"label=launcher.cluster={name}", "--format", "{{.Names}}"]
    assert subprocess.run(listed, capture_output=True, text=True, check=True).stdout == ""

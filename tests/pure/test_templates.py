"""The ready configurations in configs/: what `launcher config new` writes for these settings, and nothing else."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from launcher import render, zero
from launcher.convert import accelerate_template
from launcher.job import Job, Settings
from launcher.lints import lint_text

CONFIGS = Path(__file__).parents[2] / "configs"
RUNGS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-cpu": {"stage": 2, "offload_optimizer": "cpu"},
    "zero3": {"stage": 3},
    "zero3-cpu": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    "zero3-nvme": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme"},
}


def made(name: str, precision: Any, kind: str) -> str:
    settings = Settings(**RUNGS[name], precision=precision, clipping=1.0)
    if kind == "accelerate":
        return render.to_yaml(accelerate_template(settings))
    return zero.file_for_node(Job(script="", settings=settings), "/nvme/0")


FILES = {
    f"{kind}/{name}-{precision}.{'yaml' if kind == 'accelerate' else 'json'}": (name, precision, kind)
    for kind, name, precision in itertools.product(("accelerate", "deepspeed"), RUNGS, ("bf16", "fp16"))
}


@pytest.mark.parametrize("file", FILES)
def test_a_template_is_what_config_new_writes(file: str) -> None:
    path = CONFIGS / file
    if os.environ.get("LAUNCHER_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(made(*FILES[file]))
    assert path.read_text() == made(*FILES[file])


def test_there_are_no_other_templates() -> None:
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*")}
    assert found == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_a_template_has_no_errors_but_the_one_that_nobody_can_mend_there(file: str) -> None:
    errors = {lint.id for lint in lint_text((CONFIGS / file).read_text(), name=file) if lint.level == "error"}
    assert errors == ({"yaml-nvme-path"} if file.startswith("accelerate/zero3-nvme") else set())

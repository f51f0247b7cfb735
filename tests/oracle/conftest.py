"""Every test here asks the real libraries; on a machine without them there is nobody to ask."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before anything imports deepspeed: its search for devices is noisy
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # importing DeepSpeed leaves it behind, a test may not

# Said inside torch and DeepSpeed about themselves; not one of these can come from our code.
THEIRS = (
    r"ignore:`torch\.distributed\.\w+` is deprecated:FutureWarning",
    r"ignore:.*torch\.jit\.script:DeprecationWarning",
    r"ignore:The distutils package is deprecated:DeprecationWarning",
    r"ignore:builtin type Swig\w+ has no __module__ attribute:DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("torch", "accelerate", "deepspeed") if importlib.util.find_spec(name) is None]
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.oracle)
        for warning in THEIRS:
            item.add_marker(pytest.mark.filterwarnings(warning))
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))

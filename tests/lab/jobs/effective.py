"""Run another script; rank 0 also tells what DeepSpeed was really told: effective.py OUT SCRIPT [ARGUMENTS...]."""

import json
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

import deepspeed


def plain(value: Any) -> Any:
    """DeepSpeed's configuration objects as data, defaults and all."""
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return plain(vars(value)) if hasattr(value, "__dict__") else type(value).__name__


def telling(initialize: Callable[..., Any], out: str) -> Callable[..., Any]:
    def initialize_and_tell(*args: Any, **kwargs: Any) -> Any:
        made = initialize(*args, **kwargs)
        if os.environ["RANK"] == "0":
            told = {name: plain(value) for name, value in vars(made[0]._config).items() if name != "_param_dict"}
            with open(out, "w") as file:
                json.dump(told, file, default=str)
        return made

    return initialize_and_tell


if __name__ == "__main__":
    out, *sys.argv = sys.argv[1:]
    deepspeed.initialize = telling(deepspeed.initialize, out)
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")

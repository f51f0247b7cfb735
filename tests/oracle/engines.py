"""Builds a DeepSpeed engine for each configuration that it is given, in one process on the CPU; says how it went.

A program of its own: DeepSpeed and torch.distributed keep their state for the whole process. Configurations come as
JSON on standard input; what comes back is a list of `null`, or `ErrorType: message`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def build(config: dict[str, Any]) -> str | None:
    import deepspeed
    import torch

    try:
        model = torch.nn.Linear(4, 4)
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    except BaseException as error:  # noqa: BLE001 - some leave by SystemExit
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    import deepspeed.ops

    # Without it DeepSpeed would compile its own collectives for the CPU first.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    answers = [build(config) for config in json.load(sys.stdin)]
    sys.stderr.write("\n" + json.dumps(answers) + "\n")
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

"""Every ZeRO stage, offload, precision and way, trained for real over three nodes: the losses of one process.

A cover of it always; all of it with LAUNCHER_TEST_MATRIX=all (`make matrix`).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from typing import Any

import pytest

from tests.lab.conftest import User
from tests.lab.test_main_job import alone, losses
from tests.testbed import lab as testbed

# Wide enough for tensors that DeepSpeed swaps (a megabyte and more on each rank), narrow enough for the 8 MB that a
# process of these nodes may lock.
JOB = ("--steps", "4", "--global-batch", "6", "--log-every", "1", "--width", "384", "--layers", "1", "--block", "32")
CLOSE = {"no": 1e-3, "bf16": 3e-2}

OFFLOADS = {0: ("none",), 1: ("none", "cpu"), 2: ("none", "cpu"), 3: ("none", "cpu", "nvme")}
ALL = [
    (stage, offload, precision)
    for stage, precision in itertools.product(OFFLOADS, CLOSE)
    for offload in OFFLOADS[stage]
]
COVER = [(0, "none", "no"), (1, "cpu", "no"), (2, "none", "bf16"), (3, "cpu", "bf16")]
CASES = ALL if os.environ.get("LAUNCHER_TEST_MATRIX") == "all" else COVER


@functools.cache
def truth() -> dict[int, float]:
    return alone(JOB)


def train(user: User, lab: testbed.Lab, *options: str, close: float | None) -> dict[str, Any]:
    """Train by these settings; the losses must be the truth's. Gives back DeepSpeed's effective configuration.

    Without `close` nothing is said of the losses.
    """
    told = "/checkpoints/effective.json"
    said = user.launcher("run", *options, "jobs/effective.py", told, "examples/train.py", *JOB)
    assert said.code == 0, said.err + said.out[-3000:]
    found = losses(said.out)
    assert found.keys() == truth().keys()
    for step, loss in truth().items() if close else ():
        assert found[step] == pytest.approx(loss, rel=close), f"step {step}"
    config: dict[str, Any] = json.loads(testbed.run(lab.machines[0].name, "cat", "/mnt/checkpoints/effective.json"))
    return config


@pytest.mark.parametrize(("stage", "offload", "precision"), CASES)
def test_both_ways_train_alike_and_tell_deepspeed_the_same(
    lab: testbed.Lab, user: User, stage: int, offload: str, precision: str
) -> None:
    # Clipping is said, since the two ways say "none" differently; at a norm that this training never reaches.
    settings: tuple[str, ...] = ("--stage", str(stage), "--precision", precision, "--clipping", "1000")
    if offload != "none":
        settings += ("--offload-optimizer", offload)
    # At stage 0 in 16 bits DeepSpeed takes a step without gradients before the first one, so Adam's first real step is
    # its second (runtime/fp16/unfused_optimizer.py, initialize_optimizer_states): it trains otherwise than plain Adam.
    close = None if (stage, precision) == (0, "bf16") else CLOSE[precision]
    plugin, file = (train(user, lab, *settings, "--way", way, close=close) for way in ("plugin", "file"))
    assert plugin == file
    assert (plugin["zero_optimization_stage"], plugin["bfloat16_config"]["enabled"]) == (stage, precision == "bf16")
    assert plugin["zero_config"]["offload_optimizer"]["device"] == offload


def test_plain_training_in_16_bits_has_the_losses_of_one_process(user: User) -> None:
    said = user.launcher("run", "--precision", "bf16", "examples/train.py", *JOB)
    assert said.code == 0, said.err + said.out[-3000:]
    found = losses(said.out)
    assert found == pytest.approx(truth(), rel=CLOSE["bf16"])


def test_parameters_are_swapped_to_nvme_through_small_buffers(lab: testbed.Lab, user: User) -> None:
    settings = ("--stage", "3", "--offload-optimizer", "cpu", "--offload-param", "nvme")
    small = ("--set", "zero_optimization.offload_param.buffer_size=200000")
    config = train(user, lab, *settings, *small, close=CLOSE["no"])
    assert config["zero_config"]["offload_param"] == {
        **config["zero_config"]["offload_param"],
        "device": "nvme",
        "nvme_path": "/nvme/0",
        "buffer_size": 200000,
    }


def test_deepspeeds_own_optimizer_and_scheduler_train(lab: testbed.Lab, user: User) -> None:
    settings = ("--stage", "2", "--offload-optimizer", "cpu", "--optimizer", "CPUAdam", "--scheduler", "WarmupLR")
    told = "/checkpoints/effective.json"
    said = user.launcher("run", *settings, "jobs/effective.py", told, "examples/train.py", *JOB)
    assert said.code == 0, said.err + said.out[-3000:]
    config = json.loads(testbed.run(lab.machines[0].name, "cat", "/mnt/checkpoints/effective.json"))
    assert (config["optimizer_name"], config["scheduler_name"]) == ("adamw", "WarmupLR")
    first, last = min(losses(said.out)), max(losses(said.out))
    assert losses(said.out)[last] < losses(said.out)[first]

"""Accelerate's own test script, check by check, in the configuration of the run: what `launcher test` starts.

Usage: trial.py     (under `accelerate launch`, on every process)

These are the checks of accelerate.test_utils.scripts.test_script in the order of its main(). That itself cannot be
called: unless it is plain training on GPUs, it also compares a file to which every process has appended a line, and so
fails on machines that share no folder. There this one check is left out, and so are those that the script makes for
two processes, or for a number that divides its batch of 8. And under DeepSpeed it ends before it has trained anything;
a short training is added here.

The first process of each machine prints a line per check, done or left out. A check that fails ends its process with
the check's name.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

Check = tuple[str, Callable[[], object]]

STEPS = 40  # of the added training: fp16 skips the first ones, until its loss scale fits


PAIR = 2
BATCH = 8  # of Accelerate's checks; these deal it out with split_batches
SPLITTING = {"dl_preparation_check", "central_dl_preparation_check", "training_check"}


class CheckFailed(Exception):
    """Which check, and what it said."""


def main() -> None:
    """Every check, in order; the first that fails is the last."""
    from accelerate import Accelerator
    from accelerate.test_utils.scripts import test_script
    from accelerate.utils import broadcast_object_list

    accelerator = Accelerator()
    teller = accelerator.is_local_main_process
    # The code's own folder is read-only; and the processes of one machine must be in one folder.
    folder = broadcast_object_list([tempfile.mkdtemp(prefix="trial-") if accelerator.is_main_process else ""])[0]
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - on the other machines
    os.chdir(folder)
    count = 0
    for name, check in checks(test_script, accelerator.state):
        if why := unfit(name, accelerator.num_processes):
            if teller:
                print(f"left out {name}: {why}", flush=True)
            continue
        began = time.monotonic()
        carry_out(name, check)
        count += 1
        if teller:
            print(f"ok {name} ({time.monotonic() - began:.1f} s)", flush=True)
    if teller:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
        print(f"passed {count} checks", flush=True)


def unfit(name: str, processes: int) -> str:
    """Why Accelerate's script cannot make this check with so many processes."""
    if name == "test_split_between_processes_tensor" and processes > PAIR:
        return "it deals two rows"
    if name.partition(",")[0] in SPLITTING and BATCH % processes:
        return f"it splits a batch of {BATCH}, which {processes} processes do not divide"
    return ""


def checks(script: Any, state: Any) -> Iterator[Check]:
    """What applies here, under the names that Accelerate gives them."""
    yield "init_state_check", script.init_state_check
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == state.num_processes:  # torchrun's: all are on this machine
        yield "process_execution_check", script.process_execution_check
    for name in (
        "test_split_between_processes_list",
        "test_split_between_processes_nested_dict",
        "test_split_between_processes_tensor",
        "test_split_between_processes_evenly",
    ):
        yield name, getattr(script, name)
    if importlib.util.find_spec("datasets"):
        rows = importlib.import_module("datasets").Dataset
        yield "test_split_between_processes_dataset", lambda: script.test_split_between_processes_dataset(rows)
    for name in (
        "rng_sync_check",
        "dl_preparation_check",
        "central_dl_preparation_check",
        "custom_sampler_check",
        "check_seedable_sampler",
        "check_seedable_sampler_with_data_seed",
    ):
        yield name, getattr(script, name)
    if state.num_processes > 1:
        yield "check_seedable_sampler_in_batch_sampler_shard", script.check_seedable_sampler_in_batch_sampler_shard
    yield "training", training
    if state.deepspeed_plugin is not None:
        return
    yield "training_check", lambda: script.training_check(use_seedable_sampler=False)
    yield "training_check, seedable sampler", lambda: script.training_check(use_seedable_sampler=True)
    yield "test_trigger", script.test_trigger
    if importlib.util.find_spec("pytest"):
        yield "test_reinstantiated_state", script.test_reinstantiated_state


def carry_out(name: str, check: Callable[[], object]) -> None:
    """Run a check; what it prints is shown only where it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            check()
    except Exception as error:
        sys.stdout.write(said.getvalue())
        raise CheckFailed(f"{name}: {type(error).__name__}: {error}") from error


def training() -> None:
    """A model learns to add: its loss falls, and in the end every process has the same model."""
    import torch
    from accelerate import Accelerator
    from accelerate.test_utils import are_the_same_tensors
    from accelerate.utils import DummyOptim, DummyScheduler, set_seed

    set_seed(42)
    accelerator = Accelerator()
    plugin = accelerator.state.deepspeed_plugin
    config = {} if plugin is None else plugin.deepspeed_config
    rows = torch.randn(8 * accelerator.num_processes, 4)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows, rows.sum(1, keepdim=True)), batch_size=8)
    model = torch.nn.Linear(4, 1)
    model.config = argparse.Namespace(hidden_size=64)  # from which Accelerate fills bucket sizes that are "auto"
    optimizer = (DummyOptim if "optimizer" in config else torch.optim.AdamW)(model.parameters(), lr=0.05)
    further = [DummyScheduler(optimizer, total_num_steps=1000, warmup_num_steps=1)] if "scheduler" in config else []
    model, optimizer, data, *_ = accelerator.prepare(model, optimizer, data, *further)
    losses = []
    for _ in range(STEPS * accelerator.gradient_accumulation_steps):
        for x, y in data:
            loss = torch.nn.functional.mse_loss(model(x).float(), y.float())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    assert losses[-1] < losses[0] / 2, f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"
    with torch.no_grad():
        answer = model(rows.to(accelerator.device))
    assert are_the_same_tensors(answer), "the processes have different models"


if __name__ == "__main__":
    main()

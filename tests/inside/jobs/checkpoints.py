"""Real checkpoints of tiny models, with DeepSpeed's own reading of each: one process per rank.

Usage: checkpoints.py OUT     (RANK, WORLD_SIZE and the rest in the environment)

Every case is a folder of OUT:
  checkpoint/       as the engine saved it
  masters.pt        the fp32 parameters, as the engine held them when it saved
  theirs.pt         DeepSpeed's state dict of it; {"refused": reason} where it has none
  loaded.pt         a fresh model after load_state_dict_from_zero_checkpoint
  files-FORMAT-DTYPE-SIZE/   what convert_zero_checkpoint_to_state_dict writes, for some cases
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from torch import distributed, nn


class Odd(nn.Module):  # type: ignore[misc]
    """Sizes that nothing divides, a tied and a frozen parameter, buffers of every kind."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 7)
        self.frozen = nn.Linear(7, 5)
        self.middle = nn.Linear(5, 13)
        self.norm = nn.LayerNorm(13)
        self.back = nn.Linear(13, 7)
        self.one = nn.Parameter(torch.full((1,), 0.5))
        self.guess = nn.Linear(7, 11, bias=False)
        if tied:
            self.guess.weight = self.words.weight
        self.frozen.requires_grad_(requires_grad=False)
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("mean", torch.arange(5.0) / 3)
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("spread", torch.tensor([1.0, 2.0]).expand(3, 2))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("passing", torch.ones(2), persistent=False)

    def forward(self, words: Any) -> Any:
        hidden = self.middle(self.frozen(self.words(words)))
        return self.guess(self.back(self.norm(hidden)) * self.one)


def save(
    out: Path,
    name: str,
    *,
    stage: int,
    precision: str | None = None,
    tied: bool = True,
    steps: int = 2,
    files: Any = (),
    **config: Any,
) -> None:
    """Train a few steps and save."""
    torch.manual_seed(1)
    model = Odd(tied=tied)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in trained if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} | config.pop("zero", {})
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    } | config
    if precision:
        settings[precision] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=settings)
    for step in range(steps):
        dice = torch.Generator().manual_seed(10 * step + engine.global_rank)
        words = torch.randint(0, 11, (4,), generator=dice)
        engine.backward(nn.functional.cross_entropy(engine(words).float(), words))
        engine.step()
    folder = out / name
    engine.save_checkpoint(str(folder / "checkpoint"), tag="global_step2")
    masters = {}
    for key, weight in model.named_parameters():
        if weight.requires_grad and stage:
            masters[key] = safe_get_full_fp32_param(weight).detach().clone()
    if engine.global_rank == 0:
        torch.save(masters, folder / "masters.pt")
        read_theirs(folder, fresh(tied=tied))
        for options in files:
            write_theirs(folder, *options)
    engine.destroy()
    distributed.barrier()


def fresh(*, tied: bool = True) -> Odd:
    """A model to load into; nothing can be copied into a buffer whose numbers lie on each other."""
    model = Odd(tied=tied)
    model.spread = model.spread.clone()
    return model


def read_theirs(folder: Path, model: Any) -> None:
    """What DeepSpeed makes of it."""
    checkpoint = str(folder / "checkpoint")
    try:
        theirs = get_fp32_state_dict_from_zero_checkpoint(checkpoint)
        loaded = load_state_dict_from_zero_checkpoint(model, checkpoint).state_dict()
    except Exception as error:  # noqa: BLE001 - the reason is what is asked for
        theirs = loaded = {"refused": str(error)}
    torch.save(theirs, folder / "theirs.pt")
    torch.save(loaded, folder / "loaded.pt")


def lay_on_nvme(source: Path, folder: Path) -> None:
    """The same checkpoint as DeepSpeed leaves it when partitions are on NVMe: each in a file, rounded up to blocks."""
    shutil.copytree(source / "checkpoint", folder / "checkpoint")
    [tag] = [path for path in (folder / "checkpoint").iterdir() if path.is_dir()]
    for rank in range(distributed.get_world_size()):
        file = tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        swapped = tag / "offloaded_tensors" / f"rank{rank:02d}"
        swapped.mkdir(parents=True)
        state = torch.load(file, weights_only=False)
        groups = state["optimizer_state_dict"]["fp32_flat_groups"]
        for number in range(1, len(groups)):  # the first was too small to be swapped
            group, left = groups[number], torch.empty(0)
            left.ds_id = f"{number}_{number + 9}"
            raw = group.detach().numpy().tobytes()
            (swapped / f"{left.ds_id}.tensor.swp").write_bytes(raw + bytes(-len(raw) % 1024))
            groups[number] = left
        torch.save(state, file)
    read_theirs(folder, fresh())


def write_theirs(folder: Path, form: str, dtype: str, size: str) -> None:
    """The files that DeepSpeed makes of it."""
    convert_zero_checkpoint_to_state_dict(
        str(folder / "checkpoint"),
        str(folder / f"files-{form}-{dtype}-{size}"),
        dtype=dtype,
        max_shard_size=size,
        safe_serialization=form == "safetensors",
        exclude_frozen_parameters="zero1" in folder.name,  # of stage 1 it knows none
    )


def save_by_accelerate(out: Path) -> None:
    """The layout of accelerator.save_state: the tag is `pytorch_model`, random states lie beside."""
    from accelerate import Accelerator, DeepSpeedPlugin

    plugin = DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=1)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    accelerator = Accelerator(deepspeed_plugin=plugin)
    torch.manual_seed(1)
    model = Odd()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    words = torch.randint(0, 11, (4,))
    accelerator.backward(nn.functional.cross_entropy(model(words), words))
    optimizer.step()
    folder = out / "accelerate"
    accelerator.save_state(str(folder / "checkpoint"))
    if accelerator.is_main_process:
        read_theirs(folder, fresh())
    accelerator.wait_for_everyone()


def save_gpt2(out: Path) -> None:
    """A model of transformers, whose input and output embeddings are tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=24, vocab_size=53, n_positions=16)
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    words = torch.randint(0, 53, (1, 8))
    engine.backward(engine(input_ids=words, labels=words).loss)
    engine.step()
    engine.save_checkpoint(str(out / "gpt2" / "checkpoint"))
    if engine.global_rank == 0:
        config.save_pretrained(out / "gpt2")
        read_theirs(out / "gpt2", GPT2LMHeadModel(config))
    engine.destroy()


SHARDED = "0.5KB"
FILES = [
    *(("safetensors", dtype, size) for dtype in ("fp32", "bf16", "fp16") for size in ("5GB", SHARDED)),
    *(("bin", dtype, size) for dtype in ("fp32", "bf16") for size in ("5GB", SHARDED)),
]


def main() -> None:
    """All cases of this world size."""
    out = Path(sys.argv[1])
    for stage in (1, 2, 3):
        save(out, f"zero{stage}", stage=stage, files=[("bin", "fp32", "5GB"), ("bin", "fp32", SHARDED)])
        save(out, f"zero{stage}-bf16", stage=stage, precision="bf16")
    if distributed.get_world_size() == 2:
        for stage in (1, 2, 3):
            save(out, f"zero{stage}-untied", stage=stage, tied=False, files=FILES)
        save(out, "zero2-later", stage=2, steps=3)
        save(out, "zero3-later", stage=3, steps=3)
        save(out, "zero3-small-groups", stage=3, zero={"sub_group_size": 40})
        if distributed.get_rank() == 0:
            lay_on_nvme(out / "zero3-small-groups", out / "zero3-nvme")
        save(out, "zero1-bf16-optimizer", stage=1, precision="bf16", data_types={"grad_accum_dtype": "fp32"})
        save(out, "zero2-cpu", stage=2, zero={"offload_optimizer": {"device": "cpu"}})
        both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        save(out, "zero3-cpu", stage=3, zero=both)
        save(out, "zero0", stage=0)
        save(out, "zero0-bf16", stage=0, precision="bf16")
        save_by_accelerate(out)
        save_gpt2(out)
    (out / f"done-{distributed.get_rank()}").touch()


if __name__ == "__main__":
    main()

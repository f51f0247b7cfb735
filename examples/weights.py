"""Three ways back to the weights that train.py has saved under ZeRO, side by side; they must be the same bit for bit.

    launcher run --stage 3 examples/train.py --out /checkpoints/job
    launcher run --stage 3 examples/weights.py --out /checkpoints/job       the same stage and number of processes

converted    DeepSpeed's zero_to_fp32 makes plain files of the shards, in OUT/fp32; any program can read them, and
             train.py begins with them: --load OUT/fp32
loaded       load_state_dict_from_zero_checkpoint puts the shards into a plain torch model, without files between
resumed      the engine takes its shards back, 32-bit weights, optimizer and all: train.py --resume

And the 16-bit model in OUT/final, gathered when the training ended, is the same again, rounded to its precision.

The first two want all shards in one place: where the machines share no file system, each has only its own, and they
have to be gathered first (launcher checkpoint gather). They also hold the whole model in the memory of one machine.
The newest checkpoint in OUT is taken; other options are those of train.py.
"""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from train import (
    ENGINE,
    EVALUATION,
    GPT,
    Progress,
    Shape,
    batch,
    choose,
    loss_of,
    make_model,
    make_optimizer,
    parse,
    read_weights,
    refuse,
    settle_batch,
    stage_of,
)

Weights = dict[str, Tensor]


def main() -> None:
    """Go all ways, then compare."""
    args = parse()
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulation or 1)
    if stage_of(accelerator) == 0:
        refuse(accelerator, "a checkpoint of plain training is whole: run this at the ZeRO stage of yours")
    micro = settle_batch(accelerator, args)
    folder = choose(accelerator, args.out)
    if folder is None:
        refuse(accelerator, f"there is nothing to compare in {args.out}: run train.py first")
    shape = read_shape(accelerator, args.out / "final")
    resumed = resume(accelerator, folder, shape, args, micro=micro)
    if accelerator.is_main_process:
        missing = accelerator.num_processes - len(list((folder / ENGINE).glob("*_optim_states.pt")))
        if missing:
            raise SystemExit(f"{missing} shards of {folder} are on other machines: launcher checkpoint gather")
        ways = {"converted": convert(folder, args.out / "fp32"), "loaded": load(folder, shape), "resumed": resumed}
        rows = batch(args.seed, EVALUATION, range(16), block=shape.block)
        compare(ways, read_weights(args.out / "final"), shape, rows)
    accelerator.end_training()


def read_shape(accelerator: Accelerator, final: Path) -> Shape:
    """How large the model is, as the main process finds it."""
    path = final / "config.json"
    said = json.loads(path.read_text()) if accelerator.is_main_process and path.is_file() else None
    said = broadcast_object_list([said])[0]
    if said is None:
        refuse(accelerator, f"{path} is missing: train.py writes it when it has come to its end")
    return Shape(**{name: value for name, value in said.items() if name != "alphabet"})


def convert(folder: Path, into: Path) -> Weights:
    """By way of files that any program can read."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    partial = into.with_name(f".{into.name}-{secrets.token_hex(4)}")
    convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(partial), safe_serialization=True, tag=ENGINE)
    shutil.rmtree(into, ignore_errors=True)
    partial.rename(into)
    return read_weights(into)


def load(folder: Path, shape: Shape) -> Weights:
    """Into a plain model at once."""
    from deepspeed.utils.zero_to_fp32 import load_state_dict_from_zero_checkpoint

    model: nn.Module = load_state_dict_from_zero_checkpoint(GPT(shape), str(folder), tag=ENGINE)
    return model.state_dict()


def resume(accelerator: Accelerator, folder: Path, shape: Shape, args: object, *, micro: int) -> Weights:
    """Into the engine; then its 32-bit weights are gathered one by one, which every process takes part in."""
    from deepspeed.utils import safe_get_full_fp32_param

    model: nn.Module = make_model(shape, seed=0, accelerator=accelerator, micro=micro)
    names = [name for name, _ in model.named_parameters()]
    optimizer = make_optimizer(model, args, accelerator.state.deepspeed_plugin.deepspeed_config)
    model, _ = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(Progress())
    accelerator.load_state(str(folder))
    weights = {}
    for name, parameter in zip(names, model.parameters(), strict=True):
        whole = safe_get_full_fp32_param(parameter)
        if accelerator.is_main_process:
            weights[name] = whole.detach().cpu().clone()
    return weights


def compare(ways: dict[str, Weights], final: Weights, shape: Shape, rows: Tensor) -> None:
    """A line for each way: its loss, and whether it is the same as the first; ends with an error where it is not."""
    first = ways["converted"]
    dtype = next(iter(final.values())).dtype
    rounded = {name: weight.to(dtype) for name, weight in first.items()}
    different = 0
    for way, weights in ways.items():
        different += tell(way, weights, first, shape, rows)
    different += tell(f"final, {str(dtype).removeprefix('torch.')}", final, rounded, shape, rows)
    if different:
        raise SystemExit(f"{different} tensors are not the same")


def tell(way: str, weights: Weights, expected: Weights, shape: Shape, rows: Tensor) -> int:
    """One line; answers with how many tensors are not the expected ones."""
    model = GPT(shape)
    model.load_state_dict(weights)
    with torch.no_grad():
        loss = loss_of(model.eval(), rows).item()
    wrong = [name for name in weights.keys() | expected.keys() if not same(weights.get(name), expected.get(name))]
    count = sum(weight.numel() for weight in weights.values())
    said = f"{', '.join(sorted(wrong)[:3])} … differ" if wrong else "the same bit for bit"
    print(f"{way:<16} {count:,} weights, loss {loss:.6f}, {said}", flush=True)
    return len(wrong)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are there and equal."""
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


if __name__ == "__main__":
    main()

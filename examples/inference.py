"""Write with a model that no single GPU holds: its weights stay dealt out over all processes, under ZeRO-3.

    launcher run --stage 3 examples/inference.py --model /checkpoints/job/final --prompt "the red boat"
    accelerate launch --use_deepspeed --zero_stage 3 examples/inference.py --model out/final

The model is a folder as train.py leaves it in OUT/final, with config.json and model.safetensors; or one that was
exported from a checkpoint, in one file or several, and --config for the model's shape. Each process holds 1/N of every
tensor and reads only the rows in which its part lies; layer by layer the parts are gathered for the computation and let
go again. So every process has to take part in every step of every other one. They write different texts: the prompts
are dealt out, and who is done goes on computing until all are.

    --prompt TEXT         may be repeated; the same prompt gives the same text on any number of processes
    --length 60           letters at most; a text ends with its line
    --temperature 0       take the likeliest letter; 0.7 is livelier
    --check               compare with the whole model, which the main process loads for that

Where the machines share no file system and only the first has the folder, it reads for all. With parameters offloaded
to CPU (`--offload-param cpu`) the parts lie in the machines' memory, with NVMe on their disks.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from torch import Tensor, nn
from train import ALPHABET, CODES, GPT, Shape, read_weights, refuse, stage_of, whole, zero_init

END = "\n"


def main() -> None:
    """Load, write, perhaps check."""
    args = parse()
    accelerator = Accelerator()
    if stage_of(accelerator) != 3:
        refuse(accelerator, "only ZeRO-3 deals the weights out: launcher run --stage 3, or accelerate's --zero_stage 3")
    if strange := sorted(set("".join(args.prompt)) - set(CODES)):
        refuse(accelerator, f"the model knows no {''.join(strange)!r}: small letters, digits, spaces and . + =")
    config = read_config(accelerator, args.config or args.model / "config.json")
    shape = Shape(**{name: value for name, value in config.items() if name != "alphabet"})
    settle(accelerator)
    with zero_init(accelerator, micro=1):
        model: nn.Module = GPT(shape)
    read = fill(accelerator, model, args.model)
    model = accelerator.prepare(model)
    model.eval()
    report(accelerator, model, read=read)
    with torch.no_grad():
        if args.check:
            check(accelerator, model, shape, args)
        for prompt, text in write(accelerator, model, shape, args):
            say(accelerator, f"--- {prompt}\n{text}")
    accelerator.end_training()


def settle(accelerator: Accelerator) -> None:
    """What DeepSpeed has to be told where nothing is trained."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 1
    config.pop("train_batch_size", None)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    zero = config["zero_optimization"]
    if zero.get("stage3_param_persistence_threshold", "auto") == "auto":
        zero["stage3_param_persistence_threshold"] = 0  # else small tensors are whole everywhere


def read_config(accelerator: Accelerator, path: Path) -> dict[str, Any]:
    """The model's shape, as the main process finds it."""
    said = None
    if accelerator.is_main_process and path.is_file():
        said = json.loads(path.read_text())
    said = broadcast_object_list([said])[0]
    if not said or "alphabet" not in said:
        refuse(
            accelerator, f"{path} {'is of another model' if said else 'is missing'}: train.py writes it to OUT/final"
        )
    return dict(said)


def say(accelerator: Accelerator, text: str) -> None:
    """Once for the whole run, where `accelerator.print` says it on every machine."""
    if accelerator.is_main_process:
        print(text, flush=True)


# Loading.


def fill(accelerator: Accelerator, model: nn.Module, folder: Path) -> int:
    """Give every parameter its values; answers with the bytes that this process has read for that."""
    present = gather_object([any(folder.glob("*.safetensors"))])
    if not present[0]:
        refuse(accelerator, f"{folder} holds no *.safetensors")
    everywhere = all(present)
    files = {} if not (everywhere or accelerator.is_main_process) else tensors_of(folder)
    read = 0
    for name, parameter in model.named_parameters():
        if files and name not in files:
            raise SystemExit(f"{folder} holds no {name}")
        if everywhere and is_here(parameter):
            part = own_part(files[name].get_slice(name), parameter, rank=accelerator.process_index)
            parameter.ds_tensor.data.view(-1)[: part.numel()].copy_(part)
        else:
            with whole(parameter):
                part = files[name].get_tensor(name) if accelerator.is_main_process else torch.empty(0)
                if accelerator.is_main_process:
                    parameter.data.copy_(part)
        read += part.nbytes
    return read


def tensors_of(folder: Path) -> dict[str, Any]:
    """The open file of every tensor; of a file nothing is read yet but its table."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no dict


def is_here(parameter: nn.Parameter) -> bool:
    """Whether this process's part is in memory; on NVMe it is not."""
    return parameter.ds_tensor.status.name == "AVAILABLE"


def own_part(stored: Any, parameter: nn.Parameter, *, rank: int) -> Tensor:
    """This process's part of a tensor, flat: all are as long, and the last ones may have less or nothing to hold."""
    shape = stored.get_shape()
    if tuple(shape) != tuple(parameter.ds_shape):
        raise SystemExit(f"a tensor of the shape {tuple(parameter.ds_shape)} is {tuple(shape)} in the file")
    row = math.prod(shape[1:])
    size = parameter.ds_tensor.numel()
    first, last = min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)
    rows = stored[first // row : -(-last // row)]
    return rows.flatten()[first - first // row * row :][: last - first]


def report(accelerator: Accelerator, model: nn.Module, *, read: int) -> None:
    """How much each process holds and has read; none may hold a whole tensor."""
    parameters = list(model.parameters())
    total = sum(one.ds_numel * one.element_size() for one in parameters)
    held = sum(one.ds_tensor.nbytes for one in parameters)
    entire = [one.ds_id for one in parameters if one.numel() == one.ds_numel and accelerator.num_processes > 1]
    for rank, (held_, read_, entire_) in enumerate(gather_object([(held, read, len(entire))])):
        say(
            accelerator,
            f"process {rank} holds {held_:,} of {total:,} bytes ({held_ / total:.1%}), {entire_} tensors whole; "
            f"it has read {read_:,} bytes",
        )


# Writing.


def write(
    accelerator: Accelerator, model: nn.Module, shape: Shape, args: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    """Each prompt with its text, in order."""
    for first in range(0, len(args.prompt), accelerator.num_processes):
        turn = args.prompt[first : first + accelerator.num_processes]
        number = first + accelerator.process_index
        text = args.prompt[number] if number < len(args.prompt) else ""
        yield from zip(turn, gather_object([go_on(accelerator, model, text, shape, args, seed=number)]), strict=False)


def go_on(
    accelerator: Accelerator, model: nn.Module, text: str, shape: Shape, args: argparse.Namespace, *, seed: int
) -> str:
    """One text to its end, and further steps until every process is at the end of its own."""
    dice = torch.Generator().manual_seed(seed)
    left = args.length if text else 0
    while accelerator.reduce(torch.tensor(left, device=accelerator.device)).item():
        odds = logits_of(accelerator, model, text[-shape.block :] or END)[-1]
        if not left:
            continue
        text += ALPHABET[choose(odds, args.temperature, dice)]
        left = 0 if text.endswith(END) else left - 1
    return text.rstrip(END)


def choose(logits: Tensor, temperature: float, dice: torch.Generator) -> int:
    """The code of the next letter."""
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=dice))


def logits_of(accelerator: Accelerator, model: nn.Module, text: str) -> Tensor:
    """(letters of the text, letters of the alphabet) logits, on the CPU, in 32 bits."""
    codes = torch.tensor([[CODES[letter] for letter in text]], device=accelerator.device)
    return model(codes)[0].float().cpu()


def check(accelerator: Accelerator, model: nn.Module, shape: Shape, args: argparse.Namespace) -> None:
    """The same logits as of the whole model in one process."""
    text = "the red boat sees the blue house."[: shape.block]
    found = logits_of(accelerator, model, text)
    if not accelerator.is_main_process:
        return
    plain = GPT(shape)
    plain.load_state_dict(read_weights(args.model))
    dtype = next(model.parameters()).dtype
    expected = plain.to(dtype).eval()(torch.tensor([[CODES[letter] for letter in text]]))[0].float()
    difference = (found - expected).abs().max().item()
    print(f"logits differ from the whole model's by at most {difference:.2e}", flush=True)
    if difference > (1e-4 if dtype is torch.float32 else 0.1):
        raise SystemExit("the model that is dealt out is not the model in the file")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: config.json in the folder")
    parser.add_argument("--prompt", action="append", metavar="TEXT")
    parser.add_argument("--length", type=int, default=60, metavar="LETTERS")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    args.prompt = args.prompt or ["the red boat"]
    return args


if __name__ == "__main__":
    main()

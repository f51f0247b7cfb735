"""Train a small GPT on a made-up language: one file, any number of processes, every ZeRO stage, no download.

    launcher run --stage 3 examples/train.py --steps 200        all nodes of the cluster, ZeRO-3
    accelerate launch examples/train.py                         this machine, as `accelerate config` says
    python examples/train.py --steps 100                        one process, without any launcher

The text is written on the spot by a small grammar (sentences that agree in number, and sums that are right), so there
is something to learn: the loss falls from 3.6 to below 1 within two hundred steps, on a laptop's CPU too. Sample i of
step s is a function of (seed, s, i) alone, the weights start from the seed alone, and the global batch is dealt out
over the processes: with the same --global-batch the loss curve is the same for any number of processes and for any
ZeRO stage, up to rounding. Compare two curves with `diff <(jq .loss a/loss.jsonl) <(jq .loss b/loss.jsonl)`.

    --global-batch 32 --accumulation 2      samples per step; a process sees global / (processes * accumulation) at once
    --save-every 100                        a checkpoint every 100 steps, in OUT/step-00000100
    --resume                                go on from the newest checkpoint in --out (or --resume FOLDER); the first
                                            run of a job that always says --resume starts anew
    --log-every 1                           a line per step
    --width 512                             a model large enough for NVMe offload: smaller tensors are never swapped

Precision and ZeRO come from the Accelerate config, by plugin settings or by a DeepSpeed file. With an `optimizer` in
that file, the file's optimizer is used, and so with its `scheduler`; `"auto"` values are filled from the options here.
At the end OUT/final/model.safetensors holds the whole model; it is loaded again into a plain torch model, must give the
same loss, and writes a sample. OUT is $LAUNCHER_CHECKPOINTS/<run> under launcher, else ./out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DummyOptim, DummyScheduler, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

EVALUATION = -1  # the step that no training ever reaches: its samples are for evaluation


# The language. Each sentence is right or wrong: a verb agrees with its subject, and a sum is a sum.

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.+="
CODES = {letter: code for code, letter in enumerate(ALPHABET)}
COLOURS = "red blue green grey black white".split()  # noqa: SIM905 - it reads better
THINGS = "boat tree lamp house river stone bird cloud".split()  # noqa: SIM905
DEEDS = "see find paint carry follow remember".split()  # noqa: SIM905


def sentence(dice: random.Random) -> str:
    """One true sentence of the language."""
    if dice.random() < 0.25:
        left, right = dice.randrange(10), dice.randrange(10)
        return f"{left}+{right}={left + right}.\n"
    many = dice.random() < 0.5
    subject = f"{dice.choice(COLOURS)} {dice.choice(THINGS)}"
    subject = f"two {subject}s" if many else f"the {subject}"
    verb = dice.choice(DEEDS) + ("" if many else "s")
    return f"{subject} {verb} the {dice.choice(COLOURS)} {dice.choice(THINGS)}.\n"


def sample(seed: int, step: int, index: int, *, length: int) -> list[int]:
    """Sample `index` of `step`, the same on every machine."""
    dice = random.Random(f"{seed} {step} {index}")  # noqa: S311 - not for secrets
    text = ""
    while len(text) < length:
        text += sentence(dice)
    return [CODES[letter] for letter in text[:length]]


def batch(seed: int, step: int, indices: range, *, block: int) -> Tensor:
    """A batch: one row of block + 1 letters per index."""
    return torch.tensor([sample(seed, step, index, length=block + 1) for index in indices])


# The model.


@dataclass(frozen=True)
class Shape:
    """How large the model is."""

    block: int = 64
    layers: int = 3
    heads: int = 4
    width: int = 96


class Attention(nn.Module):
    """Every position looks at those before it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.ask_and_answer = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, time, width) to the same."""
        rows, time_, width = x.shape
        parts = self.ask_and_answer(x).view(rows, time_, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.out(seen.transpose(1, 2).reshape(rows, time_, width))


class Layer(nn.Module):
    """Look around, then think."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.LayerNorm(shape.width), Attention(shape))
        self.think = nn.Sequential(
            nn.LayerNorm(shape.width),
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(),
            nn.Linear(4 * shape.width, shape.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, time, width) to the same."""
        x = x + self.look(x)
        return x + self.think(x)


class GPT(nn.Module):
    """Letters in, a guess at each next letter out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(ALPHABET), shape.width)
        self.places = nn.Embedding(shape.block, shape.width)
        self.layers = nn.Sequential(*(Layer(shape) for _ in range(shape.layers)))
        self.last = nn.LayerNorm(shape.width)
        self.guess = nn.Linear(shape.width, len(ALPHABET), bias=False)

    def forward(self, letters: Tensor) -> Tensor:
        """From (batch, time) codes to (batch, time, letter) logits."""
        places = torch.arange(letters.shape[1], device=letters.device)
        x = self.letters(letters) + self.places(places)
        return self.guess(self.last(self.layers(x)))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """The mean loss over all letters of a batch, in nats."""
    logits = model(rows[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def write_text(model: nn.Module, *, length: int, block: int, seed: int) -> str:
    """What the model writes by itself."""
    dice = torch.Generator().manual_seed(seed)
    text = torch.tensor([[CODES["\n"]]])
    for _ in range(length):
        odds = (model(text[:, -block:])[:, -1].float() / 0.7).softmax(-1)
        text = torch.cat([text, torch.multinomial(odds, 1, generator=dice)], dim=1)
    return "".join(ALPHABET[code] for code in text[0].tolist()).strip()


# Building it, alike everywhere.


def make_model(shape: Shape, *, seed: int, accelerator: Accelerator, micro: int) -> GPT:
    """The model with its first weights; under ZeRO-3 no process ever holds all of it."""
    with partitioned(accelerator, micro=micro):
        model = GPT(shape)
    for number, parameter in enumerate(model.parameters()):
        with whole(parameter):
            first_weights(parameter.data, seed=f"{seed} {number}", layers=shape.layers)
    # LayerNorm starts as the identity: its weights are the one-dimensional ones beside a bias.
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        with whole(norm.weight):
            norm.weight.data.fill_(1.0)
    return model


def first_weights(into: Tensor, *, seed: str, layers: int) -> None:
    """Drawn on the CPU from a seed of its own, so that neither device nor sharding can change them."""
    if into.dim() < 2:
        into.zero_()
        return
    dice = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))  # noqa: S311
    spread = 0.02 if into.shape[0] != into.shape[1] else 0.02 / math.sqrt(2 * layers)
    into.copy_(torch.randn(into.shape, generator=dice) * spread)


def partitioned(accelerator: Accelerator, *, micro: int) -> contextlib.AbstractContextManager[Any]:
    """Under ZeRO-3 with zero3_init_flag: split each module as soon as it is made."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3 or not plugin.is_zero3_init_enabled():
        return contextlib.nullcontext()
    import deepspeed  # only where it is used

    config = without_auto(plugin.deepspeed_config) | {"train_micro_batch_size_per_gpu": micro}
    config.pop("train_batch_size", None)
    return deepspeed.zero.Init(config_dict_or_path=config)


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config without what Accelerate has yet to fill."""
    plain = {key: without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in plain.items() if value != "auto"}


def whole(parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """Gather a parameter that ZeRO-3 has split, and scatter what was written into it."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def settle_batch(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Agree with the config on accumulation and batch; answers with the samples a process sees at once."""
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config if plugin is not None else {}
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in os.environ:
        config.pop("gradient_accumulation_steps", None)  # by plugin settings it is 1 where nobody said anything
    said = config.get("gradient_accumulation_steps", "auto")
    if args.accumulation or said != "auto":
        accelerator.gradient_accumulation_steps = args.accumulation or said
    share = accelerator.num_processes * accelerator.gradient_accumulation_steps
    micro, rest = divmod(args.global_batch, share)
    if rest or not micro:
        raise SystemExit(
            f"--global-batch {args.global_batch} does not divide over {accelerator.num_processes} processes "
            f"x {accelerator.gradient_accumulation_steps} accumulation steps: use a multiple of {share}"
        )
    if plugin is not None:
        settle(config, "gradient_accumulation_steps", accelerator.gradient_accumulation_steps)
        settle(config, "train_micro_batch_size_per_gpu", micro)
        if config.get("gradient_clipping", "auto") == "auto":
            config["gradient_clipping"] = 0.0  # Accelerate would fill in 1.0
    return micro


def settle(config: dict[str, Any], key: str, value: int) -> None:
    """A DeepSpeed file may leave a number open, or must say the same."""
    said = config.get(key, "auto")
    if said not in ("auto", value):
        raise SystemExit(f'the DeepSpeed config says "{key}": {said}, the options here {value}; use "auto" there')
    config[key] = value


def make_optimizer(model: nn.Module, args: argparse.Namespace, config: dict[str, Any]) -> Any:
    """Ours, or a stand-in for the one in the DeepSpeed file."""
    if "optimizer" in config:
        return DummyOptim(model.parameters(), lr=args.lr, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)


def rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate: a short climb, then a cosine down to a tenth."""
    warmup = max(1, min(20, args.steps // 10))
    if step < warmup:
        return float(args.lr) * (step + 1) / warmup
    done = (step - warmup) / max(1, args.steps - warmup)
    return float(args.lr) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


# Training.


class Progress:
    """The step, as a part of every checkpoint."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        """What to save."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """What was saved."""
        self.step = state["step"]


def main() -> None:
    """Train, save, load again."""
    args = parse()
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulation or 1)
    shape = Shape(block=args.block, layers=args.layers, heads=args.heads, width=args.width)
    micro = settle_batch(accelerator, args)
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config if plugin is not None else {}
    model: Any = make_model(shape, seed=args.seed, accelerator=accelerator, micro=micro)
    count = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
    optimizer = make_optimizer(model, args, config)
    theirs = "scheduler" in config
    scheduler = DummyScheduler(optimizer, total_num_steps=args.steps, warmup_num_steps=20) if theirs else None
    prepared = accelerator.prepare(*(part for part in (model, optimizer, scheduler) if part is not None))
    model, optimizer = prepared[:2]
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    accelerator.print(
        f"{count:,} weights, {accelerator.num_processes} processes on {accelerator.device.type}, "
        f"ZeRO-{plugin.zero_stage if plugin is not None else 0}, {args.global_batch} samples a step "
        f"= {accelerator.num_processes} x {accelerator.gradient_accumulation_steps} x {micro}"
    )
    if args.resume is not None:
        resume(accelerator, Path(args.resume or args.out))
    if accelerator.is_main_process and progress.step == 0:
        (args.out / "loss.jsonl").unlink(missing_ok=True)
    own_rate = not theirs and "optimizer" not in config
    for step, loss in train(accelerator, model, optimizer, progress, args, micro=micro, own_rate=own_rate):
        note(accelerator, args, step=step, loss=loss)
        if step % args.save_every == 0 and step < args.steps:
            save(accelerator, args.out, step=step)
    save(accelerator, args.out, step=progress.step)
    finish(accelerator, model, shape, args)
    accelerator.end_training()


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    progress: Progress,
    args: argparse.Namespace,
    *,
    micro: int,
    own_rate: bool,
) -> Iterator[tuple[int, float]]:
    """Each step with its loss, the mean over the global batch before the step."""
    model.train()
    while progress.step < args.steps:
        if own_rate:
            for group in optimizer.param_groups:
                group["lr"] = rate(progress.step, args)
        total = torch.zeros((), device=accelerator.device)
        for turn in range(accelerator.gradient_accumulation_steps):
            first = (turn * accelerator.num_processes + accelerator.process_index) * micro
            rows = batch(args.seed, progress.step, range(first, first + micro), block=args.block)
            with accelerator.accumulate(model):
                loss = loss_of(model, rows.to(accelerator.device))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach() / accelerator.gradient_accumulation_steps
        progress.step += 1
        yield progress.step, accelerator.reduce(total, "mean").item()


def note(accelerator: Accelerator, args: argparse.Namespace, *, step: int, loss: float) -> None:
    """Write the loss down, and now and then on the screen."""
    if not accelerator.is_main_process:
        return
    if step % args.log_every == 0 or step in (1, args.steps):
        print(f"step {step} loss {loss:.6f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "loss.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": loss, "time": time.time()}) + "\n")


def save(accelerator: Accelerator, out: Path, *, step: int) -> None:
    """A checkpoint; it counts once `complete` lies in it, on every machine."""
    folder = out / f"step-{step:08d}"
    if accelerator.is_local_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run: swapped tensors are not saved over others
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        (folder / "complete").touch()
    accelerator.print(f"saved {folder}")


def resume(accelerator: Accelerator, out: Path) -> None:
    """Load the newest checkpoint that is complete; the main process says which."""
    found = sorted(path.parent for path in out.glob("step-*/complete"))
    newest = broadcast_object_list([str(found[-1]) if found else None])[0]
    if newest is None:
        accelerator.print(f"no checkpoint in {out}: starting anew")
        return
    if not Path(newest).is_dir():
        raise SystemExit(f"{newest} is not on this machine: a checkpoint has one part per node")
    accelerator.load_state(newest)
    accelerator.print(f"resumed from {newest}")


def finish(accelerator: Accelerator, model: nn.Module, shape: Shape, args: argparse.Namespace) -> None:
    """Save the whole model, and see that it is what was trained."""
    rows = batch(args.seed, EVALUATION, range(16), block=args.block)
    model.eval()
    with torch.no_grad():
        trained = loss_of(model, rows.to(accelerator.device)).item()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        folder = args.out / "final"
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(shape) | {"alphabet": ALPHABET}) + "\n")
        check(folder / "model.safetensors", shape, rows, trained=trained, seed=args.seed)
    accelerator.wait_for_everyone()


def check(path: Path, shape: Shape, rows: Tensor, *, trained: float, seed: int) -> None:
    """Load the file into a plain torch model on the CPU: same loss, and a sample."""
    weights = {name: weight.float() for name, weight in load_file(path).items()}
    exact = not any(weight.dtype in (torch.float16, torch.bfloat16) for weight in load_file(path).values())
    model = GPT(shape)
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        loss = loss_of(model, rows).item()
        text = write_text(model, length=200, block=shape.block, seed=seed)
    print(f"saved {path}\nreloaded: loss {loss:.6f} (trained: {trained:.6f})\n--- it writes ---\n{text}", flush=True)
    if not math.isclose(loss, trained, rel_tol=1e-3 if exact else 3e-2):
        raise SystemExit("the saved model is not the trained one")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--global-batch", type=int, default=24, help="samples per step, over all processes")
    parser.add_argument("--accumulation", type=int, help="micro batches per step (default: the config's, or 1)")
    parser.add_argument("--block", type=int, default=Shape.block, help="letters a sample is long")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--width", type=int, default=Shape.width)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=default_out())
    parser.add_argument("--save-every", type=int, default=1_000_000, metavar="STEPS")
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER")
    return parser.parse_args()


def default_out() -> Path:
    """Where launcher keeps checkpoints, under launcher; else ./out."""
    checkpoints = os.environ.get("LAUNCHER_CHECKPOINTS")
    return Path(checkpoints, os.environ.get("LAUNCHER_RUN", "")) if checkpoints else Path("out")


if __name__ == "__main__":
    main()

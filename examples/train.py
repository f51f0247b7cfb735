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
    --load FOLDER                           begin with these weights: OUT/final, or what zero_to_fp32 has written
    --save-dtype bf16                       the precision of OUT/final (default: the one that was trained in)
    --recompute                             keep no activations between layers, compute them again: less memory
    --log-every 1                           a line per step
    --width 512                             a model large enough for NVMe offload: smaller tensors are never swapped

Precision and ZeRO come from the Accelerate config, by plugin settings or by a DeepSpeed file. With an `optimizer` in
that file, the file's optimizer is used, and so with its `scheduler`; `"auto"` values are filled from the options here.

Two things are saved. A checkpoint is the 32-bit whole: weights, optimizer, step; every process writes its own shards
beside it, so without a shared file system each machine has its part. It counts once `complete` lies in it, with a list
of the machine's files and their sizes. The newest one that is whole on all machines is taken; DeepSpeed's own `latest`
is not asked. A ZeRO checkpoint fits only as many processes as have written it; turned into a universal one it fits any
number, and `--resume FOLDER` knows it when it sees it.
OUT/final is the model alone, gathered: config.json and model.safetensors, in several files where it is large. At the
end it is loaded again into a plain torch model, must give the same loss, and writes a sample.
weights.py shows that all ways back lead to the same weights, inference.py writes with them.
OUT is $LAUNCHER_CHECKPOINTS/<run> under launcher, else ./out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DummyOptim, DummyScheduler, broadcast_object_list, gather_object
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

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

    def __init__(self, shape: Shape, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.config = SimpleNamespace(hidden_size=shape.width)  # Accelerate fills "auto" bucket sizes from it
        self.letters = nn.Embedding(len(ALPHABET), shape.width)
        self.places = nn.Embedding(shape.block, shape.width)
        self.layers = nn.Sequential(*(Layer(shape) for _ in range(shape.layers)))
        self.last = nn.LayerNorm(shape.width)
        self.guess = nn.Linear(shape.width, len(ALPHABET), bias=False)

    def forward(self, letters: Tensor) -> Tensor:
        """From (batch, time) codes to (batch, time, letter) logits."""
        places = torch.arange(letters.shape[1], device=letters.device)
        x = self.letters(letters) + self.places(places)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True) if self.recompute and self.training else layer(x)
        return self.guess(self.last(x))


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


def make_model(shape: Shape, *, seed: int, accelerator: Accelerator, micro: int, recompute: bool = False) -> GPT:
    """The model with its first weights; under ZeRO-3 no process ever holds all of it."""
    with partitioned(accelerator, micro=micro):
        model = GPT(shape, recompute=recompute)
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
    return zero_init(accelerator, micro=micro)


def zero_init(accelerator: Accelerator, *, micro: int) -> contextlib.AbstractContextManager[Any]:
    """What is built inside is dealt out over the processes, tensor by tensor."""
    import deepspeed  # only where it is used

    plugin = accelerator.state.deepspeed_plugin
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
    settle_folders(accelerator, args.out)
    start = None if args.resume is None else choose(accelerator, Path(args.resume or args.out))
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config if plugin is not None else {}
    model: Any = make_model(shape, seed=args.seed, accelerator=accelerator, micro=micro, recompute=args.recompute)
    if args.load:
        load(accelerator, model, args.load)
    count = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
    optimizer = make_optimizer(model, args, config)
    theirs = "scheduler" in config
    scheduler = DummyScheduler(optimizer, total_num_steps=args.steps, warmup_num_steps=20) if theirs else None
    prepared = accelerator.prepare(*(part for part in (model, optimizer, scheduler) if part is not None))
    model, optimizer = prepared[:2]
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    say(
        accelerator,
        f"{count:,} weights, {accelerator.num_processes} processes on {accelerator.device.type}, "
        f"ZeRO-{stage_of(accelerator)}, {args.global_batch} samples a step "
        f"= {accelerator.num_processes} x {accelerator.gradient_accumulation_steps} x {micro}",
    )
    if start is not None:
        accelerator.load_state(str(start))
        say(accelerator, f"resumed from {start}")
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


def say(accelerator: Accelerator, text: str) -> None:
    """Once for the whole run, where `accelerator.print` says it on every machine."""
    if accelerator.is_main_process:
        print(text, flush=True)


# Checkpoints: the 32-bit whole, a part of it on every machine.

ENGINE = "pytorch_model"  # what Accelerate calls DeepSpeed's part of a checkpoint


def stage_of(accelerator: Accelerator) -> int:
    """The ZeRO stage; 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else int(plugin.zero_stage)


def settle_folders(accelerator: Accelerator, out: Path) -> None:
    """Where the machines share no file system, what one process saves for all must be saved on each of them."""
    out.mkdir(parents=True, exist_ok=True)
    mark = out / broadcast_object_list([f".shared-{secrets.token_hex(8)}"])[0]
    if accelerator.is_main_process:
        mark.touch()
    accelerator.wait_for_everyone()
    shared = all(gather_object([mark.exists()]))
    mark.unlink(missing_ok=True)
    accelerator.project_configuration.save_on_each_node = not shared
    if not shared and stage_of(accelerator) in (1, 2):  # at stage 3 every process writes its part of the weights anyway
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config.setdefault("checkpoint", {})["use_node_local_storage"] = True


def save(accelerator: Accelerator, out: Path, *, step: int) -> None:
    """A checkpoint; it counts once `complete` lies in it, on every machine."""
    folder = out / f"step-{step:08d}"
    if accelerator.is_local_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run: swapped tensors are not saved over others
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        files = settled_files(folder)
        write_whole(folder / f"files-{accelerator.process_index:05d}.json", json.dumps(files, indent=1) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        said = {"step": step, "processes": accelerator.num_processes, "stage": stage_of(accelerator)}
        write_whole(folder / "complete", json.dumps(said) + "\n")
    accelerator.wait_for_everyone()
    say(accelerator, f"saved {folder}")


def settled_files(folder: Path) -> dict[str, int]:
    """The bytes of every file in a folder, by its path there; when they are told, they are on the disk."""
    found = {}
    for path in sorted(path for path in folder.rglob("[!.]*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            found[path.relative_to(folder).as_posix()] = os.fstat(file.fileno()).st_size
    return {name: size for name, size in found.items() if name != "latest" and not name.startswith("files-")}


def write_whole(path: Path, text: str) -> None:
    """Under its name there is all of it or nothing."""
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def choose(accelerator: Accelerator, where: Path) -> Path | None:
    """The checkpoint to go on from: `where` itself, or the newest in it that is whole on every machine.

    None where there is none. DeepSpeed must be told of a universal one before anything is prepared: that is done here.
    """
    where = where.parent if where.name == ENGINE else where
    single = any(gather_object([(where / ENGINE).is_dir() or (where / "complete").is_file()]))
    folders = [where] if single else sorted(where.glob("step-*"))
    rank = accelerator.process_index
    faults = gather_object([{folder.name: fault(folder, rank=rank) for folder in folders}])
    for name in sorted(set().union(*faults), reverse=True):
        wrong = [(rank, mine.get(name, "it is not there")) for rank, mine in enumerate(faults) if mine.get(name, "-")]
        folder = where if single else where / name
        if not wrong:
            fit(accelerator, folder)
            return folder
        said = "process {} says: {}".format(*wrong[0])
        if single:
            refuse(accelerator, f"{folder} is not whole; {said}")
        say(accelerator, f"{folder} is not whole, trying the one before it; {said}")
    say(accelerator, f"no checkpoint in {where}: starting anew")
    return None


def fault(folder: Path, *, rank: int) -> str | None:
    """What a process cannot load a checkpoint for; None where all that it needs is there, and all that is there whole.

    Each machine's list names what it had; where checkpoints were moved about, several machines' files may lie here.
    """
    if is_universal(folder):
        return None
    try:
        json.loads((folder / "complete").read_text() or "{}")
        lists = [json.loads(path.read_text()) for path in sorted(folder.glob("files-*.json"))]
    except (OSError, ValueError):
        return "it was not saved to its end"
    for files in lists:
        for name, size in files.items():
            path = folder / name
            if path.is_file() and path.stat().st_size != size:
                return f"{name} is torn"
            if not path.is_file() and f"random_states_{rank}.pkl" in files:  # the list of the machine that it ran on
                return f"{name} is missing"
    return None


def is_universal(folder: Path) -> bool:
    """Whether a checkpoint holds each tensor whole, in place of the shards of so many processes."""
    return (folder / ENGINE / "zero" / "optimizer_state.pt").is_file()


def fit(accelerator: Accelerator, folder: Path) -> None:
    """Refuse a checkpoint that this many processes cannot load at this stage."""
    stage, plugin = stage_of(accelerator), accelerator.state.deepspeed_plugin
    if plugin is not None:
        section = plugin.deepspeed_config.setdefault("checkpoint", {})
        if section.get("load_universal") and not is_universal(folder):
            refuse(accelerator, f'the DeepSpeed config says "load_universal": true, but {folder} is not universal')
        section["load_universal"] = is_universal(folder)
    if is_universal(folder):
        if plugin is None:
            refuse(accelerator, f"{folder} is a universal checkpoint, which ZeRO loads: stage 1, 2 or 3")
        return
    said = {"stage": stage, "processes": accelerator.num_processes}
    said |= json.loads((folder / "complete").read_text() or "{}")
    if said["stage"] != stage and {said["stage"], stage} != {1, 2}:
        refuse(accelerator, f"{folder} is of ZeRO stage {said['stage']}, this is stage {stage}: resume at the same one")
    if stage and said["processes"] != accelerator.num_processes:
        refuse(
            accelerator,
            f"{folder} is of {said['processes']} processes, and these are {accelerator.num_processes}:\n"
            "  a universal checkpoint fits any number (launcher checkpoint universal, or deepspeed's ds_to_universal)",
        )


def refuse(accelerator: Accelerator, text: str) -> NoReturn:
    """Every process ends here, for the same reason; one says it."""
    if accelerator.is_main_process:
        print(text, file=sys.stderr, flush=True)
    accelerator.end_training()
    raise SystemExit(1)


# Weights: the model alone, whole.


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every weight by its name: safetensors, or what zero_to_fp32 writes, in one file or several; read when touched."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise SystemExit(f"{folder} holds no weights: neither *.safetensors nor pytorch_model*.bin")
    weights: dict[str, Tensor] = {}
    for path in files:
        safe = path.suffix == ".safetensors"
        weights |= load_file(path) if safe else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return weights


def load(accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
    """Fill a model that is not prepared yet. Only the main process reads: the others get their parts from it."""
    weights = read_weights(folder) if accelerator.is_main_process else {}
    for name, parameter in model.named_parameters():
        with whole(parameter):
            if accelerator.is_main_process:
                if name not in weights or weights[name].shape != parameter.shape:
                    raise SystemExit(f"{folder} holds no {name} of the shape {tuple(parameter.shape)}")
                parameter.data.copy_(weights[name])
    say(accelerator, f"loaded {folder}")


def write_weights(weights: dict[str, Tensor], folder: Path, *, config: dict[str, Any]) -> None:
    """A folder as `save_pretrained` writes it; it is seen under its name when all of it is there."""
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    split = split_torch_state_dict_into_shards(weights, max_shard_size="5GB")
    for name, members in split.filename_to_tensors.items():
        save_file({one: weights[one].cpu().contiguous() for one in members}, partial / name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (partial / "config.json").write_text(json.dumps(config) + "\n")
    settled_files(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def finish(accelerator: Accelerator, model: nn.Module, shape: Shape, args: argparse.Namespace) -> None:
    """Save the whole model, and see that it is what was trained."""
    rows = batch(args.seed, EVALUATION, range(16), block=args.block)
    model.eval()
    with torch.no_grad():
        trained = loss_of(model, rows.to(accelerator.device)).item()
    if stage_of(accelerator) == 3 and not model.zero_gather_16bit_weights_on_model_save():
        say(
            accelerator,
            "no final model: the DeepSpeed config does not set stage3_gather_16bit_weights_on_model_save; "
            "the weights are in the checkpoint",
        )
        return
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.save_dtype]
        weights = {name: weight.to(dtype or weight.dtype) for name, weight in weights.items()}
        write_weights(weights, args.out / "final", config=asdict(shape) | {"alphabet": ALPHABET})
        check(args.out / "final", shape, rows, trained=trained, seed=args.seed)
    accelerator.wait_for_everyone()


def check(folder: Path, shape: Shape, rows: Tensor, *, trained: float, seed: int) -> None:
    """Load the files into a plain torch model on the CPU: same loss, and a sample."""
    weights = read_weights(folder)
    exact = not any(weight.dtype in (torch.float16, torch.bfloat16) for weight in weights.values())
    model = GPT(shape)
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        loss = loss_of(model, rows).item()
        text = write_text(model, length=200, block=shape.block, seed=seed)
    print(f"saved {folder}\nreloaded: loss {loss:.6f} (trained: {trained:.6f})\n--- it writes ---\n{text}", flush=True)
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
    parser.add_argument("--load", type=Path, metavar="FOLDER", help="weights to begin with")
    parser.add_argument("--save-dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--recompute", action="store_true", help="trade computing for memory")
    return parser.parse_args()


def default_out() -> Path:
    """Where launcher keeps checkpoints, under launcher; else ./out."""
    checkpoints = os.environ.get("LAUNCHER_CHECKPOINTS")
    return Path(checkpoints, os.environ.get("LAUNCHER_RUN", "")) if checkpoints else Path("out")


if __name__ == "__main__":
    main()

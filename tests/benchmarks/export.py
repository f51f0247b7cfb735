"""Exporting a checkpoint: launcher/inside/export.py beside DeepSpeed's zero_to_fp32, on the same checkpoints.

    python -m tests.benchmarks.export [--pairs 5] [--layers 12] [--folder FOLDER] [--write]

A real engine on two ranks (gloo, CPU) trains GPT-2 for one step and saves; 12 layers with untied embeddings are
2.0 GB of states, under ZeRO-3 and under ZeRO-2. Then both converters run in turn, each as a process of its own, and
the figures are the medians of the ratios pair by pair: seconds mean nothing on a shared machine.

Measured are the wall time from starting the process to its end, and the peak of its anonymous memory (RssAnon in
/proc/PID/status, asked about 500 times a second); mapped files are not counted, for either. Every tensor of every pair
is compared bit by bit. The peer is called as a function, without its command line's imports; it writes safetensors, as
we do, and does not wait for the disk, as we do.

Bytes to move are what a node without the others' shards would have to send: its files, or its extract.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INSIDE = ROOT / "launcher" / "inside"
DOCUMENT = ROOT / "docs" / "benchmarks" / "export.md"
RANKS = 2
AIMS = {"memory": 0.25, "time": 1.0, "bytes": 3.0}
THEIRS = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict
convert_zero_checkpoint_to_state_dict(sys.argv[1], sys.argv[2], dtype=sys.argv[3], safe_serialization=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """One run of one converter: seconds and bytes."""

    seconds: float
    anonymous: int


# The checkpoints


def train_and_save(stage: int, out: Path, *, layers: int) -> None:
    """One rank's part."""
    import deepspeed
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, tie_word_embeddings=False))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}},
    )
    words = torch.arange(16).view(1, -1) + engine.global_rank
    engine.backward(engine(input_ids=words, labels=words).loss)
    engine.step()
    engine.save_checkpoint(str(out), tag="step")


def make(stage: int, out: Path, *, layers: int) -> None:
    """Both ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = os.environ | {
        "LAUNCHER_BACKEND": "gloo",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    argv = [sys.executable, str(INSIDE / "bootstrap.py"), __file__, "--make", str(stage), "--folder", str(out)]
    ranks = [
        subprocess.Popen(
            [*argv, "--layers", str(layers)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(RANKS)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit("the checkpoint could not be made")


def size_of(files: Iterable[Path]) -> int:
    """Bytes."""
    return sum(file.stat().st_size for file in files)


# The runs


def measure(argv: list[str]) -> Spent:
    """Run it, and watch its memory."""
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        running = subprocess.Popen(argv, env=env, stdout=said, stderr=said)
        status = Path(f"/proc/{running.pid}/status")
        peak = 0
        while running.poll() is None:
            peak = max(peak, anonymous(status))
            time.sleep(0.002)
        seconds = time.monotonic() - began
        if running.returncode:
            said.seek(0)
            raise SystemExit(said.read().decode())
    return Spent(seconds=seconds, anonymous=peak)


def anonymous(status: Path) -> int:
    """RssAnon in bytes; 0 when the process has just ended."""
    try:
        text = status.read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(found[0]) if found else 0


def different(ours: Path, theirs: Path) -> list[str]:
    """Names whose tensors are not the same, bit by bit."""
    import torch
    from safetensors import safe_open

    [one], [other] = (list(folder.glob("*.safetensors")) for folder in (ours, theirs))
    with safe_open(one, "pt") as left, safe_open(other, "pt") as right:
        names = sorted({*left.keys(), *right.keys()})
        return [name for name in names if not same(left.get_tensor(name), right.get_tensor(name), torch)]


def same(left: Any, right: Any, torch: Any) -> bool:
    """Type, shape, bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)))


def compare(checkpoint: Path, folder: Path, *, dtype: str, pairs: int) -> dict[str, float]:
    """Medians over the pairs."""
    ours, theirs = folder / "ours", folder / "theirs"
    rows: list[tuple[Spent, Spent]] = []
    for number in range(pairs + 1):
        runs = {
            ours: [sys.executable, str(INSIDE / "export.py"), str(checkpoint), str(ours), "--dtype", dtype],
            theirs: [sys.executable, "-c", THEIRS, str(checkpoint), str(theirs), dtype],
        }
        order = (ours, theirs) if number % 2 else (theirs, ours)
        spent = {out: measure(runs[out]) for out in order}
        wrong = different(ours, theirs)
        if wrong:
            raise SystemExit(f"not the same: {wrong}")
        for out in order:
            shutil.rmtree(out)
        if number:  # the first pair warms caches
            rows.append((spent[ours], spent[theirs]))
            sys.stdout.write(f"  {spent[ours]}   DeepSpeed {spent[theirs]}\n")
            sys.stdout.flush()
    return {
        "memory": statistics.median(ours.anonymous / theirs.anonymous for ours, theirs in rows),
        "time": statistics.median(ours.seconds / theirs.seconds for ours, theirs in rows),
        "slowest": max(ours.seconds / theirs.seconds for ours, theirs in rows),
        "ours MB": statistics.median(ours.anonymous for ours, _ in rows) / 1e6,
        "theirs MB": statistics.median(theirs.anonymous for _, theirs in rows) / 1e6,
        "ours s": statistics.median(ours.seconds for ours, _ in rows),
        "theirs s": statistics.median(theirs.seconds for _, theirs in rows),
    }


def moved(checkpoint: Path, folder: Path) -> dict[str, int]:
    """Bytes over the network, were every rank on a node of its own."""
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    sizes = {"folder": size_of(files)}
    for dtype in ("fp32", "bf16"):
        total = 0
        for rank in range(RANKS):
            node = folder / "node"
            (node / "step").mkdir(parents=True)
            for file in files:
                here = "rank_1_" in file.name if rank else "rank_1_" not in file.name
                if file.parent.name == "step" and here:
                    (node / "step" / file.name).hardlink_to(file)
            extract = folder / "extract"
            argv = ["extract", str(node), "--tag", "step", "--out", str(extract), "--dtype", dtype]
            subprocess.run([sys.executable, str(INSIDE / "export.py"), *argv], check=True, stdout=subprocess.DEVNULL)
            total += size_of([extract])
            shutil.rmtree(node)
            extract.unlink()
        sizes[dtype] = total
    return sizes


# The document


def document(stages: dict[int, dict[str, Any]], *, command: str, pairs: int, millions: int) -> str:
    """All figures, with what they were measured on."""
    rows = "\n".join(
        f"| {stage} | {dtype} | {found['ours MB']:.0f} MB | {found['theirs MB']:.0f} MB | **{found['memory']:.3f}** "
        f"| {found['ours s']:.1f} s | {found['theirs s']:.1f} s | **{found['time']:.2f}** | {found['slowest']:.2f} |"
        for stage, figures in stages.items()
        for dtype, found in figures["pairs"].items()
    )
    bytes_ = "\n".join(
        f"| {stage} | {figures['bytes']['folder'] / 1e6:.0f} MB | {figures['bytes']['fp32'] / 1e6:.0f} MB "
        f"| **{figures['bytes']['folder'] / figures['bytes']['fp32']:.3f}** | {figures['bytes']['bf16'] / 1e6:.0f} MB "
        f"| **{figures['bytes']['folder'] / figures['bytes']['bf16']:.3f}** |"
        for stage, figures in stages.items()
    )
    names = ("torch", "deepspeed", "safetensors", "numpy", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"""# Checkpoint export

**What.** A DeepSpeed checkpoint of {RANKS} ranks becomes one safetensors file: `launcher/inside/export.py` beside
DeepSpeed's own `zero_to_fp32` on the same checkpoint. The model is GPT-2 with untied embeddings, {millions} million
parameters, trained for one step by a real engine. Every tensor of every pair was the same, bit by bit.

**How.** `{command}`. Both run in turn, as processes of their own, at the lowest priority; the figures are medians over
{pairs} pairs, the ratios medians of the ratios pair by pair, after one pair that warms caches. Memory is the peak of
RssAnon, asked about 500 times a second. We wait until the result is on the disk; the peer does not. Aims: memory at
most {AIMS["memory"]}, time at most {AIMS["time"]}, at least {AIMS["bytes"]:.0f} times fewer bytes.

**Where.** {os.cpu_count()} cores, shared with other work; Python {platform.python_version()}, {versions}.

| ZeRO stage | as | memory, ours | memory, DeepSpeed | ratio | time, ours | time, DeepSpeed | ratio | largest |
|---|---|---|---|---|---|---|---|---|
{rows}

Nearly all of the peer's time is spent on importing torch and DeepSpeed when the model is small; the larger it is, the
nearer the ratio comes to that of the copying alone. Its memory grows with the shard it writes (up to 5 GB), ours does
not: it is Python, the names and a buffer of 256 KiB, and numpy where numbers are rounded.

Bytes to move, were every rank on a node of its own: all files of the checkpoint, or the nodes' extracts.

| ZeRO stage | the folder | extracts, fp32 | times fewer | extracts, bf16 | times fewer |
|---|---|---|---|---|---|
{bytes_}

Adam's states are twelve bytes per parameter and the weights are four of them: at stage 3 three times is what can be
had in fp32. At stages 1 and 2 rank 0 also has the whole model in its model file, which no extract needs.
"""


def main() -> None:
    """Make, run, print, and write the document if asked."""
    parser = argparse.ArgumentParser(description="Checkpoint export beside DeepSpeed's zero_to_fp32.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2; 12 are 2.0 GB of states")
    parser.add_argument("--folder", type=Path, help="where 7 GB fit; they are removed (default: TMPDIR)")
    parser.add_argument("--write", action="store_true", help="docs/benchmarks/export.md")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make is not None:
        train_and_save(given.make, given.folder, layers=given.layers)
        return
    stages: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for stage in (3, 2):
            checkpoint = folder / f"zero{stage}"
            make(stage, checkpoint, layers=given.layers)
            stages[stage] = {"pairs": {}, "bytes": moved(checkpoint, folder)}
            for dtype in ("fp32", "bf16"):
                sys.stdout.write(f"ZeRO-{stage}, {dtype}\n")
                stages[stage]["pairs"][dtype] = compare(checkpoint, folder, dtype=dtype, pairs=given.pairs)
            shutil.rmtree(checkpoint)
    options = f" --layers {given.layers}" if given.layers != parser.get_default("layers") else ""
    command = f"python -m tests.benchmarks.export --pairs {given.pairs}{options}"
    millions = round(stages[3]["bytes"]["fp32"] / 4e6)
    text = document(stages, command=command, pairs=given.pairs, millions=millions)
    sys.stdout.write(text)
    if given.write:
        DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()

"""The ladder on a real GPU: what torch's allocator has held at most, beside what is predicted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.memory import Cluster, Host, Recipe, Rung, weigh
from launcher.model import read_simulation

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="this machine has no GPU"),
]

SHAPE = {"n_layer": 8, "n_embd": 1024, "n_head": 16, "vocab_size": 32000, "n_positions": 512}
QUESTION: dict[str, Any] = {
    "config": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **SHAPE},
    "micro_batch": 4,
    "sequence": 512,
    "checkpointing": False,
}
BUCKET = 50_000_000

# One process on one GPU: what it holds, without what several add to it.
STEPS = """
import json, os, sys
import torch
told = json.loads(sys.argv[1])
sys.path.insert(0, told["inside"])
import simulate
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=told["port"])
question, kind = told["question"], simulate.TYPES[told["question"]["precision"]]
with torch.device("cuda"):
    model, loss = simulate.build(question)
simulate.ready(model, checkpointing=False)
if told["stage"] == 0:
    if kind is not torch.float32:
        model.forward = simulate.as_prepared(model.forward, kind)
    optimizer = torch.optim.AdamW(model.parameters())
else:
    import deepspeed
    deepspeed.init_distributed("nccl", auto_mpi_discovery=False)
    mixed = {} if kind is torch.float32 else {question["precision"]: {"enabled": True}}
    config = {
        "train_micro_batch_size_per_gpu": question["micro_batch"],
        "zero_optimization": {"stage": told["stage"], "reduce_bucket_size": told["bucket"]},
        **mixed,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
torch.cuda.reset_peak_memory_stats()
for _ in range(3):
    if told["stage"] == 0:
        loss(model, question["micro_batch"], question["sequence"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        engine.backward(loss(engine, question["micro_batch"], question["sequence"]))
        engine.step()
print("peak", torch.cuda.max_memory_allocated())
"""


def answer(argv: list[str], **options: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        argv, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return str(done.stdout)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_allocator_held_what_is_predicted(stage: int, precision: str) -> None:
    question = {**QUESTION, "precision": precision}
    said = answer([sys.executable, str(ROOT / "launcher/inside/simulate.py")], input=json.dumps(question))
    model = read_simulation(json.loads(said), where="config.json")
    told = {
        "question": question,
        "stage": stage,
        "bucket": BUCKET,
        "inside": str(ROOT / "launcher/inside"),
        "port": str(29600 + os.getpid() % 1000),
    }
    one_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    one_gpu.pop("DS_ACCELERATOR", None)
    measured = int(answer([sys.executable, "-c", STEPS, json.dumps(told)], env=one_gpu).split()[-1])
    host = Host(name="here", gpus=1, gpu_memory=0, memory=0)
    machine = Cluster(hosts=(host,), context=0, process=0, slack=0.02)
    recipe = Recipe(precision=precision, reduce_bucket_size=BUCKET)
    predicted = weigh(Rung(stage=stage), model, recipe, machine).on("gpu")
    assert measured <= predicted <= 1.1 * measured

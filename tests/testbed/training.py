"""Real training on this machine, measured: what each rank's tensors take, and at most all that it takes.

    python -m tests.testbed.training <settings.jsonl >measured.jsonl

One line in, one line out. Settings: {model: the question of inside/simulate.py, stage, offload, processes, steps,
recipe: fields of `launcher.memory.Recipe`; cgroup and limit: a memory cgroup for all ranks, and by how many bytes it
may grow once they are set up}; answer: a list, by rank, of {states: bytes of all tensors at rest after the steps, peak:
the most that the process took in the steps, rest: what it takes after them, loss: by step}, or {error}. With {simulate:
question} alone inside/simulate.py answers. Memory is counted beyond what a process takes that has trained something
tiny in the same way. The libraries are imported once, and each rank is a fork.

On CPUs a rank is set up as `launcher run` does: gloo, DS_ACCELERATOR=cpu; and so that its resident memory is what it
has allocated: no transparent huge pages, and (by environment, see `start`) a malloc that gives back what is freed. On
a GPU (`start(cuda=True)`, one process) the memory is what torch's allocator has given out.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PR_SET_THP_DISABLE = 41
TYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


@contextlib.contextmanager
def start(*, cuda: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A server of measurements: settings go to its standard input, measurements come from its standard output."""
    # NVML tells of a GPU without CUDA's being set up, after which a process cannot be forked.
    gpu = {"DS_ACCELERATOR": "cuda", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    environment = {
        **os.environ,
        **(gpu if cuda else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.testbed.training"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield server
    finally:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.close()
        server.wait()
        server.stdout.close()


def ask(server: subprocess.Popen[str], settings: dict[str, Any]) -> Any:
    """One measurement."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(settings) + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    if not line:
        raise RuntimeError("the server of measurements ended")
    return json.loads(line)


def main() -> None:
    """Import everything, then answer."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.runtime.zero.muon.muon_optimizer
    import torch
    import transformers

    from launcher.inside import simulate
    from launcher.inside.bootstrap import forgo_unbuilt_comm

    forgo_unbuilt_comm()
    torch.set_num_threads(1)
    del deepspeed, transformers
    for small in (SMALL, LLAMA):  # transformers imports a model when it is first built
        simulate.build({"config": small})
    for line in sys.stdin:
        said.write(json.dumps(measure(json.loads(line))) + "\n")
        said.flush()


SMALL = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": 64,
    "n_positions": 64,
}


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def measure(settings: dict[str, Any]) -> Any:
    """Every rank in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if "simulate" in settings:
            return simulated(settings["simulate"], Path(folder, "said"))
        ranks = []
        for rank in range(settings["processes"]):
            child = os.fork()
            if child == 0:
                be_rank(settings, rank, Path(folder))
            ranks.append(child)
        codes = wait(ranks)
        if any(codes):
            notes = [path.read_text() for path in Path(folder).glob("*.error")]
            killed = min(codes) == -signal.SIGKILL and "killed: out of memory"
            return {"error": killed or (notes[0] if notes else f"ended with {codes}")}
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(settings["processes"])]


def simulated(question: dict[str, Any], said: Path) -> Any:
    """What inside/simulate.py answers, here, where everything is imported already."""
    child = os.fork()
    if child == 0:
        from launcher.inside import simulate

        said.write_text(json.dumps(simulate.answer(question)))
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(said.read_text())


def wait(ranks: list[int]) -> list[int]:
    """Exit codes, negative for a signal; when one ended badly the others are ended."""
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] != 0:
            for other in set(ranks) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [codes[child] for child in ranks]


def be_rank(settings: dict[str, Any], rank: int, folder: Path) -> None:
    """Train, leave what was measured in the folder, and leave."""
    code = 1
    try:
        if settings.get("cgroup"):
            Path(settings["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(settings["processes"]))
        found = train(settings, rank, folder)
        (folder / f"{rank}.json").write_text(json.dumps(found))
        code = 0
    except BaseException as error:  # noqa: BLE001 - told to who asked
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}"[:2000])
    finally:
        os._exit(code)


def train(settings: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Some steps of one rank."""
    import deepspeed

    from launcher.inside import simulate

    world, on_gpu = settings["processes"], simulate.device() == "cuda"
    store, backend = f"file://{folder}/store", "nccl" if on_gpu else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, init_method=store, rank=rank, world_size=world)
    rehearse(settings)
    release()
    meter: Meter | GpuMeter = GpuMeter() if on_gpu else Meter()
    before, ours = meter.taken(), meter.tensors()
    if "limit" in settings:
        confine(Path(settings["cgroup"]), settings["limit"], first=rank == 0)
    step = prepare(settings)
    release()
    meter.reset()
    losses = [step() for _ in range(settings.get("steps", 3))]
    peak = meter.most() - before
    release()
    return {"states": meter.tensors() - ours, "peak": peak, "rest": meter.taken() - before, "loss": losses}


def confine(group: Path, more: int, *, first: bool) -> None:
    """Let the memory cgroup in which the ranks are take so many bytes more than it holds now."""
    import torch.distributed

    torch.distributed.barrier()
    if first:
        v1 = (group / "memory.usage_in_bytes").exists()
        now = int((group / ("memory.usage_in_bytes" if v1 else "memory.current")).read_text())
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(now + more))
    torch.distributed.barrier()


def rehearse(settings: dict[str, Any]) -> None:
    """Train something tiny in the same way: what a process takes once, whatever it trains, belongs to no model."""
    small = {**settings["model"], "config": SMALL, "micro_batch": 1, "sequence": 8}
    step = prepare({**settings, "model": small})
    for _ in range(3):
        step()


def prepare(settings: dict[str, Any]) -> Any:
    """A model made ready for training; what takes one step of it."""
    import torch

    from launcher.inside import simulate

    torch.manual_seed(0)
    question = settings["model"]
    with torch.device(simulate.device()):
        model, loss = simulate.build(question)
    simulate.ready(model, checkpointing=question["checkpointing"])
    return plain(model, loss, settings) if settings["stage"] == 0 else sharded(model, loss, settings)


def plain(model: Any, loss: Any, settings: dict[str, Any]) -> Any:
    """Steps of plain data-parallel training, as Accelerate prepares it."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from launcher.inside import simulate

    question, accumulation = settings["model"], settings["recipe"].get("accumulation", 1)
    if question["precision"] != "no":
        model.forward = simulate.as_prepared(model.forward, simulate.TYPES[question["precision"]])
    wrapped = DistributedDataParallel(model) if settings["processes"] > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        for micro in range(accumulation):
            last = micro == accumulation - 1
            with contextlib.nullcontext() if last or wrapped is model else wrapped.no_sync():
                total = loss(wrapped, question["micro_batch"], question["sequence"]) / accumulation
                total.backward()
        value = float(total)
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def sharded(model: Any, loss: Any, settings: dict[str, Any]) -> Any:
    """Steps of ZeRO training."""
    import deepspeed
    import torch

    recipe, question = settings["recipe"], settings["model"]
    zero: dict[str, Any] = {
        "stage": settings["stage"],
        "reduce_bucket_size": recipe["reduce_bucket_size"],
        "stage3_prefetch_bucket_size": recipe.get("prefetch_bucket_size", int(5e7)),
        "stage3_param_persistence_threshold": recipe.get("persistence_threshold", int(1e5)),
        "stage3_max_reuse_distance": recipe.get("max_reuse_distance", int(1e9)),
        "stage3_max_live_parameters": recipe.get("max_live_parameters", int(1e9)),
        "sub_group_size": recipe.get("sub_group_size", int(1e9)),
    }
    if "overlap_comm" in recipe:
        zero["overlap_comm"] = recipe["overlap_comm"]
    for part in settings.get("offload", ()):
        zero[f"offload_{part}"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": question["micro_batch"],
        "gradient_accumulation_steps": recipe.get("accumulation", 1),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **({} if question["precision"] == "no" else {question["precision"]: {"enabled": True}}),
    }
    if "optimizer" in settings.get("offload", ()):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: Any = DeepSpeedCPUAdam(model.parameters(), lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step() -> float:
        for _ in range(recipe.get("accumulation", 1)):
            total = loss(engine, question["micro_batch"], question["sequence"])
            engine.backward(total)
            engine.step()
        return float(total)

    return step


def release() -> None:
    """Give back what is not in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """Bytes of this process in main memory."""

    def taken(self) -> int:
        """All that it takes now."""
        return resident("VmRSS")

    def reset(self) -> None:
        """Forget the most that it took."""
        Path("/proc/self/clear_refs").write_text("5")

    def most(self) -> int:
        """The most that it took since."""
        return resident("VmHWM")

    def tensors(self) -> int:
        """All tensors, each storage once."""
        import torch

        storages = {}
        for one in gc.get_objects():
            if issubclass(type(one), torch.Tensor) and one.layout == torch.strided and one.device.type == "cpu":
                storage = one.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


class GpuMeter:
    """Bytes that torch's allocator has given out on this process's GPU; at rest those are its tensors."""

    def taken(self) -> int:
        import torch

        return int(torch.cuda.memory_allocated())

    tensors = taken

    def reset(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def most(self) -> int:
        import torch

        return int(torch.cuda.max_memory_allocated())


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    main()

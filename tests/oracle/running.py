"""Real runs on CPUs: `accelerate launch` with two processes, as the agent starts it, on one machine or on several."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
INSIDE = ROOT / "launcher" / "inside"
EXAMPLES = ROOT / "examples"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What one machine's part of a run printed, standard output and error as they came."""

    code: int
    text: str

    def losses(self) -> dict[int, float]:
        """The losses that train.py printed, by step."""
        return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss ([0-9.]+)", self.text, re.M)}


def run(script: Path, *args: object, folder: Path, stage: int, processes: int = 2, precision: str = "no") -> Ran:
    """A run on one machine that ended well or badly; `folder` is where it works."""
    return run_on([folder], script, *args, stage=stage, processes=processes, precision=precision)[0]


def run_on(
    machines: list[Path], script: Path, *args: object, stage: int, processes: int = 2, precision: str = "no"
) -> list[Ran]:
    """A run on several machines that share no folder but this one computer: each works in a folder of its own."""
    port = _free_port()
    running = []
    for rank, folder in enumerate(machines):
        folder.mkdir(parents=True, exist_ok=True)
        config = _config(stage, precision=precision, processes=processes, machines=len(machines), rank=rank, port=port)
        (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, INSIDE / "launch.py", "--config_file", "accelerate.yaml", "--same_network"]
        flags = ["--rdzv_backend", "static", "--rdzv_conf", "timeout=60"]
        running.append(
            subprocess.Popen(
                [*map(str, command), *flags, str(INSIDE / "bootstrap.py"), str(script), *map(str, args)],
                cwd=folder,
                env=_environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [one.communicate(timeout=900)[0] for one in running]
    return [Ran(code=one.returncode, text=text) for one, text in zip(running, said, strict=True)]


def _config(stage: int, *, precision: str, processes: int, machines: int, rank: int, port: int) -> dict[str, object]:
    deepspeed = {
        "zero_stage": stage,
        "gradient_accumulation_steps": 1,
        "zero3_init_flag": stage == 3,
        "zero3_save_16bit_model": stage == 3,
        "deepspeed_multinode_launcher": "standard",
    }
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED" if stage else "MULTI_GPU",
        "mixed_precision": precision,
        "use_cpu": False,
        "debug": False,
        "num_machines": machines,
        "num_processes": processes,
        "machine_rank": rank,
        "main_process_ip": "127.0.0.1",
        "main_process_port": port,
        "main_training_function": "main",
        **({"deepspeed_config": deepspeed} if stage else {}),
    }


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LAUNCHER_", "ACCELERATE_"))}
    ours = {"LAUNCHER_BACKEND": "gloo", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])

"""The smoke test: one `docker run` of the image trains a few steps of a small model under Accelerate and DeepSpeed.

    python -m tests.testbed.smoke [IMAGE] [--stage 3] [--steps 20] [--processes 2]

Without IMAGE the newest CPU image of this machine is taken. The container runs as the launcher's containers do:
under a uid that the image does not know, without capabilities, without a way to gain any, and without a network
beyond its own. It says what it runs, and ends with 0 only when the loss fell and the saved model is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_STRANGER = 1234  # where this is run by root: root may write anywhere and would prove nothing


def docker_run(image: str, out: Path, *, stage: int, steps: int, processes: int) -> list[str]:
    """The command: what one node does, written out."""
    user = os.getuid() or _STRANGER
    return [
        *("docker", "run", "--rm", "--init", f"--user={user}:{user}", "--shm-size=1g"),
        *("--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none"),
        *("--env=LAUNCHER_BACKEND=gloo", f"--env=LAUNCHER_WORLD_SIZE={processes}", "--env=OMP_NUM_THREADS=1"),
        *("--env=GLOO_SOCKET_IFNAME=lo", "--env=PYTHONUNBUFFERED=1"),
        "--env=DS_ACCELERATOR=cpu",  # as the CPU image says itself; the CUDA image would insist on a GPU
        "--env=PYTHONWARNINGS=ignore::FutureWarning",  # torch and DeepSpeed disagree about names, four times a step
        *_mount(ROOT / "launcher" / "inside", "/inside"),
        *_mount(ROOT / "examples", "/examples"),
        *("--mount", f"type=bind,source={out},target=/out"),
        *(image, "python3", "/inside/launch.py"),
        *(f"--num_processes={processes}", "--num_machines=1", "--machine_rank=0", "--mixed_precision=no"),
        *("--main_process_ip=127.0.0.1", "--main_process_port=29500", "--same_network", "--rdzv_backend=static"),
        *("--use_deepspeed", "--deepspeed_multinode_launcher=standard", f"--zero_stage={stage}"),
        "--zero3_save_16bit_model=true",
        *("/inside/bootstrap.py", "/examples/train.py", f"--steps={steps}", "--log-every=1", "--out=/out"),
    ]


def fault(out: Path, *, steps: int) -> str | None:
    """What is wrong with the results, or None."""
    log = next(iter(out.rglob("loss.jsonl")), None)
    if log is None:
        return "no loss was written"
    losses = [float(json.loads(line)["loss"]) for line in log.read_text().splitlines()]
    if len(losses) < steps:
        return f"{len(losses)} of {steps} steps were made"
    if not losses[-1] < losses[0]:
        return f"the loss did not fall: {losses[0]:.3f} at first, {losses[-1]:.3f} at last"
    if next(iter(out.rglob("model.safetensors")), None) is None:
        return "no model was saved"
    sys.stdout.write(f"smoke: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps, model saved\n")
    return None


def newest() -> str | None:
    """The CPU image that was built last."""
    asked = ["docker", "images", "--filter=label=launcher.flavour=cpu", "--format={{.Repository}}:{{.Tag}}"]
    said = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    return next((name for name in said if "<none>" not in name), None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.testbed.smoke", description="Train in one container.")
    parser.add_argument("image", nargs="?", help="the image (default: the newest CPU image)")
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3), help="ZeRO stage (default 3)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(argv)
    image = given.image or newest()
    if image is None:
        sys.stderr.write("smoke: there is no image\n  next: make image FLAVOUR=cpu\n")
        return 5
    with tempfile.TemporaryDirectory(prefix="launcher-smoke-") as folder:
        out = Path(folder)
        out.chmod(0o1777)
        command = docker_run(image, out, stage=given.stage, steps=given.steps, processes=given.processes)
        sys.stdout.write(f"{shlex.join(command)}\n")
        sys.stdout.flush()
        ended = subprocess.run(command, check=False)
        wrong = f"the container ended with {ended.returncode}" if ended.returncode else fault(out, steps=given.steps)
    if wrong:
        sys.stderr.write(f"smoke: {wrong}\n")
    return 1 if wrong else 0


def _mount(source: Path, target: str) -> tuple[str, str]:
    """A bind that must exist and that the job only reads; -v would make an empty folder instead."""
    return "--mount", f"type=bind,source={source},target={target},readonly"


if __name__ == "__main__":
    sys.exit(main())

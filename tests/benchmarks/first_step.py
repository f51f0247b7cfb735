"""From the start of a fresh container to the first optimizer step, with CPU Adam and offload to NVMe.

    python -m tests.benchmarks.first_step IMAGE TOOLKIT_IMAGE [--pairs 3]

IMAGE is ours; TOOLKIT_IMAGE the same recipe with compilers (`launcher image build --flavour cpu --toolkit`), in which
DeepSpeed is told that no op is compiled, as in an installation from PyPI: it compiles what the job uses when the job
starts. Both run the same script on one rank: a model of two layers under ZeRO-3 whose optimizer states lie on disk.

Measured is the time from `docker run` to the line that the script writes after its first step, in turn, and the
figure is the median of the ratios pair by pair. Afterwards the files of torch's cache of extensions are counted in the
container: prebuilt ops leave none.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SCRIPT = """
import os, pathlib
import deepspeed, torch

deepspeed.init_distributed("gloo", rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
config = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}},
}
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
engine.backward(engine(torch.ones(1, 64, dtype=engine.get_data_types()[0] or torch.float32)).mean())
engine.step()
extensions = [path for path in pathlib.Path("/").glob("home/**/torch_extensions/**/*") if path.is_file()]
print("FIRST STEP", len(extensions), flush=True)
"""
# DeepSpeed is to believe that none of its ops was compiled when it was installed.
NO_OPS = """
import deepspeed.git_version_info as info
info.installed_ops = dict.fromkeys(info.installed_ops, False)
"""


def first_step(image: str, nvme: Path, *, prebuilt: bool) -> tuple[float, int]:
    """Seconds, and how many files torch's cache of extensions has then."""
    command = [
        *("docker", "run", "--rm", "--init", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none"),
        *("--shm-size=1g", "--env=MASTER_ADDR=127.0.0.1", "--env=MASTER_PORT=29500", "--env=LOCAL_RANK=0"),
        *("--env=RANK=0", "--env=WORLD_SIZE=1", "--mount", f"type=bind,source={nvme},target=/nvme"),
        *(image, "python3", "-u", "-c", SCRIPT if prebuilt else NO_OPS + SCRIPT),
    ]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        said = []
        for line in running.stdout:
            said.append(line)
            if line.startswith("FIRST STEP"):
                took = time.monotonic() - began
                files = int(line.split()[-1])
                break
        else:
            sys.exit("".join(said[-30:]))
    return took, files


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.first_step")
    parser.add_argument("image")
    parser.add_argument("toolkit_image")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args(argv)
    sys.stdout.write("prebuilt  files   compiled at start  files   ratio\n")
    ratios = []
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        nvme = Path(folder)
        nvme.chmod(0o1777)
        for _ in range(given.pairs):
            ours, none = first_step(given.image, nvme, prebuilt=True)
            theirs, some = first_step(given.toolkit_image, nvme, prebuilt=False)
            ratios.append(theirs / ours)
            sys.stdout.write(f"{ours:7.1f} s  {none:5}   {theirs:15.1f} s  {some:5}   {ratios[-1]:5.1f}\n")
            sys.stdout.flush()
    sys.stdout.write(f"median ratio: {statistics.median(ratios):.1f}\n")


if __name__ == "__main__":
    main()

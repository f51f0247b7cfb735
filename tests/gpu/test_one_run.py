"""Real CUDA runs: the example on this machine's GPUs, without containers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="this machine has no GPU"),
]


# Every stage and precision once; DeepSpeed compiles its fused and its CPU Adam (nvcc and ninja are needed).
SETTINGS = {
    "no ZeRO, bf16": "--stage 0 --precision bf16",
    "ZeRO-1, fp16, FusedAdam": "--stage 1 --precision fp16 --optimizer FusedAdam",
    "ZeRO-2, bf16, CPU": "--stage 2 --precision bf16 --offload-optimizer cpu",
    "ZeRO-3": "--stage 3",
    "ZeRO-3, bf16": "--stage 3 --precision bf16",
    "ZeRO-3, bf16, CPU": "--stage 3 --precision bf16 --offload-optimizer cpu --offload-param cpu",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_example_trains_on_every_gpu(tmp_path: Path, name: str) -> None:
    data = yaml.safe_load((ROOT / "examples/local.yaml").read_text())
    data["accelerator"] = "cuda"
    del data["nodes"][0]["slots"]  # one for each GPU that is found
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({**data, "name": "gpu-ring"}))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "LAUNCHER_STATE": str(tmp_path / ".state")}

    def launcher(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher.cli", *argv]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    try:
        options = SETTINGS[name].split()
        done = launcher("run", *options, "--port", "auto", "examples/train.py", "--steps", "40", "--log-every", "1")
        assert done.returncode == 0, done.stderr + done.stdout[-3000:]
        losses = [float(loss) for loss in re.findall(r"step \d+ loss ([0-9.]+)", done.stdout)]
        assert len(losses) == 40
        assert losses[-1] < losses[0] / 1.5
        assert "reloaded: loss" in done.stdout
    finally:
        launcher("down")

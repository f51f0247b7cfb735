"""Launch latency: `launcher run` beside a hand-written parallel `ssh node docker run` of the same thing.

    python -m tests.benchmarks.launch [--pairs 5] [--prefix lab]        (needs `make lab` and `launcher up`)

Measured, for both, is the time from starting the command to the last of the nodes' first lines of the job's Python;
all nodes are containers of this machine, so one clock serves. The two are run in turn, and the figure is the median
of the ratios pair by pair: seconds mean nothing on a shared machine.

The peer is given every advantage that is honest: files and image are on the nodes already, nothing is surveyed, no
log is kept, host keys are pinned. It does what must be done for CPUs to train together: the same `accelerate launch`
with the same rendezvous, and Accelerate's state built for gloo before the script.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from tests.testbed import lab as testbed

# One write for the whole line: the peer's ranks share a pipe.
FIRST = "import os, time\nos.write(1, f\"first {os.environ['RANK']} {time.time()}\\n\".encode())\n"
BY_HAND = """
import runpy, sys
from accelerate import PartialState
PartialState(cpu=True, backend="gloo")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def seconds(text: str, *, began: float, processes: int) -> float:
    """From the beginning to the last rank's first line."""
    times = [float(moment) for moment in re.findall(r"first \d+ ([0-9.]+)", text)]
    if len(times) != processes:
        raise SystemExit(f"{len(times)} of {processes} processes began:\n{text[-2000:]}")
    return max(times) - began


def with_launcher(home: Path, inventory: Path, *, processes: int) -> float:
    """One `launcher run`."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "run", "-c", str(inventory), "first.py"],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    return seconds(done.stdout + done.stderr, began=began, processes=processes)


def by_hand(lab: testbed.Lab, image: str, *, slots: int) -> float:
    """Three ssh at once, each with its docker run."""
    ssh = ("ssh", "-i", str(lab.identity), "-o", f"UserKnownHostsFile={lab.known_hosts}", "-o", "BatchMode=yes")
    processes = slots * len(lab.machines)

    def one(rank: int) -> str:
        machine = lab.machines[rank]
        command = (
            f"docker run --rm --init --network host --shm-size 1g --cap-drop ALL --user 1000:1000 "
            f"-e CUDA_VISIBLE_DEVICES= -e ACCELERATE_USE_CPU=true -e OMP_NUM_THREADS=1 -e GLOO_SOCKET_IFNAME=eth0 "
            f"-v /home/ml/byhand:/job:ro -v /mnt/nvme:/nvme/0 -v /mnt/checkpoints:/checkpoints {image} "
            f"accelerate launch --multi_gpu --num_processes {processes} --num_machines {len(lab.machines)} "
            f"--machine_rank {rank} --main_process_ip {lab.machines[0].address} --main_process_port 29777 "
            f"--mixed_precision no --dynamo_backend no --same_network --rdzv_backend static "
            f"/job/byhand.py /job/first.py"
        )
        done = subprocess.run([*ssh, f"ml@{machine.address}", command], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    began = time.time()
    with ThreadPoolExecutor() as pool:
        said = "".join(pool.map(one, range(len(lab.machines))))
    return seconds(said, began=began, processes=processes)


def put_by_hand(lab: testbed.Lab) -> None:
    """The peer's files, beforehand."""
    for machine in lab.machines:
        for name, text in (("first.py", FIRST), ("byhand.py", BY_HAND)):
            script = f"mkdir -p /home/ml/byhand && cat > /home/ml/byhand/{name} <<'EOF'\n{text}EOF\n"
            testbed.run(machine.name, "sh", "-c", script, user="ml")


def main() -> None:
    """Run the pairs and print what they gave."""
    parser = argparse.ArgumentParser(description="Launch latency beside a hand-written ssh + docker run.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prefix", default="lab")
    given = parser.parse_args()
    lab = testbed.up(prefix=given.prefix)
    slots = int(yaml.safe_load(lab.inventory.read_text())["defaults"]["slots"])
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "first.py").write_text(FIRST)
        os.environ.setdefault("LAUNCHER_STATE", str(home / ".state"))
        (home / ".launcherignore").write_text(".state/\n")
        for argv in (["trust", "--yes"], ["up"]):
            subprocess.run([sys.executable, "-m", "launcher.cli", *argv, str(lab.inventory)], cwd=home, check=True)
        shown = subprocess.run(
            [sys.executable, "-m", "launcher.cli", "config", "show", "--json", "-c", str(lab.inventory)],
            cwd=home,
            check=True,
            capture_output=True,
        )
        image = json.loads(shown.stdout)["image"]
        put_by_hand(lab)
        processes = slots * len(lab.machines)
        rows = []
        for number in range(given.pairs + 1):
            ours = with_launcher(home, lab.inventory, processes=processes)
            theirs = by_hand(lab, image, slots=slots)
            if number:  # the first pair warms caches
                rows.append((ours, theirs, ours / theirs))
                sys.stdout.write(f"launcher {ours:6.2f} s   by hand {theirs:6.2f} s   ratio {ours / theirs:.2f}\n")
    ours_, theirs_, ratios = (statistics.median(column) for column in zip(*rows, strict=True))
    sys.stdout.write(f"median   {ours_:6.2f} s           {theirs_:6.2f} s         {ratios:.2f}\n")


if __name__ == "__main__":
    main()

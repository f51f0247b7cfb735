"""Teardown: seconds from the death of a rank to the end of the run on all nodes, with nobody watching.

    python -m tests.benchmarks.teardown [--pairs 5] [--prefix lab] [--cap 60]      (needs `make lab`)

`launcher run --detach`, beside plain `accelerate launch` started by hand on the same nodes with the same image,
rendezvous and script. The processes meet once and are then on their own, so that no collective tells of the death; then
one process of the second node is killed. Its death is the moment at which it was killed; the end is that of the last
node's container, by its engine: all nodes are containers of this machine, so one clock serves. What has not ended
after `--cap` seconds counts as the cap, and is then stopped: the ratio is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import yaml

from tests.benchmarks.launch import BY_HAND
from tests.testbed import lab as testbed

APART = (Path(__file__).parents[1] / "lab/jobs/apart.py").read_text()
VICTIM = 3
KILL = (
    f"for p in /proc/[0-9]*; do tr '\\0' '\\n' < $p/environ 2>/dev/null | grep -qx RANK={VICTIM} && "
    "tr '\\0' ' ' < $p/cmdline | grep -q {marker} && kill -9 ${p#/proc/} && exit 0; done; exit 1"
)


def killed(lab: testbed.Lab, marker: str) -> float:
    """Kill a process of the second node; when that was."""
    begun = time.time()
    testbed.run(lab.machines[1].name, "sh", "-c", KILL.replace("{marker}", marker))
    return begun


def seconds(lab: testbed.Lab, container: str, *, since: float, cap: float) -> float:
    """Until the last node's container has ended; the cap when that is later."""
    while time.time() < since + cap:
        ends = [_end(machine.name, container) for machine in lab.machines]
        if all(ends):
            return max(end or 0.0 for end in ends) - since
        time.sleep(0.5)
    return cap


def _end(node: str, label: str) -> float | None:
    names = testbed.run(node, "docker", "ps", "-aq", "--filter", f"label={label}").split()
    one = json.loads(testbed.run(node, "docker", "inspect", *names))[0]["State"]
    return None if one["Running"] else datetime.fromisoformat(one["FinishedAt"][:26] + "+00:00").timestamp()


def wait_until_ready(lab: testbed.Lab, command: str, *, lines: int) -> None:
    """Until every process has met the others."""
    end = time.monotonic() + 600
    for machine in lab.machines:
        while testbed.run(machine.name, "sh", "-c", command, check=False).count("ready\n") < lines:
            if time.monotonic() > end:
                raise SystemExit(f"{machine.name}: the processes do not meet")
            time.sleep(0.5)
    time.sleep(5)


def with_launcher(home: Path, lab: testbed.Lab, *, slots: int, cap: float) -> float:
    """One detached run."""
    call = [sys.executable, "-m", "launcher.cli"]
    subprocess.run([*call, "run", "--detach", "apart.py"], cwd=home, check=True, capture_output=True)
    newest = "cat $(ls -d /home/ml/.launcher/*/*/runs/2* | tail -n 1)/out/node.log"
    wait_until_ready(lab, newest, lines=slots)
    taken = seconds(lab, "launcher.role=run", since=killed(lab, "bootstrap.py"), cap=cap)
    subprocess.run([*call, "attach"], cwd=home, check=False, capture_output=True)  # clears it away
    return taken


def by_hand(lab: testbed.Lab, image: str, *, slots: int, cap: float) -> float:
    """The same by `docker run` on every node."""
    processes = slots * len(lab.machines)

    def start(rank: int) -> None:
        machine = lab.machines[rank]
        command = (
            f"docker run -d --name byhand --label byhand --init --network host --shm-size 1g --cap-drop ALL "
            f"--user 1000:1000 -e CUDA_VISIBLE_DEVICES= -e ACCELERATE_USE_CPU=true -e OMP_NUM_THREADS=1 "
            f"-e GLOO_SOCKET_IFNAME=eth0 -v /home/ml/byhand:/job:ro {image} accelerate launch --multi_gpu "
            f"--num_processes {processes} --num_machines {len(lab.machines)} --machine_rank {rank} "
            f"--main_process_ip {lab.machines[0].address} --main_process_port 29777 --mixed_precision no "
            f"--dynamo_backend no --same_network --rdzv_backend static /job/byhand.py /job/apart.py"
        )
        testbed.run(machine.name, "sh", "-c", command, user="ml")

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(start, range(len(lab.machines))))
        wait_until_ready(lab, "docker logs byhand 2>&1", lines=slots)
        return seconds(lab, "byhand", since=killed(lab, "byhand.py"), cap=cap)
    finally:
        for machine in lab.machines:
            testbed.run(machine.name, "docker", "rm", "-f", "byhand", check=False)


def put_by_hand(lab: testbed.Lab) -> None:
    """The peer's files."""
    for machine in lab.machines:
        for name, text in (("apart.py", APART), ("byhand.py", BY_HAND)):
            script = f"mkdir -p /home/ml/byhand && cat > /home/ml/byhand/{name} <<'EOF'\n{text}EOF\n"
            testbed.run(machine.name, "sh", "-c", script, user="ml")


def main() -> None:
    """Run the pairs and print what they gave."""
    parser = argparse.ArgumentParser(description="From the death of a rank to the end on all nodes.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prefix", default="lab")
    parser.add_argument("--cap", type=float, default=60.0, help="seconds after which it is not waited any longer")
    given = parser.parse_args()
    lab = testbed.up(prefix=given.prefix)
    slots = int(yaml.safe_load(lab.inventory.read_text())["defaults"]["slots"])
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "apart.py").write_text(APART)
        (home / "cluster.yaml").write_text(lab.inventory.read_text())
        (home / ".launcherignore").write_text(".state/\n")
        os.environ.setdefault("LAUNCHER_STATE", str(home / ".state"))
        call = [sys.executable, "-m", "launcher.cli"]
        for argv in (["trust", "--yes"], ["up"]):
            subprocess.run([*call, *argv, "cluster.yaml"], cwd=home, check=True)
        shown = subprocess.run([*call, "config", "show", "--json"], cwd=home, check=True, capture_output=True)
        put_by_hand(lab)
        rows = []
        for _ in range(given.pairs):
            ours = with_launcher(home, lab, slots=slots, cap=given.cap)
            theirs = by_hand(lab, json.loads(shown.stdout)["image"], slots=slots, cap=given.cap)
            rows.append((ours, theirs, theirs / ours))
            capped = " (capped)" if theirs >= given.cap else ""
            sys.stdout.write(f"launcher {ours:6.2f} s   by hand {theirs:6.2f} s{capped}   ratio {theirs / ours:.1f}\n")
            sys.stdout.flush()
    ours_, theirs_, ratios = zip(*rows, strict=True)
    sys.stdout.write(
        f"median   {statistics.median(ours_):6.2f} s           {statistics.median(theirs_):6.2f} s         "
        f"{statistics.median(ratios):.1f}   most {max(ours_):.2f} s\n"
    )


if __name__ == "__main__":
    main()

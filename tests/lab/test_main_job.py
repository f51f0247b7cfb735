"""The main job on three real nodes: trust, up, run, watch, stop, down."""

from __future__ import annotations

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile

import pytest

from tests.lab.conftest import ROOT, Note, User, containers, eventually, make_user
from tests.lab.secrecy import check_that_a_secret_is_nowhere
from tests.testbed import lab as testbed

STEP = re.compile(r"\| step (\d+) loss ([0-9.]+)")


def losses(text: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in STEP.findall(text)}


def killed(rank: int) -> str:
    """The shell line that kills a rank on its node, found by the environment that torchrun gave it."""
    return (
        f"for p in /proc/[0-9]*; do tr '\\0' '\\n' < $p/environ 2>/dev/null | grep -qx RANK={rank} && "
        "tr '\\0' ' ' < $p/cmdline | grep -q bootstrap.py && kill -9 ${p#/proc/} && exit 0; done; exit 1"
    )


def test_up_starts_one_labelled_container_per_node_with_its_disks(lab: testbed.Lab, user: User) -> None:
    for machine in lab.machines:
        assert containers(machine.name) == [f"launcher-{lab.prefix}-{machine.name}-node"]
        said = testbed.run(machine.name, "docker", "inspect", f"launcher-{lab.prefix}-{machine.name}-node")
        one = json.loads(said)[0]
        mounts = {mount["Destination"]: mount["Source"] for mount in one["Mounts"]}
        assert mounts["/nvme/0"] == "/mnt/nvme"
        assert mounts["/checkpoints"] == "/mnt/checkpoints"
        assert one["Config"]["Labels"]["launcher.cluster"] == lab.prefix
        host = one["HostConfig"]
        assert (host["Privileged"], host["CapAdd"], host["CapDrop"]) == (False, None, ["ALL"])
        assert (host["SecurityOpt"], host["NetworkMode"], host["Init"]) == (["no-new-privileges"], "host", True)


def test_up_writes_every_nodes_accelerate_config(lab: testbed.Lab, user: User) -> None:
    said = user.launcher("exec", "cat", "/launcher/files/accelerate.yaml")
    assert said.code == 0, said.err
    for rank, machine in enumerate(lab.machines):
        mine = [line.partition(" | ")[2] for line in said.out.splitlines() if line.startswith(f"{machine.name} |")]
        assert f"machine_rank: {rank}" in mine
        assert f"main_process_ip: {lab.machines[0].address}" in mine
        assert "num_processes: 6" in mine


def test_a_second_up_does_nothing_and_says_so(user: User) -> None:
    said = user.launcher("up")
    assert (said.code, said.err.strip().endswith("nothing to do")) == (0, True), said.err


def test_a_dry_run_prints_the_plan_and_changes_nothing(lab: testbed.Lab, user: User) -> None:
    said = user.launcher("run", "--dry-run", "--json", "--stage", "3", "examples/train.py")
    assert said.code == 0, said.err
    plan = json.loads(said.out)
    assert plan["world_size"] == 6
    assert plan["nodes"][lab.machines[2].name]["accelerate"]["deepspeed_config"]["zero_stage"] == 3
    assert [containers(machine.name, role="run") for machine in lab.machines] == [[], [], []]


SMALL = ("--steps", "20", "--global-batch", "12", "--log-every", "1")
# DeepSpeed swaps only what is a megabyte and more on each rank, through buffers that it pins: wide enough for the one,
# and narrow enough for the 8 MB that a process of these nodes may lock.
WIDE = ("--steps", "6", "--global-batch", "6", "--log-every", "1", "--width", "384", "--layers", "1", "--block", "32")


def alone(options: tuple[str, ...]) -> dict[int, float]:
    """The losses of one process with the same global batch, without launcher, image or node: the truth."""
    script = [sys.executable, str(ROOT / "examples/train.py")]
    environment = {**os.environ, "LAUNCHER_CHECKPOINTS": "", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [*script, *options, "--out", out], capture_output=True, text=True, check=False, env=environment, cwd=out
        )
    assert done.returncode == 0, done.stderr
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss ([0-9.]+)", done.stdout, re.M)}


def same(found: dict[int, float], truth: dict[int, float]) -> None:
    assert found.keys() == truth.keys()
    for step, loss in truth.items():
        assert found[step] == pytest.approx(loss, rel=1e-3), f"step {step}"


def test_zero_3_over_three_nodes_gives_the_losses_of_one_process(user: User) -> None:
    said = user.launcher("run", "--stage", "3", "examples/train.py", *SMALL)
    assert said.code == 0, said.err + said.out[-3000:]
    truth = alone(SMALL)
    assert len(truth) == 20
    same(losses(said.out), truth)
    assert "reloaded: loss" in said.out


def test_an_offloaded_run_swaps_to_the_nodes_nvme(lab: testbed.Lab, user: User) -> None:
    running = user.begin("run", "--stage", "3", "--offload-optimizer", "nvme", "examples/train.py", *WIDE)

    def swapped(node: str) -> bool:
        found = testbed.run(node, "find", "/mnt/nvme/zero_stage_3", "-name", "*.swp", "-size", "+0", check=False)
        return "/mnt/nvme/zero_stage_3/optimizer" in found

    eventually(
        lambda: running.poll() is not None or all(swapped(machine.name) for machine in lab.machines),
        "swap files on every node's NVMe",
        seconds=300,
    )
    assert running.poll() is None, user.end(running).out[-3000:]
    said = user.end(running)
    assert said.code == 0, said.err + said.out[-3000:]
    same(losses(said.out), alone(WIDE))


def test_a_killed_rank_ends_the_run_and_is_named(lab: testbed.Lab, user: User) -> None:
    running = user.begin("run", "jobs/work.py")
    victim = lab.machines[1].name
    eventually(lambda: user.heard(b"step 3 of 6") > 0, "the job's third step")
    testbed.run(victim, "sh", "-c", killed(3))
    said = user.end(running)
    assert said.code == 1, said.err
    assert said.first == f"error: node {victim}, rank 3: killed by SIGKILL"
    assert [containers(machine.name, role="run") for machine in lab.machines] == [[], [], []]


def test_an_exception_is_named_with_its_rank_and_message(user: User) -> None:
    (user.home / "jobs/fails.py").write_text(
        "import os\nif os.environ['RANK'] == '5':\n    raise ValueError('no such tokenizer')\n"
        "import time\ntime.sleep(60)\n"
    )
    said = user.launcher("run", "jobs/fails.py")
    assert said.code == 1
    assert said.first.endswith("-c, rank 5: exit 1: ValueError: no such tokenizer")


def test_arguments_reach_the_job_byte_for_byte(user: User) -> None:
    nasty = [
        "a b",
        "",
        "--",
        "-x",
        "$(id)",
        "`id`",
        "'",
        '"',
        "\\",
        "ünï→漢",
        "*",
        "{a,b}",
        "line\nbreak",
        "%s",
        "~",
        "#",
    ]
    said = user.launcher("run", "jobs/report.py", *nasty)
    assert said.code == 0, said.err
    reports = [json.loads(line) for line in re.findall(r"\| (\{.*\})$", said.out, re.M)]
    assert sorted(report["rank"] for report in reports) == [0, 1, 2, 3, 4, 5]
    assert all(report["args"] == nasty and report["world"] == 6 for report in reports)
    assert all(report["uid"] == 1000 and report["cwd"] == "/launcher/code" for report in reports)


def test_a_secret_reaches_the_job_and_nothing_else(lab: testbed.Lab, user: User, note: Note) -> None:
    check_that_a_secret_is_nowhere(
        user,
        cluster=lab.prefix,
        processes=6,
        nodes=[machine.name for machine in lab.machines],
        checkpoints="/mnt/checkpoints",
        note=note,
    )


def test_a_detached_run_is_seen_and_watched_from_another_directory(
    lab: testbed.Lab, user: User, tmp_path_factory: pytest.TempPathFactory
) -> None:
    said = user.launcher("run", "--detach", "jobs/work.py", "60")
    assert said.code == 0, said.err
    other = make_user(tmp_path_factory.mktemp("other") / "elsewhere", lab.inventory)
    assert other.launcher("trust", "--yes").code == 0
    status = json.loads(other.launcher("status", "--json").out)
    assert [node["state"] for node in status["nodes"]] == ["running"] * 3
    refused = other.launcher("run", "jobs/work.py", "1")
    assert refused.code == 7
    by = f"{getpass.getuser()}@{socket.gethostname()}"
    assert re.search(
        rf"node \S+: run \S+ is under way, started by {by}, since \d{{4}}-.* UTC \(container", refused.first
    )
    seen = other.launcher("attach")
    assert seen.code == 0, seen.err
    steps = [int(step) for step in re.findall(r"\| step (\d+) of 6", seen.out)]
    assert steps == list(range(60))
    mine = user.launcher("logs")
    assert [int(step) for step in re.findall(r"\| step (\d+) of 6", mine.out)] == list(range(60))
    only = user.launcher("logs", "--rank", "0")
    assert [int(step) for step in re.findall(r"0 \| step (\d+) of 6", only.out)] == list(range(60))


def test_ctrl_c_stops_the_run_in_order(lab: testbed.Lab, user: User) -> None:
    running = user.begin("run", "jobs/work.py")
    eventually(lambda: all(containers(machine.name, role="run") for machine in lab.machines), "the run's containers")
    os.killpg(running.pid, signal.SIGINT)
    said = user.end(running)
    assert said.code == 130, said.err
    assert "Traceback" not in said.err
    assert [containers(machine.name, role="run") for machine in lab.machines] == [[], [], []]


def test_a_node_that_is_lost_does_not_keep_the_others_from_being_stopped(lab: testbed.Lab, user: User) -> None:
    assert user.launcher("run", "--detach", "jobs/work.py").code == 0
    lost, *others = (machine.name for machine in reversed(lab.machines))
    with testbed.disconnect(lost):
        status = user.launcher("status")
        assert (status.code, status.out.count("running")) == (3, 2), status.out
        stopped = user.launcher("stop")
        assert (stopped.code, lost in stopped.err) == (3, True), stopped.err
        assert [containers(name, role="run") for name in others] == [[], []]
    assert user.launcher("stop").code == 0
    assert containers(lost, role="run") == []


def test_a_job_has_the_grace_that_it_was_given(user: User) -> None:
    (user.home / "jobs/slow.py").write_text(
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(8)\n    print('saved', flush=True)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('ready', flush=True)\ntime.sleep(600)\n"
    )
    running = user.begin("run", "--grace", "40", "jobs/slow.py")
    eventually(lambda: user.heard(b" ready\n") == 6, "all six processes")
    os.killpg(running.pid, signal.SIGINT)
    said = user.end(running)
    assert (said.code, said.out.count("| saved")) == (130, 6), said.out + said.err


def test_a_detached_run_is_stopped_from_outside(lab: testbed.Lab, user: User) -> None:
    assert user.launcher("run", "--detach", "jobs/work.py").code == 0
    said = user.launcher("stop")
    assert said.code == 0, said.err
    assert user.launcher("attach").code == 2
    assert "no run is under way" in user.launcher("stop").err
    assert [containers(machine.name, role="run") for machine in lab.machines] == [[], [], []]


def test_an_unchanged_file_is_never_sent_twice(user: User) -> None:
    said = user.launcher("run", "jobs/report.py")
    assert said.code == 0
    newest = max((user.home / ".state").rglob("events.jsonl"), key=lambda path: path.parent.name)
    sent = [json.loads(line) for line in newest.read_text().splitlines() if '"CodeArrived"' in line]
    assert [event["bytes"] for event in sent] == [0, 0, 0]


def test_down_removes_all_that_is_ours_and_nothing_else(lab: testbed.Lab, user: User) -> None:
    image = json.loads(user.launcher("config", "show", "--json").out)["image"]
    first = lab.machines[0].name
    # The same cluster's name, and another user's: not ours.
    labels = (f"launcher.cluster={lab.prefix}", "launcher.owner=somebody", "launcher.role=run")
    decoy = ("--name", "decoy", *(word for label in labels for word in ("--label", label)))
    testbed.run(first, "docker", "run", "-d", *decoy, image, "sleep", "99")
    try:
        said = user.launcher("down")
        assert said.code == 0, said.err
        assert [containers(machine.name) for machine in lab.machines] == [["decoy"], [], []]
        again = user.launcher("down")
        assert (again.code, "0 containers" in again.err) == (0, True)
    finally:
        testbed.run(first, "docker", "rm", "-f", "decoy")
    assert testbed.run(first, "ls", "/mnt/checkpoints").strip()
    run = user.launcher("run", "jobs/report.py")
    assert (run.code, f"cluster {lab.prefix} was not up" in run.err) == (0, True)

"""The fault matrix on three real nodes, by its ids: what ends, how soon, and what the first line says.

A cover of it always; all of it with LAUNCHER_TEST_FAULTS=all (`make faults`).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from launcher.stages.watch import RESTARTED
from tests.lab.conftest import Note, Said, User, containers, eventually, make_user
from tests.lab.test_main_job import killed
from tests.testbed import lab as testbed

GRACE = 20  # of a silent node
DROPS = 20


@pytest.fixture
def stranger(lab: testbed.Lab, user: User, tmp_path: Path) -> User:
    """Somebody elsewhere with the same inventory, who has not seen the run begin."""
    made = make_user(tmp_path / "elsewhere", lab.inventory)
    assert made.launcher("trust", "--yes").code == 0
    return made


def detach(lab: testbed.Lab, user: User, *argv: str, said: str = "ready") -> None:
    """Start a run that nobody watches, and wait until all its processes are at work and the guards have met."""
    begun = user.launcher("run", "--detach", *argv)
    assert begun.code == 0, begun.err

    def lines(node: str) -> int:
        log = testbed.run(node, "sh", "-c", "cat $(ls -d /home/ml/.launcher/*/*/runs/2* | tail -n 1)/out/node.log")
        return log.count(f" {said}\n")

    eventually(lambda: all(lines(one.name) == 2 for one in lab.machines), "all six processes", seconds=300)
    time.sleep(6)


def ends(nodes: Sequence[str]) -> dict[str, float]:
    """When each node's run container ended, by the clock that all nodes share."""
    found = {}
    for node in nodes:
        for name in containers(node, role="run"):
            one = json.loads(testbed.run(node, "docker", "inspect", name))[0]["State"]
            if one["Status"] == "exited":
                found[node] = datetime.fromisoformat(one["FinishedAt"][:26] + "+00:00").timestamp()
    return found


def ended(lab: testbed.Lab, *nodes: str, within: float, since: float) -> float:
    """Wait until the run has ended on these nodes; seconds until the last of them."""
    wanted = nodes or tuple(machine.name for machine in lab.machines)
    eventually(lambda: set(wanted) <= set(ends(wanted)), f"the end on {', '.join(wanted)}", seconds=within + 60)
    taken = max(ends(wanted).values()) - since
    assert taken <= within
    return taken


def test_f21_a_killed_rank_ends_a_run_that_nobody_watches(
    lab: testbed.Lab, user: User, stranger: User, note: Note
) -> None:
    detach(lab, user, "jobs/apart.py")
    victim = lab.machines[1].name
    begun = time.time()
    testbed.run(victim, "sh", "-c", killed(3))
    taken = ended(lab, within=15, since=begun)
    said = stranger.launcher("attach")
    assert (said.code, said.first) == (1, f"error: node {victim}, rank 3: killed by SIGKILL"), said.err
    assert [containers(machine.name, role="run") for machine in lab.machines] == [[], [], []]
    note("a rank is killed, nobody watches", said.first, taken)


def test_f22_memory_that_ran_out_is_told_from_a_kill(lab: testbed.Lab, user: User, stranger: User, note: Note) -> None:
    victim = lab.machines[2].name
    testbed.run(victim, "rm", "-f", "/mnt/checkpoints/eat")
    detach(lab, user, "jobs/apart.py", "5")
    (container,) = containers(victim, role="run")
    testbed.run(victim, "docker", "update", "--memory", "2g", "--memory-swap", "2g", container)
    begun = time.time()
    testbed.run(victim, "touch", "/mnt/checkpoints/eat")
    taken = ended(lab, within=60, since=begun)
    testbed.run(victim, "rm", "-f", "/mnt/checkpoints/eat")
    said = stranger.launcher("attach")
    assert (said.code, said.first) == (
        1,
        f"error: node {victim}: out of memory: the kernel killed it at the container's limit",
    )
    note("a rank takes more memory than its container may", said.first, taken)


def test_f23_a_rank_that_stands_still_ends_the_run_and_all_stacks_come_home(
    lab: testbed.Lab, user: User, note: Note
) -> None:
    running = user.begin("run", "--hang-timeout", "30", "jobs/work.py")
    eventually(lambda: user.heard(b"step 20 of 6") > 0, "work", seconds=300)
    victim = lab.machines[1].name
    begun = time.monotonic()
    testbed.run(victim, "sh", "-c", killed(3).replace("kill -9", "kill -STOP"))
    said = user.end(running)
    assert said.code == 1, said.err
    assert said.first.startswith(f"error: node {victim}, rank 3: is stopped (SIGSTOP); no progress: no process of any")
    taken = time.monotonic() - begun
    assert taken < 30 + 5 + 15
    (evidence,) = [path for path in (user.home / ".state").rglob("evidence") if str(path) in said.err]
    kept = sorted(path.relative_to(evidence) for path in evidence.rglob("rank-*.txt"))
    nodes = [machine.name for machine in lab.machines]
    stacks = [f"{nodes[rank // 2]}/stacks/rank-{rank:05d}{by}.txt" for rank in range(6) for by in (".py-spy", "")]
    assert [str(path) for path in kept] == stacks
    assert all("work.py" in (evidence / path).read_text() for path in kept)
    note("a rank stands still, --hang-timeout 30", said.first, taken)


@pytest.mark.thorough
def test_f24_a_node_that_stands_still_ends_the_run_elsewhere(
    lab: testbed.Lab, user: User, stranger: User, note: Note
) -> None:
    (user.home / "jobs/together.py").write_text(
        "import time, torch\nfrom accelerate import Accelerator\n"
        "accelerator = Accelerator()\naccelerator.reduce(torch.ones(1))\nprint('ready', flush=True)\n"
        "while True:\n    accelerator.reduce(torch.ones(1))\n    accelerator.print('step')\n    time.sleep(1)\n"
    )
    detach(lab, user, "--hang-timeout", "30", "jobs/together.py")
    *others, lost = (machine.name for machine in lab.machines)
    begun = time.time()
    with testbed.pause(lost):
        taken = ended(lab, *others, within=30 + 5 + 15, since=begun)
    ended(lab, lost, within=120, since=begun)
    said = stranger.launcher("attach")
    assert (said.code, "no progress: no process of any node wrote anything for 3" in said.first) == (1, True), said.err
    note("a node stands still, --hang-timeout 30", said.first, taken)


def test_f25_a_control_path_that_is_cut_costs_no_line_and_no_step(lab: testbed.Lab, user: User, note: Note) -> None:
    running = user.begin("run", "jobs/work.py", "500")
    eventually(lambda: user.heard(b"step 20 of 6") > 0, "work", seconds=300)
    first = lab.machines[0].name  # the one that tells the steps
    with testbed.cut_control(first):
        time.sleep(30)
    said = user.end(running)
    assert said.code == 0, said.err
    steps = [int(step) for step in re.findall(r"\| step (\d+) of 6", said.out)]
    assert steps == list(range(500))
    (log,) = [path for path in user.new_logs() if path.name == f"{first}.log"]
    moments = [line.split()[0] for line in log.read_text().splitlines() if " step " in line]
    times = [datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp() for moment in moments]
    longest = max(after - before for before, after in itertools.pairwise(times))
    assert longest < 5
    note("the control path is cut for 30 s", "nothing: no line lost or repeated; longest pause of the job:", longest)


@pytest.mark.thorough
def test_f26_a_data_path_that_is_cut_ends_the_run(lab: testbed.Lab, user: User, stranger: User, note: Note) -> None:
    detach(lab, user, "--node-grace", str(GRACE), "jobs/apart.py")
    *others, lost = lab.machines
    begun = time.time()
    with testbed.cut_data(lost.name, *(other.address for other in others)):
        taken = ended(lab, within=GRACE + 20, since=begun)
    said = stranger.launcher("attach")
    assert said.code == 1
    assert said.first.startswith(f"error: node {lost.name}: lost: silent for "), said.err
    note(f"the data path is cut, --node-grace {GRACE}", said.first, taken)


@pytest.mark.thorough
def test_f27_a_node_that_is_gone_ends_the_run_and_attach_learns_it(
    lab: testbed.Lab, user: User, stranger: User, note: Note
) -> None:
    detach(lab, user, "--node-grace", str(GRACE), "jobs/apart.py")
    *others, lost = (machine.name for machine in lab.machines)
    begun = time.time()
    with testbed.disconnect(lost):
        taken = ended(lab, *others, within=GRACE + 15, since=begun)
        said = stranger.launcher("attach")
        assert said.code == 1
        assert said.first.startswith(f"error: node {lost}: lost: silent for "), said.err
        assert [containers(name, role="run") for name in others] == [[], []]
    ended(lab, lost, within=GRACE + 30, since=begun)
    stranger.launcher("stop")
    assert containers(lost, role="run") == []
    note(f"a node is gone, --node-grace {GRACE}", said.first, taken)


def test_f27_an_agent_that_is_killed_is_missed_within_seconds(
    lab: testbed.Lab, user: User, stranger: User, note: Note
) -> None:
    detach(lab, user, "jobs/apart.py")
    victim = lab.machines[1].name
    (container,) = containers(victim, role="run")
    begun = time.time()
    testbed.run(victim, "docker", "kill", container)
    taken = ended(lab, within=15, since=begun)
    said = stranger.launcher("attach")
    assert (said.code, f"node {victim}" in said.first) == (1, True), said.err
    note("a run container is killed", said.first, taken)


def steps_of(said: Said, user: User, node: str) -> list[int]:
    """The steps that were told, once the mirror of the log is known to be the node's own, byte for byte."""
    (log,) = [path for path in user.new_logs() if path.name == f"{node}.log"]
    own = "cat $(ls -d /home/ml/.launcher/*/*/runs/2* | tail -n 1)/out/node.log"
    assert log.read_text() == testbed.run(node, "sh", "-c", own)
    return [int(step) for step in re.findall(r"\| step (\d+) of 6", said.out)]


def working(user: User, *argv: str) -> subprocess.Popen[bytes]:
    """A run that is watched and at work."""
    running = user.begin("run", *argv)
    eventually(lambda: user.heard(b"step 20 of 6") > 0, "work", seconds=300)
    return running


@pytest.mark.thorough
def test_f28_an_sshd_that_is_killed_costs_no_line(lab: testbed.Lab, user: User, note: Note) -> None:
    running, first = working(user, "jobs/work.py", "300"), lab.machines[0].name
    with testbed.kill_sshd(first):
        time.sleep(8)
    said = user.end(running)
    assert (said.code, steps_of(said, user, first)) == (0, list(range(300))), said.err
    note("sshd is killed, and started again 8 s later", "nothing: no line lost or repeated", 8)


def restarted(lab: testbed.Lab, user: User, stranger: User, how: str) -> tuple[str, float]:
    """A run that nobody watches, on a node whose dockerd gets this signal and is started again: what is told of it."""
    detach(lab, user, "jobs/apart.py")
    victim = lab.machines[1].name
    begun = time.time()
    with testbed.stop_engine(victim, signal=how):
        time.sleep(3)
    taken = ended(lab, within=60, since=begun)
    said = stranger.launcher("attach")
    assert (said.code, said.first) == (1, f"error: node {victim}: {RESTARTED}"), said.err
    assert user.launcher("up").code == 0
    return said.first, taken


def test_f29_a_docker_that_is_restarted_is_named(lab: testbed.Lab, user: User, stranger: User, note: Note) -> None:
    note("dockerd is restarted", *restarted(lab, user, stranger, "TERM"))


@pytest.mark.thorough
def test_f30_a_docker_that_was_killed_is_named(lab: testbed.Lab, user: User, stranger: User, note: Note) -> None:
    note("dockerd is killed, and started again", *restarted(lab, user, stranger, "KILL"))


def test_f33_a_full_disk_of_the_checkpoints_is_named_and_what_is_whole_stays(
    lab: testbed.Lab, user: User, note: Note
) -> None:
    defaults = yaml.safe_load(user.inventory.read_text())["defaults"]
    inventory = str(user.write(defaults={**defaults, "paths": {"checkpoints": "/mnt/small"}}))
    (user.home / "jobs/fill.py").write_text(
        "import os, torch\nfrom accelerate import Accelerator\naccelerator = Accelerator()\n"
        "for step in range(100):\n"
        "    accelerator.reduce(torch.ones(1))\n"
        "    if accelerator.process_index == 2:\n"
        "        torch.save(torch.zeros(2 << 20), f\"{os.environ['LAUNCHER_CHECKPOINTS']}/{step}.pt\")\n"
    )
    victim, begun = lab.machines[1].name, time.monotonic()
    try:
        said = user.launcher("run", "-c", inventory, "--ignore", "disk-full", "jobs/fill.py")  # 64 MiB in all
        whole = testbed.run(victim, "find", "/mnt/small", "-name", "*.pt", "-size", "+8191k").split()
    finally:
        testbed.run(victim, "sh", "-c", "rm -rf /mnt/small/*")
        assert user.launcher("up").code == 0
    assert (said.code, len(whole) >= 6) == (1, True), (said.err, whole)
    full = f"error: node {victim}, rank 2: exit 1: RuntimeError: no space is left at /checkpoints: "
    assert said.first.startswith(full), said.err
    note("the disk of the checkpoints is full", said.first, time.monotonic() - begun)


@pytest.mark.thorough
def test_f43_a_launcher_that_slept_goes_on_where_it_was(lab: testbed.Lab, user: User, note: Note) -> None:
    running, first = working(user, "jobs/work.py", "400"), lab.machines[0].name
    os.kill(running.pid, signal.SIGSTOP)
    with testbed.cut_control(first):
        time.sleep(20)
    os.kill(running.pid, signal.SIGCONT)
    said = user.end(running)
    assert (said.code, steps_of(said, user, first)) == (0, list(range(400))), said.err
    note("the launcher sleeps for 20 s, its connections are cut", "nothing: no line lost or repeated", 20)


def test_f44_a_stream_that_drops_again_and_again_loses_and_repeats_nothing(
    lab: testbed.Lab, user: User, note: Note
) -> None:
    running, first = working(user, "jobs/work.py", "400"), lab.machines[0].name
    drops = 0
    while running.poll() is None and drops < DROPS:
        testbed.run(first, "pkill", "-KILL", "-u", "ml", "-x", "sshd", check=False)
        drops += 1
        time.sleep(random.uniform(0.2, 1.5))  # noqa: S311 - any moment
    said = user.end(running)
    assert (said.code, steps_of(said, user, first)) == (0, list(range(400))), said.err
    note(f"the stream of the log is dropped {drops} times", "nothing: no line lost or repeated", 0)


@pytest.mark.thorough
def test_f35_a_fifth_of_all_packets_lost_ends_nothing(lab: testbed.Lab, user: User, note: Note) -> None:
    detach(lab, user, "--node-grace", str(GRACE), "jobs/apart.py")
    bad, *others = lab.machines
    with testbed.lose(bad.name, *(other.address for other in others), share=0.2):
        time.sleep(3 * GRACE)
        assert ends([machine.name for machine in lab.machines]) == {}
    assert user.launcher("stop").code == 0
    note("a fifth of all packets is lost", "nothing: it goes on", 3.0 * GRACE)


def test_f49_an_owner_that_comes_back_after_its_run_was_taken_over_touches_nothing(
    lab: testbed.Lab, user: User, stranger: User, note: Note
) -> None:
    running = user.begin("run", "jobs/apart.py")
    eventually(lambda: user.heard(b" ready\n") == 6, "all six processes", seconds=300)
    os.kill(running.pid, signal.SIGSTOP)
    assert stranger.launcher("stop").code == 0
    detach(lab, stranger, "jobs/apart.py")
    theirs = [containers(machine.name, role="run") for machine in lab.machines]
    begun = time.time()
    os.kill(running.pid, signal.SIGCONT)
    os.kill(running.pid, signal.SIGINT)
    said = user.end(running)
    assert (said.code, "Traceback" in said.err) == (130, False), said.err
    taken = time.time() - begun
    assert [containers(machine.name, role="run") for machine in lab.machines] == theirs
    assert ends([machine.name for machine in lab.machines]) == {}
    assert stranger.launcher("stop").code == 0
    note("an owner stands still, its run is taken over, it goes on", "nothing of the new run is touched", taken)


def test_a_killed_rank_is_started_again_and_the_script_goes_on(lab: testbed.Lab, user: User) -> None:
    (user.home / "jobs/again.py").write_text(
        "import os, signal\nfrom pathlib import Path\n"
        "print('attempt', os.environ.get('LAUNCHER_RESTART', '0'), os.environ['LAUNCHER_RUN'], flush=True)\n"
        "if 'LAUNCHER_RESTART' not in os.environ and os.environ['RANK'] == '3':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = user.launcher("run", "--max-restarts", "1", "jobs/again.py")
    assert said.code == 0, said.err
    assert "starting again in 10 s (restart 1 of 1): it may be over the next time" in said.err
    attempts = {line.split("| ")[1] for line in said.out.splitlines() if "| attempt" in line}
    assert sorted(line.split()[1] for line in attempts) == ["0", "1"]
    assert len({line.split()[2] for line in attempts}) == 1
    assert [containers(machine.name, role="run") for machine in lab.machines] == [[], [], []]

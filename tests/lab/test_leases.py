"""Leases on three real nodes: runs side by side, a node that is taken, and a lost one that a spare stands in for."""

from __future__ import annotations

import json
import time

from tests.lab.conftest import Note, User, containers, eventually
from tests.testbed import lab as testbed


def detach(user: User, nodes: str) -> str:
    """Start a run that nobody watches on these nodes; its id."""
    begun = user.launcher("run", "--detach", "--json", "--nodes", nodes, "jobs/apart.py")
    assert begun.code == 0, begun.err
    return str(json.loads(begun.out)["run"])


def test_two_runs_hold_their_own_nodes_and_a_third_is_told_who_has_them(lab: testbed.Lab, user: User) -> None:
    a, b, c = (machine.name for machine in lab.machines)
    idle = {node: containers(node, role="node") for node in (a, b, c)}
    pair, alone = detach(user, f"{c},{a}"), detach(user, b)
    held = user.launcher("run", "--nodes", f"{a},{b}", "jobs/apart.py")
    assert (held.code, held.first.startswith(f"error: node {a}: run {pair} is under way, started by ")) == (7, True)
    assert ", since 20" in held.first

    def ready(run: str) -> list[str]:
        lines = user.launcher("logs", run).out.splitlines()
        return sorted(line.split("|")[0].strip() for line in lines if line.endswith("| ready"))

    eventually(lambda: len(ready(pair)) == 4, "four processes", seconds=300)
    eventually(lambda: len(ready(alone)) == 2, "two processes", seconds=300)
    assert [" ".join(one.split()) for one in ready(pair)] == [f"{a} 2", f"{a} 3", f"{c} 0", f"{c} 1"]
    status = json.loads(user.launcher("status", "--json").out)
    assert [(row["run"], row["state"]) for row in status["nodes"]] == [
        (pair, "running"),
        (alone, "running"),
        (pair, "running"),
    ]
    several = user.launcher("stop")
    assert (several.code, several.first) == (2, "error: 2 runs are under way: which one is meant?")
    assert user.launcher("stop", pair).code == 0
    assert [len(containers(node, role="run")) for node in (a, b, c)] == [0, 1, 0]
    assert user.launcher("stop").code == 0
    assert [len(containers(node, role="run")) for node in (a, b, c)] == [0, 0, 0]
    assert {node: containers(node, role="node") for node in (a, b, c)} == idle


def test_a_spare_stands_in_for_a_node_that_is_gone(lab: testbed.Lab, user: User, note: Note) -> None:
    a, b, spare = (machine.name for machine in lab.machines)
    inventory = str(user.write(spares=[spare]))
    running = user.begin("run", "-c", inventory, "--max-restarts", "2", "--node-grace", "20", "jobs/spare.py")
    eventually(lambda: user.heard(b"4 processes", node=a) > 10, "work", seconds=300)
    assert containers(spare, role="run") == []
    begun = time.monotonic()
    with testbed.disconnect(b):
        said = user.end(running)
    assert said.code == 0, said.err
    told = next(line for line in said.err.splitlines() if "the spare" in line)
    assert told.startswith(f"node {b} does not answer: the spare {spare} takes its place (")
    ranks = [line.split("| ")[1] for line in said.out.splitlines() if "| rank " in line]
    assert sorted(ranks) == [f"rank {rank} is on {node}" for rank, node in enumerate((a, a, spare, spare))]
    note("a node is gone, there is a spare", told, time.monotonic() - begun)

    assert len(containers(b, role="run")) == 1  # nobody could clear it away
    assert user.launcher("stop").err == "no run is under way\n"
    assert [containers(node, role="run") for node in (a, b, spare)] == [[], [], []]

"""Tidy: after a run, what nodes would otherwise pile up. Checkpoints, data and the newest runs' logs stay."""

from __future__ import annotations

from cluster.command import script
from cluster.fleet import Machine
from launcher.plan import NodePlan
from launcher.stages.code import sweep_code

KEPT_RUNS = 50

# The names of runs sort by time. What is `.fresh.` was never finished; a day is longer than any transfer of it.
_OLD = """
cd "$1/runs" || exit 0
ls | sort -r | tail -n "+$(($2 + 1))" | while IFS= read -r old; do rm -rf -- "$old"; done
find "$1" "$1/runs" -maxdepth 1 -name '*.fresh.*' -mmin +1440 -exec rm -rf {} +
"""


def tidy(machine: Machine, node: NodePlan) -> None:
    """Remove old snapshots of the code, and the files and logs of all but the newest runs."""
    sweep_code(machine.transport, f"{node.root}/store", in_use=(node.host.code.rpartition("/")[2],))
    machine.transport.run(script(_OLD, node.root, str(KEPT_RUNS)), timeout=60)

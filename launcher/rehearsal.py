"""A rehearsal: the user's own job in small on this machine, and what is told when a part of it dies.

The cluster is this machine several times, on its CPUs; each fault has a run of its own, and comes a while after the job
has said its first line. What is watched, judged and told is what would be on the real nodes.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import document
from cluster.command import script
from cluster.container import LABEL_RUN
from cluster.errors import Interrupted
from cluster.fleet import Machine, each
from cluster.inventory import Engine, Inventory, read_inventory
from launcher import execute, nodes, render
from launcher.events import RunEnded
from launcher.job import Job
from launcher.plan import Plan
from launcher.record import Memory
from launcher.session import Session, Voice, ours, session
from launcher.snapshot import Snapshot
from launcher.state import INTERRUPTED

HANG_TIMEOUT = 15  # seconds without a line, in the rehearsal of a hang
# This machine is what it is; of a real node these would be worth a word.
IGNORED = ("nvme-on-root", "checkpoints-on-root", "memlock")

# Signal every process of a run on a node, or of one of its ranks, but not who does it. Nobody found: exit 1.
_SIGNAL = """
signal=$1 run=$2 node=$3 rank=$4 found=
for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    said=$(tr '\\0' '\\n' <"$process/environ" 2>/dev/null) || continue
    printf '%s\\n' "$said" | grep -qxF "LAUNCHER_RUN=$run" || continue
    printf '%s\\n' "$said" | grep -qxF "LAUNCHER_NODE=$node" || continue
    [ -z "$rank" ] || printf '%s\\n' "$said" | grep -qxF "RANK=$rank" || continue
    [ "$pid" = $$ ] || found="$found $pid"
done
[ -n "$found" ] || exit 1
kill -s "$signal" $found 2>/dev/null
exit 0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is done to a run; how it must end: the exit code, and what the first cause says ("" when it says none)."""

    name: str
    what: str
    signal: str = ""
    whole_node: bool = False
    code: int = 1
    told: str = ""


FAULTS = (
    Fault(name="stop", what="stopped in order", code=INTERRUPTED, told="stopped from outside"),
    Fault(name="crash", what="the last rank is killed", signal="KILL", told="rank {rank}: killed by SIGKILL"),
    Fault(name="hang", what="the last rank stands still", signal="STOP", told="no progress"),
    Fault(name="node", what="the last node is gone", signal="KILL", whole_node=True, told="node {node}"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What came of a fault. `seconds` from it to the end on all nodes; None where the job had ended before."""

    fault: Fault
    run: str
    code: int
    cause: str
    seconds: float | None
    expected: bool


def make_inventory(folder: Path, *, name: str, count: int, slots: int, engine: Engine) -> Inventory:
    """This machine as so many nodes, each with a folder of its own below `folder`."""
    made = {
        "name": name,
        "accelerator": "cpu",
        "engine": engine,
        "defaults": {"transport": "local", "slots": slots, "paths": {"state": str(folder / "nodes")}},
        "nodes": [
            {"name": f"node-{number}", "host": "localhost", "nvme": [str(folder / "nvme" / str(number))]}
            for number in range(1, count + 1)
        ],
    }
    for number in range(1, count + 1):
        (folder / "nvme" / str(number)).mkdir(parents=True, exist_ok=True)
    return read_inventory(document.read(json.dumps(made), "the rehearsal"))


@contextmanager
def stage(kept: Path, voice: Voice, *, count: int, slots: int, engine: Engine) -> Iterator[Session]:
    """A session with this machine as so many nodes. Whatever happens nothing is left of them but logs, in `kept`."""
    name = f"rehearsal-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory(prefix=f"launcher-{name}-") as folder:
        inventory = make_inventory(Path(folder), name=name, count=count, slots=slots, engine=engine)
        with session(inventory, Memory(kept).cluster(name), voice) as now:
            try:
                yield now
            finally:
                nodes.down(now)


def rehearse(
    now: Session,
    job: Job,
    snapshot: Snapshot,
    fault: Fault,
    *,
    after: float,
    values: Mapping[str, str],
    show: Callable[[str, bytes], None],
) -> Seen:
    """One run with one fault, `after` so many seconds from the job's first line; `values` are its secrets."""
    if fault.name == "hang":
        job = dataclasses.replace(job, hang_timeout=HANG_TIMEOUT)
    run_id = execute.make_run_id()
    launch = execute.prepare(now, job, snapshot, run_id=run_id, port=None, any_port=True, ignored=IGNORED)
    begun, ended = threading.Event(), threading.Event()
    injected: list[float] = []

    def heard(node: str, line: bytes) -> None:
        if line.split(b" ", 2)[1:2] != [b"-"]:  # of a rank, not of what watches over it
            begun.set()
        show(node, line)

    def inject() -> None:
        begun.wait()
        if not ended.wait(after):
            injected.append(time.monotonic())
            _inject(now, launch.plan, fault)

    # Nobody waits for it: where the job says no line, it has nothing to do.
    threading.Thread(target=inject, daemon=True).start()
    end = execute.carry_out(now, launch, now.memory.run(run_id), secrets=values, show=heard)
    ended.set()
    if end.code == INTERRUPTED and not injected:
        raise Interrupted("left; nothing of the rehearsal goes on")
    seconds = time.monotonic() - injected[0] if injected else None
    expected = seconds is not None and is_expected(launch.plan, fault, end)
    return Seen(fault=fault, run=run_id, code=end.code, cause=end.cause, seconds=seconds, expected=expected)


def is_expected(plan: Plan, fault: Fault, end: RunEnded) -> bool:
    """Whether the run ended as one must to which this was done."""
    told = fault.told.format(rank=plan.world_size - 1, node=plan.nodes[-1].name)
    return end.code == fault.code and told in end.cause


def _inject(now: Session, plan: Plan, fault: Fault) -> None:
    def act(machine: Machine) -> None:
        for one in machine.engine.find(ours(now, machine, **{LABEL_RUN: plan.run})):
            if not fault.signal:
                machine.engine.stop(one.id, grace=render.engine_grace(one.labels))
                continue
            rank = "" if fault.whole_node else str(plan.world_size - 1)
            machine.engine.execute(one.id, script(_SIGNAL, fault.signal, plan.run, machine.name, rank))

    each(now.machines if not fault.signal else now.machines[-1:], act)


def choose(names: Sequence[str]) -> tuple[Fault, ...]:
    """The faults of these names, in the order of the list; all when there are none."""
    return tuple(fault for fault in FAULTS if fault.name in names or not names)

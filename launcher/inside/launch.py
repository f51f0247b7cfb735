"""`accelerate launch`, with its failures as data: which rank, what code or signal, when. Not a launcher of its own.

Usage: python3 launch.py [arguments of `accelerate launch`]

When ranks fail, torchrun knows everything about it and prints sixty lines. This writes the same as JSON to the
file named by LAUNCHER_FAILURES, a list sorted by time of
{"rank", "local_rank", "exit_code", "signal", "time", "type", "message"}, and prints one line.
A rank that died of a signal has exit_code 128 + its number. The first bad death is also written to "fell.json" in the
folder LAUNCHER_RANKS as soon as it is seen: torchrun first ends the others, which may take as long as they like.
Exits with the first failure's code if that is 1 to 125, else with 1; with 128 + N when signal N stopped the launch
itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Mistakes of configuration and of the network: their text is enough, a traceback through torch would hide it.
PLAIN = ("ValueError", "ConnectionError", "DistNetworkError", "DistStoreError", "TimeoutError", "FileNotFoundError")
LARGEST_OWN = 125  # codes above belong to shells and signals
PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Launch, and answer with the exit code."""
    die_with_parent()
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    deaths = Deaths()
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except ChildFailedError as error:
        failures = read_failures(error.failures, deaths=deaths.times)
        write(failures)
        print(summary(failures[0]), file=sys.stderr)
        return code_of(failures[0]["exit_code"])
    except SignalException as error:
        return 128 + int(error.sigval)
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends the launch and must be recorded
        name = type(error).__name__
        write([failure(time=time.time(), kind=name, message=str(error))])
        if name not in PLAIN:
            traceback.print_exc()
        print(f"launch: {name}: {error}", file=sys.stderr)
        return 1
    return 0


def die_with_parent() -> None:
    """The launch must not outlive an agent that was killed. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Deaths:
    """When each child died. torchrun looks ten times a second and keeps whole seconds: too coarse to find a cause."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}
        self._told = not os.environ.get("LAUNCHER_RANKS")
        signal.signal(signal.SIGCHLD, self._note)

    def _note(self, _signal: int, _frame: object) -> None:
        now = time.time()
        for pid in children():
            if pid not in self.times and (end := end_of(pid)):
                self.times[pid] = now
                if not self._told and end != (os.CLD_EXITED, 0):
                    self._told = tell_fall(pid, *end, now=now)


def children() -> list[int]:
    """The process ids of our children, dead and unreaped ones too; none where /proc does not tell."""
    try:
        tasks = Path("/proc/self/task").iterdir()
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:
        return []


def end_of(pid: int) -> tuple[int, int] | None:
    """How a child ended (CLD_…), with which code or signal. Looks without reaping: the status belongs to torchrun."""
    try:
        seen = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if seen is None else (seen.si_code, seen.si_status)


def tell_fall(pid: int, how: int, status: int, *, now: float) -> bool:
    """Write down the death of a rank for the agent; False for another child, which is torchrun's own business."""
    folder = Path(os.environ["LAUNCHER_RANKS"])
    rank = next((int(one.stem) for one in folder.glob("*.pid") if one.read_text() == str(pid)), None)
    if rank is None:
        return False
    name = None if how == os.CLD_EXITED else name_of(status)
    code = status if name is None else 128 + status
    # By a name of its own: a second child may die while we write, and a handler may interrupt a handler.
    fresh = folder / f"{rank}.tmp"
    fresh.write_text(json.dumps(failure(rank=rank, time=now, exit_code=code, signal_name=name)), encoding="utf-8")
    fresh.rename(folder / "fell.json")
    return True


def name_of(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_failures(failures: dict[int, Any], *, deaths: dict[int, float]) -> list[dict[str, Any]]:
    """From torchrun's {rank: ProcessFailure} to our records, the first cause first."""
    records = [
        failure(
            rank=rank,
            local_rank=seen.local_rank,
            exit_code=seen.exitcode if seen.exitcode >= 0 else 128 - seen.exitcode,
            signal_name=seen.signal_name() if seen.exitcode < 0 else None,
            time=deaths.get(seen.pid, float(seen.timestamp)),
            message=message_of(seen),
        )
        for rank, seen in failures.items()
    ]
    return sorted(records, key=lambda record: record["time"])


def failure(
    *,
    time: float,
    kind: str | None = None,
    message: str = "",
    rank: int | None = None,
    local_rank: int | None = None,
    exit_code: int = 1,
    signal_name: str | None = None,
) -> dict[str, Any]:
    """One record."""
    return {
        "rank": rank,
        "local_rank": local_rank,
        "exit_code": exit_code,
        "signal": signal_name,
        "time": time,
        "type": kind,
        "message": message,
    }


def message_of(seen: Any) -> str:
    """What the rank itself reported in torchrun's error file, if it did."""
    if not Path(seen.error_file).is_file():
        return ""
    message = seen.message
    return str(message.get("message", "")) if isinstance(message, dict) else str(message)


def code_of(exit_code: int) -> int:
    """A worker's own code where a shell can tell it from a signal's, else 1."""
    return exit_code if 1 <= exit_code <= LARGEST_OWN else 1


def summary(record: dict[str, Any]) -> str:
    """The one line."""
    how = record["signal"] or f"exit {record['exit_code']}"
    return f"launch: rank {record['rank']} (local rank {record['local_rank']}) failed first: {how}"


def write(failures: list[dict[str, Any]]) -> None:
    """To the file the agent named; without one (launched by hand) nowhere."""
    path = os.environ.get("LAUNCHER_FAILURES")
    if path:
        Path(path).write_text(json.dumps(failures), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What every rank of this node was doing when nothing went on any more, written down before they are ended.

Each rank has said which process it is (`<rank>.pid`), and on a signal its Python threads' stacks go to `<rank>.stacks`
(bootstrap.py). NCCL's flight recorder writes its own dump when it is asked through a named pipe. Where py-spy is
installed and allowed, its view of the same stacks is kept too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHOW = getattr(signal, "SIGRTMIN", 34) + 9  # of no use to scripts, where SIGUSR1 often has one; bootstrap.py knows it
PATIENCE = 2.0  # seconds for all ranks to write down their stacks
SPY_PATIENCE = 3.0
STATES = {"T": "is stopped (SIGSTOP)", "t": "is held by a debugger", "D": "waits for a disk or a device"}


@dataclass(frozen=True)
class Rank:
    """A rank's process: its id, the kernel's letter for its state, and where in the kernel it waits."""

    rank: int
    pid: int
    state: str
    waits_in: str


def find_ranks(folder: Path, *, living: set[int]) -> list[Rank]:
    """The living ranks of this node, as they are now."""
    found = []
    for path in sorted(folder.glob("*.pid")):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            if pid in living:
                found.append(Rank(int(path.stem), pid, _state(pid), _word(Path(f"/proc/{pid}/wchan"))))
    return found


def collect(ranks: list[Rank], *, folder: Path, out: Path, wait: Callable[[float], None]) -> None:
    """Ask them all, and put what they wrote into out/stacks; `wait(seconds)` lets time pass."""
    (out / "stacks").mkdir(exist_ok=True)
    for one in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(one.pid, SHOW)
            if one.state == "T":
                os.kill(one.pid, signal.SIGCONT)  # to show where it stood; it is about to be ended anyway
    ask_flight_recorders(folder)
    spies = _spy(ranks, out=out)
    deadline = time.monotonic() + PATIENCE
    sizes: list[int] = []
    while time.monotonic() < deadline:
        wait(0.1)
        before, sizes = sizes, [_size(folder / f"{one.rank}.stacks") for one in ranks]
        if sizes == before and all(sizes):
            break
    for one in ranks:
        _keep(one, folder=folder, out=out)
    deadline += SPY_PATIENCE - PATIENCE
    for spy in spies:
        while spy.poll() is None and time.monotonic() < deadline:
            wait(0.1)
        spy.kill()
        spy.wait()
    keep_flight_records(folder, out=out)


def ask_flight_recorders(folder: Path) -> None:
    """NCCL's monitor threads read these pipes, one a rank."""
    for pipe in (folder / "flight").glob("*.pipe"):
        with contextlib.suppress(OSError):
            fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.write(fd, b"1")
            os.close(fd)


def keep_flight_records(folder: Path, *, out: Path) -> None:
    """What NCCL has dumped, now or at a timeout of its own, goes to out/flight."""
    for path in (folder / "flight").glob("rank_*"):
        if path.is_file() and path.stat().st_size:
            (out / "flight").mkdir(exist_ok=True)
            shutil.copyfile(path, out / "flight" / path.name)


def _spy(ranks: list[Rank], *, out: Path) -> list[subprocess.Popen[bytes]]:
    program = shutil.which("py-spy")
    if program is None:
        return []
    begun = []
    for one in ranks:
        with (out / "stacks" / f"rank-{one.rank:05d}.py-spy.txt").open("wb") as file:
            argv = [program, "dump", "--pid", str(one.pid)]
            begun.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT))
    return begun


def _keep(one: Rank, *, folder: Path, out: Path) -> None:
    head = f"rank {one.rank}, process {one.pid}, state {one.state}, waits in {one.waits_in or '-'}\n\n"
    try:
        said = (folder / f"{one.rank}.stacks").read_text(errors="replace")
    except OSError:
        said = ""
    text = head + (said or "no stacks: it did not answer\n")
    (out / "stacks" / f"rank-{one.rank:05d}.txt").write_text(text, encoding="utf-8")


def _state(pid: int) -> str:
    return _word(Path(f"/proc/{pid}/stat"), after=")")


def _word(path: Path, *, after: str = "") -> str:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    words = (text.rpartition(after)[2] if after else text).split()
    return words[0] if words else ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

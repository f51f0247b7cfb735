"""The launcher, killed at a chosen point of its way: what a crash leaves behind is seen, not guessed.

    python -m tests.testbed.dying COUNT.txt '' run --detach job.py      writes down the points, one per line
    python -m tests.testbed.dying COUNT.txt 'after ProcessEngine.create 1' run --detach job.py

A point lies before and after everything that crosses the rim: what is asked of a machine or its engine, and what is
written down of a run. A call that is made again and again (watching) has points the first two times.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.dockerd import DockerEngine
from cluster.local import LocalTransport
from cluster.processes import ProcessEngine
from cluster.ssh.transport import SshTransport
from launcher.cli import main
from launcher.record import ClusterMemory, RunRecord

RIM = {
    LocalTransport: ("run", "send", "stream", "pipe"),
    SshTransport: ("run", "send", "stream", "pipe"),
    ProcessEngine: ("create", "start", "find", "wait", "stop", "remove"),
    DockerEngine: ("create", "start", "find", "wait", "stop", "remove", "execute", "tag", "load"),
    RunRecord: ("emit", "save_plan"),
    ClusterMemory: ("save_facts",),
}
TIMES = 2


class Dying:
    """Counts the points, and ends the process at one of them."""

    def __init__(self, list_: Path, at: str) -> None:
        self.list, self.at = list_, at
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()

    def arm(self) -> None:
        for kind, names in RIM.items():
            for name in names:
                setattr(kind, name, self.wrap(f"{kind.__name__}.{name}", getattr(kind, name)))

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any, **options: Any) -> Any:
            with self.lock:
                self.seen[name] += 1
                number = self.seen[name]
            self.come_to(f"before {name}", number)
            try:
                return call(*args, **options)
            finally:
                self.come_to(f"after {name}", number)

        return wrapped

    def come_to(self, point: str, number: int) -> None:
        if number > TIMES:
            return
        if self.at == f"{point} {number}":
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.at:
            with self.list.open("a") as file:
                file.write(f"{point} {number}\n")


if __name__ == "__main__":
    Dying(Path(sys.argv[1]), sys.argv[2]).arm()
    sys.argv[1:3] = []
    main()

"""Who runs this command: for whoever finds a cluster taken, and to tell whether that command is still there."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path

from cluster.container import LABEL_STARTER, Container, ContainerState

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PIDS = Path("/proc/self/ns/pid")


def name() -> str:
    """Who, and on which machine: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this uid, as in a container
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def starter() -> str:
    """This process among all of the world: boot of the machine, namespace of process ids, id. Empty off Linux."""
    place = _place()
    return f"{place}/{os.getpid()}" if place else ""


def is_gone(starter: str) -> bool:
    """Whether that process is proven to be no more: it was one of this machine, and the machine has none of its id.

    A number that was given away again, another machine, another boot: not proven.
    """
    place, _, pid = starter.rpartition("/")
    return place == _place() and has_ended(pid)


def has_ended(pid: str) -> bool:
    """Whether this machine has no process of that number."""
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def never_starts(container: Container) -> bool:
    """Whether it was made and not started, by a launcher that is gone."""
    return container.state is ContainerState.CREATED and is_gone(container.labels.get(LABEL_STARTER, ""))


def _place() -> str:
    try:
        return f"{_BOOT.read_text().strip()}/{_PIDS.stat().st_ino}"
    except OSError:
        return ""

"""Evidence: what a node kept of a run that ended badly (stacks of its ranks, NCCL's flight records), brought here."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.command import Command, script
from cluster.fleet import Machine
from cluster.private import make_private, open_private

_FILES = 256  # the most that are brought from one node
_BYTES = 8 << 20  # the most that one may weigh
_LISTED = 'cd "$1" && find stacks flight -type f -size "-$2c" 2>/dev/null | sort | head -n "$3"'
_NAME = re.compile(r"(?:stacks|flight)/[A-Za-z0-9][A-Za-z0-9._-]{0,80}")


def fetch_evidence(machine: Machine, *, out: str, folder: Path) -> int:
    """Copy it to folder/<node>/; gives back how many files there were. What a job may have named itself stays there."""
    listed = machine.transport.run(script(_LISTED, out, str(_BYTES), str(_FILES)), timeout=30)
    brought = 0
    for name in filter(_NAME.fullmatch, listed.text.splitlines()):
        content = machine.transport.run(Command(argv=("head", "-c", str(_BYTES), f"{out}/{name}")), timeout=60)
        if content.ok:
            path = folder / machine.name / name
            make_private(path.parent)
            with open_private(path, "wb") as file:
                file.write(content.stdout)
            brought += 1
    return brought

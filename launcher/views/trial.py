"""How `launcher test` went on every node: its verdicts, as data and as text. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.plan import Plan
from launcher.state import RunState, node_end


def verdicts(plan: Plan, state: RunState, log: Iterable[tuple[str, bytes]]) -> list[dict[str, Any]]:
    """One per node, in the order of the ranks; in the `log` (node, line) inside/trial.py tells of its checks.

    A node is well only if it said so at its end: an exit code of 0 alone could come from anywhere.
    """
    passed, finished = _heard(log)
    made, first = [], 0
    for node in plan.nodes:
        end = state.ends.get(node.name)
        wrong = "nobody knows how it ended" if end is None else node_end(end)
        if not wrong and node.name not in finished:
            wrong = "it ended without having said that all checks were passed"
        made.append(
            {
                "node": node.name,
                "ranks": [first, first + node.slots - 1],
                "ok": not wrong,
                "checks": passed[node.name],
                "wrong": wrong or None,
            }
        )
        first += node.slots
    return made


def _heard(log: Iterable[tuple[str, bytes]]) -> tuple[Counter[str], set[str]]:
    """How many checks each node has passed, and which nodes have said that these were all."""
    passed: Counter[str] = Counter()
    finished: set[str] = set()
    for node, line in log:
        word = line.split(b" ", 3)[2:3]  # after the time and the rank
        passed[node] += word == [b"ok"]
        if word == [b"passed"]:
            finished.add(node)
    return passed, finished


def verdict_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per node."""
    return "\n".join(_line(row) for row in rows)


def _line(row: Mapping[str, Any]) -> str:
    first, last = row["ranks"]
    ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
    checks = f"{row['checks']} check{'s' * (row['checks'] != 1)} passed"
    if row["ok"]:
        return f"node {row['node']}: ok, {ranks}, {checks}"
    return f"node {row['node']}: failed, {ranks}, {checks}; {row['wrong']}"

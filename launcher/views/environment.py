"""The nodes' environments side by side: what differs first, what is the same once. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Mapping[str, Any]]  # {section: {name: value}}, as inside/environment.py prints it


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Every value of every node: `same` {section: {name: value}}, `differs` {section: {name: {node: value}}}.

    A node that does not have the name at all is there with None.
    """

    nodes: tuple[str, ...]
    same: Mapping[str, Mapping[str, Any]]
    differs: Mapping[str, Mapping[str, Mapping[str, Any]]]


def compare(reports: Mapping[str, Report]) -> Comparison:
    """What the nodes have in common, and in what they differ; in the order in which they tell it."""
    names = [(section, name) for report in reports.values() for section, values in report.items() for name in values]
    same: dict[str, dict[str, Any]] = {}
    differs: dict[str, dict[str, dict[str, Any]]] = {}
    for section, name in dict.fromkeys(names):
        by_node = {node: report.get(section, {}).get(name) for node, report in reports.items()}
        first = next(iter(by_node.values()))
        if all(value == first for value in by_node.values()):
            same.setdefault(section, {})[name] = first
        else:
            differs.setdefault(section, {})[name] = by_node
    return Comparison(nodes=tuple(reports), same=same, differs=differs)


def comparison_data(cluster: str, found: Comparison) -> dict[str, Any]:
    """For `--json`."""
    return {"cluster": cluster, "nodes": list(found.nodes), "differs": found.differs, "same": found.same}


def comparison_text(cluster: str, found: Comparison) -> str:
    """The differences, then the rest."""
    lines = [f"cluster {cluster}: {', '.join(found.nodes)}"]
    if found.differs:
        lines += ["", "differs"]
        for section, values in found.differs.items():
            for name, by_node in values.items():
                lines += [f"  {section}: {name}", *_by_value(by_node)]
    elif len(found.nodes) > 1:
        lines += ["", "the nodes differ in nothing"]
    for section, values in found.same.items():
        width = max(map(len, values))
        shared = "" if len(found.nodes) == 1 else ", the same on all"
        lines += ["", f"{section}{shared}", *(f"  {name:<{width}}  {value}" for name, value in values.items())]
    return "\n".join(lines)


def _by_value(by_node: Mapping[str, Any]) -> list[str]:
    """A line per value with the nodes that have it, those that many have first."""
    holders: dict[str, list[str]] = {}
    for node, value in by_node.items():
        said = "-" if value is None else "(empty)" if value == "" else str(value)
        holders.setdefault(said, []).append(node)
    ordered = sorted(holders.items(), key=lambda one: -len(one[1]))
    width = max(len(", ".join(nodes)) for _, nodes in ordered)
    return [f"    {', '.join(nodes):<{width}}  {value}" for value, nodes in ordered]

"""Plans, states and tables as text and as data for JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.command import describe
from cluster.container import LABEL_PLAN, LABEL_ROLE, LABEL_RUN, Container
from cluster.errors import InputError
from launcher import render, zero
from launcher.lints import Lint
from launcher.plan import NodePlan, Plan
from launcher.state import RunState

if TYPE_CHECKING:
    from launcher.rehearsal import Seen


def plan_text(plan: Plan, todo: Sequence[str] = ()) -> str:
    """What would be done, and every node's effective configuration."""
    head = [
        f"cluster {plan.cluster}: {len(plan.nodes)} nodes, {plan.world_size} processes, {plan.accelerator}, "
        f"engine {plan.engine}",
        f"image   {plan.image}",
        f"meeting {plan.master}:{plan.port}",
        "",
        "to do:",
        *(f"  {one}" for one in todo or ["nothing"]),
        *(f"note    {one}" for one in plan.job.notes),
    ]
    return "\n".join([*head, "", *(node_text(plan, node) for node in plan.nodes)])


def node_text(plan: Plan, node: NodePlan) -> str:
    """One node's part: what accelerate will really be given."""
    rows = [("address", f"{node.address} ({node.nic or 'interface unknown'})"), ("slots", str(node.slots))]
    container = render.run_container(plan, node) if plan.run else render.node_container(plan, node)
    rows += [("mount", f"{mount.source} -> {mount.target}") for mount in container.mounts]
    lines = [f"node {node.name} (rank {node.rank})", *(f"  {key:<8} {value}" for key, value in rows)]
    lines += ["  accelerate.yaml", *_indented(render.to_yaml(render.accelerate_config(plan, node)))]
    way = zero.way_of(plan.job)
    if way != zero.PLAIN:
        title = "deepspeed.json" if way == zero.FILE else "deepspeed, as Accelerate's plugin makes it of that"
        lines += [f"  {title}", *_indented(zero.file_for_node(plan.job, render.first_nvme(node)))]
    if plan.job.script:
        lines += [
            "  launch",
            f"    {describe(('accelerate', 'launch', *render.launch_arguments(plan, node)), limit=2000)}",
        ]
    lines += ["  environment", *(f"    {key}={value}" for key, value in sorted(render.environment(plan, node).items()))]
    return "\n".join([*lines, ""])


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]


def effective(plan: Plan) -> dict[str, Any]:
    """Every node's effective configuration, for `--json`."""
    return {
        "cluster": plan.cluster,
        "image": plan.image,
        "world_size": plan.world_size,
        "master": f"{plan.master}:{plan.port}",
        "way": zero.way_of(plan.job),
        "notes": list(plan.job.notes),
        "nodes": {
            node.name: {
                "rank": node.rank,
                "slots": node.slots,
                "address": node.address,
                "accelerate": render.accelerate_config(plan, node),
                "deepspeed": zero.deepspeed_config(plan.job, nvme=render.first_nvme(node))
                if zero.uses_deepspeed(plan.job)
                else None,
                "launch": list(render.launch_arguments(plan, node)),
                "environment": render.environment(plan, node),
            }
            for node in plan.nodes
        },
    }


def promise(plan: Plan) -> dict[str, Any]:
    """What a saved plan of `up` holds the machines to: the same, and what every idle container is made of."""
    containers = {node.name: render.node_container(plan, node).labels[LABEL_PLAN] for node in plan.nodes}
    return {**effective(plan), "containers": containers}


def check_promise(saved: str, plan: Plan, *, name: str) -> None:
    """`InputError` where a saved plan is none, or promised something else than this plan, with all that differs."""
    try:
        said = json.loads(saved)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or "containers" not in said:
        raise InputError("this is no saved plan", where=name, next_step="save one by launcher up --dry-run --json")
    promised = dict(_leaves({key: value for key, value in said.items() if key not in ("todo", "done")}))
    found = dict(_leaves(json.loads(json.dumps(promise(plan)))))
    differing = [key for key in {**promised, **found} if promised.get(key) != found.get(key)]
    if differing:
        lines = [f"{key}: was {promised.get(key, 'not there')}, is {found.get(key, 'not there')}" for key in differing]
        raise InputError(
            "this is not what would be done now; nothing was changed",
            where=name,
            detail=tuple(lines),
            next_step="look at launcher up --dry-run, and save it again with --json",
        )


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every value at its place, such as nodes.gpu-01.slots; a list or block that holds nothing is one, too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from _leaves(below, f"{path}.{key}" if path else str(key))
    if not items:
        yield path, json.dumps(value, ensure_ascii=False)


def lints_text(lints: Sequence[Lint]) -> str:
    """Every lint with its place, its consequence and its cure, and how many there are."""
    if not lints:
        return "no findings"
    told = [
        f"{lint.where}: {lint.level}: {lint.what} [{lint.id}]\n  if left: {lint.consequence}\n  next: {lint.cure}"
        for lint in lints
    ]
    counts = [(level, sum(lint.level == level for lint in lints)) for level in ("error", "warning")]
    summed = ", ".join(f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts if count)
    return "\n".join([*told, summed])


def lints_data(lints: Sequence[Lint]) -> list[dict[str, str]]:
    """The same for `--json`."""
    return [asdict(lint) for lint in lints]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def status_rows(
    found: Mapping[str, tuple[Container, ...]],
    hosts: Mapping[str, str],
    *,
    lost: Mapping[str, str],
    unstarted: Collection[str] = (),
    spares: Collection[str] = (),
) -> list[dict[str, Any]]:
    """One row a node: what stands there of ours; `lost` are those that did not answer, and why.

    `unstarted` are the ids of containers that nobody will start.
    """
    rows: list[dict[str, Any]] = []
    for node in hosts:
        containers = found.get(node, ())
        idle = next((one for one in containers if one.labels.get(LABEL_ROLE) == render.ROLE_NODE), None)
        run = next((one for one in containers if one.labels.get(LABEL_ROLE) == render.ROLE_RUN), None)
        rows.append(
            {
                "node": node,
                "host": hosts[node],
                "up": bool(idle and idle.is_live),
                "run": run.labels.get(LABEL_RUN) if run else None,
                "state": None if run is None else "never started" if run.id in unstarted else run.state.value,
                "code": run.code if run else None,
                "lost": lost.get(node),
                "spare": node in spares,
            }
        )
    return rows


def status_text(
    cluster: str, rows: Sequence[Mapping[str, Any]], last: RunState | None, others: Sequence[RunState] = ()
) -> str:
    """The rows as a table, and how the last run that is known here went, and `others` that stand on the nodes."""
    cells = [("NODE", "HOST", "UP", "RUN", "STATE")]
    for row in rows:
        code = f" ({row['code']})" if row["code"] is not None else ""
        run = row["run"] or ("spare" if row["spare"] else "-")
        state = f"{row['state'] or '-'}{code}"
        up = "?" if row["lost"] else "yes" if row["up"] else "no"
        cells.append((row["node"], row["host"], up, run, row["lost"] or state))
    lines = [f"cluster {cluster}", table(cells), *(f"run {one.run}: {state_line(one)}" for one in others)]
    if last and last.run:
        lines.append(f"last run {last.run}: {state_line(last)}")
        seen = all(row["run"] is None and not row["lost"] for row in rows)
        if seen and not last.is_over:
            lines[-1] += "; nothing of it is left on the nodes"
    return "\n".join(lines)


def state_line(state: RunState, *, now: float | None = None) -> str:
    """One run in one line."""
    if state.is_over:
        seconds = (state.ended or state.began) - state.began
        return f"{state.phase} after {seconds:.0f} s{': ' + state.cause if state.cause else ''}"
    return f"{state.phase}, began {age(state.began, now=now)} ago, {state.world_size} processes"


def age(began: float, *, now: float | None = None) -> str:
    """How long ago, roughly."""
    seconds = max(0, (time.time() if now is None else now) - began)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def state_data(state: RunState | None) -> dict[str, Any] | None:
    """One run as data."""
    if state is None or not state.run:
        return None
    return {
        "run": state.run,
        "cluster": state.cluster,
        "phase": state.phase,
        "code": state.code,
        "cause": state.cause or None,
        "world_size": state.world_size,
        "command": list(state.command),
        "began": state.began,
        "ended": state.ended,
    }


def run_row(cluster: str, state: RunState) -> dict[str, Any]:
    """One run for `ls`."""
    return state_data(state) or {"cluster": cluster, "run": None, "phase": "unknown"}


def run_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The runs that are known here, the newest last."""
    cells = [("RUN", "CLUSTER", "STATE", "COMMAND")]
    cells += [
        (row["run"], row["cluster"], row["phase"], describe(row["command"], limit=60)) for row in rows if row.get("run")
    ]
    return table(cells)


def rehearsed_text(seen: Sequence[Seen]) -> str:
    """What came of every fault, as a table."""
    cells = [("FAULT", "WHAT IS DONE", "ENDED AFTER", "EXIT", "WHAT IS TOLD")]
    for one in seen:
        after = "before it" if one.seconds is None else f"{one.seconds:.1f} s"
        mark = "" if one.expected else "  (not as it should be)"
        cells.append((one.fault.name, one.fault.what, after, str(one.code), f"{one.cause or 'done'}{mark}"))
    return table(cells)


def rehearsed_data(one: Seen) -> dict[str, Any]:
    """The same of one fault for `--json`."""
    said = {name: getattr(one, name) for name in ("run", "code", "cause", "seconds", "expected")}
    return {"fault": one.fault.name, "what": one.fault.what, **said}

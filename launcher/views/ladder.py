"""The ladder as text and as data for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from launcher.memory import Choice, Cluster, Verdict, show_bytes
from launcher.model import Model
from launcher.views.text import table

ON_GPUS = {"gpu": "per GPU", "cpu": "per process on the host", "nvme": "per process on NVMe"}
ON_CPUS = {"gpu": "per process", "cpu": "per process, offloaded or reserved", "nvme": "per process on NVMe"}


def ladder_text(model: Model, cluster: Cluster, choice: Choice) -> str:
    """What every rung takes, which is chosen, and why not the one below."""
    chosen = choice.chosen
    lines = [_model_line(model), *_cluster_lines(cluster), "", table(_rows(choice, cluster)), ""]
    if chosen is None:
        lines += ["no rung fits", f"  {choice.why}"]
    else:
        lines += [f"take {chosen.weight.rung.name}", *([f"  {choice.why}"] if choice.why else [])]
    if choice.asked:
        lines.append(f"  {choice.asked}")
    lines += ["", *_part_lines(chosen or choice.verdicts[-1], cluster)]
    return "\n".join(lines)


def _model_line(model: Model) -> str:
    how = "simulated" if model.simulated else "estimated"
    return (
        f"model    {model.parameters:,} parameters, {model.largest_module:,} in the largest module, "
        f"activations {show_bytes(model.activations)} ({how})"
    )


def _cluster_lines(cluster: Cluster) -> list[str]:
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for host in cluster.hosts:
        kinds.setdefault((host.gpus, host.gpu_memory, host.memory, host.nvme), []).append(host.name)
    lines = []
    for (gpus, gpu_memory, memory, nvme), names in kinds.items():
        what = f"{gpus} processes" if cluster.cpu else f"{gpus} GPUs of {show_bytes(gpu_memory)}"
        disk = f", {show_bytes(nvme)} of NVMe" if nvme else ""
        lines.append(f"cluster  {len(names)} x {what}, {show_bytes(memory)} of memory{disk}")
    return lines


def _rows(choice: Choice, cluster: Cluster) -> list[tuple[str, ...]]:
    each = "PER PROCESS" if cluster.cpu else "PER GPU"
    rows: list[tuple[str, ...]] = [("", "RUNG", each, "PER HOST", "PER NVME", "")]
    for verdict in choice.verdicts:
        missing = {short.resource: short for short in sorted(verdict.short, key=lambda one: one.missing)}
        fit = ", ".join(f"{show_bytes(one.missing)} of {name} short" for name, one in missing.items()) or "fits"
        sizes = (show_bytes(size) if size else "-" for size in (verdict.gpu, verdict.host, verdict.nvme))
        rows.append((">" if verdict is choice.chosen else "", verdict.weight.rung.name, *sizes, fit))
    return rows


def _part_lines(verdict: Verdict, cluster: Cluster) -> list[str]:
    lines = []
    for place, where in (ON_CPUS if cluster.cpu else ON_GPUS).items():
        parts = [part for part in verdict.weight.parts if part.place == place]
        if parts:
            lines.append(f"{verdict.weight.rung.name}, {where}")
            widest = max(len(part.name) for part in parts)
            parts.sort(key=lambda part: -part.bytes)
            lines += [f"  {part.name.ljust(widest)}  {show_bytes(part.bytes)}" for part in parts]
    return lines


def ladder_data(model: Model, cluster: Cluster, choice: Choice) -> dict[str, Any]:
    """The same, for `--json`; all sizes in bytes."""
    return {
        "model": {
            "parameters": model.parameters,
            "largest_module": model.largest_module,
            "activations": model.activations,
            "simulated": model.simulated,
        },
        "hosts": [dataclasses.asdict(host) for host in cluster.hosts],
        "chosen": choice.chosen.weight.rung.name if choice.chosen else None,
        "why": choice.why or None,
        "asked": choice.asked or None,
        "rungs": [_verdict_data(verdict) for verdict in choice.verdicts],
    }


def _verdict_data(verdict: Verdict) -> dict[str, Any]:
    return {
        "rung": verdict.weight.rung.name,
        **dataclasses.asdict(verdict.weight.rung),
        "gpu": verdict.gpu,
        "host": verdict.host,
        "nvme": verdict.nvme,
        "fits": verdict.fits,
        "short": [dataclasses.asdict(short) | {"missing": short.missing} for short in verdict.short],
        "parts": [dataclasses.asdict(part) for part in verdict.weight.parts],
    }

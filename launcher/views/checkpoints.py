"""Checkpoints as tables and as data for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher import shards
from launcher.events import CheckpointVerified
from launcher.views.text import age, table

if TYPE_CHECKING:
    from launcher.checkpoints import Kept, Verified
    from launcher.gathering import Placed


def rows(found: Sequence[Kept], verified: Mapping[str, CheckpointVerified]) -> list[dict[str, Any]]:
    """One row a checkpoint, the oldest first. `state` is what names, sizes and manifests tell; nothing was read."""
    return [_row(one, verified.get(one.unit)) for one in found]


def _row(one: Kept, verified: CheckpointVerified | None) -> dict[str, Any]:
    current = verified is not None and verified.time >= one.modified
    return {
        "unit": one.unit,
        "run": shards.run_of(one.unit),
        "name": one.unit.rpartition("/")[2],
        "tag": one.tag,
        "step": one.step if one.step >= 0 else None,
        "nodes": [part.place for part in one.parts],
        "copies": {copy.place: copy.unit for copy in one.copies},
        "bytes": one.bytes,
        "world_size": one.world_size,
        "style": one.style,
        "universal": one.is_universal,
        "state": state(one),
        "flaws": [flaw_data(flaw) for flaw in one.flaws],
        "modified": one.modified,
        "verified": verified.time if current and verified is not None and not verified.flaws else None,
    }


def state(one: Kept) -> str:
    """One word: whole, unsealed (nobody wrote down what it was), or the kind of its first flaw."""
    return one.fatal[0].kind if one.fatal else "whole"


def list_text(rows_: Sequence[Mapping[str, Any]], *, now: float | None = None) -> str:
    """The rows as a table."""
    cells = [("CHECKPOINT", "STEP", "SIZE", "PROCESSES", "NODES", "STATE", "VERIFIED", "COPIES", "AGE")]
    cells += [
        (
            row["unit"],
            "-" if row["step"] is None else str(row["step"]),
            size(row["bytes"]),
            str(row["world_size"]),
            ",".join(row["nodes"]) or "-",
            "universal" if row["universal"] and row["state"] == "whole" else row["state"],
            "-" if row["verified"] is None else f"{age(row['verified'], now=now)} ago",
            ",".join(row["copies"]) or "-",
            age(row["modified"], now=now),
        )
        for row in rows_
    ]
    return table(cells)


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:  # noqa: PLR2004 - decimal units
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def flaw_data(flaw: shards.Flaw) -> dict[str, str]:
    """A flaw as data."""
    return {"kind": flaw.kind, "node": flaw.place, "path": flaw.path, "what": flaw.what}


def verified_data(found: Sequence[Verified]) -> list[dict[str, Any]]:
    """Verdicts as data."""
    return [
        {
            "unit": one.kept.unit,
            "tag": one.kept.tag,
            "step": one.kept.step if one.kept.step >= 0 else None,
            "nodes": [part.place for part in one.kept.parts],
            "bytes": one.kept.bytes,
            "world_size": one.kept.world_size,
            "whole": one.ok,
            "flaws": [flaw_data(flaw) for flaw in one.flaws],
            "copies": {place: [flaw_data(flaw) for flaw in flaws] for place, flaws in one.copies.items()},
            "sealed": list(one.sealed),
        }
        for one in found
    ]


def verified_text(found: Sequence[Verified]) -> str:
    """Verdicts for people: a line for what is whole, a line for every flaw."""
    lines = []
    for one in found:
        parts = ", ".join(part.place for part in one.kept.parts) or "no node any more"
        if one.sealed:
            lines.append(f"{one.kept.unit}: written down now, as it is: {', '.join(one.sealed)}")
        verdict = "not whole" if one.flaws else "whole, every byte as it was written"
        if one.kept.parts:
            lines.append(f"{one.kept.unit}: {verdict} ({size(one.kept.bytes)} on {parts})")
        lines += [f"  {flaw}" for flaw in one.flaws]
        for place, flaws in one.copies.items():
            lines.append(f"{one.kept.unit}: the copy on {place} is {'not whole' if flaws else 'whole'}")
            lines += [f"  {flaw}" for flaw in flaws]
    return "\n".join(lines)


def placed_data(one: Placed) -> dict[str, Any]:
    """What was put somewhere, as data."""
    return {
        "unit": one.unit,
        "place": one.place,
        "folder": one.folder,
        "bytes": one.bytes,
        "sent": one.sent,
        "seconds": round(one.seconds, 3),
        "notes": list(one.notes),
    }


def placed_text(one: Placed) -> str:
    """What was put somewhere, in one line."""
    rate = f", {size(int(one.sent / one.seconds))}/s" if one.sent and one.seconds > 0 else ""
    sent = f"{size(one.sent)} sent in {one.seconds:.1f} s{rate}" if one.sent else "nothing had to be sent"
    return f"{one.unit}: {size(one.bytes)} in {one.place}: {one.folder} ({sent})"

"""Secrets and variables of a job: names in files and flags, values only in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.document import load_text
from cluster.errors import InputError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = re.compile(r"(LAUNCHER|ACCELERATE|TORCHELASTIC|PET)_.*|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_(ADDR|PORT)")
_SECRET = re.compile(r".*(TOKEN|PASSWORD|SECRET|API_KEY|ACCESS_KEY)")


def read_secrets(names: Iterable[str], *, environment: Mapping[str, str], file: Path | None = None) -> dict[str, str]:
    """The values of these names, from a file of NAME=VALUE lines if there is one, else from the environment."""
    wanted = tuple(dict.fromkeys(names))
    given = _read_file(file) if file else environment
    for name in wanted:
        if not _NAME.fullmatch(name) or _OURS.fullmatch(name):
            raise InputError(f"{name!r} cannot be the name of a secret", next_step="letters, digits and _, not our own")
        if not given.get(name):
            raise InputError(
                f"the secret {name} has no value",
                where=str(file) if file else "environment",
                next_step=f"export {name}=… before the command, or give it in --secrets-file",
            )
    return {name: given[name] for name in wanted}


def _read_file(file: Path) -> dict[str, str]:
    lines = load_text(file).splitlines()
    if file.stat().st_mode & 0o077:
        raise InputError("others can read this file of secrets", where=str(file), next_step=f"chmod 600 {file}")
    values: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, found, value = line.partition("=")
        name = name.strip()
        if not found or not _NAME.fullmatch(name):
            raise InputError(
                "this is no NAME=VALUE line",
                where=f"{file}:{number}:1",
                next_step="one a line; letters, digits and _ before the =",
            )
        if name in values:
            raise InputError(
                f"{name} a second time (first in line {seen[name]})",
                where=f"{file}:{number}:1",
                next_step="keep one of them",
            )
        values[name], seen[name] = value, number
    return values


def read_variables(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """`--env NAME=VALUE` as pairs."""
    pairs = {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found or not _NAME.fullmatch(name):
            raise InputError(f"{text!r} is no NAME=VALUE", where="--env")
        if _OURS.fullmatch(name):
            raise InputError(f"{name} is set by the launcher", where="--env", next_step="leave it out")
        if _SECRET.fullmatch(name):
            raise InputError(
                f"{name} looks like a secret; everybody on the node could read it",
                where="--env",
                next_step=f"export {name}=… and add --secret {name}",
            )
        pairs[name] = value
    return tuple(sorted(pairs.items()))

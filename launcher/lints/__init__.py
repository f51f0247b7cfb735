"""Lints: what will go wrong with a DeepSpeed or Accelerate configuration, told before anything starts. Pure."""

from __future__ import annotations

import re

from cluster import document
from launcher import dsconfig
from launcher.lints.accelerate import PYYAML, lint_accelerate
from launcher.lints.catalogue import KINDS, Kind, Lint
from launcher.lints.deepspeed import lint_deepspeed

__all__ = [
    "KINDS",
    "PYYAML",
    "Kind",
    "Lint",
    "is_deepspeed",
    "lint_accelerate",
    "lint_deepspeed",
    "lint_text",
    "read_accelerate",
]

_OF_ACCELERATE = re.compile(r"""^[\s{]*["']?(?:compute_environment|distributed_type|num_processes)["']?\s*:""", re.M)
_OF_DEEPSPEED = re.compile(r"""^[\s{]*["']?(?:zero_optimization|train_\w*batch_size\w*)["']?\s*:""", re.M)


def is_deepspeed(text: str) -> bool:
    """Whether a text is meant as a DeepSpeed JSON; else it is an Accelerate YAML. What stands in it says which."""
    bare = text.lstrip("\ufeff \t\r\n")
    is_json = not bare or bare.startswith(("{", "[", "//", "/*")) or bool(_OF_DEEPSPEED.search(text))
    return is_json and not _OF_ACCELERATE.search(text)


def read_accelerate(text: str, *, name: str) -> document.Document:
    """An Accelerate YAML; `InputError` with its place for what is not strict YAML."""
    return document.read(text, name, words=PYYAML)


def lint_text(text: str, *, name: str, world_size: int | None = None) -> tuple[Lint, ...]:
    """The lints of a DeepSpeed JSON or an Accelerate YAML; `InputError` for one that cannot be read as what it is."""
    if is_deepspeed(text):
        return lint_deepspeed(dsconfig.read(text, name=name), world_size=world_size)
    return lint_accelerate(read_accelerate(text, name=name), world_size=world_size)

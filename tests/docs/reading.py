"""What the documents say, as values: files, links, code blocks, commands. Runs nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))

_FENCE = re.compile(
    r"^(?P<mark><!-- run -->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_ENDS = {"|", "||", "&&", ";", ">", "<"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block; `run`: it stands under the mark that a test carries it out."""

    path: Path
    language: str
    text: str
    run: bool


def blocks() -> Iterator[Block]:
    for path in DOCUMENTS:
        for found in _FENCE.finditer(path.read_text(encoding="utf-8")):
            yield Block(path=path, language=found["language"], text=found["text"], run=bool(found["mark"]))


def prose(path: Path) -> str:
    """A document without its blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def links() -> Iterator[tuple[Path, str]]:
    for path in DOCUMENTS:
        for target in _LINK.findall(prose(path)):
            if "://" not in target:
                yield path, target


def anchors(path: Path) -> set[str]:
    """The names under which a document's headings can be linked to, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(program: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every command of `program` that a document shows, in a shell block or inline; as words, without the program."""
    for path in DOCUMENTS:
        lines = [
            line
            for block in blocks()
            if block.path == path and block.language == "sh"
            for line in block.text.splitlines()
        ]
        for line in (*lines, *_INLINE.findall(prose(path))):
            words = shlex.split(line, comments=True)
            if words[:1] == [program] and len(words) > 1:
                end = next((index for index, word in enumerate(words) if word in _ENDS), len(words))
                yield path, tuple(words[1:end])

"""The table of lints in docs/deepspeed-lints.md is the catalogue of the code."""

from __future__ import annotations

import re

from launcher.lints import KINDS, Kind
from tests.docs import reading

PAGE = reading.ROOT / "docs" / "deepspeed-lints.md"
HEAD = "| lint | level | what | if left | cure |\n|---|---|---|---|---|\n"


def words(template: str) -> str:
    """A text of the catalogue with dots for what is filled in; one that is all filled in is told with the lint."""
    if re.fullmatch(r"\{\w+\}", template):
        return "told with it"
    plain = re.sub(r"(?<!\{)\{\w+\}(?!\})", "…", template)
    return plain.replace("{{", "{").replace("}}", "}").replace("|", "\\|")


def row(kind: Kind) -> str:
    return f"| `{kind.id}` | {kind.level} | {words(kind.about)} | {words(kind.consequence)} | {words(kind.cure)} |\n"


def test_the_table_is_the_catalogue() -> None:
    _, head, table = PAGE.read_text(encoding="utf-8").partition(HEAD)
    assert head
    assert table == "".join(map(row, KINDS.values()))

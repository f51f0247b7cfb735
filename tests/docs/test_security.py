"""docs/security.md: every threat of the list once, each with tests that exist or the reason why there are none."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs import reading

PAGE = reading.ROOT / "docs" / "security.md"
TESTS = reading.ROOT / "tests"
ENTRIES = dict(re.findall(r"^\*\*(S\d\d) (.*?)(?=^\*\*S|^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S))
NAMED = re.compile(r"`([\w/]+\.py)::([\w:]+)`")


def those_of(file: str) -> set[str]:
    """The tests of a file by the names that pytest gives them."""
    found = set()
    for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body:
        below = node.body if isinstance(node, ast.ClassDef) else [node]
        outer = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {f"{outer}{one.name}" for one in below if isinstance(one, ast.FunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def test_every_threat_of_the_list_stands_there_once() -> None:
    heads = re.findall(r"^\*\*(S\d\d) ", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(heads) == [f"S{number:02d}" for number in range(1, 29)]


@pytest.mark.parametrize("threat", ENTRIES)
def test_a_threat_has_a_test_that_exists_or_a_reason_why_not(threat: str) -> None:
    named = NAMED.findall(ENTRIES[threat])
    assert named or "Not here: " in ENTRIES[threat]
    assert [f"{file}::{name}" for file, name in named if name not in those_of(file)] == []


def test_every_test_that_is_named_is_read() -> None:
    """A name that is written otherwise would be looked for nowhere."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("::test_") == len(NAMED.findall(text)) > len(ENTRIES)

"""Bad inventories, each of which must end as one message: the right place, the right words, exit code 2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster import document
from cluster.errors import InputError
from cluster.inventory import load_inventory

CORPUS = Path(__file__).parents[1] / "corpus" / "inventory"
NEVER = ("Traceback", "pydantic", "Input should", "Value error", "hunter2", "yaml.", "\x1b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    title: str
    content: bytes
    at: str
    says: str


def read_cases(text: str) -> Iterator[Case]:
    template, *cases = f"\n{text}".split("\n== ")
    for case in cases:
        head, _, body = case.partition("\n")
        at, says, title = head.split(" | ")
        body = body.removesuffix("\n")
        content = template.lstrip("\n").replace("@@", body) if "@@" in template else body
        yield Case(title=title, content=content.encode(), at=at, says=says)


def load_cases() -> Iterator[object]:
    for path in sorted(CORPUS.glob("*.cases")):
        for case in read_cases(path.read_text()):
            yield pytest.param(case, id=f"{path.stem}: {case.title}")
    for one in json.loads((CORPUS / "bytes.json").read_text()):
        case = Case(title=one["title"], content=one["content"].encode("latin-1"), at=one["at"], says=one["says"])
        yield pytest.param(case, id=f"bytes: {case.title}")


CASES = list(load_cases())


@pytest.mark.parametrize("loader", [document._LOADER, yaml.SafeLoader], ids=["default parser", "slow parser"])
@pytest.mark.parametrize("case", CASES)
def test_a_bad_inventory_ends_in_one_message(
    case: Case, loader: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "_LOADER", loader)
    path = tmp_path / "cluster.yaml"
    path.write_bytes(case.content)
    with pytest.raises(InputError) as caught:
        load_inventory(path)
    told = str(caught.value)
    assert (caught.value.exit_code, caught.value.where) == (2, f"{path}:{case.at}")
    assert case.says in told
    assert [word for word in NEVER if word in told] == []


def test_the_corpus_is_large_and_its_titles_are_unique() -> None:
    ids = [str(case.id) for case in CASES]  # type: ignore[attr-defined]
    assert len(ids) == len(set(ids))
    assert len(ids) >= 150

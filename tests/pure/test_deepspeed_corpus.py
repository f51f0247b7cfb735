"""DeepSpeed files with one mistake each, each of which must end as one lint: its id, its place, its words, its code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.document import load_text
from cluster.errors import InputError
from launcher.lints import KINDS, Lint, lint_text

CORPUS = Path(__file__).parents[1] / "corpus" / "deepspeed"
UNREADABLE = "unreadable"
NEVER = ("Traceback", "JSONDecodeError", "pydantic", "Expecting", "\x1b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    title: str
    content: bytes
    code: int
    id: str
    at: str
    says: str


def read_cases(text: str) -> Iterator[Case]:
    template, *cases = f"\n{text}".split("\n== ")
    for case in cases:
        head, _, body = case.partition("\n")
        code, lint, at, says, title = head.split(" | ")
        body = body.removesuffix("\n")
        content = template.lstrip("\n").replace("@@", body) if "@@" in template else body
        yield Case(title=title, content=content.encode(), code=int(code), id=lint, at=at, says=says)


def load_cases() -> Iterator[object]:
    for path in sorted(CORPUS.glob("*.cases")):
        for case in read_cases(path.read_text()):
            yield pytest.param(case, id=f"{path.stem}: {case.title}")
    for one in json.loads((CORPUS / "bytes.json").read_text()):
        content = one["content"].encode("latin-1")
        case = Case(title=one["title"], content=content, code=2, id=UNREADABLE, at=one["at"], says=one["says"])
        yield pytest.param(case, id=f"bytes: {case.title}")


CASES = list(load_cases())


def judged(path: Path) -> tuple[Lint, ...] | InputError:
    try:
        return lint_text(load_text(path), name=str(path), world_size=4)
    except InputError as error:
        return error


@pytest.mark.parametrize("case", CASES)
def test_one_mistake_ends_in_one_lint(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(case.content)
    found = judged(path)
    if isinstance(found, InputError):
        assert (case.id, case.code, found.exit_code) == (UNREADABLE, 2, 2), str(found)
        told, places = str(found), {found.where}
    else:
        mine = [lint for lint in found if lint.id == case.id]
        assert {lint.id for lint in found if lint.level == "error"} == ({case.id} if case.code else set())
        told = "\n".join(f"{lint.what}\n{lint.consequence}\n{lint.cure}" for lint in mine)
        places = {lint.where for lint in mine}
    assert f"{path}:{case.at}" in places
    assert case.says in told
    assert [word for word in NEVER if word in told] == []


def test_the_corpus_is_large_and_its_titles_are_unique() -> None:
    ids = [str(case.id) for case in CASES]  # type: ignore[attr-defined]
    assert len(ids) == len(set(ids))
    assert len(ids) >= 150


def test_every_error_that_a_file_alone_can_have_is_in_the_corpus() -> None:
    covered = {case.values[0].id for case in CASES}  # type: ignore[attr-defined]
    from_elsewhere = {"uneven-slots", "fp16-on-cpu", "gds-on-cpu"}
    mine = [kind.id for kind in KINDS.values() if kind.level == "error"]
    of_accelerate = set(mine[mine.index("accelerate-unknown-key") :])
    assert sorted(set(mine) - covered - from_elsewhere - of_accelerate) == []

"""Bad command lines, each of which must end as one message with exit code 2, and change nothing."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher import attempts, conversion, images, jobfile, ladder  # noqa: F401 - so that no child has to
from launcher.cli import main
from launcher.views import checkpoints, text  # noqa: F401 - the same

CORPUS = Path(__file__).parents[1] / "corpus" / "cli"
NEVER = ("Traceback", "this should not happen", "pydantic", "Errno", "codec", "\x1b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    words: tuple[str, ...]
    says: str


def load_cases() -> Iterator[object]:
    for path in sorted(CORPUS.glob("*.cases")):
        for line in path.read_text().splitlines():
            if not line.startswith("# "):
                command, _, says = line.rpartition(" | ")
                yield pytest.param(Case(words=tuple(shlex.split(command)), says=says), id=f"{path.stem}: {command}")


CASES = list(load_cases())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli") / "work"
    shutil.copytree(CORPUS / "work", made)
    for secret in made.glob("*.env"):
        secret.chmod(0o600)
    (made / "open.env").write_text("A=1\n")
    (made / "book.ipynb").write_text("{}")
    (made / "link.py").symlink_to("train.py")
    return made


def call(folder: Path, words: tuple[str, ...]) -> tuple[int, str]:
    """Call the command line in a process of its own, which need not import everything anew; its code, what it said."""
    said = folder.parent / "said.txt"
    child = os.fork()
    if child == 0:
        try:
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(out, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - leaves by os._exit
            os.chdir(folder)
            os.environ |= {"HOME": str(folder.parent), "LAUNCHER_STATE": str(folder.parent / "state")}
            sys.argv = ["launcher", *words]
            main()
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_command_line_ends_in_one_message(case: Case, folder: Path) -> None:
    before = content(folder)
    code, said = call(folder, case.words)
    assert code == 2, said
    assert case.says in " ".join(said.split())
    assert [word for word in NEVER if word in said] == []
    assert content(folder) == before
    assert not (folder.parent / ".launcher").exists(), "something was started"


def test_the_corpus_is_large_and_says_nothing_twice() -> None:
    ids = [str(case.id) for case in CASES]  # type: ignore[attr-defined]
    assert len(ids) == len(set(ids))
    assert len(ids) >= 180

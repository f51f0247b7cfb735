"""The command blocks that can be carried out here are: what a newcomer types first must work as it is printed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import reading

# A path of this interpreter's own, before the script that pip made: they are the same environment.
LAUNCHER = (sys.executable, "-m", "launcher.cli")


def call(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A launcher command in the checkout, by a user who has never called it before."""
    environment = {**os.environ, "HOME": str(home), "LAUNCHER_STATE": str(home / "state"), "COLUMNS": "100"}
    environment.pop("LAUNCHER_CLUSTER", None)
    return subprocess.run(
        [*LAUNCHER, *words],
        cwd=reading.ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", ["--help", "--version", "schema", "completion bash", "ls", "ls --json"])
def test_commands_that_need_no_machine(tmp_path: Path, words: str) -> None:
    said = call(tmp_path, *words.split())
    assert said.returncode == 0, said.stderr
    assert said.stdout or said.stderr


def test_every_command_of_the_documents_has_help(tmp_path: Path) -> None:
    names = {words[0] for _, words in reading.commands("launcher") if not words[0].startswith("-")}
    said = {name: call(tmp_path, name, "--help") for name in sorted(names)}
    assert {name: one.stderr for name, one in said.items() if one.returncode != 0} == {}


def test_the_schema_is_json_schema(tmp_path: Path) -> None:
    schema = json.loads(call(tmp_path, "schema").stdout)
    assert set(schema["properties"]) >= {"name", "nodes", "defaults", "image", "container"}


@pytest.mark.oracle
@pytest.mark.parametrize("block", [one for one in reading.blocks() if one.run], ids=lambda one: one.path.name)
def test_a_block_that_is_marked_runs_as_it_is_printed(tmp_path: Path, block: reading.Block) -> None:
    pytest.importorskip("torch")
    lines = [shlex.split(line, comments=True) for line in block.text.splitlines()]
    assert lines
    try:
        for program, *words in filter(None, lines):
            assert program == "launcher"
            said = call(tmp_path, *words)
            assert said.returncode == 0, f"launcher {' '.join(words)}\n{said.stdout}{said.stderr}"
    finally:
        call(tmp_path, "down", "-c", "examples/local.yaml")
    models = list(tmp_path.rglob("final/model.safetensors"))
    assert len(models) == 1

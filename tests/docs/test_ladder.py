"""What docs/ladder.md shows is what is printed."""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.docs import reading
from tests.docs.test_blocks import call


def test_the_table_in_the_guide_is_the_one_that_is_printed(tmp_path: Path) -> None:
    shown = [block for block in reading.blocks() if block.path.name == "ladder.md"]
    command, output = shown[0], shown[1]
    assert (command.language, output.language) == ("sh", "text")
    said = call(tmp_path, *shlex.split(command.text)[1:])
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout == output.text

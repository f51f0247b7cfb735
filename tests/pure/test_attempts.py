"""What rules look at in a log; the attempts themselves run in tests/inside/test_attempts.py."""

from __future__ import annotations

from pathlib import Path

from launcher.attempts import matched
from launcher.restart import Policy


def test_a_line_is_met_without_its_time_and_rank(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("2026-11-23T06:00:00.123456Z 5 loss is nan\n2026-11-23T06:00:01.123456Z - the end")
    logs = [tmp_path / "a.log", tmp_path / "missing.log"]

    def says(*rules: tuple[str, bool]) -> bool | None:
        return matched(Policy(restarts=1, on_log=rules), logs)

    assert says(("^loss is nan$", False)) is False
    assert says(("^the end$", True)) is True
    assert says(("2026", True)) is None
    assert says(("no such", True), ("nan", False), ("end", True)) is False
    assert says() is None


def test_only_the_end_of_a_long_log_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("t 0 long ago\n" + "t 0 and so on\n" * 400_000 + "t 0 just now\n")
    policy = Policy(restarts=1, on_log=(("long ago", True), ("just now", False)))
    assert matched(policy, [path]) is False

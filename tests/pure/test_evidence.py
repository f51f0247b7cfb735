"""What a node kept of a run that hung is brought here, and nothing else."""

from __future__ import annotations

from pathlib import Path

from cluster.fleet import Machine
from cluster.local import LocalTransport
from launcher.stages.evidence import fetch_evidence
from tests.pure.doubles import MemoryEngine


def fetch(out: Path, folder: Path) -> int:
    machine = Machine(name="gpu-01", transport=LocalTransport("gpu-01"), engine=MemoryEngine())
    return fetch_evidence(machine, out=str(out), folder=folder)


def test_stacks_and_flight_records_come_home(tmp_path: Path) -> None:
    out = tmp_path / "out with a space"
    for name, content in (("stacks/rank-00003.txt", b"rank 3"), ("flight/rank_3", b"\x80\x02\0\n"), ("node.log", b"x")):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    assert fetch(out, tmp_path / "evidence") == 2
    kept = {path.relative_to(tmp_path / "evidence"): path.read_bytes() for path in tmp_path.glob("evidence/**/rank*")}
    assert kept == {Path("gpu-01/stacks/rank-00003.txt"): b"rank 3", Path("gpu-01/flight/rank_3"): b"\x80\x02\0\n"}


def test_where_there_are_none_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert fetch(tmp_path / "out", tmp_path / "evidence") == 0
    assert not (tmp_path / "evidence").exists()


def test_s14_what_a_job_has_planted_is_left_there(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "stacks").mkdir(parents=True)
    elsewhere.write_text("a secret of the node")
    (out / "stacks" / "link").symlink_to(elsewhere)
    for name in (".hidden", "with space", "new\nline", "ü", "x" * 200):
        (out / "stacks" / name).write_text("x")
    (out / "stacks" / "large").write_bytes(b"\0" * (9 << 20))
    assert fetch(out, tmp_path / "evidence") == 0

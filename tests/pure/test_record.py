"""What is kept here: written whole, private, and read back whatever became of it."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterError, InputError
from launcher.events import NodeStarted, RunBegan, RunEnded, StageBegan
from launcher.job import Job, Settings
from launcher.plan import Plan, make_plan
from launcher.record import (
    Memory,
    RunRecord,
    keep_traceback,
    plan_from_json,
    plan_to_json,
    state_folder,
    to_pretty_json,
    write_whole,
)
from tests.pure import given

BEGAN = RunBegan(time=1.0, run="run-1", cluster="lab", nodes=("gpu-01",), world_size=8, command=("train.py",))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return Memory(tmp_path).cluster("lab").run("run-1")


@pytest.fixture
def plan() -> Plan:
    inventory = given.inventory(defaults={"nvme": [given.NVME]})
    job = Job(script="train.py", args=("--a", "ü", ""), settings=Settings(stage=3, clipping=1.0), secrets=("HF_TOKEN",))
    return make_plan(inventory, job, given.all_facts(inventory), image="sha256:feed", run_id="run-1", code="c0de")


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"LAUNCHER_STATE": "/srv/state", "XDG_STATE_HOME": "/x", "HOME": "/home/ada"}, "/srv/state"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/home/ada"}, "/x/launcher"),
        ({"HOME": "/home/ada"}, "/home/ada/.local/state/launcher"),
        ({"LAUNCHER_STATE": "", "XDG_STATE_HOME": "", "HOME": "/home/ada"}, "/home/ada/.local/state/launcher"),
    ],
)
def test_where_the_state_is(environment: dict[str, str], folder: str) -> None:
    assert state_folder(environment) == Path(folder)


def test_a_relative_state_folder_is_made_whole() -> None:
    assert state_folder({"LAUNCHER_STATE": "state"}) == Path.cwd() / "state"


def test_without_a_home_the_account_says_where_it_is() -> None:
    assert state_folder({}) == Path("~").expanduser() / ".local/state/launcher"


# Writing


def test_a_file_is_private_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_whole(path, "one ü\n")
    write_whole(path, "two\n")
    assert path.read_text() == "two\n"
    assert (mode(path), mode(path.parent), mode(path.parent.parent)) == (0o600, 0o700, 0o700)
    assert names(path.parent) == ["file"]


def test_what_cannot_be_written_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half\ud800")
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_what_a_dead_process_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / f".file.{os.getpid()}.{threading.get_ident()}").touch()
    write_whole(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]


def test_a_traceback_is_kept_privately_and_appended(tmp_path: Path) -> None:
    kept = keep_traceback(tmp_path / "state", "first")
    assert keep_traceback(tmp_path / "state", "second") == kept
    assert (kept.read_text(), mode(kept)) == ("first\nsecond\n", 0o600)


def test_a_traceback_finds_a_place_even_without_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "state").touch()
    kept = keep_traceback(tmp_path / "state", "half\ud800")
    assert (kept.parent, kept.read_text(), mode(kept)) == (tmp_path, "half\\ud800\n", 0o600)


def test_a_state_that_cannot_be_written_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    path = tmp_path / "state" / "file"
    with pytest.raises(ClusterError) as caught:
        write_whole(path, "text")
    cure = "  next: make room there, or set LAUNCHER_STATE to a folder that you can write to"
    assert str(caught.value).splitlines() == [f"{path}: this cannot be written: Not a directory", cure]
    with pytest.raises(ClusterError, match="this cannot be written"):
        Memory(tmp_path / "state").cluster("lab").run("run-1").emit(BEGAN)


# Clusters


def test_nothing_is_known_at_first(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "none")
    assert (memory.clusters(), memory.current(), memory.cluster("lab").inventory()) == ((), None, None)
    assert (memory.cluster("lab").runs(), memory.cluster("lab").load_facts()) == ((), {})
    assert not (tmp_path / "none").exists()


def test_a_cluster_is_remembered_with_its_file_and_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    memory = Memory(tmp_path / "state")
    lab, other = memory.cluster("lab"), memory.cluster("other")
    lab.remember(Path("cluster.yaml"), engine="process")
    other.remember(Path("/srv/other.yaml"), engine=None)
    assert [(one.name, one.inventory(), one.engine()) for one in memory.clusters()] == [
        ("lab", tmp_path / "cluster.yaml", "process"),
        ("other", Path("/srv/other.yaml"), None),
    ]


def test_the_current_cluster_is_forgotten_only_by_its_own_name(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.cluster("lab").remember(Path("/srv/lab.yaml"), engine=None)
    memory.make_current("lab")
    memory.forget_current("other")
    assert memory.current() == "lab"
    memory.forget_current("lab")
    memory.forget_current("lab")
    assert memory.current() is None


def test_a_current_cluster_that_is_not_known_any_more_is_none(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.make_current("lab")
    assert memory.current() is None


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\0", b"a\0b", b"\x1b[2Jlab\n", b"two\nlines\n"])
def test_a_torn_memory_is_no_memory(tmp_path: Path, content: bytes) -> None:
    memory = Memory(tmp_path)
    lab = memory.cluster("lab")
    lab.remember(Path("/srv/lab.yaml"), engine="docker")
    for name in ("inventory", "engine", "facts.json"):
        (lab.folder / name).write_bytes(content)
    (tmp_path / "current").write_bytes(content)
    assert (lab.inventory(), lab.engine(), lab.load_facts(), memory.current()) == (None, None, {}, None)


def test_facts_come_back_as_they_were(tmp_path: Path) -> None:
    lab = Memory(tmp_path).cluster("lab")
    known = given.all_facts(given.inventory(), routes={"10.0.0.12": "eth0"}, clock_offset=-2.5)
    lab.save_facts(known)
    assert lab.load_facts() == known


def test_facts_of_another_version_are_none(tmp_path: Path) -> None:
    lab = Memory(tmp_path).cluster("lab")
    write_whole(lab.folder / "facts.json", '{"gpu-01": {"system": "nine"}}')
    assert lab.load_facts() == {}


# Plans


def test_a_plan_comes_back_as_it_was(record: RunRecord, plan: Plan) -> None:
    record.save_plan(plan)
    assert record.load_plan() == plan
    assert plan_from_json(plan_to_json(plan), name="plan.json") == plan


def test_a_plan_torn_anywhere_is_none(record: RunRecord, plan: Plan) -> None:
    assert record.load_plan() is None
    record.save_plan(plan)
    path = record.folder / "plan.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        assert record.load_plan() is None
    path.write_bytes(b"\xff\xfe")
    assert record.load_plan() is None


def test_what_is_no_plan_is_refused_with_its_place() -> None:
    with pytest.raises(InputError) as refused:
        plan_from_json('{"cluster": "lab"}', name="plan.json")
    first, *_, last = str(refused.value).splitlines()
    assert first.startswith("plan.json: this is no saved plan: ")
    assert last == "  next: save one with --dry-run --json"


def test_no_value_of_a_secret_is_in_a_plan(plan: Plan) -> None:
    assert '"HF_TOKEN"' in plan_to_json(plan)
    assert plan.job.secrets == ("HF_TOKEN",)


# Events


def test_events_are_appended_and_read_back(record: RunRecord) -> None:
    assert list(record.events()) == []
    events = [BEGAN, StageBegan(time=2.0, stage="start"), RunEnded(time=3.0, code=1, cause="why\u2028so\x85")]
    for event in events:
        record.emit(event)
    assert list(record.events()) == events
    assert (record.state().run, record.state().cause) == ("run-1", "why\u2028so\x85")
    assert mode(record.folder) == 0o700


def test_a_torn_line_costs_itself_alone(record: RunRecord) -> None:
    record.emit(BEGAN)
    with (record.folder / "events.jsonl").open("ab") as log:
        log.write(b'{"event": "StageBegan", "ti')
    record.emit(StageBegan(time=2.0, stage="start"))
    record.emit(RunEnded(time=3.0, code=0))
    assert list(record.events()) == [BEGAN, StageBegan(time=2.0, stage="start"), RunEnded(time=3.0, code=0)]


def test_bytes_that_are_no_text_cost_their_line_alone(record: RunRecord) -> None:
    record.emit(BEGAN)
    with (record.folder / "events.jsonl").open("ab") as log:
        log.write(b"\xff\xfe\0\n\n")
    record.emit(RunEnded(time=3.0, code=0))
    assert list(record.events()) == [BEGAN, RunEnded(time=3.0, code=0)]


def test_many_threads_write_whole_lines(record: RunRecord) -> None:
    def write(number: int) -> None:
        for index in range(5):
            record.emit(NodeStarted(time=float(index), node=f"gpu-{number:02d}", container="x" * 200))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(record.events())) == 40


def test_runs_are_listed_with_the_oldest_first(tmp_path: Path) -> None:
    lab = Memory(tmp_path).cluster("lab")
    for run in ("20261123-0700-b", "20261122-0700-a"):
        lab.run(run).emit(BEGAN)
    assert [one.run for one in lab.runs()] == ["20261122-0700-a", "20261123-0700-b"]


# Logs


def mirror(record: RunRecord, node: str, *lines: Any) -> None:
    record.logs.mkdir(parents=True, exist_ok=True)
    record.mirror(node).write_bytes(b"".join(lines))


ONE = b"2026-11-23T06:00:00.000001Z 0 first\n", b"2026-11-23T06:00:00.000003Z 1 third \xff\n"
TWO = b"2026-11-23T06:00:00.000002Z 8 second\n", b"2026-11-23T06:00:00.000004Z - of the agent\n"


def test_logs_are_merged_by_the_time_of_their_lines(record: RunRecord) -> None:
    mirror(record, "gpu-01", *ONE)
    mirror(record, "gpu-02", *TWO)
    assert list(record.merged()) == [
        ("gpu-01", ONE[0][:-1]),
        ("gpu-02", TWO[0][:-1]),
        ("gpu-01", ONE[1][:-1]),
        ("gpu-02", TWO[1][:-1]),
    ]


def test_no_log_is_an_empty_one(record: RunRecord) -> None:
    assert list(record.merged()) == []
    record.split_ranks()
    assert not record.folder.exists()


def test_every_rank_gets_a_log_of_its_own(record: RunRecord) -> None:
    mirror(record, "gpu-01", *ONE, b"torn", b"\n", b"2026 " + b"9" * 5000 + b" no rank\n", b"2026 ../x no rank\n")
    mirror(record, "gpu-02", *TWO)
    record.split_ranks()
    record.split_ranks()
    logs = {path.name: path.read_bytes() for path in record.logs.glob("rank-*")}
    assert logs == {
        "rank-00000.log": b"2026-11-23T06:00:00.000001Z first\n",
        "rank-00001.log": b"2026-11-23T06:00:00.000003Z third \xff\n",
        "rank-00008.log": b"2026-11-23T06:00:00.000002Z second\n",
    }


def test_the_ranks_logs_are_no_nodes(record: RunRecord) -> None:
    mirror(record, "rank-1", b"2026-11-23T06:00:00.000001Z 0 a node may be called so\n")
    before = list(record.merged())
    record.split_ranks()
    assert list(record.merged()) == before
    assert before[0][0] == "rank-1"


# JSON for people


def test_json_is_legible_and_can_always_be_printed() -> None:
    text = to_pretty_json({"path": Path("/srv/ü"), "said": "half\ud800"})
    assert text == '{\n  "path": "/srv/ü",\n  "said": "half\\ud800"\n}'
    text.encode()

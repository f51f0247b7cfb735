"""S25, F45, F47: what is kept on this machine is its owner's alone, is written through no link, and may be damaged."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.errors import ClusterError, InputError
from cluster.private import check_private, make_private, open_private
from cluster.shelf import Shelf
from cluster.trust import HostKey, pin, pinned
from launcher.events import RunBegan, RunEnded, StageBegan
from launcher.job import Job
from launcher.plan import make_plan
from launcher.record import Memory, RunRecord, keep_traceback
from launcher.views import text
from tests.pure import given
from tests.pure.test_watch import Log

BEGAN = RunBegan(time=1.0, run="run-1", cluster="lab", nodes=("gpu-01",), world_size=8, command=("train.py",))
KEY = HostKey(
    name="10.0.0.11",
    type="ssh-ed25519",
    base64="AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f",
)
LINES = b"2026-11-23T06:00:00.000001Z 0 first\n2026-11-23T06:00:00.000003Z - of the agent\n"
"""A log of two lines."""


@pytest.fixture
def _open_hands() -> Iterator[None]:
    """The umask of somebody who hides nothing."""
    before = os.umask(0)
    yield
    os.umask(before)


def fill(folder: Path) -> RunRecord:
    """Everything that a command writes into the state folder."""
    memory = Memory(folder)
    pin(memory.cluster("lab").known_hosts, [KEY])
    memory.cluster("lab").remember(folder / "cluster.yaml", engine="docker")
    memory.make_current("lab")
    inventory = given.inventory()
    known = given.all_facts(inventory)
    memory.cluster("lab").save_facts(known)
    record = memory.cluster("lab").run("run-1")
    record.save_plan(make_plan(inventory, Job(script="train.py"), known, image="x", run_id="run-1", code="c0de"))
    for event in (BEGAN, StageBegan(time=2.0, stage="watch"), RunEnded(time=3.0, code=1, cause="node gpu-01: exit 1")):
        record.emit(event)
    log = Log(record.folder, LINES)
    log.mirror().finish()
    record.split_ranks()
    keep_traceback(folder, "Traceback")
    Shelf(memory.shelf).put([b"a layer"])
    return record


def modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder.parent)): stat.S_IMODE(path.lstat().st_mode)
        for path in (folder, *folder.rglob("*"))
    }


@pytest.mark.usefixtures("_open_hands")
def test_s25_whatever_the_umask_all_is_its_owners_alone(tmp_path: Path) -> None:
    fill(tmp_path / "above" / "state")
    found = modes(tmp_path / "above")
    folders = {name for name in found if (tmp_path / name).is_dir()}
    assert {name: mode for name, mode in found.items() if mode != (0o700 if name in folders else 0o600)} == {}
    kept = {Path(name).name for name in found.keys() - folders}
    assert {"known_hosts", "inventory", "engine", "current", "facts.json", "plan.json", "events.jsonl"} <= kept
    assert {"gpu-01.log", "rank-00000.log", "errors.log"} <= kept


def test_s25_a_folder_of_ones_own_is_taken_and_one_that_is_missing_too(tmp_path: Path) -> None:
    check_private(tmp_path / "none")
    make_private(tmp_path / "a" / "b")
    check_private(tmp_path / "a" / "b")


def test_s25_a_link_in_the_state_folders_place_is_refused(tmp_path: Path) -> None:
    planted = tmp_path / "state"
    (tmp_path / "elsewhere").mkdir()
    planted.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError) as refused:
        check_private(planted)
    assert str(refused.value).splitlines() == [
        f"{planted}: the state folder is a link, and whoever can change it decides what is written where",
        f"  next: set LAUNCHER_STATE to the folder itself: {tmp_path / 'elsewhere'}",
    ]


def test_s25_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    theirs = Path("/")  # root's; for root itself one that it gives away
    if os.geteuid() == 0:
        theirs = tmp_path
        os.chown(theirs, 65534, 65534)
    with pytest.raises(InputError, match=rf"belongs to another user \(uid \d+, and you are {os.geteuid()}\)"):
        check_private(theirs)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_s25_a_folder_into_which_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(InputError) as refused:
        check_private(tmp_path)
    assert str(refused.value).splitlines() == [
        f"{tmp_path}: others may write into the state folder (mode {mode:o})",
        f"  next: chmod go-w {tmp_path}",
    ]


@pytest.mark.parametrize("name", ["events.jsonl", "plan.json", "rank-00000.log", "gpu-01.log", "errors.log"])
def test_s25_nothing_is_written_through_a_link_in_a_files_place(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    record = Memory(tmp_path / "state").cluster("lab").run("run-1")
    make_private(record.logs)
    for folder in (record.folder, record.logs, tmp_path / "state"):
        (folder / name).symlink_to(victim)
    log = Log(record.folder, LINES)
    log.mirror().finish()
    inventory = given.inventory()
    facts = given.all_facts(inventory)
    record.save_plan(make_plan(inventory, Job(script="train.py"), facts, image="x", run_id="run-1", code="c0de"))
    if name == "events.jsonl":
        with pytest.raises(ClusterError, match="this cannot be written: a link stands in its place"):
            record.emit(BEGAN)
    if name == "rank-00000.log":
        with pytest.raises(OSError, match="symbolic links"):
            record.split_ranks()
    kept = keep_traceback(tmp_path / "state", "Traceback")
    assert (kept.parent == tmp_path / "state") is (name != "errors.log")
    if name == "errors.log":
        kept.unlink()
    assert victim.read_text() == "as it was"


def test_s25_what_is_there_is_opened_and_what_is_not_is_made(tmp_path: Path) -> None:
    for mode in ("ab", "wb", "r+b"):
        with open_private(tmp_path / mode, mode) as file:
            file.write(b"one")
        with open_private(tmp_path / mode, mode) as file:
            file.write(b"2")
    assert [(tmp_path / mode).read_bytes() for mode in ("ab", "wb", "r+b")] == [b"one2", b"2", b"2ne"]


# Damage


def look_at_everything(folder: Path) -> None:
    """Read all that is kept, as commands do; only the pinned keys, which are no mere memory, may be refused."""
    memory = Memory(folder)
    memory.current()
    for lab in memory.clusters():
        lab.inventory(), lab.engine(), lab.load_facts()
        with suppress(InputError):
            pinned(lab.known_hosts)
        for record in lab.runs():
            plan, state = record.load_plan(), record.state()
            assert plan is None or text.plan_text(plan)
            text.run_table([text.run_row(lab.name, state)])
            list(record.merged())
            record.split_ranks()
    shelf = Shelf(memory.shelf)
    shelf.bytes_used()


def kept(folder: Path) -> list[Path]:
    """The files of a state folder, but for those that are only ever written."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "errors.log")


def test_f47_a_flipped_bit_anywhere_costs_at_most_what_it_hit(tmp_path: Path) -> None:
    fill(tmp_path / "state")
    dice = random.Random(25)  # noqa: S311 - the same every time
    for path in kept(tmp_path / "state"):
        whole = path.read_bytes()
        for _ in range(12):
            spoilt, place = bytearray(whole), dice.randrange(len(whole))
            spoilt[place] ^= 1 << dice.randrange(8)
            path.write_bytes(spoilt)
            look_at_everything(tmp_path / "state")
        path.write_bytes(whole)


def test_f47_a_file_cut_anywhere_costs_at_most_its_end(tmp_path: Path) -> None:
    record = fill(tmp_path / "state")
    for path in kept(tmp_path / "state"):
        whole = path.read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 8)):
            path.write_bytes(whole[:length])
            look_at_everything(tmp_path / "state")
        path.write_bytes(whole)
    assert record.state().is_over


def test_f47_what_a_newer_release_wrote_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    record = fill(tmp_path / "state")
    events = record.folder / "events.jsonl"
    newer = b'{"event": "Migrated", "time": 2.5, "to": {"schema": 9}}\n'
    events.write_bytes(newer + events.read_bytes().replace(b'"time":', b'"since": [9], "time":', 1) + newer)
    look_at_everything(tmp_path / "state")
    assert record.state().is_over
    (record.folder / "plan.json").write_text('{"schema": 9, "plan": {}}')
    (record.folder / "notes").mkdir()
    lab = Memory(tmp_path / "state").cluster("lab")
    (lab.folder / "facts.json").write_text('{"schema": 9, "facts": []}')
    look_at_everything(tmp_path / "state")
    assert (record.load_plan(), lab.load_facts()) == (None, {})


@pytest.mark.parametrize("name", ["inventory", "engine", "facts.json", "known_hosts", "events.jsonl", "plan.json"])
def test_f47_a_folder_in_a_files_place_is_told_or_passed_over(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "state")
    for path in kept(tmp_path / "state"):
        if path.name == name:
            path.unlink()
            path.mkdir()
    look_at_everything(tmp_path / "state")


# No room


def test_f45_where_nothing_can_be_written_that_is_one_message(tmp_path: Path) -> None:
    record = Memory(Path("/proc/nowhere")).cluster("lab").run("run-1")
    with pytest.raises(ClusterError, match="this cannot be written: No such file"):
        record.emit(BEGAN)
    with pytest.raises(ClusterError, match="this cannot be written: No such file"):
        Memory(Path("/proc/nowhere")).make_current("lab")

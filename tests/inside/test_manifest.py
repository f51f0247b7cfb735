"""The watcher beside a job: what it seals, when, and what it leaves alone."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import shards
from launcher.inside import manifest
from tests.inside.conftest import INSIDE, Bench
from tests.pure import kept

UNIT = f"{kept.RUN}/step-00000004"
NODE = "gpu-01"


def sealed(root: Path, unit: str = UNIT, node: str = NODE) -> dict[str, Any] | None:
    file = root / unit / shards.manifest_name(node)
    return dict(json.loads(file.read_text())) if file.exists() else None


def write(root: Path, *, stage: int | None = 3, ranks: range = range(2), world: int = 4, unit: str = UNIT) -> Path:
    kept.write_unit(root / unit, ranks=ranks, world=world, stage=stage, step=4, seed="x")
    return root / unit


def settle(root: Path, *, since: float = 0.0, seen: dict[str, manifest.Seen] | None = None, moment: float = 0) -> None:
    run = kept.run_document(NODE, machine_rank=0, slots=2, world=4)
    manifest.settle(root, UNIT, run=run, since=since, seen=seen, moment=moment)


@pytest.mark.parametrize("stage", [3, 2, 0, None])
def test_what_is_whole_is_sealed_with_all_that_it_holds(tmp_path: Path, stage: int | None) -> None:
    folder = write(tmp_path, stage=stage)
    settle(tmp_path)
    said = sealed(tmp_path)
    assert said is not None
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    ours = {"latest", shards.manifest_name(NODE)}
    assert [part["path"] for part in said["parts"]] == [name for name in files if name not in ours]
    assert (said["run"], said["ranks"], said["world_size"]) == (kept.RUN, [0, 1], 4)
    assert said["latest"] == (None if stage is None else "pytorch_model")
    summed = subprocess.run(["sha256sum", folder / "random_states_0.pkl"], capture_output=True, text=True, check=True)
    part = next(part for part in said["parts"] if part["path"] == "random_states_0.pkl")
    assert (part["sha256"], part["step"]) == (summed.stdout.split()[0], 8)


def test_a_large_file_is_hashed_in_pieces(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "big.swp").write_bytes(os.urandom(manifest.PIECE * 2 + 7))
    settle(tmp_path)
    said = sealed(tmp_path)
    assert said is not None
    part = next(part for part in said["parts"] if part["path"] == "big.swp")
    assert len(part["pieces"]) == 3
    (one,) = kept.look(tmp_path, NODE, UNIT)
    assert shards.judge(one.manifests, (one,)) != ()  # half of the processes are not here
    assert {flaw.path for flaw in shards.judge(one.manifests, (one,))}.isdisjoint({"big.swp"})


def without(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).unlink()


OPTIM, MODEL = (f"pytorch_model/zero_pp_rank_1_mp_rank_00_{what}_states.pt" for what in ("optim", "model"))
LACKING: dict[str, Callable[[Path], object]] = {
    "a rank's state": lambda folder: without(folder, "random_states_1.pkl"),
    "a rank's optimizer": lambda folder: without(folder, OPTIM),
    "both of a rank": lambda folder: without(folder, OPTIM, MODEL),
    "the end of a file": lambda folder: os.truncate(folder / "random_states_1.pkl", 200),
    "the content of a file": lambda folder: (folder / "random_states_1.pkl").write_bytes(bytes(900)),
    "all of a file": lambda folder: os.truncate(folder / "random_states_1.pkl", 0),
    "honesty": lambda folder: (folder / "link").symlink_to("/etc/hostname"),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_lacks_something_is_not_sealed(tmp_path: Path, what: str) -> None:
    LACKING[what](write(tmp_path))
    settle(tmp_path)
    assert sealed(tmp_path) is None


def test_what_is_older_than_the_run_is_another_run_s(tmp_path: Path) -> None:
    write(tmp_path)
    settle(tmp_path, since=time.time() + 60)
    assert sealed(tmp_path) is None


def test_only_what_stays_as_it_is_for_a_while_is_sealed(tmp_path: Path) -> None:
    folder, seen = write(tmp_path), dict[str, manifest.Seen]()

    def look(moment: float) -> bool:
        settle(tmp_path, seen=seen, moment=moment)
        return sealed(tmp_path) is not None

    assert [look(0), look(manifest.QUIET - 1)] == [False, False]
    (folder / "complete").write_text("!")
    assert [look(100), look(99 + manifest.QUIET), look(100 + manifest.QUIET)] == [False, False, True]


def test_it_is_sealed_again_only_where_it_was_written_again(tmp_path: Path) -> None:
    folder = write(tmp_path)
    settle(tmp_path)
    first = sealed(tmp_path)
    settle(tmp_path)
    assert sealed(tmp_path) == first
    # A bit flips: the disk's own doing leaves the time as it was, and is not taken for a new checkpoint.
    file = folder / "random_states_0.pkl"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[300] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    settle(tmp_path)
    assert sealed(tmp_path) == first
    kept.torch_file(file, {"step": 10}, size=80, dice=random.Random(1))  # noqa: S311
    settle(tmp_path)
    again = sealed(tmp_path)
    assert again is not None
    assert first is not None
    changed = [
        new["path"] for old, new in zip(first["parts"], again["parts"], strict=True) if old["sha256"] != new["sha256"]
    ]
    assert changed == ["random_states_0.pkl"]


def test_copies_and_what_is_not_ours_are_left_alone(tmp_path: Path) -> None:
    for place in ("gathered", "exported"):
        write(tmp_path / place)
    write(tmp_path / ".launcher-partial-x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / kept.RUN / "loss.jsonl").parent.mkdir()
    (tmp_path / kept.RUN / "loss.jsonl").touch()
    assert list(manifest.find_units(tmp_path)) == []
    assert list(manifest.find_units(tmp_path, whole=True)) == [f"{place}/{UNIT}" for place in ("exported", "gathered")]


def test_units_are_found_in_all_three_habits(tmp_path: Path) -> None:
    write(tmp_path)
    kept.write_unit(tmp_path / "raw/global_step5", ranks=[0], world=1, stage=3, step=5, seed="", style="deepspeed")
    write(tmp_path, stage=None, unit="plain/step-7")
    kinds = {unit: manifest.kind_of(tmp_path, unit) for unit in manifest.find_units(tmp_path)}
    assert kinds == {
        UNIT: ("accelerate", "pytorch_model", "pytorch_model"),
        "plain/step-7": ("plain", "", None),
        "raw/global_step5": ("deepspeed", "global_step5", "global_step5"),
    }
    top = tmp_path / "raw/global_step5"
    assert list(manifest.find_units(top)) == ["."]
    assert manifest.kind_of(top, ".")[0] == "deepspeed"


def call(root: Path, *arguments: str, stdin: str = "") -> Any:
    """As a node runs it: the text alone, with nothing of ours beside it."""
    source = (INSIDE / "manifest.py").read_text()
    done = subprocess.run(
        [sys.executable, "-I", "-c", source, *arguments, "--below", str(root)],
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout) if done.stdout else None


def test_a_list_tells_names_and_sizes_and_a_hash_tells_all(tmp_path: Path) -> None:
    (write(tmp_path) / "big.swp").write_bytes(os.urandom(manifest.PIECE * 4))
    settle(tmp_path)
    (brief,) = call(tmp_path, "list", "--brief", "--blind")["units"]
    (full,) = call(tmp_path, "list", "--unit", UNIT)["units"]
    (read,) = call(tmp_path, "hash", "--unit", UNIT)["units"]
    assert [part["path"] for part in brief["parts"]] == [part["path"] for part in full["parts"]]
    assert not any(part["pieces"] or part["step"] for part in brief["parts"])
    assert {part["step"] for part in full["parts"]} == {None, 4, 8}
    assert all(part["pieces"] is not None for part in read["parts"])
    name = shards.manifest_name(NODE)
    assert len(brief["manifests"][name]) < len(full["manifests"][name])
    for text in (brief["manifests"][name], full["manifests"][name]):
        assert shards.read_manifest(text) is not None
    assert call(tmp_path, "list", "--unit", "../x", "--unit", "no/such", "--unit", f"{kept.RUN}/../{UNIT}") == {
        "units": []
    }


def test_a_link_on_the_way_to_a_unit_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / kept.RUN).symlink_to(tmp_path / "elsewhere" / kept.RUN)
    assert call(tmp_path / "root", "hash", "--unit", UNIT) == {"units": []}
    assert call(tmp_path / "root", "list") == {"units": []}


def test_a_manifest_can_be_stated_from_outside(tmp_path: Path) -> None:
    folder = write(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / f"{shards.manifest_name(NODE)}.99.tmp").symlink_to(victim)
    call(tmp_path, "state", "--unit", UNIT, "--node", NODE, stdin="{}\n")
    assert (folder / shards.manifest_name(NODE)).read_text() == "{}\n"
    assert victim.read_text() == "mine"
    assert not list(folder.glob("*.tmp"))


def test_what_a_torn_or_foreign_manifest_says_is_passed_on_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for name, text in {"a": "{", "b": '{"seal": "x"}', "c": "[]"}.items():
        (folder / shards.manifest_name(f"node-{name}")).write_text(text)
    (brief,) = call(tmp_path, "list", "--brief")["units"]
    assert sorted(brief["manifests"].values()) == ["[]", "{", '{"seal": "x"}']
    settle(tmp_path)
    assert sealed(tmp_path) is not None


# What files tell of themselves


def test_numbers_are_read_from_pickles_of_every_protocol(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        for number in (0, 4, 255, 256, 65535, 65536, 2**31 - 1):
            text = pickle.dumps({"global_steps": number, "dp_world_size": 8}, protocol=protocol)
            assert manifest.number_at(text, b"global_steps") == number
            assert manifest.number_at(text, b"dp_world_size") == 8
    assert manifest.number_at(pickle.dumps({"global_steps": "many"}, protocol=2), b"global_steps") is None


def test_a_file_without_a_table_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x_model_states.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/other", "1")
    with path.open("rb") as file:
        assert manifest.look_into(file, path.name, path.stat().st_size) == (True, None, None)
    empty = tmp_path / "y.pt"
    with zipfile.ZipFile(empty, "w"):
        pass
    with empty.open("rb") as file:  # a zip without members begins otherwise
        assert manifest.look_into(file, empty.name, empty.stat().st_size)[0]


def test_a_safetensors_file_ends_where_its_head_says(tmp_path: Path) -> None:
    head = json.dumps({"__metadata__": {}, "w": {"data_offsets": [0, 8]}}).encode()
    whole = len(head).to_bytes(8, "little") + head + bytes(8)
    for content, sound in ((whole, True), (whole[:-1], False), (whole[:4], False), (b"\xff" * 20, False), (b"", False)):
        path = tmp_path / "m.safetensors"
        path.write_bytes(content)
        with path.open("rb") as file:
            assert manifest.look_into(file, path.name, len(content))[0] == sound
    for bad in (b"{]", b"[]", b'{"w": {}}', b'{"w": {"data_offsets": []}}'):
        path.write_bytes(len(bad).to_bytes(8, "little") + bad)
        with path.open("rb") as file:
            assert not manifest.look_into(file, path.name, 8 + len(bad))[0]


def test_odd_entries_are_named_for_what_they_are(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "a-link").symlink_to("x")
    os.mkfifo(folder / "a-pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)
        try:
            listener.bind("a-socket")
        finally:
            os.chdir(here)
    _, odd = manifest.files_of(folder)
    assert odd == [("a-link", "a link"), ("a-pipe", "a pipe"), ("a-socket", "a socket")]
    assert manifest.what_is(0o020000) == "a device"


def test_a_pipe_in_a_files_place_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "latest")
    assert manifest.read_latest(tmp_path) is None


# Beside a job

SAVES = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["HELPERS"])
from tests.pure import kept
root = Path(os.environ["LAUNCHER_CHECKPOINTS"])
kept.write_unit(root / os.environ["UNIT"], ranks=[0], world=1, stage=3, step=4, seed="x")
print("saved", flush=True)
if "WAIT" in os.environ:
    deadline = time.time() + 60
    while not list(root.rglob(".launcher-manifest*")):
        assert time.time() < deadline
        time.sleep(0.05)
    print("sealed", flush=True)
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    root = bench.folder / "checkpoints"
    root.mkdir()
    (bench.folder / "files").mkdir()
    shutil.copy(INSIDE / "manifest.py", bench.folder / "files" / "manifest.py")
    monkeypatch.setenv("LAUNCHER_CHECKPOINTS", str(root))

    def run(**env: str) -> Any:
        environment = {"HELPERS": str(INSIDE.parents[1]), "UNIT": UNIT, **env}
        return bench.end(bench.start(SAVES, env=environment, run=kept.RUN))

    return run


@pytest.mark.parametrize("code", [0, 3])
def test_the_last_checkpoint_is_sealed_after_the_job_whatever_its_end(
    job: Callable[..., Any], bench: Bench, code: int
) -> None:
    ended = job(CODE=str(code))
    assert (ended.status, ended.exit["code"]) == (code, code)
    said = sealed(bench.folder / "checkpoints", node="node-a")
    assert said is not None
    assert (said["run"], said["ranks"], said["unit"]) == (kept.RUN, [0], UNIT)


def test_while_the_job_goes_on_what_is_quiet_is_sealed(job: Callable[..., Any]) -> None:
    ended = job(WAIT="1")
    assert (ended.status, ended.said("0")) == (0, ["saved", "sealed"])


def test_a_last_look_that_takes_long_is_ended_by_whoever_asks(
    job: Callable[..., Any], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "import sys, time\nif sys.argv[1] == 'seal':\n    print('slow')\n    time.sleep(600)\n"
    (bench.folder / "files" / "manifest.py").write_text(slow)
    agent = bench.start("print('done')", run=kept.RUN, env={})
    bench.wait_for((bench.folder / "out" / "exit.json").exists)
    began = time.monotonic()
    agent.send_signal(signal.SIGTERM)
    ended = bench.end(agent)
    assert (ended.status, ended.exit["stopped"]) == (0, False)
    assert time.monotonic() - began < 20

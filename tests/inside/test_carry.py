"""Pieces on their way: only where they belong, only as they were, and whole or not at all; whoever wrote the folder."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.inside import carry
from tests.inside.conftest import INSIDE

SOURCE = (INSIDE / "carry.py").read_text()
UNIT = "gathered/run/step-1"
PARTIAL = "gathered/run/.launcher-partial-step-1"


def call(
    root: Path, verb: str, unit: str = UNIT, *words: str, stdin: bytes = b"", owner: str = "ours"
) -> subprocess.CompletedProcess[bytes]:
    """As a node runs it: the text alone."""
    argv = [sys.executable, "-I", "-c", SOURCE, verb, unit, "--below", str(root), "--token", owner, *words]
    return subprocess.run(argv, input=stdin, capture_output=True, check=False)


def ask(root: Path, verb: str, asked: object, unit: str = UNIT) -> dict[str, Any]:
    done = call(root, verb, unit, stdin=json.dumps(asked).encode())
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == ("error" in answer), done.stderr
    return answer


def rows(files: Mapping[str, bytes], *, piece: int = 1000) -> list[tuple[str, int, bytes]]:
    return [
        (path, at, content[at : at + piece]) for path, content in files.items() for at in range(0, len(content), piece)
    ]


def message(pieces: list[tuple[str, int, bytes]]) -> bytes:
    head = [[path, at, len(chunk), hashlib.sha256(chunk).hexdigest()] for path, at, chunk in pieces]
    return json.dumps({"pieces": head}).encode() + b"\n" + b"".join(chunk for _, _, chunk in pieces)


def write(root: Path, pieces: list[tuple[str, int, bytes]]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(call(root, "write", stdin=message(pieces)).stdout)
    return answer


def sizes(files: Mapping[str, bytes]) -> dict[str, int]:
    return {path: len(content) for path, content in files.items()}


FILES = {"a.pt": bytes(range(256)) * 10, "below/b.pt": b"b" * 10, "below/deep/empty": b""}


def arrive(root: Path, files: Mapping[str, bytes] = FILES) -> None:
    ask(root, "ready", sizes(files))
    assert write(root, rows(files)) == {"bad": [], "written": sum(map(len, files.values())), "cut": False}


def show(root: Path, files: Mapping[str, bytes] = FILES, **more: object) -> dict[str, Any]:
    return ask(root, "show", {"files": sizes(files), "texts": {}, **more})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_arrives_is_shown_whole_under_its_name(tmp_path: Path) -> None:
    arrive(tmp_path)
    assert not (tmp_path / UNIT).exists()
    texts = {"latest": "pytorch_model", ".launcher-manifest.gpu-01.json": "{}"}
    assert show(tmp_path, texts=texts, beside={"latest": "step-1"}) == {"shown": UNIT}
    assert tree(tmp_path / UNIT) == {**FILES, **{name: text.encode() for name, text in texts.items()}}
    assert tree(tmp_path)["gathered/run/latest"] == b"step-1"
    assert names(tmp_path / "gathered/run") == ["latest", "step-1"]


def test_what_was_there_before_is_there_until_the_new_is_whole_and_gone_after_it(tmp_path: Path) -> None:
    arrive(tmp_path)
    show(tmp_path)
    new = {**FILES, "a.pt": b"new"}
    arrive(tmp_path, new)
    assert tree(tmp_path / UNIT) == FILES
    show(tmp_path, new)
    assert tree(tmp_path / UNIT) == new
    assert names(tmp_path / "gathered/run") == ["step-1"]


def test_what_has_arrived_counts_and_what_is_too_much_goes(tmp_path: Path) -> None:
    arrive(tmp_path)
    place = tmp_path / PARTIAL
    (place / "stranger").write_text("x")
    (place / "below/more").mkdir()
    with (place / "a.pt").open("ab") as file:
        file.write(b"longer")
    said = ask(tmp_path, "ready", sizes(FILES))
    whole = {path: [hashlib.sha256(content).hexdigest()] if content else [] for path, content in FILES.items()}
    assert said["have"] == whole
    assert said["free"] > 0
    assert sorted(tree(place)) == ["a.pt", "below/b.pt"]


def test_a_piece_that_is_not_what_it_should_be_is_not_written(tmp_path: Path) -> None:
    ask(tmp_path, "ready", sizes(FILES))
    sent = bytearray(message(rows(FILES)))
    sent[-1] ^= 1  # the last byte of the last piece
    answer = json.loads(call(tmp_path, "write", stdin=bytes(sent)).stdout)
    assert answer == {"bad": [["below/b.pt", 0]], "written": 2560, "cut": False}
    assert not (tmp_path / PARTIAL / "below").exists()


@pytest.mark.parametrize("share", [0.0, 0.009, 0.5, 0.99])
def test_f51_a_line_that_drops_costs_no_more_than_one_piece(tmp_path: Path, share: float) -> None:
    files = {"big": random.Random(1).randbytes(100_500)}  # noqa: S311
    ask(tmp_path, "ready", sizes(files))
    sent = message(rows(files))
    head = sent.index(b"\n") + 1
    call(tmp_path, "write", stdin=sent[: head + int(share * 100_500)])
    file = tmp_path / PARTIAL / "big"
    there = file.stat().st_size if file.exists() else 0
    assert int(share * 100_500) - there < 1000
    have = ask(tmp_path, "ready", sizes(files))["have"]["big"]
    assert have == ([hashlib.sha256(files["big"][:there]).hexdigest()] if there else [])
    arrive(tmp_path, files)
    assert show(tmp_path, files) == {"shown": UNIT}


def test_nothing_is_shown_that_lacks_anything(tmp_path: Path) -> None:
    arrive(tmp_path)
    assert "shall have" in show(tmp_path, {**FILES, "a.pt": b""})["error"]
    assert "No such file" in show(tmp_path, {**FILES, "c.pt": b"c"})["error"]
    (tmp_path / PARTIAL / "a.pt").write_bytes(b"short")
    assert "shall have" in show(tmp_path)["error"]
    assert not (tmp_path / UNIT).exists()


def test_what_is_not_wanted_any_more_leaves_nothing(tmp_path: Path) -> None:
    arrive(tmp_path)
    assert ask(tmp_path, "drop", {}) == {"dropped": UNIT}
    assert names(tmp_path) == []
    assert ask(tmp_path, "drop", {}) == {"dropped": UNIT}
    arrive(tmp_path)
    show(tmp_path)
    ask(tmp_path, "drop", {})
    assert tree(tmp_path / UNIT) == FILES


def test_pieces_of_a_unit_that_is_here_already_are_copied(tmp_path: Path) -> None:
    for path, content in FILES.items():
        file = tmp_path / "run/step-1" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    ask(tmp_path, "ready", sizes(FILES))
    pieces = [[path, at, len(chunk), hashlib.sha256(chunk).hexdigest()] for path, at, chunk in rows(FILES)]
    pieces[0][3] = "0" * 64
    answer = ask(tmp_path, "copy", {"from": "run/step-1", "pieces": pieces})
    assert answer == {"bad": [["a.pt", 0]], "written": 1570, "cut": False}


def test_bytes_are_read_in_the_order_in_which_they_are_asked_for(tmp_path: Path) -> None:
    arrive(tmp_path)
    show(tmp_path)
    asked = [["below/b.pt", 3, 4], ["a.pt", 10, 5], ["a.pt", 0, 1]]
    done = call(tmp_path, "read", stdin=json.dumps(asked).encode())
    assert (done.returncode, done.stdout) == (0, b"bbbb" + bytes(range(10, 15)) + b"\0")
    short = call(tmp_path, "read", stdin=b'[["a.pt", 2500, 100]]')
    assert (short.returncode, b"ends before its end" in short.stderr) == (1, True)


# F46, F48, F49: of two commands that bring the same to the same place one does


def test_f46_what_somebody_brings_is_his_while_he_is_there(tmp_path: Path) -> None:
    arrive(tmp_path)
    for verb, asked in (("ready", sizes(FILES)), ("show", {"files": sizes(FILES), "texts": {}}), ("copy", {})):
        done = call(tmp_path, verb, stdin=json.dumps(asked).encode(), owner="theirs")
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["held"], answer["age"] < carry.LASTS) == (1, "ours", True)
    assert json.loads(call(tmp_path, "write", stdin=message(rows(FILES)), owner="theirs").stdout)["held"] == "ours"
    assert show(tmp_path) == {"shown": UNIT}
    assert names(tmp_path / "gathered/run") == ["step-1"]


def test_f48_who_has_done_nothing_for_a_while_holds_nothing(tmp_path: Path) -> None:
    arrive(tmp_path)
    lease = tmp_path / "gathered/run/.launcher-lease-step-1"
    long_ago = lease.stat().st_mtime - carry.LASTS - 1
    os.utime(lease, (long_ago, long_ago))
    done = call(tmp_path, "ready", stdin=json.dumps(sizes(FILES)).encode(), owner="theirs")
    assert done.returncode == 0
    assert len(json.loads(done.stdout)["have"]["a.pt"]) == 1


def test_f49_who_lost_it_writes_nothing_any_more(tmp_path: Path) -> None:
    ask(tmp_path, "ready", sizes(FILES))
    done = call(tmp_path, "ready", UNIT, "--take", stdin=json.dumps({"a.pt": 3}).encode(), owner="theirs")
    assert done.returncode == 0
    assert write(tmp_path, rows(FILES))["held"] == "theirs"
    assert show(tmp_path)["held"] == "theirs"
    assert tree(tmp_path / PARTIAL) == {}


# F52, S14: a folder that somebody else may write to


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """What lies outside of the checkpoints folder, and stays as it is."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "file").write_text("mine")
    yield place
    assert tree(place) == {"file": b"mine"}
    assert names(place) == ["file"]


def plant_link(root: Path, victim: Path) -> None:
    (root / PARTIAL / "a.pt").symlink_to(victim / "file")


def plant_dangling_link(root: Path, victim: Path) -> None:
    (root / PARTIAL / "a.pt").symlink_to(victim / "new")


def plant_hard_link(root: Path, victim: Path) -> None:
    os.link(victim / "file", root / PARTIAL / "a.pt")


def plant_linked_folder(root: Path, victim: Path) -> None:
    (root / PARTIAL / "below").symlink_to(victim)


def plant_pipe(root: Path, victim: Path) -> None:
    os.mkfifo(root / PARTIAL / "a.pt")


def plant_socket(root: Path, victim: Path) -> None:
    here = Path.cwd()
    os.chdir(root / PARTIAL)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("a.pt")
    finally:
        os.chdir(here)


def plant_folder(root: Path, victim: Path) -> None:
    (root / PARTIAL / "a.pt").mkdir()


def plant_file_for_folder(root: Path, victim: Path) -> None:
    (root / PARTIAL / "below").write_text("x")


def plant_partial(root: Path, victim: Path) -> None:
    (root / PARTIAL).rmdir()
    (root / PARTIAL).symlink_to(victim)


def plant_above(root: Path, victim: Path) -> None:
    (root / "gathered").rename(root / "aside")
    (root / "gathered").symlink_to(victim)


PLANTED: tuple[Callable[[Path, Path], None], ...] = (
    *(plant_link, plant_dangling_link, plant_hard_link, plant_linked_folder, plant_pipe, plant_socket, plant_folder),
    *(plant_file_for_folder, plant_partial, plant_above),
)


@pytest.mark.parametrize("plant", PLANTED)
def test_f52_nothing_is_written_through_what_was_planted(
    tmp_path: Path, victim: Path, plant: Callable[[Path, Path], None]
) -> None:
    """Planted between two steps of a gather: the writing refuses it, and the next beginning clears it away."""
    root = tmp_path / "root"
    root.mkdir()
    ask(root, "ready", sizes(FILES))
    plant(root, victim)
    refused = write(root, rows(FILES))
    assert "error" in refused, refused
    again = ask(root, "ready", sizes(FILES))
    if plant in (plant_partial, plant_above):
        assert "a link or a file where a folder shall be" in again["error"]
        return
    assert "error" not in write(root, rows(FILES))
    assert show(root) == {"shown": UNIT}
    assert tree(root / UNIT) == FILES
    assert not any(path.is_symlink() for path in root.rglob("*"))


@pytest.mark.parametrize("plant", [plant_link, plant_hard_link, plant_linked_folder, plant_pipe, plant_folder])
def test_f52_nothing_planted_is_ever_shown(tmp_path: Path, victim: Path, plant: Callable[[Path, Path], None]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    arrive(root)
    for name in ("a.pt", "below"):
        path = root / PARTIAL / name
        if path.is_dir():
            for inner in path.rglob("*.pt"):
                inner.unlink()
            for inner in path.rglob("*"):
                inner.rmdir()
            path.rmdir()
        else:
            path.unlink()
    plant(root, victim)
    assert "error" in show(root)
    assert not (root / UNIT).exists()


HOSTILE = ["../x", "/etc/x", "a/../../x", "", "a//b", ".", "a\0b", "/".join(["a"] * 3000)]


@pytest.mark.parametrize("path", HOSTILE)
def test_f52_a_path_that_leads_out_is_refused(tmp_path: Path, victim: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    ask(root, "ready", {})
    assert "error" in write(root, [(path, 0, b"x")])
    assert "error" in ask(root, "show", {"files": {path: 0}, "texts": {}})
    assert "error" in ask(root, "show", {"files": {}, "texts": {path: "x"}})
    assert call(root, "read", stdin=json.dumps([[path, 0, 1]]).encode()).returncode == 1
    assert not (root / UNIT).exists()
    if "\0" not in path:
        assert "error" in ask(root, "ready", {}, unit=path or "..")


@pytest.mark.parametrize("plant", ["link", "linked folder", "pipe"])
def test_f52_nothing_is_read_through_what_was_planted(tmp_path: Path, plant: str) -> None:
    arrive(tmp_path)
    show(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / UNIT / "a.pt").unlink()
    if plant == "link":
        (tmp_path / UNIT / "a.pt").symlink_to(secret)
    elif plant == "pipe":
        os.mkfifo(tmp_path / UNIT / "a.pt")
    else:
        (tmp_path / UNIT / "x").symlink_to(tmp_path)
    path = "x/secret" if plant == "linked folder" else "a.pt"
    done = call(tmp_path, "read", stdin=json.dumps([[path, 0, 6]]).encode())
    assert (done.returncode, b"secret" in done.stdout) == (1, False)


def test_f52_an_old_copy_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path, victim: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    arrive(root)
    (root / UNIT).symlink_to(victim)
    assert show(root) == {"shown": UNIT}
    assert tree(root / UNIT) == FILES
    assert not (root / UNIT).is_symlink()


def test_a_piece_of_no_sensible_length_is_refused(tmp_path: Path) -> None:
    ask(tmp_path, "ready", {})
    for length in (0, -1, carry.LARGEST_PIECE + 1):
        head = json.dumps({"pieces": [["a", 0, length, "0" * 64]]}).encode()
        assert "a piece of" in json.loads(call(tmp_path, "write", stdin=head + b"\n").stdout)["error"]


# F53


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB; where none can be mounted the test is skipped."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "launcher-test", place], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_f53_a_full_disk_is_told_and_the_old_copy_stays(small_disk: Path) -> None:
    arrive(small_disk)
    show(small_disk)
    big = {"a.pt": random.Random(1).randbytes(400_000)}  # noqa: S311
    assert ask(small_disk, "ready", sizes(big))["free"] < 300_000
    answer = write(small_disk, rows(big))
    assert (answer["full"], answer["error"].startswith("no space left")) == (True, True)
    assert tree(small_disk / UNIT) == FILES
    # What came is kept for a second try; when room was made, only the rest is needed.
    have = ask(small_disk, "ready", sizes(big))["have"]["a.pt"]
    assert have
    ask(small_disk, "drop", {})
    assert names(small_disk / "gathered/run") == ["step-1"]

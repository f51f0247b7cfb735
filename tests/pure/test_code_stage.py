"""The code stage against a real `sh` with real tar, in the machine's tools and in busybox's where there is one."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from cluster.command import Command, Result
from cluster.errors import CommandError, InputError, IntegrityError
from cluster.local import LocalTransport
from launcher.snapshot import take
from launcher.stages.code import CodeSent, send_code, sweep_code

Spoil = Callable[[Iterable[bytes]], Iterable[bytes]]


class Node(LocalTransport):
    """This machine, with a line that can be spoilt; counts what goes over it."""

    def __init__(self) -> None:
        super().__init__("gpu-01")
        self.spoil: Spoil = lambda chunks: chunks
        self.before_send: Callable[[], None] = lambda: None
        self.sends = 0

    def send(self, command: Command, chunks: Iterable[bytes]) -> Result:
        self.before_send()
        self.sends += 1
        return super().send(command, self.spoil(chunks))


@functools.cache
def busybox_tools(folder: Path, program: str) -> Path:
    folder.mkdir()
    for applet in subprocess.run((program, "--list"), capture_output=True, check=True, text=True).stdout.split():
        (folder / applet).symlink_to(program)
    return folder


@pytest.fixture(params=["system", "busybox"])
def node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Node:
    if request.param == "busybox":
        program = shutil.which("busybox")
        if program is None:
            pytest.skip("no busybox here: apt-get install busybox")
        monkeypatch.setenv("PATH", str(busybox_tools(tmp_path_factory.getbasetemp() / "busybox", program)))
    return Node()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "the store"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    (folder / "model" / "deep").mkdir(parents=True)
    (folder / "train.py").write_text("print('training')\n")
    (folder / "model" / "__init__.py").touch()
    (folder / "model" / "deep" / "block.py").write_text("x = 1\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "latest").symlink_to("model/deep")
    (folder / "model" / "up").symlink_to("../train.py")
    return folder


def contents(folder: Path) -> dict[str, object]:
    """Every file, link and folder below, with what it holds and its mode."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_dir():
            found[name] = oct(path.stat().st_mode & 0o777)
        else:
            found[name] = (path.read_bytes(), oct(path.stat().st_mode & 0o777))
    return found


def unfinished(store: Path) -> list[str]:
    return sorted(path.name for path in store.glob(".incoming-*"))


def write_odd(path: Path, data: bytes = b"new\n") -> None:
    """Write into a file that is read-only, as its owner can."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(mode)


def test_the_tree_on_the_node_is_the_snapshot(node: Node, code: Path, store: Path) -> None:
    snapshot = take(code)
    sent = send_code(node, snapshot, str(store))
    assert sent == CodeSent(path=f"{store}/trees/{snapshot.digest}", files_sent=3, bytes_sent=18 + 6 + 10)
    assert contents(Path(sent.path)) == {
        "latest": "model/deep",
        "model": "0o755",
        "model/__init__.py": (b"", "0o444"),
        "model/deep": "0o755",
        "model/deep/block.py": (b"x = 1\n", "0o444"),
        "model/up": "../train.py",
        "run.sh": (b"#!/bin/sh\n", "0o555"),
        "train.py": (b"print('training')\n", "0o444"),
    }
    assert take(Path(sent.path)).entries == snapshot.entries
    assert unfinished(store) == []


def test_nothing_is_sent_a_second_time(node: Node, code: Path, store: Path) -> None:
    send_code(node, take(code), str(store))
    again = send_code(node, take(code), str(store))
    assert (again.files_sent, again.bytes_sent, node.sends) == (0, 0, 1)


def test_one_changed_file_is_all_that_is_sent(node: Node, code: Path, store: Path) -> None:
    first = send_code(node, take(code), str(store))
    (code / "train.py").write_text("changed\n")
    second = send_code(node, take(code), str(store))
    assert (second.files_sent, second.bytes_sent) == (1, 8)
    assert Path(second.path, "train.py").read_text() == "changed\n"
    assert Path(first.path, "train.py").read_text() == "print('training')\n"
    assert Path(first.path, "run.sh").stat().st_ino == Path(second.path, "run.sh").stat().st_ino


def test_a_file_that_moved_or_came_twice_is_sent_once(node: Node, code: Path, store: Path) -> None:
    (code / "copy.py").write_text("print('training')\n")
    assert send_code(node, take(code), str(store)).files_sent == 3
    (code / "train.py").rename(code / "moved.py")
    assert send_code(node, take(code), str(store)).files_sent == 0


def test_the_executable_bit_makes_another_blob(node: Node, code: Path, store: Path) -> None:
    first = send_code(node, take(code), str(store))
    (code / "train.py").chmod(0o755)
    second = send_code(node, take(code), str(store))
    assert Path(second.path, "train.py").stat().st_mode & 0o777 == 0o555
    assert Path(first.path, "train.py").stat().st_mode & 0o777 == 0o444


ODD_NAMES = [
    b"with space",
    b"'quote' \"double\"",
    b"$(touch pwned) `id`",
    "größe-日本語".encode(),
    b"-rf",
    b"--help",
    b"*",
    b"back\\slash\\n",
    b"two\nlines",
    b"\xff\xfe not utf-8",
    b"a..b",
    b"~",
    b"#hash",
    b"n" * 250,
    b"/".join([b"d" * 90] * 4),
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_arrive_byte_for_byte(node: Node, tmp_path: Path, store: Path, name: bytes) -> None:
    code = tmp_path / "odd"
    file = code / os.fsdecode(name)
    file.parent.mkdir(parents=True)
    file.write_text("odd\n")
    (code / "link").symlink_to(os.fsdecode(name))
    snapshot = take(code)
    sent = send_code(node, snapshot, str(store))
    assert take(Path(sent.path)).entries == snapshot.entries
    assert send_code(node, snapshot, str(store)).files_sent == 0
    assert node.sends == 1


def test_an_empty_folder_is_an_empty_tree(node: Node, tmp_path: Path, store: Path) -> None:
    (tmp_path / "empty").mkdir()
    sent = send_code(node, take(tmp_path / "empty"), str(store))
    assert contents(Path(sent.path)) == {}


def test_a_strict_umask_does_not_hide_the_code_from_the_container(node: Node, code: Path, store: Path) -> None:
    before = os.umask(0o077)
    try:
        sent = send_code(node, take(code), str(store))
    finally:
        os.umask(before)
    assert Path(sent.path).stat().st_mode & 0o777 == 0o755
    assert Path(sent.path, "train.py").stat().st_mode & 0o777 == 0o444


# --- transfers that go wrong ---------------------------------------------------------------------------------------


class Cut(Exception):
    """The line went dead."""


def cut_after(count: int) -> Spoil:
    """End the stream without a word after so many bytes, as a dead connection does."""

    def spoil(chunks: Iterable[bytes]) -> Iterator[bytes]:
        yield b"".join(chunks)[:count]

    return spoil


@pytest.mark.parametrize("count", [0, 300, 512, 1024, 2048, 3072, 3584, 4096, 4608, 5000])
def test_a_stream_that_ends_early_leaves_no_tree(node: Node, code: Path, store: Path, count: int) -> None:
    node.spoil = cut_after(count)
    with pytest.raises((CommandError, IntegrityError)):
        send_code(node, take(code), str(store))
    assert list((store / "trees").iterdir()) == []
    assert list((store / "blobs").iterdir()) == []
    node.spoil = lambda chunks: chunks
    sent = send_code(node, take(code), str(store))
    assert take(Path(sent.path)).entries == take(code).entries


def test_a_connection_that_dies_leaves_no_tree_and_the_next_transfer_works(node: Node, code: Path, store: Path) -> None:
    (code / "large.bin").write_bytes(os.urandom(3 * 2**20))

    def spoil(chunks: Iterable[bytes]) -> Iterator[bytes]:
        yield next(iter(chunks))
        raise Cut

    node.spoil = spoil
    with pytest.raises(Cut):
        send_code(node, take(code), str(store))
    assert list(store.glob("trees/*")) == []
    assert unfinished(store) == []
    node.spoil = lambda chunks: chunks
    assert send_code(node, take(code), str(store)).files_sent == 4


def test_a_leftover_is_swept_after_a_day_and_not_before(node: Node, code: Path, store: Path) -> None:
    for name, age in ((".incoming-old", 90_000), (".incoming-new", 60)):
        (store / name / "blobs").mkdir(parents=True)
        then = store.stat().st_mtime - age
        os.utime(store / name, (then, then))
    send_code(node, take(code), str(store))
    assert unfinished(store) == [".incoming-new"]


def test_a_bit_that_flips_on_the_way_is_an_integrity_error(node: Node, code: Path, store: Path) -> None:
    (code / "train.py").write_bytes(b"MARK" * 1000)
    node.spoil = lambda chunks: (chunk.replace(b"MARKMARK", b"MARKMARX", 1) for chunk in chunks)
    with pytest.raises(IntegrityError) as caught:
        send_code(node, take(code), str(store))
    name = hashlib.sha256(b"MARK" * 1000).hexdigest()
    assert str(caught.value) == (
        "node gpu-01: the code arrived damaged; nothing of it was kept\n"
        f"  blobs/{name}: FAILED\n"
        f"  next: run it again; if it stays, check the memory and the disk behind {store}"
    )
    assert list((store / "blobs").iterdir()) == []
    assert list((store / "trees").iterdir()) == []


def test_a_file_that_changes_between_the_look_and_the_sending_is_refused(node: Node, code: Path, store: Path) -> None:
    snapshot = take(code)
    (code / "train.py").write_text("print('TRAINING')\n")
    with pytest.raises(InputError) as caught:
        send_code(node, snapshot, str(store))
    assert str(caught.value) == (
        f"{code}: train.py changed while it was sent\n"
        "  next: start again when nothing writes into the working directory, "
        "or name the file in .launcherignore if it is not code"
    )
    assert list(store.glob("trees/*")) == []


@pytest.mark.parametrize("change", ["gone", "shorter", "link", "fifo"])
def test_a_file_that_is_no_longer_the_same_thing_is_refused(node: Node, code: Path, store: Path, change: str) -> None:
    snapshot = take(code)
    file = code / "train.py"
    file.unlink()
    if change == "shorter":
        file.write_text("p")
    elif change == "link":
        (code / "other.py").write_text("print('training')\n")
        file.symlink_to("other.py")
    elif change == "fifo":
        os.mkfifo(file)
    with pytest.raises(InputError, match=r"train\.py changed while it was sent"):
        send_code(node, snapshot, str(store))


def test_a_store_that_cannot_be_made_is_named(node: Node, code: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match="the code could not be put into") as caught:
        send_code(node, take(code), str(tmp_path / "file" / "store"))
    assert caught.value.node == "gpu-01"
    assert "file" in caught.value.detail[-1]


@pytest.mark.parametrize(
    ("says", "what"),
    [
        ("Cannot write: No space left on device", "the disk that holds {store} is full"),
        ("Wrote only 5120 of 10240 bytes", "the disk that holds {store} is full"),
        ("Cannot write: Disk quota exceeded", "the disk quota for {store} is used up"),
    ],
)
def test_a_full_disk_is_called_that(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, what: str
) -> None:
    store = tmp_path / "store"
    (tmp_path / "tar").write_text(f"#!/bin/sh\necho 'tar: blobs/0: {says}' >&2\nexit 2\n")
    (tmp_path / "tar").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CommandError) as caught:
        send_code(Node(), take(code), str(store))
    assert str(caught.value) == (
        f"node gpu-01: {what.format(store=store)}\n"
        f"  tar: blobs/0: {says}\n"
        "  next: make room there, or set another store"
    )
    assert [*store.glob("trees/*"), *store.glob("blobs/*"), *store.glob(".incoming-*")] == []


def test_two_senders_at_once_both_find_it_whole(node: Node, code: Path, store: Path) -> None:
    snapshot = take(code)
    meet = threading.Barrier(2)
    results: list[CodeSent | BaseException] = []

    def go(mine: Node) -> None:
        mine.before_send = lambda: None if mine.sends else (meet.wait(30), None)[1]
        try:
            results.append(send_code(mine, snapshot, str(store)))
        except BaseException as error:  # noqa: BLE001
            results.append(error)

    threads = [threading.Thread(target=go, args=(Node(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(result) for result in results] == [CodeSent, CodeSent]
    tree = store / "trees" / snapshot.digest
    assert take(tree).entries == snapshot.entries
    assert [path.name for path in (store / "trees").iterdir()] == [snapshot.digest]
    assert unfinished(store) == []


def test_a_sender_whose_tree_was_finished_by_another_leaves_that_one_alone(node: Node, code: Path, store: Path) -> None:
    snapshot = take(code)
    other = Node()
    node.before_send = lambda: (send_code(other, snapshot, str(store)), None)[1]
    sent = send_code(node, snapshot, str(store))
    assert (other.sends, node.sends) == (1, 1)
    assert take(Path(sent.path)).entries == snapshot.entries


def test_a_blob_that_was_swept_after_the_look_is_sent(node: Node, code: Path, store: Path) -> None:
    send_code(node, take(code), str(store))
    (code / "new.py").write_text("new\n")
    snapshot = take(code)
    blob = store / "blobs" / hashlib.sha256(b"x = 1\n").hexdigest()
    node.before_send = lambda: blob.unlink(missing_ok=True) if node.sends == 1 else None
    sent = send_code(node, snapshot, str(store))
    assert take(Path(sent.path)).entries == snapshot.entries
    assert node.sends == 3


def test_a_tool_that_is_missing_is_no_damage(
    code: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "cat", "mkdir", "rm", "find", "tar", "gzip", "grep", "mv", "ls", "sort", "uniq"):
        (tools / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(CommandError) as caught:
        send_code(Node(), take(code), str(store))
    assert caught.value.what == "a tool is missing on the node"
    assert "sha256sum" in caught.value.detail[-1]
    assert list(store.glob("trees/*")) == []


# --- a node that was touched ---------------------------------------------------------------------------------------


def edit_in_place(tree: Path) -> None:
    write_odd(tree / "train.py")


def edit_by_another_file(tree: Path) -> None:
    (tree / "new").write_text("new\n")
    (tree / "new").replace(tree / "train.py")


def add(tree: Path) -> None:
    (tree / "model" / "extra.py").write_text("")


def remove(tree: Path) -> None:
    (tree / "model" / "deep" / "block.py").unlink()


@pytest.mark.parametrize("touch", [edit_in_place, edit_by_another_file, add, remove])
def test_a_tree_that_was_edited_on_the_node_is_made_anew(
    node: Node, code: Path, store: Path, touch: Callable[[Path], None]
) -> None:
    snapshot = take(code)
    tree = Path(send_code(node, snapshot, str(store)).path)
    touch(tree)
    for path in tree.rglob("*.py"):
        if path.read_bytes() == b"new\n":
            age(path, -2)  # busybox compares whole seconds
    again = send_code(node, snapshot, str(store))
    assert take(tree).entries == snapshot.entries
    assert again.files_sent == (1 if touch is edit_in_place else 0)
    assert send_code(node, snapshot, str(store)).files_sent == 0
    assert node.sends == 2


def test_compiled_python_beside_the_code_is_no_edit(node: Node, code: Path, store: Path) -> None:
    tree = Path(send_code(node, take(code), str(store)).path)
    (tree / "model" / "__pycache__").mkdir()
    (tree / "model" / "__pycache__" / "block.pyc").write_text("")
    send_code(node, take(code), str(store))
    assert node.sends == 1


def test_after_a_reboot_the_blobs_are_checked_once(node: Node, code: Path, store: Path) -> None:
    snapshot = take(code)
    send_code(node, snapshot, str(store))
    (store / "boot").write_text("another boot\n")
    send_code(node, snapshot, str(store))
    assert node.sends == 1
    assert (store / "boot").read_text() == Path("/proc/sys/kernel/random/boot_id").read_text()


def test_a_blob_lost_in_a_power_cut_is_sent_again(node: Node, code: Path, store: Path) -> None:
    snapshot = take(code)
    tree = Path(send_code(node, snapshot, str(store)).path)
    times = (tree / "train.py").stat()
    write_odd(tree / "train.py", b"")
    os.utime(tree / "train.py", ns=(times.st_atime_ns, times.st_mtime_ns))
    (store / "boot").write_text("another boot\n")
    assert send_code(node, snapshot, str(store)).files_sent == 1
    assert take(tree).entries == snapshot.entries


# --- sweeping ------------------------------------------------------------------------------------------------------


def age(path: Path, seconds: int) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_the_sweep_keeps_the_last_used_and_those_in_use(node: Node, code: Path, store: Path) -> None:
    digests: list[str] = []
    for number in range(5):
        (code / "train.py").write_text(f"number {number}\n")
        digests.append(take(code).digest)
        send_code(node, take(code), str(store))
    for number, digest in enumerate(digests):
        age(store / "stamps" / digest, (5 - number) * 1000)
    for blob in (store / "blobs").iterdir():
        age(blob, 100_000)
    gone = sweep_code(node, str(store), in_use={digests[0]}, keep=2)
    assert set(gone) == {digests[1], digests[2]}
    assert {path.name for path in (store / "trees").iterdir()} == {digests[0], digests[3], digests[4]}
    kept = {hashlib.sha256(f"number {number}\n".encode()).hexdigest() for number in (0, 3, 4)}
    dropped = {hashlib.sha256(f"number {number}\n".encode()).hexdigest() for number in (1, 2)}
    assert kept <= {path.name for path in (store / "blobs").iterdir()}
    assert not dropped & {path.name for path in (store / "blobs").iterdir()}
    assert sweep_code(node, str(store), in_use={digests[0]}, keep=2) == ()


def test_the_sweep_leaves_files_that_came_today(node: Node, code: Path, store: Path) -> None:
    send_code(node, take(code), str(store))
    blobs = sorted((store / "blobs").iterdir())
    assert len(sweep_code(node, str(store), keep=0)) == 1
    assert sorted((store / "blobs").iterdir()) == blobs
    assert send_code(node, take(code), str(store)).files_sent == 0


def test_sweeping_where_nothing_was_sent_does_nothing(node: Node, store: Path) -> None:
    assert sweep_code(node, str(store)) == ()
    assert not store.exists()

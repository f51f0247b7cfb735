"""What a snapshot holds, from real folders and real git."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from cluster.errors import InputError
from launcher.snapshot import Entry, Snapshot, make_digest, pick, read_again, take


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "protocol.file.allow=always")
    subprocess.run(("git", *identity, *arguments), cwd=folder, check=True, capture_output=True)


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")


def paths(snapshot: Snapshot) -> list[str]:
    return [entry.path for entry in snapshot.entries]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    return folder


@pytest.fixture(params=["git", "no git"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Both ways of finding out give the same answer."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if request.param == "git":
        git(folder, "init", "-q")
    return folder


# --- what is code --------------------------------------------------------------------------------------------------


def test_a_snapshot_is_names_contents_and_executable_bits(plain: Path) -> None:
    (plain / "b").mkdir()
    (plain / "b" / "run.sh").write_text("hello\n")
    (plain / "b" / "run.sh").chmod(0o755)
    (plain / "a.py").write_text("hello\n")
    (plain / "link").symlink_to("b/run.sh")
    (plain / "empty").mkdir()
    content = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    entries = (
        Entry(path="a.py", kind="file", content=content, size=6),
        Entry(path="b/run.sh", kind="file", content=content, size=6, executable=True),
        Entry(path="link", kind="link", content="b/run.sh"),
    )
    assert take(plain) == Snapshot(root=plain, entries=entries, digest=make_digest(entries), bytes=12, skipped=())


def test_ignored_files_are_left_out(folder: Path) -> None:
    write(folder, "train.py", "a.log", "keep.log", "out/x", "deep/out/y", "deep/a.log", "docs/a.txt", "docs/b/c.txt")
    (folder / ".gitignore").write_text("*.log\n!keep.log\n/out/\ndocs/**/c.txt\n# comment\n")
    assert paths(take(folder)) == [".gitignore", "deep/out/y", "docs/a.txt", "keep.log", "train.py"]


def test_a_nearer_gitignore_wins(folder: Path) -> None:
    write(folder, "a.bin", "deep/a.bin", "deep/b.bin", "deep/er/b.bin")
    (folder / ".gitignore").write_text("*.bin\n")
    (folder / "deep" / ".gitignore").write_text("!b.bin\n/er\n")
    assert paths(take(folder)) == [".gitignore", "deep/.gitignore", "deep/b.bin"]


def test_nothing_under_an_ignored_folder_comes_back(folder: Path) -> None:
    write(folder, "data/keep.txt", "train.py")
    (folder / ".gitignore").write_text("data/\n!data/keep.txt\n")
    assert paths(take(folder)) == [".gitignore", "train.py"]


def test_a_gitignore_with_windows_line_ends_and_a_mark_is_read_as_git_does(folder: Path) -> None:
    write(folder, "a.log", "train.py")
    (folder / ".gitignore").write_bytes(b"\xef\xbb\xbf*.log\r\n")
    assert paths(take(folder)) == [".gitignore", "train.py"]


def test_launcherignore_leaves_out_more(folder: Path) -> None:
    write(folder, "train.py", "notes/a.md", "notes/b.md", "weights.bin", "deep/weights.bin", "deep/small.bin")
    (folder / ".launcherignore").write_text("notes/\n*.bin\n!small.bin\n")
    assert paths(take(folder)) == [".launcherignore", "deep/small.bin", "train.py"]


def test_launcherignore_leaves_out_what_git_tracks(checkout: Path) -> None:
    write(checkout, "train.py", "weights.bin", "notes/a.md")
    git(checkout, "add", "-A")
    write(checkout, ".launcherignore")
    (checkout / ".launcherignore").write_text("*.bin\n/notes\n")
    assert paths(take(checkout)) == [".launcherignore", "train.py"]


def test_caches_and_environments_are_never_code(folder: Path) -> None:
    write(folder, "train.py", "__pycache__/a.pyc", "b/__pycache__/c.py", "old.pyc", ".mypy_cache/x", "node_modules/y")
    write(folder, ".venv/pyvenv.cfg", ".venv/bin/python", "my-env/pyvenv.cfg", "my-env/lib/z.py", "venv/ours.py")
    write(folder, "conda/conda-meta/history", "conda/bin/python")
    (folder / "env").symlink_to("my-env")
    assert paths(take(folder)) == ["train.py", "venv/ours.py"]


def test_a_folder_that_looks_like_a_checkout_but_is_none_is_walked(plain: Path) -> None:
    write(plain, ".git/HEAD", "train.py", "a.log")
    (plain / ".gitignore").write_text("*.log\n")
    snapshot = take(plain)
    assert paths(snapshot) == [".gitignore", "train.py"]
    assert snapshot.skipped == (
        f"git could not list {plain} (fatal: not a git repository (or any of the parent directories): .git); "
        "the .gitignore files were read instead",
    )


def test_without_git_the_gitignore_files_are_read(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(checkout, "train.py", "a.log")
    (checkout / ".gitignore").write_text("*.log\n")
    monkeypatch.setenv("PATH", "/nowhere")
    snapshot = take(checkout)
    assert paths(snapshot) == [".gitignore", "train.py"]
    assert snapshot.skipped == (
        f"git could not list {checkout} (git: No such file or directory); the .gitignore files were read instead",
    )


# --- git -----------------------------------------------------------------------------------------------------------


def test_tracked_files_are_code_even_when_ignored(checkout: Path) -> None:
    write(checkout, "train.py", "kept.log", "other.log")
    git(checkout, "add", "-f", "kept.log")
    (checkout / ".gitignore").write_text("*.log\n")
    assert paths(take(checkout)) == [".gitignore", "kept.log", "train.py"]


def test_a_tracked_file_that_was_deleted_is_not_there(checkout: Path) -> None:
    write(checkout, "train.py", "old.py", "gone/a.py")
    git(checkout, "add", "-A")
    (checkout / "old.py").unlink()
    (checkout / "gone" / "a.py").unlink()
    (checkout / "gone").rmdir()
    assert paths(take(checkout)) == ["train.py"]


def test_the_working_tree_counts_and_not_the_index(checkout: Path) -> None:
    write(checkout, "train.py")
    git(checkout, "add", "-A")
    (checkout / "train.py").write_text("changed\n")
    assert take(checkout).bytes == 8


def test_a_tracked_folder_that_became_a_link_is_a_link(checkout: Path) -> None:
    write(checkout, "real/a.py", "moved/a.py")
    git(checkout, "add", "-A")
    (checkout / "moved" / "a.py").unlink()
    (checkout / "moved").rmdir()
    (checkout / "moved").symlink_to("real")
    assert paths(take(checkout)) == ["moved", "real/a.py"]


def test_a_tracked_file_that_became_a_folder_is_its_files(checkout: Path) -> None:
    write(checkout, "model")
    git(checkout, "add", "-A")
    (checkout / "model").unlink()
    write(checkout, "model/block.py")
    assert paths(take(checkout)) == ["model/block.py"]


def test_a_file_in_conflict_is_there_once(checkout: Path) -> None:
    write(checkout, "train.py")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "one")
    git(checkout, "checkout", "-qb", "other")
    (checkout / "train.py").write_text("other\n")
    git(checkout, "commit", "-qam", "two")
    git(checkout, "checkout", "-q", "-")
    (checkout / "train.py").write_text("mine\n")
    git(checkout, "commit", "-qam", "three")
    with pytest.raises(subprocess.CalledProcessError):
        git(checkout, "merge", "other")
    assert paths(take(checkout)) == ["train.py"]


def test_a_folder_within_a_checkout_is_only_that_folder(checkout: Path) -> None:
    write(checkout, "top.py", "jobs/train.py", "jobs/a.log", "jobs/deep/b.py")
    (checkout / ".gitignore").write_text("*.log\n")
    assert paths(take(checkout / "jobs")) == ["deep/b.py", "train.py"]


def test_a_folder_that_the_checkout_around_it_ignores_is_walked(checkout: Path) -> None:
    (checkout / ".gitignore").write_text("scratch/\n")
    write(checkout, "scratch/train.py", "scratch/a.log")
    (checkout / "scratch" / ".gitignore").write_text("*.log\n")
    assert paths(take(checkout / "scratch")) == [".gitignore", "train.py"]


def test_an_empty_checkout_is_an_empty_snapshot(checkout: Path) -> None:
    assert paths(take(checkout)) == []


def test_submodules_and_checkouts_within_are_code(checkout: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    write(library, "lib.py")
    git(library, "init", "-q")
    git(library, "add", "-A")
    git(library, "commit", "-qm", "one")
    git(checkout, "submodule", "--quiet", "add", str(library), "third/library")
    write(checkout, "third/library/new.py", "third/library/a.log", "train.py")
    (checkout / "third" / "library" / ".gitignore").write_text("*.log\n")
    write(checkout, "nested/inner.py")
    git(checkout / "nested", "init", "-q")
    assert paths(take(checkout)) == [
        ".gitmodules",
        "nested/inner.py",
        "third/library/.gitignore",
        "third/library/lib.py",
        "third/library/new.py",
        "train.py",
    ]


def test_a_submodule_that_is_not_checked_out_is_noted(checkout: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    write(library, "lib.py")
    git(library, "init", "-q")
    git(library, "add", "-A")
    git(library, "commit", "-qm", "one")
    git(checkout, "submodule", "--quiet", "add", str(library), "library")
    git(checkout, "submodule", "--quiet", "deinit", "-f", "library")
    snapshot = take(checkout)
    assert paths(snapshot) == [".gitmodules"]
    assert snapshot.skipped == ("library is a submodule that is not checked out; git submodule update --init fills it",)


def test_a_git_hook_that_starts_us_does_not_lead_us_astray(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(checkout, "train.py")
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert paths(take(checkout)) == ["train.py"]


# --- names, links and other things ---------------------------------------------------------------------------------

ODD_NAMES = [
    b"a b",
    b"'\"",
    b"$(id)",
    "größe".encode(),
    b"-rf",
    b"*",
    b"two\nlines",
    b"\xff\xfe",
    b"back\\slash",
    b"#x",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_kept_byte_for_byte(folder: Path, name: bytes) -> None:
    (folder / os.fsdecode(name)).write_text("x")
    (folder / ".gitignore").write_text("*.log\n")
    (folder / ".launcherignore").write_text("*.bin\n")
    assert [os.fsencode(path) for path in paths(take(folder))] == sorted([b".gitignore", b".launcherignore", name])


def test_links_within_stay_links(folder: Path) -> None:
    write(folder, "a/b/file.py")
    (folder / "up").symlink_to("a/b")
    (folder / "a" / "c").symlink_to("./b/../b/file.py")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "a" / "itself").symlink_to("itself")
    snapshot = take(folder)
    assert {entry.path: entry.content for entry in snapshot.entries if entry.kind == "link"} == {
        "up": "a/b",
        "a/c": "./b/../b/file.py",
        "dangling": "nowhere",
        "a/itself": "itself",
    }
    assert snapshot.skipped == ("dangling links to nowhere, which is not part of the snapshot",)


def test_links_that_come_back_by_a_way_outside_are_made_short(folder: Path) -> None:
    write(folder, "a/file.py")
    (folder / "absolute").symlink_to(folder / "a" / "file.py")
    (folder / "a" / "around").symlink_to(f"../../{folder.name}/a/file.py")
    links = {entry.path: entry.content for entry in take(folder).entries if entry.kind == "link"}
    assert links == {"absolute": "a/file.py", "a/around": "file.py"}


def test_a_link_to_something_left_out_is_noted(folder: Path) -> None:
    write(folder, "out/x")
    (folder / ".gitignore").write_text("out/\n")
    (folder / "latest").symlink_to("out")
    assert take(folder).skipped == ("latest links to out, which is not part of the snapshot",)


def test_a_link_that_leads_out_is_refused(folder: Path) -> None:
    (folder / "data").symlink_to("/mnt/data")
    (folder / "up").symlink_to("..")
    with pytest.raises(InputError) as caught:
        take(folder)
    assert str(caught.value) == (
        f"{folder}: links that lead out of the working directory would lead nowhere on a node\n"
        "  data -> /mnt/data\n"
        "  up -> ..\n"
        "  next: name them in .launcherignore; copy in what is code, and mount what is data"
    )
    (folder / ".launcherignore").write_text("/data\n/up\n")
    assert paths(take(folder)) == [".launcherignore"]


def test_special_files_are_left_out_with_a_note(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(plain, "train.py")
    os.mkfifo(plain / "pipe")
    monkeypatch.chdir(plain)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("door")
        snapshot = take(plain)
    assert paths(snapshot) == ["train.py"]
    assert snapshot.skipped == ("door is a socket; it was left out", "pipe is a FIFO; it was left out")


def test_a_file_that_cannot_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        folder.chmod(0o755)
        write(folder, "secret.key")
        (folder / "secret.key").chmod(0)
        before = os.geteuid()
        if before == 0:  # root reads everything
            os.seteuid(65534)
        try:
            with pytest.raises(InputError) as caught:
                take(folder)
        finally:
            os.seteuid(before)
    assert str(caught.value) == (
        f"{folder}/secret.key: cannot be read: Permission denied\n"
        "  next: make it readable, or name it in .launcherignore"
    )


def test_a_working_directory_that_is_none_is_refused(plain: Path) -> None:
    with pytest.raises(InputError, match="the working directory is not a folder"):
        take(plain / "nowhere")


# --- digest and size -----------------------------------------------------------------------------------------------


def test_the_digest_is_of_contents_and_not_of_times_or_places(plain: Path, tmp_path: Path) -> None:
    write(plain, "train.py", "a/b.py")
    first = take(plain).digest
    os.utime(plain / "train.py", (1, 1))
    (plain / "train.py").chmod(0o600)
    (plain / "new-folder").mkdir()
    assert take(plain).digest == first
    plain.rename(tmp_path / "elsewhere")
    assert take(tmp_path / "elsewhere").digest == first


def test_every_change_that_a_job_could_see_changes_the_digest(plain: Path) -> None:
    write(plain, "train.py", "b.py")
    (plain / "link").symlink_to("train.py")
    seen = [take(plain).digest]
    (plain / "train.py").chmod(0o755)
    seen.append(take(plain).digest)
    (plain / "train.py").write_text("changed")
    seen.append(take(plain).digest)
    (plain / "train.py").rename(plain / "main.py")
    seen.append(take(plain).digest)
    (plain / "link").unlink()
    (plain / "link").symlink_to("b.py")
    seen.append(take(plain).digest)
    (plain / "b.py").unlink()
    seen.append(take(plain).digest)
    assert len(set(seen)) == len(seen)


def test_too_much_is_refused_with_the_largest_and_the_cures(folder: Path) -> None:
    write(folder, "train.py")
    for number in range(3):
        (folder / "images" / str(number)).mkdir(parents=True)
        (folder / "images" / str(number) / "x.png").write_bytes(b"x" * 20_000)
    (folder / "data" / "raw").mkdir(parents=True)
    (folder / "data" / "raw" / "tokens.bin").write_bytes(b"x" * 900_000)
    (folder / "data" / "read me").write_bytes(b"x" * 100)
    for name in "abc":
        (folder / name).write_bytes(b"x" * (1000 + ord(name)))
    with pytest.raises(InputError) as caught:
        take(folder, limit_bytes=500_000)
    assert str(caught.value) == (
        f"{folder}: the code to send is 940.8 KiB in 9 files; the limit is 488.3 KiB\n"
        "  878.9 KiB  data/raw/tokens.bin\n"
        "   58.6 KiB  images/\n"
        "    1.1 KiB  c\n"
        "    1.1 KiB  b\n"
        "    1.1 KiB  a\n"
        "  next: name what is not code in .launcherignore (gitignore syntax), or raise --snapshot-limit"
    )


def test_exactly_the_limit_is_allowed(plain: Path) -> None:
    (plain / "a").write_bytes(b"x" * 100)
    assert take(plain, limit_bytes=100).bytes == 100


def test_the_bytes_that_are_read_again_are_the_bytes_of_the_snapshot(plain: Path) -> None:
    (plain / "log.py").write_text("first\n")
    snapshot = take(plain)
    (plain / "log.py").write_text("first\nand more\n")
    assert b"".join(read_again(plain, snapshot.entries[0])) == b"first\n"
    (plain / "log.py").write_text("other\n")
    with pytest.raises(InputError, match=r"log\.py changed while it was sent"):
        list(read_again(plain, snapshot.entries[0]))


def test_files_that_are_picked_are_taken_whatever_git_ignores(checkout: Path) -> None:
    write(checkout, "b.py", "a.py", "c.py")
    (checkout / ".gitignore").write_text("*\n")
    picked = pick(checkout, ("b.py", "a.py"))
    assert (paths(picked), picked.bytes, picked.skipped) == (["a.py", "b.py"], 10, ())
    assert b"".join(read_again(picked.root, picked.entries[0])) == b"a.py\n"
    (checkout / ".gitignore").write_text("c.py\n.gitignore\n")
    assert take(checkout).digest == picked.digest


def test_a_file_that_is_picked_must_be_there(plain: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.py"):
        pick(plain, ("nothing.py",))

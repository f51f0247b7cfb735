"""What the job's code is: the working directory as a value, by content. Reads it; sends nothing anywhere.

Inside a git checkout the code is what git tracks plus what it neither tracks nor ignores, submodules included;
elsewhere it is every file that the `.gitignore` files on the way down do not name. `.launcherignore` in the working
directory (gitignore syntax) leaves out more, also tracked files. Names are kept byte for byte, whatever they hold;
times, owners and empty folders are not kept.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pathspec import GitIgnoreSpec

from cluster.errors import InputError

LIMIT_BYTES = 100 * 2**20
IGNORE_FILE = ".launcherignore"
READ_BYTES = 2**20

# Never code, in any folder, tracked or not. Virtual environments are known by what they hold, see `Sieve`.
NEVER = frozenset(
    {
        ".git",
        ".hg",
        ".svn",
        ".DS_Store",
        ".hypothesis",
        ".ipynb_checkpoints",
        ".mypy_cache",
        ".nox",
        ".pytest_cache",
        ".ruff_cache",
        ".tox",
        "__pycache__",
        "node_modules",
    }
)
ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta")

# Set by git for the programs it starts (a hook, `git rebase --exec`); they would name another checkout.
GIT_LOCAL = frozenset(
    {
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_COMMON_DIR",
        "GIT_DIR",
        "GIT_INDEX_FILE",
        "GIT_NAMESPACE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_PREFIX",
        "GIT_WORK_TREE",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file or symbolic link. `content` is a file's SHA-256, or a link's target.

    `path` is relative to the root, with `/`; bytes that are not UTF-8 are surrogate escapes (`os.fsencode` undoes it).
    """

    path: str
    kind: Literal["file", "link"]
    content: str
    size: int = 0
    executable: bool = False

    @property
    def blob(self) -> str:
        """The name under which a node keeps this content; empty where there is none to keep (a link, no bytes)."""
        if self.kind == "link" or not self.size:
            return ""
        return self.content + "x" if self.executable else self.content


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The code of a job at one moment. Equal digests mean the same names, bytes, links and executable bits."""

    root: Path
    entries: tuple[Entry, ...]  # sorted by the bytes of their paths
    digest: str
    bytes: int
    skipped: tuple[str, ...]  # notes for the user: what was left out, and why

    def __hash__(self) -> int:
        return hash(self.digest)


def take(folder: Path, *, limit_bytes: int = LIMIT_BYTES) -> Snapshot:
    """Read a working directory; `InputError` when it is too large, holds links that lead out, or cannot be read."""
    root = folder.resolve()
    if not root.is_dir():
        raise InputError("the working directory is not a folder", where=str(folder))
    found = _look(root)
    links, notes = _read_links(root, found)
    _guard(root, found.files, limit_bytes)
    entries = (*links, *(_read_file(root, path) for path in found.files))
    ordered = tuple(sorted(entries, key=lambda entry: os.fsencode(entry.path)))
    return Snapshot(
        root=root,
        entries=ordered,
        digest=make_digest(ordered),
        bytes=sum(entry.size for entry in ordered),
        skipped=(*found.notes, *notes),
    )


def pick(folder: Path, names: Iterable[str]) -> Snapshot:
    """These files of a folder and no others, whatever git or an ignore file thinks of them."""
    root = folder.resolve()
    entries = tuple(_read_file(root, name) for name in sorted(names, key=os.fsencode))
    size = sum(entry.size for entry in entries)
    return Snapshot(root=root, entries=entries, digest=make_digest(entries), bytes=size, skipped=())


def make_digest(entries: Iterable[Entry]) -> str:
    """The SHA-256 of names, kinds, executable bits and contents, in order."""
    digest = hashlib.sha256(b"launcher snapshot 1\n")
    for entry in entries:
        fields = (entry.kind, "x" if entry.executable else "-", entry.path, entry.content)
        # No name or link target holds NUL, so no two lists share these bytes.
        digest.update(b"\0".join(os.fsencode(field) for field in fields) + b"\0\0")
    return digest.hexdigest()


def read_again(root: Path, entry: Entry) -> Iterator[bytes]:
    """The bytes of a file, exactly as many as the snapshot saw; `InputError` when they are not the same any more."""
    changed = InputError(
        f"{show(entry.path)} changed while it was sent",
        where=str(root),
        next_step="start again when nothing writes into the working directory, "
        f"or name the file in {IGNORE_FILE} if it is not code",
    )
    digest = hashlib.sha256()
    left = entry.size
    try:
        # A file that has become a link or a FIFO is neither followed nor waited for.
        descriptor = os.open(root / entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            while left and (chunk := file.read(min(left, READ_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise changed from error
    if left or digest.hexdigest() != entry.content:
        raise changed


def show(path: str) -> str:
    """A path for the eyes: unprintable characters and bytes that are not UTF-8 are escaped."""
    return path if path.isprintable() else ascii(path)


def show_bytes(count: int) -> str:
    """A size for the eyes."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:  # noqa: PLR2004
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


# --- what is there -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What the working directory holds: regular files with their sizes, symbolic links, and notes."""

    files: dict[str, int]
    links: tuple[str, ...]
    notes: tuple[str, ...]


def _look(root: Path) -> _Found:
    sieve = Sieve(root)
    paths, notes = _git_paths(root)
    candidates = sieve.walk() if paths is None else (path for path in sorted(paths) if sieve.keeps(path))
    files: dict[str, int] = {}
    links: list[str] = []
    for path in candidates:
        seen = _lstat(root / path)
        if seen is None:
            continue  # tracked and deleted: the job sees what the user sees
        if stat.S_ISREG(seen.st_mode):
            files[path] = seen.st_size
        elif stat.S_ISLNK(seen.st_mode):
            links.append(path)
        elif not stat.S_ISDIR(seen.st_mode):
            notes.append(f"{show(path)} is {_special(seen.st_mode)}; it was left out")
    return _Found(files=files, links=tuple(links), notes=tuple(notes))


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _special(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot be read: {error.strerror}",
        where=show(str(path)),
        next_step=f"make it readable, or name it in {IGNORE_FILE}",
    )


def _git_paths(root: Path) -> tuple[set[str] | None, list[str]]:
    """What git calls the content of `root`, or None where git has no say; and notes."""
    if not any((above / ".git").exists() for above in (root, *root.parents)):
        return None, []
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if isinstance(listed, str):
        return None, [f"git could not list {root} ({listed}); the .gitignore files were read instead"]
    names = {os.fsdecode(name).rstrip("/") for name in listed.split(b"\0") if name}
    if not names and isinstance(_git(root, "check-ignore", "-q", "."), bytes):
        return None, []  # a working directory that the checkout around it ignores: not that checkout's content
    paths: set[str] = set()
    notes: list[str] = []
    for name in names:
        if not _is_folder(root / name):
            paths.add(name)
            continue
        inner, said = _submodule(root / name, name)
        paths |= inner
        notes += said
    return paths, notes


def _is_folder(path: Path) -> bool:
    seen = _lstat(path)
    return seen is not None and stat.S_ISDIR(seen.st_mode)


def _submodule(folder: Path, name: str) -> tuple[set[str], list[str]]:
    """The content of a checkout within the checkout; git names only its folder."""
    if not (folder / ".git").exists():
        if any(folder.iterdir()):
            return set(), []  # a file that has become a folder: git lists its files by themselves
        return set(), [f"{show(name)} is a submodule that is not checked out; git submodule update --init fills it"]
    inner, notes = _git_paths(folder)
    if inner is None:
        inner = set(Sieve(folder).walk())
    return {f"{name}/{path}" for path in inner}, notes


def _git(root: Path, *arguments: str) -> bytes | str:
    """What git answered, or as text why it did not."""
    environment = {name: value for name, value in os.environ.items() if name not in GIT_LOCAL}
    try:
        done = subprocess.run(
            ("git", *arguments),
            cwd=root,
            env={**environment, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except OSError as error:
        return f"git: {error.strerror}"
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return done.stdout if done.returncode == 0 else (said[0] if said else f"git ended with {done.returncode}")


class Sieve:
    """Which paths under a root are code. As in git, nothing under a folder that is left out can be taken back in."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own = _load_patterns(root / IGNORE_FILE)
        self._folders: dict[str, bool] = {"": True}

    def keeps(self, path: str) -> bool:
        """Whether a file or link is code by its name and by the folders above it."""
        folder, _, name = path.rpartition("/")
        if name in NEVER or name.endswith(".pyc") or not self._keeps_folder(folder):
            return False
        return not (_ignores(self._own, path) or _is_environment(self._root / path, link=True))

    def _keeps_folder(self, path: str) -> bool:
        if path not in self._folders:
            above, _, name = path.rpartition("/")
            self._folders[path] = (
                self._keeps_folder(above)
                and name not in NEVER
                and not _ignores(self._own, path + "/")
                and _is_folder(self._root / path)  # not a link: what lies behind one is not at this path
                and not _is_environment(self._root / path, link=False)
            )
        return self._folders[path]

    def walk(self) -> Iterator[str]:
        """Every path that no `.gitignore` and no `.launcherignore` names, without asking git."""
        yield from self._walk("", ())

    def _walk(self, folder: str, above: tuple[tuple[str, GitIgnoreSpec], ...]) -> Iterator[str]:
        rules = (*above, (folder, _load_patterns(self._root / folder / ".gitignore")))
        try:
            with os.scandir(self._root / folder) as listing:
                found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing)
        except OSError as error:
            raise _unreadable(self._root / folder, error) from error
        for name, is_folder in found:
            path = f"{folder}/{name}" if folder else name
            if _ignored_by(rules, path + "/" if is_folder else path):
                continue
            if not is_folder and self.keeps(path):
                yield path
            elif is_folder and self._keeps_folder(path):
                yield from self._walk(path, rules)


def _load_patterns(path: Path) -> GitIgnoreSpec:
    try:
        text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        text = ""
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        # As git reads it: a byte order mark and carriage returns do not count. The plain backend takes any name.
        lines = (line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n"))
        return GitIgnoreSpec.from_lines(lines, backend="simple")
    except ValueError as error:
        raise InputError(
            f"holds a pattern that is not gitignore syntax: {error}",
            where=show(str(path)),
            next_step="see `git help gitignore`",
        ) from error


def _ignores(patterns: GitIgnoreSpec, path: str) -> bool:
    return bool(len(patterns)) and patterns.check_file(path).include is True


def _ignored_by(rules: tuple[tuple[str, GitIgnoreSpec], ...], path: str) -> bool:
    """Whether the nearest `.gitignore` with an opinion says so."""
    for folder, patterns in reversed(rules):
        opinion = patterns.check_file(path[len(folder) + 1 if folder else 0 :]).include if len(patterns) else None
        if opinion is not None:
            return opinion
    return False


def _is_environment(path: Path, *, link: bool) -> bool:
    """Whether this is a Python environment: a folder with the mark of one, or a link to such a folder."""
    if link and not path.is_symlink():
        return False
    return any(os.path.lexists(path / mark) for mark in ENVIRONMENT_MARKS)


# --- what it holds -------------------------------------------------------------------------------------------------


def _read_file(root: Path, path: str) -> Entry:
    digest = hashlib.sha256()
    size = 0
    try:
        descriptor = os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            executable = bool(os.fstat(descriptor).st_mode & stat.S_IXUSR)
            # Counted, not asked for: size and hash are of the same bytes also when somebody is writing.
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise _unreadable(root / path, error) from error
    return Entry(path=path, kind="file", content=digest.hexdigest(), size=size, executable=executable)


def _read_links(root: Path, found: _Found) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    entries: list[Entry] = []
    outside: list[str] = []
    notes: list[str] = []
    sent = _with_folders((*found.files, *found.links))
    for path in found.links:
        goal = os.path.relpath(os.path.realpath(root / path), root)
        if goal == ".." or goal.startswith("../"):
            outside.append(path)
            continue
        entries.append(Entry(path=path, kind="link", content=_target(root, path, goal)))
        if goal not in sent:
            notes.append(f"{show(path)} links to {show(goal)}, which is not part of the snapshot")
    if outside:
        raise InputError(
            "links that lead out of the working directory would lead nowhere on a node",
            where=str(root),
            detail=tuple(f"{show(path)} -> {show(_read_target(root, path))}" for path in outside[:5]),
            next_step=f"name them in {IGNORE_FILE}; copy in what is code, and mount what is data",
        )
    return tuple(entries), tuple(notes)


def _target(root: Path, path: str, goal: str) -> str:
    """The link's own target where it stays inside at every step, otherwise one from folder to goal."""
    target = _read_target(root, path)
    above = str(PurePosixPath(path).parent)
    plain = os.path.normpath(f"{above}/{target}")
    if target.startswith("/") or plain == ".." or plain.startswith("../"):
        return os.path.relpath(root / goal, os.path.realpath(root / above))
    return target


def _read_target(root: Path, path: str) -> str:
    return os.readlink(root / path)  # noqa: PTH115 (Path.readlink would tidy the target)


def _with_folders(paths: Iterable[str]) -> set[str]:
    known = {"."}
    for path in paths:
        while path and path not in known:
            known.add(path)
            path = path.rpartition("/")[0]  # noqa: PLW2901
    return known


# --- how large it is -----------------------------------------------------------------------------------------------


def _guard(root: Path, files: dict[str, int], limit_bytes: int) -> None:
    total = sum(files.values())
    if total <= limit_bytes:
        return
    largest = _largest(files)
    width = max(len(show_bytes(size)) for _, size in largest)
    raise InputError(
        f"the code to send is {show_bytes(total)} in {len(files):,} files; the limit is {show_bytes(limit_bytes)}",
        where=str(root),
        detail=tuple(f"{show_bytes(size):>{width}}  {show(path)}" for path, size in largest),
        next_step=f"name what is not code in {IGNORE_FILE} (gitignore syntax), or raise --snapshot-limit",
    )


def _largest(files: dict[str, int], *, count: int = 5) -> list[tuple[str, int]]:
    """The largest things at the top; a folder gives way to the one child that holds nearly all of it."""
    inside: dict[str, dict[str, int]] = {}
    for path, size in files.items():
        parts = path.split("/")
        for depth in range(len(parts)):
            above = "/".join(parts[:depth])
            child = "/".join(parts[: depth + 1])
            children = inside.setdefault(above, {})
            children[child] = children.get(child, 0) + size
    top = sorted(inside[""].items(), key=lambda item: (-item[1], item[0]))[:count]
    return [_descend(path, size, inside) for path, size in top]


def _descend(path: str, size: int, inside: dict[str, dict[str, int]]) -> tuple[str, int]:
    while path in inside:
        child, held = max(inside[path].items(), key=lambda item: item[1])
        if held < 0.9 * size:
            return path + "/", size
        path, size = child, held
    return path, size

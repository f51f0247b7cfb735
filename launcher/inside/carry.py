"""Brings pieces of files to where they shall be: reads them, writes them, and shows them whole or not at all.

Usage: python3 carry.py read [--below FOLDER] UNIT       < [[path, offset, length], …] as JSON
                                                         > these bytes, one after the other, and nothing else
       python3 carry.py ready [--below FOLDER] UNIT      < {path: bytes} as JSON, all that the unit shall have
       python3 carry.py write [--below FOLDER] UNIT      < {"pieces": [[path, offset, length, sha256], …]}, a line end,
                                                           then the bytes
       python3 carry.py copy [--below FOLDER] UNIT       < {"from": unit, "pieces": […]}: within this node
       python3 carry.py show [--below FOLDER] UNIT       < {"files": {path: bytes}, "texts": {path: text}, "beside": {}}
       python3 carry.py drop [--below FOLDER] UNIT

Needs Python alone. FOLDER is the checkpoints folder, LAUNCHER_CHECKPOINTS where it is not given; UNIT a path below it.
What arrives lies in `.launcher-partial-<name>` beside the unit's place. It belongs to one command at a time, the one
that says `--token`: `.launcher-lease-<name>` holds its token, and is as old as its last piece. Another command is
refused while that is young, or takes it over with `--take`; then the first one is. A piece is written when all of it
has come and its hash is right; `ready` tells which are there, by reading them again, so that a transfer that was cut
goes on where it was. `show` looks that nothing is missing or too much, brings all of it to the disk, and gives it its
name in one step; what had that name before is there until then, and gone after it.

Every path is opened name by name without following links, and only plain files with one name are written: a tree that
somebody else may write to cannot lead anywhere else. All but `read` answer with one line of JSON; {"error": …} with
exit status 1 is what went wrong, in words.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import hashlib
import json
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

PIECE = 8 * 1024 * 1024
PARTIAL = ".launcher-partial-"
OLD = ".launcher-old-"
LEASE = ".launcher-lease-"
LASTS = 60.0  # seconds after which nobody is thought to be there any more
STALLED = 300.0  # seconds in which nobody takes what is read: the other side is gone
LONGEST_PATH = 1024
LONGEST_LINE = 256 * 1024 * 1024
LARGEST_PIECE = 1024 * 1024 * 1024
AT_FDCWD, RENAME_EXCHANGE = -100, 2
FULL = (errno.ENOSPC, errno.EDQUOT)


class Refused(Exception):
    """What must not be done, in words."""


class Held(Refused):
    """Somebody else's, by the token of that command and the seconds since it last did something."""

    def __init__(self, token: str, age: float) -> None:
        super().__init__("another command is bringing this there")
        self.token, self.age = token, age


class Lease:
    """To whom what arrives belongs."""

    def __init__(self, root: str, unit: str, *, token: str) -> None:
        self.root, (self.above, self.name) = root, split(unit)
        self.token = token

    def hold(self, *, take: bool, first: bool) -> None:
        """Make it ours, or see that it still is."""
        with folder(self.root, self.above, make=first or take) as parent:
            owner, age = self._read(parent)
            if owner not in ("", self.token) and not take and (age < LASTS or not first):
                raise Held(owner, age)
            if owner != self.token:
                put_text(parent, LEASE + self.name, self.token)

    def renew(self) -> None:
        """It is still being worked on; refused when somebody took it over."""
        with folder(self.root, self.above) as parent:
            owner, age = self._read(parent)
            if owner != self.token:
                raise Held(owner, age)
            os.utime(LEASE + self.name, dir_fd=parent, follow_symlinks=False)

    def end(self, parent: int) -> None:
        """Nobody's any more."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(LEASE + self.name, dir_fd=parent)

    def _read(self, parent: int) -> tuple[str, float]:
        try:
            with plain(parent, LEASE + self.name, os.O_RDONLY) as file:
                return os.read(file, 1024).decode(errors="replace"), time.time() - os.fstat(file).st_mtime
        except FileNotFoundError:
            return "", 0.0


def main(argv: list[str]) -> int:
    """Do what is asked, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["read", "ready", "write", "copy", "show", "drop"])
    parser.add_argument("unit")
    parser.add_argument("--below", default=os.environ.get("LAUNCHER_CHECKPOINTS", ""))
    parser.add_argument("--token", default="")
    parser.add_argument("--take", action="store_true")
    asked = parser.parse_args(argv)
    os.umask(0o022)
    try:
        if asked.verb == "read":
            read(asked.below or ".", asked.unit)
            return 0
        lease = Lease(asked.below or ".", asked.unit, token=asked.token)
        lease.hold(take=asked.take or asked.verb == "drop", first=asked.verb == "ready")
        print(json.dumps(VERBS[asked.verb](asked.below or ".", asked.unit, lease)))
    except Held as held:
        print(json.dumps({"error": str(held), "held": held.token, "age": held.age}), flush=True)
        sys.exit(1)
    except Refused as error:
        complain(str(error))
    except OSError as error:
        words = "no space left" if error.errno in FULL else error.strerror or str(error)
        complain(f"{words}: {error.filename or asked.unit}", full=error.errno in FULL)
    return 0


def complain(what: str, *, full: bool = False) -> NoReturn:
    """Say what went wrong."""
    print(json.dumps({"error": what, "full": full}), flush=True)
    print(what, file=sys.stderr, flush=True)
    sys.exit(1)


# --- reading -------------------------------------------------------------------------------------------------------


def read(root: str, unit: str) -> None:
    """Write the bytes that are asked for to standard output."""
    wanted = json.load(sys.stdin.buffer)
    with folder(root, unit) as place:
        for path, offset, length in wanted:
            with plain(place, path, os.O_RDONLY) as file:
                at = offset
                while at < offset + length:
                    chunk = os.pread(file, min(offset + length - at, 1024 * 1024), at)
                    if not chunk:
                        raise Refused(f"{path} ends before its end")
                    give(chunk)
                    at += len(chunk)


def give(chunk: bytes) -> None:
    """Write to standard output, but not for ever to somebody who does not read."""
    os.set_blocking(1, False)
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    view = memoryview(chunk)
    while view:
        if not poll.poll(STALLED * 1000):
            raise Refused("nobody reads")
        with contextlib.suppress(BlockingIOError):
            view = view[os.write(1, view) :]


# --- writing -------------------------------------------------------------------------------------------------------


def ready(root: str, unit: str, lease: Lease) -> dict[str, Any]:
    """Make the partial folder hold nothing but what is wanted; tells which pieces of it are there, and what is free."""
    wanted = json.load(sys.stdin.buffer)
    with partial(root, unit, make=True) as place:
        prune(place, wanted)
        have = {}
        for path, length in wanted.items():
            lease.renew()
            have[path] = there(place, path, length)
        system = os.fstatvfs(place)
        return {"have": have, "free": system.f_bavail * system.f_frsize}


def there(place: int, path: str, length: int) -> list[str]:
    """The hashes of the pieces of a file, as far as it goes; what is longer than it shall be is cut."""
    try:
        file = opened(place, path, os.O_RDWR)
    except FileNotFoundError:
        return []
    try:
        if os.fstat(file).st_size > length:
            os.ftruncate(file, length)
        hashes: list[str] = []
        while chunk := os.pread(file, PIECE, len(hashes) * PIECE):
            hashes.append(hashlib.sha256(chunk).hexdigest())
        return hashes
    finally:
        os.close(file)


def prune(place: int, wanted: dict[str, int], *, below: str = "") -> None:
    """Remove what is not wanted, and whatever is no plain file."""
    with os.scandir(place) as found:
        entries = list(found)
    for entry in entries:
        path = below + entry.name
        info = os.stat(entry.name, dir_fd=place, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            inner = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            try:
                prune(inner, wanted, below=path + "/")
            finally:
                os.close(inner)
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(entry.name, dir_fd=place)
        elif not stat.S_ISREG(info.st_mode) or info.st_nlink > 1 or path not in wanted:
            os.unlink(entry.name, dir_fd=place)


def write(root: str, unit: str, lease: Lease) -> dict[str, Any]:
    """Take pieces from standard input; one whose hash is not right is not written, and told."""
    line = sys.stdin.buffer.readline(LONGEST_LINE)
    pieces = json.loads(line)["pieces"]
    bad: list[list[object]] = []
    written = 0
    with partial(root, unit, make=False) as place:
        for path, offset, length, sha256 in pieces:
            if not 0 < length <= LARGEST_PIECE:
                raise Refused(f"a piece of {length} bytes")
            chunk = sys.stdin.buffer.read(length)
            if len(chunk) < length:
                return {"bad": bad, "written": written, "cut": True}
            if hashlib.sha256(chunk).hexdigest() != sha256:
                bad.append([path, offset])
                continue
            lease.renew()
            put(place, path, offset, chunk)
            written += length
    return {"bad": bad, "written": written, "cut": False}


def copy(root: str, unit: str, lease: Lease) -> dict[str, Any]:
    """Take pieces from another unit of this folder."""
    asked = json.load(sys.stdin.buffer)
    bad: list[list[object]] = []
    written = 0
    with folder(root, asked["from"]) as source, partial(root, unit, make=False) as place:
        for path, offset, length, sha256 in asked["pieces"]:
            with plain(source, path, os.O_RDONLY) as file:
                chunk = os.pread(file, length, offset)
            if hashlib.sha256(chunk).hexdigest() != sha256:
                bad.append([path, offset])
                continue
            lease.renew()
            put(place, path, offset, chunk)
            written += length
    return {"bad": bad, "written": written, "cut": False}


def put(place: int, path: str, offset: int, chunk: bytes) -> None:
    """Write a piece where it belongs."""
    file = opened(place, path, os.O_WRONLY | os.O_CREAT, make=True)
    try:
        view = memoryview(chunk)
        while view:
            done = os.pwrite(file, view, offset)
            view, offset = view[done:], offset + done
    finally:
        os.close(file)


# --- showing -------------------------------------------------------------------------------------------------------


def show(root: str, unit: str, lease: Lease) -> dict[str, Any]:
    """Give the partial folder its name, if it holds exactly what it shall."""
    asked = json.load(sys.stdin.buffer)
    above, name = split(unit)
    with folder(root, above) as parent:
        with partial(root, unit, make=False) as place:
            for path, length in asked["files"].items():
                if not length:
                    os.close(opened(place, path, os.O_WRONLY | os.O_CREAT, make=True))
                with plain(place, path, os.O_RDONLY) as file:
                    if os.fstat(file).st_size != length:
                        raise Refused(f"{path} has {os.fstat(file).st_size} bytes and shall have {length}")
                    os.fsync(file)
            prune(place, asked["files"])
            for path, text in asked["texts"].items():
                put_text(place, path, text)
            sync_folders(place)
        lease.renew()
        exchange(parent, PARTIAL + name, name)
        for path, text in asked.get("beside", {}).items():
            put_text(parent, path, text)
        os.fsync(parent)
        erase(parent, OLD + name)
        lease.end(parent)
    return {"shown": unit}


def put_text(place: int, path: str, text: str) -> None:
    """A small file, whole or not at all."""
    check(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path + ".tmp", dir_fd=place)
    file = opened(place, path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, make=True)
    with os.fdopen(file, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.rename(path + ".tmp", path, src_dir_fd=place, dst_dir_fd=place)


def sync_folders(place: int) -> None:
    """Every folder's names to the disk."""
    with os.scandir(place) as found:
        names = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    for name in names:
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
        try:
            sync_folders(inner)
        finally:
            os.close(inner)
    os.fsync(place)


def exchange(parent: int, new: str, name: str) -> None:
    """`new` becomes `name`; what was there before lies under its old name's own, for `erase`."""
    erase(parent, OLD + name)
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(new, name, src_dir_fd=parent, dst_dir_fd=parent)
        return
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if swap is not None and swap(parent, os.fsencode(new), parent, os.fsencode(name), RENAME_EXCHANGE) == 0:
        os.rename(new, OLD + name, src_dir_fd=parent, dst_dir_fd=parent)
        return
    # Not every file system can swap two names: then there is a moment without either.
    os.rename(name, OLD + name, src_dir_fd=parent, dst_dir_fd=parent)
    os.rename(new, name, src_dir_fd=parent, dst_dir_fd=parent)


def drop(root: str, unit: str, lease: Lease) -> dict[str, Any]:
    """Remove what was never shown, and the folders that were made for it."""
    above, name = split(unit)
    with contextlib.suppress(FileNotFoundError), folder(root, above) as parent:
        erase(parent, PARTIAL + name)
        lease.end(parent)
    names = above.split("/") if above else []
    while names:
        with contextlib.suppress(FileNotFoundError), folder(root, "/".join(names[:-1])) as parent:
            try:
                os.rmdir(names[-1], dir_fd=parent)
            except OSError:  # not empty: it is needed
                break
        names.pop()
    return {"dropped": unit}


def erase(parent: int, name: str) -> None:
    """Remove a folder, or a link, with all that is in it."""
    try:
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError:
        os.unlink(name, dir_fd=parent)
        return
    try:
        prune(inner, {})
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=parent)


# --- opening -------------------------------------------------------------------------------------------------------


def check(path: str) -> list[str]:
    """The names of a path that stays where it is."""
    names = path.split("/")
    if len(path) > LONGEST_PATH or any(name in ("", ".", "..") or "\0" in name for name in names):
        raise Refused(f"the path {path!r} leads out of its folder")
    return names


def split(unit: str) -> tuple[str, str]:
    """The folder above a unit, and its name."""
    *above, name = check(unit)
    return "/".join(above), name


def descend(start: int, names: list[str], *, make: bool) -> int:
    """The folder at the end of a path, no link followed."""
    at = os.dup(start)
    for name in names:
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=at)
        try:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        except OSError as error:
            os.close(at)
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Refused(f"{name} is a link or a file where a folder shall be") from None
            raise
        os.close(at)
        at = below
    return at


@contextlib.contextmanager
def folder(root: str, path: str, *, make: bool = False) -> Iterator[int]:
    """A folder below the root."""
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        at = descend(top, check(path) if path else [], make=make)
    finally:
        os.close(top)
    try:
        yield at
    finally:
        os.close(at)


@contextlib.contextmanager
def partial(root: str, unit: str, *, make: bool) -> Iterator[int]:
    """Where the unit grows."""
    above, name = split(unit)
    with folder(root, above, make=make) as parent:
        place = descend(parent, [PARTIAL + name], make=make)
    try:
        yield place
    finally:
        os.close(place)


def opened(place: int, path: str, flags: int, *, make: bool = False) -> int:
    """A plain file below a folder, with no name besides this one."""
    *above, name = check(path)
    at = descend(place, above, make=make)
    try:
        file = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Refused(f"{path} is a link or a pipe where a file shall be") from None
        raise
    finally:
        os.close(at)
    info = os.fstat(file)
    if not stat.S_ISREG(info.st_mode) or (flags & os.O_ACCMODE != os.O_RDONLY and info.st_nlink > 1):
        os.close(file)
        raise Refused(f"{path} is no plain file of its own")
    return file


@contextlib.contextmanager
def plain(place: int, path: str, flags: int) -> Iterator[int]:
    """The same, closed at the end."""
    file = opened(place, path, flags)
    try:
        yield file
    finally:
        os.close(file)


VERBS = {"ready": ready, "write": write, "copy": copy, "show": show, "drop": drop}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Files and folders of this machine that are their owner's alone, whatever the umask; no link is written through."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO, Any, Literal

from cluster.errors import InputError


def check_private(folder: Path) -> None:
    """`InputError` for a folder into which others could put a link or a file; one that is missing is fine."""
    try:
        found = folder.lstat()
    except OSError:  # it will be made, or be told when it is needed
        return
    if stat.S_ISLNK(found.st_mode):
        raise InputError(
            "the state folder is a link, and whoever can change it decides what is written where",
            where=str(folder),
            next_step=f"set LAUNCHER_STATE to the folder itself: {folder.resolve()}",
        )
    if found.st_uid != os.geteuid():
        raise InputError(
            f"the state folder belongs to another user (uid {found.st_uid}, and you are {os.geteuid()})",
            where=str(folder),
            next_step="set LAUNCHER_STATE to a folder of your own",
        )
    if found.st_mode & 0o022:
        raise InputError(
            f"others may write into the state folder (mode {stat.S_IMODE(found.st_mode):o})",
            where=str(folder),
            next_step=f"chmod go-w {folder}",
        )


def make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, mode 0700 each."""
    for missing in reversed([one for one in (folder, *folder.parents) if not one.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)  # `parents=True` would give the ones above the usual mode


def open_private(path: Path, mode: Literal["ab", "wb", "r+b"], *, buffering: int = -1) -> IO[Any]:
    """Open a file for writing, made with mode 0600 where it is missing; `OSError` (ELOOP) where it is a link."""
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(path, mode, buffering, opener=lambda name, given: os.open(name, given | flags, 0o600))

"""Who a machine is: addresses, host keys and the file they are pinned in. Never a connection."""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cluster.errors import InputError, UntrustedError
from cluster.private import make_private

SSH_PORT = 22
# What may stand in a name of the file: no space, no list comma, no pattern and no `#`, `@` or `|` of its markers.
_NAME = re.compile(r"[A-Za-z0-9_.:%\[\]-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a node is, as the inventory says it; what is None is for ~/.ssh/config to say.

    `jump` is `user@host:port`, several of them with commas (the first is visited first), or `none`.
    """

    node: str
    host: str
    port: int | None = None
    user: str | None = None
    identity_file: str | None = None
    jump: str | None = None

    @property
    def key_name(self) -> str:
        """The name its host keys are pinned under.

        It is made of what the inventory says, so that an edit of ~/.ssh/config cannot point a pinned name at another
        machine unnoticed.
        """
        return key_name(self.host, self.port)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostKey:
    """A public key by which a machine proves who it is."""

    name: str
    type: str
    base64: str

    @property
    def fingerprint(self) -> str:
        """The fingerprint as `ssh-keygen -l` shows it."""
        digest = hashlib.sha256(base64.b64decode(self.base64)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.type} {self.fingerprint}"


class Verdict(Enum):
    """What a machine's keys are, beside the pinned ones."""

    NEW = "new"
    SAME = "same"
    CHANGED = "changed"


def key_name(host: str, port: int | None = None) -> str:
    """A host's name in a known_hosts file: `host`, or `[host]:port` where the port is not 22."""
    host = host.lower()
    return host if port in (None, SSH_PORT) else f"[{host}]:{port}"


def compare(pinned: Iterable[HostKey], scanned: Iterable[HostKey]) -> Verdict:
    """Judge the keys that a machine showed by those that are pinned for it.

    A machine may show more types than were pinned; one that shows another key of a pinned type, or none of the pinned
    types, is not the same machine.
    """
    known = {key.type: key.base64 for key in pinned}
    shown = {key.type: key.base64 for key in scanned}
    if not known:
        return Verdict.NEW
    common = known.keys() & shown.keys()
    if not common or any(known[kind] != shown[kind] for kind in common):
        return Verdict.CHANGED
    return Verdict.SAME


def pinned(known_hosts: Path, name: str | None = None) -> tuple[HostKey, ...]:
    """The pinned keys, of one name or of all; none where there is no file yet."""
    try:
        text = known_hosts.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the pinned host keys cannot be read: {error}", where=str(known_hosts)) from error
    return tuple(key for key in _read_lines(text, known_hosts) if name is None or key.name == name)


def pin(known_hosts: Path, keys: Iterable[HostKey], *, replace: bool = False) -> None:
    """Pin keys. A name that has other keys already is refused, unless they are to be replaced.

    The file is OpenSSH's format, readable by its owner alone, and is exchanged whole: a reader sees the old or the new.
    """
    new = tuple(keys)
    names = {key.name for key in new}
    for name in names:
        check_name(name)
    with _locked(known_hosts.parent):
        old = pinned(known_hosts)
        for name in sorted(names):
            before = tuple(key for key in old if key.name == name)
            after = tuple(key for key in new if key.name == name)
            if not replace and compare(before, after) is Verdict.CHANGED:
                raise changed(name, before, after)
        kept = tuple(key for key in old if key.name not in names)
        if not replace:
            shown = {(key.name, key.type) for key in new}
            kept += tuple(key for key in old if key.name in names and (key.name, key.type) not in shown)
        _write(known_hosts, sorted({*kept, *new}, key=lambda key: (key.name, key.type)))


def changed(node: str, before: Iterable[HostKey], after: Iterable[HostKey]) -> UntrustedError:
    """The error for a machine that shows another key than the pinned one."""
    return UntrustedError(
        node,
        "the host key is not the pinned one; nothing was sent",
        detail=(*(f"pinned: {key}" for key in before), *(f"shown:  {key}" for key in after)),
        next_step="find out why: somebody may be in between. If the machine was reinstalled, "
        "run `launcher trust --replace`",
    )


def unknown(node: str) -> UntrustedError:
    """The error for a machine that has no pinned key."""
    return UntrustedError(
        node,
        "no host key is pinned; nothing was sent",
        next_step="run `launcher trust`, which shows the fingerprints and pins them",
    )


def check_name(name: str) -> None:
    """Refuse a name that the file could not carry."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot be the name of a host")


def _read_lines(text: str, path: Path) -> Iterator[HostKey]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        key = _read_line(line)
        if key is None:
            raise InputError(
                "this is no host key", where=f"{path}:{number}", next_step="remove the line and run `launcher trust`"
            )
        yield key


def _read_line(line: str) -> HostKey | None:
    match line.split():
        case [name, kind, encoded] if _NAME.fullmatch(name):
            with suppress(binascii.Error):
                blob = base64.b64decode(encoded, validate=True)
                # A key blob begins with its own type, so a damaged line cannot pass for another type.
                if blob[4 : 4 + len(kind)] == kind.encode() and int.from_bytes(blob[:4], "big") == len(kind):
                    return HostKey(name=name, type=kind, base64=encoded)
    return None


def _write(path: Path, keys: Iterable[HostKey]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{key.name} {key.type} {key.base64}\n" for key in keys)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the folder's own entry is on disk when this ends."""
    make_private(folder)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        os.fsync(handle)
    finally:
        os.close(handle)

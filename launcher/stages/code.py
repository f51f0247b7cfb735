"""Puts a snapshot on a node, by content: what is there is not sent again. Does not decide what the code is.

The node needs sshd, `sh`, tar, gzip and coreutils (or busybox), on a file system with hard links. It holds, in `store`:

    blobs/<sha256>[x]     one file of any snapshot, read-only; `x`: executable (hard links share one mode)
    trees/<digest>/       one snapshot: folders, symbolic links, and hard links to blobs; whole or not there
    stamps/<digest>       as old as its tree; what is younger in the tree was edited; touched with every use
    boot                  the boot in which all blobs were last known to be sound
    .incoming-<unique>/   an unfinished transfer; swept after a day

One round trip asks what is lacking, a second brings it in one stream and makes the tree visible by one rename. A tree
is trusted by its name, unless a file in it is younger than its stamp, or missing, or one too many; blobs are trusted
until the node reboots (a power cut may lose what was never written back). Then their hashes are checked, once.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import secrets
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from cluster.command import Result, script
from cluster.errors import CommandError, IntegrityError
from cluster.transport import Transport
from launcher.snapshot import Entry, Snapshot, read_again

KEEP_TREES = 20
CHUNK_BYTES = 2**18
DAMAGED = 65
AGAIN = 75
ATTEMPTS = 4  # a reboot and an edit found on the same visit need a look each
STATES = frozenset({"whole", "lacking", "edited", "rebooted"})
END = bytes(tarfile.RECORDSIZE)  # two empty blocks would do; some tars read whole records

# Where a tar header has what differs from file to file.
NAME, CHECKSUM, TARGET = slice(0, 100), slice(148, 156), slice(157, 257)

# What the node's tools say -> what we say, what to do. `strerror` in the C locale, the same in GNU tools and busybox.
CURES = {
    "No space left": ("the disk that holds {store} is full", "make room there, or set another store"),
    "Wrote only": ("the disk that holds {store} is full", "make room there, or set another store"),  # GNU tar
    "quota exceeded": ("the disk quota for {store} is used up", "make room there, or set another store"),
    "Read-only file system": ("{store} is on a read-only file system", "set another store"),
    "Permission denied": ("{store} cannot be written", "give it to the SSH user, or set another store"),
    "not permitted": (
        "{store} does not allow hard links",
        "set a store on a file system with hard links, of this user",
    ),
    "Too many links": ("{store} holds too many links to one file", "remove old snapshots there, or set another store"),
    "not found": ("a tool is missing on the node", "install tar, gzip, find and coreutils, or busybox"),
}

# $1 store, $2 digest, $3 the files and links of the tree, stdin the sorted names of its blobs.
# What is there is listed twice, so what comes once is lacking. (`while read` takes a pipe byte by byte: slower.)
ASK = r"""
LC_ALL=C; export LC_ALL
cd -- "$1" 2>/dev/null && [ -d blobs ] || { echo lacking; cat; echo end; exit 0; }
tell() { cat >/dev/null; echo "$1"; echo end; exit 0; }
[ "$(cat boot 2>/dev/null)" = "$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)" ] || tell rebooted
if [ -d "trees/$2" ]; then
  have=$(find "trees/$2" -name __pycache__ -prune -o ! -type d -print | wc -l)
  younger=$(find "trees/$2" -name __pycache__ -prune -o ! -type d -newer "stamps/$2" -print 2>&1)
  [ "$have" -eq "$3" ] && [ -z "$younger" ] || tell edited
  touch "stamps/$2" 2>/dev/null
  tell whole
fi
echo lacking
{ ls blobs; ls blobs; cat; } | sort | uniq -u || exit
echo end
"""

# $1 store, $2 digest, $3 unique, $4 why: "rebooted" or "edited". Drops blobs that are not what their names say and
# puts aside the trees that may share them, or the one that was edited: they are made again from sound blobs.
CHECK = r"""
LC_ALL=C; export LC_ALL
cd -- "$1" || exit
aside=.incoming-aside-$3
mkdir "$aside" || exit
damaged=$( (cd blobs && ls | sed 's/^\(.\{64\}\).*$/\1  &/' | sha256sum -c) 2>/dev/null | sed -n 's/: FAILED.*$//p')
for blob in $damaged; do rm -f "blobs/$blob" || exit; done
for tree in trees/*; do
  [ -d "$tree" ] || continue
  [ -n "$damaged" ] || { [ "$4" = edited ] && [ "$tree" = "trees/$2" ]; } || continue
  mv "$tree" "$aside/" || exit
done
cat /proc/sys/kernel/random/boot_id > boot 2>/dev/null || :
"""

# $1 store, $2 digest, $3 unique, $4 the folder in which links.tar.gz makes the tree; stdin is one tar of SHA256SUMS,
# links.tar.gz and blobs/*. Nothing leaves .incoming-* before every hash was verified. All of stdin is read also after
# a failure, so that the sender hears why.
SEND = r"""
umask 022
LC_ALL=C; export LC_ALL
digest=$2; new=.incoming-$3; made=$4
fail() { cat >/dev/null; exit "$1"; }
mkdir -p -- "$1" && cd -- "$1" && mkdir -p blobs trees stamps || fail 1
find . ! -name . -prune -name '.incoming-*' -mtime +0 -exec rm -rf {} + 2>/dev/null
mkdir "$new" || fail 1
trap 'rm -rf "$new"' EXIT
trap 'exit 1' HUP INT TERM
[ -s boot ] || cat /proc/sys/kernel/random/boot_id > boot 2>/dev/null || :
tar -C "$new" -x -o -m -f - || fail 1
cat >/dev/null
(cd "$new" && sha256sum -c SHA256SUMS) > "$new/said" 2>&1 || {
  grep FAILED "$new/said" >&2 && exit 65
  cat "$new/said" >&2; exit 1
}
for first in 0 1 2 3 4 5 6 7 8 9 a b c d e f; do
  set -- "$new/blobs/$first"*
  [ ! -e "$1" ] || mv -f "$@" blobs/ || exit 1
done
mkdir "$made" || exit 75
trap 'rm -rf "$new" "$made"' EXIT
gzip -dc "$new/links.tar.gz" | tar -x -o -m -f - || exit 75
: > "$new/stamp" && mv -f "$new/stamp" "stamps/$digest" || exit 1
mv -f "$made/t" "$made/$digest" || exit 1
mv -f "$made/$digest" trees/ || [ -d "trees/$digest" ] || exit 1
"""

# $1 store, $2 how many trees to keep, $3 the digests in use. Prints the digests that went.
SWEEP = r"""
LC_ALL=C; export LC_ALL
cd -- "$1" 2>/dev/null && [ -d stamps ] || exit 0
count=0
ls -t stamps | while read -r digest; do
  count=$((count + 1))
  [ "$count" -gt "$2" ] || continue
  case " $3 " in *" $digest "*) continue ;; esac
  gone=.incoming-swept-$digest-$$
  [ ! -d "trees/$digest" ] || mv "trees/$digest" "$gone" || exit
  rm -f "stamps/$digest" || exit
  rm -rf "$gone" && echo "$digest"
done
find blobs -type f -links 1 -mtime +0 -exec rm -f {} +
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeSent:
    """Where the code lies on the node, and what had to be sent for it: files, and the bytes in them."""

    path: str
    files_sent: int
    bytes_sent: int


def send_code(transport: Transport, snapshot: Snapshot, store: str) -> CodeSent:
    """Make `<store>/trees/<digest>` be there, whole, and send only the files that no earlier snapshot brought.

    `store` is an absolute path on the node, of one user. May be called for many nodes at once and again at any time.
    """
    path = f"{store}/trees/{snapshot.digest}"
    blobs = {entry.blob: entry for entry in snapshot.entries if entry.blob}
    make = _pack_once
    sent: list[Entry] = []
    said: Result | None = None
    for _ in range(ATTEMPTS):
        state, lacking = _ask(transport, snapshot, store, sorted(blobs))
        if state == "whole":
            break
        if state != "lacking":
            said = _check(transport, snapshot, store, state)
            continue
        missing = [blobs[name] for name in lacking]
        pack = make(snapshot)
        command = script(SEND, store, snapshot.digest, secrets.token_hex(8), pack.folder)
        said = transport.send(command, _stream(snapshot.root, pack, missing))
        sent += missing
        if said.code != AGAIN:
            _judge(transport.node, said, store)
            break
        # Somebody is making the same tree (one store, two names for the node), or a blob was just swept. What was
        # sent is there now.
        make = _pack
    else:
        raise _failure(transport.node, said, store)
    return CodeSent(path=path, files_sent=len(sent), bytes_sent=sum(entry.size for entry in sent))


def sweep_code(
    transport: Transport, store: str, *, in_use: Iterable[str] = (), keep: int = KEEP_TREES
) -> tuple[str, ...]:
    """Remove all but the `keep` last used snapshots and those whose digests are `in_use`; gives back what went.

    Files that no snapshot has go a day after they came, so a transfer that is under way finds what it counts on.
    """
    said = transport.run(script(SWEEP, store, str(keep), " ".join(in_use)))
    if not said.ok:
        raise _failure(transport.node, said, store)
    return tuple(said.text.split())


def _ask(transport: Transport, snapshot: Snapshot, store: str, names: list[str]) -> tuple[str, list[str]]:
    """The state of the tree on the node, and which of the named blobs are not there."""
    # A name with line ends counts for as many lines as `find` prints for it.
    lines = sum(1 + entry.path.count("\n") for entry in snapshot.entries)
    wanted = "".join(f"{name}\n" for name in names).encode()
    said = transport.run(script(ASK, store, snapshot.digest, str(lines), stdin=wanted))
    answer = said.text.split()
    # A start-up file of the account may print something first; the answer has its own end.
    start = next((at for at, word in enumerate(answer) if word in STATES), None)
    if not said.ok or start is None or answer[-1] != "end":
        raise _failure(transport.node, said, store)
    return answer[start], answer[start + 1 : -1]


def _check(transport: Transport, snapshot: Snapshot, store: str, why: str) -> Result:
    said = transport.run(script(CHECK, store, snapshot.digest, secrets.token_hex(8), why))
    if not said.ok:
        raise _failure(transport.node, said, store)
    return said


def _judge(node: str, said: Result, store: str) -> None:
    if said.code == DAMAGED:
        raise IntegrityError(
            "the code arrived damaged; nothing of it was kept",
            where=f"node {node}",
            detail=said.tail(),
            next_step=f"run it again; if it stays, check the memory and the disk behind {store}",
        )
    if not said.ok:
        raise _failure(node, said, store)


def _failure(node: str, said: Result | None, store: str) -> CommandError:
    """What went wrong on the node, in the words of its tools, and what to do about it."""
    detail = said.tail() if said else ()
    words = "\n".join(detail)
    for sign, cure in CURES.items():
        if sign in words:
            what, next_step = cure
            return CommandError(node, what.format(store=store), detail=detail, next_step=next_step)
    code = f" (status {said.code})" if said else ""
    return CommandError(
        node, f"the code could not be put into {store}{code}", detail=detail, next_step="see what the node says above"
    )


# --- the stream ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pack:
    """A whole tree without contents: a compressed tar of folders, links, and hard links into blobs/."""

    folder: str
    archive: bytes


def _pack(snapshot: Snapshot) -> _Pack:
    folder = f".incoming-{secrets.token_hex(6)}"
    top = f"{folder}/t"  # short: a name of over 100 bytes takes three blocks of a tar instead of one
    members = [_member(path, tarfile.DIRTYPE, mode=0o755) for path in _folders(top, snapshot.entries)]
    members += (_link_member(top, entry) for entry in snapshot.entries)
    return _Pack(folder=folder, archive=gzip.compress(b"".join((*members, END)), compresslevel=1, mtime=0))


# Hundreds of nodes get the same bytes: made once, by the first thread that comes, while the others wait for it.
_packed = functools.lru_cache(maxsize=2)(_pack)
_packing = Lock()


def _pack_once(snapshot: Snapshot) -> _Pack:
    with _packing:
        return _packed(snapshot)


def _folders(top: str, entries: Iterable[Entry]) -> Iterator[str]:
    """The folders of a tree, each after the one above it."""
    known: set[str] = {top}
    yield top
    for entry in entries:
        path = f"{top}/{entry.path}"
        for at in range(len(top) + 1, len(path)):
            if path[at] == "/" and path[:at] not in known:
                known.add(path[:at])
                yield path[:at]


def _link_member(top: str, entry: Entry) -> bytes:
    path = f"{top}/{entry.path}"
    if entry.kind == "link":
        return _member(path, tarfile.SYMTYPE, target=entry.content)
    if entry.blob:
        return _member(path, tarfile.LNKTYPE, target=f"blobs/{entry.blob}")
    # Empty files are no blobs: packages have hundreds, and a file system counts the links to one file.
    return _member(path, tarfile.REGTYPE, mode=_mode(entry))


def _stream(root: Path, pack: _Pack, missing: list[Entry]) -> Iterator[bytes]:
    """One tar: the hashes first, so that a stream that was cut is always noticed; in chunks worth a packet."""
    sums = [(hashlib.sha256(pack.archive).hexdigest(), "links.tar.gz")]
    sums += ((entry.content, f"blobs/{entry.blob}") for entry in missing)
    listing = "".join(f"{digest}  {name}\n" for digest, name in sums).encode()
    waiting = bytearray()
    for piece in _pieces(root, listing, pack.archive, missing):
        waiting += piece
        if len(waiting) >= CHUNK_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


def _pieces(root: Path, listing: bytes, archive: bytes, missing: list[Entry]) -> Iterator[bytes]:
    for name, content in (("SHA256SUMS", listing), ("links.tar.gz", archive)):
        yield _member(name, tarfile.REGTYPE, size=len(content)) + content + _padding(len(content))
    yield _member("blobs", tarfile.DIRTYPE, mode=0o755)
    for entry in missing:
        yield _member(f"blobs/{entry.blob}", tarfile.REGTYPE, size=entry.size, mode=_mode(entry))
        yield from read_again(root, entry)
        yield _padding(entry.size)
    yield END


def _member(name: str, kind: bytes, *, size: int = 0, mode: int = 0o444, target: str = "") -> bytes:
    """A tar header in the GNU format, which both GNU tar and busybox read, names byte for byte."""
    raw_name, raw_target = os.fsencode(name), os.fsencode(target)
    if max(len(raw_name), len(raw_target)) > tarfile.LENGTH_NAME or kind == tarfile.DIRTYPE:
        return _header(name, kind, size, mode, target)
    # The same bytes as `tarfile` makes, in a tenth of the time: a tree has thousands that differ in two fields.
    header = bytearray(_header("", kind, size, mode, ""))
    header[NAME] = raw_name.ljust(tarfile.LENGTH_NAME, b"\0")
    header[TARGET] = raw_target.ljust(tarfile.LENGTH_LINK, b"\0")
    header[CHECKSUM] = b" " * 8
    header[CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


@functools.lru_cache(maxsize=64)
def _header(name: str, kind: bytes, size: int, mode: int, target: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.linkname = kind, size, mode, target
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _mode(entry: Entry) -> int:
    return 0o555 if entry.executable else 0o444


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)

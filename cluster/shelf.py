"""The shelf: layers by their content in a folder of this machine, compressed and bounded. A cache: it may be lost.

<shelf>/layers/<hex>    a layer, by the SHA-256 of its content; gzip where that is worth it
<shelf>/configs/<hex>   an image's configuration, by its own SHA-256
<shelf>/pushed/<hex>    what an engine called a layer when it pushed it: `sha256:<content> <bytes>`
<shelf>/secret          what an engine must know to push to us
<shelf>/.incoming-*     what is being taken in; swept after a day
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from cluster.archive import CHUNK, GZIP, compressed, content_digest, is_worth_compressing, plainly
from cluster.errors import ClusterError
from cluster.private import make_private

LIMIT = 24 << 30  # bytes of layers that are kept
_SAMPLE = 4 << 20
_FRESH = 3600.0  # seconds: what was used a moment ago may be in use by another command
_DAY = 86400.0
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Shelf:
    """The folder. Safe for several threads and several commands at once: what lies under a name is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def layer(self, digest: str) -> Path | None:
        """The file of a layer, None where it is not here; it counts as used."""
        path = self._path("layers", digest)
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def put(self, chunks: Iterable[bytes]) -> str:
        """Take a layer in, compressed or not; gives back the digest of its content."""
        digest, size = hashlib.sha256(), 0

        def hear(content: bytes) -> None:
            nonlocal size
            digest.update(content)
            size += len(content)

        with self._incoming() as (path, handle):
            with os.fdopen(handle, "wb") as file:
                for chunk in _stored(chunks, hear):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            name = f"sha256:{digest.hexdigest()}"
            self._write(self._path("sizes", name), f"{size}\n".encode())
            self._name(path, self._path("layers", name))
        return name

    def size(self, digest: str) -> int | None:
        """How many bytes a layer has, unpacked; None where it has never been here."""
        with suppress(OSError, ValueError):
            return int(self._path("sizes", digest).read_text())
        return None

    def config(self, digest: str) -> bytes | None:
        """An image's configuration by its digest."""
        with suppress(OSError):
            content = self._path("configs", digest).read_bytes()
            if _digest_of(content) == digest:
                return content
        return None

    def put_config(self, content: bytes) -> str:
        """Keep an image's configuration; gives back its digest."""
        digest = _digest_of(content)
        self._write(self._path("configs", digest), content)
        return digest

    def pushed(self, name: str) -> tuple[str, int] | None:
        """The layer that an engine calls `name`, and its length there; None where it is not known."""
        with suppress(OSError, ValueError):
            digest, size = self._path("pushed", name).read_text().split()
            return digest, int(size)
        return None

    def note_pushed(self, name: str, digest: str, size: int) -> None:
        """Remember what an engine calls a layer."""
        self._write(self._path("pushed", name), f"{digest} {size}\n".encode())
        self._write(self._path("known", digest), b"")

    def is_known(self, digest: str) -> bool:
        """Whether an engine has pushed this layer before, so that it will ask before it does so again."""
        return self._path("known", digest).exists()

    def secret(self) -> str:
        """What an engine must know to push to us; made on first use."""
        path = self.folder / "secret"
        with suppress(OSError):
            if found := path.read_text().strip():
                return found
        self._write(path, secrets.token_urlsafe(32).encode())
        return path.read_text().strip()

    @contextmanager
    def whole(self, digest: str, chunks: Iterable[bytes]) -> Iterator[Path]:
        """An archive in a file that has the image's name, as long as the block lasts."""
        with self._kept():
            folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=".incoming-"))
        try:
            path = folder / digest.rpartition(":")[2]
            with self._kept(), path.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def forget(self, layers: Iterable[str]) -> None:
        """Drop layers."""
        for layer in layers:
            self._path("layers", layer).unlink(missing_ok=True)

    def scrub(self, layers: Iterable[str]) -> tuple[str, ...]:
        """Drop those of these layers that are not what their names say, for instance since an engine refused them."""
        damaged = tuple(layer for layer in layers if not self._is_sound(layer))
        self.forget(damaged)
        return damaged

    def _is_sound(self, layer: str) -> bool:
        try:
            with self._path("layers", layer).open("rb") as file:
                return content_digest(iter(lambda: file.read(CHUNK), b"")) == layer
        except (OSError, zlib.error):
            return False

    def trim(self, *, keep: Collection[str] = (), limit: int = LIMIT) -> int:
        """Drop what was used longest ago until the layers fit; gives back how many bytes went."""
        gone = 0
        now = time.time()
        for path in self.folder.glob(".incoming-*"):
            if now - _moment(path) <= _DAY:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        files = sorted(self._files(), key=lambda one: one[0], reverse=True)
        total = 0
        for used, size, path in files:
            total += size
            if total > limit and now - used > _FRESH and f"sha256:{path.name}" not in keep:
                path.unlink(missing_ok=True)
                gone += size
        return gone

    def bytes_used(self) -> int:
        """How much the layers take."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for path in self.folder.glob("layers/*"):
            with suppress(OSError):
                said = path.stat()
                yield said.st_mtime, said.st_size, path

    def _path(self, kind: str, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            return self.folder / kind / "none"  # whoever says this: there is no such file
        return self.folder / kind / digest.partition(":")[2]

    def _write(self, path: Path, content: bytes) -> None:
        with self._incoming() as (fresh, handle):
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._name(fresh, path)

    def _name(self, fresh: Path, path: Path) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fresh.replace(path)

    @contextmanager
    def _incoming(self) -> Iterator[tuple[Path, int]]:
        with self._kept():
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".incoming-")
            try:
                yield Path(name), handle
            finally:
                Path(name).unlink(missing_ok=True)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            make_private(self.folder)
            yield
        except OSError as error:
            raise ClusterError(
                f"image layers cannot be kept here: {error.strerror or error}",
                where=str(self.folder),
                next_step="make room there, or set LAUNCHER_STATE to a folder on a larger disk",
            ) from error


def _stored(chunks: Iterable[bytes], hear: Callable[[bytes], object]) -> Iterator[bytes]:
    """A layer as it is kept; `hear` is given its content."""
    rest = iter(chunks)
    begin = b""
    while len(begin) < _SAMPLE and (chunk := next(rest, b"")):
        begin += chunk
    if begin[:2] == GZIP:
        for part, chunk in _both(chain((begin,), rest)):
            hear(part)
            yield chunk
        return

    def heard() -> Iterator[bytes]:
        for chunk in chain((begin,), rest):
            hear(chunk)
            yield chunk

    yield from compressed(heard()) if is_worth_compressing(begin) else heard()


def _both(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Compressed chunks, each with the content that came out of it."""
    taken: list[bytes] = []

    def noted() -> Iterator[bytes]:
        for chunk in chunks:
            taken.append(chunk)
            yield chunk

    for part in plainly(noted()):
        yield part, b"".join(taken)
        taken.clear()


def _digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _moment(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()

"""Image archives as engines read and write them: laid out to be sent, taken apart when they come. Never a connection.

An archive is a tar of the image's configuration, its layers, and `manifest.json`, which names both. An engine of the
classic store takes one that lacks layers which it has: it looks for a layer's file only when it does not know the layer
(moby, image/tarexport/load.go). What it has taken in it names by the configuration's SHA-256, and a layer that does not
hash to what the configuration says is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from cluster.errors import IntegrityError

CHUNK = 1 << 20
GZIP = b"\x1f\x8b"
_BLOCK = 4 << 20  # what one thread compresses at a time
_LEVEL = 1  # a third of the bytes at five times the speed of the default
_WORTH = 0.9  # of its length: what shrinks less is sent as it is
_SMALL = 4 << 20  # a configuration or a manifest is never longer
_END = bytes(1024)
MANIFEST = "manifest.json"

Put = Callable[[Iterable[bytes]], str]  # takes a layer in; gives back the digest of its content


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """An archive that is put together only when it is sent: bytes and whole files, one after another."""

    pieces: tuple[bytes | Path, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.sizes)

    @property
    def name(self) -> str:
        """The same for archives of the same bytes: files of a shelf are named by their content."""
        told = [piece.hex() if isinstance(piece, bytes) else piece.name for piece in self.pieces]
        return hashlib.sha256(json.dumps([told, self.sizes]).encode()).hexdigest()[:32]

    def digest(self) -> str:
        """SHA-256 of all of it, in hex."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on."""
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            if start >= size:
                start -= size
                continue
            if isinstance(piece, bytes):
                yield piece[start:]
            else:
                yield from _file_chunks(piece, start, size)
            start = 0


def compose(config: bytes, layers: Sequence[str], files: Sequence[Path | None], *, tags: Sequence[str] = ()) -> Archive:
    """An archive of these layers (digests of their contents, the lowest first); where a file is None the engine has it.

    Without `tags` it gives the image no name: who loads it tags it when it has been verified.
    """
    named = hashlib.sha256(config).hexdigest()
    paths = [f"{layer.partition(':')[2]}/layer.tar" for layer in layers]
    manifest = json.dumps([{"Config": f"{named}.json", "RepoTags": list(tags) or None, "Layers": paths}]).encode()
    pieces: list[bytes | Path] = [_member(MANIFEST, manifest), _member(f"{named}.json", config)]
    sizes = [len(piece) for piece in pieces if isinstance(piece, bytes)]
    told: set[str] = set()
    for path, file in zip(paths, files, strict=True):
        if file is None or path in told:  # an image may have the same layer twice
            continue
        told.add(path)
        size = file.stat().st_size
        for piece, length in ((_header(path, size), None), (file, size), (bytes(-size % tarfile.BLOCKSIZE), None)):
            pieces.append(piece)
            sizes.append(len(cast("bytes", piece)) if length is None else length)
    return Archive(pieces=(*pieces, _END), sizes=(*sizes, len(_END)))


def file_archive(path: Path) -> Archive:
    """An archive that is a file already."""
    return Archive(pieces=(path,), sizes=(path.stat().st_size,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """What an archive held: the configuration (whose hash the classic store calls the image), layers, and names."""

    config: bytes
    layers: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The image's name in the classic store."""
        return "sha256:" + hashlib.sha256(self.config).hexdigest()


def unpack(chunks: Iterable[bytes], put: Put, *, where: str) -> Unpacked:
    """Take an archive of one image apart, layer by layer as they come, and verify every hash in it.

    `IntegrityError` names what is not what it is said to be; `where` says whose archive it is.
    """
    small: dict[str, bytes] = {}
    hashes: dict[str, str] = {}
    links: dict[str, str] = {}
    source = _Reader(iter(chunks))
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", source), mode="r|", bufsize=CHUNK) as archive:
            for member in archive:
                name = os.path.normpath(member.name)
                if member.issym() or member.islnk():
                    below = os.path.dirname(name) if member.issym() else ""  # noqa: PTH120 - a name in the archive
                    links[name] = os.path.normpath(os.path.join(below, member.linkname))  # noqa: PTH118
                if not member.isreg():
                    continue
                content = cast("IO[bytes]", archive.extractfile(member))
                if name.endswith((".json", "/json", "/VERSION", "repositories", "oci-layout")):
                    small[name] = content.read(_SMALL)
                    continue
                begin = content.read(min(member.size, _SMALL))
                if begin[:1] == b"{" and member.size < _SMALL:
                    small[name] = begin
                    continue
                hashes[name] = put(chain((begin,), iter(lambda file=content: file.read(CHUNK), b"")))  # type: ignore[misc]
        for _ in source.rest():
            pass
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise IntegrityError(f"the image archive is cut or damaged: {error}", where=where) from error
    return _judge(small, hashes, links, where=where)


def _judge(small: dict[str, bytes], hashes: dict[str, str], links: dict[str, str], *, where: str) -> Unpacked:
    try:
        listed: list[dict[str, Any]] = json.loads(small[MANIFEST])
        (image,) = listed
        config = small[os.path.normpath(image["Config"])]
        wanted = tuple(map(str, json.loads(config)["rootfs"]["diff_ids"]))
        paths = [os.path.normpath(path) for path in image["Layers"]]
        tags = tuple(map(str, image.get("RepoTags") or ()))
        found = tuple(hashes[links.get(path, path)] for path in paths)
    except (ValueError, KeyError, TypeError) as error:
        what = "it must hold exactly one image, whole"
        raise IntegrityError(f"this is no image archive: {what}", where=where, detail=(repr(error),)) from error
    for index, (want, have) in enumerate(zip(wanted, found, strict=False)):
        if want != have:
            raise IntegrityError(
                f"layer {index + 1} of {len(wanted)} is not what it is said to be",
                where=where,
                detail=(f"said:  {want}", f"found: {have}"),
                next_step="copy the file again, or save the image anew",
            )
    if len(wanted) != len(found):
        raise IntegrityError(f"the archive lists {len(found)} layers, its image has {len(wanted)}", where=where)
    return Unpacked(config=config, layers=wanted, tags=tags)


def content_digest(chunks: Iterable[bytes]) -> str:
    """The digest of a layer's content, compressed or not: a `Put` that keeps nothing."""
    digest = hashlib.sha256()
    for plain in plainly(chunks):
        digest.update(plain)
    return "sha256:" + digest.hexdigest()


def plainly(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """A layer's content: gzip is taken off, all else is as it comes. A cut stream is a `zlib.error`."""
    rest = iter(chunks)
    begin = next(rest, b"")
    if begin[:2] != GZIP:
        yield begin
        yield from rest
        return
    stream = zlib.decompressobj(wbits=31)
    for chunk in chain((begin,), rest):
        left = chunk
        while left:
            if stream.eof:  # a stream may be of several members
                stream = zlib.decompressobj(wbits=31)
            yield stream.decompress(left, _BLOCK)  # bounded: a little of zeros comes to much
            left = stream.unconsumed_tail or stream.unused_data
    yield stream.flush()
    if not stream.eof:
        raise zlib.error("the compressed layer ends too early")


def is_worth_compressing(sample: bytes) -> bool:
    """Whether compression would save anything, by a sample of the content."""
    return bool(sample) and len(zlib.compress(sample, _LEVEL)) < _WORTH * len(sample)


def compressed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Gzip by all cores: members of a few megabytes, one after another, which every reader takes for one stream."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[bytes]] = deque()
        for block in _blocks(chunks):
            waiting.append(pool.submit(_compress, block))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _compress(block: bytes) -> bytes:
    # wbits 31 is gzip, with a header of no time and no name: the same bytes for the same content.
    stream = zlib.compressobj(_LEVEL, wbits=31)
    return stream.compress(block) + stream.flush()


def _blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    block = bytearray()
    for chunk in chunks:
        block += chunk
        while len(block) >= _BLOCK:
            yield bytes(block[:_BLOCK])
            del block[:_BLOCK]
    if block:
        yield bytes(block)


class _Reader(io.RawIOBase):
    """Chunks as a file, for tarfile."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""

    def read(self, size: int = -1, /) -> bytes:
        parts: list[bytes] = []
        while size > 0:
            if not self._left:
                self._left = next(self._chunks, b"")
                if not self._left:
                    break
            parts.append(self._left[:size])
            self._left = self._left[size:]
            size -= len(parts[-1])
        return b"".join(parts)

    def rest(self) -> Iterator[bytes]:
        """What follows the archive's end: an engine writes whole records."""
        return self._chunks


def _file_chunks(path: Path, start: int, size: int) -> Iterator[bytes]:
    left = size - start
    with path.open("rb") as file:
        file.seek(start)
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise IntegrityError("the file has become shorter", where=str(path), next_step="run it again")
            left -= len(chunk)
            yield chunk


def _member(name: str, content: bytes) -> bytes:
    return _header(name, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.GNU_FORMAT)

"""The shelf: what lies under a name is that content, whole; what is used longest ago goes first."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.archive import plainly
from cluster.errors import ClusterError, UnreachableError
from cluster.shelf import Shelf

NOISE = random.Random(2).randbytes(3 << 20)  # noqa: S311 - the same every time
TEXT = b"a layer of text " * 300_000
NOWHERE = "sha256:" + "0" * 64


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "state" / "shelf")


def pieces(content: bytes, size: int = 1 << 18) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def read(path: Path | None) -> bytes:
    assert path is not None
    return b"".join(plainly(pieces(path.read_bytes())))


@pytest.mark.parametrize("content", [TEXT, NOISE, b"x", b""], ids=["text", "noise", "one byte", "nothing"])
def test_a_layer_is_found_by_its_content(shelf: Shelf, content: bytes) -> None:
    digest = shelf.put(pieces(content))
    assert digest == digest_of(content)
    assert read(shelf.layer(digest)) == content
    assert shelf.size(digest) == len(content)


def test_what_shrinks_is_kept_small_and_what_does_not_as_it_is(shelf: Shelf) -> None:
    text, noise = shelf.layer(shelf.put(pieces(TEXT))), shelf.layer(shelf.put(pieces(NOISE)))
    assert text is not None
    assert noise is not None
    assert text.stat().st_size < len(TEXT) / 20
    assert noise.read_bytes() == NOISE


def test_a_layer_that_comes_compressed_is_known_by_what_is_in_it(shelf: Shelf) -> None:
    packed = gzip.compress(TEXT, 6) + gzip.compress(b"more", 6)
    digest = shelf.put(pieces(packed, 1000))
    assert digest == digest_of(TEXT + b"more")
    path = shelf.layer(digest)
    assert path is not None
    assert path.read_bytes() == packed


def test_what_breaks_off_leaves_nothing(shelf: Shelf) -> None:
    def broken() -> Iterator[bytes]:
        yield TEXT
        raise UnreachableError("gpu-01", "the connection was lost")

    with pytest.raises(UnreachableError):
        shelf.put(broken())
    with pytest.raises(zlib.error):
        shelf.put([gzip.compress(TEXT)[:-9]])
    assert [path for path in shelf.folder.rglob("*") if path.is_file()] == []


def test_what_is_not_there_is_none(shelf: Shelf) -> None:
    assert (shelf.layer(NOWHERE), shelf.config(NOWHERE), shelf.pushed(NOWHERE)) == (None, None, None)
    assert (shelf.size(NOWHERE), shelf.is_known(NOWHERE)) == (None, False)
    assert shelf.layer("sha256:../../../etc/passwd") is None
    assert shelf.layer("") is None


def test_a_configuration_is_verified_when_it_is_read(shelf: Shelf) -> None:
    digest = shelf.put_config(b'{"rootfs": {}}')
    assert shelf.config(digest) == b'{"rootfs": {}}'
    (shelf.folder / "configs" / digest[7:]).write_bytes(b'{"rootfs": []}')
    assert shelf.config(digest) is None


def test_what_an_engine_calls_a_layer_is_remembered(shelf: Shelf) -> None:
    shelf.note_pushed(digest_of(b"packed"), digest_of(b"content"), 12)
    assert shelf.is_known(digest_of(b"content"))
    assert shelf.pushed(digest_of(b"packed")) == (digest_of(b"content"), 12)
    (shelf.folder / "pushed" / digest_of(b"packed")[7:]).write_text("torn")
    assert shelf.pushed(digest_of(b"packed")) is None


def test_the_secret_is_made_once_and_nobody_else_reads_anything(shelf: Shelf) -> None:
    secret = shelf.secret()
    assert len(secret) > 30
    assert Shelf(shelf.folder).secret() == secret
    shelf.put([TEXT])
    shelf.put_config(b"{}")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in shelf.folder.rglob("*")}
    assert modes == {0o700, 0o600}


class TestTrimming:
    @pytest.fixture
    def three(self, shelf: Shelf) -> list[str]:
        """Layers of three megabytes, used four, three and two hours ago."""
        layers = [shelf.put([bytes([number]) + NOISE]) for number in range(3)]
        for hours, layer in zip((4, 3, 2), layers, strict=True):
            then = time.time() - hours * 3600
            os.utime(shelf.folder / "layers" / layer[7:], (then, then))
        return layers

    def there(self, shelf: Shelf, layers: list[str]) -> list[bool]:
        return [(shelf.folder / "layers" / layer[7:]).exists() for layer in layers]

    def test_what_was_used_longest_ago_goes_until_the_rest_fits(self, shelf: Shelf, three: list[str]) -> None:
        assert shelf.trim(limit=2 * len(NOISE) + 10) == len(NOISE) + 1
        assert self.there(shelf, three) == [False, True, True]
        assert shelf.bytes_used() == 2 * len(NOISE) + 2

    def test_what_shall_be_kept_is(self, shelf: Shelf, three: list[str]) -> None:
        shelf.trim(limit=0, keep=three[:1])
        assert self.there(shelf, three) == [True, False, False]

    def test_what_was_used_a_moment_ago_stays(self, shelf: Shelf, three: list[str]) -> None:
        assert shelf.layer(three[0])
        shelf.trim(limit=0)
        assert self.there(shelf, three) == [True, False, False]

    def test_while_there_is_room_nothing_goes(self, shelf: Shelf, three: list[str]) -> None:
        assert shelf.trim() == 0
        assert self.there(shelf, three) == [True] * 3

    @pytest.mark.usefixtures("three")
    def test_what_was_never_finished_goes_after_a_day(self, shelf: Shelf) -> None:
        old, young = shelf.folder / ".incoming-old", shelf.folder / ".incoming-young"
        old.touch()
        young.touch()
        os.utime(old, (time.time() - 90_000,) * 2)
        shelf.trim()
        assert (old.exists(), young.exists()) == (False, True)


def test_forgotten_layers_are_gone(shelf: Shelf) -> None:
    layer = shelf.put([TEXT])
    shelf.forget([layer, NOWHERE])
    assert shelf.layer(layer) is None


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_layer_is_found_and_goes(shelf: Shelf, damage: str) -> None:
    good, bad = shelf.put([NOISE]), shelf.put([TEXT])
    path = shelf.folder / "layers" / bad[7:]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-20])
    assert shelf.scrub([good, bad, NOWHERE]) == (bad, NOWHERE)
    assert shelf.layer(good)
    assert shelf.layer(bad) is None


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError) as caught:
        Shelf(tmp_path / "file" / "shelf").put([b"x"])
    assert "image layers cannot be kept here: Not a directory\n  next: make room there" in str(caught.value)

"""Image archives: laid out, taken apart, and every byte of them verified."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from cluster.archive import (
    Archive,
    compose,
    compressed,
    content_digest,
    is_worth_compressing,
    plainly,
    unpack,
)
from cluster.errors import IntegrityError

WHERE = "image.tar"


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def layer(text: str, *, size: int = 2000) -> bytes:
    """A tar of one file."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        content = (text * size)[:size].encode()
        header = tarfile.TarInfo("file")
        header.size = len(content)
        archive.addfile(header, io.BytesIO(content))
    return made.getvalue()


LAYERS = (layer("base"), layer("torch", size=300_000), layer("code"))
DIGESTS = tuple(map(digest_of, LAYERS))
CONFIG = json.dumps({"rootfs": {"type": "layers", "diff_ids": DIGESTS}}).encode()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = []
    for content, digest in zip(LAYERS, DIGESTS, strict=True):
        path = tmp_path / digest.partition(":")[2]
        path.write_bytes(gzip.compress(content, mtime=0))
        made.append(path)
    return made


def pieces(content: bytes, size: int = 777) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def whole(archive: Archive) -> bytes:
    return b"".join(archive.chunks())


def members(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {one.name: file.read() for one in archive if (file := archive.extractfile(one))}


class TestComposing:
    def test_it_is_a_tar_of_manifest_configuration_and_layers(self, files: list[Path]) -> None:
        held = members(whole(compose(CONFIG, DIGESTS, list(files))))
        named = digest_of(CONFIG).partition(":")[2]
        paths = [f"{digest.partition(':')[2]}/layer.tar" for digest in DIGESTS]
        assert list(held) == ["manifest.json", f"{named}.json", *paths]
        assert json.loads(held["manifest.json"]) == [{"Config": f"{named}.json", "RepoTags": None, "Layers": paths}]
        assert held[f"{named}.json"] == CONFIG
        assert [gzip.decompress(held[path]) for path in paths] == list(LAYERS)

    def test_what_the_engine_has_is_named_and_left_out(self, files: list[Path]) -> None:
        held = members(whole(compose(CONFIG, DIGESTS, [None, None, files[2]])))
        assert len(json.loads(held["manifest.json"])[0]["Layers"]) == 3
        assert [name for name in held if name.endswith("layer.tar")] == [f"{DIGESTS[2][7:]}/layer.tar"]

    def test_a_layer_that_comes_twice_travels_once(self, files: list[Path]) -> None:
        held = members(whole(compose(CONFIG, (DIGESTS[0], DIGESTS[0]), [files[0], files[0]])))
        assert sum(name.endswith("layer.tar") for name in held) == 1

    def test_it_can_be_begun_anywhere(self, files: list[Path]) -> None:
        archive = compose(CONFIG, DIGESTS, list(files))
        content = whole(archive)
        assert archive.size == len(content)
        assert archive.digest() == hashlib.sha256(content).hexdigest()
        for start in (0, 1, 511, 512, 513, 1500, len(content) // 2, len(content) - 1, len(content)):
            assert b"".join(archive.chunks(start)) == content[start:]

    def test_the_same_bytes_have_the_same_name_and_others_another(self, files: list[Path]) -> None:
        one, other = compose(CONFIG, DIGESTS, list(files)), compose(CONFIG, DIGESTS, [None, *files[1:]])
        assert one.name == compose(CONFIG, DIGESTS, list(files)).name != other.name
        files[0].write_bytes(gzip.compress(LAYERS[0], 1, mtime=0) + gzip.compress(b"", mtime=0))
        assert compose(CONFIG, DIGESTS, list(files)).name != one.name

    def test_a_file_that_became_shorter_is_noticed(self, files: list[Path]) -> None:
        archive = compose(CONFIG, DIGESTS, list(files))
        files[1].write_bytes(b"")
        with pytest.raises(IntegrityError, match="the file has become shorter"):
            whole(archive)


class TestTakingApart:
    def test_what_was_composed_comes_out_again(self, files: list[Path]) -> None:
        content = whole(compose(CONFIG, DIGESTS, list(files), tags=("lab/eval:3",)))
        taken: list[bytes] = []

        def put(chunks: Iterable[bytes]) -> str:
            taken.append(b"".join(plainly(chunks)))
            return digest_of(taken[-1])

        found = unpack(pieces(content), put, where=WHERE)
        assert (found.config, found.layers, found.tags) == (CONFIG, DIGESTS, ("lab/eval:3",))
        assert found.digest == digest_of(CONFIG)
        assert taken == list(LAYERS)

    def test_layers_may_be_plain_and_linked_to_each_other(self) -> None:
        """As the engines of the classic store save them, up to version 24."""
        config = json.dumps({"rootfs": {"diff_ids": [DIGESTS[0], DIGESTS[0]]}}).encode()
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as archive:
            for name, content in (("aa/VERSION", b"1.0"), ("aa/json", b"{}"), ("aa/layer.tar", LAYERS[0])):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
            link = tarfile.TarInfo("bb/layer.tar")
            link.type, link.linkname = tarfile.SYMTYPE, "../aa/layer.tar"
            archive.addfile(link)
            listed = [{"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["aa/layer.tar", "bb/layer.tar"]}]
            for name, content in (("c.json", config), ("manifest.json", json.dumps(listed).encode())):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
        assert unpack(pieces(made.getvalue()), content_digest, where=WHERE).layers == (DIGESTS[0], DIGESTS[0])

    def test_a_wrong_layer_is_named(self, files: list[Path]) -> None:
        files[1].write_bytes(gzip.compress(layer("trojan", size=300_000), mtime=0))
        content = whole(compose(CONFIG, DIGESTS, list(files)))
        with pytest.raises(IntegrityError) as caught:
            unpack(pieces(content), content_digest, where=WHERE)
        assert str(caught.value).splitlines()[0] == "image.tar: layer 2 of 3 is not what it is said to be"
        assert caught.value.exit_code == 8

    @pytest.mark.parametrize("percent", [0, 1, 50, 99])
    def test_a_cut_one_is_refused(self, files: list[Path], percent: int) -> None:
        content = whole(compose(CONFIG, DIGESTS, list(files)))
        with pytest.raises(IntegrityError):
            unpack(pieces(content[: (len(content) - 1024) * percent // 100]), content_digest, where=WHERE)

    @pytest.mark.parametrize("seed", range(40))
    def test_no_changed_byte_passes_for_the_image(self, files: list[Path], seed: int) -> None:
        content = bytearray(whole(compose(CONFIG, DIGESTS, list(files))))
        content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8  # noqa: S311 - the same every time
        try:
            found = unpack(pieces(bytes(content)), content_digest, where=WHERE)
        except IntegrityError:
            return
        assert (found.digest, found.layers) == (digest_of(CONFIG), DIGESTS)  # a byte of no meaning: padding, a mode

    @pytest.mark.parametrize(
        "content",
        [b"", b"not a tar" * 200, bytes(2048), b"\x1f\x8b" + bytes(100)],
        ids=["empty", "text", "zeros", "broken gzip"],
    )
    def test_what_is_no_archive_is_refused(self, content: bytes) -> None:
        with pytest.raises(IntegrityError, match="image archive"):
            unpack(pieces(content), content_digest, where=WHERE)

    def test_an_archive_that_lacks_a_layer_is_not_whole(self, files: list[Path]) -> None:
        content = whole(compose(CONFIG, DIGESTS, [None, *files[1:]]))
        with pytest.raises(IntegrityError, match="it must hold exactly one image, whole"):
            unpack(pieces(content), content_digest, where=WHERE)

    def test_a_list_that_is_shorter_than_the_image_is_refused(self, files: list[Path]) -> None:
        content = whole(compose(CONFIG, DIGESTS[:2], list(files[:2])))
        with pytest.raises(IntegrityError, match="the archive lists 2 layers, its image has 3"):
            unpack(pieces(content), content_digest, where=WHERE)


class TestCompression:
    CONTENT = bytes(5 << 20) + b"the end" * 1000 + bytes(4 << 20)

    def test_members_are_one_stream_and_always_the_same(self) -> None:
        made = b"".join(compressed(pieces(self.CONTENT, 100_000)))
        assert gzip.decompress(made) == self.CONTENT
        assert made == b"".join(compressed(pieces(self.CONTENT, 999_999)))
        assert b"".join(plainly(pieces(made))) == self.CONTENT

    def test_what_is_plain_stays_plain(self) -> None:
        assert b"".join(plainly(pieces(self.CONTENT, 1 << 20))) == self.CONTENT
        assert b"".join(plainly([])) == b""

    def test_a_cut_stream_is_an_error(self) -> None:
        made = gzip.compress(self.CONTENT)
        with pytest.raises(zlib.error):
            b"".join(plainly([made[:-1]]))

    def test_what_does_not_shrink_is_not_worth_it(self) -> None:
        noise = random.Random(1).randbytes(1 << 20)  # noqa: S311
        assert [is_worth_compressing(sample) for sample in (noise, bytes(100), b"")] == [False, True, False]

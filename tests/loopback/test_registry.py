"""The loopback registry: a real engine pushes to it, and sends only what is asked for; nobody else gets anything."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.archive import plainly
from cluster.dockerd import DockerEngine
from cluster.errors import ImageError
from cluster.local import LocalTransport
from cluster.registry import REPOSITORY, USER, Registry, receiving
from cluster.shelf import Shelf
from tests.loopback.images import Tiny, inspect

UPLOADS = f"/v2/{REPOSITORY}/blobs/uploads/"


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def engine() -> Iterator[DockerEngine]:
    engine = DockerEngine(LocalTransport("here"))
    yield engine
    engine.close()


def push(engine: DockerEngine, image: str, registry: Registry) -> None:
    engine.push(image, reference=registry.reference, user=USER, secret=registry.secret)


class TestAnEngine:
    def test_pushes_layers_and_configuration(self, engine: DockerEngine, shelf: Shelf, tiny: Tiny) -> None:
        layers = inspect(tiny.digest)["RootFS"]["Layers"]
        before = inspect(tiny.digest)["RepoTags"]
        with receiving(shelf, wanted=layers) as registry:
            push(engine, tiny.digest, registry)
        config = shelf.config(tiny.digest)
        assert config is not None
        assert b'"rootfs"' in config
        for layer in layers:
            path = shelf.layer(layer)
            assert path is not None
            content = b"".join(plainly([path.read_bytes()]))
            assert f"sha256:{hashlib.sha256(content).hexdigest()}" == layer
        assert inspect(tiny.digest)["RepoTags"] == before, "the name that it was pushed under is gone again"

    def test_sends_nothing_that_is_known(self, engine: DockerEngine, shelf: Shelf, tiny: Tiny) -> None:
        layers = inspect(tiny.digest)["RootFS"]["Layers"]
        with receiving(shelf, wanted=layers) as registry:
            push(engine, tiny.digest, registry)
        with receiving(shelf, wanted=layers) as registry:
            push(engine, tiny.digest, registry)
            assert list(registry.blobs) == [tiny.digest], "only the configuration came again"

    def test_sends_what_was_known_and_is_gone_only_if_it_is_wanted(
        self, engine: DockerEngine, shelf: Shelf, tiny: Tiny
    ) -> None:
        layers = inspect(tiny.digest)["RootFS"]["Layers"]
        with receiving(shelf, wanted=layers) as registry:
            push(engine, tiny.digest, registry)
        shelf.forget(layers)
        with receiving(shelf, wanted=()) as registry:
            push(engine, tiny.digest, registry)
        assert [shelf.layer(layer) for layer in layers] == [None] * len(layers)
        with receiving(shelf, wanted=layers) as registry:
            push(engine, tiny.digest, registry)
        assert None not in [shelf.layer(layer) for layer in layers]

    def test_that_does_not_know_the_secret_is_refused(self, engine: DockerEngine, shelf: Shelf, tiny: Tiny) -> None:
        with receiving(shelf, wanted=()) as registry, pytest.raises(ImageError, match="cannot be pushed"):
            engine.push(tiny.digest, reference=registry.reference, user=USER, secret="another")
        assert not (shelf.folder / "layers").exists()

    def test_that_finds_no_room_here_gives_up_at_once(self, engine: DockerEngine, shelf: Shelf, tiny: Tiny) -> None:
        shelf.secret()
        (shelf.folder / "layers").touch()  # in the place of the folder
        began = time.monotonic()
        with receiving(shelf, wanted=()) as registry, pytest.raises(ImageError, match=r"cannot be pushed.*kept here"):
            push(engine, tiny.digest, registry)
        assert time.monotonic() - began < 20, "it does not try again and again"

    def test_that_finds_nobody_there_says_so(self, engine: DockerEngine, tiny: Tiny) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        with pytest.raises(ImageError, match="cannot be pushed"):
            engine.push(tiny.digest, reference=f"127.0.0.1:{port}/{REPOSITORY}", user=USER, secret="any")


class Asker:
    """Somebody who speaks to the registry by hand."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def __call__(
        self, method: str, path: str, body: bytes | None = None, *, secret: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        host, _, port = self.registry.address.partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        token = base64.b64encode(f"{USER}:{secret or self.registry.secret}".encode()).decode()
        connection.request(method, path, body, {"Authorization": f"Basic {token}", **headers})
        answer = connection.getresponse()
        told = {name.lower(): value for name, value in answer.getheaders()}
        content = answer.read()
        connection.close()
        return answer.status, told, content


@pytest.fixture
def ask(shelf: Shelf) -> Iterator[Asker]:
    with receiving(shelf, wanted=()) as registry:
        yield Asker(registry)


def name_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


class TestTheProtocol:
    BLOB = gzip.compress(b"a layer" * 1000, mtime=0)

    def test_a_blob_may_come_with_the_last_word(self, ask: Asker, shelf: Shelf) -> None:
        status, told, _ = ask("POST", UPLOADS)
        assert status == 202
        status, told, _ = ask("PUT", f"{told['location']}?digest={name_of(self.BLOB)}", self.BLOB)
        assert (status, told["docker-content-digest"]) == (201, name_of(self.BLOB))
        assert shelf.layer(name_of(b"a layer" * 1000))
        assert ask("HEAD", f"/v2/{REPOSITORY}/blobs/{name_of(self.BLOB)}")[0] == 200

    def test_what_is_not_what_it_is_said_to_be_is_refused(self, ask: Asker) -> None:
        _, told, _ = ask("POST", UPLOADS)
        assert ask("PUT", f"{told['location']}?digest={name_of(b'other')}", self.BLOB)[0] == 400
        assert ask("HEAD", f"/v2/{REPOSITORY}/blobs/{name_of(self.BLOB)}")[0] == 404

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PATCH", "PUT"])
    def test_nobody_without_the_secret_gets_an_answer(self, ask: Asker, method: str) -> None:
        status, told, _ = ask(method, "/v2/", secret="another")
        assert (status, told["www-authenticate"]) == (401, 'Basic realm="launcher"')

    def test_there_is_nothing_to_be_had(self, ask: Asker, shelf: Shelf) -> None:
        layer = shelf.put([b"a layer"])
        assert ask("GET", "/v2/")[0] == 200
        for path in (f"/v2/{REPOSITORY}/blobs/{layer}", "/secret", "/v2/../secret", "/v2/_catalog"):
            assert ask("GET", path)[0] == 404
        assert ask("POST", "/v2/other/blobs/uploads/")[0] == 404

    @pytest.mark.parametrize("sent", [0, 1000], ids=["nothing", "a part"])
    def test_a_blob_that_breaks_off_leaves_nothing(self, ask: Asker, shelf: Shelf, sent: int) -> None:
        _, told, _ = ask("POST", UPLOADS)
        host, _, port = ask.registry.address.partition(":")
        token = base64.b64encode(f"{USER}:{ask.registry.secret}".encode()).decode()
        with socket.create_connection((host, int(port)), timeout=10) as line:
            head = f"PATCH {told['location']} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {token}\r\n"
            line.sendall(head.encode() + b"Content-Length: 100000\r\n\r\n" + self.BLOB[:sent])
            line.shutdown(socket.SHUT_WR)
            assert line.recv(1000) == b""
        assert list((shelf.folder).glob("layers/*")) == []
        assert list((shelf.folder).glob(".incoming-*")) == []

    def test_what_cannot_be_kept_is_refused_for_good(self, ask: Asker, shelf: Shelf) -> None:
        _, told, _ = ask("POST", UPLOADS)
        (shelf.folder / "layers").touch()  # in the place of the folder
        status, _, said = ask("PUT", f"{told['location']}?digest={name_of(self.BLOB)}", self.BLOB)
        assert status == 403
        assert b"image layers cannot be kept here" in said

"""A registry of one machine: takes what an engine pushes, and asks for nothing that is known. Never a judgment on it.

An engine of the classic store can save an image only whole (a second per 60 MB), but pushes it layer by layer, and
asks first which layers are known (distribution/push_v2.go). So a registry on the loopback address, which every engine
may push to without TLS, is the quick way to the few layers that are new.
It speaks as much of the protocol as a push needs (https://distribution.github.io/distribution/spec/api/), to who knows
the shelf's secret; there is nothing to be had from it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from cluster.archive import CHUNK
from cluster.errors import ClusterError
from cluster.shelf import Shelf

USER = "launcher"
REPOSITORY = "launcher/layers"
_LONGEST = 8 << 20  # of a configuration or a manifest
_BROKEN_OFF = (EOFError, OSError, ValueError)  # what reading a body may end with
_UPLOADS = f"/v2/{REPOSITORY}/blobs/uploads/"
_BLOB = re.compile(rf"/v2/{REPOSITORY}/blobs/(sha256:[0-9a-f]{{64}})")
_MANIFEST = re.compile(rf"/v2/{REPOSITORY}/manifests/.+")


@dataclass(kw_only=True)
class Registry:
    """Where it listens, what it wants, and what it was told."""

    address: str
    secret: str
    wanted: Collection[str]  # digests of layers' contents: these it must get, others only if it has never seen them
    shelf: Shelf
    blobs: dict[str, int] = field(default_factory=dict)  # what came in this time: name and length
    uploads: dict[str, tuple[str, int, str]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The repository, as an engine is told of it."""
        return f"{self.address}/{REPOSITORY}"

    def known(self, name: str) -> int | None:
        """The length of a blob that need not be sent."""
        if name in self.blobs:
            return self.blobs[name]
        seen = self.shelf.pushed(name)
        if seen is None:
            return None
        layer, size = seen
        return size if layer not in self.wanted or self.shelf.layer(layer) else None


@contextmanager
def receiving(shelf: Shelf, *, wanted: Collection[str]) -> Iterator[Registry]:
    """A registry, as long as the block lasts."""
    secret = shelf.secret()
    server = _Server(("127.0.0.1", 0), _Handler)
    registry = Registry(
        address=f"127.0.0.1:{server.server_address[1]}", secret=secret, wanted=frozenset(wanted), shelf=shelf
    )
    server.registry = registry
    server.token = base64.b64encode(f"{USER}:{secret}".encode()).decode()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    registry: Registry
    token: str


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's signature
        """Say nothing: an engine asks by TLS first, which is no HTTP."""

    def do_GET(self) -> None:
        if not self._is_known():
            return
        self._answer(HTTPStatus.OK if urlsplit(self.path).path == "/v2/" else HTTPStatus.NOT_FOUND)

    def do_HEAD(self) -> None:
        if not self._is_known():
            return
        blob = _BLOB.fullmatch(self.path)
        size = self.server.registry.known(blob[1]) if blob else None
        if blob is None or size is None:
            self._answer(HTTPStatus.NOT_FOUND)
        else:
            self._answer(HTTPStatus.OK, {"Docker-Content-Digest": blob[1]}, length=size)

    def do_POST(self) -> None:
        if not self._is_known() or not self._is_emptied():
            return
        if urlsplit(self.path).path != _UPLOADS:
            self._answer(HTTPStatus.NOT_FOUND)
            return
        upload = secrets.token_hex(16)
        self._answer(HTTPStatus.ACCEPTED, {"Location": _UPLOADS + upload, "Range": "0-0"})

    def do_PATCH(self) -> None:
        if not self._is_known():
            return
        upload = urlsplit(self.path).path.removeprefix(_UPLOADS)
        size = self._take(upload)
        if size is not None:
            self._answer(HTTPStatus.ACCEPTED, {"Location": _UPLOADS + upload, "Range": f"0-{max(0, size - 1)}"})

    def do_PUT(self) -> None:
        if not self._is_known():
            return
        registry = self.server.registry
        if _MANIFEST.fullmatch(self.path):
            digest = hashlib.sha256()
            try:
                for chunk in self._body():
                    digest.update(chunk)
            except _BROKEN_OFF:
                self.close_connection = True
                return
            self._answer(HTTPStatus.CREATED, {"Docker-Content-Digest": _name(digest)})
            return
        upload = urlsplit(self.path).path.removeprefix(_UPLOADS)
        if upload in registry.uploads:
            self._is_emptied()
        elif self._take(upload) is None:
            return
        name, size, layer = registry.uploads.pop(upload)
        if parse_qs(urlsplit(self.path).query).get("digest") != [name]:
            self._answer(HTTPStatus.BAD_REQUEST)
            return
        registry.blobs[name] = size
        if layer:
            registry.shelf.note_pushed(name, layer, size)
        self._answer(HTTPStatus.CREATED, {"Docker-Content-Digest": name, "Location": f"/v2/{REPOSITORY}/blobs/{name}"})

    def _take(self, upload: str) -> int | None:
        """A blob: a layer, or the configuration, which is JSON. None when it broke off; nothing of it is kept."""
        registry = self.server.registry
        digest = hashlib.sha256()
        size = 0

        def heard(chunks: Iterable[bytes]) -> Iterator[bytes]:
            nonlocal size
            for chunk in chunks:
                size += len(chunk)
                digest.update(chunk)
                yield chunk

        try:
            body = heard(self._body())
            begin = next(body, b"")
            if begin[:1] == b"{":
                layer = ""
                registry.shelf.put_config(_whole(begin, body))
            else:
                layer = registry.shelf.put(_joined(begin, body))
        except (*_BROKEN_OFF, zlib.error):
            self.close_connection = True
            return None
        except ClusterError as error:  # a full disk
            self._refuse(error.what)
            return None
        registry.uploads[upload] = (_name(digest), size, layer)
        return size

    def _body(self) -> Iterator[bytes]:
        """The request's body, by length or in chunks; `EOFError` when it breaks off."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from self._read(int(self.headers.get("Content-Length") or 0))
            return
        while length := int(self.rfile.readline().partition(b";")[0], 16):
            yield from self._read(length)
            self.rfile.readline()
        self.rfile.readline()

    def _read(self, length: int) -> Iterator[bytes]:
        while length:
            chunk = self.rfile.read(min(length, CHUNK))
            if not chunk:
                raise EOFError  # no OSError: the shelf would take that for its disk's
            length -= len(chunk)
            yield chunk

    def _is_known(self) -> bool:
        """Whether the asker knows the secret; otherwise it is told so, and the connection ends."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic" and hmac.compare_digest(token.encode(), self.server.token.encode()):
            return True
        self.close_connection = True
        self._answer(HTTPStatus.UNAUTHORIZED, {"WWW-Authenticate": 'Basic realm="launcher"'})
        return False

    def _is_emptied(self) -> bool:
        """Read past a body that says nothing."""
        try:
            return sum(map(len, self._body())) <= _LONGEST
        except _BROKEN_OFF:
            self.close_connection = True
            return False

    def _refuse(self, what: str) -> None:
        """Say that it is no use to try again, and read on until the engine has heard it."""
        self._answer(HTTPStatus.FORBIDDEN, what=what)
        self.close_connection = True
        with suppress(*_BROKEN_OFF):
            for _ in self._body():
                pass

    def _answer(
        self, status: HTTPStatus, headers: dict[str, str] | None = None, *, length: int = 0, what: str = ""
    ) -> None:
        body = b""
        if status >= HTTPStatus.BAD_REQUEST and self.command != "HEAD":
            # DENIED is what engines do not try again (distribution/push_v2.go).
            body = json.dumps({"errors": [{"code": "DENIED", "message": what or status.phrase}]}).encode()
        self.send_response(status)
        for name, value in {"Docker-Distribution-API-Version": "registry/2.0", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)


def _whole(begin: bytes, rest: Iterator[bytes]) -> bytes:
    content = bytearray(begin)
    for chunk in rest:
        content += chunk
        if len(content) > _LONGEST:
            raise ValueError
    return bytes(content)


def _joined(begin: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield begin
    yield from rest


def _name(digest: hashlib._Hash) -> str:
    return f"sha256:{digest.hexdigest()}"

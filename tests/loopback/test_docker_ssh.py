"""Docker that cannot be had: over SSH and here, what is said of it, and that nobody waits for ever.

What is scripted stands at the seam's far end: a `docker` command on the node, or a socket that answers oddly.
"""

from __future__ import annotations

import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import dockerd
from cluster.command import Command
from cluster.container import ContainerSpec
from cluster.dockerd import DockerEngine
from cluster.engine import engine_error
from cluster.errors import EngineError, ImageError, NodeError
from cluster.local import LocalTransport
from tests.loopback.conftest import Serve, Site
from tests.loopback.images import LABEL, Tiny
from tests.loopback.sshd import Sshd, running_sshd
from tests.loopback.test_transport import eventually

SLEEP = ("sleep", "1063")


class TestOverSsh:
    def test_more_containers_are_waited_for_than_a_connection_has_sessions(
        self, site: Site, shared_sshd: Sshd, swept: Tiny
    ) -> None:
        with engine_at(site, shared_sshd) as engine:
            containers = [begin(engine, swept, name=str(number)) for number in range(12)]
            with ThreadPoolExecutor(12) as pool:
                waits = [pool.submit(engine.wait, container) for container in containers]
                assert engine.execute(containers[0], Command(argv=("echo", "free"))).stdout == b"free\n"
                for container in containers:
                    engine.remove(container)
                assert all(isinstance(wait.exception(), EngineError) for wait in waits)

    def test_a_broken_connection_is_unreachable_and_the_container_lives(
        self, site: Site, serve: Serve, swept: Tiny
    ) -> None:
        server = serve("frail")
        with engine_at(site, server) as engine, ThreadPoolExecutor(1) as pool:
            container = begin(engine, swept)
            before = server.commands
            wait = pool.submit(engine.wait, container)
            # Whoever asks something else meanwhile needs a channel of its own: then the first one is waiting.
            assert eventually(lambda: bool(engine.version()) and server.commands > before)
            server.drop()
            with pytest.raises(NodeError):
                wait.result()
            assert [one.is_live for one in engine.find({LABEL: swept.mark})] == [True]

    def test_nothing_of_us_is_left_on_the_node(self, site: Site, serve: Serve, swept: Tiny) -> None:
        server = serve("node")
        with engine_at(site, server) as engine:
            assert engine.image_id(swept.tag) == swept.digest
        assert eventually(lambda: not _below(server.process.pid))

    def test_a_node_whose_address_is_ipv6(self, site: Site, site_key: Path, tmp_path: Path, tiny: Tiny) -> None:
        if not _has_ipv6():
            pytest.skip("there is no IPv6 here")
        six = running_sshd(tmp_path / "six", authorized=site_key, host="::1")
        with six as server, engine_at(site, server) as engine:
            assert engine.image_id(tiny.tag) == tiny.digest

    @pytest.mark.parametrize(
        ("said", "what"),
        [
            ("permission denied while trying to connect to the Docker daemon socket", "this user may not use Docker"),
            ("Cannot connect to the Docker daemon. Is it running?", "the Docker engine does not answer"),
        ],
    )
    def test_what_the_nodes_client_says_is_understood(
        self, site: Site, serve: Serve, tmp_path: Path, said: str, what: str
    ) -> None:
        server = serve("node", options=(client(tmp_path, f"echo '{said}' >&2; exit 1"),))
        with engine_at(site, server) as engine, pytest.raises(EngineError) as caught:
            engine.version()
        assert (caught.value.what, caught.value.detail) == (what, (said,))
        assert caught.value.next_step

    def test_an_engine_that_hangs_is_told_from_a_node_that_does(self, site: Site, serve: Serve, tmp_path: Path) -> None:
        server = serve("node", options=(client(tmp_path, "exec cat >/dev/null"),))
        with engine_at(site, server, timeout=0.5) as engine, pytest.raises(EngineError) as caught:
            engine.version()
        assert str(caught.value) == (
            "node gpu-01: the Docker engine hangs: no answer within 0.5 s (connect)\n"
            "  next: on the node: sudo systemctl restart docker; journalctl -u docker says more"
        )


class TestHere:
    def test_an_engine_that_hangs(self, engine_says: Says) -> None:
        engine = engine_says(lambda _path: None, timeout=0.3)
        with pytest.raises(EngineError, match=r"the Docker engine hangs: no answer within 0\.3 s \(list\)"):
            engine.find({})

    def test_a_socket_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
        with pytest.raises(EngineError, match="the Docker engine does not answer") as caught:
            DockerEngine(LocalTransport("here")).find({})
        assert "systemctl start docker" in (caught.value.next_step or "")

    def test_a_user_who_may_not(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as closed:
            closed.bind(str(tmp_path / "docker.sock"))
            closed.listen()
            (tmp_path / "docker.sock").chmod(0)
            monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
            with _nobody(), pytest.raises(EngineError, match="this user may not use Docker") as caught:
                DockerEngine(LocalTransport("here")).version()
        assert "usermod -aG docker" in (caught.value.next_step or "")

    @pytest.mark.parametrize(
        ("said", "what"),
        [
            ("permission denied while trying to connect", "this user may not use Docker"),
            ("sh: 1: docker: not found", "Docker is not installed"),
            ("Cannot connect to the Docker daemon", "the Docker engine does not answer"),
        ],
    )
    def test_what_docker_says_has_a_cure(self, said: str, what: str) -> None:
        error = engine_error("gpu-01", said)
        assert error is not None
        assert (error.what, error.detail) == (what, (said,))
        assert error.next_step
        assert engine_error("gpu-01", "") is None

    def test_the_engine_of_the_environment_is_spoken_to(self, engine_says: Says) -> None:
        engine = engine_says(lambda _path: None)
        assert engine.version() == "99.1"

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"this is no HTTP\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nno JSON!!",
            b"HTTP/1.1 500 Oops\r\nContent-Length: 23\r\n\r\n" + b'{"message": "no space"}',
            b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
        ],
    )
    def test_odd_answers_are_errors_of_the_engine(self, engine_says: Says, answer: bytes) -> None:
        engine = engine_says(lambda path: answer if path.endswith("/containers/json") else ok("{}"))
        with pytest.raises(EngineError):
            engine.find({})

    def test_a_build_that_breaks_off_is_an_error_of_the_engine(self, engine_says: Says, tmp_path: Path) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        for answer in (head + b'1b\r\n{"stream": "Step 1/2 : FROM"}', head + b"7\r\nno JSON\r\n0\r\n\r\n"):
            engine = engine_says(lambda path, answer=answer: answer if "/build" in path else ok("{}"))
            (tmp_path / "context.tar").touch()
            with pytest.raises(EngineError), (tmp_path / "context.tar").open("rb") as context:
                engine.build(context, tag="x:1", arguments={}, labels={}, network=None, tell=lambda _message: None)

    def test_a_build_that_fails_is_an_error_of_the_image(self, engine_says: Says, tmp_path: Path) -> None:
        engine = engine_says(lambda path: ok('{"error": "pip: no such wheel\\n"}') if "/build" in path else ok("{}"))
        (tmp_path / "context.tar").touch()
        with (
            pytest.raises(ImageError, match="the image does not build: pip: no such wheel"),
            (tmp_path / "context.tar").open("rb") as context,
        ):
            engine.build(context, tag="x:1", arguments={}, labels={}, network=None, tell=lambda _message: None)

    def test_an_archive_may_take_long_before_its_first_byte(self, engine_says: Says) -> None:
        def slowly(path: str) -> bytes:
            if path.endswith("/get"):
                time.sleep(1.0)  # the engine lays the archive down on its disk
            return ok("an archive")

        engine = engine_says(slowly, timeout=0.2)
        assert b"".join(engine.save("x:1")) == b"an archive"

    def test_an_engine_that_takes_nothing_of_an_archive_is_given_up(
        self, engine_says: Says, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dockerd, "_STALLED", 0.3)
        engine = engine_says(lambda path: None if path.endswith("load") else ok("{}"), reads_bodies=False)
        with pytest.raises(EngineError):
            engine.load(b"x" * 1024**2 for _ in range(1000))

    def test_a_disk_that_fills_up_while_an_image_loads(self, engine_says: Says) -> None:
        full = '{"errorDetail": {"message": "no space left on device"}, "error": "no space left on device"}'
        engine = engine_says(lambda _path: ok(full))
        with pytest.raises(ImageError, match="the image does not load: no space left on device"):
            engine.load([b"archive"])

    def test_a_container_that_is_being_removed_did_not_end(self, engine_says: Says) -> None:
        state = (
            '{"Id": "it", "Name": "/it", "Image": "i", "Config": {}, "State": {"Status": "removing", "ExitCode": 0}}'
        )
        engine = engine_says(lambda path: ok('{"StatusCode": 0}') if path.endswith("/wait") else ok(state))
        with pytest.raises(EngineError, match="the container it was removed"):
            engine.wait("it")

    def test_a_state_of_a_newer_engine_is_live(self, engine_says: Says) -> None:
        listed = '[{"Id": "it", "Names": ["/it"], "ImageID": "sha256:1", "State": "hibernating", "Labels": null}]'
        engine = engine_says(lambda path: ok(listed) if "/containers/json" in path else ok("{}"))
        (one,) = engine.find({})
        assert one.is_live


Answer = Callable[[str], "bytes | None"]
Says = Callable[..., DockerEngine]


@pytest.fixture
def engine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Says]:
    """An engine whose socket answers what `answer(path)` says; None: nothing at all, and the line stays open."""
    over = threading.Event()
    servers: list[_Server] = []

    def says(answer: Answer, *, timeout: float = 20.0, reads_bodies: bool = True) -> DockerEngine:
        server = _Server(str(tmp_path / f"{len(servers)}.sock"), answer, over, reads_bodies=reads_bodies)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{server.server_address!s}")
        return DockerEngine(LocalTransport("here"), timeout=timeout)

    yield says
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, answer: Answer, over: threading.Event, *, reads_bodies: bool) -> None:
        self.answer, self.over, self.reads_bodies = answer, over, reads_bodies
        super().__init__(path, _Handler)


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        request = self.rfile.readline().decode().split()
        headers = {}
        while line := self.rfile.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if self.server.reads_bodies:
            self._read(headers)
        path = request[1].partition("?")[0] if request else ""
        answer = VERSION if path.endswith("/version") else self.server.answer(path)
        if answer is None:
            self.server.over.wait()
        else:
            self.wfile.write(answer)

    def _read(self, headers: dict[str, str]) -> None:
        self.rfile.read(int(headers.get("content-length", 0)))
        if "chunked" in headers.get("transfer-encoding", ""):
            while size := int(self.rfile.readline().strip() or b"0", 16):
                self.rfile.read(size + 2)


def ok(body: str) -> bytes:
    """An answer, after which the line is closed."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n{body}".encode()


VERSION = ok('{"ApiVersion": "1.41", "Version": "99.1"}')


@contextmanager
def engine_at(site: Site, server: Sshd, *, timeout: float = 30.0) -> Iterator[DockerEngine]:
    transport = site.reach(site.trust(site.address(server)))
    engine = DockerEngine(transport, timeout=timeout)
    try:
        yield engine
    finally:
        engine.close()
        transport.close()


def begin(engine: DockerEngine, tiny: Tiny, *, name: str = "it") -> str:
    spec = ContainerSpec(name=f"lt-{tiny.mark}-{name}", image=tiny.digest, argv=SLEEP, labels={LABEL: tiny.mark})
    container = engine.create(spec)
    engine.start(container)
    return container


def client(folder: Path, does: str) -> str:
    """An option of sshd: on this node the docker command does something else."""
    (folder / "bin").mkdir()
    (folder / "bin" / "docker").write_text(f"#!/bin/sh\n{does}\n")
    (folder / "bin" / "docker").chmod(0o755)
    return f"SetEnv PATH={folder}/bin:/usr/bin:/bin"


@contextmanager
def _nobody() -> Iterator[None]:
    """Be somebody without rights, where the tests are run by root."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was == 0:
            os.seteuid(0)


def _below(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True

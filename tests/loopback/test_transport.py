"""The Transport contract, kept alike by SSH and by this machine; and what only SSH has to keep."""

from __future__ import annotations

import errno
import getpass
import hashlib
import os
import pty
import queue
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest

from cluster.command import Command, Result, script
from cluster.errors import EngineError, InputError, UnreachableError
from cluster.local import LocalTransport
from cluster.ssh import Limits, SshTransport, hops, keys
from cluster.ssh.faults import MEANINGS, translate
from cluster.ssh.route import route
from cluster.ssh.session import wire_line
from cluster.transport import Transport
from cluster.trust import Address
from tests.loopback.conftest import PATIENT, Serve, Site
from tests.loopback.sshd import LOCALHOST, Sshd, free_port, make_key
from tests.pure.test_command import NASTY

SOON = 20.0  # seconds; how long a test may wait for what must come, not how long it takes


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def running(word: str) -> list[str]:
    """Processes that carry a word in their command line, which only a test's own would."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if word.encode() in line:
            found.append(entry.parent.name)
    return found


class TransportContract:
    """What every transport does; a subclass brings the transport."""

    @pytest.fixture
    def transport(self) -> Iterator[Transport]:
        raise NotImplementedError

    def test_a_command_answers_with_its_code_and_both_streams(self, transport: Transport) -> None:
        result = transport.run(script("echo out; echo err >&2; exit 3"))
        assert result == Result(code=3, stdout=b"out\n", stderr=b"err\n")

    def test_bytes_pass_unread(self, transport: Transport) -> None:
        every = bytes(range(256)) * 64
        assert transport.run(Command(argv=("cat",), stdin=every)) == Result(code=0, stdout=every, stderr=b"")

    def test_arguments_pass_unread(self, transport: Transport, tmp_path: Path) -> None:
        canary = tmp_path / "canary"
        words = (*NASTY, f"$(touch {canary})", f"`touch {canary}`", f"'; touch {canary}; '", f"\n touch {canary}\n")
        result = transport.run(Command(argv=("printf", r"%s\0", *words)))
        assert result.stdout.decode().split("\0")[:-1] == list(words)
        assert not canary.exists()

    def test_what_cannot_pass_is_refused_before_it_is_sent(self, transport: Transport) -> None:
        for word in ("a\0b", "\udcff", "x" * 140_000):
            with pytest.raises(InputError):
                transport.run(Command(argv=("echo", word)))

    def test_a_long_word_passes(self, transport: Transport) -> None:
        assert len(transport.run(Command(argv=("printf", "%s", "x" * 100_000))).stdout) == 100_000

    @pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV", "USR1"])
    def test_a_signal_is_told_as_a_shell_tells_it(self, transport: Transport, name: str) -> None:
        number = {"TERM": 15, "KILL": 9, "SEGV": 11, "USR1": 10}[name]
        assert transport.run(script(f"ulimit -c 0; kill -s {name} $$")).code == 128 + number

    def test_a_program_that_is_not_there_is_a_result(self, transport: Transport) -> None:
        result = transport.run(Command(argv=("no-such-program", "x")))
        assert (result.code, b"no-such-program" in result.stderr) == (127, True)

    def test_both_streams_may_be_large_at_once(self, transport: Transport) -> None:
        text = "head -c 10000000 /dev/zero & head -c 10000000 /dev/zero >&2; wait"
        result = transport.run(script(text))
        assert (result.code, len(result.stdout), len(result.stderr)) == (0, 10_000_000, 10_000_000)

    def test_input_may_be_large_while_output_is(self, transport: Transport) -> None:
        blob = os.urandom(4096) * 2500
        assert transport.run(Command(argv=("cat",), stdin=blob)).stdout == blob

    def test_input_that_nobody_reads_is_no_error(self, transport: Transport) -> None:
        assert transport.run(Command(argv=("true",), stdin=b"x" * 20_000_000)).code == 0

    def test_many_threads_share_it(self, transport: Transport) -> None:
        def ask(number: int) -> bytes:
            return transport.run(Command(argv=("echo", str(number)))).stdout

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, range(24))) == [f"{number}\n".encode() for number in range(24)]

    def test_silence_is_unreachable(self, transport: Transport) -> None:
        with pytest.raises(UnreachableError, match=r"no answer within 0\.3 s"):
            transport.run(Command(argv=("sleep", "61.25")), timeout=0.3)
        assert transport.run(Command(argv=("echo", "still here")), timeout=SOON).stdout == b"still here\n"

    def test_a_pipe_carries_question_and_answer_in_turn(self, transport: Transport) -> None:
        """Whoever waits for a word before the next chunk gets it."""
        answers: queue.Queue[bytes] = queue.Queue()
        said: list[bytes] = []

        def questions() -> Iterator[bytes]:
            for word in (b"one", b"two", b"three"):
                yield word + b"\n"
                said.append(answers.get(timeout=SOON))

        talk = script('while read -r word; do echo "<$word>"; done; echo end >&2; exit 5')
        assert transport.pipe(talk, questions(), answers.put) == 5
        assert said == [b"<one>\n", b"<two>\n", b"<three>\n"]

    def test_a_pipe_ends_when_its_command_does(self, transport: Transport) -> None:
        def for_ever() -> Iterator[bytes]:
            while True:
                time.sleep(0.01)
                yield b"more\n"

        heard: list[bytes] = []
        assert transport.pipe(script("read -r word; echo enough"), for_ever(), heard.append) == 0
        assert heard == [b"enough\n"]

    def test_what_is_sent_arrives_whole(self, transport: Transport) -> None:
        block = os.urandom(1 << 20)
        digest = hashlib.sha256()

        def blocks() -> Iterator[bytes]:
            for _ in range(50):
                digest.update(block)
                yield block

        result = transport.send(Command(argv=("sha256sum",)), blocks())
        assert result.stdout.decode().split() == [digest.hexdigest(), "-"]

    def test_sending_ends_when_the_command_does(self, transport: Transport) -> None:
        sent = 0

        def for_ever() -> Iterator[bytes]:
            nonlocal sent
            while True:
                sent += 1
                yield b"x" * 65536

        assert transport.send(script("head -c 10; exit 4"), for_ever()) == Result(code=4, stdout=b"x" * 10, stderr=b"")

    def test_an_error_of_the_sender_is_the_senders(self, transport: Transport) -> None:
        def broken() -> Iterator[bytes]:
            yield b"some"
            raise OSError(errno.EIO, "the disk is broken")

        with pytest.raises(OSError, match="the disk is broken"):
            transport.send(Command(argv=("cat",)), broken())

    def test_an_error_of_the_sink_is_the_sinks(self, transport: Transport) -> None:
        def full(_: bytes) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        with pytest.raises(OSError, match="no space left"):
            transport.stream(script("echo x; sleep 61.35"), full, stop=lambda: False)
        assert eventually(lambda: not running("61.35"))

    def test_a_stream_hands_over_all_and_the_code(self, transport: Transport) -> None:
        pieces: list[bytes] = []
        text = "cat; echo out; echo err >&2; exit 5"
        code = transport.stream(Command(argv=("sh", "-c", text), stdin=b"in\0\n"), pieces.append, stop=lambda: False)
        assert (code, b"".join(pieces)) == (5, b"in\0\nout\n")

    def test_a_stream_comes_as_it_is_written(self, transport: Transport, tmp_path: Path) -> None:
        go = tmp_path / "go"
        pieces: list[bytes] = []

        def sink(data: bytes) -> None:
            pieces.append(data)
            go.touch()

        wait = f'echo first; while [ ! -e "{go}" ]; do sleep 0.02; done; echo second'
        assert transport.stream(script(wait), sink, stop=lambda: False) == 0
        assert b"".join(pieces) == b"first\nsecond\n"

    @pytest.mark.parametrize("text", ["echo x; sleep 61.45", "trap '' TERM; echo x; while :; do sleep 61.45; done"])
    def test_nothing_of_a_stopped_stream_survives(self, transport: Transport, text: str) -> None:
        pieces: list[bytes] = []
        assert transport.stream(script(text), pieces.append, stop=lambda: bool(pieces)) == -1
        assert eventually(lambda: not running("61.45"))

    def test_closing_is_harmless_and_so_is_opening_again(self, transport: Transport) -> None:
        transport.open()
        transport.close()
        transport.close()
        transport.open()
        assert transport.run(Command(argv=("true",))).ok

    def test_a_docker_engine_answers_on_a_socket(self, transport: Transport) -> None:
        if not Path("/var/run/docker.sock").exists():
            pytest.skip("no Docker engine here")
        channel = transport.dial_docker()
        channel.settimeout(SOON)
        channel.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
        said = b""
        while data := channel.recv(4096):
            said += data
        channel.close()
        assert said.startswith(b"HTTP/1.0 200 OK")
        assert said.endswith(b"OK")


class TestLocal(TransportContract):
    @pytest.fixture
    def transport(self) -> Iterator[Transport]:
        transport = LocalTransport("here")
        yield transport
        transport.close()

    def test_its_user_is_who_runs_this(self, transport: Transport) -> None:
        assert transport.user == transport.run(Command(argv=("id", "-un"))).stdout.decode().strip()

    def test_a_user_without_a_name_is_known_by_number(self) -> None:
        ask = "import os; from cluster.local import LocalTransport as Here; os.setuid(54321); print(Here('here').user)"
        if os.geteuid():
            pytest.skip("only root can be another user")
        assert subprocess.run([sys.executable, "-c", ask], capture_output=True, check=True).stdout == b"54321\n"

    def test_no_engine_is_said_in_plain_words(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
        with pytest.raises(EngineError) as caught:
            LocalTransport("here").dial_docker()
        assert str(caught.value) == (
            "node here: no Docker engine on this machine\n"
            f"  {tmp_path}/docker.sock: No such file or directory\n"
            "  next: start Docker, set DOCKER_HOST to its socket, or use `engine: process`"
        )

    def test_a_docker_host_that_is_no_socket_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
        with pytest.raises(EngineError, match="is no local socket"):
            LocalTransport("here").dial_docker()

    @pytest.mark.parametrize("chosen", ["DOCKER_CONTEXT", "config.json"])
    def test_the_engine_is_the_docker_commands_own(
        self, chosen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        path = tmp_path / "engine.sock"
        (tmp_path / "docker").write_text(f"#!/bin/sh\necho unix://{path}\n")
        (tmp_path / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        monkeypatch.delenv("DOCKER_HOST", raising=False)
        if chosen == "DOCKER_CONTEXT":
            monkeypatch.setenv("DOCKER_CONTEXT", "mine")
        else:
            (tmp_path / "config.json").write_text('{"currentContext": "mine"}')
        with socket.socket(socket.AF_UNIX) as engine:
            engine.bind(str(path))
            engine.listen()
            channel = LocalTransport("here").dial_docker()
            channel.close()

    def test_a_context_elsewhere_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "docker").write_text("#!/bin/sh\necho ssh://gpu-09\n")
        (tmp_path / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("DOCKER_HOST", raising=False)
        monkeypatch.setenv("DOCKER_CONTEXT", "mine")
        with pytest.raises(EngineError, match="the Docker context at ssh://gpu-09 is no local socket"):
            LocalTransport("here").dial_docker()


class TestSsh(TransportContract):
    @pytest.fixture
    def transport(self, shared_sshd: Sshd, site: Site) -> Iterator[Transport]:
        transport = site.reach(site.trust(site.address(shared_sshd)))
        yield transport
        transport.close()

    def test_more_lasting_sessions_than_a_connection_may_carry(self, transport: Transport) -> None:
        done = threading.Event()
        heard = threading.Semaphore(0)

        def follow() -> int:
            return transport.stream(script("echo x; sleep 61.55"), lambda _: heard.release(), stop=done.is_set)

        with ThreadPoolExecutor(12) as pool:
            follows = [pool.submit(follow) for _ in range(12)]
            try:
                assert all(heard.acquire(timeout=SOON) for _ in follows)
                assert transport.run(Command(argv=("echo", "free"))).stdout == b"free\n"
            finally:
                done.set()
            assert {follow.result() for follow in follows} == {-1}
        assert eventually(lambda: not running("61.55"))

    def test_a_dial_that_fails_says_why(self, shared_sshd: Sshd, site: Site) -> None:
        transport = site.reach(site.trust(site.address(shared_sshd)))
        transport._session = _no_docker(transport)  # type: ignore[assignment, method-assign]
        channel = transport.dial_docker()
        channel.settimeout(SOON)
        with pytest.raises(EngineError, match="there is no docker command"):
            channel.recv(1)
        channel.close()
        transport.close()


def _no_docker(transport: SshTransport) -> Callable[..., object]:
    whole = transport._session

    def session(line: str, **options: bool) -> object:
        return whole(line.replace("docker", "no-such-docker", 1), **options)

    return session


SHELLS = [name for name in ("sh", "bash", "dash", "zsh", "fish", "tcsh", "csh", "mksh") if shutil.which(name)]


@pytest.mark.parametrize("shell", SHELLS)
def test_any_login_shell_passes_arguments_unread(shell: str, tmp_path: Path) -> None:
    wire = wire_line(Command(argv=("printf", r"%s\0", *NASTY)).shell())
    said = subprocess.run([shell, "-c", wire], capture_output=True, check=True, cwd=tmp_path).stdout
    assert said.decode().split("\0")[:-1] == list(NASTY)
    assert list(tmp_path.iterdir()) == []


class TestFaults:
    def test_a_port_that_refuses(self, site: Site, shared_sshd: Sshd) -> None:
        address = site.trust(site.address(shared_sshd))
        closed = Address(node="gpu-01", host=LOCALHOST, port=free_port())
        text = site.known_hosts.read_text().replace(str(address.port), str(closed.port))
        site.known_hosts.write_text(text)
        error = failure(site.reach(closed))
        assert str(error) == (
            f"node gpu-01 (127.0.0.1:{closed.port}): the connection to port {closed.port} was refused\n"
            "  next: start sshd on the machine, or set the right port for gpu-01 in cluster.yaml"
        )
        assert error.exit_code == 3

    def test_a_name_that_is_not_found(self, site: Site, shared_sshd: Sshd) -> None:
        site.trust(site.address(shared_sshd))
        site.known_hosts.write_text(f"nowhere.invalid {shared_sshd.host_key()}\n")
        error = failure(site.reach(Address(node="gpu-01", host="nowhere.invalid")))
        assert error.what == "the name 'nowhere.invalid' was not found"

    def test_an_address_that_never_answers(self, site: Site, shared_sshd: Sshd) -> None:
        site.trust(site.address(shared_sshd))
        with full_listener() as port:
            site.known_hosts.write_text(f"[{LOCALHOST}]:{port} {shared_sshd.host_key()}\n")
            address = Address(node="gpu-01", host=LOCALHOST, port=port)
            assert failure(site.reach(address, limits=Limits(connect=0.3))).what == "no answer within 0.3 s (timed out)"

    def test_a_server_that_accepts_and_says_nothing(self, site: Site, serve: Serve) -> None:
        server = serve("hung")
        address = site.trust(site.address(server))
        server.freeze()
        error = failure(site.reach(address, limits=Limits(banner=0.5)))
        assert error.what == "sshd accepts the connection but says nothing"

    def test_closing_does_not_wait_for_a_connection_that_is_made(self, site: Site, serve: Serve) -> None:
        server = serve("hung")
        transport = site.reach(site.trust(site.address(server)))
        server.freeze()
        with ThreadPoolExecutor(1) as pool:
            opening = pool.submit(transport.open)
            assert eventually(transport._connecting.locked)
            transport.close()
            assert not opening.done()
            server.thaw()
            with pytest.raises(UnreachableError, match="we closed the connection"):
                opening.result(SOON)
        assert transport.run(Command(argv=("true",))).ok
        transport.close()

    def test_an_agent_that_hangs_is_passed_over(
        self, site: Site, shared_sshd: Sshd, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        address = site.trust(site.address(shared_sshd))
        monkeypatch.setattr(keys, "AGENT", 0.2)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(site.folder / "agent"))
            silent.listen()
            monkeypatch.setenv("SSH_AUTH_SOCK", str(site.folder / "agent"))
            transport = site.reach(address)
            assert transport.run(Command(argv=("true",))).ok
            transport.close()
            error = failure(site.reach(replace(address, identity_file="/nowhere")))
            assert error.detail == ("tried keys: agent (no answer within 0.2 s), /nowhere (no such file)",)

    def test_a_server_that_drops_every_connection_is_asked_four_times(self, site: Site, shared_sshd: Sshd) -> None:
        site.trust(site.address(shared_sshd))
        with dropping_listener() as (port, count):
            site.known_hosts.write_text(f"[{LOCALHOST}]:{port} {shared_sshd.host_key()}\n")
            error = failure(site.reach(Address(node="gpu-01", host=LOCALHOST, port=port)))
            assert error.what == "the server closed the connection before authentication"
            assert count() == 4

    def test_a_busy_server_is_no_failure(self, site: Site, serve: Serve) -> None:
        server = serve("busy", options=("MaxStartups 3:50:100",))
        address = site.trust(site.address(server))
        transports = [site.reach(address) for _ in range(12)]
        with ThreadPoolExecutor(12) as pool:
            assert all(pool.map(lambda transport: transport.run(Command(argv=("true",))).ok, transports))
        for transport in transports:
            transport.close()

    def test_a_key_that_is_not_accepted_is_offered_once(self, site: Site, serve: Serve, tmp_path: Path) -> None:
        server = serve("strict")
        wrong = make_key(tmp_path / "wrong")
        site.trust(site.address(server))
        address = Address(node="gpu-01", host=LOCALHOST, port=server.port, user="root", identity_file=str(wrong))
        error = failure(site.reach(address))
        assert str(error) == (
            f"node gpu-01 (127.0.0.1:{server.port}): permission denied for user 'root'\n"
            f"  tried keys: {wrong}\n"
            "  next: ssh-copy-id root@127.0.0.1, or set user or identity_file for gpu-01 in cluster.yaml"
        )
        assert server.attempts == 1

    def test_a_locked_key_and_a_missing_one_are_named(self, site: Site, shared_sshd: Sshd, tmp_path: Path) -> None:
        locked = make_key(tmp_path / "locked", passphrase="secret")
        site.trust(site.address(shared_sshd))
        site.config.write_text(f"IdentityFile {tmp_path}/gone\n")
        address = Address(node="gpu-01", host=LOCALHOST, port=shared_sshd.port, identity_file=str(locked))
        tried = f"tried keys: {locked} (locked by a passphrase: run ssh-add), {tmp_path}/gone (no such file)"
        assert failure(site.reach(address)).detail == (tried,)

    def test_a_connection_that_breaks_is_no_normal_end(self, site: Site, serve: Serve) -> None:
        server = serve("frail")
        transport = site.reach(site.trust(site.address(server)))
        pieces: list[bytes] = []

        def sink(data: bytes) -> None:
            pieces.append(data)
            server.drop()

        with pytest.raises(UnreachableError, match="the connection was lost"):
            transport.stream(script("echo x; sleep 61.65"), sink, stop=lambda: False)
        assert eventually(lambda: not running("61.65"))
        assert transport.run(Command(argv=("echo", "again"))).stdout == b"again\n"
        transport.close()

    def test_a_broken_connection_ends_a_run(self, site: Site, serve: Serve, tmp_path: Path) -> None:
        server = serve("frail")
        transport = site.reach(site.trust(site.address(server)))
        begun = tmp_path / "begun"

        def break_it() -> None:
            eventually(begun.exists)
            server.drop()

        threading.Thread(target=break_it).start()
        with pytest.raises(UnreachableError, match="the connection was lost"):
            transport.run(script('touch "$1"; exec sleep 3', str(begun)))
        transport.close()

    def test_the_kernel_is_asked_to_notice_a_dead_peer(self, site: Site, shared_sshd: Sshd) -> None:
        transport = site.reach(site.trust(site.address(shared_sshd)), limits=Limits(dead=6))
        transport.open()
        sock = transport._links[0]._transport.sock
        assert isinstance(sock, socket.socket)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 6000
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        transport.close()

    def test_every_error_of_paramiko_has_a_meaning(self, site: Site, shared_sshd: Sshd) -> None:
        def family(kind: type[paramiko.SSHException]) -> set[type[paramiko.SSHException]]:
            own = {kind} if kind.__module__.startswith("paramiko") else set()
            return own.union(*(family(child) for child in kind.__subclasses__()))

        assert family(paramiko.SSHException) == set(MEANINGS)
        (hop,) = route(site.address(shared_sshd), site.config, PATIENT)
        for error in (EOFError(), OSError(113, "no route"), paramiko.ChannelException(1, "no"), TimeoutError()):
            assert translate(hop, error).exit_code == 3


class TestConfiguration:
    def test_an_alias_is_resolved_and_pinned_by_its_own_name(self, site: Site, shared_sshd: Sshd) -> None:
        site.config.write_text(
            "Host gpu-a\n  HostName 127.0.0.1\n"
            f"  Port {shared_sshd.port}\n  User root\n  IdentityFile {site.key}\n  ForwardAgent yes\n"
        )
        address = site.trust(Address(node="gpu-01", host="gpu-a"))
        assert site.known_hosts.read_text() == f"gpu-a {shared_sshd.host_key()}\n"
        transport = site.reach(address)
        assert transport.run(script("echo $USER ${SSH_AUTH_SOCK-none}")).stdout == b"root none\n"
        transport.close()

    def test_the_inventory_wins_over_the_configuration(self, site: Site) -> None:
        site.config.write_text("Host *\n  Port 1\n  User nobody\n  ConnectTimeout 9\n  ProxyCommand run %h %p %r\n")
        (hop,) = route(Address(node="n", host="h", port=22022, user="ml"), site.config, PATIENT)
        assert (hop.port, hop.user, hop.timeout, hop.proxy) == (22022, "ml", 9.0, "run h 22022 ml")

    def test_an_included_file_is_read_and_ends_where_it_ends(self, site: Site) -> None:
        (site.folder / "more").write_text("Host a\n  Port 1001\n")
        site.config.write_text("Include more\nUser ml\nHost b\n  Port 1002\n")
        found = [route(Address(node="n", host=host), site.config, PATIENT)[0] for host in ("a", "b")]
        assert [(hop.user, hop.port) for hop in found] == [("ml", 1001), ("ml", 1002)]

    def test_the_user_is_known_without_a_connection(self, site: Site) -> None:
        site.config.write_text("Host a\n  User ml\n  ProxyJump ops@gate\n")
        said = [Address(node="n", host="a"), Address(node="n", host="a", user="ada")]
        assert [site.reach(address).user for address in said] == ["ml", "ada"]

    def test_jump_hosts_are_visited_in_the_order_written(self, site: Site) -> None:
        site.config.write_text("Host node\n  ProxyJump first,ops@second:2222\n")
        way = hops(Address(node="n", host="node"), ssh_config=site.config)
        assert [(hop.host, hop.user, hop.port) for hop in way] == [
            ("first", None, None),
            ("second", "ops", 2222),
            ("node", None, None),
        ]

    def test_a_jump_host_is_not_its_own_way(self, site: Site) -> None:
        site.config.write_text("Host *\n  ProxyJump gate\n")
        assert [hop.host for hop in hops(Address(node="n", host="node"), ssh_config=site.config)] == ["gate", "node"]

    def test_a_circle_of_jump_hosts_is_refused(self, site: Site) -> None:
        site.config.write_text("Host a\n  ProxyJump b\nHost b\n  ProxyJump a\n")
        with pytest.raises(InputError, match="more than 8 jump hosts"):
            hops(Address(node="n", host="a"), ssh_config=site.config)

    def test_the_inventory_can_turn_a_configured_jump_off(self, site: Site) -> None:
        site.config.write_text("Host *\n  ProxyJump gate\n")
        assert len(hops(Address(node="n", host="node", jump="none"), ssh_config=site.config)) == 1

    @pytest.mark.parametrize("jump", ["-oProxyCommand=x", "", "gate:ssh", "@"])
    def test_a_jump_host_that_is_none_is_refused(self, site: Site, jump: str) -> None:
        with pytest.raises(InputError, match="is no jump host"):
            hops(Address(node="n", host="node", jump=f"gate,{jump}"), ssh_config=site.config)

    def test_an_address_of_six_is_a_jump_host_too(self, site: Site) -> None:
        first, _ = hops(Address(node="n", host="node", jump="ops@[::1]:2222"), ssh_config=site.config)
        assert (first.user, first.host, first.port, first.key_name) == ("ops", "::1", 2222, "[::1]:2222")

    def test_a_proxy_command_carries_bytes_and_no_trust(self, site: Site, shared_sshd: Sshd) -> None:
        relay = f"{sys.executable} -c '{RELAY}' %h %p"
        site.config.write_text(f"ProxyCommand {relay}\n")
        transport = site.reach(site.trust(site.address(shared_sshd)))
        assert transport.run(Command(argv=("echo", "through"))).stdout == b"through\n"
        transport.close()

    def test_a_proxy_command_does_not_hear_our_interrupts(self, site: Site, shared_sshd: Sshd) -> None:
        noted = site.folder / "group"
        note = f'import os; open("{noted}", "w").write(str(os.getpgrp())); '
        site.config.write_text(f"ProxyCommand {sys.executable} -c '{note}{RELAY}' %h %p\n")
        transport = site.reach(site.trust(site.address(shared_sshd)))
        assert transport.run(Command(argv=("true",))).ok
        transport.close()
        assert noted.read_text() != str(os.getpgrp())

    def test_the_agent_is_asked(self, site: Site, shared_sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
        site.trust(site.address(shared_sshd))
        with agent(site.folder / "agent", site.key) as sock:
            monkeypatch.setenv("SSH_AUTH_SOCK", sock)
            transport = site.reach(Address(node="gpu-01", host=LOCALHOST, port=shared_sshd.port))
            assert transport.run(Command(argv=("true",))).ok
            transport.close()

    def test_s04_the_agent_is_never_forwarded(
        self, site: Site, shared_sshd: Sshd, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site.trust(site.address(shared_sshd))
        site.config.write_text("Host *\n  ForwardAgent yes\n")
        with agent(site.folder / "agent", site.key) as sock:
            monkeypatch.setenv("SSH_AUTH_SOCK", sock)
            command = ["ssh", "-F", str(site.config), "-o", f"UserKnownHostsFile={site.known_hosts}"]
            there = f"{getpass.getuser()}@{LOCALHOST}"
            asked = [*command, "-p", str(shared_sshd.port), there, "echo ${SSH_AUTH_SOCK-none}"]
            forwarded = subprocess.run(asked, capture_output=True, check=True).stdout
            transport = site.reach(Address(node="gpu-01", host=LOCALHOST, port=shared_sshd.port))
            ours = transport.run(script("echo ${SSH_AUTH_SOCK-none}")).stdout
            transport.close()
        assert (forwarded != b"none\n", ours) == (True, b"none\n")


class TestTerminal:
    def test_a_terminal_is_passed_through_with_its_size(self, site: Site, shared_sshd: Sshd) -> None:
        address = site.trust(site.address(shared_sshd))
        text = "stty size; read -r line; echo got $line; exit 7"
        assert on_a_terminal(site, address, text, typed=b"hello\n") == (7, ["24 80", "hello", "got hello"])

    def test_pipes_are_passed_through(self, site: Site, shared_sshd: Sshd) -> None:
        address = site.trust(site.address(shared_sshd))
        line = [sys.executable, "-c", INTERACT, *inside(site, address), "cat; echo err >&2; exit 6", ""]
        done = subprocess.run(line, input=b"a\0b", capture_output=True, check=False, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (6, b"a\0b", b"err\n")


RELAY = (
    "import socket, sys, threading, os; s = socket.create_connection((sys.argv[1], int(sys.argv[2])));"
    "f = lambda: [s.sendall(d) for d in iter(lambda: os.read(0, 65536), bytes())];"
    "threading.Thread(target=f, daemon=True).start();"
    "[os.write(1, d) for d in iter(lambda: s.recv(65536), bytes())]"
)

INTERACT = """
import sys
from pathlib import Path
from cluster.command import script
from cluster.ssh import SshTransport
from cluster.trust import Address
port, key, known_hosts, config, text, tty = sys.argv[1:]
address = Address(node="n", host="127.0.0.1", port=int(port), identity_file=key)
transport = SshTransport(address, known_hosts=Path(known_hosts), ssh_config=Path(config))
code = transport.interact(script(text), tty=bool(tty))
transport.close()
sys.exit(code)
"""


def inside(site: Site, address: Address) -> tuple[str, str, str, str]:
    return str(address.port), str(site.key), str(site.known_hosts), str(site.config)


def on_a_terminal(site: Site, address: Address, text: str, *, typed: bytes) -> tuple[int, list[str]]:
    """Run it on a terminal of its own; the code and the lines that were seen there."""
    ours, theirs = pty.openpty()
    line = [sys.executable, "-c", INTERACT, *inside(site, address), text, "tty"]
    os.set_blocking(ours, False)
    subprocess.run(["stty", "rows", "24", "cols", "80"], stdin=theirs, check=True)
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + SOON
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                data = _read(ours)
                if not data:
                    break
                seen += data
                if typed and b"24 80" in seen:
                    os.write(ours, typed)
                    typed = b""
        return process.wait(SOON), [line for line in seen.decode().replace("\r", "").split("\n") if line]
    finally:
        process.kill()
        os.close(ours)


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except OSError:  # how a terminal ends
        return b""


def failure(transport: SshTransport) -> UnreachableError:
    try:
        with pytest.raises(UnreachableError) as caught:
            transport.open()
    finally:
        transport.close()
    return caught.value


@contextmanager
def dropping_listener() -> Iterator[tuple[int, Callable[[], int]]]:
    """A port that closes every connection at once, and counts them."""
    count = 0

    def serve() -> None:
        nonlocal count
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            count += 1
            client.close()

    with socket.create_server((LOCALHOST, 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], lambda: count
        listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def full_listener() -> Iterator[int]:
    """A port whose queue is full, so that the kernel answers nobody."""
    with socket.socket() as listener:
        listener.bind((LOCALHOST, 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex((LOCALHOST, port))
        try:
            yield port
        finally:
            for client in waiting:
                client.close()


@contextmanager
def agent(path: Path, key: Path) -> Iterator[str]:
    """An agent that holds one key."""
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        assert eventually(path.exists)
        subprocess.run(
            ["ssh-add", "-q", str(key)], check=True, env={**os.environ, "SSH_AUTH_SOCK": str(path)}, timeout=30
        )
        yield str(path)
    finally:
        process.terminate()
        process.wait()

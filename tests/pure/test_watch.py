"""Watching a run, and mirroring its log: over machines and engines that are doubles."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cluster.container import (
    LABEL_CLUSTER,
    LABEL_NODE,
    LABEL_OWNER,
    LABEL_ROLE,
    ContainerSpec,
    ContainerState,
)
from cluster.errors import EngineError, Interrupted, UnreachableError, UntrustedError
from cluster.fleet import Machine
from launcher.events import Event, Failure, NodeEnded, RunEnded, StageBegan
from launcher.stages import logs
from launcher.stages import watch as stage
from launcher.stages.logs import Mirror
from launcher.stages.watch import Detached, Watched, read_exit, watch
from tests.pure.doubles import Cuts, FileTransport, MemoryEngine, Program

NOW = 1771826426.5
WORK, GOOD, BAD, DEAF = ("work",), ("good",), ("bad",), ("deaf",)
PROGRAMS: dict[tuple[str, ...], Program] = {
    GOOD: Program(code=0),
    BAD: Program(code=1, says="[rank 0] starting\nTraceback: no memory left\n"),
    DEAF: Program(deaf=True),
    ("oom",): Program(code=1, oom=True),
}
OUT = "/launcher/out"


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "RETRY", 0.001)
    monkeypatch.setattr(logs, "RETRY", 0.001)


@pytest.fixture(autouse=True)
def _signals_stay_as_they_are() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


class Nodes:
    """A run on doubles: node 1, 2, … each with its program, and what was told of it."""

    def __init__(self, folder: Path, *programs: tuple[str, ...], grace: float = 5.0, node_grace: float = 60.0) -> None:
        self.engines = [MemoryEngine(f"gpu-{n}", programs=PROGRAMS) for n in range(1, len(programs) + 1)]
        self.transports = [FileTransport(engine.node, files={f"{OUT}/node.log": b""}) for engine in self.engines]
        self.events: list[Event] = []
        self.lines: list[tuple[str, bytes]] = []
        self.containers = [self._begin(engine, argv) for engine, argv in zip(self.engines, programs, strict=True)]
        self._folder, self._grace, self._node_grace = folder, grace, node_grace

    def _begin(self, engine: MemoryEngine, argv: tuple[str, ...]) -> str:
        spec = ContainerSpec(name="run", image=engine.put_image(b""), argv=argv, labels={})
        container = engine.create(spec)
        engine.start(container)
        return container

    def says(self, node: int, **said: object) -> None:
        """What the agent on a node leaves behind."""
        self.transports[node - 1].files[f"{OUT}/exit.json"] = json.dumps(said).encode()

    def end(self, node: int, code: int) -> Callable[[], None]:
        """Something that ends a node's program."""
        return lambda: self.engines[node - 1].end(self.containers[node - 1], code)

    def watch(self, *, own: bool = True, lost: Mapping[str, NodeEnded] | None = None) -> RunEnded:
        parts = [
            Watched(
                machine=Machine(name=engine.node, transport=transport, engine=engine),
                container=container,
                out=OUT,
                mirror=self._folder / f"{engine.node}.log",
                grace=self._grace,
                node_grace=self._node_grace,
            )
            for engine, transport, container in zip(self.engines, self.transports, self.containers, strict=True)
        ]

        def show(node: str, line: bytes) -> None:
            self.lines.append((node, line))

        return watch(parts, emit=self.events.append, show=show, own=own, clear=own, lost=lost, clock=lambda: NOW)

    @property
    def ends(self) -> Mapping[str, NodeEnded]:
        return {event.node: event for event in self.events if isinstance(event, NodeEnded)}

    def stops(self) -> list[int]:
        """How often each node was asked to stop."""
        return [engine.faults.calls.count("stop") for engine in self.engines]


def ended(node: str, code: int = 0, **fields: object) -> NodeEnded:
    return NodeEnded(time=NOW, node=node, code=code, **fields)  # type: ignore[arg-type]


def interrupt() -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_often() -> None:
    """Ctrl-C, and the key is held."""
    for _ in range(50):
        interrupt()


class TestEnds:
    def test_a_run_that_ends_well_everywhere_is_done_and_cleared_away(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, GOOD, GOOD, GOOD)
        nodes.transports[1].files[f"{OUT}/node.log"] = b"one\ntwo\nthr"
        assert nodes.watch() == RunEnded(time=NOW, code=0)
        assert nodes.ends == {f"gpu-{n}": ended(f"gpu-{n}") for n in (1, 2, 3)}
        assert nodes.lines == [("gpu-2", b"one"), ("gpu-2", b"two"), ("gpu-2", b"thr")]
        assert (tmp_path / "gpu-2.log").read_bytes() == b"one\ntwo\nthr"
        assert [engine.find({}) for engine in nodes.engines] == [(), (), ()]
        assert nodes.stops() == [0, 0, 0]

    def test_one_bad_end_stops_the_others_and_is_the_cause(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, WORK, BAD, WORK)
        nodes.says(
            2, code=1, stopped=False, failures=[{"rank": 9, "exit_code": 1, "type": "ValueError", "message": "x"}]
        )
        for other in (1, 3):
            nodes.says(other, code=143, stopped=True, failures=[])
        assert nodes.watch() == RunEnded(time=NOW, code=1, cause="node gpu-2, rank 9: exit 1: ValueError: x")
        failure = Failure(rank=9, exit_code=1, signal=None, time=0.0, type="ValueError", message="x")
        assert nodes.ends == {
            "gpu-1": ended("gpu-1", 143, stopped=True),
            "gpu-2": ended("gpu-2", 1, failures=(failure,)),
            "gpu-3": ended("gpu-3", 143, stopped=True),
        }
        assert nodes.stops() == [1, 0, 1]

    def test_the_first_cause_counts_not_the_first_arrival(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, BAD, WORK)
        echo = {"rank": 0, "exit_code": 1, "time": 9.0, "type": "RuntimeError", "message": "Connection closed by peer"}
        nodes.says(1, code=1, failures=[echo])
        nodes.says(2, code=1, failures=[{"rank": 3, "exit_code": -9, "signal": "SIGKILL", "time": 9.5}])
        nodes.engines[1].faults.at("stop", nodes.end(2, 1))
        assert nodes.watch().cause == "node gpu-2, rank 3: killed by SIGKILL"

    def test_a_stop_from_outside_is_no_failure(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, ("stopped",), WORK)
        nodes.engines[0].end(nodes.containers[0], 143)
        for node in (1, 2):
            nodes.says(node, code=143, stopped=True)
        end = nodes.watch()
        assert end == RunEnded(time=NOW, code=130, cause="stopped from outside (launcher stop, or down)")

    def test_out_of_memory_is_the_engines_word(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, ("oom",))
        end = nodes.watch()
        assert nodes.ends["gpu-1"].oom
        assert end.cause == "node gpu-1: out of memory: the kernel killed it at the container's limit"

    @pytest.mark.parametrize(
        "left", [None, b"", b'{"code": 1, "failures": [{"ra', b"[1]", b"null", b"\xff", b'{"a": 1}']
    )
    def test_an_agent_that_left_no_word_is_quoted_by_its_last_line(self, tmp_path: Path, left: bytes | None) -> None:
        nodes = Nodes(tmp_path, BAD)
        if left is not None:
            nodes.transports[0].files[f"{OUT}/exit.json"] = left
        assert nodes.watch() == RunEnded(time=NOW, code=1, cause="node gpu-1: exit 1: Traceback: no memory left")

    def test_who_only_watches_leaves_the_containers_to_their_owner(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, GOOD, BAD)
        assert nodes.watch(own=False).code == 1
        assert [len(engine.find({})) for engine in nodes.engines] == [1, 1]

    def test_a_bug_is_heard_of(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, GOOD, WORK)

        def bug() -> None:
            raise ZeroDivisionError

        nodes.engines[0].faults.at("wait", bug)
        with pytest.raises(ZeroDivisionError):
            nodes.watch()


class TestSilence:
    lost = UnreachableError("gpu-1", "the connection was lost")

    def test_a_line_that_drops_again_and_again_is_no_silence(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, WORK, node_grace=0.0)
        nodes.engines[0].faults.at("wait", *[self.lost] * 100, nodes.end(1, 0))
        assert nodes.watch() == RunEnded(time=NOW, code=0)

    def test_after_the_grace_a_silent_node_is_lost_and_the_others_are_stopped(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, WORK, WORK, node_grace=0.0)
        nodes.says(2, code=143, stopped=True)
        nodes.engines[0].faults.at("wait", self.lost)
        nodes.engines[0].faults.at("version", self.lost)
        lost = "lost: the connection was lost, silent for 0 s"
        assert nodes.watch() == RunEnded(time=NOW, code=1, cause=f"node gpu-1: {lost}")
        assert nodes.ends["gpu-1"] == ended("gpu-1", 1, lost=lost)
        assert nodes.stops() == [0, 1]

    def test_within_the_grace_it_may_come_back(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, WORK)
        nodes.engines[0].faults.at("wait", self.lost, nodes.end(1, 0))
        nodes.engines[0].faults.at("version", *[self.lost] * 50)
        assert nodes.watch().code == 0

    def test_of_a_node_that_cannot_be_watched_the_others_tell(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, ("stopped",))
        nodes.engines[0].end(nodes.containers[0], 143)
        dead = {"rank": 9, "exit_code": 137, "signal": "SIGKILL", "time": 9.5, "type": None, "message": ""}
        told = {
            "node": "gpu-2",
            "time": 10.0,
            "code": 1,
            "stopped": False,
            "oom": False,
            "lost": "",
            "failures": [dead],
        }
        nodes.says(1, code=143, stopped=True, failures=[], others=[told])
        lost = {"gpu-2": ended("gpu-2", 1, lost="lost: no answer")}
        assert nodes.watch(lost=lost).cause == "node gpu-2, rank 9: killed by SIGKILL"

    def test_a_node_of_which_nobody_tells_is_lost(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, GOOD)
        lost = {"gpu-2": ended("gpu-2", 1, lost="lost: no answer")}
        assert nodes.watch(lost=lost) == RunEnded(time=NOW, code=1, cause="node gpu-2: lost: no answer")

    def test_an_impostor_is_as_good_as_silence(self, tmp_path: Path) -> None:
        wrong = UntrustedError("gpu-1", "the host key is not the pinned one")
        nodes = Nodes(tmp_path, WORK, node_grace=0.0)
        nodes.engines[0].faults.at("wait", wrong)
        nodes.engines[0].faults.at("version", wrong)
        assert nodes.watch().cause == "node gpu-1: lost: the host key is not the pinned one, silent for 0 s"

    def test_a_line_that_drops_between_the_end_and_its_reasons_repeats_nothing(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, GOOD)
        nodes.transports[0].files[f"{OUT}/node.log"] = b"one\ntw"
        nodes.transports[0].faults.at("run", self.lost, self.lost)
        assert nodes.watch().code == 0
        assert nodes.lines == [("gpu-1", b"one"), ("gpu-1", b"tw")]

    def test_a_node_that_cannot_be_stopped_now_is_stopped_when_it_is_back(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, BAD, WORK)
        nodes.says(2, code=143, stopped=True)
        nodes.engines[1].faults.at("stop", *[self.lost] * 3)
        assert nodes.watch().code == 1
        assert nodes.stops() == [0, 4]

    def test_an_engine_that_restarts_is_waited_for(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, WORK)
        nodes.engines[0].faults.at("wait", *[EngineError("gpu-1", "Docker broke off")] * 3, nodes.end(1, 0))
        assert nodes.watch() == RunEnded(time=NOW, code=0)

    def test_an_engine_that_stays_away_is_lost(self, tmp_path: Path) -> None:
        away = EngineError("gpu-1", "the Docker engine does not answer")
        nodes = Nodes(tmp_path, WORK, node_grace=0.0)
        for method in ("wait", "version", "find", "find"):
            nodes.engines[0].faults.at(method, away)
        assert nodes.watch().cause == "node gpu-1: lost: the Docker engine does not answer, silent for 0 s"

    def test_a_run_that_ended_while_its_engine_was_away_is_read_from_its_file(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, WORK)
        nodes.says(1, code=3, failures=[{"rank": 0, "exit_code": 3, "type": "SystemExit", "message": "3"}])
        nodes.engines[0].faults.at("wait", EngineError("gpu-1", "Docker broke off"))
        assert nodes.watch().cause == "node gpu-1, rank 0: exit 3"

    @pytest.mark.parametrize(("code", "cause"), [(143, f"node gpu-1: {stage.RESTARTED}"), (137, "")])
    def test_a_restart_of_docker_is_seen_by_the_idle_container(self, tmp_path: Path, code: int, cause: str) -> None:
        nodes = Nodes(tmp_path, WORK, WORK)
        labels = dict.fromkeys((LABEL_CLUSTER, LABEL_OWNER, LABEL_NODE), "x") | {LABEL_ROLE: "node"}
        idle = nodes.engines[0].create(
            ContainerSpec(name="idle", image=nodes.engines[0].put_image(b""), argv=WORK, labels=labels)
        )
        nodes.engines[0].start(idle)
        nodes.engines[0].end(idle, code)
        for node in (1, 2):
            nodes.says(node, code=143, stopped=True)
        nodes.engines[0].faults.at("wait", nodes.end(1, 143))
        nodes.engines[1].faults.at("wait", nodes.end(2, 143))
        assert nodes.watch().cause == (cause or "stopped from outside (launcher stop, or down)")

    def test_the_end_is_written_down_before_the_containers_go(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, GOOD)
        seen: list[Event] = []
        nodes.engines[0].faults.at("remove", lambda: seen.extend(nodes.events))
        assert nodes.watch() == seen[-1]

    @pytest.mark.parametrize("torn", [b"", b'{"code": 0, "fail', b"{}"])
    def test_a_torn_file_is_no_success(self, tmp_path: Path, torn: bytes) -> None:
        nodes = Nodes(tmp_path, WORK)
        nodes.transports[0].files[f"{OUT}/exit.json"] = torn
        nodes.engines[0].faults.at("wait", lambda: nodes.engines[0].remove(nodes.containers[0]))
        assert nodes.watch().code == 130
        assert nodes.ends == {"gpu-1": ended("gpu-1", 137, stopped=True)}


class TestInterrupts:
    def test_the_first_stops_in_order(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, WORK, WORK)
        nodes.engines[0].faults.at("wait", interrupt)
        assert nodes.watch() == RunEnded(time=NOW, code=130, cause="stopped by the user")
        assert nodes.events[0] == StageBegan(time=NOW, stage="stop")
        assert nodes.stops() == [1, 1]
        assert [engine.find({}) for engine in nodes.engines] == [(), ()]

    def test_the_second_ends_at_once(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, DEAF, grace=10_000.0)
        nodes.engines[0].faults.at("wait", interrupt)
        nodes.engines[0].faults.at("stop", interrupt)
        assert nodes.watch() == RunEnded(time=NOW, code=130, cause="stopped by the user")
        assert nodes.ends["gpu-1"].code == 137
        assert nodes.events.count(StageBegan(time=NOW, stage="stop")) == 1

    def test_one_more_leaves_what_cannot_be_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stage, "PATIENCE", -1.0)
        nodes = Nodes(tmp_path, WORK)

        def fail() -> None:
            interrupt()
            raise UnreachableError("gpu-1", "the connection was lost")

        nodes.engines[0].faults.at("wait", interrupt)
        nodes.engines[0].faults.at("stop", *[fail] * 10_000)
        before = signal.signal(signal.SIGINT, lambda *_: None)  # those that come after the watch has left
        try:
            with pytest.raises(Interrupted, match="left; the run could not be stopped on gpu-1"):
                nodes.watch()
        finally:
            nodes.engines[0].faults.heal()
            until(lambda: not [one for one in threading.enumerate() if "_stop_one" in one.name])
            signal.signal(signal.SIGINT, before)

    def test_many_at_once_break_nothing(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, WORK, WORK)
        nodes.engines[0].faults.at("wait", interrupt_often)
        assert nodes.watch().code == 130
        assert set(nodes.ends) == {"gpu-1", "gpu-2"}

    def test_what_failed_before_stays_the_cause(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, BAD, WORK)
        nodes.engines[1].faults.at("stop", interrupt)
        assert nodes.watch().cause == "node gpu-1: exit 1: Traceback: no memory left"

    def test_who_only_watches_leaves_and_the_run_goes_on(self, tmp_path: Path) -> None:
        nodes = Nodes(tmp_path, WORK, WORK)
        nodes.engines[0].faults.at("wait", interrupt)
        with pytest.raises(Detached):
            nodes.watch(own=False)
        assert nodes.stops() == [0, 0]
        assert [one.state for engine in nodes.engines for one in engine.find({})] == [ContainerState.RUNNING] * 2
        assert nodes.events == []


class TestReadExit:
    def test_it_is_read_whole(self) -> None:
        said = {
            "code": 1,
            "stopped": False,
            "failures": [
                {"rank": 5, "exit_code": -11, "signal": "SIGSEGV", "time": 12.5, "type": None, "message": "x", "new": 1}
            ],
        }
        failure = Failure(rank=5, exit_code=-11, signal="SIGSEGV", time=12.5, type=None, message="x")
        assert read_exit("gpu-1", json.dumps(said), now=NOW) == ended("gpu-1", 1, failures=(failure,))

    def test_times_are_told_by_the_first_nodes_clock(self) -> None:
        dead = {"rank": 9, "exit_code": 137, "signal": "SIGKILL", "time": 103.0, "type": None, "message": ""}
        other = {"node": "gpu-2", "time": 110.0, "code": 1, "lost": "lost: silent", "failures": [dead]}
        said = {"code": 1, "clock": 100.0, "oom": True, "failures": [dead], "others": [other]}
        failure = Failure(rank=9, exit_code=137, signal="SIGKILL", time=3.0, type=None, message="")
        heard = NodeEnded(time=10.0, node="gpu-2", code=1, lost="lost: silent", failures=(failure,))
        read = read_exit("gpu-1", json.dumps(said), now=NOW)
        assert read == ended("gpu-1", 1, oom=True, failures=(failure,), others=(heard,))

    def test_the_engines_word_counts(self) -> None:
        assert read_exit("gpu-1", '{"code": 0}', now=NOW, code=137, oom=True) == ended("gpu-1", 137, oom=True)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "[]", "7", "null", "{}", '{"code": "x"}', '{"code": 1, "failures": [3]}', '{"code": 1e999}'),
            *('{"code": 1, "others": [{"node": "b"}]}', '{"code": 1, "clock": "fast"}'),
        ],
    )
    def test_what_no_agent_writes_is_nothing(self, text: str) -> None:
        assert read_exit("gpu-1", text, now=NOW) is None


class Log:
    """A node's log, its mirror, and the lines that were heard."""

    def __init__(self, folder: Path, content: bytes, *, cuts: Cuts | None = None) -> None:
        self.transport = FileTransport(files={f"{OUT}/node.log": content}, cuts=cuts)
        self.path = folder / "logs" / "gpu-01.log"
        self.lines: list[bytes] = []

    def mirror(self) -> Mirror:
        machine = Machine(name="gpu-01", transport=self.transport, engine=MemoryEngine())
        return Mirror(machine, out=OUT, path=self.path, show=lambda _node, line: self.lines.append(line))

    def is_cut(self) -> bool:
        """Whether the last cut was made."""
        return self.transport._cuts.left == 0

    def grow(self, content: bytes) -> None:
        self.transport.files[f"{OUT}/node.log"] += content


# Progress bars, what is not UTF-8, empty lines, NULs, and a last line that has no end.
ODD = b"\r 10%\r 20%\r\n" + b"\xff\xfe \xc3(\n" + b"\n\n" + b"\0\x1b[31m\n" + "größer\n".encode()
LONG = ODD * 200 + b"x" * 40_000 + b"\n" + b"".join(b"%06d some words\n" % n for n in range(4000)) + b"no end"


class TestMirror:
    @pytest.mark.parametrize("seed", range(5))
    def test_a_hundred_cuts_lose_and_repeat_nothing(self, tmp_path: Path, seed: int) -> None:
        log = Log(tmp_path, LONG, cuts=Cuts(100, seed=seed))
        mirror = log.mirror()
        mirror.start()
        until(log.is_cut)
        mirror.finish()
        assert log.path.read_bytes() == LONG
        assert log.lines == LONG.split(b"\n")

    def test_what_is_written_while_it_follows_arrives(self, tmp_path: Path) -> None:
        log = Log(tmp_path, b"")
        mirror = log.mirror()
        mirror.start()
        for word in (b"one\nt", b"wo", b"\n", b"three"):
            log.grow(word)
            until(lambda: log.path.exists() and log.path.read_bytes() == log.transport.files[f"{OUT}/node.log"])
        assert log.lines == [b"one", b"two"]
        mirror.finish()
        assert log.lines == [b"one", b"two", b"three"]

    def test_another_one_goes_on_where_the_first_left(self, tmp_path: Path) -> None:
        log = Log(tmp_path, b"one\ntwo\n")
        log.mirror().finish()
        log.grow(b"three\n")
        log.mirror().finish()
        assert log.lines == [b"one", b"two", b"three"]
        assert log.path.read_bytes() == b"one\ntwo\nthree\n"

    def test_two_who_mirror_at_once_make_one_mirror(self, tmp_path: Path) -> None:
        both = [Log(tmp_path, LONG, cuts=Cuts(30, seed=seed)) for seed in (1, 2)]
        mirrors = [log.mirror() for log in both]
        for mirror in mirrors:
            mirror.start()
        for log, mirror in zip(both, mirrors, strict=True):
            until(log.is_cut)
            mirror.finish()
            assert log.lines == LONG.split(b"\n")
        assert both[0].path.read_bytes() == LONG

    def test_who_leaves_hears_no_more(self, tmp_path: Path) -> None:
        log = Log(tmp_path, b"one\n")
        mirror = log.mirror()
        mirror.start()
        until(lambda: log.lines == [b"one"])
        mirror.leave()
        mirror._thread.join()
        log.grow(b"two\n")
        assert log.path.read_bytes() == b"one\n"

    def test_a_log_that_is_not_there_is_empty(self, tmp_path: Path) -> None:
        log = Log(tmp_path, b"")
        log.transport.files.clear()
        log.mirror().finish()
        assert (log.path.exists(), log.lines) == (False, [])

    def test_a_rest_that_does_not_come_is_asked_for_again(self, tmp_path: Path) -> None:
        log = Log(tmp_path, b"one\n", cuts=Cuts(2))
        log.mirror().finish()
        assert log.lines == [b"one"]

    def test_a_node_that_is_gone_at_the_end_is_no_error(self, tmp_path: Path) -> None:
        log = Log(tmp_path, b"one\n", cuts=Cuts(1000))
        log.mirror().finish()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_here_ends_nothing(self, tmp_path: Path) -> None:
        log = Log(tmp_path, b"one\n")
        log.path = Path("/dev/full")
        mirror = log.mirror()
        mirror.start()
        until(lambda: log.transport.faults.calls.count("stream") > 3)
        mirror.finish()
        assert log.lines == []

    def test_the_mirrors_folder_is_its_owners_alone(self, tmp_path: Path) -> None:
        log = Log(tmp_path, b"one\n")
        log.mirror().finish()
        assert log.path.parent.stat().st_mode & 0o777 == 0o700


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come."""
    for _ in range(20_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError(threading.enumerate())

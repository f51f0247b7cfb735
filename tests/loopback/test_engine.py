"""The Engine contract, kept alike by Docker here, Docker over SSH, processes, and the double in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import docker as sdk
import pytest

from cluster import dockerd, processes
from cluster.command import Command, script
from cluster.container import Container, ContainerSpec, ContainerState, Mount
from cluster.dockerd import DockerEngine
from cluster.engine import Engine
from cluster.errors import EngineError, ImageError, LockedError
from cluster.layers import Held
from cluster.local import LocalTransport
from cluster.processes import ProcessEngine
from tests.loopback.conftest import Site
from tests.loopback.images import LABEL, VOLUME, Tiny, docker, inspect
from tests.loopback.sshd import Sshd
from tests.loopback.test_transport import eventually, running
from tests.pure.doubles import MemoryEngine, Program

# What containers do in these tests. The double knows them by their argv.
SLEEP = ("sleep", "1061")
EXIT_3 = ("sh", "-c", "exit 3")
SEGV = ("sh", "-c", "ulimit -c 0; kill -s SEGV $$")
TALK = ("sh", "-c", "echo one; echo two >&2; echo three; exit 4")
DEAF = ("sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done")
POLITE = ("sh", "-c", "trap 'exit 5' TERM; echo polite; while :; do sleep 0.05; done")
MISSING = ("no-such-program",)
FAIL_7 = ("sh", "-c", "echo out; exit 7")

PROGRAMS: dict[tuple[str, ...], Program] = {
    EXIT_3: Program(code=3),
    SEGV: Program(code=139),
    TALK: Program(code=4, says="one\ntwo\nthree\n"),
    DEAF: Program(says="deaf\n", deaf=True),
    POLITE: Program(says="polite\n"),
    MISSING: Program(code=127, says="no-such-program: not found\n"),
    FAIL_7: Program(code=7, says="out\n"),
}


class EngineContract:
    """What every engine does; a subclass brings the engine, its image, and what all its containers carry."""

    image: str
    mark: str

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        raise NotImplementedError

    def spec(self, *argv: str, name: str = "it", **labels: str) -> ContainerSpec:
        return ContainerSpec(
            name=f"lt-{self.mark}-{name}", image=self.image, argv=argv, labels={LABEL: self.mark, **labels}
        )

    def begin(self, engine: Engine, *argv: str, name: str = "it") -> str:
        container = engine.create(self.spec(*argv, name=name))
        engine.start(container)
        return container

    def only(self, engine: Engine) -> Container:
        (one,) = engine.find({LABEL: self.mark})
        return one

    def gone(self, engine: Engine) -> bool:
        return engine.find({LABEL: self.mark}) == ()

    def test_it_says_what_it_is(self, engine: Engine) -> None:
        assert engine.version()

    def test_the_image_is_found_by_name_and_by_digest(self, engine: Engine) -> None:
        digest = engine.image_id(self.image)
        assert digest is not None
        assert digest.startswith("sha256:")
        assert engine.image_id(digest) == digest

    def test_a_missing_image_is_none(self, engine: Engine) -> None:
        assert engine.image_id("launcher-test/no-such-image:1") is None
        assert engine.image_id("sha256:" + "0" * 64) is None
        assert engine.image_bytes("launcher-test/no-such-image:1") == 0

    def test_an_image_is_told_of_with_its_names(self, engine: Engine) -> None:
        found = engine.image(self.image)
        assert found is not None
        assert found.id == engine.image_id(self.image)
        assert self.image in (found.id, *found.tags)
        assert engine.image(found.id) == found
        assert found in engine.held()
        assert engine.image("launcher-test/no-such-image:1") is None

    def test_what_is_not_there_cannot_be_removed(self, engine: Engine) -> None:
        assert engine.remove_image("launcher-test/no-such-image:1") is False

    def test_of_sixteen_racers_one_has_the_name(self, engine: Engine) -> None:
        def race(_: int) -> str | None:
            with suppress(LockedError):
                return engine.create(self.spec(*SLEEP))
            return None

        with ThreadPoolExecutor(16) as pool:
            winners = [winner for winner in pool.map(race, range(16)) if winner]
        assert winners == [self.only(engine).id]

    def test_a_taken_name_is_locked_until_its_holder_is_removed(self, engine: Engine) -> None:
        first = engine.create(self.spec(*SLEEP))
        with pytest.raises(LockedError) as caught:
            engine.create(self.spec(*SLEEP))
        assert str(caught.value) == f"node {engine.node}: a container named lt-{self.mark}-it is already there"
        engine.remove(first)
        second = engine.create(self.spec(*SLEEP))
        engine.remove(first)  # an old id does not hit the new container
        assert self.only(engine).id == second != first

    def test_the_life_of_a_container(self, engine: Engine) -> None:
        container = engine.create(self.spec(*SLEEP))
        created = self.only(engine)
        assert (created.id, created.name) == (container, f"lt-{self.mark}-it")
        assert (created.state, created.is_live, created.code) == (ContainerState.CREATED, False, None)
        engine.start(container)
        live = self.only(engine)
        assert (live.state, live.is_live, live.code) == (ContainerState.RUNNING, True, None)
        engine.stop(container, grace=20)
        ended = self.only(engine)
        assert (ended.state, ended.is_live, ended.code, ended.oom) == (ContainerState.ENDED, False, 143, False)
        assert ended.started is not None
        assert engine.wait(container) == ended
        engine.remove(container)
        assert self.gone(engine)

    def test_labels_are_kept_and_found_by(self, engine: Engine) -> None:
        engine.create(self.spec(*SLEEP, name="a", colour="red", shape="round"))
        engine.create(self.spec(*SLEEP, name="b", colour="red", shape=""))
        engine.create(self.spec(*SLEEP, name="c", colour="a=b, c"))

        def found(**labels: str) -> list[str]:
            return sorted(one.name[-1] for one in engine.find({LABEL: self.mark, **labels}))

        assert found() == ["a", "b", "c"]
        assert found(colour="red") == ["a", "b"]
        assert found(colour="red", shape="round") == ["a"]
        assert found(shape="") == ["a", "b"]  # whatever its value
        assert found(colour="a=b, c") == ["c"]
        assert found(colour="blue") == found(size="") == []
        assert engine.find({LABEL: f"{self.mark}-other"}) == ()
        (one,) = engine.find({LABEL: self.mark, "shape": "round"})
        assert {name: one.labels[name] for name in (LABEL, "colour", "shape")} == {
            LABEL: self.mark,
            "colour": "red",
            "shape": "round",
        }

    @pytest.mark.parametrize(("argv", "code"), [(EXIT_3, 3), (SEGV, 139)])
    def test_waiting_gives_the_exit_code(self, engine: Engine, argv: tuple[str, ...], code: int) -> None:
        container = self.begin(engine, *argv)
        ended = engine.wait(container)
        assert (ended.id, ended.state, ended.code, ended.oom) == (container, ContainerState.ENDED, code, False)

    def test_what_is_not_started_yet_has_no_end(self, engine: Engine) -> None:
        container = engine.create(self.spec(*EXIT_3))
        with ThreadPoolExecutor(1) as pool:
            wait = pool.submit(engine.wait, container)
            assert self.only(engine).state is ContainerState.CREATED
            assert not wait.done()
            engine.start(container)
            assert wait.result().code == 3

    def test_a_program_that_is_not_there_ends_with_127(self, engine: Engine) -> None:
        container = self.begin(engine, *MISSING)
        assert engine.wait(container).code == 127
        assert eventually(lambda: MISSING[0] in engine.logs(container, tail=3))

    def test_everyone_who_waits_hears_of_the_end(self, engine: Engine) -> None:
        container = self.begin(engine, *SLEEP)
        with ThreadPoolExecutor(4) as pool:
            waits = [pool.submit(engine.wait, container) for _ in range(4)]
            engine.stop(container, grace=20)
            assert [wait.result().code for wait in waits] == [143] * 4

    def test_a_program_may_say_how_it_ends_when_asked_to(self, engine: Engine) -> None:
        container = self.begin(engine, *POLITE)
        assert eventually(lambda: "polite" in engine.logs(container, tail=1))
        engine.stop(container, grace=20)
        assert engine.wait(container).code == (143 if isinstance(engine, MemoryEngine) else 5)

    def test_who_does_not_listen_is_killed_after_the_grace(self, engine: Engine) -> None:
        container = self.begin(engine, *DEAF)
        assert eventually(lambda: "deaf" in engine.logs(container, tail=1))
        engine.stop(container, grace=1)
        assert engine.wait(container).code == 137

    def test_stopping_is_harmless_for_what_does_not_run(self, engine: Engine) -> None:
        container = engine.create(self.spec(*EXIT_3))
        engine.stop(container, grace=1)
        assert self.only(engine).state is ContainerState.CREATED
        engine.start(container)
        assert engine.wait(container).code == 3
        engine.stop(container, grace=1)
        assert self.only(engine).code == 3
        engine.remove(container)
        engine.stop(container, grace=1)
        engine.stop("no-such-container", grace=1)

    def test_removing_ends_what_lives_and_is_harmless_for_what_is_gone(self, engine: Engine) -> None:
        container = self.begin(engine, *DEAF)
        engine.remove(container)
        assert self.gone(engine)
        engine.remove(container)
        engine.remove("no-such-container")

    def test_two_may_remove_it_at_once(self, engine: Engine) -> None:
        container = self.begin(engine, *SLEEP)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(engine.remove, [container] * 4))
        assert eventually(lambda: self.gone(engine))

    def test_removing_under_one_who_waits_is_an_error_there(self, engine: Engine) -> None:
        container = self.begin(engine, *SLEEP)
        with ThreadPoolExecutor(1) as pool:
            wait = pool.submit(engine.wait, container)
            engine.remove(container)
            with pytest.raises(EngineError):
                wait.result()

    def test_what_is_not_there_is_an_error_or_nothing(self, engine: Engine) -> None:
        with pytest.raises(EngineError):
            engine.start("no-such-container")
        with pytest.raises(EngineError):
            engine.wait("no-such-container")
        assert engine.logs("no-such-container", tail=5) == ""
        assert not engine.execute("no-such-container", Command(argv=("cat",))).ok

    def test_the_last_lines_are_kept(self, engine: Engine) -> None:
        container = self.begin(engine, *TALK)
        assert engine.wait(container).code == 4
        assert eventually(lambda: len(engine.logs(container, tail=9).splitlines()) == 3)
        assert set(engine.logs(container, tail=9).splitlines()) == {"one", "two", "three"}
        assert len(engine.logs(container, tail=2).splitlines()) == 2

    def test_a_command_inside_gets_its_input_unread(self, engine: Engine) -> None:
        container = self.begin(engine, *SLEEP)
        every = bytes(range(256)) * 1024
        assert engine.execute(container, Command(argv=("cat",), stdin=every)).stdout == every
        assert engine.execute(container, Command(argv=("cat",))).stdout == b""

    def test_a_command_inside_answers_with_its_code(self, engine: Engine) -> None:
        container = self.begin(engine, *SLEEP)
        told = engine.execute(container, Command(argv=FAIL_7))
        assert (told.code, told.stdout) == (7, b"out\n")
        assert engine.execute(container, Command(argv=("no-such-program",))).code in (126, 127)
        engine.stop(container, grace=20)
        assert not engine.execute(container, Command(argv=("cat",))).ok

    def test_closing_is_harmless_and_not_the_end(self, engine: Engine) -> None:
        engine.close()
        assert engine.version()
        engine.close()


class DockerContract(EngineContract):
    """What Docker does wherever it is."""

    @pytest.fixture(autouse=True)
    def _image(self, swept: Tiny) -> None:
        self.image, self.mark = swept.digest, swept.mark

    def test_an_image_is_found_by_its_tag(self, engine: Engine, tiny: Tiny) -> None:
        assert engine.image_id(tiny.tag) == tiny.digest
        assert engine.image_bytes(tiny.tag) > 100_000

    def test_a_tag_is_one_more_name(self, engine: Engine, tiny: Tiny) -> None:
        name = f"localhost:5000/launcher-test/{tiny.mark}"  # a registry's port is no version
        engine.tag(tiny.digest, name)
        assert engine.image_id(name) == engine.image_id(f"{name}:latest") == tiny.digest
        docker("rmi", name)
        with pytest.raises(ImageError):
            engine.tag("sha256:" + "0" * 64, name)

    def test_without_its_image_there_is_no_container(self, engine: Engine) -> None:
        with pytest.raises(ImageError, match="the image launcher-test/no-such-image:1 is not there"):
            engine.create(replace(self.spec(*SLEEP), image="launcher-test/no-such-image:1"))
        with pytest.raises(ImageError):
            list(engine.save("launcher-test/no-such-image:1"))

    def test_what_an_archive_does_not_hold_is_no_image(self, engine: Engine) -> None:
        with pytest.raises(ImageError):
            engine.load([b"this is no archive" * 100])

    def test_a_missing_mount_is_refused_and_not_made(self, engine: Engine, tmp_path: Path) -> None:
        missing = tmp_path / "nvme"
        with pytest.raises(EngineError, match=r"Docker refuses to create: .*bind source path does not exist: .*nvme"):
            engine.create(replace(self.spec(*SLEEP), mounts=(Mount(source=str(missing), target="/nvme"),)))
        assert not missing.exists()
        assert self.gone(engine)

    def test_secrets_live_in_memory_and_belong_to_the_user(self, engine: Engine) -> None:
        container = engine.create(replace(self.spec(*SLEEP), user="1234:2345", secrets_dir="/run/secrets"))
        engine.start(container)
        look = 'stat -c "%a %u:%g" "$1"; grep " $1 tmpfs " /proc/mounts | wc -l; umask 077; cat >"$1"/it; cat "$1"/it'
        told = engine.execute(container, script(look, "/run/secrets", stdin=b"hunter2\0"))
        assert told.stdout == b"700 1234:2345\n1\nhunter2\0"
        assert "hunter2" not in json.dumps(inspect(container))


class TestDockerHere(DockerContract):
    def test_an_image_is_told_of_layer_by_layer(self, engine: Engine, tiny: Tiny) -> None:
        found, said = engine.image(tiny.tag), inspect(tiny.tag)
        assert found == Held(
            id=tiny.digest,
            tags=(tiny.tag,),
            layers=tuple(said["RootFS"]["Layers"]),
            size=said["Size"],
            labels=said["Config"]["Labels"],
            created=said["Created"],
        )
        assert engine.store() == "classic"

    def test_an_image_that_a_container_uses_stays_and_one_of_two_names_goes(self, engine: Engine, tiny: Tiny) -> None:
        name = f"launcher-test/removed:{tiny.mark}"
        docker("build", "-q", "-t", name, "--label", "removed=yes", "-", stdin=f"FROM {tiny.tag}\n".encode())
        other = f"{name}-other"
        engine.tag(name, other)
        assert engine.remove_image(other) is True
        container = engine.create(replace(self.spec(*SLEEP), image=name))
        assert engine.remove_image(name) is False
        engine.remove(container)
        assert engine.remove_image(name) is True
        assert engine.image(name) is None

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        engine = DockerEngine(LocalTransport("here"))
        yield engine
        engine.close()

    def test_what_is_asked_of_docker_to_the_letter(self, engine: Engine, tmp_path: Path) -> None:
        spec = ContainerSpec(
            name=f"lt-{self.mark}-golden",
            image=self.image,
            argv=("sleep", "1061", "$(id)"),
            labels={LABEL: self.mark},
            env={"WORD": "a b"},
            workdir="/tmp",
            user="1234:2345",
            groups=(3456, 4567),
            mounts=(
                Mount(source=str(tmp_path), target="/data"),
                Mount(source="/tmp", target="/scratch", read_only=False),
            ),
            devices=("/dev/null",),
            shm_bytes=128 * 1024**2,
            ulimits=(("nofile", 1024), ("stack", 8 * 1024**2)),
            secrets_dir="/run/secrets",
        )
        engine.create(spec)
        made = inspect(spec.name)
        host, config = made["HostConfig"], made["Config"]
        assert {name: host[name] for name in HOST} == HOST
        assert host["Mounts"] == [
            {"Type": "bind", "Source": str(tmp_path), "Target": "/data", "ReadOnly": True},
            {"Type": "bind", "Source": "/tmp", "Target": "/scratch"},
        ]
        assert {name: config[name] for name in CONFIG} == CONFIG
        assert "WORD=a b" in config["Env"]
        assert made["Image"] == self.image

    def test_the_least_that_can_be_asked_is_as_safe(self, engine: Engine) -> None:
        made = inspect(engine.create(self.spec(*SLEEP)))["HostConfig"]
        asked = ("GroupAdd", "Tmpfs", "ShmSize", "Ulimits", "Devices")
        always = {name: value for name, value in HOST.items() if name not in asked}
        assert {name: made[name] for name in always} == always
        assert [
            made.get(name) for name in (*asked, "Mounts", "DeviceRequests") if name != "ShmSize" and made.get(name)
        ] == []

    def test_all_gpus_are_asked_for_by_the_engines_own_request(self, engine: DockerEngine) -> None:
        asked = engine._config(replace(self.spec(*SLEEP), gpus=True))["HostConfig"]["DeviceRequests"]
        assert asked == [{"Driver": "", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}]

    def test_foreign_containers_are_never_seen(self, engine: Engine) -> None:
        docker("create", "--name", f"lt-{self.mark}-it", "--label", f"{LABEL}.decoy={self.mark}", self.image, "sh")
        try:
            assert self.gone(engine)
            with pytest.raises(LockedError):
                engine.create(self.spec(*SLEEP))
        finally:
            docker("rm", "-fv", f"lt-{self.mark}-it")

    def test_a_paused_container_is_live(self, engine: Engine) -> None:
        container = self.begin(engine, *SLEEP)
        docker("pause", container)
        assert (self.only(engine).state, self.only(engine).is_live) == (ContainerState.PAUSED, True)
        engine.remove(container)
        assert self.gone(engine)

    def test_anonymous_volumes_go_with_their_container(self, engine: Engine) -> None:
        container = self.begin(engine, *SLEEP)
        (volume,) = [mount["Name"] for mount in inspect(container)["Mounts"] if mount["Destination"] == VOLUME]
        engine.remove(container)
        assert docker("volume", "inspect", volume, check=False).returncode != 0

    def test_out_of_memory_is_said_by_the_kernels_flag(self, engine: Engine) -> None:
        hog = "echo ready; while [ ! -e /tmp/go ]; do sleep 0.05; done; exec tail /dev/zero"
        container = self.begin(engine, "sh", "-c", hog)
        limited = docker("update", "--memory", "24m", "--memory-swap", "24m", container, check=False)
        if limited.returncode:
            pytest.skip("memory cannot be limited here")
        engine.execute(container, Command(argv=("touch", "/tmp/go")))
        ended = engine.wait(container)
        assert (ended.state, ended.oom) == (ContainerState.ENDED, True)
        assert ended.code != 0

    def test_a_kill_from_outside_is_not_out_of_memory(self, engine: Engine) -> None:
        container = self.begin(engine, *SLEEP)
        docker("kill", container)
        ended = engine.wait(container)
        assert (ended.code, ended.oom) == (137, False)

    def test_proxies_of_the_environment_do_not_matter(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        assert engine.image_id(self.image) == self.image

    def test_inside_is_reached_by_the_engines_own_client(self, engine: Engine) -> None:
        assert engine.interactive("it", ("sh", "-l"), tty=True) == Command(
            argv=("docker", "exec", "-it", "it", "sh", "-l")
        )
        assert engine.interactive("it", ("sh",), tty=False) == Command(argv=("docker", "exec", "-i", "it", "sh"))


HOST = {
    "Init": True,
    "Privileged": False,
    "CapAdd": None,
    "CapDrop": ["ALL"],
    "GroupAdd": ["3456", "4567"],
    "SecurityOpt": ["no-new-privileges"],
    "NetworkMode": "host",
    "PidMode": "",
    "IpcMode": "private",
    "UTSMode": "",
    "UsernsMode": "",
    "Binds": None,
    "PublishAllPorts": False,
    "RestartPolicy": {"Name": "", "MaximumRetryCount": 0},
    "AutoRemove": False,
    "Tmpfs": {"/run/secrets": "size=4m,mode=0700,uid=1234,gid=2345"},
    "ShmSize": 128 * 1024**2,
    "Ulimits": [
        {"Name": "nofile", "Hard": 1024, "Soft": 1024},
        {"Name": "stack", "Hard": 8 * 1024**2, "Soft": 8 * 1024**2},
    ],
    "Devices": [{"PathOnHost": "/dev/null", "PathInContainer": "/dev/null", "CgroupPermissions": "rwm"}],
    "LogConfig": {"Type": "json-file", "Config": {"max-size": "16m", "max-file": "2"}},
}
CONFIG = {
    "User": "1234:2345",
    "WorkingDir": "/tmp",
    "Entrypoint": ["sleep"],
    "Cmd": ["1061", "$(id)"],
    "StopSignal": "SIGTERM",
    "Tty": False,
    "OpenStdin": False,
}


class TestDockerOverSsh(DockerContract):
    @pytest.fixture
    def engine(self, shared_sshd: Sshd, site: Site) -> Iterator[Engine]:
        transport = site.reach(site.trust(site.address(shared_sshd)))
        engine = DockerEngine(transport)
        yield engine
        engine.close()
        transport.close()


class TestProcesses(EngineContract):
    @pytest.fixture
    def engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessEngine]:
        # The "image" is this environment; here it need not hold what a job would want of it.
        monkeypatch.setattr(processes, "_PACKAGES", ("pytest",))
        self.image, self.mark = processes.IMAGE, str(os.getpid())
        engine = ProcessEngine("here", tmp_path / "processes")
        yield engine
        for one in engine.find({}):
            engine.remove(one.id)
        assert list((tmp_path / "processes").glob("*")) == []

    def test_a_missing_package_is_named(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "_PACKAGES", ("pytest", "no-such-package"))
        with pytest.raises(ImageError, match="this Python has no no-such-package") as caught:
            engine.image_id(processes.IMAGE)
        assert caught.value.next_step == f"{sys.executable} -m pip install 'launcher[local]'"

    @pytest.mark.usefixtures("engine")
    def test_a_folder_that_cannot_be_written_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(EngineError, match="cannot create the container"):
            ProcessEngine("here", tmp_path / "file").create(self.spec(*SLEEP))

    def test_a_job_outlives_the_one_who_started_it(self, engine: Engine, tmp_path: Path) -> None:
        begin = (
            "import os, signal, sys; from pathlib import Path\n"
            "from cluster.container import ContainerSpec; from cluster.processes import ProcessEngine\n"
            "engine = ProcessEngine('here', Path(sys.argv[1]))\n"
            "argv = ('sh', '-c', 'while [ ! -e go ]; do sleep 0.02; done; exit 6')\n"
            "spec = ContainerSpec(name='it', image='process', argv=argv, labels={'a': 'b'}, workdir=sys.argv[2])\n"
            "engine.start(engine.create(spec))\n"
            "os.kill(0, signal.SIGKILL)\n"  # its whole process group, as a terminal's end would
        )
        line = [sys.executable, "-c", begin, str(tmp_path / "processes"), str(tmp_path)]
        starter = subprocess.run(line, check=False, start_new_session=True, cwd=Path(__file__).parents[2])
        assert starter.returncode == -signal.SIGKILL
        (left,) = engine.find({"a": "b"})
        assert left.state is ContainerState.RUNNING
        (tmp_path / "go").touch()
        assert engine.wait(left.id).code == 6

    @pytest.mark.parametrize("how", ["remove", "stop", "end"])
    def test_nothing_of_a_job_is_left(self, engine: Engine, tmp_path: Path, how: str) -> None:
        word = f"1061.{os.getpid()}"
        tree = (
            f"(setsid sh -c 'trap \"\" TERM HUP INT; sleep {word}1 & sleep {word}2' &)\n"  # orphans with an own session
            f"nohup sleep {word}3 >/dev/null 2>&1 &\n"
            "touch begun\n"
            f"[ {how} = end ] || sleep {word}4\n"
        )
        spec = replace(self.spec("sh", "-c", tree), workdir=str(tmp_path))
        container = engine.create(spec)
        engine.start(container)
        assert eventually((tmp_path / "begun").exists)
        if how != "end":
            assert eventually(lambda: len(running(word)) >= 4)
        if how == "remove":
            engine.remove(container)
        if how == "stop":
            engine.stop(container, grace=20)
        if how != "remove":
            assert engine.wait(container).state is ContainerState.ENDED
        assert running(word) == []

    def test_a_keeper_that_is_killed_ended_with_137(self, engine: Engine, tmp_path: Path) -> None:
        container = self.begin(engine, *SLEEP)
        keeper = _keeper(tmp_path, container)
        os.kill(keeper, signal.SIGKILL)
        assert engine.wait(container).code == 137
        engine.remove(container)
        assert not _marked(container)

    def test_a_process_id_that_somebody_else_has_now_is_not_ours(self, engine: Engine, tmp_path: Path) -> None:
        container = self.begin(engine, *SLEEP)
        os.kill(_keeper(tmp_path, container), signal.SIGKILL)
        engine.wait(container)
        with subprocess.Popen(["sleep", "1062"]) as stranger:
            file = tmp_path / "processes" / container / "keeper.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "pid": stranger.pid}))
            assert self.only(engine).code == 137
            engine.stop(container, grace=1)
            engine.remove(container)
            assert stranger.poll() is None
            stranger.kill()

    def test_secrets_are_private_and_do_not_outlive_the_job(self, engine: Engine, tmp_path: Path) -> None:
        folder = tmp_path / "secrets"
        spec = replace(self.spec(*SLEEP), secrets_dir=str(folder))
        for end in (engine.remove, lambda one: engine.stop(one, grace=20)):
            container = engine.create(spec)
            assert not folder.exists()
            engine.start(container)
            assert folder.stat().st_mode & 0o777 == 0o700
            assert engine.execute(container, script('cat >"$1"/it', str(folder), stdin=b"hunter2")).ok
            end(container)
            assert not folder.exists()
            engine.remove(container)

    def test_secrets_are_not_put_where_somebody_else_made_a_place_for_them(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        (tmp_path / "theirs").mkdir()
        (tmp_path / "secrets").symlink_to(tmp_path / "theirs")
        container = engine.create(replace(self.spec(*SLEEP), secrets_dir=str(tmp_path / "secrets")))
        with pytest.raises(EngineError, match="File exists"):
            engine.start(container)
        assert self.only(engine).state is ContainerState.CREATED

    def test_a_job_sees_little_of_our_environment(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OUR_TOKEN", "hunter2")
        container = engine.create(replace(self.spec("sh", "-c", "env"), env={"WORD": "a b"}, workdir="/"))
        engine.start(container)
        engine.wait(container)
        said = engine.logs(container, tail=99).splitlines()
        assert "WORD=a b" in said
        assert not [line for line in said if "OUR_TOKEN" in line]

    def test_it_has_no_images_to_move(self, engine: Engine) -> None:
        with pytest.raises(EngineError, match="the process engine has no images"):
            list(engine.save("process"))
        with pytest.raises(EngineError):
            engine.load([b""])
        with pytest.raises(EngineError):
            engine.tag("process", "other")

    def test_a_container_that_is_being_made_or_removed_is_none(self, engine: Engine, tmp_path: Path) -> None:
        engine.create(self.spec(*SLEEP))
        root = tmp_path / "processes"
        half = root / ".half"
        (root / f"lt-{self.mark}-it").rename(half)
        assert engine.find({}) == ()
        half.rename(root / f"lt-{self.mark}-it")

    def test_who_looks_while_others_come_and_go_sees_whole_containers(self, engine: Engine) -> None:
        over = threading.Event()

        def churn() -> None:
            for _ in range(40):
                container = engine.create(self.spec(*SLEEP))
                engine.remove(container)
            over.set()

        with ThreadPoolExecutor(1) as pool:
            churning = pool.submit(churn)
            while not over.is_set():
                assert {one.labels[LABEL] for one in engine.find({})} <= {self.mark}
            churning.result()


def _keeper(tmp_path: Path, container: str) -> int:
    said = json.loads((tmp_path / "processes" / container / "keeper.json").read_text())
    return int(said["pid"])


def _marked(container: str) -> list[int]:
    return processes._members(container)


class TestMemory(EngineContract):
    @pytest.fixture
    def engine(self) -> Engine:
        engine = MemoryEngine(programs=PROGRAMS)
        self.image, self.mark = engine.put_image(b"an image"), "memory"
        return engine


def test_every_error_of_the_sdk_is_translated() -> None:
    known = {kind for kind in vars(sdk.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert len(known) > 15
    assert [kind for kind in known if not issubclass(kind, dockerd._FOREIGN)] == []

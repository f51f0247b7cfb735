"""Facts: what machines answered (tests/facts/<probe>/*.json), as we read it; and one real answer."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.command import Command
from cluster.facts import PATIENCE, PROBES, Disk, DockerFact, Listener, NodeFacts, read_survey, survey_command

FOLDER = Path(__file__).parents[1] / "facts"
READ = {probe.name: probe.read for probe in PROBES}
SAVED = sorted(FOLDER.glob("*/*.json"))


def as_data(fact: Any) -> Any:
    if isinstance(fact, tuple):
        return [as_data(one) for one in fact]
    if dataclasses.is_dataclass(fact) and not isinstance(fact, type):
        return {name: as_data(value) for name, value in dataclasses.asdict(fact).items()}
    return fact


@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_saved_answer_is_this_fact(path: Path) -> None:
    saved = json.loads(path.read_text())
    assert as_data(READ[path.parent.name](saved["output"])) == saved["fact"]


def test_every_probe_has_saved_answers() -> None:
    assert {path.parent.name for path in SAVED} == set(READ)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
@pytest.mark.parametrize("output", ["\n\n", "{", "{}", "{1}", "a=b=c", "1: 2: 3", "0,1,2,3,4,5", "sh: 1: x: not found"])
def test_no_answer_is_so_odd_that_a_reader_stumbles(probe: Any, output: str) -> None:
    probe.read(output)


def ask(
    *, paths: tuple[str, ...] = (), peers: tuple[str, ...] = (), engine: str = "process", patience: int = PATIENCE
) -> NodeFacts:
    command = survey_command(paths=paths, peers=peers, engine=engine, patience=patience)
    sent = time.time()
    answer = subprocess.run(command.argv, capture_output=True, check=True)
    assert answer.stderr == b""
    return read_survey(answer.stdout.decode(), sent=sent, received=time.time())


def test_this_machine_answers_the_survey(tmp_path: Path) -> None:
    folder, file = tmp_path / "a folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    missing = str(tmp_path / "$(touch canary)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        facts = ask(paths=(str(folder), str(file), missing, "~/."), peers=("127.0.0.1",))
        port = server.getsockname()[1]
    system = facts.system
    assert (system.uid, system.gid) == (os.getuid(), os.getgid())
    assert set(system.groups) == {os.getgid(), *os.getgroups()}
    assert (system.arch, system.home) == (platform.machine(), os.environ["HOME"])
    assert system.user == getpass.getuser()
    assert system.cpus >= 1
    assert system.memory > 2**27
    assert facts.clock_offset == 0.0
    assert facts.routes in ({"127.0.0.1": "lo"}, {})  # without iproute2 nobody can say
    assert port in {listener.port for listener in facts.listeners}
    seen = facts.disk(str(folder))
    assert (seen.exists, seen.is_dir, seen.writable, seen.free > 0) == (True, True, True, True)
    assert (facts.disk(str(file)).exists, facts.disk(str(file)).is_dir) == (True, False)
    assert facts.disk(missing) == Disk(path=missing, exists=False)
    assert facts.disk("~/.").is_dir


def test_s19_a_path_that_links_make_another_one_is_told(tmp_path: Path) -> None:
    real = tmp_path / "real \\t folder" / "disk"
    real.mkdir(parents=True)
    direct, below = tmp_path / "direct", tmp_path / "below"
    direct.symlink_to(real)
    below.symlink_to(real.parent)
    facts = ask(paths=(str(real), str(direct), str(below / "disk"), str(tmp_path / "none")))
    assert facts.disk(str(real)).leads_to == ""
    assert facts.disk(str(direct)).leads_to == facts.disk(str(below / "disk")).leads_to == str(real)


def test_s16_who_listens_for_other_machines_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as inward, socket.create_server(("0.0.0.0", 0)) as outward:
        ports = inward.getsockname()[1], outward.getsockname()[1]
        known = {one.port: one.exposed for one in ask().listeners}
    assert [known[port] for port in ports] == [False, True]


def test_s23_the_runtimes_are_asked_for_their_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "docker", """echo '{"ServerVersion": "27.1.1"}'""")
    tool(tmp_path / "runc", "printf 'runc version 1.1.5+ds1\\ncommit: 1.1.5+ds1-1+deb12u1\\nspec: 1.0.2-dev\\n'")
    tool(tmp_path / "nvidia-ctk", "printf 'NVIDIA Container Toolkit CLI version 1.17.4\\ncommit: 9b69590c7428\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = ask(engine="docker").docker
    assert (found.version, found.runc, found.toolkit) == ("27.1.1", "1.1.5+ds1", "1.17.4")


def test_a_way_is_found_to_a_name_and_kept_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "getent", '[ "$2" = gpu-02 ] && printf "%s STREAM gpu-02\\n%s DGRAM\\n" 10.0.0.12 10.0.0.12')
    tool(tmp_path / "ip", '[ "$1" = route ] && [ "$3" ] && echo "$3 dev to-$3 src 10.0.0.11"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ask(peers=("gpu-02", "10.0.0.13", "2001:db8::14", "gpu-09")).routes == {
        "gpu-02": "to-10.0.0.12",
        "10.0.0.13": "to-10.0.0.13",
        "2001:db8::14": "to-2001:db8::14",
    }


def tool(path: Path, text: str) -> None:
    """A program that stands in for one of the machine's."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("tools", ["system", "busybox"])
def test_who_hangs_is_left_behind_and_named(tools: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    pids.touch()
    # As deaf as a process that hangs in the kernel, and it holds its output open too.
    hung = f"trap '' TERM; echo $$ >>{pids}; while :; do sleep 1; done"
    for name in ("nvidia-smi", "docker", "getent"):
        tool(tmp_path / name, hung)
    if tools == "busybox":
        monkeypatch.setenv("PATH", str(busybox(tmp_path / "busybox")))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    try:
        facts = ask(paths=("/",), peers=("gpu-02",), engine="docker", patience=2)
        still = [int(pid) for pid in pids.read_text().split() if Path(f"/proc/{pid}").exists()]
    finally:
        for pid in pids.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    assert facts.stuck == ("gpus", "docker", "routes")
    assert facts.docker == DockerFact(error="docker info gives no answer within 5 s")
    assert (facts.gpus, facts.routes, facts.disk("/").is_dir) == ((), {}, True)
    assert len(still) == 3


def busybox(folder: Path) -> Path:
    """A folder of BusyBox's tools."""
    program = shutil.which("busybox")
    if program is None:
        pytest.skip("no busybox here: apt-get install busybox")
    folder.mkdir()
    for name in subprocess.run([program, "--list"], capture_output=True, check=True, text=True).stdout.split():
        (folder / name).symlink_to(program)
    return folder


def test_a_path_that_hangs_is_told_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = tmp_path / "dead"
    dead.mkdir()
    tool(tmp_path / "df", f'[ "$2" = "{dead}" ] && exec sleep 61.75; exec {shutil.which("df")} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = ask(paths=(str(dead), "/"), patience=2)
    assert facts.disk(str(dead)) == Disk(path=str(dead), exists=False, stuck=True)
    assert (facts.disk("/").is_dir, facts.stuck) == (True, ())


def test_without_timeout_all_is_asked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = busybox(tmp_path / "busybox")
    (tools / "timeout").unlink()
    tool(tools / "nvidia-smi", "echo 0, NVIDIA H100, GPU-0, 81559, 550.90.07, 9.0")
    monkeypatch.setenv("PATH", str(tools))
    command = survey_command(paths=("/",), peers=(), engine="process")
    # The survey's own PATH would lead back to the machine's tools.
    text = command.argv[2].replace(":/usr/sbin:/sbin", "")
    answer = subprocess.run(["sh", "-c", text, *command.argv[3:]], capture_output=True, check=True)
    facts = read_survey(answer.stdout.decode(), sent=0, received=0)
    assert (len(facts.gpus), facts.disk("/").is_dir, facts.stuck) == (1, True, ())


def test_where_no_path_could_be_looked_at_each_of_them_hangs() -> None:
    facts = read_survey("\n--8<-- fact disks\n\n--8<-- stuck\n", sent=0, received=0)
    assert facts.disk("/mnt/x") == Disk(path="/mnt/x", exists=False, stuck=True)


def test_only_the_engine_that_is_used_is_asked() -> None:
    assert ask(engine="process").docker == DockerFact(error="docker is not installed")


def test_a_path_that_was_not_asked_for_does_not_exist() -> None:
    assert survey(clock="5").disk("/mnt/x") == Disk(path="/mnt/x", exists=False)


def survey(*, clock: str, before: str = "") -> NodeFacts:
    text = f"{before}\n--8<-- fact system\nuser=ml\nclock={clock}\n\n--8<-- fact listeners\nLISTEN 0 5 *:80 *:*\n"
    return read_survey(text, sent=100.0, received=101.0)


@pytest.mark.parametrize(
    ("clock", "offset"),
    [("100.5", 0.0), ("100.0", 0.0), ("101.0", 0.0), ("99.0", -1.0), ("3701.0", 3600.0), ("", 0.0), ("soon", 0.0)],
)
def test_a_clock_is_off_only_beyond_the_time_of_asking(clock: str, offset: float) -> None:
    assert survey(clock=clock).clock_offset == offset


def test_what_a_login_shell_says_first_is_no_fact() -> None:
    chatty = survey(clock="100.5", before="Welcome to gpu-01!\nuser=banner\n")
    assert chatty == survey(clock="100.5")
    assert chatty.system.user == "ml"
    assert chatty.listeners == (Listener(port=80, exposed=True),)


def test_a_survey_that_breaks_off_is_read_as_far_as_it_goes() -> None:
    whole = survey(clock="100.5")
    assert (whole.gpus, whole.nics, whole.disks, whole.routes) == ((), (), (), {})


def test_a_survey_is_one_command_whose_arguments_cannot_be_code() -> None:
    command = survey_command(paths=("/mnt/a b", "/mnt/$(id)"), peers=("10.0.0.1", "::1"), engine="docker")
    assert command == Command(
        argv=("sh", "-c", command.argv[2], "sh", "/mnt/a b\n/mnt/$(id)", "10.0.0.1 ::1", "docker", "5")
    )

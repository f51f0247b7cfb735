"""One node's end is every node's end, named after the fault matrix. No launcher is there: so it is with `--detach`."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Ended
from .gang import Gang

MakeGang = Callable[..., Gang]


@pytest.fixture
def make_gang(tmp_path: Path) -> Iterator[MakeGang]:
    made: list[Gang] = []

    def make(**settings: Any) -> Gang:
        made.append(Gang(tmp_path, **settings))
        return made[-1]

    yield make
    for gang in made:
        gang.close()


# What is done to rank 1 outside of any collective: the others would wait for ever.
SLEEP = "import time; print('ready'); time.sleep(600)"
DEED = """
import os, signal, sys, time
from pathlib import Path
print("ready")
while os.environ["RANK"] != "1" or not Path(os.environ["MEETING"], "go").exists():
    time.sleep(0.01)
{deed}
"""
# Steps in which everybody waits for everybody, as collectives make them do.
STEPS = """
import os, re, time
from pathlib import Path
rank, meeting, world = os.environ["RANK"], Path(os.environ["MEETING"]), int(os.environ["WORLD_SIZE"])
print("ready")
step = 0
while True:
    if rank == "1" and (meeting / "go").exists():
        re.match("(a+)+$", "a" * 60 + "b")
    (meeting / f"{step}.{rank}").touch()
    while not all((meeting / f"{step}.{other}").exists() for other in range(world)):
        time.sleep(0.01)
    if rank == "0":
        print("step", step)
    step += 1
    time.sleep(0.1)
"""


def go(gang: Gang) -> float:
    (gang.meeting / "go").touch()
    return time.time()


def seconds(ends: list[Ended], *, since: float) -> float:
    """Until the last of these nodes had ended its ranks."""
    return max(float(one.exit["ended"]) for one in ends) - since


def causes(gang: Gang) -> list[str | None]:
    return [one.exit["cause"] for one in gang.end()]


@pytest.mark.parametrize(
    ("deed", "how"),
    [
        ("os._exit(3)", "exit 3"),
        ("sys.exit(3)", "exit 3"),
        ("raise ValueError('no such tokenizer')", "exit 1: ValueError: no such tokenizer"),
    ],
)
def test_f20_a_rank_that_exits_ends_the_run_everywhere(make_gang: MakeGang, deed: str, how: str) -> None:
    gang = make_gang(nodes=3)
    gang.start_all(DEED.format(deed=deed))
    begun = go(gang)
    assert causes(gang) == [f"node node-b, rank 1: {how}"] * 3
    ends = [one.exit for one in gang.end()]
    assert max(end["ended"] for end in ends) - begun < 5
    assert [end["stopped"] for end in ends] == [True, False, True]
    assert [end["code"] for end in ends] == [143, 1 if "Value" in how else 3, 143]
    for number in (0, 2):
        (told,) = [other for other in ends[number]["others"] if other["node"] == "node-b"]
        assert [(one["rank"], one["exit_code"]) for one in told["failures"]] == [(1, ends[1]["code"])]
        said = gang.benches[number].folder / "out" / "node.log"
        assert f"- launcher: the run ends: node node-b, rank 1: {how}\n" in said.read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_f21_a_rank_that_is_killed_ends_the_run_everywhere(make_gang: MakeGang, number: signal.Signals) -> None:
    gang = make_gang(nodes=2, ranks=2)
    gang.start_all(SLEEP)
    begun = time.time()
    os.kill(gang.pid(3), number)
    assert causes(gang) == [f"node node-b, rank 3: killed by {number.name}"] * 2
    assert seconds(gang.end(), since=begun) < 5


def test_f21_a_rank_that_does_not_listen_keeps_nobody_waiting(make_gang: MakeGang) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
    gang = make_gang(nodes=2, ranks=2)
    gang.start(0, SLEEP, stop_grace=30)
    gang.start(1, deaf, stop_grace=30)
    for bench in gang.benches:
        bench.wait_for_lines(" ready\n")
    time.sleep(2)
    begun = time.time()
    os.kill(gang.pid(3), signal.SIGKILL)
    log = gang.benches[0].folder / "out" / "node.log"
    gang.benches[0].wait_for(lambda: "the run ends: node node-b, rank 3: killed by SIGKILL" in log.read_text())
    assert time.time() - begun < 3  # node-b's own torchrun waits for its other rank for 30 s
    gang.benches[1].agents[0].terminate()
    gang.benches[1].agents[0].terminate()


def test_f23_a_rank_that_stands_still_is_found_and_everyones_stacks_are_kept(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=3, hang_timeout=3)
    gang.start_all(STEPS)
    os.kill(gang.pid(1), signal.SIGSTOP)
    begun = time.time()
    why = "no progress: no process of any node wrote anything for 3 s"
    assert causes(gang) == [f"node node-b, rank 1: is stopped (SIGSTOP); {why}"] * 3
    assert seconds(gang.end(), since=begun) < 3 + 5
    for rank, bench in enumerate(gang.benches):
        stacks = (bench.folder / "out" / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert "job.py" in stacks
        assert ("state T" in stacks) == (rank == 1)


def test_f23_a_rank_that_holds_the_gil_shows_its_stack_too(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=2, hang_timeout=3)
    gang.start_all(STEPS)
    begun = go(gang)
    (first, second) = causes(gang)
    assert first == second is not None
    assert str(first).endswith("no progress: no process of any node wrote anything for 3 s")
    assert seconds(gang.end(), since=begun) < 3 + 5
    stacks = (gang.benches[1].folder / "out" / "stacks" / "rank-00001.txt").read_text()
    assert 're.match("(a+)+$"' not in stacks  # places, not values
    assert "/re/__init__.py" in stacks or "re.py" in stacks


def test_f23_who_goes_on_is_left_alone_also_when_only_one_node_speaks(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=3, hang_timeout=4)
    gang.start_all(STEPS)
    time.sleep(12)
    assert [bench.agents[0].poll() for bench in gang.benches] == [None] * 3
    gang.benches[2].agents[0].terminate()
    assert causes(gang) == [None] * 3


def test_f24_a_whole_node_that_stands_still_is_lost_and_ends_when_it_wakes(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=3)
    gang.start_all(SLEEP)
    begun = time.time()
    gang.signal_node(1, signal.SIGSTOP)
    first, third = gang.end(0, 2)
    assert seconds([first, third], since=begun) < gang.settings["grace"] + 5
    for ended in (first, third):
        assert ended.exit["cause"].startswith("node node-b: lost: silent for ")
        assert ended.exit["stopped"] is True
    gang.signal_node(1, signal.SIGCONT)
    (second,) = gang.end(1)
    assert second.exit["stopped"] is True


def test_f26_two_nodes_that_are_cut_off_from_each_other_both_end_and_say_so(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=2, relayed=True)
    gang.start_all(SLEEP)
    begun = time.time()
    assert gang.relay is not None
    gang.relay.cut = {1}
    ends = gang.end()
    assert seconds(ends, since=begun) < gang.settings["grace"] + 5
    assert [ended.exit["others"][0]["lost"].startswith("lost: silent") for ended in ends] == [True, True]


def test_f26_of_three_the_one_that_is_cut_off_is_named_by_the_others(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=3, relayed=True)
    gang.start_all(SLEEP)
    assert gang.relay is not None
    gang.relay.cut = {0}
    first, second, third = (ended.exit["cause"] for ended in gang.end())
    assert second.startswith("node node-a: lost: silent for")
    assert third.startswith("node node-a: lost: silent for")
    assert ": lost: silent for" in first


def test_f27_a_node_whose_agent_is_killed_is_missed_at_once(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=3, grace=600.0)
    gang.start_all(SLEEP)
    begun = time.time()
    gang.signal_node(2, signal.SIGKILL)
    ends = gang.end(0, 1)
    assert seconds(ends, since=begun) < 5
    assert [one.exit["cause"] for one in ends] == [
        "node node-c: lost: its agent is gone, though the machine answers"
    ] * 2


def test_f27_a_node_that_is_gone_for_good_ends_the_others_after_the_grace(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=3, relayed=True)
    gang.start_all(SLEEP)
    assert gang.relay is not None
    gang.relay.cut = {2}
    gang.signal_node(2, signal.SIGKILL)
    begun = time.time()
    ends = gang.end(0, 1)
    assert 2 < seconds(ends, since=begun) < gang.settings["grace"] + 5
    assert all(one.exit["cause"].startswith("node node-c: lost: silent for") for one in ends)


def test_f35_a_fifth_of_all_datagrams_lost_ends_nothing_and_hides_nothing(make_gang: MakeGang) -> None:
    """With as many beats in the grace as usual. Ten minutes of it by a clock that is only counted: test_gang.py."""
    gang = make_gang(nodes=3, relayed=True, beat=0.2, grace=6.0)
    gang.start_all(DEED.format(deed="os._exit(7)"))
    assert gang.relay is not None
    gang.relay.loss = 0.2
    time.sleep(15)
    assert [bench.agents[0].poll() for bench in gang.benches] == [None] * 3
    begun = go(gang)
    assert causes(gang) == ["node node-b, rank 1: exit 7"] * 3
    assert seconds(gang.end(), since=begun) < 5


def test_a_stop_of_one_node_stops_all_and_is_no_failure(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=3)
    gang.start_all(SLEEP)
    gang.benches[1].agents[0].terminate()
    ends = [one.exit for one in gang.end()]
    assert [(end["stopped"], end["code"], end["cause"]) for end in ends] == [(True, 143, None)] * 3


def test_a_run_that_ends_well_ends_without_delay_and_later_nodes_are_waited_for(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=2)
    gang.start_all("import os, time; print('ready'); time.sleep(2 + 3 * int(os.environ['RANK']))")
    first, second = gang.end()
    assert (first.exit["code"], second.exit["code"]) == (0, 0)
    assert (first.exit["cause"], second.exit["cause"]) == (None, None)
    assert first.exit["ended"] + 1 < second.exit["ended"]


def test_who_comes_late_learns_that_the_run_is_over(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=2)
    gang.start(0, "raise ValueError('at once')")
    time.sleep(2)
    gang.start(1, SLEEP)
    assert causes(gang) == ["node node-a, rank 0: exit 1: ValueError: at once"] * 2


def test_the_clocks_of_the_nodes_are_compared(make_gang: MakeGang) -> None:
    """On one machine all clocks are one: what is found must be nearly nothing."""
    gang = make_gang(nodes=2)
    gang.start_all(DEED.format(deed="os._exit(3)"))
    go(gang)
    first, second = (one.exit["clock"] for one in gang.end())
    assert first == 0.0
    assert abs(second) < 0.05


def test_s21_what_is_not_signed_with_the_runs_key_changes_nothing(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=2, relayed=True)
    gang.start_all(SLEEP)
    assert gang.relay is not None
    stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    forged = b'{"from":1,"to":0,"count":99999999,"sent":0,"echo":null,"quiet":0,"state":"ending","news":9,"heard":9,'
    forged += b'"report":{"code":1,"why":"forged","hang":false,"failures":[]}}'
    for data in (b"", b"x", forged, b"\0" * 32 + forged, b"\0" * 60_000, b"cos\nsystem\n(S'touch /tmp/x'\ntR."):
        for _ in range(200):
            stranger.sendto(data, gang.addresses[0])
    stranger.close()
    time.sleep(2)
    assert [bench.agents[0].poll() for bench in gang.benches] == [None] * 2
    gang.benches[0].agents[0].terminate()
    assert causes(gang) == [None] * 2


def test_s21_a_node_with_another_key_is_not_heard(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=2)
    gang.start(0, SLEEP)
    gang.start(1, "raise ValueError('of another run')", key="ab" * 32)
    gang.end(1)
    time.sleep(1)
    assert gang.benches[0].agents[0].poll() is None


@pytest.mark.parametrize("key", ["\n", "ab" * 16, "no key at all"])
def test_s21_without_a_whole_key_nothing_is_listened_to(make_gang: MakeGang, key: str) -> None:
    gang = make_gang(nodes=2)
    gang.start(0, "print('done')", key=key)
    (ended,) = gang.end(0)
    assert (ended.status, "this node is not guarded" in ended.said("-")[0]) == (0, True)


def test_s10_the_key_is_in_no_argument_environment_log_or_report(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=2)
    gang.start_all(SLEEP)
    for number in range(2):
        for pid, words, command in gang._processes(number):
            assert gang.key.encode() not in b" ".join(words) + command, pid
    gang.benches[0].agents[0].terminate()
    for ended in gang.end():
        for path in ended.out.rglob("*"):
            assert not path.is_file() or gang.key.encode() not in path.read_bytes(), path
        assert gang.key not in ended.printed


def test_s11_a_secret_in_an_error_is_told_to_no_other_node(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=2)
    for bench in gang.benches:
        (bench.folder / "secrets").mkdir(parents=True)
        (bench.folder / "secrets" / "TOKEN").write_text("hf_1234567890")
        (bench.folder / "secrets" / ".complete").touch()
    gang.start_all(DEED.format(deed="raise ValueError('401 for ' + os.environ['TOKEN'])"), secrets=["TOKEN"])
    go(gang)
    assert causes(gang) == ["node node-b, rank 1: exit 1: ValueError: 401 for ***"] * 2
    for ended in gang.end():
        assert "hf_1234567890" not in "".join(path.read_text() for path in ended.out.iterdir())


def test_where_the_port_is_taken_the_run_goes_on_and_says_that_it_is_not_guarded(make_gang: MakeGang) -> None:
    gang = make_gang(nodes=2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(gang.addresses[0])
        gang.start(0, "print('done')")
        gang.start(1, "print('done')")
        first, second = gang.end()
    assert (first.exit["code"], second.exit["code"]) == (0, 0)
    assert any("this node is not guarded" in line for line in first.said("-"))


# The same with torchrun: nodes that have met in a collective, and then do something else.
MEET = """
import os, time
import torch
import torch.distributed as dist
dist.all_reduce(torch.ones(1))
print("ready")
while not os.path.exists(os.environ["MEETING"] + "/go"):
    time.sleep(0.01)
if dist.get_rank() == 1:
    {deed}
time.sleep(600)
"""


@pytest.mark.oracle
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="not installed: accelerate")
@pytest.mark.parametrize(
    ("deed", "how"),
    [
        ("os._exit(3)", "exit 3"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("raise ValueError('no')", "exit 1: ValueError: no"),
    ],
)
def test_f20_f21_torchrun_leaves_the_others_running_and_the_guard_does_not(
    make_gang: MakeGang, tmp_path: Path, deed: str, how: str
) -> None:
    gang = make_gang(nodes=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for number in range(2):
        config = {**CONFIG, "machine_rank": number, "main_process_port": port}
        path = tmp_path / f"accelerate-{number}.json"
        path.write_text(json.dumps(config))
        flags = ["--config_file", str(path), "--same_network", "--rdzv_backend", "static"]
        files = gang.benches[number].folder / "files"
        request = [*flags, str(files / "bootstrap.py"), "job.py"]
        env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        gang.start(number, MEET.format(deed=deed), launch=None, request=request, backend="gloo", env=env)
    gang.wait_until_ready()
    begun = go(gang)
    assert causes(gang) == [f"node node-b, rank 1: {how}"] * 2
    assert seconds(gang.end(), since=begun) < 5


CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "mixed_precision": "no",
    "use_cpu": False,
    "debug": False,
    "num_machines": 2,
    "num_processes": 2,
    "main_process_ip": "127.0.0.1",
}

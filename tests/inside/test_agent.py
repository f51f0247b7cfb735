"""The agent, as a process among processes: what it writes down, how it ends, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from .conftest import FAKE_LAUNCH, Bench

SPEAK = """
import os, sys
print("to stdout from", os.environ["LOCAL_RANK"])
print("to stderr from", os.environ["LOCAL_RANK"], file=sys.stderr)
"""


def test_every_line_is_kept_with_its_rank(bench: Bench) -> None:
    ended = bench.run(SPEAK, ranks=3, machine_rank=2)
    assert [sorted(ended.said(str(rank))) for rank in (6, 7, 8)] == [
        [f"to stderr from {local}", f"to stdout from {local}"] for local in range(3)
    ]
    assert ended.said("-") == ["started 3"]


def test_the_log_has_the_documented_format(bench: Bench) -> None:
    ended = bench.run("print('a  b '); print()")
    log = (ended.out / "node.log").read_text()
    assert re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (0|-) .*\n)+", log)
    assert ended.said("0") == ["a  b ", ""]


def test_the_same_lines_are_echoed_with_a_prefix(bench: Bench) -> None:
    ended = bench.run("print('hello')", launch=FAKE_LAUNCH.replace('print("started", count, flush=True)', ""))
    assert ended.printed == "[rank 0] hello\n"


def test_a_good_run_leaves_a_whole_exit_file(bench: Bench) -> None:
    ended = bench.run("print('done')")
    report = ended.exit
    assert ended.status == 0
    assert 0 < report.pop("started") <= report.pop("ended")
    assert report == {
        "run": "run-1",
        "node": "node-a",
        "machine_rank": 0,
        "code": 0,
        "signal": None,
        "stopped": False,
        "oom": False,
        "failures": [],
        "clock": 0.0,
        "others": [],
        "cause": None,
    }
    assert not (ended.out / "exit.json.tmp").exists()


@pytest.mark.parametrize("code", [1, 3, 42, 125])
def test_the_exit_code_of_the_job_passes(bench: Bench, code: int) -> None:
    ended = bench.run(f"import sys; sys.exit({code})")
    assert (ended.status, ended.exit["code"]) == (code, code)


def test_the_job_sees_what_the_run_says(bench: Bench) -> None:
    names = ["WORLD_SIZE", *(f"LAUNCHER_{name}" for name in ("RUN", "NODE", "WORLD_SIZE", "BACKEND", "NVME")), "MINE"]
    script = f"""
import json, os
print(json.dumps([os.environ[name] for name in {names}] + [os.getcwd(), os.environ["PYTHONUNBUFFERED"]]))
"""
    ended = bench.run(script, ranks=2, nvme=["/nvme/a", "/nvme/b"], env={"MINE": "a b$(c)"})
    seen = [json.loads(line) for line in ended.said("0")]
    assert seen == [["2", "run-1", "node-a", "2", "", "/nvme/a:/nvme/b", "a b$(c)", str(bench.folder / "work"), "1"]]


def test_a_last_line_without_an_end_is_kept(bench: Bench) -> None:
    assert bench.run("print('no newline', end='')").said("0") == ["no newline"]


def test_output_of_a_rank_that_dies_at_once_is_kept(bench: Bench) -> None:
    ended = bench.run("import os; os.write(1, b'x' * 50_000 + b'\\nlast words'); os.kill(os.getpid(), 9)")
    assert ended.said("0") == ["x" * 50_000, "last words"]


def test_a_rank_that_raises_is_named_with_its_error(bench: Bench) -> None:
    script = """
import os
if os.environ["RANK"] == "1":
    raise ValueError("the second rank\\nfails")
"""
    ended = bench.run(script, ranks=2)
    (failure,) = ended.exit["failures"]
    assert ended.exit["started"] <= failure.pop("time") <= ended.exit["ended"]
    assert failure == {
        "rank": 1,
        "local_rank": 1,
        "exit_code": 1,
        "signal": None,
        "type": "ValueError",
        "message": "the second rank\nfails",
    }


FLOOD = """
import os
line = b"y" * 99 + b"\\n"
for _ in range({chunks}):
    os.write(1, line * 1000)
"""


def test_a_flood_of_output_is_kept_whole_and_needs_no_memory(bench: Bench) -> None:
    script = FLOOD.format(chunks=300) + "print('end')"
    agent = bench.start(script, stdout=subprocess.DEVNULL)
    peak = 0
    while agent.poll() is None:
        peak = max(peak, resident(agent.pid))
    ended = bench.end(agent)
    assert ended.status == 0
    assert ended.said("0") == ["y" * 99] * 300_000 + ["end"]
    assert peak < 64 * 1024 * 1024


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def test_a_reader_who_stops_reading_stops_nothing(bench: Bench) -> None:
    agent = bench.start(FLOOD.format(chunks=50))
    bench.wait_for((bench.folder / "out" / "exit.json").exists)
    ended = bench.end(agent)
    assert len(ended.said("0")) == 50_000
    assert len(ended.printed) < 5_000_000


def test_a_closed_standard_output_stops_nothing(bench: Bench) -> None:
    agent = bench.start("print('still here')")
    assert agent.stdout is not None
    agent.stdout.close()
    assert agent.wait(timeout=60) == 0
    agent.stdout = None
    assert bench.end(agent).said("0") == ["still here"]


def test_a_stop_lets_the_job_end_by_itself(bench: Bench) -> None:
    script = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saving"), sys.exit(0)))
print("ready")
time.sleep(600)
"""
    agent = bench.start(script, ranks=2)
    bench.wait_for(lambda: ready(bench, 2))
    agent.send_signal(signal.SIGTERM)
    ended = bench.end(agent)
    assert ended.said("0") == ended.said("1") == ["ready", "saving"]
    assert ended.exit["stopped"] is True


STUBBORN = """
import os, signal, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
print("ready")
time.sleep(600)
"""


def ready(bench: Bench, count: int) -> bool:
    log = bench.folder / "out" / "node.log"
    return log.exists() and log.read_text().count("ready") == count


def test_a_job_that_does_not_stop_is_killed_after_its_grace(bench: Bench) -> None:
    agent = bench.start(STUBBORN, ranks=2, stop_grace=0.3)
    bench.wait_for(lambda: ready(bench, 4))
    agent.send_signal(signal.SIGTERM)
    ended = bench.end(agent)
    assert ended.exit["stopped"] is True
    assert (ended.exit["code"], ended.exit["signal"]) == (137, "SIGKILL")
    assert bench.living() == []


def test_a_second_signal_kills_at_once(bench: Bench) -> None:
    agent = bench.start(STUBBORN, stop_grace=100_000)
    bench.wait_for(lambda: ready(bench, 2))
    agent.send_signal(signal.SIGINT)
    agent.send_signal(signal.SIGTERM)
    ended = bench.end(agent)
    assert (ended.status, ended.exit["signal"], ended.exit["stopped"]) == (137, "SIGKILL", True)
    assert bench.living() == []


def test_nothing_survives_the_end_of_the_job(bench: Bench) -> None:
    script = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
print("leaving a daemon")
"""
    ended = bench.run(script, ranks=2)
    assert ended.exit["code"] == 0
    assert bench.living() == []


def test_nothing_survives_when_torchrun_is_killed(bench: Bench) -> None:
    agent = bench.start("import time; print('ready'); time.sleep(600)", ranks=2)
    bench.wait_for(lambda: ready(bench, 2))
    launch = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(launch[0]), signal.SIGKILL)
    ended = bench.end(agent)
    assert (ended.exit["code"], ended.exit["signal"], ended.exit["stopped"]) == (137, "SIGKILL", False)
    assert bench.living() == []


def test_a_launch_that_cannot_start_is_reported(bench: Bench) -> None:
    ended = bench.run("", workdir=str(bench.folder / "missing"))
    assert ended.status == 1
    assert [failure["type"] for failure in ended.exit["failures"]] == ["FileNotFoundError"]
    assert "missing" in ended.said("-")[0]


SHOW = "import os, base64; t = os.environ['TOKEN']; print('token', t, base64.b64encode(('me:' + t).encode()).decode())"


def put_secrets(folder: Path, **values: str) -> None:
    folder.mkdir()
    for name, value in values.items():
        (folder / name).write_text(value)
    (folder / ".complete").touch()


def test_secrets_reach_the_job_and_not_the_log(bench: Bench) -> None:
    put_secrets(bench.folder / "secrets", TOKEN="hf_1234567890")
    ended = bench.run(SHOW + "; assert t == 'hf_1234567890'", secrets=["TOKEN"])
    assert ended.status == 0
    everything = ended.printed + (ended.out / "node.log").read_text() + (ended.out / "exit.json").read_text()
    assert ended.said("0")[0].startswith("token *** ")
    assert "hf_1234567890" not in everything
    assert "2Zl8xMjM0NTY3ODkw"[:-2] not in everything


def test_secrets_are_in_no_process_environment(bench: Bench) -> None:
    put_secrets(bench.folder / "secrets", TOKEN="hf_1234567890")
    look = "open('/proc/self/environ','rb').read() + open(f'/proc/{os.getppid()}/environ','rb').read()"
    ended = bench.run(f"import os; print(b'hf_1234567890' in {look}, len(os.environ['TOKEN']))", secrets=["TOKEN"])
    assert ended.said("0") == ["False 13"]


def test_the_agent_waits_for_its_secrets(bench: Bench) -> None:
    agent = bench.start("print('secrets are here')", secrets=["TOKEN"])
    with pytest.raises(subprocess.TimeoutExpired):
        agent.wait(timeout=0.5)
    put_secrets(bench.folder / "secrets", TOKEN="value")
    assert bench.end(agent).said("0") == ["secrets are here"]


def test_an_agent_that_waits_for_secrets_can_be_stopped(bench: Bench) -> None:
    agent = bench.start("", secrets=["TOKEN"])
    bench.wait_for((bench.folder / "out" / "node.log").exists)
    bench.wait_for(lambda: catches(agent.pid, signal.SIGTERM))
    agent.send_signal(signal.SIGTERM)
    ended = bench.end(agent)
    assert (ended.status, ended.exit["stopped"], ended.exit["failures"]) == (143, True, [])


def catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


def test_a_missing_secret_is_named(bench: Bench) -> None:
    put_secrets(bench.folder / "secrets", OTHER="value")
    ended = bench.run("", secrets=["TOKEN"])
    assert ended.status == 1
    assert [failure["type"] for failure in ended.exit["failures"]] == ["SecretsMissing"]
    assert "TOKEN" in ended.said("-")[0]


def test_the_temporary_folder_is_private_and_goes_away(bench: Bench) -> None:
    (bench.folder / "tmp").mkdir()
    script = "import os; print(os.stat(os.path.dirname(os.environ['LAUNCHER_PIPES'])).st_mode)"
    agent = bench.start(script)
    agent.kill()
    agent.communicate()
    ended = bench.run(script)
    assert stat.S_IMODE(int(ended.said("0")[-1])) == 0o700

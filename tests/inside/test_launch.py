"""The whole way inside a node: agent, launch.py, torchrun, bootstrap.py and real ranks, on CPUs."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from launcher.stages.watch import read_exit
from launcher.state import first_cause

from .conftest import Bench, Ended
from .test_bootstrap import ODD

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="not installed: accelerate"),
]


def launched(bench: Bench, script: str, *arguments: str, ranks: int = 1, **run: Any) -> dict[str, Any]:
    """Everything Bench.run needs for a real launch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "no",
        "use_cpu": False,
        "debug": False,
        "num_machines": 1,
        "num_processes": ranks,
        "machine_rank": 0,
        "main_process_ip": "127.0.0.1",
        "main_process_port": port,
        **run.pop("config", {}),
    }
    (bench.folder / "accelerate.json").write_text(json.dumps(config))
    flags = ["--config_file", str(bench.folder / "accelerate.json"), "--same_network", "--rdzv_backend", "static"]
    job = [str(bench.folder / "files" / "bootstrap.py"), "job.py", *arguments]
    env = {"OMP_NUM_THREADS": "1"} | run.pop("env", {})
    return {"script": script, "ranks": ranks, "launch": None, "env": env} | run | {"request": flags + job}


def run(bench: Bench, script: str, *arguments: str, **settings: Any) -> Ended:
    return bench.end(bench.start(**launched(bench, script, *arguments, **settings)))


def cause(ended: Ended) -> str:
    """What the user is told: the agent only reports, the launcher judges."""
    end = read_exit("node-a", json.dumps(ended.exit), now=0.0)
    assert end is not None
    found = first_cause({"node-a": end})
    assert found is not None
    return found[1]


def test_arguments_pass_accelerate_and_torchrun_byte_for_byte(bench: Bench) -> None:
    words = [*ODD, "--config_file", "other.yaml", "--num_processes", "9", "-m", "--help"]
    ended = run(bench, "import json, sys; print(json.dumps(sys.argv))", *words)
    assert json.loads(ended.said("0")[0]) == ["job.py", *words]
    assert ended.status == 0


MEET = """
import os, signal, sys
import torch
import torch.distributed as dist
for turn in range(1000):
    dist.all_reduce(torch.ones(1))
    if turn == 3 and dist.get_rank() == 1:
        {deed}
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_killed_among_others_is_the_first_cause(bench: Bench, number: signal.Signals) -> None:
    ended = run(bench, MEET.format(deed=f"os.kill(os.getpid(), {int(number)})"), ranks=2, backend="gloo")
    assert cause(ended) == f"node node-a, rank 1: killed by {number.name}"
    assert (ended.status, ended.exit["stopped"]) == (1, False)
    assert not [line for line in ended.said("-") if "Traceback" in line]


def test_a_rank_that_raises_among_others_is_the_first_cause(bench: Bench) -> None:
    ended = run(bench, MEET.format(deed="raise ArithmeticError('no such number')"), ranks=2, backend="gloo")
    assert cause(ended) == "node node-a, rank 1: exit 1: ArithmeticError: no such number"


def test_a_ranks_own_exit_code_is_the_runs(bench: Bench) -> None:
    ended = run(bench, MEET.format(deed="sys.exit(42)"), ranks=2, backend="gloo")
    assert ended.status == ended.exit["code"] == 42
    assert cause(ended) == "node node-a, rank 1: exit 42"


def test_a_stop_reaches_the_ranks_through_torchrun(bench: Bench) -> None:
    script = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saving"), sys.exit(0)))
print("ready")
time.sleep(600)
"""
    agent = bench.start(**launched(bench, script, ranks=2))
    bench.wait_for_lines(" 0 ready\n", " 1 ready\n")
    agent.send_signal(signal.SIGTERM)
    ended = bench.end(agent)
    assert ended.said("0") == ended.said("1") == ["ready", "saving"]
    assert (ended.status, ended.exit["stopped"]) == (143, True)


def test_a_launch_that_is_refused_says_why_in_one_line(bench: Bench) -> None:
    ended = run(bench, "", config={"num_machine": 2})
    (failure,) = ended.exit["failures"]
    assert (ended.status, failure["rank"], failure["type"]) == (1, None, "ValueError")
    assert "num_machine" in failure["message"]
    assert not [line for line in ended.said("-") if "Traceback" in line]


def test_a_missing_node_is_noticed_within_the_timeout_given(bench: Bench) -> None:
    two = {"num_machines": 2, "num_processes": 2}
    settings = launched(bench, "", config=two)
    settings["request"] = ["--rdzv_conf", "timeout=1", *settings["request"]]
    ended = bench.end(bench.start(**settings))
    (failure,) = ended.exit["failures"]
    assert (failure["rank"], failure["type"]) == (None, "DistStoreError")
    assert "1/2 clients joined" in failure["message"]


STATE = """
from accelerate import Accelerator
accelerator = Accelerator()
print(accelerator.distributed_type.value, accelerator.num_processes, accelerator.process_index, accelerator.device.type)
accelerator.end_training()
"""
ZERO = {
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"zero_stage": 2, "deepspeed_multinode_launcher": "standard"},
}


@pytest.mark.parametrize(("config", "kind"), [({}, "MULTI_CPU"), (ZERO, "DEEPSPEED")])
def test_on_cpus_the_ranks_find_each_other_and_compile_nothing(bench: Bench, config: dict[str, Any], kind: str) -> None:
    ops = bench.folder / "torch_extensions"
    ended = run(bench, STATE, ranks=2, backend="gloo", config=config, env={"TORCH_EXTENSIONS_DIR": str(ops)})
    assert [ended.said(str(rank))[-1] for rank in range(2)] == [f"{kind} 2 {rank} cpu" for rank in range(2)]
    assert not Path(ops).exists()


def test_without_the_bootstraps_help_each_believes_to_be_alone(bench: Bench) -> None:
    ended = run(bench, STATE, ranks=2, backend=None)
    assert [ended.said(str(rank))[-1] for rank in range(2)] == ["NO 1 0 cpu"] * 2

"""The ladder as it is asked for and told: machines from facts and from options, the table, the data, the refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cluster.errors import InputError
from launcher.ladder import FREE_FOR_JOBS, Question, find_model, make_cluster, plan, read_cluster, read_config
from launcher.memory import GIB, Host, Recipe, Rung, choose
from launcher.model import guess_model
from launcher.views.ladder import ladder_data, ladder_text
from tests.pure.given import disk, facts, inventory
from tests.pure.test_cli import Shell, call

__all__ = ["call"]  # a fixture

NVME = ["/mnt/nvme0", "/mnt/nvme1"]
MODEL = guess_model(7_000_000_000, micro_batch=1, sequence=2048, checkpointing=True, item=2)
BF16 = Recipe(precision="bf16")


def cluster(*, hosts: int = 2, gpu_memory: int = 80 * GIB, nvme: int = 3072 * GIB) -> tuple[Host, ...]:
    host = Host(name="", gpus=8, gpu_memory=gpu_memory, memory=1024 * GIB, nvme=nvme)
    return tuple(dataclasses.replace(host, name=f"gpu-{number:02d}") for number in range(1, hosts + 1))


# Machines


def test_surveyed_machines_are_what_is_planned_for() -> None:
    wanted = inventory(nodes=1, defaults={"nvme": NVME})
    disks = (disk(NVME[0], free=3 * GIB), disk(NVME[1], free=5 * GIB))
    machines = read_cluster(wanted, {"gpu-01": facts(disks=disks)})
    # The processes are dealt out over the disks, so the smaller one is full first.
    assert machines.hosts == (
        Host(name="gpu-01", gpus=8, gpu_memory=80 * GIB, memory=int(1024 * GIB * FREE_FOR_JOBS), nvme=6 * GIB),
    )
    assert (machines.cpu, machines.world) == (False, 8)


def test_where_cpus_train_there_is_no_context() -> None:
    wanted = inventory(nodes=1, accelerator="cpu", defaults={"slots": 2})
    machines = read_cluster(wanted, {"gpu-01": facts(gpus=0)})
    assert (machines.cpu, machines.context, machines.hosts[0].gpus) == (True, 0, 2)
    assert machines.hosts[0].nvme == 0


# Models


def test_a_number_of_parameters_needs_no_torch() -> None:
    machines = make_cluster(cluster(), cpu=False)
    model, choice = plan(None, Question(parameters=7_000_000_000), BF16, machines, asked=None)
    assert not model.simulated
    assert choice.chosen is not None


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("{", "config.json:1:2", "this is not JSON"),
        ("[]", "config.json", "this is no config.json of a Hugging Face model"),
        ('{"layers": 3}', "config.json", "it has no model_type"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str, where: str, what: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_config(path)
    assert str(refused.value.where).endswith(where)
    assert what in str(refused.value)


@pytest.mark.parametrize(
    "question", [Question(config=Path("none.json")), Question(code=Path("none.py"), function="make")]
)
def test_a_file_that_is_not_there_is_told(question: Question) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        find_model(None, question, Recipe())


# Told


def test_the_table_marks_the_choice_and_says_why_not_the_one_below() -> None:
    machines = make_cluster(cluster(), cpu=False)
    told = ladder_text(MODEL, machines, choose(MODEL, BF16, machines, asked=Rung(stage=3)))
    lines = told.splitlines()
    assert lines[0].startswith("model    6,999,999,996 parameters, 211,200,000 in the largest module, activations ")
    assert lines[0].endswith("(estimated)")
    assert lines[1] == "cluster  2 x 8 GPUs of 80.0 GiB, 1.0 TiB of memory, 3.0 TiB of NVMe"
    assert [line.split()[1] for line in lines if line.startswith(">")] == ["ZeRO-1"]
    assert "take ZeRO-1" in lines
    assert any(line.startswith("  DDP does not fit: gpu-01 lacks ") for line in lines)
    assert "  ZeRO-3, as asked for, is more than is needed: ZeRO-1 fits, and is faster" in lines
    assert "ZeRO-1, per GPU" in lines


def test_machines_that_differ_have_a_line_each() -> None:
    first, second = cluster()
    hosts = (first, dataclasses.replace(second, gpu_memory=40 * GIB, nvme=0))
    machines = make_cluster(hosts, cpu=False)
    lines = ladder_text(MODEL, machines, choose(MODEL, BF16, machines)).splitlines()
    assert lines[1:3] == [
        "cluster  1 x 8 GPUs of 80.0 GiB, 1.0 TiB of memory, 3.0 TiB of NVMe",
        "cluster  1 x 8 GPUs of 40.0 GiB, 1.0 TiB of memory",
    ]


def test_processes_on_cpus_are_called_so() -> None:
    machines = make_cluster(cluster(hosts=1), cpu=True)
    told = ladder_text(MODEL, machines, choose(MODEL, BF16, machines))
    assert "cluster  1 x 8 processes, 1.0 TiB of memory" in told


def test_where_nothing_fits_that_is_said() -> None:
    machines = make_cluster(cluster(gpu_memory=GIB, nvme=0), cpu=False)
    told = ladder_text(MODEL, machines, choose(MODEL, BF16, machines))
    assert "no rung fits\n  ZeRO-3 + optimizer on NVMe + parameters on NVMe does not fit: " in told
    assert ">" not in told


def test_the_same_as_data() -> None:
    machines = make_cluster(cluster(), cpu=False)
    data = ladder_data(MODEL, machines, choose(MODEL, BF16, machines))
    assert json.loads(json.dumps(data)) == data
    assert (data["chosen"], data["asked"], data["model"]["simulated"]) == ("ZeRO-1", None, False)
    ddp = data["rungs"][0]
    assert (ddp["rung"], ddp["fits"]) == ("DDP", False)
    assert ddp["short"][0]["missing"] == ddp["gpu"] - 80 * GIB
    assert sum(part["bytes"] for part in ddp["parts"] if part["place"] == "gpu") == ddp["gpu"]


# The command


def test_without_a_cluster_the_machines_are_said(call: Shell) -> None:
    options = ("--precision", "bf16", "--gpu-memory", "80g", "--gpus", "4", "--nodes", "3", "--nvme", "2t")
    told = call("plan", "--parameters", "7B", "--checkpointing", "--json", *options)
    assert (told.code, told.err) == (0, "")
    data = json.loads(told.out)
    assert [host["name"] for host in data["hosts"]] == ["node-01", "node-02", "node-03"]
    assert data["hosts"][0] == {
        "name": "node-01",
        "gpus": 4,
        "gpu_memory": 80 * GIB,
        "memory": 1024 * GIB,
        "nvme": 2048 * GIB,
    }
    told = call("plan", "--parameters", "7B", "--stage", "3", *options)
    assert (told.code, told.err) == (0, "")
    assert "take ZeRO-" in told.out


GIVEN = ("--parameters", "7B", "--gpu-memory", "80g")


@pytest.mark.parametrize(
    ("words", "what", "cure"),
    [
        (("--gpu-memory", "80g"), "which model?", "give --parameters 7B"),
        ((*GIVEN, "--model", "config.json"), "this names more than one model", "give one of --parameters"),
        (("--model-from", "model.py", "--gpu-memory", "80g"), "names no function of a file", "as model.py:make"),
        (("--parameters", "lots", "--gpu-memory", "80g"), "'lots' is no number of parameters", "such as 7B"),
        (("--parameters", "7B", "--gpu-memory", "80"), "'80' is no size", "such as 80g"),
        ((*GIVEN, "-c", "lab"), "a cluster and --gpu-memory", "leave one of them out"),
        ((*GIVEN, "--offload-param", "cpu"), "offloading is asked for without a stage", "add --stage"),
        ((*GIVEN, "--stage", "2", "--offload-optimizer", "nvme"), "offloads the optimizer to the CPU alone", "use cpu"),
        (("--model", "none.json", "--gpu-memory", "80g"), "there is no such file", ""),
    ],
)
def test_what_cannot_be_meant_is_refused(call: Shell, words: tuple[str, ...], what: str, cure: str) -> None:
    told = call("plan", *words)
    assert (told.code, told.out) == (2, "")
    assert what in told.err
    assert cure in told.err

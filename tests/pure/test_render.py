"""Rendering: whole plans as golden files (tests/plans, written by `make golden`), and every trap of it by name."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.container import LABEL_PLAN, ContainerSpec, Mount
from cluster.facts import DockerFact
from cluster.inventory import Inventory, load_inventory
from launcher import render, zero
from launcher.job import Job, Settings, Stage
from launcher.plan import NodePlan, Plan, make_plan
from tests.pure import given

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "plans"
INSIDE = ROOT / "launcher" / "inside"
WRITE = os.environ.get("LAUNCHER_GOLDEN") == "write"


def plan_of(job: Job, inventory: Inventory | None = None, **facts: Any) -> Plan:
    inventory = inventory or given.inventory()
    known = given.all_facts(inventory, **facts)
    return make_plan(inventory, job, known, image="sha256:feed", run_id="run-1", code="c0de", operator="anna@laptop")


TRAIN = Job(script="train.py")
ZERO3 = Job(
    script="train.py",
    args=("--epochs", "3", "--name", "it's a run", "$(id)", ""),
    settings=Settings(
        stage=3, offload_optimizer="nvme", offload_param="nvme", accumulation=4, clipping=1.0, precision="bf16"
    ),
    env=(("WANDB_MODE", "offline"),),
    secrets=("HF_TOKEN",),
)
FILE = Job(
    script="src/train.py",
    config=json.dumps(
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    ),
)
CUDA = given.inventory(
    container={
        "shm_size": "16g",
        "devices": ["/dev/infiniband"],
        "env": {"NCCL_DEBUG": "WARN"},
        "mounts": [{"source": "/mnt/models", "target": "/models"}],
    },
    defaults={
        "nvme": [given.NVME, "/mnt/nvme1"],
        "paths": {"checkpoints": "/mnt/checkpoints", "data": "/mnt/data", "cache": "/mnt/cache"},
    },
)
CPU = given.inventory(accelerator="cpu", container={"ulimits": {"nofile": 65536}}, defaults={"slots": 2})
PLANS = {
    "cuda-zero3-nvme": plan_of(ZERO3, CUDA),
    "cuda-file": plan_of(FILE, CUDA),
    "cpu-plain": plan_of(TRAIN, CPU, gpus=0, docker=DockerFact(version="27.1.1")),
    "local-process": plan_of(
        Job(script="train.py", settings=Settings(stage=2, offload_optimizer="cpu")),
        load_inventory(ROOT / "examples" / "local.yaml"),
        gpus=0,
    ),
}


def rendered(plan: Plan, node: NodePlan) -> str:
    """Everything that one node is given, as one text."""
    standing = replace(node, host=replace(node.host, files=f"{node.root}/node"))
    files = render.files(plan, node)
    ours = {name: text for name, text in files.items() if name not in render.INSIDE}
    parts = {
        **ours,
        "other files": "\n".join(name for name in files if name not in ours),
        "launch": "\n".join(
            json.dumps(word) for word in ("accelerate", "launch", *render.launch_arguments(plan, node))
        ),
        "run container": as_text(render.run_container(plan, node)),
        "node container": as_text(render.node_container(replace(plan, run="", job=Job(script="")), standing)),
    }
    return "\n".join(f"### {name}\n{text.rstrip()}\n" for name, text in parts.items())


def as_text(spec: ContainerSpec) -> str:
    said = dataclasses.asdict(spec)
    # Of ours alone: a fingerprint in a golden file would change with every line of it.
    said["labels"] = {name: "…" if name == LABEL_PLAN else value for name, value in spec.labels.items()}
    said["mounts"] = [f"{one.source} -> {one.target}{' (read-only)' * one.read_only}" for one in spec.mounts]
    said["ulimits"] = dict(spec.ulimits)
    return json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False)


CASES = [(name, node) for name, plan in PLANS.items() for node in plan.nodes]


@pytest.mark.parametrize(("name", "node"), CASES, ids=[f"{name}-{node.name}" for name, node in CASES])
def test_a_whole_plan_is_rendered_as_its_golden_file(name: str, node: NodePlan) -> None:
    path = GOLDEN / name / f"{node.name}.txt"
    text = rendered(PLANS[name], node)
    if WRITE:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


def test_every_golden_file_belongs_to_a_plan() -> None:
    kept = {f"{path.parent.name}/{path.stem}" for path in GOLDEN.glob("*/*")}
    assert kept == {f"{name}/{node.name}" for name, node in CASES}


def config_of(job: Job, number: int = 0) -> dict[str, Any]:
    plan = plan_of(job)
    return render.accelerate_config(plan, plan.nodes[number])


def words_of(job: Job) -> tuple[str, ...]:
    plan = plan_of(job)
    return render.launch_arguments(plan, plan.nodes[1])


def block(job: Job) -> dict[str, Any]:
    said = config_of(job)["deepspeed_config"]
    assert isinstance(said, dict)
    return said


def test_no_mixed_precision_is_text_and_not_false() -> None:
    text = render.to_yaml(config_of(TRAIN))
    assert "mixed_precision: 'no'\n" in text
    assert yaml.safe_load(text)["mixed_precision"] == "no"


@pytest.mark.parametrize("job", [Job(script="train.py", settings=Settings(stage=1)), ZERO3, FILE])
def test_the_multinode_launcher_is_always_standard(job: Job) -> None:
    assert block(job)["deepspeed_multinode_launcher"] == "standard"


def test_the_number_of_processes_is_the_whole_clusters() -> None:
    assert [config_of(TRAIN, number)["num_processes"] for number in range(3)] == [24, 24, 24]
    assert [config_of(TRAIN, number)["num_machines"] for number in range(3)] == [3, 3, 3]


def test_only_the_machine_rank_tells_the_nodes_apart() -> None:
    first, second, third = (config_of(ZERO3, number) for number in range(3))
    assert [one.pop("machine_rank") for one in (first, second, third)] == [0, 1, 2]
    assert first == second == third


def test_the_meeting_point_is_an_address_and_never_a_name() -> None:
    assert (config_of(TRAIN)["main_process_ip"], config_of(TRAIN)["main_process_port"]) == ("10.0.0.11", 29500)


def test_what_the_yaml_cannot_say_is_said_by_flags() -> None:
    assert words_of(TRAIN) == (
        "--config_file",
        "/launcher/files/accelerate.yaml",
        "--same_network",
        "--rdzv_backend",
        "static",
        "--rdzv_conf",
        "timeout=120",
        "/launcher/files/bootstrap.py",
        "train.py",
    )
    assert not {"rdzv_backend", "same_network", "enable_cpu_affinity", "downcast_bf16"} & set(config_of(ZERO3))


def test_the_rendezvous_is_static_since_the_other_one_unpickles() -> None:
    words = words_of(ZERO3)
    assert words[words.index("--rdzv_backend") + 1] == "static"


def test_arguments_follow_the_script_byte_for_byte() -> None:
    odd = ("", " ", "it's", '"', "$(id)", "`id`", "\\", "*", "-x", "--", "ü\n", "a=b", "\U0001f600")
    assert words_of(replace(TRAIN, args=odd))[-len(odd) - 1 :] == ("train.py", *odd)
    plan = plan_of(replace(TRAIN, args=odd))
    document = json.loads(render.files(plan, plan.nodes[0])["run.json"])
    assert tuple(document["launch"][-len(odd) :]) == odd


def test_a_deepspeed_file_stands_beside_nothing_that_it_says_itself() -> None:
    assert block(FILE) == {
        "deepspeed_multinode_launcher": "standard",
        "zero3_init_flag": True,
        "deepspeed_config_file": "/launcher/files/deepspeed.json",
    }
    assert "mixed_precision" not in config_of(FILE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_is_rendered_even_where_there_is_none(stage: Stage) -> None:
    assert block(Job(script="train.py", settings=Settings(stage=stage)))["gradient_clipping"] == zero.UNREACHED


def test_nvme_paths_go_to_the_agent_since_accelerate_drops_them() -> None:
    plan = plan_of(ZERO3, CUDA)
    assert render.run_document(plan, plan.nodes[0])["nvme"] == ["/nvme/0", "/nvme/1"]
    assert not any("nvme_path" in key for key in block(ZERO3))


def test_a_deepspeed_file_gets_its_nvme_path_on_each_node() -> None:
    plan = plan_of(FILE, CUDA)
    made = json.loads(render.files(plan, plan.nodes[0])["deepspeed.json"])
    assert made["zero_optimization"]["offload_param"] == {"device": "nvme", "nvme_path": "/nvme/0"}


def test_plain_training_leaves_deepspeed_out_and_stays_with_torchrun() -> None:
    for inventory in (CUDA, CPU):
        plan = plan_of(TRAIN, inventory)
        config = render.accelerate_config(plan, plan.nodes[0])
        assert (config["distributed_type"], config["use_cpu"]) == ("MULTI_GPU", False)
        assert "deepspeed_config" not in config


def test_plain_training_accumulates_by_the_environment_since_the_yaml_cannot_say_it() -> None:
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"

    def said(**zero: Any) -> str | None:
        plan = plan_of(Job(script="train.py", settings=Settings(**zero)))
        return render.environment(plan, plan.nodes[0]).get(name)

    assert [said(accumulation=4), said(), said(stage=2, accumulation=4)] == ["4", None, None]


def test_the_jobs_environment_wins_over_the_inventorys_and_that_over_ours() -> None:
    inventory = given.inventory(container={"env": {"OMP_NUM_THREADS": "2", "A": "inventory", "B": "inventory"}})
    plan = plan_of(replace(TRAIN, env=(("A", "job"),)), inventory)
    said = render.environment(plan, plan.nodes[0])
    assert (said["OMP_NUM_THREADS"], said["A"], said["B"]) == ("2", "job", "inventory")


def test_threads_are_shared_out_and_never_none() -> None:
    plan = plan_of(TRAIN)
    few = replace(plan.nodes[0], cpus=4)
    assert render.environment(plan, plan.nodes[0])["OMP_NUM_THREADS"] == "8"
    assert render.environment(plan, few)["OMP_NUM_THREADS"] == "1"


def test_both_libraries_are_given_the_nic_and_none_where_it_is_unknown() -> None:
    plan = plan_of(TRAIN)
    names = {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
    assert {name: render.environment(plan, plan.nodes[0])[name] for name in names} == dict.fromkeys(names, "eth0")
    assert not names & set(render.environment(plan, replace(plan.nodes[0], nic="")))


def test_a_secret_is_in_no_file_and_no_container_but_by_its_name() -> None:
    plan = plan_of(ZERO3)
    spec = render.run_container(plan, plan.nodes[0])
    assert "HF_TOKEN" not in spec.env
    assert spec.secrets_dir == "/run/secrets"
    assert render.run_document(plan, plan.nodes[0])["secrets"] == ["HF_TOKEN"]
    assert render.run_container(plan_of(TRAIN), plan.nodes[0]).secrets_dir is None


def test_the_guards_meet_at_the_training_addresses_and_never_twice_at_one_port() -> None:
    plan = plan_of(replace(TRAIN, hang_timeout=600))
    assert render.guard_settings(plan) == {
        "peers": [{"node": f"gpu-0{n}", "address": f"10.0.0.1{n}", "port": 29500} for n in (1, 2, 3)],
        "beat": 2.0,
        "grace": 60,
        "hang_timeout": 600,
    }
    here = replace(plan, nodes=tuple(replace(node, address="127.0.0.1") for node in plan.nodes))
    peers = json.loads(json.dumps(render.guard_settings(here)))["peers"]
    assert [one["port"] for one in peers] == [29500, 29501, 29502]


def test_what_is_started_again_finds_what_the_first_attempt_had_saved() -> None:
    plan = plan_of(TRAIN)
    again = plan_of(replace(TRAIN, resumes="run-0", restart=2))
    names = ("LAUNCHER_RUN", "LAUNCHER_RESTART")
    said = [[render.environment(one, one.nodes[0]).get(name) for name in names] for one in (plan, again)]
    assert said == [["run-1", None], ["run-0", "2"]]


def test_the_code_and_the_files_are_read_only_and_the_log_is_not() -> None:
    plan = plan_of(TRAIN)
    root = "/home/ml/.launcher/lab/gpu-01"
    assert render.run_container(plan, plan.nodes[0]).mounts == (
        Mount(source=f"{root}/runs/run-1/files", target="/launcher/files"),
        Mount(source=f"{root}/store/trees/c0de", target="/launcher/code"),
        Mount(source=f"{root}/runs/run-1/out", target="/launcher/out", read_only=False),
        Mount(source=f"{root}/checkpoints", target="/checkpoints", read_only=False),
    )


def test_without_docker_nothing_is_mounted() -> None:
    plan = PLANS["local-process"]
    assert render.run_container(plan, plan.nodes[0]).mounts == ()


def test_the_files_inside_are_ours_unchanged() -> None:
    plan = plan_of(TRAIN)
    files = render.files(plan, plan.nodes[0])
    assert {name: files[name] for name in render.INSIDE} == {
        name: (INSIDE / name).read_text() for name in render.INSIDE
    }


def test_a_node_containers_label_changes_with_what_it_is_made_of_and_with_nothing_else() -> None:
    def label(inventory: Inventory) -> str:
        plan = make_plan(inventory, TRAIN, given.all_facts(inventory), image="sha256:feed")
        return render.node_container(plan, plan.nodes[0]).labels[LABEL_PLAN]

    same = label(given.inventory())
    assert label(given.inventory()) == same
    changed = [
        given.inventory(master_port=31000),
        given.inventory(container={"env": {"A": "1"}}),
        given.inventory(defaults={"nvme": [given.NVME]}),
        given.inventory(nodes=2),
    ]
    assert len({same, *map(label, changed)}) == len(changed) + 1

"""Rendering: a plan as the files, arguments and container specifications that carry it out. Returns data, writes none.

The flags beside the YAML are there because `accelerate launch` ignores those keys of its own file, or does not know
them as keys (tests/oracle holds each of these facts).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from cluster.container import (
    LABEL_CLUSTER,
    LABEL_DETACHED,
    LABEL_GRACE,
    LABEL_NODE,
    LABEL_NODES,
    LABEL_OPERATOR,
    LABEL_OUT,
    LABEL_OWNER,
    LABEL_PLAN,
    LABEL_RANK,
    LABEL_ROLE,
    LABEL_RUN,
    LABEL_STARTER,
    ContainerSpec,
    Mount,
)
from launcher import zero
from launcher.plan import NodePlan, Plan

INSIDE = ("agent.py", "guard.py", "cause.py", "stacks.py", "launch.py", "bootstrap.py", "manifest.py")
# The run's container has one name per node: making it is atomic, so two runs can never hold the same node.
ROLE_NODE, ROLE_RUN = "node", "run"
JOIN_TIMEOUT = 120  # seconds for all nodes to meet; torchrun's own default is 900
MARGIN = 5.0  # seconds more than a job's own grace before the engine ends its container: the agent's, to tell of it
BEAT = 2.0  # seconds between two datagrams of a node's guard to another's


def container_name(cluster: str, node: str, role: str) -> str:
    """The name of a node's container, the same for every run."""
    return f"launcher-{cluster}-{node}-{role}"


def kin(spec: ContainerSpec) -> dict[str, str]:
    """The labels of whatever stands in a container's place."""
    return {name: spec.labels[name] for name in (LABEL_CLUSTER, LABEL_OWNER, LABEL_NODE, LABEL_ROLE)}


def engine_grace(labels: Mapping[str, str]) -> float:
    """How long the engine shall wait for a container of ours that was asked to end."""
    return float(labels.get(LABEL_GRACE, 0)) + MARGIN


def accelerate_config(plan: Plan, node: NodePlan) -> dict[str, object]:
    """The Accelerate configuration of one node, as `accelerate launch --config_file` reads it."""
    config: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(plan),
        "mixed_precision": plan.job.settings.precision or "no",
        "use_cpu": False,  # on CPU too: `use_cpu: true` would leave torchrun for a single process
        "num_machines": len(plan.nodes),
        "num_processes": plan.world_size,  # of the whole cluster, not of this node
        "machine_rank": node.rank,
        "main_process_ip": plan.master,
        "main_process_port": plan.port,
        "main_training_function": "main",
        "debug": False,
    }
    way = zero.way_of(plan.job)
    if way == zero.FILE:
        # Everything that the DeepSpeed file says may not stand here as well: Accelerate refuses both at once.
        del config["mixed_precision"]
        block = zero.file_settings(plan.job.settings, zero.deepspeed_config(plan.job))
        config["deepspeed_config"] = {**block, "deepspeed_config_file": f"{node.job.files}/deepspeed.json"}
    elif way == zero.PLUGIN:
        config["deepspeed_config"] = zero.plugin_settings(plan.job.settings)
    return config


def _distributed_type(plan: Plan) -> str:
    # MULTI_CPU would need mpirun, and NO would leave torchrun: MULTI_GPU starts plain training of any size on either.
    return "DEEPSPEED" if zero.uses_deepspeed(plan.job) else "MULTI_GPU"


def launch_arguments(plan: Plan, node: NodePlan) -> tuple[str, ...]:
    """What follows `accelerate launch`."""
    return (
        "--config_file",
        f"{node.job.files}/accelerate.yaml",
        "--same_network",
        "--rdzv_backend",
        "static",
        "--rdzv_conf",
        f"timeout={JOIN_TIMEOUT}",
        f"{node.job.files}/bootstrap.py",
        plan.job.script,
        *plan.job.args,
    )


def environment(plan: Plan, node: NodePlan) -> dict[str, str]:
    """What the job finds in its environment; later ones win: ours, the inventory's, the job's."""
    ours = {
        "LAUNCHER_CLUSTER": plan.cluster,
        # The first attempt's: by it a script finds what the one before had saved.
        **({"LAUNCHER_RUN": plan.job.resumes or plan.run} if plan.run else {}),
        **({"LAUNCHER_RESTART": str(plan.job.restart)} if plan.job.restart else {}),
        "LAUNCHER_NODE": node.name,
        "LAUNCHER_CHECKPOINTS": node.job.checkpoints,
        # One NIC for both collectives' libraries: left alone they may choose a bridge that leads nowhere.
        **({"NCCL_SOCKET_IFNAME": node.nic, "GLOO_SOCKET_IFNAME": node.nic} if node.nic else {}),
        "OMP_NUM_THREADS": str(max(1, node.cpus // node.slots)),
    }
    if node.job.data:
        ours["LAUNCHER_DATA"] = node.job.data
    if node.job.cache:
        ours["LAUNCHER_CACHE"] = node.job.cache
        ours["HF_HOME"] = f"{node.job.cache}/huggingface"
    if plan.accelerator == "cpu":
        ours["DS_ACCELERATOR"] = "cpu"
    accumulation = plan.job.settings.accumulation
    if accumulation and accumulation > 1 and not zero.uses_deepspeed(plan.job):
        # The YAML has no key for it outside deepspeed_config; Accelerator() reads this.
        ours["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(accumulation)
    return {**ours, **dict(node.env), **dict(plan.job.env)}


def run_document(plan: Plan, node: NodePlan) -> dict[str, object]:
    """run.json: what the agent inside the container is told."""
    return {
        "run": plan.run,
        "node": node.name,
        "machine_rank": node.rank,
        "world_size": plan.world_size,
        "local_processes": node.slots,
        "launch": list(launch_arguments(plan, node)),
        "env": {},
        "workdir": node.job.code,
        "files": node.job.files,
        "out": node.job.out,
        "secrets": list(plan.job.secrets),
        "secrets_dir": node.job.secrets,
        "backend": "gloo" if plan.accelerator == "cpu" else None,
        "nvme": list(node.job.nvme) if zero.leaves_nvme_open(plan.job) else [],
        "stop_grace": plan.job.grace,
        "guard": guard_settings(plan),
    }


def guard_settings(plan: Plan) -> dict[str, object]:
    """How the nodes' guards find each other: on the training addresses, by UDP, at the port where the processes meet.

    Nodes that share an address (one machine several times) count up from there.
    """
    before = [[other.address for other in plan.nodes[: node.rank]].count(node.address) for node in plan.nodes]
    return {
        "peers": [
            {"node": node.name, "address": node.address, "port": plan.port + count}
            for node, count in zip(plan.nodes, before, strict=True)
        ],
        "beat": BEAT,
        "grace": plan.job.node_grace,
        "hang_timeout": plan.job.hang_timeout,
    }


def files(plan: Plan, node: NodePlan) -> dict[str, str]:
    """Every file of one node's run, by name: the whole of what is written there besides the code."""
    inside = Path(__file__).parent / "inside"
    made = {
        "accelerate.yaml": to_yaml(accelerate_config(plan, node)),
        "run.json": json.dumps(run_document(plan, node), indent=2, ensure_ascii=False) + "\n",
        **{name: (inside / name).read_text() for name in INSIDE},
    }
    if zero.way_of(plan.job) == zero.FILE:
        made["deepspeed.json"] = zero.file_for_node(plan.job, first_nvme(node))
    return made


def first_nvme(node: NodePlan) -> str | None:
    """The NVMe path of local rank 0; where there are several, the bootstrap deals them out."""
    return node.job.nvme[0] if node.job.nvme else None


def to_yaml(config: Mapping[str, object]) -> str:
    """YAML that means the same to every parser: PyYAML quotes the `no` of mixed_precision."""
    return yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=False)


def run_container(plan: Plan, node: NodePlan) -> ContainerSpec:
    """The container of one node's run."""
    return _container(
        plan,
        node,
        role=ROLE_RUN,
        argv=("python3", f"{node.job.files}/agent.py", f"{node.job.files}/run.json"),
        labels={
            LABEL_RUN: plan.run,
            LABEL_OPERATOR: plan.operator,
            LABEL_STARTER: plan.starter,
            LABEL_RANK: str(node.rank),
            LABEL_NODES: ",".join(one.name for one in plan.nodes),
            LABEL_OUT: node.host.out,
            LABEL_GRACE: str(plan.job.grace),
            **({LABEL_DETACHED: "yes"} if plan.job.detached else {}),
        },
        mounts=(
            Mount(source=node.host.files, target=node.job.files),
            Mount(source=node.host.code, target=node.job.code),
            Mount(source=node.host.out, target=node.job.out, read_only=False),
        ),
        workdir=node.job.code,
        secrets=bool(plan.job.secrets),
    )


def node_container(plan: Plan, node: NodePlan) -> ContainerSpec:
    """The idle container of one node: where `exec` and `shell` go. Its label says whether anything has changed."""
    spec = _container(
        plan,
        node,
        role=ROLE_NODE,
        argv=("tail", "-f", "/dev/null"),
        labels={LABEL_RANK: str(node.rank)},
        mounts=(Mount(source=node.host.files, target=node.job.files),),
        workdir=None,
        secrets=False,
    )
    said = json.dumps([repr(spec), node_files(plan, node)], sort_keys=True)
    spec.labels[LABEL_PLAN] = hashlib.sha256(said.encode()).hexdigest()[:16]
    spec.labels.update({LABEL_OPERATOR: plan.operator, LABEL_STARTER: plan.starter})  # whoever it is, it is the same
    return spec


def node_files(plan: Plan, node: NodePlan) -> dict[str, str]:
    """What `up` writes for a node: its Accelerate configuration, for those who launch by hand in its container."""
    return {"accelerate.yaml": to_yaml(accelerate_config(plan, node))}


def _container(
    plan: Plan,
    node: NodePlan,
    *,
    role: str,
    argv: tuple[str, ...],
    labels: Mapping[str, str],
    mounts: tuple[Mount, ...],
    workdir: str | None,
    secrets: bool,
) -> ContainerSpec:
    return ContainerSpec(
        name=container_name(plan.cluster, node.name, role),
        image=plan.image,
        argv=argv,
        labels={
            LABEL_CLUSTER: plan.cluster,
            LABEL_OWNER: node.owner,
            LABEL_NODE: node.name,
            LABEL_ROLE: role,
            **labels,
        },
        env=environment(plan, node),
        workdir=workdir,
        user=node.user,
        groups=node.groups,
        mounts=() if plan.engine == "process" else (*mounts, *_places(node), *node.mounts),
        devices=plan.devices,
        gpus=plan.accelerator == "cuda",
        shm_bytes=node.shm_bytes,
        ulimits=plan.ulimits,
        secrets_dir=node.job.secrets if secrets else None,
    )


def _places(node: NodePlan) -> tuple[Mount, ...]:
    """The node's disks, where the job finds them. The data are read only: nothing of a run belongs there."""
    places = [Mount(source=node.host.checkpoints, target=node.job.checkpoints, read_only=False)]
    if node.host.data and node.job.data:
        places.append(Mount(source=node.host.data, target=node.job.data))
    if node.host.cache and node.job.cache:
        places.append(Mount(source=node.host.cache, target=node.job.cache, read_only=False))
    pairs = zip(node.host.nvme, node.job.nvme, strict=True)
    places += [Mount(source=source, target=target, read_only=False) for source, target in pairs]
    return tuple(places)

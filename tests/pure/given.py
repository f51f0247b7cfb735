"""What the pure tests begin with: inventories and the facts of machines that never were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.document import read
from cluster.facts import Disk, DockerFact, Gpu, Listener, Nic, NodeFacts, System
from cluster.inventory import Inventory, read_inventory

GIB = 1024**3
NVME = "/mnt/nvme0"


def inventory(*, nodes: int = 3, **fields: Any) -> Inventory:
    """`nodes` machines gpu-01, gpu-02, … at 10.0.0.11, …; what is given stands in the file."""
    machines = [{"name": f"gpu-{n:02d}", "host": f"10.0.0.{10 + n}"} for n in range(1, nodes + 1)]
    text = json.dumps({"name": "lab", "nodes": machines, **fields})
    return read_inventory(read(text, "cluster.yaml"), home=Path("/home/ada"))


def gpu(index: int = 0, *, driver: str = "580.95.05") -> Gpu:
    uuid = f"GPU-00000000-0000-0000-0000-{index:012d}"
    return Gpu(index=index, name="NVIDIA H100 80GB HBM3", uuid=uuid, memory=80 * GIB, driver=driver, capability=(9, 0))


SYSTEM = System(
    kernel="Linux 6.1.0-28-amd64",
    arch="x86_64",
    user="ml",
    uid=1001,
    gid=1001,
    groups=(1001, 2000),
    home="/home/ml",
    cpus=64,
    memory=1024 * GIB,
    shm=512 * GIB,
    clock=1771826401.25,
)


def disk(path: str, **fields: Any) -> Disk:
    usual = Disk(path=path, exists=True, is_dir=True, writable=True, free=3000 * GIB)
    return replace(usual, **fields)


def facts(number: int = 1, *, gpus: int = 8, **fields: Any) -> NodeFacts:
    """A healthy machine with everything, whose address ends in 10 + `number`."""
    return NodeFacts(
        **{
            "system": SYSTEM,
            "gpus": tuple(gpu(index) for index in range(gpus)),
            "nics": (
                Nic(name="eth0", addresses=(f"10.0.0.{10 + number}",)),
                Nic(name="docker0", addresses=("172.17.0.1",)),
            ),
            "disks": (disk("~/.", on_root=True), disk(NVME), disk("/mnt/data"), disk("/mnt/checkpoints")),
            "listeners": (Listener(port=22, owner="sshd (pid 712)"),),
            "docker": DockerFact(version="27.1.1", runtimes=("nvidia", "runc"), root="/var/lib/docker"),
            "routes": {},
            **fields,
        }
    )


def all_facts(of: Inventory, **fields: Any) -> dict[str, NodeFacts]:
    return {node.name: facts(number, **fields) for number, node in enumerate(of.nodes, 1)}

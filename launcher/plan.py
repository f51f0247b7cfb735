"""The plan of one run: ranks, addresses, ports, paths, image. It fixes intent, never conditions.

Pure: the run id, the snapshot's digest and the facts are arguments; the same arguments give the same plan.
"""

from __future__ import annotations

import ipaddress
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.container import Mount
from cluster.facts import NodeFacts
from cluster.inventory import Inventory, Node
from launcher.errors import PlanError
from launcher.job import Job

# Where a container finds things. Without Docker the job sees the node's own paths instead.
FILES, CODE, OUT, SECRETS = "/launcher/files", "/launcher/code", "/launcher/out", "/run/secrets"
CHECKPOINTS, DATA, CACHE, NVME = "/checkpoints", "/data", "/cache", "/nvme"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """The places of one node's run: on the node itself, or as the job sees them."""

    files: str
    code: str
    out: str
    secrets: str
    checkpoints: str
    data: str | None
    cache: str | None
    nvme: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """One node's part. `root` is our folder on the node; `host` and `job` are the same places seen from both sides."""

    name: str
    rank: int
    slots: int
    address: str
    nic: str
    owner: str
    user: str
    groups: tuple[int, ...]
    cpus: int
    shm_bytes: int
    root: str
    host: Paths
    job: Paths
    mounts: tuple[Mount, ...]
    env: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One launch, whole and printable. `image` is a digest or the name under which every node has it."""

    cluster: str
    run: str
    accelerator: str
    engine: str
    image: str
    port: int
    nodes: tuple[NodePlan, ...]
    job: Job
    devices: tuple[str, ...]
    ulimits: tuple[tuple[str, int], ...]
    operator: str = ""
    starter: str = ""

    @property
    def master(self) -> str:
        """The address at which the processes meet: rank 0's, an IP literal."""
        return self.nodes[0].address

    @property
    def world_size(self) -> int:
        """All processes of all nodes."""
        return sum(node.slots for node in self.nodes)


def make_plan(
    inventory: Inventory,
    job: Job,
    facts: Mapping[str, NodeFacts],
    *,
    image: str,
    run_id: str = "",
    code: str = "",
    port: int | None = None,
    operator: str = "",
    starter: str = "",
) -> Plan:
    """Who does what, where. `port` is where the processes meet (default: the inventory's).

    `run_id`, `code` (the snapshot's digest), `operator` and `starter` are empty for what is no run: the plan of `up`.
    """
    nodes = tuple(
        _node_plan(inventory, node, facts[node.name], rank=rank, run_id=run_id, code=code)
        for rank, node in enumerate(inventory.nodes)
    )
    _even(nodes)
    return Plan(
        cluster=inventory.name,
        run=run_id,
        accelerator=inventory.accelerator,
        engine=inventory.engine,
        image=image,
        port=port or inventory.master_port,
        nodes=nodes,
        job=job,
        devices=tuple(inventory.container.devices),
        ulimits=tuple(sorted(inventory.container.ulimits.items())),
        operator=operator,
        starter=starter,
    )


def _even(nodes: tuple[NodePlan, ...]) -> None:
    """Accelerate divides the processes evenly over the machines; an uneven plan would run, and run wrongly."""
    if len({node.slots for node in nodes}) > 1:
        slots = ", ".join(f"{node.name} {node.slots}" for node in nodes)
        fewest = min(node.slots for node in nodes)
        raise PlanError(
            f"the nodes have different numbers of slots ({slots})",
            next_step=f"set slots: {fewest} under defaults, so that every node runs the same number of processes",
        )


def _node_plan(inventory: Inventory, node: Node, facts: NodeFacts, *, rank: int, run_id: str, code: str) -> NodePlan:
    address = choose_address(node, facts, alone=stays_here(inventory))
    root = node_root(inventory, node, facts)
    host = Paths(
        files=f"{root}/runs/{run_id}/files" if run_id else f"{root}/node",
        code=f"{root}/store/trees/{code}",
        out=f"{root}/runs/{run_id}/out",
        secrets=f"/dev/shm/launcher-{inventory.name}-{node.name}-{run_id}",  # noqa: S108 - a tmpfs, made 0700
        checkpoints=node.paths.checkpoints or f"{root}/checkpoints",
        data=node.paths.data,
        cache=node.paths.cache,
        nvme=tuple(node.nvme),
    )
    system = facts.system
    return NodePlan(
        name=node.name,
        rank=rank,
        slots=slots_of(inventory, node, facts),
        address=address,
        nic=node.nic or _nic_of(address, facts),
        owner=system.user,
        # Rootless Docker maps the container's root to the user; any other id would be a stranger's.
        user="0:0" if facts.docker.rootless else f"{system.uid}:{system.gid}",
        groups=() if facts.docker.rootless else tuple(group for group in system.groups if group != system.gid),
        cpus=system.cpus,
        shm_bytes=inventory.container.shm_bytes or system.memory // 2,
        root=root,
        host=host,
        job=host if inventory.engine == "process" else _inside(host),
        mounts=tuple(
            Mount(source=mount.source, target=mount.target, read_only=mount.read_only)
            for mount in inventory.container.mounts
        ),
        env=tuple(sorted({**inventory.container.env, **node.env}.items())),
    )


def _inside(host: Paths) -> Paths:
    """The same places as a container sees them: the same on every node, whatever the nodes call them."""
    return Paths(
        files=FILES,
        code=CODE,
        out=OUT,
        secrets=SECRETS,
        checkpoints=CHECKPOINTS,
        data=DATA if host.data else None,
        cache=CACHE if host.cache else None,
        nvme=tuple(f"{NVME}/{index}" for index in range(len(host.nvme))),
    )


def node_root(inventory: Inventory, node: Node, facts: NodeFacts) -> str:
    """Our folder on a node; the node's name is in it, since a home folder may be shared between nodes."""
    state = node.paths.state
    if state.startswith("~/"):
        state = f"{facts.system.home}/{state[2:]}"
    return f"{state}/{inventory.name}/{node.name}"


def slots_of(inventory: Inventory, node: Node, facts: NodeFacts) -> int:
    """How many processes: as the inventory says, or one for every GPU found."""
    return node.slots or (len(facts.gpus) if inventory.accelerator == "cuda" else 1) or 1


def stays_here(inventory: Inventory) -> bool:
    """Whether no training traffic leaves a machine: one node, or this machine several times."""
    return len(inventory.nodes) == 1 or all(node.transport == "local" for node in inventory.nodes)


def choose_address(node: Node, facts: NodeFacts, *, alone: bool = False) -> str:
    """The address by which the other nodes reach this one for training; an IP literal.

    In order: what the inventory says; the SSH host, where that is one of the node's own addresses; the address of
    the interface that leads to most peers; the only address there is.
    """
    if node.address:
        return node.address
    if alone:
        return "127.0.0.1"
    own = [address for nic in facts.nics for address in nic.addresses]
    if node.host in own:
        return str(node.host)
    led = [nic for peer, nic in facts.routes.items() if peer not in own and nic != "lo"]
    towards = sorted(facts.nics, key=lambda nic: -led.count(nic.name))
    found = [address for nic in towards for address in nic.addresses if _is_v4(address)]
    if not found:
        raise PlanError(
            f"node {node.name} has no IPv4 address that the others could reach",
            next_step=f"set address: for {node.name} in the inventory",
        )
    return found[0]


def _is_v4(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).version == 4  # noqa: PLR2004 - IPv4
    except ValueError:
        return False


def _nic_of(address: str, facts: NodeFacts) -> str:
    if address.startswith("127."):
        return "lo"
    return next((nic.name for nic in facts.nics if address in nic.addresses), "")


def choose_port(facts: NodeFacts, *, seed: str, span: int = 1) -> int:
    """A port that is free on rank 0's machine, and below those that Linux deals out itself (from 32768).

    The seed (the run id) decides where the search begins, so that two runs that start at once take two. Where `span`
    nodes are one machine, their guards take as many ports from there: another run's are not listed, but follow on its
    own. So none of the taken ports may be nearer than that.
    """
    near = {listener.port + step for listener in facts.listeners for step in range(1 - span, span)}
    start = 20000 + zlib.crc32(seed.encode()) % 10000
    return next(port for port in range(start, start + 20000) if port not in near)

"""Preflight judgment: what the facts say against starting. Pure; every finding names node, cause and cure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.allowed import check_device, check_node_path
from cluster.engine import engine_error
from cluster.errors import PreconditionError
from cluster.facts import Disk, NodeFacts
from cluster.inventory import Inventory, Node
from launcher.plan import choose_address, node_root, slots_of, stays_here

# Below this a run cannot even write its logs and a small checkpoint.
LEAST_FREE = 256 * 1024**2
# What parameter offload pins at DeepSpeed's defaults: 5 buffers of 1e8 elements of 4 bytes.
LEAST_LOCKED = 2 * 10**9
# The oldest driver that runs the CUDA 13 of the image's torch (NVIDIA's CUDA release notes, table of drivers).
LEAST_DRIVER = 580
SKEW_WARNS, SKEW_REFUSES = 2.0, 300.0
DOCKER_PORT = 2375  # where dockerd by convention asks nobody who he is

# What lets a job out of its container, and the first mended release of each line of releases.
Mended = Mapping[str, Sequence[tuple[int, ...]]]
RUNC: Mended = {
    "CVE-2024-21626": ((1, 1, 12),),
    **dict.fromkeys(("CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"), ((1, 2, 8), (1, 3, 3), (1, 4, 0, 3))),
}
TOOLKIT: Mended = {"CVE-2024-0132": ((1, 16, 2),), "CVE-2025-23266": ((1, 17, 8),)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that speaks against starting. An `error` forbids it unless its `id` is ignored by name."""

    id: str
    level: Literal["error", "warning"]
    node: str
    what: str
    next_step: str

    def __str__(self) -> str:
        return f"node {self.node}: {self.what} [{self.id}]\n  next: {self.next_step}"


def paths_to_ask(inventory: Inventory, node: Node) -> tuple[str, ...]:
    """The paths of one node that the survey must look at; those of the state folder up to its first parent."""
    paths = [*node.nvme, node.paths.checkpoints, node.paths.data, node.paths.cache]
    paths += [mount.source for mount in inventory.container.mounts]
    paths += list(inventory.container.devices)
    state = "~/." if node.paths.state.startswith("~/") else node.paths.state
    return (*dict.fromkeys(path for path in paths if path), state)


def peers_to_ask(inventory: Inventory) -> tuple[str, ...]:
    """The addresses, or else the names, that every node must find a way to."""
    return tuple(node.address or node.host for node in inventory.nodes)


def findings(
    inventory: Inventory, facts: Mapping[str, NodeFacts], *, port: int | None = None, nvme: bool = False
) -> tuple[Finding, ...]:
    """Everything that speaks against starting. `port`: about to be listened on; `nvme`: the job swaps to NVMe."""
    found = [
        finding
        for node in inventory.nodes
        for look in (_engine, _gpus, _disks, _clock, _address)
        for finding in look(inventory, node, facts[node.name])
    ]
    if port is not None:
        found += _port(inventory.nodes[0], facts[inventory.nodes[0].name], port)
        found += _outside(inventory, facts, port)
    if nvme:
        found += [finding for node in inventory.nodes for finding in _pinned(inventory, node, facts[node.name])]
        found += [
            _error(
                "nvme-none", node.name, "the job offloads to NVMe, and the node has no such path", "set nvme: [/path]"
            )
            for node in inventory.nodes
            if not node.nvme
        ]
    return (*found, *_differences(inventory, facts))


# Every id that a finding can have.
IDS = frozenset(
    (
        *("address", "arch-differs", "checkpoints-on-root", "clock", "disk-full", "docker", "docker-tcp"),
        *("driver-differs", "driver-old", "gpu-arch", "gpu-few", "gpu-none", "gpu-stuck", "memlock", "nic"),
        *("nvidia-runtime", "nvidia-toolkit", "nvme-none", "nvme-on-root", "path-kind", "path-leads-out"),
        *("path-missing", "path-read-only", "path-stuck", "port-busy", "port-public", "rootless-multinode", "runc"),
    )
)

# What speaks against a machine, not against a run: `up` tells it, and not every run again.
STANDING = ("nvidia-toolkit", "runc")


def judge(found: tuple[Finding, ...], *, ignored: tuple[str, ...]) -> tuple[Finding, ...]:
    """The findings that are left to be told; `PreconditionError` when one of them forbids the start."""
    left = tuple(finding for finding in found if finding.id not in ignored)
    errors = [finding for finding in left if finding.level == "error"]
    if errors:
        first, *others = errors
        raise PreconditionError(
            f"{first.what} [{first.id}]",
            where=f"node {first.node}",
            detail=tuple(line for other in others for line in str(other).splitlines()),
            next_step=first.next_step,
        )
    return left


def _error(name: str, node: str, what: str, cure: str) -> Finding:
    return Finding(id=name, level="error", node=node, what=what, next_step=cure)


def _warning(name: str, node: str, what: str, cure: str) -> Finding:
    return Finding(id=name, level="warning", node=node, what=what, next_step=cure)


def _engine(inventory: Inventory, node: Node, facts: NodeFacts) -> Iterator[Finding]:
    if inventory.engine != "docker":
        return
    if error := engine_error(node.name, facts.docker.error):
        yield _error("docker", node.name, f"{error.what}: {error.detail[-1]}", error.next_step or "")
        return
    if facts.docker.rootless and not stays_here(inventory):
        yield _error(
            "rootless-multinode",
            node.name,
            "its Docker is rootless: the host network of such a container is not the machine's, no other node "
            "reaches it",
            "use the system's Docker there, or `engine: process`",
        )
    if inventory.accelerator == "cuda" and not any("nvidia" in name for name in facts.docker.runtimes):
        yield _warning(
            "nvidia-runtime",
            node.name,
            "Docker has no nvidia runtime",
            "install nvidia-container-toolkit and run: sudo nvidia-ctk runtime configure --runtime=docker",
        )
    if any(
        one.port == DOCKER_PORT and one.exposed and re.match(r"$|dockerd |docker-proxy |systemd ", one.owner)
        for one in facts.listeners
    ):
        yield _error(
            "docker-tcp",
            node.name,
            f"TCP port {DOCKER_PORT} is open to other machines: where Docker listens there, whoever reaches it is root",
            "on the node: take -H tcp://… out of dockerd's options and hosts out of /etc/docker/daemon.json; nothing "
            "here needs it",
        )
    yield from _runtimes(inventory, node, facts)


def _runtimes(inventory: Inventory, node: Node, facts: NodeFacts) -> Iterator[Finding]:
    backported = "where your distribution has mended it under the old number, --ignore"
    if found := flaws(facts.docker.runc, RUNC):
        yield _warning(
            "runc",
            node.name,
            f"its runc {facts.docker.runc} may let a job out of its container ({', '.join(found)})",
            f"install runc 1.2.8, 1.3.3 or newer; {backported} runc",
        )
    if inventory.accelerator == "cuda" and (found := flaws(facts.docker.toolkit, TOOLKIT)):
        yield _warning(
            "nvidia-toolkit",
            node.name,
            f"its nvidia-container-toolkit {facts.docker.toolkit} may let a job out of its container "
            f"({', '.join(found)})",
            f"install nvidia-container-toolkit 1.17.8 or newer; {backported} nvidia-toolkit",
        )


def flaws(version: str, mended: Mended) -> tuple[str, ...]:
    """What this release has not mended yet, none for a version that cannot be read, such as 1.1.5+ds1 or 1.4.0-rc.2."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)(?:[-~]rc\.?(\d+))?", version)
    if not match:
        return ()
    candidate = int(match[4]) if match[4] else 2**31  # a release comes after all its candidates
    number = (*map(int, match.group(1, 2, 3)), candidate)
    return tuple(
        name
        for name, firsts in mended.items()
        if (first := next((one for one in firsts if one[:2] >= number[:2]), None)) and number < first
    )


def _gpus(inventory: Inventory, node: Node, facts: NodeFacts) -> Iterator[Finding]:
    if inventory.accelerator != "cuda":
        return
    if "gpus" in facts.stuck:
        yield _error(
            "gpu-stuck",
            node.name,
            "nvidia-smi gives no answer: a GPU or its driver hangs",
            "on the node: sudo dmesg | grep -i xid says why; reboot it",
        )
    elif not facts.gpus:
        yield _error(
            "gpu-none", node.name, "nvidia-smi finds no GPU", "install the NVIDIA driver, or set accelerator: cpu"
        )
    elif slots_of(inventory, node, facts) > len(facts.gpus):
        yield _error(
            "gpu-few",
            node.name,
            f"{node.slots} slots, and {len(facts.gpus)} GPUs",
            f"set slots: {len(facts.gpus)} for {node.name}",
        )
    if inventory.engine == "docker" and inventory.image.use is None and facts.gpus:
        yield from _image_fits(inventory, node, facts)


def _image_fits(inventory: Inventory, node: Node, facts: NodeFacts) -> Iterator[Finding]:
    """Whether the image that we build runs on these GPUs, and with their driver."""
    driver = facts.gpus[0].driver
    major = driver.partition(".")[0]
    if major.isdecimal() and int(major) < LEAST_DRIVER:
        yield _warning(
            "driver-old",
            node.name,
            f"the image's CUDA 13 needs driver {LEAST_DRIVER} or newer, and the node has {driver}",
            "update the driver, or name an image with an older CUDA under image.use",
        )
    compiled = inventory.image.cuda_architectures
    for capability in sorted({gpu.capability for gpu in facts.gpus}):
        if not any(_runs(one, capability) for one in compiled.split(";")):
            version = ".".join(map(str, capability))
            name = next(gpu.name for gpu in facts.gpus if gpu.capability == capability)
            yield _error(
                "gpu-arch",
                node.name,
                f"DeepSpeed's CUDA operators are compiled for {compiled}, and {name} is {version}",
                f'in the inventory: image.cuda_architectures: "{version};{compiled}"',
            )


def _runs(compiled: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this capability runs what was compiled for another, such as `8.0`, `9.0+PTX` or `9.0a`.

    Machine code runs on its own generation from its minor number on, PTX on every later one, and what ends in `a`
    only where it was made for (CUDA C++ Programming Guide, "Application Compatibility").
    """
    number = compiled.removesuffix("+PTX")
    made_for = tuple(int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return made_for == capability
    return made_for <= capability and (made_for[0] == capability[0] or compiled.endswith("+PTX"))


def _disks(inventory: Inventory, node: Node, facts: NodeFacts) -> Iterator[Finding]:
    for path in node.nvme:
        disk = facts.disk(path)
        yield from _place(node, disk, "NVMe path", write=True)
        if disk.exists and disk.on_root:
            yield _error(
                "nvme-on-root",
                node.name,
                f"the NVMe path {path} is no mount: it lies on the root disk, which offloading would fill",
                f"mount the drive at {path}, or accept it with --ignore nvme-on-root",
            )
    if node.paths.checkpoints:
        disk = facts.disk(node.paths.checkpoints)
        yield from _place(node, disk, "checkpoint path", write=True)
        if disk.exists and disk.on_root:
            yield _warning(
                "checkpoints-on-root",
                node.name,
                f"the checkpoint path {disk.path} lies on the root disk",
                "mount a disk there, or accept it with --ignore checkpoints-on-root",
            )
    if node.paths.data:
        yield from _place(node, facts.disk(node.paths.data), "data path", write=False)
    if node.paths.cache:
        yield from _place(node, facts.disk(node.paths.cache), "cache path", write=True)
    for mount in inventory.container.mounts:
        yield from _exists(node, facts.disk(mount.source), "mount source")
    for device in inventory.container.devices:
        yield from _exists(node, facts.disk(device), "device", allowed=check_device)
    state = facts.disk(paths_to_ask(inventory, node)[-1])
    if state.stuck or state.leads_to:
        yield from _exists(node, state, "state folder")
    if state.exists and state.free < LEAST_FREE:
        yield _full(node, node_root(inventory, node, facts), state)


def _place(node: Node, disk: Disk, what: str, *, write: bool) -> Iterator[Finding]:
    yield from _exists(node, disk, what)
    if not disk.exists:
        return
    if not disk.is_dir:
        yield _error("path-kind", node.name, f"the {what} {disk.path} is no directory", "name a directory")
    elif write and not disk.writable:
        yield _error(
            "path-read-only",
            node.name,
            f"the {what} {disk.path} is not writable for this user",
            f"on the node: sudo chown $USER {disk.path} (or remount it read-write)",
        )
    elif write and disk.free < LEAST_FREE:
        yield _full(node, disk.path, disk)


def _exists(node: Node, disk: Disk, what: str, allowed: Callable[[str], object] = check_node_path) -> Iterator[Finding]:
    if disk.stuck:
        yield _error(
            "path-stuck",
            node.name,
            f"the {what} {disk.path} gives no answer: to look at it hangs",
            "is the server there that it is mounted from? Mount it anew, or name another path",
        )
    elif not disk.exists:
        yield _error(
            "path-missing", node.name, f"the {what} {disk.path} does not exist", "create or mount it; we never would"
        )
    elif disk.leads_to:
        try:
            allowed(disk.leads_to)
        except ValueError as error:
            yield _error(
                "path-leads-out",
                node.name,
                f"the {what} {disk.path} leads elsewhere, and that {error}",
                "on the node: look at the links on the way there (namei); name a folder that is meant for this",
            )


def _full(node: Node, path: str, disk: Disk) -> Finding:
    return _error(
        "disk-full",
        node.name,
        f"no space left at {path}: {disk.free // 1024**2} MiB free, at least {LEAST_FREE // 1024**2} MiB needed",
        "remove what is not needed there, or name another path",
    )


def _clock(_inventory: Inventory, node: Node, facts: NodeFacts) -> Iterator[Finding]:
    offset = facts.clock_offset
    if abs(offset) > SKEW_REFUSES:
        yield _error("clock", node.name, f"its clock is {offset:+.0f} s off", "synchronise it (chrony, timesyncd)")
    elif abs(offset) > SKEW_WARNS:
        yield _warning("clock", node.name, f"its clock is {offset:+.1f} s off", "synchronise it (chrony, timesyncd)")


def _address(inventory: Inventory, node: Node, facts: NodeFacts) -> Iterator[Finding]:
    own = {address for nic in facts.nics for address in nic.addresses}
    address = choose_address(node, facts, alone=stays_here(inventory))
    if own and address not in own and not address.startswith("127."):
        yield _error(
            "address",
            node.name,
            f"its training address {address} is none of its own ({', '.join(sorted(own))})",
            f"set address: for {node.name} to one of them",
        )
    if node.nic and node.nic not in {nic.name for nic in facts.nics} | {"lo"}:
        yield _error(
            "nic",
            node.name,
            f"it has no interface {node.nic} that is up",
            f"choose one of: {', '.join(nic.name for nic in facts.nics)}",
        )


def _port(node: Node, facts: NodeFacts, port: int) -> Iterator[Finding]:
    for listener in facts.listeners:
        if listener.port == port:
            owner = f" by {listener.owner}" if listener.owner else ""
            yield _error(
                "port-busy",
                node.name,
                f"port {port}, where the processes would meet, is taken{owner}",
                "use --port auto, or another master_port in the inventory",
            )


def _outside(inventory: Inventory, facts: Mapping[str, NodeFacts], port: int) -> Iterator[Finding]:
    """The rendezvous listens on every interface of the first node and asks for no password."""
    alone, first = stays_here(inventory), inventory.nodes[0]
    public = [
        address for nic in facts[first.name].nics for address in nic.addresses if not alone and _is_public(address)
    ]
    if public:
        peers = [choose_address(node, facts[node.name], alone=alone) for node in inventory.nodes]
        family = "ip6" if any(":" in peer for peer in peers) else "ip"
        yield _warning(
            "port-public",
            first.name,
            f"port {port}, where the processes meet without a password, is open at its public address "
            f"{' and '.join(public)}, unless a firewall keeps it shut",
            f"let the nodes alone in, as by: nft add rule inet filter input tcp dport {port} "
            f"{family} saddr != '{{ {', '.join(peers)} }}' drop; where that is so, --ignore port-public",
        )


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # a node may say anything
        return False


def _pinned(inventory: Inventory, node: Node, facts: NodeFacts) -> Iterator[Finding]:
    """DeepSpeed pins the buffers through which it swaps; where it may not, it ends with a segmentation fault."""
    limit = inventory.container.ulimits.get("memlock", facts.docker.memlock)
    if inventory.engine == "docker" and limit is not None and 0 <= limit < LEAST_LOCKED:
        yield _warning(
            "memlock",
            node.name,
            f"a process in a container may lock {limit / 1e6:.0f} MB, and offloading to NVMe locks its buffers: "
            "2 GB for parameters, some times the largest tensor for the optimizer",
            "set container.ulimits.memlock: -1, or raise dockerd's own limit (LimitMEMLOCK=infinity)",
        )


def _differences(inventory: Inventory, facts: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    first = inventory.nodes[0]
    for node in inventory.nodes[1:]:
        one, other = facts[first.name], facts[node.name]
        if one.system.arch != other.system.arch:
            yield _error(
                "arch-differs",
                node.name,
                f"it is {other.system.arch}, and {first.name} is {one.system.arch}",
                "one image serves one architecture: keep such nodes in an inventory of their own",
            )
        drivers = {gpu.driver for gpu in one.gpus}, {gpu.driver for gpu in other.gpus}
        if all(drivers) and drivers[0] != drivers[1]:
            yield _warning(
                "driver-differs",
                node.name,
                f"its NVIDIA driver is {', '.join(sorted(drivers[1]))}, on {first.name} it is "
                f"{', '.join(sorted(drivers[0]))}",
                "install the same driver on all nodes",
            )

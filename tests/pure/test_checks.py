"""Preflight: every fact that speaks against starting, as the finding that names node, cause and cure."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import PreconditionError
from cluster.facts import DockerFact, Listener, Nic, NodeFacts
from cluster.inventory import Inventory
from launcher import checks
from launcher.checks import Finding, findings, flaws, judge, paths_to_ask, peers_to_ask
from tests.pure import given

ONE = given.inventory(nodes=1)
CPU = given.inventory(nodes=1, accelerator="cpu")
DISKS = given.inventory(
    nodes=1,
    defaults={"nvme": [given.NVME], "paths": {"checkpoints": "/mnt/checkpoints", "data": "/mnt/data"}},
)
CACHE = given.inventory(nodes=1, defaults={"paths": {"cache": "/mnt/data"}})
MOUNTS = given.inventory(
    nodes=1,
    container={"mounts": [{"source": "/mnt/models", "target": "/models"}], "devices": ["/dev/infiniband"]},
)
LOOK_THERE = "on the node: look at the links on the way there (namei); name a folder that is meant for this"
DENIED = "Got permission denied while trying to connect to the Docker daemon socket"
DOWN = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"


def facts(**fields: Any) -> NodeFacts:
    return given.facts(**fields)


def disks(*others: Any, home: Any = None) -> NodeFacts:
    """A machine whose disks are as usual but for these."""
    usual = {disk.path: disk for disk in given.facts().disks}
    return given.facts(disks=tuple({**usual, **{disk.path: disk for disk in others}}.values()))


# What the inventory wants, what the node says, and the finding: id, level, what, cure.
TABLE: dict[str, tuple[Inventory, NodeFacts, tuple[str, str, str, str]]] = {
    "docker may not be used": (
        ONE,
        facts(docker=DockerFact(error=DENIED)),
        (
            "docker",
            "error",
            f"this user may not use Docker: {DENIED}",
            "on the node: sudo usermod -aG docker $USER, then run again (or use rootless Docker)",
        ),
    ),
    "docker is down": (
        ONE,
        facts(docker=DockerFact(error=DOWN)),
        (
            "docker",
            "error",
            f"the Docker engine does not answer: {DOWN}",
            "on the node: sudo systemctl start docker",
        ),
    ),
    "docker is not there": (
        ONE,
        facts(docker=DockerFact(error="sh: 52: docker: not found")),
        (
            "docker",
            "error",
            "Docker is not installed: sh: 52: docker: not found",
            "install docker.io or docker-ce on the node",
        ),
    ),
    "docker cannot give GPUs": (
        ONE,
        facts(docker=DockerFact(version="27.1.1", runtimes=("runc",))),
        (
            "nvidia-runtime",
            "warning",
            "Docker has no nvidia runtime",
            "install nvidia-container-toolkit and run: sudo nvidia-ctk runtime configure --runtime=docker",
        ),
    ),
    "no GPU": (
        ONE,
        facts(gpus=0),
        (
            "gpu-none",
            "error",
            "nvidia-smi finds no GPU",
            "install the NVIDIA driver, or set accelerator: cpu",
        ),
    ),
    "a GPU that hangs": (
        ONE,
        facts(gpus=0, stuck=("gpus",)),
        (
            "gpu-stuck",
            "error",
            "nvidia-smi gives no answer: a GPU or its driver hangs",
            "on the node: sudo dmesg | grep -i xid says why; reboot it",
        ),
    ),
    "a path that hangs": (
        CACHE,
        disks(given.disk("/mnt/data", exists=False, stuck=True)),
        (
            "path-stuck",
            "error",
            "the cache path /mnt/data gives no answer: to look at it hangs",
            "is the server there that it is mounted from? Mount it anew, or name another path",
        ),
    ),
    "a state folder that hangs": (
        ONE,
        disks(given.disk("~/.", exists=False, stuck=True)),
        (
            "path-stuck",
            "error",
            "the state folder ~/. gives no answer: to look at it hangs",
            "is the server there that it is mounted from? Mount it anew, or name another path",
        ),
    ),
    "fewer GPUs than slots": (
        given.inventory(nodes=1, defaults={"slots": 8}),
        facts(gpus=7),
        ("gpu-few", "error", "8 slots, and 7 GPUs", "set slots: 7 for gpu-01"),
    ),
    "a driver older than the image's CUDA": (
        ONE,
        replace(facts(), gpus=(given.gpu(driver="570.86.10"),)),
        (
            "driver-old",
            "warning",
            "the image's CUDA 13 needs driver 580 or newer, and the node has 570.86.10",
            "update the driver, or name an image with an older CUDA under image.use",
        ),
    ),
    "a GPU that the image has no code for": (
        given.inventory(nodes=1, image={"cuda_architectures": "8.0;9.0"}),
        replace(facts(), gpus=(replace(given.gpu(), name="Tesla V100-SXM2-32GB", capability=(7, 0)),)),
        (
            "gpu-arch",
            "error",
            "DeepSpeed's CUDA operators are compiled for 8.0;9.0, and Tesla V100-SXM2-32GB is 7.0",
            'in the inventory: image.cuda_architectures: "7.0;8.0;9.0"',
        ),
    ),
    "an NVMe path is missing": (
        DISKS,
        disks(replace(given.disk(given.NVME), exists=False)),
        ("path-missing", "error", "the NVMe path /mnt/nvme0 does not exist", "create or mount it; we never would"),
    ),
    "an NVMe path is a file": (
        DISKS,
        disks(given.disk(given.NVME, is_dir=False)),
        ("path-kind", "error", "the NVMe path /mnt/nvme0 is no directory", "name a directory"),
    ),
    "an NVMe path is read-only": (
        DISKS,
        disks(given.disk(given.NVME, writable=False)),
        (
            "path-read-only",
            "error",
            "the NVMe path /mnt/nvme0 is not writable for this user",
            "on the node: sudo chown $USER /mnt/nvme0 (or remount it read-write)",
        ),
    ),
    "an NVMe disk is full": (
        DISKS,
        disks(given.disk(given.NVME, free=3 * 1024**2)),
        (
            "disk-full",
            "error",
            "no space left at /mnt/nvme0: 3 MiB free, at least 256 MiB needed",
            "remove what is not needed there, or name another path",
        ),
    ),
    "an NVMe path is no mount": (
        DISKS,
        disks(given.disk(given.NVME, on_root=True)),
        (
            "nvme-on-root",
            "error",
            "the NVMe path /mnt/nvme0 is no mount: it lies on the root disk, which offloading would fill",
            "mount the drive at /mnt/nvme0, or accept it with --ignore nvme-on-root",
        ),
    ),
    "checkpoints fill the root disk": (
        DISKS,
        disks(given.disk("/mnt/checkpoints", on_root=True)),
        (
            "checkpoints-on-root",
            "warning",
            "the checkpoint path /mnt/checkpoints lies on the root disk",
            "mount a disk there, or accept it with --ignore checkpoints-on-root",
        ),
    ),
    "the data are missing": (
        DISKS,
        disks(replace(given.disk("/mnt/data"), exists=False)),
        ("path-missing", "error", "the data path /mnt/data does not exist", "create or mount it; we never would"),
    ),
    "the cache cannot be written": (
        CACHE,
        disks(given.disk("/mnt/data", writable=False)),
        (
            "path-read-only",
            "error",
            "the cache path /mnt/data is not writable for this user",
            "on the node: sudo chown $USER /mnt/data (or remount it read-write)",
        ),
    ),
    "a mount has no source": (
        MOUNTS,
        disks(given.disk("/dev/infiniband")),
        ("path-missing", "error", "the mount source /mnt/models does not exist", "create or mount it; we never would"),
    ),
    "a device is missing": (
        MOUNTS,
        disks(given.disk("/mnt/models")),
        ("path-missing", "error", "the device /dev/infiniband does not exist", "create or mount it; we never would"),
    ),
    "the disk of our own folder is full": (
        ONE,
        disks(given.disk("~/.", free=0)),
        (
            "disk-full",
            "error",
            "no space left at /home/ml/.launcher/lab/gpu-01: 0 MiB free, at least 256 MiB needed",
            "remove what is not needed there, or name another path",
        ),
    ),
    "a clock is off": (
        ONE,
        facts(clock_offset=-2.5),
        ("clock", "warning", "its clock is -2.5 s off", "synchronise it (chrony, timesyncd)"),
    ),
    "a clock is far off": (
        ONE,
        facts(clock_offset=3600.0),
        ("clock", "error", "its clock is +3600 s off", "synchronise it (chrony, timesyncd)"),
    ),
    "docker listens for everybody": (
        ONE,
        facts(listeners=(Listener(port=2375, exposed=True),)),
        (
            "docker-tcp",
            "error",
            "TCP port 2375 is open to other machines: where Docker listens there, whoever reaches it is root",
            "on the node: take -H tcp://… out of dockerd's options and hosts out of /etc/docker/daemon.json; nothing "
            "here needs it",
        ),
    ),
    "runc is old": (
        ONE,
        facts(docker=replace(given.facts().docker, runc="1.2.7")),
        (
            "runc",
            "warning",
            "its runc 1.2.7 may let a job out of its container (CVE-2025-31133, CVE-2025-52565, CVE-2025-52881)",
            "install runc 1.2.8, 1.3.3 or newer; where your distribution has mended it under the old number, "
            "--ignore runc",
        ),
    ),
    "the NVIDIA toolkit is old": (
        ONE,
        facts(docker=replace(given.facts().docker, toolkit="1.17.7")),
        (
            "nvidia-toolkit",
            "warning",
            "its nvidia-container-toolkit 1.17.7 may let a job out of its container (CVE-2025-23266)",
            "install nvidia-container-toolkit 1.17.8 or newer; where your distribution has mended it under the old "
            "number, --ignore nvidia-toolkit",
        ),
    ),
    "an NVMe path leads into the system": (
        DISKS,
        disks(given.disk(given.NVME, leads_to="/etc")),
        (
            "path-leads-out",
            "error",
            "the NVMe path /mnt/nvme0 leads elsewhere, and that must not be '/etc': it belongs to the system, and "
            "whoever writes there owns the machine",
            LOOK_THERE,
        ),
    ),
    "checkpoints lead to somebody's keys": (
        DISKS,
        disks(given.disk("/mnt/checkpoints", leads_to="/home/ada/.ssh")),
        (
            "path-leads-out",
            "error",
            "the checkpoint path /mnt/checkpoints leads elsewhere, and that must not be '/home/ada/.ssh': it opens "
            "other doors",
            LOOK_THERE,
        ),
    ),
    "a mount leads to everything": (
        MOUNTS,
        disks(given.disk("/mnt/models", leads_to="/"), given.disk("/dev/infiniband")),
        (
            "path-leads-out",
            "error",
            "the mount source /mnt/models leads elsewhere, and that must not be '/' itself, which holds other things "
            "too; name a folder of its own below",
            LOOK_THERE,
        ),
    ),
    "a device leads to a disk": (
        MOUNTS,
        disks(given.disk("/mnt/models"), given.disk("/dev/infiniband", leads_to="/dev/sda1")),
        (
            "path-leads-out",
            "error",
            "the device /dev/infiniband leads elsewhere, and that must not be '/dev/sda1': with it a container can "
            "read or write the whole machine",
            LOOK_THERE,
        ),
    ),
    "the state folder leads into the system": (
        given.inventory(nodes=1, defaults={"paths": {"state": "/mnt/state"}}),
        disks(given.disk("/mnt/state", leads_to="/var/lib/docker/x")),
        (
            "path-leads-out",
            "error",
            "the state folder /mnt/state leads elsewhere, and that must not be '/var/lib/docker/x': it belongs to the "
            "system, and whoever writes there owns the machine",
            LOOK_THERE,
        ),
    ),
    "an interface is not there": (
        given.inventory(nodes=1, defaults={"nic": "ib0"}),
        facts(),
        ("nic", "error", "it has no interface ib0 that is up", "choose one of: eth0, docker0"),
    ),
}


@pytest.mark.parametrize(("inventory", "seen", "expected"), TABLE.values(), ids=TABLE)
def test_a_fact_is_this_finding(inventory: Inventory, seen: NodeFacts, expected: tuple[str, str, str, str]) -> None:
    name, level, what, cure = expected
    (found,) = findings(inventory, {"gpu-01": seen})
    assert (found.id, found.level, found.node, found.what, found.next_step) == (name, level, "gpu-01", what, cure)


@pytest.mark.parametrize(
    ("inventory", "seen"),
    [
        (ONE, facts()),
        (ONE, facts(clock_offset=1.9)),
        (CPU, facts(gpus=0, docker=DockerFact(version="27.1.1", runtimes=("runc",)))),
        (DISKS, facts()),
        (CACHE, facts()),
        (DISKS, disks(given.disk(given.NVME, leads_to="/mnt/raid/nvme0"))),
        (ONE, facts(listeners=(Listener(port=2375), Listener(port=2376, exposed=True)))),
        (ONE, facts(listeners=(Listener(port=2375, owner="python3 (pid 42)", exposed=True),))),
        (CPU, facts(gpus=0, docker=replace(given.facts().docker, toolkit="1.17.7"))),
        (DISKS, disks(given.disk("/mnt/data", writable=False, free=0, on_root=True))),
        (given.inventory(nodes=1, defaults={"nic": "lo"}), facts()),
        (
            given.inventory(nodes=1, accelerator="cpu", engine="process", defaults={"transport": "local"}),
            facts(docker=DockerFact(error="sh: 52: docker: not found")),
        ),
    ],
)
def test_a_fit_machine_has_no_finding(inventory: Inventory, seen: NodeFacts) -> None:
    assert findings(inventory, {"gpu-01": seen}) == ()


@pytest.mark.parametrize(
    ("compiled", "capability", "runs"),
    [
        ("8.0", (8, 9), True),
        ("8.9", (8, 6), False),
        ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (10, 0), True),
        ("9.0a", (9, 0), True),
        ("12.0a", (12, 1), False),
        ("10.0f", (10, 3), True),
    ],
)
def test_what_a_gpu_runs(compiled: str, capability: tuple[int, int], runs: bool) -> None:
    inventory = given.inventory(nodes=1, image={"cuda_architectures": compiled})
    seen = replace(facts(), gpus=(replace(given.gpu(), capability=capability),))
    assert ([one.id for one in findings(inventory, {"gpu-01": seen})] == []) is runs


def found_of(inventory: Inventory, known: dict[str, NodeFacts], **asked: Any) -> list[tuple[str, str, str]]:
    return [(one.id, one.node, one.what) for one in findings(inventory, known, **asked)]


def test_an_address_that_the_node_has_not_is_a_finding() -> None:
    inventory = given.inventory(nodes=2)
    nodes = tuple(one.model_copy(update={"address": f"10.9.0.{n}"}) for n, one in enumerate(inventory.nodes))
    wrong = inventory.model_copy(update={"nodes": nodes})
    what = "its training address 10.9.0.{} is none of its own (10.0.0.1{}, 172.17.0.1)"
    assert found_of(wrong, given.all_facts(inventory)) == [
        ("address", "gpu-01", what.format(0, 1)),
        ("address", "gpu-02", what.format(1, 2)),
    ]


def test_a_busy_port_names_who_has_it_and_only_on_the_first_node() -> None:
    inventory = given.inventory(nodes=2)
    busy = {"listeners": (Listener(port=29500, owner="python3 (pid 42)"), Listener(port=29501))}
    known = given.all_facts(inventory, **busy)
    taken = "where the processes would meet, is taken"
    assert found_of(inventory, known, port=29500) == [
        ("port-busy", "gpu-01", f"port 29500, {taken} by python3 (pid 42)")
    ]
    assert found_of(inventory, known, port=29501) == [("port-busy", "gpu-01", f"port 29501, {taken}")]
    assert found_of(inventory, known, port=29502) == []
    assert found_of(inventory, known) == []


# S23
RUNC = "CVE-2025-31133 CVE-2025-52565 CVE-2025-52881"


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("1.0.0-rc93", f"CVE-2024-21626 {RUNC}"),
        ("1.0.0~rc93+ds1", f"CVE-2024-21626 {RUNC}"),
        ("1.1.5+ds1", f"CVE-2024-21626 {RUNC}"),
        ("v1.1.11", f"CVE-2024-21626 {RUNC}"),
        ("1.1.12-0ubuntu2~22.04.1", RUNC),
        ("1.2.0-rc.1", RUNC),
        ("1.2.7", RUNC),
        ("1.2.8", ""),
        ("1.2.10", ""),
        ("1.3.0-rc.2", RUNC),
        ("1.3.2", RUNC),
        ("1.3.3", ""),
        ("1.4.0-rc.2", RUNC),
        ("1.4.0-rc.3", ""),
        ("1.4.0", ""),
        ("2.0.0", ""),
        ("51d5e94601ce", ""),
        ("", ""),
    ],
)
def test_s23_a_release_of_runc_has_these_flaws(version: str, found: str) -> None:
    assert flaws(version, checks.RUNC) == tuple(found.split())


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("1.13.5", "CVE-2024-0132 CVE-2025-23266"),
        ("1.16.1", "CVE-2024-0132 CVE-2025-23266"),
        ("1.16.2", "CVE-2025-23266"),
        ("1.17.7", "CVE-2025-23266"),
        ("1.17.8", ""),
        ("1.18.0-rc.1", ""),
    ],
)
def test_s23_a_release_of_the_nvidia_toolkit_has_these_flaws(version: str, found: str) -> None:
    assert flaws(version, checks.TOOLKIT) == tuple(found.split())


def test_s21_a_port_at_a_public_address_of_the_first_node_is_told_with_a_rule_that_closes_it() -> None:
    inventory = given.inventory(nodes=2)
    known = given.all_facts(inventory)
    public = (*known["gpu-01"].nics, Nic(name="eth1", addresses=("131.107.0.7", "1:2", "2606:4700::7")))
    open_first = {**known, "gpu-01": replace(known["gpu-01"], nics=public)}
    (found,) = findings(inventory, open_first, port=29500)
    assert str(found).splitlines() == [
        "node gpu-01: port 29500, where the processes meet without a password, is open at its public address "
        "131.107.0.7 and 2606:4700::7, unless a firewall keeps it shut [port-public]",
        "  next: let the nodes alone in, as by: nft add rule inet filter input tcp dport 29500 ip saddr != "
        "'{ 10.0.0.11, 10.0.0.12 }' drop; where that is so, --ignore port-public",
    ]
    assert found.level == "warning"
    # No run: no port. Another node: nobody meets there. One machine: it meets itself.
    assert findings(inventory, open_first) == ()
    assert findings(inventory, {**known, "gpu-02": replace(known["gpu-02"], nics=public)}, port=29500) == ()
    here = given.inventory(nodes=1, defaults={"transport": "local"})
    assert findings(here, {"gpu-01": open_first["gpu-01"]}, port=29500) == ()


def test_swapping_to_nvme_needs_a_path_on_every_node() -> None:
    inventory = given.inventory(nodes=2)
    what = "the job offloads to NVMe, and the node has no such path"
    known = given.all_facts(inventory)
    assert found_of(inventory, known, nvme=True) == [("nvme-none", "gpu-01", what), ("nvme-none", "gpu-02", what)]
    assert found_of(given.inventory(nodes=2, defaults={"nvme": [given.NVME]}), known, nvme=True) == []


@pytest.mark.parametrize(
    ("ulimits", "inherited", "warned"),
    [
        ({"stack": 1}, 8 << 20, True),
        ({"stack": 1}, None, False),
        ({}, 8 << 20, False),
        ({"memlock": 65536}, None, True),
    ],
)
def test_swapping_to_nvme_needs_memory_that_may_be_locked(
    ulimits: dict[str, int], inherited: int | None, *, warned: bool
) -> None:
    container = {"ulimits": ulimits} if ulimits else {}
    inventory = given.inventory(nodes=1, defaults={"nvme": [given.NVME]}, container=container)
    known = given.all_facts(inventory, docker=replace(given.facts().docker, memlock=inherited))
    found = [one.id for one in findings(inventory, known, nvme=True)]
    assert found == (["memlock"] if warned else [])
    assert findings(inventory, known) == ()


def test_nodes_of_two_architectures_cannot_share_an_image() -> None:
    inventory = given.inventory(nodes=2)
    known = given.all_facts(inventory)
    known["gpu-02"] = replace(known["gpu-02"], system=replace(given.SYSTEM, arch="aarch64"))
    assert found_of(inventory, known) == [("arch-differs", "gpu-02", "it is aarch64, and gpu-01 is x86_64")]


def test_another_driver_is_a_warning() -> None:
    inventory = given.inventory(nodes=3)
    known = given.all_facts(inventory)
    known["gpu-02"] = replace(
        known["gpu-02"], gpus=(given.gpu(0, driver="590.44.01"), given.gpu(1, driver="580.95.05"))
    )
    (found,) = findings(given.inventory(nodes=3), known)
    assert str(found).splitlines() == [
        "node gpu-02: its NVIDIA driver is 580.95.05, 590.44.01, on gpu-01 it is 580.95.05 [driver-differs]",
        "  next: install the same driver on all nodes",
    ]
    assert found.level == "warning"


def test_every_node_is_judged_and_every_fault_told() -> None:
    inventory = given.inventory(nodes=2)
    bad = {"gpus": 0, "clock_offset": 3600.0}
    assert [(one.node, one.id) for one in findings(inventory, given.all_facts(inventory, **bad))] == [
        ("gpu-01", "gpu-none"),
        ("gpu-01", "clock"),
        ("gpu-02", "gpu-none"),
        ("gpu-02", "clock"),
    ]


def finding(name: str, level: Any = "error", node: str = "gpu-01") -> Finding:
    return Finding(id=name, level=level, node=node, what=f"{name} is wrong", next_step=f"mend {name}")


def test_errors_forbid_the_start_and_are_told_at_once_with_exit_code_4() -> None:
    with pytest.raises(PreconditionError) as refused:
        judge((finding("a", "warning"), finding("b"), finding("c", node="gpu-02")), ignored=())
    assert refused.value.exit_code == 4
    assert str(refused.value).splitlines() == [
        "node gpu-01: b is wrong [b]",
        "  node gpu-02: c is wrong [c]",
        "    next: mend c",
        "  next: mend b",
    ]


def test_warnings_are_left_to_be_told() -> None:
    warning = finding("a", "warning")
    assert judge((warning,), ignored=()) == (warning,)


def test_what_is_ignored_by_name_is_neither_refused_nor_told() -> None:
    assert judge((finding("a"), finding("b", "warning"), finding("c", "warning")), ignored=("a", "b")) == (
        finding("c", "warning"),
    )


def test_only_the_named_finding_is_ignored() -> None:
    with pytest.raises(PreconditionError):
        judge((finding("nvme-on-root"),), ignored=("nvme",))


def test_the_survey_asks_for_every_path_that_is_judged() -> None:
    inventory = given.inventory(
        nodes=1,
        container={"mounts": [{"source": "/mnt/models", "target": "/models"}], "devices": ["/dev/infiniband"]},
        defaults={"nvme": [given.NVME], "paths": {"checkpoints": "/mnt/checkpoints", "data": "/mnt/data"}},
    )
    asked = (given.NVME, "/mnt/checkpoints", "/mnt/data", "/mnt/models", "/dev/infiniband", "~/.")
    assert paths_to_ask(inventory, inventory.nodes[0]) == asked
    elsewhere = given.inventory(nodes=1, defaults={"paths": {"state": "/mnt/state"}})
    assert paths_to_ask(elsewhere, elsewhere.nodes[0]) == ("/mnt/state",)


def test_the_peers_are_the_training_addresses_where_they_are_known() -> None:
    inventory = given.inventory(nodes=2)
    first, second = inventory.nodes
    nodes = (first.model_copy(update={"address": "10.5.0.11"}), second)
    assert peers_to_ask(inventory.model_copy(update={"nodes": nodes})) == ("10.5.0.11", "10.0.0.12")


def test_every_finding_that_the_code_knows_has_its_test_here() -> None:
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(checks))) if isinstance(node, ast.Call)]
    named = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id in ("_error", "_warning")
        and isinstance(call.args[0], ast.Constant)
    }
    others = {"address", "port-busy", "nvme-none", "memlock", "rootless-multinode", "arch-differs", "driver-differs"}
    others |= {"port-public"}
    assert named == {expected[0] for _, _, expected in TABLE.values()} | others
    assert named == checks.IDS


def test_rootless_docker_is_for_one_machine_alone() -> None:
    rootless = DockerFact(version="27.1.1", runtimes=("nvidia", "runc"), rootless=True)
    assert findings(ONE, given.all_facts(ONE, docker=rootless)) == ()
    two = given.inventory(nodes=2)
    known = {**given.all_facts(two), "gpu-02": given.facts(2, docker=rootless)}
    (found,) = findings(two, known)
    assert (found.id, found.level) == ("rootless-multinode", "error")
    assert str(found).splitlines() == [
        "node gpu-02: its Docker is rootless: the host network of such a container is not the machine's, "
        "no other node reaches it [rootless-multinode]",
        "  next: use the system's Docker there, or `engine: process`",
    ]


def test_a_node_of_no_known_interface_is_not_blamed_for_its_address() -> None:
    inventory = given.inventory(nodes=2)
    nodes = tuple(one.model_copy(update={"address": f"10.9.0.{n}"}) for n, one in enumerate(inventory.nodes))
    unknown: tuple[Nic, ...] = ()
    known = given.all_facts(inventory, nics=unknown)
    assert findings(inventory.model_copy(update={"nodes": nodes}), known) == ()

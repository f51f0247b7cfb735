"""The plan: ranks, addresses, ports and places, from an inventory and facts alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.container import Mount
from cluster.facts import DockerFact, Listener, Nic, NodeFacts
from cluster.inventory import Inventory, Node
from launcher.errors import PlanError
from launcher.job import Job
from launcher.plan import NodePlan, Paths, Plan, choose_address, choose_port, make_plan, node_root, slots_of
from tests.pure import given

JOB = Job(script="train.py")


def planned(inventory: Inventory, facts: dict[str, NodeFacts] | None = None) -> Plan:
    facts = given.all_facts(inventory) if facts is None else facts
    return make_plan(inventory, JOB, facts, image="sha256:feed", run_id="run-1", code="c0de")


def test_a_plan_is_whole() -> None:
    inventory = given.inventory(
        nodes=1,
        container={"env": {"A": "1", "B": "1"}, "mounts": [{"source": "/mnt/models", "target": "/models"}]},
        defaults={"nvme": [given.NVME], "env": {"B": "2"}, "paths": {"data": "/mnt/data"}},
    )
    root = "/home/ml/.launcher/lab/gpu-01"
    assert planned(inventory) == Plan(
        cluster="lab",
        run="run-1",
        accelerator="cuda",
        engine="docker",
        image="sha256:feed",
        port=29500,
        nodes=(
            NodePlan(
                name="gpu-01",
                rank=0,
                slots=8,
                address="127.0.0.1",
                nic="lo",
                owner="ml",
                user="1001:1001",
                groups=(2000,),
                cpus=64,
                shm_bytes=512 * given.GIB,
                root=root,
                host=Paths(
                    files=f"{root}/runs/run-1/files",
                    code=f"{root}/store/trees/c0de",
                    out=f"{root}/runs/run-1/out",
                    secrets="/dev/shm/launcher-lab-gpu-01-run-1",
                    checkpoints=f"{root}/checkpoints",
                    data="/mnt/data",
                    cache=None,
                    nvme=(given.NVME,),
                ),
                job=Paths(
                    files="/launcher/files",
                    code="/launcher/code",
                    out="/launcher/out",
                    secrets="/run/secrets",
                    checkpoints="/checkpoints",
                    data="/data",
                    cache=None,
                    nvme=("/nvme/0",),
                ),
                mounts=(Mount(source="/mnt/models", target="/models"),),
                env=(("A", "1"), ("B", "2")),
            ),
        ),
        job=JOB,
        devices=(),
        ulimits=(("memlock", -1), ("stack", 67108864)),
    )


def test_the_same_arguments_give_the_same_plan() -> None:
    inventory = given.inventory()
    assert planned(inventory) == planned(inventory)


def test_ranks_follow_the_inventory_and_the_first_is_the_master() -> None:
    plan = planned(given.inventory())
    assert [(node.name, node.rank, node.address) for node in plan.nodes] == [
        ("gpu-01", 0, "10.0.0.11"),
        ("gpu-02", 1, "10.0.0.12"),
        ("gpu-03", 2, "10.0.0.13"),
    ]
    assert (plan.master, plan.world_size) == ("10.0.0.11", 24)


def test_without_docker_the_job_sees_the_nodes_own_paths() -> None:
    inventory = given.inventory(nodes=1, engine="process", defaults={"transport": "local"})
    (node,) = planned(inventory).nodes
    assert node.job == node.host


def test_a_plan_without_a_run_names_the_nodes_own_folder() -> None:
    inventory = given.inventory(nodes=1)
    plan = make_plan(inventory, JOB, given.all_facts(inventory), image="sha256:feed")
    assert plan.run == ""
    assert plan.nodes[0].host.files == "/home/ml/.launcher/lab/gpu-01/node"


def test_rootless_docker_makes_the_user_root_inside() -> None:
    inventory = given.inventory(nodes=1)
    rootless = given.all_facts(inventory, docker=DockerFact(version="27.1.1", rootless=True))
    (node,) = planned(inventory, rootless).nodes
    assert (node.user, node.groups) == ("0:0", ())


def test_uneven_slots_are_refused_by_name() -> None:
    inventory = given.inventory()
    facts = {**given.all_facts(inventory), "gpu-02": given.facts(2, gpus=4)}
    with pytest.raises(PlanError) as refused:
        planned(inventory, facts)
    assert str(refused.value).splitlines() == [
        "the nodes have different numbers of slots (gpu-01 8, gpu-02 4, gpu-03 8)",
        "  next: set slots: 4 under defaults, so that every node runs the same number of processes",
    ]


@pytest.mark.parametrize(
    ("accelerator", "slots", "gpus", "number"),
    [("cuda", None, 8, 8), ("cuda", 2, 8, 2), ("cuda", None, 0, 1), ("cpu", None, 8, 1), ("cpu", 3, 0, 3)],
)
def test_slots_are_said_or_counted(accelerator: str, slots: int | None, gpus: int, number: int) -> None:
    inventory = given.inventory(nodes=1, accelerator=accelerator, defaults={"slots": slots} if slots else {})
    assert slots_of(inventory, inventory.nodes[0], given.facts(gpus=gpus)) == number


def test_a_state_folder_may_be_in_the_home_or_anywhere() -> None:
    at_home, elsewhere = given.inventory(nodes=1), given.inventory(nodes=1, defaults={"paths": {"state": "/mnt/s"}})
    assert node_root(at_home, at_home.nodes[0], given.facts()) == "/home/ml/.launcher/lab/gpu-01"
    assert node_root(elsewhere, elsewhere.nodes[0], given.facts()) == "/mnt/s/lab/gpu-01"


def node(**fields: Any) -> Node:
    return Node(**{"name": "gpu-01", "host": "gpu-01.example", **fields})


ETH = Nic(name="eth0", addresses=("10.0.0.11", "2001:db8::11"))
FAST = Nic(name="ib0", addresses=("10.5.0.11",))
BRIDGE = Nic(name="docker0", addresses=("172.17.0.1",))


def test_the_address_that_the_inventory_says_is_taken() -> None:
    assert choose_address(node(address="10.5.0.11"), given.facts(nics=(ETH, FAST))) == "10.5.0.11"


def test_a_node_that_is_alone_meets_itself() -> None:
    assert choose_address(node(), given.facts(nics=()), alone=True) == "127.0.0.1"


def test_the_ssh_host_is_taken_where_it_is_the_nodes_own_address() -> None:
    assert choose_address(node(host="10.5.0.11"), given.facts(nics=(ETH, FAST))) == "10.5.0.11"


def test_behind_a_forwarded_port_the_way_to_the_peers_decides() -> None:
    facts = given.facts(nics=(BRIDGE, ETH, FAST), routes={"10.0.0.12": "eth0", "10.5.0.13": "ib0", "10.0.0.14": "eth0"})
    assert choose_address(node(host="203.0.113.7"), facts) == "10.0.0.11"


def test_the_way_to_oneself_says_nothing() -> None:
    facts = given.facts(nics=(FAST, ETH), routes={"10.5.0.11": "lo", "10.0.0.11": "lo", "10.0.0.12": "eth0"})
    assert choose_address(node(), facts) == "10.0.0.11"


def test_a_way_that_is_known_by_the_peers_name_counts_alike() -> None:
    facts = given.facts(nics=(FAST, ETH), routes={"gpu-01": "lo", "gpu-02": "eth0", "gpu-03": "eth0"})
    assert choose_address(node(host="gpu-01"), facts) == "10.0.0.11"


def test_the_only_address_is_taken() -> None:
    assert choose_address(node(), given.facts(nics=(FAST,))) == "10.5.0.11"


def test_a_node_without_an_address_is_refused_with_the_cure() -> None:
    six = Nic(name="eth0", addresses=("2001:db8::11", "not an address"))
    with pytest.raises(PlanError) as refused:
        choose_address(node(), given.facts(nics=(six,)))
    assert str(refused.value).splitlines() == [
        "node gpu-01 has no IPv4 address that the others could reach",
        "  next: set address: for gpu-01 in the inventory",
    ]


def test_the_interface_is_the_one_with_the_address_unless_the_inventory_says() -> None:
    inventory = given.inventory(nodes=2, defaults={"nic": "ib0"})
    assert [one.nic for one in planned(inventory).nodes] == ["ib0", "ib0"]
    assert [one.nic for one in planned(given.inventory(nodes=2)).nodes] == ["eth0", "eth0"]


def test_an_address_of_no_interface_leaves_it_open() -> None:
    inventory = given.inventory(nodes=2)
    facts = given.all_facts(inventory)
    nodes = tuple(one.model_copy(update={"address": f"10.9.0.{n}"}) for n, one in enumerate(inventory.nodes))
    assert [one.nic for one in planned(inventory.model_copy(update={"nodes": nodes}), facts).nodes] == ["", ""]


def test_runs_that_start_at_once_take_different_free_ports() -> None:
    free = given.facts()
    first = choose_port(free, seed="20261126-170512-a01b")
    assert first == choose_port(free, seed="20261126-170512-a01b")
    assert 20000 <= first < 32768
    assert choose_port(free, seed="20261126-170512-b01a") != first
    taken = replace(free, listeners=(Listener(port=first),))
    assert choose_port(taken, seed="20261126-170512-a01b") != first


def test_the_guards_of_two_runs_on_one_machine_take_different_ports() -> None:
    seed = "20261126-170512-a01b"
    first = choose_port(given.facts(), seed=seed)
    above, below = (replace(given.facts(), listeners=(Listener(port=first + step),)) for step in (2, -2))
    assert choose_port(above, seed=seed, span=2) == choose_port(below, seed=seed, span=2) == first
    assert choose_port(above, seed=seed, span=3) == first + 5
    assert choose_port(below, seed=seed, span=3) == first + 1


def test_the_port_is_the_inventorys_unless_another_is_given() -> None:
    inventory = given.inventory(nodes=1, master_port=31000)
    facts = given.all_facts(inventory)
    assert planned(inventory).port == 31000
    assert make_plan(inventory, JOB, facts, image="x", port=31001).port == 31001

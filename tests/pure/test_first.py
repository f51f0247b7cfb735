"""A first inventory: from words and what the machines report to a file that we ourselves can read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.document import read
from cluster.errors import InputError
from cluster.facts import Nic, NodeFacts
from cluster.inventory import Inventory, read_inventory
from launcher.first import read_hosts, render_first
from tests.pure import given


def hosts(*words: str, name: str = "lab", identity_file: str | None = None) -> list[dict[str, Any]]:
    inventory = read_hosts(words, name=name, identity_file=identity_file)
    return [node.model_dump(include={"name", "host", "port", "user"}) for node in inventory.nodes]


@pytest.mark.parametrize(
    ("word", "node"),
    [
        ("10.0.0.11", {"name": "node-01", "host": "10.0.0.11", "port": None, "user": None}),
        ("gpu-01", {"name": "gpu-01", "host": "gpu-01", "port": None, "user": None}),
        ("ml@gpu-01:2222", {"name": "gpu-01", "host": "gpu-01", "port": 2222, "user": "ml"}),
        ("gpu-01.example", {"name": "node-01", "host": "gpu-01.example", "port": None, "user": None}),
        ("ml@[2001:db8::11]:22", {"name": "node-01", "host": "2001:db8::11", "port": 22, "user": "ml"}),
        ("[2001:db8::11]", {"name": "node-01", "host": "2001:db8::11", "port": None, "user": None}),
    ],
)
def test_a_word_is_a_host(word: str, node: dict[str, Any]) -> None:
    assert hosts(word) == [node]


@pytest.mark.parametrize(
    "word",
    ["", "@", "ml@", "a@b@c", "gpu-01:", "gpu-01:x", "2001:db8::11", "a:1:2", "gpu-01:" + "9" * 5000, "gpu-01:२२"],
)
def test_a_word_that_is_no_host_is_refused(word: str) -> None:
    with pytest.raises(InputError) as caught:
        hosts(word)
    assert str(caught.value).splitlines() == [f"{word!r} is no host", "  next: such as ml@10.0.0.11 or gpu-01:2222"]


@pytest.mark.parametrize("word", ["gpu-01:0", "gpu-01:99999", "a b", "gpu$(id)", "-oProxyCommand=x", "0.0.0.0"])
def test_a_host_that_cannot_be_is_refused_as_in_any_inventory(word: str) -> None:
    with pytest.raises(InputError, match="nodes"):
        hosts(word)


def test_the_same_host_twice_is_refused() -> None:
    with pytest.raises(InputError, match="given twice"):
        hosts("10.0.0.11", "10.0.0.11")


def first(*words: str, facts: tuple[NodeFacts, ...], name: str = "lab", key: str | None = None) -> str:
    asked = read_hosts(words, name=name, identity_file=key)
    known = {node.name: one for node, one in zip(asked.nodes, facts, strict=True)}
    return render_first(asked, known)


def understood(text: str) -> Inventory:
    return read_inventory(read(text, "cluster.yaml"))


def test_what_the_machines_report_becomes_the_inventory() -> None:
    text = first("ml@10.0.0.11", "ml@gpu-02:2222", facts=(given.facts(1), given.facts(2)), key="/keys/id")
    assert text.splitlines() == [
        'name: "lab"',
        "accelerator: cuda  # every node has a GPU",
        "",
        "# defaults:                      # what holds for every node; configs/cluster.yaml shows every key",
        "#   nvme: [/mnt/nvme0]           # for --offload-* nvme: a mount of its own, never the root disk",
        "#   paths:",
        "#     checkpoints: /mnt/checkpoints",
        "",
        "nodes:",
        '  - name: "node-01"',
        '    host: "10.0.0.11"',
        '    user: "ml"',
        '    identity_file: "/keys/id"',
        '    address: "10.0.0.11"  # where the other nodes find it',
        "    slots: 8  # NVIDIA H100 80GB HBM3",
        '  - name: "gpu-02"',
        '    host: "gpu-02"',
        "    port: 2222",
        '    user: "ml"',
        '    identity_file: "/keys/id"',
        '    address: "10.0.0.12"  # where the other nodes find it',
        "    slots: 8  # NVIDIA H100 80GB HBM3",
    ]
    assert [(node.address, node.slots) for node in understood(text).nodes] == [("10.0.0.11", 8), ("10.0.0.12", 8)]


def test_one_machine_without_a_gpu_makes_it_a_cluster_of_cpus() -> None:
    inventory = understood(first("gpu-01", "gpu-02", facts=(given.facts(1), given.facts(2, gpus=0))))
    assert (inventory.accelerator, [node.slots for node in inventory.nodes]) == ("cpu", [1, 1])


@pytest.mark.parametrize("word", ["no", "on", "null", "010", "1e3", "true"])
def test_a_name_that_yaml_takes_for_something_else_stays_a_name(word: str) -> None:
    text = (
        first(f"{word}@{word}", facts=(given.facts(),), name=word)
        if word.isalpha()
        else first("gpu-01", facts=(given.facts(),), name=word)
    )
    assert understood(text).name == word


def test_what_a_machine_says_of_its_gpu_cannot_become_a_key() -> None:
    strange = replace(given.gpu(), name="H100 # {a: b}\u00e9")
    inventory = understood(first("gpu-01", facts=(replace(given.facts(), gpus=(strange,)),)))
    assert inventory.nodes[0].slots == 1


def test_the_way_to_the_others_decides_the_address() -> None:
    nics = (Nic(name="eth0", addresses=("192.168.1.5",)), Nic(name="ib0", addresses=("10.5.0.11",)))
    facts = given.facts(nics=nics, routes={"10.5.0.12": "ib0"})
    assert understood(first("gpu-01.example", facts=(facts,))).nodes[0].address == "10.5.0.11"

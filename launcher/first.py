"""First contact: the host keys of new machines, and a first inventory made of what they report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.document import read
from cluster.errors import ClusterError, InputError
from cluster.facts import NodeFacts
from cluster.fleet import address_of, ask_facts, closing, connect, each
from cluster.inventory import Inventory, read_inventory
from cluster.trust import Address, HostKey, Verdict, changed, compare, pin, pinned
from launcher.plan import choose_address
from launcher.record import ClusterMemory, write_whole
from launcher.session import Voice


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One machine on the way, and the keys that it shows; `keys` is empty when they are pinned already."""

    name: str
    node: str
    keys: tuple[HostKey, ...]
    before: tuple[HostKey, ...]
    lines: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether other keys are pinned."""
        return bool(self.before) and bool(self.keys)

    def error(self) -> ClusterError:
        """The refusal of a changed key."""
        return changed(self.node, self.before, self.keys)


def scan_keys(inventory: Inventory, known_hosts: Path) -> Iterator[Hop]:
    """Every machine on the way to every node, once each, in the order in which they must be pinned.

    A jump host must be pinned before what lies behind it can be scanned, so pin each before asking for the next.
    """
    from cluster.ssh import hops, scan_host_keys

    seen: set[str] = set()
    for node in inventory.nodes:
        if node.transport != "ssh":
            continue
        for address in hops(address_of(node)):
            if address.key_name not in seen:
                seen.add(address.key_name)
                yield _hop(address, known_hosts, scan_host_keys(address, known_hosts=known_hosts))


def _hop(address: Address, known_hosts: Path, keys: tuple[HostKey, ...]) -> Hop:
    before = pinned(known_hosts, address.key_name)
    verdict = compare(before, keys)
    lines = [f"{address.node} ({address.key_name}): {verdict.value}", *(f"  {key}" for key in keys)]
    if verdict is Verdict.CHANGED:
        lines += [f"  pinned: {key}" for key in before]
    known = verdict is Verdict.SAME
    return Hop(
        name=address.key_name,
        node=address.node,
        keys=() if known else keys,
        before=before,
        lines=tuple(lines),
    )


def pin_keys(hop: Hop, known_hosts: Path, *, replace: bool) -> None:
    """Pin what was shown."""
    pin(known_hosts, hop.keys, replace=replace)


_HOST = re.compile(
    r"(?:(?P<user>[^@]+)@)?(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:@\[\]]+))(?::(?P<port>\d{1,5}))?", re.ASCII
)


def read_hosts(hosts: Sequence[str], *, name: str, identity_file: str | None) -> Inventory:
    """`user@host:port` words as an inventory of machines about which nothing else is known yet."""
    nodes = []
    for number, text in enumerate(hosts, 1):
        match = _HOST.fullmatch(text)
        if not match:
            raise InputError(f"{text!r} is no host", next_step="such as ml@10.0.0.11 or gpu-01:2222")
        host = match["six"] or match["host"]
        node: dict[str, object] = {"name": f"node-{number:02d}", "host": host}
        if re.fullmatch(r"[a-z0-9][a-z0-9-]{1,40}", host):
            node["name"] = host  # a host's own short name says more than a number
        if match["user"]:
            node["user"] = match["user"]
        if match["port"]:
            node["port"] = int(match["port"])
        if identity_file:
            node["identity_file"] = identity_file
        nodes.append(node)
    text = json.dumps({"name": name, "nodes": nodes})  # JSON is YAML: the same strict reading judges it
    return read_inventory(read(text, "launcher init"))


def check_output(output: Path) -> None:
    """Refuse to write over a file, before anything is asked."""
    if output.exists():
        raise InputError("this file exists", where=str(output), next_step="remove it, or choose another with --output")


def write_first(first: Inventory, remembered: ClusterMemory, output: Path, *, voice: Voice) -> None:
    """Ask the machines, and write an inventory of what they say."""
    machines = connect(first, known_hosts=remembered.known_hosts)
    peers = tuple(node.host for node in first.nodes)
    with closing(machines):
        facts = each(
            machines, lambda machine: ask_facts(machine, paths=(), peers=peers, engine="docker"), deadline=30
        ).all_or_raise()
    for node, fact in facts.items():
        gpus = f"{len(fact.gpus)} x {fact.gpus[0].name}" if fact.gpus else "no GPU"
        memory = fact.system.memory / 2**30
        docker = f"Docker {fact.docker.version}" if fact.docker.version else f"no Docker: {fact.docker.error}"
        voice.say(f"{node}: {gpus}, {fact.system.cpus} cores, {memory:.0f} GiB, {docker}")
    text = render_first(first, facts)
    read_inventory(read(text, str(output)))  # what we write, we can read
    write_whole(output, text)


def render_first(first: Inventory, facts: Mapping[str, NodeFacts]) -> str:
    """The inventory as commented YAML."""
    cuda = all(fact.gpus for fact in facts.values())
    lines = [
        f"name: {json.dumps(first.name)}",  # in quotes: YAML has its own ideas of `no` and `010`
        f"accelerator: {'cuda' if cuda else 'cpu'}  # {'every' if cuda else 'not every'} node has a GPU",
        "",
        "# defaults:                      # what holds for every node; configs/cluster.yaml shows every key",
        "#   nvme: [/mnt/nvme0]           # for --offload-* nvme: a mount of its own, never the root disk",
        "#   paths:",
        "#     checkpoints: /mnt/checkpoints",
        "",
        "nodes:",
    ]
    for node in first.nodes:
        fact = facts[node.name]
        slots = len(fact.gpus) if cuda else 1
        lines += [f"  - name: {json.dumps(node.name)}", f"    host: {json.dumps(node.host)}"]
        lines += [f"    port: {node.port}"] if node.port else []
        lines += [f"    user: {json.dumps(node.user)}"] if node.user else []
        lines += [f"    identity_file: {json.dumps(str(node.identity_file))}"] if node.identity_file else []
        lines += [f"    address: {json.dumps(choose_address(node, fact))}  # where the other nodes find it"]
        lines += [f"    slots: {slots}  # {fact.gpus[0].name if fact.gpus else 'processes'}"]
    return "\n".join(lines) + "\n"

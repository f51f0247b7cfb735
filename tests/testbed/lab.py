"""A laboratory of real nodes on one machine: containers with sshd and a Docker engine of their own.

    python -m tests.testbed.lab up|down|status [--prefix lab] [--nodes 3]

Everything it makes carries the label `launcher.lab=<prefix>`, and `down` removes what carries it and nothing else.
Two laboratories with different prefixes do not meet. Keys and the inventory lie in .lab/<prefix>/ of the checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors
import docker.types
import yaml

from launcher import image

ROOT = Path(__file__).resolve().parents[2]
LABEL = "launcher.lab"
# Where the options of an image build come from, so that no path of one machine stands in a file.
WHEELS, CA_BUNDLE, APT_MIRROR, BASE = (
    "LAUNCHER_TEST_WHEELS",
    "LAUNCHER_TEST_CA_BUNDLE",
    "LAUNCHER_TEST_APT_MIRROR",
    "LAUNCHER_TEST_BASE",
)
_START_SECONDS = 60.0
_HEAL_SECONDS = 180


class LabError(Exception):
    """The laboratory could not be made; the message says what was missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One node: its name (also the container's) and where its sshd listens."""

    name: str
    address: str
    host_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A running laboratory and the files that describe it."""

    prefix: str
    folder: Path
    machines: tuple[Machine, ...]

    @property
    def inventory(self) -> Path:
        """The cluster.yaml of these nodes."""
        return self.folder / "cluster.yaml"

    @property
    def identity(self) -> Path:
        """The private key that `ml` and `nodocker` accept."""
        return self.folder / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """The true host keys, for a test that does not want to ask for trust."""
        return self.folder / "known_hosts"


def up(*, prefix: str = "lab", count: int = 3) -> Lab:
    """Start the nodes, or leave them as they are when they already run; back when sshd and dockerd answer."""
    client = _client()
    folder = _folder(prefix)
    key = _key(folder)
    node_image = _node_image(client)
    network = _network(client, prefix)
    names = [f"{prefix}-{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"[:count]]
    with ThreadPoolExecutor(max_workers=count) as pool:
        machines = tuple(
            pool.map(lambda name: _machine(client, name, prefix=prefix, of=node_image, network=network, key=key), names)
        )
    lab = Lab(prefix=prefix, folder=folder, machines=machines)
    lab.known_hosts.write_text("".join(f"{one.address} {one.host_key}\n" for one in machines))
    lab.inventory.write_text(yaml.safe_dump(make_inventory(lab, image_options(os.environ)), sort_keys=False))
    return lab


def down(*, prefix: str = "lab") -> None:
    """Remove what carries this laboratory's label, and its keys."""
    client = _client()
    ours = {"label": f"{LABEL}={prefix}"}
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(lambda one: one.remove(force=True, v=True), client.containers.list(all=True, filters=ours)))
    for volume in client.volumes.list(filters=ours):
        volume.remove()
    for network in client.networks.list(filters=ours):
        network.remove()
    shutil.rmtree(_folder(prefix), ignore_errors=True)


def status(*, prefix: str = "lab") -> tuple[tuple[str, str], ...]:
    """Name and state of every node."""
    found = _client().containers.list(all=True, filters={"label": f"{LABEL}={prefix}"})
    return tuple(sorted((one.name, one.status) for one in found))


def run(node: str, *argv: str, user: str = "root", check: bool = True) -> str:
    """Run a command on a node, past SSH and past the network; what it wrote."""
    code, output = _client().containers.get(node).exec_run(list(argv), user=user)
    said = bytes(output or b"").decode(errors="replace")
    if check and code != 0:
        raise LabError(f"{node}: {argv[0]} ended with {code}: {said.strip()}")
    return said


def make_inventory(lab: Lab, image_recipe: dict[str, str]) -> dict[str, object]:
    """The cluster.yaml of a laboratory, as data."""
    return {
        "name": lab.prefix,
        "accelerator": "cpu",
        "image": {"flavour": "cpu", **image_recipe},
        # A laboratory without CAP_SYS_RESOURCE cannot raise memlock, so it asks for the one that it can have.
        "container": {"ulimits": {"stack": 64 << 20}},
        "defaults": {
            "user": "ml",
            "identity_file": str(lab.identity),
            "slots": 2,
            "nvme": ["/mnt/nvme"],
            "paths": {"checkpoints": "/mnt/checkpoints"},
        },
        "nodes": [{"name": one.name, "host": one.address, "address": one.address} for one in lab.machines],
    }


def image_options(environment: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """The part of an image recipe that belongs to this machine and not to the project."""
    named = {"wheels": WHEELS, "ca_bundle": CA_BUNDLE, "apt_mirror": APT_MIRROR, "base": BASE}
    return {field: environment[name] for field, name in named.items() if environment.get(name)}


# --- Faults. Each heals itself when its block ends, and by a second process when the test dies first.


@contextlib.contextmanager
def pause(node: str) -> Iterator[None]:
    """The whole node stands still: it accepts nothing, refuses nothing, and says nothing."""
    with _healed(node):
        # What its engine has started does not lie in the node's own control group.
        run(node, "sh", "-c", "docker ps --quiet | xargs -r docker pause")
        _client().containers.get(node).pause()
        yield


@contextlib.contextmanager
def disconnect(node: str) -> Iterator[None]:
    """The node's cable is out; its processes go on. The address stays the same."""
    with _healed(node):
        run(node, "ip", "link", "set", "eth0", "down")
        yield


@contextlib.contextmanager
def kill_sshd(node: str) -> Iterator[None]:
    """The node's sshd is gone, with every connection that it had."""
    with _healed(node):
        run(node, "pkill", "-KILL", "-x", "sshd")
        yield


@contextlib.contextmanager
def stop_engine(node: str, *, signal: str = "KILL") -> Iterator[None]:
    """The node's dockerd is down; sshd is not."""
    with _healed(node):
        run(node, "touch", "/lab/hold-engine")
        kill_process(node, "^dockerd ", signal=signal)
        yield


@contextlib.contextmanager
def cut_after(node: str, *, received: int) -> Iterator[None]:
    """Every SSH connection to the node is reset once it has brought `received` bytes."""
    counted = ("-m", "connbytes", "--connbytes", f"{received}:", "--connbytes-dir", "original")
    reset = ("--connbytes-mode", "bytes", "-j", "REJECT", "--reject-with", "tcp-reset")
    with _healed(node):
        # Byte counters of connections are off by default, and kept by the network of the node.
        run(node, "sysctl", "-q", "-w", "net.netfilter.nf_conntrack_acct=1", check=False)
        run(node, "iptables", "-I", "INPUT", "-p", "tcp", "--dport", "22", *counted, *reset)
        yield


@contextlib.contextmanager
def cut_data(node: str, *others: str) -> Iterator[None]:
    """Nothing passes between the node and these addresses; who is elsewhere still reaches it, by SSH for example."""
    with _healed(node):
        for address in others:
            run(node, "iptables", "-I", "INPUT", "-s", address, "-j", "DROP")
            run(node, "iptables", "-I", "OUTPUT", "-d", address, "-j", "DROP")
        yield


@contextlib.contextmanager
def cut_control(node: str) -> Iterator[None]:
    """Nothing passes to or from the node's sshd; the data path is whole."""
    with _healed(node):
        run(node, "iptables", "-I", "INPUT", "-p", "tcp", "--dport", "22", "-j", "DROP")
        run(node, "iptables", "-I", "OUTPUT", "-p", "tcp", "--sport", "22", "-j", "DROP")
        yield


@contextlib.contextmanager
def lose(node: str, *others: str, share: float) -> Iterator[None]:
    """A share of the packets that come from these addresses is lost."""
    chance = ("-m", "statistic", "--mode", "random", "--probability", str(share))
    with _healed(node):
        for address in others:
            run(node, "iptables", "-I", "INPUT", "-s", address, *chance, "-j", "DROP")
        yield


@contextlib.contextmanager
def impostor(node: str) -> Iterator[None]:
    """The node answers with another host key, as a stranger at its address would."""
    with _healed(node):
        script = """
            cd /etc/ssh && mkdir -p /lab/true-key && mv ssh_host_ed25519_key* /lab/true-key/ &&
            ssh-keygen -q -t ed25519 -N "" -f ssh_host_ed25519_key && pkill -HUP -o -x sshd
        """
        run(node, "sh", "-c", script)
        address = _address(_client().containers.get(node))
        _until(lambda: _greets(address), f"{node}: sshd is not back", seconds=_START_SECONDS)
        yield


def kill_process(node: str, pattern: str, *, signal: str = "KILL") -> None:
    """Signal every process of the node, also inside its containers, whose command line matches."""
    run(node, "pkill", f"-{signal}", "-f", pattern)


def heal(node: str) -> None:
    """Undo every fault of this file; harmless when there is none."""
    container = _client().containers.get(node)
    if container.status == "paused":
        container.unpause()
    gateway = next(iter(container.attrs["NetworkSettings"]["Networks"].values()))["Gateway"]
    script = f"""
        rm -f /lab/hold-engine
        pgrep -x sshd >/dev/null || /usr/sbin/sshd
        docker ps --quiet --filter status=paused | xargs -r docker unpause
        if ! ip link show eth0 | grep -q ,UP; then
            ip link set eth0 up && ip route replace default via {gateway}
        fi
        for chain in INPUT OUTPUT; do
            iptables -S $chain | grep -e connbytes -e '-j DROP' | sed 's/^-A/iptables -D/' | sh
        done
        if [ -d /lab/true-key ]; then
            rm -f /etc/ssh/ssh_host_ed25519_key* && mv /lab/true-key/* /etc/ssh/ && rmdir /lab/true-key &&
            pkill -HUP -o -x sshd
        fi
        true
    """
    run(node, "sh", "-c", script)
    address = _address(container)
    _until(lambda: _answers(node, address), f"{node} did not heal", seconds=_START_SECONDS)


@contextlib.contextmanager
def _healed(node: str) -> Iterator[None]:
    later = f"sleep {_HEAL_SECONDS}; exec {sys.executable} -m tests.testbed.lab heal --node {node}"
    guard = subprocess.Popen(["sh", "-c", later], cwd=ROOT, start_new_session=True)
    try:
        yield
    finally:
        heal(node)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guard.pid, 15)
        guard.wait()


# --- How the nodes are made.


def _client() -> Any:
    try:
        client = docker.from_env(timeout=600)
        client.ping()
    except docker.errors.DockerException as error:
        raise LabError(
            f"no Docker engine on this machine: {error}\n  next: start dockerd, or join group docker"
        ) from error
    return client


def _folder(prefix: str) -> Path:
    folder = ROOT / ".lab" / prefix
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _key(folder: Path) -> str:
    """The public half of the laboratory's key, made on first use."""
    private = folder / "id_ed25519"
    if not private.exists():
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "launcher-lab", "-f", str(private)]
        subprocess.run(command, check=True)
    return private.with_suffix(".pub").read_text().strip()


def _node_image(client: Any) -> str:
    """The image of a node, named after what it is made of: an unchanged one is not built."""
    base = _base(client)
    folder = Path(__file__).with_name("node")
    sources = {path.name: path for path in (*folder.iterdir(), ROOT / "docker" / "apt.sh")}
    entries = [image.make_entry(name, path.read_bytes()) for name, path in sources.items()]
    if authorities := os.environ.get(CA_BUNDLE):
        entries += [
            image.make_entry(f"ca/{name}", content) for name, content in image.read_authorities(Path(authorities))
        ]
    arguments = {"BASE": base, "APT_MIRROR": image.mirror_host(os.environ.get(APT_MIRROR, ""))}
    base_id = client.images.get(base).id
    name = f"launcher/lab-node:{image.fingerprint(entries, arguments, base_id=base_id)[:12]}"
    if not _has(client, name):
        _say("building the image of a node")
        with tempfile.TemporaryFile() as context:
            image.write_context(entries, context)
            context.seek(0)
            try:
                client.images.build(
                    fileobj=context, custom_context=True, tag=name, buildargs=arguments, rm=True, forcerm=True
                )
            except docker.errors.BuildError as error:
                said = "".join(str(line.get("stream", "")) for line in error.build_log)[-2000:]
                raise LabError(f"the image of a node does not build:\n{said}{error}") from error
    return name


def _base(client: Any) -> str:
    """A base named by the environment, or one made from Debian packages."""
    if named := os.environ.get(BASE):
        if not _has(client, named):
            client.images.pull(named)
        return named
    script = ROOT / "docker" / "base.sh"
    name = image.base_tag(script.read_bytes())
    if not _has(client, name):
        _say("making the base image from Debian packages")
        mirror = ["--mirror", os.environ[APT_MIRROR]] if os.environ.get(APT_MIRROR) else []
        made = subprocess.run(["sh", str(script), *mirror], check=False, capture_output=True)
        if made.returncode != 0:
            raise LabError(made.stderr.decode(errors="replace")[-2000:])
        repository, _, version = name.rpartition(":")
        client.api.import_image_from_data(made.stdout, repository=repository, tag=version)
    return name


def _has(client: Any, name: str) -> bool:
    try:
        client.images.get(name)
    except docker.errors.ImageNotFound:
        return False
    return True


def _network(client: Any, prefix: str) -> Any:
    found = client.networks.list(filters={"label": f"{LABEL}={prefix}"})
    return found[0] if found else client.networks.create(f"{prefix}-net", driver="bridge", labels={LABEL: prefix})


def _machine(client: Any, name: str, *, prefix: str, of: str, network: Any, key: str) -> Machine:
    container = _container(client, name, prefix=prefix, of=of, network=network, key=key)
    if container.status == "paused":
        container.unpause()
    container.start()
    container.reload()
    address = _address(container)
    _until(lambda: _answers(name, address), f"{name} ({address}) does not answer", seconds=_START_SECONDS)
    host_key = run(name, "cat", "/etc/ssh/ssh_host_ed25519_key.pub").split()
    return Machine(name=name, address=address, host_key=" ".join(host_key[:2]))


def _container(client: Any, name: str, *, prefix: str, of: str, network: Any, key: str) -> Any:
    """The node's container: the one that exists, unless it was made of another image or with another key."""
    recipe = hashlib.sha256(f"{of} {key}".encode()).hexdigest()[:12]
    labels = {LABEL: prefix, f"{LABEL}.recipe": recipe}
    with contextlib.suppress(docker.errors.NotFound):
        found = client.containers.get(name)
        if found.labels.get(LABEL) != prefix:
            raise LabError(f"a container named {name} exists and is not ours\n  next: choose another --prefix")
        if found.labels.get(f"{LABEL}.recipe") == recipe:
            return found
        found.remove(force=True, v=True)
    mounts = [_volume(client, f"{name}-{part}", at, prefix) for part, at in _VOLUMES.items()]
    host = client.api.create_host_config(
        mounts=mounts,
        tmpfs={"/mnt/small": "size=64m,mode=1777", "/run": "size=64m,exec"},
        binds={"/sys/fs/cgroup": {"bind": "/sys/fs/cgroup", "mode": "rw"}},
        network_mode=network.name,
        cgroupns="host",
        init=True,
        # Everything that --privileged gives except CAP_SYS_RESOURCE, which many hosts do not have to give.
        cap_add=["ALL"],
        cap_drop=["SYS_RESOURCE"],
        security_opt=["seccomp=unconfined", "apparmor=unconfined"],
    )
    # What the command line calls systempaths=unconfined: the SDK has no word for it.
    host |= {"MaskedPaths": [], "ReadonlyPaths": []}
    made = client.api.create_container(
        of, name=name, hostname=name, labels=labels, environment={"LAB_AUTHORIZED_KEY": key}, host_config=host
    )
    return client.containers.get(made["Id"])


_VOLUMES = {"docker": "/var/lib/docker", "nvme": "/mnt/nvme", "checkpoints": "/mnt/checkpoints"}


def _volume(client: Any, name: str, at: str, prefix: str) -> Any:
    client.volumes.create(name, labels={LABEL: prefix})
    return docker.types.Mount(target=at, source=name, type="volume")


def _address(container: Any) -> str:
    return str(next(iter(container.attrs["NetworkSettings"]["Networks"].values()))["IPAddress"])


def _answers(name: str, address: str) -> bool:
    """Whether sshd greets and dockerd answers the user who will ask it."""
    asked = ("sh", "-c", "docker version >/dev/null 2>&1 && echo ready")
    return _greets(address) and "ready" in run(name, *asked, user="ml", check=False)


def _greets(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=2) as connection:
            connection.settimeout(2)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _until(true: Callable[[], bool], otherwise: str, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise LabError(otherwise)
        time.sleep(0.1)


def _say(text: str) -> None:
    sys.stderr.write(f"lab: {text}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.testbed.lab", description="Real nodes on one machine.")
    parser.add_argument("command", choices=("up", "down", "status", "heal"))
    parser.add_argument("--prefix", default=os.environ.get("LAUNCHER_LAB", "lab"), help="name of the laboratory")
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="how many nodes (default 3)")
    parser.add_argument("--node", help="the node to heal")
    given = parser.parse_args(argv)
    try:
        match given.command:
            case "up":
                lab = up(prefix=given.prefix, count=given.nodes)
                sys.stdout.write(f"{lab.inventory}\n")
            case "down":
                down(prefix=given.prefix)
            case "heal":
                heal(given.node)
            case _:
                sys.stdout.write("".join(f"{name}  {state}\n" for name, state in status(prefix=given.prefix)))
    except (LabError, docker.errors.DockerException) as error:
        sys.stderr.write(f"lab: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Image distribution: a small change to one node, a cold image to many, and transfers that are cut.

    python -m tests.benchmarks.ship delta [--megabytes 972] [--pairs 5]
    python -m tests.benchmarks.ship chain [--nodes 8] [--mbit 200] [--megabytes 100] [--pairs 3]
    python -m tests.benchmarks.ship cuts  [--tries 100]

All need root and sshd; `delta` and `cuts` dockerd, `delta` docker-registry, `chain` ip and tc.

`delta`: an image of three layers, of which the uppermost, 1 MB, is new; the node, an sshd with an engine of its own,
has the others. Beside each other, in turn: `launcher`, `docker save | ssh docker load`, and Debian's docker-registry
on this machine (push, then pull on the node). The registry and we have both seen the lower layers before.

`chain`: nodes are network namespaces on a bridge, each with an sshd, every link held to the same rate in both
directions (tbf). Beside each other, in turn: one node, all nodes by `launcher`, and all nodes by one `ssh` each from
here. Engines would need more processors than one machine has, so what each node does with an archive that is whole is
to hash it, in all three.

`cuts`: three nodes with engines of their own; each try cuts a transfer at a random byte (1 %, 50 % and 99 % among
them), or kills a node of the chain, and tries again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.archive import Archive
from cluster.dockerd import DockerEngine
from cluster.errors import UnreachableError
from cluster.fleet import Machine
from cluster.shelf import Shelf
from launcher.stages.relay import Road, relay
from launcher.stages.ship import ship_image
from tests.loopback.conftest import Site
from tests.loopback.images import make_image, make_layer
from tests.loopback.nodes import Dockerd, HereButThere, Node, nodes_of, reach
from tests.loopback.sshd import free_port, make_key, running_sshd
from tests.loopback.test_relay import Slow

MB = 1 << 20
DOCKER_HOST = "unix://{0}"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def likeness(megabytes: int, *, seed: int) -> bytes:
    """Bytes that shrink to about a third, as libraries do."""
    noise = random.Random(seed)  # noqa: S311 - the same every time
    return b"".join(noise.randbytes(340) + bytes(684) for _ in range(megabytes * 1024))


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    os.environ.pop("SSH_AUTH_SOCK", None)
    os.environ["HOME"] = str(folder / "home")
    (folder / "home" / ".ssh").mkdir(parents=True)
    yield Site(folder=folder, key=make_key(folder / "id_ed25519"))


def medians(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


# --- a small change to one node


def delta(*, megabytes: int, pairs: int) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="launcher-bench-")))
        here = stack.enter_context(engine(folder / "here"))
        there = stack.enter_context(engine(folder / "there"))
        who = stack.enter_context(site(folder))
        (node,) = stack.enter_context(nodes_of(folder, [there], who))
        registry = stack.enter_context(debian_registry(folder))
        source = DockerEngine(HereButThere(here.socket, "here"))
        stack.callback(source.close)
        maker, shelf = Shelf(folder / "maker"), Shelf(folder / "shelf")
        base = [
            make_layer("base", likeness(megabytes // 8, seed=1)),
            make_layer("torch", likeness(megabytes * 7 // 8, seed=2)),
        ]

        def make(tag: str) -> str:
            digest, archive = make_image(maker, [*base, make_layer("code", os.urandom(MB))], mark="bench")
            say_to(here, "load", "-q", stdin=b"".join(archive.chunks()))
            say_to(here, "tag", digest, tag)
            return digest

        def launcher(tag: str, digest: str) -> None:
            ship_image(source, [node.machine], tag=tag, digest=digest, progress=lambda *_: None, shelf=shelf)

        def save_and_load(tag: str) -> None:
            line = f"docker -H unix://{here.socket} save {tag} | {ssh_line(who, node)} docker load -q"
            subprocess.run(["sh", "-c", line], check=True, stdout=subprocess.DEVNULL)

        def push_and_pull(tag: str) -> None:
            name = f"127.0.0.1:{registry}/bench:{tag.rpartition(':')[2]}"
            say_to(here, "tag", tag, name)
            say_to(here, "push", "-q", name)
            subprocess.run(
                ["sh", "-c", f"{ssh_line(who, node)} docker pull -q {name}"], check=True, stdout=subprocess.DEVNULL
            )

        say(f"cold, {megabytes} MB:")
        digest = make("bench:first")
        say(f"  launcher, from save     {timed(lambda: launcher('bench:first', digest)):8.2f} s")
        digest = make("bench:second")
        say(f"  launcher, first push    {timed(lambda: launcher('bench:second', digest)):8.2f} s   (once per layer)")
        make("bench:reg")
        say(f"  registry, push and pull {timed(lambda: push_and_pull('bench:reg')):8.2f} s   (the node has the layers)")
        say("1 MB change:   launcher   save|load   registry   save|load / launcher   launcher / registry")
        rows = []
        for number in range(pairs):
            tags = [f"bench:{kind}{number}" for kind in ("ours", "save", "registry")]
            digests = [make(tag) for tag in tags]
            row = (
                timed(lambda: launcher(tags[0], digests[0])),  # noqa: B023 - called at once
                timed(lambda: save_and_load(tags[1])),  # noqa: B023
                timed(lambda: push_and_pull(tags[2])),  # noqa: B023
            )
            for digest in digests:
                if node.machine.engine.image_id(digest) != digest:
                    raise SystemExit(f"{digest} is not on the node")
            rows.append((*row, row[1] / row[0], row[0] / row[2]))
            say("             " + "".join(f"{value:11.2f}" for value in rows[-1]))
        say("median       " + "".join(f"{value:11.2f}" for value in medians(rows)))


@contextmanager
def engine(folder: Path) -> Iterator[Dockerd]:
    folder.mkdir()
    made = Dockerd(folder, driver="overlay2")
    made.start()
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def debian_registry(folder: Path) -> Iterator[int]:
    program = shutil.which("docker-registry")
    if program is None:
        raise SystemExit("there is no docker-registry here: apt install docker-registry")
    port = free_port()
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}, "cache": {"blobdescriptor": "inmemory"}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (folder / "registry.json").write_text(json.dumps(config))
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(folder / "registry.json")], stdout=log, stderr=log)
    try:
        time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait()


def say_to(dockerd: Dockerd, *argv: str, stdin: bytes = b"") -> None:
    subprocess.run(
        ["docker", "-H", f"unix://{dockerd.socket}", *argv], input=stdin, check=True, stdout=subprocess.DEVNULL
    )


def ssh_line(who: Site, node: Node) -> str:
    options = f"-o UserKnownHostsFile={who.known_hosts} -o BatchMode=yes -o LogLevel=ERROR"
    return f"ssh -F /dev/null -i {who.key} {options} -p {node.sshd.port} {node.sshd.host}"


# --- a cold image to many nodes on slow links


def chain(*, count: int, mbit: int, megabytes: int, pairs: int) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="launcher-bench-")))
        who = stack.enter_context(site(folder))
        hosts = stack.enter_context(network(count, mbit=mbit))
        shelf = Shelf(folder / "shelf")
        layer = make_layer("weights", random.Random(3).randbytes(megabytes * MB))  # noqa: S311
        _, archive = make_image(shelf, [layer], mark="bench")
        whole = folder / "archive"
        whole.write_bytes(b"".join(archive.chunks()))
        hashed = subprocess.run(["sha256sum", str(whole)], capture_output=True, text=True, check=True).stdout.split()[0]
        machines, roads = stack.enter_context(stations(folder, who, hosts))

        def ours(taking: Sequence[Machine]) -> None:
            answers = relay(archive, taking, roads, lambda *_: None)
            if answers.bad:
                raise SystemExit(str(answers.bad))

        def star() -> None:
            def one(host: str) -> None:
                line = f"ssh -F /dev/null -i {who.key} -o UserKnownHostsFile={who.known_hosts} -o BatchMode=yes {host} "
                line += f"'cat > {folder}/{host}.got && sha256sum {folder}/{host}.got' < {whole}"
                done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
                if done.stdout.split()[0] != hashed:
                    raise SystemExit(f"{host} has other bytes")

            with ThreadPoolExecutor(count) as pool:
                list(pool.map(one, hosts.values()))

        floor = archive.size * 8 / mbit / 1e6
        say(f"{count} nodes, {megabytes} MB, {mbit} Mbit/s on every link: one link needs {floor:.2f} s at least")
        say("   one node   all nodes   star by ssh   all / one   star / all")
        rows = []
        for _ in range(pairs):
            one = timed(lambda: ours(machines[:1]))
            every = timed(lambda: ours(machines))
            by_ssh = timed(star)
            rows.append((one, every, by_ssh, every / one, by_ssh / every))
            say("".join(f"{value:12.2f}" for value in rows[-1]))
        say("".join(f"{value:12.2f}" for value in medians(rows)) + "   median")


@contextmanager
def stations(folder: Path, who: Site, hosts: dict[str, str]) -> Iterator[tuple[list[Machine], dict[str, Road]]]:
    """An sshd in every namespace; in the place of an engine something that takes all, since it was hashed before."""
    machines, roads = [], {}
    bench = folder / "bin"
    bench.mkdir()
    (bench / "docker").write_text("#!/bin/sh\nexit 0\n")
    (bench / "docker").chmod(0o755)
    with ExitStack() as stack:
        for name, host in hosts.items():
            (folder / name).mkdir()
            options = (f"SetEnv PATH={bench}:{os.environ['PATH']} HOME={folder}",)
            inside = ("ip", "netns", "exec", name)
            server = running_sshd(folder / name, authorized=who.key, host=host, port=22, options=options, before=inside)
            transport = reach(who, stack.enter_context(server), name)
            stack.callback(transport.close)
            machines.append(Machine(name=name, transport=transport, engine=DockerEngine(transport)))
            roads[name] = Road(folder=str(folder / name / "ship"), address=host)
        yield machines, roads


@contextmanager
def network(count: int, *, mbit: int) -> Iterator[dict[str, str]]:
    """Namespaces on a bridge, with this machine as one more station; every link has the same rate both ways."""
    prefix = f"lb{os.getpid() % 10000}"
    switch = f"{prefix}s"
    rate = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "50ms")
    hosts = {f"{prefix}n{number}": f"10.213.77.{number + 10}" for number in range(count)}

    def ip(*words: str, at: str | None = None) -> None:
        subprocess.run(["ip", *(("-n", at) if at else ()), *words], check=True)

    def plug(name: str, host: str, *, at: str | None) -> None:
        """A cable from a station to the switch."""
        end = ("netns", at) if at else ()
        ip("link", "add", name, "netns", switch, "type", "veth", "peer", "name", f"{name}e", *end)
        ip("link", "set", name, "master", "bridge", "up", at=switch)
        ip("addr", "add", f"{host}/24", "dev", f"{name}e", at=at)
        ip("link", "set", f"{name}e", "up", at=at)
        for place, device in ((switch, name), (at, f"{name}e")):
            inside = ("ip", "netns", "exec", place) if place else ()
            subprocess.run([*inside, "tc", "qdisc", "add", "dev", device, *rate], check=True)

    try:
        # The bridge has a namespace of its own: the rules of this machine's Docker are none of its.
        ip("netns", "add", switch)
        ip("link", "add", "bridge", "type", "bridge", at=switch)
        ip("link", "set", "bridge", "up", at=switch)
        plug(f"{prefix}c", "10.213.77.1", at=None)
        for name, host in hosts.items():
            ip("netns", "add", name)
            ip("link", "set", "lo", "up", at=name)
            plug(name, host, at=name)
        yield hosts
    finally:
        for name in (*hosts, switch):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


# --- transfers that are cut


def cuts(*, tries: int) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="launcher-bench-")))
        who = stack.enter_context(site(folder))
        engines = [stack.enter_context(engine(folder / f"engine{number}")) for number in range(3)]
        chance = random.Random(5)  # noqa: S311 - the same every time
        shelf = Shelf(folder / "shelf")
        wrong = failed = 0
        again, kept = [], []
        for number in range(tries):
            digest, archive = make_image(shelf, [make_layer("weights", chance.randbytes(6 * MB))], mark="bench")
            at = archive.size * (1, 50, 99)[number % 3] // 100 if number % 2 else chance.randrange(archive.size)
            with nodes_of(folder / str(number), engines, who) as nodes:
                usable, retried, resent = one_cut(nodes, archive, digest, at=at, kill=number % 4 == 0)
                wrong += usable
                failed += not retried
                again.append(resent / archive.size)
                kept.append(sum(path.stat().st_size for node in nodes for path in node.kept + node.dockerd.left_over()))
            shutil.rmtree(folder / str(number), ignore_errors=True)
            shelf.trim(limit=0)
            if number % 10 == 9:
                say(f"{number + 1} tries: {wrong} usable wrong images, {failed} retries failed")
        say(f"{tries} tries: {wrong} usable wrong images, {failed} retries failed,")
        say(f"  of the archive the retry read again from here {statistics.median(again):.2f} (median)")
        say(f"  bytes left on the nodes after the retry: {max(kept)} at most")


def one_cut(nodes: list[Node], archive: Archive, digest: str, *, at: int, kill: bool) -> tuple[bool, bool, int]:
    """Whether a wrong image could be used after a cut, whether the retry succeeded, and what it read from here."""
    machines, roads = [node.machine for node in nodes], {node.machine.name: node.road for node in nodes}

    def lose() -> None:
        if kill:
            nodes[1].sshd.drop()
            return
        raise UnreachableError("gpu-1", "the connection was lost")

    first = relay(Slow(archive, seconds=0.5, at=at, then=lose, always=not kill), machines, roads, lambda *_: None)
    usable = any(set(node.dockerd.images()) - {digest} for node in nodes)
    usable |= any(node.dockerd.images() and node.machine.name in first.bad for node in nodes)
    parcel = Slow(archive)
    lacking = [machine for machine in machines if machine.name in first.bad]
    second = relay(parcel, lacking, roads, lambda *_: None)
    return usable, not second.bad and all(node.dockerd.images() == [digest] for node in nodes), parcel.read


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Image distribution beside its peers.")
    parser.add_argument("what", choices=("delta", "chain", "cuts"))
    parser.add_argument("--megabytes", type=int)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--mbit", type=int, default=200)
    parser.add_argument("--tries", type=int, default=100)
    given = parser.parse_args()
    match given.what:
        case "delta":
            delta(megabytes=given.megabytes or 972, pairs=given.pairs)
        case "chain":
            chain(count=given.nodes, mbit=given.mbit, megabytes=given.megabytes or 100, pairs=given.pairs)
        case _:
            cuts(tries=given.tries)


if __name__ == "__main__":
    main()

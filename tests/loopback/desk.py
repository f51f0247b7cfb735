"""A user's desk: the program called as a user calls it, two nodes and this machine with engines of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.inventory import load_inventory
from cluster.shelf import Shelf
from launcher.stages.build import read_recipe
from tests.loopback.images import docker, make_image, make_layer
from tests.loopback.nodes import Dockerd, Node, nodes_of

if TYPE_CHECKING:
    from tests.loopback.conftest import Site

ROOT = Path(__file__).parents[2]
PROGRESS = re.compile(r"  \S+ \d+/\d+ MB")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Dockerd]]:
    engines = [Dockerd(tmp_path_factory.mktemp("dockerd"), driver=None) for _ in range(3)]
    try:
        for engine in engines:
            engine.start()
        yield engines
    finally:
        for engine in engines:
            engine.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """A user with an inventory of two nodes, and an engine on this machine."""

    folder: Path
    nodes: list[Node]
    here: Dockerd

    def __call__(self, *words: str, code: int = 0) -> str:
        """Call the program; what it wrote, the second stream after the first."""
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *words],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "LAUNCHER_STATE": str(self.folder / "state"),
                "DOCKER_HOST": f"unix://{self.here.socket}",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert done.returncode == code, done.stdout + done.stderr
        told = [line for line in done.stderr.splitlines(keepends=True) if not PROGRESS.match(line)]
        return done.stdout + "".join(told)

    def json(self, *words: str) -> Any:
        """Call the program for data."""
        return json.loads(self(*words, "--json").partition("\n}")[0] + "\n}")

    def image(self, *engines: Dockerd, tag: str | None, code: str = "x", **labels: str) -> str:
        """Give engines a small image; its digest."""
        digest, archive = make_image(
            Shelf(self.folder / "maker"),
            [make_layer("base", b"base" * 5000), make_layer("code", code.encode())],
            mark="desk",
            labels=labels,
        )
        for engine in engines:
            docker("-H", f"unix://{engine.socket}", "load", "-q", stdin=b"".join(archive.chunks()))
            if tag:
                engine.say("tag", digest, tag)
        return digest

    @property
    def tag(self) -> str:
        """The image that the inventory asks for."""
        inventory = load_inventory(self.folder / "cluster.yaml")
        return read_recipe(inventory.image, inventory.flavour).tag


@pytest.fixture
def desk(tmp_path: Path, engines: list[Dockerd], site: Site) -> Iterator[Desk]:
    here, *others = engines
    with nodes_of(tmp_path / "nodes", others, site) as nodes:
        folder = tmp_path / "desk"
        known = folder / "state" / "clusters" / "lab" / "known_hosts"
        known.parent.mkdir(parents=True)
        known.write_bytes(site.known_hosts.read_bytes())
        lines = ["name: lab", "accelerator: cpu", f"defaults: {{identity_file: {site.key}}}", "nodes:"]
        lines += [
            f"  - {{name: {node.machine.name}, host: {node.sshd.host}, port: {node.sshd.port}, "
            f"address: {node.sshd.host}, paths: {{state: {tmp_path}/launcher}}}}"
            for node in nodes
        ]
        (folder / "cluster.yaml").write_text("\n".join(lines) + "\n")
        yield Desk(folder=folder, nodes=nodes, here=here)
    here.clear()

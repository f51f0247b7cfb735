"""What DeepSpeed and Accelerate really write on two nodes of this machine: sealed, judged, damaged a thousand times."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launcher import shards
from tests.pure import kept

ROOT = Path(__file__).parents[2]
NODES = ("node-a", "node-b")
SMALL = (
    *("--steps", "4", "--save-every", "2", "--global-batch", "4"),
    *("--width", "8", "--layers", "1", "--block", "8"),
)


@dataclass(frozen=True)
class Trained:
    """A run of the example on two nodes, each with a folder of its own."""

    folder: Path
    run: str

    @property
    def cluster(self) -> kept.Cluster:
        return kept.Cluster(self.folder / "nodes", NODES, 1, 3)


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HOME": str(folder / "home"),
        "LAUNCHER_STATE": str(folder / "state"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "examples/train.py", folder / "train.py")
    for name in NODES:
        (folder / "nodes" / name).mkdir(parents=True)
    nodes = [
        {
            "name": name,
            "host": "localhost",
            "transport": "local",
            "slots": 1,
            "paths": {"state": str(folder / ".launcher"), "checkpoints": str(folder / "nodes" / name)},
        }
        for name in NODES
    ]
    said = {"name": "two", "engine": "process", "accelerator": "cpu", "nodes": nodes}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(said))
    try:
        done = call(folder, "run", "--stage", "3", "--port", "auto", "train.py", *SMALL)
        assert done.returncode == 0, done.stderr + done.stdout[-3000:]
        run = next(path.name for path in (folder / "nodes/node-a").iterdir() if path.name.startswith("20"))
        yield Trained(folder, run)
    finally:
        call(folder, "down")


def test_what_was_written_is_what_is_needed(trained: Trained) -> None:
    found = trained.cluster.listings(f"{trained.run}/step-00000004")
    paths = [part.path for one in found for part in one.parts]
    layout = shards.read_layout(paths)
    assert (layout.stage, layout.world_size, layout.folder) == (3, 2, "pytorch_model/")
    shard_files = {path for path in paths if shards.is_shard(path)}
    assert set(shards.required(layout, paths)) == shard_files
    told = {part.path: (part.step, part.world) for one in found for part in one.parts if part.step is not None}
    assert told == {
        **{f"pytorch_model/zero_pp_rank_{rank}_mp_rank_00_model_states.pt": (4, 2) for rank in (0, 1)},
        **{f"random_states_{rank}.pkl": (4, None) for rank in (0, 1)},
    }


def test_both_checkpoints_were_sealed_by_both_nodes(trained: Trained) -> None:
    for step in (2, 4):
        unit = f"{trained.run}/step-{step:08d}"
        assert trained.cluster.judge(unit) == ()
        manifests = shards.manifests_of(trained.cluster.listings(unit))
        assert [(one.node, one.ranks, one.run) for one in manifests] == [
            ("node-a", (0,), trained.run),
            ("node-b", (1,), trained.run),
        ]


def test_f50_a_thousand_mutations_are_all_caught_and_named(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "nodes", tmp_path / "pristine")
    scene = kept.Scene(trained.cluster, f"{trained.run}/step-00000004")
    assert kept.unseen(scene, tmp_path / "pristine", range(1000)) == []


def test_the_commands_tell_it_as_data(trained: Trained, tmp_path: Path) -> None:
    listed = json.loads(call(trained.folder, "checkpoint", "ls", "--json").stdout)
    assert [(one["name"], one["step"], one["state"], one["nodes"]) for one in listed["checkpoints"]] == [
        ("step-00000002", 2, "whole", list(NODES)),
        ("step-00000004", 4, "whole", list(NODES)),
    ]
    verified = json.loads(call(trained.folder, "checkpoint", "verify", "--all", "--json").stdout)
    assert [one["whole"] for one in verified["checkpoints"]] == [True, True]
    done = call(trained.folder, "checkpoint", "gather", "--to", str(tmp_path), "--json")
    (placed,) = json.loads(done.stdout)["placed"]
    assert placed["folder"] == f"{tmp_path}/gathered/{trained.run}/step-00000004"
    file = trained.cluster.of("node-b") / trained.run / "step-00000004/random_states_1.pkl"
    before = file.read_bytes()
    file.write_bytes(before[:-1])
    told = call(trained.folder, "checkpoint", "verify", "--json")
    assert told.returncode == 8
    (flaw,) = json.loads(told.stdout)["checkpoints"][0]["flaws"]
    assert (flaw["kind"], flaw["node"], flaw["path"]) == ("torn", "node-b", "random_states_1.pkl")
    spoken = call(trained.folder, "checkpoint", "verify")
    assert spoken.returncode == 8
    assert "torn: node node-b: random_states_1.pkl: it has" in spoken.stdout
    assert spoken.stderr.startswith(f"error: 1 flaw in {trained.run}/step-00000004")
    file.write_bytes(before)

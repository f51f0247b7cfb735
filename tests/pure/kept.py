"""Checkpoints to test with: files of the form that torch writes, in the places where DeepSpeed and Accelerate put them.

They are real zip archives with real pickles; the tensors are random bytes. The seals are those of the real program.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import shards
from launcher.inside import manifest
from launcher.shards import Flaw, Listing

RUN, STEPS = "20261123-060000-1f2e", (2, 4)
OTHER_RUN = "20261122-050000-ab12"


def torch_file(path: Path, said: Mapping[str, object], *, size: int, dice: random.Random) -> None:
    """A file as `torch.save` lays it out: a stored zip with the pickle first, then every tensor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", pickle.dumps(dict(said), protocol=2))
        for index in range(2):
            archive.writestr(f"{path.stem}/data/{index}", dice.randbytes(size // 2))
        archive.writestr(f"{path.stem}/version", "3\n")


def write_unit(
    folder: Path,
    *,
    ranks: Sequence[int],
    world: int,
    stage: int | None,
    step: int,
    seed: str,
    style: str = "accelerate",
    prefix: str = "",
) -> None:
    """What the processes of one node write of one checkpoint."""
    dice = random.Random(f"{seed} {step} {ranks[0]}")  # noqa: S311 - to be the same every time is the point
    below = folder / "pytorch_model" if style == "accelerate" and stage is not None else folder
    below.mkdir(parents=True, exist_ok=True)
    model = {"global_steps": step, "global_samples": step * 8, "dp_world_size": world, "ds_version": "0.19.8"}
    for rank in ranks:
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        if stage == 3:
            torch_file(below / f"{name}_model_states.pt", model, size=900, dice=dice)
        if stage:
            torch_file(below / f"{prefix}{name}_optim_states.pt", {"ds_version": "0.19.8"}, size=1800, dice=dice)
        if style == "accelerate":
            torch_file(folder / f"random_states_{rank}.pkl", {"step": step * 2, "x": 1}, size=700, dice=dice)
    if stage is not None and stage < 3 and 0 in ranks:
        torch_file(below / "mp_rank_00_model_states.pt", model, size=2000, dice=dice)
    if style == "accelerate":
        (folder / "complete").touch()
    if 0 in ranks:
        (folder / "zero_to_fp32.py").write_text("# how to convert\n" * 20)
        if stage is not None:
            (below.parent / "latest").write_text(below.name)


def run_document(node: str, *, machine_rank: int, slots: int, world: int, run: str = RUN) -> dict[str, object]:
    """run.json, as far as manifest.py reads it."""
    return {
        "run": run,
        "node": node,
        "machine_rank": machine_rank,
        "local_processes": slots,
        "world_size": world,
    }


@dataclass(frozen=True)
class Cluster:
    """Nodes, each with a checkpoints folder of its own."""

    root: Path
    names: tuple[str, ...]
    slots: int
    stage: int | None

    def of(self, node: str) -> Path:
        return self.root / node

    @property
    def world(self) -> int:
        return len(self.names) * self.slots

    def ranks(self, node: str) -> range:
        first = self.names.index(node) * self.slots
        return range(first, first + self.slots)

    def save(self, unit: str, *, step: int, seed: str = "", style: str = "accelerate", prefix: str = "") -> None:
        """All nodes write one checkpoint, at the same time."""
        for node in self.names:
            write_unit(
                self.of(node) / unit,
                ranks=self.ranks(node),
                world=self.world,
                stage=self.stage,
                step=step,
                seed=f"{seed}{node}",
                style=style,
                prefix=prefix,
            )

    def seal(self, *nodes: str, run: str = RUN) -> None:
        """What each node's program does once the job has ended."""
        for node in nodes or self.names:
            said = run_document(node, machine_rank=self.names.index(node), slots=self.slots, world=self.world, run=run)
            for unit in manifest.find_units(self.of(node)):
                if unit.partition("/")[0] == run:
                    manifest.settle(self.of(node), unit, run=said, since=0.0, seen=None)

    def listings(self, unit: str, *, read: bool = True) -> tuple[Listing, ...]:
        """What every node says it holds of a checkpoint."""
        return tuple(one for node in self.names for one in look(self.of(node), node, unit, read=read))

    def judge(self, unit: str, *, read: bool = True, elsewhere: shards.Contents | None = None) -> tuple[Flaw, ...]:
        found = self.listings(unit, read=read)
        return shards.judge(shards.manifests_of(found), found, elsewhere=elsewhere)


def look(root: Path, node: str, *units: str, read: bool = True, whole: bool = False) -> tuple[Listing, ...]:
    """What one node says, through the text that it would print."""
    said = manifest.listing(root, list(units) or None, brief=False, read=read, whole=whole, peek=True)
    return shards.read_listings(node, json.dumps({"units": said}))


def trained(
    root: Path, *, nodes: int = 2, slots: int = 2, stage: int | None = 3, steps: Sequence[int] = STEPS, run: str = RUN
) -> Cluster:
    """A cluster after a run with a checkpoint at every one of these steps, sealed."""
    made = Cluster(root, tuple(f"gpu-{n:02d}" for n in range(1, nodes + 1)), slots, stage)
    for step in steps:
        made.save(f"{run}/step-{step:08d}", step=step, seed=run)
    made.seal(run=run)
    return made


# --- what can go wrong with one: each damages a node's folder and says which file that was, and how it may be called


@dataclass(frozen=True)
class Damage:
    """A mutation that was carried out."""

    node: str
    path: str
    kinds: tuple[str, ...]


Mutation = Callable[["Scene", random.Random], Damage]


@dataclass(frozen=True)
class Scene:
    """A cluster with two runs, in which one checkpoint is about to be damaged."""

    cluster: Cluster
    unit: str
    stranger: str | None = None  # the same of another run

    def folder(self, node: str, unit: str | None = None) -> Path:
        return self.cluster.of(node) / (unit or self.unit)

    def files(self, node: str, *, empty: bool = False) -> list[str]:
        found = (path for path in self.folder(node).rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(str(path.relative_to(self.folder(node))) for path in found if empty or path.stat().st_size)

    def pick(self, dice: random.Random, *, empty: bool = False) -> tuple[str, str, Path]:
        node = dice.choice(self.cluster.names)
        path = dice.choice([one for one in self.files(node, empty=empty) if one != "latest"])
        return node, path, self.folder(node) / path

    def others(self, node: str, path: str) -> list[str]:
        """The other units of the same run that have such a file."""
        run = self.unit.partition("/")[0]
        found = sorted(self.cluster.of(node).glob(f"{run}/step-*/{path}"))
        units = [f"{run}/{one.relative_to(self.cluster.of(node) / run).parts[0]}" for one in found]
        return [unit for unit in units if unit != self.unit]


def flip(scene: Scene, dice: random.Random) -> Damage:
    node, path, file = scene.pick(dice)
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    return Damage(node, path, ("changed",))


def truncate(scene: Scene, dice: random.Random) -> Damage:
    node, path, file = scene.pick(dice)
    os.truncate(file, dice.randrange(file.stat().st_size))
    return Damage(node, path, ("torn",))


def zero(scene: Scene, dice: random.Random) -> Damage:
    node, path, file = scene.pick(dice)
    file.write_bytes(bytes(file.stat().st_size))
    return Damage(node, path, ("torn",))


def zero_some(scene: Scene, dice: random.Random) -> Damage:
    node, path, file = scene.pick(dice)
    content = bytearray(file.read_bytes())
    start = dice.randrange(len(content))
    end = min(len(content), start + dice.randint(1, 512))
    if not any(content[start:end]):
        content[start] = 1
    content[start:end] = bytes(end - start)
    if content == file.read_bytes():
        content[start] = 1
    file.write_bytes(content)
    return Damage(node, path, ("changed",))


def remove(scene: Scene, dice: random.Random) -> Damage:
    node, path, file = scene.pick(dice, empty=True)
    file.unlink()
    return Damage(node, path, ("missing",))


def append(scene: Scene, dice: random.Random) -> Damage:
    node, path, file = scene.pick(dice)
    with file.open("ab") as out:
        out.write(dice.randbytes(dice.randint(1, 4096)))
    return Damage(node, path, ("changed",))


def add(scene: Scene, dice: random.Random) -> Damage:
    """A file too many: of a rank that there is not, or of no meaning at all."""
    node, _, file = scene.pick(dice)
    rank = dice.randrange(scene.cluster.world, scene.cluster.world + 9)
    name = dice.choice(
        [f"pytorch_model/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", f"random_states_{rank}.pkl", "notes/x.bin"]
    )
    new = scene.folder(node) / name
    new.parent.mkdir(parents=True, exist_ok=True)
    new.write_bytes(dice.choice([file.read_bytes(), dice.randbytes(99)]))
    return Damage(node, name, ("foreign",))


def other_step(scene: Scene, dice: random.Random) -> Damage:
    """A shard of another step in the place of this one's."""
    node, path, file = shard(scene, dice)
    shutil.copy(scene.folder(node, dice.choice(scene.others(node, path))) / path, file)
    return Damage(node, path, ("mixed",))


def other_run(scene: Scene, dice: random.Random) -> Damage:
    """A shard of another run in the place of this one's."""
    if scene.stranger is None:
        return other_step(scene, dice)
    node, path, file = shard(scene, dice)
    shutil.copy(scene.folder(node, scene.stranger) / path, file)
    return Damage(node, path, ("foreign",))


def swap(scene: Scene, dice: random.Random) -> Damage:
    """Two ranks' files in each other's place."""
    node, path, file = shard(scene, dice)
    rank = shards.rank_of(path)
    peers = [one for one in scene.files(node) if one.replace(str(shards.rank_of(one)), str(rank)) == path != one]
    if not peers or rank is None:
        return flip(scene, dice)
    peer = scene.folder(node) / dice.choice(peers)
    content = peer.read_bytes()
    shutil.copy(file, peer)
    file.write_bytes(content)
    return Damage(node, path, ("foreign",))


def shard(scene: Scene, dice: random.Random) -> tuple[str, str, Path]:
    while True:
        node, path, file = scene.pick(dice)
        if shards.is_shard(path):
            return node, path, file


def whole_node(scene: Scene, dice: random.Random) -> Damage:
    """All of a node's part, with its manifest, of another step or another run."""
    node = dice.choice(scene.cluster.names)
    run, name = scene.unit.split("/")
    steps = [one.name for one in sorted((scene.cluster.of(node) / run).glob("step-*")) if one.name != name]
    unit = dice.choice([*([scene.stranger] if scene.stranger else []), *(f"{run}/{step}" for step in steps)])
    shutil.rmtree(scene.folder(node))
    shutil.copytree(scene.folder(node, unit), scene.folder(node))
    kind = "foreign" if unit == scene.stranger else "mixed"
    return Damage(node, shards.manifest_name(node), (kind,))


def lose_manifest(scene: Scene, dice: random.Random) -> Damage:
    node = dice.choice(scene.cluster.names)
    (scene.folder(node) / shards.manifest_name(node)).unlink()
    return Damage(node, scene.unit, ("unsealed",))


def spoil_manifest(scene: Scene, dice: random.Random) -> Damage:
    node = dice.choice(scene.cluster.names)
    file = scene.folder(node) / shards.manifest_name(node)
    content = bytearray(file.read_bytes())
    # The last byte ends the line, and no more.
    content[dice.randrange(len(content) - 1)] ^= 1 << dice.randrange(7)
    file.write_bytes(content)
    return Damage(node, shards.manifest_name(node), ("torn",))


def link(scene: Scene, dice: random.Random) -> Damage:
    node, path, file = scene.pick(dice)
    file.rename(scene.cluster.root / "aside")
    file.symlink_to(scene.cluster.root / "aside")
    return Damage(node, path, ("refused",))


def lose_node(scene: Scene, dice: random.Random) -> Damage:
    node = dice.choice(scene.cluster.names)
    shutil.rmtree(scene.folder(node))
    return Damage("", "", ("missing",))


def thousandth(scene: Scene, seed: int) -> Damage:
    """Damage number `seed`, always the same."""
    dice = random.Random(seed)  # noqa: S311
    return MUTATIONS[seed % len(MUTATIONS)](scene, dice)


MUTATIONS: tuple[Mutation, ...] = (
    *(flip, flip, truncate, zero, zero_some, remove, append, add, other_step, other_run, swap, whole_node),
    *(lose_manifest, spoil_manifest, link, lose_node),
)


def unseen(scene: Scene, pristine: Path, seeds: range) -> list[tuple[int, Damage, tuple[Flaw, ...]]]:
    """The mutations of these seeds that are not caught, or not named; everything is as it was after each."""
    nodes = scene.cluster.names
    known = shards.contents(one for node in nodes for one in look(scene.cluster.of(node), node, read=False))
    missed = []
    for seed in seeds:
        damage = thousandth(scene, seed)
        flaws = scene.cluster.judge(scene.unit, elsewhere=known)
        if not cast(flaws, damage) or not any(map(shards.is_fatal, flaws)):
            missed.append((seed, damage, flaws))
        for node in nodes:
            shutil.rmtree(scene.folder(node), ignore_errors=True)
            shutil.copytree(pristine / node / scene.unit, scene.folder(node))
    return missed


def cast(flaws: Sequence[Flaw], damage: Damage) -> list[Flaw]:
    """The flaws that name what was done, as what it was."""
    return [
        flaw
        for flaw in flaws
        if flaw.kind in damage.kinds and flaw.path.endswith(damage.path) and damage.node in (flaw.place, "")
    ]

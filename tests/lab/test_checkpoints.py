"""Three nodes without a shared file system: killed, gathered, verified, exported, and resumed on two of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.lab.conftest import ROOT, Said, User, eventually
from tests.lab.test_main_job import alone, killed, losses
from tests.testbed import lab as testbed

SIZES = {"steps": 40, "global-batch": 12, "log-every": 1, "save-every": 8, "width": 32, "layers": 1}
JOB = tuple(word for name, size in SIZES.items() for word in (f"--{name}", str(size)))
CHECKPOINTS = "/mnt/checkpoints"
# Flips the lowest bit of the byte at 1000.
FLIP = (
    'flip() { byte=$(od -An -tu1 -j1000 -N1 $1); printf "\\\\$(printf %o $((byte ^ 1)))" '
    "| dd of=$1 bs=1 seek=1000 conv=notrunc status=none; }; flip"
)
SHARD = "pytorch_model/zero_pp_rank_{}_mp_rank_00_{}_states.pt"


def checkpoint(user: User, *words: str, code: int = 0) -> Said:
    said = user.launcher("checkpoint", *words)
    assert said.code == code, said.err + said.out
    assert "Traceback" not in said.err
    return said


def units(user: User, *words: str) -> dict[str, dict[str, object]]:
    said = json.loads(checkpoint(user, "ls", *words, "--json").out)
    return {str(one["unit"]): one for one in said["checkpoints"]}


def node(machine: testbed.Machine, script: str) -> str:
    return testbed.run(machine.name, "sh", "-c", f"cd {CHECKPOINTS} && {script}", user="ml")


@pytest.fixture(scope="module")
def run(lab: testbed.Lab, user: User) -> str:
    """A run that was killed as soon as every node had sealed its second checkpoint; its id."""
    running = user.begin("run", "--stage", "3", "jobs/slowly.py", *JOB)

    def sealed(machine: testbed.Machine) -> bool:
        return bool(node(machine, f"ls -d */step-00000016/.launcher-manifest.{machine.name}.json 2>/dev/null || true"))

    eventually(
        lambda: running.poll() is not None or all(map(sealed, lab.machines)), "the seals of every node", seconds=900
    )
    assert running.poll() is None, user.end(running).out[-3000:]
    testbed.run(lab.machines[1].name, "sh", "-c", killed(3))
    said = user.end(running)
    assert (said.code, said.first) == (1, f"error: node {lab.machines[1].name}, rank 3: killed by SIGKILL"), said.err
    (made,) = node(lab.machines[0], "ls -d */step-00000016").split()
    return made.partition("/")[0]


def test_every_node_wrote_down_what_it_holds(lab: testbed.Lab, user: User, run: str) -> None:
    found = units(user, run)
    assert set(found) >= {f"{run}/step-00000008", f"{run}/step-00000016"}
    for name in ("step-00000008", "step-00000016"):
        one = found[f"{run}/{name}"]
        assert (one["state"], one["world_size"], one["nodes"]) == ("whole", 6, [m.name for m in lab.machines]), one
        for machine in lab.machines:
            owner = node(machine, f"stat -c %U {run}/{name}/.launcher-manifest.{machine.name}.json").strip()
            assert owner == "ml"


def test_it_verifies_and_each_damage_is_named_with_its_node(lab: testbed.Lab, user: User, run: str) -> None:
    unit = f"{run}/step-00000008"
    checkpoint(user, "verify", run, "--step", "8")
    first, second, third = lab.machines
    flipped, missing, foreign = SHARD.format(1, "optim"), SHARD.format(2, "model"), SHARD.format(4, "optim")
    node(first, f"cp -p {unit}/{flipped} kept && {FLIP} {unit}/{flipped}")
    node(second, f"mv {unit}/{missing} kept")
    node(third, f"mv {unit}/{foreign} kept && cp {run}/step-00000016/{foreign} {unit}/{foreign}")
    said = checkpoint(user, "verify", run, "--step", "8", "--json", code=8)
    flaws = {(one["kind"], one["node"], one["path"]) for one in json.loads(said.out)["checkpoints"][0]["flaws"]}
    assert flaws == {
        ("changed", first.name, flipped),
        ("missing", second.name, missing),
        ("mixed", third.name, foreign),
    }
    refused = checkpoint(user, "gather", run, "--step", "8", "--to", str(user.home / "refused"), code=8)
    assert f"missing: node {second.name}: {missing}" in refused.err
    assert not (user.home / "refused" / "gathered").exists()
    node(first, f"mv kept {unit}/{flipped}")
    node(second, f"mv kept {unit}/{missing}")
    node(third, f"mv kept {unit}/{foreign}")
    checkpoint(user, "verify", run, "--step", "8")


def test_a_foreign_shard_of_another_run_is_named(lab: testbed.Lab, user: User, run: str) -> None:
    """One that is too much: of a rank that this run never had."""
    unit, name = f"{run}/step-00000008", SHARD.format(9, "optim")
    third = lab.machines[2]
    node(third, f"cp {unit}/{SHARD.format(5, 'optim')} {unit}/{name}")
    said = checkpoint(user, "verify", run, "--step", "8", code=8)
    assert f"foreign: node {third.name}: {name}: " in said.out
    node(third, f"rm {unit}/{name}")


def test_all_parts_come_here_and_to_a_node(lab: testbed.Lab, user: User, run: str) -> None:
    said = json.loads(checkpoint(user, "gather", run, "--step", "16", "--to", str(user.home / "kept"), "--json").out)
    (placed,) = said["placed"]
    folder = Path(placed["folder"])
    assert folder == user.home / "kept/gathered" / run / "step-00000016"
    assert {path.name for path in folder.glob("pytorch_model/*")} == {
        Path(SHARD.format(rank, what)).name for rank in range(6) for what in ("model", "optim")
    }
    again = json.loads(checkpoint(user, "gather", run, "--step", "16", "--to", str(user.home / "kept"), "--json").out)
    assert again["placed"][0]["sent"] == 0
    second = lab.machines[1]
    checkpoint(user, "gather", run, "--step", "16", "--to", second.name)
    there = node(second, f"cd gathered/{run}/step-00000016 && sha256sum pytorch_model/*").split()
    assert len(there) == 2 * 12
    assert node(second, f"stat -c %U gathered/{run}/step-00000016/latest").strip() == "ml"


def test_its_weights_come_out_equal_to_deepspeeds_own(lab: testbed.Lab, user: User, run: str) -> None:
    if not (ROOT / "launcher/inside/export.py").exists():
        pytest.skip("the converter is not here")
    checkpoint(user, "export", run, "--step", "16", "--to", str(user.home / "model"))
    ours = user.home / f"model/exported/{run}/step-00000016-fp32/model.safetensors"
    assert ours.stat().st_size > 10_000
    second = lab.machines[1].name
    compare = (
        "import sys, glob, torch; from safetensors.torch import load_file; "
        "from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as whole; "
        f"theirs = whole('/checkpoints/gathered/{run}/step-00000016'); "
        f"ours = load_file('/checkpoints/exported/{run}/step-00000016-fp32/model.safetensors'); "
        "assert ours.keys() == theirs.keys(); "
        "assert all(torch.equal(ours[name], theirs[name]) for name in ours); print('equal', len(ours))"
    )
    checkpoint(user, "export", run, "--step", "16", "--to", second)
    said = user.launcher("exec", "--node", second, "--", "python3", "-c", compare)
    assert (said.code, "equal" in said.out) == (0, True), said.err


def test_a_run_goes_on_from_it_on_two_nodes_with_the_same_losses(lab: testbed.Lab, user: User, run: str) -> None:
    made = json.loads(checkpoint(user, "universal", run, "--step", "16", "--json").out)["placed"][0]
    checkpoint(user, "scatter", f"{made['place']}:{made['folder']}")
    data = yaml.safe_load(user.inventory.read_text())
    two = user.write(nodes=data["nodes"][:2])
    config = {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "checkpoint": {"load_universal": True},
    }
    (user.home / "universal.json").write_text(json.dumps(config))
    resumed = user.launcher(
        *("run", "-c", str(two), "--ds-config", "universal.json", "examples/train.py", *JOB),
        *("--resume", f"/checkpoints/gathered/{run}"),
    )
    assert resumed.code == 0, resumed.err + resumed.out[-3000:]
    assert "step-00000016-universal" in resumed.out
    truth = alone(JOB)
    found = losses(resumed.out)
    assert sorted(found) == list(range(17, 41))
    for step, loss in found.items():
        assert loss == pytest.approx(truth[step], rel=1e-3), f"step {step}"


def test_a_gather_that_was_killed_goes_on_from_where_it_was(lab: testbed.Lab, user: User, run: str) -> None:
    """With 96 MB more on one node, killed after a third of them."""
    third, unit, size = lab.machines[2], f"{run}/step-00000016", 96 << 20
    folder = f"{unit}/pytorch_model/offloaded_tensors/rank04"
    node(third, f"mkdir -p {folder} && head -c {size} /dev/urandom > {folder}/a.swp")
    node(third, f"rm {unit}/.launcher-manifest.{third.name}.json")
    checkpoint(user, "verify", run, "--step", "16", "--seal")
    to = user.home / "cut"
    began = user.begin("checkpoint", "gather", run, "--step", "16", "--to", str(to))
    partial = to / "gathered" / run / ".launcher-partial-step-00000016/pytorch_model/offloaded_tensors/rank04/a.swp"
    eventually(lambda: partial.exists() and partial.stat().st_size > size // 3, "a third of it", seconds=300)
    began.kill()
    user.end(began)
    have = partial.stat().st_size
    done = json.loads(checkpoint(user, "gather", run, "--step", "16", "--to", str(to), "--json").out)["placed"][0]
    assert done["bytes"] > size
    assert done["sent"] <= done["bytes"] - have + 0.05 * done["bytes"] + (8 << 20)
    node(third, f"rm -r {unit}/pytorch_model/offloaded_tensors {unit}/.launcher-manifest.{third.name}.json")
    checkpoint(user, "verify", run, "--step", "16", "--seal")

"""The ladder beside DeepSpeed: its defaults, its own estimators, and what its engines really hold on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.memory import Cluster, Host, Recipe, Rung, Weight, weigh
from launcher.model import Model, guess_model, read_simulation
from tests.testbed import training

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).parents[2]
BF16 = Recipe(precision="bf16", optimizer="fusedadam")


def cluster(*, gpus: int, nodes: int = 1, cpu: bool = True) -> Cluster:
    host = Host(name="node", gpus=gpus, gpu_memory=0, memory=0)
    return Cluster(hosts=(host,) * nodes, cpu=cpu, context=0, process=0, slack=0.0)


def part(weight: Weight, place: str, *names: str) -> int:
    return sum(one.bytes for one in weight.parts if one.place == place and one.name in names)


class TestDefaults:
    def test_sizes_that_nobody_sets_are_deepspeeds(self) -> None:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        theirs, ours = DeepSpeedZeroConfig(), Recipe()
        assert ours.reduce_bucket_size == theirs.reduce_bucket_size
        assert ours.prefetch_bucket_size == theirs.prefetch_bucket_size
        assert ours.max_live_parameters == theirs.max_live_parameters
        assert ours.max_reuse_distance == theirs.max_reuse_distance
        assert ours.persistence_threshold == theirs.param_persistence_threshold
        assert ours.sub_group_size == theirs.sub_group_size
        assert [ours.overlaps(stage) for stage in (1, 2, 3)] == [
            DeepSpeedZeroConfig(stage=stage).overlap_comm for stage in (1, 2, 3)
        ]

    def test_so_are_the_buffers_of_offloading(self) -> None:
        from deepspeed.runtime.zero.offload_config import (
            DeepSpeedZeroOffloadOptimizerConfig,
            DeepSpeedZeroOffloadParamConfig,
        )

        ours = Recipe()
        assert ours.optimizer_buffers == DeepSpeedZeroOffloadOptimizerConfig().buffer_count
        params = DeepSpeedZeroOffloadParamConfig()
        assert (ours.param_buffers, ours.param_buffer_size) == (params.buffer_count, params.buffer_size)
        assert ours.max_in_cpu == params.max_in_cpu

    def test_norms_are_taken_in_fp64(self) -> None:
        from deepspeed.runtime.zero.utils import get_norm_dtype

        from launcher.memory import NORM

        assert get_norm_dtype().itemsize == NORM


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (4, 1), (8, 2)])
class TestEstimators:
    """DeepSpeed's estimators beside ours: 7B, Adam, 16 bits. Where the two differ, the difference is named."""

    P = 7_000_000_000

    def ours(self, rung: Rung, gpus: int, nodes: int) -> Weight:
        model = guess_model(self.P, micro_batch=1, sequence=1, checkpointing=True, item=2)
        return weigh(rung, model, BF16, cluster(gpus=gpus, nodes=nodes))

    def test_zero_2(self, gpus: int, nodes: int) -> None:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate

        _, theirs = estimate(self.P, gpus, nodes, cpu_offload=False)
        weight = self.ours(Rung(stage=2), gpus, nodes)
        # Their 18 P/n: gradients at 2 and 4, master weights 4, moments 8. The step holds one more flat copy at 2, and
        # the tensors on a share's border are held whole.
        ours = part(weight, "gpu", "parameters", "master weights", "optimizer") + 6 * self.P // (gpus * nodes)
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert weight.on("gpu") >= theirs

    def test_zero_2_with_the_optimizer_on_the_cpu(self, gpus: int, nodes: int) -> None:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate

        ram, theirs = estimate(self.P, gpus, nodes, cpu_offload=True, additional_buffer_factor=1.0)
        weight = self.ours(Rung(stage=2, optimizer_on="cpu"), gpus, nodes)
        assert part(weight, "gpu", "parameters") == pytest.approx(theirs, rel=1e-3)
        states = gpus * part(weight, "cpu", "master weights", "gradients", "optimizer")
        assert states == pytest.approx(16 * self.P / nodes, rel=1e-3)
        # Theirs takes the whole model in fp32 once for each of all GPUs, also for those of other nodes; and at the
        # least 16 P a node, also where several nodes share it. Its factor of 1.5 is for whatever else there is.
        assert ram == self.P * max(4 * gpus * nodes, 16)

    def test_zero_3(self, gpus: int, nodes: int) -> None:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

        _, theirs, largest = estimate(self.P, 0, gpus, nodes, cpu_offload=False, cpu_offload_params=False)
        assert largest == 0
        weight = self.ours(Rung(stage=3), gpus, nodes)
        # Their 18 P/n, and 2 P/n of the weights themselves less the 2 that their formula does not count.
        ours = part(weight, "gpu", "parameters", "master weights", "optimizer", "gradients")
        assert ours + 2 * self.P // (gpus * nodes) == pytest.approx(theirs, rel=1e-3)

    @pytest.mark.parametrize("params", ["gpu", "cpu"])
    def test_zero_3_with_offload(self, gpus: int, nodes: int, params: Any) -> None:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

        ram, theirs, _ = estimate(
            self.P, 0, gpus, nodes, cpu_offload=True, cpu_offload_params=params == "cpu", additional_buffer_factor=1.0
        )
        weight = self.ours(Rung(stage=3, optimizer_on="cpu", params_on=params), gpus, nodes)
        assert part(weight, "gpu", "parameters") == pytest.approx(theirs, rel=1e-3)
        # Theirs leaves out the flat buffer in which the gradients arrive: 2 P/n.
        ours = gpus * part(weight, "cpu", "master weights", "gradients", "optimizer", "parameters")
        assert ours - 2 * self.P / nodes == pytest.approx(ram, rel=1e-3)


# The simulation

SHAPE = {"n_layer": 3, "n_embd": 128, "n_head": 4, "vocab_size": 2000, "n_positions": 128}
TINY = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **SHAPE}


def question(**fields: Any) -> dict[str, Any]:
    usual = {"config": TINY, "micro_batch": 4, "sequence": 128, "checkpointing": False, "precision": "no"}
    return {**usual, **fields}


def simulated(**fields: Any) -> Model:
    said = simulation(**fields)
    return read_simulation(said, where="config.json")


def simulation(**fields: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, ROOT / "launcher/inside/simulate.py"],
        input=json.dumps(question(**fields)),
        capture_output=True,
        text=True,
        check=True,
    )
    said: dict[str, Any] = json.loads(done.stdout)
    return said


CODE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100))

def with_loss():
    def loss(model, micro_batch, sequence):
        return model(torch.randn(micro_batch, sequence)).square().mean()
    return nn.Linear(20, 5), loss

def lost():
    return 3
"""


class TestSimulation:
    def test_what_it_counts_is_what_torchs_tracker_counts_of_a_real_step(self) -> None:
        import torch
        from torch.distributed._tools.mem_tracker import MemTracker

        from launcher.inside import simulate

        model, loss = simulate.build(question())
        simulate.ready(model, checkpointing=False)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            loss(model, 4, 128).backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        found = simulated()
        held, most = 0, 0
        for event in found.cast:
            most = max(most, event.peak + held)
            held += 4 * found.tensors[event.tensor] if hasattr(event, "tensor") else 0
        weights = 4 * found.parameters + found.buffers
        assert weights + most == pytest.approx(peak, rel=0.001)

    def test_every_trained_tensor_has_its_gradient_once(self) -> None:
        found = simulated(precision="bf16", checkpointing=True)
        for events in (found.cast, found.autocast):
            tensors = sorted(event.tensor for event in events if hasattr(event, "tensor"))
            assert tensors == list(range(len(found.tensors)))
        assert found.activations < simulated(precision="bf16").activations

    def test_a_function_of_a_file_is_built(self) -> None:
        found = simulated(config=None, code=CODE, function="make")
        assert found.parameters == 6400 + 6500
        assert found.largest_module == 6500
        found = simulated(config=None, code=CODE, function="with_loss", sequence=20)
        assert found.tensors == (100, 5)

    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            ({"code": CODE, "function": "other"}, "there is no function 'other' in it"),
            ({"code": CODE, "function": "lost"}, "lost() gives a int, not a torch.nn.Module"),
            ({"code": CODE, "function": "make", "checkpointing": True}, "it has no gradient_checkpointing_enable()"),
            ({"code": "import nothing_like_it", "function": "make"}, "ModuleNotFoundError: No module named"),
        ],
    )
    def test_what_cannot_be_run_is_told(self, fields: dict[str, Any], error: str) -> None:
        assert simulation(config=None, **fields)["error"].startswith(error)


def test_the_command_simulates_where_its_own_python_has_torch(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(CODE)
    words = ["plan", "--model-from", "model.py:make", "--gpu-memory", "1g", "--sequence", "64", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    model = json.loads(done.stdout)["model"]
    assert (model["parameters"], model["simulated"]) == (12_900, True)
    refused = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words[:2], "model.py:lost", *words[3:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "model.py: this model cannot be simulated: lost() gives a int" in refused.stderr


# Real runs


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with training.start() as started:
        yield started


RUN = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 4, "n_embd": 512, "n_head": 8}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_real_run_holds_what_is_predicted(server: subprocess.Popen[str], stage: int) -> None:
    asked = question(config={**RUN, "vocab_size": 8000, "n_positions": 128}, micro_batch=2)
    recipe: dict[str, Any] = {"reduce_bucket_size": 3_000_000}
    measured = training.ask(server, {"model": asked, "stage": stage, "processes": 2, "recipe": recipe})
    assert isinstance(measured, list), measured
    model = read_simulation(simulation(**asked), where="config.json")
    weight = weigh(Rung(stage=stage), model, Recipe(**recipe), cluster(gpus=2))
    hidden = part(weight, "gpu", "buckets") if stage == 0 else 0  # DDP's buckets are no tensors of Python
    assert max(one["states"] for one in measured) == pytest.approx(weight.states("gpu") - hidden, rel=0.01)
    peak = max(one["peak"] for one in measured)
    assert weight.on("gpu") == pytest.approx(peak, rel=0.06)

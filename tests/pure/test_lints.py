"""Lints of DeepSpeed configurations and Accelerate YAMLs; single mistakes of files are in tests/corpus/deepspeed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import document
from cluster.errors import InputError
from launcher import dskeys
from launcher.dsconfig import DsConfig, read
from launcher.lints import KINDS, PYYAML, Lint, lint_accelerate, lint_deepspeed, lint_text

GATHER = {"stage3_gather_16bit_weights_on_model_save": True}
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **(GATHER if stage == 3 else {}), **more}}


def lints(config: dict[str, Any], **known: Any) -> tuple[Lint, ...]:
    return lint_deepspeed(read(json.dumps(config), name="ds.json"), **known)


def ids(config: dict[str, Any], **known: Any) -> list[str]:
    return [lint.id for lint in lints(config, **known)]


def one(config: dict[str, Any], **known: Any) -> Lint:
    (lint,) = lints(config, **known)
    return lint


# DeepSpeed: what is right

RIGHT: dict[str, dict[str, Any]] = {
    "the least": {},
    "stage 0": {"zero_optimization": {}},
    "stage 3": zero(3),
    "stage 3, by the other name": {"zero_optimization": {"stage": 3, "gather_16bit_weights_on_model_save": True}},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"param_dtype": "bf16", "grad_accum_dtype": "fp32"}},
    "sums in the same precision": {"zero_optimization": {}, "data_types": {"grad_accum_dtype": "fp32"}},
    "two precisions, one of them off": {"bf16": {"enabled": True}, "fp16": {"enabled": False}},
    "a bucket as a float": zero(2, reduce_bucket_size=5e8),
    "a comment": {"_comment": "mine", "$schema": "x", "//": "y", "# note": 1},
    "parameters on the CPU": zero(3, offload_param={"device": "cpu"}),
    "parameters on NVMe": zero(3, offload_param={"device": "nvme", "nvme_path": "/nvme/0/swap"}),
    "nothing offloaded": zero(1, offload_optimizer={"device": "none"}, offload_param={"device": "none"}),
    "no path where none is needed": zero(1, offload_optimizer={"device": "none", "nvme_path": "none"}),
    "null for a block": zero(2, offload_param=None),
    "leaf classes": zero(3, leaf_module={"classes": ["Block"]}),
    "a batch that multiplies": {"train_batch_size": 8, "gradient_accumulation_steps": 2},
    "the sum below stage 3": {"gradient_allreduce_op": "sum"},
    "no norm": {"gradient_clipping": 0} | zero(1, compute_grad_norm=False),
    "predivided at stage 1": {"gradient_predivide_factor": 2, "prescale_gradients": True} | zero(1),
    "predivided without reduce_scatter": {"gradient_predivide_factor": 2} | zero(2, reduce_scatter=False),
    "a factor of one": {"gradient_predivide_factor": 1.0},
    "master weights and states in bf16": {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    },
    "a secondary partition": zero(3, zero_hpz_partition_size=2),
    "a larger secondary partition than there is": zero(3, zero_hpz_partition_size=64),
    "keys of stage 3 that are off": zero(2, stage3_allgather_sequential=False, zero_quantized_weights=False),
    "an unwatched monitor": {"tensorboard": {"enabled": False}},
    "what is open": {"datastates_ckpt": {"anything": {"at": "all"}}, "msamp": {"enabled": True}},
    "tensor parallelism": {"train_batch_size": 2, "tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 2}}},
    "tensor parallelism by the other name": {"tensor_parallel": {"tensor_parallel": {"tp_size": 2}}},
    "sequence parallelism": {"train_batch_size": 2, "sequence_parallel_size": 2},
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_gets_no_lint(name: str) -> None:
    assert lints(BASE | RIGHT[name], world_size=4, nvme=("/nvme/0", "/nvme/1")) == ()


def test_an_optimizer_and_a_scheduler_of_the_file_only_say_what_the_script_must_do() -> None:
    config = BASE | {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.99], "adam_w_mode": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 10, "warmup_num_steps": 1}},
    }
    assert ids(config) == ["optimizer-in-file", "scheduler-in-file"]


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}} | zero(0),
        {"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": True},
        {"optimizer": {"type": "MuAdam", "params": {"width": 3}}, "zero_allow_untested_optimizer": True},
        {"optimizer": {"type": "Muon"}} | zero(2),
        {"optimizer": {"type": "Muon"}} | zero(3, reduce_scatter=False),
        {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "amsgrad": True, "capturable": True}}},
        {"optimizer": {"type": "SGD", "params": {"nesterov": True}}, "zero_allow_untested_optimizer": True},
        {"optimizer": {"type": "Lamb"}, "fp16": {"enabled": True}, "zero_allow_untested_optimizer": True},
        {"optimizer": {"type": "AdamW"}} | zero(2, offload_optimizer={"device": "cpu"}),
        {"optimizer": {"type": "Adagrad", "params": {"amsgrad": False}}} | zero(2, offload_optimizer={"device": "cpu"}),
    ],
)
def test_optimizers_that_are_right(config: dict[str, Any]) -> None:
    assert ids(BASE | config) == ["optimizer-in-file"]


def test_every_lint_says_what_it_is() -> None:
    found = lints(BASE | {"zero_optimisation": {"stage": 2}})
    assert found == (
        Lint(
            id="unknown-key",
            level="error",
            where="ds.json:1:100",
            what="zero_optimisation is no key of DeepSpeed 0.19.8; did you mean 'zero_optimization'?",
            consequence="DeepSpeed ignores it, silently",
            cure="write zero_optimization",
        ),
    )


def test_errors_come_first() -> None:
    levels = [lint.level for lint in lints({"steps_per_print": 1, "train_batch_size": 0})]
    assert levels == sorted(levels)
    assert set(levels) == {"error", "warning"}


# DeepSpeed: what depends on more than the file


@pytest.mark.parametrize(
    ("config", "world", "what", "cure"),
    [
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            4,
            "train_batch_size is 16, but 2 per process x 4 accumulated x 4 processes = 32",
            "set train_batch_size to 32, or gradient_accumulation_steps to 2",
        ),
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1},
            4,
            "train_batch_size is 16, but 3 per process x 1 accumulated x 4 processes = 12",
            "set train_batch_size to 12",
        ),
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
            None,
            "train_batch_size is 10, but 4 per process x 1 accumulated does not divide it",
            "set train_batch_size to a multiple of 4",
        ),
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": 1},
            4,
            "train_batch_size is 10, but 2 per process x 1 accumulated x 4 processes = 8",
            "set train_batch_size to a multiple of 4",
        ),
        (
            {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3, "sequence_parallel_size": 2},
            4,
            "train_batch_size is 12, but 3 per process x 1 accumulated x 2 processes = 6 "
            "(gradient_accumulation_steps is left out: Accelerate takes 1)",
            "set train_batch_size to 6, or gradient_accumulation_steps to 2",
        ),
    ],
)
def test_the_batch_is_multiplied_before_their_eyes(config: dict[str, Any], world: int, what: str, cure: str) -> None:
    lint = one(BASE | config, world_size=world)
    assert (lint.id, lint.what, lint.cure) == ("batch-identity", what, cure)


@pytest.mark.parametrize(
    "config",
    [
        {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3},
        {"train_batch_size": 12},
        {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": "auto"},
    ],
)
def test_a_batch_that_some_number_of_processes_makes_is_left_alone(config: dict[str, Any]) -> None:
    assert "batch-identity" not in ids(BASE | config)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto"}, True),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": None}, True),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}, False),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, False),
    ],
)
def test_a_fixed_batch_and_an_open_one_clash_where_a_model_is_built_sharded(config: Any, found: bool) -> None:
    assert ("batch-zero-init" in ids(BASE | zero(3) | config, world_size=4)) is found
    assert "batch-zero-init" not in ids(BASE | config, world_size=4)


def test_uneven_slots_are_refused_and_even_ones_are_not() -> None:
    lint = one(BASE | {"checkpoint": {"use_node_local_storage": True}}, slots=(8, 8, 4))
    assert (lint.id, lint.what, lint.cure) == (
        "uneven-slots",
        "the nodes have 8, 8, 4 slots",
        "give every node 4 slots",
    )
    assert ids(BASE | {"checkpoint": {"use_node_local_storage": True}}, slots=(8, 8)) == []


def test_checkpoints_of_several_nodes_want_node_local_storage_below_stage_3() -> None:
    assert ids(BASE, slots=(8, 8)) == ["node-local-checkpoints"]
    assert ids(BASE, slots=(8,)) == []
    assert ids(BASE | zero(3), slots=(8, 8)) == []


@pytest.mark.parametrize(
    ("path", "mounts", "said"),
    [
        ("/nvme/0", ("/nvme/0",), None),
        ("/nvme/0/", ("/nvme/0/",), None),
        ("/nvme/0/swap", ("/nvme/1", "/nvme/0"), None),
        ("/nvme/0", None, None),
        ("/nvme/00", ("/nvme/0",), "use a mounted path: /nvme/0"),
        ("/nvme/0/../../tmp", ("/nvme/0",), "use a mounted path: /nvme/0"),
        ("/local", ("/nvme/0", "/nvme/1"), "use a mounted path: /nvme/0, /nvme/1"),
        ("/local", (), "use a mounted path: the nodes have none (nvme: in the inventory)"),
    ],
)
def test_a_path_must_be_on_a_mount(path: str, mounts: tuple[str, ...] | None, said: str | None) -> None:
    config = BASE | zero(3, offload_param={"device": "nvme", "nvme_path": path})
    assert [lint.cure for lint in lints(config, nvme=mounts)] == ([said] if said else [])


@pytest.mark.parametrize(
    ("config", "lint"),
    [
        ({"fp16": {"enabled": True}}, "fp16-on-cpu"),
        ({"aio": {"use_gds": True}}, "gds-on-cpu"),
    ],
)
def test_what_needs_a_gpu_is_an_error_without_one(config: dict[str, Any], lint: str) -> None:
    assert ids(BASE | config, accelerator="cpu") == [lint]
    assert ids(BASE | config, accelerator="cuda") == []


def test_a_step_more_than_the_processes_is_no_whole_partition() -> None:
    assert ids(BASE | zero(3, zero_hpz_partition_size=3), world_size=8) == ["secondary-partition"]
    assert ids(BASE | zero(3, zero_hpz_partition_size=3)) == []


# DeepSpeed: what the command line fills in


def test_what_is_filled_in_is_not_missed() -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": "auto",
            "offload_param": {"device": "auto", "nvme_path": "auto"},
            "overlap_comm": "auto",
            "stage3_gather_16bit_weights_on_model_save": "auto",
        },
    }
    filled = frozenset(
        {
            *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
            *("bf16.enabled", "zero_optimization.stage", "zero_optimization.offload_param.device"),
            *("zero_optimization.offload_param.nvme_path", "zero_optimization.overlap_comm"),
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        }
    )
    assert lints(config, supplied=filled, world_size=4) == ()
    assert len(lints(config, world_size=4)) == 9


def test_what_is_left_out_and_filled_in_is_not_missed() -> None:
    filled = frozenset({"train_micro_batch_size_per_gpu", "zero_optimization.stage", "gradient_clipping"})
    assert lints({}, supplied=filled) == ()
    assert ids({}) == ["zero-missing", "batch-missing", "clipping-default"]


@pytest.mark.parametrize(
    ("config", "filled"),
    [
        (zero(3, offload_param={"device": "nvme"}), "zero_optimization.offload_param.nvme_path"),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {}}},
            "scheduler.params.total_num_steps",
        ),
        ({"optimizer": {"type": "SGD"}}, "zero_allow_untested_optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params.warmup_num_steps"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage3_gather_16bit_weights_on_model_save"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "zero_optimization.offload_optimizer.device",
        ),
        ({"data_types": {"param_dtype": "bf16"}}, "bf16.enabled"),
        ({"gradient_clipping": 1.0} | zero(2, compute_grad_norm=False), "gradient_clipping"),
        (zero(2, offload_optimizer={"device": "cpu"}), "optimizer.type"),
    ],
)
def test_each_of_these_is_missed_unless_it_is_filled_in(config: dict[str, Any], filled: str) -> None:
    unneeded = {"optimizer-in-file", "scheduler-in-file"}
    assert set(ids(BASE | config)) - unneeded != set()
    assert set(ids(BASE | config, supplied=frozenset({filled}))) - unneeded == set()


def test_a_stage_that_is_filled_in_is_not_judged_by_what_stood_there() -> None:
    config = BASE | zero(2, offload_param={"device": "cpu"}, stage3_max_live_parameters=1)
    assert "offload-param-below-stage-3" in ids(config)
    assert ids(config, supplied=frozenset({"zero_optimization.stage"})) == []


def test_options_are_named_where_they_said_it() -> None:
    config = read(json.dumps(BASE), name="ds.json").put(
        ("zero_optimization", "overlap_comm"), "yes", where="--set zero_optimization.overlap_comm=yes"
    )
    (lint,) = lint_deepspeed(config)
    assert (lint.id, lint.where) == ("wrong-value", "--set zero_optimization.overlap_comm=yes")


# DeepSpeed: odds and ends


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (zero(2, offload_optimizer={"device": "cpu"}), ["optimizer-replaced"]),
        (zero(2, offload_optimizer={"device": "cpu"}) | {"zero_force_ds_cpu_optimizer": False}, ["optimizer-slow"]),
        (
            zero(2, offload_optimizer={"device": "cpu"})
            | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
            ["optimizer-in-file", "optimizer-slow"],
        ),
        (
            zero(2, offload_optimizer={"device": "cpu"})
            | {"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": True},
            ["optimizer-in-file", "optimizer-slow"],
        ),
    ],
)
def test_where_an_offloaded_optimizer_comes_from(config: dict[str, Any], found: list[str]) -> None:
    assert ids(BASE | config) == found


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            {"gradient_clipping": 0} | zero(2, compute_grad_norm=False, zenflow={}),
            "compute_grad_norm is false, with ZenFlow",
        ),
        (
            {"gradient_clipping": 0, "optimizer": {"type": "AdamW"}}
            | zero(2, compute_grad_norm=False, offload_optimizer={"device": "cpu"}),
            "compute_grad_norm is false, with an offloaded optimizer",
        ),
        (
            {"gradient_allreduce_op": "sum", "compile": {"deepcompile": True}},
            'gradient_allreduce_op is "sum", with DeepCompile',
        ),
        ({"gradient_allreduce_op": "sum"} | zero(2, zenflow={}), 'gradient_allreduce_op is "sum", with ZenFlow'),
    ],
)
def test_what_does_not_go_together_is_named(config: dict[str, Any], what: str) -> None:
    assert [lint.what for lint in lints(BASE | config) if lint.level == "error"] == [what]


def test_a_norm_is_needed_where_deepspeed_clips_unasked() -> None:
    config = {key: value for key, value in BASE.items() if key != "gradient_clipping"}
    found = ids(config | zero(2, compute_grad_norm=False))
    assert found == ["grad-norm", "clipping-default"]


def test_old_names_say_what_they_are_called_now() -> None:
    found = lints(BASE | {"zero_optimization": {"stage": 3, "cpu_offload_param": False} | GATHER})
    assert [lint.cure for lint in found] == ['write "offload_param": {"device": "none"}']


def test_a_value_in_a_message_is_short_and_plain() -> None:
    found = lints(BASE | {"wall_clock_breakdown": "\x1b[31m" + "x" * 100, "dump_state": [], "memory_breakdown": {}})
    assert [lint.what for lint in found] == [
        r'wall_clock_breakdown is "\x1b[31m' + "x" * 54 + '…"',
        "dump_state is a list",
        "memory_breakdown is an object",
    ]
    assert "\x1b" not in lints(BASE | {"a\x1b[31m": 1})[0].what


@pytest.mark.parametrize(
    ("stage", "found"), [(2, True), (2.0, True), (True, False), ("2", False), ([], False), (None, True)]
)
def test_a_stage_that_is_none_is_told_once_and_judges_nothing(stage: object, found: bool) -> None:
    told = ids(BASE | {"zero_optimization": {"stage": stage, "offload_param": {"device": "cpu"}}})
    assert ("offload-param-below-stage-3" in told) is found
    assert ("wrong-value" in told) is (not found or stage is None)


def test_steps_per_print_may_be_anything_since_nobody_reads_it() -> None:
    assert ids(BASE | {"steps_per_print": "auto"}) == ["steps-per-print"]


# Any configuration at all


def outcome(text: str) -> tuple[Lint, ...] | InputError:
    """The lints, or the one error that there may be."""
    try:
        return lint_text(text, name="file", world_size=4)
    except InputError as refused:
        return refused


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(-2, 2),
    st.sampled_from(["auto", "cpu", "nvme", "x", ""]),
    st.just([]),
)
PATHS = [(*path, name) for path, section in dskeys.SECTIONS.items() for name in (*section.keys, "nonsense")]


@settings(max_examples=150, deadline=None)
@given(
    chosen=st.lists(st.tuples(st.sampled_from(PATHS), VALUES), max_size=8),
    world=st.none() | st.integers(1, 9),
    supplied=st.frozensets(st.sampled_from([".".join(path) for path in PATHS]), max_size=3),
)
def test_no_configuration_breaks_a_rule(chosen: Any, world: int | None, supplied: frozenset[str]) -> None:
    config = DsConfig(name="ds.json", data=BASE, places={})
    for path, value in chosen:
        config = config.put(path, value, where="--set")
    found = lint_deepspeed(
        config, world_size=world, slots=(world,) if world else None, accelerator="cpu", nvme=(), supplied=supplied
    )
    for lint in found:
        assert lint.id in KINDS
        assert "\n" not in lint.what + lint.consequence + lint.cure
        assert not re.search(r"\{\w+\}", lint.consequence + lint.cure)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), at=st.integers(0, 200))
def test_a_damaged_file_ends_in_lints_or_in_one_message(text: str, at: int) -> None:
    whole = json.dumps(BASE, indent=1)
    damaged = whole[:at] + text + whole[at + len(text) :]
    found = outcome(damaged)
    assert not isinstance(found, InputError) or str(found.where).startswith("file:")


# Accelerate

YAML = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
mixed_precision: bf16
num_machines: 2
num_processes: 8
machine_rank: 0
main_process_ip: 10.0.0.1
main_process_port: 29500
deepspeed_config:
  deepspeed_multinode_launcher: standard
  zero_stage: 2
  gradient_clipping: 1.0
"""


def changed(old: str = "", new: str = "") -> tuple[Lint, ...]:
    assert old in YAML
    return lint_accelerate(document.read(YAML.replace(old, new) if old else YAML + new, "a.yaml"))


def in_yaml(lint: Lint) -> tuple[str, str, str]:
    return lint.id, lint.where.removeprefix("a.yaml:"), lint.what


def test_a_right_yaml_gets_no_lint() -> None:
    assert changed() == ()


ONE = "num_machines: 2\n", "num_machines: 1\n"
CHANGES: dict[str, tuple[str, str, tuple[str, str, str]]] = {
    "an unknown key": (
        "num_machines",
        "num_machine",
        ("accelerate-unknown-key", "4:1", "num_machine is no key of an Accelerate file; did you mean 'num_machines'?"),
    ),
    "a flag": (
        "machine_rank: 0",
        "rdzv_conf: timeout=60",
        ("accelerate-unknown-key", "6:1", "rdzv_conf is no key of an Accelerate file"),
    ),
    "a key of the plugin at the top": (
        "machine_rank: 0",
        "zero_stage: 3",
        ("accelerate-unknown-key", "6:1", "zero_stage is no key of an Accelerate file"),
    ),
    "a key of nobody": (
        "machine_rank: 0",
        "xyzzy: 3",
        ("accelerate-unknown-key", "6:1", "xyzzy is no key of an Accelerate file"),
    ),
    "another meeting": (
        "machine_rank: 0",
        "rdzv_backend: c10d",
        ("accelerate-ignored-key", "6:1", 'rdzv_backend is "c10d"'),
    ),
    "the same network": (
        "machine_rank: 0",
        "same_network: true",
        ("accelerate-ignored-key", "6:1", "same_network is true"),
    ),
    "affinity": (
        "machine_rank: 0",
        "enable_cpu_affinity: true",
        ("accelerate-ignored-key", "6:1", "enable_cpu_affinity is true"),
    ),
    "downcast": (
        "machine_rank: 0",
        'downcast_bf16: "yes"',
        ("accelerate-ignored-key", "6:1", 'downcast_bf16 is "yes"'),
    ),
    "a cluster of TPUs": (
        "machine_rank: 0",
        "tpu_use_cluster: true",
        ("accelerate-ignored-key", "6:1", "tpu_use_cluster is true"),
    ),
    "sudo on TPUs": (
        "machine_rank: 0",
        "tpu_use_sudo: true",
        ("accelerate-ignored-key", "6:1", "tpu_use_sudo is true"),
    ),
    "no precision, unquoted": (
        "mixed_precision: bf16",
        "mixed_precision: false",
        ("precision-unquoted", "3:1", "mixed_precision is false"),
    ),
    "an unknown precision": (
        "mixed_precision: bf16",
        "mixed_precision: tf32",
        ("accelerate-value", "3:1", 'mixed_precision is "tf32"'),
    ),
    "processes as text": (
        "num_processes: 8",
        'num_processes: "8"',
        ("accelerate-value", "5:1", 'num_processes is "8"'),
    ),
    "a port as text": (
        "main_process_port: 29500",
        'main_process_port: "29500"',
        ("accelerate-value", "8:1", 'main_process_port is "29500"'),
    ),
    "a block as text": ("machine_rank: 0", "fsdp_config: x", ("accelerate-value", "6:1", 'fsdp_config is "x"')),
    "SageMaker": (
        "LOCAL_MACHINE",
        "AMAZON_SAGEMAKER",
        ("accelerate-value", "1:1", 'compute_environment is "AMAZON_SAGEMAKER"'),
    ),
    "no processes": ("num_processes: 8\n", "", ("no-processes", "1:1", "num_processes is missing")),
    "minus one process": ("num_processes: 8", "num_processes: -1", ("no-processes", "5:1", "num_processes is -1")),
    "uneven processes": (
        "num_processes: 8",
        "num_processes: 7",
        ("uneven-processes", "5:1", "7 processes on 2 machines"),
    ),
    "no address": (
        "main_process_ip: 10.0.0.1\n",
        "",
        ("no-master", "1:1", "2 machines, and no main_process_ip"),
    ),
    "no port": (
        "main_process_port: 29500\n",
        "",
        ("no-port", "1:1", "2 machines, and no main_process_port"),
    ),
    "any port": (
        "main_process_port: 29500",
        "main_process_port: 0",
        ("port-by-chance", "8:1", "2 machines, and main_process_port is 0"),
    ),
    "a rank too many": (
        "machine_rank: 0",
        "machine_rank: 2",
        ("machine-rank", "6:1", "machine_rank is 2 of 2 machines"),
    ),
    "no launcher": (
        "  deepspeed_multinode_launcher: standard\n",
        "",
        (
            "multinode-launcher",
            "9:1",
            '2 machines, and deepspeed_multinode_launcher is "pdsh", as it is left out',
        ),
    ),
    "another launcher": (
        "launcher: standard",
        "launcher: nossh",
        ("multinode-launcher", "10:3", '2 machines, and deepspeed_multinode_launcher is "nossh"'),
    ),
    "no DeepSpeed": (
        "distributed_type: DEEPSPEED",
        "distributed_type: MULTI_GPU",
        ("deepspeed-config-unused", "9:1", 'distributed_type is "MULTI_GPU"'),
    ),
    "a path for NVMe": (
        "",
        "  offload_param_nvme_path: /nvme/0\n",
        ("yaml-nvme-path", "13:3", 'offload_param_nvme_path is "/nvme/0"'),
    ),
    "an unknown stage": ("zero_stage: 2", "zero_stage: 4", ("accelerate-value", "11:3", "zero_stage is 4")),
    "an unknown device": (
        "",
        "  offload_optimizer_device: disk\n",
        ("accelerate-value", "13:3", 'offload_optimizer_device is "disk"'),
    ),
    "no accumulation": (
        "",
        "  gradient_accumulation_steps: 0\n",
        ("accelerate-value", "13:3", "gradient_accumulation_steps is 0"),
    ),
    "negative clipping": ("clipping: 1.0", "clipping: -1.0", ("accelerate-value", "12:3", "gradient_clipping is -1.0")),
    "a flag as text": ("", "  zero3_init_flag: on it\n", ("accelerate-value", "13:3", 'zero3_init_flag is "on it"')),
    "classes as a list": (
        "zero_stage: 2",
        "zero_stage: 3\n  zero3_save_16bit_model: true\n  deepspeed_moe_layer_cls_names: [Block]",
        ("accelerate-value", "13:3", "deepspeed_moe_layer_cls_names is a list"),
    ),
    "sharded building below stage 3": (
        "",
        "  zero3_init_flag: true\n",
        ("zero3-init-below-stage-3", "13:3", "zero3_init_flag at stage 2"),
    ),
    "gathering below stage 3": (
        "",
        "  zero3_save_16bit_model: true\n",
        ("stage-3-key", "13:3", "zero3_save_16bit_model at stage 2"),
    ),
    "leaf classes below stage 3": (
        "",
        "  deepspeed_moe_layer_cls_names: Block\n",
        ("moe-leaf-below-stage-3", "13:3", "deepspeed_moe_layer_cls_names at stage 2"),
    ),
    "no gathering": ("zero_stage: 2", "zero_stage: 3", ("no-gather", "9:1", "zero3_save_16bit_model is not true")),
    "no clipping": (
        "  gradient_clipping: 1.0\n",
        "",
        ("clipping-default", "9:1", "gradient_clipping is left out"),
    ),
    "open clipping": (
        "clipping: 1.0",
        "clipping: auto",
        ("clipping-default", "12:3", 'gradient_clipping is "auto"'),
    ),
    "clipping at zero": ("clipping: 1.0", "clipping: 0.0", ("plugin-clipping-zero", "12:3", "gradient_clipping is 0")),
    "a misspelt key of the plugin": (
        "",
        "  zero_stag: 2\n",
        (
            "plugin-unknown-key",
            "13:3",
            "zero_stag is no key of Accelerate's DeepSpeed plugin; did you mean 'zero_stage'?",
        ),
    ),
    "nobody's key in the plugin": (
        "",
        "  xyzzy: 2\n",
        ("plugin-unknown-key", "13:3", "xyzzy is no key of Accelerate's DeepSpeed plugin"),
    ),
    "DeepSpeed's key with a name of the plugin's": (
        "",
        "  stage3_gather_16bit_weights_on_model_save: true\n",
        (
            "plugin-file-key",
            "13:3",
            "stage3_gather_16bit_weights_on_model_save is no key of Accelerate's DeepSpeed plugin",
        ),
    ),
    "DeepSpeed's key": (
        "",
        "  overlap_comm: true\n",
        ("plugin-file-key", "13:3", "overlap_comm is no key of Accelerate's DeepSpeed plugin"),
    ),
    "parameters below stage 3": (
        "",
        "  offload_param_device: cpu\n",
        ("offload-param-below-stage-3", "13:3", "offload_param.device is 'cpu' at stage 2"),
    ),
    "an offloaded optimizer": (
        "",
        "  offload_optimizer_device: cpu\n",
        ("optimizer-replaced", "13:3", "the optimizer is offloaded, and not in the file"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_of_a_yaml_gets_one_lint(name: str) -> None:
    old, new, expected = CHANGES[name]
    assert [in_yaml(lint) for lint in changed(old, new)] == [expected]


def test_nvme_by_the_plugin_is_told_for_the_device_where_no_path_is_said() -> None:
    found = changed("zero_stage: 2", "zero_stage: 3\n  zero3_save_16bit_model: true\n  offload_param_device: nvme")
    assert [in_yaml(lint) for lint in found] == [
        ("yaml-nvme-path", "13:3", "offload_param_device is nvme, and nothing here can say where")
    ]
    assert "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH" in found[0].cure


def test_fp8_by_msamp_is_not_for_stage_3() -> None:
    at_3 = YAML.replace("zero_stage: 2", "zero_stage: 3\n  zero3_save_16bit_model: true").replace("bf16", "fp8")
    found = lint_text(at_3 + "fp8_config:\n  backend: MSAMP\n", name="a.yaml")
    assert [in_yaml(lint) for lint in found] == [("msamp-at-stage-3", "15:3", "fp8_config.backend is MSAMP")]
    assert lint_text(at_3 + "fp8_config:\n  backend: TE\n", name="a.yaml") == ()


def test_nvme_below_stage_3_is_told_as_in_a_file() -> None:
    found = {lint.id for lint in changed("", "  offload_optimizer_device: nvme\n")}
    assert found == {"yaml-nvme-path", "nvme-below-stage-3", "optimizer-replaced"}


FILE = YAML.replace("  zero_stage: 2\n  gradient_clipping: 1.0\n", "  deepspeed_config_file: ds.json\n")


def test_a_file_and_settings_beside_it_clash_one_by_one() -> None:
    text = FILE + "  zero_stage: 2\n  gradient_clipping: 1.0\n  zero3_init_flag: true\n"
    found = lint_accelerate(document.read(text, "a.yaml"))
    assert [(*in_yaml(lint), lint.cure) for lint in found] == [
        (
            "plugin-and-file",
            "12:3",
            "zero_stage beside deepspeed_config_file",
            "write zero_optimization.stage into the DeepSpeed file, and leave it out here",
        ),
        (
            "plugin-and-file",
            "13:3",
            "gradient_clipping beside deepspeed_config_file",
            "write gradient_clipping into the DeepSpeed file, and leave it out here",
        ),
        (
            "plugin-and-file",
            "3:1",
            'mixed_precision ("bf16") beside deepspeed_config_file',
            "write bf16.enabled into the DeepSpeed file, and leave it out here",
        ),
    ]


def test_a_file_alone_is_right() -> None:
    assert lint_accelerate(document.read(FILE.replace("mixed_precision: bf16\n", ""), "a.yaml")) == ()


def test_no_precision_beside_a_file_is_a_clash_too() -> None:
    text = FILE.replace("mixed_precision: bf16", 'mixed_precision: "no"')
    (lint,) = lint_accelerate(document.read(text, "a.yaml"))
    assert lint.cure == "write fp16.enabled and bf16.enabled into the DeepSpeed file, and leave it out here"


def test_one_machine_needs_no_meeting() -> None:
    text = "distributed_type: DEEPSPEED\nnum_processes: 3\ndeepspeed_config:\n  gradient_clipping: 1.0\n"
    assert lint_accelerate(document.read(text, "a.yaml")) == ()


def test_a_hostfile_is_for_another_launcher() -> None:
    found = lint_accelerate(document.read(YAML + "  deepspeed_hostfile: hosts\n", "a.yaml"))
    assert [in_yaml(lint) for lint in found] == [("launcher-keys-unused", "13:3", "deepspeed_hostfile, with torchrun")]


def test_fp16_in_a_yaml_needs_a_gpu() -> None:
    text = document.read(YAML.replace("bf16", "fp16"), "a.yaml")
    assert [lint.id for lint in lint_accelerate(text, accelerator="cpu")] == ["fp16-on-cpu"]
    assert lint_accelerate(text) == ()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("num_processes: 1\n", "distributed_type is missing"),
        ("num_processes: 1\ndistributed_type: [x]\n", "distributed_type is no text"),
    ],
)
def test_a_yaml_must_say_what_it_is_for(text: str, what: str) -> None:
    assert [lint.what for lint in lint_accelerate(document.read(text, "a.yaml"))] == [what]


def test_what_accelerate_config_writes_itself_is_hardly_told() -> None:
    """The keys that it always writes, at the values that are so anyway."""
    text = """\
downcast_bf16: "no"
enable_cpu_affinity: false
rdzv_backend: static
same_network: false
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
debug: false
main_training_function: main
"""
    assert lint_accelerate(document.read(YAML + text, "a.yaml")) == ()


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from(("", "  ")),
            st.sampled_from(
                ("zero_stage", "num_machines", "mixed_precision", "offload_param_device", "x", "gradient_clipping")
            ),
            st.sampled_from(("3", "cpu", "[]", "{}", "null", "1.5", "-1", '"no"')),
        ),
        max_size=5,
    )
)
def test_no_yaml_breaks_a_rule(lines: list[tuple[str, str, str]]) -> None:
    text = "distributed_type: DEEPSPEED\n" + "".join(f"{a}{b}: {c}\n" for a, b, c in lines if not a)
    text += "deepspeed_config:\n  zero3_init_flag: true\n" + "".join(f"{a}{b}: {c}\n" for a, b, c in lines if a)
    found = outcome(text)
    assert not isinstance(found, InputError) or "a second time" in found.what  # of the keys that were drawn twice


# Which of the two


@pytest.mark.parametrize(
    ("text", "of"),
    [
        ("{}", "zero-missing"),
        ('{"distributed_type": "NO", "num_machines": "x"}', "accelerate-value"),
        ('\n\n  {"compute_environment": "X", "distributed_type": "NO"}', "accelerate-value"),
        ("distributed_type: MULTI_GPU\nnum_machines: x\n", "accelerate-value"),
        ("# a comment\nnum_processes: 1\n", "accelerate-value"),
        ("x: 1\n", "accelerate-value"),
    ],
)
def test_what_stands_in_a_file_says_what_it_is(text: str, of: str) -> None:
    assert of in {lint.id for lint in lint_text(text, name="file")}


def test_words_are_what_accelerate_takes_them_for() -> None:
    (lint,) = lint_text(YAML.replace("bf16", "no"), name="a.yaml")
    assert in_yaml(lint) == ("precision-unquoted", "3:1", "mixed_precision is false")
    text = YAML + "  offload_optimizer_device: none\n  offload_param_device: none\n  zero3_init_flag: No\n"
    assert lint_text(text, name="a.yaml") == ()
    assert {word: yaml.safe_load(word) for word in PYYAML} == PYYAML

"""The facts on which the lints of a DeepSpeed configuration stand, asked of the libraries. One test per fact."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import dskeys
from launcher.dsconfig import DsConfig, read
from launcher.lints import lint_deepspeed

pytestmark = pytest.mark.oracle

MICRO = {"train_micro_batch_size_per_gpu": 1}


def errors(config: dict[str, Any], *, world_size: int | None = 1, accelerator: Any = "cpu") -> set[str]:
    lints = lint_deepspeed(read(json.dumps(config), name="ds.json"), world_size=world_size, accelerator=accelerator)
    return {lint.id for lint in lints if lint.level == "error"}


def warnings(config: dict[str, Any]) -> set[str]:
    lints = lint_deepspeed(read(json.dumps(config), name="ds.json"), world_size=1, accelerator="cpu")
    return {lint.id for lint in lints if lint.level == "warning"}


# What an engine says


def with_adam(**more: Any) -> dict[str, Any]:
    return {**MICRO, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_optimization": {}} | more


def with_optimizer(name: str, *, stage: int = 1, **params: Any) -> dict[str, Any]:
    return {**MICRO, "optimizer": {"type": name, "params": params}, "zero_optimization": {"stage": stage}}


def with_scheduler(name: str, **params: Any) -> dict[str, Any]:
    return with_adam(scheduler={"type": name, "params": params})


def with_bf16(stage: int, **bf16: Any) -> dict[str, Any]:
    return with_adam(bf16={"enabled": True} | bf16, zero_optimization={"stage": stage})


MASTER, STATES = "bf16_master_weights_and_grads", "bf16_optimizer_states"
# A configuration, what the engine says to it, and the lint that foretells it; None: neither has anything to say.
ENGINES: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "plain": (with_adam(), None, None),
    "SGD with ZeRO": (with_optimizer("SGD", lr=0.1), "You are using an untested ZeRO Optimizer", "optimizer-untested"),
    "SGD without ZeRO": (with_optimizer("SGD", stage=0, lr=0.1), None, None),
    "SGD allowed": (with_optimizer("SGD", lr=0.1) | {"zero_allow_untested_optimizer": True}, None, None),
    "Adagrad with ZeRO": (with_optimizer("Adagrad", stage=2), None, None),
    "1-bit Adam": (with_optimizer("OneBitAdam"), "is not a supported DeepSpeed Optimizer", "optimizer-unknown"),
    "1-bit Lamb": (with_optimizer("OneBitLamb"), "is not a supported DeepSpeed Optimizer", "optimizer-unknown"),
    "0/1 Adam": (with_optimizer("ZeroOneAdam"), "is not a supported DeepSpeed Optimizer", "optimizer-unknown"),
    "CPUAdam by name": (with_optimizer("CPUAdam"), "is not a supported DeepSpeed Optimizer", "optimizer-unknown"),
    "torch's in small letters": (with_optimizer("sgd"), "is not a supported DeepSpeed Optimizer", "optimizer-unknown"),
    "DeepSpeed's in any": (with_optimizer("aDaMw", torch_adam=True), None, None),
    "max_grad_norm": (
        with_optimizer("AdamW", torch_adam=True, max_grad_norm=1.0),
        "'max_grad_norm' is not supported as an optimizer parameter",
        "optimizer-param",
    ),
    "a parameter that is none": (
        with_optimizer("AdamW", torch_adam=True, freeze_step=1),
        "unexpected keyword argument 'freeze_step'",
        "optimizer-param",
    ),
    "amsgrad of torch": (with_optimizer("AdamW", torch_adam=True, amsgrad=True), None, None),
    "gradients in another precision": (
        with_adam(data_types={"grad_accum_dtype": "bf16"}),
        "unsupported mix of model_dtype",
        "accum-dtype-without-zero",
    ),
    "gradients in another precision with ZeRO": (
        with_adam(data_types={"grad_accum_dtype": "bf16"}, zero_optimization={"stage": 2}),
        None,
        None,
    ),
    "parameters in another precision": (
        with_adam(data_types={"param_dtype": "bf16"}),
        "conflicts with the enabled precision mode",
        "param-dtype",
    ),
    "a scheduler that is none": (
        with_scheduler("Nope"),
        "DeepSpeed does not recognize LR scheduler Nope",
        "scheduler-unknown",
    ),
    "torch's scheduler": (with_scheduler("StepLR", step_size=3), None, None),
    "a scheduler that misses one": (
        with_scheduler("WarmupDecayLR"),
        "missing 1 required positional argument: 'total_num_steps'",
        "scheduler-param",
    ),
    "a scheduler that does not take one": (
        with_scheduler("WarmupCosineLR", total_num_steps=3, warmup_min_lr=0),
        "unexpected keyword argument 'warmup_min_lr'",
        "scheduler-param",
    ),
    "a scheduler without params": (
        with_adam(scheduler={"type": "WarmupLR"}),
        "argument after ** must be a mapping, not NoneType",
        "scheduler-param",
    ),
    "no step of warm-up": (
        with_scheduler("WarmupLR", warmup_num_steps=0),
        "warmup_num_steps must be a positive integer",
        "scheduler-param",
    ),
    "steps of warm-up as a float": (
        with_scheduler("WarmupLR", warmup_num_steps=5.0),
        "warmup_num_steps must be a positive integer",
        "scheduler-param",
    ),
    "steps of warm-up": (with_scheduler("WarmupLR", warmup_num_steps=5), None, None),
    "legacy stage 1": (
        with_adam(zero_optimization={"stage": 1, "legacy_stage1": True}),
        "The deprecated version of ZeRO Stage 1 is not supported",
        "legacy-stage-1",
    ),
    "no norm, and clipping that nobody asked for": (
        with_adam(zero_optimization={"stage": 1, "compute_grad_norm": False}),
        "compute_grad_norm=false requires gradient_clipping=0",
        "grad-norm",
    ),
    "no norm, no clipping": (
        with_adam(zero_optimization={"stage": 1, "compute_grad_norm": False}, gradient_clipping=0),
        None,
        None,
    ),
    "predivided at stage 2": (
        with_adam(gradient_predivide_factor=2.0, zero_optimization={"stage": 2}),
        "gradient_predivide_factor != 1.0 is not yet supported with ZeRO-2 with reduce scatter enabled",
        "predivide",
    ),
    "predivided at stage 3": (
        with_adam(gradient_predivide_factor=2.0, zero_optimization={"stage": 3}),
        "gradient_predivide_factor != 1.0 is not yet supported with ZeRO-3 with reduce scatter enabled",
        "predivide",
    ),
    "predivided at stage 1": (with_adam(gradient_predivide_factor=2.0, zero_optimization={"stage": 1}), None, None),
    "predivided without reduce_scatter": (
        with_adam(gradient_predivide_factor=2.0, zero_optimization={"stage": 2, "reduce_scatter": False}),
        None,
        None,
    ),
    "prescaled at stage 2": (
        with_adam(prescale_gradients=True, zero_optimization={"stage": 2}),
        "pre-scale gradients is not yet supported with ZeRO-2 with reduce scatter enabled",
        "predivide",
    ),
    "master weights in bf16 on the GPU": (
        with_bf16(1, **{MASTER: True}),
        "Master weights feature requires ZeRO-1 Offload with DeepSpeedCPUAdam",
        "master-weights",
    ),
    "master weights and states in bf16": (with_bf16(1, **{MASTER: True, STATES: True}), None, None),
    "parameters offloaded at stage 2": (
        with_adam(zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}),
        None,
        "offload-param-below-stage-3",  # it passes, and does nothing
    ),
}


@pytest.fixture(scope="module")
def answers() -> dict[str, str | None]:
    """What DeepSpeed says to each of the configurations, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("engines.py")],
        input=json.dumps([config for config, _says, _lint in ENGINES.values()]),
        env={**os.environ, **alone, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    said: list[str | None] = json.loads(done.stderr.strip().splitlines()[-1])
    return dict(zip(ENGINES, said, strict=True))


@pytest.mark.parametrize("name", ENGINES)
def test_what_an_engine_says_is_foretold(answers: dict[str, str | None], name: str) -> None:
    config, says, lint = ENGINES[name]
    answer = answers[name]
    assert (says is None) is (answer is None), answer
    assert says is None or says in str(answer)
    assert errors(config) == ({lint} if lint else set())


@pytest.mark.parametrize(
    ("section", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")]
)
def test_a_monitor_without_its_package_is_an_import_error(section: str, package: str) -> None:
    from deepspeed.monitor import utils

    assert f"import {package}" in inspect.getsource(utils)
    assert "monitor-package" in warnings(with_adam(**{section: {"enabled": True}}))
    pins = (Path(__file__).parents[2] / "docker" / "requirements.txt").read_text()
    assert package not in pins


def test_fp16_is_refused_on_most_processors() -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine._do_sanity_check)
    assert 'raise ValueError("Type fp16 is not supported on your device.")' in source
    assert "_is_mkldnn_fp16_supported" in inspect.getsource(type(get_accelerator()).is_fp16_supported)


# What its configuration says


def parse(config: dict[str, Any]) -> Any:
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(json.loads(json.dumps(config)))


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "both precisions": (
        with_adam(fp16={"enabled": True}, bf16={"enabled": True}),
        "bfloat16 and fp16 modes cannot be simultaneously enabled",
        "fp16-and-bf16",
    ),
    "a ratio below stage 3": (
        with_adam(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
        "Partial offloading only supported for ZeRO Stage 3",
        "offload-ratio",
    ),
    "sum at stage 3": (
        with_adam(gradient_allreduce_op="sum", zero_optimization={"stage": 3}),
        "gradient_allreduce_op='sum' is not supported with ZeRO stage 3",
        "sum-gradients",
    ),
    "sum with ZenFlow": (
        with_adam(gradient_allreduce_op="sum", zero_optimization={"stage": 2, "zenflow": {}}),
        "gradient_allreduce_op='sum' is not supported with ZenFlow",
        "sum-gradients",
    ),
    "sum with DeepCompile": (
        with_adam(gradient_allreduce_op="sum", compile={"deepcompile": True}),
        "gradient_allreduce_op='sum' is not supported with DeepCompile",
        "sum-gradients",
    ),
    "no norm at stage 3": (
        with_adam(gradient_clipping=0, zero_optimization={"stage": 3, "compute_grad_norm": False}),
        "compute_grad_norm=false is supported only with ZeRO Stage 1 or 2",
        "grad-norm",
    ),
    "master weights in fp16 without ZeRO": (
        with_adam(fp16={"fp16_master_weights_and_grads": True}),
        "Fp16_master_weights_and_grads is only supported with ZeRO Stage 1, 2, or 3",
        "master-weights",
    ),
    "states in bf16 alone": (
        with_adam(bf16={"bf16_optimizer_states": True}, zero_optimization={"stage": 1}),
        "bf16_optimizer_states requires bf16_master_weights_and_grads",
        "master-weights",
    ),
    "an old name beside the new one": (
        with_adam(zero_optimization={"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "none"}}),
        "Cannot provide deprecated parameter 'cpu_offload' and replacing parameter 'offload_optimizer' together",
        "both-names",
    ),
    "elasticity": (with_adam(elasticity={}), "Elastic training has been removed", "removed-key"),
    "batches that do not multiply": (
        with_adam(train_batch_size=7, gradient_accumulation_steps=2),
        "train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size 7 != 1 * 2 * 1",
        "batch-identity",
    ),
    "no batch at all": (
        {"zero_optimization": {}, "gradient_accumulation_steps": 2},
        "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided",
        "batch-missing",
    ),
    "storage that needs a GPU": (
        with_adam(aio={"use_gds": True}),
        "GDS currently only supported for CUDA accelerator",
        "gds-on-cpu",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_configuration_is_refused_for_is_foretold(name: str) -> None:
    config, says, lint = REFUSED[name]
    with pytest.raises(Exception) as refused:  # noqa: PT011 - assertions, and errors of its own
        parse(config)
    assert says in str(refused.value)
    assert lint in errors(config)


def test_gradients_are_clipped_where_nobody_says_so() -> None:
    assert parse(MICRO).gradient_clipping == 1.0
    assert "clipping-default" in warnings(with_adam())


def test_the_plugin_drops_a_clipping_of_zero_so_that_deepspeed_clips_at_one() -> None:
    from accelerate import DeepSpeedPlugin

    config = DeepSpeedPlugin(zero_stage=2, gradient_clipping=0.0).deepspeed_config
    assert "gradient_clipping" not in config
    assert parse(MICRO | {"zero_optimization": {"stage": 2}}).gradient_clipping == 1.0


@pytest.mark.parametrize("key", ["cpu_offload", "cpu_offload_param", "stage3_gather_fp16_weights_on_model_save"])
def test_an_old_name_is_still_taken(key: str) -> None:
    zero = parse(MICRO | {"zero_optimization": {"stage": 3, key: True}}).zero_config
    new = dskeys.SECTIONS[("zero_optimization",)].keys[key].instead
    assert getattr(zero, str(new))
    assert "deprecated-key" in warnings(with_adam(zero_optimization={"stage": 3, key: True}))


def test_the_engine_reads_the_aio_block_and_never_thread_count() -> None:
    from deepspeed.runtime.swap_tensor import constants

    names = {value for name, value in vars(constants).items() if name.startswith("AIO_") and isinstance(value, str)}
    assert "thread_count" not in names
    assert errors(with_adam(aio={"thread_count": 8})) == {"aio-thread-count"}


def test_below_stage_3_any_device_means_the_cpu() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(DeepSpeedZeroOptimizer.__init__)
    assert "offload_optimizer_config.device != OffloadDeviceEnum.none" in source
    assert "OffloadDeviceEnum.nvme" not in source


def test_a_cpu_optimizer_is_made_at_stage_0_too() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "stage" not in inspect.getsource(DeepSpeedEngine.zero_use_cpu_optimizer)
    assert "must be 'cpu'" in inspect.getsource(DeepSpeedCPUAdam.step)


def test_lamb_has_no_optimizer_for_the_cpu_and_wants_a_dynamic_scale() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    made = inspect.getsource(DeepSpeedEngine._configure_basic_optimizer)
    lamb = made.partition("LAMB_OPTIMIZER:")[2].partition("elif")[0]
    assert "FusedLamb" in lamb
    assert "zero_use_cpu_optimizer" not in lamb
    assert "optimizer requires dynamic loss scaling" in inspect.getsource(DeepSpeedEngine._do_sanity_check)


def test_muon_and_reduce_scatter_are_refused_at_stage_3() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3.__init__)
    assert 'raise ValueError("Muon and reduce scatter cannot be used together")' in source


def test_deepspeeds_own_adam_and_lamb_have_no_amsgrad() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb

    for kind in (DeepSpeedCPUAdam, FusedAdam, FusedLamb):
        assert "does not support the AMSGrad variant" in inspect.getsource(kind)


def test_autotuning_ends_the_job() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "_autotuning_exit" in inspect.getsource(DeepSpeedEngine)
    assert "exit()" in inspect.getsource(DeepSpeedEngine._autotuning_exit)


def test_the_secondary_partition_must_divide_the_processes() -> None:
    from deepspeed.utils import groups

    source = inspect.getsource(groups._create_zero_param_parallel_group)
    assert "zero_param_parallel_size_ = min(group_size, world_size)" in source
    assert "_ensure_divisibility(world_size, zero_param_parallel_size_)" in source


def test_without_node_local_storage_the_first_process_alone_writes_the_model() -> None:
    from deepspeed.runtime.checkpoint_engine import checkpoint_engine
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine._configure_checkpointing)
    assert "rank = self.local_rank if self.use_node_local_storage() else dp_rank" in source
    assert "dp_rank == 0" in inspect.getsource(checkpoint_engine.CheckpointEngine.is_data_parallel_writer)


def test_elastic_checkpoints_are_ignored_at_stage_3() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert "no longer supported" in inspect.getsource(DeepSpeedZeroConfig.elastic_checkpoint_deprecated)


# What Accelerate makes of it


def plugin(**config: Any) -> Any:
    from accelerate import DeepSpeedPlugin

    return DeepSpeedPlugin(hf_ds_config=config)


def test_a_file_without_zero_optimization_is_refused() -> None:
    with pytest.raises(ValueError, match="Please specify the ZeRO optimization config"):
        plugin(**MICRO)
    assert errors(MICRO) == {"zero-missing"}


def test_accelerate_accumulates_once_where_the_file_does_not_say() -> None:
    assert plugin(**MICRO, zero_optimization={}).deepspeed_config["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    "key", ["pipeline.stages", "data_types.keep_in_fp32_modules", "zero_optimization.sub_group_size"]
)
def test_an_auto_that_nobody_fills_is_refused_in_prepare_even_where_it_is_the_default(key: str) -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3}} | MICRO
    section, name = key.split(".")
    config.setdefault(section, {})[name] = "auto"
    with pytest.raises(ValueError, match=f"`{key}` not found in kwargs"):
        plugin(**config).deepspeed_config_process(must_match=False)
    assert "auto-unfilled" in errors(config)


def test_a_block_of_auto_breaks_accelerate() -> None:
    with pytest.raises(AttributeError, match="'str' object has no attribute 'get'"):
        plugin(zero_optimization={"stage": 3, "offload_optimizer": "auto"}, **MICRO)
    assert "wrong-value" in errors({"zero_optimization": {"offload_optimizer": "auto"}} | MICRO)


def test_the_old_block_bfloat16_loses_against_the_one_that_accelerate_adds() -> None:
    made = plugin(zero_optimization={}, bfloat16={"enabled": True})
    made.set_mixed_precision("no")
    assert made.deepspeed_config["bf16"] == {"enabled": False}
    assert parse(MICRO | made.deepspeed_config | {"steps_per_print": 1}).bfloat16_config.enabled is False


def test_accelerate_sets_steps_per_print_itself() -> None:
    made = plugin(zero_optimization={}, steps_per_print=10)
    assert made.deepspeed_config["steps_per_print"] == float("inf")


@pytest.mark.parametrize("micro", [None, "auto"])
def test_a_fixed_batch_beside_an_open_one_breaks_sharded_building(micro: object) -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3}, "train_batch_size": 8}
    config |= {} if micro is None else {"train_micro_batch_size_per_gpu": micro}
    made = plugin(**config)
    made.set_deepspeed_weakref()
    with pytest.raises(AssertionError, match="8 != 1 \\* 1 \\* 1"):
        parse({**made.dschf.config, "steps_per_print": 1})
    assert "batch-zero-init" in warnings(config)


def test_an_optimizer_in_both_places_is_refused_and_so_is_a_scheduler() -> None:
    from accelerate import Accelerator

    source = inspect.getsource(Accelerator._prepare_deepspeed)
    assert "You cannot specify an optimizer in the config file and in the code at the same time" in source
    assert "You cannot specify a scheduler in the config file and in the code at the same time" in source


def test_an_offloaded_optimizer_of_the_script_is_replaced() -> None:
    from accelerate import Accelerator
    from accelerate.utils import deepspeed

    prepare = inspect.getsource(Accelerator._prepare_deepspeed)
    assert 'self.deepspeed_config.get("zero_force_ds_cpu_optimizer", True)' in prepare
    assert "optimizer = map_pytorch_optim_to_deepspeed(optimizer)" in prepare
    assert "optimizer_class = DeepSpeedCPUAdam" in inspect.getsource(deepspeed.map_pytorch_optim_to_deepspeed)


def test_without_gathering_no_weights_can_be_had_at_stage_3() -> None:
    from accelerate import Accelerator

    assert "Cannot get 16bit model weights because" in inspect.getsource(Accelerator.get_state_dict)


def test_the_trainer_and_accelerate_need_a_hidden_size() -> None:
    from accelerate import Accelerator

    source = inspect.getsource(Accelerator._prepare_deepspeed)
    assert "Can't find `model.config` entry" in source
    assert "Can find neither `model.config.hidden_size` nor `model.config.hidden_sizes`" in source


def test_an_open_micro_batch_needs_a_dataloader() -> None:
    from accelerate import Accelerator

    source = inspect.getsource(Accelerator._prepare_deepspeed)
    assert "requires you to pass at least one of training or evaluation dataloaders" in source


# What is refused there must be an error here, whatever the configuration

VALUES = st.one_of(
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([0.0, 0.5, 1.0, 1.5, 5e8, 2**40]),
    st.sampled_from(["cpu", "nvme", "none", "sum", "fp16", "bf16", "AdamW", "warn", "true", "x", ""]),
    st.just([]),
    st.just({}),
    st.none(),
)
PATHS = [
    (*path, name)
    for path, section in dskeys.SECTIONS.items()
    for name in section.keys
    if path[:1] not in (("optimizer",), ("scheduler",), ("datastates_ckpt",), ("msamp",))
    if (*path, name) not in (("sequence_parallel_size",), ("data_parallel_size",))
]
SETTINGS = st.lists(st.tuples(st.sampled_from(PATHS), VALUES), max_size=4)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(stage=st.integers(0, 3), chosen=SETTINGS)
def test_what_deepspeed_refuses_is_never_passed(stage: int, chosen: list[tuple[tuple[str, ...], Any]]) -> None:
    config = DsConfig(name="ds.json", data={**MICRO, "zero_optimization": {"stage": stage}}, places={})
    for path, value in chosen:
        config = config.put(path, value, where="--set")
    try:
        parse(dict(config.data))
    except Exception:  # noqa: BLE001 - whatever it is, the user would have met it
        assert errors(dict(config.data)) != set()

"""From one kind of configuration to the other and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.document import read
from launcher import dsconfig, zero
from launcher.convert import (
    accelerate_template,
    is_accelerate,
    settings_of_accelerate,
    settings_of_file,
    unsaid_by_file,
    unsaid_by_plugin,
)
from launcher.errors import PlanError
from launcher.job import Job, Settings

PLUGIN = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
mixed_precision: bf16
num_machines: 2
fsdp_config: {}
deepspeed_config:
  zero_stage: 3
  gradient_accumulation_steps: 4
  gradient_clipping: 1.0
  offload_optimizer_device: nvme
  offload_optimizer_nvme_path: /nvme
  offload_param_device: cpu
  zero3_init_flag: true
  zero3_save_16bit_model: true
  deepspeed_moe_layer_cls_names: MixtralSparseMoeBlock, Other
  deepspeed_hostfile: hosts
"""


def of_file(config: dict[str, Any]) -> Settings:
    return settings_of_file(dsconfig.read(json.dumps(config), name="ds.json"))


def test_an_accelerate_yaml_is_settings_and_what_is_none() -> None:
    assert settings_of_accelerate(read(PLUGIN, "a.yaml")) == (
        Settings(
            stage=3,
            offload_optimizer="nvme",
            offload_param="cpu",
            precision="bf16",
            accumulation=4,
            clipping=1.0,
            zero3_init=True,
            gather_16bit=True,
            moe_leaf=("MixtralSparseMoeBlock", "Other"),
            overrides=(("zero_optimization.offload_optimizer.nvme_path", "/nvme"),),
        ),
        ("fsdp_config", "deepspeed_config.deepspeed_hostfile"),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: lab", "a.yaml:1:1: this is no Accelerate configuration"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: 3", "a.yaml:2:1: deepspeed_config must be a mapping"),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: z.json",
            "a.yaml:3:3: the settings stand in a DeepSpeed file",
        ),
        ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 4", "a.yaml:3:3: zero_stage cannot be 4"),
        ("distributed_type: DEEPSPEED\nmixed_precision: false", "a.yaml:2:1: mixed_precision cannot be false"),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero3_init_flag: maybe",
            'a.yaml:3:3: zero3_init_flag cannot be "maybe"',
        ),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  gradient_clipping: much",
            'a.yaml:3:3: gradient_clipping cannot be "much"',
        ),
    ],
)
def test_what_cannot_be_a_setting_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(PlanError) as refused:
        settings_of_accelerate(read(text, "a.yaml"))
    assert str(refused.value).splitlines()[0] == said


def test_only_a_mapping_with_accelerates_keys_is_its_configuration() -> None:
    assert is_accelerate(read(PLUGIN, "a.yaml"))
    assert not is_accelerate(read("- a", "a.yaml"))
    assert not is_accelerate(read("name: lab", "a.yaml"))


def test_a_deepspeed_file_is_settings_and_nothing_of_it_is_lost() -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
        "fp16": {"enabled": True, "auto_cast": True, "initial_scale_power": 12},
        "bf16": {"enabled": False},
        "aio": {"queue_depth": 4},
        "flops_profiler": {},
    }
    assert of_file(config) == Settings(
        stage=2,
        offload_optimizer="cpu",
        precision="fp16",
        micro_batch=2,
        optimizer="AdamW",
        aio=(("queue_depth", 4),),
        overrides=(
            ("zero_optimization.offload_optimizer.pin_memory", True),
            ("optimizer.params.betas", [0.9, 0.95]),
            ("fp16.initial_scale_power", 12),
            ("flops_profiler", {}),
        ),
    )


SETTINGS = st.builds(
    Settings,
    stage=st.sampled_from([1, 2, 3]),
    offload_optimizer=st.sampled_from(["none", "cpu"]),
    precision=st.sampled_from([None, "fp16", "bf16"]),
    accumulation=st.integers(1, 64),
    clipping=st.sampled_from([None, 0.5, 1.0]),
    micro_batch=st.none() | st.integers(1, 64),
    scheduler=st.sampled_from([None, *zero.SCHEDULERS]),
    optimizer=st.sampled_from([None, "AdamW", "Lion"]),
    reduce_bucket_size=st.none() | st.integers(1, 10**9),
    overlap_comm=st.none() | st.booleans(),
    aio=st.sampled_from([(), (("queue_depth", 4),)]),
    overrides=st.sampled_from([(), (("zero_optimization.round_robin_gradients", True),)]),
)


@given(SETTINGS)
def test_a_file_made_of_settings_gives_the_same_file_again(settings: Settings) -> None:
    made = zero.deepspeed_config(Job(script="", settings=settings))
    assert zero.deepspeed_config(Job(script="", settings=of_file(made))) == made


@given(SETTINGS)
def test_plugin_settings_give_the_same_plugin_settings_again(settings: Settings) -> None:
    made = accelerate_template(settings)
    again, left = settings_of_accelerate(read(json.dumps(made), "a.yaml"))
    plain = Settings(**{**again.given(), "way": settings.way})
    assert left == ()
    assert zero.plugin_settings(plain) == zero.plugin_settings(settings)


def test_what_one_way_cannot_say_of_the_other_is_named() -> None:
    settings = Settings(
        stage=3,
        precision="fp8",
        zero3_init=False,
        moe_leaf=("A", "B"),
        micro_batch=2,
        aio=(("queue_depth", 4),),
        overrides=(("optimizer.params.eps", 1e-6),),
    )
    assert unsaid_by_file(settings) == (
        "zero3_init_flag=False",
        "deepspeed_moe_layer_cls_names=A,B",
        "mixed_precision=fp8",
    )
    assert unsaid_by_plugin(settings) == (
        "train_micro_batch_size_per_gpu=2",
        "aio.queue_depth=4",
        "optimizer.params.eps=1e-06",
    )
    assert unsaid_by_file(Settings(stage=2)) == unsaid_by_plugin(Settings(stage=2)) == ()


def test_a_template_is_plain_by_plugin_or_names_a_file() -> None:
    plain = accelerate_template(Settings(precision="bf16"))
    assert (plain["distributed_type"], plain["mixed_precision"]) == ("MULTI_GPU", "bf16")
    assert "deepspeed_config" not in plain
    named = accelerate_template(Settings(stage=3, precision="bf16"), file="z.json")
    assert "mixed_precision" not in named
    assert named["deepspeed_config"] == {
        "deepspeed_multinode_launcher": "standard",
        "zero3_init_flag": True,
        "deepspeed_config_file": "z.json",
    }

"""Settings: what both ways tell DeepSpeed, and what cannot be meant."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from cluster.errors import InputError
from launcher.errors import PlanError
from launcher.job import Job, Settings
from launcher.zero import (
    OPTIMIZERS,
    SCHEDULERS,
    UNREACHED,
    Accelerator,
    check,
    deepspeed_config,
    effective,
    file_for_node,
    file_settings,
    leaves_nvme_open,
    needs_nvme,
    plugin_settings,
    settled,
    way_of,
)

BATCH = {"train_micro_batch_size_per_gpu": 1}


def with_file(settings: Settings | None = None, /, **config: Any) -> Job:
    text = json.dumps({**config, **BATCH}, indent=1)
    return Job(script="train.py", config=text, config_name="ds.json", settings=settings or Settings())


def plain(**settings: Any) -> Job:
    return Job(script="train.py", settings=Settings(**settings))


def refusal(job: Job, *, accelerator: Accelerator = "cuda") -> list[str]:
    with pytest.raises(InputError) as refused:
        check(job, accelerator=accelerator)
    assert refused.value.exit_code == 2
    return str(refused.value).splitlines()


CASES = {
    "stage": (plain(stage=4), "--stage: there is no ZeRO stage 4", "  next: choose 0, 1, 2, 3 or auto"),
    "accumulation": (plain(stage=1, accumulation=0), "--accumulation: 0 is not possible", "  next: 1 or more"),
    "a bucket of nothing": (
        plain(stage=1, reduce_bucket_size=-5),
        "--reduce-bucket-size: -5 is not possible",
        "  next: 1 or more",
    ),
    "clipping below zero": (
        plain(stage=1, clipping=-0.5),
        "--clipping: -0.5 is not possible",
        "  next: a number, 0 or more",
    ),
    "clipping at no number": (
        plain(stage=1, clipping=float("nan")),
        "--clipping: nan is not possible",
        "  next: a number, 0 or more",
    ),
    "a rate without end": (
        plain(stage=1, optimizer="AdamW", learning_rate=float("inf")),
        "--learning-rate: inf is not possible",
        "  next: a number, 0 or more",
    ),
    "clipping that nobody would do": (
        plain(clipping=1.0),
        "--clipping: clipping from outside needs ZeRO: plain training would ignore it",
        "  next: add --stage 1, 2 or 3, or clip in the script (accelerator.clip_grad_norm_)",
    ),
    "offload without ZeRO": (
        plain(offload_optimizer="cpu"),
        "--offload-optimizer: offloading needs ZeRO",
        "  next: add --stage, or leave --offload-optimizer out",
    ),
    "NVMe below stage 3": (
        plain(stage=2, offload_optimizer="nvme"),
        "--offload-optimizer: offload_optimizer.device is 'nvme' at stage 2 [nvme-below-stage-3]",
        "  if left: DeepSpeed keeps the optimizer's states in the host's memory, as if the device were cpu",
        "  next: set the stage to 3, or the device to cpu",
    ),
    "parameters below stage 3": (
        plain(stage=2, offload_param="cpu"),
        "--offload-param: offload_param.device is 'cpu' at stage 2 [offload-param-below-stage-3]",
        "  if left: DeepSpeed ignores it: the parameters stay in the GPU's memory",
        "  next: set the stage to 3, or the device to none",
    ),
    "prefetching below stage 3": (
        plain(stage=2, prefetch_bucket_size=10),
        "--prefetch-bucket-size: this has an effect from ZeRO stage 3 on, not at stage 2",
        "  next: add --stage 3, or leave --prefetch-bucket-size out",
    ),
    "buckets without ZeRO": (
        plain(overlap_comm=True),
        "--overlap-comm: this has an effect from ZeRO stage 1 on, not at stage 0",
        "  next: add --stage 1, or leave --overlap-comm out",
    ),
    "a setting that the plugin cannot say": (
        plain(stage=2, way="plugin", reduce_bucket_size=10),
        "--reduce-bucket-size: the plugin way has no word for this",
        "  next: leave --way plugin out: a DeepSpeed file is made",
    ),
    "a file by the plugin way": (
        with_file(Settings(way="plugin"), zero_optimization={}),
        "--way: a DeepSpeed file and the plugin way exclude each other",
        "  next: leave --way plugin or the file out",
    ),
    "fp8 by a file": (
        plain(stage=2, way="file", precision="fp8"),
        "--precision: a DeepSpeed file has no word for fp8",
        "  next: leave out what needs a file, or train in bf16",
    ),
    "fp8 beside a file": (
        with_file(Settings(precision="fp8"), zero_optimization={}),
        "--precision: a DeepSpeed file has no word for fp8",
        "  next: leave out what needs a file, or train in bf16",
    ),
    "a rate for nobody": (
        plain(stage=2, learning_rate=0.1),
        "--learning-rate: this is said to DeepSpeed's optimizer, and none is chosen",
        "  next: add --optimizer AdamW",
    ),
    "a removed optimizer": (
        plain(stage=1, optimizer="OneBitAdam"),
        "--optimizer: DeepSpeed has removed OneBitAdam",
        "  next: use AdamW, Lamb or Lion",
    ),
    "a misspelt optimizer": (
        plain(stage=1, optimizer="adamw"),
        "--optimizer: DeepSpeed has no optimizer 'adamw'; did you mean AdamW?",
        f"  next: one of: {', '.join(OPTIMIZERS)}",
    ),
    "an unknown scheduler": (
        plain(stage=1, scheduler="Zigzag"),
        "--scheduler: DeepSpeed has no scheduler 'Zigzag'",
        f"  next: one of: {', '.join(SCHEDULERS)}",
    ),
    "a CPU optimizer on the GPU": (
        plain(stage=2, optimizer="CPUAdam"),
        "--optimizer: CPUAdam is for an optimizer on the CPU",
        "  next: add --offload-optimizer cpu, or use FusedAdam",
    ),
    "a GPU optimizer on the CPU": (
        plain(stage=2, optimizer="FusedAdam", offload_optimizer="cpu"),
        "--optimizer: FusedAdam is for an optimizer on the GPU, and it is offloaded",
        "  next: use CPUAdam",
    ),
    "a setting against the file": (
        with_file(Settings(stage=2), zero_optimization={"stage": 3}),
        "ds.json:3:3: the file says 3 for zero_optimization.stage, and --stage says 2",
        '  next: leave one of them out, write "auto" into the file, or insist: --set zero_optimization.stage=2',
    ),
    "a precision against the file": (
        with_file(Settings(precision="no"), zero_optimization={}, bf16={"enabled": True}),
        "ds.json:4:3: the file says true for bf16.enabled, and --precision says false",
        '  next: leave one of them out, write "auto" into the file, or insist: --set bf16.enabled=false',
    ),
    "a file without ZeRO": (
        with_file(train_batch_size=8),
        "ds.json:1:1: zero_optimization is missing [zero-missing]",
        "  if left: Accelerate refuses the file: "
        '"Please specify the ZeRO optimization config in the DeepSpeed config."',
        '  next: add "zero_optimization": {"stage": …}; stage 0 is plain training',
    ),
    "a file with a comment": (
        Job(script="train.py", config='{\n  "a": 1 // one\n}', config_name="ds.json"),
        "ds.json:2:10: not a DeepSpeed JSON: a comment",
        "  next: remove it; Accelerate takes strict JSON: double quotes, no comments, no comma after the last item",
    ),
}


@pytest.mark.parametrize(("job", "lines"), [(job, list(lines)) for job, *lines in CASES.values()], ids=list(CASES))
def test_what_cannot_be_meant_is_refused_by_name(job: Job, lines: list[str]) -> None:
    assert refusal(job) == lines


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_that_needs_a_gpu_is_refused_on_cpu(precision: Any) -> None:
    job = plain(precision=precision)
    said = [f"--precision: {precision} needs a GPU", "  next: on CPU use --precision bf16, or no"]
    assert refusal(job, accelerator="cpu") == said
    check(job, accelerator="cuda")


@pytest.mark.parametrize(
    "job",
    [
        Job(script="train\udcff.py"),
        Job(script="train.py", args=("--name", "\udcff")),
        Job(script="train.py", args=("a\0b",)),
        Job(script="train.py", env=(("A", "\udcff"),)),
    ],
)
def test_words_that_would_not_arrive_as_they_are_are_refused(job: Job) -> None:
    with pytest.raises(InputError, match=r"is not UTF-8|holds a NUL byte"):
        check(job, accelerator="cuda")


@pytest.mark.parametrize(
    "job",
    [
        plain(),
        plain(accumulation=4, micro_batch=2),
        plain(stage="auto"),
        plain(stage=1, clipping=0.0),
        plain(stage=2, offload_optimizer="cpu", optimizer="CPUAdam", clipping=1.0, accumulation=8),
        plain(stage=3, offload_optimizer="nvme", offload_param="nvme"),
        plain(stage=3, way="plugin", moe_leaf=("Experts",)),
        with_file(zero_optimization={"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}),
        with_file(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}),
        with_file(Settings(stage=3, precision="bf16"), zero_optimization={"stage": "auto"}),
        with_file(Settings(stage=3), zero_optimization={"stage": 3}),
    ],
)
def test_what_can_be_meant_passes(job: Job) -> None:
    check(job, accelerator="cuda")


def test_plain_training_uses_no_deepspeed_unless_a_setting_needs_it() -> None:
    assert [way_of(plain(stage=stage)) for stage in range(4)] == ["plain", "plugin", "plugin", "plugin"]
    assert way_of(plain(micro_batch=4)) == "plain"
    assert way_of(plain(stage=0, way="plugin")) == "plugin"
    assert [way_of(plain(way="file")), way_of(plain(optimizer="Lamb"))] == ["file", "file"]
    assert [way_of(plain(stage=2, micro_batch=4)), way_of(with_file())] == ["file", "file"]


def test_the_plugin_says_everything_and_never_a_nvme_path() -> None:
    settings = Settings(
        stage=3, offload_optimizer="nvme", offload_param="cpu", accumulation=4, clipping=1.0, moe_leaf=("A", "B")
    )
    assert plugin_settings(settings) == {
        "deepspeed_multinode_launcher": "standard",
        "zero_stage": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": "nvme",
        "offload_param_device": "cpu",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
        "deepspeed_moe_layer_cls_names": "A,B",
    }


def test_no_clipping_is_said_as_a_norm_that_is_never_reached() -> None:
    stages = (Settings(stage=1), Settings(stage=2), Settings(stage=3))
    assert [plugin_settings(settings)["gradient_clipping"] for settings in stages] == [UNREACHED] * 3


def test_what_belongs_to_stage_three_can_be_said_otherwise() -> None:
    below = plugin_settings(Settings(stage=2))
    assert (below["zero3_init_flag"], below["zero3_save_16bit_model"]) == (False, False)
    said = plugin_settings(Settings(stage=3, zero3_init=False, gather_16bit=False))
    assert (said["zero3_init_flag"], said["zero3_save_16bit_model"]) == (False, False)


def test_beside_a_file_only_accelerates_own_settings_are_left() -> None:
    config = {"zero_optimization": {"stage": 3}}
    assert file_settings(Settings(), config)["zero3_init_flag"] is True
    assert file_settings(Settings(), {"zero_optimization": {"stage": 2}})["zero3_init_flag"] is False
    assert file_settings(Settings(zero3_init=False, moe_leaf=("A",)), config) == {
        "deepspeed_multinode_launcher": "standard",
        "zero3_init_flag": False,
        "deepspeed_moe_layer_cls_names": "A",
    }


def test_a_file_made_of_settings_says_all_of_them() -> None:
    job = plain(
        stage=3,
        offload_optimizer="nvme",
        offload_param="cpu",
        precision="fp16",
        micro_batch=2,
        accumulation=4,
        clipping=1.0,
        optimizer="CPUAdam",
        learning_rate=1e-4,
        scheduler="WarmupDecayLR",
        reduce_bucket_size=1000,
        sub_group_size=2000,
        overlap_comm=False,
        aio=(("block_size", 1048576),),
        overrides=(("zero_optimization.round_robin_gradients", True), ("scheduler.params.total_num_steps", 100)),
    )
    check(job, accelerator="cuda")
    assert deepspeed_config(job, nvme="/nvme/0") == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme/0"},
            "offload_param": {"device": "cpu"},
            "stage3_gather_16bit_weights_on_model_save": True,
            "reduce_bucket_size": 1000,
            "sub_group_size": 2000,
            "overlap_comm": False,
            "round_robin_gradients": True,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": 100,
            },
        },
        "fp16": {"enabled": True, "auto_cast": True},
        "aio": {"block_size": 1048576},
    }


def test_every_value_knows_who_said_it() -> None:
    job = with_file(
        Settings(precision="bf16", accumulation=2, overrides=(("aio.queue_depth", 4),)),
        zero_optimization={"stage": 3, "offload_param": {"device": "nvme"}},
    )
    config = effective(job, nvme="/nvme/0")
    assert config.where(("zero_optimization", "stage")) == "ds.json:3:3"
    assert config.where(("bf16", "enabled")) == "--precision"
    assert config.where(("gradient_accumulation_steps",)) == "--accumulation"
    assert config.where(("aio", "queue_depth")) == "--set aio.queue_depth"
    assert config.where(("zero_optimization", "offload_param", "nvme_path")) == "nvme of the inventory"


def test_settings_fill_what_a_file_leaves_open_and_overrides_insist() -> None:
    job = with_file(
        Settings(stage=3, clipping=0.5, precision="fp16", overrides=(("train_batch_size", 16),)),
        train_batch_size="auto",
        gradient_clipping="auto",
        zero_optimization={"stage": "auto", "reduce_scatter": True},
    )
    check(job, accelerator="cuda")
    assert deepspeed_config(job) == {
        "train_batch_size": 16,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 3, "reduce_scatter": True},
        "fp16": {"enabled": True},
        **BATCH,
    }


def test_precision_no_agrees_with_a_file_that_says_so() -> None:
    job = with_file(Settings(precision="no"), zero_optimization={}, fp16={"enabled": False})
    check(job, accelerator="cuda")
    assert deepspeed_config(job)["fp16"] == {"enabled": False}


NAMED = {"device": "nvme", "nvme_path": "/x"}


@pytest.mark.parametrize(
    ("job", "needed", "is_open"),
    [
        (plain(), False, False),
        (plain(stage=3), False, False),
        (plain(stage=3, offload_param="nvme"), True, True),
        (plain(stage=3, offload_optimizer="nvme"), True, True),
        (with_file(zero_optimization={"stage": 3, "offload_param": {"device": "nvme"}}), True, True),
        (
            with_file(zero_optimization={"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}),
            True,
            False,
        ),
        (with_file(zero_optimization={"stage": 3, "offload_param": {"device": "cpu"}}), False, False),
        (with_file(zero_optimization="auto"), False, False),
        (with_file(), False, False),
    ],
)
def test_whether_anything_is_swapped_to_nvme(job: Job, needed: bool, is_open: bool) -> None:
    assert (needs_nvme(job), leaves_nvme_open(job)) == (needed, is_open)


@pytest.mark.parametrize(
    ("given", "nvme", "made"),
    [
        ({"device": "nvme"}, "/nvme/0", {"device": "nvme", "nvme_path": "/nvme/0"}),
        ({"device": "nvme", "nvme_path": "auto"}, "/nvme/0", {"device": "nvme", "nvme_path": "/nvme/0"}),
        ({"device": "nvme", "nvme_path": None}, "/nvme/0", {"device": "nvme", "nvme_path": "/nvme/0"}),
        ({"device": "nvme", "nvme_path": "/fast"}, "/nvme/0", {"device": "nvme", "nvme_path": "/fast"}),
        ({"device": "nvme"}, None, {"device": "nvme"}),
        ({"device": "cpu"}, "/nvme/0", {"device": "cpu"}),
    ],
)
def test_the_users_file_gets_the_nodes_nvme_path_where_it_is_open(given: Any, nvme: str | None, made: Any) -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_optimizer": given}, "train_batch_size": "auto"}
    text = file_for_node(with_file(**config), nvme)
    assert json.loads(text) == {**config, "zero_optimization": {"stage": 3, "offload_optimizer": made}, **BATCH}
    assert text.endswith("}\n")


def test_a_stage_that_is_to_be_chosen_is_judged_when_it_is() -> None:
    check(plain(stage="auto", prefetch_bucket_size=10), accelerator="cuda")
    with pytest.raises(PlanError, match="--stage auto chooses this, too"):
        check(plain(stage="auto", offload_optimizer="nvme"), accelerator="cuda")
    with pytest.raises(PlanError, match="nvme-below-stage-3"):
        check(plain(stage=2, offload_optimizer="nvme"), accelerator="cuda")


OFFLOAD = ("none", "cpu", "nvme")


@pytest.mark.parametrize("way", ["plugin", "file"])
def test_every_combination_of_stage_and_offload_is_valid_or_refused_by_name(way: Any) -> None:
    refused = {}
    for stage, optimizer, param in itertools.product((0, 1, 2, 3), OFFLOAD, OFFLOAD):
        job = plain(stage=stage, offload_optimizer=optimizer, offload_param=param, way=way)
        try:
            check(job, accelerator="cuda")
        except PlanError as error:
            refused[stage, optimizer, param] = str(error.where)
    valid = {(stage, optimizer, param) for stage, optimizer, param in itertools.product((0, 1, 2, 3), OFFLOAD, OFFLOAD)}
    valid -= refused.keys()
    assert valid == {
        (0, "none", "none"),
        *itertools.product((1, 2), ("none", "cpu"), ("none",)),
        *itertools.product((3,), OFFLOAD, OFFLOAD),
    }
    assert set(refused.values()) == {"--offload-optimizer", "--offload-param"}


def test_nodes_without_a_shared_folder_write_all_of_a_checkpoint_each() -> None:
    local = (("checkpoint.use_node_local_storage", True),)
    assert settled(plain(stage=2), nodes=3, shared=False).settings.overrides == local
    assert way_of(settled(plain(stage=2), nodes=3, shared=False)) == "file"
    for job, nodes, shared in (
        (plain(), 3, False),
        (plain(stage=3), 3, False),
        (plain(stage=2), 1, False),
        (plain(stage=2), 3, True),
        (plain(stage=2, way="plugin"), 3, False),
        (with_file(zero_optimization={"stage": 2}), 3, False),
    ):
        assert settled(job, nodes=nodes, shared=shared) is job
    said = plain(stage=2, overrides=(("checkpoint.use_node_local_storage", False),))
    assert settled(said, nodes=3, shared=False).settings == said.settings

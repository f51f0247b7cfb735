"""Settings -> what Accelerate and DeepSpeed will really be told; and the settings that cannot be meant.

Two ways lead to DeepSpeed: plugin settings (the `deepspeed_config` block of the Accelerate YAML), and a DeepSpeed
JSON. Both say the same thing here: `deepspeed_config` is what DeepSpeed is told either way. Keys:
https://huggingface.co/docs/accelerate/usage_guides/deepspeed and https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from cluster.command import check_word
from launcher.dsconfig import DsConfig, read
from launcher.errors import PlanError
from launcher.job import Job, Settings
from launcher.lints import Lint, lint_deepspeed

Accelerator = Literal["cuda", "cpu"]
STAGES = (0, 1, 2, 3)
GRADIENTS, PARAMETERS = 2, 3  # the first ZeRO stage that shards them
OFFLOADS = ("offload_optimizer", "offload_param")
PLUGIN, FILE, PLAIN = "plugin", "file", "plain"

# A norm that no gradient reaches: Accelerate drops a 0 on the way, and DeepSpeed would clip at its default, 1.0.
UNREACHED = 1e9

LOCAL_CHECKPOINTS = "checkpoint.use_node_local_storage"

# What each setting is called in DeepSpeed's configuration; precision, optimizer, scheduler and aio are blocks.
KEYS = {
    "stage": "zero_optimization.stage",
    "offload_optimizer": "zero_optimization.offload_optimizer.device",
    "offload_param": "zero_optimization.offload_param.device",
    "gather_16bit": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "sub_group_size": "zero_optimization.sub_group_size",
    "overlap_comm": "zero_optimization.overlap_comm",
    "micro_batch": "train_micro_batch_size_per_gpu",
    "accumulation": "gradient_accumulation_steps",
    "clipping": "gradient_clipping",
    "optimizer": "optimizer.type",
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "scheduler": "scheduler.type",
}
# Settings for which the Accelerate YAML has no key: they need a DeepSpeed file.
FILE_ONLY = (
    *("micro_batch", "optimizer", "learning_rate", "weight_decay", "scheduler", "reduce_bucket_size"),
    *("allgather_bucket_size", "prefetch_bucket_size", "sub_group_size", "overlap_comm", "aio", "overrides"),
)
# Settings that travel beside a DeepSpeed file, since they are Accelerate's own.
BESIDE_FILE = ("zero3_init", "moe_leaf")
# The first ZeRO stage at which a setting has any effect.
NEEDS = {
    **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "overlap_comm"), 1),
    **dict.fromkeys(("zero3_init", "gather_16bit", "prefetch_bucket_size", "sub_group_size", "moe_leaf"), PARAMETERS),
}
LEAST_ONE = (
    *("micro_batch", "accumulation", "reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size"),
    "sub_group_size",
)

# Our name -> DeepSpeed's type (deepspeed.runtime.engine._configure_basic_optimizer). FusedAdam and CPUAdam are what
# Adam becomes on the GPU and where the optimizer is offloaded.
OPTIMIZERS = {
    **{
        name: name for name in ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD", "SGD")
    },
    "FusedAdam": "AdamW",
    "CPUAdam": "AdamW",
}
REMOVED = ("OneBitAdam", "OneBitLamb", "ZeroOneAdam")  # DeepSpeed 0.19.8 has no trace of them any more
# A scheduler's parameters that Accelerate fills from the script's DummyScheduler.
SCHEDULERS: Mapping[str, tuple[str, ...]] = {
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"),
    "WarmupDecayLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"),
    "WarmupCosineLR": ("warmup_num_steps", "total_num_steps"),
    "OneCycle": (),
    "LRRangeTest": (),
}


def option(setting: str) -> str:
    """What a setting is called on the command line."""
    return "--set" if setting == "overrides" else f"--{setting.replace('_', '-')}"


# --- which way -------------------------------------------------------------------------------------------------------


def way_of(job: Job) -> Literal["plain", "plugin", "file"]:
    """How the job is told of DeepSpeed, if at all: if plain multi-process training works, no ZeRO."""
    settings = job.settings
    sharded = settings.stage not in (None, 0)
    given = settings.given()
    if not sharded:
        given.pop("micro_batch", None)  # by itself no reason for DeepSpeed: the script has its own word for it
    if job.config is not None or settings.way == FILE or any(name in given for name in FILE_ONLY):
        return "file"
    return "plugin" if settings.way == PLUGIN or sharded else "plain"


def uses_deepspeed(job: Job) -> bool:
    """Whether the job needs DeepSpeed at all."""
    return way_of(job) != PLAIN


# --- what both ways say ----------------------------------------------------------------------------------------------


def effective(job: Job, *, nvme: str | None = None) -> DsConfig:
    """What DeepSpeed is told, by whichever way, before Accelerate fills the "auto" that are left; and who said it.

    `nvme` is the path for offloading where the job leaves it open. `PlanError` where a setting contradicts a file.
    """
    config = read_file(job) if job.config is not None else DsConfig(name="the settings", data=_SKELETON, places={})
    for setting, key, value in _said(job):
        config = _filled(config, setting, key, value, job=job)
    if way_of(job) == PLUGIN and not job.settings.clipping:
        config = config.put(("gradient_clipping",), UNREACHED, where="the settings")
    for key, value in job.settings.overrides:
        config = config.put(tuple(key.split(".")), value, where=f"--set {key}")
    for part in OFFLOADS:
        block = value_at(config.data, f"zero_optimization.{part}")
        if nvme and isinstance(block, Mapping) and is_open(block):
            config = config.put(("zero_optimization", part, "nvme_path"), nvme, where="nvme of the inventory")
    return config


def deepspeed_config(job: Job, *, nvme: str | None = None) -> dict[str, Any]:
    """The data of `effective`."""
    return dict(effective(job, nvme=nvme).data)


# What Accelerate's plugin says of itself when nobody says anything.
_SKELETON: Mapping[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # said, since DeepSpeed's default is 1.0: the same script would train differently
    "zero_optimization": {
        "stage": 0,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"},
        "stage3_gather_16bit_weights_on_model_save": False,
    },
}


def _said(job: Job) -> Iterator[tuple[str, str, Any]]:
    """The settings under DeepSpeed's keys, (setting, dotted key, value); without a file also what follows from them."""
    settings = job.settings
    given = settings.given()
    if settings.optimizer:
        given["optimizer"] = OPTIMIZERS.get(settings.optimizer, settings.optimizer)
    if job.config is None:
        given = {**_implied(settings), **given}
    yield from ((name, KEYS[name], given[name]) for name in KEYS if name in given)
    if settings.scheduler and job.config is None:
        names = SCHEDULERS.get(settings.scheduler, ())
        yield from (("scheduler", f"scheduler.params.{name}", "auto") for name in names)
    yield from (("precision", key, value) for key, value in _precision(job))
    yield from (("aio", f"aio.{name}", value) for name, value in settings.aio)


def _implied(settings: Settings) -> dict[str, Any]:
    implied: dict[str, Any] = {}
    if settings.stage == PARAMETERS:
        implied["gather_16bit"] = True
    if settings.optimizer:  # "auto" is what the script's DummyOptim says
        implied |= {"learning_rate": "auto", "weight_decay": "auto"}
    return implied


def _precision(job: Job) -> Iterator[tuple[str, Any]]:
    """As `DeepSpeedPlugin.set_mixed_precision` does it."""
    precision = job.settings.precision
    if precision in ("fp16", "bf16"):
        yield f"{precision}.enabled", True
    if precision == "fp16" and job.config is None:
        yield "fp16.auto_cast", True
    if precision == "no" and job.config is not None:
        yield from ((f"{block}.enabled", False) for block in ("fp16", "bf16") if block in read_file(job).data)


def _filled(config: DsConfig, setting: str, key: str, value: object, *, job: Job) -> DsConfig:
    """With a value where the file leaves it open; what the file says itself, no setting may contradict."""
    path = tuple(key.split("."))
    found = value_at(config.data, key)
    if job.config is not None and found not in (None, "auto", value):
        raise PlanError(
            f"the file says {json.dumps(found)} for {key}, and {option(setting)} says {json.dumps(value)}",
            where=config.where(path),
            next_step=f'leave one of them out, write "auto" into the file, or insist: --set {key}={json.dumps(value)}',
        )
    return config.put(path, value, where=option(setting))


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key, None where there is none."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def is_open(block: Mapping[str, Any]) -> bool:
    """Whether an offload block goes to NVMe and leaves open to which path."""
    return block.get("device") == "nvme" and block.get("nvme_path") in (None, "auto")


def settled(job: Job, *, nodes: int, shared: bool) -> Job:
    """With what follows from the nodes: who shares no folder for checkpoints writes all of them on each.

    Below stage 3 DeepSpeed writes the model's part on the first node alone, and no other could resume. Nothing is added
    to a file of the user's or to an insisted way; there the lint `node-local-checkpoints` says so.
    """
    stage = value_at(deepspeed_config(job), KEYS["stage"]) if uses_deepspeed(job) else PARAMETERS
    free = job.config is None and job.settings.way in (None, "auto")
    if nodes == 1 or shared or not free or stage == PARAMETERS:
        return job
    added = Settings(overrides=((LOCAL_CHECKPOINTS, True),))
    return dataclasses.replace(job, settings=job.settings.over(added))


# --- the plugin way --------------------------------------------------------------------------------------------------


def plugin_settings(settings: Settings) -> dict[str, object]:
    """The `deepspeed_config` block of the plugin way.

    The NVMe paths are not here: Accelerate reads them from this block and never hands them on (they travel as
    ACCELERATE_DEEPSPEED_OFFLOAD_*_NVME_PATH).
    """
    third = settings.stage == PARAMETERS
    return {
        "deepspeed_multinode_launcher": "standard",  # anything else splits a multi-node run, silently
        "zero_stage": settings.stage or 0,
        "gradient_accumulation_steps": settings.accumulation or 1,
        "gradient_clipping": settings.clipping or UNREACHED,
        "offload_optimizer_device": settings.offload_optimizer or "none",
        "offload_param_device": settings.offload_param or "none",
        "zero3_init_flag": third if settings.zero3_init is None else settings.zero3_init,
        "zero3_save_16bit_model": third if settings.gather_16bit is None else settings.gather_16bit,
        **_moe_leaf(settings),
    }


def file_settings(settings: Settings, config: Mapping[str, Any]) -> dict[str, object]:
    """The `deepspeed_config` block of the file way: everything else stands in the DeepSpeed JSON."""
    third = value_at(config, "zero_optimization.stage") == PARAMETERS
    return {
        "deepspeed_multinode_launcher": "standard",
        "zero3_init_flag": third if settings.zero3_init is None else settings.zero3_init,
        **_moe_leaf(settings),
    }


def _moe_leaf(settings: Settings) -> dict[str, object]:
    return {"deepspeed_moe_layer_cls_names": ",".join(settings.moe_leaf)} if settings.moe_leaf else {}


# --- the file way ----------------------------------------------------------------------------------------------------


def read_file(job: Job) -> DsConfig:
    """The user's own DeepSpeed JSON; `InputError` with its place."""
    return read(job.config or "{}", name=job.config_name)


def file_for_node(job: Job, nvme: str | None) -> str:
    """The DeepSpeed JSON of one node, with its NVMe path where the job leaves it open."""
    return json.dumps(deepspeed_config(job, nvme=nvme), indent=2) + "\n"


def needs_nvme(job: Job) -> bool:
    """Whether anything will be swapped to NVMe."""
    return any(block.get("device") == "nvme" for block in _offloads(job))


def leaves_nvme_open(job: Job) -> bool:
    """Whether the node's own NVMe paths are to be used."""
    return any(is_open(block) for block in _offloads(job))


def _offloads(job: Job) -> tuple[Mapping[str, Any], ...]:
    if not uses_deepspeed(job):
        return ()
    found = (value_at(deepspeed_config(job), f"zero_optimization.{part}") for part in OFFLOADS)
    return tuple(block for block in found if isinstance(block, Mapping))


# --- what cannot be meant --------------------------------------------------------------------------------------------


def check(job: Job, *, accelerator: Accelerator) -> None:
    """Refuse settings that contradict each other or cannot be handed on, by name, before anything starts."""
    for word in (job.script, *job.args, *(value for _, value in job.env)):
        check_word(word)
    check_values(job.settings)
    _check_way(job)
    if job.config is None:
        _check_stage(job)
    _check_optimizer(job)
    _check_precision(job, accelerator=accelerator)
    judge(lints(job, accelerator=accelerator))


def lints(
    job: Job, *, accelerator: Accelerator, slots: tuple[int, ...] | None = None, nvme: tuple[str, ...] | None = None
) -> tuple[Lint, ...]:
    """What speaks against the job's DeepSpeed configuration; `slots` by node and the NVMe paths once they are known."""
    if not uses_deepspeed(job) or job.settings.stage == "auto":
        return ()
    config = effective(job, nvme=nvme[0] if nvme else None)
    blocks = {part: value_at(config.data, f"zero_optimization.{part}") for part in OFFLOADS}
    left_open = (part for part, block in blocks.items() if isinstance(block, Mapping) and is_open(block))
    found = lint_deepspeed(
        config,
        world_size=sum(slots) if slots else None,
        slots=slots,
        accelerator=accelerator,
        nvme=nvme,
        supplied=frozenset(f"zero_optimization.{part}.nvme_path" for part in left_open),
    )
    return tuple(lint for lint in found if job.config is not None or lint.id not in _KNOWN)


# Warnings of what a configuration of ours always says, because it is meant.
_KNOWN = ("auto-dataloader",)


def judge(found: tuple[Lint, ...]) -> tuple[str, ...]:
    """The warnings as lines to be told; `PlanError` with the first error, the others as its detail."""
    errors = [lint for lint in found if lint.level == "error"]
    if errors:
        first, *others = errors
        raise PlanError(
            f"{first.what} [{first.id}]",
            where=first.where,
            detail=(f"if left: {first.consequence}", *(f"{one.where}: {one.what} [{one.id}]" for one in others)),
            next_step=first.cure,
        )
    return tuple(f"{one.where}: {one.what}: {one.consequence} [{one.id}]; {one.cure}" for one in found)


def _refuse(setting: str, what: str, cure: str) -> None:
    raise PlanError(what, where=option(setting), next_step=cure)


def check_values(settings: Settings) -> None:
    """Refuse what no setting can be, each by itself."""
    given = settings.given()
    if settings.stage not in (None, "auto", *STAGES):
        _refuse("stage", f"there is no ZeRO stage {settings.stage}", "choose 0, 1, 2, 3 or auto")
    for name in LEAST_ONE:
        if given.get(name, 1) < 1:
            _refuse(name, f"{given[name]} is not possible", "1 or more")
    for name in ("clipping", "learning_rate", "weight_decay"):
        if not 0 <= given.get(name, 0.0) < math.inf:
            _refuse(name, f"{given[name]} is not possible", "a number, 0 or more")
    for leaf in settings.moe_leaf:
        if not all(part.isidentifier() for part in leaf.split(".")):
            _refuse("moe_leaf", f"{leaf!r} is no name of a class", "such as MixtralSparseMoeBlock")
    overrides = dict(settings.overrides)
    for name, key in KEYS.items():
        if name in given and key in overrides and overrides[key] != given[name]:
            what = f"{option(name)} says {json.dumps(given[name])}, and --set {key} says {json.dumps(overrides[key])}"
            _refuse(name, what, "leave one of them out")
    if settings.optimizer in REMOVED:
        _refuse("optimizer", f"DeepSpeed has removed {settings.optimizer}", "use AdamW, Lamb or Lion")
    if settings.optimizer is not None and settings.optimizer not in OPTIMIZERS:
        _unknown("optimizer", settings.optimizer, OPTIMIZERS)
    if settings.scheduler is not None and settings.scheduler not in SCHEDULERS:
        _unknown("scheduler", settings.scheduler, SCHEDULERS)


def _check_way(job: Job) -> None:
    given = job.settings.given()
    if job.settings.way != PLUGIN:
        return
    if job.config is not None:
        _refuse("way", "a DeepSpeed file and the plugin way exclude each other", "leave --way plugin or the file out")
    for name in FILE_ONLY:
        if name in given:
            _refuse(name, "the plugin way has no word for this", "leave --way plugin out: a DeepSpeed file is made")


def _check_stage(job: Job) -> None:
    """Settings that would be ignored at this stage, or do something else."""
    settings = job.settings
    if settings.stage == "auto":  # not known yet: the rest is checked when it is
        for name in OFFLOADS:
            if settings.given().get(name) in ("cpu", "nvme"):
                _refuse(name, "--stage auto chooses this, too", f"leave {option(name)} out, or name the stage")
        return
    stage = settings.stage or 0
    if settings.clipping and not uses_deepspeed(job):
        _refuse(
            "clipping",
            "clipping from outside needs ZeRO: plain training would ignore it",
            "add --stage 1, 2 or 3, or clip in the script (accelerator.clip_grad_norm_)",
        )
    for name in OFFLOADS:
        if settings.given().get(name) in ("cpu", "nvme") and not uses_deepspeed(job):
            _refuse(name, "offloading needs ZeRO", f"add --stage, or leave {option(name)} out")
    for name, least in NEEDS.items():
        if settings.given().get(name) and stage < least:
            _refuse(
                name,
                f"this has an effect from ZeRO stage {least} on, not at stage {stage}",
                f"add --stage {least}, or leave {option(name)} out",
            )


def _check_precision(job: Job, *, accelerator: str) -> None:
    if job.settings.precision == "fp8" and way_of(job) == FILE:
        _refuse("precision", "a DeepSpeed file has no word for fp8", "leave out what needs a file, or train in bf16")
    if job.settings.precision in ("fp16", "fp8") and accelerator == "cpu":
        _refuse("precision", f"{job.settings.precision} needs a GPU", "on CPU use --precision bf16, or no")


def _check_optimizer(job: Job) -> None:
    settings = job.settings
    for name in ("learning_rate", "weight_decay"):
        if getattr(settings, name) is not None and settings.optimizer is None and job.config is None:
            _refuse(name, "this is said to DeepSpeed's optimizer, and none is chosen", "add --optimizer AdamW")
    offloaded = value_at(deepspeed_config(job), KEYS["offload_optimizer"]) in ("cpu", "nvme")
    if settings.optimizer == "CPUAdam" and not offloaded:
        _refuse("optimizer", "CPUAdam is for an optimizer on the CPU", "add --offload-optimizer cpu, or use FusedAdam")
    if settings.optimizer == "FusedAdam" and offloaded:
        _refuse("optimizer", "FusedAdam is for an optimizer on the GPU, and it is offloaded", "use CPUAdam")


def _unknown(setting: str, name: str, known: Mapping[str, object]) -> None:
    close = difflib.get_close_matches(name.lower(), {one.lower(): one for one in known}, n=1)
    meant = next((f"; did you mean {one}?" for one in known if one.lower() in close), "")
    _refuse(setting, f"DeepSpeed has no {setting} {name!r}{meant}", f"one of: {', '.join(known)}")

"""From an Accelerate YAML or a DeepSpeed JSON to settings and back; and what one of them cannot say of the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.document import Document
from launcher import zero
from launcher.dsconfig import DsConfig
from launcher.errors import PlanError
from launcher.job import Job, Settings

# The keys of Accelerate's `deepspeed_config` block that are settings.
PLUGIN_KEYS = {
    "zero_stage": "stage",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "clipping",
    "offload_optimizer_device": "offload_optimizer",
    "offload_param_device": "offload_param",
    "zero3_init_flag": "zero3_init",
    "zero3_save_16bit_model": "gather_16bit",
}
# Keys that are the launcher's own business, or say what is so anyway.
MOE_KEY = "deepspeed_moe_layer_cls_names"
_OURS = (
    *("compute_environment", "distributed_type", "mixed_precision", "use_cpu", "debug", "num_machines"),
    *("num_processes", "machine_rank", "main_process_ip", "main_process_port", "main_training_function"),
    *("deepspeed_config", "rdzv_backend", "same_network", "gpu_ids", "enable_cpu_affinity", "downcast_bf16"),
    *("tpu_env", "tpu_use_cluster", "tpu_use_sudo"),
)
_OURS_BELOW = (
    *("deepspeed_multinode_launcher", MOE_KEY, "offload_optimizer_nvme_path", "offload_param_nvme_path"),
    "deepspeed_config_file",
)


def is_accelerate(document: Document) -> bool:
    """Whether a document is an Accelerate configuration."""
    return isinstance(document.data, dict) and not {"compute_environment", "distributed_type"}.isdisjoint(document.data)


def settings_of_accelerate(document: Document) -> tuple[Settings, tuple[str, ...]]:
    """The settings of an Accelerate YAML, and the keys of it that are none; `PlanError` for what cannot be one."""
    block = _plugin_block(document)
    data = document.data
    assert isinstance(data, dict)
    said: dict[str, Any] = {
        name: block[key] for key, name in PLUGIN_KEYS.items() if block.get(key) not in (None, "auto")
    }
    if said.get("clipping") == zero.UNREACHED:
        said["clipping"] = 0.0
    if "mixed_precision" in data:
        said["precision"] = data["mixed_precision"]
    _check_kinds(said, document)
    leaf = str(block.get(MOE_KEY) or "")
    said["moe_leaf"] = tuple(name.strip() for name in leaf.split(",") if name.strip())
    said["overrides"] = tuple(
        (f"zero_optimization.offload_{part}.nvme_path", block[f"offload_{part}_nvme_path"])
        for part in ("optimizer", "param")
        if block.get(f"offload_{part}_device") == "nvme"
        and block.get(f"offload_{part}_nvme_path") not in (None, "none")
    )
    left = [key for key in data if key not in _OURS]
    left += [f"deepspeed_config.{key}" for key in block if key not in (*PLUGIN_KEYS, *_OURS_BELOW)]
    return Settings(**said), tuple(left)


def _plugin_block(document: Document) -> Mapping[str, Any]:
    """The `deepspeed_config` of an Accelerate YAML, empty when it has none."""
    data = document.data
    if not isinstance(data, dict) or not is_accelerate(document):
        raise PlanError(
            "this is no Accelerate configuration",
            where=f"{document.name}:1:1",
            next_step="such a file says compute_environment and distributed_type",
        )
    block = data.get("deepspeed_config") or {}
    if not isinstance(block, dict):
        raise PlanError("deepspeed_config must be a mapping", where=document.where(("deepspeed_config",)))
    if block.get("deepspeed_config_file") not in (None, "none"):
        raise PlanError(
            "the settings stand in a DeepSpeed file",
            where=document.where(("deepspeed_config", "deepspeed_config_file")),
            next_step=f"use that one: {block['deepspeed_config_file']}",
        )
    return block


def _check_kinds(said: Mapping[str, Any], document: Document) -> None:
    places = {name: ("deepspeed_config", key) for key, name in PLUGIN_KEYS.items()}
    for name, value in said.items():
        if not _is_possible(name, value):
            place = places.get(name, ("mixed_precision",))
            raise PlanError(
                f"{place[-1]} cannot be {json.dumps(value)}",
                where=document.where(place),
                next_step=f"one of: {', '.join(map(str, _WORDS[name]))}" if name in _WORDS else "see configs/",
            )


# What a setting of the plugin can be, by name: these words, else a value of this kind.
_DEVICES = ("none", "cpu", "nvme")
_WORDS: Mapping[str, tuple[object, ...]] = {
    "stage": zero.STAGES,
    "offload_optimizer": _DEVICES,
    "offload_param": _DEVICES,
    "precision": ("no", "fp16", "bf16", "fp8"),
    "zero3_init": ("true", "false"),
    "gather_16bit": ("true", "false"),
}


def _is_possible(name: str, value: object) -> bool:
    if name in ("zero3_init", "gather_16bit"):
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    return value in _WORDS[name] if name in _WORDS else isinstance(value, (int, float))


def settings_of_file(config: DsConfig) -> Settings:
    """The settings of a DeepSpeed JSON; keys for which there is no setting become overrides, so nothing is lost."""
    named = {key: name for name, key in zero.KEYS.items()}
    said: dict[str, Any] = {}
    aio, overrides = [], []
    for key, value in _flat(config.data):
        if value == "auto" and key in _AUTO:
            continue
        if key in named:
            said[named[key]] = value
        elif key in ("fp16.enabled", "bf16.enabled"):
            if value is True:
                said["precision"] = key.partition(".")[0]
        elif key.startswith("aio."):
            aio.append((key.removeprefix("aio."), value))
        elif (key, value) not in _IMPLIED:
            overrides.append((key, value))
    return Settings(**said, aio=tuple(aio), overrides=tuple(overrides))


# What a rendered file says by itself.
_AUTO = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("optimizer.params.lr", "optimizer.params.weight_decay"),
    *{f"scheduler.params.{name}" for names in zero.SCHEDULERS.values() for name in names},
)
_IMPLIED = (("fp16.auto_cast", True),)


def _flat(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def unsaid_by_plugin(settings: Settings) -> tuple[str, ...]:
    """What of these settings the plugin way has no word for."""
    given = settings.given()
    named = [f"{zero.KEYS[name]}={given[name]}" for name in zero.FILE_ONLY if name in given and name in zero.KEYS]
    return (*named, *(f"aio.{key}={value}" for key, value in settings.aio), *_dotted(settings.overrides))


def unsaid_by_file(settings: Settings) -> tuple[str, ...]:
    """What of these settings a DeepSpeed file has no word for: it stays in the Accelerate YAML beside it."""
    said = [f"zero3_init_flag={settings.zero3_init}"] if settings.zero3_init is not None else []
    said += [f"deepspeed_moe_layer_cls_names={','.join(settings.moe_leaf)}"] if settings.moe_leaf else []
    return (*said, *(["mixed_precision=fp8"] if settings.precision == "fp8" else []))


def _dotted(pairs: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in pairs)


def accelerate_template(settings: Settings, *, file: str | None = None) -> dict[str, object]:
    """An Accelerate configuration for `accelerate launch`, by the plugin way or naming a DeepSpeed `file`.

    It is of one machine and one process: `accelerate launch --num_processes N` says otherwise.
    """
    job = Job(script="", settings=settings)
    plain = file is None and zero.way_of(job) == zero.PLAIN
    config: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if plain else "DEEPSPEED",
        "mixed_precision": settings.precision or "no",
        "use_cpu": False,
        "num_machines": 1,
        "num_processes": 1,
        "machine_rank": 0,
        "main_training_function": "main",
    }
    if file is not None:
        del config["mixed_precision"]  # Accelerate refuses it beside a file, which says it itself
        block = zero.file_settings(settings, zero.deepspeed_config(job))
        config["deepspeed_config"] = {**block, "deepspeed_config_file": file}
    elif not plain:
        config["deepspeed_config"] = zero.plugin_settings(settings)
    return config

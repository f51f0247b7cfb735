"""ZeRO settings -> what Accelerate and DeepSpeed will really be told; and the settings that cannot be meant.

Two ways lead to DeepSpeed: plugin settings (the `deepspeed_config` block of the Accelerate YAML), and a DeepSpeed
JSON. Both are rendered here. Keys: https://huggingface.co/docs/accelerate/usage_guides/deepspeed and
https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cluster.command import check_word
from launcher.errors import PlanError
from launcher.job import Job, Zero

STAGES = (0, 1, 2, 3)


def uses_deepspeed(job: Job) -> bool:
    """Whether the job needs DeepSpeed at all: if plain multi-process training works, no ZeRO."""
    return job.config is not None or job.zero.stage > 0


def plugin_settings(zero: Zero) -> dict[str, object]:
    """The `deepspeed_config` block of the plugin way.

    The NVMe paths are not here: Accelerate reads them from this block and never hands them on (they travel as
    ACCELERATE_DEEPSPEED_OFFLOAD_*_NVME_PATH).
    """
    settings: dict[str, object] = {
        "deepspeed_multinode_launcher": "standard",  # anything else splits a multi-node run, silently
        "zero_stage": zero.stage,
        "gradient_accumulation_steps": zero.accumulation,
        # Left out, Accelerate fills "auto" with 1.0, and the same script trains differently than without ZeRO.
        "gradient_clipping": zero.clipping or 0.0,
        "offload_optimizer_device": zero.offload_optimizer,
        "offload_param_device": zero.offload_param,
        "zero3_init_flag": zero.stage == 3 if zero.init is None else zero.init,  # noqa: PLR2004 - ZeRO stage 3
        "zero3_save_16bit_model": zero.stage == 3 if zero.gather_16bit is None else zero.gather_16bit,  # noqa: PLR2004
    }
    return settings


def file_settings() -> dict[str, object]:
    """The `deepspeed_config` block of the file way: everything else stands in the DeepSpeed JSON."""
    return {"deepspeed_multinode_launcher": "standard", "zero3_init_flag": True}


def read_config(text: str, *, name: str) -> dict[str, Any]:
    """A user's DeepSpeed JSON, or `PlanError` with its place."""
    try:
        config = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants, parse_float=_only_finite
        )
    except _BadPairError as error:
        raise PlanError(str(error), where=name) from None
    except json.JSONDecodeError as error:
        raise PlanError(
            f"this is not JSON: {error.msg}",
            where=f"{name}:{error.lineno}:{error.colno}",
            next_step="DeepSpeed takes strict JSON: no comments, no trailing commas",
        ) from None
    except RecursionError:
        raise PlanError("this JSON is nested too deeply", where=name) from None
    except ValueError as error:  # a number of more digits than Python reads
        raise PlanError(f"this is not JSON: {error}", where=name) from None
    if not isinstance(config, dict):
        raise PlanError("a DeepSpeed configuration is a JSON object", where=name)
    return config


class _BadPairError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen: dict[str, object] = {}
    for key, value in pairs:
        if key in seen:
            raise _BadPairError(f"the key {key!r} stands twice; DeepSpeed would take the last one, silently")
        seen[key] = value
    return seen


def _only_finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _BadPairError(f"{text[:20]} is larger than any number of a computer")
    return number


def _no_constants(name: str) -> object:
    raise _BadPairError(f"{name} is not JSON")


def check(job: Job, *, accelerator: str) -> None:
    """Refuse settings that contradict each other or cannot be handed on, by name, before anything starts."""
    for word in (job.script, *job.args, *(value for _, value in job.env)):
        check_word(word)
    if job.config is not None:
        _check_file(job)
    else:
        _check_plugin(job.zero)
    if job.precision == "fp16" and accelerator == "cpu":
        raise PlanError(
            "--precision fp16 needs a GPU", next_step="on CPU use --precision bf16, or no", where="--precision"
        )
    if job.precision == "fp8" and accelerator == "cpu":
        raise PlanError("--precision fp8 needs a GPU", next_step="use --precision bf16, or no", where="--precision")


def _check_plugin(zero: Zero) -> None:
    if zero.stage not in STAGES:
        raise PlanError(f"there is no ZeRO stage {zero.stage}", where="--stage", next_step="choose 0, 1, 2 or 3")
    if zero.accumulation < 1:
        raise PlanError(
            f"{zero.accumulation} accumulation steps are not possible", where="--accumulation", next_step="1 or more"
        )
    if zero.clipping is not None and not 0 <= zero.clipping < math.inf:
        raise PlanError(f"{zero.clipping} is no norm to clip at", where="--clipping", next_step="0 or more")
    if zero.clipping is not None and zero.stage == 0:
        raise PlanError(
            "clipping from outside needs ZeRO: plain training would ignore it",
            where="--clipping",
            next_step="add --stage 1, 2 or 3, or clip in the script (accelerator.clip_grad_norm_)",
        )
    if zero.offload_optimizer != "none" and zero.stage == 0:
        raise PlanError(
            "offloading the optimizer needs ZeRO",
            where="--offload-optimizer",
            next_step="add --stage 1, 2 or 3, or leave --offload-optimizer out",
        )
    if zero.offload_optimizer == "nvme" and zero.stage != 3:  # noqa: PLR2004 - ZeRO stage 3
        raise PlanError(
            f"offloading the optimizer to NVMe needs ZeRO stage 3: at stage {zero.stage} DeepSpeed would use the CPU",
            where="--offload-optimizer",
            next_step="add --stage 3, or use --offload-optimizer cpu",
        )
    if zero.offload_param != "none" and zero.stage != 3:  # noqa: PLR2004 - ZeRO stage 3
        raise PlanError(
            f"offloading the parameters needs ZeRO stage 3: at stage {zero.stage} DeepSpeed would ignore it",
            where="--offload-param",
            next_step="add --stage 3, or leave --offload-param out",
        )


def _check_file(job: Job) -> None:
    if job.zero != Zero():
        raise PlanError(
            "a DeepSpeed file and plugin settings clash: Accelerate refuses them beside each other",
            where="--ds-config",
            next_step="write the stage, offload, accumulation and clipping into the file, or leave the file out",
        )
    if job.precision != "no":
        raise PlanError(
            "a DeepSpeed file and --precision clash: the file alone says in what precision DeepSpeed trains",
            where="--ds-config",
            next_step=f'write {{"{job.precision}": {{"enabled": true}}}} into the file, and leave --precision out',
        )
    config = read_config(job.config or "", name="--ds-config")
    if "zero_optimization" not in config:
        raise PlanError("the file has no zero_optimization", where="--ds-config", next_step='add {"stage": …}')
    zero = _mapping(config["zero_optimization"])
    stage = zero.get("stage", 0)
    for part in ("offload_optimizer", "offload_param"):
        device = _mapping(zero.get(part)).get("device", "none")
        if device == "nvme" and stage != 3:  # noqa: PLR2004 - ZeRO stage 3
            raise PlanError(f"zero_optimization.{part}.device nvme needs stage 3", where="--ds-config")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def needs_nvme(job: Job) -> bool:
    """Whether anything will be swapped to NVMe."""
    if job.config is None:
        return "nvme" in (job.zero.offload_optimizer, job.zero.offload_param)
    zero = _mapping(read_config(job.config, name="--ds-config").get("zero_optimization"))
    return any(_mapping(zero.get(part)).get("device") == "nvme" for part in ("offload_optimizer", "offload_param"))


def file_for_node(job: Job, nvme: str | None) -> str:
    """The DeepSpeed JSON of one node: the user's own, with its NVMe path filled in where the user left it open."""
    config = read_config(job.config or "", name="--ds-config")
    for part in ("offload_optimizer", "offload_param"):
        block = _mapping(_mapping(config.get("zero_optimization")).get(part))
        if nvme and block.get("device") == "nvme" and block.get("nvme_path") in (None, "auto"):
            config["zero_optimization"][part]["nvme_path"] = nvme
    return json.dumps(config, indent=2) + "\n"

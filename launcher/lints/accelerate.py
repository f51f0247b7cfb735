"""What will go wrong with an Accelerate YAML: keys that are ignored or refused, shapes that do not fit, clashes.

Its `deepspeed_config` block says the same as a DeepSpeed file in other words; what it says is put into those, with the
places of the YAML, so that one set of rules judges both. tests/oracle/test_accelerate_launch.py holds the facts.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from cluster.document import Document
from launcher import dskeys
from launcher.dsconfig import DsConfig, Place
from launcher.lints.catalogue import Lint, told
from launcher.lints.deepspeed import PLUGIN_RULES
from launcher.lints.look import STAGE_3, Look, shown

BLOCKS = (
    *("deepspeed_config", "fsdp_config", "megatron_lm_config", "mpirun_config", "fp8_config", "parallelism_config"),
    "dynamo_config",
)
KEYS = (
    *("compute_environment", "distributed_type", "mixed_precision", "use_cpu", "debug", "num_processes"),
    *("machine_rank", "num_machines", "gpu_ids", "main_process_ip", "main_process_port", "rdzv_backend"),
    *("same_network", "main_training_function", "enable_cpu_affinity", "downcast_bf16", "tpu_name", "tpu_zone"),
    *("tpu_use_cluster", "tpu_use_sudo", "command_file", "commands", "tpu_vm", "tpu_env", *BLOCKS),
    *("fp16", "dynamo_backend"),  # of old files
)
FLAGS_ONLY = ("max_restarts", "monitor_interval", "rdzv_conf", "log_dir", "tee", "role", "module", "no_python")
# What accelerate launch takes for a key that it does not read from the file, and what says it instead.
IGNORED: Mapping[str, tuple[object, str]] = {
    "rdzv_backend": ("static", "pass --rdzv_backend, or remove it"),
    "same_network": (False, "pass --same_network, or remove it"),
    "enable_cpu_affinity": (False, "pass --enable_cpu_affinity, or remove it"),
    "downcast_bf16": (False, "pass --downcast_bf16, or remove it"),
    "tpu_use_cluster": (False, "remove it: it is for TPUs"),
    "tpu_use_sudo": (False, "remove it: it is for TPUs"),
}
PLUGIN = (
    *("zero_stage", "gradient_accumulation_steps", "gradient_clipping", "offload_optimizer_device"),
    *("offload_param_device", "offload_optimizer_nvme_path", "offload_param_nvme_path", "zero3_init_flag"),
    *("zero3_save_16bit_model", "deepspeed_config_file", "deepspeed_hostfile", "deepspeed_exclusion_filter"),
    *("deepspeed_inclusion_filter", "deepspeed_multinode_launcher", "deepspeed_moe_layer_cls_names"),
)
# What may not stand beside a DeepSpeed file: the file has to say it.
OVERLAP: Mapping[str, str] = {
    "zero_stage": "zero_optimization.stage",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}
# Plain words as PyYAML understands them, with which Accelerate reads and writes: `none` is text, `no` is false.
PYYAML: Mapping[str, bool | str | None] = MappingProxyType(
    {
        **{spelt: True for word in ("yes", "on", "true") for spelt in (word, word.title(), word.upper())},
        **{spelt: False for word in ("no", "off", "false") for spelt in (word, word.title(), word.upper())},
        **dict.fromkeys(("Null", "NULL")),
        **{spelt: spelt for spelt in ("none", "None", "NONE")},
    }
)
PRECISIONS = ("no", "fp16", "bf16", "fp8")
DEVICES = ("none", "cpu", "nvme")


def lint_accelerate(
    document: Document,
    *,
    world_size: int | None = None,
    accelerator: Literal["cuda", "cpu"] = "cuda",
) -> tuple[Lint, ...]:
    """Everything that speaks against an Accelerate YAML, errors first. `world_size`: all processes, if known.

    The document is read with `words=PYYAML`, so that it says what Accelerate will understand.
    """
    view = View(document=document, accelerator=accelerator, world_size=world_size)
    found = [lint for rule in RULES for lint in rule(view)]
    return tuple(sorted(dict.fromkeys(found), key=lambda lint: lint.level != "error"))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """An Accelerate YAML under the eye of the rules."""

    document: Document
    accelerator: Literal["cuda", "cpu"]
    world_size: int | None

    @property
    def data(self) -> Mapping[str, Any]:
        return self.document.data if isinstance(self.document.data, Mapping) else {}

    @property
    def plugin(self) -> Mapping[str, Any]:
        block = self.data.get("deepspeed_config")
        return block if isinstance(block, Mapping) else {}

    def where(self, *place: str) -> str:
        return self.document.where(place)

    def count(self, key: str) -> int | None:
        """A whole number of the top level."""
        value = self.data.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def machines(self) -> int:
        return self.count("num_machines") or 1

    @property
    def uses_deepspeed(self) -> bool:
        return str(self.data.get("distributed_type")).upper() == "DEEPSPEED"


def _keys(view: View) -> Iterator[Lint]:
    for key in view.data:
        if key in KEYS:
            continue
        what = f"{key} is no key of an Accelerate file"
        near = difflib.get_close_matches(key, KEYS, n=1)
        if key in FLAGS_ONLY:
            cure = f"pass it as a flag: --{key}"
        elif key in PLUGIN:
            cure = "move it under deepspeed_config"
        else:
            what += f"; did you mean {near[0]!r}?" if near else ""
            cure = f"write {near[0]}" if near else "remove it"
        yield told("accelerate-unknown-key", where=view.where(key), what=what, cure=cure)
    for key, (value, cure) in IGNORED.items():
        given = view.data.get(key, value)
        if given not in (value, "no", None):
            what = f"{key} is {shown(given)}"
            yield told("accelerate-ignored-key", where=view.where(key), what=what, value=shown(value), cure=cure)


def _values(view: View) -> Iterator[Lint]:
    precision = view.data.get("mixed_precision")
    if precision is False:
        yield told("precision-unquoted", where=view.where("mixed_precision"), what="mixed_precision is false")
    elif precision is not None and str(precision).lower() not in PRECISIONS:
        yield from _value(view, "mixed_precision", '"no", fp16, bf16 or fp8')
    if precision == "fp16" and view.accelerator == "cpu":
        what = "mixed_precision is fp16, and there is no GPU"
        yield told("fp16-on-cpu", where=view.where("mixed_precision"), what=what)
    for key in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
        given = view.data.get(key)
        if given is not None and (view.count(key) is None or (view.count(key) or 0) < -1):
            yield from _value(view, key, "a whole number")
    for key in BLOCKS:
        if key in view.data and view.data[key] is not None and not isinstance(view.data[key], Mapping):
            yield from _value(view, key, "keys below it")
    if view.data.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        yield from _value(view, "compute_environment", "LOCAL_MACHINE")
    if not isinstance(view.data.get("distributed_type"), str):
        where = view.where("distributed_type")
        what = "distributed_type is missing" if "distributed_type" not in view.data else "distributed_type is no text"
        yield told("accelerate-value", where=where, what=what, right="DEEPSPEED")


def _value(view: View, key: str, right: str) -> Iterator[Lint]:
    what = f"{key} is {shown(view.data[key])}"
    yield told("accelerate-value", where=view.where(key), what=what, right=right)


def _shape(view: View) -> Iterator[Lint]:
    processes = view.count("num_processes")
    # Without DeepSpeed, and for one process, Accelerate takes 1.
    if processes in (None, -1) and view.data.get("distributed_type") != "NO" and "num_processes" not in _wrong(view):
        what = "num_processes is -1" if processes else "num_processes is missing"
        yield told("no-processes", where=view.where("num_processes"), what=what)
    if view.machines <= 1:
        return
    if processes and processes > 0 and processes % view.machines:
        each = processes // view.machines
        what = f"{processes} processes on {view.machines} machines"
        consequence = f"{each} on each, {each * view.machines} in all"
        where = view.where("num_processes")
        yield told("uneven-processes", where=where, what=what, consequence=consequence, machines=view.machines)
    if view.data.get("main_process_ip") in (None, ""):
        what = f"{view.machines} machines, and no main_process_ip"
        yield told("no-master", where=view.where("main_process_ip"), what=what)
    if view.count("main_process_port") == 0:
        what = f"{view.machines} machines, and main_process_port is 0"
        yield told("port-by-chance", where=view.where("main_process_port"), what=what)
    elif view.data.get("main_process_port") is None:
        what = f"{view.machines} machines, and no main_process_port"
        yield told("no-port", where=view.where("main_process_port"), what=what)
    rank = view.count("machine_rank")
    if rank is not None and not 0 <= rank < view.machines:
        what = f"machine_rank is {rank} of {view.machines} machines"
        yield told("machine-rank", where=view.where("machine_rank"), what=what, last=view.machines - 1)


def _wrong(view: View) -> tuple[str, ...]:
    """Numbers that are none: told already."""
    return tuple(key for key in ("num_processes",) if view.data.get(key) is not None and view.count(key) is None)


def _deepspeed(view: View) -> Iterator[Lint]:
    if not view.uses_deepspeed:
        if view.plugin:
            what = f"distributed_type is {shown(view.data.get('distributed_type'))}"
            yield told("deepspeed-config-unused", where=view.where("deepspeed_config"), what=what)
        return
    yield from _launcher(view)
    yield from _plugin_keys(view)
    if view.plugin.get("deepspeed_config_file") is not None:
        yield from _clash(view)
    else:
        yield from _plugin(view)


def _launcher(view: View) -> Iterator[Lint]:
    asked = view.plugin.get("deepspeed_multinode_launcher")
    where = view.where("deepspeed_config", "deepspeed_multinode_launcher")
    if view.machines > 1 and asked != "standard":
        what = f"{view.machines} machines, and deepspeed_multinode_launcher is {shown(asked or 'pdsh')}"
        yield told("multinode-launcher", where=where, what=what + ("" if asked else ", as it is left out"))
    elif asked in (None, "standard"):
        for key in ("deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter"):
            if view.plugin.get(key) is not None:
                yield told(
                    "launcher-keys-unused", where=view.where("deepspeed_config", key), what=f"{key}, with torchrun"
                )


def _plugin_keys(view: View) -> Iterator[Lint]:
    by_file_name = {file.rpartition(".")[2]: plugin for plugin, file in OVERLAP.items() if "offload" not in plugin}
    for key in view.plugin:
        if key in PLUGIN:
            continue
        where, what = view.where("deepspeed_config", key), f"{key} is no key of Accelerate's DeepSpeed plugin"
        if key in by_file_name:
            yield told("plugin-file-key", where=where, what=what, cure=f"write {by_file_name[key]}")
            continue
        near = difflib.get_close_matches(key, PLUGIN, n=1, cutoff=0.75)
        if near or not dskeys.places_of(key):
            what += f"; did you mean {near[0]!r}?" if near else ""
            cure = f"write {near[0]}" if near else "remove it"
            yield told("plugin-unknown-key", where=where, what=what, cure=cure)
        else:
            place = ".".join(filter(None, (dskeys.places_of(key)[0], key)))
            cure = f"use a DeepSpeed file (deepspeed_config_file) and write {place} there"
            yield told("plugin-file-key", where=where, what=what, cure=cure)


def _clash(view: View) -> Iterator[Lint]:
    for key, right in OVERLAP.items():
        if key in view.plugin:
            what = f"{key} beside deepspeed_config_file"
            yield told("plugin-and-file", where=view.where("deepspeed_config", key), what=what, right=right)
    if view.data.get("mixed_precision") not in (None, False):
        precision = view.data["mixed_precision"]
        right = "fp16.enabled and bf16.enabled" if precision not in ("fp16", "bf16") else f"{precision}.enabled"
        what = f"mixed_precision ({shown(precision)}) beside deepspeed_config_file"
        yield told("plugin-and-file", where=view.where("mixed_precision"), what=what, right=right)


def _plugin(view: View) -> Iterator[Lint]:
    for part in ("optimizer", "param"):
        key, device = f"offload_{part}_nvme_path", f"offload_{part}_device"
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_NVME_PATH"
        if view.plugin.get(key) not in (None, "none"):
            where, what = view.where("deepspeed_config", key), f"{key} is {shown(view.plugin[key])}"
            yield told("yaml-nvme-path", where=where, what=what, variable=variable)
        elif view.plugin.get(device) == "nvme":
            what = f"{device} is nvme, and nothing here can say where"
            yield told("yaml-nvme-path", where=view.where("deepspeed_config", device), what=what, variable=variable)
    yield from _plugin_values(view)
    stage = view.plugin.get("zero_stage", 2)
    if stage in (0, 1, 2):
        yield from _below_3(view, stage)
    elif stage == STAGE_3:
        yield from _at_3(view)
    yield from _clipping(view)
    look = _as_file(view)
    for rule in PLUGIN_RULES:
        yield from rule(look)


def _plugin_values(view: View) -> Iterator[Lint]:
    checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("zero_stage", lambda one: type(one) is int and 0 <= one <= STAGE_3, "0, 1, 2 or 3"),
        ("offload_optimizer_device", lambda one: one in DEVICES, "none, cpu or nvme"),
        ("offload_param_device", lambda one: one in DEVICES, "none, cpu or nvme"),
        ("gradient_accumulation_steps", lambda one: one == "auto" or (type(one) is int and one > 0), "1 or more"),
        ("gradient_clipping", lambda one: one == "auto" or (type(one) in (int, float) and one >= 0), "0 or more"),
        ("zero3_init_flag", lambda one: isinstance(one, bool), "true or false"),
        ("zero3_save_16bit_model", lambda one: isinstance(one, bool), "true or false"),
        ("deepspeed_moe_layer_cls_names", lambda one: isinstance(one, str), "class names with commas between them"),
    )
    for key, fits, right in checks:
        given = view.plugin.get(key)
        if given is not None and not fits(given):
            where, what = view.where("deepspeed_config", key), f"{key} is {shown(given)}"
            yield told("accelerate-value", where=where, what=what, right=right)


def _below_3(view: View, stage: int) -> Iterator[Lint]:
    if view.plugin.get("zero3_init_flag") is True:
        where = view.where("deepspeed_config", "zero3_init_flag")
        yield told("zero3-init-below-stage-3", where=where, what=f"zero3_init_flag at stage {stage}")
    if view.plugin.get("zero3_save_16bit_model") is True:
        where = view.where("deepspeed_config", "zero3_save_16bit_model")
        yield told("stage-3-key", where=where, what=f"zero3_save_16bit_model at stage {stage}")
    if view.plugin.get("deepspeed_moe_layer_cls_names"):
        where = view.where("deepspeed_config", "deepspeed_moe_layer_cls_names")
        yield told("moe-leaf-below-stage-3", where=where, what=f"deepspeed_moe_layer_cls_names at stage {stage}")


def _at_3(view: View) -> Iterator[Lint]:
    if view.plugin.get("zero3_save_16bit_model") is not True:
        where = view.where("deepspeed_config", "zero3_save_16bit_model")
        what = "zero3_save_16bit_model is not true"
        yield told("no-gather", where=where, what=what, right="zero3_save_16bit_model")
    fp8 = view.data.get("fp8_config")
    backend = (fp8.get("backend") or fp8.get("fp8_backend")) if isinstance(fp8, Mapping) else None
    if str(backend).upper() == "MSAMP":
        yield told("msamp-at-stage-3", where=view.where("fp8_config", "backend"), what="fp8_config.backend is MSAMP")


def _clipping(view: View) -> Iterator[Lint]:
    clipping = view.plugin.get("gradient_clipping", "auto")
    where = view.where("deepspeed_config", "gradient_clipping")
    if clipping == "auto":
        what = "gradient_clipping is " + ('"auto"' if "gradient_clipping" in view.plugin else "left out")
        cure = "write the norm that is meant; for none use a DeepSpeed file"
        yield told("clipping-default", where=where, what=what, cure=cure)
    elif clipping == 0 and clipping is not False:
        yield told("plugin-clipping-zero", where=where, what="gradient_clipping is 0")


def _as_file(view: View) -> Look:
    """The plugin's settings as a DeepSpeed file would say them, at the YAML's places."""
    config = DsConfig(name=view.document.name, data={}, places={(): view.where("deepspeed_config")})
    stage: dict[str, object] = {"zero_stage": 2}  # what Accelerate takes where nothing is said
    for key, value in (stage | dict(view.plugin)).items():
        path: Place = tuple(OVERLAP.get(key, "").split("."))
        if key.endswith(("_device", "_stage")):
            config = config.put(path, value, where=view.where("deepspeed_config", key))  # type: ignore[arg-type]
    return Look(
        config=config,
        world_size=view.world_size or view.count("num_processes"),
        slots=None,
        accelerator=view.accelerator,
        nvme=None,
        # Where they are is told otherwise.
        supplied=frozenset(OVERLAP[f"offload_{part}_nvme_path"] for part in ("optimizer", "param")),
    )


Rule = Callable[[View], Iterator[Lint]]
RULES: tuple[Rule, ...] = (_keys, _values, _shape, _deepspeed)

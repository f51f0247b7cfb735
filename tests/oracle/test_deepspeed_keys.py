"""The table of DeepSpeed's keys (launcher/dskeys.py) against DeepSpeed's own classes, and against what it asks for.

Where a section is a class, its fields are compared: names, kinds, bounds, words, what is deprecated. Where it is a
dictionary that is asked for keys, the whole of DeepSpeed's reading is run over one that notes down every question.
"""

from __future__ import annotations

import ast
import enum
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from launcher import dskeys

pytestmark = pytest.mark.oracle

# Keys that are asked for elsewhere than in DeepSpeedConfig, and where.
ELSEWHERE = {
    "msamp": "accelerate.utils.dataclasses.DeepSpeedPlugin",
    "data_parallel_size": "deepspeed.initialize",
    "sequence_parallel_size": "deepspeed.initialize, and DeepSpeedConfig where processes have met",
    "pipeline.use_reentrant": "deepspeed.runtime.pipe.engine",
    "data_efficiency.data_sampling.dynamic_batching.metrics_path": "deepspeed.runtime.data_pipeline",
    "data_efficiency.data_sampling.dynamic_batching.sequence_picking_order": "deepspeed.runtime.data_pipeline",
}


def models() -> dict[str, Any]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": precision_config.DeepSpeedFP16Config,
        "bf16": precision_config.DeepSpeedBF16Config,
        "hybrid_engine": HybridEngineConfig,
        "tensorboard": monitor.TensorBoardConfig,
        "wandb": monitor.WandbConfig,
        "csv_monitor": monitor.CSVConfig,
        "comet": monitor.CometConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "compile": CompileConfig,
        "comms_logger": CommsLoggerConfig,
        "weight_quantization": WeightQuantConfig,
        "tensor_parallel": TPTrainingConfig,
    }


# The classes


def fields(model: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every field of a model and of those inside it, with what our table should say of it."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    for name, field in model.model_fields.items():
        extra = field.json_schema_extra or {}
        said = " ".join(
            [
                kind_of(field.annotation),
                *sorted(f"{type(one).__name__.lower()} {bound(one):g}" for one in field.metadata),
                *([f"deprecated for {extra['new_param']}"] if extra.get("deprecated") else []),
            ]
        )
        for one in filter(None, (name, field.alias)):
            yield f"{path}.{one}", said
        for inner in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(inner) and issubclass(inner, DeepSpeedConfigModel):
                yield from fields(inner, f"{path}.{field.alias or name}")


def bound(limit: Any) -> float:
    return float(next(getattr(limit, name) for name in ("gt", "ge", "lt", "le") if hasattr(limit, name)))


def kind_of(annotation: Any) -> str:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    origin = get_origin(annotation)
    if origin is Union:
        inner = [one for one in get_args(annotation) if one is not type(None)]
        return "|".join(sorted(map(kind_of, inner))) + ("?" if len(inner) < len(get_args(annotation)) else "")
    if origin is Literal:
        return "|".join(sorted(get_args(annotation)))
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum) and issubclass(annotation, int):
        return "int"
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return "|".join(sorted(str(one.value) for one in annotation))
    if inspect.isclass(annotation) and issubclass(annotation, DeepSpeedConfigModel):
        return "map"
    name = getattr(origin or annotation, "__name__", str(annotation))
    names = {"str": "text", "float": "num", "Path": "text", "tuple": "list", "dict": "map", "Dict": "map"}
    return {**names, "object": "any", "dtype": "never"}.get(name, name)


def in_our_words(key: dskeys.Key) -> str:
    low = f"{'ge' if key.closed[0] else 'gt'} {key.low:g}" if key.low > float("-inf") else ""
    high = f"{'le' if key.closed[1] else 'lt'} {key.high:g}" if key.high < float("inf") else ""
    kinds = [] if key.kind == "word" else [key.kind]
    kind = "|".join(sorted([*kinds, *key.words])) + ("?" if key.null else "")
    deprecated = f"deprecated for {key.instead}" if key.instead else ""
    return " ".join(filter(None, (kind, low, high, deprecated)))


# Where we say more than a class does: its validators, or what Accelerate makes of it.
STRICTER = {
    "zero_optimization.stage": ("int", "int ge 0 le 3"),
    "zero_optimization.zenflow.select_strategy": ("text", "auto|epoch|step"),
    "zero_optimization.zenflow.select_interval": ("int|text", "auto|int"),
    "zero_optimization.zenflow.update_interval": ("int|text", "auto|int ge 1"),
    "fp16.loss_scale": ("num", "num ge 0"),
    "fp16.loss_scale_window": ("int", "int gt 0"),  # where the scale is dynamic
    "fp16.min_loss_scale": ("int", "int gt 0"),
    "tensor_parallel.autotp_size": ("int", "int ge 0"),
}


def test_every_field_of_a_class_is_in_the_table_with_its_kind() -> None:
    theirs = {name: said for path, model in models().items() for name, said in fields(model, path)}
    theirs |= {name: ours for name, (said, ours) in STRICTER.items() if theirs[name] == said}
    refusing = {path: section for path, section in dskeys.SECTIONS.items() if section.rest == "refuses"}
    ours = {
        ".".join((*path, name)): in_our_words(key)
        for path, section in refusing.items()
        for name, key in section.keys.items()
    }
    assert {name: said for name, said in theirs.items() if ours.get(name) != said} == {}
    assert sorted(set(ours) - set(theirs)) == []


def test_the_classes_refuse_what_they_do_not_know() -> None:
    from pydantic import ValidationError

    for model in models().values():
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            model(no_such_key=1)


@pytest.mark.parametrize(
    ("section", "key", "wrong"),
    [
        ("zenflow", "select_strategy", "never"),
        ("zenflow", "select_interval", "often"),
        ("zenflow", "update_interval", 0),
        ("fp16", "loss_scale", -1),
        ("fp16", "loss_scale_window", 0),
        ("fp16", "min_loss_scale", 0),
    ],
)
def test_where_we_are_stricter_a_validator_is(section: str, key: str, wrong: object) -> None:
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match=key):
        ZenFlowConfig(**{key: wrong}) if section == "zenflow" else DeepSpeedFP16Config(enabled=True, **{key: wrong})


# The dictionaries


class Asked(dict[str, Any]):
    """A dictionary that notes down which keys it was asked for, and so do those inside it."""

    def __init__(self, values: Mapping[str, Any], path: str, log: set[str]) -> None:
        super().__init__({key: self._wrap(key, value, path, log) for key, value in values.items()})
        self.path, self.log = path, log

    @staticmethod
    def _wrap(key: str, value: Any, path: str, log: set[str]) -> Any:
        return Asked(value, f"{path}{key}.", log) if isinstance(value, Mapping) else value

    def __copy__(self) -> Asked:
        return Asked(dict(self), self.path, self.log)

    def keys(self) -> Any:
        return self  # `key in d.keys()` is a question like any other

    def __contains__(self, key: object) -> bool:
        self.log.add(f"{self.path}{key}")
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.log.add(f"{self.path}{key}")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.log.add(f"{self.path}{key}")
        return super().get(key, default)


EVERYTHING: dict[str, Any] = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {}},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "torch_autocast": {"enabled": False, "dtype": "bf16", "lower_precision_safe_modules": []},
    "activation_checkpointing": {"profile": False},
    "flops_profiler": {"enabled": False},
    "autotuning": {"enabled": False, "model_info": {"profile": False}},
    "data_efficiency": {
        "enabled": False,
        "data_sampling": {
            "enabled": False,
            "curriculum_learning": {"enabled": False},
            "dynamic_batching": {"enabled": True, "max_tokens": 1},
        },
        "data_routing": {"enabled": False, "random_ltd": {"enabled": False}},
    },
    "checkpoint": {"parallel_write": {"pipeline_stage": False}, "writer": {"type": "fast"}},
    "data_types": {"grad_accum_dtype": None},
    "aio": {"block_size": 1},
    "timers": {"throughput": {"enabled": True}},
    "expert_parallel": {"enabled": False},
}


def asked_for() -> set[str]:
    """Every key that DeepSpeed asks a configuration for, without those that its classes take."""
    from deepspeed.runtime.config import DeepSpeedConfig

    log: set[str] = set()
    DeepSpeedConfig(Asked(EVERYTHING, "", log))
    return log - {"optimizer.params.max_grad_norm"}  # asked for, to refuse it


def pipeline_keys() -> set[str]:
    from deepspeed.runtime.config import get_pipeline_config

    return {f"pipeline.{key}" for key in get_pipeline_config({})}


def test_every_key_that_is_asked_for_is_in_the_table_and_the_other_way_round() -> None:
    removed = {".".join(path) for path in dskeys.REMOVED}
    open_below = tuple(f"{'.'.join(path)}." for path, section in dskeys.SECTIONS.items() if section.rest != "ignores")
    ours = {
        ".".join((*path, name))
        for path, section in dskeys.SECTIONS.items()
        if section.rest == "ignores"
        for name in section.keys
    }
    theirs = {name for name in asked_for() if not name.startswith(open_below)} | pipeline_keys()
    assert sorted(theirs - ours - removed) == []
    assert sorted(ours - theirs - set(ELSEWHERE)) == []


def test_what_was_removed_is_refused_and_that_is_all() -> None:
    from deepspeed.runtime import config

    theirs = {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    theirs |= {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert {".".join(path) for path in dskeys.REMOVED} == theirs


def test_what_is_asked_for_elsewhere_is_asked_for_there() -> None:
    import deepspeed
    import deepspeed.runtime.data_pipeline.constants as pipeline
    import deepspeed.runtime.pipe.engine
    from accelerate import DeepSpeedPlugin

    sizes = '"sequence_parallel_size" in config and "data_parallel_size" in config'
    assert sizes in inspect.getsource(deepspeed.initialize)
    assert "pipeline['use_reentrant']" in inspect.getsource(deepspeed.runtime.pipe.engine)
    assert '"msamp" not in self.deepspeed_config' in inspect.getsource(DeepSpeedPlugin)
    assert (pipeline.DYNAMIC_BATCHING_METRICS_PATH, pipeline.DYNAMIC_BATCHING_SEQUENCE_PICKING_ORDER) == (
        "metrics_path",
        "sequence_picking_order",
    )


WORDS = {
    "communication_data_type": "Supported data types: ['fp16', 'bf16', 'fp32']",
    "seq_parallel_communication_data_type": "Supported data types: ['fp16', 'bf16', 'fp32']",
    "gradient_allreduce_op": "Supported operations: ['mean', 'sum']",
    "checkpoint.tag_validation": "expecting one of ['WARN', 'IGNORE', 'FAIL']",
    "checkpoint.writer.type": "expecting one of ['MOCK', 'PYTHON', 'FAST']",
    "checkpoint.writer.data_parallel": "expecting one of ['REPLICA', 'SOCKET', 'MACHINE']",
}


@pytest.mark.parametrize("dotted", WORDS)
def test_words_of_a_dictionary_are_those_that_deepspeed_takes(dotted: str) -> None:
    *path, name = dotted.split(".")
    key = dskeys.SECTIONS[tuple(path)].keys[name]
    for word in key.words:
        read_with(dotted, word.upper() if key.any_case else word)
    with pytest.raises(Exception) as refused:  # noqa: PT011 - an assertion here, an error of its own there
        read_with(dotted, "nonsense")
    assert WORDS[dotted].lower() in str(refused.value).lower()


@pytest.mark.parametrize("word", dskeys.SECTIONS[("torch_autocast",)].keys["dtype"].words)
def test_a_precision_may_be_written_in_these_ways(word: str) -> None:
    from deepspeed.runtime.config import DtypeEnum

    assert DtypeEnum(word)


def read_with(dotted: str, value: object) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config: Any = value
    for part in reversed(dotted.split(".")):
        config = {part: config}
    DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1} | config)


# Optimizers and schedulers


def parameters(kind: Any) -> set[str]:
    """What a constructor takes beside the parameters of the model."""
    skipped = ("self", "params", "model_params", "optimizer", "last_batch_iteration", "last_epoch")
    return {name for name in inspect.signature(kind).parameters if name not in skipped}


def test_the_optimizers_that_deepspeed_makes_are_these() -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    assert {name for name in dskeys.MADE if "/" not in name} == set(DEEPSPEED_OPTIMIZERS)


def test_each_takes_what_its_class_takes() -> None:
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from torch.optim import Adagrad

    popped = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}  # by the engine, before it makes one
    on_gpu = parameters(FusedAdam) | popped
    offloaded = parameters(DeepSpeedCPUAdam) - {"adamw_mode"} | popped
    theirs = {
        "adam": on_gpu,
        "adamw": on_gpu,
        "adam/offloaded": offloaded,
        "adamw/offloaded": offloaded,
        "adagrad": parameters(Adagrad),
        "adagrad/offloaded": parameters(DeepSpeedCPUAdagrad),
        "lamb": parameters(FusedLamb) - {"max_grad_norm"},  # which the engine refuses
        "lion": parameters(FusedLion),
        "lion/offloaded": parameters(DeepSpeedCPULion),
    }
    assert {name: set(dskeys.MADE[name]) for name in theirs} == theirs


def test_muon_takes_what_its_halves_take_and_the_engine_takes_out() -> None:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine.get_optimizer_configuration)
    popped = {"torch_adam", "adam_w_mode", "fp32_optimizer_states", "foreach"}
    assert "optimizer_parameters.pop('foreach'" in source
    halves = set(DeepSpeedEngine._MUON_HALF_KEYS) | set(DeepSpeedEngine._ADAM_HALF_KEYS) | {"muon_lr", "adam_lr"}
    assert '.get("per_head_muon", False)' in inspect.getsource(deepspeed.set_optimizer_flags)
    assert set(dskeys.MADE["muon"]) == halves | popped | {"per_head_muon"}


def test_the_optimizers_of_torch_are_these() -> None:
    import torch

    theirs = {
        name: parameters(one)
        for name, one in vars(torch.optim).items()
        if inspect.isclass(one) and name not in ("Optimizer", "Adagrad", "Muon")  # DeepSpeed makes the last two
    }
    assert {name: set(takes) for name, takes in dskeys.TORCH.items()} == theirs


def test_the_optimizers_that_zero_was_tested_with_are_these() -> None:
    from deepspeed.runtime.zero import utils

    classes = {
        "Adam": "adam",
        "AdamW": "adamw",
        "FusedAdam": "adamw",
        "DeepSpeedCPUAdam": "adamw",
        "ZenFlowCPUAdam": "adamw",
        "Adagrad": "adagrad",
        "DeepSpeedCPUAdagrad": "adagrad",
        "DeepSpeedCPULion": "lion",
        "FusedLion": "lion",
        "MuonWithAuxAdam": "muon",
    }
    theirs = {classes[one.__name__] for one in utils.ZERO_SUPPORTED_OPTIMIZERS}
    assert "MuonWithAuxAdam" in inspect.getsource(utils.is_zero_supported_optimizer)
    assert theirs | {"muon"} == dskeys.TESTED


@pytest.mark.parametrize("name", sorted(dskeys.OPTIMIZER_WORDS))
def test_what_people_write_for_an_optimizer_is_none(name: str) -> None:
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    assert name not in DEEPSPEED_OPTIMIZERS
    assert name not in {one.lower() for one in vars(torch.optim)}


def test_the_schedules_are_these() -> None:
    from deepspeed.runtime import lr_schedules
    from torch.optim import lr_scheduler

    def told(kind: Any) -> set[str]:
        signature = inspect.signature(kind).parameters
        return {f"{name}!" if signature[name].default is inspect.Parameter.empty else name for name in parameters(kind)}

    theirs = {name: told(getattr(lr_schedules, name)) for name in lr_schedules.VALID_LR_SCHEDULES}
    # Those of torch that are made of text and numbers; `verbose` and what is no schedule aside.
    described = [
        name
        for name, one in vars(lr_scheduler).items()
        if inspect.isclass(one) and issubclass(one, lr_scheduler.LRScheduler) and not name.endswith("LRScheduler")
        if name not in ("ChainedScheduler", "SequentialLR", "LambdaLR", "MultiplicativeLR")
    ]
    theirs |= {name: told(getattr(lr_scheduler, name)) for name in described}
    assert {name: set(takes) for name, takes in dskeys.SCHEDULES.items()} == theirs


# Who fills an "auto"


def keys_assigned(function: Any, *names: str) -> set[str]:
    """The text keys of every dictionary or item that a function assigns to one of these names, or updates it with."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = [one.value if isinstance(one, ast.Subscript) else one for one in node.targets]
            if any(isinstance(one, ast.Name) and one.id in names for one in targets):
                found |= {key for one in (node.value, *node.targets) for key in text_keys(one)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in [f"{name}.update" for name in names]:
            found |= {key for one in node.args for key in text_keys(one)}
    return found


def text_keys(node: ast.AST) -> Iterator[str]:
    keys: list[Any] = []
    if isinstance(node, ast.Dict):
        keys = list(node.keys)
    elif isinstance(node, ast.Subscript):
        keys = [node.slice]
    yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def test_accelerate_fills_these_from_the_script_and_these_from_nothing() -> None:
    from accelerate import Accelerator, DeepSpeedPlugin

    prepare = keys_assigned(Accelerator._prepare_deepspeed, "config_kwargs")
    precision = keys_assigned(DeepSpeedPlugin.set_mixed_precision, "kwargs")
    by_plugin = tree_values(DeepSpeedPlugin.__post_init__, "plugin_to_config_mapping")
    from_script = {key for key, who in dskeys.FILLED.items() if who != "trainer"}
    assert prepare | precision | by_plugin == from_script | set(dskeys.DEFAULTED)


def tree_values(function: Any, name: str) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        if any(isinstance(one, ast.Name) and one.id == name for one in node.targets)
        for value in node.value.values
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }


def test_the_trainer_fills_these_besides() -> None:
    from transformers.integrations import HfTrainerDeepSpeedConfig

    tree = ast.parse(textwrap.dedent(inspect.getsource(HfTrainerDeepSpeedConfig)))
    theirs = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("fill_match", "fill_only") and isinstance(node.args[0], ast.Constant)
    }
    with_default = {key for key, (_value, has_trainer) in dskeys.DEFAULTED.items() if has_trainer}
    assert theirs == set(dskeys.FILLED) | with_default


@pytest.mark.parametrize("key", [key for key, (_value, trainer) in dskeys.DEFAULTED.items() if not trainer])
def test_an_auto_becomes_this_without_a_word(key: str) -> None:
    assert_becomes(key, dskeys.DEFAULTED[key][0])


def assert_becomes(key: str, value: object) -> None:
    from accelerate import DeepSpeedPlugin

    *path, name = key.split(".")
    config: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    block = config
    for part in path:
        block = block.setdefault(part, {})
    block[name] = "auto"
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    plugin.set_mixed_precision("no")
    assert plugin.get_value(key) == value


@pytest.mark.parametrize("key", ["fp16.enabled", "bf16.enabled"])
def test_a_precision_on_auto_is_off_unless_the_launch_says_it(key: str) -> None:
    assert_becomes(key, dskeys.DEFAULTED[key][0])

"""What will go wrong with a DeepSpeed configuration: its keys and values, and what they say together.

Each rule looks at one thing and yields what it finds; a value of the wrong kind is told once, and others pass it by.
tests/oracle/test_deepspeed_lints.py holds the facts about DeepSpeed and Accelerate on which they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from launcher.dsconfig import DsConfig
from launcher.lints.catalogue import Lint, told
from launcher.lints.keys import autos, keys
from launcher.lints.look import AUTO, STAGE_3, Look, shown
from launcher.lints.optimizers import optimizer, scheduler

PARTS = ("offload_optimizer", "offload_param")


def lint_deepspeed(
    config: DsConfig,
    *,
    world_size: int | None = None,
    slots: tuple[int, ...] | None = None,
    accelerator: Literal["cuda", "cpu"] = "cuda",
    nvme: tuple[str, ...] | None = None,
    supplied: frozenset[str] = frozenset(),
) -> tuple[Lint, ...]:
    """Everything that speaks against a configuration, errors first.

    `world_size`: all processes; `slots`: those of each node; `nvme`: the paths that are mounts where the job runs;
    None: not known. `supplied`: the dotted keys that will be filled in before Accelerate sees the file.
    """
    look = Look(
        config=config, world_size=world_size, slots=slots, accelerator=accelerator, nvme=nvme, supplied=supplied
    )
    found = [lint for rule in RULES for lint in rule(look)]
    return tuple(sorted(dict.fromkeys(found), key=lambda lint: lint.level != "error"))


def _zero(look: Look) -> Iterator[Lint]:
    if not look.has("zero_optimization") and not any(key.startswith("zero_optimization.") for key in look.supplied):
        yield told("zero-missing", where=look.where(""), what="zero_optimization is missing")
    if look.flag("zero_optimization.legacy_stage1"):
        yield told("legacy-stage-1", where=look.where("zero_optimization.legacy_stage1"), what="legacy_stage1 is true")
    if look.stage == STAGE_3 and look.flag("zero_optimization.elastic_checkpoint"):
        where = look.where("zero_optimization.elastic_checkpoint")
        yield told("elastic-checkpoint", where=where, what="elastic_checkpoint is true at stage 3")


# Batches and processes

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def _batch(look: Look) -> Iterator[Lint]:
    train, micro = look.whole(TRAIN), look.whole(MICRO)
    if look.get(TRAIN) is None and look.get(MICRO) is None and not {TRAIN, MICRO} & look.supplied:
        yield told("batch-missing", where=look.where(""), what=f"neither {TRAIN} nor {MICRO} is there")
    says_micro = MICRO in look.supplied or look.get(MICRO) is not None
    if look.get(TRAIN) == AUTO and not says_micro and TRAIN not in look.supplied:
        what = f'{TRAIN} is "auto", and {MICRO} is missing'
        yield told("auto-unfilled", where=look.where(TRAIN), what=what, cure=f'add "{MICRO}": "auto"')
    if train is None:
        return
    # Accelerate puts 1 where the file does not say how often to accumulate.
    steps = look.whole(STEPS) if look.has(STEPS) else 1
    is_open = look.get(MICRO) in (None, AUTO) and MICRO not in look.supplied
    if is_open and look.stage == STAGE_3 and train != (steps or 1) * (look.world_size or 1):
        what = f"{TRAIN} is {train}, and {MICRO} is {'left out' if look.get(MICRO) is None else shown(AUTO)}"
        yield told("batch-zero-init", where=look.where(TRAIN), what=what)
    if steps and (micro or not says_micro):
        yield from _identity(look, train=train, micro=micro, steps=steps, world=_data_parallel(look))


def _data_parallel(look: Look) -> int | None:
    """How many processes see data of their own; None where it cannot be known."""
    if look.world_size is None or look.whole("tensor_parallel.autotp_size") not in (None, 1):
        return None
    return look.world_size // (look.whole("sequence_parallel_size") or 1)


def _identity(look: Look, *, train: int, micro: int | None, steps: int, world: int | None) -> Iterator[Lint]:
    """train = micro x steps x world, as DeepSpeed will ask; what is not known is chosen as it chooses."""
    if world is None and (micro is None or train % (micro * steps) == 0):
        return
    own = micro or max(1, train // (world or 1) // steps)
    product = own * steps * (world or 1)
    if world is not None and product == train:
        return
    said = f"{own} per process x {steps} accumulated"
    said += " does not divide it" if world is None else f" x {world} processes = {product}"
    said += "" if look.has(STEPS) else f" ({STEPS} is left out: Accelerate takes 1)"
    cure = f"set {TRAIN} to {product}" if world and micro else f"set {TRAIN} to a multiple of {steps * (world or own)}"
    if world and micro and train % (micro * world) == 0:
        cure += f", or {STEPS} to {train // (micro * world)}"
    yield told("batch-identity", where=look.where(TRAIN), what=f"{TRAIN} is {train}, but {said}", cure=cure)


def _processes(look: Look) -> Iterator[Lint]:
    if look.slots and len(set(look.slots)) > 1:
        what = f"the nodes have {', '.join(map(str, look.slots))} slots"
        yield told("uneven-slots", where=look.where(""), what=what, fewest=min(look.slots))
    size = look.whole("zero_optimization.zero_hpz_partition_size")
    if look.stage == STAGE_3 and size and look.world_size and look.world_size % min(size, look.world_size):
        what = f"zero_hpz_partition_size is {size}, and {look.world_size} processes do not divide by it"
        yield told("secondary-partition", where=look.where("zero_optimization.zero_hpz_partition_size"), what=what)
    if look.slots and len(look.slots) > 1 and look.below_3 and not look.flag("checkpoint.use_node_local_storage"):
        what = f"{len(look.slots)} nodes, and checkpoint.use_node_local_storage is not true"
        yield told("node-local-checkpoints", where=look.where("checkpoint.use_node_local_storage"), what=what)


# Offloading


def _offload(look: Look) -> Iterator[Lint]:
    for part in PARTS:
        device, at = look.device(part), f"zero_optimization.{part}.device"
        if device == "none":
            yield from _unused_path(look, part)
            continue
        said = f"{part}.device is {device!r} at stage {look.stage}"
        if part == "offload_optimizer" and look.stage == 0:
            yield told("offload-without-zero", where=look.where(at), what=said)
        elif part == "offload_param" and look.below_3:
            yield told("offload-param-below-stage-3", where=look.where(at), what=said)
        elif device == "nvme" and look.below_3:
            yield told("nvme-below-stage-3", where=look.where(at), what=said)
        elif device == "nvme":
            yield from _path(look, part)
        else:
            yield from _unused_path(look, part)
    yield from _ratio(look)


def _unused_path(look: Look, part: str) -> Iterator[Lint]:
    at = f"zero_optimization.{part}.nvme_path"
    path = look.get(at)
    is_said = isinstance(path, str) and path not in ("", "none", AUTO)
    if is_said and look.get(f"zero_optimization.{part}.device") != AUTO:
        yield told("nvme-path-unused", where=look.where(at), what=f"{part}.nvme_path is {path!r}")


def _path(look: Look, part: str) -> Iterator[Lint]:
    at = f"zero_optimization.{part}.nvme_path"
    path = look.get(at)
    if at in look.supplied or path == AUTO or not (path is None or isinstance(path, str)):
        return
    if path in (None, "", "none"):
        what = f"{part}.device is 'nvme', and nvme_path is {'missing' if path is None else shown(path)}"
        yield told("nvme-without-path", where=look.where(at), what=what)
        return
    mounts = ", ".join(look.nvme) if look.nvme else "the nodes have none (nvme: in the inventory)"
    if not path.startswith("/"):
        what = f"{part}.nvme_path is {path!r}, relative to the working directory"
        yield told("nvme-no-mount", where=look.where(at), what=what, mounts=mounts)
    elif look.nvme is not None and not any(_inside(path, mount) for mount in look.nvme):
        what = f"{part}.nvme_path is {path!r}, which is no mount in the container"
        yield told("nvme-no-mount", where=look.where(at), what=what, mounts=mounts)


def _inside(path: str, mount: str) -> bool:
    return ".." not in path.split("/") and f"{path}/".startswith(f"{mount.rstrip('/')}/")


def _ratio(look: Look) -> Iterator[Lint]:
    at = "zero_optimization.offload_optimizer.ratio"
    ratio = look.get(at)
    if look.below_3 and isinstance(ratio, int | float) and ratio < 1:
        yield told("offload-ratio", where=look.where(at), what=f"ratio is {ratio} at stage {look.stage}")


STAGE_3_KEYS = (
    *("sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
    *("save_muon_momentum_buffer_in_memory", "offload_optimizer.super_offload"),
)


GATHER = (
    "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)


def _stage_3(look: Look) -> Iterator[Lint]:
    zero = look.block("zero_optimization")
    if look.below_3:
        mine = [key for key in zero if key.startswith("stage3_") and zero[key] is not False]
        mine += [key for key in STAGE_3_KEYS if look.get(f"zero_optimization.{key}") not in (None, False)]
        for key in mine:
            where = look.where(f"zero_optimization.{key}")
            yield told("stage-3-key", where=where, what=f"{key} at stage {look.stage}")
        if look.block("zero_optimization.leaf_module"):
            where = look.where("zero_optimization.leaf_module")
            yield told("moe-leaf-below-stage-3", where=where, what=f"leaf_module at stage {look.stage}")
        return
    given = [f"zero_optimization.{name}" for name in GATHER if look.has(f"zero_optimization.{name}")]
    if look.stage == STAGE_3 and not any(look.flag(name) or name in look.supplied for name in given):
        where = look.where(given[0] if given else "zero_optimization.stage")
        if not given or look.get(given[0]) != AUTO:
            yield told("no-gather", where=where, what=f"{GATHER[0]} is not true", right=GATHER[0])


# Precision


def _precision(look: Look) -> Iterator[Lint]:
    if look.flag("fp16.enabled") and look.flag("bf16.enabled"):
        yield told("fp16-and-bf16", where=look.where("bf16.enabled"), what="fp16 and bf16 are both enabled")
    if look.accelerator == "cpu" and look.flag("fp16.enabled"):
        yield told("fp16-on-cpu", where=look.where("fp16.enabled"), what="fp16 is enabled, and there is no GPU")
    if look.accelerator == "cpu" and look.flag("aio.use_gds"):
        yield told("gds-on-cpu", where=look.where("aio.use_gds"), what="aio.use_gds is true, and there is no GPU")
    wanted = _DTYPES.get(str(look.get("data_types.param_dtype")))
    if wanted and wanted != look.precision and not _precision_open(look):
        what = f"data_types.param_dtype is {wanted}, and training is in {look.precision}"
        yield told("param-dtype", where=look.where("data_types.param_dtype"), what=what)
    summed = _DTYPES.get(str(look.get("data_types.grad_accum_dtype")))
    if look.stage == 0 and summed and summed != look.precision and not _precision_open(look):
        what = f"data_types.grad_accum_dtype is {summed} at stage 0, and training is in {look.precision}"
        yield told("accum-dtype-without-zero", where=look.where("data_types.grad_accum_dtype"), what=what)
    yield from _master_weights(look)


_DTYPES: Mapping[str, str] = {
    **dict.fromkeys(("torch.float16", "fp16", "float16", "half"), "fp16"),
    **dict.fromkeys(("torch.bfloat16", "bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("torch.float32", "fp32", "float32", "float"), "fp32"),
}


def _precision_open(look: Look) -> bool:
    """Whether the precision is decided elsewhere."""
    keys = ("fp16.enabled", "bf16.enabled")
    return any(look.get(key) == AUTO or key in look.supplied for key in keys)


def _master_weights(look: Look) -> Iterator[Lint]:
    for dtype in ("fp16", "bf16"):
        at = f"{dtype}.{dtype}_master_weights_and_grads"
        if not look.flag(at):
            continue
        in_bf16 = dtype == "bf16" and look.flag("bf16.bf16_optimizer_states")
        if look.stage == 0:
            yield told(
                "master-weights", where=look.where(at), what=f"{at} at stage 0", cure="set the stage to 1, 2 or 3"
            )
        elif look.stage and not look.offloads and not in_bf16 and not _device_open(look):
            cure = "offload the optimizer, or leave it out"
            yield told("master-weights", where=look.where(at), what=f"{at} without an offloaded optimizer", cure=cure)
    at = "bf16.bf16_optimizer_states"
    if look.flag(at) and not look.flag("bf16.bf16_master_weights_and_grads"):
        cure = "set bf16.bf16_master_weights_and_grads to true, too"
        what = f"{at} without bf16.bf16_master_weights_and_grads"
        yield told("master-weights", where=look.where(at), what=what, cure=cure)


def _device_open(look: Look) -> bool:
    at = "zero_optimization.offload_optimizer.device"
    return look.get(at) == AUTO or at in look.supplied


# Gradients, and what else meets


def _gradients(look: Look) -> Iterator[Lint]:
    if not look.has("gradient_clipping"):
        cure = 'write "gradient_clipping": 0 for none, or the norm that is meant'
        yield told("clipping-default", where=look.where(""), what="gradient_clipping is left out", cure=cure)
    if look.get("gradient_allreduce_op") == "sum":
        yield from _sum(look)
    if look.get("zero_optimization.compute_grad_norm") is False:
        yield from _grad_norm(look)
    if look.stage in (2, STAGE_3) and look.flag("zero_optimization.reduce_scatter", default=True):
        factor = look.get("gradient_predivide_factor")
        if isinstance(factor, int | float) and factor != 1:
            what = f"gradient_predivide_factor is {factor} at stage {look.stage}"
            yield told("predivide", where=look.where("gradient_predivide_factor"), what=what)
        if look.flag("prescale_gradients"):
            what = f"prescale_gradients is true at stage {look.stage}"
            yield told("predivide", where=look.where("prescale_gradients"), what=what)


def _sum(look: Look) -> Iterator[Lint]:
    against = (
        (look.stage == STAGE_3, "ZeRO stage 3", "a lower stage"),
        (look.get("zero_optimization.zenflow") is not None, "ZenFlow", "leave zenflow out"),
        (look.flag("compile.deepcompile"), "DeepCompile", "set compile.deepcompile to false"),
    )
    for speaks, name, cure in against:
        if speaks:
            where = look.where("gradient_allreduce_op")
            yield told("sum-gradients", where=where, what=f'gradient_allreduce_op is "sum", with {name}', cure=cure)


def _grad_norm(look: Look) -> Iterator[Lint]:
    clips = look.clipping is not None and look.clipping > 0
    against = (
        (look.stage in (0, STAGE_3), f"stage {look.stage}", "leave it out, or use stage 1 or 2"),
        (clips, f"clipping at {look.clipping}", 'write "gradient_clipping": 0, or leave it out'),
        (look.offloads, "an offloaded optimizer", "leave it out, or do not offload the optimizer"),
        (look.get("zero_optimization.zenflow") is not None, "ZenFlow", "leave it out, or zenflow"),
    )
    for speaks, name, cure in against:
        if speaks:
            where = look.where("zero_optimization.compute_grad_norm")
            yield told("grad-norm", where=where, what=f"compute_grad_norm is false, with {name}", cure=cure)


_PACKAGES: Mapping[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def _surroundings(look: Look) -> Iterator[Lint]:
    if look.get("steps_per_print") is not None:
        yield told("steps-per-print", where=look.where("steps_per_print"), what="steps_per_print is set")
    if look.flag("autotuning.enabled"):
        yield told("autotuning", where=look.where("autotuning.enabled"), what="autotuning.enabled is true")
    for section, package in _PACKAGES.items():
        if look.flag(f"{section}.enabled"):
            where = look.where(f"{section}.enabled")
            yield told("monitor-package", where=where, what=f"{section} is enabled", package=package, section=section)


Rule = Callable[[Look], Iterator[Lint]]
RULES: tuple[Rule, ...] = (
    *(keys, autos, _zero, _batch, _processes, _offload, _stage_3, _precision, optimizer, scheduler),
    *(_gradients, _surroundings),
)
# Those that hold for the plugin's settings, too: a script's optimizer, and where what is offloaded.
PLUGIN_RULES: tuple[Rule, ...] = (_offload, optimizer)

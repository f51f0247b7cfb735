"""Optimizers and schedulers: whether DeepSpeed has them, what they take, and where they can run."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from launcher import dskeys
from launcher.lints.catalogue import Lint, told
from launcher.lints.look import AUTO, STAGE_3, Look, shown


def optimizer(look: Look) -> Iterator[Lint]:
    """The optimizer of the file, or that of the script where it is offloaded."""
    if look.optimizer is None:
        yield from _script_optimizer(look)
        return
    yield told("optimizer-in-file", where=look.where("optimizer"), what=f"optimizer.type is {look.optimizer!r}")
    torch_adam = look.flag("optimizer.params.torch_adam")
    params = dskeys.optimizer_params(look.optimizer, offloaded=look.offloads, torch_adam=torch_adam)
    if params is None:
        yield from _unknown_optimizer(look, look.optimizer)
    elif not params:
        what = f"optimizer.type is {look.optimizer!r}, and the optimizer is offloaded"
        yield told("optimizer-not-offloadable", where=look.where("optimizer.type"), what=what)
    else:
        yield from _optimizer_params(look, params)
    if params is not None:
        yield from _optimizer_and_zero(look, look.optimizer.lower())


def _script_optimizer(look: Look) -> Iterator[Lint]:
    if not look.offloads or "optimizer.type" in look.supplied:
        return
    at = "zero_optimization.offload_optimizer.device"
    if not look.flag("zero_force_ds_cpu_optimizer", default=True):
        where = look.where("zero_force_ds_cpu_optimizer")
        yield told(
            "optimizer-slow", where=where, what="zero_force_ds_cpu_optimizer is false, and the optimizer offloaded"
        )
    else:
        yield told("optimizer-replaced", where=look.where(at), what="the optimizer is offloaded, and not in the file")


def _unknown_optimizer(look: Look, name: str) -> Iterator[Lint]:
    right = dskeys.OPTIMIZER_WORDS.get(name.lower())
    if right is None:
        by_small_letters = {one.lower(): one for one in ("AdamW", "Lion", "Lamb", "Muon", *dskeys.TORCH)}
        near = difflib.get_close_matches(name.lower(), by_small_letters, n=1)
        right = by_small_letters[near[0]] if near else "AdamW, Adam, Adagrad, Lion, Lamb, Muon or one of torch.optim"
    yield told("optimizer-unknown", where=look.where("optimizer.type"), what=f"optimizer.type is {name!r}", right=right)


def _optimizer_params(look: Look, params: tuple[str, ...]) -> Iterator[Lint]:
    mode = "offloaded " if look.offloads else ""
    for name, value in look.block("optimizer.params").items():
        where = look.config.where(("optimizer", "params", name))
        if name == "max_grad_norm":
            cure = f'remove it, and write "gradient_clipping": {shown(value)} at the top'
            yield told("optimizer-param", where=where, what="max_grad_norm", error="ValueError", cure=cure)
        elif name not in params and params != ("*",):
            near = difflib.get_close_matches(name, params, n=1)
            cure = f"write {near[0]}" if near else f"remove it; there are {', '.join(params)}"
            what = f"an {mode}{look.optimizer} takes no {name!r}"
            yield told("optimizer-param", where=where, what=what, error="TypeError", cure=cure)
        elif name == "amsgrad" and value is True and _is_deepspeeds(look):
            what = f"amsgrad is true, and DeepSpeed's {look.optimizer} has it not"
            yield told("optimizer-param", where=where, what=what, error="RuntimeError", cure="leave amsgrad out")


def _is_deepspeeds(look: Look) -> bool:
    """Whether DeepSpeed makes it itself, and not torch."""
    return str(look.optimizer).lower() in dskeys.MADE and not look.flag("optimizer.params.torch_adam")


def _optimizer_and_zero(look: Look, name: str) -> Iterator[Lint]:
    at = look.where("optimizer.type")
    allowed = look.flag("zero_allow_untested_optimizer") or "zero_allow_untested_optimizer" in look.supplied
    if look.stage and name not in dskeys.TESTED and not allowed:
        what = f"optimizer.type is {look.optimizer!r} at stage {look.stage}"
        yield told("optimizer-untested", where=at, what=what)
    if look.offloads and not _is_deepspeeds(look):
        what = f"{look.optimizer} of torch, and the optimizer is offloaded"
        yield told("optimizer-slow", where=at, what=what)
    scale = look.get("fp16.loss_scale")
    if name == "lamb" and look.flag("fp16.enabled") and isinstance(scale, int | float) and scale > 0:
        yield told("lamb-loss-scale", where=look.where("fp16.loss_scale"), what=f"Lamb, and fp16.loss_scale is {scale}")
    if name == "muon" and look.stage == STAGE_3 and look.flag("zero_optimization.reduce_scatter", default=True):
        where = look.where("zero_optimization.reduce_scatter")
        yield told("muon-reduce-scatter", where=where, what="Muon at stage 3, and reduce_scatter is not false")


def scheduler(look: Look) -> Iterator[Lint]:
    """The scheduler of the file."""
    name = look.get("scheduler.type")
    if not isinstance(name, str):
        return
    yield told("scheduler-in-file", where=look.where("scheduler"), what=f"scheduler.type is {name!r}")
    known = dskeys.SCHEDULES.get(name)
    if known is None:
        near = difflib.get_close_matches(name, dskeys.SCHEDULES, n=1)
        right = near[0] if near else ", ".join(dskeys.SCHEDULES)
        yield told(
            "scheduler-unknown", where=look.where("scheduler.type"), what=f"scheduler.type is {name!r}", right=right
        )
        return
    yield from _scheduler_params(look, name, known)


def _scheduler_params(look: Look, name: str, known: tuple[str, ...]) -> Iterator[Lint]:
    params = look.block("scheduler.params")
    plain = [one.rstrip("!") for one in known]
    if "params" not in look.block("scheduler") and not any(key.startswith("scheduler.") for key in look.supplied):
        what = f"{name} without params"
        yield told(
            "scheduler-param", where=look.where("scheduler"), what=what, error="TypeError", cure='add "params": {}'
        )
    for one in params:
        if one not in plain:
            near = difflib.get_close_matches(one, plain, n=1)
            cure = f"write {near[0]}" if near else f"remove it; there are {', '.join(plain)}"
            where = look.config.where(("scheduler", "params", one))
            yield told("scheduler-param", where=where, what=f"{name} takes no {one!r}", error="TypeError", cure=cure)
    for one in known:
        at = f"scheduler.params.{one.rstrip('!')}"
        if one.endswith("!") and not look.has(at):
            what = f"{name} needs {one.rstrip('!')}"
            yield told("scheduler-param", where=look.where(at), what=what, error="TypeError", cure="add it")
    steps = params.get("warmup_num_steps")
    if steps is not None and steps != AUTO and (type(steps) is not int or steps < 1):
        where = look.where("scheduler.params.warmup_num_steps")
        what = f"warmup_num_steps is {shown(steps)}"
        yield told("scheduler-param", where=where, what=what, error="ValueError", cure="write a whole number above 0")

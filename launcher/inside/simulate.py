"""How much memory a model's activations take, found by running it on fake tensors: no GPU, no weights, seconds.

Run by `launcher plan` where torch is: in a node container, or by another Python of this machine. It is told QUESTION
(a global, or as JSON on standard input) and answers with one line of JSON on standard output:

  QUESTION  config: a Hugging Face config.json as a mapping; or code: the text of a Python file, and function: its
            name. That function takes nothing and gives an nn.Module, or (nn.Module, loss) where
            loss(module, micro_batch, sequence) runs it on made-up inputs and gives a scalar.
            micro_batch, sequence: the inputs; checkpointing; precision: no, fp16, bf16 or fp8
  answer    tensors: [[numel, trained]] as DeepSpeed meets them; buffers: bytes; modules: [[name, [tensor, …]]], with
            the tensors that each owns itself; cast and autocast (the same where the precision is no): what happens in
            one forward and backward, as ZeRO runs it (the model cast) and as plain training does (under autocast):
            [["use", module, peak, level] | ["grad", tensor, peak, level], …]
            error: what kept the model from being run, instead

`peak` and `level` are bytes of everything but parameters, buffers and gradients: the most since the last event, and
now. A module is used when its forward begins, and again when its backward begins. Bytes are counted by torch's
MemTracker (torch.distributed._tools.mem_tracker) under FakeTensorMode.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._pytree import tree_leaves, tree_map_only

TYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class UnfitError(Exception):
    """The model cannot be run as it was asked for."""


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Build the model and run it once in every way that differs."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": device()}
    precision = str(question["precision"])
    for mode in ("cast", "autocast"):
        if mode == "autocast" and precision == "no":
            found[mode] = found["cast"]
            break
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device(device()):
                model, loss = build(question)
            ready(model, checkpointing=bool(question["checkpointing"]))
            found |= measures(model)
            remake(model, TYPES[precision] if mode == "cast" else None)
            found[mode] = run(model, loss, question, autocast=TYPES[precision] if mode == "autocast" else None)
    return found


def device() -> str:
    """The device that the job will have: kernels differ, and so do what they save."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(question: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The model, and what gives its loss."""
    if question.get("config") is not None:
        return from_config(dict(question["config"])), language_loss
    names: dict[str, Any] = {"__name__": "model"}
    exec(compile(question["code"], question.get("path", "model.py"), "exec"), names)  # noqa: S102 - the user's own file
    make = names.get(question["function"])
    if not callable(make):
        raise UnfitError(f"there is no function {question['function']!r} in it")
    made = make()
    model, loss = made if isinstance(made, tuple) else (made, token_loss)
    if not isinstance(model, nn.Module):
        raise UnfitError(f"{question['function']}() gives a {type(model).__name__}, not a torch.nn.Module")
    return model, loss


def from_config(config: dict[str, Any]) -> nn.Module:
    """The model that a config.json describes: its own architecture, else the causal language model of its kind."""
    import transformers

    kind = config.pop("model_type", None)
    if kind is None:
        raise UnfitError("it has no model_type: is it the config.json of a Hugging Face model?")
    made = transformers.AutoConfig.for_model(kind, **config)
    named = (config.get("architectures") or [""])[0]
    architecture = getattr(transformers, named, None)
    if architecture is None:
        return transformers.AutoModelForCausalLM.from_config(made)
    return architecture(made)


def ready(model: nn.Module, *, checkpointing: bool) -> None:
    """Set the model up for training."""
    model.train()
    if not checkpointing:
        return
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise UnfitError(
            "it has no gradient_checkpointing_enable(): let it call torch.utils.checkpoint without --checkpointing"
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def remake(model: nn.Module, kind: torch.dtype | None) -> None:
    """Make every parameter and buffer anew, as `model.to(kind)` does, which cannot be had of fake tensors.

    A tensor that is shared stays shared. It is needed without a kind too: a fake parameter that was copied by
    `copy.deepcopy`, as nn.TransformerEncoder copies its layers, has another storage than its views, and would be
    counted once more where its transpose is kept for the backward.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, one in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(one) not in made:
                other = one.detach()
                if kind is not None and one.is_floating_point():
                    other = other.to(kind)
                made[id(one)] = nn.Parameter(other, one.requires_grad) if isinstance(one, nn.Parameter) else other
            setattr(module, name, made[id(one)])


def tokens(micro_batch: int, sequence: int) -> Tensor:
    """Made-up token ids."""
    return torch.zeros((micro_batch, sequence), dtype=torch.int64, device=device())


def language_loss(model: nn.Module, micro_batch: int, sequence: int) -> Tensor:
    """The loss of a Hugging Face model, by its own labels."""
    ids = tokens(micro_batch, sequence)
    return loss_in(model(input_ids=ids, labels=ids))


def token_loss(model: nn.Module, micro_batch: int, sequence: int) -> Tensor:
    """The loss of a module that takes token ids: its own, or cross entropy over the logits that it gives."""
    given = model(tokens(micro_batch, sequence))
    if isinstance(given, Tensor) and given.dim() > 1:
        logits = given.float().flatten(0, -2)
        return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
    return loss_in(given)


def loss_in(given: Any) -> Tensor:
    """The scalar in what a model gives."""
    found = getattr(given, "loss", None)
    scalars = [one for one in tree_leaves(given if found is None else found) if isinstance(one, Tensor)]
    for one in scalars:
        if one.dim() == 0:
            return one
    raise UnfitError("it gives no loss: let the function give (module, loss), see docs/ladder.md")


def measures(model: nn.Module) -> dict[str, Any]:
    """Tensors and the modules that own them, each tensor once, in the order of `parameters()`."""
    numbers = {id(one): number for number, one in enumerate(model.parameters())}
    owned = (
        (name, [numbers[id(one)] for one in module.parameters(recurse=False)]) for name, module in model.named_modules()
    )
    return {
        "tensors": [[one.numel(), one.requires_grad] for one in model.parameters()],
        "buffers": sum(one.numel() * one.element_size() for one in model.buffers()),
        "modules": [[name, mine] for name, mine in owned],
    }


class Watch(MemTracker):  # type: ignore[misc]
    """A tracker that keeps, instead of every module's statistics, one list of what happened and what was held then."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.track_external(model)
        self.start = self.held()
        self.gradients = 0
        self.peak = 0
        self.events: list[list[Any]] = []

    def held(self) -> int:
        """Bytes of all tensors."""
        return sum(kinds["Total"] for kinds in self._curr_mem_snap.values())

    def level(self) -> int:
        """Bytes beyond parameters, buffers and gradients."""
        return self.held() - self.start - self.gradients

    def note(self, kind: str, index: int) -> None:
        """Something happened."""
        level = self.level()
        self.events.append([kind, index, max(self.peak, level), level])
        self.peak = 0

    def grown(self, index: int, gradient: Tensor | None) -> None:
        """A parameter has its gradient."""
        self.peak = max(self.peak, self.level())
        if gradient is not None:
            self.gradients += gradient.untyped_storage().nbytes()
        self.note("grad", index)

    # The tracker calls this after every operation; its own goes through all modules each time, which takes minutes.
    def _update_peak_stats(self, peak_state: Any) -> None:
        del peak_state
        self.peak = max(self.peak, self.level())


def run(model: nn.Module, loss: Any, question: dict[str, Any], *, autocast: torch.dtype | None) -> list[list[Any]]:
    """One forward and backward; its events."""
    watch = Watch(model)
    with hooked(model, watch), watch:
        if autocast is not None:
            model.forward = as_prepared(model.forward, autocast)
        total = loss(model, int(question["micro_batch"]), int(question["sequence"]))
        total.backward()
        watch.note("use", -1)
    return watch.events


def as_prepared(forward: Any, kind: torch.dtype) -> Any:
    """As Accelerate prepares a model for mixed precision: under autocast, and what it gives made fp32 again."""

    def prepared(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device(), dtype=kind):
            given = forward(*args, **kwargs)
        if isinstance(given, dict):  # a ModelOutput: of its own class, which the loss is read from
            return type(given)(**{key: tree_map_only(Tensor, widened, value) for key, value in given.items()})
        return tree_map_only(Tensor, widened, given)

    return prepared


def widened(tensor: Tensor) -> Tensor:
    """A tensor of half precision as fp32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextlib.contextmanager
def hooked(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Let the model's own modules tell when they are used, and its parameters when they have their gradients."""
    handles: list[Any] = []
    for number, module in enumerate(model.modules()):
        handles.append(module.register_forward_pre_hook(lambda *_, number=number: watch.note("use", number)))
        handles.append(module.register_forward_hook(before_backward(watch, number)))
    for number, one in enumerate(model.parameters()):
        if one.requires_grad:
            handles.append(
                one.register_post_accumulate_grad_hook(lambda it, number=number: watch.grown(number, it.grad))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def before_backward(watch: Watch, number: int) -> Any:
    """A forward hook that lets the first gradient of an output tell that the module's backward begins."""

    def hook(_module: nn.Module, _given: Any, output: Any) -> None:
        told: list[bool] = []

        def tell(_gradient: Tensor) -> None:
            if not told:
                told.append(True)
                watch.note("use", number)

        for one in tree_leaves(output):
            if isinstance(one, Tensor) and one.requires_grad:
                one.register_hook(tell)

    return hook


def main() -> None:
    """Answer the question; whatever a library prints goes to standard error."""
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    question = globals().get("QUESTION") or json.load(sys.stdin)
    try:
        found = answer(question)
    except UnfitError as error:
        found = {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - the model is a guest: whatever it raises is reported
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    print(json.dumps(found, separators=(",", ":")), file=said, flush=True)


if __name__ == "__main__":
    main()

"""A configuration under the eye of the rules: values by dotted key, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.dsconfig import DsConfig

STAGE_3 = 3
AUTO = "auto"
LONGEST = 60  # characters of a key or value in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A configuration under the eye of the rules: values by dotted key, passing by those of a wrong kind."""

    config: DsConfig
    world_size: int | None
    slots: tuple[int, ...] | None
    accelerator: Literal["cuda", "cpu"]
    nvme: tuple[str, ...] | None
    supplied: frozenset[str]

    def get(self, dotted: str) -> Any:
        """The value, or None where there is none."""
        value: Any = self.config.data
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def has(self, dotted: str) -> bool:
        """Whether the key is there, or will be."""
        above, _, last = dotted.rpartition(".")
        return dotted in self.supplied or last in self.block(above)

    def block(self, dotted: str) -> Mapping[str, Any]:
        value = self.get(dotted) if dotted else self.config.data
        return value if isinstance(value, Mapping) else {}

    def flag(self, dotted: str, *, default: bool = False) -> bool:
        value = self.get(dotted)
        return value if isinstance(value, bool) else default

    def whole(self, dotted: str) -> int | None:
        """A whole number above 0 that is not still to be filled in."""
        value = self.get(dotted)
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and value == value // 1
        return int(value) if whole and dotted not in self.supplied else None

    def where(self, dotted: str) -> str:
        return self.config.where(tuple(dotted.split(".")) if dotted else ())

    @property
    def stage(self) -> int | None:
        """The ZeRO stage; None where it cannot be known."""
        at = "zero_optimization.stage"
        stage = self.get(at)
        if at in self.supplied:
            return None
        if stage is None:
            return 0
        known = not isinstance(stage, bool) and stage in (0, 1, 2, STAGE_3)
        return int(stage) if known else None

    @property
    def below_3(self) -> bool:
        return self.stage is not None and self.stage < STAGE_3

    def device(self, part: str) -> str:
        device = self.get(f"zero_optimization.{part}.device")
        return device if device in ("cpu", "nvme") else "none"

    @property
    def offloads(self) -> bool:
        """Whether the optimizer is not on the GPU."""
        return self.device("offload_optimizer") != "none"

    @property
    def optimizer(self) -> str | None:
        name = self.get("optimizer.type")
        return name if isinstance(name, str) else None

    @property
    def precision(self) -> str:
        """fp16, bf16 or fp32: what DeepSpeed trains in."""
        return next((one for one in ("fp16", "bf16") if self.flag(f"{one}.enabled")), "fp32")

    @property
    def clipping(self) -> float | None:
        """The norm at which gradients are clipped; None where it cannot be known."""
        value = self.get("gradient_clipping")
        if value is None:
            return 1.0
        return float(value) if isinstance(value, int | float) and "gradient_clipping" not in self.supplied else None


def dots(path: Iterable[str | int]) -> str:
    """A path as people write it; what cannot be seen in a key is escaped."""
    return ".".join(_plain(str(part)) for part in path)


def shown(value: object) -> str:
    """A value as the file has it, cut short."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if isinstance(value, int | float) else f'"{_plain(str(value))}"'


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _plain(text: str) -> str:
    cut = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return cut if cut.isprintable() else repr(cut)[1:-1]

"""The job: what the user wants trained and how. Values only; whether they make sense together is `zero`'s to judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["no", "fp16", "bf16", "fp8"]
Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """ZeRO as the plugin way says it. Stage 0 is plain multi-process training: the first rung of the ladder."""

    stage: int = 0
    offload_optimizer: Offload = "none"
    offload_param: Offload = "none"
    accumulation: int = 1
    clipping: float | None = None  # None: the script's own business
    init: bool | None = None  # build the model sharded; None: at stage 3
    gather_16bit: bool | None = None  # gather weights on save; None: at stage 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing to run on every process of the cluster.

    `script` is a path relative to the snapshot's root; `args` reach it byte for byte. `config` is the text of a
    DeepSpeed JSON (the file way): then `zero` must be left as it is, since Accelerate would ignore it.
    """

    script: str
    args: tuple[str, ...] = ()
    zero: Zero = Zero()
    precision: Precision = "no"
    config: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()
    detached: bool = False  # no command stays to own the run
    grace: int = 5  # seconds between asking the job to end and ending it
    hang_timeout: int | None = None  # seconds in which no process writes anything, after which the run is ended
    resumes: str = ""  # the run whose work this one goes on with
    restart: int = 0  # how often that was started again, with this one

"""The job: what the user wants trained and how. Values only; whether they make sense together is `zero`'s to judge."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Precision = Literal["no", "fp16", "bf16", "fp8"]
Offload = Literal["none", "cpu", "nvme"]
Way = Literal["auto", "plugin", "file"]
Stage = Literal["auto", 0, 1, 2, 3]
GRACE = 5  # seconds between asking a job to end and ending it
NODE_GRACE = 60  # seconds for which a node may be silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the model is trained; the names are those of the command line and of job.yaml. None: nobody said so.

    Sizes of buckets and groups are counts of elements, as DeepSpeed has them, not bytes.
    """

    stage: Stage | None = None  # ZeRO stage; 0 is plain multi-process training, "auto" the lowest rung that fits
    way: Way | None = None  # how DeepSpeed is told: by plugin settings or by a file
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None
    precision: Precision | None = None
    micro_batch: int | None = None  # samples that one process sees at once
    accumulation: int | None = None  # micro batches per step
    clipping: float | None = None  # norm of the gradients; None: the script's own business
    optimizer: str | None = None  # one of DeepSpeed's; None: the script's own
    learning_rate: float | None = None
    weight_decay: float | None = None
    scheduler: str | None = None
    zero3_init: bool | None = None  # build the model sharded; None: at stage 3
    gather_16bit: bool | None = None  # gather whole 16-bit weights on save; None: at stage 3
    reduce_bucket_size: int | None = None
    allgather_bucket_size: int | None = None
    prefetch_bucket_size: int | None = None
    sub_group_size: int | None = None
    overlap_comm: bool | None = None
    aio: tuple[tuple[str, Any], ...] = ()  # keys of DeepSpeed's aio block
    moe_leaf: tuple[str, ...] = ()  # classes of mixture-of-experts layers that are gathered whole
    overrides: tuple[tuple[str, Any], ...] = ()  # any key of the DeepSpeed configuration, dotted

    def given(self) -> dict[str, Any]:
        """What somebody said, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value not in (None, ())}

    def over(self, below: Settings) -> Settings:
        """These settings, and where they are silent those of `below`; pairs are merged key by key."""
        pairs = {
            name: tuple({**dict(getattr(below, name)), **dict(getattr(self, name))}.items())
            for name in ("aio", "overrides")
        }
        return dataclasses.replace(below, **{**self.given(), **pairs})


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing to run on every process of the cluster.

    `script` is a path relative to the snapshot's root; `args` reach it byte for byte. `config` is the text of a
    DeepSpeed JSON of the user's own and `config_name` what messages call it; `settings` may fill what it leaves open.
    """

    script: str
    args: tuple[str, ...] = ()
    settings: Settings = Settings()
    config: str | None = None
    config_name: str = "--ds-config"
    env: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()
    detached: bool = False  # no command stays to own the run
    grace: int = GRACE
    node_grace: int = NODE_GRACE  # seconds for which a node may be silent before the run is ended without it
    hang_timeout: int | None = None  # seconds in which no process writes anything, after which the run is ended
    resumes: str = ""  # the run whose work this one goes on with
    restart: int = 0  # how often that was started again, with this one
    notes: tuple[str, ...] = ()  # what the user should know of how these settings came about

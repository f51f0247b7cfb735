"""The job file (job.yaml): a job's settings by the names of the command line's options. Read and judged as text.

script: train.py
args: [--epochs, "3"]
stage: 3
offload_optimizer: nvme
set: {zero_optimization.round_robin_gradients: true}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from cluster.allowed import Env, LocalPath, Name, Secrets
from cluster.complaints import judge
from cluster.document import Document
from launcher.job import Offload, Precision, Settings, Stage, Way

NEXT_STEP = "docs/settings.md explains every key"
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]


class JobFile(BaseModel):
    """What may stand in job.yaml; nothing must."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    script: str | None = Field(default=None, description="The script, relative to the working directory.")
    args: tuple[str, ...] = Field(default=(), description="Its arguments.")
    stage: Stage | None = Field(default=None, description="ZeRO stage; auto takes the lowest rung that fits.")
    way: Way | None = Field(default=None, description="How DeepSpeed is told: plugin settings, or a file.")
    offload_optimizer: Offload | None = Field(default=None, description="Where the optimizer's states live.")
    offload_param: Offload | None = Field(default=None, description="Where the parameters live (stage 3).")
    precision: Precision | None = Field(default=None, description="Mixed precision.")
    micro_batch: Count | None = Field(default=None, description="Samples that one process sees at once.")
    accumulation: Count | None = Field(default=None, description="Gradient accumulation steps.")
    clipping: Amount | None = Field(default=None, description="Norm at which gradients are clipped.")
    optimizer: str | None = Field(default=None, description="One of DeepSpeed's optimizers.")
    learning_rate: Amount | None = Field(default=None, description="Of that optimizer.")
    weight_decay: Amount | None = Field(default=None, description="Of that optimizer.")
    scheduler: str | None = Field(default=None, description="One of DeepSpeed's learning rate schedulers.")
    zero3_init: bool | None = Field(default=None, description="Build the model sharded (stage 3).")
    gather_16bit: bool | None = Field(default=None, description="Gather whole weights on save (stage 3).")
    reduce_bucket_size: Count | None = Field(default=None, description="Elements reduced at once.")
    allgather_bucket_size: Count | None = Field(default=None, description="Elements gathered at once.")
    prefetch_bucket_size: Count | None = Field(default=None, description="Elements fetched ahead (stage 3).")
    sub_group_size: Count | None = Field(default=None, description="Elements that one optimizer step takes (stage 3).")
    overlap_comm: bool | None = Field(default=None, description="Reduce gradients during the backward pass.")
    aio: dict[str, JsonValue] = Field(default={}, description="DeepSpeed's aio block: how NVMe is read and written.")
    moe_leaf: tuple[str, ...] = Field(default=(), description="Classes of MoE layers that are gathered whole.")
    set: dict[str, JsonValue] = Field(default={}, description="Any key of the DeepSpeed configuration, dotted.")
    ds_config: LocalPath | None = Field(default=None, description="A DeepSpeed JSON; relative to this file's folder.")
    parameters: str | None = Field(default=None, description="For stage auto: the model's size alone, as 7B.")
    model: LocalPath | None = Field(default=None, description="For stage auto: a Hugging Face config.json.")
    model_from: str | None = Field(default=None, description="For stage auto: what builds it, FILE:FUNCTION.")
    sequence: Count | None = Field(default=None, description="For stage auto: tokens of a sample.")
    checkpointing: bool | None = Field(default=None, description="For stage auto: activations are computed again.")
    env: Env = Field(default={}, description="Environment of the job.")
    secrets: Secrets = Field(default=(), description="Names of secrets.")
    nodes: tuple[Name, ...] = Field(default=(), description="Only on these nodes, in the order of their ranks.")
    grace: Annotated[int, Field(ge=0, le=3600)] | None = Field(
        default=None, description="Seconds that the job may take to end when it is asked to."
    )

    @property
    def settings(self) -> Settings:
        """What is said of the training itself."""
        return make_settings({**self.model_dump(), "overrides": self.set})


def make_settings(said: Mapping[str, Any]) -> Settings:
    """Settings from values by name; mappings and lists become tuples, other names are passed over."""
    names = Settings.__dataclass_fields__
    return Settings(**{name: _frozen(value) for name, value in said.items() if name in names})


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def read_job_file(document: Document) -> JobFile:
    """Judge a document; one `InputError` names everything that is wrong in it."""
    return judge(document, JobFile, {"": tuple(JobFile.model_fields)}, next_step=NEXT_STEP)


def merge_notes(flags: Settings, below: Settings, document: Document) -> tuple[str, ...]:
    """What the command line says otherwise than the file: it wins, and the user hears of it."""
    ours, theirs = _told(flags), _told(below)
    return tuple(
        f"{' '.join(place).replace('_', '-')}: {json.dumps(ours[place])} of the command line wins over "
        f"{json.dumps(theirs[place])} ({document.where(place)})"
        for place in sorted(ours.keys() & theirs.keys(), key=document.position)
        if ours[place] != theirs[place]
    )


def _told(settings: Settings) -> dict[tuple[str, ...], Any]:
    """What is said, by its place in a job file."""
    given = settings.given()
    told: dict[tuple[str, ...], Any] = {("aio", key): value for key, value in given.pop("aio", ())}
    told |= {("set", key): value for key, value in given.pop("overrides", ())}
    return {**{(name,): value for name, value in given.items()}, **told}

"""Asking for the ladder: what the machines have, what the model takes, and which rung fits. The judgment is `memory`'s.

The model is run on fake tensors by inside/simulate.py where torch is: in the first node's idle container, else by this
machine's own Python. The control machine's process itself never loads torch.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.command import Command, Result
from cluster.container import LABEL_ROLE
from cluster.document import load_text
from cluster.errors import ClusterError, CommandError, InputError, NodeError, PreconditionError
from cluster.facts import NodeFacts
from cluster.inventory import Inventory
from cluster.local import LocalTransport
from launcher import memory, render, zero
from launcher.job import Job, Settings
from launcher.memory import Choice, Cluster, Host, Recipe, Rung
from launcher.model import Model, guess_model, read_simulation
from launcher.plan import slots_of
from launcher.session import Session, look, ours

# The script and the question in one: both may be longer than a command line.
BOOT = """
import json, sys
told = json.load(sys.stdin)
exec(compile(told["script"], "simulate.py", "exec"), {"__name__": "__main__", "QUESTION": told["question"]})
"""
# The kernel, the engine, sshd and the page cache want some of a machine's memory, too.
FREE_FOR_JOBS = 0.95


SEQUENCE = 2048  # tokens of a sample, where nobody says


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A model: a number of parameters, or a config.json, or a Python file with a function; and how it is trained."""

    parameters: int | None = None
    config: Path | None = None
    code: Path | None = None
    function: str = ""
    micro_batch: int = 1
    sequence: int = SEQUENCE
    checkpointing: bool = False


def plan(
    now: Session | None, question: Question, recipe: Recipe, cluster: Cluster, *, asked: Rung | None
) -> tuple[Model, Choice]:
    """The model, and the rungs for it on a cluster; `now` where one is at hand whose containers may be up."""
    model = find_model(now, question, recipe)
    return model, memory.choose(model, recipe, cluster, asked=asked)


def check_question(question: Question | None) -> Question:
    """The model that `--stage auto` needs; `InputError` where none is named, or its file cannot be read."""
    if question is None:
        raise InputError(
            "which model? The lowest rung that fits depends on it",
            where="--stage auto",
            next_step="add --parameters 7B, --model config.json or --model-from model.py:make",
        )
    if question.config is not None:
        read_config(question.config)
    if question.code is not None:
        load_text(question.code)
    return question


def choose_stage(now: Session, job: Job, facts: Mapping[str, NodeFacts], question: Question) -> Job:
    """The job on the lowest rung that fits; `PreconditionError` where none does."""
    machines = read_cluster(now.inventory, facts)
    _, choice = plan(now, question, recipe_of(job), machines, asked=None)
    if choice.chosen is None:
        raise PreconditionError(
            f"no rung of the ladder fits: {choice.why}",
            where="--stage auto",
            next_step="a smaller --micro-batch or --sequence, --checkpointing, NVMe in the inventory, or more nodes",
        )
    rung = choice.chosen.weight.rung
    note = f"stage auto: {rung.name}, the lowest rung that fits" + (f"; {choice.why}" if choice.why else "")
    chosen: Any = {
        "stage": rung.stage,
        "offload_optimizer": _DEVICES[rung.optimizer_on],
        "offload_param": _DEVICES[rung.params_on],
    }
    settings = dataclasses.replace(job.settings, **chosen)
    return dataclasses.replace(job, settings=settings, notes=(*job.notes, note))


_DEVICES: Mapping[str, Any] = {"gpu": None, "cpu": "cpu", "nvme": "nvme"}

# Recipe's names for keys of zero_optimization.
_SIZES = {
    "reduce_bucket_size": "reduce_bucket_size",
    "overlap_comm": "overlap_comm",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "persistence_threshold": "stage3_param_persistence_threshold",
    "sub_group_size": "sub_group_size",
    "optimizer_buffers": "offload_optimizer.buffer_count",
    "param_buffers": "offload_param.buffer_count",
    "param_buffer_size": "offload_param.buffer_size",
    "max_in_cpu": "offload_param.max_in_cpu",
}


def recipe_of(job: Job) -> Recipe:
    """How a job trains, as far as memory is concerned: its settings, or the DeepSpeed file of the user's."""
    config = zero.deepspeed_config(dataclasses.replace(job, settings=_without_auto(job.settings)))
    sizes: dict[str, Any] = {name: zero.value_at(config, f"zero_optimization.{key}") for name, key in _SIZES.items()}
    sixteen = next((name for name in ("bf16", "fp16") if zero.value_at(config, f"{name}.enabled") is True), None)
    steps = config.get("gradient_accumulation_steps")
    optimizer = str(job.settings.optimizer or zero.value_at(config, "optimizer.type") or "AdamW").lower()
    given: dict[str, Any] = {name: value for name, value in sizes.items() if isinstance(value, int)}
    return Recipe(
        precision=job.settings.precision or sixteen or "no",
        optimizer=optimizer if optimizer in memory.OPTIMIZERS else "adamw",  # Muon and its kin keep as many states
        moments=2 if zero.value_at(config, "bf16.bf16_optimizer_states") is True else memory.MASTER,
        accumulation=steps if isinstance(steps, int) else 1,
        **given,
    )


def _without_auto(settings: Settings) -> Settings:
    return dataclasses.replace(settings, stage=None) if settings.stage == "auto" else settings


def find_model(now: Session | None, question: Question, recipe: Recipe) -> Model:
    """The model that is asked about: simulated where it can be built, else by formula."""
    if question.parameters is not None:
        return guess_model(
            question.parameters,
            micro_batch=question.micro_batch,
            sequence=question.sequence,
            checkpointing=question.checkpointing,
            item=recipe.item,
        )
    where = str(question.config or question.code)
    script = (Path(__file__).parent / "inside" / "simulate.py").read_text(encoding="utf-8")
    told = {"script": script, "question": _told(question, recipe)}
    return read_simulation(_simulate(now, json.dumps(told).encode(), where=where), where=where)


def _told(question: Question, recipe: Recipe) -> dict[str, Any]:
    how = {
        "micro_batch": question.micro_batch,
        "sequence": question.sequence,
        "checkpointing": question.checkpointing,
        "precision": recipe.precision,
    }
    if question.config is not None:
        return {**how, "config": read_config(question.config)}
    assert question.code is not None
    return {**how, "code": load_text(question.code), "path": str(question.code), "function": question.function}


def read_config(path: Path) -> dict[str, Any]:
    """A Hugging Face config.json; `InputError` with its place."""
    try:
        said = json.loads(load_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"this is not JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}") from None
    if not isinstance(said, dict) or "model_type" not in said:
        raise InputError(
            "this is no config.json of a Hugging Face model: it has no model_type",
            where=str(path),
            next_step="give the config.json that lies beside a model's weights, or --model-from FILE:FUNCTION",
        )
    return said


def _simulate(now: Session | None, told: bytes, *, where: str) -> Mapping[str, Any]:
    result = _run_in_container(now, told) if now is not None else None
    if result is None:
        if importlib.util.find_spec("torch") is None:
            raise PreconditionError(
                "to simulate a model, torch is needed: the cluster is not up, and this Python has none",
                where=where,
                next_step="launcher up; or pip install 'launcher[local]'; or --parameters, which is estimated",
            )
        here = LocalTransport("this machine")
        result = here.run(Command(argv=(sys.executable, "-c", BOOT), stdin=told))
    lines = result.text.splitlines()
    try:
        said = json.loads(lines[-1]) if lines else None
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise ClusterError("the simulation gave no answer", where=where, detail=result.tail())
    return said


def _run_in_container(now: Session, told: bytes) -> Result | None:
    """The answer from the first node's idle container; None where there is none, or nobody answers."""
    machine = now.machines[0]
    try:
        machine.transport.open()
        idle = machine.engine.find(ours(now, machine, **{LABEL_ROLE: render.ROLE_NODE}))
        live = [one.id for one in idle if one.is_live]
        if not live:
            return None
        return machine.engine.execute(live[0], Command(argv=("python3", "-c", BOOT), stdin=told))
    except CommandError:
        raise
    except NodeError as error:
        now.voice.say(f"warning: {error.where}: {error.what}; simulating here")
        return None


def survey(now: Session) -> Cluster:
    """What the machines of a cluster have, by a new survey, or by the last one where a node does not answer."""
    try:
        facts = look(now, tag="").facts
    except NodeError as error:
        facts = now.memory.load_facts()
        if {node.name for node in now.inventory.nodes} - set(facts):
            raise
        now.voice.say(f"warning: {error.where}: {error.what}; this is what the last survey found")
    return read_cluster(now.inventory, facts)


def read_cluster(inventory: Inventory, facts: Mapping[str, NodeFacts]) -> Cluster:
    """Surveyed machines as the ladder sees them."""
    hosts = []
    for node in inventory.nodes:
        fact = facts[node.name]
        disks = [fact.disk(path).free for path in node.nvme]
        hosts.append(
            Host(
                name=node.name,
                gpus=slots_of(inventory, node, fact),
                gpu_memory=min((gpu.memory for gpu in fact.gpus), default=0),
                memory=int(fact.system.memory * FREE_FOR_JOBS),
                nvme=min(disks, default=0) * len(disks),  # the paths are dealt out over the processes
            )
        )
    return make_cluster(tuple(hosts), cpu=inventory.accelerator == "cpu")


def make_cluster(hosts: tuple[Host, ...], *, cpu: bool) -> Cluster:
    """A cluster with the reserves of its kind: a process on CPUs has no CUDA context, and loads fewer libraries."""
    return Cluster(hosts=hosts, cpu=True, context=0, process=memory.GIB) if cpu else Cluster(hosts=hosts)

"""The ladder: plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.errors import InputError
from launcher.cli.options import cluster_option, json_option, launcher, opened, show_json

if TYPE_CHECKING:
    from launcher.ladder import Question
    from launcher.memory import Cluster, Recipe, Rung

OFFLOAD = click.Choice(["none", "cpu", "nvme"])
OPTIMIZERS = (
    *("sgd", "momentum", "adam", "adamw", "fusedadam", "cpuadam", "lion", "adagrad", "lamb"),
    *("onebitadam", "zerooneadam", "onebitlamb"),
)


@launcher.command()
@cluster_option
@click.option("--parameters", metavar="COUNT", help="The model by its size alone, as 7B: activations are estimated.")
@click.option("--model", "config", type=click.Path(path_type=Path), metavar="FILE", help="A Hugging Face config.json.")
@click.option("--model-from", metavar="FILE:FUNCTION", help="A Python function that builds the model.")
@click.option("--micro-batch", type=click.IntRange(1), default=1, show_default=True, help="Samples a GPU sees at once.")
@click.option("--sequence", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of a sample.")
@click.option("--checkpointing", is_flag=True, help="Compute activations again instead of keeping them.")
@click.option("--precision", type=click.Choice(["no", "fp16", "bf16", "fp8"]), default="no", help="Mixed precision.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True, help="Which one.")
@click.option("--accumulation", type=click.IntRange(1), default=1, metavar="N", help="Gradient accumulation steps.")
@click.option("--stage", type=click.Choice(["0", "1", "2", "3"]), help="What you would take: is it needed, and enough?")
@click.option("--offload-optimizer", type=OFFLOAD, default="none", help="The same, of the optimizer's states.")
@click.option("--offload-param", type=OFFLOAD, default="none", help="The same, of the parameters.")
@click.option("--gpu-memory", metavar="SIZE", help="Instead of a cluster: the memory of a GPU, as 80g.")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="With it: GPUs of a node.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="With it: nodes.")
@click.option("--host-memory", metavar="SIZE", default="1t", show_default=True, help="With it: the memory of a node.")
@click.option("--nvme", metavar="SIZE", help="With it: free NVMe of a node.")
@json_option
def plan(cluster: str | None, *, as_json: bool, **asked: Any) -> None:
    """What every rung of the ladder takes, and the lowest one that fits.

    The rungs are plain training (DDP), ZeRO-1, 2 and 3, then with optimizer and parameters on CPU and NVMe. Asked for
    the nodes of a cluster, or with --gpu-memory for machines that are not there.

    \b
    launcher plan --model config.json --micro-batch 4 --precision bf16
    launcher plan --parameters 7B --precision bf16 --gpu-memory 80g --gpus 8 --nodes 2
    """
    from launcher import ladder
    from launcher.views import ladder as view

    question, recipe, rung = _question(asked), _recipe(asked), _rung(asked)
    if asked["gpu_memory"]:
        if cluster:
            raise InputError("a cluster and --gpu-memory: which machines are meant?", next_step="leave one of them out")
        machines = _machines(asked)
        model, choice = ladder.plan(None, question, recipe, machines, asked=rung)
    else:
        with opened(cluster) as now:
            machines = ladder.survey(now)
            model, choice = ladder.plan(now, question, recipe, machines, asked=rung)
    if as_json:
        show_json(view.ladder_data(model, machines, choice))
    else:
        click.echo(view.ladder_text(model, machines, choice))


def _question(asked: dict[str, Any]) -> Question:
    from launcher.ladder import Question
    from launcher.model import read_count

    given = [asked[name] is not None for name in ("parameters", "config", "model_from")]
    if sum(given) != 1:
        raise InputError(
            "which model?" if not any(given) else "this names more than one model",
            next_step="give one of --parameters 7B, --model config.json, --model-from model.py:make",
        )
    code, _, function = (asked["model_from"] or "").rpartition(":")
    if asked["model_from"] is not None and not (code and function.isidentifier()):
        raise InputError(
            f"{asked['model_from']!r} names no function of a file", where="--model-from", next_step="as model.py:make"
        )
    return Question(
        parameters=None if asked["parameters"] is None else read_count(asked["parameters"], where="--parameters"),
        config=asked["config"],
        code=Path(code) if code else None,
        function=function,
        micro_batch=asked["micro_batch"],
        sequence=asked["sequence"],
        checkpointing=asked["checkpointing"],
    )


def _recipe(asked: dict[str, Any]) -> Recipe:
    from launcher.memory import Recipe

    return Recipe(precision=asked["precision"], optimizer=asked["optimizer"], accumulation=asked["accumulation"])


def _rung(asked: dict[str, Any]) -> Rung | None:
    from launcher.memory import make_rung

    optimizer, params = asked["offload_optimizer"], asked["offload_param"]
    if asked["stage"] is None and (optimizer, params) != ("none", "none"):
        raise InputError("offloading is asked for without a stage", next_step="add --stage")
    return None if asked["stage"] is None else make_rung(int(asked["stage"]), optimizer=optimizer, params=params)


def _machines(asked: dict[str, Any]) -> Cluster:
    from launcher.ladder import make_cluster
    from launcher.memory import Host, read_size

    host = Host(
        name="",
        gpus=asked["gpus"],
        gpu_memory=read_size(asked["gpu_memory"], where="--gpu-memory"),
        memory=read_size(asked["host_memory"], where="--host-memory"),
        nvme=read_size(asked["nvme"], where="--nvme") if asked["nvme"] else 0,
    )
    import dataclasses

    hosts = tuple(dataclasses.replace(host, name=f"node-{number:02d}") for number in range(1, asked["nodes"] + 1))
    return make_cluster(hosts, cpu=False)

"""The ladder: plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cluster.errors import InputError
from launcher.cli.options import (
    Command,
    cluster_option,
    job_options,
    json_option,
    launcher,
    model_options,
    opened,
    read_job,
    read_question,
    show_json,
    with_nodes,
)

if TYPE_CHECKING:
    from launcher.job import Job
    from launcher.memory import Cluster, Rung


@launcher.command(cls=Command)
@cluster_option
@job_options
@model_options
@click.option("--gpu-memory", metavar="SIZE", help="Instead of a cluster: the memory of a GPU, as 80g.")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="With it: GPUs of a node.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="With it: nodes.")
@click.option("--host-memory", metavar="SIZE", default="1t", show_default=True, help="With it: the memory of a node.")
@click.option("--nvme", metavar="SIZE", help="With it: free NVMe of a node.")
@json_option
def plan(cluster: str | None, *, as_json: bool, **asked: Any) -> None:
    """What every rung of the ladder takes, and the lowest one that fits.

    The rungs are plain training (DDP), ZeRO-1, 2 and 3, then with optimizer and parameters on CPU and NVMe. Asked for
    the nodes of a cluster, or with --gpu-memory for machines that are not there. With --stage and offloading it says
    whether what you would take is enough, and whether it is needed.

    \b
    launcher plan --model config.json --micro-batch 4 --precision bf16
    launcher plan --parameters 7B --precision bf16 --gpu-memory 80g --gpus 8 --nodes 2
    """
    from launcher import ladder
    from launcher.views import ladder as view
    from launcher.zero import check_values

    job = read_job(asked, script="SCRIPT", args=())
    check_values(job.settings)
    question, recipe, rung = read_question(asked, job), ladder.recipe_of(job), _rung(job)
    if question is None:
        raise InputError(
            "which model?", next_step="give --parameters 7B, --model config.json or --model-from m.py:make"
        )
    if asked["gpu_memory"]:
        if cluster:
            raise InputError("a cluster and --gpu-memory: which machines are meant?", next_step="leave one of them out")
        machines = _machines(asked)
        model, choice = ladder.plan(None, question, recipe, machines, asked=rung)
    else:
        with opened(cluster) as now:
            chosen = with_nodes(now, {**asked, "nodes": ()})
            machines = ladder.survey(chosen)
            model, choice = ladder.plan(chosen, question, recipe, machines, asked=rung)
    if as_json:
        show_json(view.ladder_data(model, machines, choice))
    else:
        click.echo(view.ladder_text(model, machines, choice))


def _rung(job: Job) -> Rung | None:
    from launcher.memory import make_rung

    settings = job.settings
    optimizer, params = settings.offload_optimizer or "none", settings.offload_param or "none"
    if isinstance(settings.stage, int):
        return make_rung(settings.stage, optimizer=optimizer, params=params)
    if (optimizer, params) != ("none", "none"):
        raise InputError("offloading is asked for without a stage", next_step="add --stage")
    return None


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

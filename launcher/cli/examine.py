"""Is it fit to train: env, test."""

from __future__ import annotations

from typing import Any

import click

from launcher.cli.options import (
    Command,
    cluster_option,
    ignore_option,
    job_options,
    json_option,
    launcher,
    log_view,
    opened,
    read_job,
    show_json,
)


@launcher.command()
@cluster_option
@json_option
@click.argument("name", required=False, metavar="[CLUSTER]")
def env(cluster: str | None, name: str | None, *, as_json: bool) -> None:
    """What a job finds on every node: versions, GPUs, DeepSpeed's ops, limits, variables. Differences first.

    It is `accelerate env` and `ds_report`, of all nodes at once.

    \b
    launcher env
    launcher env --json lab
    """
    from launcher import nodes as machines
    from launcher.views import environment

    with opened(name or cluster) as now:
        found = environment.compare(machines.ask_environment(now))
    if as_json:
        show_json(environment.comparison_data(now.inventory.name, found))
    else:
        click.echo(environment.comparison_text(now.inventory.name, found))


@launcher.command(cls=Command)
@cluster_option
@job_options
@ignore_option
@json_option
@click.argument("name", required=False, metavar="[CLUSTER]")
def test(cluster: str | None, name: str | None, *, as_json: bool, **asked: Any) -> None:
    """Run Accelerate's own test script on every process of the cluster, with a verdict per node.

    In the configuration that the options describe, as `launcher run` would start it; under DeepSpeed with a short
    training besides. The processes meet at the inventory's port, or at another one where that is taken.

    \b
    launcher test
    launcher test --stage 3 --precision bf16
    """
    from launcher import execute
    from launcher.errors import RunError
    from launcher.snapshot import pick
    from launcher.state import INTERRUPTED
    from launcher.views import trial

    job = read_job(asked, script=execute.TRIAL, args=())
    with opened(name or cluster) as now:
        launch = execute.prepare(
            now,
            job,
            pick(execute.INSIDE, (execute.TRIAL,)),
            run_id=execute.make_run_id(),
            port=None,
            any_port=True,
            ignored=asked["ignore"],
        )
        plan, record = launch.plan, now.memory.run(launch.plan.run)
        count = len(plan.nodes)
        now.voice.say(f"test {plan.run}: {plan.world_size} processes on {count} node{'s' * (count != 1)}")
        show = (lambda _node, _line: None) if as_json else log_view([node.name for node in plan.nodes])
        end = execute.carry_out(now, launch, record, show=show)
        rows = trial.verdicts(plan, record.state(), record.merged())
    if as_json:
        show_json({"run": plan.run, "code": end.code, "cause": end.cause, "logs": str(record.logs), "nodes": rows})
    else:
        click.echo(trial.verdict_text(rows))
    if end.code == INTERRUPTED:
        raise SystemExit(end.code)
    if not all(row["ok"] for row in rows):
        raise RunError(end.cause or "not every node is well", detail=(f"logs: {record.logs}",))

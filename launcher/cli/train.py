"""Runs: run, attach, stop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cluster.errors import InputError
from launcher.cli.options import (
    Command,
    check_script,
    cluster_option,
    ignore_option,
    job_options,
    json_option,
    launcher,
    log_view,
    model_options,
    nodes_option,
    opened,
    quit_with_reader,
    read_job,
    read_question,
    show_json,
    with_nodes,
)

if TYPE_CHECKING:
    from launcher.attempts import Prepare
    from launcher.execute import Launch
    from launcher.job import Job
    from launcher.restart import Policy
    from launcher.session import Session


@launcher.command(cls=Command, context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@cluster_option
@job_options
@model_options
@nodes_option
@click.option("--engine", type=click.Choice(["docker", "process"]), help="In place of the inventory's engine.")
@click.option("--port", metavar="PORT|auto", help="Where the processes meet. Default: the inventory's master_port.")
@click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A secret, from the environment.")
@click.option("--secrets-file", type=click.Path(path_type=Path), help="NAME=VALUE lines, in place of the environment.")
@click.option(
    "--snapshot-limit",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="MIB",
    help="The most that the code may weigh.",
)
@click.option(
    "--node-grace",
    type=click.IntRange(10, 3600),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="How long a node may be silent before the others end without it.",
)
@click.option(
    "--hang-timeout",
    type=click.IntRange(min=10),
    metavar="SECONDS",
    help="End the run when no process has written a line for so long.  [default: never]",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0, 1000),
    default=0,
    show_default=True,
    metavar="N",
    help="How often a run that failed is started again, unless its own script is to blame.",
)
@click.option("--on-exit", multiple=True, metavar="CODE=restart|fail", help="A rule for an exit code.")
@click.option("--on-log", multiple=True, metavar="REGEX=restart|fail", help="A rule for a line of the log; wins.")
@click.option("--detach", "-d", is_flag=True, help="Start it and return; launcher attach watches it.")
@click.option("--dry-run", is_flag=True, help="Print the whole plan; change nothing.")
@ignore_option
@json_option
@click.argument("script", required=False, metavar="SCRIPT")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]...")
def run(cluster: str | None, *, detach: bool, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Run a training script on every process of the cluster.

    The working directory is copied to the nodes as far as git or .launcherignore do not leave it out. Options for the
    launcher stand before SCRIPT; everything after it reaches the script byte for byte.

    \b
    launcher run train.py --epochs 3
    launcher run --stage 3 --offload-optimizer nvme train.py
    launcher run --stage auto --model config.json --precision bf16 train.py
    launcher run --ds-config zero3.json train.py
    launcher run --nodes gpu-01,gpu-02 train.py
    launcher run --job job.yaml           script and settings from a file; options win over it
    """
    from launcher import execute
    from launcher.restart import read_policy
    from launcher.secrets import read_secrets
    from launcher.snapshot import take
    from launcher.views import text

    job = read_job(asked, script=asked["script"], args=asked["args"])
    policy = read_policy(asked["max_restarts"], asked["on_exit"], asked["on_log"])
    if detach and policy.restarts:
        raise InputError(
            "nobody is left to start a detached run again",
            where="--max-restarts",
            next_step="leave out --detach: a run whose launcher dies goes on all the same",
        )
    if str(Path.cwd()) == os.environ.get("HOME"):
        raise InputError(
            "the working directory is your home: all of it would be sent to every node, keys and all",
            next_step="change to the folder of your code",
        )
    port, any_port = _port(asked["port"])
    snapshot = take(Path.cwd(), limit_bytes=asked["snapshot_limit"] << 20)
    check_script(job.script, {entry.path for entry in snapshot.entries})
    with opened(cluster, engine=asked["engine"], keep=not dry_run) as whole:
        now = with_nodes(whole, asked)
        names = (*now.inventory.container.secrets, *job.secrets, *asked["secrets"])
        secrets = read_secrets(names, environment=os.environ, file=asked["secrets_file"])
        watched = {name: asked[name] for name in ("node_grace", "hang_timeout")}
        job = _with(job, secrets=tuple(secrets), detached=detach, **watched)

        def prepare(now: Session, job: Job, run_id: str) -> Launch:
            return execute.prepare(
                now,
                job,
                snapshot,
                run_id=run_id,
                port=port,
                any_port=any_port,
                question=read_question(asked, job),
                ignored=asked["ignore"],
                dry_run=dry_run,
            )

        launch = prepare(now, job, execute.make_run_id())
        if dry_run:
            todo = (*launch.todo, f"send {len(snapshot.entries)} files", "start the run's containers on every node")
            if as_json:
                show_json({**text.effective(launch.plan), "todo": todo})
            else:
                click.echo(text.plan_text(launch.plan, todo))
            return
        if detach:
            _start(now, launch, secrets, as_json=as_json)
        else:
            _run(now, launch, policy, prepare, secrets, as_json=as_json)


def _start(now: Session, launch: Launch, secrets: dict[str, str], *, as_json: bool) -> None:
    from launcher import execute

    plan = launch.plan
    _tell(now, launch)
    try:
        with execute.leaving_on_signals():
            containers = execute.start(now, launch, now.memory.run(plan.run), secrets=secrets)
    except KeyboardInterrupt:
        execute.abandon(now, plan)
        raise
    now.voice.say(f"run {plan.run} goes on by itself, and ends on every node when it ends on one")
    now.voice.say("  next: launcher attach, launcher logs -f, launcher stop")
    if as_json:
        show_json({"run": plan.run, "containers": containers})


def _run(
    now: Session, launch: Launch, policy: Policy, prepare: Prepare, secrets: dict[str, str], *, as_json: bool
) -> None:
    from launcher import attempts, execute

    _tell(now, launch)
    spares = now.whole.inventory.spares if now.whole and policy.restarts else ()
    show = log_view([*dict.fromkeys((*(node.name for node in launch.plan.nodes), *spares))])
    with execute.leaving_on_signals():
        run_id, end = attempts.carry_through(now, launch, policy, prepare=prepare, secrets=secrets, show=show)
    code = [entry.path for entry in launch.snapshot.entries]
    _finish(now, run_id, end, as_json=as_json, code=code, beside=_beside(launch.plan.job.script))


def _beside(script: str = "") -> list[str]:
    """The modules in the working directory, and those beside a script."""
    folders = {Path(), Path(script).parent}
    return [str(path) for folder in folders for path in (*folder.glob("*.py"), *folder.glob("*/__init__.py"))]


def _tell(now: Session, launch: Launch) -> None:
    plan = launch.plan
    count = len(plan.nodes)
    for note in (*plan.job.notes, *launch.snapshot.skipped):
        now.voice.say(note)
    now.voice.say(f"run {plan.run}: {plan.world_size} processes on {count} node{'s' * (count != 1)}")


def _finish(
    now: Session, run_id: str, end: Any, *, as_json: bool, code: list[str], beside: list[str] | None = None
) -> NoReturn:
    """Say how the run ended, and leave with the right exit code; `code` and `beside` as in `imports.cure`."""
    from launcher import imports
    from launcher.errors import RunError
    from launcher.state import INTERRUPTED
    from launcher.views import text

    record = now.memory.run(run_id)
    try:
        record.split_ranks()
    except OSError as error:
        now.voice.say(f"warning: no logs by rank: {error}")
    if as_json:
        show_json({"run": run_id, "code": end.code, "cause": end.cause, "logs": str(record.logs)})
    if end.code == 0:
        now.voice.say(f"run {run_id}: {text.state_line(record.state())}; logs in {record.logs}")
        raise SystemExit(0)
    if end.code == INTERRUPTED:
        now.voice.say(f"run {run_id}: {end.cause}; nothing of it is left running")
        raise SystemExit(INTERRUPTED)
    detail = [f"logs: {record.logs}", *([f"stacks: {record.evidence}"] if record.evidence.exists() else [])]
    file = now.memory.inventory()
    lacks = imports.cure(
        record.state().ends, now.inventory, code=code, beside=beside or (), file=file.name if file else "cluster.yaml"
    )
    raise RunError(end.cause, detail=tuple(detail), next_step=lacks or f"launcher logs {run_id}")


def _with(job: Job, **changes: Any) -> Job:
    import dataclasses

    return dataclasses.replace(job, **changes)


def _port(text: str | None) -> tuple[int | None, bool]:
    if text in (None, "auto"):
        return None, text == "auto"
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:  # noqa: PLR2004 - the ports that a user may listen on
        raise InputError(f"{text!r} is no port", where="--port", next_step="1024 to 65535, or auto")
    return int(text), False


@launcher.command()
@cluster_option
@json_option
@click.argument("run_id", required=False, metavar="[RUN]")
def attach(cluster: str | None, run_id: str | None, *, as_json: bool) -> None:
    """Watch the run that is under way, from wherever; Ctrl-C only leaves.

    Where several are, name one of them.

    \b
    launcher attach
    launcher attach 20261126-170512-a01b
    """
    from launcher import execute

    quit_with_reader()
    if run_id:
        execute.check_run(run_id)
    with opened(cluster) as now:
        show = log_view([node.name for node in now.inventory.nodes])
        found, end = execute.attach(now, run_id, show=show)
        _finish(now, found, end, as_json=as_json, code=_beside())


@launcher.command()
@cluster_option
@click.argument("run_id", required=False, metavar="[RUN]")
def stop(cluster: str | None, run_id: str | None) -> None:
    """Stop the run that is under way, in order, on every node.

    Where several are, name one of them.

    \b
    launcher stop
    launcher stop 20261126-170512-a01b
    """
    from launcher import execute

    if run_id:
        execute.check_run(run_id)
    with opened(cluster) as now:
        end = execute.stop(now, run_id)
    none = f"run {run_id} is not under way" if run_id else "no run is under way"
    click.echo(none if end is None else f"{end.cause or 'it had ended'}; nothing of it is left", err=True)

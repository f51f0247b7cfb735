"""What would happen: rehearse."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cluster.errors import InputError
from launcher.cli.options import (
    Command,
    check_script,
    job_options,
    json_option,
    launcher,
    log_view,
    memory,
    read_job,
    show_json,
)

FAULTS = ("stop", "crash", "hang", "node")


@launcher.command(cls=Command, context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@job_options
@click.option("--nodes", type=click.IntRange(2, 8), default=2, show_default=True, help="This machine so many times.")
@click.option("--slots", type=click.IntRange(1, 8), default=1, show_default=True, help="Processes of each.")
@click.option("--fault", "faults", multiple=True, type=click.Choice(FAULTS), help="Only this one; may be repeated.")
@click.option(
    "--after",
    type=click.IntRange(0, 3600),
    default=5,
    show_default=True,
    metavar="SECONDS",
    help="When it comes, from the job's first line on.",
)
@click.option(
    "--engine",
    type=click.Choice(["process", "docker"]),
    default="process",
    show_default=True,
    help="Without containers, or in the CPU image.",
)
@click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A secret, from the environment.")
@json_option
@click.argument("script", required=False, metavar="SCRIPT")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]...")
def rehearse(*, as_json: bool, **asked: Any) -> None:
    """Run your own job in small on this machine, and see what happens when a part of it dies.

    The cluster is this machine several times, on its CPUs, without SSH. Each fault has a run of its own: the job is
    stopped, its last rank is killed, its last rank stands still, its last node is gone. What is told is what would be
    told on the real nodes. A full disk is not rehearsed: that would take more rights than this needs.

    \b
    launcher rehearse --stage 3 train.py --steps 1000
    launcher rehearse --nodes 3 --fault crash --after 30 train.py
    """
    import dataclasses
    import shutil

    from launcher import rehearsal, zero
    from launcher.errors import RunError
    from launcher.secrets import read_secrets
    from launcher.snapshot import take
    from launcher.views import text
    from launcher.views.live import Teller

    job = read_job(asked, script=asked["script"], args=asked["args"])
    if job.settings.stage == "auto":
        raise InputError("which stage is to be rehearsed?", where="--stage auto", next_step="choose 0, 1, 2 or 3")
    zero.check(job, accelerator="cpu")
    values = read_secrets((*job.secrets, *asked["secrets"]), environment=os.environ)
    job = dataclasses.replace(job, secrets=tuple(values))
    snapshot = take(Path.cwd())
    check_script(job.script, {entry.path for entry in snapshot.entries})
    kept = memory().rehearsals
    size = {name: asked[name] for name in ("slots", "engine")}
    with rehearsal.stage(kept, Teller(), count=asked["nodes"], **size) as now:
        show = (lambda _node, _line: None) if as_json else log_view([node.name for node in now.inventory.nodes])
        seen = []
        for fault in rehearsal.choose(asked["faults"]):
            now.voice.say(f"--- {fault.name}: {fault.what}")
            seen.append(rehearsal.rehearse(now, job, snapshot, fault, after=asked["after"], values=values, show=show))
    logs = now.memory.folder
    if as_json:
        show_json({"faults": [text.rehearsed_data(one) for one in seen]})
    else:
        click.echo(text.rehearsed_text(seen))
    if all(one.expected for one in seen):
        shutil.rmtree(logs, ignore_errors=True)
        return
    early = [one for one in seen if one.seconds is None]
    if early:
        raise RunError(
            f"the job had ended before it could be tried: {', '.join(one.fault.name for one in early)}",
            detail=(f"logs: {logs}",),
            next_step="let it train for longer, or make --after shorter",
        )
    raise RunError("not everything ended as it should have", detail=(f"logs: {logs}",))

"""Bringing machines up and down: init, trust, up, down."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.errors import InputError
from launcher.cli.options import (
    cluster_option,
    ignore_option,
    json_option,
    launcher,
    load,
    memory,
    opened,
    show_json,
)

if TYPE_CHECKING:
    from cluster.inventory import Inventory
    from launcher.plan import Plan
    from launcher.record import ClusterMemory


@launcher.command()
@click.argument("hosts", nargs=-1, required=True, metavar="[USER@]HOST[:PORT]...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("cluster.yaml"), help="The file.", show_default=True
)
@click.option("--name", default="cluster", show_default=True, help="The cluster's name.")
@click.option("-i", "--identity-file", help="Private key for all hosts.")
@click.option("--yes", is_flag=True, help="Pin the shown host keys without asking.")
def init(hosts: tuple[str, ...], output: Path, name: str, identity_file: str | None, *, yes: bool) -> None:
    """Write a first inventory, filled with what the machines report.

    \b
    launcher init ml@10.0.0.11 ml@10.0.0.12
    launcher init 10.0.0.11 10.0.0.12 --name lab -o lab.yaml
    """
    from launcher.first import check_output, read_hosts, write_first
    from launcher.views.live import Teller

    check_output(output)
    first = read_hosts(hosts, name=name, identity_file=identity_file)
    remembered = memory().cluster(name)
    _trust(first, remembered, yes=yes, replace=False)
    write_first(first, remembered, output, voice=Teller())
    click.echo(f"wrote {output}; next: launcher up {output}", err=True)


@launcher.command()
@click.argument("cluster", required=False, envvar="LAUNCHER_CLUSTER", metavar="[CLUSTER]")
@click.option("--yes", is_flag=True, help="Pin without asking.")
@click.option("--replace", is_flag=True, help="Also pin keys that have changed.")
def trust(cluster: str | None, *, yes: bool, replace: bool) -> None:
    """Show the nodes' host keys, and pin them.

    Compare the fingerprints with what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints on each node. No other
    command ever connects to a node whose key is not pinned.

    \b
    launcher trust cluster.yaml
    """
    inventory, remembered, path = load(cluster)
    remembered.remember(path, engine=remembered.engine())
    _trust(inventory, remembered, yes=yes, replace=replace)


def _trust(inventory: Inventory, remembered: ClusterMemory, *, yes: bool, replace: bool) -> None:
    from launcher.first import pin_keys, scan_keys

    for hop in scan_keys(inventory, remembered.known_hosts):
        for line in hop.lines:
            click.echo(line, err=True)
        if not hop.keys:
            continue
        if hop.changed and not replace:
            raise hop.error()
        if not yes and not _agreed(f"pin {'the CHANGED keys' if hop.changed else 'these keys'} of {hop.name}?"):
            raise InputError(f"the keys of {hop.name} were not pinned", next_step="compare them, then run this again")
        pin_keys(hop, remembered.known_hosts, replace=replace)


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise InputError("nobody can be asked: standard input is no terminal", next_step="compare, then add --yes")
    return click.confirm(question, err=True)


@launcher.command()
@click.argument("cluster", required=False, envvar="LAUNCHER_CLUSTER", metavar="[CLUSTER]")
@click.option("--engine", type=click.Choice(["docker", "process"]), help="In place of the inventory's engine.")
@click.option("--dry-run", is_flag=True, help="Print the whole plan; change nothing.")
@click.option(
    "--plan",
    "planned",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Do only what this plan says, as --dry-run --json gave it; refuse if anything has changed since.",
)
@ignore_option
@json_option
def up(
    cluster: str | None,
    engine: str | None,
    planned: Path | None,
    ignore: tuple[str, ...],
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Bring the machines up: image, directories, configuration, one idle container each.

    May be run at any time; does only what is missing.

    \b
    launcher up cluster.yaml
    launcher up examples/local.yaml       this machine alone, without SSH and Docker
    launcher up --dry-run cluster.yaml
    launcher up --dry-run --json > plan.json && launcher up --plan plan.json
    """
    from cluster.document import load_text
    from launcher import converge
    from launcher.views import text

    check: Callable[[Plan], None] | None = None
    if planned is not None:
        check = functools.partial(text.check_promise, load_text(planned), name=str(planned))
    with opened(cluster, engine=engine, keep=not dry_run) as now:
        done, todo = converge.up(now, ignored=ignore, dry_run=dry_run, check=check)
        if not dry_run:
            memory().make_current(now.inventory.name)
    if as_json:
        show_json({**text.promise(done.plan), "todo": todo, "done": converge.told(done)})
    elif dry_run:
        click.echo(text.plan_text(done.plan, todo))
    else:
        count = len(done.plan.nodes)
        nodes = f"{count} node{'s' * (count != 1)}"
        click.echo(f"cluster {now.inventory.name} is up: {nodes}; {converge.told(done)}", err=True)


@launcher.command()
@cluster_option
@click.argument("name", required=False, metavar="[CLUSTER]")
def down(cluster: str | None, name: str | None) -> None:
    """Remove every container of the cluster from every node. Checkpoints, data and logs stay.

    \b
    launcher down
    launcher down -c lab
    """
    from launcher import nodes as machines

    with opened(name or cluster) as now:
        gone = machines.down(now)
    memory().forget_current(now.inventory.name)
    count = sum(len(names) for names in gone.values())
    click.echo(f"cluster {now.inventory.name} is down: {count} container{'s' * (count != 1)} removed", err=True)

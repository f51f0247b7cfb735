"""Looking: status, ls, logs, and into the node containers: exec, shell."""

from __future__ import annotations

import sys

import click

from launcher.cli.options import (
    cluster_option,
    json_option,
    launcher,
    log_view,
    memory,
    opened,
    quit_with_reader,
    show_json,
)


@launcher.command()
@cluster_option
@json_option
def status(cluster: str | None, *, as_json: bool) -> None:
    """What stands on every node, by its labels.

    \b
    launcher status
    launcher status --json -c lab
    """
    from launcher import operator, session
    from launcher.views import text

    with opened(cluster) as now:
        answers = session.find_ours(now)
        hosts = {node.name: node.host for node in now.inventory.nodes}
        lost = {node: error.what for node, error in answers.bad.items()}
        unstarted = [one.id for ones in answers.good.values() for one in ones if operator.never_starts(one)]
        spares = now.inventory.spares
        rows = text.status_rows(answers.good, hosts, lost=lost, unstarted=unstarted, spares=spares)
        runs = now.memory.runs()
        last = runs[-1].state() if runs else None
        there = [run for run in session.run_containers(answers.good) if last is None or run != last.run]
        others = [state for run in there if (state := now.memory.run(run).state()).run]
    if as_json:
        told = {"last_run": text.state_data(last), "other_runs": [text.state_data(one) for one in others]}
        show_json({"cluster": now.inventory.name, "nodes": rows, **told})
    else:
        click.echo(text.status_text(now.inventory.name, rows, last, others))
    answers.all_or_raise()


@launcher.command("ls")
@json_option
def list_(*, as_json: bool) -> None:
    """The clusters and runs that are known on this machine.

    \b
    launcher ls
    """
    from launcher.views import text

    known = memory()
    current = known.current()
    rows = [text.run_row(one.name, run.state()) for one in known.clusters() for run in one.runs()]
    names = [one.name for one in known.clusters() if one.inventory()]
    if as_json:
        show_json({"current": current, "clusters": names, "runs": rows})
        return
    for name in names:
        click.echo(f"{'*' if name == current else ' '} {name}  {known.cluster(name).inventory()}")
    if rows:
        click.echo(text.run_table(rows))
    if not names:
        click.echo("no cluster is known here; next: launcher up cluster.yaml", err=True)


@launcher.command()
@cluster_option
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends; Ctrl-C only leaves.")
@click.option("--since", default="", metavar="TIME", help="2026-11-23T06:00, or 10m, 2h ago.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank's lines.")
@click.argument("run_id", required=False, metavar="[RUN]")
def logs(cluster: str | None, since: str, rank: int | None, run_id: str | None, *, follow: bool) -> None:
    """The merged log of a run; the newest one when none is named.

    \b
    launcher logs -f
    launcher logs --since 10m --rank 5
    """
    from launcher import execute
    from launcher.views.live import read_since

    quit_with_reader()
    moment = read_since(since)
    with opened(cluster) as now:
        wanted = execute.choose_run(now, run_id)
        show = log_view([node.name for node in now.inventory.nodes], rank=rank, since=moment)
        execute.show_logs(now, wanted, show=show, follow=follow)


@launcher.command(name="exec", context_settings={"allow_interspersed_args": False})
@cluster_option
@click.option("--node", "nodes", multiple=True, metavar="NODE", help="Only there. May be repeated.")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
def execute_(cluster: str | None, nodes: tuple[str, ...], argv: tuple[str, ...]) -> None:
    """Run a command in the node containers, on all nodes at once.

    \b
    launcher exec nvidia-smi
    launcher exec --node gpu-01 -- df -h /nvme/0
    """
    from launcher import nodes as machines

    with opened(cluster) as now:
        answers = machines.run_inside(now, nodes, argv)
    worst = 0
    for node, result in answers.items():
        for stream, said in ((sys.stdout, result.stdout), (sys.stderr, result.stderr)):
            for line in said.decode(errors="replace").splitlines():
                click.echo(f"{node} | {line}", file=stream)
        worst = max(worst, result.code)
    raise SystemExit(1 if worst else 0)


@launcher.command(context_settings={"allow_interspersed_args": False})
@cluster_option
@click.argument("node", required=False)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND]...")
def shell(cluster: str | None, node: str | None, argv: tuple[str, ...]) -> None:
    """A shell in a node's container; in the first node's when none is named.

    \b
    launcher shell gpu-02
    """
    from launcher import nodes as machines

    with opened(cluster) as now:
        raise SystemExit(machines.shell(now, node, argv or ("bash",), tty=sys.stdin.isatty()))

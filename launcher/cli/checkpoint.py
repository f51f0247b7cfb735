"""Checkpoints: ls, verify, gather, scatter, export, universal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from cluster.errors import InputError
from launcher.cli.options import Group, cluster_option, json_option, launcher, opened, show_json

if TYPE_CHECKING:
    from launcher.gathering import Placed
    from launcher.session import Session


@launcher.group(cls=Group)
def checkpoint() -> None:
    """Checkpoints of nodes without a shared file system: whole, in one place, converted."""


def tag_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--tag`: which checkpoint of the run."""
    return click.option(
        "--tag",
        "--step",
        "tag",
        metavar="TAG|STEP",
        help="Which checkpoint: its folder, its tag, or its step. Default: the newest that is whole.",
    )(command)


run_argument = click.argument("run", required=False, metavar="[RUN]")


@checkpoint.command("ls")
@cluster_option
@json_option
@run_argument
def list_(cluster: str | None, run: str | None, *, as_json: bool) -> None:
    """Which checkpoints there are, on which nodes, and whether they are whole; nothing is read.

    \b
    launcher checkpoint ls
    """
    from launcher import checkpoints
    from launcher.views import checkpoints as views

    with opened(cluster) as now:
        at, lost = checkpoints.reached(now)
        found = checkpoints.kept(at, run)
        events = (event for record in now.memory.runs() for event in record.events())
        rows = views.rows(found, checkpoints.last_verified(events))
    if as_json:
        silent = {node: error.what for node, error in lost.items()}
        show_json({"cluster": now.inventory.name, "checkpoints": rows, "lost": silent})
    elif rows:
        click.echo(views.list_text(rows))
    else:
        click.echo(f"cluster {now.inventory.name} has no checkpoint", err=True)
    if lost:
        raise next(iter(lost.values()))


@checkpoint.command()
@cluster_option
@tag_option
@click.option("--all", "every", is_flag=True, help="All checkpoints of the run, not only the newest.")
@click.option("--seal", is_flag=True, help="Where a node never wrote down what it holds: do it now, as it is.")
@json_option
@run_argument
def verify(cluster: str | None, run: str | None, tag: str | None, *, every: bool, seal: bool, as_json: bool) -> None:
    """Read a checkpoint again on all nodes at once, and name every file that is not as it was written.

    Exit code 8 when anything is missing, torn, changed, foreign, or of another step.

    \b
    launcher checkpoint verify
    launcher checkpoint verify 20261123-060000-1f2e --step 100
    """
    from launcher import checkpoints
    from launcher.views import checkpoints as views

    with opened(cluster) as now:
        found = checkpoints.verify(now, run=run, tag=tag, every=every, seal=seal)
    if as_json:
        show_json({"cluster": now.inventory.name, "checkpoints": views.verified_data(found)})
    else:
        click.echo(views.verified_text(found))
    bad = [one for one in found if not one.ok]
    if bad and not as_json:
        flaws = sum(len(one.flaws) + sum(map(len, one.copies.values())) for one in bad)
        from cluster.errors import IntegrityError

        raise IntegrityError(
            f"{flaws} flaw{'s' * (flaws != 1)} in {', '.join(one.kept.unit for one in bad)}",
            next_step=checkpoints.cure_of(bad),
        )
    raise SystemExit(8 if bad else 0)


@checkpoint.command()
@cluster_option
@tag_option
@click.option("--to", required=True, metavar="NODE|FOLDER", help="A node, or a folder on this machine.")
@json_option
@run_argument
def gather(cluster: str | None, run: str | None, tag: str | None, to: str, *, as_json: bool) -> None:
    """Bring every node's part of a checkpoint to one place, verified, whole or not at all.

    What an interrupted one has brought is not sent again.

    \b
    launcher checkpoint gather --to ./kept
    launcher checkpoint gather --step 100 --to gpu-01
    """
    from launcher import gathering

    with opened(cluster) as now:
        _tell(now, (gathering.gather(now, run=run, tag=tag, to=to),), as_json=as_json)


@checkpoint.command()
@cluster_option
@click.option("--to", "nodes", multiple=True, metavar="NODE", help="Only there. May be repeated.")
@json_option
@click.argument("source", metavar="FROM")
def scatter(cluster: str | None, source: str, nodes: tuple[str, ...], *, as_json: bool) -> None:
    """Put a whole checkpoint onto all nodes, so that a run can go on from it on any of them.

    FROM is a folder on this machine, or NODE:FOLDER, as gather and universal name it.

    \b
    launcher checkpoint scatter gpu-01:gathered/20261123-060000-1f2e/step-00000100-universal
    """
    from launcher import gathering

    with opened(cluster) as now:
        _tell(now, gathering.scatter(now, source, to=nodes), as_json=as_json)


def _size(_context: click.Context, _option: click.Parameter, text: str) -> str:
    from argparse import ArgumentTypeError

    from launcher.inside.export import size_of

    try:
        size_of(text)
    except ArgumentTypeError as error:
        raise InputError(str(error), where="--max-shard-size") from None
    return text


@checkpoint.command()
@cluster_option
@tag_option
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", help="Of the weights.")
@click.option(
    "--format", "form", type=click.Choice(["safetensors", "bin"]), default="safetensors", help="Of the files."
)
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    callback=_size,
    help="The most in one file.",
)
@click.option("--to", required=True, metavar="NODE|FOLDER", help="A node, or a folder on this machine.")
@json_option
@run_argument
def export(cluster: str | None, run: str | None, *, as_json: bool, **asked: Any) -> None:
    """Turn a ZeRO checkpoint into plain weights, where its shards are.

    \b
    launcher checkpoint export --dtype bf16 --to ./model
    """
    from launcher import conversion

    with opened(cluster) as now:
        _tell(now, (conversion.export(now, run=run, **asked),), as_json=as_json)


@checkpoint.command()
@cluster_option
@tag_option
@click.option("--to", metavar="NODE", help="Where to do it. Default: where all shards are, else the most.")
@json_option
@run_argument
def universal(cluster: str | None, run: str | None, tag: str | None, to: str | None, *, as_json: bool) -> None:
    """Turn a ZeRO checkpoint into one for any number of processes, by DeepSpeed's own tool.

    Then scatter it, and resume with "checkpoint": {"load_universal": true} in the DeepSpeed configuration.

    \b
    launcher checkpoint universal
    """
    from launcher import conversion

    with opened(cluster) as now:
        _tell(now, (conversion.universal(now, run=run, tag=tag, to=to),), as_json=as_json)


def _tell(now: Session, placed: Iterable[Placed], *, as_json: bool) -> None:
    from launcher.views import checkpoints as views

    done = tuple(placed)
    if as_json:
        show_json({"cluster": now.inventory.name, "placed": [views.placed_data(one) for one in done]})
        return
    for one in done:
        for note in one.notes:
            now.voice.say(note)
        click.echo(views.placed_text(one))

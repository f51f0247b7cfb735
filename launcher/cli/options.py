"""What the commands share: the group, the options, and how the cluster that is meant is found."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.errors import InputError
from launcher import __version__

if TYPE_CHECKING:
    from cluster.inventory import Inventory
    from launcher.job import Job
    from launcher.record import ClusterMemory, Memory
    from launcher.session import Session

NAME = "launcher"
ORDER = (
    *("init", "trust", "up", "run", "status", "ls", "logs", "attach", "stop", "exec", "shell", "down"),
    *("checkpoint", "verify", "gather", "scatter", "export", "universal"),
    *("config", "image", "schema", "completion"),
)


class Group(click.Group):
    """Commands in the order in which they are used, and a suggestion for a mistyped one."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], self.commands, n=1)
            if close and "did you mean" not in error.message.lower():
                raise click.UsageError(f"{error.message} Did you mean {close[0]!r}?", ctx) from None
            raise


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Begin with: launcher init HOST..., launcher up cluster.yaml, launcher run train.py",
)
@click.version_option(__version__, prog_name=NAME)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def launcher(debug: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """From a list of GPU machines and a training script to a trained model.

    \b
    launcher up cluster.yaml              image, configuration and containers on every node
    launcher run --stage 3 train.py       Accelerate + DeepSpeed over all nodes, logs merged
    launcher down                         leaves nothing of ours but checkpoints
    """
    del debug  # read by main(), also when the parsing itself fails


def cluster_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--cluster`: an inventory file, or the name of a cluster that was brought up from here."""
    return click.option(
        "-c",
        "--cluster",
        metavar="NAME|FILE",
        envvar="LAUNCHER_CLUSTER",
        help="An inventory, or a cluster's name. Default: ./cluster.yaml, else the one brought up last.",
    )(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`: the same as data."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def ignore_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--ignore`: accept a finding."""
    return click.option(
        "--ignore", multiple=True, metavar="ID", help="Accept a finding, by the id in [brackets]. May be repeated."
    )(command)


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the job is to be trained."""
    offload = click.Choice(["none", "cpu", "nvme"])
    options = [
        click.option(
            "--stage",
            type=click.Choice(["0", "1", "2", "3"]),
            default="0",
            show_default=True,
            help="ZeRO stage; 0 is plain multi-process training. Take the lowest that works.",
        ),
        click.option("--offload-optimizer", type=offload, default="none", help="Where the optimizer's states live."),
        click.option("--offload-param", type=offload, default="none", help="Where the parameters live (stage 3)."),
        click.option(
            "--precision", type=click.Choice(["no", "fp16", "bf16", "fp8"]), default="no", help="Mixed precision."
        ),
        click.option("--accumulation", type=int, default=1, metavar="N", help="Gradient accumulation steps."),
        click.option("--clipping", type=float, metavar="NORM", help="Gradient clipping."),
        click.option(
            "--ds-config",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A DeepSpeed JSON instead of the settings above.",
        ),
        click.option(
            "--grace",
            type=click.IntRange(0, 3600),
            default=5,
            show_default=True,
            metavar="SECONDS",
            help="How long the job may take to end when it is asked to.",
        ),
        click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="Environment of the job."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def memory() -> Memory:
    """What is remembered on this machine."""
    from launcher.record import Memory, state_folder

    return Memory(state_folder(os.environ))


def load(cluster: str | None, *, engine: str | None = None) -> tuple[Inventory, ClusterMemory, Path]:
    """The inventory that is meant, what is remembered of it, and where its file is."""
    from cluster.inventory import load_inventory

    known = memory()
    path = _meant(cluster, known)
    inventory = load_inventory(path, engine=engine)  # type: ignore[arg-type]
    if cluster and not _is_file(cluster) and inventory.name != cluster:
        raise InputError(
            f"this file now describes the cluster {inventory.name!r}, not {cluster!r}",
            where=str(path),
            next_step=f"change the name back, or use -c {inventory.name}",
        )
    remembered = known.cluster(inventory.name)
    stand_in = remembered.engine() if remembered.inventory() == path.absolute() else None
    if engine is None and stand_in:
        inventory = load_inventory(path, engine=stand_in)  # type: ignore[arg-type]
    return inventory, remembered, path


def _is_file(cluster: str) -> bool:
    return Path(cluster).is_file() or "/" in cluster or cluster.endswith((".yaml", ".yml"))


def _meant(cluster: str | None, known: Memory) -> Path:
    if cluster and _is_file(cluster):
        return Path(cluster)
    if not cluster and Path("cluster.yaml").exists():
        return Path("cluster.yaml")
    name = cluster or known.current()
    if name is None:
        raise InputError(
            "no cluster is named, there is no cluster.yaml here, and none was brought up",
            next_step="launcher up cluster.yaml, or launcher init HOST... to write a first one",
        )
    path = known.cluster(name).inventory()
    if path is None:
        names = ", ".join(one.name for one in known.clusters()) or "none"
        raise InputError(f"no cluster {name!r} is known here", next_step=f"known are: {names}; or name its file")
    return path


@contextlib.contextmanager
def opened(cluster: str | None, *, engine: str | None = None, keep: bool = False) -> Iterator[Session]:
    """A session with the cluster that is meant; with `keep` it is remembered where the inventory is, and the engine."""
    from launcher.session import session
    from launcher.views.live import Teller

    inventory, remembered, path = load(cluster, engine=engine)
    if keep:
        remembered.remember(path, engine=engine or remembered.engine())
    with session(inventory, remembered, Teller()) as now:
        yield now


def read_job(asked: dict[str, Any], *, script: str, args: tuple[str, ...]) -> Job:
    """The job that the options of `job_options` describe."""
    from launcher.job import Job, Zero
    from launcher.secrets import read_variables

    path = asked["ds_config"]
    try:
        config = None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the DeepSpeed file cannot be read: {error}", where=str(path)) from None
    return Job(
        script=script,
        args=args,
        zero=Zero(
            stage=int(asked["stage"]),
            offload_optimizer=asked["offload_optimizer"],
            offload_param=asked["offload_param"],
            accumulation=asked["accumulation"],
            clipping=asked["clipping"],
        ),
        precision=asked["precision"],
        config=config,
        env=read_variables(asked["variables"]),
        grace=asked["grace"],
    )


def quit_with_reader() -> None:
    """Who only watches ends quietly when nobody reads any more, as `tail -f` does."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def log_view(nodes: list[str], *, rank: int | None = None, since: str = "") -> Any:
    """Log lines on standard output."""
    from launcher.views.live import LogView

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a job's words must not end its watch
    return LogView(nodes, out=sys.stdout, colour=sys.stdout.isatty(), rank=rank, since=since)


def show_json(value: object) -> None:
    """JSON on standard output."""
    from launcher.record import to_pretty_json

    click.echo(to_pretty_json(value))

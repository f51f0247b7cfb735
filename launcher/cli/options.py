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
    from cluster.document import Document
    from cluster.inventory import Inventory
    from launcher.job import Job, Settings
    from launcher.jobfile import JobFile
    from launcher.ladder import Question
    from launcher.record import ClusterMemory, Memory
    from launcher.session import Session

NAME = "launcher"
ORDER = (
    *("init", "trust", "up", "plan", "run", "status", "ls", "logs", "attach", "stop", "exec", "shell"),
    *("env", "test", "rehearse", "down", "checkpoint", "verify", "gather", "scatter", "export", "universal"),
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
        "--ignore",
        multiple=True,
        metavar="ID",
        callback=_known_findings,
        help="Accept a finding, by the id in [brackets]. May be repeated.",
    )(command)


def _known_findings(_context: click.Context, _option: click.Parameter, ids: tuple[str, ...]) -> tuple[str, ...]:
    import difflib

    from launcher.checks import IDS

    for one in ids:
        if one not in IDS:
            close = difflib.get_close_matches(one, IDS, n=1)
            cure = f"did you mean {close[0]}?" if close else f"one of: {', '.join(sorted(IDS))}"
            raise InputError(f"{one!r} is no finding", where="--ignore", next_step=cure)
    return ids


class Option(click.Option):
    """An option that stands under a heading of the help text."""

    def __init__(self, *names: Any, section: str = "", **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.section = section


class Command(click.Command):
    """A command whose help text shows its options by section; those of none come last, as `Options`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", ""), []).append(record)
        for name in sorted(sections, key=lambda name: not name):
            with formatter.section(name or "Options"):
                formatter.write_dl(sections[name])


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the job is to be trained; the names are those of job.yaml."""
    offload = click.Choice(["none", "cpu", "nvme"])
    count = click.IntRange(min=1)
    zero, step, how = "ZeRO", "Steps and optimizer", "DeepSpeed in detail"
    options = [
        _option(
            "--stage",
            type=click.Choice(["auto", "0", "1", "2", "3"]),
            section=zero,
            help="ZeRO stage; 0 is plain multi-process training (default). auto: the lowest rung that fits.",
        ),
        _option("--offload-optimizer", type=offload, section=zero, help="Where the optimizer's states live."),
        _option("--offload-param", type=offload, section=zero, help="Where the parameters live (stage 3)."),
        _option("--precision", type=click.Choice(["no", "fp16", "bf16", "fp8"]), section=zero, help="Mixed precision."),
        _option("--micro-batch", type=count, metavar="N", section=step, help="Samples that one process sees at once."),
        _option("--accumulation", type=int, metavar="N", section=step, help="Gradient accumulation steps."),
        _option("--clipping", type=float, metavar="NORM", section=step, help="Gradient clipping."),
        _option(
            "--optimizer",
            metavar="NAME",
            section=step,
            help="DeepSpeed's own, in place of the script's: FusedAdam, CPUAdam, AdamW, Lion, Lamb, … The script "
            "passes accelerate's DummyOptim.",
        ),
        _option("--learning-rate", type=float, metavar="RATE", section=step, help="Of that optimizer."),
        _option("--weight-decay", type=float, metavar="DECAY", section=step, help="Of that optimizer."),
        _option(
            "--scheduler",
            metavar="NAME",
            section=step,
            help="DeepSpeed's own: WarmupLR, WarmupDecayLR, WarmupCosineLR, … The script passes DummyScheduler.",
        ),
        _option("--way", type=click.Choice(["auto", "plugin", "file"]), section=how, help="How DeepSpeed is told."),
        _option("--zero3-init/--no-zero3-init", default=None, section=how, help="Build the model sharded (stage 3)."),
        _option("--gather-16bit/--no-gather-16bit", default=None, section=how, help="Gather whole weights on save."),
        _option("--reduce-bucket-size", type=count, metavar="N", section=how, help="Elements reduced at once."),
        _option("--allgather-bucket-size", type=count, metavar="N", section=how, help="Elements gathered at once."),
        _option("--prefetch-bucket-size", type=count, metavar="N", section=how, help="Elements fetched ahead."),
        _option("--sub-group-size", type=count, metavar="N", section=how, help="Elements of one optimizer step."),
        _option("--overlap-comm/--no-overlap-comm", default=None, section=how, help="Reduce during the backward pass."),
        _option("--aio", multiple=True, metavar="KEY=VALUE", section=how, help="A key of the aio block (NVMe)."),
        _option("--moe-leaf", multiple=True, metavar="CLASS", section=how, help="MoE layers that are gathered whole."),
        _option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            section=how,
            help="Any key of the DeepSpeed configuration, such as zero_optimization.overlap_comm=true.",
        ),
        _option(
            "--ds-config",
            type=click.Path(path_type=Path),
            metavar="FILE",
            section=how,
            help="A DeepSpeed JSON of your own; the settings above fill what it leaves open.",
        ),
        _option(
            "--accelerate-config",
            type=click.Path(path_type=Path),
            metavar="FILE",
            section=how,
            help="Take the settings of an Accelerate YAML of your own.",
        ),
        _option(
            "--job",
            "job_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A job file (job.yaml) with any of these settings; what is said here wins.",
        ),
        _option(
            "--grace",
            type=click.IntRange(0, 3600),
            metavar="SECONDS",
            help="How long the job may take to end when it is asked to. Default: 5.",
        ),
        _option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="Environment of the job."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which model the ladder is asked about."""
    section = "The model, for --stage auto"
    options = [
        _option("--parameters", metavar="COUNT", section=section, help="Its size alone, as 7B: memory is estimated."),
        _option(
            "--model",
            type=click.Path(path_type=Path),
            metavar="FILE",
            section=section,
            help="A Hugging Face config.json: memory is simulated.",
        ),
        _option(
            "--model-from",
            metavar="FILE:FUNCTION",
            section=section,
            help="A Python function that builds it: memory is simulated.",
        ),
        _option(
            "--sequence",
            type=click.IntRange(min=1),
            metavar="N",
            section=section,
            help="Tokens of a sample. Default: 2048.",
        ),
        _option("--checkpointing", is_flag=True, section=section, help="Activations are computed again, not kept."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def nodes_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--nodes`: some of the cluster's nodes."""
    return click.option(
        "--nodes",
        multiple=True,
        metavar="NODE,...",
        help="Only on these, in the order of their ranks.  [default: all but the spares]",
    )(command)


def with_nodes(now: Session, asked: dict[str, Any]) -> Session:
    """The session with the nodes that --nodes names, or the job file; with all but the spares where neither does."""
    from launcher.session import narrowed

    file, document = _job_file(asked["job_file"])
    flags = [name for text in asked["nodes"] for name in text.split(",")]
    names, known = flags or file.nodes, [machine.name for machine in now.machines]
    for index, name in enumerate(names):
        where = "--nodes" if flags or document is None else document.where(("nodes", index))
        if name not in known:
            cure = f"the nodes are: {', '.join(known)}"
            raise InputError(f"there is no node {name!r}", where=where, next_step=cure)
        if name in names[:index]:
            raise InputError(f"the node {name} is named twice", where=where, next_step="name it once")
    return narrowed(now, names)


def read_question(asked: dict[str, Any], job: Job) -> Question | None:
    """The model that the options of `model_options`, or the job file, name; None where they name none."""
    from launcher.ladder import SEQUENCE, Question
    from launcher.model import read_count

    file = _job_file(asked["job_file"])[0]
    flags = {name: asked[name] for name in ("parameters", "model", "model_from")}
    named = (
        flags if any(value is not None for value in flags.values()) else {name: getattr(file, name) for name in flags}
    )
    given = [name for name, value in named.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise InputError("this names more than one model", next_step="give one of --parameters, --model, --model-from")
    code, _, function = (named["model_from"] or "").rpartition(":")
    if named["model_from"] is not None and not (code and function.isidentifier()):
        raise InputError(
            f"{named['model_from']!r} names no function of a file", where="--model-from", next_step="as model.py:make"
        )
    return Question(
        parameters=None if named["parameters"] is None else read_count(named["parameters"], where="--parameters"),
        config=named["model"],
        code=Path(code) if code else None,
        function=function,
        micro_batch=job.settings.micro_batch or 1,
        sequence=asked["sequence"] or file.sequence or SEQUENCE,
        checkpointing=asked["checkpointing"] or bool(file.checkpointing),
    )


def _option(*names: str, section: str = "", **attributes: Any) -> Callable[..., Any]:
    return click.option(*names, cls=Option, section=section, **attributes)


def memory() -> Memory:
    """What is remembered on this machine; `InputError` where others could put something into it."""
    from cluster.private import check_private
    from launcher.record import Memory, state_folder

    folder = state_folder(os.environ)
    check_private(folder)
    return Memory(folder)


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
    try:
        with session(inventory, remembered, Teller()) as now:
            yield now
    except InputError as error:
        if not error.place:
            raise
        from cluster.document import load as load_document

        raise InputError(
            f"{'.'.join(map(str, error.place))}: {error.what}",
            where=load_document(path).where(error.place),
            next_step=error.next_step,
        ) from error


def read_job(asked: dict[str, Any], *, script: str | None, args: tuple[str, ...]) -> Job:
    """The job that the options of `job_options` describe, above the job file and the Accelerate YAML they name."""
    from cluster.document import load_text
    from launcher.job import GRACE, Job
    from launcher.jobfile import JobFile
    from launcher.secrets import read_variables

    settings, file = _read_settings(asked), JobFile()
    notes: tuple[str, ...] = ()
    for path, read_below in ((asked["job_file"], _from_job_file), (asked["accelerate_config"], _from_accelerate)):
        if path is not None:
            settings, more, found = read_below(path, settings)
            notes, file = (*notes, *more), found or file
    script = script or file.script
    if script is None:
        raise InputError("no script is named", next_step="launcher run train.py, or script: in the job file")
    ds_config = asked["ds_config"] or file.ds_config
    return Job(
        script=script,
        args=args or file.args,
        settings=settings,
        config=None if ds_config is None else load_text(ds_config),
        config_name=str(ds_config or "--ds-config"),
        env=tuple({**dict(sorted(file.env.items())), **dict(read_variables(asked["variables"]))}.items()),
        secrets=file.secrets,
        grace=next(one for one in (asked["grace"], file.grace, GRACE) if one is not None),
        notes=notes,
    )


def _read_settings(asked: dict[str, Any]) -> Settings:
    from launcher.jobfile import make_settings

    stage = asked["stage"]
    return make_settings(
        {
            **asked,
            "stage": int(stage) if stage is not None and stage.isdigit() else stage,
            "aio": _pairs(asked["aio"], "--aio"),
            "overrides": _pairs(asked["overrides"], "--set"),
        }
    )


def _pairs(texts: tuple[str, ...], option: str) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is JSON where it can be read as that, else text."""
    import json

    pairs: dict[str, Any] = {}
    for text in texts:
        key, found, value = text.partition("=")
        if not found or not all(key.split(".")):
            raise InputError(f"{text!r} is no KEY=VALUE", where=option, next_step=f"{option} {key or 'KEY'}=VALUE")
        try:
            pairs[key] = json.loads(value)
        except (ValueError, RecursionError):
            pairs[key] = value
    return pairs


def _job_file(path: Path | None) -> tuple[JobFile, Document | None]:
    from cluster.document import load as load_document
    from launcher.jobfile import JobFile, read_job_file

    document = None if path is None else load_document(path)
    return (JobFile() if document is None else read_job_file(document)), document


def _from_job_file(path: Path, flags: Settings) -> tuple[Settings, tuple[str, ...], JobFile | None]:
    from launcher.jobfile import merge_notes

    file, document = _job_file(path)
    assert document is not None
    return flags.over(file.settings), merge_notes(flags, file.settings, document), file


def _from_accelerate(path: Path, flags: Settings) -> tuple[Settings, tuple[str, ...], JobFile | None]:
    from cluster.document import load_text
    from launcher.convert import settings_of_accelerate
    from launcher.jobfile import merge_notes
    from launcher.lints import read_accelerate

    document = read_accelerate(load_text(path), name=str(path))
    below, left = settings_of_accelerate(document)
    notes = tuple(f"{document.where(tuple(key.split('.')))}: {key} is not taken over" for key in left)
    return flags.over(below), (*merge_notes(flags, below, document), *notes), None


def check_script(script: str, files: set[str]) -> None:
    """`InputError` for a script that is not among the files that the nodes get."""
    path = os.path.normpath(script)
    if path.endswith(".ipynb"):
        raise InputError(
            "this is a notebook, not a script", where=script, next_step=f"jupyter nbconvert --to script {script}"
        )
    if path in files:
        return
    if path.startswith(("/", "..")):
        raise InputError(
            "the script must lie in the working directory, which is what the nodes get",
            where=script,
            next_step="change to its directory, or give its path from here",
        )
    if not Path(script).exists():
        import difflib

        close = difflib.get_close_matches(path, files, n=1)
        cure = f"did you mean {close[0]}?" if close else None
        raise InputError("there is no such script", where=script, next_step=cure)
    if Path(script).is_dir():
        raise InputError("this is a directory, not a script", where=script)
    raise InputError(
        "the script is left out of what the nodes get", where=script, next_step="look at .gitignore and .launcherignore"
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

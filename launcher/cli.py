"""The command line: parse, call, render, exit code. No logic; heavy modules are loaded by who needs them."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cluster.errors import ClusterError, InputError
from launcher import __version__

if TYPE_CHECKING:
    from cluster.inventory import Inventory
    from launcher.execute import Launch, Session
    from launcher.job import Job
    from launcher.record import ClusterMemory, Memory

NAME = "launcher"
EPIPE_CODE = 0  # who closed our output has read enough


class Group(click.Group):
    """Commands in the order in which they are used, and a suggestion for a mistyped one."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)

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


# What several commands share


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
    path, remembered = _meant(cluster, known)
    inventory = load_inventory(path, engine=engine or remembered)  # type: ignore[arg-type]
    return inventory, known.cluster(inventory.name), path


def _meant(cluster: str | None, known: Memory) -> tuple[Path, str | None]:
    if cluster and (Path(cluster).exists() or "/" in cluster or cluster.endswith((".yaml", ".yml"))):
        return Path(cluster), None
    if not cluster and Path("cluster.yaml").exists():
        return Path("cluster.yaml"), None
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
    return path, known.cluster(name).engine()


@contextlib.contextmanager
def opened(cluster: str | None, *, engine: str | None = None) -> Iterator[Session]:
    """A session with the cluster that is meant."""
    from launcher.execute import session
    from launcher.views.live import Teller

    inventory, remembered, path = load(cluster, engine=engine)
    if not remembered.inventory():
        remembered.remember(path, engine=engine)
    with session(inventory, remembered, Teller()) as now:
        yield now


def show_json(value: object) -> None:
    """JSON on standard output."""
    from launcher.record import to_pretty_json

    click.echo(to_pretty_json(value))


# Bringing machines up


@launcher.command()
@click.argument("hosts", nargs=-1, required=True, metavar="[USER@]HOST[:PORT]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("cluster.yaml"), show_default=True)
@click.option("--name", default="cluster", show_default=True, help="The cluster's name.")
@click.option("-i", "--identity-file", help="Private key for all hosts.")
@click.option("--yes", is_flag=True, help="Pin the shown host keys without asking.")
def init(hosts: tuple[str, ...], output: Path, name: str, identity_file: str | None, *, yes: bool) -> None:
    """Write a first inventory, filled with what the machines report.

    \b
    launcher init ml@10.0.0.11 ml@10.0.0.12
    launcher init 10.0.0.11 10.0.0.12 --name lab -o lab.yaml
    """
    from launcher.first import read_hosts, write_first
    from launcher.views.live import Teller

    first = read_hosts(hosts, name=name, identity_file=identity_file)
    remembered = memory().cluster(name)
    _trust(first, remembered, yes=yes, replace=False)
    write_first(first, remembered, output, voice=Teller())
    click.echo(f"wrote {output}; next: launcher up {output}", err=True)


@launcher.command()
@click.argument("cluster", required=False, metavar="[CLUSTER]")
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
@click.argument("cluster", required=False, metavar="[CLUSTER]")
@click.option("--engine", type=click.Choice(["docker", "process"]), help="In place of the inventory's engine.")
@click.option("--dry-run", is_flag=True, help="Print the whole plan; change nothing.")
@ignore_option
@json_option
def up(cluster: str | None, engine: str | None, ignore: tuple[str, ...], *, dry_run: bool, as_json: bool) -> None:
    """Bring the machines up: image, directories, configuration, one idle container each.

    May be run at any time; does only what is missing.

    \b
    launcher up cluster.yaml
    launcher up examples/local.yaml       this machine alone, without SSH and Docker
    launcher up --dry-run cluster.yaml
    """
    from launcher import execute
    from launcher.views import text

    with opened(cluster, engine=engine) as now:
        done, todo = execute.up(now, ignored=ignore, dry_run=dry_run)
        if not dry_run:
            now.memory.remember(load(cluster, engine=engine)[2], engine=engine)
            memory().make_current(now.inventory.name)
    if as_json:
        show_json({**text.effective(done.plan), "todo": todo, "done": execute.told(done)})
    elif dry_run:
        click.echo(text.plan_text(done.plan, todo))
    else:
        count = len(done.plan.nodes)
        nodes = f"{count} node{'s' * (count > 1)}"
        click.echo(f"cluster {now.inventory.name} is up: {nodes}; {execute.told(done)}", err=True)


@launcher.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@cluster_option
@job_options
@click.option("--engine", type=click.Choice(["docker", "process"]), help="In place of the inventory's engine.")
@click.option("--port", metavar="PORT|auto", help="Where the processes meet. Default: the inventory's master_port.")
@click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A secret, from the environment.")
@click.option("--secrets-file", type=click.Path(path_type=Path), help="NAME=VALUE lines, in place of the environment.")
@click.option("--snapshot-limit", type=int, default=100, show_default=True, metavar="MIB", help="The code's size.")
@click.option("--detach", "-d", is_flag=True, help="Start it and return; launcher attach watches it.")
@click.option("--dry-run", is_flag=True, help="Print the whole plan; change nothing.")
@ignore_option
@json_option
@click.argument("script", metavar="SCRIPT")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]...")
def run(cluster: str | None, *, detach: bool, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Run a training script on every process of the cluster.

    The working directory is copied to the nodes as far as git or .launcherignore do not leave it out. Options for the
    launcher stand before SCRIPT; everything after it reaches the script byte for byte.

    \b
    launcher run train.py --epochs 3
    launcher run --stage 3 --offload-optimizer nvme train.py
    launcher run --ds-config zero3.json train.py
    """
    from launcher import execute
    from launcher.secrets import read_secrets
    from launcher.snapshot import take
    from launcher.views import text

    job = _job(asked, script=asked["script"], args=asked["args"])
    snapshot = take(Path.cwd(), limit_bytes=asked["snapshot_limit"] << 20)
    _check_script(job.script, {entry.path for entry in snapshot.entries})
    port, any_port = _port(asked["port"])
    with opened(cluster, engine=asked["engine"]) as now:
        names = (*now.inventory.container.secrets, *asked["secrets"])
        secrets = read_secrets(names, environment=os.environ, file=asked["secrets_file"])
        job = _with(job, secrets=tuple(secrets))
        launch = execute.prepare(
            now,
            job,
            snapshot,
            run_id=execute.make_run_id(),
            port=port,
            any_port=any_port,
            ignored=asked["ignore"],
            dry_run=dry_run,
        )
        if dry_run:
            todo = (*launch.todo, f"send {len(snapshot.entries)} files", "start the run's containers on every node")
            if as_json:
                show_json({**text.effective(launch.plan), "todo": todo})
            else:
                click.echo(text.plan_text(launch.plan, todo))
            return
        _run(now, launch, secrets, detach=detach, as_json=as_json)


def _run(now: Session, launch: Launch, secrets: dict[str, str], *, detach: bool, as_json: bool) -> None:
    from launcher import execute

    plan = launch.plan
    record = now.memory.run(plan.run)
    for note in launch.snapshot.skipped:
        now.voice.say(note)
    now.voice.say(f"run {plan.run}: {plan.world_size} processes on {len(plan.nodes)} nodes")
    containers = execute.start(now, launch, record, secrets=secrets)
    if detach:
        now.voice.say(f"run {plan.run} goes on by itself; next: launcher attach, launcher logs -f, launcher stop")
        if as_json:
            show_json({"run": plan.run, "containers": containers})
        return
    show = _log_view([node.name for node in plan.nodes])
    with execute.leaving_on_signals():
        _finish(now, plan.run, execute.follow(now, plan, record, containers, show=show, own=True), as_json=as_json)


def _finish(now: Session, run_id: str, end: Any, *, as_json: bool) -> NoReturn:
    """Say how the run ended, and leave with the right exit code."""
    from launcher.errors import RunError
    from launcher.state import INTERRUPTED
    from launcher.views import text

    record = now.memory.run(run_id)
    record.split_ranks()
    if as_json:
        show_json({"run": run_id, "code": end.code, "cause": end.cause, "logs": str(record.logs)})
    if end.code == 0:
        now.voice.say(f"run {run_id}: {text.state_line(record.state())}; logs in {record.logs}")
        raise SystemExit(0)
    if end.code == INTERRUPTED:
        now.voice.say(f"run {run_id}: {end.cause}; nothing of it is left running")
        raise SystemExit(INTERRUPTED)
    raise RunError(end.cause, detail=(f"logs: {record.logs}",), next_step=f"launcher logs {run_id}")


def _log_view(nodes: list[str], *, rank: int | None = None, since: str = "") -> Any:
    from launcher.views.live import LogView

    return LogView(nodes, out=sys.stdout, colour=sys.stdout.isatty(), rank=rank, since=since)


def _job(asked: dict[str, Any], *, script: str, args: tuple[str, ...]) -> Job:
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
    )


def _with(job: Job, **changes: Any) -> Job:
    import dataclasses

    return dataclasses.replace(job, **changes)


def _check_script(script: str, files: set[str]) -> None:
    path = os.path.normpath(script)
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


def _port(text: str | None) -> tuple[int | None, bool]:
    if text in (None, "auto"):
        return None, text == "auto"
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:  # noqa: PLR2004 - the ports that a user may listen on
        raise InputError(f"{text!r} is no port", where="--port", next_step="1024 to 65535, or auto")
    return int(text), False


# Watching


@launcher.command()
@cluster_option
@json_option
def status(cluster: str | None, *, as_json: bool) -> None:
    """What stands on every node, by its labels.

    \b
    launcher status
    launcher status --json -c lab
    """
    from launcher import execute
    from launcher.views import text

    with opened(cluster) as now:
        found = execute.find_ours(now)
        hosts = {node.name: node.host for node in now.inventory.nodes}
        rows = text.status_rows(found, hosts)
        runs = now.memory.runs()
        last = runs[-1].state() if runs else None
    if as_json:
        show_json({"cluster": now.inventory.name, "nodes": rows, "last_run": text.state_data(last)})
    else:
        click.echo(text.status_text(now.inventory.name, rows, last))


@launcher.command("ls")
@json_option
def list_(*, as_json: bool) -> None:
    """The clusters and runs that are known on this machine."""
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
@click.option("--rank", type=int, help="Only this rank's lines.")
@click.argument("run_id", required=False, metavar="[RUN]")
def logs(cluster: str | None, since: str, rank: int | None, run_id: str | None, *, follow: bool) -> None:
    """The merged log of a run; the newest one when none is named.

    \b
    launcher logs -f
    launcher logs --since 10m --rank 5
    """
    from launcher import execute
    from launcher.views.live import read_since

    with opened(cluster) as now:
        wanted = execute.choose_run(now, run_id)
        show = _log_view([node.name for node in now.inventory.nodes], rank=rank, since=read_since(since))
        execute.show_logs(now, wanted, show=show, follow=follow)


@launcher.command()
@cluster_option
@json_option
def attach(cluster: str | None, *, as_json: bool) -> None:
    """Watch the run that is under way, from wherever; Ctrl-C only leaves.

    \b
    launcher attach
    """
    from launcher import execute

    with opened(cluster) as now:
        show = _log_view([node.name for node in now.inventory.nodes])
        run_id, end = execute.attach(now, show=show)
        _finish(now, run_id, end, as_json=as_json)


@launcher.command()
@cluster_option
@click.option("--grace", type=float, default=5.0, show_default=True, metavar="SECONDS", help="Before it is killed.")
def stop(cluster: str | None, grace: float) -> None:
    """Stop the run that is under way, in order, on every node."""
    from launcher import execute

    with opened(cluster) as now:
        stopped = execute.stop(now, grace=grace)
    names = [name for names in stopped.values() for name in names]
    click.echo(f"stopped {', '.join(names)}" if names else "no run is under way", err=True)


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
    from launcher import execute

    with opened(cluster) as now:
        answers = execute.run_inside(now, nodes, argv)
    worst = 0
    for node, result in answers.items():
        for stream, said in ((sys.stdout, result.stdout), (sys.stderr, result.stderr)):
            for line in said.decode(errors="replace").splitlines():
                click.echo(f"{node} | {line}", file=stream)
        worst = max(worst, result.code)
    raise SystemExit(1 if worst else 0)


@launcher.command()
@cluster_option
@click.argument("node", required=False)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND]...")
def shell(cluster: str | None, node: str | None, argv: tuple[str, ...]) -> None:
    """A shell in a node's container; in the first node's when none is named."""
    from launcher import execute

    with opened(cluster) as now:
        raise SystemExit(execute.shell(now, node, argv or ("bash",), tty=sys.stdin.isatty()))


@launcher.command()
@cluster_option
@click.option("--grace", type=float, default=5.0, show_default=True, metavar="SECONDS", help="Before a run is killed.")
@click.argument("name", required=False, metavar="[CLUSTER]")
def down(cluster: str | None, name: str | None, grace: float) -> None:
    """Remove every container of the cluster from every node. Checkpoints, data and logs stay.

    \b
    launcher down
    launcher down -c lab
    """
    from launcher import execute

    with opened(name or cluster) as now:
        gone = execute.down(now, grace=grace)
    memory().forget_current(now.inventory.name)
    count = sum(len(names) for names in gone.values())
    click.echo(f"cluster {now.inventory.name} is down: {count} container{'s' * (count != 1)} removed", err=True)


# Configuration and images


@launcher.group(cls=Group)
def config() -> None:
    """Configurations: what accelerate and DeepSpeed will really be told."""


@config.command("show")
@cluster_option
@job_options
@json_option
@click.argument("node", required=False)
def config_show(cluster: str | None, node: str | None, *, as_json: bool, **asked: Any) -> None:
    """The effective configuration of every node, or of one.

    \b
    launcher config show gpu-02 --stage 3
    """
    from launcher import execute
    from launcher.views import text

    job = _job(asked, script="SCRIPT", args=())
    with opened(cluster) as now:
        plan = execute.plan_only(now, job)
    chosen = [one for one in plan.nodes if node in (None, one.name)]
    if not chosen:
        raise InputError(
            f"there is no node {node!r}", next_step=f"the nodes are: {', '.join(one.name for one in plan.nodes)}"
        )
    if as_json:
        said = text.effective(plan)
        show_json(said if node is None else said["nodes"][node])
        return
    for one in chosen:
        click.echo(text.node_text(plan, one))


@launcher.group(cls=Group)
def image() -> None:
    """The image: build it."""


@image.command("build")
@click.option("--flavour", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--base", help="The image to build on. Default: Debian, from a registry or made of its packages.")
@click.option("--ca-bundle", type=click.Path(path_type=Path), help="Certificates (PEM) that the build must trust.")
@click.option("--pip-index", metavar="URL", help="A package index instead of PyPI.")
@click.option("--apt-mirror", metavar="URL", help="A Debian mirror.")
@click.option("--wheels", type=click.Path(path_type=Path), metavar="FOLDER", help="Wheels that pip prefers.")
@click.option("--cuda-architectures", metavar="LIST", help="Such as '8.0;9.0'.")
@click.option("--build-network", type=click.Choice(["default", "host"]), help="The network of the build.")
@json_option
def image_build(flavour: str, *, as_json: bool, **asked: Any) -> None:
    """Build the image on this machine; an unchanged recipe builds nothing.

    \b
    launcher image build --flavour cpu
    """
    from launcher import execute
    from launcher.views.live import Teller

    tag, digest, built = execute.build_here(asked, flavour=flavour, voice=Teller())
    if as_json:
        show_json({"tag": tag, "digest": digest, "built": built})
    else:
        click.echo(tag)


@launcher.command()
def schema() -> None:
    """The inventory's JSON Schema, for editors.

    \b
    launcher schema > cluster.schema.json
    # then, as the first line of cluster.yaml:
    # yaml-language-server: $schema=cluster.schema.json
    """
    from cluster.inventory import schema as make_schema

    show_json(make_schema())


@launcher.command()
@click.argument("shell_name", type=click.Choice(["bash", "zsh", "fish"]), metavar="bash|zsh|fish")
def completion(shell_name: str) -> None:
    """The completion script of a shell.

    \b
    eval "$(launcher completion bash)"
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell_name)
    assert made is not None
    click.echo(made(launcher, {}, NAME, "_LAUNCHER_COMPLETE").source())


def main() -> NoReturn:
    """Run, and leave by the exit codes of the contract; no traceback reaches a user."""
    debug = "--debug" in sys.argv[1:]
    try:
        launcher.main(prog_name=NAME, standalone_mode=False)
    except ClusterError as error:
        _complain(error, debug=debug)
        _leave(error.exit_code)
    except click.exceptions.Exit as leaving:
        _leave(leaving.exit_code)
    except click.ClickException as error:
        error.show()
        _leave(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        _leave(130)
    except BrokenPipeError:
        # The reader has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(EPIPE_CODE)
    except SystemExit as leaving:
        _leave(leaving.code if isinstance(leaving.code, int) else 1)
    except Exception as error:  # noqa: BLE001 - the last resort: one line for the user, the rest for the log
        _unexpected(error, debug=debug)
        _leave(1)
    _leave(0)


def _complain(error: ClusterError, *, debug: bool) -> None:
    from launcher.views.live import paint, sanitize

    if debug:
        traceback.print_exc()
    lines = [sanitize(line) for line in str(error).splitlines()]
    click.echo(f"{paint('error', 31, on=sys.stderr.isatty())}: " + "\n".join(lines), err=True)


def _unexpected(error: Exception, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
        return
    from launcher.record import keep_traceback, state_folder

    kept = keep_traceback(state_folder(os.environ), traceback.format_exc())
    click.echo(f"error: this should not happen: {type(error).__name__}: {error}", err=True)
    click.echo(f"  the traceback is in {kept}\n  next: report it, or run again with --debug", err=True)


def _leave(code: int) -> NoReturn:
    """Leave at once: threads that wait for a dead node must not hold the prompt."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

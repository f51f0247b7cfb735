"""Configurations and images: config, image, schema, completion."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.errors import InputError
from launcher.cli.options import (
    NAME,
    Command,
    Group,
    cluster_option,
    job_options,
    json_option,
    launcher,
    opened,
    read_job,
    show_json,
    with_nodes,
)

if TYPE_CHECKING:
    from launcher.job import Settings


@launcher.group(cls=Group)
def config() -> None:
    """Configurations: what accelerate and DeepSpeed will really be told."""


@config.command("show", cls=Command)
@cluster_option
@job_options
@json_option
@click.argument("node", required=False)
def config_show(cluster: str | None, node: str | None, *, as_json: bool, **asked: Any) -> None:
    """The effective configuration of every node, or of one.

    \b
    launcher config show gpu-02 --stage 3
    """
    from launcher import converge
    from launcher.views import text

    job = read_job(asked, script="SCRIPT", args=())
    with opened(cluster) as now:
        plan = converge.plan_only(with_nodes(now, {**asked, "nodes": ()}), job)
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


@config.command("check")
@json_option
@click.option(
    "--world-size", type=click.IntRange(min=1), metavar="N", help="All processes, to judge the batch sizes by."
)
@click.argument("file", type=click.Path(path_type=Path))
def config_check(file: Path, *, world_size: int | None, as_json: bool) -> None:
    """What will go wrong with a DeepSpeed JSON or an Accelerate YAML; exit code 2 if there is an error.

    \b
    launcher config check deepspeed.json --world-size 16
    """
    from cluster.document import load_text
    from launcher.lints import lint_text
    from launcher.views import text

    lints = lint_text(load_text(file), name=str(file), world_size=world_size)
    if as_json:
        show_json(text.lints_data(lints))
    else:
        click.echo(text.lints_text(lints))
    if any(lint.level == "error" for lint in lints):
        sys.exit(2)


@config.command("new", cls=Command)
@job_options
@click.option("--force", is_flag=True, help="Write over a file that exists.")
@click.argument("file", type=click.Path(path_type=Path))
def config_new(file: Path, *, force: bool, **asked: Any) -> None:
    """Write a configuration from settings: an Accelerate YAML, or a DeepSpeed JSON where FILE ends in .json.

    Without settings, on a terminal, it asks. Ready ones are in configs/.

    \b
    launcher config new zero3.yaml --stage 3 --precision bf16
    launcher config new zero3.json --stage 3 --offload-optimizer nvme --optimizer CPUAdam
    """
    from launcher import convert, render, zero

    if file.exists() and not force:
        raise InputError("this file exists", where=str(file), next_step="choose another name, or add --force")
    job = read_job(asked, script="SCRIPT", args=())
    if not job.settings.given() and sys.stdin.isatty():
        job = dataclasses.replace(job, settings=_ask())
    if file.suffix == ".json":
        job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, way="file"))
        zero.check(job, accelerator="cuda")
        text = zero.file_for_node(job, None)
        unsaid = convert.unsaid_by_file(job.settings)
    else:
        zero.check(job, accelerator="cuda")
        text = render.to_yaml(convert.accelerate_template(job.settings))
        unsaid = convert.unsaid_by_plugin(job.settings)
    if unsaid:
        raise InputError(
            f"such a file has no word for {', '.join(unsaid)}", where=str(file), next_step=_other_kind(file.suffix)
        )
    _write(file, text)
    click.echo(f"wrote {file}; next: launcher config check {file}", err=True)


def _ask() -> Settings:
    """The few questions that decide most."""
    from launcher.job import Settings

    def choose(question: str, words: list[str]) -> Any:
        return click.prompt(question, type=click.Choice(words), default=words[0], err=True)

    click.echo("Take the lowest stage that works: 0 before 2, 2 before 3.", err=True)
    stage = int(choose("ZeRO stage", ["0", "1", "2", "3"]))
    optimizer = choose("optimizer states on", ["none", "cpu", *(["nvme"] if stage == 3 else [])]) if stage else None  # noqa: PLR2004 - ZeRO stage 3
    param = choose("parameters on", ["none", "cpu", "nvme"]) if stage == 3 else None  # noqa: PLR2004
    precision = choose("precision", ["bf16", "fp16", "no", "fp8"])
    return Settings(stage=stage, offload_optimizer=optimizer, offload_param=param, precision=precision)  # type: ignore[arg-type]


@config.command("convert")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file. Default: standard output.")
@click.option("--force", is_flag=True, help="Write over a file that exists.")
@click.argument("file", type=click.Path(path_type=Path))
def config_convert(file: Path, output: Path | None, *, force: bool) -> None:
    """Turn an Accelerate YAML (plugin settings) into a DeepSpeed JSON, or back; says what has no word there.

    \b
    launcher config convert accelerate.yaml -o zero3.json
    launcher config convert zero3.json
    """
    from cluster.document import load_text
    from launcher import convert, dsconfig, render, zero
    from launcher.job import Job
    from launcher.lints import is_deepspeed, read_accelerate

    if output is not None and output.exists() and not force:
        raise InputError("this file exists", where=str(output), next_step="choose another name, or add --force")
    text = load_text(file)
    if is_deepspeed(text):
        settings = convert.settings_of_file(dsconfig.read(text, name=str(file)))
        made, unsaid = render.to_yaml(convert.accelerate_template(settings)), convert.unsaid_by_plugin(settings)
        kind = "the plugin way"
    else:
        settings, left = convert.settings_of_accelerate(read_accelerate(text, name=str(file)))
        job = Job(script="", settings=dataclasses.replace(settings, way="file"))
        made, unsaid = zero.file_for_node(job, None), (*convert.unsaid_by_file(settings), *left)
        kind = "a DeepSpeed file"
    if output is None:
        click.echo(made, nl=False)
    else:
        _write(output, made)
    for one in unsaid:
        click.echo(f"warning: {kind} has no word for {one}", err=True)


def _other_kind(suffix: str) -> str:
    return "write an Accelerate YAML (.yaml) instead" if suffix == ".json" else "write a DeepSpeed JSON (.json) instead"


def _write(file: Path, text: str) -> None:
    from launcher.record import write_whole

    write_whole(file, text)


@launcher.group(cls=Group)
def image() -> None:
    """Images: build, send, save, load; what is where, and what may go."""


@image.command("build")
@click.option("--flavour", type=click.Choice(["cuda", "cpu"]), default="cuda", help="What for.", show_default=True)
@click.option("--base", help="The image to build on. Default: Debian, from a registry or made of its packages.")
@click.option("--ca-bundle", type=click.Path(path_type=Path), help="Certificates (PEM) that the build must trust.")
@click.option("--pip-index", metavar="URL", help="A package index instead of PyPI.")
@click.option("--apt-mirror", metavar="URL", help="A Debian mirror.")
@click.option("--wheels", type=click.Path(path_type=Path), metavar="FOLDER", help="Wheels that pip prefers.")
@click.option("--cuda-architectures", metavar="LIST", help="Such as '8.0;9.0'.")
@click.option("--toolkit", is_flag=True, default=None, help="Keep the compilers in the image.")
@click.option("--build-network", type=click.Choice(["default", "host"]), help="The network of the build.")
@click.option("--package", "packages", multiple=True, metavar="REQUIREMENT", help="A Python package besides.")
@click.option("--requirements", type=click.Path(path_type=Path), metavar="FILE", help="A file of such packages.")
@click.option("--apt", multiple=True, metavar="NAME", help="A Debian package besides.")
@click.option("--dockerfile", type=click.Path(path_type=Path), metavar="FILE", help="Your own, on top of the image.")
@click.option("--build-on", metavar="NODE", help="The node of --cluster whose engine builds.  [default: here]")
@click.option("--dry-run", is_flag=True, help="Only say the image's name, and whether it is there.")
@cluster_option
@json_option
def image_build(
    flavour: str, *, build_on: str | None, dry_run: bool, cluster: str | None, as_json: bool, **asked: Any
) -> None:
    """Build the image, on this machine or on a node; an unchanged recipe builds nothing.

    \b
    launcher image build --flavour cpu
    launcher image build --package einops --apt ffmpeg
    launcher image build --build-on gpu-01
    """
    from cluster.inventory import HERE
    from launcher import converge
    from launcher.views.live import Teller

    if build_on in (None, HERE):
        tag, digest, built = converge.build_here(asked, flavour=flavour, voice=Teller(), dry_run=dry_run)
    else:
        with opened(cluster) as now:
            tag, digest, built = converge.build_there(now, build_on, asked, flavour=flavour, dry_run=dry_run)
    if as_json:
        show_json({"tag": tag, "digest": digest, "built": built})
    else:
        click.echo(tag)
        if dry_run:
            click.echo("it is there" if digest else "it would be built", err=True)


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

"""Configurations and images: config, image, schema, completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cluster.errors import InputError
from launcher.cli.options import (
    NAME,
    Group,
    cluster_option,
    job_options,
    json_option,
    launcher,
    opened,
    read_job,
    show_json,
)


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
    from launcher import converge
    from launcher.views import text

    job = read_job(asked, script="SCRIPT", args=())
    with opened(cluster) as now:
        plan = converge.plan_only(now, job)
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
    """Images: build, send, save, load; what is where, and what may go."""


@image.command("build")
@click.option("--flavour", type=click.Choice(["cuda", "cpu"]), default="cuda", help="What for.", show_default=True)
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
    from launcher import converge
    from launcher.views.live import Teller

    tag, digest, built = converge.build_here(asked, flavour=flavour, voice=Teller())
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

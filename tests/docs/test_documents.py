"""What the documents say is so: links lead somewhere, commands and targets exist, tables agree with the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

import cluster.container
import cluster.errors
import launcher.errors
from cluster.errors import ClusterError
from launcher.cli.options import launcher as program
from tests.docs import reading

TARGET = re.compile(r"^([a-z-]+):.*?(## .+)?$", re.MULTILINE)


def named(path: Path) -> str:
    return str(path.relative_to(reading.ROOT))


def every_command(group: click.Group, prefix: str = "launcher") -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}"


def parse(words: tuple[str, ...]) -> None:
    """Let click read a command line down to the command that would be called."""
    command: click.Command = program
    context = command.make_context("launcher", list(words))
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
        context = command.make_context(command.name, rest, parent=context)


@pytest.mark.parametrize(("path", "target"), list(reading.links()), ids=lambda value: str(value).rpartition("/")[2])
def test_a_link_leads_somewhere(path: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    there = (path.parent / file).resolve() if file else path
    assert there.exists(), f"{named(path)}: {target}"
    if anchor:
        assert anchor in reading.anchors(there), f"{named(path)}: {target}"


@pytest.mark.parametrize(
    ("path", "words"),
    list(reading.commands("launcher")),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_that_is_shown_can_be_given(path: Path, words: tuple[str, ...]) -> None:
    try:
        parse(words)
    except click.MissingParameter:
        bare = " ".join(("launcher", *words)) in every_command(program)
        assert bare, "only a command's bare name, in prose, may leave out what it needs"
    except click.UsageError as error:
        pytest.fail(f"{named(path)}: launcher {' '.join(words)}: {error.format_message()}")


def test_every_command_is_in_a_document() -> None:
    text = "\n".join(path.read_text() for path in reading.DOCUMENTS if path.name != "CHANGELOG.md")
    assert [name for name in every_command(program) if name not in text] == []


def test_the_readme_lists_every_command() -> None:
    table = (reading.ROOT / "README.md").read_text()
    assert [name for name in every_command(program) if f"`{name}" not in table] == []


def test_a_target_that_is_shown_exists_and_is_explained() -> None:
    makefile = (reading.ROOT / "Makefile").read_text()
    explained = {name for name, help_ in TARGET.findall(makefile) if help_}
    shown = {words[0] for _, words in reading.commands("make")}
    assert sorted(shown - explained) == []
    assert {
        "setup",
        "demo",
        "test",
        "check",
        "fix",
        "image",
        "lab",
        "lab-down",
        "smoke",
        "bench",
        "golden",
    } <= explained


def errors(kind: type[ClusterError] = ClusterError) -> Iterator[type[ClusterError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from errors(child)


def test_the_table_of_exit_codes_is_complete() -> None:
    text = (reading.ROOT / "docs/how-it-works.md").read_text()
    section = text.partition("## Exit codes")[2].partition("\n## ")[0]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    ours = {
        kind.exit_code for kind in errors() if kind.__module__ in (cluster.errors.__name__, launcher.errors.__name__)
    }
    assert documented == ours | {0}


def test_every_label_is_explained() -> None:
    text = (reading.ROOT / "docs/how-it-works.md").read_text()
    labels = {value for name, value in vars(cluster.container).items() if name.startswith("LABEL_")}
    assert sorted(label for label in labels if f"`{label}`" not in text) == []


@pytest.mark.parametrize(
    "block", [block for block in reading.blocks() if block.language == "yaml"], ids=lambda one: named(one.path)
)
def test_every_key_of_an_example_is_one_of_the_inventory(block: reading.Block) -> None:
    def keys(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, below in value.items():
                yield key
                yield from keys(below)
        elif isinstance(value, list):
            for below in value:
                yield from keys(below)

    known = set(re.findall(r"^[#\s-]*(\w+):", (reading.ROOT / "configs/cluster.yaml").read_text(), re.MULTILINE))
    assert sorted(set(keys(yaml.safe_load(block.text))) - known) == []


def test_pins_that_are_repeated_are_the_image_s() -> None:
    pins = (reading.ROOT / "docker/requirements.txt").read_text()
    repeated = re.findall(
        r"\b(torch|deepspeed|accelerate|transformers)==([\d.]+\d)", "".join(map(Path.read_text, reading.DOCUMENTS))
    )
    assert [f"{name}=={version}" for name, version in repeated if f"{name}=={version}\n" not in pins] == []

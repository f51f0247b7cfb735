"""Secrets and variables: by name, with values that no message ever repeats."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import InputError
from launcher.secrets import read_secrets, read_variables

VALUE = "s3cr3t-c4n4ry"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secrets"
    path.touch(mode=0o600)
    return path


def refused(
    names: tuple[str, ...], environment: dict[str, str] | None = None, *, file: Path | None = None
) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_secrets(names, environment=environment or {}, file=file)
    assert VALUE not in str(caught.value)
    return str(caught.value).splitlines()


def test_secrets_come_from_the_environment_each_once_and_only_these() -> None:
    environment = {"HF_TOKEN": VALUE, "WANDB_API_KEY": "a b\n", "PATH": "/bin"}
    assert read_secrets(("HF_TOKEN", "WANDB_API_KEY", "HF_TOKEN"), environment=environment) == {
        "HF_TOKEN": VALUE,
        "WANDB_API_KEY": "a b\n",
    }
    assert read_secrets((), environment=environment) == {}


def test_a_file_stands_in_for_the_environment(file: Path) -> None:
    file.write_text(f"# of the team\n\nHF_TOKEN={VALUE}=\n WANDB_API_KEY =' x '\nUNUSED=1\n")
    names = ("HF_TOKEN", "WANDB_API_KEY")
    assert read_secrets(names, environment={"HF_TOKEN": "other"}, file=file) == {
        "HF_TOKEN": f"{VALUE}=",
        "WANDB_API_KEY": "' x '",
    }


@pytest.mark.parametrize("environment", [{}, {"HF_TOKEN": ""}])
def test_a_secret_without_a_value_is_refused(environment: dict[str, str]) -> None:
    assert refused(("HF_TOKEN",), environment) == [
        "environment: the secret HF_TOKEN has no value",
        "  next: export HF_TOKEN=… before the command, or give it in --secrets-file",
    ]


def test_a_secret_that_the_file_lacks_is_not_taken_from_elsewhere(file: Path) -> None:
    file.write_text("OTHER=1\n")
    assert refused(("HF_TOKEN",), {"HF_TOKEN": VALUE}, file=file)[0] == f"{file}: the secret HF_TOKEN has no value"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606, 0o660])
def test_a_file_that_others_can_read_is_refused_unread(file: Path, mode: int) -> None:
    file.write_text(f"HF_TOKEN={VALUE}\n")
    file.chmod(mode)
    assert refused(("HF_TOKEN",), file=file) == [
        f"{file}: others can read this file of secrets",
        f"  next: chmod 600 {file}",
    ]


@pytest.mark.parametrize("line", [VALUE, f"export HF_TOKEN={VALUE}", f"={VALUE}", f"1A={VALUE}", f"A-B={VALUE}"])
def test_a_line_that_is_none_is_named_by_its_place_and_never_shown(file: Path, line: str) -> None:
    file.write_text(f"# one\n{line}\n")
    assert refused(("HF_TOKEN",), file=file) == [
        f"{file}:2:1: this is no NAME=VALUE line",
        "  next: one a line; letters, digits and _ before the =",
    ]


def test_a_name_that_comes_twice_is_refused(file: Path) -> None:
    file.write_text("HF_TOKEN=s3cr3t-c4n4ry\nA=1\nHF_TOKEN=another-c4n4ry\n")
    assert refused(("A",), file=file) == [
        f"{file}:3:1: HF_TOKEN a second time (first in line 1)",
        "  next: keep one of them",
    ]


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path, file: Path) -> None:
    assert "there is no such file" in refused(("HF_TOKEN",), file=tmp_path / "none")[0]
    assert refused(("HF_TOKEN",), file=tmp_path)[0].startswith(f"{tmp_path}: ")
    file.write_bytes(b"HF_TOKEN=\xff\xfe")
    assert refused(("HF_TOKEN",), file=file)[0].startswith(f"{file}:1:10: the byte 0xFF is not UTF-8")


NAMES = ["", "A-B", "1A", "a b", "A\n", "HF_TOKEN=x", "RANK", "WORLD_SIZE", "MASTER_ADDR", "LAUNCHER_X", "ACCELERATE_X"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_or_ours_is_refused(name: str) -> None:
    assert refused((name,), {name: VALUE}) == [
        f"{name!r} cannot be the name of a secret",
        "  next: letters, digits and _, not our own",
    ]


def test_variables_are_pairs_in_order_and_the_last_of_a_name_wins() -> None:
    texts = ("B=2", "A=", "C=a=b $(id) ü", "B=3", "TOKENIZERS_PARALLELISM=false")
    assert read_variables(texts) == (("A", ""), ("B", "3"), ("C", "a=b $(id) ü"), ("TOKENIZERS_PARALLELISM", "false"))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("A", ["--env: 'A' is no NAME=VALUE"]),
        ("=x", ["--env: '=x' is no NAME=VALUE"]),
        ("A B=x", ["--env: 'A B=x' is no NAME=VALUE"]),
        ("RANK=0", ["--env: RANK is set by the launcher", "  next: leave it out"]),
        ("LAUNCHER_NVME=/x", ["--env: LAUNCHER_NVME is set by the launcher", "  next: leave it out"]),
        (
            f"HF_TOKEN={VALUE}",
            [
                "--env: HF_TOKEN looks like a secret; everybody on the node could read it",
                "  next: export HF_TOKEN=… and add --secret HF_TOKEN",
            ],
        ),
    ],
)
def test_a_variable_that_cannot_be_given_is_refused(text: str, lines: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_variables((text,))
    assert str(caught.value).splitlines() == lines


def test_the_environment_is_only_read() -> None:
    before = dict(os.environ)
    read_secrets(("HOME",), environment=os.environ)
    assert dict(os.environ) == before

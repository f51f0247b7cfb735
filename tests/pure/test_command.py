"""Commands as values: what is quoted, what is refused, what is shown."""

from __future__ import annotations

import subprocess

import pytest

from cluster.command import LONGEST_LINE, Command, Result, describe, script
from cluster.errors import InputError

NASTY = (
    "",
    " ",
    "two words",
    "  leading and trailing  ",
    "'",
    '"',
    "it's",
    """both ' and " of them""",
    "$HOME",
    "${HOME}",
    "$(touch canary)",
    "`touch canary`",
    "; touch canary",
    "&& touch canary",
    "| tee canary",
    "> canary",
    "a\nb",
    "\ttab\r",
    "\\",
    "\\n",
    "trailing\\",
    "*",
    "~",
    "{a,b}",
    "[a-z]?",
    "!history",
    "#comment",
    "-rf",
    "--",
    "=ls",
    "%s 100%",
    "FOO=bar",
    "ünï-çødé 🚀 日本",
    "\x01\x1b[31m\x7f",
    "'\"'\"'$(id)`id`\\\n!%",
)


@pytest.mark.parametrize("word", NASTY)
def test_a_shell_reads_back_every_word(word: str) -> None:
    line = Command(argv=("printf", "%s", word)).shell()
    assert subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout == word.encode()


def test_a_script_gets_its_arguments_in_order_and_unread() -> None:
    line = script('printf "%s|" "$@"', *NASTY).shell()
    said = subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout
    assert said.decode() == "".join(f"{word}|" for word in NASTY)


@pytest.mark.parametrize("word", ["a\0b", "\udcff", "x\ud800"])
def test_what_would_not_arrive_byte_for_byte_is_refused(word: str) -> None:
    with pytest.raises(InputError):
        Command(argv=("echo", word)).shell()


def test_a_line_may_be_as_long_as_the_kernel_allows_and_no_longer() -> None:
    fits = "x" * (LONGEST_LINE - len("true "))
    assert len(Command(argv=("true", fits)).shell()) == LONGEST_LINE
    with pytest.raises(InputError, match="put long arguments into a file"):
        Command(argv=("true", fits + "x")).shell()


def test_standard_input_is_never_shown() -> None:
    command = Command(argv=("docker", "login", "--password-stdin"), stdin=b"hunter2")
    assert str(command) == "docker login --password-stdin"
    assert command.shell() == "docker login --password-stdin"


def test_a_command_for_the_eyes_is_one_short_line() -> None:
    assert describe(("echo", "a b")) == "echo 'a b'"
    assert describe(("sh", "-c", "a\nb")) == "sh -c 'a b'"
    assert describe(("x" * 200,), limit=10) == "xxxxxxxxx…"


def test_a_result_tells_its_last_words() -> None:
    assert Result(code=1, stdout=b"out", stderr=b"1\n2\n3\n").tail(2) == ("2", "3")
    assert Result(code=1, stdout=b"out\n", stderr=b" \n").tail() == ("out",)
    assert Result(code=0, stdout=b"\xff", stderr=b"").text == "\ufffd"
    assert Result(code=0, stdout=b"", stderr=b"").ok
    assert not Result(code=137, stdout=b"", stderr=b"").ok

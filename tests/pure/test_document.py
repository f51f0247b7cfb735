"""Strict YAML: what is read, where it stands, and what is refused before it can do harm."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import yaml

from cluster import document
from cluster.document import Document, load, read
from cluster.errors import InputError

TEXT = """\
# a comment
name: lab
nodes:
  - host: 10.0.0.11
    env: {A: "1", B: two}
  - [x, [y]]
"""

SCALARS = {
    "true": True,
    "false": False,
    "null": None,
    "~": None,
    "": None,
    "0": 0,
    "-0": 0,
    "-12": -12,
    "999999999999999999": 999999999999999999,
    "1.5": 1.5,
    "-0.25": -0.25,
    "1e3": 1000.0,
    "2E-4": 0.0002,
    "'no'": "no",
    '"010"': "010",
    "22:22": "22:22",
    "10.0.0.1": "10.0.0.1",
    "2026-01-31": "2026-01-31",
    "12:30:45": "12:30:45",
    "::1": "::1",
    "0.0.0": "0.0.0",
    "y": "y",
    "nothing": "nothing",
    "=": "=",
    "<<": "<<",
    "1-2": "1-2",
    "two words": "two words",
    '"a\\tb\\n"': "a\tb\n",
    '"\\u00fc"': "ü",
    "|\n  a\n  b\n": "a\nb\n",
    ">\n  a\n  b\n": "a b\n",
}


@pytest.fixture(params=[document._LOADER, yaml.SafeLoader], ids=["default parser", "slow parser"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "_LOADER", request.param)


def refusal(text: str) -> str:
    with pytest.raises(InputError) as caught:
        read(text, "f.yaml")
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_a_scalar_means_what_it_looks_like(text: str, value: object) -> None:
    data = read(f"key: {text}", "f.yaml").data
    assert data == {"key": value}
    assert isinstance(data, dict)
    assert type(data["key"]) is type(value)


def test_every_key_is_text() -> None:
    keys = read("{yes: 1, 010: 1, null: 1, 1.5: 1, on: 1, '<<': 1}", "f.yaml").data
    assert keys == dict.fromkeys(["yes", "010", "null", "1.5", "on", "<<"], 1)


def test_a_document_knows_where_everything_stands() -> None:
    one = read(TEXT, "f.yaml")
    assert one.data == {
        "name": "lab",
        "nodes": [{"host": "10.0.0.11", "env": {"A": "1", "B": "two"}}, ["x", ["y"]]],
    }
    assert one.positions == {
        (): (2, 1),
        ("name",): (2, 1),
        ("nodes",): (3, 1),
        ("nodes", 0): (4, 5),
        ("nodes", 0, "host"): (4, 5),
        ("nodes", 0, "env"): (5, 5),
        ("nodes", 0, "env", "A"): (5, 11),
        ("nodes", 0, "env", "B"): (5, 19),
        ("nodes", 1): (6, 5),
        ("nodes", 1, 0): (6, 6),
        ("nodes", 1, 1): (6, 9),
        ("nodes", 1, 1, 0): (6, 10),
    }


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ((), "f.yaml:2:1"),
        (("nodes", 0, "env", "B"), "f.yaml:5:19"),
        (("nodes", 0, "env", "C"), "f.yaml:5:5"),
        (("nodes", 0, "user"), "f.yaml:4:5"),
        (("nodes", 7, "user"), "f.yaml:3:1"),
        (("paths", "data"), "f.yaml:2:1"),
    ],
)
def test_a_place_that_does_not_exist_stands_where_its_surroundings_do(place: document.Place, where: str) -> None:
    assert read(TEXT, "f.yaml").where(place) == where


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "~", "\ufeff"])
def test_an_empty_text_is_null(text: str) -> None:
    one = read(text, "f.yaml")
    assert (one.data, one.position(("x",))[0] < 3) == (None, True)


def test_line_ends_and_a_byte_order_mark_change_nothing() -> None:
    assert read("\ufeff" + TEXT.replace("\n", "\r\n"), "f.yaml") == read(TEXT, "f.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "a list in brackets that does not end well; is a ',' or ']' missing?"),
        ("a: {b: 1", "a mapping in braces that does not end well; is a ',' or '}' missing?"),
        ('a: "\\q"', "an escape that YAML does not know"),
        ("a: |x", "a '|' or '>' with something else behind it"),
        ("a: \ufdd0\ud800", "f.yaml:1:5: the invisible or control character U+D800"),
        ("a\nb", None),
        ("word: another\nline\nkey: x", "neither 'key: value' nor '- item'"),
    ],
)
def test_a_syntax_error_is_told_in_our_words(text: str, says: str | None) -> None:
    if says is None:
        assert read(text, "f.yaml").data == "a b"
    else:
        assert says in refusal(text)


def test_what_the_parser_cannot_place_is_still_an_input_error() -> None:
    error = document._syntax_error(yaml.YAMLError("odd"), "f.yaml")
    assert str(error) == "f.yaml:1:1: not YAML: odd"
    error = document._syntax_error(yaml.MarkedYAMLError(problem="strange"), "f.yaml")
    assert str(error) == "f.yaml:1:1: not YAML: strange"


BOMBS = {
    "deep brackets": ("[" * 500_000, "more than 32 levels inside each other"),  # where, depends on libyaml
    "deep braces": ("{a: " * 1000, "f.yaml:1:133: more than 32 levels inside each other"),
    "deep lines": (
        "".join(" " * n + "a:\n" for n in range(500)),
        "f.yaml:34:34: more than 32 levels inside each other",
    ),
    "deep dashes": ("- " * 100_000, "f.yaml:1:67: more than 32 levels inside each other"),
    "many items": ("- 1\n" * 101_000, "f.yaml:100000:3: more than 100000 values"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(51_000)), "f.yaml:50000:9: more than 100000 values"),
    "many aliases": ("a: &a [x]\nb: [" + "*a," * 100_000 + "]", "f.yaml:1:4: the anchor '&a'"),
    "long": ("#" * (document.LARGEST + 1), "f.yaml:1:1: the file is larger than 1048576 bytes"),
    "long number": ("a: " + "9" * 900_000, "is a number that is not written plainly, or too large"),
    "long half of a number": ("a: [" + "9" * 900_000 + "x, *a]", "the alias '*a'"),
    "merge keys": ("a: {<<: [{<<: {}}]}", "f.yaml:1:5: a merge key '<<'"),
}


@pytest.mark.parametrize("parser", [document._LOADER], ids=["default parser"], indirect=True)
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_soon_and_in_one_line(name: str) -> None:
    text, says = BOMBS[name]
    begin = time.process_time()
    told = refusal(text)
    assert says in told
    assert len(told) < 250
    assert time.process_time() - begin < 5  # on a slow machine; a tenth of it is usual


def test_a_file_is_read_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.yaml").write_text("a: 1\n")
    monkeypatch.chdir(tmp_path)
    assert load(Path("f.yaml")) == Document(
        name="f.yaml", data={"a": 1}, folder=tmp_path, positions={(): (1, 1), ("a",): (1, 1)}
    )


def loading(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()[0]


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    with server:
        server.bind(str(tmp_path / "s"))
        assert [loading(path) for path in (tmp_path, tmp_path / "pipe", tmp_path / "s", Path("/dev/zero"))] == [
            f"{tmp_path}: this is a folder, not a file",
            f"{tmp_path}/pipe: this is a pipe, not a file",
            f"{tmp_path}/s: this is a socket, not a file",
            "/dev/zero: this is a device, not a file",
        ]


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    long = Path("/" + "x" * 300)
    assert loading(tmp_path / "nowhere") == f"{tmp_path}/nowhere: there is no such file"
    assert loading(tmp_path / "dangling") == f"{tmp_path}/dangling: there is no such file"
    assert "symbolic links" in loading(tmp_path / "loop")
    assert loading(tmp_path / "file" / "x") == f"{tmp_path}/file/x: the file cannot be read: Not a directory"
    assert loading(long) == f"{long}: the file cannot be read: File name too long"
    assert "a\\x00b: the file cannot be read" in loading(Path("a\0b"))


def test_a_file_without_permission_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("a: 1")

    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)  # root may read everything, and the tests may run as root
    assert loading(path) == f"{path}: the file may not be read"


def test_a_file_may_have_exactly_the_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + b"#" * document.LARGEST)
    assert load(path).data is None
    path.write_bytes(b"#" * (document.LARGEST + 1))
    assert loading(path) == f"{path}:1:1: the file is larger than 1048576 bytes"


def test_words_of_another_program_mean_what_it_means_by_them() -> None:
    words: dict[str, bool | str | None] = {"none": "none", "no": False}
    assert read("a: none\nb: no\nc: true\nd: 'no'\n", "f.yaml", words=words).data == {
        "a": "none",
        "b": False,
        "c": True,
        "d": "no",
    }
    with pytest.raises(InputError, match="a plain None may mean two things"):
        read("a: None", "f.yaml", words=words)

"""Bytes to lines, and secrets out of them."""

from __future__ import annotations

import base64

import pytest

from launcher.inside.agent import LONGEST, Lines, Redactor, pieces

OPEN = Redactor()


def lines_of(*chunks: bytes, redact: Redactor = OPEN, now: float = 0.0) -> list[str]:
    lines = Lines()
    return [line for data in chunks for line in lines.feed(data, redact=redact, now=now)] + lines.end(redact=redact)


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"one\ntwo\n"], ["one", "two"]),
        ([b"on", b"e\ntw", b"o\n"], ["one", "two"]),
        ([b"\n\n"], ["", ""]),
        ([b"dos\r\nunix\n"], ["dos", "unix"]),
        ([b"dos\r", b"\nunix\n"], ["dos", "unix"]),
        ([b"no end"], ["no end"]),
        ([b"no end\r"], ["no end"]),
        ([b""], []),
        ([b"\xff\xfe ok\n"], ["�� ok"]),
        ([b"\xc3", b"\xa4\n"], ["ä"]),
        (["a\u2028b\x0bc\x85d\n".encode()], ["a\u2028b\x0bc\x85d"]),
        ([b" 10%\r 20%\r 30%\n"], [" 30%"]),
        ([b"\r 10%\r 20%", b"\r100%\n", b"done\n"], [" 10%", "100%", "done"]),
        ([b"10%\r20%\r30%\r"], ["20%", "30%"]),
    ],
)
def test_bytes_become_lines(chunks: list[bytes], lines: list[str]) -> None:
    assert lines_of(*chunks) == lines


def test_of_a_progress_bar_one_update_a_second_is_kept() -> None:
    bar = Lines()
    shown = [line for step in range(31) for line in bar.feed(b"\r%d%%" % step, redact=OPEN, now=step / 10)]
    assert shown + bar.end(redact=OPEN) == ["0%", "10%", "20%", "30%"]


def test_a_long_line_is_cut_between_characters() -> None:
    text = "ä" * LONGEST
    cut = lines_of(text.encode() + b"\nnext\n")
    assert "".join(cut) == text + "next"
    assert all(len(line.encode()) <= LONGEST for line in cut)


def test_an_endless_line_is_not_kept_in_memory() -> None:
    lines = Lines()
    out = [line for _ in range(100) for line in lines.feed(b"x" * 50_000, redact=OPEN, now=0.0)]
    out += lines.end(redact=OPEN)
    assert "".join(out) == "x" * 5_000_000
    assert {len(line) for line in out[:-1]} == {LONGEST}


def test_pieces_of_nothing_are_one_empty_piece() -> None:
    assert list(pieces(b"")) == [b""]


SECRET = b"s3cret-value"


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
@pytest.mark.parametrize("alphabet", [None, b"-_"])
def test_a_secret_is_hidden_in_base64_wherever_it_stands(before: str, alphabet: bytes | None) -> None:
    text = base64.b64encode(before.encode() + b"?" + SECRET + b"~after", altchars=alphabet).decode()
    (line,) = lines_of(f"header {text}\n".encode(), redact=Redactor([SECRET]))
    assert "***" in line
    assert SECRET not in base64.b64decode(line.removeprefix("header ").replace("***", "AAAA" * 9) + "==")


@pytest.mark.parametrize(
    "chunks",
    [
        [b"token=s3cret-value;\n"],
        [b"token=s3cr", b"et-value;\n"],
        [b"token=s3cret-value;"],
        [b"token=s3cret-value;\r10%\r20%\n"],
    ],
)
def test_a_secret_is_hidden(chunks: list[bytes]) -> None:
    assert "s3cret" not in "".join(lines_of(*chunks, redact=Redactor([SECRET])))


@pytest.mark.parametrize(
    "text",
    [
        "hub_/%2B+k%C3%A9y%26%3D",
        "hub_%2F%2B%20k%C3%A9y%26%3D",
        "hub_%2F%2B+k%C3%A9y%26%3D",
        "hub_/%2B%20k%C3%A9y%26%3D",
    ],
)
def test_s11_a_secret_is_hidden_as_urls_write_it(text: str) -> None:
    line = f"GET https://hub/api?token={text}&x=1"
    assert lines_of(line.encode() + b"\n", redact=Redactor(["hub_/+ kéy&=".encode()])) == [
        "GET https://hub/api?token=***&x=1"
    ]


@pytest.mark.parametrize("before", [LONGEST - 6, LONGEST, LONGEST + 1, 2 * LONGEST - 3])
def test_a_secret_is_hidden_where_a_long_line_is_cut(before: int) -> None:
    text = b"x" * before + SECRET + b"y" * LONGEST + b"\n"
    chunks = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    assert "".join(lines_of(*chunks, redact=Redactor([SECRET]))) == "x" * before + "***" + "y" * LONGEST


def test_each_line_of_a_long_secret_is_hidden() -> None:
    key = b"-----BEGIN KEY-----\nMIIEabcd\nEFGHijkl\n-----END KEY-----\n"
    assert lines_of(b"key:\n" + key, redact=Redactor([key])) == ["key:", "***", "***", "***", "***"]


def test_the_longer_of_two_secrets_is_hidden_whole() -> None:
    assert lines_of(b"abcdefgh\n", redact=Redactor([b"abcd", b"abcdefgh"])) == ["***"]

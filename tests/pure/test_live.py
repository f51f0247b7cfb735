"""The live view: whose line it is, in which colour, and nothing that a rank prints moves the cursor."""

from __future__ import annotations

import io
import re

import pytest

from cluster.errors import InputError
from launcher.checks import Finding
from launcher.image import Progress
from launcher.views.live import (
    COLOURS,
    LogView,
    Teller,
    paint,
    read_since,
    sanitize,
    seconds_left,
    split_record,
)


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


INJECTIONS = {
    "title by BEL": "\x1b]0;owned\x07",
    "title by ST": "\x1b]2;owned\x1b\\",
    "title without an end": "\x1b]0;owned",
    "hyperlink": "\x1b]8;;http://evil.example\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "notification": "\x1b]777;notify;a;b\x07",
    "palette": "\x1b]4;1;#000000\x07",
    "clear screen": "\x1b[2J",
    "clear line": "\x1b[K",
    "home": "\x1b[H",
    "up": "\x1b[5A",
    "position": "\x1b[1;1H",
    "scroll region": "\x1b[1;2r",
    "alternate screen": "\x1b[?1049h",
    "hide the cursor": "\x1b[?25l",
    "mouse": "\x1b[?1003h",
    "bracketed paste": "\x1b[?2004h",
    "device attributes": "\x1b[c",
    "cursor report": "\x1b[6n",
    "window report": "\x1b[21t",
    "reset": "\x1bc",
    "save and restore": "\x1b7\x1b8",
    "character set": "\x1b(0",
    "device control": '\x1bP$q"p\x1b\\',
    "application command": "\x1b_G\x1b\\",
    "privacy message": "\x1b^x\x1b\\",
    "C1 control sequence": "\x9b2J",
    "C1 operating system command": "\x9d0;owned\x9c",
    "carriage return": "all well\r",
    "backspace": "\x08\x08\x08",
    "bell": "\x07",
    "form feed and vertical tab": "\x0c\x0b",
    "NUL and DEL": "\0\x7f",
    "shift out": "\x0e",
    "bidirectional override": "\u202etxt.exe\u202c",
    "bidirectional isolate": "\u2067abc\u2069",
    "conceal": "\x1b[8m",
    "conceal among others": "\x1b[1;8;31m",
    "conceal after a colour": "\x1b[38;5;1;8m",
    "an escape inside an escape": "\x1b[\x1b[2J",
    "an escape around a colour": "\x1b]0;a\x1b[31mb\x07",
    "an escape at the end": "\x1b",
    "an unfinished sequence": "\x1b[31",
    "a sequence with a NUL in it": "\x1b[3\x001m",
}
# What a terminal would act on, or what would show text in another order than it is written.
HARM = re.compile("\x1b(?!\\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
CONCEAL = re.compile(r"\x1b\[(?:[^m]*;)?8(?:;[^m]*)?m")


@pytest.mark.parametrize("attack", INJECTIONS.values(), ids=INJECTIONS)
def test_nothing_that_a_rank_prints_moves_the_cursor_or_hides_text(attack: str) -> None:
    shown = sanitize(f"before{attack}after")
    assert not HARM.search(shown)
    assert not CONCEAL.search(shown)
    assert shown.startswith(("before", "beforeall well"))


@pytest.mark.parametrize("text", ["", "plain", "a\tb", "ü \U0001f600", "50 %", "[31m", "a [2J b"])
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert sanitize(text) == text


@pytest.mark.parametrize(
    "colour",
    ["\x1b[31m", "\x1b[m", "\x1b[0m", "\x1b[1;31m", "\x1b[38;5;8m", "\x1b[38;2;8;8;8m", "\x1b[48;5;208;1m", "\x1b[97m"],
)
def test_colours_stay_and_end_with_the_line(colour: str) -> None:
    assert sanitize(f"a{colour}b") == f"a{colour}b\x1b[0m"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b"2026-11-23T06:00:00Z 5 hello  world ", ("2026-11-23T06:00:00Z", "5", "hello  world ")),
        (b"2026-11-23T06:00:00Z - ", ("2026-11-23T06:00:00Z", "-", "")),
        (b"2026-11-23T06:00:00Z 5 \xff\xc3\xbc", ("2026-11-23T06:00:00Z", "5", "\ufffdü")),
        (b"torn", ("torn", "", "")),
        (b"", ("", "", "")),
    ],
)
def test_a_record_is_time_rank_and_text(line: bytes, parts: tuple[str, str, str]) -> None:
    assert split_record(line) == parts


LINES = (
    ("gpu-01", b"2026-11-23T06:00:01.5Z 0 step 1"),
    ("gpu-010", b"2026-11-23T06:00:02.5Z 12 step 1"),
    ("gpu-01", b"2026-11-23T06:00:03.5Z - ended"),
)


def test_lines_say_whose_they_are_in_columns() -> None:
    out = io.StringIO()
    view = LogView(["gpu-01", "gpu-010"], out=out, colour=False)
    for node, line in LINES:
        view(node, line)
    assert out.getvalue().splitlines() == [
        "gpu-01   0 | step 1",
        "gpu-010 12 | step 1",
        "gpu-01   - | ended",
    ]


def test_one_rank_can_be_shown_alone() -> None:
    out = io.StringIO()
    view = LogView(["gpu-01", "gpu-010"], out=out, colour=False, rank=12)
    for node, line in LINES:
        view(node, line)
    assert out.getvalue() == "gpu-010 12 | step 1\n"


def test_what_was_before_is_left_out() -> None:
    out = io.StringIO()
    view = LogView(["gpu-01", "gpu-010"], out=out, colour=False, since="2026-11-23T06:00:02")
    for node, line in LINES:
        view(node, line)
    assert out.getvalue().splitlines() == ["gpu-010 12 | step 1", "gpu-01   - | ended"]


def test_nodes_have_colours_of_their_own_and_strangers_none() -> None:
    nodes = [f"n{index:02d}" for index in range(len(COLOURS) + 1)]
    out = Terminal()
    view = LogView(nodes, out=out, colour=True)
    for node in (*nodes, "n99"):
        view(node, b"t 0 x")
    lines = out.getvalue().splitlines()
    assert lines[0] == f"\x1b[{COLOURS[0]}mn00  0 |\x1b[0m x"
    assert lines[len(COLOURS)].startswith(f"\x1b[{COLOURS[0]}m")
    assert lines[-1].startswith("\x1b[0m")
    assert len({line.split("m")[0] for line in lines[: len(COLOURS)]}) == len(COLOURS)
    assert not {31, 91} & set(COLOURS), "red means failure"


def test_a_terminal_is_guarded_in_every_part_of_a_record() -> None:
    out = Terminal()
    LogView(["a"], out=out, colour=False)("a", b"t \x1b]0;x\x07 \x1b[2Jy")
    assert out.getvalue() == "a    | y\n"


def test_a_file_gets_what_was_printed() -> None:
    out = io.StringIO()
    LogView(["a"], out=out, colour=False)("a", b"t 0 \x1b[2Jy\r")
    assert out.getvalue() == "a  0 | \x1b[2Jy\r\n"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("", ""),
        ("90s", "2026-11-23T05:58:30"),
        ("10m", "2026-11-23T05:50:00"),
        ("2h", "2026-11-23T04:00:00"),
        ("1d", "2026-11-22T06:00:00"),
        ("2026-11-23", "2026-11-23"),
        ("2026-11-23T06:00", "2026-11-23T06:00"),
        ("2026-11-23 06:00:01.5Z", "2026-11-23T06:00:01.5"),
    ],
)
def test_a_time_is_a_moment_or_ago(text: str, moment: str) -> None:
    assert read_since(text, now=1795413600.0) == moment


@pytest.mark.parametrize("text", ["yesterday", "10", "m", "-5m", "10 m", "06:00", "2026-11-23T", "23.11.2026", "5w"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InputError) as refused:
        read_since(text)
    assert str(refused.value).splitlines() == [
        f"--since: {text!r} is no time",
        "  next: such as 10m, 2h, or 2026-11-23T06:00 (UTC)",
    ]


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
FINDING = Finding(id="clock", level="warning", node="gpu-01", what="its clock is off", next_step="synchronise it")


def test_without_a_terminal_what_is_said_is_plain_lines() -> None:
    out = io.StringIO()
    teller = Teller(out)
    teller.say("sent \x1b[2J")
    teller.warn(FINDING)
    assert out.getvalue() == ("sent \x1b[2J\nwarning: node gpu-01: its clock is off [clock]\n  next: synchronise it\n")


def test_on_a_terminal_bars_give_way_to_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    teller = Teller(out)
    teller.building(Progress(step=2, total=5, instruction="RUN pip install", text="Collecting\x1b[2J  [b]torch"))
    teller.warn(FINDING)
    before, bar, after = out.getvalue().partition(HIDE)
    assert (before, bar) == ("", HIDE)
    _, shown, said = after.rpartition(SHOW)
    assert shown == SHOW, "the cursor is there again"
    assert said.endswith(
        "\x1b[33mwarning\x1b[0m: node gpu-01: its clock is off [clock]\n  next: synchronise it\x1b[0m\n"
    )
    assert "\x1b[2J" not in after
    teller.done()
    assert out.getvalue().endswith(said)


def test_without_a_terminal_what_takes_long_is_a_line_now_and_then() -> None:
    out = io.StringIO()
    teller = Teller(out)
    teller.shipping("gpu-02", 5_000_000, 12_000_000)
    teller.shipping("gpu-02", 6_000_000, 12_000_000)
    teller.done()
    assert out.getvalue() == "  gpu-02 5/12 MB\n"


def test_without_a_terminal_all_nodes_are_told_of_in_one_line() -> None:
    out, now = io.StringIO(), [100.0]
    teller = Teller(out, clock=lambda: now[0])
    teller.shipping("gpu-01", 0, 12_000_000)
    teller.shipping("gpu-02", 0, 12_000_000)
    now[0] = 110.0
    teller.shipping("gpu-01", 4_000_000, 12_000_000)
    teller.done()
    assert out.getvalue() == "  gpu-01 0/12 MB\n  gpu-01 4/12 MB, 20 s left; gpu-02 0/12 MB\n"


@pytest.mark.parametrize(
    ("taken", "since", "seconds", "left"),
    [
        (50, 50, 10.0, 10.0),
        (75, 25, 10.0, 10.0),  # it began with 50
        (100, 100, 10.0, None),
        (50, 0, 10.0, None),
        (50, 50, 0.0, None),
    ],
)
def test_what_is_left_takes_as_long_as_what_came(taken: int, since: int, seconds: float, left: float | None) -> None:
    assert seconds_left(taken, 100, since_first=since, seconds=seconds) == left


def test_a_bar_goes_when_its_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    teller = Teller(out)
    teller.shipping("gpu-02", 5_000_000, 12_000_000)
    teller.shipping("gpu-03", 5_000_000, 0)
    teller.done()
    assert out.getvalue().startswith(HIDE)
    assert out.getvalue().count(SHOW) == 1


def test_what_machines_say_is_guarded_where_it_is_quoted() -> None:
    out = Terminal()
    Teller(out).say("docker said: \x1b]0;owned\x07")
    assert out.getvalue() == "docker said: \n"


def test_paint_is_for_those_who_want_it() -> None:
    assert (paint("x", 31, on=True), paint("x", 31, on=False)) == ("\x1b[31mx\x1b[0m", "x")

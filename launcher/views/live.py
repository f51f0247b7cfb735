"""The live view: log lines of all nodes as one stream, and progress. Colours and bars only on a terminal."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from cluster.errors import InputError
from launcher import image
from launcher.checks import Finding

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Nodes are told apart by colour, in the order of their ranks; none of these is red, which means failure.
COLOURS = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)
EVERY = 5.0  # seconds between two lines of progress where there is no terminal

# What a rank prints could move the cursor, set the title or hide text: only colours are let through.
# Of those not the one that conceals (8), unless it is part of a colour (38;5;8).
_COLOUR = re.compile(
    r"\x1b\[(?:(?:[34]8;(?:5;\d{1,3}|2;\d{1,3};\d{1,3};\d{1,3})|[0-79]|[1-79]\d|10[0-7])(?:;|(?=m)))*m", re.ASCII
)
_CONTROL = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]|\x1b.?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")


def sanitize(text: str) -> str:
    """Without control sequences and bidirectional overrides; colours stay, and end with the line."""
    parts = _COLOUR.split(text)
    colours = _COLOUR.findall(text)
    plain = [_BIDI.sub("", _CONTROL.sub("", part)) for part in parts]
    mixed = "".join(part + colour for part, colour in zip(plain, [*colours, ""], strict=True))
    return f"{mixed}\x1b[0m" if colours else mixed


def split_record(line: bytes) -> tuple[str, str, str]:
    """A log record as (time, rank, text); see `inside/agent.py` for its form."""
    moment, _, rest = line.decode(errors="replace").partition(" ")
    rank, _, text = rest.partition(" ")
    return moment, rank, text


class LogView:
    """Prints log lines as `node rank | text`, whole lines from many threads."""

    def __init__(
        self, nodes: Sequence[str], *, out: TextIO, colour: bool, rank: int | None = None, since: str = ""
    ) -> None:
        self._width = max((len(node) for node in nodes), default=0)
        self._colours = {node: COLOURS[index % len(COLOURS)] for index, node in enumerate(nodes)}
        self._out = out
        self._colour = colour
        self._rank = None if rank is None else str(rank)
        self._since = since
        self._lock = threading.Lock()

    def __call__(self, node: str, line: bytes) -> None:
        moment, rank, text = split_record(line)
        if (self._rank is not None and rank != self._rank) or moment < self._since:
            return
        if self._out.isatty():  # the job can write to its node's log: no part of a record can be trusted
            rank, text = sanitize(rank), sanitize(text)
        head = f"{node:<{self._width}} {rank:>2} |"
        if self._colour:
            head = f"\x1b[{self._colours.get(node, 0)}m{head}\x1b[0m"
        # BrokenPipeError: nobody reads any more; the watch goes on, and the log is kept.
        with self._lock, suppress(BrokenPipeError):
            self._out.write(f"{head} {text}\n")
            self._out.flush()


class Teller:
    """The voice on standard error: a line for what is done; bars for what takes long, or a line now and then."""

    def __init__(self, out: TextIO = sys.stderr, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._moving = out.isatty()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last = -EVERY
        self._began: dict[str, tuple[float, int]] = {}  # when a node's first bytes were told, and how many
        self._shown: dict[str, str] = {}
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """One line about what was done."""
        with self._lock:
            self._clear()
            self._out.write(f"{sanitize(text) if self._moving else text}\n")  # errors quote what machines said
            self._out.flush()

    def warn(self, finding: Finding) -> None:
        """A finding that does not forbid the start."""
        self.say(f"{paint('warning', 33, on=self._moving)}: {finding}")

    def building(self, progress: image.Progress) -> None:
        """Where the image's build is."""
        text = " ".join(sanitize(f"{progress.instruction} {progress.text}").split())
        self._show("build", text, done=progress.step, total=progress.total, shown=f"{progress.step}/{progress.total}")

    def shipping(self, node: str, taken: int, total: int) -> None:
        """How many bytes of the image a node has taken, of about how many."""
        now = self._clock()
        began, first = self._began.setdefault(node, (now, taken))
        left = seconds_left(taken, total, since_first=taken - first, seconds=now - began)
        shown = f"{taken / 1e6:.0f}/{total / 1e6:.0f} MB"
        if self._moving:
            self._show(node, "", done=taken, total=total, shown=shown)
            return
        self._shown[node] = f"{node} {shown}" + (f", {left:.0f} s left" if left else "")
        self._show("; ".join(self._shown.values()), "", done=taken, total=total, shown="")

    def carrying(self, name: str, taken: int, total: int, left: float | None) -> None:
        """How many bytes of so many have arrived somewhere, and about how many seconds the rest will take."""
        rest = "" if left is None else f", {left:.0f} s left"
        self._show(name, "", done=taken, total=total, shown=f"{taken / 1e6:.1f}/{total / 1e6:.1f} MB{rest}")

    def done(self) -> None:
        """What was being shown as progress is over."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        if self._bars:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()
        self._began.clear()
        self._shown.clear()

    def _show(self, name: str, text: str, *, done: int, total: int, shown: str) -> None:
        with self._lock:
            if self._moving:
                self._move(name, text[:60], done=done, total=total, shown=shown)
            elif (now := self._clock()) - self._last >= EVERY:
                self._last = now
                self._out.write(f"  {name} {shown}".rstrip() + f" {text[:100]}".rstrip() + "\n")
                self._out.flush()

    def _move(self, name: str, text: str, *, done: int, total: int, shown: str) -> None:
        from rich.console import Console  # here: only what is slow can pay for loading it
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bars is None:
            columns = (TextColumn("  {task.fields[name]}"), BarColumn(), TextColumn("{task.fields[shown]}"))
            line = (*columns, TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bars = Progress(*line, console=Console(file=self._out), transient=True)
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task("", name=name, shown="")
        self._bars.update(
            self._tasks[name], completed=done, total=total or None, description=escape(text), shown=escape(shown)
        )


def seconds_left(taken: int, total: int, *, since_first: int, seconds: float) -> float | None:
    """How long the rest takes at the pace so far; None while there is none."""
    return (total - taken) * seconds / since_first if since_first > 0 and seconds > 0 and total > taken else None


def paint(text: str, colour: int, *, on: bool) -> str:
    """Text in a colour, where colours are wanted."""
    return f"\x1b[{colour}m{text}\x1b[0m" if on else text


def read_since(text: str, *, now: float | None = None) -> str:
    """`10m`, `2h`, `1d` ago, or a moment, as the beginning of a log's time stamp; empty for everything."""
    if not text:
        return ""
    if match := re.fullmatch(r"(\d{1,6})(s|m|h|d)", text):
        ago = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
        then = time.gmtime(max(0.0, (time.time() if now is None else now) - ago))
        return time.strftime("%Y-%m-%dT%H:%M:%S", then)
    moment = text.replace(" ", "T").rstrip("Z")
    if re.fullmatch(r"\d{4}-\d\d-\d\d(T\d\d(:\d\d(:\d\d(\.\d+)?)?)?)?", moment):
        whole = moment[:19] + "1970-01-01T00:00:00"[len(moment) :]
        with suppress(ValueError):  # no such day, or hour
            time.strptime(whole, "%Y-%m-%dT%H:%M:%S")
            return moment
    raise InputError(f"{text!r} is no time", where="--since", next_step="such as 10m, 2h, or 2026-11-23T06:00 (UTC)")

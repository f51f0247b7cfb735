"""The live view: log lines of all nodes as one stream, and progress. Colours and bars only on a terminal."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from cluster.errors import InputError
from launcher.checks import Finding
from launcher.image import Progress

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
        with self._lock:
            self._out.write(f"{head} {text}\n")
            self._out.flush()


class Teller:
    """The voice on standard error: one line for what is done, a moving line for what takes long."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._moving = out.isatty()
        self._shown = False
        self._last = 0.0
        self._began = time.monotonic()
        self._taken: dict[str, int] = {}
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

    def building(self, progress: Progress) -> None:
        """Where the image's build is."""
        step = f"step {progress.step}/{progress.total} " if progress.total else ""
        self._progress(f"  {step}{progress.instruction[:60]} {progress.text}")

    def shipping(self, node: str, taken: int) -> None:
        """How many bytes of the image a node has taken."""
        with self._lock:
            self._taken[node] = taken
            seconds = max(0.1, time.monotonic() - self._began)
            parts = [f"{name} {size / 1e6:.0f} MB" for name, size in sorted(self._taken.items())]
            rate = sum(self._taken.values()) / seconds / 1e6
        self._progress(f"  {', '.join(parts)} ({rate:.0f} MB/s)")

    def done(self) -> None:
        """What was being shown as progress is over."""
        with self._lock:
            self._clear()
            self._taken.clear()
            self._began = time.monotonic()

    def _progress(self, text: str) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last < (0.1 if self._moving else EVERY):
                return
            self._last = now
            line = " ".join(sanitize(text).split())
            if self._moving:
                self._out.write(f"\r\x1b[K{line[:100]}")
                self._shown = True
            else:
                self._out.write(f"{line}\n")
            self._out.flush()

    def _clear(self) -> None:
        if self._shown:
            self._out.write("\r\x1b[K")
            self._shown = False


def paint(text: str, colour: int, *, on: bool) -> str:
    """Text in a colour, where colours are wanted."""
    return f"\x1b[{colour}m{text}\x1b[0m" if on else text


def read_since(text: str, *, now: float | None = None) -> str:
    """`10m`, `2h`, `1d` ago, or a moment, as the beginning of a log's time stamp; empty for everything."""
    if not text:
        return ""
    if match := re.fullmatch(r"(\d+)(s|m|h|d)", text):
        ago = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
        moment = time.gmtime((time.time() if now is None else now) - ago)
        return time.strftime("%Y-%m-%dT%H:%M:%S", moment)
    if re.fullmatch(r"\d{4}-\d\d-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d+)?)?)?Z?)?", text):
        return text.replace(" ", "T").rstrip("Z")
    raise InputError(f"{text!r} is no time", where="--since", next_step="such as 10m, 2h, or 2026-11-23T06:00 (UTC)")

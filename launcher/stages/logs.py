"""Logs: a node's log mirrored here, byte for byte. Its length here is the cursor: nothing lost, nothing repeated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.command import Command
from cluster.errors import NodeError
from cluster.fleet import Machine
from cluster.private import make_private, open_private

RETRY = 1.0  # seconds between two attempts to follow again
TRIES = 3  # for the rest of a log whose writer has ended

Show = Callable[[str, bytes], None]


class Mirror:
    """One node's log, from its `out` folder to `path`; `show(node, line)` hears every complete line that is new.

    Begins at byte `start`, else where the mirror ends. Every byte is written at its own place, so that several
    launchers may mirror the same log into the same file.
    """

    def __init__(self, machine: Machine, *, out: str, path: Path, show: Show, start: int | None = None) -> None:
        self._machine = machine
        self._source = f"{out}/node.log"
        self._show = show
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._rest = b""
        self._path = path
        # Made with its first byte: a run that nobody knows leaves nothing here.
        self._have = (path.stat().st_size if path.exists() else 0) if start is None else start

    def start(self) -> None:
        """Begin to follow, beside whatever else is done."""
        self._thread.start()

    def leave(self) -> None:
        """Stop following; the rest stays on the node."""
        self._stop.set()

    def finish(self) -> None:
        """Nothing more will be written there: fetch what is left, then let go."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        for _ in range(TRIES):
            with suppress(NodeError, OSError):
                self._machine.transport.stream(self._tail(follow=False), self._take, stop=lambda: False)
                break
        if self._rest:
            self._show(self._machine.name, self._rest)

    def _follow(self) -> None:
        while not self._stop.is_set():
            # OSError: the disk here is full; what did not fit is asked for again.
            with suppress(NodeError, OSError):
                self._machine.transport.stream(self._tail(follow=True), self._take, stop=self._stop.is_set)
            self._stop.wait(RETRY)

    def _tail(self, *, follow: bool) -> Command:
        return Command(argv=("tail", "-c", f"+{self._have + 1}", *(("-f",) if follow else ()), self._source))

    def _take(self, chunk: bytes) -> None:
        make_private(self._path.parent)
        with open_private(self._path, "r+b", buffering=0) as file:
            file.seek(self._have)
            while chunk:
                written = file.write(chunk)
                self._have += written
                *lines, self._rest = (self._rest + chunk[:written]).split(b"\n")
                for line in lines:
                    self._show(self._machine.name, line)
                chunk = chunk[written:]

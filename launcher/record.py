"""What is kept on the control machine: which clusters there are, their pinned keys, and every run's record.

    <state>/current                     the cluster that was brought up last
    <state>/clusters/<name>/inventory   where its inventory file is
    <state>/clusters/<name>/known_hosts pinned host keys
    <state>/clusters/<name>/facts.json  the last survey
    <state>/clusters/<name>/runs/<id>/  plan.json, events.jsonl, logs/<node>.log, logs/rank-00005.log, evidence/<node>/
    <state>/shelf/                      layers of images, by content (`cluster.shelf`)

Nothing here is needed to find containers (labels do that): it is memory, and may be lost.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cluster.errors import ClusterError, InputError
from cluster.private import make_private, open_private
from launcher.events import Event, from_json, to_json
from launcher.state import RunState, fold

if TYPE_CHECKING:
    from cluster.facts import NodeFacts
    from launcher.plan import Plan


def state_folder(environment: Mapping[str, str]) -> Path:
    """Where all this is: LAUNCHER_STATE, else the XDG state folder's `launcher`."""
    if environment.get("LAUNCHER_STATE"):
        return Path(environment["LAUNCHER_STATE"]).absolute()
    if environment.get("XDG_STATE_HOME"):
        return Path(environment["XDG_STATE_HOME"]) / "launcher"
    try:
        return Path(environment.get("HOME") or "~").expanduser() / ".local/state/launcher"
    except RuntimeError:
        raise InputError("no home folder is known", next_step="set HOME, or LAUNCHER_STATE to a folder") from None


RANK_DIGITS = 5
_OF_RANK = re.compile(rf"rank-\d{{{RANK_DIGITS}}}\.log")


class Memory:
    """The whole folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def shelf(self) -> Path:
        """Where image layers are kept."""
        return self._folder / "shelf"

    @property
    def rehearsals(self) -> Path:
        """Where a rehearsal leaves the logs of what did not end as it should."""
        return self._folder / "rehearsals"

    def cluster(self, name: str) -> ClusterMemory:
        """One cluster's part; it need not be there yet."""
        return ClusterMemory(self._folder / "clusters" / name)

    def clusters(self) -> tuple[ClusterMemory, ...]:
        """All clusters that are known here, by name."""
        folder = self._folder / "clusters"
        return tuple(ClusterMemory(one) for one in sorted(folder.iterdir())) if folder.is_dir() else ()

    def current(self) -> str | None:
        """The cluster that was brought up last, if it is still known."""
        name = _line(self._folder / "current")
        return name if name and self.cluster(name).inventory() else None

    def make_current(self, name: str) -> None:
        """Remember what was brought up last."""
        write_whole(self._folder / "current", name + "\n")

    def forget_current(self, name: str) -> None:
        """After `down`, a cluster is not the current one any more."""
        if self.current() == name:
            (self._folder / "current").unlink(missing_ok=True)
        (self.cluster(name).folder / "engine").unlink(missing_ok=True)


class ClusterMemory:
    """What is remembered of one cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name

    @property
    def known_hosts(self) -> Path:
        """The pinned host keys."""
        return self.folder / "known_hosts"

    @property
    def shelf(self) -> Path:
        """Where image layers are kept, for all clusters."""
        return Memory(self.folder.parent.parent).shelf

    def inventory(self) -> Path | None:
        """Where the inventory file was when the cluster was last brought up."""
        path = _line(self.folder / "inventory")
        return Path(path) if path else None

    def engine(self) -> str | None:
        """The engine that `up --engine` put in place of the inventory's, until `down`."""
        return _line(self.folder / "engine")

    def remember(self, inventory: Path, *, engine: str | None) -> None:
        """Keep where the inventory file is, and an engine that stands in for its own."""
        write_whole(self.folder / "inventory", f"{inventory.absolute()}\n")
        write_whole(self.folder / "engine", f"{engine or ''}\n")

    def save_facts(self, facts: Mapping[str, NodeFacts]) -> None:
        """Keep the last survey: `config show` and `plan` need no network then."""
        write_whole(self.folder / "facts.json", _facts_type().dump_json(dict(facts), indent=1).decode())

    def load_facts(self) -> Mapping[str, NodeFacts]:
        """The last survey, empty when there is none that this version can read."""
        try:
            facts: dict[str, NodeFacts] = _facts_type().validate_json((self.folder / "facts.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return facts

    def runs(self) -> tuple[RunRecord, ...]:
        """All records, the oldest first."""
        folder = self.folder / "runs"
        return tuple(RunRecord(one) for one in sorted(folder.iterdir())) if folder.is_dir() else ()

    def run(self, run_id: str) -> RunRecord:
        """One run's record; it need not be there yet."""
        return RunRecord(self.folder / "runs" / run_id)


class RunRecord:
    """One run's folder. `emit` appends an event; it may be called from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder.name
        self._lock = threading.Lock()

    @property
    def logs(self) -> Path:
        """The folder of the logs: `<node>.log` mirrors the node's own byte for byte."""
        return self.folder / "logs"

    @property
    def evidence(self) -> Path:
        """What the nodes kept of a run that ended badly: `<node>/stacks/` and `<node>/flight/`."""
        return self.folder / "evidence"

    def mirror(self, node: str) -> Path:
        """Where a node's log is mirrored."""
        return self.logs / f"{node}.log"

    def mirrored(self) -> dict[str, int]:
        """How much of each node's log is here in whole lines, in bytes."""
        mirrors = sorted(self.logs.glob("*.log")) if self.logs.is_dir() else []
        return {path.stem: _whole(path) for path in mirrors if not _OF_RANK.fullmatch(path.name)}

    def merged(self, until: Mapping[str, int] | None = None) -> Iterator[tuple[str, bytes]]:
        """All mirrored lines with their node, by the time at which they were written; up to these bytes of each."""
        lengths = self.mirrored() if until is None else until
        streams = [_lines(self.mirror(node), length) for node, length in lengths.items() if length]
        for _, node, line in heapq.merge(*streams, key=lambda one: one[0]):
            yield node, line

    def split_ranks(self) -> None:
        """One log for every rank, `rank-00005.log`, made of the mirrors; a rank lives on one node."""
        for node, length in self.mirrored().items():
            with ExitStack() as stack:
                parts: dict[bytes, IO[bytes]] = {}
                for moment, _, line in _lines(self.mirror(node), length):
                    rank, _, text = line[len(moment) + 1 :].partition(b" ")
                    if not rank.isdigit() or len(rank) > RANK_DIGITS:
                        continue
                    if rank not in parts:
                        path = self.logs / f"rank-{int(rank):05d}.log"
                        parts[rank] = stack.enter_context(open_private(path, "wb"))
                    parts[rank].write(moment + b" " + text + b"\n")

    def save_plan(self, plan: Plan) -> None:
        """Keep the plan whole."""
        write_whole(self.folder / "plan.json", plan_to_json(plan))

    def load_plan(self) -> Plan | None:
        """The plan, None when there is none that this version can read."""
        try:
            text = (self.folder / "plan.json").read_text(encoding="utf-8", errors="replace")
            return plan_from_json(text, name=str(self.folder / "plan.json"))
        except (OSError, InputError):
            return None

    def emit(self, event: Event) -> None:
        """Append one event; it is on disk when this returns."""
        with self._lock, _written(self.folder):
            make_private(self.folder)
            with open_private(self.folder / "events.jsonl", "ab") as log:
                # After a torn line (a full disk, a crash) a new one begins.
                start = b"\n" if _is_torn(self.folder / "events.jsonl") else b""
                log.write(start + to_json(event).encode() + b"\n")
                log.flush()
                os.fsync(log.fileno())

    def events(self) -> Iterator[Event]:
        """All events; torn and unknown lines are passed over."""
        try:
            text = (self.folder / "events.jsonl").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        yield from filter(None, map(from_json, text.split("\n")))

    def state(self) -> RunState:
        """What the events amount to."""
        return fold(self.events())


def _line(path: Path) -> str | None:
    """What a one-line file says; None when there is none, or nothing that can be used."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if text.isprintable() and text else None


def _is_torn(path: Path) -> bool:
    with path.open("rb") as log:
        return bool(log.seek(0, os.SEEK_END)) and (log.seek(-1, os.SEEK_END), log.read(1))[1] != b"\n"


def _whole(path: Path) -> int:
    """The length of a file up to its last line end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _lines(path: Path, length: int) -> Iterator[tuple[bytes, str, bytes]]:
    with path.open("rb") as file:
        for line in file:
            length -= len(line)
            if length < 0:
                return
            yield line.partition(b" ")[0], path.stem, line.rstrip(b"\n")


def keep_traceback(folder: Path, text: str) -> Path:
    """Append a traceback to the log for bugs; gives back where that is."""
    path = folder / "errors.log"
    try:
        make_private(folder)
        log = open_private(path, "ab")
    except OSError:  # that may be the very bug
        handle, name = tempfile.mkstemp(prefix="launcher-errors-")
        log, path = os.fdopen(handle, "ab"), Path(name)
    with log:
        log.write(text.encode(errors="backslashreplace") + b"\n")
    return path


def plan_to_json(plan: Plan) -> str:
    """The whole plan as JSON."""
    return _plan_type().dump_json(plan, indent=1).decode()  # type: ignore[no-any-return]


def plan_from_json(text: str, *, name: str) -> Plan:
    """A plan that was saved; `InputError` when this is none."""
    try:
        plan: Plan = _plan_type().validate_json(text)
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"this is no saved plan: {first}", where=name, next_step="save one with --dry-run --json"
        ) from None
    return plan


def write_whole(path: Path, text: str) -> None:
    """Write a private file so that it is never seen half: beside it, to the disk, then under its name."""
    with _written(path):
        _write_whole(path, text)


@contextmanager
def _written(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "a link stands in its place" if error.errno == errno.ELOOP else error.strerror or error
        raise ClusterError(
            f"this cannot be written: {why}",
            where=str(place),
            next_step="make room there, or set LAUNCHER_STATE to a folder that you can write to",
        ) from error


def _write_whole(path: Path, text: str) -> None:
    make_private(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    partial.unlink(missing_ok=True)  # of a process that died while it had our number
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _facts_type() -> Any:
    from pydantic import TypeAdapter  # here: a command that keeps nothing need not load it

    from cluster.facts import NodeFacts

    return TypeAdapter(dict[str, NodeFacts])


def _plan_type() -> Any:
    from pydantic import TypeAdapter

    from launcher.plan import Plan

    return TypeAdapter(Plan)


def to_pretty_json(value: object) -> str:
    """JSON for people and programs alike."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return text.encode(errors="backslashreplace").decode()  # a lone surrogate cannot be printed; JSON can escape it

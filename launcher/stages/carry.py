"""Carry: what places hold of checkpoints, and pieces of them from one place to others; verified on arrival.

A place is a node (its programs run in the idle container, as the node's user, which sees the node's own checkpoints
folder), or a folder on this machine. Nothing is installed: each program (`inside/manifest.py`, `inside/carry.py`) comes
on the standard input of the Python that runs it, and nothing of it stays. Between two nodes the bytes flow through this
machine, without a key of one on the other; many destinations are fed from one reading.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.command import Command, Result
from cluster.engine import Engine
from cluster.errors import CommandError, IntegrityError, LockedError, NodeError
from cluster.fleet import Machine, each
from cluster.local import LocalTransport
from cluster.transport import Transport
from launcher import operator
from launcher.shards import Listing, Piece, Wanted, read_listings

HERE = "this machine"
_SLACK = 32  # chunks that one destination may lag behind the source
PARTIAL = ".launcher-partial-"  # before the name of what is not whole yet, as in inside/carry.py
# Run by a Python: takes so many bytes of its input as a program, and leaves it the rest.
_BEGIN = "import sys; exec(compile(sys.stdin.buffer.read(int(sys.argv.pop(1))), 'launcher', 'exec'))"
_INSIDE = Path(__file__).parents[1] / "inside"

Progress = Callable[[int], None]  # bytes that were just taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where checkpoints lie. `folder` is their folder; None: the one that the node's container calls its own."""

    name: str
    transport: Transport
    engine: Engine | None = None
    container: str = ""
    folder: str | None = None

    def program(self, name: str, *arguments: str, stdin: bytes = b"") -> Command:
        """A program of `inside/`, to be run there; its text stands before its own input."""
        below = ("--below", self.folder) if self.folder else ()
        text = _source(name)
        return self.python("-c", _BEGIN, str(len(text)), *arguments, *below, stdin=text + stdin)

    def carrier(self, verb: str, unit: str, *, stdin: bytes = b"", take: bool = False) -> Command:
        """`inside/carry.py`, for what arrives at this place on behalf of this very command."""
        return self.program("carry.py", verb, unit, "--token", token(), *(("--take",) if take else ()), stdin=stdin)

    def python(self, *arguments: str, stdin: bytes = b"") -> Command:
        """Python, to be run there."""
        if self.engine is None:
            return Command(argv=(sys.executable, *arguments), stdin=stdin)
        return replace(self.engine.interactive(self.container, ("python3", *arguments), tty=False), stdin=stdin)

    def ask(self, command: Command) -> Result:
        """Run it to its end, however long that takes."""
        return self.transport.send(command, (command.stdin,))


@functools.cache
def token() -> str:
    """Whose what arrives is: this process, by its machine and number, and by chance."""
    return f"{os.uname().nodename}:{os.getpid()}:{secrets.token_hex(4)}"


def place_of(machine: Machine, container: str) -> Place:
    """A node, by its idle container."""
    return Place(name=machine.name, transport=machine.transport, engine=machine.engine, container=container)


def place_here(folder: Path) -> Place:
    """A folder on this machine."""
    return Place(name=HERE, transport=LocalTransport(HERE), folder=str(folder))


@functools.cache
def _source(name: str) -> bytes:
    """The text of a program of `inside/`."""
    return (_INSIDE / name).read_bytes()


# --- what there is -------------------------------------------------------------------------------------------------


def list_units(
    place: Place, units: Sequence[str] | None = None, *, brief: bool = False, blind: bool = False
) -> tuple[Listing, ...]:
    """All units of a place, or these; `blind`: not looking into files; `brief`: nor taking the manifests' hashes."""
    how = (*(("--brief",) if brief else ()), *(("--blind",) if blind or brief else ()))
    return _listings(place, "list", *how, *_named(units))


def hash_units(place: Place, units: Sequence[str], *, whole: bool = False) -> tuple[Listing, ...]:
    """These units, every byte read again there; with `whole` also the hash of every file as one."""
    return _listings(place, "hash", *(("--whole",) if whole else ()), *_named(units))


def _named(units: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(word for unit in units or () for word in ("--unit", unit))


def _listings(place: Place, *arguments: str) -> tuple[Listing, ...]:
    said = place.ask(place.program("manifest.py", *arguments))
    if not said.ok:
        raise CommandError(place.name, "its checkpoints cannot be listed", detail=said.tail(3))
    return read_listings(place.name, said.text)


def put_manifest(place: Place, unit: str, *, node: str, text: str) -> None:
    """Write a node's manifest into a unit."""
    command = place.program("manifest.py", "state", "--unit", unit, "--node", node, stdin=text.encode())
    said = place.ask(command)
    if not said.ok:
        raise CommandError(place.name, f"the manifest of {unit} cannot be written", detail=said.tail(3))


# --- what comes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What has arrived at a place: the hashes of the pieces by file; and the bytes that are free there."""

    have: Mapping[str, tuple[str, ...]]
    free: int


def make_ready(place: Place, unit: str, wanted: Sequence[Wanted]) -> Ready:
    """Make the place ready to receive a unit; what has arrived of it before is read again, and counts."""
    said = _ask(place, "ready", unit, {one.path: one.bytes for one in wanted})
    return Ready(have={path: tuple(hashes) for path, hashes in said["have"].items()}, free=int(said["free"]))


def carry(
    source: Place, unit: str, pieces: Sequence[Piece], targets: Sequence[Place], to: str, *, progress: Progress
) -> Mapping[str, tuple[tuple[str, int], ...] | NodeError]:
    """Bring pieces of the source's `unit` to the unit `to` that is arriving at the targets.

    Answers for each target with the (path, offset) of the pieces that did not come as they were said to be, or with
    the error that ended it. Raises the source's own error once every target has kept what came whole.
    """
    near = [target for target in targets if target == source]
    far = [target for target in targets if target != source]
    answers: dict[str, tuple[tuple[str, int], ...] | NodeError] = {}
    for target in near:
        answers[target.name] = _copy(target, unit, pieces, to)
        progress(sum(piece.length for piece in pieces))
    if far:
        answers |= _stream(source, unit, pieces, far, to, progress=progress)
    return answers


def _copy(place: Place, unit: str, pieces: Sequence[Piece], to: str) -> tuple[tuple[str, int], ...] | NodeError:
    try:
        return _bad(_ask(place, "copy", to, {"from": unit, "pieces": _rows(pieces)}))
    except NodeError as error:
        return error


def _stream(
    source: Place, unit: str, pieces: Sequence[Piece], targets: Sequence[Place], to: str, *, progress: Progress
) -> dict[str, tuple[tuple[str, int], ...] | NodeError]:
    pipes = {target.name: _Pipe() for target in targets}
    broken: list[BaseException] = []
    reading = (source, unit, pieces, tuple(pipes.values()), broken)
    threading.Thread(target=_read, args=reading, daemon=True).start()
    head = json.dumps({"pieces": _rows(pieces)}).encode() + b"\n"

    def take(target: Place) -> tuple[tuple[str, int], ...]:
        pipe = pipes[target.name]

        command = target.carrier("write", to, stdin=head)

        def chunks() -> Iterator[bytes]:
            yield command.stdin
            for chunk in pipe:
                yield chunk
                progress(len(chunk))

        try:
            said = target.transport.send(command, chunks())
        finally:
            pipe.leave()
        return _bad(_answer(target, said))

    answers = each(targets, take, width=len(targets))
    if broken:
        raise broken[0]
    return {**answers.good, **answers.bad}


def _rows(pieces: Sequence[Piece]) -> list[list[object]]:
    return [[piece.path, piece.offset, piece.length, piece.sha256] for piece in pieces]


def _bad(said: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    return tuple((str(path), int(offset)) for path, offset in said["bad"])


def _read(
    source: Place, unit: str, pieces: Sequence[Piece], pipes: tuple[_Pipe, ...], broken: list[BaseException]
) -> None:
    asked = json.dumps([[piece.path, piece.offset, piece.length] for piece in pieces]).encode()

    def pour(chunk: bytes) -> None:
        for pipe in pipes:
            pipe.put(chunk)

    try:
        command = source.program("carry.py", "read", unit, stdin=asked)
        code = source.transport.stream(command, pour, stop=lambda: all(pipe.is_left for pipe in pipes))
        if code > 0:
            broken.append(
                CommandError(
                    source.name,
                    f"{unit} could not be read to its end (status {code})",
                    next_step="launcher checkpoint verify",
                )
            )
    except BaseException as error:  # noqa: BLE001 - handed to the caller
        broken.append(error)
    for pipe in pipes:
        pipe.put(None)


class _Pipe:
    """A bounded queue of chunks that ends with None."""

    def __init__(self) -> None:
        self._chunks: queue.Queue[bytes | None] = queue.Queue(maxsize=_SLACK)
        self._left = threading.Event()

    def put(self, chunk: bytes | None) -> None:
        while not self._left.is_set():
            try:
                self._chunks.put(chunk, timeout=0.5)
                return
            except queue.Full:
                continue

    @property
    def is_left(self) -> bool:
        """Whether nobody takes any more."""
        return self._left.is_set()

    def leave(self) -> None:
        """The taking side is gone."""
        self._left.set()

    def __iter__(self) -> Iterator[bytes]:
        while (chunk := self._chunks.get()) is not None:
            yield chunk


def show(
    place: Place,
    unit: str,
    wanted: Sequence[Wanted],
    *,
    texts: Mapping[str, str],
    beside: Mapping[str, str],
) -> None:
    """Give what has arrived its name, in one step, with these small files in it and beside it."""
    asked = {"files": {one.path: one.bytes for one in wanted}, "texts": dict(texts), "beside": dict(beside)}
    _ask(place, "show", unit, asked)


def drop(place: Place, unit: str) -> None:
    """Remove what has arrived of a unit and has no name yet."""
    _ask(place, "drop", unit, {})


def arriving(place: Place, unit: str, *, whole: bool = False) -> Listing:
    """What has been put where a unit arrives, and has no name yet; read in full."""
    found = hash_units(place, [partial(unit)], whole=whole)
    if not found:
        raise CommandError(place.name, f"nothing was made of {unit}")
    return found[0]


def as_wanted(listing: Listing) -> tuple[Wanted, ...]:
    """All of a listing that was read, as what another place shall have."""
    return tuple(
        Wanted(path=part.path, bytes=part.bytes, pieces=part.pieces or (), holders=(listing.place,))
        for part in listing.parts
    )


def partial(unit: str) -> str:
    """Where a unit arrives before it has its name, below the same checkpoints folder."""
    folder, _, name = unit.rpartition("/")
    return f"{folder}/{PARTIAL}{name}" if folder else PARTIAL + name


_SPEAKER = "export: "
# Whatever is made of a checkpoint is made in the checkpoints folder, so that places in it are relative paths.
_THERE = 'cd -- "$LAUNCHER_CHECKPOINTS" && exec nice "$@"'
# $1 the unit, $2 where the result shall lie, $3 the folder of the shards in both. What is no shard is taken as it is.
_UNIVERSAL = """
from=$1; to=$2; shards=$3
python3 -m deepspeed.checkpoint.ds_to_universal --inject_missing_state \
    --input_folder "$from${shards:+/$shards}" --output_folder "$to${shards:+/$shards}" \
    --num_extract_workers 2 --num_merge_workers 1 || exit
[ -z "$shards" ] || find "$from" -maxdepth 1 -type f ! -name 'latest*' ! -name '.launcher-*' -exec cp -- {} "$to/" ';'
"""


def export(place: Place, *arguments: str) -> None:
    """Run the converter, `inside/export.py`, on a node; paths are those below its checkpoints folder."""
    _make(place, ("python3", "-", *arguments), stdin=_source("export.py"))


def make_universal(place: Place, unit: str, to: str, *, shards: str) -> None:
    """Run DeepSpeed's own `ds_to_universal` on a node."""
    _make(place, ("sh", "-c", _UNIVERSAL, "sh", unit, to, shards))


def _make(place: Place, argv: Sequence[str], *, stdin: bytes = b"") -> None:
    assert place.engine is not None
    inside = ("sh", "-c", _THERE, "sh", *argv)
    said = place.ask(replace(place.engine.interactive(place.container, inside, tty=False), stdin=stdin))
    if said.ok:
        return
    lines = said.tail(8)
    # The converter names itself before its one sentence; what follows is advice. Others end with what went wrong.
    own = next((line for line in lines if line.startswith(_SPEAKER)), lines[-1] if lines else "it ended without a word")
    rest = tuple(line.strip() for line in lines if line != own)
    if said.code == IntegrityError.exit_code:
        raise IntegrityError(own.removeprefix(_SPEAKER), where=f"node {place.name}", detail=rest)
    raise CommandError(place.name, f"the checkpoint could not be converted: {own.removeprefix(_SPEAKER)}", detail=rest)


def _ask(place: Place, verb: str, unit: str, asked: Mapping[str, object], *, take: bool = False) -> dict[str, Any]:
    stdin = json.dumps(asked).encode()
    said = place.ask(place.carrier(verb, unit, stdin=stdin, take=take))
    try:
        return _answer(place, said)
    except LockedError as held:
        # An owner that is proven dead holds nothing; one on another machine cannot be asked.
        if take or verb != "ready" or not _is_dead(held):
            raise
        return _ask(place, verb, unit, asked, take=True)


def _is_dead(held: LockedError) -> bool:
    host, _, rest = str(held.detail[0]).removeprefix("held by ").partition(":")
    return host == os.uname().nodename and operator.has_ended(rest.partition(":")[0])


def _answer(place: Place, said: Result) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(said.text)
    except ValueError:
        answer = {"error": "the transfer ended without an answer"}
    if "error" not in answer:
        return answer
    if "held" in answer:
        raise LockedError(
            str(answer["error"]),
            where=f"node {place.name}",
            detail=(f"held by {answer['held']}", f"it last did something {float(answer['age']):.0f} s ago"),
            next_step="wait for it; a minute after it was killed this works",
        )
    raise CommandError(
        place.name,
        str(answer["error"]),
        detail=() if "full" in answer else said.tail(3),
        next_step="free some space there; the same command goes on from where it was" if answer.get("full") else None,
    )

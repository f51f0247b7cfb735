"""One node's part of a run: start the ranks, keep every line they say, leave nothing behind, end when the others do.

Usage: python3 agent.py RUN_JSON

The main process of a run container (under an init), or a plain process where there is no Docker. Needs Python alone,
and guard.py, cause.py and stacks.py beside it.
RUN_JSON holds {"run", "node", "machine_rank", "world_size", "local_processes", "launch": [arguments of `accelerate
launch`, ending with bootstrap.py, the script and its arguments], "env": {}, "workdir", "files": the folder of
launch.py, "out": a writable folder, "secrets": [names], "secrets_dir", "backend": "gloo" or null, "nvme": [paths],
"stop_grace": seconds, "guard": as guard.py says}.

It writes into "out":
  node.log   One record per line, appended whole, so a reader may remember a byte offset and come back:
                 2026-11-23T06:00:00.123456Z 5 text of the line
             The second word is the rank, or `-` for torchrun and this agent. A record ends with \\n and with nothing
             else (never use splitlines). Invalid UTF-8 is replaced; longer lines are cut at 64 KiB; of text that
             is overwritten by a carriage return about one version a second is kept; secrets read `***`.
  exit.json  Written atomically when nothing of the job is left, and once more when the other nodes have told of theirs:
             {"run", "node", "machine_rank", "code", "signal", "started", "ended", "stopped", "oom", "failures":
             [{"rank", "local_rank", "exit_code", "signal", "time", "type", "message"}], "clock", "others", "cause"},
             times in seconds since the epoch by this node's clock, which is "clock" seconds ahead of the first node's;
             failures by time. Rank null: the launch itself failed. "stopped": told to end before anything failed here.
             "others": what was heard of the other nodes, as reports (cause.py); "cause": the first cause of all, in
             one line, null when all went well.
  stacks/    rank-00003.txt: what each rank was doing when nothing went on any more (and rank-00003.py-spy.txt).
  flight/    The dumps of NCCL's flight recorder, where there are any.
The same lines go to standard output (`[rank 5] text`) as far as somebody reads it.

SIGTERM or SIGINT asks the job to stop, and kills it after stop_grace seconds; a second one kills it now.
Secrets are files named by name in secrets_dir; they are complete when `.complete` lies beside them. The ranks read
them there themselves: what is in a process's first environment, every process of that user can read. The agent exits
with the job's code.

Where there is a checkpoints folder, manifest.py watches it beside the job and looks once more after it, for a time.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import json
import os
import re
import select
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes, quote_plus

# On a node these files lie side by side, and belong to no package.
if TYPE_CHECKING or __package__:
    from .cause import HANG, first_cause, how
    from .guard import Guard
    from .stacks import STATES, collect, find_ranks, keep_flight_records
else:
    from cause import HANG, first_cause, how
    from guard import Guard
    from stacks import STATES, collect, find_ranks, keep_flight_records

LONGEST = 64 * 1024  # of a line, in bytes
CHUNK = 256 * 1024  # one read
ECHO_LIMIT = 1024 * 1024  # kept for a slow reader of standard output; what is beyond is in node.log only
SECRETS_PATIENCE = 60.0
LEFTOVER_GRACE = 2.0  # for processes that outlived the job, before SIGKILL
SEALING = {True: 60.0, False: 3.0}  # after a job that ended well, and after any other: somebody may be waiting
KILL_PATIENCE = 10.0  # a process in uninterruptible sleep does not die of SIGKILL; do not wait for it for ever
SHORTEST_SECRET = 4  # shorter values would blot out half of every line
CONTINUES = 0x80  # the high bits of a UTF-8 byte that is not the first of its character
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
LOOK = 0.1  # seconds between two looks for a rank that fell
EXIT_PATIENCE = 30.0  # beyond the grace, for a rank that failed and does not end, or a torchrun that does not notice
OURS = ("status", "time", "lost")  # of an ending, in no exit.json
SIGNALLED = 128  # exit statuses from here on tell of a signal
FULL = 1 << 20  # bytes: a disk with less than that has no room left
LARGEST_CODE = 126  # a shell means something else by 126 and 127
PR_SET_CHILD_SUBREAPER = 36
F_SETPIPE_SZ = 1031


def main(argv: list[str]) -> int:
    """Read the run, carry it out, leave its exit.json; answers with the exit code."""
    hold_standard_streams()
    run = {**json.loads(Path(argv[0]).read_text(encoding="utf-8")), "document": argv[0]}
    out = Path(run["out"])
    log = Log(out / "node.log")
    bell = Bell()
    adopt_orphans()
    guard = Guard(run, say=log.say)
    folder = Path(tempfile.mkdtemp(prefix="launcher-"))
    try:
        ended = carry_out(run, log=log, bell=bell, folder=folder, guard=guard)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_exit(out / "exit.json", with_others(ended, guard))  # what we know is safe; then hear the others to their end
    found = first_cause([ended])
    guard.part(ended, why=found[1] if found else "", hurry=lambda: bell.rung > 0)
    log.finish()
    write_exit(out / "exit.json", with_others(ended, guard))
    seal_checkpoints(run, ended, bell=bell)
    return int(ended["status"])


def carry_out(run: dict[str, Any], *, log: Log, bell: Bell, folder: Path, guard: Guard) -> dict[str, Any]:
    """Start the job, follow it to its end, clear away what it left; answers with how it ended."""
    started, out = time.time(), Path(run["out"])
    killed_before = oom_kills()
    secrets = wait_for_secrets(run, bell=bell)
    if isinstance(secrets, str):
        log.say(secrets)
        code = 128 + signal.SIGTERM if bell.rung else 1
        failures = [] if bell.rung else [failure(time=time.time(), kind="SecretsMissing", message=secrets)]
        return ending(run, code=code, started=started, stopped=bool(bell.rung), failures=failures)
    log.redact = Redactor(secrets.values())
    pipes = Pipes(folder, run=run, log=log, bell=bell, guard=guard)
    try:
        job = Job(run, folder=folder, output=pipes.job_end)
    except (OSError, ValueError) as error:
        log.say(f"launcher: cannot start {run['files']}/launch.py in {run['workdir']}: {error}")
        failures = [failure(time=time.time(), kind=type(error).__name__, message=str(error))]
        return ending(run, code=1, started=started, stopped=False, failures=failures)
    keep_manifests(run, "watch", since=started, output=pipes.job_end)
    pipes.close_job_end()
    hangs = follow(job, pipes=pipes, bell=bell, guard=guard, folder=folder, run=run)
    clear_away(job, pipes=pipes, bell=bell, log=log)
    pipes.drain()
    keep_flight_records(folder, out=out)
    failures = sorted([*hangs, *read_failures(folder, run=run, redact=log.redact)], key=lambda one: float(one["time"]))
    for place in full_places(run):
        failures = [{**one, "message": f"no space is left at {place}: {one['message']}"} for one in failures]
    own = [one for one in failures if job.told is None or one["time"] < job.told]
    stopped = job.told is not None and not own
    code = job.code
    if own and code != 0 and (code < SIGNALLED if job.told is None else True):
        # torchrun's order is that of the ends it saw; the ranks' own notes know which was first.
        code = own[0]["exit_code"] if 0 < own[0]["exit_code"] < LARGEST_CODE else 1
    oom = oom_kills() > killed_before and not stopped
    return ending(run, code=code, started=started, stopped=stopped, failures=failures, oom=oom)


def keep_manifests(run: dict[str, Any], how: str, *, since: float, output: int) -> subprocess.Popen[bytes] | None:
    """Start manifest.py, which writes down what the checkpoints are while they are still true."""
    program = Path(run["files"], "manifest.py")
    if not (os.environ.get("LAUNCHER_CHECKPOINTS") and program.exists() and run.get("run")):
        return None
    return subprocess.Popen(
        [sys.executable, str(program), how, run["document"], "--since", str(since)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def seal_checkpoints(run: dict[str, Any], ended: dict[str, Any], *, bell: Bell) -> None:
    """The last look at the checkpoints. How the run ended is written down already, and whoever asks is obeyed."""
    sealing = keep_manifests(run, "seal", since=ended["started"], output=subprocess.DEVNULL)
    deadline = time.monotonic() + SEALING[ended["code"] == 0]
    rung = bell.rung
    while sealing is not None and sealing.poll() is None:
        if time.monotonic() > deadline or bell.rung > rung:
            sealing.kill()
        time.sleep(0.02)


def follow(
    job: Job, *, pipes: Pipes, bell: Bell, guard: Guard, folder: Path, run: dict[str, Any]
) -> list[dict[str, Any]]:
    """Carry lines until the job has ended; pass on what the bell asks for, and the verdict of the guard.

    Answers with the failures that no rank could note itself: that nothing went on any more.
    """
    grace = float(run["stop_grace"])
    heard, deadline, look_at, fell = 0, float("inf"), 0.0, False
    hangs: list[dict[str, Any]] = []
    while not job.has_ended():
        now = time.monotonic()
        if not fell and heard == 0 and now >= look_at:
            look_at = now + LOOK
            if failures := read_failures(folder, run=run, redact=pipes.log.redact):
                # torchrun ends the others here, whatever the guards of other nodes may say now.
                fell, deadline = True, now + grace + EXIT_PATIENCE
                guard.ending(f"node {run['node']}, rank {failures[0]['rank']}: {how(failures[0])}", failures=failures)
        if heard == 0 and guard.verdict and not fell:
            pipes.log.say(f"launcher: the run ends: {guard.verdict}")
            if guard.hanging:
                hangs = note_hang(job, pipes=pipes, guard=guard, folder=folder, run=run)
        asked = max(bell.rung, 1 if guard.verdict and not fell else 0)
        if asked > heard:
            heard = asked
            guard.ending(f"node {run['node']}: told to stop")
            job.signal(signal.SIGTERM if heard == 1 else signal.SIGKILL)
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() >= deadline:
            job.signal(signal.SIGKILL)
            deadline = float("inf")
        pipes.pump(timeout=min(guard.patience(), max(0.0, deadline - time.monotonic())))
    return hangs


def note_hang(job: Job, *, pipes: Pipes, guard: Guard, folder: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Keep what every rank was doing; answers with who can be blamed by the look of it."""
    now = time.time()
    ranks = find_ranks(folder / "ranks", living=job.descendants())
    collect(ranks, folder=folder / "ranks", out=Path(run["out"]), wait=pipes.pass_time)
    pipes.log.say(f"launcher: stacks of {len(ranks)} ranks are in {run['out']}/stacks")
    first = run["machine_rank"] * run["local_processes"]
    # Since it was so before anybody noticed, whoever can be blamed comes first.
    since = now - float(run["guard"]["hang_timeout"])
    blamed = [
        {
            **failure(time=since, kind=HANG, message=f"{STATES[one.state]}; {guard.verdict}"),
            "rank": one.rank,
            "local_rank": one.rank - first,
        }
        for one in ranks
        if one.state in STATES
    ]
    return blamed + ([failure(time=now, kind=HANG, message=guard.verdict)] if guard.decided else [])


def clear_away(job: Job, *, pipes: Pipes, bell: Bell, log: Log) -> None:
    """End every process the job left behind: ranks have sessions of their own and may outlive torchrun."""
    now = time.monotonic()
    kill_at, give_up_at = now + LEFTOVER_GRACE, now + LEFTOVER_GRACE + KILL_PATIENCE
    asked: set[int] = set()
    while left := job.left_behind():
        now = time.monotonic()
        if now >= give_up_at:
            log.say(f"launcher: these processes do not die, even of SIGKILL: {' '.join(map(str, sorted(left)))}")
            return
        killing = now >= kill_at or bell.rung > 1 or job.killed
        for pid in left if killing else left - asked:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if killing else signal.SIGTERM)
        asked |= left
        pipes.pump(timeout=0.05)


class Bell:
    """Counts the requests to stop, and wakes the selector for them and for the end of a child."""

    def __init__(self) -> None:
        self.rung = 0
        self.fd, wake = os.pipe()
        for fd in (self.fd, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in STOPPING:
            signal.signal(number, self._ring)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def _ring(self, _number: int, _frame: object) -> None:
        self.rung += 1

    def quiet(self) -> None:
        """Forget the wake-ups so far."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, CHUNK)


class Redactor:
    """Replaces the values of secrets, as they are, in base64 and in URLs, by `***`."""

    def __init__(self, values: Iterable[bytes] = ()) -> None:
        words = {word for value in values for word in spellings(value)}
        self.longest = max(map(len, words), default=0)
        longest_first = sorted(words, key=lambda word: (-len(word), word))
        self._pattern = re.compile(b"|".join(map(re.escape, longest_first))) if words else None

    def __call__(self, text: bytes) -> bytes:
        return text if self._pattern is None else self._pattern.sub(b"***", text)


def spellings(value: bytes) -> Iterator[bytes]:
    """The lines of a secret, and what URLs make of the whole, and base64 at each of the three places it may start."""
    yield from (line for line in value.splitlines() if len(line) >= SHORTEST_SECRET)
    if len(value) < SHORTEST_SECRET:
        return
    for safe in ("", "/"):
        yield quote_from_bytes(value, safe=safe).encode()
        yield quote_plus(value, safe=safe).encode()
    for shift in range(3):
        # Only the characters that depend on nothing but the value: the first and the last ones mix with neighbours.
        first = (shift * 8 + 5) // 6
        last = (shift + len(value)) * 8 // 6
        for alphabet in (None, b"-_"):
            yield base64.b64encode(b"\0" * shift + value, altchars=alphabet)[first:last]


class Lines:
    """Makes lines of one stream of bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._update = ""  # the newest overwritten text not yet shown
        self._shown = float("-inf")

    def feed(self, data: bytes, *, redact: Redactor, now: float) -> list[str]:
        """The lines that data completes."""
        block, newline, rest = (self._rest + data).rpartition(b"\n")
        self._rest = rest
        lines = list(self._finished(redact(block))) if newline else []
        if len(self._rest) > LONGEST + redact.longest:
            lines += self._cut(redact)
        if b"\r" in self._rest:
            lines += self._updates(redact, now=now)
        return lines

    def end(self, *, redact: Redactor) -> list[str]:
        """What was never ended by a newline."""
        rest, self._rest = self._rest.removesuffix(b"\r"), b""
        return list(self._finished(redact(rest))) if rest else [self._update] if self._update else []

    def _finished(self, block: bytes) -> Iterator[str]:
        self._update = ""
        if b"\r" not in block and len(block) <= LONGEST:
            yield from block.decode(errors="replace").split("\n")
            return
        for line in block.split(b"\n"):
            last = line.removesuffix(b"\r").rpartition(b"\r")[2]
            yield from (piece.decode(errors="replace") for piece in pieces(last))

    def _cut(self, redact: Redactor) -> list[str]:
        # A secret that has not wholly arrived lies within the last bytes, which stay.
        self._rest = redact(self._rest)
        *whole, last = pieces(self._rest[: len(self._rest) - redact.longest])
        self._rest = last + self._rest[len(self._rest) - redact.longest :]
        return [piece.decode(errors="replace") for piece in whole]

    def _updates(self, redact: Redactor, *, now: float) -> list[str]:
        # A last \r may yet become \r\n: it stays.
        end = b"\r" if self._rest.endswith(b"\r") else b""
        over, _, rest = self._rest.removesuffix(b"\r").rpartition(b"\r")
        self._rest = rest + end
        newest = over.rstrip(b"\r").rpartition(b"\r")[2]
        if newest:
            self._update = redact(newest).decode(errors="replace")
        if not self._update or now - self._shown < 1.0:
            return []
        self._shown = now
        shown, self._update = self._update, ""
        return [shown]


def pieces(line: bytes) -> Iterator[bytes]:
    """A line in pieces of at most LONGEST bytes, never cut inside a character; an empty line is one empty piece."""
    start = 0
    while len(line) - start > LONGEST:
        end = start + LONGEST
        while end > start + LONGEST - 4 and line[end] & 0xC0 == CONTINUES:
            end -= 1
        yield line[start:end]
        start = end
    yield line[start:]


class Log:
    """node.log, and its echo on standard output."""

    def __init__(self, path: Path) -> None:
        self.redact = Redactor()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._torn = False  # the last write stopped inside a line
        self._lost = 0
        self._echo = Echo(1)

    def say(self, text: str) -> None:
        """A line of the agent's own."""
        self.write("-", text.split("\n"))

    def write(self, rank: str, lines: list[str]) -> None:
        """Append one record per line."""
        if not lines:
            return
        stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        start = f"{stamp} {rank} "
        self._append((start + ("\n" + start).join(lines) + "\n").encode(errors="replace"), count=len(lines))
        start = "" if rank == "-" else f"[rank {rank}] "
        self._echo.write((start + ("\n" + start).join(lines) + "\n").encode(errors="replace"))

    def finish(self) -> None:
        """Give a slow reader of standard output a last second."""
        self._echo.finish()
        if self._lost:
            print(f"launcher: node.log could not take {self._lost} lines (disk full?)", file=sys.stderr)

    def _append(self, records: bytes, *, count: int) -> None:
        # A full disk must stop neither the job nor the agent.
        view = memoryview(b"\n" + records if self._torn else records)
        try:
            while view:
                view = view[os.write(self._file, view) :]
            self._torn = False
        except OSError:
            self._torn = self._torn or len(view) < len(records)
            self._lost += count


class Echo:
    """Standard output for people: never waits for its reader, never minds that nobody reads."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd
        self._waiting = bytearray()
        self._dropped = 0

    def write(self, lines: bytes) -> None:
        """Pass on whole lines, or none of them when the reader is far behind."""
        if self._fd is None:
            return
        if len(self._waiting) + len(lines) > ECHO_LIMIT:
            self._dropped += lines.count(b"\n")
        else:
            if self._dropped:
                self._waiting += b"launcher: %d lines are in node.log only\n" % self._dropped
                self._dropped = 0
            self._waiting += lines
        self.flush(timeout=0)

    def flush(self, *, timeout: float) -> None:
        """Write while the reader takes it: a pipe that polls writable takes PIPE_BUF bytes without blocking."""
        done = 0
        while self._fd is not None and done < len(self._waiting) and is_writable(self._fd, timeout=timeout):
            try:
                done += os.write(self._fd, self._waiting[done : done + select.PIPE_BUF])
            except BlockingIOError:
                break
            except OSError:
                self._fd = None
        del self._waiting[:done]

    def finish(self) -> None:
        """Write the rest if the reader takes it within a second at a time."""
        self.flush(timeout=1.0)


def is_writable(fd: int, *, timeout: float) -> bool:
    """Whether a write would not block; also true where it would fail at once."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(timeout * 1000))


class Pipes:
    """All streams of the job: one FIFO per rank, and one pipe for torchrun itself."""

    def __init__(self, folder: Path, *, run: dict[str, Any], log: Log, bell: Bell, guard: Guard) -> None:
        self.log, self._bell, self._guard = log, bell, guard
        self._streams: dict[int, tuple[str, Lines]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(bell.fd, selectors.EVENT_READ)
        if guard.fd is not None:
            self._selector.register(guard.fd, selectors.EVENT_READ)
        ours, self.job_end = os.pipe()
        self._add(ours, "-")
        (folder / "pipes").mkdir()
        for name in ("errors", "ranks", "ranks/flight"):
            (folder / name).mkdir()
        first = run["machine_rank"] * run["local_processes"]
        for local_rank in range(run["local_processes"]):
            fifo = folder / "pipes" / str(local_rank)
            os.mkfifo(fifo, 0o600)
            # Read and write: with a writer of our own there is no end of file when a rank ends or starts again.
            self._add(os.open(fifo, os.O_RDWR), str(first + local_rank))

    def _add(self, fd: int, rank: str) -> None:
        os.set_blocking(fd, False)
        with contextlib.suppress(OSError):  # not Linux, or beyond this user's allowance: then it stays 64 KiB
            fcntl.fcntl(fd, F_SETPIPE_SZ, 1024 * 1024)
        self._streams[fd] = (rank, Lines())
        self._selector.register(fd, selectors.EVENT_READ)

    def close_job_end(self) -> None:
        """The job holds its own copy now."""
        os.close(self.job_end)

    def pump(self, *, timeout: float) -> bool:
        """Wait for something to read and write it down; False if there was nothing."""
        any_read = False
        for key, _events in self._selector.select(timeout):
            if key.fd == self._bell.fd:
                self._bell.quiet()
            elif key.fd != self._guard.fd:
                any_read |= self._read(key.fd)
        self._guard.turn()
        return any_read

    def pass_time(self, seconds: float) -> None:
        """Go on carrying lines for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.pump(timeout=left)

    def _read(self, fd: int) -> bool:
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(fd)
            return False
        rank, lines = self._streams[fd]
        if rank != "-":
            self._guard.progress(time.monotonic())
        self.log.write(rank, lines.feed(data, redact=self.log.redact, now=time.monotonic()))
        return True

    def drain(self) -> None:
        """Read what is left once every writer is gone, then the lines that have no end."""
        while self.pump(timeout=0):
            pass
        for rank, lines in self._streams.values():
            self.log.write(rank, lines.end(redact=self.log.redact))


class Job:
    """launch.py in a session of its own, and everything that descends from it."""

    def __init__(self, run: dict[str, Any], *, folder: Path, output: int) -> None:
        self.code = -1
        self.killed = False
        self.told: float | None = None  # when it was first asked to end
        self._process = subprocess.Popen(
            [sys.executable, str(Path(run["files"], "launch.py")), *run["launch"]],
            cwd=run["workdir"],
            env=environment(run, folder=folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def has_ended(self) -> bool:
        """Whether launch.py has; takes leave of every dead child on the way."""
        while self._process.returncode is None:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == self._process.pid:
                self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
        return self._process.returncode is not None

    def signal(self, number: signal.Signals) -> None:
        """To launch.py and its process group; torchrun passes it on to the ranks."""
        self.killed = self.killed or number is signal.SIGKILL
        self.told = self.told or time.time()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def left_behind(self) -> set[int]:
        """The living processes that descend from us: as their subreaper we inherit every orphan of the job."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return self.descendants()

    def descendants(self) -> set[int]:
        """The same while the job goes on: its end is still to be heard of, so nobody is taken leave of."""
        parents = dict(living_processes())
        found: set[int] = set()
        edge = {os.getpid()}
        while edge:
            edge = {pid for pid, parent in parents.items() if parent in edge} - found
            found |= edge
        return found


def living_processes() -> Iterator[tuple[int, int]]:
    """(process id, parent's id) of every process that is not a zombie; none where there is no /proc."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may itself hold spaces and parentheses.
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(entry.parent.name), int(parent)


def environment(run: dict[str, Any], *, folder: Path) -> dict[str, str]:
    """What the job sees: ours, the run's, where its secrets lie, and where its helpers report."""
    defaults = {"PYTHONUNBUFFERED": "1", "PET_SHUTDOWN_TIMEOUT": str(max(1, int(run["stop_grace"])))}
    defaults |= {"LAUNCHER_RUN": run["run"]}  # the container may say another one, whose work this one goes on with
    if run["backend"] == "gloo":
        defaults |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        # NCCL's flight recorder: it keeps the last collectives, and writes them down at a timeout or when asked.
        record = str(folder / "ranks" / "flight" / "rank_")
        defaults |= {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}
        defaults |= {"TORCH_FR_DUMP_TEMP_FILE": record, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": record}
        defaults |= {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE": record, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    ours = {
        "LAUNCHER_NODE": run["node"],
        "LAUNCHER_WORLD_SIZE": str(run["world_size"]),
        "LAUNCHER_BACKEND": run["backend"] or "",
        "LAUNCHER_NVME": os.pathsep.join(run["nvme"]),
        "LAUNCHER_SECRETS": os.pathsep.join(str(Path(run["secrets_dir"], name)) for name in run["secrets"]),
        "LAUNCHER_PIPES": str(folder / "pipes"),
        "LAUNCHER_ERRORS": str(folder / "errors"),
        "LAUNCHER_RANKS": str(folder / "ranks"),
        "LAUNCHER_FAILURES": str(folder / "failures.json"),
    }
    asked: dict[str, str] = run["env"]
    return defaults | dict(os.environ) | asked | ours


def wait_for_secrets(run: dict[str, Any], *, bell: Bell) -> dict[str, bytes] | str:
    """The secrets by name once they have all arrived; else what is wrong."""
    names = run["secrets"]
    folder = Path(run["secrets_dir"] or "/nonexistent")
    deadline = time.monotonic() + SECRETS_PATIENCE
    while names and not (folder / ".complete").exists():
        if bell.rung:
            return "launcher: told to stop while waiting for secrets"
        if time.monotonic() > deadline:
            return f"launcher: secrets {', '.join(names)} did not arrive in {folder} within {SECRETS_PATIENCE:.0f} s"
        time.sleep(0.05)
    try:
        return {name: (folder / name).read_bytes().removesuffix(b"\n") for name in names}
    except OSError as error:
        return f"launcher: a secret is missing in {folder}: {error}"


def read_failures(folder: Path, *, run: dict[str, Any], redact: Redactor) -> list[dict[str, Any]]:
    """What torchrun saw, made more exact by what the ranks noted themselves; the first cause first."""
    seen: list[dict[str, Any]] = load(folder / "failures.json", default=[])
    fell = load(folder / "ranks" / "fell.json", default=None)
    if fell and all(record["rank"] != fell["rank"] for record in seen):
        seen.append(fell)
    notes = {note["rank"]: note for path in (folder / "errors").glob("*.json") if (note := load(path, default=None))}
    records = [{**record, **notes.pop(record["rank"], {})} for record in seen]
    records += [{**failure(time=0.0), **note} for note in notes.values()]
    first = run["machine_rank"] * run["local_processes"]
    for record in records:
        record["local_rank"] = None if record["rank"] is None else record["rank"] - first
        record["message"] = redact(record["message"].encode(errors="replace")).decode(errors="replace")
    return sorted(records, key=lambda record: float(record["time"]))


def full_places(run: dict[str, Any]) -> list[str]:
    """The folders that a job fills and that have no room left: not every library tells so when it cannot write."""
    full = []
    for place in filter(None, (os.environ.get("LAUNCHER_CHECKPOINTS"), *run["nvme"])):
        with contextlib.suppress(OSError):
            room = os.statvfs(place)
            if room.f_blocks and room.f_bavail * room.f_frsize < FULL:
                full.append(place)
    return full


def failure(*, time: float, kind: str | None = None, message: str = "") -> dict[str, Any]:
    """One record of exit.json."""
    return {
        "rank": None,
        "local_rank": None,
        "exit_code": 1,
        "signal": None,
        "time": time,
        "type": kind,
        "message": message,
    }


def load(path: Path, *, default: Any) -> Any:
    """A JSON file; the default if it is missing or was never finished."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def ending(
    run: dict[str, Any],
    *,
    code: int,
    started: float,
    stopped: bool,
    failures: list[dict[str, Any]],
    oom: bool = False,
) -> dict[str, Any]:
    """This node's part of exit.json, which is also a report (cause.py); and under "status" our own exit status."""
    status = code if code >= 0 else 128 - code
    return {
        "run": run["run"],
        "node": run["node"],
        "machine_rank": run["machine_rank"],
        "code": status,
        "signal": signal_name(-code) if code < 0 else None,
        "started": started,
        "ended": time.time(),
        "stopped": stopped,
        "oom": oom,
        "failures": failures,
        "status": status,
        "time": time.time(),
        "lost": "",
    }


def with_others(ended: dict[str, Any], guard: Guard) -> dict[str, Any]:
    """The whole of exit.json: with what was heard of the other nodes, and the first cause of all."""
    others = guard.others(now=time.monotonic(), wall=time.time())
    found = first_cause([{**ended, "others": others}])
    return {**ended, "clock": guard.clock, "others": others, "cause": found and found[1]}


def oom_kills() -> int:
    """How many processes of this container the kernel has killed for memory; 0 where it does not tell (cgroup 1, 2)."""
    for place in ("memory.events", "memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            said = Path("/sys/fs/cgroup", place).read_text().split()
            return int(said[said.index("oom_kill") + 1])
    return 0


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def write_exit(path: Path, ended: dict[str, Any]) -> None:
    """Whole or not at all, also over a power cut."""
    text = json.dumps({key: value for key, value in ended.items() if key not in OURS}, indent=1) + "\n"
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


def hold_standard_streams() -> None:
    """If standard streams were closed, occupy their numbers: another file must not receive the echo."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004 - standard error
        pass
    os.close(fd)


def adopt_orphans() -> None:
    """Become the parent of every orphaned descendant, so that none can escape. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The hand of the engine seam that needs no Docker: the same contract by processes on this machine.

A "container" is a folder with its specification, and a keeper process (this file, run as a program) that starts the
program in a session of its own, hands on SIGTERM, collects what the program leaves behind, and writes down how it
ended; so a job lives on when the launcher does not. The "image" is the Python environment that runs the launcher.
There is no isolation: mounts are not needed, since the job sees this machine's own paths.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import BinaryIO

from cluster.command import Command, Result
from cluster.container import Container, ContainerSpec, ContainerState
from cluster.errors import EngineError, ImageError, LockedError
from cluster.layers import Held, Store

IMAGE = "process"
# What a job needs of the environment; their versions are the identity of the "image".
_PACKAGES = ("torch", "accelerate", "deepspeed", "transformers")
# Every process of a container carries this variable with its id: so none of ours is lost, none else hit.
_MARK = "LAUNCHER_CONTAINER"
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A folder that vanishes while we read it, or holds something else.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "USER", "LOGNAME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")


class ProcessEngine:
    """This machine as an engine. `root` is where the containers' folders stand, one user's own."""

    def __init__(self, node: str, root: Path) -> None:
        self.node = node
        self._root = root

    def version(self) -> str:
        return f"processes of {sys.executable}"

    # The image: this Python environment

    def image_id(self, name: str) -> str | None:
        if name != IMAGE and not name.startswith("sha256:"):
            return None
        try:
            versions = [f"{package}=={importlib.metadata.version(package)}" for package in _PACKAGES]
        except importlib.metadata.PackageNotFoundError as error:
            raise ImageError(
                self.node,
                f"this Python has no {error.name}, which a job without Docker needs",
                next_step=f"{sys.executable} -m pip install 'launcher[local]'",
            ) from error
        digest = "sha256:" + hashlib.sha256("\n".join([sys.version, sys.prefix, *versions]).encode()).hexdigest()
        return digest if name in (IMAGE, digest) else None

    def image_bytes(self, name: str) -> int:  # noqa: ARG002 - the seam's
        return 0

    def build(
        self,
        context: BinaryIO,
        *,
        tag: str,
        arguments: Mapping[str, str],
        labels: Mapping[str, str],
        network: str | None,
        tell: Callable[[Mapping[str, object]], None],
    ) -> str:
        raise self._no_images(context, tag, arguments, labels, network, tell)

    def save(self, name: str) -> Iterator[bytes]:
        raise self._no_images(name)

    def load(self, chunks: Iterable[bytes]) -> None:
        raise self._no_images(chunks)

    def tag(self, image: str, name: str) -> None:
        raise self._no_images(image, name)

    def image(self, name: str) -> Held | None:
        digest = self.image_id(name)
        return Held(id=digest, tags=(IMAGE,)) if digest else None

    def held(self) -> tuple[Held, ...]:
        found = self.image(IMAGE)
        return (found,) if found else ()

    def store(self) -> Store:
        return "other"

    def push(self, image: str, *, reference: str, user: str, secret: str) -> None:
        raise self._no_images(image, reference, user, secret)

    def remove_image(self, name: str) -> bool:  # noqa: ARG002 - the seam's
        return False

    def _no_images(self, *_asked: object) -> EngineError:
        return EngineError(self.node, "the process engine has no images", next_step="use engine: docker")

    # Containers: folders and keepers

    def create(self, spec: ContainerSpec) -> str:
        with self._translated("create"):
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Made beside its name and then renamed: none is ever seen half, and of many only one gets the name. Below
            # the name a folder that no other container ever has: who holds an old id does not hit its successor.
            fresh = Path(tempfile.mkdtemp(prefix=".", dir=self._root))
            folder = fresh / secrets.token_hex(4)
            folder.mkdir()
            _write(folder / "spec.json", _spec_to_json(spec))
            try:
                fresh.rename(self._root / spec.name)
            except OSError as error:
                shutil.rmtree(fresh)
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                raise LockedError(
                    f"a container named {spec.name} is already there", where=f"node {self.node}"
                ) from None
        return f"{spec.name}/{folder.name}"

    def start(self, container: str) -> None:
        folder = self._root / container
        with self._translated("start"):
            spec = _load(folder)
            if spec.secrets_dir:
                Path(spec.secrets_dir).mkdir(mode=0o700)
            with (folder / "log").open("ab") as log:
                keeper = subprocess.Popen(
                    [sys.executable, "-m", "cluster.processes", str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=_environment(spec, container),
                    # From beside the package, so that it is found whatever the job's own folder holds.
                    cwd=Path(__file__).parents[1],
                )
        # It writes down itself that it is there: whoever dies now, a living keeper can be found.
        while not (folder / "keeper.json").exists():
            if keeper.poll() is not None:
                raise EngineError(
                    self.node, f"the container {container} does not start", detail=(self.logs(container, tail=3),)
                )
            time.sleep(0.01)
        # The keeper outlives us by design: that nobody waits for it here is no mistake to be warned of.
        keeper.returncode = 0

    def find(self, labels: Mapping[str, str]) -> tuple[Container, ...]:
        # A name that begins with a dot is one that is being made or removed: `glob` passes it over.
        found = glob("*/*", root_dir=self._root)  # noqa: PTH207 - Path.glob fails when a folder goes while it looks
        seen = (self._seen(self._root / one) for one in sorted(found))
        return tuple(one for one in seen if one and _carries(one.labels, labels))

    def wait(self, container: str) -> Container:
        while True:
            seen = self._seen(self._root / container)
            if seen is None or (self._root / container / "removing").exists():
                raise EngineError(self.node, f"the container {container} was removed")
            if seen.state is ContainerState.ENDED:
                return seen
            time.sleep(0.05)

    def stop(self, container: str, *, grace: float) -> None:
        seen = self._seen(self._root / container)
        if seen is None or not seen.is_live:
            return
        _signal(_keeper(self._root / container), signal.SIGTERM)
        end = time.monotonic() + grace
        while time.monotonic() < end:
            seen = self._seen(self._root / container)
            if seen is None or not seen.is_live:
                return
            time.sleep(0.05)
        self._kill(container)

    def remove(self, container: str) -> None:
        folder = self._root / container
        if not folder.is_dir():
            return
        with suppress(OSError):
            (folder / "removing").touch()  # who waits learns that it did not end by itself
        self._kill(container)
        with suppress(*_UNREADABLE):
            _forget_secrets(_load(folder))
        # Renamed first, so that a half-removed one is never taken for a container.
        gone = tempfile.mkdtemp(prefix=".", dir=self._root)
        with suppress(FileNotFoundError):  # somebody else was faster
            folder.rename(gone)
        with suppress(OSError):  # its name is free; or taken again
            folder.parent.rmdir()
        shutil.rmtree(gone, ignore_errors=True)

    def logs(self, container: str, *, tail: int) -> str:
        try:
            return "\n".join((self._root / container / "log").read_text(errors="replace").splitlines()[-tail:])
        except OSError:
            return ""

    def execute(self, container: str, command: Command) -> Result:
        seen = self._seen(self._root / container)
        if seen is None or not seen.is_live:
            return Result(code=1, stdout=b"", stderr=f"the container {container} is not running\n".encode())
        with self._translated("execute"):
            spec = _load(self._root / container)
        try:
            done = subprocess.run(
                list(command.argv),
                input=command.stdin,
                capture_output=True,
                env=_environment(spec, container),
                cwd=spec.workdir,
                check=False,
            )
        except OSError as error:
            return Result(code=127, stdout=b"", stderr=f"{error}\n".encode())
        return Result(code=_shell_code(done.returncode), stdout=done.stdout, stderr=done.stderr)

    def interactive(self, container: str, argv: tuple[str, ...], *, tty: bool) -> Command:  # noqa: ARG002 - the seam's
        with self._translated("enter"):
            spec = _load(self._root / container)
        variables = (f"{key}={value}" for key, value in _environment(spec, container).items())
        return Command(argv=("env", "-C", spec.workdir or "/", *variables, *argv))

    def close(self) -> None:
        pass

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            raise EngineError(self.node, f"cannot {doing} the container: {error}") from error

    def _kill(self, container: str) -> None:
        _end_all(container, _keeper(self._root / container))

    def _seen(self, folder: Path) -> Container | None:
        try:
            spec = _load(folder)
            state, code, started = _life(folder)
        except _UNREADABLE:  # removed while we look
            return None
        return Container(
            id=f"{folder.parent.name}/{folder.name}",
            name=spec.name,
            image=spec.image,
            state=state,
            labels=spec.labels,
            code=code,
            started=started,
        )


def _life(folder: Path) -> tuple[ContainerState, int | None, str | None]:
    """State, exit code and start. The keeper's last word is written before it ends, so it is looked for after it."""
    if not (folder / "keeper.json").exists():
        return ContainerState.CREATED, None, None
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(float(str(_read(folder / "keeper.json")["started"]))))
    alive = _keeper(folder)
    if (folder / "exit.json").exists():
        return ContainerState.ENDED, int(str(_read(folder / "exit.json")["code"])), started
    return (ContainerState.RUNNING, None, started) if alive else (ContainerState.ENDED, 137, started)


def _carries(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value if value else key in labels for key, value in wanted.items())


def _environment(spec: ContainerSpec, container: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}"
    return {**kept, **spec.env, _MARK: container}


def _members(container: str) -> list[int]:
    """Processes that carry the container's mark (Linux; elsewhere the keeper's own group is what is known)."""
    wanted = f"{_MARK}={container}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return [pid for pid in found if pid != os.getpid()]


def _end_all(container: str, *others: int) -> None:
    """End every process of the container; those that are born meanwhile too."""
    for _ in range(50):
        members = [*_members(container), *(pid for pid in others if pid and _born(pid))]
        if not members:
            return
        for pid in members:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.02)


def _keeper(folder: Path) -> int:
    """The keeper's process id, 0 when it has ended (a process id may since belong to somebody else)."""
    try:
        kept = _read(folder / "keeper.json")
    except (OSError, ValueError):
        return 0
    pid = int(str(kept["pid"]))
    return pid if kept["born"] == _born(pid) != "" else 0


def _born(pid: int) -> str:
    """When a process began, in the system's own unit; empty when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if sys.platform == "linux":
            return ""
    said = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return said.stdout.strip()


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        if pid:
            os.kill(pid, number)
    except ProcessLookupError:
        return


def _spec_to_json(spec: ContainerSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "image": spec.image,
        "argv": list(spec.argv),
        "labels": dict(spec.labels),
        "env": dict(spec.env),
        "workdir": spec.workdir,
        "secrets_dir": spec.secrets_dir,
    }


def _spec_from_json(said: Mapping[str, object]) -> ContainerSpec:
    values = dict(said)
    values["argv"] = tuple(values["argv"])  # type: ignore[arg-type]
    return ContainerSpec(**values)  # type: ignore[arg-type]


def _load(folder: Path) -> ContainerSpec:
    return _spec_from_json(_read(folder / "spec.json"))


def _forget_secrets(spec: ContainerSpec) -> None:
    if spec.secrets_dir:
        shutil.rmtree(spec.secrets_dir, ignore_errors=True)


def _shell_code(code: int) -> int:
    """Python's way to tell of a signal, as a shell tells it."""
    return code if code >= 0 else 128 - code


def _read(path: Path) -> dict[str, object]:
    said = json.loads(path.read_text())
    return said if isinstance(said, dict) else {}


def _write(path: Path, values: Mapping[str, object]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values))
    partial.rename(path)


def keep(folder: Path) -> int:
    """Be the keeper: run the program, hand on SIGTERM, reap what it leaves, write down how it ended."""
    if sys.platform == "linux":
        # PR_SET_CHILD_SUBREAPER: orphans of the program become ours, as they would become tini's in a container.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    spec = _load(folder)
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_ON)  # until there is somebody to hand them on to
    _write(folder / "keeper.json", {"pid": os.getpid(), "born": _born(os.getpid()), "started": time.time()})
    try:
        code = _run(spec)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        code = 127
    _end_all(os.environ[_MARK])
    _forget_secrets(spec)
    _write(folder / "exit.json", {"code": _shell_code(code), "ended": time.time()})
    return 0


def _run(spec: ContainerSpec) -> int:
    program = subprocess.Popen(
        list(spec.argv),
        cwd=spec.workdir,
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON),  # noqa: PLW1509 - one thread only
    )
    for number in _HANDED_ON:
        signal.signal(number, lambda got, _frame: _signal(program.pid, signal.Signals(got)))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)
    while program.returncode is None:
        pid, status = os.wait()  # the program, or an orphan that became ours
        if pid == program.pid:
            program.returncode = os.waitstatus_to_exitcode(status)
    return program.returncode


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1])))

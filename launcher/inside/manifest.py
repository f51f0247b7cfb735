"""What a node holds of its checkpoints: lists them, hashes them, and writes it down while they are still true.

Usage: python3 manifest.py watch RUN_JSON --since TIME      beside a job: seals every checkpoint that has become quiet
       python3 manifest.py seal RUN_JSON --since TIME       once, after the job
       python3 manifest.py list [--below FOLDER] [--brief] [--blind] [--unit UNIT]...
       python3 manifest.py hash [--below FOLDER] [--whole] --unit UNIT...
       python3 manifest.py state [--below FOLDER] --unit UNIT --node NODE     the manifest comes on standard input

Needs Python alone; never loads a pickle. FOLDER is the checkpoints folder, LAUNCHER_CHECKPOINTS where it is not given.
RUN_JSON is that of agent.py; what was written before TIME (in seconds since 1970) is another run's. `list` and `hash`
print {"units": [{"unit", "style", "tag", "latest", "parts", "odd",
"manifests"}]}; launcher/shards.py says what a unit is, and reads it.

A manifest is `.launcher-manifest.<node>.json` in the unit: {"version", "node", "run", "unit", "tag", "ranks",
"world_size", "piece", "made", "latest", "parts": [{"path", "bytes", "pieces", "sha256", "modified", "step",
"world"}], "seal"}, where the seal is the SHA-256 of all the rest. It is written beside its name, to the disk, and then
renamed. A checkpoint is sealed when every process of this node has written all its files, each of them whole by its
outer form, and nothing has changed for some seconds; sealed again only when its files were written again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import stat
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PIECE = 8 * 1024 * 1024
QUIET = 5.0  # seconds without a change before a checkpoint counts as written
EVERY = 2.0  # seconds between two looks; more where one look takes long
PATIENT = 20  # times as long as a look takes
THREADS = 4  # that hash at once when nothing else is done with the node
HEAD = 64 * 1024 * 1024  # of the table of a torch file that is looked through

OURS = ".launcher-"
MANIFEST = re.compile(r"\.launcher-manifest\.[a-z0-9-]{1,41}\.json")
WHOLE = ("gathered", "exported")  # copies that are made by commands, not by jobs
SHARD = re.compile(r"(?:mp_rank|(?:bf16_)?zero_pp_rank|expp_rank|layer)_.*_?states\.pt")
OPTIM = re.compile(r"(?:bf16_)?(zero_pp_rank_(\d+)_mp_rank_(\d\d))_?optim_states\.pt")
MODEL_3 = re.compile(r"(zero_pp_rank_(\d+)_mp_rank_(\d\d))_model_states\.pt")
RANDOM = re.compile(r"random_states_(\d+)\.pkl")
TAG = re.compile(r"pytorch_model(_\d+)?")
# How a pickle of protocol 2 to 5 says that a key has a small number: its name, a place in the memo, the number.
NUMBER = rb"(?:[q\x71].|r....|\x94)?(?:K(.)|M(..)|J(....))"
LONGEST_LATEST = 1024
CLOCKS = 2.0  # seconds by which a file's time may lie behind ours
PR_SET_PDEATHSIG = 1

Seen = tuple[tuple[tuple[str, int, int], ...], float]


def main(argv: list[str]) -> int:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["watch", "seal", "list", "hash", "state"])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--below", default=os.environ.get("LAUNCHER_CHECKPOINTS", ""))
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--unit", action="append", dest="units")
    parser.add_argument("--node", default="")
    parser.add_argument("--since", type=float, default=0.0)
    asked = parser.parse_args(argv)
    root = Path(asked.below or ".")
    if asked.verb in ("watch", "seal"):
        run = json.loads(Path(asked.run).read_text(encoding="utf-8"))
        return be_beside(run, root=root, since=asked.since, once=asked.verb == "seal")
    if asked.verb == "state":
        write_whole(root / asked.units[0] / manifest_name(asked.node), sys.stdin.read())
        return 0
    how = {"read": asked.verb == "hash", "whole": asked.whole, "peek": not asked.blind}
    print(json.dumps({"units": listing(root, asked.units, brief=asked.brief, **how)}))
    return 0


# --- beside a job --------------------------------------------------------------------------------------------------


def be_beside(run: dict[str, Any], *, root: Path, since: float, once: bool) -> int:
    """Seal what the run writes; `once` without waiting for it to become quiet, since nobody writes any more."""
    with contextlib.suppress(OSError):
        os.nice(19)
    die_with_parent()
    seen: dict[str, Seen] = {}
    while True:
        looked = time.monotonic()
        for unit in find_units(root):
            with contextlib.suppress(OSError, ValueError):
                settle(root, unit, run=run, since=since, seen=None if once else seen, moment=time.monotonic())
        if once:
            return 0
        time.sleep(max(EVERY, PATIENT * (time.monotonic() - looked)))


def settle(
    root: Path,
    unit: str,
    *,
    run: dict[str, Any],
    since: float,
    seen: dict[str, Seen] | None = None,
    moment: float = 0.0,
) -> None:
    """Seal a unit if it is this run's, whole here, and quiet.

    `seen` holds since which `moment` each has looked as it does; None: nobody writes any more.
    """
    entries, odd = files_of(root / unit)
    now = tuple((path, info.st_size, info.st_mtime_ns) for path, info in entries)
    if seen is not None:
        before = seen.get(unit)
        if before is None or before[0] != now:
            seen[unit] = (now, moment)
            return
        if moment - before[1] < QUIET:
            return
    if odd or max((info.st_mtime for _, info in entries), default=0.0) < since - CLOCKS:
        return
    sealed = read_manifest(root / unit / manifest_name(run["node"]))
    if sealed is not None and now == tuple((one["path"], one["bytes"], one["changed"]) for one in sealed["parts"]):
        return
    if not is_whole_here([path for path, _ in entries], ranks=ranks_of(run)):
        return
    parts = [describe(root / unit, path, info, read=True, whole=True, known=sealed) for path, info in entries]
    again, _ = files_of(root / unit)
    if not all(part["sound"] for part in parts) or now != tuple((path, i.st_size, i.st_mtime_ns) for path, i in again):
        return
    style, tag, latest = kind_of(root, unit)
    said = {
        "version": 1,
        "node": run["node"],
        "run": run["run"],
        "unit": unit,
        "tag": tag,
        "ranks": ranks_of(run),
        "world_size": run["world_size"],
        "piece": PIECE,
        "made": time.time(),
        "latest": latest if style == "accelerate" else None,
        "parts": [{key: part[key] for key in SAID} for part in parts],
    }
    write_whole(root / unit / manifest_name(run["node"]), json.dumps({**said, "seal": seal_of(said)}) + "\n")


SAID = ("path", "bytes", "pieces", "sha256", "modified", "changed", "step", "world")


def ranks_of(run: dict[str, Any]) -> list[int]:
    """The processes of this node."""
    first = run["machine_rank"] * run["local_processes"]
    return list(range(first, first + run["local_processes"]))


def is_whole_here(paths: list[str], *, ranks: list[int]) -> bool:
    """Whether every process of this node has written what such a checkpoint has of each."""
    names = {path.rpartition("/")[2] for path in paths}
    optim = {match[1] for one in names if (match := OPTIM.fullmatch(one))}
    model = {match[1] for one in names if (match := MODEL_3.fullmatch(one))}
    random = {int(match[1]) for one in names if (match := RANDOM.fullmatch(one))}
    below = any(TAG.fullmatch(path.partition("/")[0]) for path in paths)
    if (below or random) and not random.issuperset(ranks):
        return False  # Accelerate writes these last, when the shards of all processes are there
    if model and model != optim:
        return False
    single = not any(int(match[3]) for one in names if (match := OPTIM.fullmatch(one)))
    own = {int(match[2]) for one in names if (match := OPTIM.fullmatch(one))}
    return not (optim and single) or own.issuperset(ranks)


def die_with_parent() -> None:
    """Nobody needs this when the agent is gone. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# --- what there is -------------------------------------------------------------------------------------------------


def listing(root: Path, units: list[str] | None, *, brief: bool, **how: bool) -> list[dict[str, Any]]:
    """Every unit, or the named ones as far as they are there: its files, read or not, and its manifests."""
    there = find_units(root, whole=True) if units is None else (one for one in units if is_plain_below(root, one))
    found = []
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for unit in list(there):
            with contextlib.suppress(OSError):
                found.append(look_at(root, unit, brief=brief, how=how, pool=pool))
    return found


def look_at(root: Path, unit: str, *, brief: bool, how: dict[str, Any], pool: ThreadPoolExecutor) -> dict[str, Any]:
    """One unit."""
    folder = root / unit
    entries, odd = files_of(folder)

    def one(entry: tuple[str, os.stat_result]) -> dict[str, Any] | None:
        try:
            return describe(folder, *entry, **how)
        except OSError as error:
            odd.append((entry[0], f"it cannot be read: {error.strerror}"))
            return None

    # Threads are for what is large.
    each = pool.map if sum(info.st_size for _, info in entries) > PIECE else map
    parts = [part for part in each(one, entries) if part is not None]
    style, tag, latest = kind_of(root, unit)
    manifests = {name: shorten(text) if brief else text for name, text in manifest_texts(folder)}
    return {
        "unit": unit,
        "style": style,
        "tag": tag,
        "latest": latest,
        "parts": parts,
        "odd": odd,
        "manifests": manifests,
    }


def find_units(root: Path, *, whole: bool = False, below: str = "") -> Iterator[str]:
    """The checkpoints below a folder, as paths from it; links are not followed."""
    folders, names = [], set()
    try:
        with os.scandir(root / below) as found:
            for entry in found:
                names.add(entry.name)
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    folders.append(entry.name)
    except OSError:
        return
    if any(RANDOM.fullmatch(name) or SHARD.fullmatch(name) for name in names) or any(map(TAG.fullmatch, folders)):
        yield below or "."
        return
    for name in sorted(folders):
        if below or whole or name not in WHOLE:
            yield from find_units(root, whole=whole, below=f"{below}/{name}" if below else name)


def files_of(folder: Path) -> tuple[list[tuple[str, os.stat_result]], list[tuple[str, str]]]:
    """(path, state) of every plain file of a unit, and (path, what it is) of every other entry; ours left out."""
    files: list[tuple[str, os.stat_result]] = []
    odd: list[tuple[str, str]] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(folder / below) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            path = below + entry.name
            if not below and (entry.name.startswith(OURS) or entry.name in ("latest", "latest_universal")):
                continue
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                waiting.append(path + "/")
            elif stat.S_ISREG(info.st_mode):
                files.append((path, info))
            else:
                odd.append((path, what_is(info.st_mode)))
    return sorted(files, key=lambda one: one[0]), odd


def what_is(mode: int) -> str:
    """An entry that is no file, in words."""
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((word for test, word in kinds if test(mode)), "a device")


def kind_of(root: Path, unit: str) -> tuple[str, str, str | None]:
    """(style, tag, what `latest` says) of a unit; `latest` lies in Accelerate's and above DeepSpeed's."""
    folder = root / unit
    tags = sorted(name for name in os.listdir(folder) if TAG.fullmatch(name))  # noqa: PTH208 - only the names
    if tags:
        return "accelerate", tags[0], read_latest(folder)
    if any(SHARD.fullmatch(name) for name in os.listdir(folder)):  # noqa: PTH208
        return "deepspeed", Path(unit).name, read_latest(folder.parent) if unit != "." else None
    return "plain", "", None


def read_latest(folder: Path) -> str | None:
    """What `latest` says; None where there is none."""
    try:
        with open_plain(folder, "latest") as file:
            return str(file.read(LONGEST_LATEST).decode(errors="replace"))
    except OSError:
        return None


def is_plain_below(root: Path, unit: str) -> bool:
    """Whether a unit is a folder below the root, with no link on the way."""
    place = root
    for name in unit.split("/"):
        place = place / name
        if name in ("", "..") or place.is_symlink():
            return False
    return place.is_dir()


# --- one file ------------------------------------------------------------------------------------------------------


def describe(
    folder: Path,
    path: str,
    info: os.stat_result,
    *,
    read: bool,
    whole: bool,
    peek: bool = True,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One file: its size, what it tells of itself, and with `read` its hashes (with `whole` that of all of it too).

    What `known`, an earlier manifest, says of the same unchanged file is not computed again.
    """
    part: dict[str, Any] = {
        "path": path,
        "bytes": info.st_size,
        "modified": info.st_mtime,
        "changed": info.st_mtime_ns,
        "sha256": "",
        "pieces": None,
        "step": None,
        "world": None,
        "sound": True,
        "zeros": False,
    }
    old = next((one for one in (known or {}).get("parts", ()) if one["path"] == path), None)
    if old is not None and (old["bytes"], old["changed"]) == (info.st_size, info.st_mtime_ns):
        return {**part, **{key: old[key] for key in SAID}}
    with open_plain(folder, path) as file:
        if peek:
            part["sound"], part["step"], part["world"] = look_into(file, path, info.st_size)
        if read:
            file.seek(0)
            part["bytes"], part["pieces"], part["sha256"], part["zeros"] = hash_of(file, whole=whole)
    return part


def open_plain(folder: Path, path: str) -> Any:
    """A plain file, opened without following any link below its folder."""
    names = path.split("/")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names[:-1]:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        file = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{path} is no plain file")
    return os.fdopen(file, "rb", buffering=0)


def hash_of(file: Any, *, whole: bool) -> tuple[int, list[str], str, bool]:
    """(bytes, hashes of the pieces, hash of all, whether all are zero) of a file."""
    everything, pieces, length, zeros = hashlib.sha256(), [], 0, True
    buffer = bytearray(min(PIECE, os.fstat(file.fileno()).st_size) or 1)
    while taken := read_full(file, buffer):
        piece = memoryview(buffer)[:taken]
        pieces.append(hashlib.sha256(piece).hexdigest())
        if whole:
            everything.update(piece)
        zeros = zeros and not bytes(piece[:4096]).strip(b"\0") and not bytes(piece).strip(b"\0")
        length += taken
    return length, pieces, everything.hexdigest() if whole else "", bool(length) and zeros


def read_full(file: Any, buffer: bytearray) -> int:
    """Fill a buffer as far as the file goes."""
    view, done = memoryview(buffer), 0
    while done < len(buffer) and (taken := file.readinto(view[done:])):
        done += taken
    return done


def look_into(file: Any, path: str, length: int) -> tuple[bool, int | None, int | None]:
    """(whether its outer form is whole, the step, the number of processes) as a file itself tells them."""
    name = path.rpartition("/")[2]
    if name.endswith(".safetensors"):
        return is_whole_safetensors(file, length), None, None
    if not name.endswith((".pt", ".pkl", ".bin", ".pth")):
        return True, None, None
    head = file.read(4)
    if head != b"PK\x03\x04":
        return bool(head.strip(b"\0")), None, None  # another form of pickle, of which nothing is known
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            if not infos or max(info.header_offset + info.compress_size for info in infos) > length:
                return False, None, None
            return True, *told_by(archive, name)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return False, None, None


def told_by(archive: zipfile.ZipFile, name: str) -> tuple[int | None, int | None]:
    """The step and the number of processes in a torch file, by its bytes; its pickle is looked at, never loaded."""
    keys = {True: (b"step", None), False: (b"global_steps", b"dp_world_size")}
    if not (name.endswith("model_states.pt") or RANDOM.fullmatch(name)):
        return None, None
    table = next((one for one in archive.namelist() if one.endswith("/data.pkl")), None)
    if table is None:
        return None, None
    with archive.open(table) as opened:
        text = opened.read(HEAD)
    step, world = keys[bool(RANDOM.fullmatch(name))]
    return number_at(text, step), number_at(text, world) if world else None


def number_at(text: bytes, key: bytes) -> int | None:
    """The small number that a pickled dictionary has under a key; None where there is none such."""
    spelled = b"(?:X" + re.escape(struct.pack("<I", len(key))) + b"|\\x8c" + re.escape(bytes([len(key)])) + b")"
    found = re.search(spelled + re.escape(key) + NUMBER, text, re.DOTALL)
    if found is None:
        return None
    digits = next(group for group in found.groups() if group is not None)
    return int.from_bytes(digits, "little")


def is_whole_safetensors(file: Any, length: int) -> bool:
    """Whether the tensors that the head of a safetensors file names end where the file does."""
    try:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > length - 8:
            return False
        head = json.loads(file.read(size))
        ends = [one["data_offsets"][1] for name, one in head.items() if name != "__metadata__"]
        return 8 + int(size) + max(ends, default=0) == length
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error):
        return False


# --- manifests -----------------------------------------------------------------------------------------------------


def manifest_name(node: str) -> str:
    """The file of a node's manifest."""
    return f"{OURS}manifest.{node}.json"


def manifest_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """The manifests of a unit, as they are written."""
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        if MANIFEST.fullmatch(name):
            with contextlib.suppress(OSError), open_plain(folder, name) as file:
                yield name, file.readall().decode(errors="replace")


def shorten(text: str) -> str:
    """A manifest without its hashes, sealed anew; one that is not as it was sealed stays as it is."""
    try:
        said = json.loads(text)
        if said.pop("seal") != seal_of(said):
            return text
        said["piece"] = 1 << 62
        said["parts"] = [{**part, "pieces": part["pieces"][:1]} for part in said["parts"]]
        return json.dumps({**said, "seal": seal_of(said)})
    except (ValueError, KeyError, TypeError, AttributeError):
        return text


def seal_of(said: dict[str, Any]) -> str:
    """The hash of all that a manifest says."""
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(path: Path) -> Any:
    """A manifest of ours; None if it is missing or torn."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return said if said.pop("seal") == seal_of(said) else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all, also over a power cut."""
    for stale in path.parent.glob(f"{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

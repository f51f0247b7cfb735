"""The image as a value: recipe, build context, fingerprint, tag and progress; never the building of it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from cluster.errors import InputError
from cluster.inventory import HERE

Flavour = Literal["cuda", "cpu"]

DEFAULT_BASE = "debian:bookworm-slim"
DEFAULT_CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"

FINGERPRINT, PARTS = "launcher.fingerprint", "launcher.parts"  # labels of every image of ours

# In the folder for people and for the machine that starts the build, not for the builder.
_NOT_SENT = frozenset({"base.sh", "lock.py", ".dockerignore"})
_TAIL = 4 << 20
_FORMAT = "1"  # part of every fingerprint: raise it when the meaning of the context changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What an operator may choose about the image; the versions are pinned in docker/requirements.txt."""

    flavour: Flavour = "cuda"
    base: str | None = None
    ca_bundle: Path | None = None
    pip_index: str | None = None
    wheels: Path | None = None
    apt_mirror: str | None = None
    cuda_architectures: str = DEFAULT_CUDA_ARCHITECTURES
    toolkit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of the build context: its bytes, or the path where a large one lies."""

    name: str
    size: int
    digest: str
    source: bytes | Path
    executable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a build is: `step` of `total`, the instruction, and the last line that it wrote."""

    step: int = 0
    total: int = 0
    instruction: str = ""
    text: str = ""


def context_folder() -> Path:
    """The docker/ folder: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    installed = package / "share" / "docker"
    return installed if installed.is_dir() else package.parent / "docker"


def load_context(folder: Path, recipe: Recipe) -> tuple[Entry, ...]:
    """Read what the recipe sends to the builder; wheels stay on disk until they are sent."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in _NOT_SENT}
    if "Dockerfile" not in files:
        raise InputError("there is no Dockerfile", where=str(folder))
    pins = read_pins(files["requirements.txt"].read_text(encoding="utf-8"))
    entries = [
        *(make_entry(name, path.read_bytes()) for name, path in files.items()),
        *(make_entry(f"locks/{path.name}", path.read_bytes()) for path in sorted((folder / "locks").glob("*.txt"))),
        *(make_entry(f"ca/{name}", content) for name, content in read_authorities(recipe.ca_bundle)),
        *load_wheels(recipe.wheels, pins=pins, flavour=recipe.flavour),
    ]
    return tuple(sorted(entries, key=lambda entry: entry.name))


def make_entry(name: str, content: bytes) -> Entry:
    """A small file of the context, from its bytes."""
    return Entry(name=name, size=len(content), digest=hashlib.sha256(content).hexdigest(), source=content)


def read_authorities(bundle: Path | None) -> Iterator[tuple[str, bytes]]:
    """Certificates under the names that update-ca-certificates looks for (*.crt)."""
    if bundle is None:
        return
    found = sorted(bundle.glob("*.crt")) if bundle.is_dir() else [bundle]
    if not found or not all(path.is_file() for path in found):
        raise InputError("no CA certificate there", where=str(bundle), next_step="give a PEM file or a folder of *.crt")
    for path in found:
        yield f"{path.stem}.crt", path.read_bytes()


def read_pins(requirements: str) -> dict[str, str]:
    """`{"torch": "2.13.0", ...}` of a requirements file; lines that pin nothing are left out."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    return {project(name): version for name, found, version in (line.partition("==") for line in lines) if found}


def load_wheels(folder: Path | None, *, pins: Mapping[str, str], flavour: Flavour) -> Iterator[Entry]:
    """What a wheel folder has to give; the wheels stay on disk until they are sent."""
    return map(_wheel, _wheels(folder, pins=pins, flavour=flavour))


def choose_wheels(names: Iterable[str], *, pins: Mapping[str, str], flavour: Flavour) -> tuple[str, ...]:
    """The files of a wheel folder that can be of use.

    Left out are other versions of what is pinned, builds for the other flavour (by their local version, `+cpu` or
    `+cu130`) and, for cpu, NVIDIA's libraries: one folder may serve both flavours and older images. The rest goes
    in, so that a folder with everything builds without an index.
    """
    return tuple(sorted(name for name in names if _useful(name, pins=pins, flavour=flavour)))


def build_arguments(recipe: Recipe, *, base: str | None = None) -> dict[str, str]:
    """The Dockerfile's arguments; `base` stands in for a recipe that names none."""
    arguments = {
        "BASE": recipe.base or base or DEFAULT_BASE,
        "FLAVOUR": recipe.flavour,
        "PIP_INDEX_URL": recipe.pip_index or "",
        "APT_MIRROR": mirror_host(recipe.apt_mirror or ""),
        # Architectures of GPUs must not make a CPU image a different one.
        "CUDA_ARCHITECTURES": recipe.cuda_architectures if recipe.flavour == "cuda" else "",
        "GPUS": "all" if recipe.flavour == "cuda" else "void",
        "TOOLKIT": "yes" if recipe.toolkit else "",
    }
    return {name: value for name, value in arguments.items() if value}


def mirror_host(mirror: str) -> str:
    """A mirror without the path of Debian itself: people write it with and without."""
    return mirror.rstrip("/").removesuffix("/debian")


def fingerprint(entries: Iterable[Entry], arguments: Mapping[str, str], *, base_id: str | None = None) -> str:
    """Sha256 over everything that decides what the image holds.

    `base_id` is the digest of the base where the engine already has it: its name alone may move.
    """
    recipe = {
        "format": _FORMAT,
        "files": sorted((entry.name, entry.size, entry.digest) for entry in entries),
        "arguments": dict(arguments),
        "base": base_id,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def parts(entries: Iterable[Entry], arguments: Mapping[str, str]) -> dict[str, str]:
    """What a fingerprint was made of, by name; kept in the image's labels, to explain a changed one.

    Files by a digest, arguments as they are: those stand in the image's history, too.
    """
    files = {f"file {entry.name}": entry.digest[:16] for entry in entries}
    return {"format": _FORMAT, **{f"argument {name}": value for name, value in arguments.items()}, **files}


def read_parts(labels: Mapping[str, str]) -> dict[str, str] | None:
    """The parts that an image's labels tell of; None where it was built before they were kept."""
    try:
        told = json.loads(labels[PARTS])
    except (KeyError, ValueError):
        return None
    return {str(name): str(value) for name, value in told.items()} if isinstance(told, dict) else None


def explain(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """What makes one fingerprint another, one line for each part."""
    lines = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if old is None or new is None:
            lines.append(f"{name}: {'added' if old is None else 'removed'}{_value(name, old or new or '')}")
        else:
            lines.append(f"{name}: changed{_value(name, old, new)}")
    return tuple(lines)


def _value(name: str, *values: str) -> str:
    """The values of an argument; a file's digests would tell nobody anything."""
    return f" ({' -> '.join(values)})" if name.removeprefix("layer: ").startswith("argument ") else ""


def tag(flavour: Flavour, fingerprint: str) -> str:
    """The image's name: the same recipe, the same name."""
    return f"launcher/{flavour}:{fingerprint[:12]}"


def base_tag(script: bytes, *, suite: str = "bookworm") -> str:
    """The name of the base that docker/base.sh makes where no registry can be reached."""
    return f"launcher/base:{suite}-{hashlib.sha256(script).hexdigest()[:12]}"


def labels(flavour: Flavour, fingerprint: str, parts: Mapping[str, str]) -> dict[str, str]:
    """What the image says about itself, beside the labels of the Dockerfile."""
    told = json.dumps(dict(parts), sort_keys=True, separators=(",", ":"))
    return {"launcher.flavour": flavour, FINGERPRINT: fingerprint, PARTS: told}


def write_context(entries: Iterable[Entry], out: BinaryIO, *, folders: tuple[str, ...] = ("ca", "wheels")) -> None:
    """Write the context as a tar stream, the same bytes for the same entries on every machine.

    `folders`: what a COPY of the Dockerfile wants, even empty.
    """
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for folder in folders:
            archive.addfile(_header(folder, size=0, folder=True))
        for entry in sorted(entries, key=lambda entry: entry.name):
            header = _header(entry.name, size=entry.size, folder=False)
            header.mode |= 0o111 if entry.executable else 0
            if isinstance(entry.source, bytes):
                archive.addfile(header, io.BytesIO(entry.source))
            else:
                with entry.source.open("rb") as file:
                    archive.addfile(header, file)


def choose_builder(asked: str | None, *, here: str | None, nodes: Mapping[str, str]) -> tuple[str, str]:
    """Which machine builds, a node's name or `HERE`; and why, where nobody has asked for it and it is not this one.

    `here`: the architecture of this machine's engine, None where it has none; `nodes`: theirs by name, the first of
    which is taken.
    """
    if asked:
        return asked, ""
    first, theirs = next(iter(nodes.items()))
    if here is None:
        return first, "this machine has no Docker engine"
    if here != theirs:
        return first, f"this machine is {here}, {first} is {theirs}"
    return HERE, ""


def read_progress(message: Mapping[str, object], *, after: Progress) -> Progress:
    """The next progress, from one message of the classic builder."""
    said = _line(message)
    if not said:
        return after
    step = _STEP.match(said)
    if step is None:
        return Progress(step=after.step, total=after.total, instruction=after.instruction, text=said)
    return Progress(step=int(step[1]), total=int(step[2]), instruction=step[3], text="")


_STEP = re.compile(r"Step (\d+)/(\d+) : (.*)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _line(message: Mapping[str, object]) -> str:
    """The last line that a message shows: output of a step, or the layer that is being pulled."""
    if "stream" in message:
        lines = _COLOUR.sub("", str(message["stream"])).split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    shown = (message.get("id"), message.get("status"), message.get("progress"))
    return " ".join(str(part) for part in shown if part)


def _wheel(path: Path) -> Entry:
    """A wheel by the end of its file: there its zip directory keeps name, size and CRC of every member.

    A GPU build of torch has some gigabytes; reading all of it would cost more than the rest of an unchanged build.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL))
        digest = hashlib.sha256(file.read()).hexdigest()
    return Entry(name=f"wheels/{path.name}", size=size, digest=digest, source=path)


def _wheels(folder: Path | None, *, pins: Mapping[str, str], flavour: Flavour) -> Iterator[Path]:
    if folder is None:
        return
    if not folder.is_dir():
        raise InputError("the wheel folder does not exist", where=str(folder))
    names = (path.name for path in folder.iterdir() if path.is_file())
    for name in choose_wheels(names, pins=pins, flavour=flavour):
        yield folder / name


def _useful(name: str, *, pins: Mapping[str, str], flavour: Flavour) -> bool:
    stem = name.removesuffix(".tar.gz") if name.endswith(".tar.gz") else name.removesuffix(".whl")
    if stem == name:
        return False
    # A wheel is name-version-tags; a source archive name-version, where the name may hold dashes itself.
    named, _, version = stem.rpartition("-") if name.endswith(".tar.gz") else stem.partition("-")
    version, _, local = version.partition("-")[0].partition("+")
    named = project(named)
    if flavour == "cpu" and (local.startswith("cu") or named.startswith(("nvidia-", "cuda-"))):
        return False
    if flavour == "cuda" and local == "cpu":
        return False
    return pins.get(named, version) == version


def project(name: str) -> str:
    """A project's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _header(name: str, *, size: int, folder: bool) -> tarfile.TarInfo:
    """A header that tells nothing about the machine: root's, and of no time."""
    header = tarfile.TarInfo(name)
    header.size = size
    header.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
    header.mode = 0o755 if folder else 0o644
    header.uname = header.gname = "root"
    return header

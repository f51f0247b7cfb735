"""The user's layer as a value: what stands on top of our image, its build context and name; never the building of it.

It is an image of its own on top of the shared one: either made by docker/layer/Dockerfile of lists of packages, or by
a Dockerfile of the user's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from launcher import image

BASE = "launcher.base"  # the label that names the image of ours below
KEPT = ("torch", "deepspeed", "accelerate")  # compiled for each other: a layer may not bring other versions
LARGEST = 512 << 20  # of a context: it is read whenever the image's name is asked for
# Every image ends as ours does: a Dockerfile of the user's may forget to go back.
ENDING = b"\nUSER launcher\nWORKDIR /home/launcher\n"

_SMALL = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What the user wants on top; an empty one is no layer."""

    packages: tuple[str, ...] = ()
    requirements: Path | None = None
    apt: tuple[str, ...] = ()
    dockerfile: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.packages or self.requirements or self.apt or self.dockerfile)


def load_packages(
    folder: Path, layer: Layer, *, flavour: image.Flavour, wheels: Path | None
) -> tuple[image.Entry, ...]:
    """Read what a layer of packages sends to the builder; `folder` is docker/."""
    wanted = "".join(f"{one}\n" for one in layer.packages)
    if layer.requirements is not None:
        wanted = read_requirements(_text(layer.requirements, "requirements"), str(layer.requirements)) + wanted
    pins = image.read_pins((folder / "requirements.txt").read_text(encoding="utf-8"))
    ours = [folder / "apt.sh", *sorted((folder / "layer").iterdir())]
    texts = {
        **{path.name: path.read_bytes() for path in ours if path.is_file()},
        "apt.txt": "".join(f"{one}\n" for one in layer.apt).encode(),
        "constraints.txt": "".join(f"{name}=={pins[name]}\n" for name in KEPT if name in pins).encode(),
        "packages.txt": wanted.encode(),
    }
    entries = [image.make_entry(name, content) for name, content in texts.items()]
    if wanted:
        entries += [one for one in image.load_wheels(wheels, pins=pins, flavour=flavour) if not _is_there(one.name)]
    return tuple(sorted(entries, key=lambda entry: entry.name))


def _is_there(wheel: str) -> bool:
    """Whether a wheel is of what the image below holds for certain; these are the large ones."""
    project = image.project(wheel.removeprefix("wheels/").partition("-")[0])
    return project in KEPT or project.startswith(("nvidia-", "cuda-"))


_FILES = re.compile(r"-[rce]\b|--(?:requirement|constraint|editable)\b|\.{0,2}/|\.\.?$|file:")


def read_requirements(text: str, name: str) -> str:
    """A requirements file's text; `InputError` for a line that names another file, for only this one travels."""
    for number, line in enumerate(text.splitlines(), start=1):
        if _FILES.match(line.strip()):
            column = len(line) - len(line.lstrip()) + 1
            raise InputError(
                f"{line.strip()!r} names another file, and only this one is sent to the build",
                where=f"{name}:{number}:{column}",
                next_step="write its lines in here; wheels of your own belong into a folder, named under image.wheels",
            )
    return text if not text or text.endswith("\n") else f"{text}\n"


def load_dockerfile(layer: Layer, files: Iterable[str]) -> tuple[image.Entry, ...]:
    """Read the context of a Dockerfile of the user's; `files`: what its folder holds and .dockerignore leaves in."""
    path = layer.dockerfile
    assert path is not None
    text = _text(path, "dockerfile")
    check_dockerfile(text, str(path))
    paths = [path.parent / name for name in files if name not in (path.name, ".dockerignore")]
    paths = [one for one in paths if one.is_symlink() or not one.is_dir()]
    for one in paths:
        if one.is_symlink() or not one.is_file():
            raise InputError(
                "only files and folders can go into the build", where=str(one), next_step="name it in .dockerignore"
            )
    total = sum(one.stat().st_size for one in paths)
    if total > LARGEST:
        raise InputError(
            f"the folder weighs {total >> 20} MiB, and all of it would go into the build; {LARGEST >> 20} may",
            where=str(path.parent),
            next_step="give the Dockerfile a folder of its own, or name in .dockerignore what it does not COPY",
        )
    entries = [_entry(one, one.relative_to(path.parent).as_posix()) for one in paths]
    entries.append(image.make_entry(path.name, text.encode() + ENDING))
    return tuple(sorted(entries, key=lambda entry: entry.name))


def _entry(path: Path, name: str) -> image.Entry:
    status = path.stat()
    executable = bool(status.st_mode & 0o100)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest() + ("x" if executable else "")
    source: bytes | Path = content if status.st_size <= _SMALL else path
    return image.Entry(name=name, size=len(content), digest=digest, source=source, executable=executable)


def _text(path: Path, key: str) -> str:
    place = ("image", key)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}", place=place) from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8", place=place) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", place=place) from None


def check_dockerfile(text: str, name: str) -> None:
    """Whether a Dockerfile stands on our image: its last stage must come from ${BASE}, by itself or by other stages."""
    declared = False
    ours: set[str] = set()
    last: tuple[int, str] | None = None
    for number, instruction in _instructions(text):
        word, _, rest = instruction.partition(" ")
        if word.upper() == "ARG" and last is None:
            declared = declared or rest.split("=")[0].strip() == "BASE"
        elif word.upper() == "FROM":
            parts = [part for part in rest.split() if not part.startswith("--")]
            source, alias = (parts or ["nothing"])[0], parts[-1].lower() if len(parts) == 3 else ""  # noqa: PLR2004 - X as Y
            good = declared and (source in ("${BASE}", "$BASE") or source.lower() in ours)
            ours |= {alias} if good and alias else set()
            last = (number, "" if good else source)
    if last is None or last[1]:
        number, source = last or (1, "nothing")
        raise InputError(
            f"the image must come from ours, not from {source}",
            where=f"{name}:{number}:1",
            next_step="begin it with 'ARG BASE' and 'FROM ${BASE}'",
        )


def _instructions(text: str) -> Iterator[tuple[int, str]]:
    """Every instruction, its lines joined, with the number of its first line."""
    begun, parts = 0, list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        said = line.strip()
        if not said or said.startswith("#"):
            continue
        begun = begun if parts else number
        parts.append(said.removesuffix("\\").strip())
        if not said.endswith("\\"):
            yield begun, re.sub(r"\s+", " ", " ".join(parts))
            parts = []
    if parts:
        yield begun, " ".join(parts)


def arguments(recipe: image.Recipe) -> dict[str, str]:
    """The Dockerfile's arguments besides BASE."""
    told = {"PIP_INDEX_URL": recipe.pip_index or "", "APT_MIRROR": image.mirror_host(recipe.apt_mirror or "")}
    return {name: value for name, value in told.items() if value}


def tag(base: str, fingerprint: str) -> str:
    """The image's name: the one below, and what stands on it."""
    return f"{base}-{fingerprint[:12]}"


def parts(
    base: Mapping[str, str], layer: Layer, entries: Iterable[image.Entry], arguments: Mapping[str, str]
) -> dict[str, str]:
    """What the pair is made of, by name: the image below, and what was asked for on top of it."""
    told = image.parts(entries, arguments)
    asked = {f"package {one}": "" for one in layer.packages} | {f"apt {one}": "" for one in layer.apt}
    lists = {"file apt.txt", "file packages.txt"} if layer.requirements is None else {"file apt.txt"}
    own = {f"layer: {name}": value for name, value in told.items() if name not in lists}
    return {**base, **{f"layer: {name}": value for name, value in asked.items()}, **own}


_CONFLICT = re.compile(r"conflict|ResolutionImpossible|which is incompatible|has requirement", re.IGNORECASE)


def cure(said: Iterable[str]) -> str | None:
    """What to do about a layer that does not build, from the last lines of the step that failed."""
    lines = tuple(said)
    if any(_CONFLICT.search(line) for line in lines):
        return f"ask for versions that go together, and with the image's own {', '.join(KEPT)}, which stay"
    if any("Unable to locate package" in line for line in lines):
        return "apt knows no such package: correct its name under image.apt"
    if any("No matching distribution" in line for line in lines):
        return "pip's index has no such package or version: correct it, or name an index under image.pip_index"
    return None

"""A tiny image made of this machine's own busybox, so that no test needs a registry; and what is ours on the engine.

Everything that a session of tests makes carries a label of its own, and is removed by it; nothing else is touched.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pip
import pytest

from cluster.archive import Archive, compose
from cluster.shelf import Shelf

LABEL = "launcher.test"
IMAGE_LABEL = "launcher.test.image"  # another one: a container inherits its image's labels
VOLUME = "/volume"  # the image declares it, as many a user's base image does


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """The image, and the mark under which everything of this session of tests is found."""

    mark: str
    tag: str
    digest: str


@pytest.fixture(scope="session")
def tiny() -> Iterator[Tiny]:
    """An image of some 3 MB with a shell; a container of it needs 0.3 s."""
    if docker("version", check=False).returncode:
        pytest.skip("there is no Docker engine here")
    mark = f"{os.getpid()}-{secrets.token_hex(3)}"
    tag = f"launcher-test/tiny:{mark}"
    try:
        docker("import", "-c", f"LABEL {IMAGE_LABEL}={mark}", "-c", f"VOLUME {VOLUME}", "-", tag, stdin=rootfs())
        yield Tiny(mark=mark, tag=tag, digest=inspect(tag)["Id"])
    finally:
        sweep(mark)
        for image in docker("images", "-aq", "--no-trunc", "--filter", f"label={IMAGE_LABEL}={mark}").stdout.split():
            docker("rmi", "-f", image.decode(), check=False)


@pytest.fixture
def swept(tiny: Tiny) -> Iterator[Tiny]:
    """The image; what a test made of it is gone afterwards."""
    yield tiny
    sweep(tiny.mark)


def make_layer(name: str, content: bytes) -> bytes:
    """A layer with one file."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        archive.addfile(header, io.BytesIO(content))
    return made.getvalue()


def make_image(
    shelf: Shelf, layers: Sequence[bytes], *, mark: str, labels: Mapping[str, str] | None = None
) -> tuple[str, Archive]:
    """An image of these layers, on a shelf and as an archive; its digest. Nothing in it can be run."""
    names = [shelf.put([layer]) for layer in layers]
    said = {"architecture": "amd64", "os": "linux", "config": {"Labels": {IMAGE_LABEL: mark, **(labels or {})}}}
    config = json.dumps({**said, "rootfs": {"type": "layers", "diff_ids": names}}).encode()
    return shelf.put_config(config), compose(config, names, [shelf.layer(name) for name in names])


def sweep(mark: str) -> None:
    """Remove the containers that carry a mark."""
    if left := docker("ps", "-aq", "--filter", f"label={LABEL}={mark}").stdout.decode().split():
        docker("rm", "-fv", *left, check=False)


def docker(*argv: str, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """The engine's own client, for what a test makes or looks at behind our back."""
    try:
        return subprocess.run(["docker", *argv], input=stdin, capture_output=True, check=check, timeout=120)
    except FileNotFoundError:
        pytest.skip("there is no docker command here")


def inspect(name: str) -> Any:
    """Everything that the engine says of an image or a container."""
    return json.loads(docker("inspect", name).stdout)[0]


def rootfs() -> bytes:
    """A root file system: busybox under all its names, and the libraries that it needs."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        _fill(archive, {})
    return made.getvalue()


def python_rootfs() -> bytes:
    """The same with what a layer of packages meets in our image: /opt/venv with pip, made of this machine's Python."""
    program = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    modules = [*library.glob("lib-dynload/*.so")]
    tools = {name: shutil.which(name) or "" for name in ("comm", "find", "tar", "xargs")}  # busybox's know less
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        _fill(archive, tools, needs=[str(program), *map(str, modules)])
        archive.addfile(*_file(str(program), str(program).lstrip("/")))
        archive.add(library, filter=_kept)
        for folder in Path(pip.__file__).parents[1].glob("pip*"):
            archive.add(folder, f"{packages_folder()}/{folder.name}", filter=_kept)
        said = f"home = {program.parent}\n".encode()
        header = tarfile.TarInfo("opt/venv/pyvenv.cfg")
        header.size = len(said)
        archive.addfile(header, io.BytesIO(said))
        for name in ("python3", "python"):
            link = tarfile.TarInfo(f"opt/venv/bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, str(program)
            archive.addfile(link)
    return made.getvalue()


def packages_folder() -> str:
    """Where packages lie in it."""
    return f"opt/venv/lib/{Path(sysconfig.get_path('stdlib')).name}/site-packages"


def _kept(one: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """What is worth its bytes of a Python's own library."""
    left = {"test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "site-packages", "dist-packages"}
    path = Path(one.name)
    useless = path.name.startswith("config-") or path.name.endswith((".opt-1.pyc", ".opt-2.pyc", ".exe"))
    return None if useless or ("venv" not in path.parts and path.name in left) else one


def _fill(archive: tarfile.TarFile, tools: Mapping[str, str], *, needs: Sequence[str] = ()) -> None:
    """Busybox, some tools in place of its own, and the libraries of all these and of what else is named."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("there is no busybox: apt install busybox-static")
    names = subprocess.run([busybox, "--list"], capture_output=True, check=True, text=True).stdout.split()
    for name, path in {"busybox": busybox, **tools}.items():
        archive.addfile(*_file(path, f"bin/{name}"))
    for path in sorted({one for of in (busybox, *tools.values(), *needs) for one in _libraries(of)}):
        archive.addfile(*_file(path, path.lstrip("/")))
    for name in names:
        if name not in {"busybox", *tools}:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    folder = tarfile.TarInfo("tmp")
    folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
    archive.addfile(folder)


def _libraries(program: str) -> list[str]:
    said = subprocess.run(["ldd", program], capture_output=True, check=False, text=True).stdout
    return re.findall(r"(/\S+) \(0x", said)  # none where it is linked statically


def _file(path: str, name: str) -> tuple[tarfile.TarInfo, io.BytesIO]:
    content = Path(path).read_bytes()
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(content), 0o755
    return header, io.BytesIO(content)

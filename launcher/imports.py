"""A package that a job lacks: read from the failure that ended its run, with the line that brings it. Pure."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict

from cluster.inventory import Inventory
from launcher.events import NodeEnded
from launcher.inside import cause

# Where the name that is imported is not the one that pip knows. Only what is well known: a wrong name is no help.
PROJECTS = {
    "Crypto": "pycryptodome",
    "PIL": "pillow",
    "OpenSSL": "pyopenssl",
    "apex": "",  # what PyPI has under this name is another one
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil",
    "docx": "python-docx",
    "dotenv": "python-dotenv",
    "faiss": "faiss-cpu",
    "fitz": "pymupdf",
    "git": "gitpython",
    "google.protobuf": "protobuf",
    "grpc": "grpcio",
    "hydra": "hydra-core",
    "jwt": "pyjwt",
    "magic": "python-magic",
    "mpl_toolkits": "matplotlib",
    "ruamel": "ruamel.yaml",
    "serial": "pyserial",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}
_MODULE = re.compile(r"No module named '([\w.]+)'")
# What libraries say of those that they need themselves: Run `pip install einops timm`.
_ADVICE = re.compile(r"""[`'"]pip install ([\w.\[\],=<>\- ]+)[`'"]""")


def cure(
    ends: Mapping[str, NodeEnded], inventory: Inventory, *, code: Collection[str], beside: Collection[str], file: str
) -> str | None:
    """What to do about a run that ended because a package is missing; None where it ended otherwise.

    `code`: the files that the nodes have got; `beside`: those where the script is imported from here. `file` is the
    inventory's name.
    """
    found = cause.first_failure(asdict(end) for end in ends.values())
    failure = found and found[2]
    if not failure or failure["type"] not in ("ImportError", "ModuleNotFoundError"):
        return None
    module = _MODULE.search(failure["message"])
    name = module[1] if module else ""
    if name and _has(code, name):
        return None
    if name and _has(beside, name):
        return f"{name} is of yours, but left out of what the nodes get: look at .gitignore and .launcherignore"
    wanted = packages(failure["message"])
    return _line(wanted, inventory, file) if wanted else None


def packages(message: str) -> tuple[str, ...]:
    """The packages that an import error asks for, as pip knows them; empty where it asks for none.

    A module inside of a package that is there makes no package missing, nor does one of Python's own.
    """
    module = _MODULE.search(message)
    if not module:
        advice = _ADVICE.search(message)
        return tuple(word for word in advice[1].split() if not word.startswith("-")) if advice else ()
    name = module[1]
    if name in PROJECTS:
        return tuple(filter(None, (PROJECTS[name],)))
    return () if "." in name or name in sys.stdlib_module_names else (name,)


def _has(files: Collection[str], name: str) -> bool:
    """Whether one of these is the module, or lies in a folder that is."""
    return any(
        path.endswith(".py") and name in (*path.split("/")[:-1], path.rpartition("/")[2].removesuffix(".py"))
        for path in files
    )


def _line(wanted: tuple[str, ...], inventory: Inventory, file: str) -> str:
    words, recipe = " ".join(wanted), inventory.image
    if inventory.engine == "process":
        return f"pip install {words}, in the environment that the launcher is installed in"
    if recipe.use:
        return f"put {words} into the image {recipe.use}, or name it under image.packages in place of image.use"
    if recipe.dockerfile:
        return f"RUN pip install {words} in {recipe.dockerfile.name}, which image.dockerfile in {file} names"
    return f"image.packages: {json.dumps([*recipe.packages, *wanted])} in {file}, then run it again"

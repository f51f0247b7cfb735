"""What a job finds on its machine, as one line of JSON: `accelerate env` and `ds_report` in one, and what limits it.

Usage: python3 - < environment.py     (in the node container; reads nothing, changes nothing)

Prints {section: {name: value}} with values that are text or numbers. What cannot be found out is a text that begins
with "unknown". Of environment variables only those are told that training listens to, and none that may hold a secret.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Section = dict[str, Any]

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "safetensors", "numpy", "triton", "datasets", "peft")
# Variables that torch, its collectives, Accelerate, DeepSpeed and the linker listen to.
HEARD = re.compile(
    r"(ACCELERATE|CUDA|DEEPSPEED|DS|FI|GLOO|HF|KMP|LAUNCHER|MKL|NCCL|NVIDIA|OMP|OPENBLAS|PYTHON|PYTORCH|SAFETENSORS"
    r"|TORCH|TORCHINDUCTOR|TRANSFORMERS|TRITON|UCX)_?\w*|LD_LIBRARY_PATH|LD_PRELOAD|PATH|TMPDIR|VIRTUAL_ENV"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSW|KEY|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
OURS = ("LAUNCHER_CONTAINER", "LAUNCHER_NODE")  # another one on every node, by design
GIB = 1024**3


def main() -> None:
    """Ask everything; answer in one line."""
    answer = os.dup(1)
    os.dup2(2, 1)  # libraries greet on standard output
    sections: dict[str, Callable[[], Section]] = {
        "versions": versions,
        "gpus": gpus,
        "ops": ops,
        "machine": machine,
        "limits": limits,
        "variables": variables,
        "accelerate env": accelerate_env,
    }
    report = {name: attempt(section) for name, section in sections.items()}
    with os.fdopen(answer, "w", encoding="utf-8") as out:
        out.write(json.dumps(report) + "\n")


def attempt(section: Callable[[], Section]) -> Section:
    """One part that cannot be found out is no reason to be silent about the others."""
    try:
        return section()
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the finding
        return {"error": f"unknown: {type(error).__name__}: {error}"}


def versions() -> Section:
    """Python, torch and what it brings along, the libraries on top."""
    import torch

    cuda = torch.version.cuda
    return {
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "cuda": cuda or "none",
        "cudnn": torch.backends.cudnn.version() or "none",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "none",
        "nvcc": nvcc(),
    }


def installed(package: str) -> str:
    """A package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def nvcc() -> str:
    """The CUDA compiler, where there is one: DeepSpeed needs it for ops that were not built into the image."""
    from torch.utils.cpp_extension import CUDA_HOME

    said = asked(f"{CUDA_HOME}/bin/nvcc", "--version") if CUDA_HOME else ""
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else "none"


def asked(*argv: str) -> str:
    """What a program prints; empty where it is not there or fails."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def gpus() -> Section:
    """Each GPU, and the driver; as torch sees them, which is what a job gets."""
    import torch

    found: Section = {"count": torch.cuda.device_count()}
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        found[str(index)] = f"{one.name}, {one.total_memory / GIB:.1f} GiB, compute {one.major}.{one.minor}"
    drivers = set(asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split())
    return {**found, "driver": ", ".join(sorted(drivers)) or "none"}


def ops() -> Section:
    """DeepSpeed's compiled parts: built in, to be compiled at first use, or not for this machine."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops, torch_info
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    accelerator = get_accelerator().device_name()
    found: Section = {
        "accelerator": accelerator,
        "deepspeed build": f"{deepspeed.__version__}, {deepspeed.__git_hash__}, {deepspeed.__git_branch__}",
        "compiled with": f"torch {torch_info['version']}, cuda {torch_info['cuda_version']}",
    }
    for name, builder in ALL_OPS.items():
        if name == "deepspeed_not_implemented":
            continue  # a place-holder for what this accelerator lacks
        if installed_ops.get(name) and accelerator_name == accelerator:
            found[name] = "installed"
        else:
            found[name] = "compiled at first use" if probe_is_compatible(builder, verbose=False) else "not compatible"
    return found


def machine() -> Section:
    """Processor, memory, system."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', read("/etc/os-release"), re.MULTILINE))
    model = re.search(r"^model name\s*: (.*)$", read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", read("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor() or "unknown",
        "cpus": os.cpu_count() or 0,
        "cpus allowed": len(os.sched_getaffinity(0)),
        "memory": f"{int(memory[1]) / 1024**2:.1f} GiB" if memory else "unknown",
        "architecture": platform.machine(),
        "system": release.get("PRETTY_NAME", "unknown"),
        "kernel": platform.release(),
        "libc": "-".join(platform.libc_ver()),
    }


def read(path: str) -> str:
    """A file of the system, empty where it is not there."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def limits() -> Section:
    """What runs out first, and without a good word: shared memory, lockable memory, open files, the container's own."""
    shm = os.statvfs("/dev/shm")  # noqa: S108 - it is looked at, nothing is put there
    most = read("/sys/fs/cgroup/memory.max").strip() or read("/sys/fs/cgroup/memory/memory.limit_in_bytes").strip()
    return {
        "shared memory": f"{shm.f_frsize * shm.f_blocks / GIB:.1f} GiB",
        "memlock": limit(resource.RLIMIT_MEMLOCK),
        "open files": limit(resource.RLIMIT_NOFILE),
        "stack": limit(resource.RLIMIT_STACK),
        "memory": f"{int(most) / GIB:.1f} GiB" if most.isdecimal() and int(most) < 1 << 60 else "unlimited",
        "uid": os.getuid(),
    }


def limit(which: int) -> str | int:
    """The soft limit, which is the one that counts."""
    soft = resource.getrlimit(which)[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else soft


def variables() -> Section:
    """The environment, as far as training listens to it; a secret's name is told, never its value."""
    return {
        name: "***" if SECRET.search(name) else re.sub(r"://[^/@\s]+@", "://***@", value)
        for name, value in sorted(os.environ.items())
        if HEARD.fullmatch(name) and name not in OURS
    }


def accelerate_env() -> Section:
    """What `accelerate env` says, under its own names."""
    from accelerate.commands.env import env_command

    with contextlib.redirect_stdout(io.StringIO()):
        said = env_command(argparse.Namespace(config_file=None))
    return {
        name.replace("`", ""): value if isinstance(value, str | int | float) else json.dumps(value, default=str)
        for name, value in said.items()
    }


if __name__ == "__main__":
    main()

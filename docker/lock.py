"""Pins everything that pip puts into the image, with hashes: docker/locks/ from docker/requirements.txt.

    make lock

One file for each step of the Dockerfile, so that a change of one package builds only what comes after it. Resolved
by uv for Linux and every Python that the base may have. Only the CPU build of torch is not in a lock: PyPI has none.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON = "3.11"  # the oldest that the pins can run on

# What the compiler of the CUDA ops needs beyond the libraries that torch brings, and what reads machine code.
TOOLKIT = ("nvcc", "cccl", "cudart", "curand", "cublas", "cusparse", "cusolver", "nvrtc", "nvtx", "profiler")
CUOBJDUMP = "nvidia-cuda-cuobjdump==13.*"

# What only another operating system needs.
ELSEWHERE = re.compile(r"\S+ ; (?!.* or ).*sys_platform == '(win32|emscripten)' ")

Lock = dict[str, str]  # a requirement with its marker and hashes, by `name==version`


def resolve(wanted: list[str], constraints: Lock | None = None) -> Lock:
    """What `wanted` comes down to; `constraints` hold what is decided already."""
    known = HERE / "locks" / ".constraints"
    known.write_text("".join((constraints or {}).values()))
    command = ["uv", "pip", "compile", "-", "--universal", "--python-version", PYTHON, "--generate-hashes", "--quiet"]
    command += ["--no-header", "--no-annotate", "--constraints", str(known)]
    try:
        done = subprocess.run(command, input="\n".join(wanted), text=True, check=False, capture_output=True)
    finally:
        known.unlink()
    if done.returncode:
        sys.exit(f"lock: {done.stderr.strip()}")
    # A requirement starts in the first column, its hashes follow indented.
    blocks = re.findall(r"^\S.*\n(?:[ \t]+.*\n)*", done.stdout, flags=re.MULTILINE)
    return {block.split()[0]: block for block in blocks if not ELSEWHERE.match(block)}


def for_gpus(name: str) -> bool:
    """Whether only the CUDA build of torch needs it, or it is that build."""
    return name.startswith(("torch==", "triton==", "nvidia-", "cuda-"))


def main() -> None:
    """Write every lock anew."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    pins = [line.partition("#")[0].strip() for line in lines if "==" in line.partition("#")[0]]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    deepspeed = next(pin for pin in pins if pin.startswith("deepspeed=="))
    tools = ["pip", "setuptools", "wheel"]
    # DeepSpeed is installed without isolation, so that it sees this torch: what its build needs comes before it.
    build = ["ninja", "packaging", "psutil", "py-cpuinfo", "pydantic"]

    # DeepSpeed asks for this where it finds a torch for CUDA, and the resolver has none.
    jobs = [*pins, "nvidia-ml-py"]

    everything = resolve([*tools, torch, "numpy", *build, *jobs])
    done: Lock = {}

    def step(*wanted: str, decided: Lock = everything) -> Lock:
        found = {name: block for name, block in resolve(list(wanted), decided).items() if name not in done}
        done.update(found)
        return found

    locks = {"tools": step(*tools)}
    with_torch = step(torch, "numpy")
    locks["torch"] = {name: block for name, block in with_torch.items() if not for_gpus(name)}
    locks["cuda"] = {name: block for name, block in with_torch.items() if for_gpus(name)}
    needed = step(deepspeed, *build)
    locks["deepspeed"] = {name: needed.pop(name) for name in [*needed] if name == deepspeed}
    locks["build"] = needed
    locks["jobs"] = step(*jobs)
    release = next(name for name in with_torch if name.startswith("cuda-toolkit==")).partition("==")[2]
    locks["toolkit"] = step(f"cuda-toolkit[{','.join(TOOLKIT)}]=={release}", CUOBJDUMP)

    for name, lock in locks.items():
        (HERE / "locks" / f"{name}.txt").write_text("".join(lock[each] for each in sorted(lock)))
        print(f"{name:10} {len(lock)} packages")


if __name__ == "__main__":
    main()

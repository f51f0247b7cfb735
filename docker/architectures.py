"""Which GPUs each op was compiled for: one line for an op with CUDA code, its name and its architectures.

Read from the machine code itself by cuobjdump, for no GPU is needed to look. Ends the build when an op lacks one of
CUDA_ARCHITECTURES ("8.0;9.0+PTX": the machine code of both, and of the second also the PTX that later GPUs compile).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from proof import ops


def wanted(architectures: str) -> list[str]:
    """`["sm_80", "sm_90", "compute_90"]` of `8.0;9.0+PTX`."""
    names = []
    for one in filter(None, re.split(r"[; ]+", architectures)):
        number = one.removesuffix("+PTX").replace(".", "")
        names += [f"sm_{number}", f"compute_{number}"] if one.endswith("+PTX") else [f"sm_{number}"]
    return names


def compiled(library: Path) -> list[str]:
    """What the library holds: `sm_*` for machine code, `compute_*` for PTX."""
    tool = str(Path(os.environ["CUDA_HOME"], "bin", "cuobjdump"))
    found = set()
    for option, kind in (("--list-elf", "sm"), ("--list-ptx", "compute")):
        # cuobjdump ends with an error where there is none of a kind.
        told = subprocess.run([tool, option, str(library)], text=True, capture_output=True, check=False).stdout
        found |= {f"{kind}_{number}" for number in re.findall(r"\.(?:sm|compute)_(\d+\w?)\.", told)}
    return sorted(found, key=lambda name: (name.startswith("compute"), int(re.sub(r"\D", "", name)), name))


def main() -> None:
    """Print the table."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    lacking = []
    for name in ops(Path(__file__).with_name("ops.txt").read_text(), "cuda"):
        builder = ALL_OPS[name]
        if not any(source.endswith(".cu") for source in builder.sources()):
            continue
        found = importlib.util.find_spec(builder.absolute_name())
        if found is None or found.origin is None:
            sys.exit(f"architectures: {builder.absolute_name()} was not compiled")
        has = compiled(Path(found.origin))
        print(f"{name:20} {' '.join(has)}")
        lacking += [f"{name} lacks {one}" for one in wanted(os.environ["CUDA_ARCHITECTURES"]) if one not in has]
    if lacking:
        sys.exit(f"architectures: {', '.join(lacking)}")


if __name__ == "__main__":
    main()

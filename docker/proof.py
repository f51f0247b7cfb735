"""The last step of the build: every DeepSpeed op of this flavour is in the image and loads without a compiler.

Ends the build with the names of the ops that do not.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path


def ops(table: str, flavour: str) -> list[str]:
    """Names of the ops that `table` (ops.txt) wants in this flavour."""
    rows = [line.split() for line in table.splitlines() if line.strip() and not line.startswith("#")]
    return [name for name, _variable, *flavours in rows if flavour in flavours]


def fault(name: str, flavour: str) -> str | None:
    """Why this op would not run on a node, or None."""
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    if accelerator_name != flavour:
        return f"DeepSpeed was built for the accelerator {accelerator_name!r}"
    builder = ALL_OPS.get(name)
    if builder is None or not installed_ops.get(name):
        return "not compiled"
    found = importlib.util.find_spec(builder.absolute_name())
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return f"{builder.absolute_name()} is missing"
    try:
        builder.load()
    except (ImportError, OSError) as error:
        # The CUDA driver lies on the node, never in an image: a build machine without a GPU cannot load these.
        if flavour == "cuda" and "libcuda.so" in str(error):
            return None
        return f"does not load: {error}"
    return None


def read_architectures(table: Path) -> dict[str, str]:
    """The GPUs that each op with CUDA code was compiled for (architectures.py); nothing in a CPU image."""
    rows = table.read_text().splitlines() if table.is_file() else []
    return dict(row.split(maxsplit=1) for row in rows)


def main() -> None:
    """Check the ops of the flavour given on the command line."""
    flavour = sys.argv[1]
    if compiler := shutil.which("gcc") or shutil.which("c++"):
        # From the base, or wanted by TOOLKIT. No op is compiled here for that: DeepSpeed's list is asked first.
        print(f"proof: the image has a compiler, {compiler}")
    wanted = ops(Path(__file__).with_name("ops.txt").read_text(), flavour)
    faults = {name: why for name in wanted if (why := fault(name, flavour))}
    architectures = read_architectures(Path(sys.prefix, "share", "launcher", "architectures.txt"))
    for name in wanted:
        print(f"{name:20} {faults.get(name, 'ok')} {architectures.get(name, '')}".rstrip())
    if faults or not wanted:
        sys.exit(f"proof: the image lacks {', '.join(faults) or 'every op'}")


if __name__ == "__main__":
    main()

"""The first thing every rank runs: connect it to the agent, check it against the plan, then run the script.

Usage: bootstrap.py SCRIPT [ARGUMENTS...]     (started by torchrun; arguments reach the script byte for byte)

It is not a wrapper the script could notice: `__main__`, `sys.argv`, `sys.path[0]` and tracebacks are as under
`python SCRIPT`. It reads from the environment, and does nothing for a variable that is not set:
  LAUNCHER_PIPES        a folder of FIFOs named by local rank; standard output and error go there
  LAUNCHER_ERRORS       a folder; an exception leaves <rank>.json there: {rank, time, type, message, exit_code, signal}
  LAUNCHER_RANKS        a folder; <rank>.pid says which process this is, and <rank>.stacks receives the stacks of all
                        its threads whenever it gets the signal SIGRTMIN + 9 (also while it holds the GIL)
  LAUNCHER_WORLD_SIZE   the planned number of ranks; another WORLD_SIZE is an error
  LAUNCHER_SECRETS      files (joined by os.pathsep): each becomes the variable that is its name
  LAUNCHER_NVME         paths (joined by os.pathsep) for NVMe offload, dealt out over the local ranks
  LAUNCHER_BACKEND      gloo: train on CPUs
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import runpy
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import NoReturn

PR_SET_PDEATHSIG = 1
SHOW = getattr(signal, "SIGRTMIN", 34) + 9  # stacks.py sends it


def main(argv: list[str]) -> None:
    """Run the script as `__main__`; leaves by the exit code of the script."""
    die_with_parent()
    connect_output()
    answer_for_stacks()
    sys.argv = argv
    script = argv[0]
    try:
        check_world_size()
        reveal_secrets()
        spread_nvme()
        hush()
        if os.environ.get("LAUNCHER_BACKEND") == "gloo":
            use_cpu()
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            record(leaving)
            raise
    except BaseException as error:  # noqa: BLE001 - the script is a guest: whatever it raises is reported
        record(error)
        error.__traceback__ = strip(error.__traceback__)  # excepthook looks here, whatever it is given
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    leave_process_group()
    leave()


def die_with_parent() -> None:
    """A rank must not outlive a torchrun that was killed. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def connect_output() -> None:
    """Give standard output and error to the agent, before anything can print."""
    pipes = os.environ.get("LAUNCHER_PIPES")
    if not pipes:
        return
    pipe = os.open(os.path.join(pipes, os.environ["LOCAL_RANK"]), os.O_WRONLY)  # noqa: PTH118
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    os.close(pipe)


def answer_for_stacks() -> None:
    """Show what every thread is doing when the agent asks; only who has left its number is asked."""
    folder = os.environ.get("LAUNCHER_RANKS")
    if not folder:
        return
    rank = os.environ["RANK"]
    file = os.open(os.path.join(folder, f"{rank}.stacks"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # noqa: PTH118
    faulthandler.register(SHOW, file=file, all_threads=True, chain=False)
    Path(folder, f"{rank}.pid").write_text(str(os.getpid()))


def check_world_size() -> None:
    """A cluster that fell apart trains N times the same model without a word; this is the word."""
    planned = os.environ.get("LAUNCHER_WORLD_SIZE")
    seen = os.environ.get("WORLD_SIZE")
    if planned and planned != seen:
        sys.exit(
            f"launcher: the plan has {planned} ranks (LAUNCHER_WORLD_SIZE), torchrun started {seen} (WORLD_SIZE):\n"
            "  the nodes did not find each other, or the Accelerate config is not the plan's"
        )


def reveal_secrets() -> None:
    """Set the secrets as variables, here and not before: this environment is memory, and shows in no /proc file."""
    for file in os.environ.get("LAUNCHER_SECRETS", "").split(os.pathsep):
        if file:
            os.environ[Path(file).name] = os.fsdecode(Path(file).read_bytes().removesuffix(b"\n"))


def spread_nvme() -> None:
    """Deal the NVMe paths over the local ranks, for each way by which DeepSpeed hears of them."""
    paths = [path for path in os.environ.get("LAUNCHER_NVME", "").split(os.pathsep) if path]
    if not paths:
        return
    path = paths[int(os.environ.get("LOCAL_RANK", "0")) % len(paths)]
    for what in ("OPTIMIZER", "PARAM"):
        # Plugin settings: Accelerate reads these two variables and nobody else sets them.
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") == "nvme":
            os.environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_NVME_PATH"] = path
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path != paths[0] and file != "none":
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = file_with_nvme(file, paths[0], path)


def file_with_nvme(file: str, named: str, path: str) -> str:
    """The text of a DeepSpeed file with another NVMe path than `named`; Accelerate takes it in place of a file name."""
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    for part in ("offload_optimizer", "offload_param"):
        block = config.get("zero_optimization", {}).get(part)
        if isinstance(block, dict) and block.get("nvme_path") == named:
            block["nvme_path"] = path
    return json.dumps(config)


def hush() -> None:
    """DeepSpeed uses names of collectives that torch calls deprecated: a warning per step that no user can mend."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def use_cpu() -> None:
    """Build Accelerate's state for CPUs first: without CUDA it finds no backend and believes in one process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        forgo_unbuilt_comm()
        from accelerate import PartialState

        PartialState(backend="gloo")
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        from accelerate import PartialState

        PartialState(cpu=True, backend="gloo")


def forgo_unbuilt_comm() -> None:
    """Where DeepSpeed's shared-memory collectives are not prebuilt, use gloo alone.

    DeepSpeed would compile them now, for a minute, or fail without a compiler. torchrun does not set the
    LOCAL_SIZE they need, so they would not be used anyway. The table is DeepSpeed's own and made to be edited.
    """
    from deepspeed import ops
    from deepspeed.git_version_info import installed_ops

    if not installed_ops.get("deepspeed_shm_comm"):
        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def record(error: BaseException) -> None:
    """Leave a note of what went wrong and when, to the microsecond: the earliest of all ranks is the cause."""
    folder = os.environ.get("LAUNCHER_ERRORS")
    if not folder:
        return
    rank = int(os.environ.get("RANK", "0"))
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    note = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        # What happens to this process from here on is no cause: torchrun may end it before it has left by itself.
        "exit_code": code & 0xFF,
        "signal": None,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(note), encoding="utf-8")


def strip(frames: TracebackType | None) -> TracebackType | None:
    """Without our own frames and runpy's: what remains is the script's."""
    while frames is not None and is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return frames


def is_ours(filename: str) -> bool:
    """Whether a frame belongs to the start-up, not to the script."""
    return filename in (__file__, runpy.__file__, "<frozen runpy>")


def leave_process_group() -> None:
    """A script that ended well and left the process group open: close it, or its threads race with the exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def leave() -> NoReturn:
    """Leave as multiprocessing's children do: everything that Python owes is done, then the process ends at once.

    What an ordinary exit would add are destructors of C++ globals, in no defined order, while threads of gloo and of
    DeepSpeed's engine still run: under ZeRO-3 one rank in some hundreds aborted there, after its script had ended well.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # noqa: SLF001 - what multiprocessing calls, too
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])

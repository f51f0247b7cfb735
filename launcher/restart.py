"""Whether a run that failed is started again: the user's rules first, else by what a new attempt could change.

What the script itself raises or returns is its user's to mend: a second attempt would end as the first. A lost node, a
hang, a rank that was killed, and what the network or a device did to a rank may be over the next time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from cluster.errors import InputError
from launcher.events import NodeEnded
from launcher.inside import cause

FIRST_DELAY, LONGEST_DELAY = 10.0, 300.0  # seconds before the first restart, doubled each time, and at most

# What hardware and its drivers say through a RuntimeError. Memory that ran out is the user's business.
_DEVICE = re.compile(r"CUDA error|NCCL|cuDNN|CUBLAS_STATUS|ECC error|unspecified launch failure", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError", re.IGNORECASE)
_PASSING = ("ConnectionError", "ConnectionResetError", "ConnectionAbortedError", "BrokenPipeError", "TimeoutError")
_NETWORK = ("DistNetworkError", "DistStoreError", "DistBackendError", cause.HANG, cause.RESTART)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How often at most, and the user's rules: exit code or pattern -> whether to start again; the first one counts."""

    restarts: int = 0
    on_exit: tuple[tuple[int, bool], ...] = ()
    on_log: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Start again after `delay` seconds, or not; and why, in a few words."""

    again: bool
    why: str
    delay: float = 0.0


def read_policy(restarts: int, on_exit: Iterable[str], on_log: Iterable[str]) -> Policy:
    """The policy of the options; `InputError` for a rule that is none."""
    return Policy(
        restarts=restarts,
        on_exit=tuple(_exit_rule(text) for text in on_exit),
        on_log=tuple(_log_rule(text) for text in on_log),
    )


def _exit_rule(text: str) -> tuple[int, bool]:
    code, again = _rule(text, "--on-exit", "such as 17=restart, or 2=fail")
    if not code.isascii() or not code.isdecimal() or not 1 <= int(code) <= 255:  # noqa: PLR2004 - a process has these
        raise InputError(f"{code!r} is no exit code", where="--on-exit", next_step="1 to 255; 128 + N for signal N")
    return int(code), again


def _log_rule(text: str) -> tuple[str, bool]:
    pattern, again = _rule(text, "--on-log", "such as 'CUDA error=restart', or 'loss is nan=fail'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}", where="--on-log") from None
    return pattern, again


def _rule(text: str, where: str, example: str) -> tuple[str, bool]:
    what, _, then = text.rpartition("=")
    if not what or then not in ("restart", "fail"):
        raise InputError(f"{text!r} is no rule", where=where, next_step=example)
    return what, then == "restart"


def judge(
    policy: Policy, ends: Mapping[str, NodeEnded], *, done: int, matched: bool | None, progressed: bool
) -> Decision:
    """Whether to start again after `done` restarts.

    `matched` is what the first --on-log rule that met a line says; `progressed` whether a checkpoint was written.
    """
    again, why = _worth_it(policy, ends, matched=matched)
    if not again:
        return Decision(again=False, why=why)
    if done >= policy.restarts:
        return Decision(again=False, why=f"it was started again {done} times" if done else "no restarts were asked for")
    if done and not progressed:
        return Decision(again=False, why="the last restart wrote no checkpoint: one more would come no further")
    return Decision(again=True, why=why, delay=min(LONGEST_DELAY, FIRST_DELAY * 2**done))


def _worth_it(policy: Policy, ends: Mapping[str, NodeEnded], *, matched: bool | None) -> tuple[bool, str]:
    if matched is not None:
        return matched, "a line of the log says so (--on-log)"
    found = cause.first_failure(asdict(end) for end in ends.values())
    if found is None:
        return False, "nothing failed"
    failure = found[2]
    code = 1 if failure is None else int(failure["exit_code"])
    rule = next((again for wanted, again in policy.on_exit if code == wanted), None)
    if rule is not None:
        return rule, f"exit code {code} says so (--on-exit)"
    return (True, "a node was lost") if failure is None else _by_itself(failure)


def _by_itself(failure: cause.Report) -> tuple[bool, str]:
    said = f"{failure['type']}: {failure['message']}"
    if _MEMORY.search(said):
        return False, "memory that ran out once runs out again"
    device = failure["type"] in ("RuntimeError", "AcceleratorError") and _DEVICE.search(failure["message"])
    echo = cause.is_echo({"oom": False}, failure)
    if failure["signal"] or failure["type"] in (*_NETWORK, *_PASSING) or device or echo:
        return True, "it may be over the next time"
    return False, "the script itself ended so, and would again"

"""Which failure of a run was the first: a judgment over what its nodes report. Pure; the same on nodes and in commands.

A report is a mapping: {"node", "time", "code", "stopped", "oom", "lost", "failures": [{"rank", "exit_code", "signal",
"time", "type", "message"}], "others": [reports that this node heard of the other nodes]}. Times are in seconds since
the epoch, by one clock. `stopped`: it was told to end, and nothing of it had failed before. `lost`: not the node's own
word, but why it is taken for gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Report = Mapping[str, Any]

# What a rank says when it was another one that died: never the first cause while there is any other.
_ECHO = re.compile(
    r"connection (closed|reset) by|broken pipe|connection refused|socket (timeout|closed)|remote process exited"
    r"|timed out waiting|store.*(lost|closed)|heartbeat|nccl.*(abort|remote error)|peer",
    re.IGNORECASE,
)
# The types of failures that nobody noted himself: nothing went on any more; the engine was restarted.
HANG, RESTART = "Hang", "Restart"
MEMORY = "OutOfMemory"  # the type of a failure that the kernel is to be asked about
OOM = "out of memory: the kernel killed it at the container's limit"


def first_cause(reports: Iterable[Report]) -> tuple[str, str] | None:
    """The node that failed first and how, in one line; None when every node ended well or was told to stop."""
    found = first_failure(reports)
    return found and found[:2]


def first_failure(reports: Iterable[Report]) -> tuple[str, str, Report | None] | None:
    """The same, and the failure itself; None in its place where nobody could explain the end.

    Of all failures of all nodes the earliest that is not merely an echo of another one's death; else the earliest end
    that nobody could explain (a lost node), whose echo the others may be. A signal or an out-of-memory kill is never
    an echo: no collective dies of one.
    """
    own = {str(one["node"]): one for one in reports}
    bad = [one for one in _known(own) if one["code"] != 0 and not one["stopped"]]
    failures = sorted(_each(bad), key=_earliest)
    silent = [(one["time"], one["node"], _end(one)) for one in bad if not one["oom"] and not one["failures"]]
    silent += _missed(own, failed={report["node"] for report, _ in failures})
    if failures and not (silent and is_echo(*failures[0])):
        report, failure = failures[0]
        return report["node"], _failure(failure, report), failure
    return (*min(silent)[1:], None) if silent else None


def node_end(report: Report) -> str:
    """How one node ended, in a line that does not name it; empty when it ended well."""
    if report["code"] == 0:
        return ""
    failures = sorted(_each([report]), key=_earliest)
    told = report["stopped"] and all(failure["signal"] == "SIGTERM" for _, failure in failures)
    if failures and not told and not is_echo(*failures[0]):
        failure = failures[0][1]
        rank = "" if failure["rank"] is None else f"rank {failure['rank']}: "
        return f"{rank}{OOM if report['oom'] else how(failure)}"
    if failures or report["stopped"]:
        return "it was stopped, or broke off, because another node had failed"
    return report["lost"] or f"exit {report['code']}"


def _known(own: Mapping[str, Report]) -> list[Report]:
    """One report a node: its own, or what it told the others before it was lost to us."""
    told = {
        str(other["node"]): other
        for report in own.values()
        for other in report.get("others") or ()
        if not other["lost"] and (other["node"] not in own or own[other["node"]]["lost"])
    }
    return [*({**own, **told}.values())]


def _missed(own: Mapping[str, Report], *, failed: set[str]) -> list[tuple[float, str, str]]:
    """The node that most others lost; both, where two lost each other and nobody else tells which one was cut off."""
    losses = [
        (other, str(report["node"]))
        for report in own.values()
        for other in report.get("others") or ()
        if other["lost"] and other["node"] not in failed
    ]
    if not losses:
        return []
    votes: dict[str, list[str]] = {}
    for other, by in losses:
        votes.setdefault(str(other["node"]), []).append(by)
    most = max(map(len, votes.values()))
    lost = sorted(node for node, by in votes.items() if len(by) == most)
    first = next(other for other, _ in losses if other["node"] == lost[0])
    if len(lost) == 2 and votes[lost[0]] == [lost[1]] and votes[lost[1]] == [lost[0]]:  # noqa: PLR2004 - a pair
        return [(first["time"], lost[0], f"nodes {lost[0]} and {lost[1]} lost each other: {first['lost']}")]
    return [(first["time"], lost[0], _end(first))]


def _earliest(one: tuple[Report, Report]) -> tuple[bool, float, str, int]:
    report, failure = one
    rank = failure["rank"]
    return is_echo(report, failure), failure["time"], report["node"], -1 if rank is None else rank


def _each(bad: Iterable[Report]) -> list[tuple[Report, Report]]:
    """Every failure with the report it stands in; memory is the cause whatever the ranks said."""
    memory = {"rank": None, "exit_code": 1, "signal": None, "time": 0.0, "type": MEMORY, "message": ""}
    return [(one, failure) for one in bad for failure in ([memory] if one["oom"] else one["failures"])]


def is_echo(report: Report, failure: Report) -> bool:
    """Whether it is what a rank says when it was another one that died."""
    if report["oom"] or failure["signal"] not in (None, "SIGABRT") or failure["type"] in (HANG, RESTART):
        return False
    return bool(_ECHO.search(failure["message"]))


def _failure(failure: Report, report: Report) -> str:
    rank = f", rank {failure['rank']}" if failure["rank"] is not None else ""
    return f"node {report['node']}{rank}: {OOM if report['oom'] else how(failure)}"


def how(failure: Report) -> str:
    """How a rank ended, in few words."""
    if failure["signal"]:
        return f"killed by {failure['signal']}"
    if failure["type"] in (HANG, RESTART):
        return _one_line(failure["message"])
    if failure["type"] == "SystemExit":  # its message is the code again, or was printed by Python already
        return f"exit {failure['exit_code']}"
    said = ": ".join(part for part in (failure["type"], _one_line(failure["message"])) if part)
    return f"exit {failure['exit_code']}{': ' + said if said else ''}"


def _end(report: Report) -> str:
    if report["lost"]:
        return f"node {report['node']}: {report['lost']}"
    return f"node {report['node']}: exit {report['code']}"


def _one_line(text: str, *, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"

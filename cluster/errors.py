"""The error tree: everything a user can be told, with its exit code.

    ClusterError                     1   root: where, what, what next
    ├── InputError                   2   a file, flag or argument that cannot be right (path:line:col)
    ├── NodeError                        one node could not do what was asked; carries its name
    │   ├── UnreachableError         3   no TCP, no SSH banner, or no authentication
    │   ├── UntrustedError           3   the host key is not the pinned one, or none is pinned
    │   ├── CommandError             4   a command on the node ended badly
    │   └── EngineError              4   the container engine is down, refuses, or lacks permission
    │       └── ImageError           5   an image could not be built, sent or loaded
    ├── PreconditionError            4   findings that forbid the start
    ├── LockedError                  7   somebody else holds it
    ├── IntegrityError               8   bytes are not what they were said to be
    └── Interrupted                130   Ctrl-C or SIGTERM, after everything was put away

Third-party exceptions are translated at the seam that names the library (`ssh`, `dockerd`, `local`, `processes`,
`document`) and nowhere else.
"""

from __future__ import annotations


class ClusterError(Exception):
    """Something a user can act on.

    `what` is one sentence; `where` a place (`path:line:col`, `node gpu-03 (10.0.0.13:22)`); `detail` further lines
    (what was tried, what a program said); `next_step` what the user can do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        detail: tuple[str, ...] = (),
        next_step: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.detail = detail
        self.next_step = next_step

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [head, *(f"  {line}" for line in self.detail)]
        if self.next_step:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(lines)


class InputError(ClusterError):
    """Input that cannot be right; nothing was changed.

    `place`: the key of the inventory that it is about, where whoever noticed it does not know the file.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        detail: tuple[str, ...] = (),
        next_step: str | None = None,
        place: tuple[str | int, ...] = (),
    ) -> None:
        super().__init__(what, where=where, detail=detail, next_step=next_step)
        self.place = place


class NodeError(ClusterError):
    """One node could not do what was asked of it."""

    exit_code = 4

    def __init__(
        self,
        node: str,
        what: str,
        *,
        detail: tuple[str, ...] = (),
        next_step: str | None = None,
    ) -> None:
        super().__init__(what, where=f"node {node}", detail=detail, next_step=next_step)
        self.node = node


class UnreachableError(NodeError):
    """No connection: refused, timed out, no SSH banner, no name, or no key accepted."""

    exit_code = 3


class UntrustedError(NodeError):
    """The host key is not the one that was pinned, or none was pinned."""

    exit_code = 3


class CommandError(NodeError):
    """A command on the node ended badly."""


class EngineError(NodeError):
    """The container engine does not answer, refuses, or may not be used."""


class ImageError(EngineError):
    """An image could not be built, sent, loaded or found."""

    exit_code = 5


class PreconditionError(ClusterError):
    """The nodes are not fit for the job; the findings say why."""

    exit_code = 4


class LockedError(ClusterError):
    """Somebody else holds what we need."""

    exit_code = 7


class IntegrityError(ClusterError):
    """Bytes are not what they were said to be."""

    exit_code = 8


class Interrupted(ClusterError):
    """Stopped by the user, after everything was put away."""

    exit_code = 130

"""Containers as values: what one is asked to be, what one is; and the labels by which ours are found."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

LABEL_CLUSTER = "launcher.cluster"
LABEL_OWNER = "launcher.owner"  # the login name on the node: what another one started is not ours
LABEL_NODE = "launcher.node"
LABEL_ROLE = "launcher.role"  # "node": idle, one per machine; "run": one launch
LABEL_RUN = "launcher.run"
LABEL_STARTER = "launcher.starter"  # the process that starts the run: when it is gone too early, nobody will
LABEL_OPERATOR = "launcher.operator"  # who started the run, and from which machine: user@host
LABEL_RANK = "launcher.rank"
LABEL_NODES = "launcher.nodes"  # the names of all nodes of the run, in the order of their ranks
LABEL_OUT = "launcher.out"  # where on the node a run's log is
LABEL_DETACHED = "launcher.detached"  # no command owns this run: who sees its end clears it away
LABEL_GRACE = "launcher.grace"  # seconds that a run may take to end by itself
LABEL_PLAN = "launcher.plan"  # fingerprint of the specification: unchanged means nothing to do


class ContainerState(Enum):
    """The life of a container, in our words."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


# Docker's and podman's words -> ours. Anything else is a bug or a new engine, and is treated as running: never removed.
FOREIGN_STATES = {
    "created": ContainerState.CREATED,
    "configured": ContainerState.CREATED,
    "initialized": ContainerState.CREATED,
    "running": ContainerState.RUNNING,
    "restarting": ContainerState.RUNNING,
    "removing": ContainerState.ENDED,
    "paused": ContainerState.PAUSED,
    "exited": ContainerState.ENDED,
    "stopped": ContainerState.ENDED,
    "dead": ContainerState.ENDED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A bind mount. The source must exist: Docker would create it as root on the root disk."""

    source: str
    target: str
    read_only: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """What a container is asked to be. Everything not said here is the engine's safe default.

    Never privileged, no added capability; `secrets_dir` is a tmpfs that is filled after the start.
    """

    name: str
    image: str
    argv: tuple[str, ...]
    labels: dict[str, str]
    env: dict[str, str] = field(default_factory=dict)
    workdir: str | None = None
    user: str | None = None  # "uid:gid"
    groups: tuple[int, ...] = ()  # further ones of that user
    mounts: tuple[Mount, ...] = ()
    devices: tuple[str, ...] = ()
    gpus: bool = False
    shm_bytes: int | None = None
    ulimits: tuple[tuple[str, int], ...] = ()
    secrets_dir: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """What a container is. `code` is set once it has ended; `oom` when the kernel killed it for memory."""

    id: str
    name: str
    image: str
    state: ContainerState
    labels: dict[str, str]
    code: int | None = None
    oom: bool = False
    started: str | None = None  # RFC 3339, by the node's clock

    @property
    def is_live(self) -> bool:
        """Whether it may hold processes."""
        return self.state in (ContainerState.RUNNING, ContainerState.PAUSED)

"""What can go wrong with a run, below `cluster.errors`.

ClusterError
├── InputError
│   └── PlanError     2   settings that contradict each other, or the nodes
├── NodeError
│   └── BusyError     7   another command of ours is at work on the node
└── RunError          1   the job failed; the first cause is in `what`
"""

from __future__ import annotations

from cluster.errors import ClusterError, InputError, NodeError


class PlanError(InputError):
    """Settings that contradict each other; refused by name before anything starts."""


class RunError(ClusterError):
    """The job failed; `what` is the first cause: node, rank, how it ended."""


class BusyError(NodeError):
    """Another command of ours is at work on the node."""

    exit_code = 7

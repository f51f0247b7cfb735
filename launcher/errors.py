"""What can go wrong with a run, below `cluster.errors`.

ClusterError
├── InputError
│   └── PlanError     2   settings that contradict each other, or the nodes
└── RunError          1   the job failed; the first cause is in `what`
"""

from __future__ import annotations

from cluster.errors import ClusterError, InputError


class PlanError(InputError):
    """Settings that contradict each other; refused by name before anything starts."""


class RunError(ClusterError):
    """The job failed; `what` is the first cause: node, rank, how it ended."""

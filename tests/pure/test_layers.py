"""What an engine has of an image: a common beginning of its layers, and nothing else."""

from __future__ import annotations

import pytest

from cluster.layers import Held, shared


def held(*layers: str) -> Held:
    return Held(id="sha256:0", layers=layers)


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        ([], 0),
        ([held()], 0),
        ([held("a", "b", "c")], 3),
        ([held("a", "b", "c", "d")], 3),
        ([held("a")], 1),
        ([held("a", "x", "c"), held("a", "b")], 2),
        ([held("b", "c")], 0),  # the same layers, upon others
    ],
)
def test_a_common_beginning_counts(engine: list[Held], count: int) -> None:
    assert shared(("a", "b", "c"), engine) == count

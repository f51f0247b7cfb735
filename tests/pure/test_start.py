"""Who is told what when the nodes are taken."""

from __future__ import annotations

import pytest

from cluster.container import LABEL_OPERATOR, LABEL_ROLE, LABEL_RUN, Container, ContainerState
from cluster.errors import LockedError
from launcher.stages.start import refuse_foreign


def container(labels: dict[str, str], state: ContainerState = ContainerState.RUNNING) -> Container:
    return Container(id="1", name="launcher-lab-gpu-01-run", image="sha256:feed", state=state, labels=labels)


OURS = {LABEL_ROLE: "run", LABEL_RUN: "20261126-170512-a01b", LABEL_OPERATOR: "anna@laptop"}


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (OURS, "run 20261126-170512-a01b is under way, started by anna@laptop, since 2026-11-26 17:05:12 UTC"),
        ({**OURS, LABEL_OPERATOR: ""}, "run 20261126-170512-a01b is under way, since 2026-11-26 17:05:12 UTC"),
        ({**OURS, LABEL_RUN: "other"}, "run other is under way, started by anna@laptop"),
    ],
)
def test_who_comes_second_sees_who_came_first(labels: dict[str, str], told: str) -> None:
    with pytest.raises(LockedError) as caught:
        refuse_foreign({"gpu-01": (container(labels),)})
    assert str(caught.value).splitlines()[0] == f"node gpu-01: {told} (container launcher-lab-gpu-01-run)"
    assert caught.value.exit_code == 7


def test_what_has_ended_and_what_is_idle_holds_nothing() -> None:
    refuse_foreign({"gpu-01": (container(OURS, ContainerState.ENDED), container({**OURS, LABEL_ROLE: "node"}))})

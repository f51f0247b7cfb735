"""Who starts a run, and whether that process is proven to be gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster.container import LABEL_STARTER, Container, ContainerState
from launcher import operator


def test_an_operator_is_a_user_on_a_machine() -> None:
    user, _, host = operator.name().partition("@")
    assert user
    assert host


def test_this_process_is_there_and_an_ended_one_is_gone() -> None:
    starter = operator.starter()
    assert not operator.is_gone(starter)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    place = starter.rpartition("/")[0]
    assert place
    assert operator.is_gone(f"{place}/{ended.pid}")


@pytest.mark.parametrize("starter", ["", "x", "/", f"another-boot/4026531836/{2**22 + 1}", f"/{os.getpid()}", "a/b/-1"])
def test_of_another_machine_nothing_is_proven(starter: str) -> None:
    assert not operator.is_gone(starter)


def test_what_has_begun_or_ended_is_not_waiting_to_be_started() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    labels = {LABEL_STARTER: f"{operator.starter().rpartition('/')[0]}/{ended.pid}"}
    states = {
        state: operator.never_starts(Container(id="1", name="it", image="x", state=state, labels=labels))
        for state in ContainerState
    }
    assert [state for state, never in states.items() if never] == [ContainerState.CREATED]

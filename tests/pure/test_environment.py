"""Environments side by side: what differs comes first, what is the same once."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.views.environment import Comparison, compare, comparison_data, comparison_text

GPU_01: dict[str, dict[str, Any]] = {
    "versions": {"torch": "2.13.0", "nccl": "2.27.3"},
    "machine": {"cpus": 64},
    "variables": {"PATH": "/bin"},
}
GPU_02: dict[str, dict[str, Any]] = {
    **GPU_01,
    "versions": {"torch": "2.13.0", "nccl": "2.26.1"},
    "variables": {"PATH": "/bin", "NCCL_DEBUG": ""},
}


def test_what_is_the_same_and_what_differs() -> None:
    assert compare({"gpu-01": GPU_01, "gpu-02": GPU_02, "gpu-03": GPU_01}) == Comparison(
        nodes=("gpu-01", "gpu-02", "gpu-03"),
        same={"versions": {"torch": "2.13.0"}, "machine": {"cpus": 64}, "variables": {"PATH": "/bin"}},
        differs={
            "versions": {"nccl": {"gpu-01": "2.27.3", "gpu-02": "2.26.1", "gpu-03": "2.27.3"}},
            "variables": {"NCCL_DEBUG": {"gpu-01": None, "gpu-02": "", "gpu-03": None}},
        },
    )


def test_a_section_that_one_node_lacks_differs() -> None:
    found = compare(
        {"gpu-01": {"ops": {"error": "unknown: ImportError: torch"}}, "gpu-02": {"ops": {"cpu_adam": "yes"}}}
    )
    assert found.same == {}
    assert list(found.differs["ops"]) == ["error", "cpu_adam"]


def test_the_differences_come_first_and_name_the_many_before_the_few() -> None:
    found = compare({"gpu-01": GPU_02, "gpu-02": GPU_01, "gpu-03": GPU_01})
    assert comparison_text("lab", found) == (
        "cluster lab: gpu-01, gpu-02, gpu-03\n"
        "\n"
        "differs\n"
        "  versions: nccl\n"
        "    gpu-02, gpu-03  2.27.3\n"
        "    gpu-01          2.26.1\n"
        "  variables: NCCL_DEBUG\n"
        "    gpu-02, gpu-03  -\n"
        "    gpu-01          (empty)\n"
        "\n"
        "versions, the same on all\n"
        "  torch  2.13.0\n"
        "\n"
        "machine, the same on all\n"
        "  cpus  64\n"
        "\n"
        "variables, the same on all\n"
        "  PATH  /bin"
    )


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ({"gpu-01": {"versions": {"torch": "2.13.0"}}}, "cluster lab: gpu-01\n\nversions\n  torch  2.13.0"),
        (
            {"gpu-01": {"versions": {"torch": "2.13.0"}}, "gpu-02": {"versions": {"torch": "2.13.0"}}},
            "cluster lab: gpu-01, gpu-02\n\nthe nodes differ in nothing\n\nversions, the same on all\n  torch  2.13.0",
        ),
    ],
)
def test_nodes_that_do_not_differ(reports: dict[str, dict[str, dict[str, str]]], said: str) -> None:
    assert comparison_text("lab", compare(reports)) == said


def test_as_data() -> None:
    found = compare({"gpu-01": GPU_01})
    assert comparison_data("lab", found) == {"cluster": "lab", "nodes": ["gpu-01"], "differs": {}, "same": GPU_01}

"""The error tree: drawn in its docstrings as it is, with the exit codes of the contract."""

from __future__ import annotations

import inspect
import re

import pytest

import cluster.errors
import launcher.errors
from cluster.errors import ClusterError, InputError, Interrupted, NodeError

CODES = {
    "ClusterError": 1,
    "InputError": 2,
    "PlanError": 2,
    "NodeError": 4,
    "UnreachableError": 3,
    "UntrustedError": 3,
    "CommandError": 4,
    "EngineError": 4,
    "ImageError": 5,
    "BusyError": 7,
    "PreconditionError": 4,
    "RunError": 1,
    "LockedError": 7,
    "IntegrityError": 8,
    "Interrupted": 130,
}


def tree(kind: type[ClusterError] = ClusterError) -> dict[str, type[ClusterError]]:
    found = {kind.__name__: kind}
    for below in kind.__subclasses__():
        found |= tree(below)
    return {name: one for name, one in found.items() if one.__module__ in ("cluster.errors", "launcher.errors")}


def drawn(text: str) -> list[tuple[int, str, str]]:
    """(depth, name, code) of every line of a tree that is drawn in a docstring."""
    lines = re.findall(r"^((?:│? +|[├└]── )*)(\w+(?:Error|Interrupted)|Interrupted)(?: +(\d+))?", text, re.MULTILINE)
    return [(len(before) // 4, name, code) for before, name, code in lines]


def test_every_error_has_the_exit_code_of_the_contract() -> None:
    assert {name: kind.exit_code for name, kind in tree().items()} == CODES


@pytest.mark.parametrize("module", [cluster.errors, launcher.errors], ids=lambda module: module.__name__)
def test_the_tree_is_drawn_as_it_is(module: object) -> None:
    kinds = tree()
    above: dict[int, str] = {}
    text = inspect.getdoc(module) or ""
    lines = drawn(inspect.cleandoc(text))
    first = min(depth for depth, _, _ in lines)
    for depth, name, code in lines:
        above[depth] = name
        assert name in kinds
        assert code in ("", str(CODES[name]))
        if depth > first:
            assert kinds[name].__base__ is kinds[above[depth - 1]]
    own = {name for name, kind in kinds.items() if kind.__module__ == getattr(module, "__name__", "")}
    assert own <= {name for _, name, _ in lines}


def test_an_error_says_where_what_and_what_next() -> None:
    error = InputError("this is wrong", where="a.yaml:1:2", detail=("one", "two"), next_step="mend it")
    assert str(error).splitlines() == ["a.yaml:1:2: this is wrong", "  one", "  two", "  next: mend it"]
    assert str(InputError("this is wrong")) == "this is wrong"


def test_a_nodes_error_names_it() -> None:
    error = NodeError("gpu-01", "it burns", next_step="water")
    assert (error.node, str(error)) == ("gpu-01", "node gpu-01: it burns\n  next: water")


def test_an_interruption_is_no_node_and_no_input() -> None:
    assert not issubclass(Interrupted, (InputError, NodeError))

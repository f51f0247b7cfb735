"""Accelerate's test script: what `launcher test` makes of it, and the facts on which that stands."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from tests.oracle.running import INSIDE, run, run_on

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]

TRIAL = INSIDE / "trial.py"


def test_the_checks_of_the_script_are_the_ones_that_are_known_here() -> None:
    from accelerate.test_utils.scripts import test_script

    main = ast.parse(inspect.getsource(test_script.main))
    called = {node.func.id for node in ast.walk(main) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    checks = {name for name in called if hasattr(test_script, name) and inspect.isfunction(getattr(test_script, name))}
    checks -= {"is_datasets_available", "is_pytest_available"}
    known = {node.value for node in ast.walk(ast.parse(TRIAL.read_text())) if isinstance(node, ast.Constant)}
    assert checks <= known, f"new checks: {checks - known}"


def test_the_script_itself_fails_on_machines_that_share_no_folder(tmp_path: Path) -> None:
    from accelerate.test_utils.scripts import test_script

    machines = [tmp_path / "one", tmp_path / "two"]
    first, _ = run_on(machines, Path(test_script.__file__), stage=1)
    assert first.code == 1
    assert "AssertionError: Main process was not first" in first.text


def test_the_script_does_not_train_under_deepspeed() -> None:
    from accelerate.test_utils.scripts import test_script

    source = inspect.getsource(test_script.main)
    assert source.index("== DistributedType.DEEPSPEED:\n        return") < source.index("training_check(")


def test_the_check_of_tensors_is_for_two_processes() -> None:
    from accelerate import PartialState

    third = PartialState.__new__(PartialState)
    third.__dict__.update(_cpu=True, num_processes=3, process_index=2)
    with third.split_between_processes(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])) as results:
        assert results.shape == (0, 4), "where it is (1, 4), trial.py may make the check"


DEALING = {"dl_preparation_check", "central_dl_preparation_check"}


@pytest.mark.parametrize(("stage", "processes"), [(0, 2), (3, 3)])
def test_every_check_passes_on_machines_that_share_no_folder(tmp_path: Path, stage: int, processes: int) -> None:
    machines = [tmp_path / str(number) for number in range(processes)]
    ran = run_on(machines, TRIAL, stage=stage, processes=processes)
    for one in ran:
        assert one.code == 0, one.text
        passed = re.findall(r"^ok ([\w, ]+) \(", one.text, re.M)
        assert "training" in passed
        assert ("training_check" in passed) == (stage == 0)
        assert "process_execution_check" not in passed
        left_out = set(re.findall(r"^left out (\w+): it", one.text, re.M))
        assert left_out == (set() if processes == 2 else {"test_split_between_processes_tensor", *DEALING})
        assert f"passed {len(passed)} checks" in one.text


def test_on_one_machine_the_order_of_processes_is_checked_too(tmp_path: Path) -> None:
    ran = run(TRIAL, folder=tmp_path, stage=1)
    assert ran.code == 0, ran.text
    assert "ok process_execution_check (" in ran.text

"""The examples, run for real under DeepSpeed on CPUs: checkpoints, the ways back to the weights, and writing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle.running import EXAMPLES, Ran, run, run_on

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]

TRAIN = EXAMPLES / "train.py"
BATCH = ("--global-batch", 12)
SMALL = (*BATCH, "--steps", 4, "--save-every", 2, "--log-every", 1, "--width", 32, "--layers", 2, "--block", 32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """OUT of four steps by two processes under ZeRO-3, with checkpoints after the second and the fourth."""
    folder = tmp_path_factory.mktemp("trained")
    ran = run(TRAIN, *SMALL, "--out", "out", folder=folder, stage=3)
    assert ran.code == 0, ran.text
    assert len(ran.losses()) == 4
    return folder / "out", ran


def later(ran: Ran) -> dict[int, float]:
    """The losses after the checkpoint at step 2."""
    return {step: loss for step, loss in ran.losses().items() if step > 2}


def test_a_checkpoint_lists_its_files(trained: tuple[Path, Ran]) -> None:
    out, _ = trained
    folder = out / "step-00000002"
    assert json.loads((folder / "complete").read_text()) == {"step": 2, "processes": 2, "stage": 3}
    kept = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    listed = json.loads((folder / "files-00000.json").read_text())
    assert listed == {name: kept[name] for name in kept.keys() - {"complete", "latest", "files-00000.json"}}
    assert "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt" in kept


def test_the_newest_checkpoint_that_is_whole_is_taken(trained: tuple[Path, Ran], tmp_path: Path) -> None:
    out, ran = trained
    shutil.copytree(out, tmp_path / "out")
    newest = tmp_path / "out/step-00000004"
    (newest / "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"torn")
    (tmp_path / "out/step-00000002/latest").unlink()  # which nobody needs
    again = run(TRAIN, *SMALL, "--out", "out", "--resume", folder=tmp_path, stage=3)
    assert again.code == 0, again.text
    torn = "out/step-00000004 is not whole, trying the one before it; process 0 says: pytorch_model/zero_pp_rank_1"
    assert torn in again.text
    assert "resumed from out/step-00000002" in again.text
    assert again.losses() == later(ran)


def test_other_processes_than_wrote_a_checkpoint_are_refused(trained: tuple[Path, Ran], tmp_path: Path) -> None:
    out, _ = trained
    ran = run(TRAIN, *SMALL, "--resume", out, folder=tmp_path, stage=3, processes=1)
    assert ran.code == 1
    assert f"{out}/step-00000004 is of 2 processes, and these are 1:" in ran.text
    assert "Traceback" not in ran.text


def test_a_universal_checkpoint_goes_on_with_more_processes_on_the_same_curve(
    trained: tuple[Path, Ran], tmp_path: Path
) -> None:
    out, ran = trained
    made_universal(out / "step-00000002", tmp_path / "universal")
    more = run(TRAIN, *SMALL, "--resume", "universal", folder=tmp_path, stage=3, processes=3)
    assert more.code == 0, more.text
    assert "resumed from universal" in more.text
    assert more.losses() == pytest.approx(later(ran), rel=1e-5)


def made_universal(folder: Path, into: Path) -> None:
    """By DeepSpeed's own program; the step lies beside it, as in the checkpoint that it was made of."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=1"]
    folders = ["--input_folder", folder / "pytorch_model", "--output_folder", into / "pytorch_model"]
    subprocess.run([*command, "--num_merge_workers=1", *map(str, folders)], check=True, capture_output=True)
    shutil.copy(folder / "custom_checkpoint_0.pkl", into)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_machines_that_share_nothing_each_keep_what_they_need(tmp_path: Path, stage: int) -> None:
    machines = [tmp_path / "one", tmp_path / "two"]
    ran = run_on(machines, TRAIN, *SMALL, "--out", "out", stage=stage)
    assert [one.code for one in ran] == [0, 0], ran[0].text + ran[1].text
    (machines[1] / "out/step-00000004/complete").unlink()
    again = run_on(machines, TRAIN, *SMALL, "--out", "out", "--resume", stage=stage)
    assert [one.code for one in again] == [0, 0], again[0].text + again[1].text
    assert "step-00000004 is not whole" in again[0].text
    assert "process 1 says: it was not saved to its end" in again[0].text
    assert again[0].losses() == later(ran[0])


def test_three_ways_lead_back_to_the_same_weights(trained: tuple[Path, Ran]) -> None:
    out, _ = trained
    ran = run(EXAMPLES / "weights.py", *BATCH, "--out", out, folder=out.parent, stage=3)
    assert ran.code == 0, ran.text
    assert ways(ran) == {"converted", "loaded", "resumed", "final, float32"}


def test_sixteen_bits_are_the_same_weights_rounded(tmp_path: Path) -> None:
    ran = run(TRAIN, *SMALL, "--out", "out", "--recompute", folder=tmp_path, stage=2, precision="bf16")
    assert ran.code == 0, ran.text
    ran = run(EXAMPLES / "weights.py", *BATCH, "--out", "out", folder=tmp_path, stage=2, precision="bf16")
    assert ran.code == 0, ran.text
    assert ways(ran) == {"converted", "loaded", "resumed", "final, bfloat16"}


def ways(ran: Ran) -> set[str]:
    found = re.findall(r"^(\w.*?) +[\d,]+ weights, loss [\d.]+, the same bit for bit$", ran.text, re.M)
    return set(found)


def test_training_begins_with_given_weights_and_ends_in_the_precision_asked_for(
    trained: tuple[Path, Ran], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    out, ran = trained
    options = ("--load", out / "final", "--save-dtype", "bf16", "--recompute")
    begun = run(TRAIN, *SMALL, "--out", "out", *options, folder=tmp_path, stage=3)
    assert begun.code == 0, begun.text
    assert begun.losses()[1] < ran.losses()[3]
    weights = load_file(tmp_path / "out/final/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_recomputed_activations_change_nothing(trained: tuple[Path, Ran], tmp_path: Path) -> None:
    _, ran = trained
    again = run(TRAIN, *SMALL, "--out", "out", "--recompute", folder=tmp_path, stage=3)
    assert again.losses() == ran.losses()


PROMPTS = ("--prompt", "the red boat", "--prompt", "two blue", "--prompt", "3+4=", "--length", 12)


def test_a_model_that_nobody_holds_whole_writes_what_the_whole_one_does(
    trained: tuple[Path, Ran], tmp_path: Path
) -> None:
    out, _ = trained
    said = {}
    for processes in (1, 2):
        arguments = ("--model", out / "final", "--check", "--temperature", 0.7, *PROMPTS)
        ran = run(EXAMPLES / "inference.py", *arguments, folder=tmp_path, stage=3, processes=processes)
        assert ran.code == 0, ran.text
        assert "logits differ from the whole model's by at most " in ran.text
        said[processes] = ran.text.partition("--- the red boat\n")[2]
        held = re.findall(r"process \d holds [\d,]+ of [\d,]+ bytes \(([\d.]+)%\), (\d+) tensors whole", ran.text)
        assert held == [("50.0", "0")] * 2 if processes == 2 else [("100.0", "0")]
    assert said[1] == said[2]
    assert said[1].count("\n--- ") == 2


def test_only_one_machine_needs_the_model(trained: tuple[Path, Ran], tmp_path: Path) -> None:
    out, _ = trained
    shutil.copytree(out / "final", tmp_path / "one/final")
    machines = [tmp_path / "one", tmp_path / "two"]
    ran = run_on(machines, EXAMPLES / "inference.py", "--model", "final", "--check", "--length", 4, stage=3)
    assert [one.code for one in ran] == [0, 0], ran[0].text + ran[1].text
    assert re.search(r"process 1 holds .* it has read 0 bytes", ran[0].text)


@pytest.mark.parametrize(
    ("stage", "arguments", "said"),
    [
        (1, ("--model", "."), "only ZeRO-3 deals the weights out"),
        (3, ("--model", "nowhere"), "nowhere/config.json is missing"),
    ],
)
def test_what_cannot_be_written_with_is_refused_in_one_line(
    tmp_path: Path, stage: int, arguments: tuple[str, ...], said: str
) -> None:
    ran = run(EXAMPLES / "inference.py", *arguments, folder=tmp_path, stage=stage, processes=1)
    assert ran.code == 1
    assert said in ran.text
    assert "Traceback" not in ran.text


def test_the_all_reduce_is_right_and_measured_by_size(tmp_path: Path) -> None:
    ran = run(EXAMPLES / "allreduce.py", "--smallest", "64K", "--largest", "1M", folder=tmp_path, stage=0, processes=3)
    assert ran.code == 0, ran.text
    rows = [line.split() for line in ran.text.splitlines() if re.fullmatch(r" +\d+ +[\d.]+ +[\d.]+ +[\d.]+", line)]
    assert [int(row[0]) for row in rows] == [65536, 262144, 1048576]
    assert all(float(row[3]) == pytest.approx(float(row[2]) * 4 / 3, abs=2e-3) for row in rows)


def test_one_process_alone_has_nothing_to_measure(tmp_path: Path) -> None:
    ran = run(EXAMPLES / "allreduce.py", folder=tmp_path, stage=0, processes=1)
    assert ran.code == 1
    assert "two or more are needed" in ran.text

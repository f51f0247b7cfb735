"""The job file: read strictly, and below what the command line says."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.document import load, read
from cluster.errors import InputError
from launcher.job import Job, Settings
from launcher.jobfile import JobFile, make_settings, merge_notes, read_job_file
from launcher.zero import check


def job_file(text: str) -> JobFile:
    return read_job_file(read(text, "job.yaml"))


def test_all_settings_can_be_said() -> None:
    said = job_file(
        """
script: train.py
args: [--epochs, "3"]
stage: auto
offload_optimizer: cpu
precision: bf16
micro_batch: 4
clipping: 1
zero3_init: false
aio: {block_size: 1048576}
moe_leaf: [Experts]
set: {zero_optimization.round_robin_gradients: true}
env: {WANDB_MODE: offline}
secrets: [HF_TOKEN]
grace: 30
nodes: [gpu-02, gpu-01]
"""
    )
    assert said.settings == Settings(
        stage="auto",
        offload_optimizer="cpu",
        precision="bf16",
        micro_batch=4,
        clipping=1.0,
        zero3_init=False,
        aio=(("block_size", 1048576),),
        moe_leaf=("Experts",),
        overrides=(("zero_optimization.round_robin_gradients", True),),
    )
    assert (said.script, said.args, said.grace) == ("train.py", ("--epochs", "3"), 30)
    assert said.nodes == ("gpu-02", "gpu-01")


def test_every_setting_has_its_key_and_every_key_of_a_setting_its_field() -> None:
    others = {"script", "args", "set", "ds_config", "env", "secrets", "grace", "nodes"}
    others |= {"parameters", "model", "model_from", "sequence", "checkpointing"}
    assert set(JobFile.model_fields) - others == set(Settings.__dataclass_fields__) - {"overrides"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "job.yaml:1:1: the file is empty"),
        ("- a", "job.yaml:1:1: the file must be a mapping (lines of 'key: value')"),
        ("stage: 4", "job.yaml:1:1: stage must be 'auto', 0, 1, 2 or 3, not 4"),
        ("stge: 3", "job.yaml:1:1: stge is no key; did you mean 'stage'?"),
        ("script: a.py\nclipping: high", "job.yaml:2:1: clipping must be a number, not the text 'high'"),
        ("micro_batch: 0", "job.yaml:1:1: micro_batch must be at least 1, not 0"),
        ("precision: no", "job.yaml:1:12: a plain no may mean two things"),
    ],
)
def test_what_cannot_be_right_has_its_place(text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        job_file(text)
    assert str(refused.value).splitlines()[0] == said


def test_a_deepspeed_file_is_meant_from_the_job_files_folder(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("ds_config: zero3.json\n")
    assert read_job_file(load(path)).ds_config == tmp_path / "zero3.json"


def test_the_command_line_wins_and_says_so() -> None:
    text = "stage: 3\noffload_param: cpu\nset: {a.b: 1, c: 3}\naccumulation: 2"
    document = read(text, "job.yaml")
    below = read_job_file(document).settings
    flags = Settings(stage=2, accumulation=2, overrides=(("a.b", 2),), moe_leaf=("X",))
    assert flags.over(below) == Settings(
        stage=2, offload_param="cpu", accumulation=2, overrides=(("a.b", 2), ("c", 3)), moe_leaf=("X",)
    )
    assert merge_notes(flags, below, document) == (
        "stage: 2 of the command line wins over 3 (job.yaml:1:1)",
        "set a.b: 2 of the command line wins over 1 (job.yaml:3:7)",
    )


def test_settings_are_made_of_whatever_has_their_names() -> None:
    assert make_settings({"stage": 3, "aio": {"queue_depth": 4}, "moe_leaf": ["A"], "other": 1}) == Settings(
        stage=3, aio=(("queue_depth", 4),), moe_leaf=("A",)
    )


def test_the_annotated_job_file_loads_and_names_every_key() -> None:
    path = Path(__file__).parents[2] / "configs/job.yaml"
    said = read_job_file(load(path))
    left = set(JobFile.model_fields) - said.model_fields_set
    assert left == {"ds_config", "parameters", "model_from"}
    assert all(f"#   {name}: " in path.read_text() for name in left)
    check(Job(script="train.py", settings=said.settings), accelerator="cuda")

"""ZeRO settings: what both ways tell DeepSpeed, and what cannot be meant."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.errors import InputError
from launcher.errors import PlanError
from launcher.job import Job, Zero
from launcher.zero import check, file_for_node, needs_nvme, plugin_settings, read_config, uses_deepspeed


def with_file(**config: Any) -> Job:
    return Job(script="train.py", config=json.dumps(config))


def refusal(job: Job, *, accelerator: str = "cuda") -> list[str]:
    with pytest.raises(PlanError) as refused:
        check(job, accelerator=accelerator)
    assert refused.value.exit_code == 2
    return str(refused.value).splitlines()


def plain(**zero: Any) -> Job:
    return Job(script="train.py", zero=Zero(**zero))


CASES = {
    "stage": (
        plain(stage=4),
        "--stage: there is no ZeRO stage 4",
        "  next: choose 0, 1, 2 or 3",
    ),
    "accumulation": (
        plain(stage=1, accumulation=0),
        "--accumulation: 0 accumulation steps are not possible",
        "  next: 1 or more",
    ),
    "clipping below zero": (
        plain(stage=1, clipping=-0.5),
        "--clipping: -0.5 is no norm to clip at",
        "  next: 0 or more",
    ),
    "clipping at no number": (
        plain(stage=1, clipping=float("nan")),
        "--clipping: nan is no norm to clip at",
        "  next: 0 or more",
    ),
    "clipping without end": (
        plain(stage=1, clipping=float("inf")),
        "--clipping: inf is no norm to clip at",
        "  next: 0 or more",
    ),
    "clipping that nobody would do": (
        plain(clipping=1.0),
        "--clipping: clipping from outside needs ZeRO: plain training would ignore it",
        "  next: add --stage 1, 2 or 3, or clip in the script (accelerator.clip_grad_norm_)",
    ),
    "offload without ZeRO": (
        plain(offload_optimizer="cpu"),
        "--offload-optimizer: offloading the optimizer needs ZeRO",
        "  next: add --stage 1, 2 or 3, or leave --offload-optimizer out",
    ),
    "NVMe below stage 3": (
        plain(stage=2, offload_optimizer="nvme"),
        "--offload-optimizer: offloading the optimizer to NVMe needs ZeRO stage 3: at stage 2 DeepSpeed would use "
        "the CPU",
        "  next: add --stage 3, or use --offload-optimizer cpu",
    ),
    "parameters below stage 3": (
        plain(stage=2, offload_param="cpu"),
        "--offload-param: offloading the parameters needs ZeRO stage 3: at stage 2 DeepSpeed would ignore it",
        "  next: add --stage 3, or leave --offload-param out",
    ),
    "a file and settings": (
        Job(script="train.py", zero=Zero(stage=2), config="{}"),
        "--ds-config: a DeepSpeed file and plugin settings clash: Accelerate refuses them beside each other",
        "  next: write the stage, offload, accumulation and clipping into the file, or leave the file out",
    ),
    "a file and a precision": (
        Job(script="train.py", precision="bf16", config="{}"),
        "--ds-config: a DeepSpeed file and --precision clash: the file alone says in what precision DeepSpeed trains",
        '  next: write {"bf16": {"enabled": true}} into the file, and leave --precision out',
    ),
    "a file without ZeRO": (
        with_file(train_batch_size=8),
        "--ds-config: the file has no zero_optimization",
        '  next: add {"stage": …}',
    ),
    "a file with NVMe below stage 3": (
        with_file(zero_optimization={"stage": 2, "offload_optimizer": {"device": "nvme"}}),
        "--ds-config: zero_optimization.offload_optimizer.device nvme needs stage 3",
    ),
    "a file with a comment": (
        Job(script="train.py", config='{\n  "a": 1 // one\n}'),
        "--ds-config:2:10: this is not JSON: Expecting ',' delimiter",
        "  next: DeepSpeed takes strict JSON: no comments, no trailing commas",
    ),
}


@pytest.mark.parametrize(("job", "lines"), [(job, list(lines)) for job, *lines in CASES.values()], ids=list(CASES))
def test_what_cannot_be_meant_is_refused_by_name(job: Job, lines: list[str]) -> None:
    assert refusal(job) == lines


@pytest.mark.parametrize(
    ("precision", "cure"), [("fp16", "on CPU use --precision bf16, or no"), ("fp8", "use --precision bf16, or no")]
)
def test_a_precision_that_needs_a_gpu_is_refused_on_cpu(precision: Any, cure: str) -> None:
    job = Job(script="train.py", precision=precision)
    said = [f"--precision: --precision {precision} needs a GPU", f"  next: {cure}"]
    assert refusal(job, accelerator="cpu") == said
    check(job, accelerator="cuda")


@pytest.mark.parametrize(
    "job",
    [
        Job(script="train\udcff.py"),
        Job(script="train.py", args=("--name", "\udcff")),
        Job(script="train.py", args=("a\0b",)),
        Job(script="train.py", env=(("A", "\udcff"),)),
    ],
)
def test_words_that_would_not_arrive_as_they_are_are_refused(job: Job) -> None:
    with pytest.raises(InputError, match=r"is not UTF-8|holds a NUL byte"):
        check(job, accelerator="cuda")


@pytest.mark.parametrize(
    "job",
    [
        plain(),
        plain(accumulation=4),
        plain(stage=1, clipping=0.0),
        plain(stage=2, offload_optimizer="cpu", clipping=1.0, accumulation=8),
        plain(stage=3, offload_optimizer="nvme", offload_param="nvme"),
        with_file(zero_optimization={"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}),
        with_file(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}),
        with_file(zero_optimization={"stage": 1, "offload_optimizer": "auto"}),
        with_file(zero_optimization={}),
    ],
)
def test_what_can_be_meant_passes(job: Job) -> None:
    check(job, accelerator="cuda")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "ds.json: the key 'a' stands twice; DeepSpeed would take the last one, silently"),
        ('{"a": {"b": 1, "b": 1}}', "ds.json: the key 'b' stands twice; DeepSpeed would take the last one, silently"),
        ('{"a": NaN}', "ds.json: NaN is not JSON"),
        ('{"a": -Infinity}', "ds.json: -Infinity is not JSON"),
        ('{"a": 1e999}', "ds.json: 1e999 is larger than any number of a computer"),
        ("[]", "ds.json: a DeepSpeed configuration is a JSON object"),
        ('{"a": 1,}', "ds.json:1:9: this is not JSON: Illegal trailing comma before end of object"),
        ("", "ds.json:1:1: this is not JSON: Expecting value"),
        ("\ufeff{}", "ds.json:1:1: this is not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig)"),
        ("[" * 100_000, "ds.json: this JSON is nested too deeply"),
    ],
    ids=["twice", "twice inside", "nan", "infinity", "overflow", "list", "comma", "empty", "bom", "deep"],
)
def test_a_file_is_read_strictly_with_its_place(text: str, said: str) -> None:
    with pytest.raises(PlanError) as refused:
        read_config(text, name="ds.json")
    # Python 3.13 has words of its own for a trailing comma.
    older = "Illegal trailing comma before end of object", "Expecting property name enclosed in double quotes"
    assert str(refused.value).splitlines()[0] in (said, said.replace(*older))


def test_a_number_of_more_digits_than_python_reads_is_refused() -> None:
    with pytest.raises(PlanError, match="this is not JSON: Exceeds the limit"):
        read_config("9" * 5000, name="ds.json")


def test_plain_training_uses_no_deepspeed() -> None:
    assert [uses_deepspeed(plain(stage=stage)) for stage in range(4)] == [False, True, True, True]
    assert uses_deepspeed(with_file())


def test_the_plugin_says_everything_and_never_a_nvme_path() -> None:
    zero = Zero(stage=3, offload_optimizer="nvme", offload_param="cpu", accumulation=4, clipping=1.0)
    assert plugin_settings(zero) == {
        "deepspeed_multinode_launcher": "standard",
        "zero_stage": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": "nvme",
        "offload_param_device": "cpu",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
    }


def test_clipping_is_always_rendered_since_accelerate_would_fill_in_one() -> None:
    assert [plugin_settings(Zero(stage=stage))["gradient_clipping"] for stage in (1, 2, 3)] == [0.0] * 3


def test_what_belongs_to_stage_three_can_be_said_otherwise() -> None:
    below = plugin_settings(Zero(stage=2))
    assert (below["zero3_init_flag"], below["zero3_save_16bit_model"]) == (False, False)
    said = plugin_settings(Zero(stage=3, init=False, gather_16bit=False))
    assert (said["zero3_init_flag"], said["zero3_save_16bit_model"]) == (False, False)


@pytest.mark.parametrize(
    ("job", "needed"),
    [
        (plain(stage=3), False),
        (plain(stage=3, offload_param="nvme"), True),
        (plain(stage=3, offload_optimizer="nvme"), True),
        (with_file(zero_optimization={"stage": 3, "offload_param": {"device": "nvme"}}), True),
        (with_file(zero_optimization={"stage": 3, "offload_param": {"device": "cpu"}}), False),
        (with_file(zero_optimization="auto"), False),
        (with_file(), False),
    ],
)
def test_whether_anything_is_swapped_to_nvme(job: Job, needed: bool) -> None:
    assert needs_nvme(job) is needed


@pytest.mark.parametrize(
    ("given", "nvme", "made"),
    [
        ({"device": "nvme"}, "/nvme/0", {"device": "nvme", "nvme_path": "/nvme/0"}),
        ({"device": "nvme", "nvme_path": "auto"}, "/nvme/0", {"device": "nvme", "nvme_path": "/nvme/0"}),
        ({"device": "nvme", "nvme_path": None}, "/nvme/0", {"device": "nvme", "nvme_path": "/nvme/0"}),
        ({"device": "nvme", "nvme_path": "/fast"}, "/nvme/0", {"device": "nvme", "nvme_path": "/fast"}),
        ({"device": "nvme"}, None, {"device": "nvme"}),
        ({"device": "cpu"}, "/nvme/0", {"device": "cpu"}),
    ],
)
def test_the_users_file_gets_the_nodes_nvme_path_where_it_is_open(given: Any, nvme: str | None, made: Any) -> None:
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": given}, "train_batch_size": "auto"}
    text = file_for_node(with_file(**config), nvme)
    assert json.loads(text) == {**config, "zero_optimization": {"stage": 3, "offload_optimizer": made}}
    assert text.endswith("}\n")

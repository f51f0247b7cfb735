"""The table of DeepSpeed's keys: how it is read, and what its keys refuse. Its truth is held in tests/oracle."""

from __future__ import annotations

import pytest

from launcher.dskeys import FILLED, SECTIONS, Key, optimizer_params, places_of


def key(dotted: str) -> Key:
    *path, name = dotted.split(".")
    return SECTIONS[tuple(path)].keys[name]


@pytest.mark.parametrize(
    ("dotted", "fits", "not_fits", "must_be"),
    [
        ("wall_clock_breakdown", (True, False), ("true", 1, 0, None, []), "true or false"),
        ("train_batch_size", (1, 8, 8.0, None), (0, -1, 1.5, "8", True), "a whole number above 0"),
        ("gradient_clipping", (0, 0.5, 1), (-0.1, "1", None), "a number of at least 0"),
        ("zero_optimization.stage", (0, 3), (4, -1, "3", True), "a whole number between 0 and 3"),
        (
            "zero_optimization.zenflow.topk_ratio",
            (0.1, 0.9),
            (0, 1, 1.0),
            "a number between 0 and 1, neither of them",
        ),
        ("zero_optimization.offload_optimizer.ratio", (0, 0.5, 1), (-0.1, 1.1), "a number between 0 and 1"),
        ("zero_optimization.offload_optimizer.device", ("cpu",), ("CPU", "disk", 1), '"none", "cpu" or "nvme"'),
        ("communication_data_type", ("fp16", "FP16", None), ("fp8", 16), '"fp16", "bf16" or "fp32"'),
        ("zero_optimization.zenflow.update_interval", ("auto", 1), ("x", 0), 'a whole number of at least 1 or "auto"'),
        ("zero_optimization", ({},), ([], True, "x"), "an object in braces"),
        ("zero_optimization.leaf_module.classes", ([], ()), ({}, "x"), "a list"),
        ("optimizer.type", ("AdamW", ""), (1, None), "text"),
        ("autotuning.results_dir", ("x",), ("", 1), "text that is not empty"),
        ("pipeline.stages", ("auto", 2, None), (), "any value"),
        ("expert_parallel.load_balance_coeff", (None,), (0, {}), "null"),
        ("tensor_parallel.dtype", (), ("fp16", None), "nothing: a file cannot say it"),
    ],
)
def test_a_key_says_what_it_takes(
    dotted: str, fits: tuple[object, ...], not_fits: tuple[object, ...], must_be: str
) -> None:
    one = key(dotted)
    assert one.must_be == must_be
    assert [value for value in fits if one.refuses(value) is not None] == []
    assert [value for value in not_fits if one.refuses(value) != must_be] == []


def test_a_key_may_have_two_names_and_a_successor() -> None:
    assert key("zero_optimization.prefetch_bucket_size").also == "stage3_prefetch_bucket_size"
    assert key("zero_optimization.stage3_prefetch_bucket_size").also == "prefetch_bucket_size"
    assert key("zero_optimization.cpu_offload").instead == "offload_optimizer"


def test_a_block_of_the_table_is_a_key_of_the_one_above() -> None:
    blocks = [path for path in SECTIONS if path]
    assert [path for path in blocks if path[-1] not in SECTIONS[path[:-1]].keys] == []


def test_who_fills_an_auto_names_keys_that_exist() -> None:
    tables = [dotted for dotted in FILLED if not dotted.startswith(("optimizer.params.", "scheduler.params."))]
    assert [key(dotted).name for dotted in tables] == [dotted.rpartition(".")[2] for dotted in tables]


def test_a_key_can_be_looked_for_everywhere() -> None:
    assert places_of("stage") == ("zero_optimization",)
    assert places_of("train_batch_size") == ("",)
    assert places_of("device") == ("zero_optimization.offload_param", "zero_optimization.offload_optimizer")
    assert places_of("nonsense") == ()


@pytest.mark.parametrize(
    ("name", "offloaded", "torch_adam", "takes"),
    [
        ("Lion", False, False, ("lr", "betas", "weight_decay", "set_grad_none")),
        ("LION", True, False, ("lr", "betas", "weight_decay", "fp32_optimizer_states")),
        ("Lamb", True, False, ()),
        ("MuSGD", False, False, ("*",)),
        ("SparseAdam", False, False, ("lr", "betas", "eps", "maximize")),
        ("sparseadam", False, False, None),
        ("OneBitAdam", False, False, None),
    ],
)
def test_an_optimizer_takes_what_it_takes(
    name: str, offloaded: bool, torch_adam: bool, takes: tuple[str, ...] | None
) -> None:
    assert optimizer_params(name, offloaded=offloaded, torch_adam=torch_adam) == takes


def test_torchs_adam_takes_what_torch_takes() -> None:
    takes = optimizer_params("AdamW", offloaded=True, torch_adam=True)
    assert takes is not None
    assert {"capturable", "torch_adam"} <= set(takes)
    assert "bias_correction" not in takes

"""The ladder's arithmetic: what each rung holds, worked out by hand for a model of three tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cluster.errors import InputError
from launcher.errors import PlanError
from launcher.memory import (
    GIB,
    LADDER,
    Cluster,
    Host,
    Recipe,
    Rung,
    Weight,
    choose,
    judge,
    make_rung,
    read_size,
    show_bytes,
    weigh,
)
from launcher.model import Event, Gradient, Model, Use, guess_model

# A module of one tensor, and one of a tensor with a small second one. Forward, then backward.
SIZES = (1000, 600, 6)
EVENTS: tuple[Event, ...] = (
    Use(tensors=(0,), peak=0, level=0),
    Use(tensors=(1, 2), peak=100, level=80),
    Use(tensors=(1, 2), peak=500, level=300),
    Gradient(tensor=1, peak=350, level=200),
    Gradient(tensor=2, peak=200, level=200),
    Use(tensors=(0,), peak=220, level=210),
    Gradient(tensor=0, peak=250, level=0),
    Use(tensors=(), peak=0, level=0),
)
MODEL = Model(tensors=SIZES, trained=(True, True, True), cast=EVENTS, autocast=EVENTS, buffers=16)


def at_the_end(*gradients: int, after: int = 0) -> Model:
    """The model with a moment that is larger than every other: when the last of these gradients is there, or after."""
    quiet = (Gradient(tensor=one, peak=0, level=0) for one in gradients[:-1])
    last = Gradient(tensor=gradients[-1], peak=0, level=0 if after else 10**6)
    return dataclasses.replace(MODEL, cast=(*quiet, last, Use(tensors=(), peak=after, level=after)))


def loud() -> Model:
    """The model whose activations are larger than all else: most when its second module begins its backward."""
    events = tuple(dataclasses.replace(event, peak=event.peak * 1000, level=event.level * 1000) for event in EVENTS)
    return dataclasses.replace(MODEL, cast=events, autocast=events)


SMALL = Recipe(reduce_bucket_size=700, persistence_threshold=10, prefetch_bucket_size=0)


def cluster(*, gpus: int = 2, hosts: int = 1, **fields: Any) -> Cluster:
    each = Host(name="gpu", gpus=gpus, gpu_memory=80 * GIB, memory=1024 * GIB, nvme=3072 * GIB)
    named = tuple(dataclasses.replace(each, name=f"gpu-{number:02d}") for number in range(1, hosts + 1))
    return Cluster(hosts=named, **{"context": 0, "process": 0, "slack": 0.0, **fields})


def parts(weight: Weight, place: str = "gpu") -> dict[str, int]:
    return {part.name: part.bytes for part in weight.parts if part.place == place}


def weighed(rung: Rung, recipe: Recipe = SMALL, model: Model = MODEL, **fields: Any) -> Weight:
    return weigh(rung, model, recipe, cluster(**fields))


# Plain training


def test_plain_training_holds_everything_on_every_gpu() -> None:
    weight = weighed(Rung(stage=0))
    # The step: all gradients, and one more copy of the weights by the foreach kernels.
    assert parts(weight) == {
        "parameters": 4 * 1606 + 16,
        "optimizer": 8 * 1606,
        "buckets": 4 * 1606,
        "gradients": 4 * 1606,
        "step": 4 * 1606,
    }
    assert parts(weight, "cpu") == {"building the model": 4 * 1606}
    assert weight.states("gpu") == 4 * 1606 + 16 + 12 * 1606


def test_one_process_has_no_buckets() -> None:
    assert "buckets" not in parts(weighed(Rung(stage=0), gpus=1))


def test_where_activations_are_the_most_they_are_what_is_told() -> None:
    events = tuple(dataclasses.replace(event, peak=event.peak * 1000) for event in EVENTS)
    large = dataclasses.replace(MODEL, autocast=events)
    told = parts(weighed(Rung(stage=0), model=large))
    assert (told["activations"], told.get("gradients")) == (500_000, None)


def test_accumulated_gradients_are_held_through_the_forward() -> None:
    events = tuple(dataclasses.replace(event, peak=event.peak * 1000) for event in EVENTS)
    large = dataclasses.replace(MODEL, autocast=events)
    told = parts(weighed(Rung(stage=0), dataclasses.replace(SMALL, accumulation=2), large))
    assert (told["activations"], told["gradients"]) == (500_000, 4 * 1606)


@pytest.mark.parametrize(
    ("optimizer", "states", "step"),
    [("sgd", 0, 0), ("momentum", 1, 0), ("adamw", 2, 1), ("fusedadam", 2, 0), ("lion", 1, 0), ("onebitadam", 4, 0)],
)
def test_an_optimizer_has_its_states(optimizer: str, states: int, step: int) -> None:
    told = parts(weighed(Rung(stage=0), dataclasses.replace(SMALL, optimizer=optimizer)))
    assert told.get("optimizer", 0) == states * 4 * 1606
    assert told.get("step", 0) == step * 4 * 1606


def test_moments_may_be_kept_in_half_precision() -> None:
    assert parts(weighed(Rung(stage=0), dataclasses.replace(SMALL, moments=2)))["optimizer"] == 4 * 1606


# ZeRO-1 and 2


def test_zero_1_keeps_all_gradients_until_backward_ends() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="fusedadam", precision="bf16")
    told = parts(weighed(Rung(stage=1), recipe, at_the_end(1, 2, 0, after=10**6)))
    # 1606 are padded to 2 x 2 x 402. The first tensor, of 1000, is larger than the bucket: it is reduced from where it
    # is, by way of a flat copy.
    assert told == {
        "parameters": 2 * 1608 + 16,
        "master weights": 4 * 804,
        "optimizer": 8 * 804,
        "activations": 10**6,
        "gradients": 2 * 1606,
        "buckets": 2 * 700,
        "reduction": 2 * 1000,
    }


def test_zero_1_keeps_its_bucket_until_the_step_is_done() -> None:
    quiet = Model(tensors=(4,) * 400, trained=(True,) * 400, cast=(Gradient(tensor=0, peak=0, level=0),), autocast=())
    recipe = dataclasses.replace(SMALL, reduce_bucket_size=2000, precision="bf16", optimizer="adamw")
    told = parts(weighed(Rung(stage=1), recipe, quiet))
    assert (told["buckets"], told["own gradients"], told["step"]) == (2 * 2000, 2 * 800, (2 + 4) * 800)
    assert "buckets" not in parts(weighed(Rung(stage=2), recipe, quiet))


def test_one_process_reduces_a_large_gradient_where_it_is() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="fusedadam", precision="bf16")
    told = parts(weighed(Rung(stage=1), recipe, at_the_end(1, 2, 0, after=10**6), gpus=1))
    assert "reduction" not in told


def test_zero_2_lets_gradients_go_as_they_come() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="fusedadam", precision="bf16", reduce_bucket_size=2000)
    weight = weighed(Rung(stage=2), recipe, at_the_end(1, 2, 0))
    told = parts(weight)
    assert (told["activations"], told["buckets"]) == (10**6, 2 * 2000)
    assert not {"reduction", "own gradients", "gradients"} & set(told)
    assert weight.states("gpu") == 2 * 1608 + 16 + 12 * 804


def test_a_bucket_that_is_full_is_reduced_in_the_middle_of_backward() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="fusedadam", precision="bf16")
    events = tuple(
        dataclasses.replace(event, level=event.level * 100) if isinstance(event, Gradient) else event
        for event in EVENTS
    )
    told = parts(weighed(Rung(stage=2), recipe, dataclasses.replace(MODEL, cast=events)))
    assert (told["activations"], told["buckets"]) == (20_000, 1400)


def test_overlapping_communication_doubles_the_bucket() -> None:
    recipe = dataclasses.replace(SMALL, overlap_comm=True, reduce_bucket_size=10_000, optimizer="sgd")
    assert parts(weighed(Rung(stage=2), recipe))["buckets"] == 2 * 4 * 10_000
    assert parts(weighed(Rung(stage=1), recipe))["buckets"] == 2 * 4 * 10_000


def test_the_step_holds_gradients_flat_and_in_fp32() -> None:
    recipe = dataclasses.replace(SMALL, reduce_bucket_size=1, precision="bf16")
    model = Model(tensors=(4,) * 400, trained=(True,) * 400, cast=(), autocast=())
    told = parts(weighed(Rung(stage=2), recipe, model))
    assert (told["own gradients"], told["step"]) == (2 * 800, (2 + 4) * 800)
    # At full precision no second copy is made: as much as the gradients, or later AdamW's own copy beside them.
    told = parts(weighed(Rung(stage=2), dataclasses.replace(recipe, precision="no"), model))
    assert told.get("own gradients", 0) + told["step"] == 2 * 4 * 800


def test_what_is_not_trained_is_neither_padded_nor_optimized() -> None:
    model = dataclasses.replace(MODEL, trained=(False, True, True))
    weight = weighed(Rung(stage=2), model=model)
    assert parts(weight)["parameters"] == 4 * (608 + 1000) + 16
    assert parts(weight)["optimizer"] == 8 * 304


def test_accumulation_keeps_the_own_gradients_or_at_stage_1_all() -> None:
    events = tuple(dataclasses.replace(event, peak=event.peak * 1000) for event in EVENTS)
    model = dataclasses.replace(MODEL, cast=events)
    recipe = dataclasses.replace(SMALL, accumulation=2, reduce_bucket_size=5000)
    assert parts(weighed(Rung(stage=1), recipe, model))["gradients"] == 4 * 1606
    assert parts(weighed(Rung(stage=2), recipe, model))["gradients"] == 4 * 1606


def test_an_optimizer_on_the_cpu_takes_master_weights_and_gradients_along() -> None:
    weight = weighed(Rung(stage=2, optimizer_on="cpu"))
    assert parts(weight)["staging"] == 4 * 1000
    assert "optimizer" not in parts(weight)
    # Pinned memory is dealt out in powers of two: 3216 -> 4096, 4000 -> 4096.
    assert parts(weight, "cpu") == {
        "master weights": 4096,
        "gradients": 4096,
        "optimizer": 8 * 804,
        "staging": 4096 + 4096,
    }
    several = weighed(Rung(stage=2, optimizer_on="cpu"), dataclasses.replace(SMALL, accumulation=4))
    assert parts(several, "cpu")["accumulated gradients"] == 4 * 1606


def test_a_model_is_built_on_the_host_before_it_goes_to_the_gpu() -> None:
    weight = weighed(Rung(stage=1, optimizer_on="cpu"), dataclasses.replace(SMALL, optimizer="sgd"), gpus=64)
    assert parts(weight, "cpu")["building the model"] > 0
    assert weight.on("cpu") == 4 * 1606


# ZeRO-3


def test_zero_3_keeps_shares_and_gathers_what_is_used() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="fusedadam", precision="bf16", reduce_bucket_size=2000)
    weight = weighed(Rung(stage=3), recipe, loud())
    told = parts(weight)
    # The tensor of six is below the threshold of persistence.
    assert told["persistent parameters"] == 2 * 6
    assert told["parameters"] == 2 * 803 + 16
    assert told["master weights"] == 4 * 803
    assert told["optimizer"] == 8 * 803
    assert told["gradients"] == 2 * 803
    assert told["buckets"] == 2 * 2000
    # Used again soon, so the first module is still there when the second begins its backward.
    assert told["gathered parameters"] == 2 * 1600
    assert weight.states("gpu") == 2 * 6 + 2 * 803 + 16 + 12 * 803 + 2 * 803 + 2 * 2000
    assert weight.on("cpu") == 0


def test_at_full_precision_there_are_master_weights_too() -> None:
    assert parts(weighed(Rung(stage=3)))["master weights"] == 4 * 803
    assert parts(weighed(Rung(stage=3, params_on="cpu")))["master weights"] == 4 * 803


def test_with_a_short_reuse_distance_a_module_is_let_go_of() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="sgd", max_reuse_distance=0, persistence_threshold=0)
    events = tuple(Use(tensors=tensors, peak=0, level=10**6) for tensors in ((0,), (1,), (0,), ()))
    model = dataclasses.replace(MODEL, cast=events)
    told = parts(weighed(Rung(stage=3), recipe, model, cpu=True))
    assert told["gathered parameters"] == 4 * 1000
    # A GPU may still be reading the module before.
    assert parts(weighed(Rung(stage=3), recipe, model))["gathered parameters"] == 4 * 1600
    kept = dataclasses.replace(recipe, max_reuse_distance=601)
    assert parts(weighed(Rung(stage=3), kept, model, cpu=True))["gathered parameters"] == 4 * 1600


def test_tensors_gathered_together_come_in_one_buffer() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="sgd", max_reuse_distance=0, persistence_threshold=0)
    events = (Use(tensors=(1, 2), peak=0, level=0), Use(tensors=(), peak=0, level=0))
    model = dataclasses.replace(MODEL, tensors=(0, 6000, 60), trained=(True, True, True), cast=events)
    assert parts(weighed(Rung(stage=3), recipe, model))["gathering"] == 4 * 6060


def test_what_is_prefetched_lies_in_its_buffer_until_all_of_it_was_used() -> None:
    recipe = dataclasses.replace(
        SMALL, optimizer="sgd", max_reuse_distance=0, persistence_threshold=0, prefetch_bucket_size=10_000
    )
    events = tuple(Use(tensors=tensors, peak=0, level=0) for tensors in ((0,), (1,), (2,), ()))
    model = Model(tensors=(10, 6000, 3000), trained=(True, True, True), cast=events, autocast=events)
    told = parts(weighed(Rung(stage=3), recipe, model, cpu=True))
    # The second has been copied out of the buffer of both, the third not yet.
    assert (told["gathered parameters"], told["prefetch"]) == (4 * 9000, 4 * 9000)


def test_no_more_is_prefetched_than_may_live() -> None:
    recipe = dataclasses.replace(
        SMALL, optimizer="sgd", persistence_threshold=0, prefetch_bucket_size=10_000, max_live_parameters=10
    )
    events = tuple(Use(tensors=tensors, peak=0, level=0) for tensors in ((0,), (1,), (2,), ()))
    model = Model(tensors=(10, 6000, 3000), trained=(True, True, True), cast=events, autocast=events)
    assert "prefetch" not in parts(weighed(Rung(stage=3), recipe, model))


def test_one_process_gathers_nothing() -> None:
    told = parts(weighed(Rung(stage=3), gpus=1))
    assert "gathered parameters" not in told
    assert "persistent parameters" not in told


def test_one_process_fetches_what_lies_on_the_host() -> None:
    recipe = dataclasses.replace(SMALL, precision="bf16", optimizer="fusedadam")
    told = parts(weighed(Rung(stage=3, optimizer_on="cpu", params_on="cpu"), recipe, loud(), gpus=1))
    # Whole tensors, one by one: nothing is gathered from others into a flat buffer.
    assert (told["gathered parameters"], told["persistent parameters"]) == (2 * 1600, 2 * 6)
    assert "gathering" not in told


def test_shares_on_the_host_are_copied_to_be_gathered() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="sgd", persistence_threshold=0)
    events = (Use(tensors=(1, 2), peak=0, level=0), Use(tensors=(), peak=0, level=0))
    model = dataclasses.replace(MODEL, tensors=(0, 6000, 60), trained=(True, True, True), cast=events)
    offloaded = Rung(stage=3, optimizer_on="cpu", params_on="cpu")
    assert parts(weighed(offloaded, recipe, model))["gathering"] == 4 * 6060 + 4 * 3030


def test_an_offloaded_gradient_is_copied_and_measured_on_its_way() -> None:
    recipe = dataclasses.replace(SMALL, precision="bf16", optimizer="fusedadam", reduce_bucket_size=2000)
    offloaded = Rung(stage=3, optimizer_on="cpu")
    told = parts(weighed(offloaded, recipe, at_the_end(1, 2, 0, after=10**6)))
    # All three in one bucket; the largest one's half of 500: in bf16, and its norm in fp64.
    assert (told["reduction"], told["conversion"]) == (2 * 1606, 2 * 500 + 8 * 500)


def test_a_gradient_that_comes_alone_is_reduced_where_it_is() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="sgd", reduce_bucket_size=100)
    alone = dataclasses.replace(MODEL, cast=(Gradient(tensor=0, peak=0, level=10**6),))
    told = parts(weighed(Rung(stage=3), recipe, alone))
    assert (told["large gradients"], "reduction" in told) == (4 * 1000, False)
    # Among three processes it has to be padded, in a copy.
    assert parts(weighed(Rung(stage=3), recipe, alone, gpus=3))["reduction"] == 4 * 1000


def test_a_gradient_larger_than_the_bucket_stays_beside_it() -> None:
    recipe = dataclasses.replace(SMALL, optimizer="sgd", reduce_bucket_size=100)
    told = parts(weighed(Rung(stage=3), recipe))
    assert told.get("large gradients", 0) + told.get("reduction", 0) >= 4 * 600


def test_sub_groups_are_stepped_one_by_one() -> None:
    quiet = (Use(tensors=(), peak=0, level=0),)
    model = dataclasses.replace(MODEL, cast=quiet)
    whole = parts(weighed(Rung(stage=3), model=model))
    cut = parts(weighed(Rung(stage=3), dataclasses.replace(SMALL, sub_group_size=500), model))
    assert (whole["step"], cut["step"]) == (2 * 4 * 803, 2 * 4 * 500)


def test_offload_moves_the_states_to_the_host() -> None:
    weight = weighed(Rung(stage=3, optimizer_on="cpu", params_on="cpu"))
    assert {name for name in parts(weight) if name in ("optimizer", "master weights", "gradients")} == set()
    assert parts(weight)["parameters"] == 16
    assert parts(weight, "cpu") == {
        "master weights": 4 * 803,
        "gradients": 4096 + 4096,  # in fp32, and as they came; 3212 each, pinned
        "optimizer": 8 * 803,
        "parameters": 4096,
    }


def test_each_sub_group_has_gradients_of_its_own_on_the_host() -> None:
    weight = weighed(Rung(stage=3, optimizer_on="cpu"), dataclasses.replace(SMALL, sub_group_size=500))
    # 500 and 303 elements: 2000 and 1212 bytes, pinned; and 3212 as they came.
    assert parts(weight, "cpu")["gradients"] == 2048 + 2048 + 4096


def test_offload_to_nvme_leaves_buffers_on_the_host() -> None:
    weight = weighed(Rung(stage=3, optimizer_on="nvme", params_on="nvme"), dataclasses.replace(SMALL, precision="bf16"))
    assert parts(weight, "nvme") == {
        "master weights": 4 * 803,
        "gradients": 4 * 803,
        "optimizer": 8 * 803,
        "parameters": 2 * 803,
    }
    assert parts(weight, "cpu") == {
        "gradients": 2048,
        "swap buffers": 4 * 4 * 803 + 8 * 803,
        "parameters": 2048,
        "parameter buffers": 2 * 5 * 100_000_000,
    }


# Reserves, and CPUs


def test_reserves_are_added_to_what_is_held() -> None:
    plain = weighed(Rung(stage=0))
    weight = weighed(Rung(stage=0), context=1000, process=500, slack=0.1)
    assert weight.on("gpu") == plain.on("gpu") + int(plain.on("gpu") * 0.1) + 1000
    assert weight.on("cpu") == plain.on("cpu") + 500


def test_where_cpus_train_only_what_is_written_counts() -> None:
    recipe = dataclasses.replace(SMALL, reduce_bucket_size=1_000_000)
    assert parts(weighed(Rung(stage=3), recipe, cpu=True))["buckets"] == 4 * 1606
    assert parts(weighed(Rung(stage=0), cpu=True))["step"] == 2 * 4 * 1000
    assert parts(weighed(Rung(stage=0), cpu=True), "cpu") == {}
    offloaded = weighed(Rung(stage=2, optimizer_on="cpu"), cpu=True)
    assert parts(offloaded, "cpu")["master weights"] == 4 * 804


def test_where_cpus_train_everything_is_in_the_hosts_memory() -> None:
    verdict = judge(Rung(stage=0), MODEL, SMALL, cluster(cpu=True, gpus=3))
    assert verdict.host == 3 * (verdict.gpu + verdict.weight.on("cpu"))
    assert verdict.fits


# The choice


def machines(gpu_memory: int, memory: int = 2048 * GIB, nvme: int = 0) -> Cluster:
    host = Host(name="gpu-01", gpus=8, gpu_memory=gpu_memory, memory=memory, nvme=nvme)
    return Cluster(hosts=(host,))


LARGE = guess_model(7_000_000_000, micro_batch=1, sequence=2048, checkpointing=True, item=2)
BF16 = Recipe(precision="bf16")


def test_the_lowest_rung_that_fits_is_chosen_and_the_one_below_is_told() -> None:
    choice = choose(LARGE, BF16, machines(80 * GIB))
    assert choice.chosen is not None
    assert choice.chosen.weight.rung == Rung(stage=1)
    assert [verdict.weight.rung for verdict in choice.verdicts] == list(LADDER)
    needed = choice.verdicts[0].gpu
    assert choice.why == (
        f"DDP does not fit: gpu-01 lacks {needed - 80 * GIB:,} bytes of GPU memory ({show_bytes(needed)} of 80.0 GiB)"
    )
    assert choice.asked == ""


def test_the_lowest_rung_of_all_has_none_below() -> None:
    tiny = guess_model(1_000_000, micro_batch=1, sequence=16, checkpointing=False, item=4)
    choice = choose(tiny, Recipe(), machines(80 * GIB))
    assert choice.chosen is not None
    assert (choice.chosen.weight.rung, choice.why) == (Rung(stage=0), "")


def test_where_none_fits_the_last_one_is_told() -> None:
    choice = choose(LARGE, BF16, machines(1 * GIB, memory=8 * GIB))
    assert choice.chosen is None
    assert choice.why.startswith("ZeRO-3 + optimizer on NVMe + parameters on NVMe does not fit: gpu-01 lacks")


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (Rung(stage=3), "ZeRO-3, as asked for, is more than is needed: ZeRO-1 fits, and is faster"),
        (Rung(stage=1), ""),
        (Rung(stage=0), "DDP, as asked for, does not fit: gpu-01 lacks"),
        (Rung(stage=3, params_on="cpu"), ""),
    ],
)
def test_who_asks_for_another_rung_is_answered(asked: Rung, answer: str) -> None:
    choice = choose(LARGE, BF16, machines(80 * GIB), asked=asked)
    assert choice.asked.startswith(answer)
    assert bool(choice.asked) == bool(answer)


def test_a_rung_above_what_fits_is_not_called_too_much() -> None:
    assert choose(LARGE, BF16, machines(1 * GIB, memory=8 * GIB), asked=Rung(stage=3)).asked.startswith("ZeRO-3, as")
    fits = choose(LARGE, BF16, machines(80 * GIB), asked=Rung(stage=2))
    assert "more than is needed" in fits.asked


def test_every_resource_of_every_machine_counts() -> None:
    verdict = judge(Rung(stage=3, optimizer_on="nvme"), LARGE, BF16, machines(80 * GIB, memory=GIB, nvme=GIB))
    assert {short.resource for short in verdict.short} == {"host memory", "NVMe"}
    assert all(short.missing == short.needed - short.there > 0 for short in verdict.short)
    assert not verdict.fits


def test_no_machines_are_no_memory() -> None:
    assert judge(Rung(stage=0), MODEL, SMALL, Cluster(hosts=())).host == 0


# Words


def test_rungs_have_names() -> None:
    assert [rung.name for rung in (LADDER[0], LADDER[2], LADDER[-1])] == [
        "DDP",
        "ZeRO-2",
        "ZeRO-3 + optimizer on NVMe + parameters on NVMe",
    ]


def test_settings_make_a_rung() -> None:
    assert make_rung(3, optimizer="cpu", params="nvme") == Rung(stage=3, optimizer_on="cpu", params_on="nvme")


@pytest.mark.parametrize(
    ("stage", "optimizer", "params", "what"),
    [
        (2, "none", "cpu", "ZeRO stage 2 leaves the parameters on the GPU"),
        (0, "cpu", "none", "plain training leaves the optimizer on the GPU"),
        (1, "nvme", "none", "ZeRO stage 1 offloads the optimizer to the CPU alone"),
    ],
)
def test_what_deepspeed_cannot_is_refused(stage: int, optimizer: str, params: str, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        make_rung(stage, optimizer=optimizer, params=params)


@pytest.mark.parametrize(
    ("text", "size"), [("80g", 80 * GIB), ("1.5T", 1536 * GIB), ("512MiB", 512 << 20), ("2gb", 2 * GIB)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_size(text, where="--nvme") == size


@pytest.mark.parametrize("text", ["80", "g", "-1g", "1e3g", "80 g"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        read_size(text, where="--nvme")


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 KiB"), (2048, "2 KiB"), (3 << 20, "3.0 MiB"), (5 * GIB, "5.0 GiB"), (2 << 40, "2.0 TiB")],
)
def test_bytes_are_shown(count: int, shown: str) -> None:
    assert show_bytes(count) == shown

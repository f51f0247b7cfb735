"""What is trained: reading a simulation, and guessing from a number of parameters."""

from __future__ import annotations

import pytest

from cluster.errors import InputError
from launcher.model import Gradient, Model, Use, guess_model, read_count, read_simulation

SAID = {
    "tensors": [[10, True], [6, True], [4, False]],
    "buffers": 8,
    "modules": [["first", [0]], ["second", [1, 2]]],
    "cast": [["use", 0, 1, 1], ["use", 1, 5, 3], ["grad", 1, 9, 2], ["use", -1, 4, 4]],
    "autocast": [["use", 0, 2, 2]],
}


def test_a_simulation_is_read() -> None:
    model = read_simulation(SAID, where="config.json")
    assert model == Model(
        tensors=(10, 6, 4),
        trained=(True, True, False),
        cast=(
            Use(tensors=(0,), peak=1, level=1),
            Use(tensors=(1, 2), peak=5, level=3),
            Gradient(tensor=1, peak=9, level=2),
            Use(tensors=(), peak=4, level=4),
        ),
        autocast=(Use(tensors=(0,), peak=2, level=2),),
        buffers=8,
    )
    assert (model.parameters, model.optimized, model.largest_module, model.activations) == (20, (10, 6), 10, 9)


def test_what_is_never_called_is_gathered_with_what_holds_it() -> None:
    said = {
        **SAID,
        "modules": [["", []], ["attention", [0]], ["attention.out", [1]], ["head", [2]]],
        "cast": [["use", 1, 1, 1], ["use", 3, 5, 3], ["use", -1, 4, 4]],
    }
    model = read_simulation(said, where="config.json")
    assert [event.tensors for event in model.cast if isinstance(event, Use)] == [(0, 1), (2,), ()]


def test_what_kept_a_model_from_being_run_is_told() -> None:
    with pytest.raises(InputError) as refused:
        read_simulation({"error": "ValueError: no such thing"}, where="model.py")
    assert str(refused.value).splitlines() == [
        "model.py: this model cannot be simulated: ValueError: no such thing",
        "  next: give --parameters instead of it: the activations are then estimated",
    ]


@pytest.mark.parametrize("parameters", [1_000, 1_000_000, 124_000_000, 7_000_000_000, 70_000_000_000, 10**12])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_guess_has_the_parameters_that_it_was_given(parameters: int, *, checkpointing: bool) -> None:
    model = guess_model(parameters, micro_batch=2, sequence=128, checkpointing=checkpointing, item=2)
    assert model.parameters == pytest.approx(parameters, rel=0.1 if parameters > 10_000 else 1)
    assert not model.simulated
    assert all(event.peak >= event.level >= 0 for event in model.cast)
    assert sorted(event.tensor for event in model.cast if isinstance(event, Gradient)) == list(
        range(len(model.tensors))
    )


def test_a_7b_has_the_proportions_of_one() -> None:
    model = guess_model(7_000_000_000, micro_batch=1, sequence=2048, checkpointing=False, item=2)
    layers = (len(model.tensors) - 2) // 2
    assert 28 <= layers <= 36
    # 44 bytes an element of each layer, and the logits.
    assert 11e9 < model.activations < 15e9


def test_checkpointing_keeps_less_and_a_longer_sequence_more() -> None:
    def activations(sequence: int, *, checkpointing: bool) -> int:
        return guess_model(10**9, micro_batch=1, sequence=sequence, checkpointing=checkpointing, item=2).activations

    assert activations(1024, checkpointing=True) < activations(1024, checkpointing=False) / 2
    assert activations(2048, checkpointing=False) == pytest.approx(2 * activations(1024, checkpointing=False))


@pytest.mark.parametrize(
    ("text", "count"), [("7B", 7 * 10**9), ("1.3b", 1_300_000_000), ("350m", 350_000_000), ("124", 124)]
)
def test_counts_are_read(text: str, count: int) -> None:
    assert read_count(text, where="--parameters") == count


@pytest.mark.parametrize("text", ["", "B", "0", "-7B", "7 B", "7e9", "seven"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no number of parameters"):
        read_count(text, where="--parameters")

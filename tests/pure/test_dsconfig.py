"""A DeepSpeed JSON as data with places; what it refuses is in tests/corpus/deepspeed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InputError
from launcher.dsconfig import DEEPEST, LARGEST, MOST, DsConfig, read

TEXT = """\
{
  "zero_optimization": {
    "stage": 3,
    "offload_param": {"device": "nvme"}
  },
  "optimizer": {"params": {"betas": [0.9, 0.99]}}
}
"""


def test_every_value_knows_its_place() -> None:
    config = read(TEXT, name="ds.json")
    assert config.data == json.loads(TEXT)
    assert [
        config.where(path)
        for path in (
            (),
            ("zero_optimization",),
            ("zero_optimization", "stage"),
            ("zero_optimization", "offload_param", "device"),
            ("optimizer", "params", "betas", 1),
        )
    ] == ["ds.json:1:1", "ds.json:2:3", "ds.json:3:5", "ds.json:4:23", "ds.json:6:43"]


def test_what_is_not_there_is_told_at_the_nearest_thing_that_is() -> None:
    config = read(TEXT, name="ds.json")
    assert config.where(("zero_optimization", "offload_param", "nvme_path")) == "ds.json:4:5"
    assert config.where(("fp16", "enabled")) == "ds.json:1:1"
    assert DsConfig(name="--stage", data={}, places={}).where(("fp16",)) == "--stage"


def test_a_place_that_was_passed_is_found_again() -> None:
    text = '{\n"a": {\n"b": [\n'
    with pytest.raises(InputError) as refused:
        read(text, name="ds.json")
    assert refused.value.where == "ds.json:3:6"


def test_a_value_that_is_put_in_carries_who_said_so() -> None:
    config = read(TEXT, name="ds.json")
    changed = config.put(("zero_optimization", "stage"), 2, where="--stage").put(
        ("fp16", "enabled"), value=True, where="--set"
    )
    assert changed.data["zero_optimization"] == {"stage": 2, "offload_param": {"device": "nvme"}}
    assert changed.data["fp16"] == {"enabled": True}
    assert changed.where(("zero_optimization", "stage")) == "--stage"
    assert changed.where(("zero_optimization", "offload_param")) == "ds.json:4:5"
    assert changed.where(("fp16", "enabled")) == "--set"
    assert config == read(TEXT, name="ds.json")


def test_what_is_put_in_replaces_what_is_in_its_way_and_what_was_below_it() -> None:
    config = read('{"a": {"b": {"c": 1}}, "d": 2}', name="ds.json")
    assert config.put(("d", "e"), 1, where="--set").data == {"a": {"b": {"c": 1}}, "d": {"e": 1}}
    below = config.put(("a", "b"), {"c": 2}, where="--set")
    assert below.where(("a", "b", "c")) == "--set"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"\\u00e9\\n\\t\\"\\\\\\/\\b\\f\\r"', 'é\n\t"\\/\b\f\r'),
        ('"\\ud83d\\ude00"', "😀"),
        ("[]", []),
        ("{}", {}),
        ("-0", 0),
        ("-12", -12),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("1e-4", 1e-4),
        ("5E8", 5e8),
        ("0.5", 0.5),
        (" true ", True),
        ("false", False),
        ("null", None),
    ],
)
def test_values_are_what_they_look_like(text: str, value: object) -> None:
    read_value = read(f'{{"a": {text}}}', name="ds.json").data["a"]
    assert (read_value, type(read_value)) == (value, type(value))


@pytest.mark.parametrize("newline", ["\r\n", "\n"])
def test_line_ends_of_others_count_too(newline: str) -> None:
    config = read(newline.join(TEXT.splitlines()), name="ds.json")
    assert config.where(("zero_optimization", "stage")) == "ds.json:3:5"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{" + " " * LARGEST + "}", f"larger than {LARGEST} bytes"),
        ('{"a": "' + "é" * (LARGEST // 2) + '"}', f"larger than {LARGEST} bytes"),
        ('{"a": [' + "1," * MOST + "1]}", f"more than {MOST} values"),
        ('{"a":' * (DEEPEST + 1) + "1", f"more than {DEEPEST} levels"),
        ('{"a": "\\', "an escape that JSON does not know"),
        ('{"a": "x\\"', "a quote that is never closed"),
        ('{"a": ' + "x" * 100 + "}", "…"),
        ('{"\udcff": 1}', "U+DCFF"),
    ],
)
def test_limits_and_ends_are_refused(text: str, says: str) -> None:
    with pytest.raises(InputError) as refused:
        read(text, name="ds.json")
    assert says in str(refused.value)


def outcome(text: str) -> Any:
    """What is read, or the one error that there may be."""
    try:
        return read(text, name="ds.json").data
    except InputError as refused:
        return refused


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(data=st.dictionaries(st.text(min_size=1), JSON, max_size=5), indent=st.none() | st.integers(0, 3))
def test_what_json_writes_is_read_as_it_was(data: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(data, indent=indent)
    read_back = outcome(text)
    assert read_back == data if isinstance(read_back, dict) else "NUL" in read_back.what


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet='{}[]",:\\ \n\t01.-+eEatrufls/#\x00\ufeff', max_size=40))
def test_no_text_breaks_the_reader(text: str) -> None:
    read_back = outcome(text)
    if isinstance(read_back, InputError):
        assert str(read_back.where).startswith("ds.json:")
    else:
        assert read_back == json.loads(text)

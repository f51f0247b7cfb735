"""From a file's data to a model, or from pydantic's errors to one `InputError`: where, what, which key was meant."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.allowed import ENV_NAME, PATTERNS, legible, nearest, shown
from cluster.document import Document, Place
from cluster.errors import InputError

# The keys of each mapping, by the key that it stands under; "" is the top.
Keys = Mapping[str, tuple[str, ...]]

Model = TypeVar("Model", bound=BaseModel)

_MOST_SHOWN = 20
_PASSWORD = re.compile(r".*(?:passw(?:or)?d|passphrase|secret|token)", re.IGNORECASE)

# What other tools call our keys.
_SYNONYMS = {
    "hostname": "host",
    "ip": "address",
    "ssh_port": "port",
    "username": "user",
    "ssh_user": "user",
    "login": "user",
    "key": "identity_file",
    "ssh_key": "identity_file",
    "key_file": "identity_file",
    "bastion": "jump",
    "gateway": "jump",
    "proxy_jump": "jump",
    "gpus": "slots",
    "num_gpus": "slots",
    "processes": "slots",
    "interface": "nic",
    "environment": "env",
    "volumes": "mounts",
    "hosts": "nodes",
    "device": "accelerator",
}


def judge(
    document: Document,
    model: type[Model],
    keys: Keys,
    *,
    next_step: str,
    home: Path | None = None,
    instead: Mapping[str, object] = {},
) -> Model:
    """The document as a model; one `InputError` names everything that is wrong in it. `instead` replaces top keys."""
    data = document.data
    if not isinstance(data, dict):
        what = "the file is empty" if data is None else "the file must be a mapping (lines of 'key: value')"
        raise InputError(what, where=f"{document.name}:1:1", next_step=next_step)
    context = {"folder": document.folder, "home": home or _home()}
    try:
        # As JSON: there pydantic's strict mode takes a list for a tuple and a mapping for a model, and nothing else.
        return model.model_validate_json(json.dumps({**data, **instead}), context=context)
    except ValidationError as error:
        raise _input_error(error.errors(include_url=False), document, keys, next_step) from None


def judge_options(given: Mapping[str, object], model: type[Model], *, options: Mapping[str, str] = {}) -> Model:
    """What options of a command line say as a model; `InputError` names the first that is wrong. None is not given.

    `options`: those whose name is not the key's.
    """
    try:
        return model.model_validate_json(json.dumps({name: one for name, one in given.items() if one is not None}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        option = options.get(key, f"--{key.replace('_', '-')}")
        raise InputError(_says(first, {"": tuple(given)}), where=option) from None


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None


def _input_error(errors: list[ErrorDetails], document: Document, keys: Keys, next_step: str) -> InputError:
    """All problems in the order of the file: the first is the message, the others are its detail."""
    first, *others = sorted(_without_echoes(errors, keys), key=lambda error: document.position(_place(error)))
    detail = [f"{document.where(_place(error))}: {_sentence(error, keys)}" for error in others[:_MOST_SHOWN]]
    if len(others) > _MOST_SHOWN:
        detail.append(f"and {len(others) - _MOST_SHOWN} more")
    where = document.where(_place(first))
    return InputError(_sentence(first, keys), where=where, detail=tuple(detail), next_step=next_step)


def _without_echoes(errors: list[ErrorDetails], keys: Keys) -> list[ErrorDetails]:
    """A misspelt key is one mistake, not two: the right one is not told to be missing as well."""
    unknown = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
    meant = {(*loc[:-1], _meant(loc, keys)) for loc in unknown[:_MOST_SHOWN]}
    return [error for error in errors if error["type"] != "missing" or error["loc"] not in meant]


def _place(error: ErrorDetails) -> Place:
    return tuple(part for part in error["loc"] if part != "[key]")


def _sentence(error: ErrorDetails, keys: Keys) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{legible(part)}" for part in _place(error))
    return f"{''.join(parts).lstrip('.')} {_says(error, keys)}"


def _says(error: ErrorDetails, keys: Keys) -> str:
    """The end of a sentence that begins with the place."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _EXPECTED:
        return _wrong_type(_EXPECTED[kind], given, secret="env" in error["loc"])
    says: dict[str, Callable[[], str]] = {
        "refused": lambda: str(context["what"]),
        "value_error": lambda: str(context["error"]),
        "missing": lambda: "is missing",
        "extra_forbidden": lambda: _unknown_key(error["loc"], keys),
        "string_pattern_mismatch": lambda: _mismatch(context["pattern"], given),
        "literal_error": lambda: _wrong_word(str(context["expected"]), given),
        "too_long": lambda: f"must hold at most {context['max_length']} items",
        "greater_than_equal": lambda: f"must be at least {context['ge']}, not {given}",
        "less_than_equal": lambda: f"must be at most {context['le']}, not {given}",
    }
    return says[kind]()


_EXPECTED = {
    "string_type": "text",
    "path_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping ('key: value')",
    "model_type": "a mapping ('key: value')",
}


def _mismatch(pattern: str, given: object) -> str:
    # What should have been a variable's name may hold the secret itself.
    return PATTERNS[pattern] + ("" if pattern == ENV_NAME else f"; this is {shown(given)}")


def _wrong_type(expected: str, given: object, *, secret: bool) -> str:
    if given is None:
        return f"must be {expected}, but nothing is given; leave the key out or give it a value"
    if expected == "text" and isinstance(given, (bool, int, float)):
        return f"must be text: write {'it' if secret else json.dumps(str(json.dumps(given)))} in quotes"
    return f"must be {expected}, not {_kind(given)}"


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"the text {shown(value)}" if isinstance(value, str) else json.dumps(value)


def _wrong_word(expected: str, given: object) -> str:
    if isinstance(given, str):
        words = re.findall("'([^']*)'", expected)
        return f"must be {expected}, not {shown(given)}{nearest(given, words)}"
    return f"must be {expected}, not {_kind(given)}"


def _unknown_key(loc: Place, keys: Keys) -> str:
    key = _plain_key(loc)
    if _PASSWORD.fullmatch(key):
        return "is no key: passwords are not kept here; use a key file or the agent, and container.secrets for a job"
    if meant := _meant(loc, keys):
        return f"is no key; did you mean {meant!r}?"
    if elsewhere := [name or "the top" for name, there in keys.items() if key in there]:
        return f"is no key here; it belongs under {' or '.join(elsewhere)}"
    return f"is no key; the keys here are {', '.join(_keys_here(loc, keys))}"


def _meant(loc: Place, keys: Keys) -> str | None:
    """The key of the same mapping that a wrong one stands for, if it resembles any."""
    key, here = _plain_key(loc), _keys_here(loc, keys)
    if key in here or _SYNONYMS.get(key) in here:
        return key if key in here else _SYNONYMS[key]
    if any(key in there for there in keys.values()):
        return None
    return next(iter(difflib.get_close_matches(key, here, n=1)), None)


def _plain_key(loc: Place) -> str:
    return str(loc[-1]).lower().replace("-", "_")


def _keys_here(loc: Place, keys: Keys) -> tuple[str, ...]:
    above = next((part for part in reversed(loc[:-1]) if isinstance(part, str)), "")
    return keys[above]

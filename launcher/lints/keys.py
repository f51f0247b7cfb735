"""Keys and values one by one: known or not, of the right kind or not, and who fills an "auto"."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from launcher import dskeys
from launcher.lints.catalogue import Lint, told
from launcher.lints.look import AUTO, Look, dots, listed, shown

FATES: Mapping[str, str] = {"refuses": "refuses the file", "ignores": "ignores it, silently"}


def keys(look: Look) -> Iterator[Lint]:
    """Every key: known where it stands, and of the right kind."""
    yield from _section(look, ())


def _section(look: Look, path: tuple[str, ...]) -> Iterator[Lint]:
    known = dskeys.SECTIONS.get(_first_names(path))
    if known is None or known.rest == "open":
        return
    for name, value in look.block(".".join(path)).items():
        here = (*path, name)
        key = known.keys.get(name)
        if here in dskeys.REMOVED:
            yield told(
                "removed-key",
                where=look.config.where(here),
                what=f"{dots(here)} is gone from DeepSpeed {dskeys.VERSION}",
                gone=dskeys.REMOVED[here],
            )
        elif key is None:
            yield from _unknown(look, here, known)
        else:
            yield from _value(look, here, key, value)
            if isinstance(value, Mapping):
                yield from _section(look, here)


def _first_names(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path by the names under which the sections are kept; only this one has another."""
    return ("tensor_parallel", "tp") if path == ("tensor_parallel", "tensor_parallel") else path


def _unknown(look: Look, here: tuple[str, ...], section: dskeys.Section) -> Iterator[Lint]:
    name = here[-1]
    if section.rest == "ignores" and name.startswith(("_", "$", "//", "#")):
        return  # how people write comments in JSON
    where = look.config.where(here)
    if here == ("aio", "thread_count"):
        count = look.get("aio.thread_count")
        yield told("aio-thread-count", where=where, what=f"aio.thread_count is {shown(count)}", count=shown(count))
        return
    near = difflib.get_close_matches(name, section.keys, n=1, cutoff=0.75)
    elsewhere = [place for place in dskeys.places_of(name) if place != ".".join(here[:-1])]
    if elsewhere and not (near and near[0].lower() == name.lower()):
        right = f"under {elsewhere[0]}" if elsewhere[0] else "to the top of the file"
        yield told(
            "misplaced-key",
            where=where,
            what=f"{dots(here)} is no key there",
            right=right,
            outcome=FATES[section.rest],
        )
        return
    cure = f"write {near[0]}" if near else "remove it, or correct its name"
    what = f"{dots(here)} is no key of DeepSpeed {dskeys.VERSION}"
    what += f"; did you mean {near[0]!r}?" if near else ""
    yield told("unknown-key", where=where, what=what, outcome=FATES[section.rest], cure=cure)


def _value(look: Look, here: tuple[str, ...], key: dskeys.Key, value: object) -> Iterator[Lint]:
    where = look.config.where(here)
    if here == ("bfloat16",):
        yield told("bfloat16-block", where=where, what="the block bfloat16 is called bf16")
    elif key.instead:
        yield from _deprecated(look, here, key, value)
    filled = value == AUTO and key.kind != "map"  # by somebody, or told as one that nobody fills
    if not filled and (must_be := key.refuses(value)):
        yield told("wrong-value", where=where, what=f"{dots(here)} is {shown(value)}", right=must_be)


def _deprecated(look: Look, here: tuple[str, ...], key: dskeys.Key, value: object) -> Iterator[Lint]:
    where = look.config.where(here)
    new = str(key.instead)
    beside = [name for name in (new, f"stage3_{new}") if name in look.block("zero_optimization")]
    if beside:
        yield told("both-names", where=where, what=f"{dots(here)} beside {beside[0]}", old=key.name)
    elif key.name == "cpu_offload_use_pin_memory":
        yield told("deprecated-key", where=where, what=f"{dots(here)} is an old name", right=f"pin_memory in {new}")
    elif key.name.startswith("cpu_offload"):
        right = f'"{new}": {{"device": "{"cpu" if value is True else "none"}"}}'
        yield told("deprecated-key", where=where, what=f"{dots(here)} is an old name", right=right)
    else:
        yield told("deprecated-key", where=where, what=f"{dots(here)} is an old name", right=f"stage3_{new}")


def autos(look: Look) -> Iterator[Lint]:
    """Every "auto": who fills it, and what that takes."""
    for path in _autos(look.config.data, ()):
        dotted = dots(path)
        if dotted in look.supplied or path[0] in ("steps_per_print", *_not_known(look)):
            continue  # Accelerate sets steps_per_print itself; what is not known is told as such
        if dotted in dskeys.DEFAULTED:
            yield from _auto_defaulted(look, path)
        elif dskeys.FILLED.get(dotted) == "trainer":
            yield told(
                "auto-trainer",
                where=look.config.where(path),
                what=f'{dotted} is "auto"',
                outcome='accelerator.prepare ends with "not found in kwargs"',
            )
        elif dotted not in dskeys.FILLED:
            yield from _auto_unfilled(look, path)
    yield from _auto_from_script(look)


def _not_known(look: Look) -> set[str]:
    return set(look.config.data) - set(dskeys.SECTIONS[()].keys)


def _autos(value: object, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths of every "auto" that Accelerate would see: it does not look into lists."""
    if value == AUTO:
        yield path
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _autos(below, (*path, key))


def _auto_defaulted(look: Look, path: tuple[str, ...]) -> Iterator[Lint]:
    value, has_trainer = dskeys.DEFAULTED[dots(path)]
    what = f'{dots(path)} is "auto"'
    if not has_trainer:
        yield told("auto-silent", where=look.config.where(path), what=what, value=shown(value))
        return
    condition = ", unless accelerate launch is given --mixed_precision" if path[-1] == "enabled" else ""
    yield told(
        "auto-trainer", where=look.config.where(path), what=what, outcome=f"it becomes {shown(value)}{condition}"
    )


def _auto_unfilled(look: Look, path: tuple[str, ...]) -> Iterator[Lint]:
    section = dskeys.SECTIONS.get(path[:-1])
    key = section.keys.get(path[-1]) if section else None
    if key and key.kind == "map":
        return  # told as a wrong value
    is_default = key is not None and (AUTO in key.words or path == ("pipeline", "stages"))
    cure = "leave it out: that is the same" if is_default else "write a value, or leave it out"
    yield told("auto-unfilled", where=look.config.where(path), what=f'{dots(path)} is "auto"', cure=cure)


def _auto_from_script(look: Look) -> Iterator[Lint]:
    """One lint for each thing that the script must bring, however many keys wait for it."""
    waiting: dict[str, list[str]] = {}
    for key, filler in dskeys.FILLED.items():
        if filler != "trainer" and look.get(key) == AUTO and key not in look.supplied:
            waiting.setdefault(filler, []).append(key)
    for who, keys_of_it in waiting.items():
        what = f'{listed(keys_of_it)} {"are" if len(keys_of_it) > 1 else "is"} "auto"'
        yield told(f"auto-{who}", where=look.where(keys_of_it[0]), what=what)

"""A DeepSpeed JSON as data of which every value knows its place. Strict as Accelerate's `json.load`, and stricter:

- UTF-8 without a byte order mark, at most 1 MiB, 32 levels, 100 000 values, one object;
- no key twice: `json.load` would take the last one, silently;
- no NaN or Infinity, no number that a float or 64 bits cannot hold, no invisible or half characters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeAlias

from cluster.errors import InputError

Place: TypeAlias = tuple["str | int", ...]

LARGEST = 1 << 20
DEEPEST = 32
MOST = 100_000
STRICT = "Accelerate takes strict JSON: double quotes, no comments, no comma after the last item"

_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = re.compile(r'"((?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*)"')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?(?![0-9A-Za-z_.+-])")
_WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_ALMOST_NUMBER = re.compile(r"[-+.0-9][-+.0-9A-Za-z_]*")
_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))')
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
# Control characters, other people's line ends, and the marks that make text look different from what it is.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufffe\uffff]")
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DsConfig:
    """A DeepSpeed configuration, and where each piece of it was said. `name` is what messages call it."""

    name: str
    data: Mapping[str, Any]
    places: Mapping[Place, str] = field(repr=False)

    def where(self, path: Place) -> str:
        """`name:line:col` of a key or item, or the option that said it; else of the nearest thing around it."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, self.name)

    def put(self, path: tuple[str, ...], value: object, *, where: str) -> DsConfig:
        """The same with one value set; what is in its way and no object is replaced. `where` says who said so."""
        *parents, last = path
        data = below = dict(self.data)
        for key in parents:
            inner = below.get(key)
            below[key] = dict(inner) if isinstance(inner, Mapping) else {}
            below = below[key]
        below[last] = value
        told = {place: said for place, said in self.places.items() if place[: len(path)] != path}
        above: dict[Place, str] = {path[:length]: where for length in range(1, len(path))}
        return replace(self, data=data, places={**above, **told, path: where})


def read(text: str, *, name: str) -> DsConfig:
    """A DeepSpeed JSON; `InputError` with its place for whatever is no strict JSON object."""
    reader = _Reader(text, name)
    data = reader.document()
    return DsConfig(name=name, data=data, places=reader.places)


class _Reader:
    """Reads and refuses on the way. Levels are bounded, so recursion is."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self.at = 0
        self.count = 0
        self.places: dict[Place, str] = {}
        self.line, self.line_start, self.counted = 1, 0, 0  # so that looking up places reads the text once

    def document(self) -> dict[str, Any]:
        if len(self.text) > LARGEST or len(self.text.encode(errors="replace")) > LARGEST:
            raise InputError(
                f"the file is larger than {LARGEST} bytes", where=f"{self.name}:1:1", next_step="is it the right file?"
            )
        if self.text.startswith("\ufeff"):
            self.refuse(0, "a byte order mark, which Accelerate does not read", "save the file as UTF-8 without one")
        if found := _INVISIBLE.search(self.text) or _NO_TEXT.search(self.text):
            self.refuse(
                found.start(),
                f"the invisible or control character U+{ord(found[0]):04X}",
                'remove it, or write it as "\\u…" if it is meant',
            )
        self.space()
        if self.here() != "{":
            self.expected("a DeepSpeed configuration is a JSON object, in braces")
        data = self.mapping(())
        self.space()
        if self.here():
            self.unexpected("text after the end of the object")
        return data

    def value(self, place: Place) -> Any:
        self.count += 1
        if self.count > MOST:
            self.refuse(self.at, f"more than {MOST} values", "is it the right file?")
        if len(place) > DEEPEST:
            self.refuse(self.at, f"more than {DEEPEST} levels inside each other", "is it the right file?")
        first = self.here()
        if first == "{":
            return self.mapping(place)
        if first == "[":
            return self.sequence(place)
        if first == '"':
            return self.string()
        if first in "-+.0123456789" and first:
            return self.number()
        return self.word()

    def mapping(self, place: Place) -> dict[str, Any]:
        start = self.at
        self.places.setdefault(place, self.where(start))
        items: dict[str, Any] = {}
        self.at += 1
        while not self.closed("}", start, empty=not items):
            key_at = self.at
            key = self.key()
            here = (*place, key)
            if key in items:
                told = self.places[here].removeprefix(f"{self.name}:")
                self.refuse(
                    key_at,
                    f"the key {_shown(key)} stands twice (first at {told})",
                    "keep one of them; Accelerate would take the last one, silently",
                )
            self.places[here] = self.where(key_at)
            self.colon(key)
            items[key] = self.value(here)
        return items

    def sequence(self, place: Place) -> list[Any]:
        start = self.at
        items: list[Any] = []
        self.at += 1
        while not self.closed("]", start, empty=not items):
            here = (*place, len(items))
            self.places[here] = self.where(self.at)
            items.append(self.value(here))
        return items

    def closed(self, end: str, start: int, *, empty: bool) -> bool:
        """Whether the object or list ends here; else go on to the next item."""
        self.space()
        first = self.here()
        if first == end:
            self.at += 1
            return True
        if not first:
            opened = self.text[start]
            self.refuse(start, f"this '{opened}' is never closed", f"add the '{end}' that belongs to it")
        if empty:
            return False
        if first != ",":
            self.unexpected(f"a ',' or '{end}' is missing before this")
        comma = self.at
        self.at += 1
        self.space()
        if self.here() == end:
            self.refuse(comma, f"a ',' after the last item, before '{end}'", f"remove it; {STRICT}")
        return False

    def key(self) -> str:
        if self.here() != '"':
            self.expected("a key must be text in double quotes")
        key = self.string()
        if not key:
            self.refuse(self.at - 2, "an empty key", "write the key between the quotes")
        return key

    def colon(self, key: str) -> None:
        self.space()
        if self.here() != ":":
            self.expected(f"a ':' is missing after the key {_shown(key)}")
        self.at += 1
        self.space()

    def string(self) -> str:
        start = self.at
        found = _STRING.match(self.text, start)
        if found is None:
            self.bad_string(start)
        text = _unescaped(found[1])
        if _NO_TEXT.search(text):
            self.refuse(start, "text with a NUL or half a character", "remove the escape")
        self.at = found.end()
        return text

    def bad_string(self, start: int) -> NoReturn:
        at = start + 1
        while at < len(self.text) and self.text[at] not in '"\n\r\t':
            if self.text[at] == "\\" and not _ESCAPE.match(self.text, at):
                self.refuse(at, "an escape that JSON does not know", "write \\\\ for a backslash")
            at += 2 if self.text[at] == "\\" else 1
        if at < len(self.text) and self.text[at] == "\t":
            self.refuse(at, "a tab character inside text", "write it as \\t")
        self.refuse(start, "a quote that is never closed", "close it on the same line")

    def number(self) -> int | float:
        found = _NUMBER.match(self.text, self.at)
        if found is None:
            almost = _ALMOST_NUMBER.match(self.text, self.at)
            assert almost is not None  # it begins like one
            if _WORD.fullmatch(almost[0].lstrip("+-")):
                self.constant(almost[0])
            self.refuse(
                self.at, f"{_shown(almost[0])} is no JSON number", "write a decimal number: 12, -3, 0.5 or 1e-4"
            )
        start, self.at = self.at, found.end()
        if found[1] is None and found[2] is None:
            whole = int(found[0]) if len(found[0]) <= len(str(-(2**63))) else 2**63
            if not -(2**63) <= whole < 2**63:
                self.refuse(start, f"{_cut(found[0])} is larger than 64 bits can hold", "write a smaller number")
            return whole
        number = float(found[0])
        if math.isinf(number):
            self.refuse(start, f"{_cut(found[0])} is larger than any number of a computer", "write a smaller number")
        return number

    def word(self) -> bool | None:
        found = _WORD.match(self.text, self.at)
        if found is None:
            self.expected("a value is missing here")
        if found[0] not in _WORDS:
            self.constant(found[0])
        self.at = found.end()
        return _WORDS[found[0]]

    def constant(self, text: str) -> NoReturn:
        """A word where a value is due that is none of JSON's three."""
        plain = text.lstrip("+-")
        if plain.lower() in ("nan", "infinity", "inf"):
            self.refuse(self.at, f"{text} is not JSON", "write a number, or leave the key out")
        python = {"True": "true", "False": "false", "None": "null"}
        right = python.get(plain, f'"{plain}" in double quotes')
        self.refuse(self.at, f"{_shown(text)} is no value of JSON", f"write {right}")

    def space(self) -> None:
        found = _SPACE.match(self.text, self.at)
        assert found is not None  # it matches nothing, too
        self.at = found.end()

    def here(self) -> str:
        return self.text[self.at : self.at + 1]

    def expected(self, what: str) -> NoReturn:
        """Something else stands where one thing alone is possible."""
        if not self.here():
            end = len(self.text.rstrip())
            self.refuse(end, f"the file ends too early: {what}" if end else "the file is empty", 'write {"…": …}')
        self.unexpected(what)

    def unexpected(self, what: str) -> NoReturn:
        if self.text.startswith(("//", "/*", "#"), self.at):
            self.refuse(self.at, "a comment", f"remove it; {STRICT}")
        self.refuse(self.at, f"{what}; here stands {_shown(self.here())}", STRICT)

    def where(self, index: int) -> str:
        """Line and column, from 1."""
        if index < self.counted:
            self.line, self.line_start, self.counted = 1, 0, 0
        if newlines := self.text.count("\n", self.counted, index):
            self.line += newlines
            self.line_start = self.text.rfind("\n", 0, index) + 1
        self.counted = index
        return f"{self.name}:{self.line}:{index - self.line_start + 1}"

    def refuse(self, index: int, what: str, next_step: str) -> NoReturn:
        raise InputError(f"not a DeepSpeed JSON: {what}", where=self.where(index), next_step=next_step)


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    plain = _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else _ESCAPES.get(found[2], found[2]), text)
    # A pair of halves is one character.
    return (
        plain.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") if _NO_TEXT.search(plain) else plain
    )


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"  # noqa: PLR2004


def _shown(text: str) -> str:
    return repr(_cut(text))

"""Strict YAML with positions: plain data of which every value knows its place, and never an object of some class.

Stricter than YAML, so that a file means what it looks like:

- UTF-8 (a byte order mark at the start is skipped), at most 1 MiB, 32 levels, 100 000 values, one document;
- no anchors, aliases, merge keys, tags, directives or duplicate keys, and no tab in the indentation;
- every key is text, as it is written;
- a plain `true` or `false` is a boolean, `null`, `~` or nothing at all is null, `-12` an integer, `1.5` or `2e-4` a
  float; whatever only resembles one of these (`yes`, `Off`, `NULL`, `010`, `0x1f`, `1_000`, `+5`, `.inf`) is refused
  until it is quoted or written plainly; everything else (`22:22`, `2026-01-31`, `10.0.0.1`) is text.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, TypeAlias

import yaml

from cluster.errors import InputError

Data: TypeAlias = "dict[str, Data] | list[Data] | str | int | float | bool | None"
Place: TypeAlias = tuple["str | int", ...]

LARGEST = 1 << 20
DEEPEST = 32
MOST = 100_000
LONGEST_INTEGER = 18

# libyaml where PyYAML was built with it: twenty times as fast, the same events.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}
_NONE_BESIDES: Mapping[str, bool | str | None] = MappingProxyType({})
_ALMOST_WORD = re.compile(r"yes|no|on|off|true|false|null|none", re.IGNORECASE)
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_ALMOST_NUMBER = re.compile(
    r"[-+]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|\.(?:inf|nan)"
    r"|\.?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?)",
    re.IGNORECASE,
)
# Control characters, other people's line ends, and the marks that make text look different from what it is.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]")
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")  # an escape in double quotes can make these
_TAB = re.compile(r"^ *\t", re.MULTILINE)

# What the parser says (both of PyYAML's) -> what we say.
_SYNTAX = (
    ("mapping values are not allowed", "a ':' where no key can stand; put text that contains ': ' in quotes"),
    ("could not find expected ':'", "neither 'key: value' nor '- item'; is a ':' missing?"),
    ("while scanning a quoted scalar", "a quote that is never closed"),
    ("cannot start any token", "text cannot begin with this character; put it in quotes"),
    ("escape c", "an escape that YAML does not know; write \\\\ for a backslash, or use single quotes"),
    ("node content", "a value is missing, or something else stands where it should be"),
    ("mapping keys are not allowed", "a '?' where no key can stand; put text that begins with '?' in quotes"),
    ("block scalar", "a '|' or '>' with something else behind it; put text that begins with it in quotes"),
    ("flow sequence", "a list in brackets that does not end well; is a ',' or ']' missing?"),
    ("flow mapping", "a mapping in braces that does not end well; is a ',' or '}' missing?"),
    ("sequence entries are not allowed", "a '-' where no list can stand; begin the list on a line of its own"),
    ("block collection", "this does not fit what stands before it; check the indentation and the quotes"),
    ("block mapping", "this does not fit what stands before it; check the indentation and the quotes"),
    ("undefined tag handle", "a tag ('!'); put text that begins with '!' in quotes"),
    ("maximum nesting depth", f"more than {DEEPEST} levels inside each other"),  # libyaml 0.2.6 has a bound of its own
    ("document start", "text after the end of the document; is the indentation right?"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A file's data, and where each piece of it stands. Relative paths in it are meant from `folder`."""

    name: str
    data: Data
    folder: Path
    positions: dict[Place, tuple[int, int]] = field(repr=False)

    def position(self, place: Place) -> tuple[int, int]:
        """Line and column (from 1) of a key or item, or of the nearest thing around it that exists."""
        while place not in self.positions and place:
            place = place[:-1]
        return self.positions.get(place, (1, 1))

    def where(self, place: Place) -> str:
        """`name:line:col` of the same."""
        line, column = self.position(place)
        return f"{self.name}:{line}:{column}"


def load(path: Path) -> Document:
    """Read a file; `InputError` for one that is missing, unreadable, no regular file, too large, or not strict YAML."""
    document = read(load_text(path), str(path))
    return replace(document, folder=path.absolute().parent)


def load_text(path: Path) -> str:
    """A file's text; `InputError` for one that is missing, unreadable, no regular file, too large, or not UTF-8."""
    return _decoded(_content(path), str(path))


def read(text: str, name: str, *, words: Mapping[str, bool | str | None] = _NONE_BESIDES) -> Document:
    """Read strict YAML; `name` is what messages call it.

    `words`: plain words that would be refused, and what they mean in the files of the program that they belong to.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > LARGEST:
        _too_large(name)
    if found := _INVISIBLE.search(text):
        raise InputError(
            f"the invisible or control character U+{ord(found[0]):04X}",
            where=_where(text, found.start(), name),
            next_step='remove it, or write it as "\\u…" in double quotes if it is meant',
        )
    if found := _TAB.search(text):
        raise InputError(
            "a tab character in the indentation",
            where=_where(text, found.end() - 1, name),
            next_step="indent with spaces",
        )
    reader = _Reader(text, name, words)
    try:
        data = reader.document()
    except yaml.YAMLError as error:
        raise _syntax_error(error, name) from None
    return Document(name=name, data=data, folder=Path(name).parent, positions=reader.positions)


def _content(path: Path) -> bytes:
    try:
        _check_kind(path.stat().st_mode, path)
        # Not blocking: between the look and the opening the file may have become a pipe.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
            _check_kind(os.fstat(file.fileno()).st_mode, path)
            content = file.read(LARGEST + 4)
    except FileNotFoundError:
        raise InputError("there is no such file", where=str(path)) from None
    except PermissionError:
        raise InputError("the file may not be read", where=str(path), next_step="check its owner and mode") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"the file cannot be read: {reason}", where=ascii(str(path))[1:-1]) from None
    return content


def _check_kind(mode: int, path: Path) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((words for is_kind, words in kinds if is_kind(mode)), "a device")
    raise InputError(f"this is {kind}, not a file", where=str(path), next_step="give the path of a file")


def _decoded(content: bytes, name: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError("the file is UTF-16, not UTF-8", where=f"{name}:1:1", next_step="save it as UTF-8")
    if len(content.removeprefix(b"\xef\xbb\xbf")) > LARGEST:
        _too_large(name)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        raise InputError(
            f"the byte 0x{content[error.start]:02X} is not UTF-8",
            where=_where(before, len(before), name),
            next_step="save the file as UTF-8",
        ) from None


def _too_large(name: str) -> NoReturn:
    raise InputError(f"the file is larger than {LARGEST} bytes", where=f"{name}:1:1", next_step="is it the right file?")


def _where(text: str, index: int, name: str) -> str:
    return f"{name}:{text.count(chr(10), 0, index) + 1}:{index - text.rfind(chr(10), 0, index)}"


def _syntax_error(error: yaml.YAMLError, name: str) -> InputError:
    if not isinstance(error, yaml.MarkedYAMLError):
        return InputError(f"not YAML: {error}", where=f"{name}:1:1")
    mark = error.problem_mark or error.context_mark
    said = f"{error.context or ''} {error.problem or ''}".strip()
    what = next((ours for theirs, ours in _SYNTAX if theirs in said), said)
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else f"{name}:1:1"
    return InputError(f"not YAML: {what}", where=where)


class _Reader:
    """Turns the parser's events into data, and refuses on the way. Levels are bounded, so recursion is."""

    def __init__(self, text: str, name: str, words: Mapping[str, bool | str | None]) -> None:
        self.name = name
        self.words = {**_WORDS, **words}
        self.events: Iterator[yaml.Event] = yaml.parse(text, Loader=_LOADER)
        self.positions: dict[Place, tuple[int, int]] = {}
        self.count = 0

    def document(self) -> Data:
        next(self.events)  # the start of the stream
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        if isinstance(event, yaml.DocumentStartEvent) and (event.version or event.tags):
            self.refuse(event, "a '%' directive", "remove the line")
        data = self.value(next(self.events), ())
        next(self.events)  # the end of the document
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            self.refuse(event, "a second document", "keep one document in the file; remove the '---' and what follows")
        return data

    def value(self, event: yaml.Event, place: Place) -> Data:
        self.check(event, depth=len(place))
        self.positions.setdefault(place, _spot(event))
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(place)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        return self.sequence(place)

    def check(self, event: yaml.Event, *, depth: int) -> None:
        self.count += 1
        if self.count > MOST:
            self.refuse(event, f"more than {MOST} values", "is it the right file?")
        if depth > DEEPEST:
            self.refuse(event, f"more than {DEEPEST} levels inside each other", "is it the right file?")
        if isinstance(event, yaml.AliasEvent):
            self.refuse(event, f"the alias '*{event.anchor}'", "write the value out, or put it in quotes if it is text")
        if (anchor := getattr(event, "anchor", None)) is not None:
            self.refuse(event, f"the anchor '&{anchor}'", "write values out where they are needed")
        if (tag := getattr(event, "tag", None)) is not None:
            short = tag.replace("tag:yaml.org,2002:", "!!")
            self.refuse(event, f"the tag '{short}'", "write the value without a tag, in quotes if it is text")

    def sequence(self, place: Place) -> list[Data]:
        items: list[Data] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.value(event, (*place, len(items))))
        return items

    def mapping(self, place: Place) -> dict[str, Data]:
        items: dict[str, Data] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event, place)
            items[key] = self.value(next(self.events), (*place, key))
        return items

    def key(self, event: yaml.Event, place: Place) -> str:
        self.check(event, depth=len(place))
        if not isinstance(event, yaml.ScalarEvent):
            self.refuse(event, "a list or mapping as a key", "a key must be text; put braces and brackets in quotes")
        key = self.text(event)
        if not key:
            self.refuse(event, "an empty key", "write the key before the ':'")
        if key == "<<" and event.implicit[0]:
            self.refuse(event, "a merge key '<<'", "write the keys out")
        here = (*place, key)
        if first := self.positions.get(here):
            self.refuse(event, f"the key {_shown(key)} a second time (first in line {first[0]})", "keep one of them")
        self.positions[here] = _spot(event)
        return key

    def scalar(self, event: yaml.ScalarEvent) -> str | int | float | bool | None:
        text = self.text(event)
        if not event.implicit[0]:  # quoted, or a block
            return text
        if text in self.words:
            return self.words[text]
        if _ALMOST_WORD.fullmatch(text):
            self.refuse(event, f"a plain {text} may mean two things", f'write true, false, null, or "{text}" in quotes')
        if _INTEGER.fullmatch(text) and len(text) <= LONGEST_INTEGER:
            return int(text)
        if _FLOAT.fullmatch(text) and not _INTEGER.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        if _ALMOST_NUMBER.fullmatch(text):
            self.refuse(
                event,
                f"{_shown(text)} is a number that is not written plainly, or too large",
                "write a decimal number (12, -3, 0.5, 1e-4), or put text in quotes",
            )
        return text

    def text(self, event: yaml.ScalarEvent) -> str:
        text: str = event.value
        if _NO_TEXT.search(text):
            self.refuse(event, "text with a NUL or half a character", "remove the escape")
        return text

    def refuse(self, event: yaml.Event, what: str, next_step: str) -> NoReturn:
        line, column = _spot(event)
        raise InputError(what, where=f"{self.name}:{line}:{column}", next_step=next_step)


def _spot(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    assert mark is not None  # every event of a text has one
    return mark.line + 1, mark.column + 1


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")  # noqa: PLR2004

"""Commands as values: what to run, never the running of it. The only place that quotes a shell line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import InputError

# sshd hands the whole line to one `sh -c` argument, which Linux limits to 128 KiB (MAX_ARG_STRLEN).
LONGEST_LINE = 120_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A program and its arguments; `stdin` carries what is long or secret, and is never shown."""

    argv: tuple[str, ...]
    stdin: bytes = b""

    def shell(self) -> str:
        """The POSIX shell line for the wire; `InputError` where no line can carry the arguments."""
        for word in self.argv:
            check_word(word)
        line = shlex.join(self.argv)
        if len(line.encode()) > LONGEST_LINE:
            raise InputError(
                f"the command {self.argv[0]!r} is {len(line.encode())} bytes long; at most {LONGEST_LINE} can be sent",
                next_step="put long arguments into a file",
            )
        return line

    def __str__(self) -> str:
        return shlex.join(self.argv)


def script(text: str, *arguments: str, stdin: bytes = b"") -> Command:
    """A POSIX shell script with positional arguments; `stdin` is what the script itself reads."""
    return Command(argv=("sh", "-c", text, "sh", *arguments), stdin=stdin)


def check_word(word: str) -> None:
    """Refuse what would not arrive byte for byte: NUL, and bytes that are not UTF-8."""
    if "\0" in word:
        raise InputError(f"the argument {word!r} holds a NUL byte", next_step="remove it: no program can be given one")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the argument {word!r} is not UTF-8", next_step="rename the file, or pass the bytes in a file"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a command answered. `code` is the exit status, 128 + N for a signal N."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def ok(self) -> bool:
        """Whether the command ended with 0."""
        return self.code == 0

    @property
    def text(self) -> str:
        """Standard output as text; bytes that are not UTF-8 are shown as U+FFFD."""
        return self.stdout.decode(errors="replace")

    def tail(self, lines: int = 5) -> tuple[str, ...]:
        """The last lines of standard error (of standard output when that is empty), for an error's detail."""
        said = self.stderr.strip() or self.stdout.strip()
        return tuple(said.decode(errors="replace").splitlines()[-lines:])


def describe(argv: Sequence[str], *, limit: int = 100) -> str:
    """A command for the eyes: quoted, and cut where it is long."""
    line = shlex.join(argv).replace("\n", " ")
    return line if len(line) <= limit else line[: limit - 1] + "…"

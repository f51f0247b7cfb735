"""The example, with half a second after every step: time for something to happen in between."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import train  # type: ignore[import-not-found]

note = train.note


def note_and_wait(*arguments: Any, **named: Any) -> None:
    note(*arguments, **named)
    time.sleep(0.5)


train.note = note_and_wait
train.main()

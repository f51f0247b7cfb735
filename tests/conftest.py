"""What holds for every ring: a test leaves the environment as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Pytest's own diary of what it is doing, and where torch notes its cache when its compiler is first imported.
THEIRS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in THEIRS}


@pytest.fixture(autouse=True)
def _the_environment_stays_as_it_is() -> Iterator[None]:
    before = environment()
    yield
    assert environment() == before, "a test changed os.environ; monkeypatch puts things back"

"""Arenas for the differential tests: one scratch file system for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.differential import arena


@pytest.fixture(scope="session")
def place() -> Iterator[bytes]:
    """An empty directory on the best file system that can be had."""
    with arena.arena(arena.best()) as found:
        yield found

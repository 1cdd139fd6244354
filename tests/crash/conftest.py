"""Thousands of small unions, in memory where that can hold one: nothing here waits for a disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import probe
from tests.support.unions import memory_directory
from tests.support.unions import unions as unions


@pytest.fixture
def home(request: pytest.FixtureRequest) -> Iterator[Path]:
    memory = memory_directory()
    if memory is None:
        yield request.getfixturevalue("tmp_path")
        return
    with tempfile.TemporaryDirectory(prefix="unionfs2-crash-", dir=memory) as name:
        yield Path(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case in one dialect, a third of them in the other, where there are two."""
    if "case" not in metafunc.fixturenames:
        return
    from tests.crash.cases import CASES

    trusted = bool(probe.has_trusted_xattr())
    pairs = [(case, not trusted) for case in CASES]
    if trusted:
        pairs += [(case, True) for case in CASES[::3]]
    names = [f"{case.name}-{'user' if user else 'trusted'}" for case, user in pairs]
    metafunc.parametrize(("case", "userxattr"), pairs, ids=names)


@pytest.fixture
def userxattr() -> bool:
    return not probe.has_trusted_xattr()

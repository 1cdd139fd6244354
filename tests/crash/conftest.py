"""Thousands of small unions, in memory where that can hold one: nothing here waits for a disk."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support import probe
from tests.support.unions import unions as unions

_MEMORY = "/dev/shm"


@cache
def _memory_reason() -> str:
    """Why a union cannot live in memory; empty when it can."""
    keys = ["user.probe", "trusted.probe"] if probe.has_trusted_xattr() else ["user.probe"]
    try:
        with tempfile.TemporaryDirectory(dir=_MEMORY) as name:
            for key in keys:
                os.setxattr(name, key, b"probe")
            os.close(os.open(name, os.O_TMPFILE | os.O_RDWR))
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, "?")
    return ""


@pytest.fixture
def home(request: pytest.FixtureRequest) -> Iterator[Path]:
    if _memory_reason():
        yield request.getfixturevalue("tmp_path")
        return
    with tempfile.TemporaryDirectory(prefix="unionfs2-crash-", dir=_MEMORY) as name:
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

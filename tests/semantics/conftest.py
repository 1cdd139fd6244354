"""Fixtures: one union per test, by each backend."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import targets
from tests.semantics.rig import NATIVE, Rig
from tests.support import mounts, probe
from tests.support.transports import TRANSPORTS, WAYS, backend_of


def _need(way: str) -> None:
    # the tests act as several users and look into trusted.* attributes
    probe.need("root", "overlay" if way == NATIVE else "fuse")
    if way != NATIVE and shutil.which(targets.unionfs2_program()) is None:
        pytest.fail("the unionfs2 command is not installed beside this Python; run ./dev setup")


@pytest.fixture(params=[pytest.param(name, id=f"via-{name}") for name in WAYS])
def way(request: pytest.FixtureRequest) -> str:
    """What serves the union of this test: the kernel, or one of the transports."""
    name = str(request.param)
    _need(name)
    return name


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Which transport serves when the test mounts through FUSE."""
    return str(request.param)


@pytest.fixture(scope="session")
def rigs() -> Iterator[Path]:
    """Where this run makes its unions; sweeps the mounts that an aborted run left.

    Not below pytest's own folder, which is closed to the ordinary users some tests act as.
    """
    home = Path(tempfile.gettempdir()) / "unionfs2-semantics"
    home.mkdir(mode=0o755, exist_ok=True)
    mounts.sweep(home)
    run = Path(tempfile.mkdtemp(dir=home))
    run.chmod(0o755)
    lock = mounts.claim(run)
    try:
        yield run
    finally:
        mounts.detach(run)
        shutil.rmtree(run)
        os.close(lock)


@contextlib.contextmanager
def _made(rigs: Path, backend: str, transport: str | None) -> Iterator[Rig]:
    """A rig, removed afterwards; a server that had something to say fails the test."""
    made = Rig(backend, rigs, transport)
    try:
        yield made
    finally:
        said = made.complaints()
        made.remove()
        if said:
            pytest.fail(f"the server said:\n{said}", pytrace=False)


@pytest.fixture
def rig(way: str, rigs: Path) -> Iterator[Rig]:
    """An unmounted union with one empty lower."""
    with _made(rigs, backend_of(way), None if way == NATIVE else way) as made:
        yield made


@pytest.fixture
def both(rigs: Path, transport: str) -> Iterator[Rig]:
    """A union that one test mounts by both backends in turn."""
    _need(NATIVE)
    _need(transport)
    with _made(rigs, NATIVE, transport) as made:
        yield made

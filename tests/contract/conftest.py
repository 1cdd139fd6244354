"""The driver on both backends: the same tests, the same answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import mounts, probe
from unionfs2.backends import Choice
from unionfs2.driver import Driver

BACKENDS: tuple[Choice, ...] = ("native", "fuse")

Opener = Callable[..., Driver]


def _need(backend: str) -> None:
    probe.need("root", "fuse" if backend == "fuse" else "overlay")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of these mounts stay out of the machine's own."""
    directory = tmp_path / "state"
    directory.mkdir(exist_ok=True)
    monkeypatch.setenv("UNIONFS2_STATE", str(directory))
    return directory


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Choice:
    """Both backends in turn."""
    _need(request.param)
    chosen: Choice = request.param
    return chosen


@pytest.fixture
def other(backend: Choice) -> Choice:
    """The backend that *backend* is not."""
    found: Choice = "fuse" if backend == "native" else "native"
    _need(found)
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A place for a store, with a name that needs escaping."""
    return tmp_path / "a store, with:colons"


@pytest.fixture
def opener(home: Path, backend: Choice, state: Path, warnings_heard: list[str]) -> Iterator[Opener]:
    """Opens the store as often as a test likes."""
    assert state.exists()
    opened: list[Driver] = []

    def open_(**keywords: Any) -> Driver:
        keywords = {"backend": backend, "warn": warnings_heard.append, **keywords}
        opened.append(Driver.open(keywords.pop("home", home), **keywords))
        return opened[-1]

    yield open_
    for driver in opened:
        driver.close()
    mounts.detach(Path(os.path.realpath(home)))


@pytest.fixture
def warnings_heard() -> list[str]:
    """What the drivers of the test warned of."""
    return []


@pytest.fixture
def driver(opener: Opener) -> Driver:
    """An open, empty store on the backend under test."""
    return opener()

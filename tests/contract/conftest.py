"""The driver on both backends: the same tests, the same answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import mounts, probe
from tests.support.transports import NATIVE, TRANSPORTS, WAYS, backend_of
from unionfs2.backends import Choice
from unionfs2.driver import Driver

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


#: For tests of what the server does: by each transport, and not by the kernel.
by_fuse = pytest.mark.parametrize("way", TRANSPORTS, indirect=True)
by_kernel = pytest.mark.parametrize("way", [NATIVE], indirect=True)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """What serves: the kernel, or one of the transports."""
    name = str(request.param)
    _need(backend_of(name))
    return name


@pytest.fixture
def backend(way: str) -> Choice:
    """Both backends in turn."""
    return "native" if way == NATIVE else "fuse"


@pytest.fixture
def store_options(way: str) -> list[str]:
    """Options of a store that make its FUSE mounts be served by the transport under test."""
    return [] if way == NATIVE else [f"mountopt=transport={way}"]


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
def opener(
    home: Path,
    backend: Choice,
    store_options: list[str],
    state: Path,
    warnings_heard: list[str],
) -> Iterator[Opener]:
    """Opens the store as often as a test likes."""
    assert state.exists()
    opened: list[Driver] = []

    def open_(**keywords: Any) -> Driver:
        keywords = {"backend": backend, "warn": warnings_heard.append, **keywords}
        if keywords["backend"] == backend:
            keywords["options"] = _together(store_options, keywords.get("options", ()))
        opened.append(Driver.open(keywords.pop("home", home), **keywords))
        return opened[-1]

    yield open_
    for driver in opened:
        driver.close()
    mounts.detach(Path(os.path.realpath(home)))


def _together(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Both lists of options; what both say of mounts becomes one option."""
    texts = [text.partition("=")[2] for text in (*first, *second) if text.startswith("mountopt=")]
    rest = [text for text in (*first, *second) if not text.startswith("mountopt=")]
    return [*rest, f"mountopt={','.join(texts)}"] if texts else rest


@pytest.fixture
def warnings_heard() -> list[str]:
    """What the drivers of the test warned of."""
    return []


@pytest.fixture
def driver(opener: Opener) -> Driver:
    """An open, empty store on the backend under test."""
    return opener()

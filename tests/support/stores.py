"""Layer stores for tests: made by hand as Docker lays them out, looked at, damaged."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from unionfs2.layers import LayerStore
from unionfs2.store_options import StoreOptions
from unionfs2.storecheck import Finding, check
from unionfs2.storemodel import LayerId


@contextlib.contextmanager
def quick_place(otherwise: Path) -> Iterator[Path]:
    """A directory in memory where there is one: thousands of stores are made for some tests."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield otherwise
        return
    path = Path(tempfile.mkdtemp(prefix="unionfs2-test-", dir=memory))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def lid(text: str) -> LayerId:
    """*text* as a layer id."""
    return LayerId(text)


def open_store(home: Path, *options: str, create: bool = True) -> LayerStore:
    """The store at *home* with storage options."""
    return LayerStore.open(os.fsencode(home), options=StoreOptions.parse(options), create=create)


def fill(store: LayerStore, layer: LayerId, content: Mapping[str, str]) -> None:
    """Put files straight into the diff of a layer."""
    for name, text in content.items():
        (Path(os.fsdecode(store.diff_path(layer))) / name).write_text(text)


def docker_layer(home: Path, layer: str, short: str, lower: str | None = None) -> Path:
    """A layer as Docker's overlay2 writes it; the directory l must exist."""
    base = home / layer
    (base / "diff").mkdir(parents=True)
    (base / "link").write_text(short)
    if lower is not None:
        (base / "lower").write_text(lower)
        (base / "work").mkdir(mode=0o700)
    (home / "l" / short).symlink_to(f"../{layer}/diff")
    return base


SHORT_A = "A" * 26
SHORT_B = "B" * 26
SHORT_C = "C" * 26


def docker_store(home: Path) -> Path:
    """Three layers, c on b on a, and a file that is no layer."""
    (home / "l").mkdir(parents=True, mode=0o710)
    home.chmod(0o710)
    (home / "backingFsBlockDev").touch()
    docker_layer(home, "a", SHORT_A)
    docker_layer(home, "b", SHORT_B, f"l/{SHORT_A}")
    docker_layer(home, "c", SHORT_C, f"l/{SHORT_B}:l/{SHORT_A}")
    for layer in "abc":
        (home / layer).chmod(0o710)
    return home


def codes(findings: list[Finding]) -> list[str]:
    """The codes of findings, sorted."""
    return sorted(finding.code for finding in findings)


def assert_clean(store: LayerStore) -> None:
    """Nothing is wrong, nothing half made, every layer can be read, every invariant holds."""
    findings = check(store, deep=True)
    assert findings == [], "\n".join(map(str, findings))
    home = Path(os.fsdecode(store.home))
    links = {link.name: os.readlink(link) for link in (home / "l").iterdir()}
    for layer in store.ids():
        found = store.layer(layer)
        assert links.pop(found.link) == f"../{layer}/diff"
        if found.parent is not None:
            parent = store.layer(found.parent)
            assert found.lower == (parent.link, *parent.lower)
            assert found.id in store.children(parent.id)
    assert links == {}
    for name in ("staging", "trash"):
        assert list((home / ".unionfs2" / name).iterdir()) == []
    assert stat.S_IMODE((home / ".unionfs2").stat().st_mode) == 0o700


def content_of(store: LayerStore, layer: LayerId) -> dict[str, str]:
    """Files in the diff of a layer."""
    diff = Path(os.fsdecode(store.diff_path(layer)))
    return {path.name: path.read_text() for path in sorted(diff.iterdir())}

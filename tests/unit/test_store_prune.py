"""What prune removes, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stores import assert_clean, lid, open_store
from unionfs2.layers import LayerStore
from unionfs2.storeprune import prune, unused_layers


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LayerStore]:
    """Two images of two layers each, a box on the first one, on layers named as their paths."""
    with open_store(tmp_path / "home") as opened:
        for name in ("a", "a1", "a2", "b", "b1"):
            parent = {"a1": "a", "a2": "a1", "b1": "b"}.get(name)
            opened.create(lid(name), None if parent is None else lid(parent), commit=True)
        opened.create(lid("box"), lid("a1"), writable=True)
        yield opened


def litter(store: LayerStore, home: Path) -> None:
    (home / ".unionfs2" / "staging" / "dead").mkdir()
    (home / ".unionfs2" / "trash" / "dead").mkdir()
    (home / "l" / ("D" * 26)).symlink_to("../nobody/diff")


def test_left_overs_only_unless_asked(store: LayerStore, tmp_path: Path) -> None:
    litter(store, tmp_path / "home")
    shown = prune(store, dry_run=True)
    assert sorted(item.kind for item in shown) == ["link-dangling", "staging-abandoned", "trash"]
    assert sorted(map(str, prune(store))) == sorted(map(str, shown))
    assert_clean(store)
    assert prune(store) == []
    assert len(store.ids()) == 6


def test_layers_that_nobody_needs(store: LayerStore) -> None:
    assert unused_layers(store, [lid("b1")]) == ["a2"]
    assert unused_layers(store, []) == ["a2", "b1", "b"]
    shown = prune(store, dry_run=True, keep=[])
    assert [item.layer for item in shown] == ["a2", "b1", "b"]
    assert store.exists(lid("b"))
    assert [str(item) for item in prune(store, keep=[])] == ["layer a2", "layer b1", "layer b"]
    assert store.ids() == ("a", "a1", "box")
    assert_clean(store)


def test_what_a_damaged_layer_may_need_is_kept(store: LayerStore, tmp_path: Path) -> None:
    (tmp_path / "home" / "b1" / "layer.json").write_text("{")
    assert unused_layers(store, []) == ["a2"]


def test_a_layer_that_gets_a_child_meanwhile_stays(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.discard

    def discard(layer: str) -> object:
        if layer == "b1":
            store.create(lid("late"), lid("b1"))
        return real(lid(layer))

    monkeypatch.setattr(store, "discard", discard)
    stayed = [item for item in prune(store, keep=[]) if item.error]
    assert [item.layer for item in stayed] == ["b1", "b"]
    assert "another layer is built on it: late" in str(stayed[0])
    assert_clean(store)

"""The hostile archives given to the driver: a layer appears whole or not at all, and nothing else.

Every fifth archive of the corpus, into an empty layer and as a new one on another, in turn; all of
them one by one with ``UNIONFS2_HOSTILE=all``. The store lies in memory where that can hold one.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile import corpus
from tests.hostile.corpus import Hostile, Outcome
from tests.support.tree import Dir, File, Snapshot, Tree, build, differences, snapshot
from tests.support.unions import memory_directory
from unionfs2.driver import Driver
from unionfs2.errors import UnionFSError, sentence
from unionfs2.storemodel import LayerId

pytestmark = pytest.mark.needs("root", "mknod", "trusted-xattr", "user-xattr", "acl")

_STRIDE = 1 if os.environ.get("UNIONFS2_HOSTILE") == "all" else 5
_BASE: Tree = {"d": {"inner": "base"}, "file": "base"}


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="unionfs2-hostile-", dir=memory_directory()) as name:
        yield Path(name)


class Scene:
    """A store, and a directory that no archive may reach."""

    def __init__(self, place: Path, driver: Driver) -> None:
        self.driver = driver
        self.outside = place / "outside"
        build(self.outside, {"kept": File("precious", uid=5), "dir": Dir({"deep": {"f": "x"}})})
        driver.create("base")
        build(os.fsdecode(driver.store.diff_path(LayerId("base"))), _BASE)
        driver.commit("base", "base")
        self.home = Path(os.fsdecode(driver.store.home))
        self.before = self.look()

    def look(self) -> tuple[Snapshot, Snapshot, set[str]]:
        """The outside, the layer that was there before, and what there is in the store."""
        names = {str(path.relative_to(self.home)) for path in self.home.glob("*")}
        names |= {str(path.relative_to(self.home)) for path in self.home.glob(".unionfs2/*/*")}
        return snapshot(self.outside), snapshot(self.home / "base"), names

    def try_one(self, case: Hostile, *, fresh: bool) -> str:
        """Apply *case*, look at everything, remove the layer again; how it ended."""
        driver, stream = self.driver, io.BytesIO(case.data)
        if not fresh:
            driver.create("new", "base")
        try:
            if fresh:
                applied = driver.import_layer("new", "base", stream)
            else:
                applied = driver.apply("new", stream)
        except (UnionFSError, OSError) as exc:
            text = sentence(exc)
            assert text, case.name
            assert "\n" not in text, case.name
            assert case.outcome is not Outcome.CONFINED, (case.name, text)
            assert driver.exists("new") is not fresh, case.name
            if not fresh:
                layer = driver.store.layer(LayerId("new"))
                assert not layer.frozen, case.name
                assert os.listdir(driver.store.diff_path(layer.id)) == [], case.name
            ended = "refused"
        else:
            # Limits of its own are those of unpack(); the store's here are wider.
            assert case.outcome is not Outcome.REFUSED or case.limits != corpus.DEFAULT, case.name
            layer = driver.store.layer(LayerId("new"))
            assert layer.frozen, case.name
            assert layer.record.diff_id == applied.diff_id, case.name
            assert driver.diff("new", io.BytesIO(), exact=True) == applied.diff_id, case.name
            ended = "whole"
        driver.remove("new")
        outside, base, names = self.look()
        assert differences(self.before[0], outside) == [], case.name
        assert differences(self.before[1], base) == [], case.name
        assert names == self.before[2], case.name
        return ended


def test_a_layer_is_whole_or_absent(place: Path) -> None:
    ended: Counter[str] = Counter()
    store = place / "store"
    limits = ("apply_size_max=16m", "apply_entries_max=5000")
    with Driver.open(store, options=limits) as driver:
        scene = Scene(place, driver)
        for number, case in enumerate(corpus.hostile(os.fsencode(scene.outside))):
            if number % _STRIDE == 0:
                ended[scene.try_one(case, fresh=number // _STRIDE % 2 == 0)] += 1
        assert driver.check(deep=True) == []
    assert min(ended.values()) > 100
    print(f"{sum(ended.values())} archives, {dict(ended)}, 0 escapes")  # noqa: T201 - with -s

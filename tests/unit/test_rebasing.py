"""Conflicts between what a layer changes and what became of its parent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.tree import Dir, File, Tree, Whiteout, build
from unionfs2.rebasing import conflicts
from unionfs2.whiteout import Dialect

pytestmark = pytest.mark.needs("mknod-whiteout", "user-xattr")

D: dict[str, Any] = {"mtime_ns": 5}
A, B, C = (File(data, **D) for data in ("a", "b", "c"))


def _conflicts(home: Path, top: Tree, old: Tree, new: Tree | None) -> list[str]:
    trees = {"top": top, "old": old} | ({} if new is None else {"new": new})
    for name, tree in trees.items():
        build(home / name, tree, userxattr=True)
    chain = () if new is None else (os.fsencode(home / "new"),)
    found = conflicts(
        os.fsencode(home / "top"), (os.fsencode(home / "old"),), chain, Dialect(userxattr=True)
    )
    return [f"{c.ours}{c.theirs} {os.fsdecode(c.path)}" for c in found]


@pytest.mark.parametrize(
    ("top", "old", "new", "expected"),
    [
        ({"f": B}, {"f": A}, {"f": C}, ["CC /f"]),
        ({"f": B}, {"f": A}, {"f": B}, []),
        ({"f": B}, {"f": A}, {"f": A}, []),
        ({"f": B}, {}, {"f": C}, ["AA /f"]),
        ({"f": B}, {"f": A}, {}, ["CD /f"]),
        ({"f": Whiteout()}, {"f": A}, {"f": C}, ["DC /f"]),
        ({"f": Whiteout()}, {"f": A}, {}, []),
        ({"g": B}, {"f": A}, {"f": C}, []),
        # Directories that both only changed are merged.
        ({"d": {"x": A}}, {"d": {}}, {"d": {"y": A}}, []),
        # One side deleted the directory in which the other works.
        ({"d": Whiteout()}, {"d": {"x": A}}, {"d": {"x": B, "y": A}},
         ["DC /d", "DC /d/x", "DA /d/y"]),
        ({"d": {"x": B}}, {"d": {"x": A}}, {}, ["CD /d", "CD /d/x"]),
        ({"d": Dir({"e": Dir({"x": B}, **D)}, **D)}, {"d": Dir({"e": Dir({"x": A}, **D)}, **D)},
         {"d": A}, ["CC /d/e/x"]),
        # Names that sort between a directory and what is in it.
        (
            {"a": Whiteout(), "a-": Whiteout()},
            {"a": Dir({"x": A}, **D), "a-": Dir({"x": A}, **D)},
            {"a": Dir({"x": B}, **D), "a-": Dir({"x": B}, **D)},
            ["DC /a-/x", "DC /a/x"],
        ),
    ],
)  # fmt: skip
def test_conflicts(tmp_path: Path, top: Tree, old: Tree, new: Tree, expected: list[str]) -> None:
    assert _conflicts(tmp_path, top, old, new) == expected


def test_a_parent_that_is_gone_altogether(tmp_path: Path) -> None:
    top: Tree = {"f": B, "new": A}
    assert _conflicts(tmp_path, top, {"f": A, "other": A}, None) == ["CD /f"]


def test_a_layer_without_a_parent(tmp_path: Path) -> None:
    build(tmp_path / "top", {"f": B, "same": A}, userxattr=True)
    build(tmp_path / "new", {"f": A, "same": A}, userxattr=True)
    top, new = (os.fsencode(tmp_path / name) for name in ("top", "new"))
    found = conflicts(top, (), (new,), Dialect(userxattr=True))
    assert [conflict.path for conflict in found] == [b"/f"]

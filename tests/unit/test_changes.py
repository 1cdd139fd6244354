"""The list of changes that the demo prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from devtools.changes import changes, summary
from tests.support.tree import Dir, Tree, Whiteout, build

pytestmark = pytest.mark.needs("mknod-whiteout", "user-xattr")


def _found(tmp_path: Path) -> list[tuple[str, str]]:
    lower = [tmp_path / name for name in ("top", "bottom")]
    return [(item.kind, str(item.path)) for item in changes(tmp_path / "upper", lower)]


def test_added_changed_deleted(tmp_path: Path) -> None:
    build(tmp_path / "bottom", {"old": "1", "d": {"kept": "", "edited": ""}, "gone": ""})
    build(tmp_path / "top", {"d": {"edited": "2"}})
    build(
        tmp_path / "upper",
        {"gone": Whiteout(), "d": {"edited": "3", "new": {"x": "", "y": ""}}, "n": ""},
    )
    assert _found(tmp_path) == [
        ("C", "d"),
        ("C", "d/edited"),
        ("A", "d/new"),
        ("D", "gone"),
        ("A", "n"),
    ]


def test_what_a_lower_layer_hides_is_added_not_changed(tmp_path: Path) -> None:
    build(tmp_path / "bottom", {"white": "", "opaque": {"f": ""}, "blocked": {"f": ""}})
    build(tmp_path / "top", {"white": Whiteout(), "opaque": Dir({}, opaque=True), "blocked": ""})
    files: Tree = {"white": "", "opaque": {"f": ""}, "blocked": {"f": ""}}
    build(tmp_path / "upper", files)
    assert _found(tmp_path) == [
        ("C", "blocked"),
        ("A", "blocked/f"),
        ("C", "opaque"),
        ("A", "opaque/f"),
        ("A", "white"),
    ]


def test_an_opaque_directory_is_told(tmp_path: Path) -> None:
    build(tmp_path / "bottom", {"d": {"f": ""}})
    build(tmp_path / "upper", {"d": Dir({}, opaque=True)}, userxattr=True)
    found = list(changes(tmp_path / "upper", [tmp_path / "bottom"]))
    assert summary(found) == ["C /d  (opaque: hides what was there)"]


def test_the_summary_keeps_crowds_together(tmp_path: Path) -> None:
    build(tmp_path / "bottom", {"crowd": {}, "few": {}})
    files = {f"{number}": "" for number in range(50)}
    build(tmp_path / "upper", {"crowd": files, "few": {"a": "", "b": {"c": ""}}})
    found = list(changes(tmp_path / "upper", [tmp_path / "bottom"]))
    assert summary(found, lines_max=10) == [
        "A /crowd/...  (50 objects)",
        "A /few/a",
        "A /few/b  (with 1 objects)",
    ]

"""Which layer provides a path, and what hides the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tree import Dir, File, Symlink, Tree, Whiteout, build
from unionfs2.treeview import MergedView
from unionfs2.which import Held, which
from unionfs2.whiteout import Dialect

pytestmark = pytest.mark.needs("mknod-whiteout", "user-xattr")

USER = Dialect(userxattr=True)
Ask = Callable[[str], list[Held]]


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Ask]:
    def make(*trees: Tree) -> Ask:
        layers = [tmp_path / f"l{number}" for number in range(len(trees))]
        for layer, tree in zip(layers, trees, strict=True):
            build(layer, tree, userxattr=True)
        chain = [os.fsencode(layer) for layer in layers]

        def run(path: str) -> list[Held]:
            found = which(chain, os.fsencode(path), USER)
            with MergedView.open(chain, USER) as view:
                seen = view.find(os.fsencode(path))
            visible = [held for held in found if held.role == "visible"]
            assert len(visible) == (seen is not None or path == "/")
            return found

        return run

    return make


def _short(found: list[Held]) -> list[str]:
    return [
        f"{held.kind or '-'}{' ' + held.role if held.role else ''}"
        + (f" < {held.hidden.layer} {held.hidden.reason}" if held.hidden else "")
        for held in found
    ]


def test_the_root_merges_every_layer(ask: Callable[..., Ask]) -> None:
    assert _short(ask({}, {}, {})("/")) == ["directory visible", *["directory merged"] * 2]


def test_a_file_hides_what_is_below(ask: Callable[..., Ask]) -> None:
    run = ask({}, {"f": File("abc", mode=0o600, mtime_ns=5)}, {"f": "x"}, {"f": {}})
    found = run("f")
    assert _short(found) == ["-", "file visible", "file < 1 file", "directory < 1 file"]
    assert (found[1].size, found[1].mode, found[1].mtime_ns, found[1].path) == (3, 0o600, 5, b"/f")


def test_a_whiteout_hides_what_is_below(ask: Callable[..., Ask]) -> None:
    run = ask({"f": Whiteout()}, {"f": ""}, {"f": ""})
    assert _short(run("f")) == ["whiteout", "file < 0 whiteout", "file < 0 whiteout"]
    run_2 = ask({}, {"d": Whiteout()}, {"d": {"x": ""}})
    found = run_2("d/x")
    assert _short(found) == ["-", "-", "file < 1 whiteout"]
    assert found[2].hidden is not None
    assert found[2].hidden.path == b"/d"


def test_an_opaque_directory_hides_what_is_below_it(ask: Callable[..., Ask]) -> None:
    run = ask({"d": {}}, {"d": Dir({"a": ""}, opaque=True)}, {"d": {"b": "", "a": ""}})
    found = run("d")
    assert _short(found) == [
        *("directory visible", "directory merged", "directory < 1 opaque directory"),
    ]
    assert [held.opaque for held in found] == [False, True, False]
    assert _short(run("d/a")) == ["-", "file visible", "file < 1 opaque directory"]
    assert _short(run("d/b")) == ["-", "-", "file < 1 opaque directory"]


def test_a_file_between_directories(ask: Callable[..., Ask]) -> None:
    run = ask({"d": {}}, {"d": "file"}, {"d": {"x": ""}})
    assert _short(run("d")) == ["directory visible", "file < 0 directory", "directory < 1 file"]
    assert _short(run("d/x")) == ["-", "-", "file < 1 file"]


def test_links_are_not_followed(ask: Callable[..., Ask]) -> None:
    run = ask({"to": Symlink(target="d")}, {"d": {"x": ""}})
    assert _short(run("to")) == ["symlink visible", "-"]
    assert _short(run("to/x")) == ["-", "-"]


def test_what_is_nowhere(ask: Callable[..., Ask]) -> None:
    run = ask({"f": ""}, {})
    assert _short(run("none/at/all")) == ["-", "-"]
    assert _short(run("f/below")) == ["-", "-"]
    with pytest.raises(OSError, match="Invalid argument"):
        run("../f")


def test_a_moved_directory_and_a_file_without_data(ask: Callable[..., Ask]) -> None:
    mark = {"user.overlay.redirect": b"/old"}
    hollow = File(size=4, xattrs={"user.overlay.metacopy": b""})
    run = ask(
        {"new": Dir({"f": hollow}, xattrs=mark), "old": Whiteout()},
        {"new": {"own": ""}, "old": {"f": "data"}},
    )
    found = run("new")
    assert _short(found) == ["directory visible", "directory merged"]
    assert [held.path for held in found] == [b"/new", b"/old"]
    assert found[0].redirect == b"/old"
    found = run("new/f")
    assert _short(found) == ["file visible", "file data"]
    assert found[0].metacopy
    assert [held.path for held in found] == [b"/new/f", b"/old/f"]
    assert _short(run("new/own")) == ["-", "-"]
    assert _short(run("old")) == ["whiteout", "directory < 0 whiteout"]

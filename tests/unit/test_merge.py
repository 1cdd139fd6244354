"""Listings: which names, of what kind, once each."""

from __future__ import annotations

import os
import stat

import pytest

from tests.support.tree import Dir, Fifo, Symlink, Tree, Whiteout
from tests.support.unions import Union, Unions, trusted_only
from unionfs2.names import LowerNames


def listed(u: Union, path: str) -> dict[bytes, int]:
    entries = u.fs.listing(u.sh.dir(path))
    assert len(entries) == len({entry.name for entry in entries})
    return {entry.name: entry.kind for entry in entries}


def test_the_topmost_kind_counts_and_whiteouts_hide(unions: Unions) -> None:
    u = unions(
        {"d": {"a": "", "b": {}, "c": Fifo(), "l": Symlink("x"), b"\xff\n": ""}},
        {"d": {"a": {}, "gone": "", "low": ""}},
        upper={"d": {"b": "", "gone": Whiteout()}},
    )
    assert listed(u, "d") == {
        b"a": stat.S_IFREG,
        b"b": stat.S_IFREG,
        b"c": stat.S_IFIFO,
        b"l": stat.S_IFLNK,
        b"\xff\n": stat.S_IFREG,
        b"low": stat.S_IFREG,
    }


@pytest.mark.parametrize("where", ["upper", "lower", "opaque"])
def test_a_directory_of_one_layer_is_passed_through(unions: Unions, where: str) -> None:
    """Stray whiteouts and all: listed as devices, not to be looked up, not to be removed over."""
    stray: Tree = {"stray": Whiteout(), "f": ""}
    layers: dict[str, tuple[Tree, Tree]] = {
        "upper": ({}, {"d": stray}),
        "lower": ({"d": stray}, {}),
        "opaque": ({"d": {"x": ""}}, {"d": Dir(stray, opaque=True)}),
    }
    lower, upper = layers[where]
    u = unions(lower, upper=upper)
    assert listed(u, "d") == {b"stray": stat.S_IFCHR, b"f": stat.S_IFREG}
    assert not u.sh.exists("d/stray")
    node = u.sh.dir("d")
    assert u.fs.listed_although_hidden(node, b"stray")
    assert not u.fs.listed_although_hidden(node, b"absent")


def test_a_copied_up_directory_hides_its_strays(unions: Unions) -> None:
    u = unions({"d": {"stray": Whiteout()}})
    u.sh.chmod("d", 0o700)
    assert listed(u, "d") == {}
    assert not u.fs.listed_although_hidden(u.sh.dir("d"), b"stray")


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("at_root", [True, False])
def test_attribute_whiteouts_are_filtered_where_the_directory_says_so(
    unions: Unions, marked: bool, at_root: bool
) -> None:
    tree: Tree = {"gone": "", "full": "x", "f": ""}
    low: Tree = {"gone": "low"}
    u = unions(tree, low) if at_root else unions({"d": tree}, {"d": low})
    path = "" if at_root else "d"
    for name in ("gone", "full"):
        os.setxattr(u.lowers[0] / path / name, u.key("whiteout"), b"")
    if marked:
        os.setxattr(u.lowers[0] / path, u.key("opaque"), b"x")
    assert (b"gone" in listed(u, path)) is not marked
    assert {b"full", b"f"} <= listed(u, path).keys()
    assert not u.sh.exists(f"{path}/gone")
    assert u.fs.listed_although_hidden(u.sh.dir(path), b"gone") is not marked


@trusted_only
def test_an_impure_directory_lists_what_can_be_looked_up(unions: Unions) -> None:
    u = unions({"d": {"f": ""}}, upper={"d": {"gone": ""}})
    os.setxattr(u.upper / "d/gone", u.key("whiteout"), b"")
    node = u.sh.dir("d")
    assert u.fs.listed_although_hidden(node, b"gone")
    u.sh.chmod("d/f", 0o600)
    assert not u.fs.listed_although_hidden(node, b"gone")
    assert u.fs.needs_lookup(node, b"f")
    assert not u.fs.needs_lookup(node, b"absent")


def test_numbers_are_those_of_the_real_objects(unions: Unions) -> None:
    u = unions({"d": {"a": "", "b": ""}}, upper={"d": {"b": ""}})
    expected = {
        b"a": (u.lowers[0] / "d/a").stat().st_ino,
        b"b": (u.upper / "d/b").stat().st_ino,
    }
    assert {e.name: e.ino for e in u.fs.listing(u.sh.dir("d"))} == expected


def test_a_handle_of_a_listing(unions: Unions) -> None:
    u = unions({"d": {"a": ""}})
    one, other = u.fs.opendir(u.sh.dir("d")), u.fs.opendir(u.sh.dir("d"))
    assert one.id != other.id
    assert u.fs.dir_handle(one.id) is one
    u.fs.releasedir(one)
    with pytest.raises(OSError, match=r"\[Errno 9\]"):
        u.fs.dir_handle(one.id)
    assert u.fs.dir_handle(other.id) is other


def test_a_thousand_names_in_ten_layers(unions: Unions) -> None:
    u = unions(*({"d": {f"n{n}": "" for n in range(layer, 1000, 7)}} for layer in range(10)))
    assert len(listed(u, "d")) == 1000
    assert u.sh.dir("d").index is not None
    assert all(u.sh.exists(f"d/n{n}") for n in range(0, 1000, 13))
    u.sh.unlink("d/n13")
    u.sh.create("d/new")
    assert not u.sh.exists("d/n13")
    assert u.sh.exists("d/new")
    assert len(listed(u, "d")) == 1000


def test_names_know_their_directories() -> None:
    names = LowerNames()
    names.add([(1, [b"a"]), (2, [b"a", b"b"]), (8, [b"a", b"b"])])
    assert [names.holders(name, (), 0) for name in (b"a", b"b", b"c")] == [11, 10, 0]
    assert names.filled == 11

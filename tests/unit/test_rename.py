"""rename(2): every row of the table of what the upper holds afterwards."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable

import pytest

from tests.support.shell import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from tests.support.tree import Dir, HardLink, Tree, Whiteout
from tests.support.unions import Union, Unions

LOWER: Tree = {
    "f": "lower",
    "over": "under",
    "gone": "hidden",
    "d": {"x": "in d", "gone": ""},
    "empty": {},
    "m": {"a": "", "b": ""},
    "op": {"hidden": ""},
    "h1": "linked",
    "h2": HardLink("h1"),
}
UPPER: Tree = {
    "over": "over",
    "gone": Whiteout(),
    "u": "upper",
    "d": {"gone": Whiteout()},
    "ud": {"z": ""},
    "ue": {},
    "m": {"a": Whiteout(), "b": Whiteout()},
    "op": Dir({}, opaque=True),
    "p": {"d": {"g": ""}},
}


@pytest.fixture
def u(unions: Unions) -> Union:
    return unions(LOWER, upper=UPPER)


def kind_of(u: Union, path: str) -> str | None:
    entry = u.on_disk(path)
    return entry.kind if entry else None


def errno_of(act: Callable[[], object]) -> int:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        act()
    return caught.value.errno or 0


@pytest.mark.parametrize("new", ["new", "gone", "u", "d/new", "d/gone", "p/new", "empty/new"])
@pytest.mark.parametrize(
    ("old", "data", "left"),
    [
        ("f", b"lower", "whiteout"),
        ("over", b"over", "whiteout"),
        ("d/x", b"in d", "whiteout"),
        ("h1", b"linked", "whiteout"),
        ("p/f", b"pure", None),
    ],
)
def test_a_file(u: Union, old: str, new: str, data: bytes, left: str | None) -> None:
    if old == "p/f":
        u.sh.create(old, data)
    u.sh.rename(old, new)
    assert u.sh.read(new) == data
    assert not u.sh.exists(old)
    assert kind_of(u, old) == left
    assert kind_of(u, new) == "file"
    assert u.in_work() == []
    u.reopen()
    assert u.sh.read(new) == data
    assert not u.sh.exists(old)


@pytest.mark.parametrize(
    ("new", "opaque"),
    [
        ("new", True),
        ("gone", True),
        ("empty", True),
        ("m", True),
        ("op", True),
        ("ue", True),
        ("d/new", True),
        ("d/gone", True),
        ("p/new", False),
    ],
)
def test_a_pure_upper_directory(u: Union, new: str, opaque: bool) -> None:
    node = u.sh.node("ud")
    u.sh.rename("ud", new)
    assert u.sh.node(new) is node
    assert u.sh.names(new) == [b"z"]
    assert kind_of(u, "ud") is None
    assert u.marks(new) == ({"opaque": b"y"} if opaque else {})
    assert u.in_work() == []
    u.sh.create(f"{new}/more")
    u.reopen()
    assert u.sh.names(new) == [b"more", b"z"]


@pytest.mark.parametrize("new", ["new", "gone", "empty", "u2"])
@pytest.mark.parametrize("old", ["d", "m", "empty"])
@pytest.mark.parametrize("flags", [0, RENAME_EXCHANGE])
def test_a_directory_with_anything_below_does_not_move(
    u: Union, old: str, new: str, flags: int
) -> None:
    if old == new or (flags and new in ("new", "gone", "u2")):
        new = "ue"
    assert errno_of(lambda: u.sh.rename(old, new, flags)) == errno.EXDEV
    assert u.sh.exists(old)


@pytest.mark.parametrize("name", ["f", "u", "ud", "d", "empty"])
def test_onto_itself_nothing_happens(u: Union, name: str) -> None:
    before = sorted(os.listdir(u.upper))
    node = u.sh.hold(name)
    u.sh.rename(name, name)
    u.sh.rename(name, name, RENAME_EXCHANGE)
    assert errno_of(lambda: u.sh.rename(name, name, RENAME_NOREPLACE)) == errno.EEXIST
    assert u.sh.node(name) is node
    assert sorted(os.listdir(u.upper)) == before


def test_two_names_of_one_file(u: Union) -> None:
    u.sh.link("u", "v")
    u.sh.rename("u", "v")
    assert u.sh.exists("u")
    u.sh.rename("h1", "h2")  # lower ones part at copy-up, so this replaces one by the other
    assert not u.sh.exists("h1")
    assert u.sh.nlink("h2") == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("f", "u"), ("f", "over"), ("f", "ud"), ("ud", "ue"), ("d/x", "p/d"), ("u", "d/x")],
)
def test_exchange(u: Union, one: str, other: str) -> None:
    nodes = u.sh.node(one), u.sh.node(other)
    u.sh.rename(one, other, RENAME_EXCHANGE)
    assert (u.sh.node(other), u.sh.node(one)) == nodes
    for path, node in ((one, nodes[1]), (other, nodes[0])):
        merged_parent = not path.startswith("p/")
        assert ("opaque" in u.marks(path)) == (node.is_dir and merged_parent), path
        assert kind_of(u, path) == ("dir" if node.is_dir else "file")
    kinds = [node.kind for node in nodes]
    u.reopen()
    assert [u.sh.node(other).kind, u.sh.node(one).kind] == kinds


def test_an_impure_mark_goes_before_a_copied_object(u: Union) -> None:
    u.sh.rename("u", "p/u")
    assert "impure" not in u.marks("p")
    u.sh.rename("f", "p/f")
    assert u.marks("p")["impure"] == b"y"
    u.sh.rename("p/f", "ue", RENAME_EXCHANGE)
    assert "impure" in u.marks(".")


REFUSED = [
    ("missing", "new", 0, errno.ENOENT),
    ("gone", "new", 0, errno.ENOENT),
    ("f", "u", RENAME_NOREPLACE, errno.EEXIST),
    ("f", "new", RENAME_EXCHANGE, errno.ENOENT),
    ("f", "new", RENAME_WHITEOUT, errno.EINVAL),
    ("f", "new", 8, errno.EINVAL),
    ("f", "ud", 0, errno.EISDIR),
    ("ud", "f", 0, errno.ENOTDIR),
    ("ud", "p", 0, errno.ENOTEMPTY),
    ("ud", "d", 0, errno.ENOTEMPTY),
    ("p", "p/d/new", 0, errno.EINVAL),
    ("p/d", "p", 0, errno.ENOTEMPTY),
    ("p/d/g", "p", 0, errno.ENOTEMPTY),
    ("d/x", "d", 0, errno.ENOTEMPTY),
    ("p", "p/d", RENAME_EXCHANGE, errno.EINVAL),
    ("p/d", "p", RENAME_EXCHANGE, errno.EINVAL),
    ("f", "n" * 256, 0, errno.ENAMETOOLONG),
]


@pytest.mark.parametrize(("old", "new", "flags", "number"), REFUSED)
def test_refused_and_nothing_changed(u: Union, old: str, new: str, flags: int, number: int) -> None:
    u.sh.names("d")
    before = sorted(os.walk(u.upper))
    assert errno_of(lambda: u.sh.rename(old, new, flags)) == number
    assert sorted(os.walk(u.upper)) == before


def test_check_refuses_the_same(u: Union) -> None:
    for old, new, flags, number in REFUSED:
        if number == errno.ENOTEMPTY and not old.startswith(new):
            continue  # found out by the operation itself
        (parent, name), (to, to_name) = u.sh.split(old), u.sh.split(new)
        check = functools.partial(u.fs.check_rename, parent, name, to, to_name, flags)
        assert errno_of(check) == number


def test_noreplace_onto_a_whiteout(u: Union) -> None:
    u.sh.rename("f", "gone", RENAME_NOREPLACE)
    assert u.sh.read("gone") == b"lower"


def test_content_of_a_moved_directory_stays_reachable(u: Union) -> None:
    u.sh.create("p/d/deep", b"x")
    handle = u.sh.open("p/d/deep", os.O_RDWR)
    listing = u.sh.dir("p/d")
    u.sh.rename("p", "q")
    u.fs.stack.cache.close_all()
    assert u.sh.read("q/d/deep") == b"x"
    u.sh.chmod("q/d/deep", 0o600)
    u.sh.create("q/d/new")
    assert sorted(e.name for e in u.fs.listing(listing)) == [b"deep", b"g", b"new"]
    u.fs.release(handle)

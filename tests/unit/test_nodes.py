"""The node table: counts, places, aliases, and the end of a node."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from tests.support.tree import HardLink
from tests.support.unions import Unions, open_fds
from unionfs2.nodes import DEAD, ROOT_ID, Dir, Node, NodeTable
from unionfs2.union import UnionFS


def file(table: NodeTable, parent: Dir, name: bytes) -> Node:
    node = Node(stat.S_IFREG, 7, None)
    table.add(node, parent, name)
    return node


def directory(table: NodeTable, parent: Dir | None, name: bytes) -> Dir:
    node = Dir(7, None, (), whiteouts=False)
    table.add(node, parent, name)
    return node


@pytest.fixture
def table() -> NodeTable:
    return NodeTable()


@pytest.fixture
def root(table: NodeTable) -> Dir:
    root = directory(table, None, b"")
    assert root.id == ROOT_ID
    return root


def check_invariants(fs: UnionFS) -> None:
    """What the module says of itself, for every node of *fs*."""
    nodes = fs.stack.nodes
    for number, node in nodes.by_id.items():
        assert node.id == number
        if node.parent is not None:
            assert node.parent.children.get(node.name) is node
            assert nodes.by_id.get(node.parent.id) is node.parent
            assert node.orphan < 0
        elif number != ROOT_ID:
            assert node.orphan >= 0 or node.low is not None, node.name
        for parent, name in node.aliases or ():
            assert parent.children.get(name) is node
        if isinstance(node, Dir):
            for name, child in node.children.items():
                assert nodes.by_id.get(child.id) is child, name
            if node.upper is not None and not node.flags & DEAD:
                there = os.listdir(os.fsencode(f"/proc/self/fd/{node.upper.at()}"))
                assert not [name for name in there if node.upper_names.lack(name)]
    for key, node in nodes.by_inode.items():
        assert node.link_key == key
        assert nodes.by_id.get(node.id) is node


def test_a_node_ends_with_its_last_lookup(table: NodeTable, root: Dir) -> None:
    node = file(table, root, b"f")
    node.lookups = 3
    table.forget(node.id, 2)
    assert root.children == {b"f": node}
    table.forget(node.id, 1)
    assert root.children == {}
    assert list(table.by_id) == [ROOT_ID]
    assert node.id == 0


def test_more_forgotten_than_counted_is_the_end_too(table: NodeTable, root: Dir) -> None:
    node = file(table, root, b"f")
    node.lookups = 1
    table.forget(node.id, 5)
    table.forget(node.id, 1)
    table.forget(999, 1)
    assert list(table.by_id) == [ROOT_ID]


def test_a_chain_ends_from_below(table: NodeTable, root: Dir) -> None:
    here = root
    for name in (b"a", b"b", b"c"):
        here = directory(table, here, name)
    leaf = file(table, here, b"f")
    leaf.lookups = 1
    a = root.children[b"a"]
    a.lookups = 1
    table.forget(a.id, 1)
    assert len(table.by_id) == 5
    table.forget(leaf.id, 1)
    assert list(table.by_id) == [ROOT_ID]
    assert root.children == {}


def test_the_root_never_ends(table: NodeTable, root: Dir) -> None:
    root.lookups = 1
    table.forget(ROOT_ID, 1)
    assert table.by_id == {ROOT_ID: root}


def test_numbers_are_not_used_again(table: NodeTable, root: Dir) -> None:
    first = file(table, root, b"f").id
    table.reap(table.by_id[first])
    assert file(table, root, b"f").id > first


def test_a_second_place_is_an_alias(table: NodeTable, root: Dir) -> None:
    other = directory(table, root, b"d")
    node = file(table, root, b"a")
    table.attach(node, other, b"b")
    table.attach(node, other, b"b")
    assert node.aliases == {(other, b"b"): None}
    assert table.detach(node, root, b"a")
    assert (node.parent, node.name, node.aliases) == (other, b"b", {})
    assert not table.detach(node, other, b"b")
    assert node.parent is None


def test_an_alias_goes_and_the_place_stays(table: NodeTable, root: Dir) -> None:
    node = file(table, root, b"a")
    table.attach(node, root, b"b")
    assert table.detach(node, root, b"b")
    assert (node.parent, node.name) == (root, b"a")
    assert root.children == {b"a": node}


def test_the_end_of_a_node_ends_its_aliases_and_their_directories(
    table: NodeTable, root: Dir
) -> None:
    first, second = directory(table, root, b"1"), directory(table, root, b"2")
    node = file(table, first, b"a")
    table.attach(node, second, b"b")
    node.lookups = second.lookups = 1
    table.forget(second.id, 1)
    assert len(table.by_id) == 4
    table.forget(node.id, 1)
    assert list(table.by_id) == [ROOT_ID]


@pytest.mark.parametrize("which", ["place", "alias"])
def test_a_moved_place(table: NodeTable, root: Dir, which: str) -> None:
    node = file(table, root, b"a")
    table.attach(node, root, b"b")
    old = b"a" if which == "place" else b"b"
    del root.children[old]
    table.place_moved(node, (root, old), (root, b"c"))
    places = {(node.parent, node.name), *(node.aliases or ())}
    assert places == {(root, b"c"), (root, b"b" if which == "place" else b"a")}
    assert root.children[b"c"] is node


def test_the_number_of_a_file_leads_to_its_latest_node(table: NodeTable, root: Dir) -> None:
    one, other = file(table, root, b"a"), file(table, root, b"b")
    table.link_key(one, (1, 2))
    table.link_key(one, (1, 3))
    assert table.by_inode == {(1, 3): one}
    table.link_key(other, (1, 3))
    table.unlink_key(one)
    assert table.by_inode == {(1, 3): other}
    table.unlink_key(other)
    table.unlink_key(other)
    assert table.by_inode == {}


# --- in a union ---------------------------------------------------------------------------------


def test_invariants_hold_through_a_life(unions: Unions) -> None:
    u = unions({"d": {"f": "", "g": ""}, "h": ""}, upper={"u": "", "v": HardLink("u"), "e": {}})
    sh = u.sh
    for path in ("d", "d/f", "d/g", "h", "u", "v", "e"):
        sh.hold(path)
    acts: tuple[Callable[[], object], ...] = (
        lambda: sh.link("d/f", "e/f"),
        lambda: sh.rename("d/f", "e/g"),
        lambda: sh.rename("u", "h"),
        lambda: sh.unlink("v"),
        lambda: sh.rename("e", "e2"),
        lambda: sh.unlink("e2/f"),
        lambda: sh.unlink("e2/g"),
        lambda: sh.rmdir("e2"),
        lambda: sh.unlink("d/g"),
        lambda: sh.rmdir("d"),
        lambda: sh.mkdir("d"),
        lambda: sh.create("d/g"),
    )
    for act in acts:
        act()
        check_invariants(u.fs)


def test_everything_forgotten_leaves_the_root(unions: Unions) -> None:
    u = unions({"d": {"e": {"f": ""}}}, upper={"a": "", "d": {"b": HardLink("a")}})
    sh = u.sh
    fds = open_fds()
    nodes = [sh.hold(path) for path in ("d", "d/e", "d/e/f", "a", "d/b")]
    handle = sh.open("d/e/f")
    listing = u.fs.opendir(sh.dir("d/e"))
    sh.unlink("d/e/f")
    sh.unlink("a")
    for node in nodes:
        u.fs.forget(node.id, 1)
        check_invariants(u.fs)
    u.fs.release(handle)
    u.fs.releasedir(listing)
    assert list(u.fs.stack.nodes.by_id) == [ROOT_ID]
    assert u.fs.root.children == {}
    assert u.fs.stack.nodes.by_inode == {}
    assert len(u.fs.stack.cache) == 0
    assert open_fds() == fds


def test_a_forgotten_number_is_stale(unions: Unions) -> None:
    u = unions({"f": ""})
    node = u.sh.hold("f")
    number = node.id
    u.fs.forget(number, 1)
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        u.fs.node(number)
    assert caught.value.errno == errno.ESTALE


def test_a_removed_directory_takes_nothing_and_shows_nothing(unions: Unions) -> None:
    """Also when another directory has its name by now."""
    u = unions({"low": {}}, upper={"up": {}})
    for name in ("low", "up"):
        node = u.sh.hold(name)
        assert isinstance(node, Dir)
        u.sh.rmdir(name)
        u.sh.mkdir(name)
        u.sh.create(f"{name}/f")
        assert u.fs.getattr(node).st_nlink in (0, 2)
        for act in (
            lambda node=node: u.fs.mkdir(node, b"x", 0o700, u.sh.caller),
            lambda node=node: u.fs.link(u.sh.node(f"{name}/f"), node, b"x"),  # noqa: B023
            lambda node=node: u.fs.rename(u.fs.root, name.encode(), node, b"x"),  # noqa: B023
            lambda node=node: u.fs.unlink(node, b"f"),
        ):
            with pytest.raises(FileNotFoundError):
                act()
        assert u.fs.lookup(node, b"f") is None
        assert u.fs.listing(node) == []
        assert os.listdir(u.upper / name) == ["f"]
        check_invariants(u.fs)

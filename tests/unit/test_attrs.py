"""Attributes and extended attributes of the view: hidden, escaped, refused, and changed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from tests.support.shell import Shell, me
from tests.support.tree import Dir, File, Symlink, Tree
from tests.support.unions import Unions, trusted_only
from unionfs2.model import Caller, SetAttr

ACL = "system.posix_acl_access"
# user:: rwx, user:1 r--, group:: r-x, mask:: r-x, other:: r-x
ACL_VALUE = bytes.fromhex(
    "0200000001000700ffffffff020004000100000004000500ffffffff10000500ffffffff20000500ffffffff"
)


def errno_of(act: Callable[[], object]) -> int:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        act()
    return caught.value.errno or 0


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("path", ["f", "d"])
def test_private_names_are_neither_listed_nor_read(unions: Unions, layer: int, path: str) -> None:
    tree: Tree = {"f": File("x", xattrs={"user.a": b"1"}), "d": Dir({}, xattrs={"user.a": b"1"})}
    u = unions(tree if layer else {}, upper={} if layer else tree)
    prefix = u.prefix.encode()
    for suffix in ("protattrx", "origin", "overlay.opaque", "overlay."):
        os.setxattr(u.layer(layer) / path, u.key(suffix), suffix.encode())
    view = {b"user.a": b"1", prefix + b"opaque": b"overlay.opaque"}
    assert u.sh.xattrs(path) == view
    for hidden in (b"origin", b"protattrx", b"impure"):
        assert errno_of(lambda h=hidden: u.sh.getxattr(path, prefix + h)) == errno.ENODATA  # type: ignore[misc]


def test_escaped_names_go_one_level_down_and_back(unions: Unions) -> None:
    u = unions({"f": ""})
    name = u.prefix.encode() + b"opaque"
    nested = u.prefix.encode() + b"overlay.opaque"
    u.sh.setxattr("f", name, b"1")
    u.sh.setxattr("f", nested, b"2")
    assert u.marks("f")["overlay.opaque"] == b"1"
    assert u.marks("f")["overlay.overlay.opaque"] == b"2"
    assert u.sh.xattrs("f") == {name: b"1", nested: b"2"}
    u.sh.removexattr("f", name)
    assert u.sh.xattrs("f") == {nested: b"2"}


def test_the_bare_prefix_is_refused(unions: Unions) -> None:
    u = unions({"f": ""})
    bare = u.prefix.encode()
    for act in (
        lambda: u.sh.getxattr("f", bare),
        lambda: u.sh.setxattr("f", bare, b""),
        lambda: u.sh.removexattr("f", bare),
        lambda: u.fs.check_setxattr(u.sh.node("f"), bare),
    ):
        assert errno_of(act) == errno.EINVAL
    assert os.listdir(u.upper) == []


@pytest.mark.parametrize("userxattr", [True])
def test_names_beside_the_prefix_are_ordinary(unions: Unions) -> None:
    u = unions({"f": ""})
    for key in (b"user.overlay", b"user.overlayx"):
        u.sh.setxattr("f", key, b"1")
        assert os.getxattr(u.upper / "f", key) == b"1"
    assert u.sh.xattrs("f") == {b"user.overlay": b"1", b"user.overlayx": b"1"}


def test_flags_of_setxattr(unions: Unions) -> None:
    u = unions({"f": File("", xattrs={"user.there": b"1"})})
    create, replace = os.XATTR_CREATE, os.XATTR_REPLACE
    assert errno_of(lambda: u.sh.setxattr("f", b"user.there", b"2", create)) == errno.EEXIST
    assert errno_of(lambda: u.sh.setxattr("f", b"user.new", b"2", replace)) == errno.ENODATA
    u.sh.setxattr("f", b"user.there", b"2", replace)
    u.sh.setxattr("f", b"user.new", b"3", create)
    assert u.sh.xattrs("f") == {b"user.there": b"2", b"user.new": b"3"}


def test_what_was_seen_without_attributes_can_get_some(unions: Unions) -> None:
    """A node remembers that its object had none; every way to one has to clear that."""
    u = unions({"low": "", "acl": ""}, upper={"up": ""})
    for name in ("low", "up", "acl"):
        u.sh.hold(name)
        assert u.sh.xattrs(name) == {}
        assert errno_of(lambda n=name: u.sh.getxattr(n, b"security.capability")) == errno.ENODATA  # type: ignore[misc]
    for name in ("low", "up"):
        u.sh.setxattr(name, b"user.a", b"1")
        assert u.sh.xattrs(name) == {b"user.a": b"1"}


@pytest.mark.needs("acl")
@pytest.mark.parametrize("layer", [0, 1])
def test_an_access_list_arrives_and_changes_the_mode(unions: Unions, layer: int) -> None:
    tree = {"f": File("", mode=0o600)}
    u = unions(tree if layer else {}, upper={} if layer else tree)
    u.sh.hold("f")
    assert u.sh.xattrs("f") == {}
    u.sh.setxattr("f", ACL.encode(), ACL_VALUE)
    assert u.sh.getxattr("f", ACL.encode()) == ACL_VALUE
    assert stat.S_IMODE(u.sh.stat("f").st_mode) == 0o755
    u.sh.removexattr("f", ACL.encode())
    assert ACL.encode() not in u.sh.xattrs("f")


@pytest.mark.needs("acl", "root")
@pytest.mark.parametrize(("gid", "kept"), [(77, False), (4321, True)])
def test_an_access_list_by_a_stranger_to_the_group_clears_sgid(
    unions: Unions, gid: int, kept: bool
) -> None:
    u = unions({"f": File("", mode=0o2755, uid=4321, gid=gid)})
    Shell(u.fs, Caller(4321, 4321)).setxattr("f", ACL.encode(), ACL_VALUE)
    assert bool(u.sh.stat("f").st_mode & stat.S_ISGID) == kept


@trusted_only
def test_trusted_names_are_for_the_privileged(unions: Unions) -> None:
    u = unions({"f": File("", xattrs={"trusted.x": b"1", "user.x": b"2"})})
    node = u.sh.node("f")
    assert u.fs.listxattr(node, me()) == [b"trusted.x", b"user.x"]
    assert u.fs.listxattr(node, Caller(4321, 4321)) == [b"user.x"]


# --- setattr ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("path", ["f", "d", "l"])
def test_each_attribute_alone(unions: Unions, layer: int, path: str) -> None:
    tree: Tree = {"f": "data", "d": {}, "l": Symlink("x")}
    u = unions(tree if layer else {}, upper={} if layer else tree)
    mine, group = os.geteuid(), os.getegid()
    changes = [SetAttr(mtime_ns=11), SetAttr(atime_ns=12), SetAttr(uid=mine), SetAttr(gid=group)]
    if path != "l":
        changes.append(SetAttr(mode=0o1711))
    if path == "f":
        changes.append(SetAttr(size=2))
    for new in changes:
        before = u.sh.stat(path)
        after = u.fs.setattr(u.sh.node(path), new)
        fields = {
            "mode": (stat.S_IMODE(before.st_mode), stat.S_IMODE(after.st_mode)),
            "uid": (before.st_uid, after.st_uid),
            "gid": (before.st_gid, after.st_gid),
            "size": (before.st_size, after.st_size),
            "atime_ns": (before.st_atime_ns, after.st_atime_ns),
            "mtime_ns": (before.st_mtime_ns, after.st_mtime_ns),
        }
        for name, (old, now) in fields.items():
            asked = getattr(new, name)
            if name == "mtime_ns" and new.size is not None:
                assert now > old
            else:
                assert now == (old if asked is None else asked), (new, name)
    assert (u.upper / path).lstat().st_mode == u.sh.stat(path).st_mode


@pytest.mark.needs("root")
def test_owners(unions: Unions) -> None:
    u = unions({"f": File("", mode=0o6755), "l": Symlink("f"), "d": {}})
    for path in ("f", "l", "d"):
        u.sh.setattr(path, SetAttr(uid=1, gid=2))
        info = (u.upper / path).lstat()
        assert (info.st_uid, info.st_gid) == (1, 2)
    assert stat.S_IMODE(u.sh.stat("f").st_mode) == 0o755


def test_a_handle_may_cut_what_its_owner_may_not_open(unions: Unions) -> None:
    u = unions({}, upper={"f": "0123456789"})
    handle = u.sh.open("f", os.O_RDWR)
    u.sh.chmod("f", 0)
    node = u.sh.node("f")
    u.fs.setattr(node, SetAttr(size=5), handle)
    assert u.fs.read(handle, 0, 99) == b"01234"
    u.fs.release(handle)


def test_a_reader_cuts_nothing_by_its_own_handle(unions: Unions) -> None:
    u = unions({"f": "0123456789"})
    reader = u.sh.open("f")
    node = u.sh.node("f")
    u.fs.setattr(node, SetAttr(size=3), reader)
    assert u.fs.read(reader, 0, 99) == b"012"
    u.fs.setattr(node, SetAttr(size=5))
    assert u.fs.read(reader, 0, 99) == b"012\0\0"
    u.fs.release(reader)


def test_nothing_to_change_changes_nothing_but_the_layer(unions: Unions) -> None:
    u = unions({"f": "data"})
    before = u.sh.stat("f")
    u.fs.setattr(u.sh.node("f"), SetAttr())
    after = u.sh.stat("f")
    assert (after.st_mtime_ns, after.st_mode) == (before.st_mtime_ns, before.st_mode)

"""Making and removing names: what lands in the upper, and whose it is."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from tests.support.shell import Shell, me
from tests.support.tree import Dir, Symlink, Tree, Whiteout
from tests.support.unions import Union, Unions, trusted_only
from unionfs2.model import Caller

MAKERS: dict[str, Callable[[Shell, str], object]] = {
    "file": lambda sh, name: sh.create(name, mode=0o6764),
    "node": lambda sh, name: sh.mknod(name, 0o764),
    "fifo": lambda sh, name: sh.mknod(name, stat.S_IFIFO | 0o764),
    "socket": lambda sh, name: sh.mknod(name, stat.S_IFSOCK | 0o764),
    "symlink": lambda sh, name: sh.symlink(name, b"to"),
    "dir": lambda sh, name: sh.mkdir(name, 0o1764),
}
FREE_AND_HIDDEN = pytest.mark.parametrize("name", ["new", "gone"])
# user:: rwx, user:1 rwx, group:: rwx, mask:: rwx, other:: rwx
DEFAULT_ACL = bytes.fromhex(
    "0200000001000700ffffffff020007000100000004000700ffffffff10000700ffffffff20000700ffffffff"
)


def errno_of(act: Callable[[], object]) -> int:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        act()
    return caught.value.errno or 0


@FREE_AND_HIDDEN
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_modes_follow_the_umask_of_the_caller(
    unions: Unions, kind: str, name: str, umask: int
) -> None:
    u = unions({"gone": "low"}, upper={"gone": Whiteout()})
    MAKERS[kind](Shell(u.fs, me(umask)), name)
    asked = {"file": 0o6764, "dir": 0o1764}.get(kind, 0o764)
    expected = 0o777 if kind == "symlink" else asked & ~umask
    entry = u.on_disk(name)
    assert entry is not None
    assert entry.mode == expected
    assert entry.kind == ("file" if kind == "node" else kind)
    assert os.umask(0) == 0, "the server's own umask stays 0"
    assert set(u.marks(name)) == ({"opaque"} if (kind, name) == ("dir", "gone") else set())
    assert u.in_work() == []


@FREE_AND_HIDDEN
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.needs("root")
def test_a_new_object_belongs_to_the_caller(unions: Unions, kind: str, name: str) -> None:
    u = unions({"gone": "low"}, upper={"gone": Whiteout()})
    before = (os.geteuid(), os.getegid())
    MAKERS[kind](Shell(u.fs, Caller(1234, 5678, 0, 0o022)), name)
    entry = u.on_disk(name)
    assert entry is not None
    assert (entry.uid, entry.gid) == (1234, 5678)
    assert (os.geteuid(), os.getegid()) == before
    (u.upper / "mine").touch()
    assert (u.upper / "mine").stat().st_uid == before[0], "the file system ids are back, too"


@FREE_AND_HIDDEN
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.needs("root")
def test_a_setgid_directory_gives_its_group(unions: Unions, kind: str, name: str) -> None:
    u = unions({"d": {"gone": "low"}}, upper={"d": Dir({"gone": Whiteout()}, mode=0o2777, gid=99)})
    MAKERS[kind](Shell(u.fs, Caller(1234, 5678, 0, 0)), f"d/{name}")
    entry = u.on_disk(f"d/{name}")
    assert entry is not None
    assert (entry.uid, entry.gid) == (1234, 99)
    assert bool(entry.mode & stat.S_ISGID) == (kind in ("dir", "file"))


@FREE_AND_HIDDEN
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.needs("acl")
def test_a_default_acl_replaces_the_umask(unions: Unions, kind: str, name: str) -> None:
    """Made in place and made through the work directory: the same object."""
    tree = Dir({"gone": Whiteout()}, xattrs={"system.posix_acl_default": DEFAULT_ACL})
    u = unions({"d": {"gone": "low"}}, upper={"d": tree})
    MAKERS[kind](Shell(u.fs, me(0o077)), f"d/{name}")
    entry = u.on_disk(f"d/{name}")
    assert entry is not None
    acls = {key: value for key, value in entry.xattrs if key.startswith("system.")}
    if kind == "symlink":
        assert acls == {}
        return
    assert entry.mode & 0o777 == 0o764
    access = bytes.fromhex(
        "0200000001000700ffffffff020007000100000004000700ffffffff10000600ffffffff20000400ffffffff"
    )
    expected = {"system.posix_acl_access": access}
    if kind == "dir":
        expected["system.posix_acl_default"] = DEFAULT_ACL
    assert acls == expected


def test_what_a_plain_server_may_not_do_for_another(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without privilege it serves its own user; the group is given afterwards if possible."""
    from unionfs2 import syscalls

    def refuse(uid: int, gid: int) -> None:
        raise PermissionError(errno.EPERM, "no")

    u = unions({})
    u.fs.actor.may_switch = False
    monkeypatch.setattr(syscalls, "set_fs_ids", refuse)
    mine, group = os.geteuid(), os.getegid()
    assert errno_of(lambda: Shell(u.fs, Caller(mine + 1, group)).create("f")) == errno.EPERM
    assert not (u.upper / "f").exists()
    Shell(u.fs, Caller(mine, group + 1)).create("g")
    given = (u.upper / "g").stat().st_gid
    assert given == (group + 1 if mine == 0 else group)


# --- refusals -----------------------------------------------------------------------------------


def test_what_cannot_be_made(unions: Unions) -> None:
    u = unions({"f": "", "d": {}, "l": Symlink("f")})
    for name in ("f", "d", "l"):
        for kind, make in MAKERS.items():
            assert errno_of(lambda m=make, n=name: m(u.sh, n)) == errno.EEXIST, kind  # type: ignore[misc]
    assert errno_of(lambda: u.sh.mknod("w", stat.S_IFCHR | 0o600, 0)) == errno.EPERM
    assert errno_of(lambda: u.sh.create("f/x")) == errno.ENOTDIR
    assert errno_of(lambda: u.sh.create("no/x")) == errno.ENOENT
    assert errno_of(lambda: u.sh.create("n" * 256)) == errno.ENAMETOOLONG
    assert errno_of(lambda: u.sh.link("d", "e")) == errno.EPERM
    assert errno_of(lambda: u.sh.link("f", "d")) == errno.EEXIST
    assert errno_of(lambda: u.sh.unlink("d")) == errno.EISDIR
    assert errno_of(lambda: u.sh.unlink("no")) == errno.ENOENT
    assert errno_of(lambda: u.sh.rmdir("f")) == errno.ENOTDIR
    assert errno_of(lambda: u.fs.readlink(u.sh.node("f"))) == errno.EINVAL
    assert errno_of(lambda: u.fs.directory(u.sh.node("f").id)) == errno.ENOTDIR
    assert os.listdir(u.upper) == []


@pytest.mark.parametrize("lower_only", [True, False])
def test_a_mount_that_must_not_change(unions: Unions, lower_only: bool) -> None:
    tree: Tree = {"f": "data", "d": {}, "l": Symlink("f")}
    u = unions(tree, {"d": {}}, lower_only=lower_only, read_only=not lower_only)
    sh = u.sh
    for act in (
        *(lambda make=make: make(sh, "new") for make in MAKERS.values()),
        lambda: sh.unlink("f"),
        lambda: sh.rmdir("d"),
        lambda: sh.link("f", "new"),
        lambda: sh.rename("f", "new"),
        lambda: sh.chmod("f", 0),
        lambda: sh.truncate("f", 0),
        lambda: sh.setxattr("f", b"user.x", b""),
        lambda: sh.removexattr("f", b"user.x"),
        lambda: sh.open("f", os.O_WRONLY),
        lambda: sh.open("f", os.O_RDONLY | os.O_TRUNC),
        lambda: u.fs.begin_copy_up(sh.node("f")),
    ):
        assert errno_of(act) == errno.EROFS
    assert sh.read("f") == b"data"
    assert u.fs.readlink(sh.node("l")) == b"f"
    assert u.fs.statfs().f_namemax == u.fs.name_max == 255


@pytest.mark.needs("mknod")
def test_devices_but_no_whiteouts(unions: Unions) -> None:
    u = unions({})
    u.sh.mknod("null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    u.sh.mknod("block", stat.S_IFBLK | 0o600, 0)
    assert u.sh.stat("null").st_rdev == os.makedev(1, 3)
    entry = u.on_disk("block")
    assert entry is not None
    assert (entry.kind, entry.rdev) == ("block", 0)


# --- removal ------------------------------------------------------------------------------------


def kind_of(u: Union, path: str) -> str | None:
    entry = u.on_disk(path)
    return entry.kind if entry else None


@pytest.mark.parametrize(
    ("name", "left"),
    [("low", "whiteout"), ("both", "whiteout"), ("up", None), ("again", None), ("mid", "whiteout")],
)
def test_unlink_hides_only_what_would_come_back(
    unions: Unions, name: str, left: str | None
) -> None:
    u = unions(
        {"low": "", "both": "", "again": Whiteout()},
        {"again": "below a whiteout", "mid": "two below"},
        upper={"both": "", "up": "", "again": ""},
    )
    u.sh.unlink(name)
    assert kind_of(u, name) == left
    assert not u.sh.exists(name)
    u.sh.create(name, b"new")
    assert kind_of(u, name) == "file"
    assert u.marks(name) == {}
    u.sh.unlink(name)
    assert kind_of(u, name) == left
    assert u.in_work() == [] or left


@pytest.mark.parametrize(
    ("name", "left"),
    [("low", "whiteout"), ("cleared", "whiteout"), ("opaque", "whiteout"), ("up", None)],
)
def test_rmdir(unions: Unions, name: str, left: str | None) -> None:
    u = unions(
        {"low": {}, "cleared": {"a": "", "b": {}}, "opaque": {"a": ""}, "full": {"a": ""}},
        upper={
            "cleared": {"a": Whiteout(), "b": Whiteout()},
            "opaque": Dir({}, opaque=True),
            "up": {},
            "full": {},
        },
    )
    u.sh.rmdir(name)
    assert kind_of(u, name) == left
    u.sh.mkdir(name)
    assert u.sh.names(name) == []
    assert u.marks(name) == ({"opaque": b"y"} if left else {})
    assert errno_of(lambda: u.sh.rmdir("full")) == errno.ENOTEMPTY
    assert kind_of(u, "full") == "dir"


def test_what_is_in_the_upper_counts_whatever_is_below(unions: Unions) -> None:
    u = unions({"d": "a file", "e": Whiteout()}, upper={"d": {"x": ""}, "e": {"x": ""}})
    for name in ("d", "e"):
        assert errno_of(lambda n=name: u.sh.rmdir(n)) == errno.ENOTEMPTY  # type: ignore[misc]
        u.sh.unlink(f"{name}/x")
        u.sh.rmdir(name)
        assert not u.sh.exists(name)
    assert (kind_of(u, "d"), kind_of(u, "e")) == ("whiteout", None)


@trusted_only
def test_an_upper_directory_whose_lower_is_gone_still_hides_whiteouts(unions: Unions) -> None:
    u = unions({"d": {"a": ""}}, upper={})
    u.sh.unlink("d/a")
    u.close()
    (u.lowers[0] / "d/a").unlink()
    (u.lowers[0] / "d").rmdir()
    assert u.sh.names("d") == []
    u.sh.rmdir("d")
    assert kind_of(u, "d") is None


def test_whiteouts_share_one_inode_until_the_limit(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unionfs2 import syscalls

    u = unions({f"f{n}": "" for n in range(9)})
    for n in range(2):
        u.sh.unlink(f"f{n}")
    inos = {(u.upper / f"f{n}").lstat().st_ino for n in range(2)}
    assert len(inos) == 1
    assert len(u.in_work()) == 1
    real = syscalls.link
    refusals: list[int] = []

    def refuse(*args: object) -> None:
        if refusals:
            number = refusals.pop(0)
            raise OSError(number, os.strerror(number))
        real(*args)  # type: ignore[arg-type]

    def inodes_of(first: int, last: int) -> int:
        for n in range(first, last):
            u.sh.unlink(f"f{n}")
        return len({(u.upper / f"f{n}").lstat().st_ino for n in range(first, last)})

    monkeypatch.setattr(syscalls, "link", refuse)
    refusals.append(errno.EMLINK)
    assert inodes_of(2, 5) == 2, "one by itself, then a new base"
    refusals.append(errno.EPERM)
    assert inodes_of(5, 9) == 4, "no sharing any more"
    assert u.sh.names() == []
    assert all(kind_of(u, f"f{n}") == "whiteout" for n in range(9))
    u.close()
    assert len(u.in_work()) <= 2


# --- links --------------------------------------------------------------------------------------


@FREE_AND_HIDDEN
def test_a_link_to_a_lower_file(unions: Unions, name: str) -> None:
    u = unions({"f": "data", "d": {"gone": ""}}, upper={"d": {"gone": Whiteout()}})
    u.sh.link("f", f"d/{name}")
    assert u.sh.node("f") is u.sh.node(f"d/{name}")
    entry = u.on_disk("f")
    assert entry is not None
    assert entry.links == tuple(sorted((b"f", b"d/" + name.encode())))
    assert u.marks("d")["impure"] == b"y"
    assert u.sh.nlink("f") == 2
    u.sh.write("f", b"DATA")
    assert u.sh.read(f"d/{name}") == b"DATA"


@FREE_AND_HIDDEN
def test_a_link_to_a_symlink_is_one_to_itself(unions: Unions, name: str) -> None:
    u = unions({"l": Symlink("target"), "gone": ""}, upper={"gone": Whiteout()})
    u.sh.link("l", name)
    entry = u.on_disk(name)
    assert entry is not None
    assert (entry.kind, entry.target, entry.nlink) == ("symlink", b"target", 2)


def test_an_unlinked_file_gets_no_new_name(unions: Unions) -> None:
    u = unions({"low": "x"}, upper={"up": "x"})
    for name in ("low", "up"):
        node = u.sh.hold(name)
        u.sh.unlink(name)
        assert errno_of(lambda n=node: u.fs.link(n, u.fs.root, b"new")) == errno.ENOENT  # type: ignore[misc]
    assert not u.sh.exists("new")


def test_one_name_of_two_goes_and_comes(unions: Unions) -> None:
    u = unions({}, upper={"a": "x"})
    u.sh.link("a", "b")
    node = u.sh.hold("a")
    u.sh.unlink("a")
    assert u.sh.node("b") is node
    u.fs.link(node, u.fs.root, b"a")
    assert u.sh.nlink("a") == 2
    assert u.sh.names() == [b"a", b"b"]

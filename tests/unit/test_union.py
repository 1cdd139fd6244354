"""The API as a whole: walking, stale numbers, statfs, and the end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from tests.support.tree import Symlink
from tests.support.unions import Unions, open_fds
from unionfs2.union import UnionFS


def errno_of(act: Callable[[], object]) -> int:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        act()
    return caught.value.errno or 0


def test_a_walk_follows_no_link(unions: Unions) -> None:
    u = unions({"d": {"e": {"f": ""}}, "l": Symlink("d")})
    assert u.fs.walk(b"/d//./e/f/") is u.sh.node("d/e/f")
    assert u.fs.walk(b"") is u.fs.root
    assert u.fs.walk(b"l").kind == stat.S_IFLNK
    assert errno_of(lambda: u.fs.walk(b"l/e")) == errno.ENOTDIR
    assert errno_of(lambda: u.fs.walk(b"d/e/f/g")) == errno.ENOTDIR
    assert errno_of(lambda: u.fs.walk(b"d/x/y")) == errno.ENOENT


def test_the_root_stays_whatever_is_forgotten(unions: Unions) -> None:
    u = unions({"f": ""})
    u.fs.forget(u.fs.root.id, 99)
    assert u.fs.directory(1) is u.fs.root
    assert errno_of(lambda: u.fs.node(12345)) == errno.ESTALE


@pytest.mark.parametrize("lower_only", [True, False])
def test_statfs_is_that_of_the_topmost_layer(unions: Unions, lower_only: bool) -> None:
    u = unions({}, {}, lower_only=lower_only)
    real = os.statvfs(u.lowers[0] if lower_only else u.upper)
    ours = u.fs.statfs()
    fields = ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax")
    assert [getattr(ours, name) for name in fields] == [getattr(real, name) for name in fields]


def test_two_unions_share_nothing(unions: Unions) -> None:
    one, other = unions({"f": "1"}), unions({"f": "2"})
    one.sh.write("f", b"x")
    assert (one.sh.read("f"), other.sh.read("f")) == (b"x", b"2")
    one.close()
    assert other.sh.read("f") == b"2"


def test_an_error_in_a_with_block_closes(unions: Unions) -> None:
    u = unions({"f": ""})
    fds = open_fds()

    def fail() -> None:
        with UnionFS.open(u.spec) as fs:
            fs.opendir(fs.root)
            fs.open_file(fs.walk(b"f"), os.O_RDWR)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail()
    assert open_fds() == fds


def test_what_copy_up_changed_is_noted_for_a_door(unions: Unions) -> None:
    u = unions({"d": {"f": ""}})
    directory, file = u.sh.node("d"), u.sh.node("d/f")
    assert u.fs.stack.changed == []
    u.sh.chmod("d/f", 0o600)
    assert set(u.fs.stack.changed) >= {directory, file}

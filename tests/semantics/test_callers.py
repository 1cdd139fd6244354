"""Who the caller is: owner of new objects, supplementary groups, umask, setgid, default ACLs."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.semantics.callers import ALICE, BOB, TEAM, as_caller
from tests.semantics.rig import Rig
from tests.semantics.system import (
    ACL_ACCESS,
    ACL_DEFAULT,
    permissions,
    simple_acl,
)


def _file(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))


MAKERS: dict[str, Callable[[Path], None]] = {
    "file": _file,
    "directory": lambda path: os.mkdir(path, 0o777),
    "symlink": lambda path: os.symlink("target", path),
    "fifo": lambda path: os.mkfifo(path, 0o666),
    "socket": _socket,
}


@pytest.fixture(params=sorted(MAKERS))
def make(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return MAKERS[request.param]


def _open_to_all(rig: Rig, name: str) -> Path:
    """A lower directory in which everybody may create."""
    made = rig.lower / name
    made.mkdir()
    made.chmod(0o777)
    return made


@pytest.mark.parametrize("over_whiteout", [False, True], ids=["fresh", "over-whiteout"])
def test_new_object_belongs_to_caller(
    rig: Rig, make: Callable[[Path], None], over_whiteout: bool
) -> None:
    below = _open_to_all(rig, "d")
    if over_whiteout:
        (below / "new").write_text("hidden")
    merged = rig.mount()
    if over_whiteout:
        (merged / "d/new").unlink()
    as_caller(lambda: make(merged / "d/new"), uid=ALICE, gid=BOB)
    for path in (merged / "d/new", rig.top / "d/new"):
        found = os.lstat(path)
        assert (found.st_uid, found.st_gid) == (ALICE, BOB)


@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077])
def test_umask_of_caller_is_applied(rig: Rig, umask: int) -> None:
    _open_to_all(rig, "d")
    merged = rig.mount() / "d"

    def act() -> None:
        for kind in ("file", "directory", "fifo"):
            MAKERS[kind](merged / kind)

    as_caller(act, umask=umask)
    assert permissions(merged / "file") == 0o666 & ~umask
    assert permissions(merged / "fifo") == 0o666 & ~umask
    assert permissions(merged / "directory") == 0o777 & ~umask


def test_umask_of_each_caller_is_its_own(rig: Rig) -> None:
    _open_to_all(rig, "d")
    merged = rig.mount() / "d"
    for number in range(4):
        umask = 0o077 if number % 2 else 0o002
        path = merged / f"{number}"
        as_caller(lambda path=path: _file(path), umask=umask)  # type: ignore[misc]
        assert permissions(path) == 0o666 & ~umask


def test_supplementary_group_may_read_and_write(rig: Rig) -> None:
    shared = rig.lower / "shared"
    shared.write_text("below")
    os.chown(shared, 0, TEAM)
    shared.chmod(0o660)
    merged = rig.mount() / "shared"
    assert as_caller(merged.read_text, groups=[TEAM]) == "below"
    as_caller(lambda: merged.write_text("above"), groups=[TEAM])
    assert (rig.top / "shared").read_text() == "above"
    found = os.stat(rig.top / "shared")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, TEAM, 0o660)


def test_without_the_group_access_is_refused_and_nothing_copied_up(rig: Rig) -> None:
    shared = rig.lower / "shared"
    shared.write_text("below")
    os.chown(shared, 0, TEAM)
    shared.chmod(0o660)
    merged = rig.mount() / "shared"
    for action in (merged.read_text, lambda: merged.write_text("x")):
        with pytest.raises(PermissionError):
            as_caller(action, groups=[])
    with pytest.raises(PermissionError) as refused:
        as_caller(lambda: merged.chmod(0o777))
    assert refused.value.errno == errno.EPERM
    assert not list(rig.top.iterdir())


def test_supplementary_group_may_create_in_directory(rig: Rig) -> None:
    box = rig.lower / "box"
    box.mkdir()
    os.chown(box, 0, TEAM)
    box.chmod(0o770)
    merged = rig.mount() / "box"
    with pytest.raises(PermissionError):
        as_caller(lambda: _file(merged / "f"))
    as_caller(lambda: _file(merged / "f"), groups=[BOB, TEAM])
    found = os.stat(merged / "f")
    assert (found.st_uid, found.st_gid) == (ALICE, ALICE)


def test_owner_may_give_file_to_own_supplementary_group_only(rig: Rig) -> None:
    mine = rig.lower / "mine"
    mine.write_text("")
    os.chown(mine, ALICE, ALICE)
    merged = rig.mount() / "mine"
    with pytest.raises(PermissionError):
        as_caller(lambda: os.chown(merged, -1, TEAM))
    as_caller(lambda: os.chown(merged, -1, TEAM), groups=[TEAM])
    assert os.stat(merged).st_gid == TEAM


def test_chmod_setgid_is_dropped_for_a_group_the_caller_is_not_in(rig: Rig) -> None:
    mine = rig.lower / "mine"
    mine.write_text("")
    os.chown(mine, ALICE, TEAM)
    merged = rig.mount() / "mine"
    as_caller(lambda: merged.chmod(0o2755))
    assert permissions(merged) == 0o755
    as_caller(lambda: merged.chmod(0o2755), groups=[TEAM])
    assert permissions(merged) == 0o2755


def test_underlying_modes_do_not_stop_who_may_by_the_merged_ones(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    os.chown(rig.lower / "d", ALICE, ALICE)
    (rig.lower / "d/f").write_text("below")
    os.chown(rig.lower / "d/f", ALICE, ALICE)
    merged = rig.mount()
    for directory in (rig.top, rig.work):
        directory.chmod(0o755)
    closed = rig.base / "closed"
    closed.mkdir(0o700)
    as_caller(lambda: (merged / "d/f").write_text("above"))
    as_caller(lambda: _file(merged / "d/new"))
    assert (merged / "d/f").read_text() == "above"


def test_sticky_directory_keeps_others_from_removing(rig: Rig) -> None:
    box = _open_to_all(rig, "tmp")
    box.chmod(0o1777)
    (box / "root's").write_text("")
    merged = rig.mount() / "tmp"
    as_caller(lambda: _file(merged / "alice's"), uid=ALICE)
    for name in ("root's", "alice's"):
        with pytest.raises(PermissionError):
            as_caller((merged / name).unlink, uid=BOB)
    as_caller((merged / "alice's").unlink, uid=ALICE)


def _setgid_directory(rig: Rig) -> None:
    below = _open_to_all(rig, "team")
    os.chown(below, 0, TEAM)
    below.chmod(0o2777)


@pytest.mark.parametrize("copied_up", [False, True], ids=["lower", "copied-up"])
def test_setgid_directory_hands_down_its_group(
    rig: Rig, make: Callable[[Path], None], copied_up: bool
) -> None:
    _setgid_directory(rig)
    merged = rig.mount() / "team"
    if copied_up:
        _file(merged / "first")
    as_caller(lambda: make(merged / "new"))
    found = os.lstat(merged / "new")
    assert (found.st_uid, found.st_gid) == (ALICE, TEAM)
    inherits = stat.S_ISDIR(found.st_mode)
    assert bool(found.st_mode & stat.S_ISGID) == inherits
    assert permissions(rig.top / "team") == 0o2777


def test_setgid_directory_hands_down_its_group_over_a_whiteout(
    rig: Rig, make: Callable[[Path], None]
) -> None:
    _setgid_directory(rig)
    (rig.lower / "team/new").write_text("hidden")
    merged = rig.mount() / "team"
    (merged / "new").unlink()
    as_caller(lambda: make(merged / "new"))
    found = os.lstat(merged / "new")
    assert (found.st_uid, found.st_gid) == (ALICE, TEAM)
    assert bool(found.st_mode & stat.S_ISGID) == stat.S_ISDIR(found.st_mode)


def test_creating_with_setgid_executable_for_a_foreign_group_drops_the_bit(rig: Rig) -> None:
    _setgid_directory(rig)
    merged = rig.mount() / "team"

    def act() -> None:
        os.close(os.open(merged / "program", os.O_WRONLY | os.O_CREAT, 0o2755))

    as_caller(act)
    assert permissions(merged / "program") == 0o755


@pytest.mark.parametrize("over_whiteout", [False, True], ids=["fresh", "over-whiteout"])
def test_default_acl_is_inherited_and_the_umask_ignored(rig: Rig, over_whiteout: bool) -> None:
    below = _open_to_all(rig, "d")
    default = simple_acl(BOB, 7, mask=7, group=7, other=5)
    os.setxattr(below, ACL_DEFAULT, default)
    if over_whiteout:
        (below / "file").write_text("hidden")
        (below / "directory").write_text("hidden")
    merged = rig.mount() / "d"
    if over_whiteout:
        (merged / "file").unlink()
        (merged / "directory").unlink()

    def act() -> None:
        MAKERS["file"](merged / "file")
        MAKERS["directory"](merged / "directory")

    as_caller(act, umask=0o077)
    # the mode given to open and mkdir limits owner, mask and others; the umask does nothing
    assert permissions(merged / "file") == 0o664
    assert permissions(merged / "directory") == 0o775
    for top in (merged, rig.top / "d"):
        assert os.getxattr(top / "file", ACL_ACCESS) == simple_acl(
            BOB, 7, mask=6, group=7, other=4
        ).replace(b"\x01\x00\x07\x00", b"\x01\x00\x06\x00", 1)
        assert os.getxattr(top / "directory", ACL_DEFAULT) == default
        assert os.getxattr(top / "directory", ACL_ACCESS) == default


def test_inherited_acl_opens_the_file_to_the_named_user(rig: Rig) -> None:
    below = _open_to_all(rig, "d")
    os.setxattr(below, ACL_DEFAULT, simple_acl(BOB, 6, mask=6, group=0, other=0))
    merged = rig.mount() / "d"

    def act() -> None:
        (merged / "f").write_text("for bob")

    as_caller(act, uid=ALICE, umask=0o077)
    assert as_caller((merged / "f").read_text, uid=BOB) == "for bob"
    with pytest.raises(PermissionError):
        as_caller((merged / "f").read_text, uid=TEAM)


def test_device_nodes_by_root_only_and_never_a_whiteout(rig: Rig) -> None:
    _open_to_all(rig, "d")
    merged = rig.mount() / "d"
    os.mknod(merged / "null", 0o640 | stat.S_IFCHR, os.makedev(1, 3))
    found = os.lstat(merged / "null")
    assert stat.S_ISCHR(found.st_mode)
    assert found.st_rdev == os.makedev(1, 3)
    with pytest.raises(PermissionError) as whiteout:
        os.mknod(merged / "w", 0o600 | stat.S_IFCHR, os.makedev(0, 0))
    assert whiteout.value.errno == errno.EPERM
    with pytest.raises(PermissionError):
        as_caller(lambda: os.mknod(merged / "x", 0o600 | stat.S_IFCHR, os.makedev(1, 3)))

"""Open files: what a handle sees after copy-up, unlink and rename; flags; privileges."""

from __future__ import annotations

import errno
import os
import stat
import time

import pytest

from tests.support.shell import RENAME_EXCHANGE, Shell, me
from tests.support.tree import File, HardLink, Tree
from tests.support.unions import Unions, open_fds
from unionfs2.model import Caller, SetAttr

SOMEBODY = Caller(uid=4321, gid=4321)


def test_a_reader_from_before_sees_what_is_written_after(unions: Unions) -> None:
    u = unions({"f": "lower data"})
    before = [u.sh.open("f"), u.sh.open("f")]
    u.sh.write("f", b"UPPER")
    for handle in before:
        assert u.fs.read(handle, 0, 99) == b"UPPER data"
        assert handle.in_upper
        u.fs.release(handle)


def test_the_number_of_a_handle_stays_through_copy_up(unions: Unions) -> None:
    u = unions({"f": "data"})
    handle = u.sh.open("f")
    number = handle.fd
    u.sh.chmod("f", 0o600)
    assert u.fs.file(number) is handle
    assert handle.fd == number
    assert os.get_inheritable(number) is False
    u.fs.release(handle)
    with pytest.raises(OSError, match=r"\[Errno 9\]"):
        u.fs.file(number)


def test_open_and_unlinked(unions: Unions) -> None:
    u = unions({"low": "lower"}, upper={"up": "upper"})
    handles = {name: u.sh.open(name) for name in ("low", "up")}
    writer = u.sh.open("up", os.O_RDWR)
    nodes = {name: u.sh.hold(name) for name in ("low", "up")}
    for name in ("low", "up"):
        u.sh.unlink(name)
        u.sh.create(name, b"another")
    assert u.fs.read(handles["low"], 0, 99) == b"lower"
    u.fs.write(writer, 0, b"UP")
    assert u.fs.read(handles["up"], 0, 99) == b"UPper"
    assert [u.sh.read(name) for name in ("low", "up")] == [b"another"] * 2
    assert u.fs.getattr(nodes["low"]).st_size == 5
    assert u.fs.getattr(nodes["up"]).st_nlink == 0
    u.fs.setattr(nodes["up"], SetAttr(mode=0o640, mtime_ns=7, size=1))
    u.fs.setxattr(nodes["up"], b"user.x", b"1")
    info = u.fs.getattr(nodes["up"])
    assert (stat.S_IMODE(info.st_mode), info.st_mtime_ns, info.st_size) == (0o640, 7, 1)
    assert u.fs.getxattr(nodes["up"], b"user.x") == b"1"
    assert stat.S_IMODE(u.sh.stat("up").st_mode) == 0o644
    for change in (
        lambda: u.fs.setattr(nodes["low"], SetAttr(mode=0)),
        lambda: u.fs.open_file(nodes["low"], os.O_WRONLY),
    ):
        with pytest.raises(FileExistsError):
            change()
    reader = u.fs.open_file(nodes["low"], os.O_RDONLY)
    assert u.fs.read(reader, 0, 99) == b"lower"
    for handle in (*handles.values(), writer, reader):
        u.fs.release(handle)


def test_an_unlinked_file_is_let_go_with_its_last_user(unions: Unions) -> None:
    u = unions({"f": "x", "g": "y"}, upper={"up": "z"})
    u.sh.unlink("g")  # the whiteout that others are linked to is there now
    fds = open_fds()
    for name, held in (("f", 0), ("up", 1)):  # a lower file stays where it is
        handle = u.sh.open(name)
        node = u.sh.hold(name)
        u.sh.unlink(name)
        assert open_fds() == fds + held + 1
        u.fs.release(handle)
        assert open_fds() == fds + held
        u.fs.forget(node.id, 1)
        assert open_fds() == fds


def test_open_and_renamed(unions: Unions) -> None:
    u = unions({"f": "lower", "d": {}}, upper={"g": "upper"})
    old, other = u.sh.open("f"), u.sh.open("g")
    u.sh.rename("f", "d/moved")
    u.sh.rename("g", "d/moved")
    u.sh.write("d/moved", b"UPPER")
    assert u.fs.read(old, 0, 9) == b"lower"
    assert u.fs.read(other, 0, 9) == b"UPPER"
    for handle in (old, other):
        u.fs.release(handle)


def test_open_and_exchanged(unions: Unions) -> None:
    u = unions({"f": "lower"}, upper={"g": "upper"})
    handle, node = u.sh.open("f"), u.sh.node("f")
    u.sh.rename("f", "g", RENAME_EXCHANGE)
    assert u.sh.node("g") is node
    u.sh.write("g", b"L")
    assert u.fs.read(handle, 0, 9) == b"Lower"
    u.fs.release(handle)


def test_writing_needs_a_handle_for_writing(unions: Unions) -> None:
    u = unions({"f": "x"})
    handle = u.sh.open("f")
    with pytest.raises(OSError, match=r"\[Errno 9\]"):
        u.fs.write(handle, 0, b"y")
    u.fs.release(handle)


def test_the_offset_of_a_write_counts_not_o_append(unions: Unions) -> None:
    """The kernel computes the offset of an append; a second one here would write elsewhere."""
    u = unions({"f": "0123"})
    handle = u.sh.open("f", os.O_WRONLY | os.O_APPEND)
    u.fs.write(handle, 1, b"x")
    assert u.sh.read("f") == b"0x23"
    u.fs.release(handle)


def test_a_short_write_is_continued_and_an_error_after_it_counts_less(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unionfs2 import syscalls

    calls = []

    def two_bytes_then_full(fd: int, data: bytes | memoryview, offset: int) -> int:
        calls.append(offset)
        if offset >= 4:
            raise OSError(errno.ENOSPC, "full")
        return os.pwrite(fd, bytes(data[:2]), offset)

    u = unions({}, upper={"f": ""})
    handle = u.sh.open("f", os.O_WRONLY)
    monkeypatch.setattr(syscalls, "pwrite", two_bytes_then_full)
    assert u.fs.write(handle, 0, memoryview(b"abcdef")) == 4
    assert calls == [0, 2, 4]
    with pytest.raises(OSError, match="full"):
        u.fs.write(handle, 4, b"x")
    assert u.sh.read("f") == b"abcd"
    u.fs.release(handle)


def test_what_is_no_regular_file_is_not_opened(unions: Unions) -> None:
    u = unions({"d": {}})
    u.sh.mknod("p", stat.S_IFIFO | 0o600)
    for name, number in (("d", errno.EISDIR), ("p", errno.ENXIO)):
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            u.sh.open(name)
        assert caught.value.errno == number


def test_sync_reaches_upper_files_only(unions: Unions, monkeypatch: pytest.MonkeyPatch) -> None:
    from unionfs2 import syscalls

    calls: list[str] = []
    u = unions({"low": "x"}, upper={"up": "x"})
    volatile = unions({}, upper={"up": "x"}, volatile=True)
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(syscalls, name, lambda fd, name=name: calls.append(name))
    for sh, name in ((u.sh, "low"), (u.sh, "up"), (volatile.sh, "up")):
        handle = sh.open(name)
        sh.fs.sync(handle)
        sh.fs.sync(handle, data_only=True)
        sh.fs.release(handle)
    assert calls == ["fsync", "fdatasync"]
    assert volatile.fs.open_for_sync(volatile.fs.root) is None
    fd = u.fs.open_for_sync(u.fs.root)
    assert fd is not None
    os.fsync(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("atime", "mtime", "due"), [(10, 20, True), (20, 10, True), (None, None, False)]
)
def test_when_a_read_changes_the_access_time(
    unions: Unions, atime: int | None, mtime: int | None, due: bool
) -> None:
    """relatime: older than the data, than the change, or than a day."""
    u = unions({"low": "x"}, upper={"f": "x"})
    if atime is None or mtime is None:
        now = time.time_ns()
        os.utime(u.upper / "f", ns=(now + 10**9, now - 10**9))
    else:
        os.utime(u.upper / "f", ns=(atime, mtime))
    handle, low = u.sh.open("f", os.O_RDONLY | os.O_NOATIME), u.sh.open("low")
    assert u.fs.atime_is_due(handle) is due
    assert not u.fs.atime_is_due(low)
    for one in (handle, low):
        u.fs.release(one)


@pytest.mark.needs("root")
def test_noatime_mounts_never_change_it(unions: Unions) -> None:
    u = unions({}, upper={"f": "x"}, atime="noatime")
    os.utime(u.upper / "f", ns=(10, 20))
    handle = u.sh.open("f")
    assert not u.fs.atime_is_due(handle)
    u.fs.read(handle, 0, 1)
    assert (u.upper / "f").stat().st_atime_ns == 10
    u.fs.release(handle)


# --- privileges of a file that is overwritten ---------------------------------------------------


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("mode", "left"), [(0o4755, 0o755), (0o2755, 0o755), (0o2745, 0o745), (0o6711, 0o711)]
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_stranger_who_truncates_takes_suid_and_sgid_away(
    unions: Unions, mode: int, left: int, layer: int
) -> None:
    tree = {"f": File("x", mode=mode)}
    u = unions(tree if layer else {}, upper={} if layer else tree)
    sh = Shell(u.fs, SOMEBODY)
    sh.fs.release(sh.open("f", os.O_WRONLY))
    assert stat.S_IMODE(sh.stat("f").st_mode) == mode
    sh.fs.release(sh.open("f", os.O_WRONLY | os.O_TRUNC))
    assert stat.S_IMODE(sh.stat("f").st_mode) == left


@pytest.mark.needs("root")
def test_a_member_of_the_group_keeps_sgid_without_execution(unions: Unions) -> None:
    u = unions({"f": File("x", mode=0o2745, gid=4321)})
    sh = Shell(u.fs, SOMEBODY)
    sh.fs.release(sh.open("f", os.O_WRONLY | os.O_TRUNC))
    assert stat.S_IMODE(sh.stat("f").st_mode) == 0o2745


@pytest.mark.needs("root")
def test_root_keeps_them(unions: Unions) -> None:
    u = unions({"f": File("x", mode=0o6755)})
    u.sh.fs.release(u.sh.open("f", os.O_WRONLY | os.O_TRUNC))
    assert stat.S_IMODE(u.sh.stat("f").st_mode) == 0o6755


# --- several names ------------------------------------------------------------------------------


def test_names_of_one_upper_file_are_one_node(unions: Unions) -> None:
    u = unions({}, upper={"a": "x", "b": HardLink("a")})
    node = u.sh.hold("a")
    assert u.sh.node("b") is node
    u.sh.unlink("a")
    assert u.sh.node("b") is node
    assert u.sh.read("b") == b"x"


def test_a_name_not_yet_seen_finds_the_node_of_an_open_file(unions: Unions) -> None:
    """Two nodes for one file would be two caches in front of it."""
    u = unions({}, upper={"a": "x", "b": HardLink("a")})
    handle = u.sh.open(
        "a",
        os.O_RDWR,
    )
    node = u.sh.hold("a")
    u.sh.unlink("a")
    assert u.sh.node("b") is node
    u.sh.write("b", b"y")
    assert u.fs.read(handle, 0, 9) == b"y"
    assert u.fs.getattr(node).st_nlink == 1
    u.sh.chmod("b", 0o600)
    u.fs.release(handle)


def test_a_new_file_with_the_number_of_a_lost_one_is_a_new_node(unions: Unions) -> None:
    u = unions({}, upper={"a": "x", "b": HardLink("a")})
    node = u.sh.hold("a")
    u.sh.node("b")
    u.sh.unlink("a")
    u.sh.unlink("b")
    u.fs.forget(node.id, 1)
    for number in range(20):
        u.sh.create(f"new{number}")
        u.sh.link(f"new{number}", f"again{number}")
        assert u.sh.node(f"new{number}") is not node
    assert len({u.sh.node(f"new{number}").id for number in range(20)}) == 20


def test_lower_names_are_one_node_only_where_nothing_can_change(unions: Unions) -> None:
    tree: Tree = {"a": "x", "b": HardLink("a")}
    writable, fixed = unions(tree), unions(tree, {}, lower_only=True)
    assert writable.sh.node("a") is not writable.sh.node("b")
    assert fixed.sh.node("a") is fixed.sh.node("b")


def test_closing_ends_open_files(unions: Unions) -> None:
    fds = open_fds()
    u = unions({"f": "x", "g": "y"})
    u.sh.open("f")
    u.sh.open("g", os.O_RDWR)
    u.sh.hold("f")
    u.sh.unlink("f")
    u.close()
    assert open_fds() == fds


def test_me_is_the_caller() -> None:
    assert me().uid == os.geteuid()

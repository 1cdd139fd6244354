from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.cases import CASES, LOWER, UPPER, Case
from tests.support.faults import inject
from tests.support.held import BLOCK, Held, held
from tests.support.shell import RENAME_EXCHANGE, view
from tests.support.tree import Dir, File, Tree, Whiteout, snapshot
from tests.support.unions import Union, Unions, trusted_only
from unionfs2 import quota
from unionfs2.errors import OptionError
from unionfs2.model import SetAttr
from unionfs2.quota import Ledger

KIB = 1 << 10
MIB = 1 << 20
HUGE = {"quota_bytes": 1 << 50, "quota_inodes": 1 << 40}


def counted(u: Union) -> Held:
    ledger = u.fs.stack.ledger
    assert ledger is not None
    return Held(ledger.used_bytes, ledger.used_inodes)


def left(u: Union) -> int:
    """Bytes that may still be written."""
    ledger = u.fs.stack.ledger
    assert ledger is not None
    assert ledger.limit_bytes is not None
    return ledger.limit_bytes - ledger.used_bytes


def refused(act: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        act()
    assert caught.value.errno == errno.EDQUOT


# --- limits ---------------------------------------------------------------------------------------


def test_a_mount_without_limits_counts_nothing(unions: Unions) -> None:
    u = unions({}, upper={"f": "x"})
    assert u.fs.stack.ledger is None
    handle = u.sh.open("f", os.O_RDWR)
    assert handle.account is None


def test_limits_need_an_upper(unions: Unions) -> None:
    u = unions({}, lower_only=True, quota_bytes=MIB)
    with pytest.raises(OptionError, match="size= limits the upper directory: add upperdir="):
        _ = u.fs


def test_a_read_only_mount_is_not_counted(unions: Unions) -> None:
    u = unions({}, upper={"f": "x"}, read_only=True, quota_bytes=1)
    assert u.fs.stack.ledger is None


def test_what_is_there_is_counted_at_the_start(unions: Unions) -> None:
    upper: Tree = {
        "d": {str(number): "x" * number * 1000 for number in range(20)},
        "gone": Whiteout(),
        "hole": File(size=MIB, pieces={500_000: b"island"}),
    }
    u = unions({}, upper=upper, **HUGE)
    (u.upper / "again").hardlink_to(u.upper / "d" / "7")
    (u.upper / "link").symlink_to("t" * 500)
    assert counted(u) == held(u.upper)
    assert counted(u).inodes == 24


def test_a_directory_closed_to_its_owner_is_counted(unions: Unions) -> None:
    u = unions({}, upper={"d": Dir({"f": "x" * 5000}, mode=0o000)}, **HUGE)
    ledger = u.fs.stack.ledger
    assert ledger is not None
    assert ledger.used_inodes == 3
    assert stat.S_IMODE((u.upper / "d").stat().st_mode) == 0


# --- each operation, also when it fails -----------------------------------------------------------


@trusted_only
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_count_is_right_whatever_fails(unions: Unions, case: Case) -> None:
    """Each change of the disk fails in turn; what is counted is what is there afterwards."""
    for number in itertools.count(1):
        u = unions(case.part_of(LOWER), upper=case.part_of(UPPER), **HUGE)
        view(u.fs, hold=True)
        with inject(fail_at=number, error=errno.ENOSPC) as faults, contextlib.suppress(OSError):
            case.act(u.sh)
        assert counted(u) == held(u.upper), faults.calls[number - 1 : number]
        u.close()
        if not faults.fired:
            break


def test_directories_grow_with_their_names(unions: Unions) -> None:
    """On file systems where they do."""
    names = [f"{number:0200}" for number in range(200)]
    u = unions({"low": dict.fromkeys(names[:100], "")}, upper={"a": {}, "b": {}}, **HUGE)
    before = counted(u)
    for name in names:
        u.sh.create(f"a/{name}")
        assert counted(u) == held(u.upper)
    for name in names:
        u.sh.link(f"a/{name}", f"b/{name}")
    assert counted(u) == held(u.upper)
    u.sh.mkdir("c")
    for name in names:
        u.sh.rename(f"b/{name}", f"c/{name}")
    assert counted(u) == held(u.upper)
    for name in names[:100]:
        u.sh.unlink(f"low/{name}")
    assert counted(u) == held(u.upper)
    u.sh.mkdir("d")
    for name in names:
        u.sh.mkdir(f"d/{name}")
        u.sh.rmdir(f"d/{name}")
        u.sh.symlink(f"d/{name}", b"x" * 200)
    assert counted(u) == held(u.upper)
    assert counted(u).bytes >= before.bytes


def test_whiteouts_that_are_files_are_counted_until_they_go(unions: Unions) -> None:
    """Image tools without privilege write them as empty files with an attribute."""
    names = ("over", "linked", "moved", "dir")
    u = unions(dict.fromkeys(names, "hidden"), upper={"u": "x", "v": "x", "m": {}}, **HUGE)
    for name in names:
        (u.upper / name).touch()
        os.setxattr(u.upper / name, u.key("whiteout"), b"")
    assert counted(u) == held(u.upper)
    u.sh.create("over")
    u.sh.link("u", "linked")
    u.sh.rename("v", "moved")
    u.sh.mkdir("dir")
    assert counted(u) == held(u.upper)
    assert u.sh.names() == [b"dir", b"linked", b"m", b"moved", b"over", b"u"]


def test_a_directory_that_holds_whiteouts_goes_with_them(unions: Unions) -> None:
    u = unions({"d": {"a": "", "b": ""}, "e": {"a": ""}}, upper={"x": {}}, **HUGE)
    u.sh.unlink("d/a")
    u.sh.unlink("e/a")
    for name in ("d", "e"):
        os.setxattr(u.upper / name, "user.large", b"v" * 3000)
    u.reopen()
    u.sh.unlink("d/b")
    u.sh.rmdir("d")
    assert counted(u) == held(u.upper)
    u.sh.rename("x", "e")
    assert counted(u) == held(u.upper)


def test_attributes_of_directories_are_counted(unions: Unions) -> None:
    u = unions({}, upper={"d": {}, "f": "x" * 5000}, **HUGE)
    for name in ("d", "f"):
        u.sh.setxattr(name, b"user.large", b"v" * 3000)
        assert counted(u) == held(u.upper)
        u.sh.removexattr(name, b"user.large")
        assert counted(u) == held(u.upper)


# --- copy-up --------------------------------------------------------------------------------------


def test_a_copy_that_does_not_fit_leaves_nothing(unions: Unions) -> None:
    u = unions({"a": {"b": {"f": "x" * 100_000}}}, quota_bytes=64 * KIB)
    for act in (
        lambda: u.sh.open("a/b/f", os.O_WRONLY),
        lambda: u.sh.chmod("a/b/f", 0o600),
        lambda: u.sh.setxattr("a/b/f", b"user.k", b"v"),
        lambda: u.sh.truncate("a/b/f", 90_000),
        lambda: u.sh.link("a/b/f", "linked"),
        lambda: u.sh.rename("a/b/f", "moved"),
        lambda: u.fs.begin_copy_up(u.sh.node("a/b/f")),
    ):
        refused(act)
        assert list(snapshot(u.upper)) == [b"."]
        assert u.in_work() == []
        assert counted(u) == held(u.upper)
    u.sh.open("a/b/f", os.O_WRONLY | os.O_TRUNC)
    assert counted(u) == held(u.upper)


@pytest.mark.parametrize("inodes", range(1, 5))
def test_ancestors_are_reckoned_with(unions: Unions, inodes: int) -> None:
    u = unions({"a": {"b": {"f": "x"}}}, quota_inodes=inodes)
    if inodes < 4:
        refused(lambda: u.sh.chmod("a/b/f", 0o600))
        refused(lambda: u.sh.create("a/b/new"))
        assert list(snapshot(u.upper)) == [b"."]
        return
    u.sh.chmod("a/b/f", 0o600)
    assert counted(u).inodes == 4
    refused(lambda: u.sh.create("a/b/new"))
    u.sh.link("a/b/f", "again")


def test_a_link_brings_up_file_and_both_parents_or_nothing(unions: Unions) -> None:
    lower: Tree = {"a": {"f": "x"}, "b": {"c": {}}}
    u = unions(lower, quota_inodes=4)
    refused(lambda: u.sh.link("a/f", "b/c/g"))
    refused(lambda: u.sh.rename("a/f", "b/c/g"))
    assert list(snapshot(u.upper)) == [b"."]
    u = unions(lower, quota_inodes=5)
    u.sh.link("a/f", "b/c/g")
    assert counted(u).inodes == 5


def test_an_exchange_brings_both_up_or_neither(unions: Unions) -> None:
    u = unions({"a": "x" * 9000, "b": "y" * 9000}, quota_inodes=2)
    refused(lambda: u.sh.rename("a", "b", RENAME_EXCHANGE))
    assert list(snapshot(u.upper)) == [b"."]


def test_a_copy_under_way_holds_its_room(unions: Unions) -> None:
    u = unions({"f": "x" * 100_000, "g": "y" * 100_000}, quota_bytes=200_000)
    before = counted(u)
    job = u.fs.begin_copy_up(u.sh.node("f"))
    assert job is not None
    refused(lambda: u.fs.begin_copy_up(u.sh.node("g")))
    job.run()
    job.publish()
    job.close()
    assert counted(u) == held(u.upper)
    other = u.fs.begin_copy_up(u.sh.node("f"))
    assert other is None
    u.sh.unlink("f")
    job = u.fs.begin_copy_up(u.sh.node("g"))
    assert job is not None
    job.close()  # given up
    assert counted(u) == before == held(u.upper)


def test_a_sparse_file_needs_what_is_copied_of_it(unions: Unions) -> None:
    island = {10 * MIB: b"island"}
    u = unions({"f": File(size=20 * MIB, pieces=island)}, quota_bytes=2 * MIB)
    u.sh.chmod("f", 0o600)
    assert counted(u) == held(u.upper)
    assert counted(u).bytes < 1200 * KIB


# --- writing --------------------------------------------------------------------------------------


def test_the_last_block_is_the_last(unions: Unions) -> None:
    u = unions({}, upper={"f": ""}, quota_bytes=40 * KIB)
    handle = u.sh.open("f", os.O_RDWR)
    room = left(u)
    assert u.fs.write(handle, 0, b"x" * 3) == 3
    assert left(u) == room - BLOCK
    assert u.fs.write(handle, 3, b"y" * MIB) == room - 3
    assert left(u) == 0
    refused(lambda: u.fs.write(handle, room, b"z"))
    assert u.fs.write(handle, 0, b"z" * room) == room
    u.fs.setattr(handle.node, SetAttr(size=5000), handle)
    assert left(u) == room - 2 * BLOCK
    assert u.fs.write(handle, 5000, b"z" * MIB) == room - 5000
    assert counted(u) == held(u.upper)


def test_two_handles_of_one_file_share_an_account(unions: Unions) -> None:
    u = unions({}, upper={"f": "x"}, **HUGE)
    (u.upper / "g").hardlink_to(u.upper / "f")
    one, other = u.sh.open("f", os.O_WRONLY), u.sh.open("g", os.O_RDWR)
    assert one.account is other.account
    assert u.fs.write(one, 0, bytes(9000)) == 9000
    assert u.fs.write(other, 9000, bytes(9000)) == 9000
    assert counted(u) == held(u.upper)
    third = u.sh.open("f", os.O_WRONLY | os.O_TRUNC)
    assert counted(u) == held(u.upper)
    for handle in (one, other, third):
        u.fs.release(handle)
    assert counted(u) == held(u.upper)


def test_holes_are_filled_as_far_as_it_goes(unions: Unions) -> None:
    u = unions({}, upper={"f": File(size=MIB)}, quota_bytes=64 * KIB)
    handle = u.sh.open("f", os.O_RDWR)
    room = left(u)
    assert u.fs.write(handle, 100_001, b"a") == 1
    assert left(u) == room - BLOCK
    done = u.fs.write(handle, 1, b"b" * 500_000)
    assert done == room - BLOCK - 1
    assert left(u) == 0
    assert os.pread(handle.fd, done, 1) == b"b" * done
    assert counted(u) == held(u.upper)


def test_what_may_be_a_memory_map_is_never_answered_short(unions: Unions) -> None:
    u = unions({}, upper={"f": File(size=256 * KIB)}, quota_bytes=64 * KIB)
    handle = u.sh.open("f", os.O_RDWR)
    assert u.fs.write(handle, 200_000, b"there") == 5
    page = 200_000 // BLOCK * BLOCK
    room = left(u)
    refused(lambda: u.fs.write(handle, 0, b"m" * 256 * KIB))
    assert left(u) == 0
    data = os.pread(handle.fd, 256 * KIB, 0)
    assert data[:room] == b"m" * room
    assert data[page : page + BLOCK] == b"m" * BLOCK  # it was allocated
    assert data.count(0) == 256 * KIB - room - BLOCK
    assert counted(u) == held(u.upper)


def test_a_direct_write_is_whole_or_nothing(unions: Unions) -> None:
    u = unions({}, upper={"f": ""}, quota_bytes=40 * KIB)
    handle = u.sh.open("f", os.O_WRONLY | os.O_DIRECT)
    room = left(u)
    refused(lambda: u.fs.write(handle, 0, bytes(room + 1)))
    assert left(u) == room
    assert u.fs.write(handle, 0, bytes(room)) == room


def test_a_write_that_fails_below_is_counted_as_far_as_it_got(unions: Unions) -> None:
    u = unions({}, upper={"f": "", "s": File(size=MIB)}, **HUGE)
    for name in ("f", "s"):
        handle = u.sh.open(name, os.O_WRONLY)
        with inject(fail_at=1, error=errno.ENOSPC), pytest.raises(OSError, match="fault"):
            u.fs.write(handle, 0, bytes(10_000))
        assert counted(u) == held(u.upper)


def test_writers_in_threads_do_not_pass_the_limit(unions: Unions) -> None:
    u = unions({}, upper={str(number): "" for number in range(6)}, quota_bytes=2 * MIB)
    handles = [u.sh.open(str(number), os.O_WRONLY) for number in range(6)]
    done = [0] * 6

    def write(number: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                done[number] += u.fs.write(handles[number], done[number], bytes(7001))

    room = left(u)
    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left(u) == 0
    assert counted(u) == held(u.upper)
    assert room - 6 * BLOCK <= sum(done) <= room


# --- files without a name -------------------------------------------------------------------------


def test_what_is_open_is_counted_to_the_last_handle(unions: Unions) -> None:
    u = unions({}, upper={"f": "x" * 50_000, "g": "y"}, **HUGE)
    before = counted(u)
    reader, writer = u.sh.open("f"), u.sh.open("f", os.O_RDWR)
    u.sh.rename("g", "f")
    assert counted(u) == before
    u.fs.write(writer, 50_000, bytes(50_000))
    u.fs.release(writer)
    assert counted(u).inodes == before.inodes
    u.fs.release(reader)
    assert counted(u) == held(u.upper)


def test_a_nameless_file_opened_again_is_counted_again(unions: Unions) -> None:
    """Through /proc/self/fd of an O_PATH descriptor: the kernel still knows the node."""
    u = unions({}, upper={"f": "x" * 50_000}, **HUGE)
    node = u.sh.hold("f")
    u.sh.unlink("f")
    empty = counted(u)
    assert empty == held(u.upper)
    handle = u.fs.open_file(node, os.O_RDWR)
    u.fs.write(handle, 0, bytes(90_000))
    assert counted(u) == Held(empty.bytes + 90_112, empty.inodes + 1)
    u.fs.setattr(node, SetAttr(size=10))
    assert counted(u) == Held(empty.bytes + BLOCK, empty.inodes + 1)
    u.fs.release(handle)
    assert counted(u) == empty
    u.fs.setattr(node, SetAttr(size=0))
    u.fs.setxattr(node, b"user.k", b"v")
    assert counted(u) == empty


def test_a_removed_directory_counts_no_more(unions: Unions) -> None:
    u = unions({}, upper={"d": {}}, **HUGE)
    node = u.sh.hold("d")
    u.sh.rmdir("d")
    u.fs.setxattr(node, b"user.large", b"v" * 3000)
    assert counted(u) == held(u.upper)


# --- the ledger alone -----------------------------------------------------------------------------


def test_room_within_room_is_taken_once() -> None:
    ledger = Ledger(100, 10, empty_directory=0)
    with ledger.room(80, 8):
        assert (ledger.used_bytes, ledger.used_inodes) == (80, 8)
        with ledger.room(50, 5) as inner:
            assert (ledger.used_bytes, ledger.used_inodes) == (80, 8)
            inner.keep().release()
    assert (ledger.used_bytes, ledger.used_inodes) == (0, 0)


def test_room_that_is_kept_is_released_later_and_once() -> None:
    ledger = Ledger(100, 10, empty_directory=0)
    with ledger.room(80, 8) as room:
        kept = room.keep()
    assert ledger.used_bytes == 80
    refused(lambda: ledger.take(30))
    kept.release()
    kept.release()
    assert (ledger.used_bytes, ledger.used_inodes) == (0, 0)


def test_room_is_given_back_after_an_error() -> None:
    ledger = Ledger(100, 10, empty_directory=0)
    with pytest.raises(KeyError), ledger.room(80, 8):
        raise KeyError
    assert (ledger.used_bytes, ledger.used_inodes) == (0, 0)
    refused(ledger.room(101, 0).__enter__)
    refused(ledger.room(0, 11).__enter__)
    with ledger.room(100, 10):
        pass


def test_over_the_limit_what_needs_nothing_passes() -> None:
    ledger = Ledger(100, 10, empty_directory=0)
    ledger.book(500, 50)
    ledger.take(0, 0)
    refused(lambda: ledger.take(1, 0))
    refused(lambda: ledger.take(0, 1))
    assert ledger.take_up_to(BLOCK) == 0


def _statvfs(**fields: int) -> os.statvfs_result:
    names = "f_bsize f_frsize f_blocks f_bfree f_bavail f_files f_ffree f_favail f_flag f_namemax"
    return os.statvfs_result([fields.get(name, 0) for name in names.split()])


@pytest.mark.parametrize(
    ("disk_free", "used", "free"),
    [(900, 0, 100), (900, 30, 70), (50, 30, 50), (900, 100, 0), (900, 200, 0)],
)
def test_statfs_shows_the_smaller_of_limit_and_disk(disk_free: int, used: int, free: int) -> None:
    ledger = Ledger(100 * BLOCK, None, empty_directory=0)
    ledger.book(used * BLOCK)
    real = _statvfs(f_bsize=BLOCK, f_frsize=BLOCK, f_blocks=1000, f_bfree=disk_free, f_bavail=900)
    shown = ledger.statfs(real)
    assert (shown.f_blocks, shown.f_bfree) == (100, free)


def test_statfs_shows_inodes_where_the_disk_has_no_number_of_them() -> None:
    ledger = Ledger(None, 10, empty_directory=0)
    ledger.book(0, 3)
    shown = ledger.statfs(_statvfs(f_blocks=1000, f_bfree=500))
    assert (shown.f_files, shown.f_ffree, shown.f_favail) == (10, 7, 7)
    assert (shown.f_blocks, shown.f_bfree) == (1000, 500)


@pytest.mark.parametrize(
    ("missing", "budget", "allowed"),
    [
        ([(0, 8192)], 4096, [(0, 4096), (8192, 20_000)]),
        ([(0, 8192)], 0, [(8192, 20_000)]),
        ([(4096, 8192), (12_288, 20_480)], 8192, [(0, 16_384)]),
        ([(4096, 8192), (12_288, 20_480)], 4096, [(0, 12_288)]),
        ([(0, 20_480)], 0, []),
    ],
)
def test_parts_of_a_write_within_a_budget(
    missing: list[tuple[int, int]], budget: int, allowed: list[tuple[int, int]]
) -> None:
    assert quota._without(missing, budget, 0, 20_000) == allowed


def test_holes_are_found_between_data(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.truncate(MIB)
        file.seek(200_000)
        file.write(b"x" * 5)
    fd = os.open(path, os.O_RDONLY)
    try:
        page = 200_000 // BLOCK * BLOCK
        found = quota.holes(fd, 0, 2 * MIB, MIB)
        assert found == [(0, page), (page + BLOCK, 2 * MIB)]
        assert quota.holes(fd, page, page + BLOCK, MIB) == []
    finally:
        os.close(fd)

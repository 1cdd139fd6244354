"""size= and inodes=: what a program on the mount sees of a limit."""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.semantics.rig import Rig
from tests.support.held import BLOCK, held
from tests.support.transports import TRANSPORTS

pytestmark = pytest.mark.parametrize("way", TRANSPORTS, indirect=True)

KIB = 1 << 10
MIB = 1 << 20


def refused(act: Callable[[], object]) -> None:
    """*act* fails with EDQUOT."""
    with pytest.raises(OSError, match=r".") as caught:
        act()
    assert caught.value.errno == errno.EDQUOT


def until_refused(write: Callable[[], int]) -> int:
    """Repeat *write* until EDQUOT; gives the number of bytes written."""
    done = 0
    while done < 64 * MIB:
        try:
            done += write()
        except OSError as exc:
            if exc.errno != errno.EDQUOT:
                raise
            return done
    pytest.fail("nothing stops it")


def fill(path: Path, piece: int = 64 * KIB, flags: int = 0) -> int:
    """Write to *path* until EDQUOT."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags)
    except OSError as exc:
        if exc.errno != errno.EDQUOT:
            raise
        return 0  # somebody else was quicker
    try:
        return until_refused(lambda: os.write(fd, b"x" * piece))
    finally:
        os.close(fd)


def free(merged: Path) -> int:
    """Bytes that df(1) shows as free."""
    st = os.statvfs(merged)
    assert st.f_bfree == st.f_bavail
    return st.f_bfree * st.f_frsize


def eventually(probe: Callable[[], object]) -> None:
    """The kernel lets go of a file a moment after its last close."""
    for _ in range(100):
        if probe():
            return
        time.sleep(0.02)
    pytest.fail("it did not happen")


def test_writing_stops_at_the_limit_to_the_block(rig: Rig) -> None:
    merged = rig.mount(options="size=1M")
    room = free(merged)
    assert fill(merged / "f") == room
    assert (merged / "f").stat().st_size == room
    assert held(rig.top).bytes == MIB
    assert free(merged) == 0
    refused((merged / "g").touch)
    refused((merged / "d").mkdir)
    refused(lambda: (merged / "s").symlink_to("x" * 100))
    with (merged / "f").open("r+b") as file:  # what is allocated may be written again
        file.write(b"y" * room)
    (merged / "f").unlink()
    eventually(lambda: free(merged) == room)
    (merged / "g").write_bytes(b"z" * (room // 2))


@pytest.mark.parametrize("piece", [1, 1000, 4096, 10_000, 300_000, 3 * MIB])
def test_the_last_write_is_short_and_the_next_one_fails(rig: Rig, piece: int) -> None:
    merged = rig.mount(options="size=256K")
    if piece == 1:
        (merged / "f").write_bytes(bytes(free(merged) - BLOCK))
        assert fill(merged / "f", 1, os.O_APPEND) == BLOCK
        return
    room = free(merged)
    assert fill(merged / "f", piece) == room
    assert (merged / "f").read_bytes() == b"x" * room


@pytest.mark.parametrize("flags", [os.O_APPEND, os.O_SYNC, os.O_DSYNC | os.O_APPEND])
def test_every_way_of_opening_is_limited(rig: Rig, flags: int) -> None:
    merged = rig.mount(options="size=300K")
    room = free(merged)
    assert fill(merged / "f", 10_000, flags) == room


def test_a_direct_write_is_whole_or_refused(rig: Rig) -> None:
    merged = rig.mount(options="size=300K")
    room = free(merged)
    piece = 64 * KIB
    fd = os.open(merged / "f", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        with mmap.mmap(-1, piece) as buffer:
            done = until_refused(lambda: os.write(fd, buffer))
    finally:
        os.close(fd)
    assert done == room // piece * piece
    assert held(rig.top).bytes == 300 * KIB - (room - done)


def test_holes_are_free_until_they_are_filled(rig: Rig) -> None:
    merged = rig.mount(options="size=512K")
    before = free(merged)
    with (merged / "f").open("wb") as file:
        file.truncate(100 * MIB)
    eventually(lambda: free(merged) == before)
    with (merged / "f").open("r+b", buffering=0) as file:
        for position in (1, 30 * MIB, 99 * MIB):
            file.seek(position)
            file.write(b"data")
        assert free(merged) == before - 3 * BLOCK
        file.seek(50 * MIB + 1)
        done = file.write(bytes(MIB))
        assert done is not None
        # The list of extents may have taken a block of its own.
        assert before - 6 * BLOCK <= done < before - 3 * BLOCK
        refused(lambda: file.write(b"more"))
        file.seek(1)
        file.write(b"DATA")
    os.truncate(merged / "f", 0)
    assert free(merged) == before


def test_a_hard_link_costs_nothing_and_the_last_name_gives_back(rig: Rig) -> None:
    merged = rig.mount(options="size=1M,inodes=3")
    before = free(merged)
    (merged / "a").write_bytes(bytes(100 * KIB))
    (merged / "b").hardlink_to(merged / "a")
    (merged / "c").hardlink_to(merged / "b")
    used = before - 100 * KIB
    assert free(merged) == used
    (merged / "a").unlink()
    (merged / "c").unlink()
    assert free(merged) == used
    (merged / "b").unlink()
    eventually(lambda: free(merged) == before)


def test_truncation_gives_back(rig: Rig) -> None:
    merged = rig.mount(options="size=512K")
    before = free(merged)
    fill(merged / "f")
    os.truncate(merged / "f", 10_000)
    assert free(merged) == before - 3 * BLOCK
    with (merged / "f").open("wb") as file:
        assert free(merged) == before
        os.ftruncate(file.fileno(), 400 * KIB)
        assert free(merged) == before
    fill(merged / "g")
    os.rename(merged / "f", merged / "g")
    eventually(lambda: free(merged) == before)


def test_copy_up_counts_and_one_that_does_not_fit_leaves_nothing(rig: Rig) -> None:
    deep = rig.lower / "one" / "two"
    deep.mkdir(parents=True)
    (deep / "large").write_bytes(b"L" * 600 * KIB)
    (deep / "small").write_bytes(b"S" * 20 * KIB)
    merged = rig.mount(options="size=512K")
    before = free(merged)
    names = merged / "one" / "two"
    refused(lambda: (names / "large").open("ab"))
    refused(lambda: (names / "large").chmod(0o600))
    refused(lambda: os.truncate(names / "large", 590 * KIB))
    refused(lambda: (names / "large").rename(names / "other"))
    refused(lambda: (merged / "link").hardlink_to(names / "large"))
    assert list(rig.top.iterdir()) == []
    assert free(merged) == before
    os.truncate(names / "large", 5 * KIB)  # this much of it fits
    (names / "small").chmod(0o600)
    assert held(rig.top).bytes == MIB // 2 - free(merged)
    assert (names / "large").read_bytes() == b"L" * 5 * KIB


def test_deleting_works_on_a_full_upper(rig: Rig) -> None:
    for name in ("a", "b", "c"):
        (rig.lower / name).write_bytes(b"lower")
    merged = rig.mount(options="size=256K,inodes=2")
    fill(merged / "full")
    refused((merged / "more").touch)
    for name in ("a", "b", "c"):
        (merged / name).unlink()
    assert os.listdir(merged) == ["full"]
    (merged / "full").unlink()
    (merged / "a").write_bytes(b"again")


def test_what_is_open_is_counted_until_it_is_closed(rig: Rig) -> None:
    merged = rig.mount(options="size=1M,inodes=2")
    before = free(merged)
    with (merged / "f").open("w+b", buffering=0) as file:
        file.write(bytes(500 * KIB))
        (merged / "f").unlink()
        assert free(merged) == before - 500 * KIB
        refused((merged / "g").touch)
        file.write(bytes(100 * KIB))
        assert free(merged) == before - 600 * KIB
        file.truncate(BLOCK)
        assert free(merged) == before - BLOCK
    eventually(lambda: free(merged) == before)
    (merged / "g").touch()


def test_a_replaced_file_is_given_back_with_its_last_reader(rig: Rig) -> None:
    merged = rig.mount(options="size=1M")
    before = free(merged)
    (merged / "old").write_bytes(bytes(400 * KIB))
    (merged / "new").write_bytes(bytes(8 * KIB))
    with (merged / "old").open("rb") as file:
        (merged / "new").rename(merged / "old")
        assert free(merged) == before - 408 * KIB
        assert len(file.read()) == 400 * KIB
    eventually(lambda: free(merged) == before - 8 * KIB)


def test_the_count_is_right_after_a_remount(rig: Rig) -> None:
    (rig.lower / "low").write_bytes(b"l" * 30_000)
    merged = rig.mount(options="size=2M,inodes=100")
    (merged / "d").mkdir()
    for number in range(20):
        (merged / "d" / str(number)).write_bytes(bytes(number * 1000))
    (merged / "d" / "again").hardlink_to(merged / "d" / "7")
    (merged / "low").chmod(0o600)
    (merged / "d" / "3").unlink()
    with (merged / "hole").open("wb") as file:
        file.truncate(MIB)
    eventually(lambda: free(merged) == 2 * MIB - held(rig.top).bytes)
    status = os.statvfs(merged)
    rig.unmount()
    again = os.statvfs(rig.mount(options="size=2M,inodes=100"))
    assert again == status
    assert again.f_files - again.f_ffree == held(rig.top).inodes


def test_a_limit_below_what_is_there(rig: Rig) -> None:
    merged = rig.mount()
    (merged / "f").write_bytes(b"x" * 500 * KIB)
    rig.unmount()
    rig.mount(options="size=100K,inodes=1")
    assert free(merged) == 0
    assert (merged / "f").read_bytes() == b"x" * 500 * KIB
    with (merged / "f").open("r+b", buffering=0) as file:
        file.write(b"y" * 500 * KIB)
        refused(lambda: file.write(b"more"))
    refused((merged / "g").touch)
    (merged / "f").rename(merged / "g")
    os.truncate(merged / "g", 50 * KIB)
    with (merged / "g").open("ab", buffering=0) as file:
        file.write(bytes(10 * KIB))
    (merged / "g").unlink()
    refused((merged / "h").touch)  # the directory itself is one already


def test_inodes_are_limited(rig: Rig) -> None:
    (rig.lower / "low").touch()
    merged = rig.mount(options="inodes=6")
    assert (os.statvfs(merged).f_files, os.statvfs(merged).f_ffree) == (6, 5)
    (merged / "file").touch()
    (merged / "directory").mkdir()
    (merged / "link").symlink_to("file")
    os.mkfifo(merged / "fifo")
    (merged / "again").hardlink_to(merged / "file")
    assert os.statvfs(merged).f_ffree == 1
    (merged / "low").chmod(0o600)
    for act in (
        (merged / "x").touch,
        (merged / "x").mkdir,
        lambda: (merged / "x").symlink_to("y"),
        lambda: os.mkfifo(merged / "x"),
    ):
        refused(act)
    (merged / "more").hardlink_to(merged / "file")
    (merged / "fifo").unlink()
    (merged / "x").touch()
    assert os.statvfs(merged).f_blocks == os.statvfs(rig.top).f_blocks  # without a limit


def test_df_shows_the_limit_or_what_the_disk_has(rig: Rig) -> None:
    merged = rig.mount(options="size=8M")
    status = os.statvfs(merged)
    assert status.f_blocks * status.f_frsize == 8 * MIB
    real = os.statvfs(rig.top)
    assert (status.f_files, status.f_namemax) == (real.f_files, real.f_namemax)
    rig.unmount()
    rig.mount(options="size=4000T,inodes=1000000000000")
    status = os.statvfs(merged)
    assert (status.f_blocks, status.f_files) == (real.f_blocks, real.f_files)


def test_a_memory_map_into_a_hole_reports_its_loss(rig: Rig) -> None:
    merged = rig.mount(options="size=256K")
    pages = 256 * KIB // BLOCK
    fd = os.open(merged / "f", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, 2 * pages * BLOCK)
        room = free(merged) // BLOCK
        with mmap.mmap(fd, 2 * pages * BLOCK) as memory:
            memory[:] = b"m" * (2 * pages * BLOCK)
            refused(memory.flush)
        assert 0 <= free(merged) <= 2 * BLOCK
    finally:
        os.close(fd)
    assert held(rig.top / "f").bytes >= (room - 2) * BLOCK


def test_a_memory_map_within_the_limit_is_written(rig: Rig) -> None:
    merged = rig.mount(options="size=256K")
    fd = os.open(merged / "f", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, 100_000)
        with mmap.mmap(fd, 100_000) as memory:
            memory[:] = b"m" * 100_000
            memory.flush()
        os.fsync(fd)
    finally:
        os.close(fd)
    assert (rig.top / "f").read_bytes() == b"m" * 100_000


def test_copies_inside_the_kernel_are_limited(rig: Rig) -> None:
    (rig.lower / "source").write_bytes(b"s" * MIB)
    merged = rig.mount(options="size=600K")
    for name, copy in (("range", os.copy_file_range), ("sendfile", _sendfile)):
        room = free(merged)
        with (merged / "source").open("rb") as source, (merged / name).open("wb") as target:
            ends = (source.fileno(), target.fileno())
            assert until_refused(functools.partial(copy, *ends, MIB)) == room
        (merged / name).unlink()
        eventually(lambda: free(merged) == 600 * KIB - BLOCK)


def _sendfile(source: int, target: int, count: int) -> int:
    return os.sendfile(target, source, None, count)


def test_many_writers_at_once_do_not_pass_the_limit(rig: Rig) -> None:
    merged = rig.mount(options="size=8M")
    room = free(merged)

    def write(number: int) -> int:
        return fill(merged / str(number), 300_000)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = sum(pool.map(write, range(8)))
    assert held(rig.top).bytes <= 8 * MIB
    # Each file ends in a block of its own, each name kept a little free for its directory.
    assert room - 8 * 3 * BLOCK <= done <= room
    for number in range(8):
        (merged / str(number)).unlink(missing_ok=True)
    eventually(lambda: free(merged) == room)


def test_the_server_dies_and_the_count_is_right_again(rig: Rig) -> None:
    merged = rig.mount(options="size=1M")
    with (merged / "gone").open("wb") as file:
        file.write(bytes(300 * KIB))
        file.flush()
        (merged / "gone").unlink()
        (merged / "kept").write_bytes(bytes(100 * KIB))
    rig.unmount()
    rig.mount(options="size=1M")
    assert free(merged) == MIB - held(rig.top).bytes
    assert held(rig.top).inodes == 2

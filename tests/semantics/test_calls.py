"""System calls beyond open, read and write: allocation, holes, copies, nameless files, flags."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.semantics import system
from tests.semantics.callers import ALICE, BOB, TEAM, as_caller
from tests.semantics.rig import NATIVE, Rig
from tests.semantics.system import CAPABILITY, CAPABILITY_NAME, DirStream, permissions

KIB = 1 << 10
MIB = 1 << 20

#: For calls that pyfuse3 has no handlers for.
whole_protocol = pytest.mark.parametrize("way", [NATIVE, "devfuse"], indirect=True)
on_devfuse = pytest.mark.parametrize("way", ["devfuse"], indirect=True)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def number_of(act: Callable[[], object]) -> int:
    """The errno that *act* fails with, 0 when it does not."""
    try:
        act()
    except OSError as exc:
        return exc.errno or -1
    return 0


@pytest.fixture(params=["lower", "upper"])
def file(request: pytest.FixtureRequest, rig: Rig) -> Path:
    """A file of 64 KiB in the lower or in the upper; not mounted yet."""
    tree = rig.lower if request.param == "lower" else rig.top
    (tree / "f").write_bytes(b"x" * 64 * KIB)
    return rig.mount() / "f"


# --- fallocate ------------------------------------------------------------------------------------


@whole_protocol
def test_fallocate_extends(file: Path) -> None:
    with opened(file) as fd:
        system.fallocate(fd, 0, 60 * KIB, 40 * KIB)
        assert os.fstat(fd).st_size == 100 * KIB
    assert file.read_bytes() == b"x" * 64 * KIB + bytes(36 * KIB)


@whole_protocol
def test_fallocate_keeps_the_size(file: Path) -> None:
    with opened(file) as fd:
        system.fallocate(fd, system.FALLOC_KEEP_SIZE, 0, MIB)
        assert os.fstat(fd).st_size == 64 * KIB
        assert os.fstat(fd).st_blocks * 512 >= MIB
    assert file.read_bytes() == b"x" * 64 * KIB


@whole_protocol
@pytest.mark.parametrize(
    "mode", [system.FALLOC_PUNCH_HOLE | system.FALLOC_KEEP_SIZE, system.FALLOC_ZERO_RANGE]
)
@pytest.mark.parametrize("read_before", [False, True])
def test_fallocate_makes_zeros(file: Path, mode: int, read_before: bool) -> None:
    with opened(file) as fd:
        if read_before:
            assert os.pread(fd, 64 * KIB, 0) == b"x" * 64 * KIB
        os.pwrite(fd, b"y" * 100, 10 * KIB)
        system.fallocate(fd, mode, 9 * KIB, 8 * KIB)
        assert os.pread(fd, 64 * KIB, 0) == b"x" * 9 * KIB + bytes(8 * KIB) + b"x" * 47 * KIB
    assert file.stat().st_size == 64 * KIB


@whole_protocol
def test_fallocate_collapses_where_the_client_lets_it(file: Path, way: str) -> None:
    """Known difference "fallocate-ranges"."""
    with opened(file) as fd:
        collapse = partial(system.fallocate, fd, system.FALLOC_COLLAPSE_RANGE, 0, 4 * KIB)
        assert number_of(collapse) == (0 if way == NATIVE else errno.EOPNOTSUPP)
    assert file.stat().st_size == (60 if way == NATIVE else 64) * KIB


@whole_protocol
@pytest.mark.parametrize(
    ("flags", "arguments", "number"),
    [
        (os.O_RDONLY, (0, 0, 1), errno.EBADF),
        (os.O_RDWR, (0, 0, 0), errno.EINVAL),
        (os.O_RDWR, (0, -1, 1), errno.EINVAL),
        (os.O_RDWR, (0, 0, 1 << 62), errno.EFBIG),
        (os.O_RDWR, (system.FALLOC_PUNCH_HOLE, 0, 1), errno.EOPNOTSUPP),
    ],
)
def test_fallocate_refused(
    file: Path, flags: int, arguments: tuple[int, int, int], number: int
) -> None:
    with opened(file, flags) as fd:
        assert number_of(lambda: system.fallocate(fd, *arguments)) == number
    assert file.read_bytes() == b"x" * 64 * KIB


# --- holes ----------------------------------------------------------------------------------------


def layout(path: Path) -> list[tuple[int, int]]:
    """(start, end) of all data."""
    found: list[tuple[int, int]] = []
    end = 0
    with opened(path, os.O_RDONLY) as fd:
        while True:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise
                return found
            end = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, end))


def write_sparsely(path: Path) -> None:
    with path.open("wb") as out:
        for position in (0, MIB, 3 * MIB):
            out.seek(position)
            out.write(b"data" * 1024)
        out.truncate(4 * MIB)


@whole_protocol
@pytest.mark.parametrize("where", ["lower", "upper", "just written"])
def test_holes_are_those_of_the_file(rig: Rig, where: str) -> None:
    write_sparsely(rig.base / "reference")
    if where != "just written":
        write_sparsely((rig.lower if where == "lower" else rig.top) / "f")
    merged = rig.mount() / "f"
    if where == "just written":
        write_sparsely(merged)
    assert layout(merged) == layout(rig.base / "reference") != []


@whole_protocol
def test_data_written_into_a_hole_is_found_at_once(rig: Rig) -> None:
    with (rig.top / "f").open("wb") as out:
        out.truncate(4 * MIB)
    merged = rig.mount() / "f"
    with opened(merged) as fd:
        assert number_of(lambda: os.lseek(fd, 0, os.SEEK_DATA)) == errno.ENXIO
        assert os.lseek(fd, 5, os.SEEK_HOLE) == 5
        os.pwrite(fd, b"data", 2 * MIB)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 2 * MIB
        assert os.lseek(fd, 2 * MIB, os.SEEK_HOLE) > 2 * MIB


@whole_protocol
def test_seeking_beyond_the_end(file: Path) -> None:
    with opened(file) as fd:
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            assert number_of(partial(os.lseek, fd, 64 * KIB, whence)) == errno.ENXIO
            assert number_of(partial(os.lseek, fd, -1, whence)) in (errno.ENXIO, errno.EINVAL)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 64 * KIB


# --- copies ---------------------------------------------------------------------------------------


def test_copy_file_range_of_a_lower_file_leaves_it_there(rig: Rig) -> None:
    data = os.urandom(3 * MIB)
    (rig.lower / "f").write_bytes(data)
    merged = rig.mount()
    made = opened(merged / "new", os.O_WRONLY | os.O_CREAT)
    with opened(merged / "f", os.O_RDONLY) as source, made as target:
        done = 0
        while done < len(data):
            done += os.copy_file_range(source, target, len(data))
        assert os.copy_file_range(source, target, len(data)) == 0
    assert (merged / "new").read_bytes() == data
    assert os.listdir(rig.top) == ["new"]


@pytest.mark.parametrize(("start", "to", "length"), [(0, 0, 10), (5, 100, 9), (60_000, 3, 9_999)])
def test_copy_file_range_between_offsets(file: Path, start: int, to: int, length: int) -> None:
    data = bytes(range(256)) * 256
    target = file.with_name("target")
    target.write_bytes(b"-" * 1000)
    file.write_bytes(data)
    with opened(file, os.O_RDONLY) as source, opened(target) as out:
        done = os.copy_file_range(source, out, length, start, to)
        assert os.lseek(source, 0, os.SEEK_CUR) == os.lseek(out, 0, os.SEEK_CUR) == 0
    assert done == min(length, len(data) - start)
    before = b"-" * 1000
    piece = data[start : start + length]
    assert target.read_bytes() == before[:to] + piece + before[to + done :]


@whole_protocol
def test_copy_file_range_within_a_file(file: Path) -> None:
    with opened(file) as fd:
        os.pwrite(fd, b"head", 0)
        assert os.copy_file_range(fd, fd, 4, 0, 100) == 4
        assert os.pread(fd, 6, 99) == b"xheadx"
        assert number_of(lambda: os.copy_file_range(fd, fd, 100, 0, 50)) == errno.EINVAL


# --- nameless files -------------------------------------------------------------------------------


@whole_protocol
@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_nameless_file_gets_a_name(rig: Rig, where: str) -> None:
    ((rig.lower if where == "lower" else rig.top) / "d").mkdir()
    merged = rig.mount() / "d"
    with opened(merged, os.O_TMPFILE | os.O_RDWR, 0o640) as fd:
        os.write(fd, b"content")
        assert os.listdir(merged) == []
        assert os.fstat(fd).st_nlink == 0
        system.give_name(fd, merged / "named")
        assert os.fstat(fd).st_nlink == 1
        assert os.fstat(fd).st_ino == (merged / "named").stat().st_ino
        os.write(fd, b" and more")
    assert (merged / "named").read_bytes() == b"content and more"
    assert permissions(merged / "named") == 0o640
    rig.remount()
    assert (merged / "named").read_bytes() == b"content and more"


@whole_protocol
def test_a_nameless_file_that_is_to_stay_so(rig: Rig) -> None:
    merged = rig.mount()
    with opened(merged, os.O_TMPFILE | os.O_RDWR | os.O_EXCL) as fd:
        os.write(fd, b"content")
        assert number_of(lambda: system.give_name(fd, merged / "named")) == errno.ENOENT
        assert os.pread(fd, 99, 0) == b"content"
    assert os.listdir(rig.top) == []


@whole_protocol
def test_a_nameless_file_belongs_to_its_maker_and_to_the_group_of_the_directory(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    os.chown(rig.lower / "d", 0, TEAM)
    (rig.lower / "d").chmod(0o2777)
    merged = rig.mount() / "d"

    def make() -> None:
        with opened(merged, os.O_TMPFILE | os.O_WRONLY, 0o666) as fd:
            assert os.fstat(fd).st_uid == ALICE
            system.give_name(fd, merged / "named")

    as_caller(make, uid=ALICE)
    found = (merged / "named").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (ALICE, TEAM, 0o644)


# --- inode flags ----------------------------------------------------------------------------------


def on_disk(rig: Rig, path: str) -> tuple[bytes | None, int]:
    """(protattr, flags of the inode that protect it) of an upper object."""
    try:
        mark: bytes | None = os.getxattr(rig.top / path, "trusted.overlay.protattr")
    except OSError as exc:
        if exc.errno != errno.ENODATA:
            raise
        mark = None
    flags = system.get_flags(rig.top / path)
    return mark, flags & (system.FS_IMMUTABLE | system.FS_APPEND)


PROTECTED: list[Any] = [
    (system.FS_IMMUTABLE, system.XFLAG_IMMUTABLE, b"i"),
    (system.FS_APPEND, system.XFLAG_APPEND, b"a"),
    (
        system.FS_IMMUTABLE | system.FS_APPEND,
        system.XFLAG_IMMUTABLE | system.XFLAG_APPEND,
        b"ai",
    ),
]


@whole_protocol
@pytest.mark.parametrize(("flags", "xflags", "mark"), PROTECTED, ids=["i", "a", "ai"])
@pytest.mark.parametrize("by", ["chattr", "xfs_io"])
def test_a_protected_file(
    file: Path, rig: Rig, flags: int, xflags: int, mark: bytes, by: str
) -> None:
    before, x_before = system.get_flags(file), system.get_xflags(file)
    if by == "chattr":
        system.set_flags(file, before | flags)
    else:
        system.set_xflags(file, x_before | xflags)
    assert system.get_flags(file) == before | flags
    assert system.get_xflags(file) == x_before | xflags
    assert on_disk(rig, "f") == (mark, 0)
    assert number_of(file.unlink) == errno.EPERM
    assert number_of(lambda: file.rename(file.with_name("g"))) == errno.EPERM
    assert number_of(lambda: file.chmod(0o600)) == errno.EPERM
    assert number_of(lambda: os.truncate(file, 1)) == errno.EPERM
    if flags == system.FS_APPEND:
        with file.open("ab") as out:
            out.write(b"more")
        assert file.stat().st_size == 64 * KIB + 4
    rig.remount()
    assert system.get_flags(file) == before | flags
    assert number_of(file.unlink) == errno.EPERM
    system.set_flags(file, before)
    assert system.get_flags(file) == before
    assert on_disk(rig, "f") == (None, 0)
    file.unlink()


@whole_protocol
def test_a_flag_that_protects_nothing_is_on_the_inode(file: Path, rig: Rig) -> None:
    before = system.get_flags(file)
    system.set_flags(file, before | system.FS_NODUMP)
    assert system.get_flags(file) == before | system.FS_NODUMP
    assert system.get_flags(rig.top / "f") & system.FS_NODUMP
    with pytest.raises(PermissionError):
        as_caller(lambda: system.set_flags(file, before), uid=ALICE)


@whole_protocol
def test_an_immutable_directory_takes_no_names(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    (rig.lower / "d/f").touch()
    merged = rig.mount() / "d"
    system.set_flags(merged, system.get_flags(merged) | system.FS_IMMUTABLE)
    assert number_of((merged / "new").touch) == errno.EPERM
    assert number_of((merged / "f").unlink) == errno.EPERM
    system.set_flags(merged, system.get_flags(merged) & ~system.FS_IMMUTABLE)
    (merged / "f").unlink()


# --- birth, sync, locks ---------------------------------------------------------------------------


@whole_protocol
def test_time_of_birth_is_that_of_the_real_file(file: Path, rig: Rig) -> None:
    real = next(tree / "f" for tree in (rig.top, rig.lower) if (tree / "f").exists())
    assert system.birth_ns(file) == system.birth_ns(real) is not None
    file.with_name("new").touch()
    assert system.birth_ns(file.with_name("new")) == system.birth_ns(rig.top / "new")


def test_syncfs_and_fsync_of_everything(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    merged = rig.mount()
    (merged / "d/f").write_bytes(b"content")
    for path in (merged, merged / "d", merged / "d/f"):
        with opened(path, os.O_RDONLY) as fd:
            system.syncfs(fd)
            os.fsync(fd)
            os.fdatasync(fd)
    assert (rig.top / "d/f").read_bytes() == b"content"


@pytest.mark.parametrize("kind", ["flock", "posix"])
def test_a_lock_ends_with_its_holder(file: Path, kind: str) -> None:
    lock = fcntl.flock if kind == "flock" else fcntl.lockf
    held, holds = os.pipe()
    pid = os.fork()
    if not pid:
        with file.open("r+b") as mine:
            lock(mine, fcntl.LOCK_EX)
            os.write(holds, b"x")
            signal.pause()
        os._exit(0)
    try:
        assert os.read(held, 1) == b"x"
        with file.open("r+b") as other:
            assert number_of(lambda: lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)) == errno.EAGAIN
            os.kill(pid, signal.SIGKILL)
            lock(other, fcntl.LOCK_EX)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(held)
        os.close(holds)


def test_locked_ranges_of_one_file_do_not_meet(file: Path) -> None:
    def second() -> list[int]:
        with file.open("r+b") as other:
            return [
                number_of(partial(fcntl.lockf, other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, start))
                for start in (0, 5, 10, 20)
            ]

    file.chmod(0o666)
    with file.open("r+b") as mine:
        fcntl.lockf(mine, fcntl.LOCK_EX, 10, 0)
        assert as_caller(second) == [errno.EAGAIN, errno.EAGAIN, 0, 0]


# --- flags of open --------------------------------------------------------------------------------


def test_direct_reading_and_writing(file: Path) -> None:
    with mmap.mmap(-1, 8 * KIB) as buffer, opened(file, os.O_RDWR | os.O_DIRECT) as fd:
        assert os.readv(fd, [buffer]) == 8 * KIB
        assert buffer[:] == b"x" * 8 * KIB
        buffer[:] = b"y" * 8 * KIB
        assert os.pwritev(fd, [buffer], 4 * KIB) == 8 * KIB
        assert os.pwritev(fd, [buffer], 64 * KIB) == 8 * KIB
    expected = b"x" * 4 * KIB + b"y" * 8 * KIB + b"x" * 52 * KIB + b"y" * 8 * KIB
    assert file.read_bytes() == expected


def test_direct_and_cached_access_agree(file: Path) -> None:
    with mmap.mmap(-1, 4 * KIB) as buffer, opened(file) as cached:
        assert os.pread(cached, 4 * KIB, 0) == b"x" * 4 * KIB
        with opened(file, os.O_RDWR | os.O_DIRECT) as direct:
            os.pwrite(cached, b"c" * 4 * KIB, 0)
            assert os.preadv(direct, [buffer], 0) == 4 * KIB
            assert buffer[:] == b"c" * 4 * KIB
            buffer[:] = b"d" * 4 * KIB
            os.pwritev(direct, [buffer], 0)
            assert os.pread(cached, 4 * KIB, 0) == b"d" * 4 * KIB


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
def test_synchronous_writes_are_on_the_upper_at_once(file: Path, rig: Rig, flag: int) -> None:
    with opened(file, os.O_WRONLY | flag) as fd:
        for number in range(3):
            os.pwrite(fd, b"%d" % number, number)
            assert (rig.top / "f").read_bytes()[: number + 1] == b"012"[: number + 1]


# --- names ----------------------------------------------------------------------------------------


def _by_exchange(directory: Path, name: Path) -> None:
    (directory / "other").touch()
    name.touch()
    system.renameat2(directory / "other", name, system.RENAME_EXCHANGE)


WAYS_TO_MAKE: dict[str, Callable[[Path, Path], object]] = {
    "open": lambda _, name: name.write_bytes(b""),
    "mkdir": lambda _, name: name.mkdir(),
    "mknod": lambda _, name: os.mknod(name, stat.S_IFIFO | 0o600),
    "symlink": lambda _, name: name.symlink_to("nowhere"),
    "link": lambda directory, name: os.link(directory / "there", name),
    "rename": lambda directory, name: (directory / "there").rename(name),
    "exchange": _by_exchange,
    "copy": lambda directory, name: shutil.copyfile(directory / "there", name),
}


@pytest.mark.parametrize("make", WAYS_TO_MAKE)
def test_a_name_that_was_not_there_is_seen_once_it_is(rig: Rig, make: str) -> None:
    (rig.lower / "d").mkdir()
    (rig.lower / "d/there").write_bytes(b"content")
    merged = rig.mount() / "d"
    name = merged / "name"
    for _ in range(2):
        assert not os.path.lexists(name)
        assert "name" not in os.listdir(merged)
        WAYS_TO_MAKE[make](merged, name)
        assert os.path.lexists(name)
        assert "name" in os.listdir(merged)
        if name.is_dir():
            name.rmdir()
        else:
            name.unlink()
        (merged / "there").write_bytes(b"content")


def test_two_readers_of_a_directory_while_it_is_emptied(rig: Rig) -> None:
    """5 000 names, in the lower and in the upper: each reader meets each name that stays once."""
    stay = {f"stay-{number:04}".encode() for number in range(2500)}
    for number in range(2500):
        tree = rig.lower if number % 2 else rig.top
        (tree / f"stay-{number:04}").touch()
        (tree / f"go-{number:04}").touch()
    merged = rig.mount()
    seen: list[list[bytes]] = [[], []]
    with contextlib.ExitStack() as stack:
        streams = [DirStream(merged) for _ in seen]
        for stream in streams:
            stack.callback(stream.close)
        turn, going = 0, [True, True]
        while any(going):
            for which, steps in ((0, 3), (1, 2)):
                for _ in range(steps):
                    entry = streams[which].read()
                    going[which] = entry is not None
                    if entry is None:
                        break
                    seen[which].append(entry.name)
            if turn < 2500:
                (merged / f"go-{turn:04}").unlink()
            turn += 1
    for names in seen:
        assert len(names) == len(set(names))
        assert stay <= set(names)


def test_a_directory_of_5000_is_emptied_as_it_is_read_by_two(rig: Rig) -> None:
    for number in range(5000):
        ((rig.lower if number % 2 else rig.top) / f"{number:04}").touch()
    merged = rig.mount()
    with contextlib.closing(DirStream(merged)) as one, contextlib.closing(DirStream(merged)) as two:
        streams = [one, two]
        while streams:
            for stream in list(streams):
                entry = stream.read()
                if entry is None:
                    streams.remove(stream)
                elif entry.name not in (b".", b".."):
                    with contextlib.suppress(FileNotFoundError):
                        (merged / os.fsdecode(entry.name)).unlink()
    assert os.listdir(merged) == []


# --- a full upper ---------------------------------------------------------------------------------


def on_small_upper(rig: Rig, options: str = "") -> Path:
    """An upper of 1 MiB."""
    rig.use_small_upper()
    return rig.mount(options=options)


def write_for_ever(path: Path) -> int:
    """Write until something says no; gives the errno of that write, 0 after 512 MiB."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(8192):
            number = number_of(lambda: os.write(fd, b"x" * 64 * KIB))
            if number:
                return number
        return 0
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)  # where writes were held back it says so too


def check_full(merged: Path) -> None:
    assert write_for_ever(merged / "endless") == errno.ENOSPC
    assert write_for_ever(merged / "another") == errno.ENOSPC
    (merged / "another").unlink()
    (merged / "endless").unlink()
    (merged / "again").write_bytes(b"y" * 64 * KIB)
    with opened(merged / "again") as fd:
        os.fsync(fd)
    assert (merged / "again").read_bytes() == b"y" * 64 * KIB


def test_a_full_upper_ends_an_endless_writer(rig: Rig) -> None:
    check_full(on_small_upper(rig))


@on_devfuse
@pytest.mark.parametrize("writeback", ["on", "off"])
def test_a_full_upper_ends_an_endless_writer_with_and_without_writeback(
    rig: Rig, writeback: str
) -> None:
    check_full(on_small_upper(rig, f"writeback={writeback}"))


def test_a_copy_up_that_does_not_fit_changes_nothing(rig: Rig) -> None:
    (rig.lower / "big").write_bytes(b"x" * 2 * MIB)
    merged = on_small_upper(rig)
    assert number_of(lambda: (merged / "big").chmod(0o600)) == errno.ENOSPC
    assert (merged / "big").read_bytes() == b"x" * 2 * MIB
    assert permissions(merged / "big") == 0o644
    assert os.listdir(rig.top) == []


# --- privileges -----------------------------------------------------------------------------------


def _allocate(path: Path) -> None:
    with opened(path) as fd:
        system.fallocate(fd, 0, 0, 100_000)


def _copy_into(path: Path) -> None:
    with opened(path.with_name("source"), os.O_RDONLY) as source, opened(path) as fd:
        assert os.copy_file_range(source, fd, 5) == 5


def _write(path: Path) -> None:
    with opened(path) as fd:
        os.write(fd, b"new")


CHANGES: dict[str, Callable[[Path], None]] = {
    "write": _write,
    "truncate": lambda path: os.truncate(path, 1),
    "fallocate": _allocate,
    "copy_file_range": _copy_into,
}


@pytest.fixture(params=["lower", "upper"])
def program(request: pytest.FixtureRequest, rig: Rig) -> Path:
    """A program of TEAM with a capability, which everybody may write; made last, with its mode."""
    tree = rig.lower if request.param == "lower" else rig.top
    (tree / "source").write_bytes(b"source")
    below = tree / "program"
    below.write_bytes(b"x" * 8192)
    os.chown(below, BOB, TEAM)
    os.setxattr(below, CAPABILITY_NAME, CAPABILITY)
    return below


@whole_protocol
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("group", ["in", "out"])
@pytest.mark.parametrize(
    ("mode", "after_in", "after_out"),
    [(0o6777, 0o777, 0o777), (0o2767, 0o2767, 0o767), (0o4767, 0o767, 0o767)],
)
def test_what_a_user_changes_loses_its_privileges(
    program: Path, rig: Rig, change: str, group: str, mode: int, after_in: int, after_out: int
) -> None:
    program.chmod(mode)
    merged = rig.mount() / "program"
    groups = (TEAM,) if group == "in" else ()
    as_caller(lambda: CHANGES[change](merged), uid=ALICE, groups=groups)
    assert permissions(merged) == (after_in if group == "in" else after_out)
    assert CAPABILITY_NAME not in os.listxattr(merged)
    assert permissions(rig.top / "program") == permissions(merged)


@whole_protocol
@pytest.mark.parametrize("change", CHANGES)
def test_what_root_changes_loses_only_its_capability(program: Path, rig: Rig, change: str) -> None:
    program.chmod(0o6777)
    merged = rig.mount() / "program"
    CHANGES[change](merged)
    assert permissions(merged) == 0o6777
    assert CAPABILITY_NAME not in os.listxattr(merged)

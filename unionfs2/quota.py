"""What the upper directory holds, counted and limited: ``size=`` and ``inodes=`` of a FUSE mount.

Nobody else changes an upper while it is mounted, so counting once at the start and adding up what
each operation changes is enough, on any file system and without privilege. The count is that of a
project quota: every inode once, however many names it has, and

* a regular file: its allocated blocks, but not more than its size rounded up to 4 KiB. Holes are
  free, and so is what a file system allocates ahead of a growing file.
* anything else: its allocated blocks.
* a whiteout: nothing. It holds no data, there cannot be more of them than names in the lower
  layers, and a full upper must not keep anybody from deleting.

Invariant: an operation that could go over a limit is refused with EDQUOT before it has changed
anything. It takes what it may need first, books what it did need, and gives the rest back.
Invariant: what is given back for an inode is what was booked for it. The blocks of a file may
change behind our back (preallocation, extent trees), so what differs from the ordinary charge is
remembered in ``_odd``; the ordinary charge follows from type and size alone.

Two things may go over a limit, by some blocks: a directory that grows because of a whiteout or a
rename (XFS lets these pass, too), and the blocks in which a file system keeps extended attributes
and the lists of its extents.

Totals are guarded by a lock, because large writes run in worker threads; an ``Account`` orders
the writers of one file. Everything else belongs to the thread of the core.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final

from . import syscalls as sc
from .branch import Branch, FdCache, RealDir
from .handles import write_whole

#: Granularity of the charge of a file.
BLOCK: Final = 4096
#: Kept free for the directory that a new name goes into: a leaf and a node of its index. XFS
#: reserves more (XFS_CREATE_SPACE_RES), ext4 nothing.
NAME_RESERVE: Final = 2 * BLOCK

_FALLOC_FL_KEEP_SIZE: Final = 1
_SECTOR: Final = 512  # unit of st_blocks
_S_IFMT: Final = 0o170000
# A symlink shorter than this is kept in the inode by every file system in use (ext4: 60).
_FAST_SYMLINK: Final = 60


def round_up(size: int) -> int:
    """*size* in whole blocks."""
    return (size + BLOCK - 1) & -BLOCK


def is_free(st: os.stat_result) -> bool:
    """Whether the object is a whiteout, which costs nothing."""
    return st.st_rdev == 0 and stat.S_ISCHR(st.st_mode)


def charge(st: os.stat_result) -> int:
    """Bytes that an inode counts for."""
    allocated = st.st_blocks * _SECTOR
    if st.st_mode & _S_IFMT == stat.S_IFREG:
        return min(allocated, round_up(st.st_size))
    return 0 if is_free(st) else allocated


def symlink_charge(length: int) -> int:
    """What a symlink with a target of *length* bytes costs at most."""
    return 0 if length < _FAST_SYMLINK else BLOCK


def _refuse() -> OSError:
    return OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


class Ledger:
    """Totals of one upper. All sizes in bytes."""

    __slots__ = (
        "_accounts",
        "_in_room",
        "_lock",
        "_odd",
        "empty_directory",
        "limit_bytes",
        "limit_inodes",
        "used_bytes",
        "used_inodes",
    )

    def __init__(
        self, limit_bytes: int | None, limit_inodes: int | None, *, empty_directory: int
    ) -> None:
        self.limit_bytes = limit_bytes
        self.limit_inodes = limit_inodes
        self.empty_directory = empty_directory
        self.used_bytes = 0
        self.used_inodes = 0
        self._lock = threading.Lock()
        self._odd: dict[int, int] = {}
        self._accounts: dict[int, Account] = {}
        self._in_room = False

    # --- totals, for any thread --------------------------------------------------------------

    def take(self, size: int, inodes: int = 0) -> None:
        """Count *size* bytes and *inodes* more, or raise EDQUOT."""
        with self._lock:
            limit = self.limit_bytes
            if size > 0 and limit is not None and self.used_bytes + size > limit:
                raise _refuse()
            most = self.limit_inodes
            if inodes > 0 and most is not None and self.used_inodes + inodes > most:
                raise _refuse()
            self.used_bytes += size
            self.used_inodes += inodes

    def take_up_to(self, size: int) -> int:
        """Count *size* bytes more, or as many whole blocks as are left; gives their number."""
        with self._lock:
            limit = self.limit_bytes
            if limit is not None and self.used_bytes + size > limit:
                size = max(0, limit - self.used_bytes) & -BLOCK
            self.used_bytes += size
            return size

    def book(self, size: int, inodes: int = 0) -> None:
        """Count what has happened already, in either direction."""
        if size or inodes:
            with self._lock:
                self.used_bytes += size
                self.used_inodes += inodes

    # --- objects, for the thread of the core --------------------------------------------------

    def room(self, size: int, inodes: int) -> Room:
        """For the time of one operation: take what it may need. Within another room, nothing."""
        return Room(self, size, inodes)

    def booked(self, st: os.stat_result) -> int:
        """What is booked for an inode; *st* may be from before a change, but not from after."""
        account = self._accounts.get(st.st_ino)
        if account is not None:
            return account.booked
        return self._odd.get(st.st_ino, self._ordinary(st))

    def _ordinary(self, st: os.stat_result) -> int:
        kind = st.st_mode & _S_IFMT
        if kind == stat.S_IFREG:
            return round_up(st.st_size)
        return self.empty_directory if kind == stat.S_IFDIR else 0

    def _note(self, st: os.stat_result, value: int) -> None:
        if value == self._ordinary(st):
            self._odd.pop(st.st_ino, None)
        else:
            self._odd[st.st_ino] = value

    def added(self, st: os.stat_result) -> None:
        """A new inode is in the upper."""
        if is_free(st):
            return
        value = charge(st)
        self._note(st, value)
        self.book(value, 1)

    def removed(self, st: os.stat_result) -> None:
        """The last name of an inode is gone; *st* is from before, or of what is still open."""
        if is_free(st):
            return
        self.book(-self.booked(st), -1)
        self._odd.pop(st.st_ino, None)

    def changed(self, before: os.stat_result, after: os.stat_result) -> None:
        """An inode has other blocks or another size."""
        account = self._accounts.get(after.st_ino)
        if account is not None:
            account.settle(after)
        elif not is_free(after):
            old = self.booked(before)
            new = charge(after)
            self._note(after, new)
            self.book(new - old)

    def directory_changed(self, dir_fd: int) -> None:
        """Names came to or went from the directory *dir_fd* of the upper, or its attributes did."""
        st = os.stat(dir_fd)
        self.changed(st, st)  # the ordinary charge of a directory does not depend on its size

    # --- open files ---------------------------------------------------------------------------

    def open_file(self, fd: int) -> Account:
        """The account of a file of the upper, open for writing; one for all its handles."""
        st = os.fstat(fd)
        account = self._accounts.get(st.st_ino)
        if account is None:
            account = Account(self, st.st_size, self.booked(st))
            self._accounts[st.st_ino] = account
            self._odd.pop(st.st_ino, None)
        account.users += 1
        return account

    def close_file(self, account: Account, fd: int) -> None:
        """One handle less; with the last one the file is counted by its inode again."""
        account.users -= 1
        if not account.users:
            st = os.fstat(fd)
            account.settle(st)
            del self._accounts[st.st_ino]
            self._note(st, account.booked)

    def writing_stopped(self, st: os.stat_result) -> threading.RLock | Room:
        """Context in which nobody writes to the inode *st*, for whoever changes its size."""
        account = self._accounts.get(st.st_ino)
        return NO_ROOM if account is None else account.lock

    # --- what others see ------------------------------------------------------------------------

    def statfs(self, real: os.statvfs_result) -> os.statvfs_result:
        """The limits, and what is left of them, unless the file system has less.

        As XFS and ext4 answer for a project (xfs_fill_statvfs_from_dquot(), ext4_statfs_project()).
        """
        fields = list(real)
        if self.limit_bytes is not None:
            unit = real.f_frsize or BLOCK
            limit = self.limit_bytes // unit
            left = max(0, limit - -(-self.used_bytes // unit))
            fields[2:5] = [
                min(real.f_blocks, limit),
                min(real.f_bfree, left),
                min(real.f_bavail, left),
            ]
        if self.limit_inodes is not None:
            left = max(0, self.limit_inodes - self.used_inodes)
            counts = bool(real.f_files)  # btrfs has no number of inodes to tell
            fields[5:8] = [
                min(real.f_files, self.limit_inodes) if counts else self.limit_inodes,
                min(real.f_ffree, left) if counts else left,
                min(real.f_favail, left) if counts else left,
            ]
        return os.statvfs_result(fields)

    # --- counting -------------------------------------------------------------------------------

    def count(self, upper: Branch, cache: FdCache) -> None:
        """Add up the whole upper; nothing may be open yet. Closes what it opens.

        Takes about a second for 100 000 files that the kernel knows, two from a disk. Remembered
        are directories not yet read, files with several links, and what has an odd charge.
        """
        linked: set[int] = set()
        device = os.stat(upper.root_fd).st_dev
        self.added(os.stat(upper.root_fd))
        pending = [upper.root]
        try:
            while pending:
                directory = pending.pop()
                self._count_directory(directory, device, linked, pending)
                cache.trim()
        finally:
            cache.close_all()

    def _count_directory(
        self, directory: RealDir, device: int, linked: set[int], pending: list[RealDir]
    ) -> None:
        size = inodes = 0
        for name, st in _entries(directory):
            kind = st.st_mode & _S_IFMT
            if st.st_dev != device or is_free(st):
                continue
            if kind == stat.S_IFDIR:
                pending.append(directory.child(os.fsencode(name)))
            elif st.st_nlink > 1:
                if st.st_ino in linked:
                    continue
                linked.add(st.st_ino)
            value = charge(st)
            self._note(st, value)
            size += value
            inodes += 1
        self.book(size, inodes)


def _entries(directory: RealDir) -> Iterator[tuple[str, os.stat_result]]:
    fd = _open_list(directory)
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                yield entry.name, entry.stat(follow_symlinks=False)
    finally:
        os.close(fd)


def _open_list(directory: RealDir) -> int:
    """Also a directory that its owner has closed to himself."""
    try:
        return directory.open_list()
    except PermissionError:
        fd = directory.at()
        mode = stat.S_IMODE(os.stat(fd).st_mode)
        sc.chmod_fd(fd, mode | stat.S_IRWXU)
        try:
            return directory.open_list()
        finally:
            sc.chmod_fd(fd, mode)


class Room:
    """What an operation has taken in advance; given back at its end, when all is booked."""

    __slots__ = ("_held", "_inodes", "_ledger", "_outer", "_size")

    def __init__(self, ledger: Ledger | None, size: int, inodes: int) -> None:
        self._ledger = ledger
        self._size = size
        self._inodes = inodes
        self._held = False
        self._outer = False

    def __enter__(self) -> Room:
        ledger = self._ledger
        if ledger is not None and not ledger._in_room:  # noqa: SLF001 - one thing in two classes
            ledger.take(self._size, self._inodes)
            ledger._in_room = self._held = self._outer = True  # noqa: SLF001
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._outer and self._ledger is not None:
            self._ledger._in_room = self._outer = False  # noqa: SLF001
            self.release()

    def keep(self) -> Room:
        """What was taken, for somebody who goes on after the operation and releases it then."""
        kept = Room(self._ledger, self._size, self._inodes)
        kept._held, self._held = self._held, False
        return kept

    def release(self) -> None:
        """Give back, once."""
        if self._held and self._ledger is not None:
            self._held = False
            self._ledger.book(-self._size, -self._inodes)


#: For mounts without a limit, and for operations that need nothing.
NO_ROOM: Final = Room(None, 0, 0)


# --- writing --------------------------------------------------------------------------------------


class Account:
    """A file of the upper while it is open for writing: size, and what is booked for it.

    A dense file, all of whose blocks are booked, needs no system call to tell what a write adds:
    overwriting adds nothing, appending adds blocks. For others the holes are looked up before
    the write and the blocks counted after it.
    """

    __slots__ = ("_ledger", "booked", "lock", "size", "users")

    def __init__(self, ledger: Ledger, size: int, booked: int) -> None:
        self._ledger = ledger
        self.size = size
        self.booked = booked
        self.users = 0
        self.lock = threading.RLock()

    def settle(self, st: os.stat_result, taken: int = 0) -> None:
        """Book what *st* says; *taken* of it are counted already."""
        with self.lock:
            value = charge(st)
            self._ledger.book(value - self.booked - taken)
            self.booked = value
            self.size = st.st_size

    def write(self, fd: int, offset: int, data: bytes | memoryview, *, whole: bool = False) -> int:
        """Write as much as the limit allows; EDQUOT when that is nothing.

        Like ext4 and XFS: the blocks that are left are filled, which makes a short write, and
        the next write fails. *whole*: all or nothing.
        """
        end = offset + len(data)
        with self.lock:
            top = round_up(self.size)
            dense = self.booked >= top and offset <= top
            if dense and end <= top:
                done = write_whole(fd, data, offset)
                self.size = max(self.size, offset + done)
                return done
            if dense:
                missing = [(top, round_up(end))]
            else:
                missing = holes(fd, offset & -BLOCK, round_up(end), self.size)
            need = sum(stop - start for start, stop in missing)
            taken = self._ledger.take_up_to(need)
            if taken < need and whole:
                self._ledger.book(-taken)
                raise _refuse()
            if taken < need:
                return self._write_part(fd, offset, data, missing, taken)
            done = 0
            try:
                done = write_whole(fd, data, offset)
            finally:
                if dense and offset + done == end:
                    self.size = end
                    self.booked += taken
                else:
                    self.settle(os.fstat(fd), taken)
            return done

    def allocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2): the blocks that a file may be charged for have to be free before.

        Those beyond its size are not charged, so with FALLOC_FL_KEEP_SIZE nothing is needed.
        """
        end = self.size if mode & _FALLOC_FL_KEEP_SIZE else max(self.size, offset + length)
        with self.lock:
            need = max(0, round_up(end) - self.booked)
            self._ledger.take(need)
            try:
                sc.fallocate(fd, mode, offset, length)
            finally:
                self.settle(os.fstat(fd), need)

    def _write_part(
        self,
        fd: int,
        offset: int,
        data: bytes | memoryview,
        missing: Sequence[tuple[int, int]],
        taken: int,
    ) -> int:
        """Only *taken* bytes of the *missing* ones may be filled."""
        view = memoryview(data)
        end = offset + len(view)
        allowed = _without(missing, taken, offset, end)
        try:
            if _may_be_mapped(offset, end, self.size):
                for start, stop in allowed:
                    write_whole(fd, view[start - offset : stop - offset], start)
                raise _refuse()
            if not allowed or allowed[0][0] != offset:
                raise _refuse()
            return write_whole(fd, view[: allowed[0][1] - offset], offset)
        finally:
            self.settle(os.fstat(fd), taken)


def _may_be_mapped(offset: int, end: int, size: int) -> bool:
    """Whether a write may come from a memory map.

    The kernel takes a short answer to those for a complete one (fuse_writepage_end()), and the
    rest would be lost without a word: what fits is written, and the answer is the error.
    """
    return offset % BLOCK == 0 and end <= size and (end % BLOCK == 0 or end == size)


def _without(
    missing: Sequence[tuple[int, int]], budget: int, offset: int, end: int
) -> list[tuple[int, int]]:
    """The parts of a write from *offset* to *end* that fill *budget* bytes of *missing* at most."""
    allowed: list[tuple[int, int]] = []
    here = offset
    for start, stop in missing:
        spent = min(budget, stop - start)
        budget -= spent
        if spent == stop - start:
            continue
        if start + spent > here:
            allowed.append((here, start + spent))
        here = max(here, stop)
    if here < end:
        allowed.append((here, end))
    return allowed


def holes(fd: int, start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Ranges between *start* and *stop* (whole blocks) without data, in a file of *size* bytes."""
    found: list[tuple[int, int]] = []
    here = start
    while here < stop:
        try:
            data = min(stop, os.lseek(fd, here, os.SEEK_DATA))
        except OSError:
            data = stop  # ENXIO: nothing but a hole up to the end
        if data > here:
            found.append((here, data))
        if data == stop:
            break
        here = os.lseek(fd, data, os.SEEK_HOLE)
        if here >= size:
            here = round_up(here)
    return found

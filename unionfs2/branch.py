"""One directory tree of a mount: its root, its device, and its directories as descriptors.

A ``RealDir`` is one real directory of one branch. It knows its parent and its name, so its
descriptor can be closed at any time between two operations and opened again later; paths are
never built, so their length has no limit and a renamed directory stays reachable.

Invariant: a descriptor returned by ``RealDir.at()`` stays open until the next ``FdCache.trim()``,
which only runs between operations.
Invariant: every RealDir of an upper branch follows its directory through renames (``move``).
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from . import syscalls as sc

# Ancestors that stay open when a directory is reached again from far above; the others are only
# passed through, so that any depth can be reached with few descriptors.
_KEPT_OPEN = 32
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: How a directory of an untouched branch is opened by name to be listed.
DIR_TO_LIST = _LIST | os.O_NOFOLLOW


class FdCache:
    """Bounded set of open directory descriptors with second-chance eviction."""

    __slots__ = ("_open", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: OrderedDict[RealDir, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def has_room(self) -> bool:
        return len(self._open) < self.limit

    def add(self, directory: RealDir) -> None:
        self._open[directory] = None

    def drop(self, directory: RealDir) -> None:
        """Close *directory*'s descriptor; it opens again when it is next needed."""
        if directory.fd >= 0 and self._open.pop(directory, directory) is None:
            os.close(directory.fd)
            directory.fd = -1

    def trim(self) -> None:
        """Close what was not used lately. needs: no operation in progress."""
        excess = len(self._open) - self.limit
        if excess <= 0:
            return
        budget = len(self._open)  # give each entry one second chance at most
        while excess > 0 and self._open:
            directory, _ = self._open.popitem(last=False)
            if directory.used and budget > 0:
                directory.used = False
                budget -= 1
                self._open[directory] = None
                continue
            os.close(directory.fd)
            directory.fd = -1
            excess -= 1

    def close_all(self) -> None:
        while self._open:
            directory, _ = self._open.popitem()
            os.close(directory.fd)
            directory.fd = -1


class Identity(NamedTuple):
    """What handles of a file system need: its UUID, a descriptor for open_by_handle_at(2)."""

    uuid: bytes | None
    handle_fd: int  # -1: handles cannot be decoded here

    @classmethod
    def of(cls, root_fd: int) -> Identity:
        """Ask the file system of *root_fd*; whether decoding works is tried, not guessed."""
        fd = sc.reopen(root_fd, os.O_RDONLY | os.O_DIRECTORY)
        uuid = sc.fs_uuid(fd)
        try:
            handle = sc.name_to_handle(b"", fd)
            os.close(sc.open_by_handle(fd, handle, os.O_PATH))
        except OSError:
            os.close(fd)
            return cls(uuid, -1)
        return cls(uuid, fd)


class Branch:
    """One tree of the stack. ``index`` is 0 for the upper, 1.. for lowers from the top."""

    __slots__ = (
        "cache",
        "dev",
        "fs_index",
        "identity",
        "index",
        "open_dir",
        "path",
        "private",
        "read_flags",
        "root",
        "root_fd",
        "untouched",
        "xwhiteouts",
    )

    def __init__(
        self, index: int, path: bytes, root_fd: int, cache: FdCache, *, private: bool
    ) -> None:
        self.index = index
        self.path = path
        self.root_fd = root_fd
        self.cache = cache
        self.private = private
        # Whether reading changes no access time, because the clone is read-only.
        self.untouched = False
        # Whether a directory marked opaque=x was met in here; listings then look for the
        # attribute form in every directory of this layer that merges with a marked one.
        self.xwhiteouts = False
        # A private clone has nothing mounted below it; a shared tree may, and is not entered.
        self.open_dir: Callable[[bytes, int], int] = sc.open_dir if private else sc.open_dir_no_xdev
        self.dev = os.stat(root_fd).st_dev
        self.fs_index = 0
        self.identity = Identity(None, -1)
        # Reading a lower object must not change its atime; a private clone is noatime as a whole.
        self.read_flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        self.root = RealDir(self, None, b"")
        self.root.fd = root_fd

    @property
    def reads_freely(self) -> bool:
        """Whether reading may be seen from access times: in the upper, or because it never is."""
        return self.index == 0 or self.untouched

    def close(self) -> None:
        if self.root_fd >= 0:
            os.close(self.root_fd)
        self.root_fd = self.root.fd = -1

    def open_names(self, name: bytes, dir_fd: int) -> int:
        """A descriptor of directory *name* that can be listed; a symlink is ENOTDIR or ELOOP."""
        if self.untouched:
            return os.open(name, DIR_TO_LIST, dir_fd=dir_fd)
        fd = self.open_dir(name, dir_fd)
        try:
            return self.open_self(fd)
        finally:
            os.close(fd)

    def open_self(self, fd: int) -> int:
        """Another descriptor of directory *fd* that can be listed, leaving its atime alone."""
        if self.reads_freely:
            return os.open(b".", _LIST, dir_fd=fd)
        try:
            return os.open(b".", _LIST | os.O_NOATIME, dir_fd=fd)
        except PermissionError:
            # O_NOATIME is for the owner only (open(2)).
            return os.open(b".", _LIST, dir_fd=fd)

    def open_file(self, name: bytes, dir_fd: int, flags: int = os.O_RDONLY) -> int:
        """Open an object of this branch for reading, leaving its atime alone if a lower."""
        if self.reads_freely:
            return os.open(name, self.read_flags | flags, dir_fd=dir_fd)
        try:
            return os.open(name, self.read_flags | flags | os.O_NOATIME, dir_fd=dir_fd)
        except PermissionError:
            # O_NOATIME is for the owner only (open(2)).
            return os.open(name, self.read_flags | flags, dir_fd=dir_fd)


class RealDir:
    """A real directory: branch, parent and name; hashable by identity."""

    __slots__ = ("branch", "fd", "name", "parent", "used")

    def __init__(self, branch: Branch, parent: RealDir | None, name: bytes) -> None:
        self.branch = branch
        self.parent = parent
        self.name = name
        self.fd = -1
        self.used = False

    def at(self) -> int:
        """Descriptor (O_PATH, or one that can be listed) of this directory, for this operation."""
        fd = self.fd
        if fd >= 0:
            self.used = True
            return fd
        return self._open(_KEPT_OPEN)

    def lend(self) -> tuple[int, bool]:
        """(descriptor, whether the caller has to close it): for loops over many directories.

        However many are asked, no more descriptors stay open than the cache has room for.
        """
        if self.fd >= 0 or self.branch.cache.has_room:
            return self.at(), False
        return self._open(0), True

    def stat_of(self, name: bytes) -> os.stat_result | None:
        """stat of *name* in here, None when it does not exist; see lend()."""
        fd, lent = self.lend()
        try:
            return sc.lstat_or_none(name, fd)
        finally:
            if lent:
                os.close(fd)

    def _open(self, kept: int) -> int:
        # Opened from the nearest open ancestor downwards, without recursion: depth has no limit.
        missing = []
        here: RealDir = self
        while here.fd < 0:
            missing.append(here)
            if here.parent is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), here.name)
            here = here.parent
        branch = self.branch
        fd = here.fd
        while missing:
            directory = missing.pop()
            try:
                opened = branch.open_dir(directory.name, fd)
            finally:
                if fd != here.fd:
                    os.close(fd)
            fd = opened
            if len(missing) < kept:
                directory.adopt(fd)
                here = directory
        return fd

    def adopt(self, fd: int) -> None:
        """Keep *fd*, a descriptor of this directory, which has none."""
        self.fd = fd
        self.used = True
        self.branch.cache.add(self)

    def child(self, name: bytes) -> RealDir:
        return RealDir(self.branch, self, name)

    def move(self, parent: RealDir, name: bytes) -> None:
        """Follow the directory to its new place after a rename."""
        self.parent = parent
        self.name = name

    def release(self) -> None:
        """Close the descriptor if this is not a root."""
        if self.parent is not None:
            self.branch.cache.drop(self)

    def open_list(self) -> int:
        """A descriptor that can be listed, fsynced or asked for flags (not O_PATH)."""
        branch = self.branch
        if self.fd >= 0 or self.parent is None or branch.index == 0:
            return branch.open_self(self.at())
        return self.parent.open_names(self.name)

    def open_names(self, name: bytes) -> int:
        """A descriptor that can be listed of directory *name* in this one; follows no symlink."""
        fd, lent = self.lend()
        try:
            return self.branch.open_names(name, fd)
        finally:
            if lent:
                os.close(fd)

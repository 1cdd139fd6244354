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


class FdCache:
    """Bounded set of open directory descriptors with second-chance eviction."""

    __slots__ = ("_open", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: OrderedDict[RealDir, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

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

    def close(self) -> None:
        if self.root_fd >= 0:
            os.close(self.root_fd)
        self.root_fd = self.root.fd = -1

    def open_file(self, name: bytes, dir_fd: int, flags: int = os.O_RDONLY) -> int:
        """Open an object of this branch for reading, leaving its atime alone if a lower."""
        if self.index == 0 or self.untouched:
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
        """Descriptor (O_PATH) of this directory, for the current operation."""
        fd = self.fd
        if fd >= 0:
            self.used = True
            return fd
        return self._open()

    def _open(self) -> int:
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
            if len(missing) < _KEPT_OPEN:
                directory.fd = fd
                directory.used = True
                branch.cache.add(directory)
                here = directory
        return self.fd

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
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        if self.branch.index == 0 or self.branch.untouched:
            return os.open(b".", flags, dir_fd=self.at())
        try:
            return os.open(b".", flags | os.O_NOATIME, dir_fd=self.at())
        except PermissionError:
            return os.open(b".", flags, dir_fd=self.at())

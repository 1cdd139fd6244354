"""Open files and listings.

A file handle owns one descriptor of a real file. When the file is copied up, handles that were
opened on the lower file are moved to the upper one in place (dup2), so that a reader that opened
before sees what is written afterwards, as on the kernel's overlay since 4.19.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import syscalls as sc

if TYPE_CHECKING:
    from .model import Entry
    from .nodes import Dir, Node
    from .quota import Account


def write_whole(fd: int, data: bytes | memoryview, offset: int) -> int:
    """All of *data*, or an error; what was written before an error counts."""
    done = sc.pwrite(fd, data, offset)
    if done == len(data):
        return done
    view = memoryview(data)
    while done < len(data):
        try:
            more = sc.pwrite(fd, view[done:], offset + done)
        except OSError:
            break
        if not more:
            break
        done += more
    return done


def write_or_fail(fd: int, data: bytes | memoryview, offset: int) -> int:
    """All of *data*, or an error whatever was written before it.

    For what the kernel writes back from its cache: it takes a short answer for a complete one
    (fuse_writepage_end()), and the rest would be lost without a word.
    """
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += sc.pwrite(fd, view[done:], offset + done)
    return done


class FileHandle:
    """``fd`` is the handle's number towards the door, too: unique while it is open."""

    __slots__ = ("account", "fd", "flags", "in_upper", "node")

    def __init__(self, fd: int, node: Node, flags: int, *, in_upper: bool) -> None:
        self.fd = fd
        self.node = node
        self.flags = flags  # as the caller gave them to open(2)
        self.in_upper = in_upper
        self.account: Account | None = None  # of a file that is open for writing, with a limit

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def sync(self) -> bool:
        """Whether each write has to reach the disk."""
        return bool(self.flags & (os.O_SYNC | os.O_DSYNC))

    def replace(self, new_fd: int) -> None:
        """Point the handle at another open file; consumes *new_fd*."""
        os.dup2(new_fd, self.fd, inheritable=False)
        os.close(new_fd)
        self.in_upper = True


class DirHandle:
    """A listing in progress: the names are taken once, at the first read and after a rewind."""

    __slots__ = ("entries", "id", "node")

    def __init__(self, handle_id: int, node: Dir) -> None:
        self.id = handle_id
        self.node = node
        self.entries: list[Entry] | None = None

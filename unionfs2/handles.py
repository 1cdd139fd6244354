"""Open files and listings.

A file handle owns one descriptor of a real file. When the file is copied up, handles that were
opened on the lower file are moved to the upper one in place (dup2), so that a reader that opened
before sees what is written afterwards, as on the kernel's overlay since 4.19.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import Entry
    from .nodes import Dir, Node


class FileHandle:
    """``fd`` is the handle's number towards the door, too: unique while it is open."""

    __slots__ = ("fd", "in_upper", "node", "sync", "writable")

    def __init__(self, fd: int, node: Node, *, in_upper: bool, writable: bool, sync: bool) -> None:
        self.fd = fd
        self.node = node
        self.in_upper = in_upper
        self.writable = writable
        self.sync = sync

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

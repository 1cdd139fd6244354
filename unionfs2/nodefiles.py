"""Data of files by node, for a door whose opens send no message.

Such a door knows neither when a file is opened nor when it is closed, and reads and writes name the
node. Descriptors are kept for the few files in use, opened when needed and closed when others need
the room; nothing is lost with them, so there is no state that a handle would have to hold.

Invariant: a descriptor that is given out is of the object that the node has now (``low``).
Invariant: a descriptor with users is not closed.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict

from . import attrs
from .branch import RealDir
from .nodes import Node
from .stack import Stack

#: What is written to is opened so.
OPEN_FLAGS = os.O_RDWR | os.O_NOATIME
_OWNER_RW = stat.S_IRUSR | stat.S_IWUSR


class NodeFile:
    """An open descriptor of the data of one node."""

    __slots__ = ("closing", "fd", "low", "users", "writable")

    def __init__(self, fd: int, low: RealDir | None, *, writable: bool) -> None:
        self.fd = fd
        self.low = low
        self.writable = writable
        self.users = 0  # who works with the descriptor outside the lock of the core
        self.closing = False


class NodeFiles:
    """The descriptors of one mount; for the thread that holds the core.

    A node may have two: one to read from, and one that is written to and leaves the access time
    alone. Where access times are not kept the second serves both.
    """

    def __init__(self, stack: Stack, limit: int) -> None:
        self._stack = stack
        self._limit = limit
        self._keeps_atime = stack.policy.keeps_atime
        self._read: OrderedDict[Node, NodeFile] = OrderedDict()
        self._written: OrderedDict[Node, NodeFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._read) + len(self._written)

    def reading(self, node: Node) -> NodeFile:
        """A descriptor to read from, which counts as access. OSError of open(2)."""
        found = self._read.get(node)
        if found is not None and found.low is node.low:
            return found
        if not self._keeps_atime:
            found = self._written.get(node)
            if found is not None:
                return found
        return self._keep(self._read, node, os.O_RDONLY)

    def writing(self, node: Node) -> NodeFile:
        """A descriptor to write to. needs: *node* is in the upper."""
        found = self._written.get(node)
        if found is not None:
            return found
        return self._keep(self._written, node, OPEN_FLAGS)

    def open_quietly(self, node: Node) -> int:
        """A descriptor of the caller's own, reading from which is no access."""
        return self._open_object(node, os.O_RDONLY | os.O_NOATIME)

    def adopt(self, node: Node, fd: int) -> NodeFile:
        """Keep *fd*, opened with OPEN_FLAGS, of an object just made."""
        return self._add(self._written, node, NodeFile(fd, node.low, writable=True))

    def drop(self, node: Node) -> None:
        """Close what is open of a node that goes, or whose object has changed."""
        for files in (self._read, self._written):
            found = files.pop(node, None)
            if found is not None:
                self._close(found)

    def hand_over(self, node: Node) -> int:
        """A descriptor of *node* that is open and that nobody works with, or -1.

        For one that loses its name and is kept by a descriptor from then on.
        """
        for files in (self._written, self._read):
            found = files.get(node)
            if found is not None and not found.users and found.low is node.low:
                del files[node]
                return found.fd
        return -1

    def use(self, file: NodeFile) -> NodeFile:
        """Keep *file* open until done(), whatever happens to the node."""
        file.users += 1
        return file

    def done(self, file: NodeFile) -> None:
        file.users -= 1
        if file.closing:
            self._close(file)

    def close(self) -> None:
        """Close everything; nobody works with any descriptor any more."""
        for files in (self._read, self._written):
            while files:
                os.close(files.popitem()[1].fd)

    def _keep(self, files: OrderedDict[Node, NodeFile], node: Node, flags: int) -> NodeFile:
        found = files.pop(node, None)
        if found is not None:
            self._close(found)
        fd = self._open_object(node, flags)
        return self._add(files, node, NodeFile(fd, node.low, writable=flags == OPEN_FLAGS))

    def _add(self, files: OrderedDict[Node, NodeFile], node: Node, file: NodeFile) -> NodeFile:
        files[node] = file
        if len(files) > self._limit:
            self._close(files.popitem(last=False)[1])
        return file

    @staticmethod
    def _close(file: NodeFile) -> None:
        if file.users:
            file.closing = True
        else:
            os.close(file.fd)

    def _open_object(self, node: Node, flags: int) -> int:
        stack = self._stack
        try:
            return attrs.open_object(stack, node, flags)
        except PermissionError:
            if stack.policy.overrides_modes or not node.in_upper:
                raise
        # The kernel has let somebody open the file, perhaps with a mode that it does not have any
        # more. A server without CAP_DAC_OVERRIDE lends itself the right, as for directories.
        mode = stat.S_IMODE(stack.stat(node).st_mode)
        attrs.change_mode(stack, node, mode | _OWNER_RW)
        try:
            return attrs.open_object(stack, node, flags)
        finally:
            attrs.change_mode(stack, node, mode)

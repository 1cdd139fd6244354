"""Open files that the kernel reads and writes by itself (FUSE_PASSTHROUGH, Linux 6.9).

An answer to OPEN names a backing file, and no READ or WRITE of it comes here any more. All opens
of one inode have to agree while any is open (fs/fuse/iomode.c): the first one decides.

Invariant: a file is passed on only where its data stays: in the upper, or below a mount without
one. A reader of a lower file has to see what is written after a copy-up, and would not.
"""

from __future__ import annotations

import fcntl
import struct
from typing import TYPE_CHECKING

from unionfs2.logger import Log

from . import abi

if TYPE_CHECKING:
    from unionfs2.handles import FileHandle
    from unionfs2.nodes import Node

    from .device import Device

_log = Log(__name__)


class Passthrough:
    """The backing files of one connection."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._ids: dict[Node, int] = {}
        self._handles: set[int] = set()
        self.enabled = False

    def opened(self, handle: FileHandle, *, stays: bool) -> int:
        """The id to answer the open of *handle* with; 0 when it is not passed on."""
        node = handle.node
        if not self.enabled or handle.account is not None:
            return 0
        backing = self._ids.get(node, 0)
        if not backing and stays and node.handles == [handle]:
            backing = self._register(handle.fd)
            if backing:
                self._ids[node] = backing
        if backing:
            self._handles.add(handle.fd)
        return backing

    def released(self, handle: FileHandle) -> None:
        """*handle* is about to be closed."""
        if handle.fd not in self._handles:
            return
        self._handles.discard(handle.fd)
        node = handle.node
        if not any(other.fd in self._handles for other in node.handles or ()):
            backing = self._ids.pop(node)
            try:
                fcntl.ioctl(self._device.fd, abi.DEV_IOC_BACKING_CLOSE, struct.pack("=I", backing))
            except OSError as exc:
                _log.warning("backing file %d is not closed: %s", backing, exc)

    def _register(self, fd: int) -> int:
        """An id for the open file *fd*; 0 where the kernel does not take it, for good."""
        try:
            request = bytearray(abi.BACKING_MAP.pack(fd, 0))  # mutable: the id is returned
            code: int = fcntl.ioctl(self._device.fd, abi.DEV_IOC_BACKING_OPEN, request, True)
            return code
        except OSError as exc:
            self.enabled = False
            _log.warning("passthrough is not possible here: %s", exc)
            return 0

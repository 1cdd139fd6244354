"""Answers to large reads without a copy of ours: file -> pipe -> device (splice(2)).

The kernel then copies from the page cache of the layer into that of the mount, and nothing passes
through the server's memory, which for 1 MiB is larger than the processor's caches.

Invariant: after each call the pipe is empty, or it has been closed.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Final

from unionfs2 import syscalls as sc

from . import abi

if TYPE_CHECKING:
    from .device import Device

_PIPE_SIZE: Final = 1 << 20
#: One page of the pipe is for the header.
DATA_MAX: Final = _PIPE_SIZE - abi.PAGE
#: Below it copying is quicker than three more system calls.
DATA_MIN: Final = 64 << 10


class Splicer:
    """The pipe of one reading thread; made when it is first needed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._ends: tuple[int, int] | None = None
        self._usable = hasattr(os, "splice")

    def close(self) -> None:
        if self._ends is not None:
            for end in self._ends:
                os.close(end)
            self._ends = None

    def answer(self, unique: int, fd: int, offset: int, size: int) -> bool:
        """Answer READ *unique* from the page cache of *fd*; False when it has to be copied.

        Nothing was sent then. OSError of the device: the request is gone.
        """
        aligned = offset >= 0 and not offset % abi.PAGE
        if not aligned or not DATA_MIN <= size <= DATA_MAX or not self._usable:
            return False
        size = min(size, os.fstat(fd).st_size - offset)
        if size < DATA_MIN or not sc.is_cached(fd, offset, size):
            return False
        if self._ends is None and not self._open():
            return False
        assert self._ends is not None
        out, into = self._ends
        total = abi.OUT_HEADER.size + size
        try:
            os.write(into, abi.OUT_HEADER.pack(total, 0, unique))
            done = 0
            while done < size:
                moved = os.splice(fd, into, size - done, offset_src=offset + done)
                if not moved:
                    self.close()  # shorter than it was a moment ago
                    return False
                done += moved
        except OSError:
            self.close()
            self._usable = False
            return False
        try:
            self._device.splice(out, total)
        except OSError:
            self.close()
            raise
        return True

    def _open(self) -> bool:
        ends = os.pipe2(os.O_CLOEXEC)
        try:
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:  # the user has too many pipes already
            for end in ends:
                os.close(end)
            self._usable = False
            return False
        self._ends = ends
        return True

"""What is worth a thread of its own: the same rules for every door.

A metadata call takes microseconds and is done at once. Data copies, fsync and reads from a cold
disk take long and leave the thread that answers requests.
"""

from __future__ import annotations

import os
from mmap import mmap
from typing import Final

#: Copies up to this size without fsync are cheaper at once than a thread switch.
INLINE_COPY: Final = 64 << 10
#: Reads up to this size may wait for an idle disk at once.
INLINE_READ: Final = 128 << 10
#: Writes from this size on overlap with other requests in a thread.
THREAD_WRITE: Final = 256 << 10


def copy_is_short(size: int, *, volatile: bool) -> bool:
    """Whether a copy-up of *size* bytes is done at once; with an fsync it never is."""
    return size <= INLINE_COPY and volatile


def read_cached(fd: int, buffer: bytearray | mmap, offset: int, size: int) -> memoryview | None:
    """What the page cache holds, without waiting; None when the disk has to be asked.

    A result shorter than *size* ends the file or the cached part; the caller tells which.
    EOPNOTSUPP on file systems in memory, which never wait.
    """
    view = memoryview(buffer)[:size]
    try:
        done = os.preadv(fd, (view,), offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    return view[:done]


def read_whole(fd: int, offset: int, size: int) -> bytes:
    """pread that ends short only at the end of the file."""
    data = os.pread(fd, size, offset)
    while data and len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data

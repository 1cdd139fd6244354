"""The descriptor of /dev/fuse: the next message in, answers and notifications out.

Rules that hold here:

* One thread reads. Whoever has an answer writes it; a write is one system call and complete.
* Waking a sleeping process costs more than most requests, so the reader looks again for a moment
  before it sleeps, while requests follow each other closely.
* Messages are read into memory that could be shared with another process (memfd), in buffers that
  can be taken away by a request that goes on elsewhere.

Invariant: nobody looks again on a machine with one processor, with a limit of 0, or when it did
not pay lately.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import time
from typing import Final

from . import abi
from .codec import Reply

#: How long to look again, in microseconds, unless the mount says otherwise.
BUSY_POLL_US: Final = 50
_MISSES_MAX: Final = 3
_CLOSE_BY_NS: Final = 150_000
_ENDED: Final = (errno.ENODEV, errno.ECONNABORTED, errno.EBADF)


class Ended(Exception):  # noqa: N818 - not an error
    """The connection is gone: unmounted, aborted, or told to end."""


def new_buffer(size: int) -> mmap.mmap:
    """Memory for one message, which another process could map as well."""
    fd = os.memfd_create("unionfs2-request", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


class Device:
    """One connection. ``buffer`` holds the message that next() has read."""

    def __init__(self, fd: int, *, busy_poll_us: int | None = None) -> None:
        self.fd = fd
        os.set_blocking(fd, False)
        self._size = abi.BUFFER_MIN
        self._spare: list[mmap.mmap] = []
        self.buffer = new_buffer(self._size)
        self._into = [self.buffer]
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._wake_end, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._wake_end, select.POLLIN)
        limit_us = BUSY_POLL_US if busy_poll_us is None else busy_poll_us
        self._spin_ns = limit_us * 1000 if len(os.sched_getaffinity(0)) > 1 else 0
        self._misses = 0
        self._ending = False

    def close(self) -> None:
        for fd in (self.fd, self._wake_end, self._wake):
            os.close(fd)
        self.fd = -1

    def widen(self, transfer: int) -> None:
        """From now on a message may carry *transfer* bytes of data."""
        self._size = transfer + abi.HEADER_ROOM
        self._spare.clear()
        self._use(new_buffer(self._size))

    def _use(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self._into = [buffer]

    def take_buffer(self) -> mmap.mmap:
        """The buffer of the current message, for a request that goes on in another thread."""
        taken = self.buffer
        self._use(self._spare.pop() if self._spare else new_buffer(self._size))
        return taken

    def give_back(self, buffer: mmap.mmap) -> None:
        """A buffer that was taken is free again."""
        if len(buffer) == self._size and len(self._spare) < 2:
            self._spare.append(buffer)

    def end(self) -> None:
        """Have next() raise Ended, from any thread or a signal handler."""
        self._ending = True
        try:
            os.write(self._wake, b"x")
        except OSError:
            pass  # it is full, or closed: either will do

    # --- in ----------------------------------------------------------------------------------

    def next(self) -> int:
        """Wait for a message and read it into ``buffer``; its length. Raises Ended."""
        while not self._ending:
            try:
                return os.readv(self.fd, self._into)
            except BlockingIOError:
                pass
            except OSError as exc:
                _check_reading(exc)
                continue
            length = self._look_again()
            if length:
                return length
            self._sleep()
        raise Ended

    def _look_again(self) -> int:
        if not self._spin_ns or self._misses >= _MISSES_MAX:
            return 0
        readv, fd, into = os.readv, self.fd, self._into
        clock = time.perf_counter_ns
        end = clock() + self._spin_ns
        while clock() < end:
            try:
                length = readv(fd, into)
            except BlockingIOError:
                continue
            except OSError as exc:
                _check_reading(exc)
                continue
            self._misses = 0
            return length
        self._misses += 1
        return 0

    def _sleep(self) -> None:
        before = time.perf_counter_ns()
        self._poll.poll()
        if time.perf_counter_ns() - before < _CLOSE_BY_NS:
            self._misses = 0

    # --- out ---------------------------------------------------------------------------------

    def answer(self, reply: Reply) -> None:
        """Send an answer. What nobody waits for any more is dropped."""
        try:
            if isinstance(reply, list):
                os.writev(self.fd, reply)
            else:
                os.write(self.fd, reply)
        except OSError as exc:
            # ENOENT: the request was interrupted, or the mount has gone.
            if exc.errno != errno.ENOENT and exc.errno not in _ENDED:
                raise

    def notify(self, message: bytes) -> bool:
        """Send a notification; False when the kernel does not know the node or the name."""
        try:
            os.write(self.fd, message)
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENOTCONN, *_ENDED):
                return False
            raise
        return True


def _check_reading(exc: OSError) -> None:
    """Go on after a request that was withdrawn before it was read; Ended, or the error itself."""
    if exc.errno in _ENDED:
        raise Ended from None
    if exc.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
        raise exc

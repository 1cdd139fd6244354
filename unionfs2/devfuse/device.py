"""The descriptor of /dev/fuse: the next message in, answers and notifications out.

Rules that hold here:

* One thread reads. Whoever has an answer writes it; a write is one system call and complete.
* Waking a sleeping process costs more than most requests, so the reader looks again for a moment
  before it sleeps, while requests follow each other closely.
* Messages are read into memory that could be shared with another process (memfd), in buffers that
  can be taken away by a request that goes on elsewhere.

Invariant: nobody looks again on a machine with one processor, with a limit of 0, while threads
work, or when it did not pay lately.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import threading
import time
from typing import Final

from unionfs2.logger import Log
from unionfs2.wakeful import Wakeful

from . import abi
from .codec import Reply

#: How long to look again, in microseconds, unless the mount says otherwise.
BUSY_POLL_US: Final = 50
_MISSES_MAX: Final = 3
# Messages for which nobody looks again after so many misses.
_PAUSE_MIN: Final = 64
_PAUSE_MAX: Final = 8192
_ENDED: Final = (errno.ENODEV, errno.ECONNABORTED, errno.EBADF)


_log = Log(__name__)


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


class Patience:
    """Whether it pays to look again before sleeping.

    It does while answers come quickly from another processor. It does not where the client waits
    for this very processor; that is found out by trying, more and more rarely.
    """

    __slots__ = ("_misses", "_pause", "_rest", "limit_ns")

    def __init__(self, limit_us: int) -> None:
        self.limit_ns = limit_us * 1000 if len(os.sched_getaffinity(0)) > 1 else 0
        self._misses = 0
        self._pause = _PAUSE_MIN
        self._rest = 0

    def pays(self) -> bool:
        """Ask before each wait."""
        if self._rest:
            self._rest -= 1
            return False
        return self.limit_ns > 0

    def hit(self) -> None:
        """A message came while we looked."""
        self._misses = 0
        self._pause = _PAUSE_MIN

    def miss(self) -> None:
        """None came."""
        self._misses += 1
        if self._misses >= _MISSES_MAX:
            self._misses = _MISSES_MAX - 1
            self._rest = self._pause
            self._pause = min(self._pause * 2, _PAUSE_MAX)


class Device:
    """One connection. ``buffer`` holds the message that next() has read.

    *in_main_thread*: the reader may block in read(2) itself, one system call less for each
    message, because a signal can get it out; elsewhere it polls, and a pipe wakes it.
    """

    def __init__(
        self,
        fd: int,
        *,
        busy_poll_us: int | None = None,
        wakeful: str = "off",
        in_main_thread: bool = False,
    ) -> None:
        self.fd = fd
        self._blocks = in_main_thread
        os.set_blocking(fd, in_main_thread)
        self._size = abi.BUFFER_MIN
        self._spare: list[mmap.mmap] = []
        self.buffer = new_buffer(self._size)
        self._into = [self.buffer]
        self._look = select.poll()
        self._look.register(fd, select.POLLIN)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._wake_end, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._wake_end, select.POLLIN)
        self._patience = Patience(BUSY_POLL_US if busy_poll_us is None else busy_poll_us)
        self._wakeful = Wakeful(wakeful)
        self._ending = False
        self._reading = False
        self._finishing = threading.Lock()
        self._finished = False

    def finish(self) -> None:
        """Nobody reads any more: end() sends no signal now, which could end the process."""
        with self._finishing:
            self._finished = True

    def close(self) -> None:
        for fd in (self.fd, self._wake_end, self._wake):
            os.close(fd)
        self.fd = -1
        self._wakeful.close()

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
        """Have next() raise Ended, from any thread or a signal handler.

        A reader that blocks in the main thread is interrupted: from a signal handler at once,
        else by the signal whose handler comes here again.
        """
        self._ending = True
        if not self._blocks:
            try:
                os.write(self._wake, b"x")
            except OSError:
                pass  # it is full, or closed: either will do
        elif threading.current_thread() is not threading.main_thread():
            with self._finishing:
                if not self._finished:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        elif self._reading:
            raise Ended

    # --- in ----------------------------------------------------------------------------------

    def next(self, *, patient: bool = True) -> int:
        """Wait for a message and read it into ``buffer``; its length. Raises Ended.

        *patient*: look again for a moment before sleeping, unless waking costs little now.
        """
        wakeful = self._wakeful
        wakeful.request()
        while True:
            looked = patient and not wakeful.held and self._patience.pays() and self._comes()
            if not looked and not self._blocks:
                self._poll.poll()
            self._reading = True  # from here on end() raises in a signal handler
            try:
                if self._ending:
                    raise Ended
                return os.readv(self.fd, self._into)
            except OSError as exc:
                _check_reading(exc)
            finally:
                self._reading = False

    def _comes(self) -> bool:
        """Look for a message again and again for a moment."""
        look, clock = self._look.poll, time.perf_counter_ns
        end = clock() + self._patience.limit_ns
        while clock() < end:
            if look(0):
                self._patience.hit()
                return True
        self._patience.miss()
        return False

    # --- out ---------------------------------------------------------------------------------

    def answer(self, reply: Reply | memoryview) -> None:
        """Send an answer. What nobody waits for any more is dropped.

        Invariant: whoever asked is answered; with EIO where the kernel does not take the answer.
        """
        try:
            if isinstance(reply, list):
                os.writev(self.fd, reply)
            else:
                os.write(self.fd, reply)
        except OSError as exc:
            # ENOENT: the request was interrupted, or the mount has gone.
            if exc.errno == errno.ENOENT or exc.errno in _ENDED:
                return
            head = reply[0] if isinstance(reply, list) else reply
            _, error, unique = abi.OUT_HEADER.unpack_from(head)
            _log.warning("the kernel does not take the answer to request %d: %s", unique, exc)
            if error != -errno.EIO:
                self.answer(abi.OUT_HEADER.pack(abi.OUT_HEADER.size, -errno.EIO, unique))

    def splice(self, pipe: int, total: int) -> None:
        """Send an answer of *total* bytes that waits in *pipe*. OSError: it was not taken."""
        os.splice(pipe, self.fd, total)

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

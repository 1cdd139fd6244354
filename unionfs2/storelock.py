"""Who may change a store, and who works on a layer: flock(2) on freshly opened descriptors.

* The *store lock* is ``.unionfs2/lock``. Shared: the structure (which layers there are, their
  links) stands still. Exclusive: it may be changed. Held for a few system calls, never while
  trees are written, copied or deleted.
* A *layer lock* is the directory of the layer. Whoever mounts, unmounts, fills, commits or
  removes a layer holds it, for as long as that takes.

Descriptors are opened anew each time, so the locks exclude threads as they exclude processes, and
the kernel drops them with their holder. Order: layer locks sorted by id, then the store lock.

The lock file also holds one line, ``generation boot-id state``. Every change counts the generation
up, which is how caches notice. The state is ``busy`` while a change is under way: whoever takes
the lock next and finds it so, or finds another boot, knows that something may be half done.
The line is never synced: after a power cut the boot id differs anyway.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, NamedTuple

from . import ondisk
from . import syscalls as sc
from .closing import Closing
from .errors import LayerInUseError, StoreError, show
from .storemodel import LayerId

_LINE_BYTES: Final = 96
# Errnos of file systems without locks: nobody else has one either.
_NO_LOCKS: Final = frozenset({errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EBADF})


def boot_id() -> bytes:
    """What tells this boot of the machine from all others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read(64).strip()
    except OSError:
        return b"unknown"


def flock(fd: int, operation: int) -> bool:
    """Take or change a lock; False when LOCK_NB was given and somebody else has it."""
    try:
        fcntl.flock(fd, operation)
    except OSError as exc:
        if exc.errno == errno.EWOULDBLOCK:
            return False
        if exc.errno not in _NO_LOCKS:
            raise
    return True


class _Line(NamedTuple):
    generation: int
    boot: bytes
    state: bytes

    @classmethod
    def read(cls, fd: int) -> _Line:
        """The line in the lock file; anything unreadable is busy."""
        words = os.pread(fd, _LINE_BYTES, 0).split()
        if len(words) != 3 or not words[0].isdigit():
            # Not 1, 2, 3: somebody may remember those from before the file was lost.
            return cls(time.time_ns(), b"", ondisk.STORE_LOCK_BUSY)
        return cls(int(words[0]), words[1], words[2])

    def write(self, fd: int) -> None:
        text = b"%d %b %b" % self
        sc.pwrite(fd, text.ljust(_LINE_BYTES - 1) + b"\n", 0)


class StoreLock:
    """The lock of one opened store; ``with lock.shared():`` and ``with lock.exclusive():``.

    Threads of this process queue up at a mutex first: holders of the shared lock that wait for
    the interpreter would otherwise keep an exclusive one out for long.
    """

    def __init__(self, state_fd: int | None, mend: Callable[[], bool]) -> None:
        self._state_fd = state_fd  # None: a read-only store without state, where nothing changes
        self._mend = mend
        self._boot = boot_id()
        self._mutex = threading.Lock()
        self._pid = os.getpid()
        self.read_only = state_fd is None
        # Whether everything was mended that had to be when the lock was taken.
        self._whole = True
        #: Valid while the lock is held.
        self.generation = 0

    def shared(self) -> Held:
        """Hold the structure still."""
        return Held(self, exclusive=False)

    def exclusive(self) -> Held:
        """Hold the structure to change it, after ``begin()``. Mends what a dead process left."""
        return Held(self, exclusive=True)

    def enter(self, *, exclusive: bool) -> int:
        """Take the lock: descriptor of the lock file, -1 where there is none. For Held only."""
        if self._pid != os.getpid():  # forked while another thread held the mutex, perhaps
            self._mutex, self._pid = threading.Lock(), os.getpid()
        self._mutex.acquire()
        try:
            return self._open(exclusive=exclusive)
        except BaseException:
            self._mutex.release()
            raise

    def _open(self, *, exclusive: bool) -> int:
        fd = self._open_file()
        if exclusive and self.read_only:
            if fd >= 0:
                os.close(fd)
            raise StoreError("the store cannot be changed: it is read-only", errno=errno.EROFS)
        if fd < 0:
            return -1
        try:
            flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            line = _Line.read(fd)
            self.generation = line.generation
            self._whole = True
            if not self.read_only and (line.boot, line.state) != (
                self._boot,
                ondisk.STORE_LOCK_IDLE,
            ):
                self._recover(fd, exclusive=exclusive)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open_file(self) -> int:
        if self._state_fd is None:
            return -1
        flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        if not self.read_only:
            try:
                return sc.create_at(ondisk.STORE_LOCK_NAME, flags, 0o600, dir_fd=self._state_fd)
            except OSError as exc:
                if exc.errno not in {errno.EROFS, errno.EACCES, errno.EPERM}:
                    raise
                self.read_only = True
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            return sc.open_at(ondisk.STORE_LOCK_NAME, flags, dir_fd=self._state_fd)
        except FileNotFoundError:
            return -1  # nobody ever changed this store, and we cannot

    def _recover(self, fd: int, *, exclusive: bool) -> None:
        """Mend what was left half done. needs: the lock, in the given form."""
        if not exclusive:
            flock(fd, fcntl.LOCK_EX)  # not atomic; somebody else may have mended meanwhile
            line = _Line.read(fd)
            self.generation = line.generation
            if (line.boot, line.state) == (self._boot, ondisk.STORE_LOCK_IDLE):
                flock(fd, fcntl.LOCK_SH)
                return
        self.begin(fd)
        self._whole = self._mend()
        self.finish(fd)
        if not exclusive:
            flock(fd, fcntl.LOCK_SH)

    def begin(self, fd: int) -> None:
        """Count the generation up and say that a change is under way. For Held only."""
        self.generation += 1
        _Line(self.generation, self._boot, ondisk.STORE_LOCK_BUSY).write(fd)

    def finish(self, fd: int) -> None:
        """Say that the change is done, if all before it was. For Held only."""
        if not self._whole:
            return
        _Line(self.generation, self._boot, ondisk.STORE_LOCK_IDLE).write(fd)

    def leave(self, fd: int) -> None:
        """Give the lock back. For Held only."""
        try:
            if fd >= 0:
                os.close(fd)
        finally:
            self._mutex.release()


class Held:
    """The store lock for the length of a ``with`` block."""

    __slots__ = ("_begun", "_exclusive", "_fd", "_lock")

    def __init__(self, lock: StoreLock, *, exclusive: bool) -> None:
        self._lock = lock
        self._exclusive = exclusive
        self._begun = False
        self._fd = -1

    def __enter__(self) -> Held:
        self._fd = self._lock.enter(exclusive=self._exclusive)
        self._begun = False
        return self

    def begin(self) -> None:
        """Before the first change of the structure; a block that ends without is no change."""
        assert self._exclusive
        if not self._begun:
            self._begun = True
            self._lock.begin(self._fd)

    def leave_busy(self) -> None:
        """The next holder shall look at everything: something derived was not done."""
        self._begun = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # After a failure the state stays busy: the next holder looks at everything.
            if self._begun and exc is None:
                self._lock.finish(self._fd)
        finally:
            self._lock.leave(self._fd)


class LayerLock(Closing):
    """The lock on one layer: its directory, open and locked. close() gives it back."""

    __slots__ = ("fd", "id")

    def __init__(self, layer: LayerId, fd: int) -> None:
        self.id = layer
        self.fd = fd

    def close(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def lock_layer(
    layer: LayerId, open_directory: Callable[[], int], *, wait: bool = True
) -> LayerLock:
    """Lock the directory that *open_directory* opens, as often as it takes to get the real one.

    While we wait, the layer may be replaced, renamed or removed: then the locked inode is no
    longer the one under the name. Raises what *open_directory* raises, LayerInUseError without
    *wait* when somebody else works on the layer.
    """
    while True:
        fd = open_directory()
        try:
            if not flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
                raise LayerInUseError(
                    f"layer {show(layer)} is being worked on by another process or thread:"
                    " try again later"
                )
            again = open_directory()
            same = os.path.sameopenfile(again, fd)
            os.close(again)
        except BaseException:
            os.close(fd)
            raise
        if same:
            return LayerLock(layer, fd)
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Whether nobody holds the lock on *fd*; then it is held now."""
    return flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

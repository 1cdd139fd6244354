"""What runs inline and what in a thread: the trio side of a door.

The core is called from the one trio thread only. A metadata call takes microseconds and runs
inline; data copies, fsync and reads from a cold disk take long and go to worker threads, which
touch nothing but descriptors. While a file is on its way up, operations on the same file wait,
all others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from . import longwork
from .nodes import Node
from .union import UnionFS

T = TypeVar("T")


class Runner:
    """Long work of one mount."""

    def __init__(self, fs: UnionFS) -> None:
        self._fs = fs
        self._copying: dict[Node, trio.Event] = {}
        # Apart, so that reads do not queue behind disks that are being written to.
        self._readers = trio.CapacityLimiter(16)
        self._writers = trio.CapacityLimiter(16)

    async def thread(self, work: Callable[..., T], *args: object) -> T:
        """Run *work*, which writes or waits for a disk to be written, in a worker thread."""
        return await trio.to_thread.run_sync(work, *args, limiter=self._writers)

    async def read(self, work: Callable[..., T], *args: object) -> T:
        """Run *work*, which reads, in a worker thread."""
        return await trio.to_thread.run_sync(work, *args, limiter=self._readers)

    def is_busy(self) -> bool:
        """Whether any thread works."""
        return bool(self._readers.borrowed_tokens or self._writers.borrowed_tokens)

    def may_wait(self, size: int) -> bool:
        """Whether a read may wait for the disk right here.

        A small one does, when no disk is being written to: one access takes about as long as
        handing it to a thread and back, and a large file is read ahead anyway.
        """
        return (
            size <= longwork.INLINE_READ and not self._copying and not self._writers.borrowed_tokens
        )

    def is_copying(self, node: Node | None) -> bool:
        """Whether somebody has to wait for *node*; cheap, for the common case."""
        return node in self._copying

    async def settled(self, node: Node | None) -> None:
        """Wait until no copy-up of *node* is under way."""
        while node is not None and (busy := self._copying.get(node)) is not None:
            await busy.wait()

    async def bring_up(self, node: Node, limit: int | None = None) -> None:
        """Copy *node* up, data in a thread; returns when it is in the upper.

        Everything that needs no data copied is left to the operation itself. Raises what
        copyup.prepare() and CopyJob raise.
        """
        await self.settled(node)
        if node.in_upper or not node.is_regular:
            return
        job = self._fs.begin_copy_up(node, limit)
        if job is None:
            return
        self._copying[node] = event = trio.Event()
        try:
            if longwork.copy_is_short(job.size, volatile=self._fs.stack.policy.volatile):
                job.run()
            else:
                await self.thread(job.run)
            job.publish()
        finally:
            job.close()
            del self._copying[node]
            event.set()

    def write_blocks(self, size: int, *, sync: bool) -> bool:
        """Whether a write should leave the loop: large, synchronous, or the disk is busy."""
        return sync or size >= longwork.THREAD_WRITE or bool(self._copying)

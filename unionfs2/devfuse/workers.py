"""Threads for what takes long, and the two values with which a handler says that it does.

A handler runs under the lock of the core and is answered at once, unless it returns ``Later`` (go
on in a thread, without the lock, and come back under it) or raises ``Busy`` (start again when a
copy-up that is under way has ended).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unionfs2.nodes import Node

#: Threads of one kind at the most. They mostly wait for disks.
THREADS_MAX = 16
_IDLE_S = 10.0


class Later:
    """``work`` without the lock, ``then`` with its result under it, ``cleanup`` in any case."""

    __slots__ = ("cleanup", "reads", "then", "work")

    def __init__(
        self,
        work: Callable[[], Any],
        then: Callable[[Any], Any],
        *,
        cleanup: Callable[[], None] | None = None,
        reads: bool = False,
    ) -> None:
        self.work = work
        self.then = then
        self.cleanup = cleanup
        self.reads = reads


class Busy(Exception):  # noqa: N818 - a way to wait, not an error
    """The request has to wait for the copy-up of a node."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node


class Workers:
    """A pool that grows when all of its threads are busy, and shrinks when they are not."""

    def __init__(self, name: str, prepare: Callable[[], None], most: int = THREADS_MAX) -> None:
        self._name = name
        self._prepare = prepare
        self._most = most
        self._queue: queue.SimpleQueue[tuple[Callable[..., object], tuple[object, ...]] | None]
        self._queue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._pending = 0  # submitted and not finished

    @property
    def busy(self) -> bool:
        """Whether anything is being worked on, or waits for that."""
        return self._pending > 0

    def submit(self, work: Callable[..., object], *args: object) -> None:
        """Run *work* in a thread; it must not raise."""
        with self._lock:
            self._pending += 1
            grow = self._pending > self._threads and self._threads < self._most
            self._threads += grow
        self._queue.put((work, args))
        if grow:
            threading.Thread(target=self._run, name=f"unionfs2-{self._name}", daemon=True).start()

    def close(self) -> None:
        """Let every thread end as soon as what was submitted is done; nothing is waited for."""
        with self._lock:
            for _ in range(self._threads):
                self._queue.put(None)

    def _run(self) -> None:
        self._prepare()
        while True:
            try:
                job = self._queue.get(timeout=_IDLE_S)
            except queue.Empty:
                job = None
            if job is None:
                with self._lock:
                    if self._pending >= self._threads:
                        continue  # something came just now, counted on this thread
                    self._threads -= 1
                    return
            work, args = job
            try:
                work(*args)
            finally:
                del work, args, job
                with self._lock:
                    self._pending -= 1

"""Taking the next request without a pass through the event loop, when it is there already.

pyfuse3 waits for every request with a lock and ``wait_readable``: one scheduling pass, two
epoll_wait(2) and an epoll_ctl(2) a message, more than the work of most requests. It looks both
names up in its ``trio`` global, which its own asyncio support replaces; here it is replaced by
trio with two names changed:

* ``Lock``: taken without a checkpoint when it is free.
* ``wait_readable``: asks poll(2) first, and for a moment again and again while requests follow
  each other closely, because waking a sleeping process costs more than the request.

Invariant: after ``_STREAK`` requests at most the event loop gets its turn.
Invariant: nobody spins on a machine with one processor, while threads work, or when it did not
pay lately.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import trio

from unionfs2.wakeful import Wakeful

_STREAK: Final = 64
_SPIN_NS: Final = 50_000
_MISSES_MAX: Final = 3


class EagerLock:
    """A lock for tasks of one loop; whoever is running may take it before those who wait."""

    def __init__(self) -> None:
        self._held = False
        self._waiting: deque[trio.lowlevel.Task] = deque()

    async def __aenter__(self) -> None:
        while self._held:
            task = trio.lowlevel.current_task()
            self._waiting.append(task)

            def give_up(_: object, task: trio.lowlevel.Task = task) -> trio.lowlevel.Abort:
                self._waiting.remove(task)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(give_up)
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        if self._waiting:
            trio.lowlevel.reschedule(self._waiting.popleft())


class EagerWait:
    """wait_readable() for the one descriptor of a FUSE session."""

    def __init__(
        self,
        fd: int,
        is_busy: Callable[[], bool],
        spin_ns: int = _SPIN_NS,
        wakeful: Wakeful | None = None,
    ) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        self._poll = poll.poll
        self._is_busy = is_busy
        self._wakeful = wakeful or Wakeful("off")
        self._streak = 0
        self._misses = 0
        self._spin_ns = spin_ns
        self._may_spin = spin_ns > 0 and len(os.sched_getaffinity(0)) > 1

    async def __call__(self, fd: int) -> None:
        self._wakeful.request()
        if self._streak < _STREAK and (self._poll(0) or self._spin()):
            self._streak += 1
            return
        self._streak = 0
        before = time.perf_counter_ns()
        await trio.lowlevel.wait_readable(fd)
        if time.perf_counter_ns() - before < self._spin_ns:
            self._misses = 0

    def _spin(self) -> bool:
        if not self._may_spin or self._wakeful.held:
            return False
        if self._misses >= _MISSES_MAX or self._is_busy():
            return False
        poll = self._poll
        clock = time.perf_counter_ns
        end = clock() + self._spin_ns
        while clock() < end:
            if poll(0):
                self._misses = 0
                return True
        self._misses += 1
        return False


class _Changed:
    """A module with some names changed."""

    def __init__(self, module: Any, **changed: Any) -> None:
        self._module = module
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def trio_for(fd: int, is_busy: Callable[[], bool], busy_poll: int | None, wakeful: Wakeful) -> Any:
    """What pyfuse3 shall use as ``trio`` for the session on *fd*.

    *busy_poll* is how many microseconds to look for a request; None leaves that to this module.
    """
    spin_ns = _SPIN_NS if busy_poll is None else busy_poll * 1000
    lowlevel = _Changed(trio.lowlevel, wait_readable=EagerWait(fd, is_busy, spin_ns, wakeful))
    return _Changed(trio, Lock=EagerLock, lowlevel=lowlevel)

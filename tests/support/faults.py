"""The fault seam: fail the n-th change of a disk, or stop there as a crash would.

Every change goes through a function named in ``unionfs2.syscalls.MUTATORS``, which callers reach
as an attribute of that module; ``inject()`` replaces them for the length of a ``with`` block::

    for n in itertools.count(1):
        with inject(fail_at=n, error=errno.ENOSPC) as faults:
            with contextlib.suppress(OSError):
                action()
        check_old_or_new_state()
        if not faults.fired:
            break                       # the action has fewer than n changes
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

from unionfs2 import syscalls

# Functions for which a failure is an answer, not an exception.
_ANSWERS: Final[dict[str, Any]] = {"clone_data": False}


class Crash(BaseException):
    """The process ends here; nothing catches it, and no later change reaches the disk."""


@dataclass
class Faults:
    """Plan and record: which call fails and how, which calls were made (by name)."""

    fail_at: int
    error: int
    crash: bool
    calls: list[str] = field(default_factory=list)
    fired: bool = False

    def before(self, name: str) -> None:
        """Count a call of *name*; raise instead of letting it happen, when it is the one."""
        self.calls.append(name)
        if len(self.calls) == self.fail_at or (self.crash and self.fired):
            self.fired = True
            if self.crash:
                raise Crash(f"before change {len(self.calls)}: {name}")
            raise OSError(self.error, os.strerror(self.error), f"fault injected into {name}")


def _guarded(faults: Faults, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            faults.before(name)
        except OSError:
            if name in _ANSWERS:
                return _ANSWERS[name]
            raise
        return real(*args, **keywords)

    return call


@contextlib.contextmanager
def inject(*, fail_at: int = 0, error: int = errno.EIO, crash: bool = False) -> Iterator[Faults]:
    """Fail the *fail_at*-th change (counted from 1; 0 only records) inside the block.

    With *crash* that call and every later one raise Crash, so that clean-up code of the caller
    cannot change the disk either: what is there is what a power cut would leave of this process.
    """
    faults = Faults(fail_at, error, crash)
    with contextlib.ExitStack() as stack:
        for name in syscalls.MUTATORS:
            real = getattr(syscalls, name)
            stack.enter_context(mock.patch.object(syscalls, name, _guarded(faults, name, real)))
        yield faults

"""Do something as another user: in a forked child, whose value or exception comes back."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

T = TypeVar("T")

ALICE = 4001
BOB = 4002
TEAM = 4100


def as_caller(
    action: Callable[[], T],
    *,
    uid: int = ALICE,
    gid: int | None = None,
    groups: Sequence[int] = (),
    umask: int = 0o022,
) -> T:
    """Call `action` with the given identity; its OSError is raised here."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _child(action, write_end, uid, uid if gid is None else gid, groups, umask)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    outcome = pickle.loads(answer)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome  # type: ignore[no-any-return]  # it came from `action`


def _child(
    action: Callable[[], T], pipe: int, uid: int, gid: int, groups: Sequence[int], umask: int
) -> NoReturn:
    """Take the identity, act, tell, and leave without running anything of the parent's."""
    outcome: T | BaseException
    try:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        os.umask(umask)
        outcome = action()
    except OSError as exc:
        outcome = OSError(exc.errno, exc.strerror)
    except BaseException:  # noqa: BLE001  # the parent gets it, whatever it is
        outcome = AssertionError(traceback.format_exc())
    try:
        data = pickle.dumps(outcome)
        view = memoryview(data)
        while view:
            view = view[os.write(pipe, view) :]
        sys.stderr.flush()
    finally:
        os._exit(0)

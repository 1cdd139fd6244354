"""A devfuse server in a process of its own; the test may change parts of it first."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import mounts, probe
from unionfs2 import attach
from unionfs2.devfuse.server import Server
from unionfs2.options import MountSpec
from unionfs2.union import UnionFS


def in_child(work: Callable[[], None]) -> int:
    """Run *work* in a forked process, which ends with 0 unless it raises; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(100)  # it must not outlive its test
        logger = logging.getLogger("unionfs2")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the child has nobody else to tell
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextlib.contextmanager
def serving(
    spec: MountSpec, target: Path, change: Callable[[], None] | None = None
) -> Iterator[int]:
    """Mount *spec* on *target*, served by a child in which *change* was called first; its pid.

    At the end it is unmounted, and the server must end by itself with status 0.
    """
    ready, said = os.pipe()

    def serve() -> None:
        os.close(ready)
        if change is not None:
            change()
        with UnionFS.open(spec) as fs:
            fd = attach.attach(spec, os.fsencode(target))
            Server(fs, fd, spec=spec, ready=lambda: tell(said), unmount=None).run()

    pid = in_child(serve)
    os.close(said)
    try:
        with os.fdopen(ready, "rb") as pipe:
            assert pipe.read(1) == b"x", "the server did not come up"
        yield pid
        probe.sys_umount(str(target))
        status, pid = ended(pid), 0
        assert status == 0
    finally:
        mounts.detach(target)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def tell(pipe: int) -> None:
    """Say that it answers."""
    os.write(pipe, b"x")
    os.close(pipe)

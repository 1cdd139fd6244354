"""Several processes on one mount at once."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.workloads.looking import FILES
from bench.workloads.model import Workload
from bench.workloads.trees import NOTHING, SMALL_FILES, small_file

PROCESSES: Final = 4
_CONTENT = b"y" * 8192


def together(part: Callable[[int], None]) -> None:
    """Call `part` with 0 to 3, each in a process of its own. RuntimeError when one fails."""
    running = {_started(part, number) for number in range(PROCESSES)}
    failed = 0
    try:
        while running:
            pid, status = os.waitpid(min(running), 0)
            running.remove(pid)
            failed += status != 0
    finally:
        for pid in running:  # when the wait was interrupted
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if failed:
        raise RuntimeError(f"{failed} of {PROCESSES} processes failed, see above")


def _started(part: Callable[[int], None], number: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        part(number)
        status = 0
    except BaseException:  # noqa: BLE001 - the child must not return into the caller's frames
        traceback.print_exc()
    finally:
        os._exit(status)


def read_together(root: Path, size: int) -> None:
    """Each process opens, reads and closes every fourth small file."""

    def part(number: int) -> None:
        for file in range(number, size, PROCESSES):
            fd = os.open(small_file(root, file), os.O_RDONLY)
            os.read(fd, 8192)
            os.close(fd)

    together(part)


def write_together(root: Path, size: int) -> None:
    """Each process writes its share of new small files into a directory of its own."""

    def part(number: int) -> None:
        place = f"{root}/writer-{number}"
        os.mkdir(place)
        for file in range(number, size, PROCESSES):
            fd = os.open(f"{place}/{file}", os.O_WRONLY | os.O_CREAT, 0o644)
            os.write(fd, _CONTENT)
            os.close(fd)

    together(part)


WORKLOADS = [
    Workload(
        "readers-4", "4 processes read 6,000 of 4 KiB", "parallel", SMALL_FILES, FILES,
        read_together,
    ),
    Workload(
        "writers-4", "4 processes write 4,000 of 8 KiB", "parallel", NOTHING, 4000,
        write_together, changes=True,
    ),
]  # fmt: skip

"""The judge's end of a worker process: requests with a time limit.

A FUSE server that hangs leaves its caller in an uninterruptible wait, so nothing here waits
without a limit, and a worker that does not answer is given up (killed once its mount is gone).
"""

from __future__ import annotations

import mmap
import os
import pickle
import select
import subprocess
import sys
import tempfile
from typing import IO, Any, cast

from tests.differential.looks import View
from tests.differential.script import Op
from tests.differential.sides import REPOSITORY
from tests.differential.worker import Answer


class WorkerHangsError(Exception):
    """The worker did not answer in time; *op_index* is the call of the batch it is in."""

    def __init__(self, op_index: int, limit_s: float) -> None:
        super().__init__(f"no answer within {limit_s:g} s in call {op_index} of the batch")
        self.op_index = op_index


class WorkerDiedError(Exception):
    """The worker process ended; its standard error is the message."""


class Courier:
    """A persistent worker process. Requests are posted first and collected later, so that the
    workers of both sides work at the same time."""

    def __init__(self, limit_s: float = 30.0) -> None:
        self.limit_s = limit_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        shared = os.memfd_create("progress")
        os.ftruncate(shared, 4)
        self._progress = mmap.mmap(shared, 4)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.differential.worker", str(shared)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=REPOSITORY,
            pass_fds=[shared],
        )
        os.close(shared)

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def post(self, verb: str, *args: object) -> None:
        """Send a request."""
        stdin = cast("IO[bytes]", self._process.stdin)
        try:
            pickle.dump((verb, *args), stdin, pickle.HIGHEST_PROTOCOL)
            stdin.flush()
        except BrokenPipeError:
            self._died()

    def collect(self) -> Any:
        """Answer of the oldest request. WorkerHangsError, WorkerDiedError."""
        stdout = cast("IO[bytes]", self._process.stdout)
        ready, _, _ = select.select([stdout], [], [], self.limit_s)
        if not ready:
            raise WorkerHangsError(int.from_bytes(self._progress[:4], "little"), self.limit_s)
        try:
            return pickle.load(stdout)
        except (EOFError, pickle.UnpicklingError):
            self._died()

    def ask(self, verb: str, *args: object) -> Any:
        """Send a request and wait for its answer."""
        self.post(verb, *args)
        return self.collect()

    def run(self, ops: tuple[Op, ...]) -> list[Answer]:
        """Make calls, one after the other."""
        return cast("list[Answer]", self.ask("run", [tuple(op) for op in ops]))

    def _died(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()
        raise WorkerDiedError(f"worker ended with {self._process.returncode}: {text}")

    def close(self) -> None:
        """End the worker; one that is stuck in a system call is killed and left to the kernel."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                pass
        self._progress.close()
        self._errors.close()


def collect_both(one: Courier, two: Courier) -> tuple[Any, Any]:
    """Answers of both; when one side fails the other's answer is still taken off its pipe."""
    try:
        first = one.collect()
    except (WorkerHangsError, WorkerDiedError):
        two.collect()
        raise
    return first, two.collect()


def views(one: Courier, two: Courier) -> tuple[View, View]:
    """Merged views of both sides, read at the same time."""
    one.post("view")
    two.post("view")
    return cast("tuple[View, View]", collect_both(one, two))

"""Long work happens elsewhere: others are answered, the same file waits, the end is clean."""

from __future__ import annotations

import errno
import os
import stat
import threading
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing

from tests.door.fakes import CTX, FakeCore, FakeJob, door_of, stat_of
from unionfs2.fs_ops import Door
from unionfs2.nodes import Node

ST = stat_of(stat.S_IFREG | 0o644)
MAIN = threading.current_thread().name


class Copying:
    """A door with a lower file whose copy-up takes until it is allowed to end."""

    def __init__(self) -> None:
        self.core = FakeCore()
        self.node: Node = self.core.add(stat.S_IFREG, 7, b"f", lower=True)
        self.core.add(stat.S_IFREG, 8, b"g")
        self.jobs: list[FakeJob] = []
        self.begun = [trio.Event(), trio.Event()]
        self.core.answers.update(
            getattr=ST,
            setattr=ST,
            begin_copy_up=self.begin,
            link=(self.node, ST),
            open_file=self.core.handle(self.node, 33),
            unlink=self.node,
        )
        self.door: Door = door_of(self.core)
        self.error: Exception | None = None

    def begin(self, node: Node, limit: int | None) -> FakeJob:
        assert node is self.node
        job = FakeJob(node)
        job.error = self.error
        self.begun[len(self.jobs)].set()
        self.jobs.append(job)
        return job

    def asked(self) -> list[str]:
        return [call[0] for call in self.core.calls]


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Copying:
    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda *_, **__: None)
    return Copying()


def chmod() -> tuple[Any, Any]:
    fields = dict.fromkeys(("uid", "gid", "size", "atime", "mtime"), False)
    wanted = SimpleNamespace(update_mode=True, **{f"update_{k}": v for k, v in fields.items()})
    return pyfuse3.EntryAttributes(), wanted


REQUESTS: dict[str, Any] = {
    "setattr": lambda door: door.setattr(7, *chmod(), None, CTX),
    "setxattr": lambda door: door.setxattr(7, b"user.a", b"", CTX),
    "removexattr": lambda door: door.removexattr(7, b"user.a", CTX),
    "open": lambda door: door.open(7, os.O_WRONLY, CTX),
    "link": lambda door: door.link(7, 1, b"new", CTX),
    "rename": lambda door: door.rename(1, b"f", 1, b"new", 0, CTX),
    "exchange": lambda door: door.rename(1, b"g", 1, b"f", 2, CTX),
}


@pytest.mark.parametrize("request_name", REQUESTS)
async def test_others_are_answered_meanwhile(copying: Copying, request_name: str) -> None:
    ended = trio.Event()

    async def change() -> None:
        await REQUESTS[request_name](copying.door)
        ended.set()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await trio.testing.wait_all_tasks_blocked()
            (job,) = copying.jobs
            assert copying.door.is_busy()
            await copying.door.getattr(8, CTX)
            await copying.door.getattr(7, CTX)
            assert not ended.is_set()
            assert job.done == []
            job.may_end.set()
    assert ended.is_set()
    assert job.done[1:] == ["publish", "close"]
    assert job.done[0] != MAIN
    assert not copying.door.is_busy()


@pytest.mark.parametrize("second", ["setattr", "open", "link", "rename", "unlink"])
async def test_the_same_file_waits(copying: Copying, second: str) -> None:
    requests = {**REQUESTS, "unlink": lambda door: door.unlink(1, b"f", CTX)}
    core_call = {"open": "open_file"}.get(second, second)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(REQUESTS["setxattr"], copying.door)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(requests[second], copying.door)
            await trio.testing.wait_all_tasks_blocked()
            assert core_call not in copying.asked()
            copying.jobs[0].may_end.set()
    assert len(copying.jobs) == 1, "it was copied once"
    assert core_call in copying.asked()


async def test_a_copy_that_fails_is_tried_again_by_the_next(copying: Copying) -> None:
    copying.error = OSError(errno.ENOSPC, "full")
    answers: list[int] = []

    async def change() -> None:
        try:
            await REQUESTS["setxattr"](copying.door)
        except pyfuse3.FUSEError as exc:
            answers.append(exc.errno)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(change)
            await trio.testing.wait_all_tasks_blocked()
            copying.error = None
            copying.jobs[0].may_end.set()
            await copying.begun[1].wait()
            copying.jobs[1].may_end.set()
    assert answers == [errno.ENOSPC]
    assert copying.jobs[0].done[-1] == "close"
    assert "publish" not in copying.jobs[0].done
    assert copying.jobs[1].done[-2:] == ["publish", "close"]
    assert copying.node.in_upper


async def test_cancelling_leaves_nothing_behind(copying: Copying) -> None:
    """The copy in the thread is waited for, what it made is given back, and others may go on."""
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(copying.door.getattr, 8, CTX)
                scope.cancel()
                await REQUESTS["setxattr"](copying.door)
            assert scope.cancelled_caught
            assert [job.done for job in copying.jobs] == [["close"]]
            nursery.start_soon(REQUESTS["setxattr"], copying.door)
            await trio.testing.wait_all_tasks_blocked()
            copying.jobs[-1].may_end.set()
    assert copying.node.in_upper


async def test_cancelling_while_the_thread_copies(copying: Copying) -> None:
    scope = trio.CancelScope()

    async def change() -> None:
        with scope:
            await REQUESTS["setxattr"](copying.door)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            copying.jobs[0].may_end.set()
    assert copying.jobs[0].done[-1] == "close"
    assert not copying.door.is_busy()


async def test_a_mount_that_must_not_change_starts_no_copy(copying: Copying) -> None:
    class ReadOnly(SimpleNamespace):
        @property
        def w(self) -> None:
            raise OSError(errno.EROFS, "read-only")

    fields = {name: value for name, value in vars(copying.core.stack).items() if name != "w"}
    copying.core.stack = ReadOnly(**fields)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await REQUESTS["setxattr"](copying.door)
    assert caught.value.errno == errno.EROFS
    assert copying.jobs == []


@pytest.mark.parametrize("size", [300_000, 10])
async def test_large_and_synchronous_writes_leave_the_loop(copying: Copying, size: int) -> None:
    handle = copying.core.files[33]
    handle.flags |= os.O_SYNC if size == 10 else 0
    may_end = threading.Event()

    def slow(*_: object) -> int:
        assert may_end.wait(5)
        return size

    copying.core.answers["write"] = slow
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copying.door.write, 33, 0, b"x" * size)
            await trio.testing.wait_all_tasks_blocked()
            await copying.door.getattr(8, CTX)
            may_end.set()


async def test_a_sync_leaves_the_loop(copying: Copying) -> None:
    may_end = threading.Event()
    copying.core.answers["sync"] = lambda *_: may_end.wait(5)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copying.door.fsync, 33, False)
            await trio.testing.wait_all_tasks_blocked()
            await copying.door.getattr(8, CTX)
            may_end.set()


async def test_open_readers_lose_their_pages_after_the_copy(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once from a thread: dropping pages waits for reads that this loop has to answer."""
    told: list[tuple[int, str]] = []

    def record(inode: int, *, attr_only: bool = False) -> None:
        if not attr_only:
            told.append((inode, threading.current_thread().name))

    monkeypatch.setattr(pyfuse3, "invalidate_inode", record)
    copying.node.lookups = 1
    copying.node.handles = [copying.core.files[33]]
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(REQUESTS["setxattr"], copying.door)
            await trio.testing.wait_all_tasks_blocked()
            copying.jobs[0].may_end.set()
    ((inode, thread),) = told
    assert inode == 7
    assert thread != MAIN

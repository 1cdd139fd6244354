"""The door of devfuse: errors, waiting, interrupts, buffers, and what is counted."""

from __future__ import annotations

import errno
import logging
import os
import random
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.door.fakes import FakeJob
from tests.support.fusetalk import MAKERS, STATELESS, WITH_HANDLES, Talk
from tests.support.fusewire import Answer, dirents, entry, message
from tests.support.tree import Tree
from tests.support.unions import Union, Unions, memory_directory, open_fds
from tests.support.unions import home as home
from tests.support.unions import unions as unions
from unionfs2.devfuse import abi
from unionfs2.devfuse.workers import Busy, Later, Workers
from unionfs2.errors import LayerError
from unionfs2.nodes import Node

pytestmark = pytest.mark.needs("user-xattr")

#: Answered with ENOSYS on purpose: the kernel does by itself what they are about, or never asks.
UNHANDLED: Final = {
    "GETLK": "locks are kept by the kernel",
    "SETLK": "locks are kept by the kernel",
    "SETLKW": "locks are kept by the kernel",
    "BMAP": "for block devices only",
    "POLL": "the kernel knows from then on that files are always ready",
    "NOTIFY_REPLY": "nothing is retrieved from the kernel's cache",
    "SETUPMAPPING": "virtiofs only",
    "REMOVEMAPPING": "virtiofs only",
}
TREE: Final[Tree] = {"f": "lower data", "d": {"inner": "x", "deep": {}}, "big": "y" * 300_000}


def pack(form: str, *values: Any) -> bytes:
    return struct.pack("<" + form, *values)


def write_to(offset: int, data: bytes, *, fh: int = 0, flags: int = 0) -> bytes:
    return pack("QQIIQII", fh, offset, len(data), 0, 0, flags, 0) + data


def read_from(offset: int, size: int, *, fh: int = 0) -> bytes:
    return pack("QQIIQII", fh, offset, size, 0, 0, 0, 0)


def until(probe: Callable[[], bool]) -> None:
    """Wait for another thread; the test's own timeout ends what never comes."""
    while not probe():
        os.sched_yield()


@pytest.fixture
def userxattr() -> bool:
    """One dialect: the door knows none."""
    return True


@pytest.fixture
def talk(unions: Unions) -> Iterator[Talk]:
    made = Talk(unions(TREE, upper={"up": "upper data"}).fs)
    yield made
    made.close()


def test_every_row_has_a_handler_or_a_reason_to_have_none(talk: Talk) -> None:
    handled = {abi.ROWS[opcode].name for opcode in talk.door.handlers} | {"INIT"}
    assert not handled & UNHANDLED.keys()
    assert handled | UNHANDLED.keys() == {row.name for row in abi.ROWS.values()}


def test_what_has_no_handler_is_answered(talk: Talk, caplog: pytest.LogCaptureFixture) -> None:
    for opcode in (abi.GETLK, abi.BMAP, abi.POLL, 999):
        assert talk.ask(opcode, bytes(64)).error == errno.ENOSYS
    assert not caplog.records


def test_what_is_not_understood_is_answered_and_logged(
    talk: Talk, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (b"no end", b"\0", b".\0", b"..\0", b"../x\0", b"f\0\0"):
        assert talk.ask(abi.LOOKUP, name).error == errno.EINVAL
    assert talk.ask(abi.SETXATTR, pack("IIII", 99, 0, 0, 0), b"user.a\0v").error == errno.EINVAL
    talk.door.process(talk.device.put(b"short"))
    # An answer to number 0 would be a notification.
    for opcode in talk.door.handlers:
        talk.door.process(talk.device.put(message(opcode, body_of(opcode), unique=0)))
    assert talk.device.answers == {}
    assert len(caplog.records) == 8 + len(talk.door.handlers)


# --- errors ---------------------------------------------------------------------------------------

#: What each handled request carries, for a node that does not matter.
BODIES: Final[dict[int, bytes]] = {
    abi.LOOKUP: b"f\0",
    abi.SYMLINK: b"f\0to\0",
    abi.UNLINK: b"f\0",
    abi.RMDIR: b"f\0",
    abi.REMOVEXATTR: b"user.a\0",
    abi.MKNOD: pack("IIII", 0o100644, 0, 0, 0) + b"new\0",
    abi.MKDIR: pack("II", 0o755, 0) + b"new\0",
    abi.RENAME: pack("Q", 1) + b"f\0g\0",
    abi.RENAME2: pack("QII", 1, 0, 0) + b"f\0g\0",
    abi.LINK: pack("Q", 2) + b"new\0",
    abi.CREATE: pack("IIII", os.O_RDWR, 0o644, 0, 0) + b"new\0",
    abi.TMPFILE: pack("IIII", os.O_RDWR, 0o644, 0, 0) + b"/\0",
    abi.WRITE: write_to(0, b"data"),
    abi.SETXATTR: pack("IIII", 1, 0, 0, 0) + b"user.a\0v",
    abi.GETXATTR: pack("II", 10, 0) + b"user.a\0",
    abi.SETATTR: pack("IIQQQQQQIIIIIIII", abi.FATTR_MODE, *[0] * 15),
    abi.IOCTL: pack("QIIQII", 0, 0, 0x80086601, 0, 0, 4),
    abi.LSEEK: pack("QQII", 0, 0, os.SEEK_DATA, 0),
    abi.READ: read_from(0, 10),
    abi.READDIR: read_from(0, 4096),
    abi.READDIRPLUS: read_from(0, 4096),
}


def body_of(opcode: int) -> bytes:
    layout = abi.ROWS[opcode].layout
    return BODIES.get(opcode, bytes(layout.size if layout else 0))


#: Requests that are about no node, or do not look at it.
NODELESS: Final = {
    abi.STATFS, abi.DESTROY, abi.SYNCFS, abi.RELEASE, abi.RELEASEDIR, abi.FORGET, abi.BATCH_FORGET,
    abi.INTERRUPT, abi.FLUSH,
}  # fmt: skip


@pytest.mark.parametrize("flags", [STATELESS, WITH_HANDLES & ~abi.SETXATTR_EXT])
def test_an_unknown_node_is_stale(unions: Unions, flags: int) -> None:
    talk = Talk(unions(TREE).fs, flags | abi.SETXATTR_EXT)
    for opcode in sorted(talk.door.handlers.keys() - NODELESS):
        found = talk.ask(opcode, body_of(opcode), nodeid=4711)
        unsupported = talk.door.settings.stateless and opcode in (
            abi.OPEN,
            abi.OPENDIR,
            abi.CREATE,
        )
        expected = errno.ENOSYS if unsupported else errno.ESTALE
        assert found.error == expected, abi.ROWS[opcode].name
    talk.close()


def test_an_unknown_handle(unions: Unions) -> None:
    talk = Talk(unions(TREE).fs, WITH_HANDLES)
    node = talk.lookup(b"f").nodeid
    for opcode, body in (
        (abi.READ, read_from(0, 1, fh=99)),
        (abi.WRITE, write_to(0, b"x", fh=99)),
        (abi.RELEASE, pack("QIIQ", 99, 0, 0, 0)),
        (abi.FSYNC, pack("QII", 99, 0, 0)),
        (abi.LSEEK, pack("QQII", 99, 0, os.SEEK_DATA, 0)),
        (abi.FALLOCATE, pack("QQQII", 99, 0, 1, 0, 0)),
    ):
        assert talk.ask(opcode, body, nodeid=node).error == errno.EBADF, abi.ROWS[opcode].name
    talk.close()


def failing(exc: BaseException) -> Callable[..., Any]:
    def handler(*_: object) -> Any:
        raise exc

    return handler


@pytest.mark.parametrize(
    ("exc", "number", "logged"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC, 0),
        (OSError("no number"), errno.EIO, 0),
        (LayerError("no", errno=errno.EMFILE), errno.EMFILE, 1),
        (OverflowError("too large"), errno.EINVAL, 0),
        (RuntimeError("a bug"), errno.EIO, 1),
        (AssertionError("a bug"), errno.EIO, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["at once", "work", "then"])
def test_an_exception_becomes_an_errno(
    talk: Talk,
    exc: Exception,
    number: int,
    logged: int,
    where: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cleaned: list[str] = []
    work, then = (failing(exc), failing(exc)) if where == "work" else (lambda: 1, failing(exc))

    def later(*_: object) -> Later:
        return Later(work, then, cleanup=lambda: cleaned.append("x"))

    talk.door.handlers[abi.STATFS] = failing(exc) if where == "at once" else later
    assert talk.ask(abi.STATFS).error == number
    talk.settle()
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(records) == logged
    if isinstance(exc, (RuntimeError, AssertionError)):
        assert records[0].exc_info is not None
        assert "STATFS" in records[0].getMessage()
    assert cleaned == ([] if where == "at once" else ["x"])
    assert not talk.door.lock.locked()
    assert talk.ask(abi.GETATTR, bytes(16)).ok


def test_forgetting_answers_nobody(talk: Talk, caplog: pytest.LogCaptureFixture) -> None:
    talk.door.handlers[abi.FORGET] = failing(RuntimeError("a bug"))
    unique = talk.send(abi.FORGET, pack("Q", 1), nodeid=7)
    assert not talk.answered(unique)
    assert len(caplog.records) == 1


def test_an_end_asked_for_from_outside_goes_through(talk: Talk) -> None:
    talk.door.handlers[abi.STATFS] = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        talk.send(abi.STATFS)
    assert not talk.door.lock.locked()


# --- what takes long ------------------------------------------------------------------------------


class Copying:
    """A door over a lower file whose copy-up takes until the test lets it end."""

    def __init__(self, union: Union) -> None:
        self.talk = Talk(union.fs)
        self.jobs: list[FakeJob] = []
        self.node = self.talk.lookup(b"f").nodeid
        self._real = union.fs.begin_copy_up
        union.fs.begin_copy_up = self.begin  # type: ignore[method-assign]

    def begin(self, node: Node, limit: int | None = None, *, nameless: bool = False) -> Any:
        del limit, nameless
        real = self._real(node)
        assert real is not None
        job = FakeJob(node)
        publish = job.publish

        def published() -> None:
            real.run()
            real.publish()
            publish()

        job.publish = published  # type: ignore[method-assign]
        close = job.close

        def closed() -> None:
            real.close()
            close()

        job.close = closed  # type: ignore[method-assign]
        self.jobs.append(job)
        return job

    def chmod(self, mode: int) -> int:
        return self.talk.send(abi.SETATTR, mode_of(mode), nodeid=self.node)

    def end(self) -> None:
        for job in self.jobs:
            job.may_end.set()


@pytest.fixture
def copying(unions: Unions) -> Iterator[Copying]:
    made = Copying(unions(TREE))
    yield made
    made.end()
    made.talk.close()


def mode_of(mode: int) -> bytes:
    return pack("IIQQQQQQIIIIIIII", abi.FATTR_MODE, *[0] * 10, mode, *[0] * 4)


WAITING: Final[dict[str, tuple[int, bytes, int]]] = {
    "SETATTR": (abi.SETATTR, mode_of(0o600), 2),
    "SETXATTR": (abi.SETXATTR, BODIES[abi.SETXATTR], 2),
    "WRITE": (abi.WRITE, write_to(0, b"LOWER"), 2),
    "LINK": (abi.LINK, pack("Q", 2) + b"second\0", 1),
    "RENAME": (abi.RENAME, pack("Q", 1) + b"f\0other\0", 1),
    "UNLINK": (abi.UNLINK, b"f\0", 1),
    "FSYNC": (abi.FSYNC, bytes(16), 2),
    "FALLOCATE": (abi.FALLOCATE, pack("QQQII", 0, 0, 4096, 0, 0), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITING)
def test_a_request_about_a_file_on_its_way_up_waits(copying: Copying, name: str) -> None:
    talk = copying.talk
    assert copying.node == 2
    first = copying.chmod(0o640)
    opcode, body, nodeid = WAITING[name]
    second = talk.send(opcode, body, nodeid=nodeid)
    assert talk.ask(abi.GETATTR, bytes(16)).ok  # others are answered meanwhile
    assert talk.ask(abi.READ, read_from(0, 5), nodeid=copying.node).body == b"lower"
    assert not talk.answered(first)
    assert not talk.answered(second)
    copying.end()
    assert talk.answer(first).ok
    assert talk.answer(second).ok
    assert len(copying.jobs) == 1
    talk.settle()
    assert talk.door._copying == {}
    assert talk.door._parked == {}


def test_a_copy_up_that_fails_lets_the_next_one_try(copying: Copying) -> None:
    talk = copying.talk
    first = copying.chmod(0o640)
    second = copying.chmod(0o600)
    copying.jobs[0].error = OSError(errno.ENOSPC, "full")
    copying.jobs[0].may_end.set()
    assert talk.answer(first).error == errno.ENOSPC
    until(lambda: len(copying.jobs) == 2)  # the second one starts again from its beginning
    copying.end()
    assert talk.answer(second).ok
    assert len(copying.jobs) == 2
    assert copying.jobs[0].done[-1] == "close"


def _exchange(talk: Talk, first: int, second: int) -> tuple[int, bytes, int]:
    del first, second
    return abi.RENAME2, pack("QII", 1, 2, 0) + b"big\0f\0", 1


def _copy_range(talk: Talk, first: int, second: int) -> tuple[int, bytes, int]:
    return abi.COPY_FILE_RANGE, pack("QQQQQQQ", 0, 0, first, 0, 0, 4, 0), second


@pytest.mark.parametrize("of", [_exchange, _copy_range])
def test_a_second_file_that_is_found_busy_in_the_middle(copying: Copying, of: Any) -> None:
    """First one file is copied up, then the other turns out to be on its way by somebody else."""
    talk = copying.talk
    big = talk.lookup(b"big").nodeid
    opcode, body, nodeid = of(talk, big, copying.node)
    both = talk.send(opcode, body, nodeid=nodeid)
    other = copying.chmod(0o640)  # begins the copy-up of the second file
    copying.jobs[0].may_end.set()
    until(lambda: len(copying.jobs[0].done) >= 3)
    assert not talk.answered(both)
    copying.end()
    assert talk.answer(other).ok
    assert talk.answer(both).ok
    talk.settle()
    assert talk.door._copying == {}
    assert talk.door._parked == {}


def test_an_interrupted_request_stops_waiting(copying: Copying) -> None:
    talk = copying.talk
    first, second, third = (copying.chmod(mode) for mode in (0o640, 0o600, 0o604))
    interrupt = talk.send(abi.INTERRUPT, pack("Q", second), nodeid=0)
    assert talk.answer(second).error == errno.EINTR
    assert not talk.answered(first)
    assert not talk.answered(interrupt)  # which is itself not answered
    copying.end()
    assert talk.answer(first).ok
    assert talk.answer(third).ok
    assert talk.fs.stack.stat(talk.fs.node(copying.node)).st_mode & 0o777 == 0o604
    assert not talk.answered(second)


def test_an_interrupt_of_what_is_being_done_or_was_is_nothing(copying: Copying) -> None:
    talk = copying.talk
    first = copying.chmod(0o640)
    for unique in (first, 2, 99_999, 0):
        talk.send(abi.INTERRUPT, pack("Q", unique), nodeid=0)
    assert not talk.answered(first)
    copying.end()
    assert talk.answer(first).ok


def test_the_buffer_of_a_waiting_write_is_not_read_into(copying: Copying) -> None:
    talk, device = copying.talk, copying.talk.device
    first = copying.chmod(0o640)
    buffer = device.buffer
    writes = [
        talk.send(abi.WRITE, write_to(3 * i, b"%03d" % i), nodeid=copying.node) for i in range(3)
    ]
    assert device.taken[0] is buffer
    assert len({id(taken) for taken in [*device.taken, device.buffer]}) == 4
    talk.ask(abi.LOOKUP, b"x" * 200 + b"\0")  # overwrites the current one
    copying.end()
    for unique in (first, *writes):
        assert talk.answer(unique).ok
    assert talk.ask(abi.READ, read_from(0, 9), nodeid=copying.node).body == b"000001002"
    talk.settle()
    assert all(any(taken is given for given in device.given) for taken in device.taken)


def test_a_large_write_keeps_its_buffer_until_it_is_written(talk: Talk) -> None:
    node = talk.lookup(b"up").nodeid
    gate = threading.Event()
    handler = talk.door.handlers[abi.WRITE]

    def slowly(*args: Any) -> Any:
        outcome = handler(*args)
        assert isinstance(outcome, Later)
        work = outcome.work

        def waiting() -> Any:
            assert gate.wait(10)
            return work()

        outcome.work = waiting
        return outcome

    talk.door.handlers[abi.WRITE] = slowly
    data = os.urandom(300_000)
    unique = talk.send(abi.WRITE, write_to(0, data, flags=os.O_SYNC), nodeid=node)
    talk.ask(abi.LOOKUP, b"x" * 200 + b"\0")
    gate.set()
    assert talk.answer(unique).body == pack("II", len(data), 0)
    talk.settle()
    assert len(talk.device.given) == 1
    read = talk.answer(talk.send(abi.READ, read_from(0, len(data)), nodeid=node))
    assert read.body == data


def test_what_copy_up_changed_is_told_before_the_answer(copying: Copying) -> None:
    talk = copying.talk
    unique = copying.chmod(0o640)
    assert not talk.device.notices
    copying.end()
    talk.answer(unique)
    assert pack("Qqq", copying.node, -1, 0) in [notice.body for notice in talk.device.notices]


def test_busy_names_the_node() -> None:
    node = Node(0o100000, 5, None)
    assert Busy(node).node is node


def test_a_broken_quick_way_is_told_once_and_left(
    talk: Talk, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> bytes:
        raise KeyError("no such thing")

    talk.door.quick[abi.LOOKUP] = broken
    for _ in range(3):
        assert talk.lookup(b"f").nodeid
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert abi.LOOKUP not in talk.door.quick


# --- workers --------------------------------------------------------------------------------------


def test_workers_grow_with_the_work_up_to_their_limit() -> None:
    prepared: list[str] = []
    workers = Workers("test", lambda: prepared.append(threading.current_thread().name), 3)
    gate, done = threading.Event(), threading.Semaphore(0)

    def work(number: int) -> None:
        assert gate.wait(10)
        seen.append(number)
        done.release()

    seen: list[int] = []
    for number in range(10):
        workers.submit(work, number)
    assert workers.busy
    gate.set()
    for _ in range(10):
        assert done.acquire(timeout=10)
    assert sorted(seen) == list(range(10))
    until(lambda: not workers.busy)
    assert 1 <= len(prepared) <= 3


def test_idle_workers_go_and_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unionfs2.devfuse.workers._IDLE_S", 0.001)
    workers = Workers("test", lambda: None, 4)
    for _ in range(300):
        done = threading.Event()
        workers.submit(done.set)
        assert done.wait(10)
    until(lambda: not workers._threads)
    assert not workers.busy


def test_workers_end_when_they_are_closed() -> None:
    workers = Workers("closed", lambda: None, 4)
    gate, done = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        assert gate.wait(10)
        done.release()

    for _ in range(6):
        workers.submit(work)
    workers.close()
    gate.set()
    for _ in range(6):  # what was submitted before is done
        assert done.acquire(timeout=10)
    mine = [thread for thread in threading.enumerate() if thread.name == "unionfs2-closed"]
    for thread in mine:
        thread.join(5)  # less than the time after which an idle one goes
        assert not thread.is_alive()


# --- nodes ----------------------------------------------------------------------------------------


def forget_all(talk: Talk, rng: random.Random) -> None:
    """Give back what is known: singly and in batches, all at once or bit by bit."""
    known = [(node, count) for node, count in talk.known.items() if node != 1]
    rng.shuffle(known)
    talk.known.clear()
    batch: list[tuple[int, int]] = []
    for node, count in known:
        if rng.random() < 0.5:
            talk.send(abi.FORGET, pack("Q", count), nodeid=node)
        elif rng.random() < 0.5:
            batch += [(node, 1)] * count
        else:
            batch.append((node, count))
    data = b"".join(pack("QQ", *pair) for pair in batch)
    talk.send(abi.BATCH_FORGET, pack("II", len(batch), 0), data, nodeid=0)


class Client:
    """Sends random requests about nodes that it knows; like the kernel, it looks names up first."""

    NAMES = (b"f", b"d", b"inner", b"deep", b"big", b"up", b"new", b"other", b"absent")

    def __init__(self, talk: Talk, rng: random.Random) -> None:
        self.talk = talk
        self.rng = rng
        self.dirs = [1]
        self.nodes = [1]
        self.handles: list[tuple[int, int]] = []

    def learn(self, opcode: int, answer: Answer) -> None:
        if not answer.ok:
            return
        found = []
        if opcode == abi.READDIRPLUS:
            items = dirents(answer.body, plus=True)
            found = [item.entry for item in items if item.entry is not None]
        elif opcode in MAKERS:
            made = entry(answer.body)
            found = [made]
            if opcode in (abi.CREATE, abi.TMPFILE):
                fh = struct.unpack_from("<Q", answer.body, 128)[0]
                self.handles.append((made.nodeid, fh))
        for node in found:
            if node.nodeid:
                self.nodes.append(node.nodeid)
                if node.attr.mode & 0o170000 == 0o040000:
                    self.dirs.append(node.nodeid)

    def step(self) -> None:
        rng = self.rng
        opcode = rng.choice(
            [abi.LOOKUP] * 6
            + [abi.READDIRPLUS] * 3
            + [abi.MKNOD, abi.MKDIR, abi.SYMLINK, abi.LINK, abi.CREATE, abi.TMPFILE]
            + [abi.UNLINK, abi.RMDIR, abi.RENAME, abi.RENAME2, abi.READDIR]
            + [abi.READ, abi.WRITE, abi.SETATTR, abi.GETATTR, abi.LSEEK]
        )
        name, other = rng.choice(self.NAMES) + b"\0", rng.choice(self.NAMES) + b"\0"
        nodeid = rng.choice(self.dirs)
        body = BODIES.get(opcode, b"")
        if opcode in (abi.LOOKUP, abi.UNLINK, abi.RMDIR):
            body = name
        elif opcode == abi.LINK:
            body = pack("Q", rng.choice(self.nodes)) + name
        elif opcode in (abi.MKNOD, abi.MKDIR, abi.CREATE):
            body = body[:-4] + name
        elif opcode == abi.SYMLINK:
            body = name + b"target\0"
        elif opcode in (abi.RENAME, abi.RENAME2):
            flags = rng.choice([0, 1, 2])
            head = pack("Q", rng.choice(self.dirs))
            body = head + (pack("II", flags, 0) if opcode == abi.RENAME2 else b"") + name + other
        elif opcode in (abi.READ, abi.WRITE, abi.SETATTR, abi.GETATTR, abi.LSEEK):
            nodeid = rng.choice(self.nodes)
            body = BODIES.get(opcode, bytes(16))
        elif opcode == abi.READDIRPLUS:
            self.look_at_all(nodeid)
        for part in (name, other):
            self.ask(abi.LOOKUP, part, nodeid)
        if opcode in (abi.RENAME, abi.RENAME2):
            for part in (name, other):
                self.ask(abi.LOOKUP, part, struct.unpack_from("<Q", body)[0])
        self.ask(opcode, body, nodeid)

    def look_at_all(self, nodeid: int) -> None:
        """READDIRPLUS in small pieces, some of which hold no name at all."""
        offset = 0
        for _ in range(20):
            found = self.ask(abi.READDIRPLUS, read_from(offset, 400), nodeid)
            if not found.body:
                return
            offset = dirents(found.body, plus=True)[-1].offset

    def ask(self, opcode: int, body: bytes, nodeid: int) -> Answer:
        found = self.talk.ask(opcode, body, nodeid=nodeid)
        assert found.error != errno.EIO
        self.learn(opcode, found)
        return found

    def close(self) -> None:
        for node, fh in self.handles:
            if not fh:  # stateless
                continue
            assert self.talk.ask(abi.RELEASE, pack("QIIQ", fh, 0, 0, 0), nodeid=node).ok


@settings(max_examples=60, deadline=None)
@given(seed=some.integers(0, 1 << 32), steps=some.integers(0, 60), handles=some.booleans())
def test_after_all_is_forgotten_nothing_is_left(seed: int, steps: int, handles: bool) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=memory_directory()) as name:
        union = Union(Path(name), (TREE, {"d": {"below": "z"}}), {"up": "u"}, userxattr=True)
        before = open_fds()
        talk = Talk(union.fs, WITH_HANDLES if handles else STATELESS)
        try:
            client = Client(talk, rng)
            for _ in range(steps):
                client.step()
            client.close()
            forget_all(talk, rng)
            assert set(union.fs.stack.nodes.by_id) == {1}
            assert union.fs.root.children == {}
            assert union.fs.stack.nodes.by_inode == {}
            assert len(talk.door.files) == 0
        finally:
            talk.close()
            union.close()
        assert open_fds() == before

"""The descriptor, with a socket that keeps messages apart in the place of /dev/fuse."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from unionfs2.devfuse import codec, device
from unionfs2.devfuse.device import Device, Ended


class Line:
    """A device, and the kernel's end of it."""

    def __init__(self, busy_poll_us: int | None = 0) -> None:
        self.kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(10)
        self.device = Device(ours.detach(), busy_poll_us=busy_poll_us)

    def close(self) -> None:
        self.kernel.close()
        if self.device.fd >= 0:
            self.device.close()


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.close()


def test_a_message_comes_in_and_an_answer_goes_out(line: Line) -> None:
    line.kernel.send(b"message")
    assert line.device.next() == 7
    assert line.device.buffer[:7] == b"message"
    line.device.answer(b"answer")
    line.device.answer([b"in ", b"two ", memoryview(b"pieces")])
    assert line.kernel.recv(99) == b"answer"
    assert line.kernel.recv(99) == b"in two pieces"


@pytest.mark.parametrize("busy_poll_us", [None, 0, 100_000])
def test_it_waits_for_a_message_that_comes_later(busy_poll_us: int | None) -> None:
    line = Line(busy_poll_us)
    try:
        sender = threading.Timer(0.02, line.kernel.send, (b"later",))
        sender.start()
        assert line.device.next() == 5
        sender.join()
    finally:
        line.close()


def test_it_ends_when_told_from_another_thread(line: Line) -> None:
    ender = threading.Timer(0.02, line.device.end)
    ender.start()
    with pytest.raises(Ended):
        line.device.next()
    ender.join()
    with pytest.raises(Ended):
        line.device.next()


def test_it_may_be_told_a_thousand_times(line: Line) -> None:
    for _ in range(100_000):
        line.device.end()
    with pytest.raises(Ended):
        line.device.next()
    line.device.close()
    line.device.end()


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ECONNABORTED, errno.EBADF])
def test_it_ends_with_the_connection(
    line: Line, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def readv(_fd: int, _into: object) -> int:
        raise OSError(number, "gone")

    line.kernel.send(b"there is something to read")
    monkeypatch.setattr(os, "readv", readv)
    with pytest.raises(Ended):
        line.device.next()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EINTR])
def test_a_request_that_was_withdrawn_is_passed_over(
    line: Line, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    errors = [OSError(number, "withdrawn")] * 3

    def readv(_fd: int, _into: object) -> int:
        if errors:
            raise errors.pop()
        return 42

    line.kernel.send(b"there is something to read")
    monkeypatch.setattr(os, "readv", readv)
    assert line.device.next() == 42


def test_another_error_of_reading_is_not_hidden(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def readv(_fd: int, _into: object) -> int:
        raise OSError(errno.EIO, "broken")

    line.kernel.send(b"there is something to read")
    monkeypatch.setattr(os, "readv", readv)
    with pytest.raises(OSError, match="broken"):
        line.device.next()


def _failing(numbers: list[int], written: list[bytes]) -> object:
    def write(_fd: int, reply: bytes) -> int:
        if numbers and (number := numbers.pop(0)):
            raise OSError(number, os.strerror(number))
        written.append(bytes(reply))
        return len(reply)

    return write


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.ECONNABORTED, errno.EBADF])
def test_an_answer_that_nobody_waits_for_is_dropped(
    line: Line, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(os, "write", _failing([number], written))
    line.device.answer(codec.ok(9))
    assert written == []


@pytest.mark.parametrize("pieces", [False, True])
def test_an_answer_that_the_kernel_refuses_becomes_eio(
    line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pieces: bool
) -> None:
    """Whoever asked must not wait for ever, and the server lives on."""
    written: list[bytes] = []
    numbers = [errno.EINVAL]
    if pieces:
        writev = _failing([errno.EINVAL], [])
        monkeypatch.setattr(os, "writev", writev)
        numbers = []
    monkeypatch.setattr(os, "write", _failing(numbers, written))
    line.device.answer([codec.ok(9), b"too much"] if pieces else codec.ok(9))
    assert written == [struct.pack("<IiQ", 16, -errno.EIO, 9)]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "request 9" in record.getMessage()


def test_it_does_not_try_for_ever(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(os, "write", _failing([errno.EINVAL] * 99, written))
    line.device.answer(codec.ok(9))
    assert written == []


@pytest.mark.parametrize("number", [0, errno.ENOENT, errno.ENOTCONN, errno.ENODEV])
def test_a_notification_tells_whether_it_was_of_use(
    line: Line, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "write", _failing([number], []))
    assert line.device.notify(codec.inval_inode(5, 0, 0)) is (number == 0)


def test_another_error_of_a_notification_is_not_hidden(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", _failing([errno.EINVAL], []))
    with pytest.raises(OSError, match=r"\[Errno 22\]"):
        line.device.notify(b"")


def test_a_buffer_that_was_taken_is_not_read_into(line: Line) -> None:
    line.kernel.send(b"first")
    line.device.next()
    taken = line.device.take_buffer()
    line.kernel.send(b"other")
    line.device.next()
    assert line.device.buffer is not taken
    assert (taken[:5], line.device.buffer[:5]) == (b"first", b"other")


def test_a_buffer_given_back_is_used_again_and_few_are_kept(line: Line) -> None:
    taken = [line.device.take_buffer() for _ in range(5)]
    assert len({id(buffer) for buffer in taken}) == 5
    for buffer in taken:
        line.device.give_back(buffer)
    again = [line.device.take_buffer() for _ in range(4)]
    assert sum(buffer in taken for buffer in again[1:]) == 2


def test_wider_messages_from_now_on(line: Line) -> None:
    small = line.device.take_buffer()
    line.device.widen(1 << 20)
    assert len(line.device.buffer) == (1 << 20) + 4096
    line.device.give_back(small)  # of the old size, so of no use
    line.device.take_buffer()
    assert len(line.device.buffer) == (1 << 20) + 4096


def test_memory_that_another_process_can_map() -> None:
    buffer = device.new_buffer(8192)
    pid = os.fork()
    if not pid:
        buffer[:5] = b"child"
        os._exit(0)
    os.waitpid(pid, 0)
    assert buffer[:5] == b"child"


def test_nothing_stays_open(line: Line) -> None:
    before = len(os.listdir("/proc/self/fd"))
    other = Line()
    other.device.widen(1 << 20)
    other.close()
    del other  # a memory map keeps its file open
    assert len(os.listdir("/proc/self/fd")) == before

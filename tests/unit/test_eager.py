"""The short cut in front of pyfuse3's wait: it must give way, wake everybody, and end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from unionfs2 import eager
from unionfs2.wakeful import Wakeful


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    yield read_end, write_end
    for fd in (read_end, write_end):
        os.close(fd)


async def test_what_is_there_is_taken_without_the_loop(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    wait = eager.EagerWait(read_end, lambda: False)
    os.write(write_end, b"x")
    turns: list[int] = []

    async def other() -> None:
        turns.append(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await wait(read_end)
        assert not turns, "the loop had a turn although a request was there"
    assert turns


async def test_the_loop_gets_its_turn_under_load(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    os.write(write_end, b"x")  # never read: there is always a request
    wait = eager.EagerWait(read_end, lambda: False)
    turns: list[int] = []

    async def other() -> None:
        while len(turns) < 3:
            turns.append(1)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(1000):
            await wait(read_end)
    assert len(turns) == 3


async def test_it_sleeps_until_something_comes(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    wait = eager.EagerWait(read_end, lambda: False)
    woken = trio.Event()

    async def sleeper() -> None:
        await wait(read_end)
        woken.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper)
        await trio.testing.wait_all_tasks_blocked()
        assert not woken.is_set()
        os.write(write_end, b"x")
        with trio.fail_after(5):
            await woken.wait()


async def test_closing_ends_the_wait(pipe: tuple[int, int]) -> None:
    read_end, _ = pipe
    fake = eager.trio_for(read_end, lambda: False, None, Wakeful("off"))

    async def sleeper() -> None:
        with pytest.raises(fake.ClosedResourceError):
            await fake.lowlevel.wait_readable(read_end)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await trio.testing.wait_all_tasks_blocked()
            fake.lowlevel.notify_closing(read_end)


async def test_the_lock_excludes_and_wakes_everybody() -> None:
    lock = eager.EagerLock()
    inside = 0
    done = []

    async def user(number: int) -> None:
        nonlocal inside
        for _ in range(20):
            async with lock:
                inside += 1
                assert inside == 1
                await trio.lowlevel.checkpoint()
                inside -= 1
        done.append(number)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(user, number)
    assert sorted(done) == [0, 1, 2, 3, 4]


async def test_a_waiter_can_be_cancelled() -> None:
    lock = eager.EagerLock()
    async with lock:
        with trio.move_on_after(0.01) as scope:
            async with lock:
                pytest.fail("the lock was given twice")
    assert scope.cancelled_caught
    with trio.fail_after(5):
        async with lock:
            pass


def test_nobody_spins_when_it_was_forbidden(pipe: tuple[int, int]) -> None:
    read_end, _ = pipe

    def busy() -> bool:
        pytest.fail("it was about to spin")

    async def main() -> None:
        wait = eager.trio_for(read_end, busy, 0, Wakeful("off")).lowlevel.wait_readable
        with trio.move_on_after(0.01):
            await wait(read_end)

    trio.run(main)


def test_nobody_spins_while_threads_work(pipe: tuple[int, int]) -> None:
    read_end, _ = pipe
    asked = []

    def busy() -> bool:
        asked.append(1)
        return True

    async def main() -> None:
        wait = eager.EagerWait(read_end, busy)
        with trio.move_on_after(0.01):
            await wait(read_end)

    trio.run(main)
    assert len(asked) == (1 if len(os.sched_getaffinity(0)) > 1 else 0)

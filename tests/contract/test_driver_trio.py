"""The driver awaited from trio: the same answers, and nothing is lost by cancelling."""

from __future__ import annotations

import inspect
import io
import os
from pathlib import Path

import pytest
import trio

from tests.contract.conftest import Opener, by_kernel
from tests.contract.test_driver_diffs import digest_of, tar_of
from unionfs2 import AsyncDriver, Driver, references
from unionfs2.backends import Choice
from unionfs2.errors import UnknownLayerError
from unionfs2.storemodel import LayerId

pytestmark = pytest.mark.needs("root")

#: Closing has its own name in trio; the class method opens.
DIFFERENT = {"close", "aclose", "open"}


def test_every_method_is_there() -> None:
    def names(cls: type) -> set[str]:
        return {
            name
            for name, value in inspect.getmembers(cls, callable)
            if not name.startswith("_") and value is not None
        }

    assert names(AsyncDriver) - DIFFERENT == names(Driver) - DIFFERENT


@pytest.mark.parametrize("name", ["create", "get", "apply", "mounted", "diff", "open_diff"])
def test_methods_are_documented(name: str) -> None:
    assert inspect.getdoc(getattr(AsyncDriver, name))


def test_a_life(opener: Opener, home: Path, backend: Choice) -> None:
    opener()
    stream = tar_of(("file", b"x"))

    async def main() -> None:
        async with await AsyncDriver.open(home, backend=backend) as driver:
            base = await driver.create("base")
            done = await driver.apply(base, io.BytesIO(stream), expected=digest_of(stream))
            assert done.entries == 1
            box = await driver.create("box", base, writable=True)
            async with driver.mounted(box) as root:
                assert os.listdir(root) == ["file"]
                (root / "new").write_text("n")
            assert [str(found.kind) for found in await driver.changes(box)] == ["A"]
            out = io.BytesIO()
            digest = await driver.diff(box, out)
            assert digest == digest_of(out.getvalue())
            async with driver.open_diff(box) as reader:
                assert await reader.read() == out.getvalue()
            with pytest.raises(UnknownLayerError):
                await driver.get("nobody")
            assert await driver.remove(box)
            assert await driver.ids() == ("base",)

    trio.run(main)


class _Parts(trio.abc.ReceiveStream):
    """Bytes that come a few at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        size = min(max_bytes or 100, 100)
        part, self._data = self._data[:size], self._data[size:]
        return part

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class _Kept(trio.abc.SendStream):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.data = b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.data += bytes(data)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@by_kernel
def test_streams_of_trio(driver: Driver) -> None:
    stream = tar_of(("file", b"x" * 1000))

    async def main() -> None:
        shared = AsyncDriver(driver)
        await shared.create("base")
        await shared.apply("base", _Parts(stream), expected=digest_of(stream))
        kept = _Kept()
        await shared.diff("base", kept, exact=True)
        assert kept.data == stream

    trio.run(main)


def test_a_cancelled_task_gives_its_mount_back(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base")
    merged = driver.store.merged_path(LayerId("box"))

    async def main() -> None:
        shared = AsyncDriver(driver)
        with trio.CancelScope() as scope:
            async with shared.mounted("box"):
                assert references.layer_mount(merged) is not None
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught

    trio.run(main)
    assert references.layer_mount(merged) is None


def test_many_tasks_at_once(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base", writable=True)

    async def main() -> None:
        shared = AsyncDriver(driver)

        async def work(number: int) -> None:
            async with shared.mounted("box") as root:
                (root / str(number)).touch()

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(work, number)

    trio.run(main)
    assert len(driver.changes("box")) == 16
    assert references.layer_mount(driver.store.merged_path(LayerId("box"))) is None

"""The driver for programs that run on trio: the same methods, awaited.

    async with await AsyncDriver.open("storage") as driver:
        box = await driver.create(parent=base, writable=True)
        async with driver.mounted(box) as root:
            ...

Each call runs in a worker thread. Work that has begun is not abandoned when its task is cancelled,
because a mount that nobody knows of would be left; what was begun is finished and given back. The
callbacks *progress* and *warn* are called in that worker thread.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import trio

from .archive.digest import Chunk, Readable, Writable
from .backends import Choice
from .driver import DIRECT, Driver, Parent
from .storemodel import Applied, Digest

__all__ = ["AsyncDriver", "AsyncReader"]

P = ParamSpec("P")
R = TypeVar("R")


def _awaited(
    method: Callable[Concatenate[Driver, P], R],
) -> Callable[Concatenate[AsyncDriver, P], Awaitable[R]]:
    """*method* of Driver as one of AsyncDriver."""

    async def call(self: AsyncDriver, /, *args: P.args, **keywords: P.kwargs) -> R:
        return await trio.to_thread.run_sync(
            functools.partial(method, self.sync, *args, **keywords)
        )

    functools.update_wrapper(call, method)
    return call


class AsyncReader:
    """A stream to read from; read() is awaited."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream

    async def read(self, size: int = -1) -> bytes:
        """At most *size* bytes, all that is left when negative; b"" at the end."""
        return await trio.to_thread.run_sync(self._stream.read, size)


class _FromTask:
    """A trio stream as the worker thread of apply() reads it."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        return bytes(trio.from_thread.run(self._stream.receive_some, size))


class _ToTask:
    """A trio stream as the worker thread of diff() writes it."""

    def __init__(self, stream: trio.abc.SendStream) -> None:
        self._stream = stream

    def write(self, data: Chunk, /) -> None:
        trio.from_thread.run(self._stream.send_all, bytes(data))


class AsyncDriver:
    """An open store. ``sync`` is the Driver underneath."""

    def __init__(self, driver: Driver) -> None:
        self.sync = driver

    @classmethod
    async def open(cls, home: str | bytes | os.PathLike[str], **keywords: Any) -> AsyncDriver:
        """Open the store at *home*; the keywords are those of Driver.open()."""
        opened = functools.partial(Driver.open, home, **keywords)
        return cls(await trio.to_thread.run_sync(opened))

    async def __aenter__(self) -> AsyncDriver:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sync.close()

    async def aclose(self) -> None:
        """Give the descriptors back. Mounts stay, and so do the references to them."""
        self.sync.close()
        await trio.lowlevel.checkpoint()

    status = _awaited(Driver.status)
    ids = _awaited(Driver.ids)
    layers = _awaited(Driver.layers)
    tree = _awaited(Driver.tree)
    usage = _awaited(Driver.usage)
    cleanup = _awaited(Driver.cleanup)
    exists = _awaited(Driver.exists)
    is_parent = _awaited(Driver.is_parent)
    get_metadata = _awaited(Driver.get_metadata)
    inspect = _awaited(Driver.inspect)
    which = _awaited(Driver.which)
    create = _awaited(Driver.create)
    create_read_write = _awaited(Driver.create_read_write)
    remove = _awaited(Driver.remove)
    commit = _awaited(Driver.commit)
    get = _awaited(Driver.get)
    put = _awaited(Driver.put)
    import_layer = _awaited(Driver.import_layer)
    diff_between = _awaited(Driver.diff_between)
    diff_size = _awaited(Driver.diff_size)
    changes = _awaited(Driver.changes)
    check = _awaited(Driver.check)
    repair = _awaited(Driver.repair)
    prune = _awaited(Driver.prune)
    flatten = _awaited(Driver.flatten)
    rebase = _awaited(Driver.rebase)

    async def apply(
        self,
        layer: str,
        stream: Readable | trio.abc.ReceiveStream,
        parent: Parent = DIRECT,
        *,
        expected: Digest | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Applied:
        """Driver.apply(); *stream* may also be one of trio's."""
        source = _FromTask(stream) if isinstance(stream, trio.abc.ReceiveStream) else stream
        return await trio.to_thread.run_sync(
            functools.partial(
                self.sync.apply, layer, source, parent, expected=expected, progress=progress
            )
        )

    async def diff(
        self,
        layer: str,
        out: Writable | trio.abc.SendStream,
        parent: Parent = DIRECT,
        *,
        exact: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Digest:
        """Driver.diff(); *out* may also be a stream of trio's."""
        sink = _ToTask(out) if isinstance(out, trio.abc.SendStream) else out
        return await trio.to_thread.run_sync(
            functools.partial(self.sync.diff, layer, sink, parent, exact=exact, progress=progress)
        )

    @contextlib.asynccontextmanager
    async def open_diff(
        self, layer: str, parent: Parent = DIRECT, *, exact: bool = False
    ) -> AsyncIterator[AsyncReader]:
        """Driver.open_diff() with a stream whose read() is awaited."""
        manager = self.sync.open_diff(layer, parent, exact=exact)
        stream = await trio.to_thread.run_sync(manager.__enter__)
        try:
            yield AsyncReader(stream)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(manager.__exit__, None, None, None)

    @contextlib.asynccontextmanager
    async def mounted(
        self,
        layer: str,
        label: str = "",
        *,
        backend: Choice | None = None,
        read_only: bool = False,
        target: str | bytes | os.PathLike[str] | None = None,
    ) -> AsyncIterator[Path]:
        """Driver.mounted(); the layer is given back also when the task is cancelled."""
        path = await self.get(layer, label, backend=backend, read_only=read_only, target=target)
        try:
            yield path
        finally:
            with trio.CancelScope(shield=True):
                await self.put(layer)

"""Digests of streams: the DiffID of a layer, the ChainID of a stack of them.

SHA-256 over a few hundred megabytes takes as long as writing them, and hashlib works without the
interpreter's lock. So a ``StreamHash`` hands large chunks to one thread of its own; small streams
are hashed in place and start none.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Sequence
from typing import Final, Protocol

from unionfs2.storemodel import Digest

Chunk = bytes | bytearray | memoryview

_INLINE_BYTES_MAX: Final = 256 << 10  # a stream of this size is hashed before a thread runs
_WAITING_MAX: Final = 8  # chunks on their way to the thread, so that memory stays bounded

#: Name of a thread that hashes.
THREAD_NAME: Final = "sha256"


class Readable(Protocol):
    """What is read from: a file object, or anything with its read()."""

    def read(self, size: int, /) -> bytes:
        """At most *size* bytes, fewer where that is all there is now, none at the end."""
        ...


class Writable(Protocol):
    """What is written to."""

    def write(self, data: Chunk, /) -> object:
        """Take all of *data*, which may be overwritten as soon as the call returns."""
        ...


def to_digest(hexadecimal: str) -> Digest:
    """64 hexadecimal digits as the digest that names them."""
    return Digest(f"sha256:{hexadecimal}")


def sha256_hex(data: Chunk) -> str:
    """SHA-256 of *data* in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of(data: Chunk) -> Digest:
    """Digest of *data*."""
    return to_digest(sha256_hex(data))


def chain_id(diff_ids: Sequence[Digest]) -> Digest:
    """ChainID of layers, lowest first (OCI image-spec, config.md, "Layer ChainID").

    Raises ValueError for no layer at all: nothing has no ChainID.
    """
    if not diff_ids:
        raise ValueError("a chain has at least one layer")
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = digest_of(f"{chain} {diff_id}".encode())
    return chain


class HashingReader:
    """Passes a stream on and hashes what goes through."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1, /) -> bytes:
        """Read from the stream; a negative *size* reads to the end."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        data = self._stream.read(size)
        self._hash.update(data)
        self.size += len(data)
        return data

    def digest(self) -> Digest:
        """Digest of what was read so far."""
        return to_digest(self._hash.hexdigest())


class StreamHash:
    """SHA-256 of a stream, computed beside the work. close() must be called in the end.

    Invariant: chunks are hashed in the order of update(), whoever hashes them.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._size = 0
        self._queue: queue.SimpleQueue[tuple[Chunk, threading.Semaphore] | None] | None = None
        self._slots = threading.Semaphore(_WAITING_MAX)
        self._thread: threading.Thread | None = None

    def update(self, chunk: Chunk, slots: threading.Semaphore | None = None) -> None:
        """Hash *chunk*, which must stay as it is until *slots* is released (or close())."""
        self._size += len(chunk)
        if self._thread is None:
            if self._size <= _INLINE_BYTES_MAX:
                self._hash.update(chunk)
                if slots is not None:
                    slots.release()
                return
            self._start()
        assert self._queue is not None
        if slots is None:
            slots = self._slots
            slots.acquire()
        self._queue.put((chunk, slots))

    def _start(self) -> None:
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._queue is not None
        while (item := self._queue.get()) is not None:
            chunk, slots = item
            self._hash.update(chunk)
            slots.release()

    def close(self) -> None:
        """Wait for what is still to be hashed and end the thread. May be called twice."""
        if self._thread is not None and self._queue is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
            self._queue = None
        self._size = 0

    def digest(self) -> Digest:
        """Digest of everything; ends the thread."""
        self.close()
        return to_digest(self._hash.hexdigest())

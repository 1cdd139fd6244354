"""The way out of a stream: collected into large pieces, hashed beside the writing."""

from __future__ import annotations

import os
from typing import Final

from unionfs2.storemodel import Digest

from .digest import StreamHash, Writable

_BUFFER_BYTES: Final = 1 << 20


class ShortFile(Exception):  # noqa: N818 - no error by itself; copy() says it of a file
    """A file ended before its size."""


class Sink:
    """Writes to *out* and hashes. finish() must come last; close() ends the helper in any case."""

    def __init__(self, out: Writable) -> None:
        self._out = out
        self._hashed = StreamHash()
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._used = 0
        self._flushed = 0

    @property
    def offset(self) -> int:
        """Bytes of the stream so far."""
        return self._flushed + self._used

    def write(self, data: bytes | memoryview) -> None:
        """Append *data*."""
        start = self._used
        stop = start + len(data)
        if stop > _BUFFER_BYTES:
            self._flush()
            if len(data) > _BUFFER_BYTES:
                self._put(bytes(data))
                return
            start, stop = 0, len(data)
        self._view[start:stop] = data
        self._used = stop

    def copy(self, fd: int, offset: int, length: int) -> None:
        """Append *length* bytes of a file from *offset*. Raises ShortFile."""
        while length:
            if self._used == _BUFFER_BYTES:
                self._flush()
            start = self._used
            done = os.preadv(fd, [self._view[start : start + length]], offset)
            if not done:
                raise ShortFile
            self._used += done
            offset += done
            length -= done

    def finish(self) -> Digest:
        """Write what is left; digest of everything."""
        self._flush()
        return self._hashed.digest()

    def close(self) -> None:
        """End the helper; what was not written is lost."""
        self._hashed.close()

    def _flush(self) -> None:
        # A copy, because the receiver may keep what it was given, and the hash lags behind.
        data = bytes(self._view[: self._used])
        self._used = 0
        if data:
            self._put(data)

    def _put(self, data: bytes) -> None:
        self._hashed.update(data)
        self._flushed += len(data)
        done = self._out.write(data)
        while isinstance(done, int) and 0 < done < len(data):
            data = data[done:]  # a raw file may take less than it was given
            done = self._out.write(data)

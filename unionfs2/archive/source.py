"""The way in of a stream: read ahead in large pieces, counted, hashed.

Everything that is not content of a file is passed to a keeper (``split``), so that nothing of the
original is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NoReturn

from unionfs2.errors import ArchiveError, LimitError

from .digest import Readable, StreamHash
from .tar import BLOCK

_READ_BYTES: Final = 512 << 10

Keep = Callable[[bytes], None]
Progress = Callable[[int], None]


class Input:
    """An uncompressed stream, read ahead in large pieces.

    Invariant: every byte of the stream is either given out by content() or passed to *keep*, in
    order, and is hashed once.
    """

    def __init__(
        self,
        stream: Readable,
        hashed: StreamHash,
        *,
        keep: Keep | None = None,
        progress: Progress | None = None,
        bytes_max: int = 1 << 62,
    ) -> None:
        self._stream = stream
        self._hashed = hashed
        self._keep = keep
        self._progress = progress
        self._bytes_max = bytes_max
        self._buf = b""
        self._pos = 0
        self._mark = 0  # from here to _pos lies what keep() has not seen
        self._before = 0  # bytes of the stream before _buf

    @property
    def offset(self) -> int:
        """Bytes given out so far."""
        return self._before + self._pos

    def _fill(self) -> bool:
        """Read on, behind what is left; False at the end of the stream."""
        try:
            data = self._stream.read(_READ_BYTES)
        except OSError as exc:
            raise ArchiveError(
                f"the stream cannot be read: {exc.strerror or exc}", errno=exc.errno
            ) from exc
        if not data:
            if not isinstance(data, bytes):  # a raw stream that does not wait answers None
                raise ArchiveError("the stream is not ready: give one that waits for its data")
            return False
        self._keep_up()
        left = self._buf[self._pos :]
        self._before += self._pos
        self._buf = left + data if left else data
        self._pos = self._mark = 0
        self._hashed.update(data)
        total = self._before + len(self._buf)
        if total > self._bytes_max:
            raise LimitError(f"the stream is longer than the {self._bytes_max} bytes allowed")
        if self._progress is not None:
            self._progress(total)
        return True

    def _keep_up(self) -> None:
        if self._keep is not None and self._mark < self._pos:
            self._keep(self._buf[self._mark : self._pos])
        self._mark = self._pos

    def block(self) -> bytes:
        """The next 512 bytes; nothing at the end of the stream."""
        start = self._pos
        stop = start + BLOCK
        if stop <= len(self._buf):
            self._pos = stop
            return self._buf[start:stop]
        return self.take(BLOCK, may_end=True)

    def take(self, size: int, *, may_end: bool = False) -> bytes:
        """The next *size* bytes, which are no content."""
        while len(self._buf) - self._pos < size:
            if not self._fill():
                if may_end and self._pos == len(self._buf):
                    return b""
                self._cut_short()
        start = self._pos
        self._pos = start + size
        return self._buf[start : self._pos]

    def content(self, size: int) -> Iterator[memoryview]:
        """The next *size* bytes, content of a file, as they come."""
        self._keep_up()
        while size:
            if self._pos == len(self._buf) and not self._fill():
                self._cut_short()
            piece = memoryview(self._buf)[self._pos : self._pos + size]
            self._pos += len(piece)
            self._mark = self._pos
            size -= len(piece)
            yield piece

    def skip(self, size: int) -> None:
        """Pass over *size* bytes, which are kept as if they were no content."""
        while size:
            if self._pos == len(self._buf) and not self._fill():
                self._cut_short()
            step = min(size, len(self._buf) - self._pos)
            self._pos += step
            size -= step

    def finish(self) -> None:
        """Read to the end of the stream: nothing but zeros may be left."""
        while True:
            rest = self._buf[self._pos :]
            if rest.count(0) != len(rest):
                raise ArchiveError(
                    f"tar stream, byte {self.offset}: something follows the end of the archive"
                )
            self._pos = len(self._buf)
            if not self._fill():
                break
        self._keep_up()

    def _cut_short(self) -> NoReturn:
        raise ArchiveError(
            f"tar stream, byte {self._before + len(self._buf)}: the stream ends in the middle of an"
            " archive, so it was cut short"
        )

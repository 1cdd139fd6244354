"""Where the frames of a zstd stream begin and end (RFC 8878, section 3.1)."""

from __future__ import annotations

from typing import Final

from unionfs2.errors import ArchiveError

from .digest import Readable

_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# A frame may be a skippable one: 0x184D2A50 to 5F, little-endian.
_SKIPPABLE: Final = b"\x2a\x4d\x18"
_READ_BYTES: Final = 128 << 10


def is_skippable(head: bytes) -> bool:
    """Whether a frame that begins with *head* only holds what is to be skipped."""
    return head[1:4] == _SKIPPABLE and head[0] & 0xF0 == 0x50


class Frames:
    """Follows the frames of a zstd stream (RFC 8878, 3.1), only to know where one ends.

    The library's reader takes a stream that was cut short for one that ended.
    """

    def __init__(self) -> None:
        self._state = self._magic
        self._want = 4  # bytes of the current field
        self._field = b""
        self._pass = 0  # bytes to pass over
        self._checksum = 0
        self.complete = True

    def feed(self, data: bytes) -> None:
        """Take note of *data*, the next bytes of the stream."""
        at = 0
        while at < len(data):
            if self._pass:
                step = min(self._pass, len(data) - at)
                self._pass -= step
                at += step
                continue
            take = self._want - len(self._field)
            self._field += data[at : at + take]
            at += take
            if len(self._field) == self._want:
                field, self._field = self._field, b""
                self._state(field)
            else:
                self.complete = False

    @property
    def at_boundary(self) -> bool:
        """Whether a frame is complete here and none has begun."""
        return self.complete and not self._pass and not self._field

    def _magic(self, field: bytes) -> None:
        self.complete = False
        if is_skippable(field):
            self._state, self._want = self._skippable, 4
        elif field == _MAGIC:
            self._state, self._want = self._descriptor, 1
        else:
            raise ArchiveError("something that is no zstd frame follows in the zstd stream")

    def _skippable(self, field: bytes) -> None:
        self._pass = int.from_bytes(field, "little")
        self._end_frame()

    def _descriptor(self, field: bytes) -> None:
        flags = field[0]
        single = flags >> 5 & 1
        size = (single, 2, 4, 8)[flags >> 6]
        self._checksum = 4 if flags & 4 else 0
        self._pass = (0 if single else 1) + (0, 1, 2, 4)[flags & 3] + size
        self._state, self._want = self._block, 3

    def _block(self, field: bytes) -> None:
        number = int.from_bytes(field, "little")
        kind = number >> 1 & 3
        self._pass = 1 if kind == 1 else number >> 3
        if number & 1:
            self._pass += self._checksum
            self._end_frame()

    def _end_frame(self) -> None:
        self._state, self._want = self._magic, 4
        self.complete = True


class Watched:
    """Lets a stream pass while its frames are followed."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.frames = Frames()

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size if size >= 0 else _READ_BYTES)
        self.frames.feed(data)
        return data

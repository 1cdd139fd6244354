"""Compressed streams, both ways; which kind it is says the beginning of the stream.

Reading is streaming: no more than a few megabytes are held, however much a small file unpacks to.
Writing is deterministic: the same bytes in give the same bytes out, on every machine with the same
version of the compression library.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import IO, Final, Protocol, cast

import zstandard

from unionfs2.errors import ArchiveError, StoreError

from .digest import Chunk, Readable, Writable
from .zstdframes import Watched, is_skippable

NONE: Final = "none"
GZIP: Final = "gzip"
ZSTD: Final = "zstd"
XZ: Final = "xz"
BZIP2: Final = "bzip2"

_MAGIC: Final = (
    (b"\x1f\x8b", GZIP),
    (b"\x28\xb5\x2f\xfd", ZSTD),
    (b"\xfd7zXZ\0", XZ),
    (b"BZh", BZIP2),
)
_MAGIC_BYTES: Final = 6
_INPUT_BYTES: Final = 128 << 10
# What one step may hold; a bomb is met in portions of this size.
_OUTPUT_BYTES: Final = 1 << 20
_WINDOW_BYTES_MAX: Final = 128 << 20
_GZIP_LEVEL: Final = 6
_ZSTD_LEVEL: Final = 3
_WBITS_GZIP: Final = 31


class _Decoder(Protocol):
    """The common part of the decompressors of the standard library."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def step(self, data: bytes) -> bytes: ...
    @property
    def hungry(self) -> bool: ...


class _Zlib:
    def __init__(self) -> None:
        self._real = zlib.decompressobj(_WBITS_GZIP)

    @property
    def eof(self) -> bool:
        return self._real.eof

    @property
    def unused_data(self) -> bytes:
        return self._real.unused_data

    @property
    def hungry(self) -> bool:
        return not self._real.unconsumed_tail

    def step(self, data: bytes) -> bytes:
        return self._real.decompress(self._real.unconsumed_tail + data, _OUTPUT_BYTES)


class _Other:
    """bz2 and lzma have one interface."""

    def __init__(self, real: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._real = real

    @property
    def eof(self) -> bool:
        return self._real.eof

    @property
    def unused_data(self) -> bytes:
        return self._real.unused_data

    @property
    def hungry(self) -> bool:
        return self._real.needs_input

    def step(self, data: bytes) -> bytes:
        return self._real.decompress(data, _OUTPUT_BYTES)


_DECODERS: Final[dict[str, Callable[[], _Decoder]]] = {
    GZIP: _Zlib,
    BZIP2: lambda: _Other(bz2.BZ2Decompressor()),
    XZ: lambda: _Other(lzma.LZMADecompressor(memlimit=_WINDOW_BYTES_MAX)),
}
_ERRORS: Final = (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError, zstandard.ZstdError)


class _Ahead:
    """A stream whose beginning was read already."""

    def __init__(self, head: bytes, stream: Readable) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int = -1, /) -> bytes:
        if self._head:
            data, self._head = (
                (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
            )
            return data + self._stream.read(-1) if size < 0 else data
        return self._stream.read(size)


class _Decompressed:
    """The content of a compressed stream; members after one another are one content."""

    def __init__(self, stream: Readable, kind: str) -> None:
        self._stream = stream
        self._kind = kind
        self._decoder = _DECODERS[kind]()
        self._ready = b""
        self._left = b""  # read from the stream and not decoded yet
        self._begun = False  # the current member has consumed something

    def read(self, size: int = -1, /) -> bytes:
        """Up to *size* bytes, nothing at the end. Raises ArchiveError."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_OUTPUT_BYTES), b""))
        while not self._ready and size:
            if not self._more():
                return b""
        data, self._ready = self._ready[:size], self._ready[size:]
        return data

    def _more(self) -> bool:
        """Decode a portion; False at the end."""
        if self._decoder.eof:
            self._left = self._decoder.unused_data or self._left
            self._decoder = _DECODERS[self._kind]()
            self._begun = False
        if not self._begun:
            self._left = self._left.lstrip(b"\0")  # padding between members, and after the last
        data = self._left
        self._left = b""
        if not data and self._decoder.hungry:
            data = self._stream.read(_INPUT_BYTES)
            if not data:
                if self._begun:
                    raise ArchiveError(f"the {self._kind} stream is cut short")
                return False
            if not self._begun:
                data = data.lstrip(b"\0")
                if not data:
                    return True
        self._begun = True
        try:
            self._ready = self._decoder.step(data)
        except _ERRORS as exc:
            raise ArchiveError(f"the {self._kind} stream is damaged: {exc}") from exc
        return True


class _Zstd:
    """The content of a zstd stream of any number of frames."""

    def __init__(self, stream: Readable) -> None:
        self._watched = Watched(stream)
        decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX)
        self._reader = decoder.stream_reader(
            cast("IO[bytes]", self._watched), read_size=_INPUT_BYTES, read_across_frames=True
        )

    def read(self, size: int = -1, /) -> bytes:
        """Up to *size* bytes, nothing at the end. Raises ArchiveError."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_OUTPUT_BYTES), b""))
        try:
            data = self._reader.read(size)
        except (zstandard.ZstdError, MemoryError) as exc:
            raise ArchiveError(f"the zstd stream is damaged: {exc}") from exc
        if size and not data and not self._watched.frames.at_boundary:
            raise ArchiveError("the zstd stream is cut short")
        return data


def kind_of(head: bytes) -> str:
    """How a stream is compressed that begins with *head* (6 bytes at least, if it has them)."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if is_skippable(head):
        return ZSTD
    return NONE


def open_compressed(stream: Readable) -> tuple[Readable, str]:
    """The content of *stream*, and how it was compressed.

    Kinds: "none", "gzip", "zstd", "xz", "bzip2". Reading raises ArchiveError where the stream is
    damaged or cut short.
    """
    head = b""
    while len(head) < _MAGIC_BYTES:
        data = stream.read(_INPUT_BYTES)
        if not data:
            break
        head += data
    ahead = _Ahead(head, stream)
    kind = kind_of(head)
    if kind == NONE:
        return ahead, kind
    return _Zstd(ahead) if kind == ZSTD else _Decompressed(ahead, kind), kind


# --- writing --------------------------------------------------------------------------------------


class _Encoder(Protocol):
    def compress(self, data: Chunk, /) -> bytes: ...
    def flush(self) -> bytes: ...


# The gzip member without name, time and system: 255 says "unknown" (RFC 1952, 2.3).
_GZIP_HEADER: Final = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"


class _Gzip:
    def __init__(self) -> None:
        self._real = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -15)
        self._head = _GZIP_HEADER
        self._crc = 0
        self._size = 0

    def compress(self, data: Chunk, /) -> bytes:
        head, self._head = self._head, b""
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        return head + self._real.compress(data)

    def flush(self) -> bytes:
        tail = self._crc.to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little")
        return self._head + self._real.flush() + tail


class _Plain:
    def compress(self, data: Chunk, /) -> bytes:
        return bytes(data)

    def flush(self) -> bytes:
        return b""


def _zstd() -> _Encoder:
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()


_ENCODERS: Final[dict[str, Callable[[], _Encoder]]] = {NONE: _Plain, GZIP: _Gzip, ZSTD: _zstd}


class Compressor:
    """Compresses what is written to it into *out*; close() ends the stream, *out* stays open."""

    def __init__(self, kind: str, out: Writable) -> None:
        if kind not in _ENCODERS:
            raise StoreError(f'cannot compress as "{kind}": known are {", ".join(_ENCODERS)}')
        self._encoder = _ENCODERS[kind]()
        self._out = out
        self.size = 0  # bytes written to *out*

    def write(self, data: Chunk, /) -> int:
        """Take all of *data*."""
        self._put(self._encoder.compress(data))
        return len(data)

    def _put(self, data: bytes) -> None:
        self.size += len(data)
        while data:
            done = self._out.write(data)
            if not isinstance(done, int) or done >= len(data) or not done:
                return
            data = data[done:]

    def close(self) -> None:
        """End the compressed stream."""
        self._put(self._encoder.flush())

    def __enter__(self) -> Compressor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()


def compressor(kind: str, out: Writable) -> Compressor:
    """A writer that compresses into *out*: "gzip", "zstd" or "none". Use it in a with block."""
    return Compressor(kind, out)

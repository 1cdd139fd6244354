"""What an original stream held besides the contents of files, so that it can be made again.

A layer's digest is that of the very stream it came in, and no second program writes the same stream
for the same files. So everything but the contents is kept: headers, padding, what follows the end.
rebuild() puts it together with the files of the diff directory.

The file: a magic line; zstd frames; an index; a trailer that says where the index is. Frames of one
kind hold, one after the other, records: ``L`` with literal bytes, or ``C`` naming a file and the
pieces of it that come here. A later entry of a stream can overwrite a file. Its content is then
saved before it is lost, in a frame of the other kind, which the index assigns to the ``C`` record
with that number. Numbers are little-endian.

Invariant: a frame of records ends at the end of a record.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Final, NamedTuple, NoReturn, cast

import zstandard

from unionfs2 import ondisk, storetrees
from unionfs2 import syscalls as sc
from unionfs2.errors import ArchiveError, show
from unionfs2.storemodel import Digest, Limits

from . import place
from .digest import Writable
from .sink import ShortFile, Sink
from .sparse import Piece

_MAGIC: Final = b"unionfs2 tar-split 1\n"
_TRAILER: Final = struct.Struct("<QQ8s")
_TRAILER_MAGIC: Final = b"\nend\nu2s"
_INDEX: Final = struct.Struct("<BQQQQ")  # kind, offset, length, number of the C record, size
_LITERAL: Final = struct.Struct("<cI")
_CONTENT: Final = struct.Struct("<cIII")  # "C", length of the path, pieces, nothing
_PIECE: Final = struct.Struct("<QQ")
_RECORDS: Final = 1
_SAVED: Final = 2
_LEVEL: Final = 3
_LITERAL_BYTES_MAX: Final = 1 << 20
_COPY_BYTES: Final = 1 << 20
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MODE: Final = 0o600


def _compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)


class _Live(NamedTuple):
    """A file whose content is still in the diff directory."""

    number: int
    pieces: tuple[Piece, ...]


class SplitWriter:
    """Receives from unpack() what rebuilds its stream; finish() makes the file complete."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offset = 0
        self._index: list[bytes] = []
        self._live: dict[bytes, _Live] = {}
        self._number = 0
        self._literal: list[bytes] = []
        self._literal_bytes = 0
        self._packer: zstandard.ZstdCompressionObj | None = None
        self._start = 0
        self.finished = False
        self._write(_MAGIC)

    @classmethod
    @contextmanager
    def create(cls, dir_fd: int, name: bytes = ondisk.TAR_SPLIT_NAME) -> Iterator[SplitWriter]:
        """A new file *name* in *dir_fd*, open for the length of the block."""
        fd = sc.create_at(name, _CREATE, _MODE, dir_fd=dir_fd)
        try:
            yield cls(fd)
        finally:
            os.close(fd)

    # --- called by unpack() ------------------------------------------------------------------

    def keep(self, data: bytes) -> None:
        """Bytes of the stream that are no content."""
        self._literal.append(data)
        self._literal_bytes += len(data)
        if self._literal_bytes > _LITERAL_BYTES_MAX:
            self._end_literal()

    def content(self, path: bytes, stored: int, pieces: list[Piece] | None) -> None:
        """Here *stored* bytes of the file *path* stood in the stream, from these *pieces*."""
        if not stored:
            return
        self._end_literal()
        where = tuple(pieces) if pieces is not None else ((0, stored),)
        self._record(
            _CONTENT.pack(b"C", len(path), len(where), 0)
            + path
            + b"".join(_PIECE.pack(*piece) for piece in where)
        )
        self._live[path] = _Live(self._number, where)
        self._number += 1

    def removed(self, path: bytes, dir_fd: int, name: bytes) -> None:
        """*path* is about to be removed, with all that is below it: save what is still needed."""
        live = self._live.pop(path, None)
        if live is not None:
            self._save(live, dir_fd, name)
            return
        if not stat.S_ISDIR(sc.lstat_at(name, dir_fd).st_mode):
            return
        fd = storetrees.open_inside(name, dir_fd)
        try:
            for found in storetrees.walk(fd):
                live = self._live.pop(path + b"/" + found.path, None)
                if live is not None:
                    self._save(live, found.dir_fd, found.name)
        finally:
            os.close(fd)

    def finish(self) -> None:
        """Write what is left and the index. Nothing is synced."""
        if self.finished:
            return
        self._end_records()
        index = b"".join(self._index)
        packed = _compressor().compress(index)
        at = self._offset
        self._write(packed)
        self._write(_TRAILER.pack(at, len(packed), _TRAILER_MAGIC))
        self._live.clear()
        self.finished = True

    # --- writing -----------------------------------------------------------------------------

    def _end_literal(self) -> None:
        if self._literal:
            data = b"".join(self._literal)
            self._literal.clear()
            self._literal_bytes = 0
            self._record(_LITERAL.pack(b"L", len(data)) + data)

    def _record(self, data: bytes) -> None:
        if self._packer is None:
            self._packer = _compressor().compressobj()
            self._start = self._offset
        self._write(self._packer.compress(data))

    def _end_records(self) -> None:
        self._end_literal()
        if self._packer is not None:
            self._write(self._packer.flush())
            self._packer = None
            self._add_frame(_RECORDS, self._start, 0, 0)

    def _add_frame(self, kind: int, start: int, number: int, size: int) -> None:
        self._index.append(_INDEX.pack(kind, start, self._offset - start, number, size))

    def _save(self, live: _Live, dir_fd: int, name: bytes) -> None:
        self._end_records()
        start = self._offset
        packer = _compressor().compressobj()
        size = 0
        fd = sc.open_at(name, _READ, dir_fd=dir_fd)
        try:
            for offset, length in live.pieces:
                for at in range(offset, offset + length, _COPY_BYTES):
                    data = os.pread(fd, min(_COPY_BYTES, offset + length - at), at)
                    self._write(packer.compress(data))
                    size += len(data)
        finally:
            os.close(fd)
        self._write(packer.flush())
        self._add_frame(_SAVED, start, live.number, size)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = sc.pwrite(self._fd, view, self._offset)
            self._offset += done
            view = view[done:]


# --- the stream again -----------------------------------------------------------------------------


class _Frame(NamedTuple):
    kind: int
    offset: int
    length: int
    number: int
    size: int


def rebuild(split_fd: int, root_fd: int, out: Writable) -> Digest:
    """Write to *out* the stream that *split_fd* was kept of, with contents from *root_fd*.

    The digest returned tells whether it is the stream: compare it with the recorded one. Raises
    ArchiveError, naming the file, when a content is not there any more, or when the record itself
    is damaged; then *out* has received a part.
    """
    try:
        frames = _read_index(split_fd)
        with _Rebuilder(split_fd, root_fd, frames, out) as job:
            return job.run()
    except (zstandard.ZstdError, struct.error, MemoryError) as exc:
        raise _damaged() from exc


def _damaged() -> ArchiveError:
    return ArchiveError(
        "the record of the layer's original stream (tar-split) is damaged, so the stream cannot be"
        " made again; the layer itself is not touched by this"
    )


def _read_index(fd: int) -> list[_Frame]:
    size = os.fstat(fd).st_size
    tail = os.pread(fd, _TRAILER.size, max(0, size - _TRAILER.size))
    if os.pread(fd, len(_MAGIC), 0) != _MAGIC or len(tail) != _TRAILER.size:
        raise _damaged()
    offset, length, magic = _TRAILER.unpack(tail)
    if magic != _TRAILER_MAGIC or offset + length != size - _TRAILER.size:
        raise _damaged()
    with _open_frame(fd, offset, length) as stream:
        data = b"".join(iter(lambda: stream.read(_COPY_BYTES), b""))
    return [_Frame(*fields) for fields in _INDEX.iter_unpack(data)]


class _Window:
    """A part of a file as a stream."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        self._fd = fd
        self._at = offset
        self._end = offset + length

    def read(self, size: int = -1, /) -> bytes:
        left = self._end - self._at
        data = os.pread(self._fd, left if size < 0 else min(size, left), self._at)
        self._at += len(data)
        return data


def _open_frame(fd: int, offset: int, length: int) -> zstandard.ZstdDecompressionReader:
    window = cast("IO[bytes]", _Window(fd, offset, length))
    return zstandard.ZstdDecompressor().stream_reader(window)


class _Rebuilder:
    def __init__(self, split_fd: int, root_fd: int, frames: list[_Frame], out: Writable) -> None:
        self._split_fd = split_fd
        self._frames = frames
        self._saved = {frame.number: frame for frame in frames if frame.kind == _SAVED}
        self._sink = Sink(out)
        self._places = place.Places(root_fd, Limits(), set(), _never)
        self._number = 0

    def __enter__(self) -> _Rebuilder:
        return self

    def __exit__(self, *_: object) -> None:
        self._places.close()
        self._sink.close()

    def run(self) -> Digest:
        for frame in self._frames:
            if frame.kind == _RECORDS:
                self._records(frame)
        return self._sink.finish()

    def _records(self, frame: _Frame) -> None:
        with _open_frame(self._split_fd, frame.offset, frame.length) as stream:
            while kind := stream.read(1):
                if kind == b"L":
                    (length,) = struct.unpack("<I", _exactly(stream, 4))
                    self._sink.write(_exactly(stream, length))
                elif kind == b"C":
                    self._content(stream)
                else:
                    raise _damaged()

    def _content(self, stream: zstandard.ZstdDecompressionReader) -> None:
        length, count, _ = struct.unpack("<III", _exactly(stream, _CONTENT.size - 1))
        path = _exactly(stream, length)
        if b"\0" in path:
            raise _damaged()
        pieces = list(_PIECE.iter_unpack(_exactly(stream, count * _PIECE.size)))
        saved = self._saved.get(self._number)
        self._number += 1
        if saved is not None:
            self._copy_saved(saved)
            return
        self._places.trim()
        try:
            self._copy(path, pieces)
        except (OSError, ShortFile) as exc:
            raise ArchiveError(
                f'"{show(path)}" is not what the original stream held, so the stream cannot be made'
                " again: a committed layer was changed"
            ) from exc

    def _copy_saved(self, frame: _Frame) -> None:
        left = frame.size
        with _open_frame(self._split_fd, frame.offset, frame.length) as stream:
            while left:
                data = stream.read(min(left, _COPY_BYTES))
                if not data:
                    raise _damaged()
                self._sink.write(data)
                left -= len(data)

    def _copy(self, path: bytes, pieces: list[Piece]) -> None:
        parent, _, name = path.rpartition(b"/")
        dir_fd, _ = self._places.directory(parent, make=False)
        try:
            fd = sc.open_at(name, _READ | os.O_NOATIME, dir_fd=dir_fd)
        except PermissionError:  # not the owner
            fd = sc.open_at(name, _READ, dir_fd=dir_fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ShortFile
            for offset, length in pieces:
                self._sink.copy(fd, offset, length)
        finally:
            os.close(fd)


def _exactly(stream: zstandard.ZstdDecompressionReader, size: int) -> bytes:
    # In portions: a damaged length must not reserve gigabytes.
    parts = []
    while size:
        data = stream.read(min(size, _COPY_BYTES))
        if not data:
            raise _damaged()
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _never(path: bytes, marked: bool) -> NoReturn:  # noqa: FBT001 - a callback
    raise AssertionError((path, marked))  # directories are only looked for, never made

"""Sparse members: which pieces of a file a tar stream holds.

GNU tar has four ways to say it: entries in the header and in blocks after it (type "S"), PAX
records one number each (0.0), one record with all numbers (0.1), and lines of text before the data
(1.0), which is the form written here. A map is a list of pieces (offset, length).
"""

from __future__ import annotations

from typing import Final

from unionfs2.errors import ArchiveError

from .tar import BLOCK, parse_number

Piece = tuple[int, int]

GRAIN: Final = 4096  # a hole is made of whole zero blocks of this size
PIECES_MAX: Final = 16384  # finer maps are made coarser, so that every reader takes them
_ENTRY: Final = 24
_IN_HEADER: Final = (386, 4)
_IN_EXTENSION: Final = (0, 21)
_FLAG_IN_HEADER: Final = 482
_FLAG_IN_EXTENSION: Final = 504
_REAL_SIZE: Final = slice(483, 495)


def check(pieces: list[Piece], size: int, stored: int) -> list[Piece]:
    """*pieces* without empty ones; they must rise, stay within *size* and add up to *stored*."""
    at = total = 0
    kept = []
    for offset, length in pieces:
        if offset < at or length < 0 or offset + length > size:
            raise ArchiveError(
                f"the map of a sparse file holds {length} bytes at {offset}, which overlaps or lies"
                f" beyond its size {size}"
            )
        at = offset + length
        total += length
        if length:
            kept.append((offset, length))
    if total != stored:
        raise ArchiveError(
            f"the map of a sparse file describes {total} bytes, but the stream has {stored}"
        )
    return kept


def old_real_size(header: bytes) -> int:
    """Size of the file that a header of type "S" begins."""
    return parse_number(header[_REAL_SIZE], "the size of a sparse file")


def old_entries(block: bytes, *, is_header: bool) -> tuple[list[Piece], bool]:
    """Pieces in a header of type "S" or a block after it; whether another block follows."""
    start, count = _IN_HEADER if is_header else _IN_EXTENSION
    pieces = []
    for at in range(start, start + count * _ENTRY, _ENTRY):
        if not block[at : at + _ENTRY].strip(b"\0"):
            break
        offset = parse_number(block[at : at + 12], "an offset of a sparse map")
        length = parse_number(block[at + 12 : at + 24], "a length of a sparse map")
        pieces.append((offset, length))
    more = block[_FLAG_IN_HEADER if is_header else _FLAG_IN_EXTENSION]
    return pieces, bool(more)


def parse_list(text: bytes) -> list[Piece]:
    """The value of GNU.sparse.map: offsets and lengths by turns, with commas."""
    return pairs(text.split(b",") if text else [])


def pairs(numbers: list[bytes]) -> list[Piece]:
    """Offsets and lengths by turns, each in decimal."""
    if len(numbers) % 2 or not all(item.isdigit() and len(item) <= 20 for item in numbers):
        raise ArchiveError("the map of a sparse file is not made of pairs of decimal numbers")
    values = [int(item) for item in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


class MapText:
    """The text before the data of format 1.0, fed block by block."""

    def __init__(self) -> None:
        self._text = b""
        self._lines: list[bytes] = []

    def feed(self, block: bytes) -> list[Piece] | None:
        """The map, as soon as *block* completes it."""
        *lines, self._text = (self._text + block).split(b"\n")
        self._lines += lines
        if not self._lines:
            if len(self._text) > 20:
                raise ArchiveError("the map of a sparse file does not begin with a number")
            return None
        if not self._lines[0].isdigit() or len(self._lines[0]) > 18:
            raise ArchiveError("the map of a sparse file does not begin with a number")
        wanted = 2 * int(self._lines[0])
        if len(self._lines) <= wanted:
            return None
        return pairs(self._lines[1 : wanted + 1])


def build_map(pieces: list[Piece]) -> bytes:
    """The text for *pieces*, padded to whole blocks."""
    text = b"%d\n" % len(pieces) + b"".join(b"%d\n%d\n" % piece for piece in pieces)
    return text + bytes(-len(text) % BLOCK)


def coarsen(pieces: list[Piece], size: int) -> list[Piece]:
    """*pieces* of whole grains with so many small holes filled that PIECES_MAX is kept."""
    grain = GRAIN
    while len(pieces) > PIECES_MAX:
        grain *= 2
        merged: list[Piece] = []
        for offset, length in pieces:
            start = offset - offset % grain
            stop = min(size, offset + length + -(offset + length) % grain)
            if merged and sum(merged[-1]) >= start:
                merged[-1] = (merged[-1][0], stop - merged[-1][0])
            else:
                merged.append((start, stop - start))
        pieces = merged
    return pieces

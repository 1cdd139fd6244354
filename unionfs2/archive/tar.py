"""One tar header: 512 bytes to a value and back. No I/O, no state.

Formats read: the one of Unix version 7, POSIX ustar, star's variant of it, and GNU. What extends a
header (PAX records, GNU long names, sparse maps) is put together in ``members``. Written are ustar
headers, with whatever does not fit in them left to PAX records.

Names are bytes. All errors are ArchiveError and say what was found and what would be right.
"""

from __future__ import annotations

import functools
import struct
from typing import Final, NamedTuple

from unionfs2.errors import ArchiveError, show

BLOCK: Final = 512
ZERO_BLOCK: Final = bytes(BLOCK)

# Type flags (POSIX pax, "ustar Header Block"; letters are GNU's, tar.h of GNU tar).
REGULAR: Final = b"0"
REGULAR_V7: Final = b"\0"
HARD_LINK: Final = b"1"
SYMLINK: Final = b"2"
CHAR_DEVICE: Final = b"3"
BLOCK_DEVICE: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"
CONTIGUOUS: Final = b"7"
PAX_LOCAL: Final = b"x"
PAX_LOCAL_SOLARIS: Final = b"X"
PAX_GLOBAL: Final = b"g"
GNU_LONG_NAME: Final = b"L"
GNU_LONG_LINK: Final = b"K"
GNU_SPARSE: Final = b"S"
GNU_DUMP_DIR: Final = b"D"
GNU_VOLUME: Final = b"V"
GNU_CONTINUED: Final = b"M"

_FIELDS: Final = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12s")
_MAGIC_USTAR: Final = b"ustar\0"
_MAGIC_GNU: Final = b"ustar "
_TRAILER_STAR: Final = b"tar\0"
_CHECKSUM: Final = slice(148, 156)

ID_MAX: Final = 0xFFFFFFFE  # one less than "leave it alone" of chown(2)
_OCTAL_SIZE_MAX: Final = 8**11 - 1
_OCTAL_ID_MAX: Final = 8**7 - 1
SECONDS_MAX: Final = 1 << 55  # far beyond any file system, and safe for arithmetic in nanoseconds


class Header(NamedTuple):
    """What one block says. *ustar* and *gnu* tell the format; old ones are neither."""

    name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    type: bytes
    link: bytes
    major: int
    minor: int
    ustar: bool
    gnu: bool


@functools.lru_cache(maxsize=1024)  # modes, owners and times of an archive are few
def parse_number(field: bytes, what: str) -> int:
    """A number: octal digits ended by space or NUL, or GNU's base 256. An empty field is 0."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        if field[0] & 0x40:
            return value - (1 << 8 * len(field))
        return value & ~(0x80 << 8 * (len(field) - 1))
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    try:
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:
        pass
    raise ArchiveError(f'{what} is "{show(field.rstrip(bytes(1)))}", which is no octal number')


def checksum(block: bytes) -> int:
    """The sum that belongs into the header: unsigned bytes, its own field taken as spaces."""
    return sum(block) - sum(block[_CHECKSUM]) + 8 * 32


def _check_sum(block: bytes, field: bytes) -> None:
    stated = parse_number(field, "the checksum")
    unsigned = checksum(block)
    if stated == unsigned:
        return
    # Some old programs added signed bytes.
    high = sum(byte >= 0x80 for byte in block) - sum(byte >= 0x80 for byte in field)
    if stated != unsigned - 256 * high:
        raise ArchiveError(
            f"the header's checksum is {stated}, but its bytes add up to {unsigned}: the stream is"
            " damaged, or no tar archive"
        )


def parse_header(block: bytes) -> Header | None:
    """The header in *block*, 512 bytes; None for a block of zeros, which ends an archive."""
    if block == ZERO_BLOCK:
        return None
    (name, mode, uid, gid, size, mtime, check, kind, link, magic, _, _, _, major, minor, prefix,
     tail) = _FIELDS.unpack(block)  # fmt: skip
    _check_sum(block, check)
    ustar = magic == _MAGIC_USTAR
    name = name.partition(b"\0")[0]
    if ustar:
        if tail[8:] == _TRAILER_STAR:
            prefix = prefix[:131]
        prefix = prefix.partition(b"\0")[0]
        if prefix:
            name = prefix + b"/" + name
    is_device = kind in (CHAR_DEVICE, BLOCK_DEVICE)
    return Header(
        name=name,
        mode=parse_number(mode, "the mode"),
        uid=parse_number(uid, "the owner"),
        gid=parse_number(gid, "the group"),
        size=parse_number(size, "the size"),
        mtime=parse_number(mtime, "the time"),
        type=kind,
        link=link.partition(b"\0")[0],
        major=parse_number(major, "the device number") if is_device else 0,
        minor=parse_number(minor, "the device number") if is_device else 0,
        ustar=ustar,
        gnu=magic == _MAGIC_GNU,
    )


def padding(size: int) -> int:
    """Bytes between *size* bytes of data and the next header."""
    return -size % BLOCK


# --- writing --------------------------------------------------------------------------------------


class NewHeader(NamedTuple):
    """A ustar header to be written; *name* and *link* must fit, see fits()."""

    name: bytes
    type: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    link: bytes = b""
    major: int = 0
    minor: int = 0


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """(prefix, name) for the two fields of a ustar header; None when *name* does not fit."""
    if len(name) <= 100:
        return b"", name
    # The separator must leave at most 155 bytes before it and 1 to 100 after it.
    at = name.find(b"/", len(name) - 101, 156)
    if at <= 0 or at == len(name) - 1:
        return None
    return name[:at], name[at + 1 :]


def fits_id(number: int) -> bool:
    """Whether a user or group id fits into its field."""
    return 0 <= number <= _OCTAL_ID_MAX


def fits_size(number: int) -> bool:
    """Whether a size, or a time in seconds, fits into its field."""
    return 0 <= number <= _OCTAL_SIZE_MAX


def build_header(header: NewHeader) -> bytes:
    """The block for *header*. Numbers that do not fit become 0: a PAX record says them."""
    split = split_name(header.name)
    prefix, name = split if split is not None else (b"", header.name[:100])
    block = bytearray(
        b"%b%07o\0%07o\0%07o\0%011o\0%011o\0        %c%bustar\x0000%64b%07o\0%07o\0%b"
        % (
            name.ljust(100, b"\0"),
            header.mode & 0o7777,
            header.uid if fits_id(header.uid) else 0,
            header.gid if fits_id(header.gid) else 0,
            header.size if fits_size(header.size) else 0,
            header.mtime if fits_size(header.mtime) else 0,
            header.type,
            header.link[:100].ljust(100, b"\0"),
            bytes(64),
            header.major if fits_id(header.major) else 0,
            header.minor if fits_id(header.minor) else 0,
            prefix.ljust(167, b"\0"),
        )
    )
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)

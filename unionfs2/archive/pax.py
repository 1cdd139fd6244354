"""PAX records: "length key=value newline", the extension of tar that POSIX defines.

Keys and values are bytes; hdrcharset changes nothing, because names are never decoded here. Which
keys mean what stands in ``members``. An extended attribute's name may hold "=", which would end a
key, so GNU tar's escapes (%25 and %3D) are read and written there.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import unquote_to_bytes

from unionfs2.errors import ArchiveError, show

from .tar import SECONDS_MAX

Record = tuple[bytes, bytes]

XATTR_SCHILY: Final = b"SCHILY.xattr."
XATTR_LIBARCHIVE: Final = b"LIBARCHIVE.xattr."
ACL_ACCESS: Final = b"SCHILY.acl.access"
ACL_DEFAULT: Final = b"SCHILY.acl.default"

_LENGTH_DIGITS_MAX: Final = 12
_TIME: Final = re.compile(rb"(-?)(\d{1,18})(?:\.(\d*))?")
_BILLION: Final = 1_000_000_000


def parse_records(data: bytes) -> Iterator[Record]:
    """Records of an extended header in order, duplicates included."""
    at = 0
    end = len(data)
    while at < end:
        space = data.find(b" ", at, at + _LENGTH_DIGITS_MAX)
        digits = data[at:space] if space >= 0 else b""
        if not digits.isdigit():
            if not data[at:].strip(b"\0"):
                return  # some writers round the size up
            raise ArchiveError(f"an extended header has no record length at its byte {at}")
        stop = at + int(digits)
        if stop > end or stop <= space + 1 or data[stop - 1] != 0x0A:
            raise ArchiveError(
                f"a record of an extended header at its byte {at} claims {int(digits)} bytes and"
                " does not end there with a newline"
            )
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if not equals or not key:
            raise ArchiveError(f"a record of an extended header at its byte {at} has no key")
        yield key, value
        at = stop


def build_record(key: bytes, value: bytes) -> bytes:
    """One record; its length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if rest + len(str(length)) != length:
        length += 1
    return b"%d %b=%b\n" % (length, key, value)


def build_records(records: Iterable[Record]) -> bytes:
    """All *records* in the order given."""
    return b"".join(build_record(key, value) for key, value in records)


# --- values ---------------------------------------------------------------------------------------


def parse_decimal(value: bytes, key: bytes) -> int:
    """A number without sign."""
    if value.isdigit() and len(value) <= 20:
        return int(value)
    raise ArchiveError(f'the extended header says {show(key)}="{show(value)}": that is no number')


def parse_time(value: bytes, key: bytes) -> int:
    """Seconds with any number of decimals, as nanoseconds, rounded down as the kernel does."""
    found = _TIME.fullmatch(value)
    if found is None or int(found[2]) > SECONDS_MAX:
        raise ArchiveError(f'the extended header says {show(key)}="{show(value)}": that is no time')
    decimals = found[3] or b""
    ns = int(found[2]) * _BILLION + int(decimals[:9].ljust(9, b"0"))
    if not found[1]:
        return ns
    return -ns - (1 if decimals[9:].strip(b"0") else 0)


def build_time(ns: int) -> bytes:
    """The shortest text for *ns* nanoseconds."""
    sign = b"-" if ns < 0 else b""
    seconds, rest = divmod(abs(ns), _BILLION)
    if not rest:
        return b"%b%d" % (sign, seconds)
    return b"%b%d.%b" % (sign, seconds, (b"%09d" % rest).rstrip(b"0"))


def xattr_key(name: bytes) -> bytes:
    """Key of the record for the extended attribute *name*."""
    return XATTR_SCHILY + name.replace(b"%", b"%25").replace(b"=", b"%3D")


def xattr_name(key: bytes) -> bytes:
    """Name of the extended attribute that a SCHILY.xattr record holds."""
    name = key[len(XATTR_SCHILY) :]
    if b"%" in name:
        name = name.replace(b"%3D", b"=").replace(b"%25", b"%")
    return name


def libarchive_xattr(key: bytes, value: bytes) -> Record:
    """Name and value of a LIBARCHIVE.xattr record: URL escapes and base 64."""
    name = unquote_to_bytes(key[len(XATTR_LIBARCHIVE) :])
    try:
        return name, base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as exc:
        raise ArchiveError(f"the extended header's {show(key)} is no base 64") from exc

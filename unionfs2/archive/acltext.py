"""Access control lists: the text that tar archives hold, the bytes that Linux keeps.

Only numeric ids are understood: names would be looked up on the machine that unpacks, through
libraries that an image could have planted. The form of star, with the number as a fourth field, is
read too. Layout of the bytes: posix_acl_xattr.h, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from unionfs2.errors import ArchiveError, show

_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")
_NOBODY: Final = 0xFFFFFFFF
_USER: Final = 0x02
_GROUP: Final = 0x08
# word -> tag without and with a qualifier
_TAGS: Final = {
    b"user": (0x01, _USER),
    b"group": (0x04, _GROUP),
    b"mask": (0x10, 0),
    b"other": (0x20, 0),
}
_WORDS: Final = {
    0x01: b"user",
    _USER: b"user",
    0x04: b"group",
    _GROUP: b"group",
    0x10: b"mask",
    0x20: b"other",
}
_BITS: Final = {ord("r"): 4, ord("w"): 2, ord("x"): 1, ord("-"): 0}
_SHORT: Final = {b"u": b"user", b"g": b"group", b"m": b"mask", b"o": b"other"}

Mapper = Callable[[int], int]


def parse(text: bytes) -> bytes:
    """The bytes of the list that *text* says; entries end with a comma or a newline."""
    entries = []
    for line in text.replace(b",", b"\n").split(b"\n"):
        entry = line.partition(b"#")[0].strip()
        if entry:
            entries.append(_parse_entry(entry))
    entries.sort(key=lambda item: (item[0], item[2]))  # the order that the kernel asks for
    return _VERSION + b"".join(_ENTRY.pack(*item) for item in entries)


def _parse_entry(entry: bytes) -> tuple[int, int, int]:
    fields = [part.strip() for part in entry.split(b":")]
    word = _SHORT.get(fields[0], fields[0])
    if word == b"default" and len(fields) > 1:
        fields = fields[1:]
        word = _SHORT.get(fields[0], fields[0])
    if word not in _TAGS or len(fields) not in (2, 3, 4):
        raise _bad(entry)
    if len(fields) == 2:
        fields.insert(1, b"")
    bare, named = _TAGS[word]
    perm = 0
    for letter in fields[2]:
        if letter not in _BITS:
            raise _bad(entry)
        perm |= _BITS[letter]
    if not fields[1]:
        return bare, perm, _NOBODY
    number = fields[3] if len(fields) == 4 else fields[1]
    if not named:
        raise _bad(entry)
    if not number.isdigit() or len(number) > 10 or int(number) >= _NOBODY:
        raise ArchiveError(
            f'the access control list names "{show(fields[1])}" without its number: pack with'
            " numeric owners"
        )
    return named, perm, int(number)


def _bad(entry: bytes) -> ArchiveError:
    return ArchiveError(f'the access control list has an entry "{show(entry)}" that says nothing')


def _entries(value: bytes) -> list[tuple[int, int, int]]:
    body = value[len(_VERSION) :]
    if value[: len(_VERSION)] != _VERSION or len(body) % _ENTRY.size:
        raise ArchiveError("an access control list is not in the form that Linux keeps")
    return list(_ENTRY.iter_unpack(body))


def build(value: bytes) -> bytes:
    """The text for the bytes *value*, one entry a line."""
    lines = []
    for tag, perm, who in _entries(value):
        word = _WORDS.get(tag)
        if word is None:
            raise ArchiveError("an access control list is not in the form that Linux keeps")
        number = b"%d" % who if tag in (_USER, _GROUP) else b""
        letters = bytes(
            letter if perm & bit else ord("-")
            for letter, bit in zip(b"rwx", (4, 2, 1), strict=True)
        )
        lines.append(b"%b:%b:%b\n" % (word, number, letters))
    return b"".join(lines)


def mapped(value: bytes, uid: Mapper, gid: Mapper) -> bytes:
    """*value* with the ids of named users and groups passed through *uid* and *gid*."""
    out = []
    for tag, perm, who in _entries(value):
        number = uid(who) if tag == _USER else gid(who) if tag == _GROUP else who
        out.append(_ENTRY.pack(tag, perm, number))
    return _VERSION + b"".join(out)

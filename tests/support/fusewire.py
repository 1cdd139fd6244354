"""The kernel's end of the FUSE protocol: messages made by hand, answers taken apart.

Independent of unionfs2.devfuse on purpose: formats are written down here a second time, as they
stand in include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

HEADER: Final = 40
ROOT: Final = 1
#: Number of a request that nobody has chosen.
UNIQUE: Final = 0x1122334455667788


def message(
    opcode: int,
    *parts: bytes,
    nodeid: int = ROOT,
    unique: int = UNIQUE,
    uid: int = 0,
    gid: int = 0,
    pid: int = 0,
    extensions: bytes = b"",
) -> bytes:
    """One request: header, *parts*, then extensions (of a multiple of 8 bytes)."""
    body = b"".join(parts) + extensions
    head = struct.pack(
        "<IIQQIIIHH",
        HEADER + len(body), opcode, unique, nodeid, uid, gid, pid, len(extensions) // 8, 0,
    )  # fmt: skip
    return head + body


class Answer(NamedTuple):
    """An answer or a notification; *error* is an errno, or the code of a notification."""

    error: int
    unique: int
    body: bytes

    @property
    def ok(self) -> bool:
        return self.error == 0


def parse(reply: bytes) -> Answer:
    """Take the head off; AssertionError unless the length in it is right."""
    length, error, unique = struct.unpack_from("<IiQ", reply)
    assert length == len(reply)
    assert -512 < error <= 0 if unique else error >= 0, error
    assert not error or not unique or length == 16
    return Answer(-error if unique else error, unique, reply[16:])


class Attr(NamedTuple):
    """struct fuse_attr."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


ATTR: Final = struct.Struct("<QQQqqqIIIIIIIIII")


def attr_of(st: os.stat_result, ino: int, nlink: int) -> Attr:
    """What the kernel is to be told of *st*."""
    (a, a_ns), (m, m_ns), (c, c_ns) = (
        divmod(ns, 10**9) for ns in (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)
    )
    return Attr(
        ino, st.st_size, st.st_blocks, a, m, c, a_ns, m_ns, c_ns,
        st.st_mode, nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_blksize, 0,
    )  # fmt: skip


class Entry(NamedTuple):
    """struct fuse_entry_out."""

    nodeid: int
    generation: int
    entry_valid: int
    attr_valid: int
    entry_valid_nsec: int
    attr_valid_nsec: int
    attr: Attr


def entry(body: bytes) -> Entry:
    """The entry at the beginning of *body*."""
    node, generation, valid, attr_valid, nsec, attr_nsec = struct.unpack_from("<QQQQII", body)
    attr = Attr(*ATTR.unpack_from(body, 40))
    return Entry(node, generation, valid, attr_valid, nsec, attr_nsec, attr)


class Dirent(NamedTuple):
    """struct fuse_dirent, and the node of a fuse_direntplus."""

    name: bytes
    ino: int
    offset: int
    type: int
    entry: Entry | None = None


def dirents(body: bytes, *, plus: bool) -> list[Dirent]:
    """The names in the answer to a READDIR or READDIRPLUS."""
    found, at = [], 0
    while at < len(body):
        node = entry(body[at:]) if plus else None
        at += 128 if plus else 0
        ino, offset, length, kind = struct.unpack_from("<QQII", body, at)
        found.append(Dirent(body[at + 24 : at + 24 + length], ino, offset, kind, node))
        padding = -length % 8
        assert body[at + 24 + length :][:padding] == bytes(padding)
        at += 24 + length + padding
    assert at == len(body)
    return found

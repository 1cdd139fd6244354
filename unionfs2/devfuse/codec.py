"""Bytes in, values out; values in, bytes out. No I/O at all.

``decode`` turns a message of the kernel into a ``Request``; what does not follow the protocol is a
``ProtocolError``, whatever the bytes are. The other functions build complete answers.

Invariant: a name that decode() gives is one component of a path that leads down: it is not empty,
not "." or "..", and has no NUL and no slash in it. Targets of symlinks and names of attributes are
free.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from mmap import mmap
from typing import Any, Final

from . import abi

Buffer = bytes | bytearray | mmap
#: An answer: one piece, or several that go out together.
Reply = bytes | bytearray | list[bytes | memoryview]

#: Names and attributes stay valid as long as the mount lives: nobody else writes to its layers.
CACHE_S: Final = 10**9
_NS: Final = 10**9
_DOTS: Final = (b".", b"..")
_HEADER_SIZE: Final = abi.IN_HEADER.size
_OUT_SIZE: Final = abi.OUT_HEADER.size


class ProtocolError(Exception):
    """A message that no kernel sends. ``unique`` is 0 where not even the header could be read."""

    def __init__(self, text: str, unique: int = 0) -> None:
        super().__init__(text)
        self.unique = unique


class Request:
    """One message: who asks, about which node, and the arguments of its row."""

    __slots__ = ("args", "gid", "inline", "kept", "nodeid", "opcode", "pid", "uid", "unique")

    def __init__(
        self,
        opcode: int,
        unique: int,
        nodeid: int,
        uid: int,
        gid: int,
        pid: int,
        args: tuple[Any, ...],
    ) -> None:
        self.opcode = opcode
        self.unique = unique
        self.nodeid = nodeid
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.args = args
        # Whether the thread that reads the device works on it, whose buffers may be used.
        self.inline = True
        # The buffer that ``args`` points into, when the request outlives the next message.
        self.kept: mmap | None = None

    def __repr__(self) -> str:
        row = abi.ROWS.get(self.opcode)
        name = row.name if row is not None else str(self.opcode)
        return f"{name} {self.unique} of node {self.nodeid} by {self.uid}:{self.gid} {self.pid}"


def decode(buffer: Buffer, length: int) -> Request:
    """The request in the first *length* bytes of *buffer*. Raises ProtocolError.

    Data of a WRITE is a view of *buffer*, everything else a copy.
    """
    if length < _HEADER_SIZE:
        raise ProtocolError(f"a message of {length} bytes has no header")
    said, opcode, unique, nodeid, uid, gid, pid, extensions, _ = abi.IN_HEADER.unpack_from(buffer)
    if said != length or not unique:
        raise ProtocolError(f"message {unique} of {length} bytes says that it has {said}", unique)
    decoder = _DECODERS.get(opcode)
    end = length - extensions * 8
    if decoder is None or end < _HEADER_SIZE:
        if decoder is None:
            return Request(opcode, unique, nodeid, uid, gid, pid, ())
        raise ProtocolError("extensions are longer than their message", unique)
    try:
        args = decoder(buffer, end)
    except ProtocolError as exc:
        raise ProtocolError(f"{abi.ROWS[opcode].name}: {exc}", unique) from None
    return Request(opcode, unique, nodeid, uid, gid, pid, args)


# --- arguments ------------------------------------------------------------------------------------

Decoder = Callable[[Buffer, int], tuple[Any, ...]]


def _free_name(buffer: Buffer, end: int, start: int = _HEADER_SIZE) -> bytes:
    name = bytes(buffer[start:end])
    if name[-1:] != b"\0" or len(name) < 2:
        raise ProtocolError("the name does not end, or is empty")
    name = name[:-1]
    if b"\0" in name:
        raise ProtocolError("the name has a NUL in it")
    return name


def one_name(buffer: Buffer, end: int, start: int = _HEADER_SIZE) -> bytes:
    """The name that ends with a NUL at *end*; ProtocolError if it is none or leads elsewhere."""
    name = _free_name(buffer, end, start)
    if b"/" in name or name in _DOTS:
        raise ProtocolError("the name leads elsewhere")
    return name


def _two_names(buffer: Buffer, start: int, end: int, *, second_free: bool) -> tuple[bytes, bytes]:
    parts = bytes(buffer[start:end]).split(b"\0")
    if len(parts) != 3 or parts[2] or not parts[0] or not parts[1]:
        raise ProtocolError("not two names")
    for name in parts[: 1 if second_free else 2]:
        if b"/" in name or name in _DOTS:
            raise ProtocolError("a name leads elsewhere")
    return parts[0], parts[1]


def _decoder_of(opcode: int, row: abi.Row) -> Decoder:
    """The function that takes a message of this kind apart."""
    layout = row.layout
    if layout is None:
        return _without_struct(opcode, row)
    unpack, start = layout.unpack_from, _HEADER_SIZE + layout.size
    take_name = _free_name if opcode == abi.GETXATTR else one_name

    def check(end: int) -> None:
        if end < start:
            raise ProtocolError(f"{end} bytes are too few")

    def fixed(buffer: Buffer, end: int) -> tuple[Any, ...]:
        check(end)
        return unpack(buffer, _HEADER_SIZE)

    def with_name(buffer: Buffer, end: int) -> tuple[Any, ...]:
        check(end)
        return (*unpack(buffer, _HEADER_SIZE), take_name(buffer, end, start))

    def with_names(buffer: Buffer, end: int) -> tuple[Any, ...]:
        check(end)
        names = _two_names(buffer, start, end, second_free=False)
        return (*unpack(buffer, _HEADER_SIZE), *names)

    def with_data(buffer: Buffer, end: int) -> tuple[Any, ...]:
        check(end)
        return (*unpack(buffer, _HEADER_SIZE), bytes(buffer[start:end]))

    if row.data:
        return with_data
    return (fixed, with_name, with_names)[row.names]


def _without_struct(opcode: int, row: abi.Row) -> Decoder:
    def nothing(buffer: Buffer, end: int) -> tuple[Any, ...]:
        del buffer, end
        return ()

    take_name = _free_name if opcode == abi.REMOVEXATTR else one_name

    def name(buffer: Buffer, end: int) -> tuple[Any, ...]:
        return (take_name(buffer, end),)

    def names(buffer: Buffer, end: int) -> tuple[Any, ...]:
        return _two_names(buffer, _HEADER_SIZE, end, second_free=opcode == abi.SYMLINK)

    return (nothing, name, names)[row.names]


def _write(buffer: Buffer, end: int) -> tuple[Any, ...]:
    start = _HEADER_SIZE + abi.WRITE_IN.size
    if end < start:
        raise ProtocolError(f"{end} bytes are too few")
    fh, offset, size, write_flags, _owner, flags = abi.WRITE_IN.unpack_from(buffer, _HEADER_SIZE)
    if size != end - start:
        raise ProtocolError(f"{end - start} bytes of data, said to be {size}")
    return fh, offset, write_flags, flags, memoryview(buffer)[start:end]


def setxattr_args(rest: bytes, size: int, *, extended: bool) -> tuple[int, bytes, bytes]:
    """(setxattr_flags, name, value) of what follows the first 8 bytes of a SETXATTR."""
    setxattr_flags = 0
    if extended:
        if len(rest) < 8:
            raise ProtocolError("SETXATTR: too short")
        setxattr_flags = int.from_bytes(rest[:4], _ORDER)
        rest = rest[8:]
    name, end, value = rest.partition(b"\0")
    if not end or not name or len(value) != size:
        raise ProtocolError("SETXATTR: name and value do not fit the size")
    return setxattr_flags, name, value


def forgets(count: int, data: bytes) -> list[tuple[int, int]]:
    """(node id, lookups) of a BATCH_FORGET."""
    if len(data) < count * abi.FORGET_ONE.size:
        raise ProtocolError("BATCH_FORGET: shorter than its count")
    return list(abi.FORGET_ONE.iter_unpack(data[: count * abi.FORGET_ONE.size]))


_ORDER: Final = sys.byteorder
_DECODERS: Final[dict[int, Decoder]] = {
    opcode: _decoder_of(opcode, row) for opcode, row in abi.ROWS.items()
}
_DECODERS[abi.WRITE] = _write

# --- answers --------------------------------------------------------------------------------------

_pack_head = abi.OUT_HEADER.pack
_pack_entry = abi.ENTRY_OUT.pack
_pack_attr = abi.ATTR_OUT.pack
_ENTRY_SIZE: Final = abi.ENTRY_OUT.size
_ATTR_SIZE: Final = abi.ATTR_OUT.size


def ok(unique: int) -> bytes:
    """Done, and nothing to say."""
    return _pack_head(_OUT_SIZE, 0, unique)


def failed(unique: int, number: int) -> bytes:
    """Answer with errno *number*."""
    return _pack_head(_OUT_SIZE, -number, unique)


def data(unique: int, content: bytes | memoryview) -> Reply:
    """Bytes as they are."""
    return [_pack_head(_OUT_SIZE + len(content), 0, unique), content]


def no_entry(unique: int) -> bytes:
    """The name does not exist, which the kernel may remember (node id 0)."""
    return _pack_entry(_ENTRY_SIZE, 0, unique, 0, 0, CACHE_S, 0, 0, 0, *_NOTHING)


def entry(unique: int, node_id: int, ino: int, nlink: int, st: os.stat_result) -> bytes:
    """A node with its attributes, for LOOKUP and everything that makes names."""
    atime, mtime, ctime = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
    return _pack_entry(
        _ENTRY_SIZE, 0, unique, node_id, 0, CACHE_S, CACHE_S, 0, 0,
        ino, st.st_size, st.st_blocks,
        atime // _NS, mtime // _NS, ctime // _NS, atime % _NS, mtime % _NS, ctime % _NS,
        st.st_mode, nlink, st.st_uid, st.st_gid, st.st_rdev & 0xFFFFFFFF, st.st_blksize, 0,
    )  # fmt: skip


def attr(unique: int, ino: int, nlink: int, st: os.stat_result) -> bytes:
    """Attributes, for GETATTR and SETATTR."""
    atime, mtime, ctime = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
    return _pack_attr(
        _ATTR_SIZE, 0, unique, CACHE_S, 0, 0,
        ino, st.st_size, st.st_blocks,
        atime // _NS, mtime // _NS, ctime // _NS, atime % _NS, mtime % _NS, ctime % _NS,
        st.st_mode, nlink, st.st_uid, st.st_gid, st.st_rdev & 0xFFFFFFFF, st.st_blksize, 0,
    )  # fmt: skip


def with_open(
    entry_reply: bytes, unique: int, fh: int, open_flags: int, backing_id: int = 0
) -> bytes:
    """The answer to CREATE or TMPFILE: that of a LOOKUP and that of an OPEN in one."""
    body = entry_reply[_OUT_SIZE:] + abi.OPEN_PART.pack(fh, open_flags, backing_id)
    return _pack_head(_OUT_SIZE + len(body), 0, unique) + body


def opened(unique: int, fh: int, open_flags: int, backing_id: int = 0) -> bytes:
    """The answer to OPEN or OPENDIR."""
    return abi.OPEN_OUT.pack(abi.OPEN_OUT.size, 0, unique, fh, open_flags, backing_id)


def written(unique: int, size: int) -> bytes:
    """How much of a WRITE or a copy was done."""
    return abi.WRITE_OUT.pack(abi.WRITE_OUT.size, 0, unique, size)


def copied_64(unique: int, size: int) -> bytes:
    """How much was copied, in the form of COPY_FILE_RANGE_64."""
    return abi.LSEEK_OUT.pack(abi.LSEEK_OUT.size, 0, unique, size)


def sized(unique: int, size: int) -> bytes:
    """How large a value is, for GETXATTR and LISTXATTR that ask with size 0."""
    return abi.GETXATTR_OUT.pack(abi.GETXATTR_OUT.size, 0, unique, size)


def position(unique: int, offset: int) -> bytes:
    """The answer to LSEEK."""
    return abi.LSEEK_OUT.pack(abi.LSEEK_OUT.size, 0, unique, offset)


def ioctl(unique: int, out: bytes) -> bytes:
    """The answer to an ioctl that worked."""
    return abi.IOCTL_OUT.pack(abi.IOCTL_OUT.size + len(out), 0, unique, 0, 0, 0, 0) + out


def statfs(unique: int, real: os.statvfs_result, name_max: int) -> bytes:
    """The answer to STATFS."""
    return abi.STATFS_OUT.pack(
        abi.STATFS_OUT.size, 0, unique,
        real.f_blocks, real.f_bfree, real.f_bavail, real.f_files, real.f_ffree,
        real.f_bsize, name_max, real.f_frsize,
    )  # fmt: skip


_NOTHING: Final = (0,) * 16


def inval_inode(node_id: int, offset: int, length: int) -> bytes:
    """Attributes are to be asked for again; pages too unless *offset* is negative."""
    size = abi.INVAL_INODE_OUT.size
    return abi.INVAL_INODE_OUT.pack(size, abi.NOTIFY_INVAL_INODE, 0, node_id, offset, length)


def inval_entry(parent_id: int, name: bytes) -> bytes:
    """The name is to be looked up again."""
    size = abi.INVAL_ENTRY_OUT.size + len(name) + 1
    head = abi.INVAL_ENTRY_OUT.pack(size, abi.NOTIFY_INVAL_ENTRY, 0, parent_id, len(name), 0)
    return head + name + b"\0"


def delete(parent_id: int, node_id: int, name: bytes) -> bytes:
    """The name has gone, and the kernel may drop it without asking (FUSE_NOTIFY_DELETE)."""
    size = abi.DELETE_OUT.size + len(name) + 1
    head = abi.DELETE_OUT.pack(size, abi.NOTIFY_DELETE, 0, parent_id, node_id, len(name), 0)
    return head + name + b"\0"


def resend() -> bytes:
    """Have the kernel hand out again what was read and is not answered (HAS_RESEND)."""
    return _pack_head(_OUT_SIZE, abi.NOTIFY_RESEND, 0)


# --- listings -------------------------------------------------------------------------------------

_pack_dirent = abi.DIRENT_OUT.pack
_pack_direntplus = abi.DIRENTPLUS_OUT.pack
_PADDING: Final = tuple(b"\0" * count for count in range(8))


def dirent(name: bytes, ino: int, next_offset: int, kind: int) -> bytes:
    """One name of a READDIR; *kind* as S_IFMT bits."""
    head = _pack_dirent(ino, next_offset, len(name), kind >> 12)
    return head + name + _PADDING[-len(name) & 7]


def direntplus(
    name: bytes, next_offset: int, node_id: int, ino: int, nlink: int, st: os.stat_result
) -> bytes:
    """One name of a READDIRPLUS with its node, which then counts as looked up."""
    atime, mtime, ctime = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
    mode = st.st_mode
    head = _pack_direntplus(
        node_id, 0, CACHE_S, CACHE_S, 0, 0,
        ino, st.st_size, st.st_blocks,
        atime // _NS, mtime // _NS, ctime // _NS, atime % _NS, mtime % _NS, ctime % _NS,
        mode, nlink, st.st_uid, st.st_gid, st.st_rdev & 0xFFFFFFFF, st.st_blksize, 0,
        ino, next_offset, len(name), mode >> 12,
    )  # fmt: skip
    return head + name + _PADDING[-len(name) & 7]


def direntplus_unknown(name: bytes, ino: int, next_offset: int, kind: int) -> bytes:
    """One name of a READDIRPLUS without a node (node id 0): the kernel looks it up when needed."""
    head = _pack_direntplus(
        0, 0, 0, 0, 0, 0, *_NOTHING, ino, next_offset, len(name), kind >> 12
    )  # fmt: skip
    return head + name + _PADDING[-len(name) & 7]

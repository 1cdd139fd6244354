"""Inode flags: what ``lsattr``, ``chattr`` and ``xfs_io`` ask for, by ioctl(2) and file_getattr(2).

Source: ovl_fileattr_get(), ovl_fileattr_set() in fs/overlayfs/inode.c. The flags are those of the
real object. Immutable and append-only are not: on a copied-up object they are letters in the
``protattr`` mark, since set on the upper inode they would stop the overlay itself.

Values are those of the ioctls, in the machine's byte order: 4 bytes of FS_*_FL bits, or 28 bytes
``struct fsxattr``. Errors: ENOTTY for a special file or where the file system has no flags, EPERM,
EROFS, and what the ioctl on the upper raises.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from . import attrs, copyup, protect
from . import nodes as nd
from . import syscalls as sc
from .nodes import Dir, Node
from .stack import Stack, oserror

GETFLAGS: Final = 0x80086601
SETFLAGS: Final = 0x40086602
FSGETXATTR: Final = 0x801C581F
FSSETXATTR: Final = 0x401C5820
GETTERS: Final = (GETFLAGS, FSGETXATTR)
SETTERS: Final = (SETFLAGS, FSSETXATTR)

_SIZES: Final = {GETFLAGS: 4, SETFLAGS: 4, FSGETXATTR: 28, FSSETXATTR: 28}
# The bits for immutable and append-only in either form (FS_*_FL, FS_XFLAG_*).
_IMMUTABLE: Final = {4: sc.FS_IMMUTABLE_FL, 28: 0x08}
_APPEND: Final = {4: sc.FS_APPEND_FL, 28: 0x10}
_BITS: Final = struct.Struct("=I")


def get(stack: Stack, node: Node, cmd: int) -> bytes:
    """The value that GETFLAGS or FSGETXATTR gives for *node*."""
    fd = _open(stack, node)
    try:
        raw = _ask(fd, cmd)
    finally:
        os.close(fd)
    bits = _BITS.unpack_from(raw)[0] & ~_protecting(len(raw))
    return _BITS.pack(bits | _shown(stack, node, len(raw))) + raw[4:]


def check(stack: Stack, node: Node, cmd: int, value: bytes) -> None:
    """What put() would be refused for before anything is copied up."""
    _ = stack.w
    if len(value) < _SIZES[cmd]:
        raise oserror(errno.EINVAL)
    if not node.is_dir and not node.is_regular:
        raise oserror(errno.ENOTTY)


def put(stack: Stack, node: Node, cmd: int, value: bytes) -> None:
    """Set what SETFLAGS or FSSETXATTR gives; copies *node* up first."""
    check(stack, node, cmd, value)
    size = _SIZES[cmd]
    copyup.whole(stack, node)
    bits = _BITS.unpack_from(value)[0]
    _protect(
        stack, node, immutable=bool(bits & _IMMUTABLE[size]), append=bool(bits & _APPEND[size])
    )
    fd = _open(stack, node)
    try:
        sc.set_file_attributes(fd, cmd, _BITS.pack(bits & ~_protecting(size)) + value[4:size])
    finally:
        os.close(fd)


def _ask(fd: int, cmd: int) -> bytes:
    buffer = bytearray(max(8, _SIZES[cmd]))  # some file systems write a long for the int
    fcntl.ioctl(fd, cmd, buffer, True)
    return bytes(buffer[: _SIZES[cmd]])


def _open(stack: Stack, node: Node) -> int:
    if isinstance(node, Dir):
        if node.orphan >= 0:
            return sc.reopen(node.orphan, os.O_RDONLY | os.O_DIRECTORY)
        return node.top.open_list()
    if not node.is_regular:
        raise oserror(errno.ENOTTY)
    return attrs.open_object(stack, node, os.O_RDONLY | os.O_NOATIME)


def _protecting(size: int) -> int:
    return _IMMUTABLE[size] | _APPEND[size]


def _shown(stack: Stack, node: Node, size: int) -> int:
    found = protect.flags(stack, node)
    bits = _IMMUTABLE[size] if found & nd.IMMUTABLE else 0
    return bits | (_APPEND[size] if found & nd.APPEND_ONLY else 0)


def _protect(stack: Stack, node: Node, *, immutable: bool, append: bool) -> None:
    """Write ``protattr``, or take it away (ovl_set_protattr())."""
    path, follow = stack.object_path(node)
    key = stack.dialect.protattr
    value = (b"a" if append else b"") + (b"i" if immutable else b"")
    before = stack.before(node)
    if value:
        sc.setxattr(path, key, value, 0, follow_symlinks=follow)
    else:
        try:
            sc.removexattr(path, key, follow_symlinks=follow)
        except OSError as exc:
            if exc.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    stack.recount(node, before)
    node.flags &= ~(nd.IMMUTABLE | nd.APPEND_ONLY | nd.NO_XATTRS)
    node.flags |= nd.PROTECTION_KNOWN
    node.flags |= (nd.IMMUTABLE if immutable else 0) | (nd.APPEND_ONLY if append else 0)

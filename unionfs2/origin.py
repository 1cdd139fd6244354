"""The ``origin`` handle: which lower object an upper one was copied from.

Byte layout and meaning as struct ovl_fb of fs/overlayfs/overlayfs.h; made and read with
name_to_handle_at(2) and open_by_handle_at(2), so it equals what the kernel writes.
"""

from __future__ import annotations

import os
import stat
import sys

from . import ondisk
from . import syscalls as sc
from .branch import Branch


def encode(uuid: bytes | None, handle: sc.FileId) -> bytes:
    """Bytes of the ``origin`` attribute for an object of a file system with *uuid*."""
    flags = ondisk.FH_FLAG_BIG_ENDIAN if sys.byteorder == "big" else 0
    head = bytes(
        (
            ondisk.FH_VERSION,
            ondisk.FH_MAGIC,
            ondisk.FH_HEADER_BYTES + len(handle.fid),
            flags,
            handle.type,
        )
    )
    return head + (uuid or ondisk.UUID_NULL) + handle.fid


def decode(raw: bytes) -> tuple[bytes, sc.FileId] | None:
    """(file system UUID, handle), or None where the origin is unknown (ovl_check_fb_len())."""
    if len(raw) <= ondisk.FH_HEADER_BYTES or raw[0] != ondisk.FH_VERSION:
        return None
    if raw[1] != ondisk.FH_MAGIC or raw[2] > len(raw) or raw[2] <= ondisk.FH_HEADER_BYTES:
        return None
    flags = raw[3]
    if flags & ~ondisk.FH_FLAGS_KNOWN:
        return None
    big = bool(flags & ondisk.FH_FLAG_BIG_ENDIAN)
    if not flags & ondisk.FH_FLAG_ANY_ENDIAN and big != (sys.byteorder == "big"):
        return None
    uuid = raw[5 : ondisk.FH_HEADER_BYTES]
    return uuid, sc.FileId(raw[4], raw[ondisk.FH_HEADER_BYTES : raw[2]])


def of_object(branch: Branch, name: bytes, dir_fd: int) -> bytes:
    """Value to store for a lower object; empty where its handle could not be decoded later."""
    if branch.identity.handle_fd < 0:
        return b""
    try:
        return encode(branch.identity.uuid, sc.name_to_handle(name, dir_fd))
    except OSError:
        return b""


def resolve(raw: bytes, lowers: list[Branch]) -> tuple[os.stat_result, Branch] | None:
    """The live lower object that *raw* names, None when unknown or gone (ovl_check_origin_fh())."""
    found = decode(raw)
    if found is None:
        return None
    uuid, handle = found
    tried: set[int] = set()
    for branch in lowers:
        if (
            branch.identity.handle_fd < 0
            or branch.dev in tried
            or (branch.identity.uuid or ondisk.UUID_NULL) != uuid
        ):
            continue
        tried.add(branch.dev)
        try:
            fd = sc.open_by_handle(branch.identity.handle_fd, handle, os.O_PATH)
        except OSError:
            continue
        try:
            return os.stat(fd), branch
        finally:
            os.close(fd)
    return None


def same_type(one: int, other: int) -> bool:
    """Whether two st_mode values are of one file type."""
    return stat.S_IFMT(one) == stat.S_IFMT(other)

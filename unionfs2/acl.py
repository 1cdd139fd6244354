"""POSIX access control lists as bytes: what an object made in the work directory must inherit.

An object that is made in place inherits from its parent by the backing file system. One that is
made in the work directory and renamed over a whiteout does not, so the rule of
posix_acl_create() (fs/posix_acl.c) is applied here. Layout: posix_acl_xattr.h, little-endian.
"""

from __future__ import annotations

import stat
import struct
from typing import Final, NamedTuple

_VERSION: Final = 2
_USER_OBJ: Final = 0x01
_USER: Final = 0x02
_GROUP_OBJ: Final = 0x04
_GROUP: Final = 0x08
_MASK: Final = 0x10
_OTHER: Final = 0x20
_ENTRY: Final = struct.Struct("<HHI")


class Inherited(NamedTuple):
    """Mode of the new object; its access ACL if the mode cannot say it all."""

    mode: int
    access: bytes | None


def inherit(default: bytes, mode: int) -> Inherited:
    """Apply a parent's default ACL to the *mode* a caller asked for (umask does not count)."""
    entries = [_ENTRY.unpack_from(default, at) for at in range(4, len(default), _ENTRY.size)]
    has_mask = any(tag == _MASK for tag, _, _ in entries)
    bits = mode & 0o777
    out = [struct.pack("<I", _VERSION)]
    extended = False
    for tag, granted, who in entries:
        perm = granted
        if tag == _USER_OBJ:
            perm &= bits >> 6
            bits = bits & 0o077 | perm << 6
        elif tag == _OTHER:
            perm &= bits
            bits = bits & 0o770 | perm
        elif tag == _MASK or (tag == _GROUP_OBJ and not has_mask):
            perm &= bits >> 3
            bits = bits & 0o707 | perm << 3
        extended = extended or tag in (_USER, _GROUP, _MASK)
        out.append(_ENTRY.pack(tag, perm, who))
    new_mode = stat.S_IFMT(mode) | mode & 0o7000 | bits
    return Inherited(new_mode, b"".join(out) if extended else None)

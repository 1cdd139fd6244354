"""System calls that Python's standard library lacks, straight from the C library.

Independent of unionfs2 on purpose: a mistake there must not hide itself here.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from pathlib import Path

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.closedir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.telldir.argtypes = [ctypes.c_void_p]
_libc.seekdir.restype = None
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
_libc.rewinddir.restype = None
_libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.readdir64.restype = ctypes.c_void_p
_libc.readdir64.argtypes = [ctypes.c_void_p]

_AT_FDCWD = -100
_DIRENT_NAME_OFFSET = 19

# tags of a POSIX ACL, see acl(5) and the kernel's posix_acl_xattr.h
ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK, ACL_OTHER = 1, 2, 4, 8, 0x10, 0x20
ACL_NO_ID = 0xFFFFFFFF
ACL_ACCESS = "system.posix_acl_access"
ACL_DEFAULT = "system.posix_acl_default"

# VFS_CAP_REVISION_2 with the effective bit, cap_net_raw permitted
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
CAPABILITY_NAME = "security.capability"


def _raise(path: object) -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), str(path))


def renameat2(old: Path, new: Path, flags: int) -> None:
    """Rename with flags."""
    args = (_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags))
    if _libc.renameat2(*args) != 0:
        _raise(old)


@dataclass(frozen=True, slots=True)
class Dirent:
    """One entry as readdir(3) gives it."""

    ino: int
    type: int
    name: bytes


class DirStream:
    """A directory stream of the C library, for what os.scandir does not show."""

    def __init__(self, path: Path) -> None:
        self._dir = _libc.opendir(os.fsencode(path))
        if not self._dir:
            _raise(path)

    def close(self) -> None:
        _libc.closedir(self._dir)

    def read(self) -> Dirent | None:
        """The next entry; None at the end."""
        ctypes.set_errno(0)
        address = _libc.readdir64(self._dir)
        if not address:
            if ctypes.get_errno():
                _raise("readdir")
            return None
        ino, _, _, kind = struct.unpack_from("<QqHB", ctypes.string_at(address, 19))
        return Dirent(ino, kind, ctypes.string_at(address + _DIRENT_NAME_OFFSET))

    def rest(self) -> list[Dirent]:
        """All entries from here on."""
        found = []
        while (entry := self.read()) is not None:
            found.append(entry)
        return found

    def tell(self) -> int:
        return int(_libc.telldir(self._dir))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._dir, position)

    def rewind(self) -> None:
        _libc.rewinddir(self._dir)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL as its xattr holds it, from (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def simple_acl(
    user: int, user_perm: int, *, mask: int = 7, group: int = 5, other: int = 0
) -> bytes:
    """An ACL that names one user beside owner (rwx), group and others."""
    return acl(
        (ACL_USER_OBJ, 7, ACL_NO_ID),
        (ACL_USER, user_perm, user),
        (ACL_GROUP_OBJ, group, ACL_NO_ID),
        (ACL_MASK, mask, ACL_NO_ID),
        (ACL_OTHER, other, ACL_NO_ID),
    )


def permissions(path: Path | int) -> int:
    """The twelve mode bits."""
    found = os.fstat(path) if isinstance(path, int) else os.lstat(path)
    return found.st_mode & 0o7777


def is_whiteout(path: Path) -> bool:
    """Whether an object of a layer hides the name below."""
    found = os.lstat(path)
    return (found.st_mode & 0o170000) == 0o020000 and found.st_rdev == 0

"""System calls that Python's standard library lacks, straight from the C library.

Independent of unionfs2 on purpose: a mistake there must not hide itself here.
"""

from __future__ import annotations

import ctypes
import fcntl
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


# --- allocation, times of birth, sync, inode flags -----------------------------------------------

FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_COLLAPSE_RANGE = 8
FALLOC_ZERO_RANGE = 16

FS_NODUMP = 0x40
FS_IMMUTABLE = 0x10
FS_APPEND = 0x20
XFLAG_IMMUTABLE = 0x08
XFLAG_APPEND = 0x10

_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602
_FSGETXATTR, _FSSETXATTR = 0x801C581F, 0x401C5820
_STATX_BTIME = 0x800


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        _raise(fd)


def syncfs(fd: int) -> None:
    """syncfs(2)."""
    if _libc.syncfs(fd) != 0:
        _raise(fd)


def give_name(fd: int, path: Path) -> None:
    """linkat(2) of an open file; os.link() does not follow where it says so."""
    source = os.fsencode(f"/proc/self/fd/{fd}")
    if _libc.linkat(_AT_FDCWD, source, _AT_FDCWD, os.fsencode(path), 0x400) != 0:
        _raise(path)


def birth_ns(path: Path) -> int | None:
    """Time of birth by statx(2), None where the file system has none."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), 0x100, _STATX_BTIME, buffer) != 0:
        _raise(path)
    (mask,) = struct.unpack_from("<I", buffer, 0)
    seconds, nanoseconds = struct.unpack_from("<qI", buffer, 80)
    return int(seconds * 10**9 + nanoseconds) if mask & _STATX_BTIME else None


def get_flags(path: Path) -> int:
    """What lsattr(1) shows."""
    return int(struct.unpack_from("<I", _ioctl(path, _GETFLAGS, bytes(8)))[0])


def set_flags(path: Path, flags: int) -> None:
    """What chattr(1) sets."""
    _ioctl(path, _SETFLAGS, struct.pack("<I4x", flags))


def get_xflags(path: Path) -> int:
    """Flags in the form of xfs_io(8)."""
    return int(struct.unpack_from("<I", _ioctl(path, _FSGETXATTR, bytes(28)))[0])


def set_xflags(path: Path, flags: int) -> None:
    """The same, to set."""
    _ioctl(path, _FSSETXATTR, struct.pack("<I24x", flags))


def _ioctl(path: Path, command: int, value: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return fcntl.ioctl(fd, command, value)
    finally:
        os.close(fd)

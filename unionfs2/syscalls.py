"""The one way to the operating system for files: calls relative to directory descriptors.

Rules that hold here:

* Nothing in the package changes a disk except through a name of this module. ``MUTATORS`` lists
  them, so that a test can make the n-th change fail (tests/support/faults.py).
* Names are single path components unless a docstring says otherwise; every call that could
  follow a symbolic link is told not to.
* This module, ``mountcalls`` and ``quotacalls`` are the only ones that use ctypes for system
  calls.

All functions raise OSError with the errno of the call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# System call numbers above 423 are the same on every architecture.
_NR_OPENAT2: Final = 437
_NR_FCHMODAT2: Final = 452
_NR_LISTXATTRAT: Final = 465

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_EMPTY_PATH: Final = 0x1000
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_BENEATH: Final = 0x08
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2
XATTR_CREATE: Final = os.XATTR_CREATE
XATTR_REPLACE: Final = os.XATTR_REPLACE

STATX_ATTR_IMMUTABLE: Final = 0x10
STATX_ATTR_APPEND: Final = 0x20
FS_SYNC_FL: Final = 0x08
FS_IMMUTABLE_FL: Final = 0x10
FS_APPEND_FL: Final = 0x20
FS_NOATIME_FL: Final = 0x80
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_IOC_GETFSUUID: Final = 0x80111500
_BTRFS_IOC_FS_INFO: Final = 0x8400941F
_FICLONE: Final = 0x40049409

_PR_GET_SECUREBITS: Final = 27
_PR_SET_SECUREBITS: Final = 28
_SECBIT_NO_SETUID_FIXUP: Final = 1 << 2

_DIR_PATH: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _raise(name: bytes | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), name)


# --- opening ------------------------------------------------------------------------------------

open_at = os.open
close = os.close


def open_dir(name: bytes, dir_fd: int) -> int:
    """O_PATH descriptor of directory *name* below *dir_fd*; a symlink is ENOTDIR."""
    return os.open(name, _DIR_PATH, dir_fd=dir_fd)


def open_dir_no_xdev(name: bytes, dir_fd: int) -> int:
    """Like open_dir(), but a mount point is EXDEV (openat2(2) RESOLVE_NO_XDEV)."""
    how = struct.pack("=QQQ", _DIR_PATH, 0, RESOLVE_NO_XDEV | RESOLVE_BENEATH)
    fd: int = _syscall(_NR_OPENAT2, dir_fd, name, how, len(how))
    if fd < 0:
        if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
            # Kernels before 5.6, and seccomp filters that do not know the call.
            return _open_same_device(name, dir_fd)
        raise _raise(name)
    return fd


def _open_same_device(name: bytes, dir_fd: int) -> int:
    fd = open_dir(name, dir_fd)
    if os.fstat(fd).st_dev != os.stat(dir_fd).st_dev:
        os.close(fd)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
    return fd


def fd_path(fd: int) -> bytes:
    """Path of *fd* through /proc: follows the descriptor, never a name."""
    return b"/proc/self/fd/%d" % fd


def reopen(fd: int, flags: int) -> int:
    """A new open file description of what *fd* (also O_PATH) refers to."""
    return os.open(b"/proc/self/fd/%d" % fd, flags | os.O_CLOEXEC)


def entry_path(dir_fd: int, name: bytes) -> bytes:
    """Path for calls that have no *at form; the last component is never followed by callers."""
    return b"/proc/self/fd/%d/%b" % (dir_fd, name)


# --- reading ------------------------------------------------------------------------------------


def lstat_at(name: bytes, dir_fd: int) -> os.stat_result:
    """Stat of *name* itself, ENOENT when it does not exist."""
    return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


def lstat_or_none(name: bytes, dir_fd: int) -> os.stat_result | None:
    """stat of *name*, None when it does not exist."""
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


class _StatxTimestamp(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_int64), ("nsec", ctypes.c_uint32), ("pad", ctypes.c_int32))


class _Statx(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("pad1", ctypes.c_uint16),
        ("ino", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("attributes_mask", ctypes.c_uint64),
        ("times", _StatxTimestamp * 4),
        ("rdev", ctypes.c_uint32 * 2),
        ("dev", ctypes.c_uint32 * 2),
        ("mnt_id", ctypes.c_uint64),
        ("spare", ctypes.c_uint64 * 13),
    )


def attributes_at(name: bytes, dir_fd: int) -> int:
    """STATX_ATTR_* bits of *name*, of *dir_fd* itself when empty (statx(2)); 0 if unknown."""
    buf = _Statx()
    flags = AT_SYMLINK_NOFOLLOW if name else AT_EMPTY_PATH
    if _libc.statx(dir_fd, name, flags, 0, ctypes.byref(buf)) < 0:
        raise _raise(name)
    return int(buf.attributes & buf.attributes_mask)


#: What statx(2) answers without being asked for more, and the time of birth.
STATX_BASIC_STATS: Final = 0x7FF
STATX_BTIME: Final = 0x800


def birth_ns(name: bytes, dir_fd: int) -> int | None:
    """When *name* (*dir_fd* itself when empty) was made, in ns; None where nobody knows."""
    buf = _Statx()
    flags = AT_SYMLINK_NOFOLLOW if name else AT_EMPTY_PATH
    if _libc.statx(dir_fd, name, flags, STATX_BTIME, ctypes.byref(buf)) < 0:
        raise _raise(name)
    if not buf.mask & STATX_BTIME:
        return None
    return int(buf.times[1].sec) * 1_000_000_000 + int(buf.times[1].nsec)


_NR_CACHESTAT: Final = 451
_PAGE: Final = 4096


def is_cached(fd: int, offset: int, size: int) -> bool:
    """Whether the page cache holds all of a range (cachestat(2), Linux 6.5); False if unknown.

    For a caller that must not wait for a disk. *offset* is a multiple of the page size.
    """
    if ctypes.sizeof(ctypes.c_long) != 8:
        return False
    where = struct.pack("=QQ", offset, size)
    found = ctypes.create_string_buffer(40)
    if _syscall(_NR_CACHESTAT, fd, where, found, 0) < 0:
        return False
    return int(struct.unpack_from("=Q", found)[0]) >= -(-size // _PAGE)


def mount_id(fd: int) -> int:
    """Mount id of *fd* (statx STATX_MNT_ID, Linux 5.8); 0 when unknown."""
    buf = _Statx()
    if _libc.statx(fd, b"", AT_EMPTY_PATH, 0x1000, ctypes.byref(buf)) < 0:
        return 0
    return int(buf.mnt_id) if buf.mask & 0x1000 else 0


def inode_flags(fd: int) -> int:
    """FS_*_FL flags of an open file or directory; 0 where the file system has none."""
    buf = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, buf)
    except OSError:
        return 0
    return int(struct.unpack_from("=I", buf)[0])


def fs_uuid(dir_fd: int) -> bytes | None:
    """16-byte UUID of the file system of an open (not O_PATH) directory, None if it has none.

    FS_IOC_GETFSUUID (Linux 6.9); btrfs answers ENOTTY there and tells it by BTRFS_IOC_FS_INFO.
    """
    buf = bytearray(17)
    try:
        fcntl.ioctl(dir_fd, _FS_IOC_GETFSUUID, buf)
        return bytes(buf[1 : 1 + buf[0]]).ljust(16, b"\0")
    except OSError:
        pass
    info = bytearray(1024)
    try:
        fcntl.ioctl(dir_fd, _BTRFS_IOC_FS_INFO, info)
        return bytes(info[16:32])
    except OSError:
        return None


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint32),
        ("handle_type", ctypes.c_int32),
        ("f_handle", ctypes.c_char * 128),
    )


class FileId(NamedTuple):
    """What name_to_handle_at(2) says of an object: type and opaque bytes."""

    type: int
    fid: bytes


def name_to_handle(name: bytes, dir_fd: int) -> FileId:
    """File handle of *name* (of *dir_fd* itself when empty). EOPNOTSUPP: the fs has none."""
    buf = _FileHandle()
    buf.handle_bytes = 128
    mnt = ctypes.c_int()
    flags = 0 if name else AT_EMPTY_PATH
    if _libc.name_to_handle_at(dir_fd, name, ctypes.byref(buf), ctypes.byref(mnt), flags) < 0:
        raise _raise(name)
    raw = ctypes.string_at(ctypes.byref(buf, 8), buf.handle_bytes)
    return FileId(buf.handle_type, raw)


def open_by_handle(mount_fd: int, handle: FileId, flags: int) -> int:
    """Open an object by handle; needs CAP_DAC_READ_SEARCH in the initial user namespace."""
    buf = _FileHandle()
    buf.handle_bytes = len(handle.fid)
    buf.handle_type = handle.type
    ctypes.memmove(ctypes.byref(buf, 8), handle.fid, len(handle.fid))
    fd: int = _libc.open_by_handle_at(mount_fd, ctypes.byref(buf), flags | os.O_CLOEXEC)
    if fd < 0:
        raise _raise()
    return fd


def getxattr_at(name: bytes, dir_fd: int, key: bytes) -> bytes:
    """Value of attribute *key* of *name* itself; ENODATA when absent."""
    return os.getxattr(b"/proc/self/fd/%d/%b" % (dir_fd, name), key, follow_symlinks=False)


def listxattr_at(name: bytes, dir_fd: int) -> list[bytes]:
    """Attribute names of *name* as bytes; empty where the file system has no attributes."""
    if _have_listxattrat:
        # Most objects have none, so that one call without a buffer is all.
        size = _syscall(_NR_LISTXATTRAT, dir_fd, name, AT_SYMLINK_NOFOLLOW, None, 0)
        if not size:
            return []
        if size > 0:
            buf = ctypes.create_string_buffer(size)
            size = _syscall(_NR_LISTXATTRAT, dir_fd, name, AT_SYMLINK_NOFOLLOW, buf, size)
        if size > 0:
            return buf.raw[:size].split(b"\0")[:-1]
    # Also after an error, to have it raised.
    return _listxattr(b"/proc/self/fd/%d/%b" % (dir_fd, name))


def xattrs_of(fd: int) -> list[str]:
    """Attribute names of the open file or directory *fd*; empty where there are none."""
    try:
        return os.listxattr(fd)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return []
        raise


def _listxattr(path: bytes) -> list[bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return []
        raise
    return [os.fsencode(key) for key in names] if names else []


def _probe_listxattrat() -> bool:
    # An empty name is ENOENT where the call exists (Linux 6.13) and no filter forbids it.
    _syscall(_NR_LISTXATTRAT, AT_FDCWD, b"", AT_SYMLINK_NOFOLLOW, None, 0)
    return ctypes.get_errno() == errno.ENOENT


_have_listxattrat: Final = _probe_listxattrat()


def fs_magic(fd: int) -> int:
    """f_type of the file system that *fd* (also O_PATH) is on, statfs(2)."""
    buf = ctypes.create_string_buffer(512)  # f_type is the first member and a long everywhere
    if _libc.fstatfs(fd, buf) < 0:
        raise _raise()
    return ctypes.c_ulong.from_buffer(buf).value & 0xFFFFFFFF


_getdents = _libc["getdents64" if hasattr(_libc, "getdents64") else "getdents"]  # musl: the latter
_getdents.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_getdents.restype = ctypes.c_ssize_t


def entry_types(dir_fd: int) -> dict[bytes, int]:
    """d_type (DT_* numbers, 0 unknown) of each entry of a small open directory (getdents64(2)).

    At most what fits into one buffer is read; a file system that cannot say says so at once.
    """
    buf = ctypes.create_string_buffer(32768)
    count = _getdents(dir_fd, buf, len(buf))
    if count < 0:
        raise _raise()
    return dict(_records(buf.raw[:count]))


# struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name
_record_head = struct.Struct("=16xHB").unpack_from
_entry_head = struct.Struct("=Q8xHB").unpack_from


def _records(raw: bytes) -> Iterator[tuple[bytes, int]]:
    """(name, d_type) of each record."""
    pos, end = 0, len(raw)
    while pos < end:
        length, kind = _record_head(raw, pos)
        yield raw[pos + 19 : raw.index(0, pos + 19)], kind
        pos += length


class SmallDirectories:
    """Reads open directories whole, one after the other, if they are small; reuses one buffer."""

    __slots__ = ("_address", "_buffer", "_words")

    BYTES: Final = 1024

    def __init__(self) -> None:
        self._buffer = bytearray(self.BYTES)
        self._words = memoryview(self._buffer).cast("Q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    def read(self, fd: int) -> bytes | None:
        """What a directory just opened holds, for names_in(): empty if nothing.

        None if it is too much, or cannot be read. Afterwards the position of *fd* is anywhere.
        """
        count = filled = _getdents(fd, self._address, self.BYTES)
        if count == 48 and self._words[4] == _LAST_POSITION and self._has_dots():
            return b""
        # Only the end is the end: a signal, and some file systems, cut answers short.
        while count > 0:
            count = _getdents(fd, self._address + filled, self.BYTES - filled)
            filled += count
        if filled == 48 and self._has_dots():
            return b""
        raw = bytes(self._buffer[:filled])
        self._words[2] = self._words[5] = 0  # the kernel leaves what is behind a name as it is
        return raw if not count else None  # EINVAL: the next record does not fit

    def _has_dots(self) -> bool:
        """Whether the first two records are those of any directory, in one order or the other."""
        first, second = self._words[2], self._words[5]
        return (first == _DOT and second == _DOT_DOT) or (first == _DOT_DOT and second == _DOT)


def _word(layout: str, *values: object) -> int:
    return int.from_bytes(struct.pack(layout, *values), sys.byteorder)


# As d_off: the greatest position there is, so that nothing can follow. So ends a directory of ext4.
_LAST_POSITION: Final = (1 << 63) - 1
# d_reclen, d_type and d_name.
_DOT: Final = _word("=HB1s4x", 24, 4, b".")
_DOT_DOT: Final = _word("=HB2s3x", 24, 4, b"..")


def names_in(raw: bytes) -> list[bytes]:
    """Names in what SmallDirectories.read() returned."""
    names = []
    lengths = memoryview(raw).cast("H")
    pos, end = 0, len(raw)
    while pos < end:
        names.append(raw[pos + 19 : raw.index(0, pos + 19)])
        pos += lengths[pos + 16 >> 1]
    for name in (b".", b".."):
        if name in names:
            names.remove(name)
    return names


def entries_in(raw: bytes) -> list[tuple[bytes, int, int]]:
    """The same as (name, inode number, d_type); d_type is S_IFMT bits >> 12, or 0 if unknown."""
    entries = []
    pos, end = 0, len(raw)
    while pos < end:
        ino, length, kind = _entry_head(raw, pos)
        entries.append((raw[pos + 19 : raw.index(0, pos + 19)], ino, kind))
        pos += length
    return [entry for entry in entries if entry[0] not in (b".", b"..")]


def start_writeback(fd: int) -> None:
    """Begin to write the data of an open file, so that fsync() of several share one commit.

    sync_file_range(2) with SYNC_FILE_RANGE_WRITE. Promises nothing, so failure is no error.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE: Final = 2
_sync_file_range = getattr(_libc, "sync_file_range", None)  # not on every architecture


# --- changing -----------------------------------------------------------------------------------

mkdir = os.mkdir
mknod = os.mknod
symlink = os.symlink
unlink = os.unlink
rmdir = os.rmdir
chown = os.chown
fchown = os.fchown
fchmod = os.fchmod
ftruncate = os.ftruncate
truncate = os.truncate
pwrite = os.pwrite
fsync = os.fsync
fdatasync = os.fdatasync
setxattr = os.setxattr
removexattr = os.removexattr
create_at = os.open
open_truncated = os.open
chmod_path = os.chmod


def link(src: bytes, src_fd: int, dst: bytes, dst_fd: int) -> None:
    """linkat(2) of the object *src* itself, also when it is a symlink."""
    os.link(src, dst, src_dir_fd=src_fd, dst_dir_fd=dst_fd, follow_symlinks=False)


def link_fd(fd: int, dst: bytes, dst_fd: int) -> None:
    """Give the open file *fd* (O_TMPFILE or unlinked-but-linkable) the name *dst*."""
    os.link(b"/proc/self/fd/%d" % fd, dst, dst_dir_fd=dst_fd, follow_symlinks=True)


def rename(old: bytes, old_fd: int, new: bytes, new_fd: int, flags: int = 0) -> None:
    """renameat2(2)."""
    if not flags:
        os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)
    elif _libc.renameat2(old_fd, old, new_fd, new, flags) < 0:
        raise _raise(old)


def chmod(name: bytes, dir_fd: int, mode: int) -> None:
    """Set the permission bits of *name*, which is not a symlink; never follows one."""
    if _have_fchmodat2:
        if _syscall(_NR_FCHMODAT2, dir_fd, name, mode, AT_SYMLINK_NOFOLLOW) == 0:
            return
        if ctypes.get_errno() != errno.ENOSYS:
            raise _raise(name)
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.chmod(b"/proc/self/fd/%d" % fd, mode)
    finally:
        os.close(fd)


def chmod_fd(fd: int, mode: int) -> None:
    """Permission bits of what *fd*, also an O_PATH descriptor, refers to."""
    os.chmod(b"/proc/self/fd/%d" % fd, mode)


def _probe_fchmodat2() -> bool:
    # An empty name is ENOENT where the call exists (Linux 6.6).
    _syscall(_NR_FCHMODAT2, AT_FDCWD, b"", 0, AT_SYMLINK_NOFOLLOW)
    return ctypes.get_errno() == errno.ENOENT


_have_fchmodat2: Final = _probe_fchmodat2()


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


_TwoTimes = _Timespec * 2


def _timespec(ns: int | None) -> _Timespec:
    if ns is None:
        return _Timespec(0, UTIME_OMIT)
    return _Timespec(ns // 1_000_000_000, ns % 1_000_000_000)


def utimes(name: bytes, dir_fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """utimensat(2) without following; None leaves a time alone."""
    if atime_ns is not None and mtime_ns is not None:
        os.utime(name, ns=(atime_ns, mtime_ns), dir_fd=dir_fd, follow_symlinks=False)
        return
    times = _TwoTimes(_timespec(atime_ns), _timespec(mtime_ns))
    if _libc.utimensat(dir_fd, name, times, AT_SYMLINK_NOFOLLOW) < 0:
        raise _raise(name)


def utimes_path(path: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
    """utimensat(2) through a /proc/self/fd path, which is followed."""
    if atime_ns is not None and mtime_ns is not None:
        os.utime(path, ns=(atime_ns, mtime_ns))  # several times faster than through ctypes
        return
    times = _TwoTimes(_timespec(atime_ns), _timespec(mtime_ns))
    if _libc.utimensat(AT_FDCWD, path, times, 0) < 0:
        raise _raise(path)


def futimes(fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """futimens(2) on an open file, or through /proc on an O_PATH descriptor."""
    if atime_ns is not None and mtime_ns is not None:
        try:
            os.utime(fd, ns=(atime_ns, mtime_ns))  # several times faster than through ctypes
            return
        except OSError as exc:
            if exc.errno != errno.EBADF:
                raise
    times = _TwoTimes(_timespec(atime_ns), _timespec(mtime_ns))
    if _libc.futimens(fd, times) < 0:
        if ctypes.get_errno() != errno.EBADF:
            raise _raise()
        utimes_path(fd_path(fd), atime_ns, mtime_ns)


def touch_mtime(fd: int) -> None:
    """Set mtime of an open file to the current time, leave atime alone."""
    times = _TwoTimes(_Timespec(0, UTIME_OMIT), _Timespec(0, UTIME_NOW))
    if _libc.futimens(fd, times) < 0:
        raise _raise()


def setxattr_at(name: bytes, dir_fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
    """Set attribute *key* of *name* itself."""
    setxattr(b"/proc/self/fd/%d/%b" % (dir_fd, name), key, value, flags, follow_symlinks=False)


def set_inode_flags(fd: int, flags: int) -> None:
    """Set FS_*_FL flags of an open file or directory."""
    fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("=Q", flags))


_fallocate = _libc.fallocate


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch, ... (fallocate(2)); os.posix_fallocate() has no modes and may write."""
    if _fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) < 0:
        raise _raise()


def set_file_attributes(fd: int, command: int, value: bytes) -> None:
    """FS_IOC_SETFLAGS or FS_IOC_FSSETXATTR with the bytes of its argument."""
    fcntl.ioctl(fd, command, value.ljust(8, b"\0"))


def clone_data(src: int, dst: int) -> bool:
    """Share all extents of *src* with *dst* (FICLONE); False where the file system cannot."""
    try:
        fcntl.ioctl(dst, _FICLONE, src)
    except OSError:
        return False
    return True


copy_range = os.copy_file_range


def syncfs(fd: int) -> None:
    """Write back everything of the file system that *fd* (not O_PATH) is on, and wait."""
    if _libc.syncfs(fd) < 0:
        raise _raise()


#: Names through which a disk changes; the fault seam of the tests wraps each of them.
MUTATORS: Final = (
    "mkdir",
    "mknod",
    "symlink",
    "unlink",
    "rmdir",
    "chown",
    "fchown",
    "fchmod",
    "chmod",
    "chmod_path",
    "chmod_fd",
    "ftruncate",
    "truncate",
    "pwrite",
    "fsync",
    "fdatasync",
    "syncfs",
    "setxattr",
    "removexattr",
    "create_at",
    "open_truncated",
    "link",
    "link_fd",
    "rename",
    "utimes",
    "utimes_path",
    "futimes",
    "touch_mtime",
    "set_inode_flags",
    "clone_data",
    "copy_range",
    "fallocate",
    "set_file_attributes",
)


# --- memory ---------------------------------------------------------------------------------------

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8


def settle_malloc() -> None:
    """Keep the C heap of a long-lived server from growing by fragments (mallopt(3)).

    Request buffers of up to 1 MiB come and go in several threads; with an arena for each and
    thresholds that follow the sizes seen, glibc holds on to more with every hour. Other C
    libraries have no such call and need none.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        mallopt(_M_TRIM_THRESHOLD, 8 << 20)


# --- identity of the calling thread -------------------------------------------------------------

_setfsuid = _libc.setfsuid
_setfsgid = _libc.setfsgid


def keep_capabilities() -> bool:
    """Let setfsuid() leave this thread's capabilities alone (capabilities(7), securebits).

    Creation then happens with the caller's ids and the mounter's rights, as in the kernel's
    ovl_override_creds(). Inherited by threads started later. False without CAP_SETPCAP.
    """
    bits = _libc.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0)
    if bits < 0:
        return False
    return bool(_libc.prctl(_PR_SET_SECUREBITS, bits | _SECBIT_NO_SETUID_FIXUP, 0, 0, 0) == 0)


_CLONE_FS: Final = 0x200


def unshare_fs_state() -> None:
    """Give the calling thread an umask (and a current directory) of its own (unshare(2)).

    Without it, two mounts served by threads of one process would create with each other's umask.
    """
    _libc.unshare(_CLONE_FS)


def set_fs_ids(uid: int, gid: int) -> None:
    """File system ids of this thread only; the raw calls are per thread in glibc and musl.

    Raises EPERM when the ids did not take (not permitted, or not mapped in the namespace).
    """
    _setfsgid(gid)
    _setfsuid(uid)
    if _setfsuid(-1) != uid or _setfsgid(-1) != gid:
        raise OSError(errno.EPERM, f"no permission to act as user {uid}, group {gid}")


def clear_fs_ids(uid: int, gid: int) -> None:
    """Back to the server's own ids; cannot fail."""
    _setfsuid(uid)
    _setfsgid(gid)

"""Project quota of ext4 and XFS: the limits of a writable layer below the kernel's overlay.

A project is a number on every inode of a tree. Directories that carry it together with
PROJINHERIT hand it on to whatever is made in them, so an empty tree is set once and stays whole.
The limits of a number live in the quota files of the file system, which has to be mounted for it.

Renames: the kernel answers EXDEV when something is moved or linked into a directory with
PROJINHERIT and another number (ext4_rename(), xfs_rename()). Upper and work directory need the
same number, therefore; a directory without PROJINHERIT above them can be moved at will.

Over the limit, ext4 answers EDQUOT and XFS, for projects, ENOSPC. ext4 lets CAP_SYS_RESOURCE pass
any limit; the kernel's overlay puts that capability away when it is mounted.

Numbers belong to the first user namespace, and so does everything here: elsewhere it is EPERM.
All functions take the descriptor of a directory that is not O_PATH, and raise OSError.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Collection
from typing import Final, NamedTuple

from . import mountcalls
from . import syscalls as sc
from .errors import show
from .storemodel import Quota

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_NR_QUOTACTL_FD: Final = 443
_NR_FILE_SETATTR: Final = 469

# include/uapi/linux/quota.h
_PRJQUOTA: Final = 2
_Q_GETQUOTA: Final = 0x800007
_Q_SETQUOTA: Final = 0x800008
_QIF_BLIMITS: Final = 1
_QIF_ILIMITS: Final = 4
_VFS_UNIT: Final = 1024  # of the limits; the space in use is in bytes
# struct if_dqblk: hard, soft, used for blocks and for inodes, two times, what is valid
_DQBLK: Final = struct.Struct("=QQQQQQQQI4x")

# include/uapi/linux/dqblk_xfs.h
_Q_XGETQUOTA: Final = 0x5803
_Q_XSETQLIM: Final = 0x5804
_Q_XGETQSTAT: Final = 0x5805
_FS_DQUOT_VERSION: Final = 1
_FS_PROJ_QUOTA: Final = 2
_FS_DQ_LIMITS: Final = 0x0F  # hard and soft limits of inodes and blocks
_FS_QUOTA_PDQ_ENFD: Final = 1 << 5
_XFS_UNIT: Final = 512
# struct fs_disk_quota up to the numbers used here, and its whole size
_FS_DISK_QUOTA: Final = struct.Struct("=bbHIQQQQQQ")
_FS_DISK_QUOTA_BYTES: Final = 112
_FS_QUOTA_STAT_BYTES: Final = 80

# struct fsxattr: xflags, extsize, nextents, projid, cowextsize (include/uapi/linux/fs.h)
_FSXATTR: Final = struct.Struct("=IIIII8x")
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
_FS_XFLAG_PROJINHERIT: Final = 0x200
_PROJID_AT: Final = 3
# struct file_attr of file_setattr(2): xflags, extsize, nextents, projid, cowextsize
_FILE_ATTR: Final = struct.Struct("=QIIII")

_VFS_QUOTA: Final = frozenset((b"ext4", b"f2fs"))
_XFS: Final = b"xfs"

#: Numbers that free_project() gives: far from what administrators take by hand, below 2^31.
PROJECT_FIRST: Final = 1 << 24
PROJECT_LAST: Final = (1 << 31) - 1


class Usage(NamedTuple):
    """What a project uses, and its limits, in bytes and inodes; None is no limit."""

    bytes: int
    inodes: int
    bytes_max: int | None
    inodes_max: int | None


# --- quotactl(2) ----------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a directory lies: type of the file system, and its block device."""

    fstype: bytes
    source: bytes


def _place(dir_fd: int) -> _Place:
    device = os.fstat(dir_fd).st_dev
    mount_id = sc.mount_id(dir_fd)
    entries = [entry for entry in mountcalls.read_mountinfo() if entry.device == device]
    if not entries:
        return _Place(b"", b"")
    own = [entry for entry in entries if entry.mount_id == mount_id] or entries
    return _Place(own[0].fstype, own[0].source)


def _probe_quotactl_fd() -> bool:
    # EBADF where the call exists (Linux 5.14).
    _syscall(_NR_QUOTACTL_FD, -1, _command(_Q_GETQUOTA), 0, None)
    return ctypes.get_errno() == errno.EBADF


def _command(number: int) -> ctypes.c_uint:
    return ctypes.c_uint(number << 8 | _PRJQUOTA)


def _quotactl(dir_fd: int, number: int, project: int, buffer: bytearray) -> None:
    """One command for *project*; *buffer* is read or filled."""
    data = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    which = ctypes.c_uint(project)
    if _have_quotactl_fd:
        result = _syscall(_NR_QUOTACTL_FD, dir_fd, _command(number), which, data)
    else:
        result = _libc.quotactl(_command(number), _device(dir_fd), which, data)
    if result < 0:
        number_of_error = ctypes.get_errno()
        raise OSError(number_of_error, os.strerror(number_of_error))


def _device(dir_fd: int) -> bytes:
    """Path of the block device that *dir_fd* lies on; quotactl(2) takes nothing else."""
    device = os.fstat(dir_fd).st_dev
    by_number = b"/dev/block/%d:%d" % (os.major(device), os.minor(device))
    for path in (_place(dir_fd).source, by_number):
        try:
            st = os.stat(path)
        except OSError:
            continue
        if stat.S_ISBLK(st.st_mode) and st.st_rdev == device:
            return path
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), by_number)


_have_quotactl_fd = _probe_quotactl_fd()


# --- what can be done here ------------------------------------------------------------------------

_WHY_NOT: Final = {
    errno.ENOSYS: "this kernel has no quota for it",
    errno.ESRCH: "it is not mounted with prjquota",
    errno.ENOTTY: "it has no project numbers",
    errno.EOPNOTSUPP: "it has no project numbers",
    errno.EPERM: "project quota needs CAP_SYS_ADMIN in the initial user namespace",
    errno.EACCES: "project quota needs CAP_SYS_ADMIN in the initial user namespace",
    errno.ENODEV: "its block device cannot be found",
}


def supported(dir_fd: int) -> str | None:
    """None when limits can be set on trees in *dir_fd*, else one clause that says why not."""
    place = _place(dir_fd)
    name = show(place.fstype) or "an unknown file system"
    if place.fstype != _XFS and place.fstype not in _VFS_QUOTA:
        return f"the file system is {name}, and only ext4 and xfs have project quota"
    try:
        _get_attributes(dir_fd)
        usage(dir_fd, 0)
        enforced = _is_enforced(dir_fd)
    except OSError as exc:
        why = _WHY_NOT.get(exc.errno or 0, os.strerror(exc.errno or 0))
        return f"the file system is {name}, and {why}"
    if not enforced:
        return f"the file system is {name}, and it counts projects without limiting them"
    return None


def _is_enforced(dir_fd: int) -> bool:
    buffer = bytearray(_FS_QUOTA_STAT_BYTES)
    _quotactl(dir_fd, _Q_XGETQSTAT, 0, buffer)  # file systems of either kind answer it
    flags: int = struct.unpack_from("=H", buffer, 2)[0]
    return bool(flags & _FS_QUOTA_PDQ_ENFD)


# --- limits and usage -----------------------------------------------------------------------------


def usage(dir_fd: int, project: int) -> Usage:
    """What *project* uses on the file system of *dir_fd*; nothing for a number never used."""
    try:
        return _xfs_usage(dir_fd, project) if _is_xfs(dir_fd) else _vfs_usage(dir_fd, project)
    except FileNotFoundError:
        return Usage(0, 0, None, None)


def _is_xfs(dir_fd: int) -> bool:
    return _place(dir_fd).fstype == _XFS


def _vfs_usage(dir_fd: int, project: int) -> Usage:
    buffer = bytearray(_DQBLK.size)
    _quotactl(dir_fd, _Q_GETQUOTA, project, buffer)
    block_limit, _, used, inode_limit, _, inodes, *_ = _DQBLK.unpack(buffer)
    return Usage(used, inodes, block_limit * _VFS_UNIT or None, inode_limit or None)


def _xfs_usage(dir_fd: int, project: int) -> Usage:
    buffer = bytearray(_FS_DISK_QUOTA_BYTES)
    _quotactl(dir_fd, _Q_XGETQUOTA, project, buffer)
    fields = _FS_DISK_QUOTA.unpack_from(buffer)
    block_limit, _, inode_limit, _, blocks, inodes = fields[4:]
    return Usage(blocks * _XFS_UNIT, inodes, block_limit * _XFS_UNIT or None, inode_limit or None)


def set_limits(dir_fd: int, project: int, limits: Quota) -> None:
    """Hard limits of *project*, bytes rounded up to the unit of the file system; None lifts one.

    Raises EPERM, ESRCH (not mounted for it), ENOSYS; see supported().
    """
    size, inodes = limits.size_bytes or 0, limits.inodes or 0
    if _is_xfs(dir_fd):
        blocks = -(-size // _XFS_UNIT)
        buffer = bytearray(_FS_DISK_QUOTA_BYTES)
        head = (_FS_DQUOT_VERSION, _FS_PROJ_QUOTA, _FS_DQ_LIMITS, project)
        _FS_DISK_QUOTA.pack_into(buffer, 0, *head, blocks, 0, inodes, 0, 0, 0)
        _quotactl(dir_fd, _Q_XSETQLIM, project, buffer)
        return
    blocks = -(-size // _VFS_UNIT)
    valid = _QIF_BLIMITS | _QIF_ILIMITS
    buffer = bytearray(_DQBLK.pack(blocks, 0, 0, inodes, 0, 0, 0, 0, valid))
    _quotactl(dir_fd, _Q_SETQUOTA, project, buffer)


def clear(dir_fd: int, project: int) -> None:
    """Lift the limits of *project*; its number is free once no inode has it."""
    set_limits(dir_fd, project, Quota())


def free_project(dir_fd: int, used: Collection[int] = ()) -> int:
    """A number that is not in *used*, and has neither inodes nor limits on this file system.

    Picked at random, so that two stores on one file system do not meet; it is taken as soon as
    set_project() has put it on a directory.
    """
    while True:
        project = PROJECT_FIRST + secrets.randbelow(PROJECT_LAST - PROJECT_FIRST)
        if project not in used and usage(dir_fd, project) == Usage(0, 0, None, None):
            return project


# --- numbers on inodes ----------------------------------------------------------------------------


def _get_attributes(fd: int) -> list[int]:
    buffer = bytearray(_FSXATTR.size)
    fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, buffer)
    return list(_FSXATTR.unpack(buffer))


def project_of(fd: int) -> int:
    """Number of an open file or directory; 0 is none."""
    return _get_attributes(fd)[_PROJID_AT]


def _set_project(fd: int, project: int, *, inherit: bool) -> None:
    fields = _get_attributes(fd)
    wanted = fields[0] & ~_FS_XFLAG_PROJINHERIT | (_FS_XFLAG_PROJINHERIT if inherit else 0)
    if (fields[0], fields[_PROJID_AT]) == (wanted, project):
        return
    fields[0], fields[_PROJID_AT] = wanted, project
    fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(*fields))


def set_project(dir_fd: int, project: int) -> int:
    """Give *dir_fd* and everything below it the number *project*, to be inherited; 0 takes it away.

    Best done while the tree is empty. Gives the number of symlinks, devices, fifos and sockets
    that could not be reached, because only XFS since Linux 6.17 changes those (file_setattr(2));
    they keep their number and cannot be moved within the tree. Never enters another mount. Holds
    a descriptor for each level. Raises EPERM, ENOTTY, EDQUOT; what was set by then stays set.
    """
    left, below = _set_directory(dir_fd, project)
    levels = [(os.dup(dir_fd), below)]
    try:
        while levels:
            fd, names = levels[-1]
            if not names:
                os.close(levels.pop()[0])
                continue
            inner = _open_below(names.pop(), fd)
            if inner is not None:
                levels.append((inner, []))
                missed, below = _set_directory(inner, project)
                levels[-1] = (inner, below)
                left += missed
    finally:
        for fd, _ in levels:
            os.close(fd)
    return left


def _set_directory(fd: int, project: int) -> tuple[int, list[bytes]]:
    """A directory and what is no directory in it: how many could not be set, and the others."""
    _set_project(fd, project, inherit=bool(project))
    left = 0
    below: list[bytes] = []
    with os.scandir(fd) as entries:
        names = [os.fsencode(entry.name) for entry in entries]
    for name in names:
        mode = sc.lstat_at(name, fd).st_mode
        if stat.S_ISDIR(mode):
            below.append(name)
        elif stat.S_ISREG(mode):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(name, flags, dir_fd=fd)
            try:
                _set_project(file, project, inherit=False)
            finally:
                os.close(file)
        else:
            left += not _set_special(name, fd, project)
    return left, below


def _open_below(name: bytes, dir_fd: int) -> int | None:
    """A directory to be listed, None when something is mounted there."""
    try:
        path_fd = sc.open_dir_no_xdev(name, dir_fd)
    except OSError as exc:
        if exc.errno == errno.EXDEV:
            return None
        raise
    try:
        return sc.reopen(path_fd, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(path_fd)


def _set_special(name: bytes, dir_fd: int, project: int) -> bool:
    """By name (file_setattr(2)); False where the kernel or the file system cannot."""
    attributes = _FILE_ATTR.pack(0, 0, 0, project, 0)
    size = ctypes.c_size_t(len(attributes))
    result = _syscall(_NR_FILE_SETATTR, dir_fd, name, attributes, size, sc.AT_SYMLINK_NOFOLLOW)
    return bool(result == 0)

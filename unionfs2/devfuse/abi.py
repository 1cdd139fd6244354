"""The FUSE wire format: numbers, struct layouts, and one row for each request.

Source: include/uapi/linux/fuse.h, protocol 7.12 to 7.45. Nothing here acts; ``codec`` reads the
table, ``session`` the flags. All structs are little or big endian as the machine is ("="), and
padded so that 32-bit and 64-bit programs agree.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

MAJOR: Final = 7
MINOR_MIN: Final = 12
MINOR: Final = 45
ROOT_ID: Final = 1
#: A request is never larger than a write of ``max_write`` bytes and its header.
HEADER_ROOM: Final = 4096
#: The kernel refuses to hand requests to a smaller buffer (FUSE_MIN_READ_BUFFER).
BUFFER_MIN: Final = 8192
PAGE: Final = 4096

# Requests (enum fuse_opcode).
LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
FLUSH: Final = 25
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
GETLK: Final = 31
SETLK: Final = 32
SETLKW: Final = 33
ACCESS: Final = 34
CREATE: Final = 35
INTERRUPT: Final = 36
BMAP: Final = 37
DESTROY: Final = 38
IOCTL: Final = 39
POLL: Final = 40
NOTIFY_REPLY: Final = 41
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
SETUPMAPPING: Final = 48
REMOVEMAPPING: Final = 49
SYNCFS: Final = 50
TMPFILE: Final = 51
STATX: Final = 52
COPY_FILE_RANGE_64: Final = 53

# Flags of INIT; bits from 32 on travel in the second word.
ASYNC_READ: Final = 1 << 0
POSIX_LOCKS: Final = 1 << 1
ATOMIC_O_TRUNC: Final = 1 << 3
EXPORT_SUPPORT: Final = 1 << 4
BIG_WRITES: Final = 1 << 5
DONT_MASK: Final = 1 << 6
SPLICE_WRITE: Final = 1 << 7
SPLICE_MOVE: Final = 1 << 8
SPLICE_READ: Final = 1 << 9
FLOCK_LOCKS: Final = 1 << 10
HAS_IOCTL_DIR: Final = 1 << 11
AUTO_INVAL_DATA: Final = 1 << 12
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
ASYNC_DIO: Final = 1 << 15
WRITEBACK_CACHE: Final = 1 << 16
NO_OPEN_SUPPORT: Final = 1 << 17
PARALLEL_DIROPS: Final = 1 << 18
HANDLE_KILLPRIV: Final = 1 << 19
POSIX_ACL: Final = 1 << 20
ABORT_ERROR: Final = 1 << 21
MAX_PAGES: Final = 1 << 22
CACHE_SYMLINKS: Final = 1 << 23
NO_OPENDIR_SUPPORT: Final = 1 << 24
EXPLICIT_INVAL_DATA: Final = 1 << 25
HANDLE_KILLPRIV_V2: Final = 1 << 28
SETXATTR_EXT: Final = 1 << 29
INIT_EXT: Final = 1 << 30
HAS_EXPIRE_ONLY: Final = 1 << 35
DIRECT_IO_ALLOW_MMAP: Final = 1 << 36
PASSTHROUGH: Final = 1 << 37
HAS_RESEND: Final = 1 << 39
OVER_IO_URING: Final = 1 << 41
#: Set in the number of a request that the kernel hands out again after FUSE_NOTIFY_RESEND.
UNIQUE_RESEND: Final = 1 << 63

# What SETATTR changes.
FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8
FATTR_CTIME: Final = 1 << 10
FATTR_KILL_SUIDGID: Final = 1 << 11

# Answers to OPEN.
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PASSTHROUGH: Final = 1 << 7

GETATTR_FH: Final = 1 << 0
WRITE_CACHE: Final = 1 << 0
WRITE_KILL_SUIDGID: Final = 1 << 2
FSYNC_FDATASYNC: Final = 1 << 0
IOCTL_DIR: Final = 1 << 4
SETXATTR_ACL_KILL_SGID: Final = 1 << 0

# Notifications (enum fuse_notify_code).
NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
NOTIFY_STORE: Final = 4
NOTIFY_RETRIEVE: Final = 5
NOTIFY_DELETE: Final = 6
NOTIFY_RESEND: Final = 7

# ioctl(2) on the device.
DEV_IOC_BACKING_OPEN: Final = 0x4010E501
DEV_IOC_BACKING_CLOSE: Final = 0x4004E502

# Heads of all messages.
IN_HEADER: Final = Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid extlen padding
OUT_HEADER: Final = Struct("=IiQ")  # len error unique

# What comes with requests. Positions and sizes of files are signed, as loff_t is, so that one
# that no file can have is refused by the system call that is given it.
INIT_IN: Final = Struct("=IIII")  # major minor max_readahead flags; then flags2 since 7.36
INIT_FLAGS2: Final = Struct("=I")
GETATTR_IN: Final = Struct("=IIQ")  # flags, dummy, fh
SETATTR_IN: Final = Struct("=I4xQqQqqqIIII4xII4x")
MKNOD_IN: Final = Struct("=III4x")  # mode rdev umask
MKDIR_IN: Final = Struct("=II")  # mode umask
RENAME_IN: Final = Struct("=Q")
RENAME2_IN: Final = Struct("=QI4x")
LINK_IN: Final = Struct("=Q")
OPEN_IN: Final = Struct("=II")  # flags, open_flags
CREATE_IN: Final = Struct("=IIII")  # flags mode umask open_flags
RELEASE_IN: Final = Struct("=QIIQ")  # fh flags release_flags lock_owner
FLUSH_IN: Final = Struct("=Q8xQ")  # fh lock_owner
READ_IN: Final = Struct("=QqIIQI4x")  # fh offset size read_flags lock_owner flags
WRITE_IN: Final = Struct("=QqIIQI4x")  # fh offset size write_flags lock_owner flags
FSYNC_IN: Final = Struct("=QI4x")  # fh flags
SETXATTR_IN: Final = Struct("=II")  # size flags; the extended form has 8 bytes more
SETXATTR_EXT_IN: Final = Struct("=III4x")  # size flags setxattr_flags
GETXATTR_IN: Final = Struct("=I4x")
ACCESS_IN: Final = Struct("=I4x")
INTERRUPT_IN: Final = Struct("=Q")
FORGET_IN: Final = Struct("=Q")
BATCH_FORGET_IN: Final = Struct("=I4x")
FORGET_ONE: Final = Struct("=QQ")
IOCTL_IN: Final = Struct("=QIIQII")  # fh flags cmd arg in_size out_size
FALLOCATE_IN: Final = Struct("=QqqI4x")  # fh offset length mode
LSEEK_IN: Final = Struct("=QqI4x")  # fh offset whence
COPY_FILE_RANGE_IN: Final = Struct("=QqQQqQQ")  # fh_in off_in nodeid_out fh_out off_out len flags
SYNCFS_IN: Final = Struct("=8x")
STATX_IN: Final = Struct("=I4xQII")  # getattr_flags fh sx_flags sx_mask

# What goes out; the layouts with a head are complete messages.
INIT_OUT: Final = Struct("=IIIIHHIIHHIIH22x")
ENTRY_OUT: Final = Struct("=IiQQQQQII" + "QQQqqqIIIIIIIIII")
ATTR_OUT: Final = Struct("=IiQQII" + "QQQqqqIIIIIIIIII")
DIRENTPLUS_OUT: Final = Struct("=QQQQII" + "QQQqqqIIIIIIIIII" + "QQII")
DIRENT_OUT: Final = Struct("=QQII")  # ino off namelen type
OPEN_OUT: Final = Struct("=IiQQIi")
WRITE_OUT: Final = Struct("=IiQI4x")
GETXATTR_OUT: Final = Struct("=IiQI4x")
STATFS_OUT: Final = Struct("=IiQQQQQQIII4x24x")
LSEEK_OUT: Final = Struct("=IiQQ")
IOCTL_OUT: Final = Struct("=IiQiIII")
OPEN_PART: Final = Struct("=QIi")  # what follows the entry in answers to CREATE and TMPFILE
STATX_OUT: Final = Struct("=IiQQII16x" + "IIQIIIH2xQQQQ" + "qI4x" * 4 + "IIII112x")
INVAL_INODE_OUT: Final = Struct("=IiQQqq")
INVAL_ENTRY_OUT: Final = Struct("=IiQQII")
DELETE_OUT: Final = Struct("=IiQQQII")
STORE_OUT: Final = Struct("=IiQQQII")
BACKING_MAP: Final = Struct("=iI8x")  # fd flags


class Row(NamedTuple):
    """What a request carries after its header: a struct, then names or data."""

    name: str
    layout: Struct | None = None
    names: int = 0  # strings, each with its NUL
    data: bool = False  # bytes up to the end
    answered: bool = True


#: Every request of the protocol. One without a handler is answered with ENOSYS.
ROWS: Final[dict[int, Row]] = {
    LOOKUP: Row("LOOKUP", names=1),
    FORGET: Row("FORGET", FORGET_IN, answered=False),
    GETATTR: Row("GETATTR", GETATTR_IN),
    SETATTR: Row("SETATTR", SETATTR_IN),
    READLINK: Row("READLINK"),
    SYMLINK: Row("SYMLINK", names=2),
    MKNOD: Row("MKNOD", MKNOD_IN, names=1),
    MKDIR: Row("MKDIR", MKDIR_IN, names=1),
    UNLINK: Row("UNLINK", names=1),
    RMDIR: Row("RMDIR", names=1),
    RENAME: Row("RENAME", RENAME_IN, names=2),
    LINK: Row("LINK", LINK_IN, names=1),
    OPEN: Row("OPEN", OPEN_IN),
    READ: Row("READ", READ_IN),
    WRITE: Row("WRITE", WRITE_IN, data=True),
    STATFS: Row("STATFS"),
    RELEASE: Row("RELEASE", RELEASE_IN),
    FSYNC: Row("FSYNC", FSYNC_IN),
    SETXATTR: Row("SETXATTR", SETXATTR_IN, data=True),
    GETXATTR: Row("GETXATTR", GETXATTR_IN, names=1),
    LISTXATTR: Row("LISTXATTR", GETXATTR_IN),
    REMOVEXATTR: Row("REMOVEXATTR", names=1),
    FLUSH: Row("FLUSH", FLUSH_IN),
    INIT: Row("INIT", INIT_IN, data=True),
    OPENDIR: Row("OPENDIR", OPEN_IN),
    READDIR: Row("READDIR", READ_IN),
    RELEASEDIR: Row("RELEASEDIR", RELEASE_IN),
    FSYNCDIR: Row("FSYNCDIR", FSYNC_IN),
    GETLK: Row("GETLK", data=True),
    SETLK: Row("SETLK", data=True),
    SETLKW: Row("SETLKW", data=True),
    ACCESS: Row("ACCESS", ACCESS_IN),
    CREATE: Row("CREATE", CREATE_IN, names=1),
    INTERRUPT: Row("INTERRUPT", INTERRUPT_IN, answered=False),
    BMAP: Row("BMAP", data=True),
    DESTROY: Row("DESTROY"),
    IOCTL: Row("IOCTL", IOCTL_IN, data=True),
    POLL: Row("POLL", data=True),
    NOTIFY_REPLY: Row("NOTIFY_REPLY", data=True, answered=False),
    BATCH_FORGET: Row("BATCH_FORGET", BATCH_FORGET_IN, data=True, answered=False),
    FALLOCATE: Row("FALLOCATE", FALLOCATE_IN),
    READDIRPLUS: Row("READDIRPLUS", READ_IN),
    RENAME2: Row("RENAME2", RENAME2_IN, names=2),
    LSEEK: Row("LSEEK", LSEEK_IN),
    COPY_FILE_RANGE: Row("COPY_FILE_RANGE", COPY_FILE_RANGE_IN),
    SETUPMAPPING: Row("SETUPMAPPING", data=True),
    REMOVEMAPPING: Row("REMOVEMAPPING", data=True),
    SYNCFS: Row("SYNCFS", SYNCFS_IN),
    TMPFILE: Row("TMPFILE", CREATE_IN, data=True),  # its name is "/", and means nothing
    STATX: Row("STATX", STATX_IN),
    COPY_FILE_RANGE_64: Row("COPY_FILE_RANGE_64", COPY_FILE_RANGE_IN),
}

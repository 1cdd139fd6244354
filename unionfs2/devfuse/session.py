"""What kernel and server agree on before the first request: pure, INIT in, settings and answer out.

Source: process_init_reply() in fs/fuse/inode.c. The kernel offers flags, the answer takes some of
them. Flags that this kernel does not offer are done without, so one server works on all of them.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from . import abi
from .codec import ProtocolError

#: Most that one READ or WRITE carries; the kernel's own limit is 256 pages unless raised.
TRANSFER_MAX: Final = 1 << 20
_MAX_BACKGROUND: Final = 64
_CONGESTION: Final = 48

_ALWAYS: Final = (
    abi.ASYNC_READ
    | abi.BIG_WRITES
    | abi.DONT_MASK
    | abi.SPLICE_WRITE
    | abi.SPLICE_MOVE
    | abi.HAS_IOCTL_DIR
    | abi.DO_READDIRPLUS
    | abi.READDIRPLUS_AUTO
    | abi.ASYNC_DIO
    | abi.PARALLEL_DIROPS
    | abi.ABORT_ERROR
    | abi.MAX_PAGES
    | abi.CACHE_SYMLINKS
    | abi.EXPLICIT_INVAL_DATA
    | abi.HANDLE_KILLPRIV_V2
    | abi.SETXATTR_EXT
    | abi.INIT_EXT
    | abi.DIRECT_IO_ALLOW_MMAP
    | abi.HAS_RESEND
)


class Wanted(NamedTuple):
    """What the mount asks for, as far as the kernel can."""

    acl: bool = True
    writeback: bool = True
    stateless: bool = True  # opens that send no message
    passthrough: bool = False


class Settings(NamedTuple):
    """What holds for the life of the connection."""

    minor: int
    flags: int
    max_write: int

    def has(self, flag: int) -> bool:
        return bool(self.flags & flag)

    @property
    def stateless(self) -> bool:
        """Whether files are opened without a message, so that READ and WRITE have no handle."""
        return self.has(abi.NO_OPEN_SUPPORT)

    @property
    def stateless_dirs(self) -> bool:
        return self.has(abi.NO_OPENDIR_SUPPORT)


def negotiate(
    unique: int, wanted: Wanted, args: tuple[int, int, int, int, bytes]
) -> tuple[Settings | None, bytes]:
    """Settings and the answer to an INIT with *args* (major, minor, readahead, flags, the rest).

    No settings where the kernel has a larger major number: it asks again with ours. Raises
    ProtocolError for a protocol that is too old.
    """
    major, minor, readahead, flags, rest = args
    if major > abi.MAJOR:
        return None, _answer(unique, Settings(abi.MINOR, 0, 0), readahead)
    if major < abi.MAJOR or minor < abi.MINOR_MIN:
        raise ProtocolError(
            f"the kernel speaks FUSE {major}.{minor}, needed is 7.{abi.MINOR_MIN} or newer", unique
        )
    if flags & abi.INIT_EXT and len(rest) >= abi.INIT_FLAGS2.size:
        flags |= abi.INIT_FLAGS2.unpack_from(rest)[0] << 32
    taken = flags & _wish(wanted)
    max_write = TRANSFER_MAX if taken & abi.MAX_PAGES else 32 * abi.PAGE
    settings = Settings(min(minor, abi.MINOR), taken, max_write)
    return settings, _answer(unique, settings, readahead)


def _wish(wanted: Wanted) -> int:
    wish = _ALWAYS | abi.NO_OPENDIR_SUPPORT
    if wanted.acl:
        wish |= abi.POSIX_ACL
    if wanted.stateless and not wanted.passthrough:
        wish |= abi.NO_OPEN_SUPPORT
    else:
        wish |= (
            abi.ATOMIC_O_TRUNC
        )  # O_TRUNC comes with the OPEN, and sets mtime also of an empty file
    if wanted.passthrough:
        wish |= abi.PASSTHROUGH
    elif wanted.writeback:  # the kernel excludes the two
        wish |= abi.WRITEBACK_CACHE
    return wish


def _answer(unique: int, settings: Settings, readahead: int) -> bytes:
    flags = settings.flags
    message = abi.INIT_OUT.pack(
        abi.MAJOR,
        settings.minor,
        min(readahead, TRANSFER_MAX) if readahead else TRANSFER_MAX,
        flags & 0xFFFFFFFF,
        _MAX_BACKGROUND,
        _CONGESTION,
        settings.max_write,
        1,  # times in steps of a nanosecond
        settings.max_write // abi.PAGE,
        0,
        flags >> 32,
        1 if flags & abi.PASSTHROUGH else 0,  # stacking: backing files are not stacked themselves
        0,
    )
    if settings.minor < 23:
        message = message[:24]  # FUSE_COMPAT_22_INIT_OUT_SIZE
    return abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(message), 0, unique) + message

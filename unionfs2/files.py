"""Open files: opening with copy-up, reading, writing, and what outlives an unlink."""

from __future__ import annotations

import errno
import os
import stat
import time

from . import attrs, copyup, creds, protect
from . import nodes as nd
from . import syscalls as sc
from .handles import FileHandle, write_whole
from .model import Caller
from .nodes import Node
from .quota import Ledger
from .stack import Stack, oserror

# What a caller asked for that the real file must not see: the offset of a write comes with the
# request (O_APPEND would override it), buffers are not aligned (O_DIRECT), names are ours.
_NOT_PASSED = (
    os.O_APPEND
    | os.O_DIRECT
    | os.O_CREAT
    | os.O_EXCL
    | os.O_NOCTTY
    | getattr(os, "FASYNC", 0o20000)
)
_COPY_STEP = 1 << 20
_DAY_S = 24 * 3600
#: Flags of a node whose data cannot be changed by everybody, or about which that is not known.
PROTECTED = nd.IMMUTABLE | nd.APPEND_ONLY


def wants_write(flags: int) -> bool:
    """O_TRUNC counts with any access mode (ovl_open_flags_need_copy_up())."""
    return flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)


def passed_flags(flags: int) -> int:
    """Flags for the real open."""
    return flags & ~_NOT_PASSED


def copy_limit(flags: int) -> int | None:
    """How much data an open for writing needs copied up: none with O_TRUNC."""
    return 0 if flags & os.O_TRUNC else None


def check_open(stack: Stack, node: Node, flags: int) -> None:
    """What can be refused before anything is copied up. EROFS, EPERM, EISDIR, ENXIO."""
    if node.is_dir:
        raise oserror(errno.EISDIR, node.name)
    if not node.is_regular:
        raise oserror(errno.ENXIO, node.name)
    if not wants_write(flags):
        return
    _ = stack.w
    appending = bool(flags & os.O_APPEND) and not flags & os.O_TRUNC
    protect.check_write(stack, node, append=appending)


def open_file(stack: Stack, node: Node, flags: int, caller: Caller | None = None) -> FileHandle:
    """Open a regular file; copies it up first when *flags* ask for writing."""
    check_open(stack, node, flags)
    writing = wants_write(flags)
    if writing:
        copyup.whole(stack, node, limit=copy_limit(flags))
        if flags & os.O_TRUNC and caller is not None:
            drop_privileges(stack, node, caller)
    before = stack.before(node) if flags & os.O_TRUNC else None
    fd = attrs.open_object(stack, node, passed_flags(flags))
    if before is not None:
        stack.recount(node, before)
    return adopt(stack, node, fd, flags)


def drop_privileges(stack: Stack, node: Node, caller: Caller) -> None:
    """Clear suid and sgid as for a change of data by the caller, unless the caller may keep them.

    The server would truncate, allocate or copy with its own rights (should_remove_suid(),
    setattr_should_drop_sgid() in fs). For requests in which the kernel does not say it.
    """
    st = stack.stat(node)
    drop = 0
    if st.st_mode & stat.S_ISUID and not creds.keeps_suid(caller):
        drop |= stat.S_ISUID
    if st.st_mode & stat.S_ISGID and _loses_sgid(st, caller):
        drop |= stat.S_ISGID
    if drop:
        attrs.change_mode(stack, node, stat.S_IMODE(st.st_mode) & ~drop)


def kill_suid_sgid(stack: Stack, node: Node, caller: Caller) -> None:
    """Clear suid and sgid, because the kernel says so (FUSE_HANDLE_KILLPRIV_V2).

    It says so for every caller without CAP_FSETID; set-group-id without group execute stays for
    members of the group and for root of a user namespace (setattr_should_drop_sgid()).
    """
    mode = stat.S_IMODE(stack.stat(node).st_mode)
    drop = mode & stat.S_ISUID
    if mode & stat.S_ISGID and (
        mode & stat.S_IXGRP
        or (stack.stat(node).st_gid not in creds.groups_of(caller) and not creds.keeps_sgid(caller))
    ):
        drop |= stat.S_ISGID
    if drop:
        attrs.change_mode(stack, node, mode & ~drop)


def fallocate(handle: FileHandle, mode: int, offset: int, length: int) -> None:
    """Allocate or punch; where somebody counts, what the file grows by has to be free."""
    if not handle.writable:
        raise oserror(errno.EBADF)
    if handle.account is None:
        sc.fallocate(handle.fd, mode, offset, length)
    else:
        handle.account.allocate(handle.fd, mode, offset, length)


def copy_range(handle: FileHandle, fd_in: int, length: int, offset_in: int, offset_out: int) -> int:
    """copy_file_range(2) from *fd_in*; where somebody counts, by reading and writing."""
    if not handle.writable:
        raise oserror(errno.EBADF)
    if handle.account is None:
        return sc.copy_range(fd_in, handle.fd, length, offset_in, offset_out)
    done = 0
    while done < length:
        data = os.pread(fd_in, min(length - done, _COPY_STEP), offset_in + done)
        if not data:
            break
        try:
            part = handle.account.write(handle.fd, offset_out + done, data)
        except OSError:
            if not done:
                raise
            break
        done += part
        if part < len(data):
            break
    return done


def _loses_sgid(st: os.stat_result, caller: Caller) -> bool:
    if st.st_mode & stat.S_IXGRP:
        return not creds.keeps_suid(caller)
    return st.st_gid not in creds.groups_of(caller) and not creds.keeps_sgid(caller)


def adopt(stack: Stack, node: Node, fd: int, flags: int) -> FileHandle:
    """A handle for an open descriptor of *node*."""
    handle = FileHandle(fd, node, flags, in_upper=node.low is None)
    if stack.ledger is not None and handle.in_upper:
        _open_account(stack.ledger, handle)
    if node.handles is None:
        node.handles = []
    node.handles.append(handle)
    return handle


def _open_account(ledger: Ledger, handle: FileHandle) -> None:
    node = handle.node
    if node.orphan >= 0 and not node.handles:
        # Through /proc/self/fd: a file without a name is counted as long as it is open.
        st = os.fstat(handle.fd)
        if not st.st_nlink:
            ledger.added(st)
    if handle.writable:
        handle.account = ledger.open_file(handle.fd)


def _close_account(ledger: Ledger, handle: FileHandle) -> None:
    node = handle.node
    if handle.account is not None:
        ledger.close_file(handle.account, handle.fd)
        handle.account = None
    if node.parent is None and node.handles == [handle]:
        st = os.fstat(handle.fd)
        if not st.st_nlink:
            ledger.removed(st)


def read(handle: FileHandle, offset: int, size: int) -> bytes:
    """Up to *size* bytes at *offset*; empty at the end."""
    return os.pread(handle.fd, size, offset)


def write(handle: FileHandle, offset: int, data: bytes | memoryview) -> int:
    """All of *data*, or an error; what was written before an error or a limit counts."""
    if not handle.writable:
        raise oserror(errno.EBADF)
    if handle.account is not None:
        # The kernel makes EIO of a short answer to a direct write (fuse_get_res_by_io()).
        whole = bool(handle.flags & os.O_DIRECT)
        return handle.account.write(handle.fd, offset, data, whole=whole)
    return write_whole(handle.fd, data, offset)


def sync(stack: Stack, handle: FileHandle, *, data_only: bool) -> None:
    """fsync(2) of an upper file; a lower one is clean by definition (ovl_fsync())."""
    if not handle.in_upper or stack.policy.volatile:
        return
    if data_only:
        sc.fdatasync(handle.fd)
    else:
        sc.fsync(handle.fd)


def atime_is_due(handle: FileHandle) -> bool:
    """relatime_need_update() of fs/inode.c for an upper file; a lower one is left alone."""
    if not handle.in_upper:
        return False
    st = os.fstat(handle.fd)
    atime = st.st_atime_ns
    if atime <= st.st_mtime_ns or atime <= st.st_ctime_ns:
        return True
    return time.time() - st.st_atime >= _DAY_S


def release(stack: Stack, handle: FileHandle) -> None:
    """Close; the node may go with its last handle."""
    node = handle.node
    if stack.ledger is not None and handle.in_upper:
        _close_account(stack.ledger, handle)
    os.close(handle.fd)
    handle.fd = -1
    if node.handles is not None:
        node.handles.remove(handle)
        if not node.handles:
            node.handles = None
            if not node.lookups:
                stack.nodes.reap(node)

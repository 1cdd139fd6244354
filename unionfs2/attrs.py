"""Changing attributes and extended attributes of what the union shows.

Permission is the door's business (the kernel checks against the merged inode); what happens
here is copy-up, the change on the upper object, and the rules that overlayfs adds: protection
marks, hidden and escaped names.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Protocol

from . import copyup, creds, ondisk, protect
from . import nodes as nd
from . import syscalls as sc
from .model import Caller, SetAttr
from .nodes import Node
from .stack import Stack, oserror

_ACLS = (ondisk.ACL_ACCESS, ondisk.ACL_DEFAULT)
# Attributes that a file without any listed attribute cannot have; label modules may answer for
# others without listing them.
_LISTED = (ondisk.CAPABILITY, *_ACLS)


class Resizable(Protocol):
    """An open file, as far as a change of size needs it."""

    @property
    def fd(self) -> int: ...

    @property
    def writable(self) -> bool: ...


_NOTHING_THERE = nd.NO_XATTRS | nd.NO_CAPABILITY


def set_attributes(
    stack: Stack,
    node: Node,
    new: SetAttr,
    handle: Resizable | None = None,
    caller: Caller | None = None,
) -> None:
    """Apply *new*; size first, then owner, mode, times.

    Raises EROFS, EPERM for protected files, EEXIST for an unlinked lower file, and what copy-up
    and the calls on the upper raise.
    """
    check_attributes(stack, node, new)
    copyup.whole(stack, node, limit=new.size)
    # Decided by the group that the file has before it may get another one.
    drop_sgid = caller is not None and _loses_lone_sgid(stack, node, new, caller)
    if new.size is not None:
        _set_size(stack, node, new.size, handle)
    path, follow = stack.object_path(node)
    if new.uid is not None or new.gid is not None:
        uid = -1 if new.uid is None else new.uid
        gid = -1 if new.gid is None else new.gid
        sc.chown(path, uid, gid, follow_symlinks=follow)
    if new.mode is not None:
        change_mode(stack, node, stat.S_IMODE(new.mode))
    if drop_sgid:
        mode = stat.S_IMODE(stack.stat(node).st_mode)
        change_mode(stack, node, mode & ~stat.S_ISGID)
    if new.atime_ns is not None or new.mtime_ns is not None:
        set_times(stack, node, new.atime_ns, new.mtime_ns)


def check_attributes(stack: Stack, node: Node, new: SetAttr) -> None:
    """EROFS, or EPERM for protected files."""
    _ = stack.w
    if new.size is not None:
        protect.check_write(stack, node, append=False)
    if any(field is not None for field in (new.mode, new.uid, new.gid)):
        protect.check_metadata(stack, node)
    if new.atime_ns is not None or new.mtime_ns is not None:
        protect.check_metadata(stack, node)


def _set_size(stack: Stack, node: Node, size: int, handle: Resizable | None) -> None:
    """ftruncate(2) through the caller's handle, truncate(2) without.

    Only the first sets mtime on every file system when the size stays the same.
    """
    before = stack.before(node)
    if before is None or stack.ledger is None:
        _resize(stack, node, size, handle)
        return
    with stack.ledger.writing_stopped(before):
        _resize(stack, node, size, handle)
        stack.recount(node, before)


def _resize(stack: Stack, node: Node, size: int, handle: Resizable | None) -> None:
    if handle is not None and handle.writable:
        sc.ftruncate(handle.fd, size)
        return
    if node.orphan >= 0:
        sc.truncate(sc.fd_path(node.orphan), size)
        return
    fd = open_object(stack, node, os.O_PATH)
    try:
        sc.truncate(sc.fd_path(fd), size)
    finally:
        os.close(fd)


def open_object(stack: Stack, node: Node, flags: int) -> int:
    """Open the object of a node; never follows a link, never waits for a fifo."""
    try:
        return _open_object(stack, node, flags)
    except PermissionError:
        if not flags & os.O_NOATIME:
            raise
        # The caller owns the file, but the server does not and has no privilege (open(2)).
        return _open_object(stack, node, flags & ~os.O_NOATIME)


def _open_object(stack: Stack, node: Node, flags: int) -> int:
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    open_at = sc.open_truncated if flags & os.O_TRUNC else os.open
    if node.orphan >= 0:
        return open_at(sc.fd_path(node.orphan), flags & ~os.O_NOFOLLOW)
    low = node.low
    if low is not None:
        return low.branch.open_file(node.name, low.at(), flags)
    dir_fd, name = stack.place(node)
    return open_at(name, flags, dir_fd=dir_fd)


def change_mode(stack: Stack, node: Node, mode: int) -> None:
    """chmod of the upper object of *node*."""
    if node.orphan >= 0 or node.parent is None:
        path, _ = stack.object_path(node)
        sc.chmod_path(path, mode)
        return
    dir_fd, name = stack.place(node)
    sc.chmod(name, dir_fd, mode)


def set_times(stack: Stack, node: Node, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set them, whether or not the file is protected."""
    if node.orphan >= 0 or node.parent is None:
        path, _ = stack.object_path(node)
        sc.utimes_path(path, atime_ns, mtime_ns)
        return
    dir_fd, name = stack.place(node)
    sc.utimes(name, dir_fd, atime_ns, mtime_ns)


# --- extended attributes ------------------------------------------------------------------------


def stat_with_birth(stack: Stack, node: Node) -> tuple[os.stat_result, int | None]:
    """Attributes, and when the object was made in ns; None where the file system does not know."""
    if node.orphan >= 0:
        return stack.stat(node), sc.birth_ns(b"", node.orphan)
    if node.is_dir:
        return stack.stat(node), sc.birth_ns(b"", node.top.at())  # type: ignore[attr-defined]
    dir_fd, name = stack.place(node)
    return stack.stat(node), sc.birth_ns(name, dir_fd)


def _is_known_absent(node: Node, key: bytes) -> bool:
    """Spares the call that the kernel makes before every write, for ``security.capability``."""
    if node.flags & nd.NO_XATTRS:
        return key in _LISTED
    return key == ondisk.CAPABILITY


def get_xattr(stack: Stack, node: Node, key: bytes) -> bytes:
    """Value of *key* in the merged view; ENODATA for our own marks, EINVAL for the bare prefix."""
    if node.flags & _NOTHING_THERE and _is_known_absent(node, key):
        raise oserror(errno.ENODATA)
    disk_key = stack.dialect.to_disk(key)
    path, follow = stack.object_path(node)
    return os.getxattr(path, disk_key, follow_symlinks=follow)


def list_xattrs(stack: Stack, node: Node, caller: Caller | None = None) -> list[bytes]:
    """Names in the merged view; trusted.* only for a caller who may see them."""
    if node.flags & nd.NO_XATTRS:
        return []
    path, follow = stack.object_path(node)
    try:
        raw = os.listxattr(path, follow_symlinks=follow)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return []
        raise
    shown = [stack.dialect.to_view(os.fsencode(key)) for key in raw]
    keys = [key for key in shown if key is not None]
    plain = [key for key in keys if not key.startswith(ondisk.TRUSTED_NAMESPACE)]
    if len(plain) == len(keys) or caller is None or creds.sees_trusted(caller):
        return keys
    return plain


def check_xattr(stack: Stack, node: Node, key: bytes) -> bytes:
    """Name of *key* on disk; EROFS, EINVAL, or EPERM for protected files."""
    _ = stack.w
    disk_key = stack.dialect.to_disk(key)
    protect.check_metadata(stack, node)
    return disk_key


def set_xattr(
    stack: Stack, node: Node, key: bytes, value: bytes, flags: int, caller: Caller | None = None
) -> None:
    """Set *key*; copy-up first. *flags*: XATTR_CREATE or XATTR_REPLACE."""
    disk_key = check_xattr(stack, node, key)
    copyup.whole(stack, node)
    node.flags &= ~_NOTHING_THERE
    path, follow = stack.object_path(node)
    before = stack.before(node)
    sc.setxattr(path, disk_key, value, flags, follow_symlinks=follow)
    stack.recount(node, before)
    if key == ondisk.ACL_ACCESS and caller is not None:
        _drop_sgid(stack, node, caller)


def remove_xattr(stack: Stack, node: Node, key: bytes, caller: Caller | None = None) -> None:
    """Remove *key*; an absent one is ENODATA and copies nothing up (ovl_xattr_set())."""
    disk_key = check_removal(stack, node, key, caller)
    copyup.whole(stack, node)
    path, follow = stack.object_path(node)
    before = stack.before(node)
    sc.removexattr(path, disk_key, follow_symlinks=follow)
    stack.recount(node, before)
    if key == ondisk.ACL_ACCESS and caller is not None:
        _drop_sgid(stack, node, caller)


def check_removal(stack: Stack, node: Node, key: bytes, caller: Caller | None) -> bytes:
    """Name on disk; what a removal is refused for before anything is copied up.

    EROFS, EPERM, and ENODATA for an attribute that a lower object does not have. Where removing an
    access ACL clears sgid, that comes first, and with it the copy-up (ovl_set_acl()).
    """
    disk_key = check_xattr(stack, node, key)
    clears = key == ondisk.ACL_ACCESS and caller is not None and _acl_clears(stack, node, caller)
    if not node.in_upper and not clears:
        path, follow = stack.object_path(node)
        os.getxattr(path, disk_key, follow_symlinks=follow)
    return disk_key


def _loses_lone_sgid(stack: Stack, node: Node, new: SetAttr, caller: Caller) -> bool:
    """Whether a truncation or chown by somebody outside the group clears sgid without x.

    The kernel's FUSE client clears the other combinations by itself and forgets this one
    (setattr_should_drop_sgid() in fs/attr.c, fuse_setattr() in fs/fuse/dir.c).
    """
    if node.is_dir or (new.size is None and new.uid is None and new.gid is None):
        return False
    st = stack.stat(node)
    if st.st_mode & (stat.S_ISGID | stat.S_IXGRP) != stat.S_ISGID:
        return False
    return st.st_gid not in creds.groups_of(caller) and not creds.keeps_sgid(caller)


def _drop_sgid(stack: Stack, node: Node, caller: Caller) -> None:
    """A new access ACL by somebody outside the file's group clears sgid.

    Source: posix_acl_update_mode() in fs/posix_acl.c.
    """
    if _acl_clears(stack, node, caller):
        mode = stat.S_IMODE(stack.stat(node).st_mode)
        change_mode(stack, node, mode & ~stat.S_ISGID)


def _acl_clears(stack: Stack, node: Node, caller: Caller) -> bool:
    st = stack.stat(node)
    if not st.st_mode & stat.S_ISGID or st.st_gid in creds.groups_of(caller):
        return False
    return not creds.keeps_sgid(caller)

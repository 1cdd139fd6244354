"""Requests about attributes: GETATTR, SETATTR, STATX, extended attributes, inode flags, STATFS."""

from __future__ import annotations

import errno
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from unionfs2 import creds, fileattr, ondisk
from unionfs2 import nodes as nd
from unionfs2 import syscalls as sc
from unionfs2.attrs import set_times, stat_with_birth
from unionfs2.model import SetAttr
from unionfs2.ondisk import CAPABILITY
from unionfs2.stack import oserror

from . import abi, codec
from .door import caller_of

if TYPE_CHECKING:
    from unionfs2.attrs import Resizable
    from unionfs2.nodes import Node

    from .codec import Request
    from .door import Door, Handler, Outcome, Quick

_NS = 10**9
_BODY_AT = abi.IN_HEADER.size
_GETATTR_SIZE = _BODY_AT + abi.GETATTR_IN.size
_SETATTR_SIZE = _BODY_AT + abi.SETATTR_IN.size
_unpack_setattr = abi.SETATTR_IN.unpack_from
_HELD_BACK = abi.FATTR_MTIME | abi.FATTR_CTIME
_XATTR_AT = _BODY_AT + abi.GETXATTR_IN.size
_CAPABILITY = ondisk.CAPABILITY + b"\0"
# What the kernel itself stamps with (current_time() of fs/inode.c); time has no name for it.
_CLOCK_REALTIME_COARSE = 5


class Attributes:
    """Handlers of one door."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._fs = door.fs
        self._by_id = door.stack.nodes.by_id

    def quick(self) -> dict[int, Quick]:
        return {
            abi.GETATTR: self.quick_getattr,
            abi.SETATTR: self.quick_setattr,
            abi.IOCTL: self.quick_ioctl,
            abi.GETXATTR: self.quick_getxattr,
        }

    def handlers(self) -> dict[int, Handler]:
        return {
            abi.GETATTR: self.getattr,
            abi.SETATTR: self.setattr,
            abi.STATX: self.statx,
            abi.STATFS: self.statfs,
            abi.ACCESS: self.access,
            abi.GETXATTR: self.getxattr,
            abi.LISTXATTR: self.listxattr,
            abi.SETXATTR: self.setxattr,
            abi.REMOVEXATTR: self.removexattr,
            abi.IOCTL: self.ioctl,
        }

    # --- stat ----------------------------------------------------------------------------------

    def getattr(self, req: Request, flags: int, *_: int) -> Outcome:
        node = self._door.node(req.nodeid)
        if flags & abi.GETATTR_FH and self._door.settings.has(abi.WRITEBACK_CACHE):
            self._door.check_writer(node)
        return self._door.attributes(req, node)

    def quick_getattr(
        self, buffer: codec.Buffer, length: int, unique: int, node_id: int
    ) -> bytes | None:
        """GETATTR by path; None: the long way."""
        node = self._by_id.get(node_id)
        if length != _GETATTR_SIZE or node is None or node.flags & nd.IMMUTABLE:
            return None
        if abi.GETATTR_IN.unpack_from(buffer, _BODY_AT)[0] or self._door.refusing:
            return None
        st = self._door.stack.stat(node)
        return codec.attr(unique, node.ino, self._fs.nlink_of(node, st), st)

    def quick_setattr(
        self, buffer: codec.Buffer, length: int, unique: int, node_id: int
    ) -> bytes | None:
        """Times that the kernel has held back: after a close, an unlink, a rename ...

        Without a file it was a change of names; nothing is to be done. Size and times in the answer
        are ignored: the kernel has its own.
        """
        node = self._by_id.get(node_id)
        if length != _SETATTR_SIZE or node is None or not node.is_regular:
            return None
        fields = _unpack_setattr(buffer, _BODY_AT)
        valid, fh, mtime_ns = fields[0], fields[1], fields[5] * _NS + fields[8]
        door = self._door
        if valid & ~abi.FATTR_FH != _HELD_BACK or not door.settings.has(abi.WRITEBACK_CACHE):
            return None
        if node.flags & (nd.IMMUTABLE | nd.APPEND_ONLY) or fh or door.copies:
            return None
        if valid & abi.FATTR_FH and node.low is None:
            fd = door.files.writing(node).fd
            st = os.fstat(fd)
            sc.futimes(fd, st.st_atime_ns, mtime_ns)
        else:
            st = door.stack.stat(node)
            if st.st_mtime_ns != mtime_ns:
                return None
        return codec.attr(unique, node.ino, st.st_nlink, st)

    def quick_ioctl(self, buffer: codec.Buffer, length: int, unique: int, _: int) -> bytes | None:
        """What files of a union do not know, above all whether they are a terminal."""
        if length < _BODY_AT + abi.IOCTL_IN.size:
            return None
        cmd = abi.IOCTL_IN.unpack_from(buffer, _BODY_AT)[2]
        if cmd in fileattr.GETTERS or cmd in fileattr.SETTERS:
            return None
        return codec.failed(unique, errno.ENOTTY)

    def quick_getxattr(
        self, buffer: codec.Buffer, length: int, unique: int, node_id: int
    ) -> bytes | None:
        """The capability that the kernel asks for before it writes, where there can be none."""
        node = self._by_id.get(node_id)
        if node is None or buffer[_XATTR_AT:length] != _CAPABILITY:
            return None
        absent = node.flags & (nd.NO_XATTRS | nd.NO_CAPABILITY)
        return codec.failed(unique, errno.ENODATA) if absent else None

    def statx(self, req: Request, _flags: int, _fh: int, _sx_flags: int, mask: int) -> Outcome:
        """What GETATTR says, and the time of birth."""
        del mask
        node = self._door.node(req.nodeid)
        st, birth_ns = stat_with_birth(self._door.stack, node)
        found = sc.STATX_BASIC_STATS
        if birth_ns is not None:
            found |= sc.STATX_BTIME
        times = (st.st_atime_ns, birth_ns or 0, st.st_ctime_ns, st.st_mtime_ns)
        pairs = [part for ns in times for part in (ns // _NS, ns % _NS)]
        return abi.STATX_OUT.pack(
            abi.STATX_OUT.size, 0, req.unique, codec.CACHE_S, 0, 0,
            found, st.st_blksize, 0, self._fs.nlink_of(node, st), st.st_uid, st.st_gid,
            st.st_mode, node.ino, st.st_size, st.st_blocks, 0,
            *pairs,
            os.major(st.st_rdev), os.minor(st.st_rdev), 0, 0,
        )  # fmt: skip

    def statfs(self, req: Request) -> Outcome:
        return codec.statfs(req.unique, self._fs.statfs(), self._fs.name_max)

    def access(self, req: Request, mask: int) -> Outcome:
        """Asked only where the kernel does not check by itself (default_permissions)."""
        st = self._fs.getattr(self._door.node(req.nodeid))
        if not creds.may_access(st, mask, caller_of(req)):
            raise oserror(errno.EACCES)
        return codec.ok(req.unique)

    # --- change --------------------------------------------------------------------------------

    def setattr(
        self, req: Request, valid: int, fh: int, size: int, _owner: int,
        atime: int, mtime: int, _ctime: int, atime_ns: int, mtime_ns: int, _ctime_ns: int,
        mode: int, uid: int, gid: int,
    ) -> Outcome:  # fmt: skip
        door, fs = self._door, self._fs
        node = door.node(req.nodeid)
        new = SetAttr(
            mode=mode if valid & abi.FATTR_MODE else None,
            uid=uid if valid & abi.FATTR_UID else None,
            gid=gid if valid & abi.FATTR_GID else None,
            size=size if valid & abi.FATTR_SIZE else None,
            atime_ns=_time(valid, abi.FATTR_ATIME, abi.FATTR_ATIME_NOW, atime, atime_ns),
            mtime_ns=_time(valid, abi.FATTR_MTIME, abi.FATTR_MTIME_NOW, mtime, mtime_ns),
        )
        held_back = self._may_be_held_back(valid)
        if held_back and fs.getattr(node).st_mtime_ns == new.mtime_ns:
            # Only the time of change was touched, for instance because a name went.
            return door.attributes(req, node)
        # With a file it is the kernel that writes back, on behalf of somebody who may write.
        by_writer = bool(valid & abi.FATTR_FH)
        written = node.flags & nd.APPEND_ONLY or (by_writer and node.flags & nd.IMMUTABLE)
        if held_back and written and node.low is None:
            set_times(door.stack, node, None, new.mtime_ns)  # it was written when it could be
            return door.attributes(req, node)
        if not (held_back and by_writer):
            fs.check_setattr(node, new)
        then = partial(self._setattr_now, req, node, new, valid, fh)
        nameless = by_writer or _only_kills(valid)
        return door.copied_up(node, then, limit=new.size, nameless=nameless)

    def _may_be_held_back(self, valid: int) -> bool:
        """Whether this may be the time of a write that the kernel held back, not utimensat(2)."""
        wanted = valid & ~(abi.FATTR_CTIME | abi.FATTR_FH)
        return wanted == abi.FATTR_MTIME and self._door.settings.has(abi.WRITEBACK_CACHE)

    def _setattr_now(self, req: Request, node: Node, new: SetAttr, valid: int, fh: int) -> Outcome:
        door, fs = self._door, self._fs
        handle: Resizable | None = None
        # To size 0 without a file: O_TRUNC, which sets the time of an empty file as well, or
        # truncate(2), which does not; the first is what happens.
        truncated = new.size == 0 and door.settings.stateless and node.is_regular
        if new.size is not None and (valid & abi.FATTR_FH or truncated):
            handle = fs.files.get(fh) if fh else door.files.writing(node)
        if new.size is not None and new.mtime_ns is None and door.settings.has(abi.WRITEBACK_CACHE):
            # The size stays, else the kernel would have set the time. It keeps the time that it
            # has, whatever we answer, so the file must keep it as well.
            new = new._replace(mtime_ns=fs.getattr(node).st_mtime_ns)
        caller = caller_of(req)
        if valid & abi.FATTR_KILL_SUIDGID and new.size is not None:
            fs.kill_suid_sgid(node, caller)
        elif _only_kills(valid) and node.is_regular:
            fs.drop_privileges(node, caller)
        st = fs.setattr(node, new, handle, caller)
        return codec.attr(req.unique, node.ino, fs.nlink_of(node, st), st)

    # --- extended attributes -------------------------------------------------------------------

    def getxattr(self, req: Request, size: int, name: bytes) -> Outcome:
        value = self._fs.getxattr(self._door.node(req.nodeid), name)
        return _sized(req, size, value)

    def listxattr(self, req: Request, size: int) -> Outcome:
        keys = self._fs.listxattr(self._door.node(req.nodeid), caller_of(req))
        return _sized(req, size, b"".join(key + b"\0" for key in keys))

    def setxattr(self, req: Request, size: int, flags: int, rest: bytes) -> Outcome:
        door = self._door
        extended = door.settings.has(abi.SETXATTR_EXT)
        _, name, value = codec.setxattr_args(rest, size, extended=extended)
        node = door.node(req.nodeid)
        self._fs.check_setxattr(node, name)

        def then(_: object = None) -> Outcome:
            self._fs.setxattr(node, name, value, flags, caller_of(req))
            return codec.ok(req.unique)

        if name == CAPABILITY and node.is_regular:
            # What was written before it came, and is held back, would take it away when written.
            return door.copied_up(node, lambda: door.written_back(node, then))
        return door.copied_up(node, then)

    def removexattr(self, req: Request, name: bytes) -> Outcome:
        door = self._door
        node = door.node(req.nodeid)

        def then() -> Outcome:
            self._fs.removexattr(node, name, caller_of(req))
            return codec.ok(req.unique)

        if node.in_upper:
            return then()
        self._fs.check_removexattr(node, name, caller_of(req))
        # With a write by somebody who may not keep it the kernel takes this one away first.
        return door.copied_up(node, then, nameless=name == CAPABILITY)

    # --- inode flags (chattr, xfs_io) ------------------------------------------------------------

    def ioctl(
        self, req: Request, _fh: int, _flags: int, cmd: int, _arg: int, _in_size: int,
        out_size: int, data: bytes,
    ) -> Outcome:  # fmt: skip
        node = self._door.node(req.nodeid)
        if cmd in fileattr.GETTERS:
            return codec.ioctl(req.unique, fileattr.get(self._fs.stack, node, cmd)[:out_size])
        if cmd in fileattr.SETTERS:
            fileattr.check(self._fs.stack, node, cmd, data)

            def then(_: object = None) -> Outcome:
                fileattr.put(self._fs.stack, node, cmd, data)
                # The kernel is to ask before the next write, see check_writer().
                self._fs.stack.changed.append(node)
                return codec.ioctl(req.unique, b"")

            # What was written before it was protected must not be refused afterwards.
            return self._door.copied_up(node, lambda: self._door.written_back(node, then))
        raise oserror(errno.ENOTTY)


def _only_kills(valid: int) -> bool:
    """Whether what a caller may not keep has to go, before a write or for a chown(-1, -1).

    With FUSE_HANDLE_KILLPRIV_V2 nothing is left of ATTR_KILL_SUID, nor of ATTR_KILL_PRIV, which
    the kernel also sends for those who may keep suid (fuse_setattr()).
    """
    return not valid & ~(abi.FATTR_FH | abi.FATTR_CTIME)


def _time(valid: int, given: int, now: int, seconds: int, nanoseconds: int) -> int | None:
    if valid & now:
        return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    return seconds * _NS + nanoseconds if valid & given else None


def _sized(req: Request, size: int, value: bytes) -> Outcome:
    if not size:
        return codec.sized(req.unique, len(value))
    if len(value) > size:
        raise oserror(errno.ERANGE)
    return codec.data(req.unique, value)

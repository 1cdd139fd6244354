"""Owner, attributes, mode and times of what was unpacked, in the order in which they survive.

Owner first, because chown takes capabilities and setuid bits away; mode after the attributes,
because setting an access list may take a bit away; times last.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final, NoReturn

from unionfs2 import ondisk
from unionfs2 import syscalls as sc
from unionfs2.errors import ArchiveError, show
from unionfs2.storemodel import IdMaps
from unionfs2.whiteout import Dialect

from . import acltext, tar
from .members import Member

_ACLS: Final = frozenset({ondisk.ACL_ACCESS, ondisk.ACL_DEFAULT})
_NAMESPACES: Final = (b"user.", b"trusted.", ondisk.SECURITY_PREFIX)
_PRIVILEGED: Final = (b"trusted.", ondisk.SECURITY_PREFIX)
_DISK_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM})


class Attributes:
    """Sets them. *lenient*: what only root may set is left out where it is refused."""

    def __init__(self, dialect: Dialect, ids: IdMaps, *, lenient: bool) -> None:
        self._dialect = dialect
        self._ids = ids
        self._lenient = lenient

    def of_file(self, fd: int, member: Member) -> None:
        """Of an open file, once its content is there."""
        try:
            sc.fchown(fd, *self._owner(member.uid, member.gid))
        except OSError as exc:
            if not self._lenient:
                _refuse_owner(exc, member.uid, member.gid)
        if member.xattrs:
            self._set_xattrs(fd, member)
        sc.fchmod(fd, member.mode)
        sc.futimes(fd, member.mtime_ns, member.mtime_ns)

    def copy(self, source_fd: int, fd: int, name: bytes) -> None:
        """Of the directory *source_fd*, which is on the disk, to directory *name*."""
        st = os.stat(source_fd)
        source = sc.fd_path(source_fd)
        self._chown(fd, name, st.st_uid, st.st_gid)
        for key in map(os.fsencode, os.listxattr(source)):
            if not self._dialect.is_private(key):
                sc.setxattr_at(name, fd, key, os.getxattr(source, key))
        sc.chmod(name, fd, stat.S_IMODE(st.st_mode))
        sc.utimes(name, fd, st.st_mtime_ns, st.st_mtime_ns)

    def _owner(self, uid: int, gid: int) -> tuple[int, int]:
        return self._ids.to_host(uid, gid) if self._ids else (uid, gid)

    def _chown(self, fd: int, name: bytes, uid: int, gid: int) -> None:
        try:
            sc.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)
        except OSError as exc:
            if not self._lenient:
                _refuse_owner(exc, uid, gid)

    def of_object(self, member: Member, fd: int, name: bytes) -> None:
        """Everything but content, of an object that has no descriptor of its own."""
        self._chown(fd, name, *self._owner(member.uid, member.gid))
        if member.xattrs:
            self._set_xattrs(sc.entry_path(fd, name), member)
        if member.type != tar.SYMLINK:
            sc.chmod(name, fd, member.mode)
        sc.utimes(name, fd, member.mtime_ns, member.mtime_ns)

    def _set_xattrs(self, target: int | bytes, member: Member) -> None:
        for key, value in member.xattrs.items():
            if not (key.startswith(_NAMESPACES) or key in _ACLS):
                continue  # of another system, as com.apple.*: there is no place for it here
            try:
                self._set_xattr(target, key, value)
            except OSError as exc:
                if exc.errno in _DISK_ERRORS:
                    raise
                if self._lenient and key.startswith(_PRIVILEGED):
                    continue
                raise ArchiveError(
                    f'attribute "{show(key)}" of "{show(member.path)}" cannot be set: '
                    f"{exc.strerror}",
                    errno=exc.errno,
                ) from exc

    def _set_xattr(self, target: int | bytes, key: bytes, value: bytes) -> None:
        if key in _ACLS:
            if not value:
                return
            if self._ids:
                value = acltext.mapped(value, self._ids.uid_to_host, self._ids.gid_to_host)
        name = self._dialect.to_disk(key)
        if isinstance(target, int):
            sc.setxattr(target, name, value)
        else:
            sc.setxattr(target, name, value, 0, follow_symlinks=False)


def _refuse_owner(exc: OSError, uid: int, gid: int) -> NoReturn:
    """EPERM and EINVAL are what somebody without privilege gets, who can do something about it."""
    if exc.errno not in (errno.EPERM, errno.EINVAL):
        raise exc
    raise OSError(
        exc.errno,
        f"owner {uid}:{gid} cannot be set ({exc.strerror}): unpack as root, or with the storage"
        " option ignore_chown_errors=true",
    ) from exc

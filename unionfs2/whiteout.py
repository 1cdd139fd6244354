"""Deletion marks: reading them in any layer, making them in the upper.

A whiteout is a character device 0:0, or an empty regular file with the ``whiteout`` attribute
(made by image tools only). An opaque directory hides what lies below it. ``Dialect`` knows the
two spellings of the attributes, ``trusted.overlay.`` and ``user.overlay.``.
"""

from __future__ import annotations

import errno
import os
import stat
from itertools import count

from . import ondisk
from . import syscalls as sc


class Dialect:
    """Attribute names of one namespace (ovl_xattr_table in fs/overlayfs/super.c)."""

    __slots__ = (
        "escaped",
        "impure",
        "marks",
        "metacopy",
        "name",
        "opaque",
        "origin",
        "prefix",
        "protattr",
        "redirect",
        "uuid",
        "whiteout",
    )

    def __init__(self, *, userxattr: bool) -> None:
        prefix = ondisk.USER_PREFIX if userxattr else ondisk.TRUSTED_PREFIX
        self.name = "user" if userxattr else "trusted"
        self.prefix = prefix
        self.escaped = prefix + ondisk.ESCAPE
        self.opaque = prefix + ondisk.SUFFIX_OPAQUE
        self.whiteout = prefix + ondisk.SUFFIX_WHITEOUT
        self.origin = prefix + ondisk.SUFFIX_ORIGIN
        self.impure = prefix + ondisk.SUFFIX_IMPURE
        self.redirect = prefix + ondisk.SUFFIX_REDIRECT
        self.metacopy = prefix + ondisk.SUFFIX_METACOPY
        self.uuid = prefix + ondisk.SUFFIX_UUID
        self.protattr = prefix + ondisk.SUFFIX_PROTATTR
        # What a lookup looks for on directories, as os.listxattr() spells names.
        self.marks = frozenset(os.fsdecode(key) for key in (self.opaque, self.redirect))

    def is_private(self, key: bytes) -> bool:
        """Never shown, never copied up: the prefix, unless escaped for a nested overlay."""
        return key.startswith(self.prefix) and not key.startswith(self.escaped)

    def to_disk(self, key: bytes) -> bytes:
        """Name on disk of attribute *key* of the merged view (ovl_xattr_escape_name())."""
        if not key.startswith(self.prefix):
            return key
        if key == self.prefix:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self.escaped + key[len(self.prefix) :]

    def to_view(self, key: bytes) -> bytes | None:
        """Name in the merged view of attribute *key* on disk, None when it is hidden."""
        if not key.startswith(self.prefix):
            return key
        if key.startswith(self.escaped) and len(key) > len(self.escaped):
            return self.prefix + key[len(self.escaped) :]
        return None


def is_device(st: os.stat_result) -> bool:
    """Character device 0:0 (ovl_is_whiteout())."""
    return st.st_rdev == 0 and stat.S_ISCHR(st.st_mode)


def has_mark(dialect: Dialect, name: bytes, dir_fd: int) -> bool:
    """Whether an empty regular file carries the ``whiteout`` attribute."""
    try:
        sc.getxattr_at(name, dir_fd, dialect.whiteout)
    except OSError:
        return False
    return True


def is_whiteout(dialect: Dialect, st: os.stat_result, name: bytes, dir_fd: int) -> bool:
    """Either form; costs a system call for empty regular files only."""
    mode = st.st_mode
    if stat.S_ISCHR(mode):
        return st.st_rdev == 0
    return st.st_size == 0 and stat.S_ISREG(mode) and has_mark(dialect, name, dir_fd)


class TempNames:
    """Names for half-made objects in the work directory, unique among its users.

    The kernel and a second server on the same work directory count too: the process id keeps
    ours apart, and whoever creates asks for exclusive creation anyway.
    """

    __slots__ = ("_count", "_head")

    def __init__(self) -> None:
        self._count = count(1)
        self._head = ondisk.TEMP_PREFIX + b"%x" % (os.getpid() << 32)

    def next(self) -> bytes:
        return self._head[:-8] + b"%08x" % (next(self._count) & 0xFFFFFFFF)


class WhiteoutMaker:
    """Makes whiteouts as hard links of one, which saves an inode for each (ovl_whiteout())."""

    __slots__ = ("_base", "_names", "_share", "_work_fd")

    def __init__(self, work_fd: int, names: TempNames) -> None:
        self._work_fd = work_fd
        self._names = names
        self._base: bytes | None = None
        self._share = True

    def put(self, name: bytes, dir_fd: int) -> None:
        """Whiteout under a name that does not exist in *dir_fd*. One step, EEXIST if it does."""
        if self._share:
            base = self._base or self._make_base()
            try:
                sc.link(base, self._work_fd, name, dir_fd)
                return
            except OSError as exc:
                if exc.errno == errno.EEXIST:
                    raise
                self._base = None
                if exc.errno != errno.EMLINK:
                    self._share = False
        self._make(name, dir_fd)

    def temp(self) -> bytes:
        """A whiteout under a new name in the work directory, to be renamed over a victim."""
        name = self._names.next()
        self.put(name, self._work_fd)
        return name

    def close(self) -> None:
        """Remove the shared base; a mount that crashed leaves it to the next one."""
        if self._base is not None:
            try:
                sc.unlink(self._base, dir_fd=self._work_fd)
            except OSError:
                return
            finally:
                self._base = None

    def _make_base(self) -> bytes:
        name = self._names.next()
        self._make(name, self._work_fd)
        self._base = name
        return name

    def _make(self, name: bytes, dir_fd: int) -> None:
        sc.mknod(name, stat.S_IFCHR, 0, dir_fd=dir_fd)

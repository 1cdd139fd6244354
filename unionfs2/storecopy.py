"""Copies of diff directories, for layers made from a template.

Everything is copied as it lies on the disk: marks, whiteouts, attributes, owners, times to the
nanosecond, hard links among the copies, holes. Data is shared where the file system can (reflink),
copied inside the kernel otherwise. The source is not changed, not even its access times where the
caller may prevent that.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from . import ondisk
from . import syscalls as sc
from .copyup import copy_data
from .storefiles import names_in
from .storetrees import Descent

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Marks that say which mount an upper belongs to, not what is in it: a copy is another upper.
_IDENTITY: Final = (
    ondisk.TRUSTED_PREFIX + ondisk.SUFFIX_UUID,
    ondisk.USER_PREFIX + ondisk.SUFFIX_UUID,
)


def copy_tree(source_fd: int, target_fd: int) -> None:
    """Copy directory *source_fd*, itself included, onto the empty directory *target_fd*.

    Mount points are copied as the empty directories they stand on. Raises OSError; what was copied
    by then stays.
    """
    _Copy().directory(source_fd, target_fd)


class _Copy:
    def __init__(self) -> None:
        # Of files with several names: where the first of them went.
        self._first: dict[tuple[int, int], bytes] = {}
        self._root_fd = -1

    def directory(self, source_fd: int, target_fd: int) -> None:
        """Copy a tree, side by side, without recursion."""
        self._root_fd = target_fd
        source, target = Descent(source_fd), Descent(target_fd)
        todo = [(b"", names_in(source_fd)[::-1])]
        try:
            while todo:
                path, names = todo[-1]
                if names:
                    name = names.pop()
                    if self._entry(source, target, name, path + name):
                        todo.append((path + name + b"/", names_in(source.fd)[::-1]))
                    continue
                # Times of a directory last: making entries changes them.
                _finish(source.fd, target.fd, os.fstat(source.fd))
                todo.pop()
                if todo:
                    source.leave()
                    target.leave()
        finally:
            source.close()
            target.close()

    def _entry(self, source: Descent, target: Descent, name: bytes, path: bytes) -> bool:
        """Copy one entry; True when it is a directory that was entered on both sides."""
        st = sc.lstat_at(name, source.fd)
        kind = stat.S_IFMT(st.st_mode)
        if kind == stat.S_IFDIR:
            return self._enter(source, target, name, st)
        if st.st_nlink > 1 and self._link(st, name, target.fd, path):
            return False
        if kind == stat.S_IFREG:
            self._file(source.fd, target.fd, name)
            return False
        if kind == stat.S_IFLNK:
            sc.symlink(os.readlink(name, dir_fd=source.fd), name, dir_fd=target.fd)
        else:
            sc.mknod(name, kind | 0o600, st.st_rdev, dir_fd=target.fd)
        _finish_name(source.fd, target.fd, name, st)
        return False

    @staticmethod
    def _enter(source: Descent, target: Descent, name: bytes, st: os.stat_result) -> bool:
        sc.mkdir(name, 0o700, dir_fd=target.fd)
        try:
            source.enter(name)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            _finish_name(source.fd, target.fd, name, st)
            return False
        target.enter(name)
        return True

    def _link(self, st: os.stat_result, name: bytes, target: int, path: bytes) -> bool:
        """Make *name* another name of a file copied before; False for the first one."""
        key = (st.st_dev, st.st_ino)
        first = self._first.setdefault(key, path)
        if first == path:
            return False
        *parents, last = first.split(b"/")
        fd = os.dup(self._root_fd)
        try:
            for parent in parents:
                above, fd = fd, sc.open_dir(parent, fd)
                os.close(above)
            sc.link(last, fd, name, target)
        except OSError as exc:
            if exc.errno != errno.EMLINK:
                raise
            self._first[key] = path
            return False
        finally:
            os.close(fd)
        return True

    @staticmethod
    def _file(source: int, target: int, name: bytes) -> None:
        try:
            src = sc.open_at(name, _READ | os.O_NOATIME, dir_fd=source)
        except PermissionError:  # not the owner
            src = sc.open_at(name, _READ, dir_fd=source)
        try:
            dst = sc.create_at(name, _CREATE, 0o600, dir_fd=target)
            try:
                st = os.fstat(src)
                if not sc.clone_data(src, dst):
                    copy_data(src, dst, st.st_size)
                _finish(src, dst, st)
            finally:
                os.close(dst)
        finally:
            os.close(src)


def _finish(source: int, target: int, st: os.stat_result) -> None:
    """Attributes of an open file or directory: chown drops some, so it comes first; times last."""
    sc.fchown(target, st.st_uid, st.st_gid)
    for key in _keys(os.listxattr(source)):
        sc.setxattr(target, key, os.getxattr(source, key))
    sc.fchmod(target, stat.S_IMODE(st.st_mode))
    sc.futimes(target, st.st_atime_ns, st.st_mtime_ns)


def _finish_name(source: int, target: int, name: bytes, st: os.stat_result) -> None:
    """The same for what cannot be opened."""
    sc.chown(name, st.st_uid, st.st_gid, dir_fd=target, follow_symlinks=False)
    for key in _keys(sc.listxattr_at(name, source)):
        sc.setxattr_at(name, target, key, sc.getxattr_at(name, source, key))
    if not stat.S_ISLNK(st.st_mode):
        sc.chmod(name, target, stat.S_IMODE(st.st_mode))
    sc.utimes(name, target, st.st_atime_ns, st.st_mtime_ns)


def _keys(names: list[str] | list[bytes]) -> list[bytes]:
    return [key for key in map(os.fsencode, names) if key not in _IDENTITY]

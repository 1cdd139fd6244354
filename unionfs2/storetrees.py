"""Whole directory trees: walking, measuring and deleting them.

Nothing here leaves the tree it was given: no symbolic link is followed and no mount point entered,
wherever somebody moves things meanwhile. Trees may be of any depth and any width: no recursion,
and no more than a few directories open at a time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from . import syscalls as sc
from .storefiles import names_in
from .storemodel import Size

_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# Directories kept open above the current one; those further up are reopened through "..".
_WINDOW: Final = 16


def open_inside(name: bytes, dir_fd: int) -> int:
    """A listable descriptor of directory *name* on the same mount; EXDEV for a mount point."""
    path_fd = sc.open_dir_no_xdev(name, dir_fd)
    try:
        return sc.open_at(b".", _OPEN_DIR, dir_fd=path_fd)
    finally:
        os.close(path_fd)


class Descent:
    """The way from the root of a tree to one of its directories: ``fd`` is where we are."""

    __slots__ = ("_identities", "_opener", "_stack")

    def __init__(self, root_fd: int, opener: Callable[[bytes, int], int] = open_inside) -> None:
        self._stack = [root_fd]  # -1: closed for the time being
        self._identities = [_identity(root_fd)]
        self._opener = opener

    @property
    def fd(self) -> int:
        return self._stack[-1]

    def enter(self, name: bytes) -> None:
        """Go into a directory below. Raises OSError: EXDEV for a mount point."""
        fd = self._opener(name, self.fd)
        self._stack.append(fd)
        self._identities.append(_identity(fd))
        far = len(self._stack) - 1 - _WINDOW
        if far > 0:
            os.close(self._stack[far])
            self._stack[far] = -1

    def leave(self) -> None:
        """Go back up. Raises ESTALE when the directory was moved away meanwhile."""
        fd = self._stack.pop()
        self._identities.pop()
        try:
            if self._stack[-1] < 0:
                self._stack[-1] = up = sc.open_at(b"..", _OPEN_DIR, dir_fd=fd)
                if _identity(up) != self._identities[-1]:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close everything but the root."""
        for fd in self._stack[1:]:
            if fd >= 0:
                os.close(fd)
        del self._stack[1:]


def _identity(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


# --- walking --------------------------------------------------------------------------------------


class Found(NamedTuple):
    """One object of a walk; *dir_fd* is good until the next step."""

    path: bytes  # below the root
    dir_fd: int
    name: bytes
    st: os.stat_result


def walk(root_fd: int) -> Iterator[Found]:
    """Every object below *root_fd*, sorted, parents before what is in them.

    Mount points are shown and not entered; what vanishes meanwhile is left out.
    """
    place = Descent(root_fd)
    todo = [(b"", names_in(root_fd)[::-1])]
    try:
        while todo:
            path, names = todo[-1]
            if not names:
                todo.pop()
                if todo:
                    place.leave()
                continue
            name = names.pop()
            st = sc.lstat_or_none(name, place.fd)
            if st is None:
                continue
            yield Found(path + name, place.fd, name, st)
            if stat.S_ISDIR(st.st_mode) and _enter(place, name):
                todo.append((path + name + b"/", names_in(place.fd)[::-1]))
    finally:
        place.close()


def _enter(place: Descent, name: bytes) -> bool:
    try:
        place.enter(name)
    except OSError as exc:
        if exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.EXDEV}:
            return False
        raise
    return True


def tree_size(root_fd: int) -> Size:
    """Bytes and inodes below the directory *root_fd*, which is not counted itself.

    Bytes are the st_size of regular files, each inode once, as Docker counts; every object counts
    as one inode. What is mounted below is not entered.
    """
    total = inodes = 0
    seen: set[tuple[int, int]] = set()
    for found in walk(root_fd):
        st = found.st
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            if (st.st_dev, st.st_ino) in seen:
                continue
            seen.add((st.st_dev, st.st_ino))
        inodes += 1
        total += st.st_size if stat.S_ISREG(st.st_mode) else 0
    return Size(total, inodes)


# --- deleting -------------------------------------------------------------------------------------


class Undeleted(NamedTuple):
    """What delete_tree() had to leave: path below the directory, and the errno."""

    path: bytes
    errno: int


def delete_tree(dir_fd: int, name: bytes) -> list[Undeleted]:
    """Delete *name*, a tree or any other object; returns what could not be deleted.

    Links are deleted, not followed; mount points stay with all that is below them (EXDEV).
    Directories of mode 0 are opened by force, immutable and append-only flags taken away where
    that is allowed. What vanishes meanwhile counts as deleted, so two may work on one tree.
    """
    left: list[Undeleted] = []
    place = Descent(dir_fd, _open_by_force)
    todo: list[tuple[bytes, list[bytes]]] = [(b"", [name])]
    try:
        while True:
            path, names = todo[-1]
            if names:
                entry = names.pop()
                if _delete_entry(place, entry, path + entry, left):
                    todo.append((path + entry + b"/", names_in(place.fd)))
                continue
            todo.pop()
            if not todo:
                return left
            place.leave()
            _rmdir(place.fd, path[:-1], left)
    except OSError as exc:  # moved under our hands, or the disk is broken
        left.append(Undeleted(todo[-1][0] if todo else name, exc.errno or errno.EIO))
        return left
    finally:
        place.close()


def _delete_entry(place: Descent, name: bytes, path: bytes, left: list[Undeleted]) -> bool:
    """Unlink an entry, or enter it if it is a directory; whether it was entered."""
    try:
        if _unlink(place.fd, name):
            return False
        place.enter(name)
        return True
    except FileNotFoundError:
        return False
    except OSError as exc:
        left.append(Undeleted(path, exc.errno or errno.EIO))
        return False


def _rmdir(dir_fd: int, path: bytes, left: list[Undeleted]) -> None:
    name = path.rpartition(b"/")[2]
    try:
        try:
            sc.rmdir(name, dir_fd=dir_fd)
        except PermissionError:
            if not _set_free(dir_fd, name):
                raise
            sc.rmdir(name, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
    except OSError as exc:
        if not (exc.errno == errno.ENOTEMPTY and left):
            left.append(Undeleted(path, exc.errno or errno.EIO))


def _unlink(dir_fd: int, name: bytes) -> bool:
    """Unlink *name*; False when it is a directory."""
    try:
        sc.unlink(name, dir_fd=dir_fd)
        return True
    except IsADirectoryError:
        return False
    except PermissionError:
        if stat.S_ISDIR(sc.lstat_at(name, dir_fd).st_mode):
            return False  # what POSIX says unlink() answers for a directory
        if not _set_free(dir_fd, name):
            raise
    sc.unlink(name, dir_fd=dir_fd)
    return True


def _set_free(dir_fd: int, name: bytes) -> bool:
    """Take away whatever forbids to remove *name*; False if nothing could be changed."""
    changed = [_unprotect(dir_fd, name), _unprotect(dir_fd, b"."), _open_up(dir_fd)]
    return any(changed)


def _unprotect(dir_fd: int, name: bytes) -> bool:
    """Take away the flags that forbid deletion (chattr(1) i and a); False if it had none."""
    protected = sc.STATX_ATTR_IMMUTABLE | sc.STATX_ATTR_APPEND
    if not sc.attributes_at(name, dir_fd) & protected:
        return False
    try:
        fd = sc.open_at(name, _OPEN_FILE, dir_fd=dir_fd)
    except OSError:
        return False
    try:
        flags = sc.inode_flags(fd)
        sc.set_inode_flags(fd, flags & ~(sc.FS_IMMUTABLE_FL | sc.FS_APPEND_FL))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _open_up(dir_fd: int) -> bool:
    """Give the owner of a directory the right to change it; False if that is not what lacks."""
    if stat.S_IMODE(os.fstat(dir_fd).st_mode) & 0o700 == 0o700:
        return False
    try:
        sc.chmod_fd(dir_fd, 0o700)
    except OSError:
        return False
    return True


def _open_by_force(name: bytes, dir_fd: int) -> int:
    path_fd = sc.open_dir_no_xdev(name, dir_fd)
    try:
        try:
            return sc.open_at(b".", _OPEN_DIR, dir_fd=path_fd)
        except PermissionError:
            sc.chmod_fd(path_fd, 0o700)
            return sc.open_at(b".", _OPEN_DIR, dir_fd=path_fd)
    finally:
        os.close(path_fd)

"""Files and directories of a store: written so that a power cut leaves the old or the new one.

Three rules hold here:

* Content is durable before the name by which it is found (write_synced(), then rename).
* Several files that become visible together are written first and synced afterwards: the first
  fsync of a journalling file system commits what the others need, and they cost almost nothing.
* Deleting and measuring never leave the tree they were given: no symbolic link is followed, no
  mount point is entered.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from . import ondisk
from . import syscalls as sc
from .storemodel import Size

_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

FILE_MODE: Final = 0o644


class Owner(NamedTuple):
    """Who owns what the store makes: root of the container, as the host counts."""

    uid: int
    gid: int


# --- reading --------------------------------------------------------------------------------------


def open_dir(dir_fd: int, name: bytes) -> int:
    """A descriptor of directory *name* that can be listed, locked and fsynced. Never a link."""
    return sc.open_at(name, _OPEN_DIR, dir_fd=dir_fd)


@contextmanager
def opened_dir(dir_fd: int, name: bytes) -> Iterator[int]:
    """open_dir() for the length of a block."""
    fd = open_dir(dir_fd, name)
    try:
        yield fd
    finally:
        os.close(fd)


def read_file(dir_fd: int, name: bytes, limit: int) -> bytes:
    """Content of the regular file *name*. EINVAL for another type, EFBIG beyond *limit* bytes."""
    fd = sc.open_at(name, _OPEN_FILE, dir_fd=dir_fd)
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        if st.st_size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), name)
        content = b""
        while piece := os.read(fd, max(st.st_size + 1 - len(content), 4096)):
            content += piece
            if len(content) > limit:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), name)
        return content
    finally:
        os.close(fd)


def names_in(dir_fd: int) -> list[bytes]:
    """Names in a directory, sorted; *dir_fd* may have been read before."""
    fd = sc.open_at(b".", _OPEN_DIR, dir_fd=dir_fd)
    try:
        return sorted(os.fsencode(name) for name in os.listdir(fd))
    finally:
        os.close(fd)


def is_dir(dir_fd: int, name: bytes) -> bool:
    """Whether *name* is a directory itself, not a link to one."""
    st = sc.lstat_or_none(name, dir_fd)
    return st is not None and stat.S_ISDIR(st.st_mode)


# --- making ---------------------------------------------------------------------------------------


def make_dir(dir_fd: int, name: bytes, mode: int, owner: Owner | None = None) -> None:
    """A new directory with exactly *mode*, whatever the umask; EEXIST when the name is taken."""
    sc.mkdir(name, mode & 0o700, dir_fd=dir_fd)
    if owner is not None:
        sc.chown(name, owner.uid, owner.gid, dir_fd=dir_fd, follow_symlinks=False)
    sc.chmod(name, dir_fd, mode)


def write_all(fd: int, content: bytes) -> None:
    """Write *content* from the beginning of an open file."""
    done = 0
    while done < len(content):
        done += sc.pwrite(fd, content[done:], done)


def write_file(
    dir_fd: int, name: bytes, content: bytes, mode: int = FILE_MODE, owner: Owner | None = None
) -> int:
    """A new file, on its way to the disk but not synced: the descriptor, for sync_all()."""
    fd = sc.create_at(name, _CREATE, 0o600, dir_fd=dir_fd)
    try:
        write_all(fd, content)
        if owner is not None:
            sc.fchown(fd, owner.uid, owner.gid)
        sc.fchmod(fd, mode)
        sc.start_writeback(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_synced(
    dir_fd: int, name: bytes, content: bytes, mode: int = FILE_MODE, owner: Owner | None = None
) -> None:
    """A new file whose content is durable; its name is so after an fsync of the directory."""
    sync_all((write_file(dir_fd, name, content, mode, owner),))


def sync_all(fds: Iterable[int]) -> None:
    """Fsync and close every descriptor; all are closed also when one fails."""
    failure: OSError | None = None
    for fd in fds:
        try:
            if failure is None:
                sc.fsync(fd)
        except OSError as exc:
            failure = exc
        finally:
            os.close(fd)
    if failure is not None:
        raise failure


def write_file_atomic(
    dir_fd: int, name: bytes, content: bytes, mode: int = FILE_MODE, owner: Owner | None = None
) -> None:
    """Put *content* in place of the file *name*: readers and power cuts see the old or the new."""
    temp = temp_name(name)
    try:
        write_synced(dir_fd, temp, content, mode, owner)
        sc.rename(temp, dir_fd, name, dir_fd)
    except BaseException:
        remove_file(dir_fd, temp)
        raise
    sc.fsync(dir_fd)


def symlink_atomic(dir_fd: int, name: bytes, target: bytes) -> None:
    """Put a symbolic link in place of *name*, whatever file or link that was."""
    temp = temp_name(name)
    sc.symlink(target, temp, dir_fd=dir_fd)
    try:
        sc.rename(temp, dir_fd, name, dir_fd)
    except BaseException:
        remove_file(dir_fd, temp)
        raise


def remove_file(dir_fd: int, name: bytes) -> None:
    """Unlink *name*, if it is there and can be: for cleaning up behind a failure."""
    try:
        sc.unlink(name, dir_fd=dir_fd)
    except OSError:
        pass


def random_name() -> bytes:
    """A name that nobody else has chosen."""
    return secrets.token_hex(8).encode()


def temp_name(name: bytes) -> bytes:
    """Name for a file that will become *name*; is_temp_name() knows it again."""
    return b"%b.%b%b" % (name, random_name(), ondisk.TEMP_SUFFIX)


def is_temp_name(name: bytes, of: bytes | None = None) -> bool:
    """Whether *name* was made by temp_name(), for the file *of* if given."""
    head, dot, middle = name.removesuffix(ondisk.TEMP_SUFFIX).rpartition(b".")
    hexadecimal = len(middle) == 16 and set(middle) <= set(b"0123456789abcdef")
    return name.endswith(ondisk.TEMP_SUFFIX) and bool(dot) and hexadecimal and of in {None, head}


# --- trees ----------------------------------------------------------------------------------------


class Undeleted(NamedTuple):
    """What delete_tree() had to leave: path below the tree, and the errno."""

    path: bytes
    errno: int


def delete_tree(dir_fd: int, name: bytes) -> list[Undeleted]:
    """Delete *name*, a tree or any other object; returns what could not be deleted.

    Links are deleted, not followed; mount points are left (EXDEV, EBUSY) with all that is below
    them. Directories of mode 0 are opened by force, immutable and append-only flags taken away
    where that is allowed. What vanishes meanwhile counts as deleted, so two may work on one tree.
    """
    left: list[Undeleted] = []
    _delete(dir_fd, name, name, left)
    return left


def _delete(dir_fd: int, name: bytes, path: bytes, left: list[Undeleted]) -> None:
    # Iterative, so that a tree may be deeper than the interpreter's stack; the depth is bounded
    # by descriptors instead, so beyond some depth the rest is moved up first.
    try:
        if _unlink(dir_fd, name):
            return
        fd = _open_for_deletion(dir_fd, name)
    except FileNotFoundError:
        return
    except OSError as exc:
        left.append(Undeleted(path, exc.errno or errno.EIO))
        return
    try:
        _delete_below(fd, path, left)
    finally:
        os.close(fd)
    try:
        sc.rmdir(name, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
    except OSError as exc:
        if not (exc.errno == errno.ENOTEMPTY and left):
            left.append(Undeleted(path, exc.errno or errno.EIO))


def _delete_below(root_fd: int, path: bytes, left: list[Undeleted]) -> None:
    """Empty *root_fd*: a stack of open directories instead of recursion."""
    stack: list[tuple[int, bytes, list[bytes]]] = [(root_fd, path, names_in(root_fd))]
    try:
        while stack:
            fd, here, names = stack[-1]
            if not names:
                stack.pop()
                if stack:
                    os.close(fd)
                    _rmdir(stack[-1][0], here, left)
                continue
            name = names.pop()
            below = _delete_entry(fd, name, here + b"/" + name, left)
            if below is not None:
                stack.append((below, here + b"/" + name, names_in(below)))
    finally:
        for fd, _, _ in stack[1:]:
            os.close(fd)


def _delete_entry(fd: int, name: bytes, path: bytes, left: list[Undeleted]) -> int | None:
    """Unlink an entry; for a directory the descriptor to go on with."""
    try:
        return None if _unlink(fd, name) else _open_for_deletion(fd, name)
    except FileNotFoundError:
        return None
    except OSError as exc:
        left.append(Undeleted(path, exc.errno or errno.EIO))
        return None


def _rmdir(parent_fd: int, path: bytes, left: list[Undeleted]) -> None:
    try:
        sc.rmdir(path.rpartition(b"/")[2], dir_fd=parent_fd)
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
        if not (_unprotect(dir_fd, name) or _unprotect(dir_fd, b".")):
            raise
    sc.unlink(name, dir_fd=dir_fd)
    return True


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


def _open_for_deletion(dir_fd: int, name: bytes) -> int:
    """A listable descriptor of a directory on the same mount; EXDEV for a mount point."""
    path_fd = sc.open_dir_no_xdev(name, dir_fd)
    try:
        _unprotect(path_fd, b".")
        try:
            return sc.open_at(b".", _OPEN_DIR, dir_fd=path_fd)
        except PermissionError:
            sc.chmod_fd(path_fd, 0o700)
            return sc.open_at(b".", _OPEN_DIR, dir_fd=path_fd)
    finally:
        os.close(path_fd)


def tree_size(root_fd: int) -> Size:
    """Bytes and inodes below the directory *root_fd*, which is not counted itself.

    Bytes are the st_size of regular files, each inode once, as Docker counts; every object counts
    as one inode. What is mounted below is not entered.
    """
    total = inodes = 0
    seen: set[tuple[int, int]] = set()
    for _, _, _, st in walk(root_fd):
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            if (st.st_dev, st.st_ino) in seen:
                continue
            seen.add((st.st_dev, st.st_ino))
        inodes += 1
        total += st.st_size if stat.S_ISREG(st.st_mode) else 0
    return Size(total, inodes)


def walk(root_fd: int) -> Iterator[tuple[bytes, int, bytes, os.stat_result]]:
    """Every object below *root_fd*: (path, directory fd, name, lstat), parents first.

    The descriptor is good until the next step. Mount points are shown, not entered; what vanishes
    meanwhile is left out.
    """
    stack = [(sc.open_at(b".", _OPEN_DIR, dir_fd=root_fd), b"", names_in(root_fd)[::-1])]
    try:
        while stack:
            fd, path, names = stack[-1]
            if not names:
                os.close(stack.pop()[0])
                continue
            name = names.pop()
            st = sc.lstat_or_none(name, fd)
            if st is None:
                continue
            yield path + name, fd, name, st
            if stat.S_ISDIR(st.st_mode):
                below = _enter(fd, name)
                if below is not None:
                    stack.append((below, path + name + b"/", names_in(below)[::-1]))
    finally:
        for fd, _, _ in stack:
            os.close(fd)


def _enter(dir_fd: int, name: bytes) -> int | None:
    try:
        path_fd = sc.open_dir_no_xdev(name, dir_fd)
    except OSError as exc:
        if exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.EXDEV}:
            return None
        raise
    try:
        return sc.open_at(b".", _OPEN_DIR, dir_fd=path_fd)
    finally:
        os.close(path_fd)

"""Files and directories of a store: written so that a power cut leaves the old or the new one.

Two rules hold here:

* Content is durable before the name by which it is found (write_synced(), then rename).
* Several files that become visible together are written first and synced afterwards: the first
  fsync of a journalling file system commits what the others need, and they cost almost nothing.
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
    """Fsync every descriptor, and close all of them also when one fails."""
    files = tuple(fds)
    try:
        for fd in files:
            sc.fsync(fd)
    finally:
        for fd in files:
            os.close(fd)


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


def is_temp_name(name: bytes) -> bool:
    """Whether *name* was made by temp_name()."""
    _, dot, middle = name.removesuffix(ondisk.TEMP_SUFFIX).rpartition(b".")
    hexadecimal = len(middle) == 16 and set(middle) <= set(b"0123456789abcdef")
    return name.endswith(ondisk.TEMP_SUFFIX) and bool(dot) and hexadecimal

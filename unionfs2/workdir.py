"""The work directory: made ready at mount, left tidy at the end (ovl_workdir_create()).

``WORK/work`` is ours and the kernel's in turn: whatever a crashed mount left there is deleted.
Other names in WORK are left alone. ``incompat`` marks an upper that must not be mounted before
somebody looked at it, for instance after a volatile mount.
"""

from __future__ import annotations

import errno
import os
import stat

from . import ondisk
from . import syscalls as sc
from .errors import LayerError, show


def prepare(base_fd: int, path: bytes, *, clean: bool, volatile: bool) -> int:
    """O_PATH descriptor of an empty ``work``; *clean* is False while another mount uses it.

    Raises LayerError for an incompatible work directory, OSError of the calls.
    """
    st = sc.lstat_or_none(ondisk.WORK_NAME, base_fd)
    if st is not None and not stat.S_ISDIR(st.st_mode):
        sc.unlink(ondisk.WORK_NAME, dir_fd=base_fd)
        st = None
    if st is None:
        sc.mkdir(ondisk.WORK_NAME, ondisk.WORK_MODE, dir_fd=base_fd)
    fd = _open(base_fd)
    try:
        _refuse_incompatible(fd, path)
        if clean:
            empty(fd)
        if volatile:
            _mark_volatile(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(base_fd: int) -> int:
    fd = sc.open_dir(ondisk.WORK_NAME, base_fd)
    try:
        os.close(sc.open_at(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd))
    except PermissionError:
        # Mode 0000, as the kernel makes it, keeps out a server without CAP_DAC_OVERRIDE.
        os.close(fd)
        sc.chmod(ondisk.WORK_NAME, base_fd, 0o700)
        fd = sc.open_dir(ondisk.WORK_NAME, base_fd)
    return fd


def _refuse_incompatible(work_fd: int, path: bytes) -> None:
    try:
        fd = sc.open_at(
            ondisk.INCOMPAT_NAME,
            os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
            dir_fd=work_fd,
        )
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        names = os.listdir(fd)
    finally:
        os.close(fd)
    if names:
        mark = os.path.join(path, ondisk.WORK_NAME, ondisk.INCOMPAT_NAME, os.fsencode(names[0]))
        raise LayerError(
            f"work directory {show(path)} is marked incompatible by {show(mark)}: its upper"
            " directory may be incomplete after a crash of a volatile mount; check or discard the"
            " upper directory, then remove that mark",
            errno=errno.EINVAL,
        )


def _mark_volatile(work_fd: int) -> None:
    here = os.dup(work_fd)
    try:
        for part in ondisk.VOLATILE_PARTS[:-1]:
            if sc.lstat_or_none(part, here) is None:
                sc.mkdir(part, 0o700, dir_fd=here)
            below = sc.open_dir(part, here)
            os.close(here)
            here = below
        flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        os.close(sc.create_at(ondisk.VOLATILE_PARTS[-1], flags, 0o000, dir_fd=here))
    finally:
        os.close(here)


def empty(dir_fd: int) -> None:
    """Delete everything below *dir_fd*, never through a link or into a mount."""
    fd = sc.reopen(dir_fd, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names = [os.fsencode(name) for name in os.listdir(fd)]
        for name in names:
            _remove(name, fd)
    finally:
        os.close(fd)


def _remove(name: bytes, dir_fd: int) -> None:
    try:
        sc.unlink(name, dir_fd=dir_fd)
        return
    except IsADirectoryError:
        pass
    except PermissionError:
        if not stat.S_ISDIR(sc.lstat_at(name, dir_fd).st_mode):
            raise
    sc.chmod(name, dir_fd, 0o700)
    below = sc.open_dir_no_xdev(name, dir_fd)
    try:
        empty(below)
    finally:
        os.close(below)
    sc.rmdir(name, dir_fd=dir_fd)

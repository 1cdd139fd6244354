"""Who uses an upper and a work directory right now.

A server holds flock(2) locks on both directories as long as it lives; the kernel drops them with
the last descriptor, so a crash leaves nothing behind. A mount of the kernel's overlay has no
process that could hold a lock: it is found in the list of mounts instead, as far as this mount
namespace shows it.

The kernel's overlay only warns about a second mount of one upper (fs/overlayfs/super.c,
ovl_report_in_use), because container engines do that; so do we, unless ``exclusive`` is asked.

Invariant: an ordinary holder has the lock shared, an exclusive one has it exclusive. So "somebody
is there" is "an exclusive lock cannot be had", and an exclusive holder keeps everybody out.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

from . import mountcalls
from .errors import InUseError, show
from .options import MountSpec, unescape


class Locks:
    """Locks held on the directories of one spec, and what is worth a warning."""

    __slots__ = ("fds", "warnings")

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.warnings: list[str] = []

    @property
    def in_use(self) -> bool:
        """Whether another mount works in these directories, so that nothing may be cleaned."""
        return bool(self.warnings)

    def close(self) -> None:
        """Give the locks back."""
        while self.fds:
            os.close(self.fds.pop())


def acquire(spec: MountSpec) -> Locks:
    """Lock upper and work of *spec* until close() or the end of this process.

    Raises InUseError when one of them is in use and either side asked for ``exclusive``; OSError
    when a directory cannot be opened. Nothing stays locked after an error.
    """
    locks = Locks()
    try:
        for role, path in _writable(spec):
            _lock(locks, role, path, exclusive=spec.exclusive)
        for role, path, target in _kernel_users(spec):
            sentence = (
                f"{role} directory {show(path)} is in use by the overlay mount {show(target)}"
            )
            if spec.exclusive:
                raise InUseError(f"{sentence}: unmount it first")
            locks.warnings.append(f"{sentence}: changes made there may not be seen here")
    except BaseException:
        locks.close()
        raise
    return locks


def check(spec: MountSpec) -> list[str]:
    """Like acquire(), for a mount without a process of its own: keeps nothing, gives warnings."""
    locks = acquire(spec)
    locks.close()
    return locks.warnings


def _writable(spec: MountSpec) -> Iterator[tuple[str, bytes]]:
    if spec.upper is not None:
        yield "upper", spec.upper
        if spec.work is not None:
            yield "work", spec.work


def _lock(locks: Locks, role: str, path: bytes, *, exclusive: bool) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    locks.fds.append(fd)
    if _try(fd, fcntl.LOCK_EX):
        if not exclusive:
            # The change is not atomic; who slips in between is met below like any other.
            exclusively_held = not _try(fd, fcntl.LOCK_SH)
            if exclusively_held:
                raise _taken(role, path)
        return
    if exclusive:
        raise InUseError(
            f"{role} directory {show(path)} is in use by another mount: "
            "unmount that one first, or leave out exclusive"
        )
    if not _try(fd, fcntl.LOCK_SH):
        raise _taken(role, path)
    locks.warnings.append(
        f"{role} directory {show(path)} is in use by another mount: "
        "changes made there may not be seen here"
    )


def _taken(role: str, path: bytes) -> InUseError:
    return InUseError(
        f"{role} directory {show(path)} is in use by a mount with the option exclusive: "
        "unmount that one first"
    )


def _try(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno == errno.EWOULDBLOCK:
            return False
        if exc.errno in (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EBADF):
            # Some network file systems have no locks on directories: nobody else has one either.
            return True
        raise
    return True


def _kernel_users(spec: MountSpec) -> Iterator[tuple[str, bytes, bytes]]:
    """(role, path, target) of overlay mounts that write to a directory of *spec*."""
    mine = [(role, path, _identity(path)) for role, path in _writable(spec)]
    if not mine:
        return
    for entry in mountcalls.read_mountinfo():
        if entry.fstype != b"overlay":
            continue
        theirs = {
            identity
            for name in (b"upperdir", b"workdir")
            for identity in _identities(mountcalls.super_option(entry, name))
        }
        for role, path, identity in mine:
            if identity in theirs:
                yield role, path, entry.target


def _identities(text: bytes | None) -> Iterator[tuple[int, int]]:
    # The kernel shows what it was given, which mount(2) wants escaped and fsconfig(2) does not.
    for path in {text, unescape(text)} if text else ():
        if path.startswith(b"/"):  # a relative one counts from a directory that nobody knows
            try:
                yield _identity(path)
            except OSError:
                continue


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino

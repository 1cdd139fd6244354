"""What the two ways to mount have in common: their shape, their result, the mount point.

Both take a MountSpec and a directory, and return when the mount answers.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from . import mountcalls
from .errors import TargetError, show
from .mountcalls import MountEntry
from .options import Backend, MountSpec
from .transports import Transport

#: File system types of our own FUSE mounts, as mountinfo shows them.
FUSE_TYPE = b"fuse.unionfs2"
OVERLAY_TYPE = b"overlay"


class Mounted(NamedTuple):
    """A mount that exists, and what its mounter wants to be known about it."""

    backend: Backend
    target: bytes  # absolute, without symbolic links
    pid: int | None = None  # of the server, for FUSE
    warnings: tuple[str, ...] = ()
    transport: Transport | None = None  # the one that serves, as the server told


class Mounter(Protocol):
    """One way to mount."""

    name: Backend

    def probe(self, spec: MountSpec) -> str | None:
        """Why *spec* cannot be mounted this way on this machine; None when it may be tried."""

    def mount(self, spec: MountSpec, target: bytes) -> Mounted:
        """Mount *spec* on *target* and return when it answers. Raises UnionFSError or OSError."""

    def unmount(self, target: bytes, *, lazy: bool = False) -> None:
        """Take the mount at *target* away. Raises TargetError, BusyError or MountError."""


def resolve_target(target: bytes) -> bytes:
    """*target* as an absolute path without links, as the kernel's list of mounts names it."""
    return os.path.realpath(target)


def open_target(target: bytes) -> int:
    """O_PATH descriptor of the mount point *target*. Raises TargetError in words."""
    what = f"mount point {show(target)}"
    existing = mountcalls.find_mount(target)
    if existing is not None and is_ours(existing):
        raise TargetError(
            f"{what} is busy, a unionfs2 mount is there already: unmount it first",
            errno=errno.EBUSY,
        )
    try:
        fd = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        os.fstat(fd)
    except FileNotFoundError as exc:
        raise TargetError(f"{what} does not exist: create the directory", errno=exc.errno) from exc
    except NotADirectoryError as exc:
        raise TargetError(f"{what} is not a directory: give a directory", errno=exc.errno) from exc
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:
            raise TargetError(
                f"{what} holds a FUSE mount whose server has ended: unmount it first",
                errno=errno.EBUSY,
            ) from exc
        raise TargetError(
            f"{what} cannot be used: {os.strerror(exc.errno or 0)}", errno=exc.errno
        ) from exc
    return fd


def is_ours(entry: MountEntry) -> bool:
    """Whether *entry* was made by this package: by its type, or by its source for overlay."""
    if entry.fstype == FUSE_TYPE:
        return True
    return entry.fstype == OVERLAY_TYPE and entry.source == MountSpec().source


def _bits(spec: MountSpec) -> Iterator[tuple[int, int]]:
    """The generic flags of *spec*: (MS_* bit of mount(2), MOUNT_ATTR_* bit of fsmount(2))."""
    for wanted, flag, attribute in (
        (spec.read_only, mountcalls.MS_RDONLY, mountcalls.MOUNT_ATTR_RDONLY),
        (spec.nosuid, mountcalls.MS_NOSUID, mountcalls.MOUNT_ATTR_NOSUID),
        (spec.nodev, mountcalls.MS_NODEV, mountcalls.MOUNT_ATTR_NODEV),
        (spec.noexec, mountcalls.MS_NOEXEC, mountcalls.MOUNT_ATTR_NOEXEC),
        (spec.nosymfollow, mountcalls.MS_NOSYMFOLLOW, mountcalls.MOUNT_ATTR_NOSYMFOLLOW),
        (spec.nodiratime, mountcalls.MS_NODIRATIME, mountcalls.MOUNT_ATTR_NODIRATIME),
        (spec.atime == "relatime", mountcalls.MS_RELATIME, 0),
        (spec.atime == "noatime", mountcalls.MS_NOATIME, mountcalls.MOUNT_ATTR_NOATIME),
        (spec.atime == "strictatime", mountcalls.MS_STRICTATIME, mountcalls.MOUNT_ATTR_STRICTATIME),
        # Of the file system, not of the mount: fsconfig(2) sets these.
        (spec.sync, mountcalls.MS_SYNCHRONOUS, 0),
        (spec.dirsync, mountcalls.MS_DIRSYNC, 0),
    ):
        if wanted:
            yield flag, attribute


def mount_attributes(spec: MountSpec) -> int:
    """The generic flags of *spec* as MOUNT_ATTR_* bits (fsmount(2))."""
    return sum(attribute for _, attribute in _bits(spec))


def mount_flags(spec: MountSpec) -> int:
    """The generic flags of *spec* as MS_* bits (mount(2))."""
    return sum(flag for flag, _ in _bits(spec))

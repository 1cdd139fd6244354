"""What is on its way out: removed layers, and layers whose makers died.

Deleting takes as long as it takes, so it happens without any lock of the store. Several processes
may delete one entry; whoever holds the lock on its diff directory does, the others go on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from . import mountcalls, ondisk
from .storefiles import names_in, open_dir
from .storehome import Home
from .storelock import StoreLock, try_lock
from .storestaging import is_abandoned, move_to_trash, staging_path
from .storetrees import Undeleted, delete_tree


def empty_trash(home: Home) -> list[Undeleted]:
    """Delete everything in the trash; returns what could not be deleted."""
    return [left for name in names_in(home.trash_fd) for left in delete_trash(home, name)]


def delete_trash(home: Home, name: bytes) -> list[Undeleted]:
    """Delete one entry of the trash, unless somebody else is at it."""
    with _guard(home, name) as free:
        return delete_tree(home.trash_fd, name) if free else []


def is_forgotten(home: Home, name: bytes) -> bool:
    """Whether nobody is deleting an entry of the trash."""
    with _guard(home, name) as free:
        return free


@contextlib.contextmanager
def _guard(home: Home, name: bytes) -> Iterator[bool]:
    """Whether nobody else deletes the entry, and for the length of the block nobody will."""
    try:
        guard = open_dir(home.trash_fd, name)
    except OSError:
        yield True
        return
    try:
        with contextlib.suppress(OSError):
            # Not the layer's own lock: who waits for that must learn at once that it is gone.
            layer_fd, guard = guard, open_dir(guard, ondisk.DIFF_NAME)
            os.close(layer_fd)
        yield try_lock(guard)
    finally:
        os.close(guard)


def clear_staging(home: Home, lock: StoreLock) -> int:
    """Throw away abandoned layers in the making; how many there were.

    What their makers mounted in them, to probe what works, is unmounted; where that is not
    allowed, the layer stays.
    """
    if not names_in(home.staging_fd):
        return 0
    with lock.exclusive():
        trashed = [
            move_to_trash(home, home.staging_fd, name)
            for name in names_in(home.staging_fd)
            if is_abandoned(home, name) and _is_bare(staging_path(home, name))
        ]
    for name in trashed:
        if name is not None:
            delete_trash(home, name)
    return len(trashed)


def _is_bare(path: bytes) -> bool:
    """Whether nothing is mounted in *path*, or no longer is."""
    for entry in reversed(mountcalls.mounts_below(path)):
        with contextlib.suppress(OSError):
            mountcalls.umount(entry.target, mountcalls.MNT_DETACH | mountcalls.UMOUNT_NOFOLLOW)
    return not mountcalls.mounts_below(path)

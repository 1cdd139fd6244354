"""Layers in the making: ``.unionfs2/staging/<random>``, locked by whoever makes them.

A staged layer is a complete layer directory under a name that nobody looks up. It becomes visible
by one rename, after everything in it is durable. Its maker holds a lock on it all the while, so
an unlocked one is garbage; and because the lock moves with the directory, a new layer is born
locked by its maker.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from typing import Final

from . import ondisk
from . import syscalls as sc
from .storefiles import (
    make_dir,
    open_dir,
    random_name,
    sync_all,
    write_file,
)
from .storehome import Home
from .storelayout import format_link, format_lower
from .storelock import try_lock
from .storerecord import Record, format_record

_PRIVATE: Final = (ondisk.TRUSTED_PREFIX, ondisk.USER_PREFIX)


class Staging:
    """A layer in the making; close() throws it away unless it was installed.

    ``fd`` and ``path`` are its diff directory, to be filled; ``base_fd`` is the layer directory
    itself, where ``tar-split`` belongs; ``name`` its name in the staging directory.
    """

    def __init__(self, home: Home, name: bytes, base_fd: int) -> None:
        self._home = home
        self.name = name
        self.base_fd = base_fd
        self.installed = False
        self.fd = -1
        #: As seal() has written it.
        self.record = Record()
        self.path = os.path.join(staging_path(home, name), ondisk.DIFF_NAME)

    @classmethod
    def make(cls, home: Home) -> Staging:
        """A new one with an empty diff. needs: store lock, shared; prune looks at all others."""
        name = random_name()
        make_dir(home.staging_fd, name, ondisk.PRIVATE_MODE)
        staging = cls(home, name, open_dir(home.staging_fd, name))
        try:
            if not try_lock(staging.base_fd):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), name)
            make_dir(staging.base_fd, ondisk.DIFF_NAME, ondisk.DIFF_MODE, home.owner)
            staging.fd = open_dir(staging.base_fd, ondisk.DIFF_NAME)
        except BaseException:
            staging.close()
            raise
        return staging

    def close(self) -> bytes | None:
        """Give up the lock; moves what was not installed to the trash and returns its name."""
        try:
            if self.base_fd >= 0 and not self.installed:
                return move_to_trash(self._home, self._home.staging_fd, self.name)
            return None
        finally:
            for fd in (self.fd, self.base_fd):
                if fd >= 0:
                    os.close(fd)
            self.fd = self.base_fd = -1

    def inherit(self, parent_diff_fd: int) -> None:
        """Give the diff root mode, owner and attributes of the parent's, marks left out."""
        st, mine = os.fstat(parent_diff_fd), os.fstat(self.fd)
        if (st.st_uid, st.st_gid) != (mine.st_uid, mine.st_gid):
            sc.fchown(self.fd, st.st_uid, st.st_gid)
        for key in map(os.fsencode, os.listxattr(parent_diff_fd)):
            if not key.startswith(_PRIVATE):
                _copy_attribute(parent_diff_fd, self.fd, key)
        # Last: owner and ACLs change mode bits.
        sc.fchmod(self.fd, stat.S_IMODE(st.st_mode))

    def seal(
        self, link: str, lower: tuple[str, ...], record: Record, *, committed: bool, filled: bool
    ) -> None:
        """Write the files of the layer and make all of it durable.

        *filled*: the diff has content of unknown size; the whole file system is synced then, which
        is one commit instead of one per file.
        """
        self.record = dataclasses.replace(
            record, link=link, parent_link=lower[0] if lower else None
        )
        texts = {
            ondisk.LINK_NAME: format_link(link),
            ondisk.RECORD_NAME: format_record(self.record),
        }
        if lower:
            texts[ondisk.LOWER_NAME] = format_lower(lower)
        if committed:
            texts[ondisk.COMMITTED_NAME] = b""
        files = self._write_files(texts)
        try:
            self._make_rest(with_work=bool(lower))
        finally:
            # Also closes them; and the first sync is the one that costs.
            sync_all(files)
        if filled:
            sc.syncfs(self.base_fd)
        else:
            sc.fsync(self.fd)
            sc.fsync(self.base_fd)

    def _make_rest(self, *, with_work: bool) -> None:
        owner = self._home.owner
        for name in (ondisk.WORK_NAME, ondisk.MERGED_NAME) if with_work else ():
            make_dir(self.base_fd, name, ondisk.PRIVATE_MODE, owner)
        if owner is not None:
            sc.fchown(self.base_fd, owner.uid, owner.gid)
        sc.fchmod(self.base_fd, ondisk.LAYER_MODE)

    def _write_files(self, texts: dict[bytes, bytes]) -> list[int]:
        files: list[int] = []
        try:
            for name, text in texts.items():
                files.append(write_file(self.base_fd, name, text, owner=self._home.owner))
        except BaseException:
            for fd in files:
                os.close(fd)
            raise
        return files

    def relink(self, link: str) -> None:
        """Another short name, after a clash."""
        self.record = dataclasses.replace(self.record, link=link)
        texts = {
            ondisk.LINK_NAME: format_link(link),
            ondisk.RECORD_NAME: format_record(self.record),
        }
        for name in texts:
            sc.unlink(name, dir_fd=self.base_fd)
        sync_all(self._write_files(texts))
        sc.fsync(self.base_fd)


def staging_path(home: Home, name: bytes) -> bytes:
    """Path of the staged layer *name*."""
    return os.path.join(home.path, ondisk.STORE_NAME, ondisk.STAGING_NAME, name)


def _copy_attribute(source_fd: int, target_fd: int, key: bytes) -> None:
    value = os.getxattr(source_fd, key)
    try:
        sc.setxattr(target_fd, key, value)
    except OSError as exc:
        # Labels of security modules are not for everybody to set, and new files get their own.
        if not key.startswith(ondisk.SECURITY_PREFIX) or exc.errno not in {
            errno.EPERM,
            errno.EOPNOTSUPP,
        }:
            raise


def move_in(home: Home, dir_fd: int, name: bytes, target: bytes) -> None:
    """Give the directory *name* its place in HOME; EEXIST when there is something."""
    try:
        sc.rename(name, dir_fd, target, home.fd, sc.RENAME_NOREPLACE)
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
        # A file system without the flag. The store lock keeps others like us away.
        if sc.lstat_or_none(target, home.fd) is not None:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), target) from exc
        sc.rename(name, dir_fd, target, home.fd)


def move_to_trash(home: Home, dir_fd: int, name: bytes) -> bytes | None:
    """Put *name* where it will be deleted; its name there, None when it was gone already."""
    trashed = random_name()
    try:
        sc.rename(name, dir_fd, trashed, home.trash_fd)
    except FileNotFoundError:
        return None
    return trashed


def is_abandoned(home: Home, name: bytes) -> bool:
    """Whether nobody works on the staged layer *name* any more. needs: store lock, exclusive."""
    try:
        fd = open_dir(home.staging_fd, name)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # no directory, so nobody's
    try:
        return try_lock(fd)
    finally:
        os.close(fd)

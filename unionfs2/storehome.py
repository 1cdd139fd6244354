"""The directories of a store: found or made, opened once, never changed when they existed.

``HOME/.unionfs2`` holds what only this project writes, closed to everybody else. A HOME without
it was written by Docker and gets it, unless it cannot be written: then the store is opened for
reading, without locks and without repair.
"""

from __future__ import annotations

import errno
import json
import os
from typing import Final

from . import ondisk
from . import syscalls as sc
from .errors import StoreError, sentence, show
from .storefiles import Owner, make_dir, names_in, open_dir, read_file, write_file_atomic
from .storelayout import WAY_OUT

#: Directories below .unionfs2, all of them private.
STATE_NAMES: Final = (
    ondisk.STAGING_NAME,
    ondisk.TRASH_NAME,
    ondisk.QUARANTINE_NAME,
    ondisk.REFERENCES_NAME,
    ondisk.IMAGES_NAME,
    ondisk.EMPTY_NAME,
)
_READ_ONLY: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_FORMAT_BYTES_MAX: Final = 1 << 16


class Home:
    """Open descriptors of one store; -1 where a directory is missing and cannot be made."""

    def __init__(self, path: bytes, owner: Owner | None, *, create: bool) -> None:
        """Open, and with *create* make what is missing. Raises StoreError, OSError."""
        self.owner = owner
        self.fd = self.state_fd = self.links_fd = self.staging_fd = self.trash_fd = -1
        #: Why ``l`` cannot be used, None when it can.
        self.links_reason: str | None = None
        #: Whether ``l`` was missing and is empty now, so that all links have to be made.
        self.links_made = False
        self.path = os.path.realpath(path)
        try:
            self._open(create=create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all descriptors; a second call does nothing."""
        for name in ("fd", "state_fd", "links_fd", "staging_fd", "trash_fd"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

    def _open(self, *, create: bool) -> None:
        if create:
            self._make_home()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            self.fd = sc.open_at(self.path, flags)
        except FileNotFoundError as exc:
            raise StoreError(
                f"there is no layer store at {show(self.path)}: name another directory, or make"
                " one with unionfs2 layer create",
                errno=errno.ENOENT,
            ) from exc
        except NotADirectoryError as exc:
            raise StoreError(
                f"{show(self.path)} is not a directory: name that of a layer store",
                errno=errno.ENOTDIR,
            ) from exc
        made = self._open_state()
        self.open_links()
        if made:
            sc.fsync(self.fd)

    def _make_home(self) -> None:
        missing = []
        path = self.path
        while not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            try:
                # Parents as mkdir -p makes them; the store itself is closed to others.
                sc.mkdir(path, 0o755)
            except FileExistsError:
                continue  # somebody else opens the same new store
            if path == self.path:
                if self.owner is not None:
                    sc.chown(path, self.owner.uid, self.owner.gid, follow_symlinks=False)
                sc.chmod(path, sc.AT_FDCWD, ondisk.HOME_MODE)

    # --- private state ---

    def _open_state(self) -> bool:
        try:
            made = _ensure(self.fd, ondisk.STORE_NAME, ondisk.PRIVATE_MODE, None)
        except OSError as exc:
            if exc.errno in _READ_ONLY:
                return False
            raise
        self.state_fd = self._open_own(self.fd, ondisk.STORE_NAME)
        self._check_format()
        try:
            for name in STATE_NAMES:
                made |= _ensure(self.state_fd, name, ondisk.PRIVATE_MODE, None)
        except OSError as exc:
            if exc.errno not in _READ_ONLY:
                raise
        self.staging_fd = self._open_own(self.state_fd, ondisk.STAGING_NAME)
        self.trash_fd = self._open_own(self.state_fd, ondisk.TRASH_NAME)
        return made

    def _open_own(self, dir_fd: int, name: bytes) -> int:
        try:
            return open_dir(dir_fd, name)
        except (NotADirectoryError, FileNotFoundError) as exc:
            raise StoreError(
                f"{show(name)} in the store {show(self.path)} is not a directory:"
                " move it away, it will be made anew"
            ) from exc

    def _check_format(self) -> None:
        """Refuse a store of a newer format; write the format of a new one."""
        name = f"{show(self.path)}/{ondisk.STORE_NAME.decode()}/{ondisk.STORE_FORMAT_NAME.decode()}"
        try:
            text = read_file(self.state_fd, ondisk.STORE_FORMAT_NAME, _FORMAT_BYTES_MAX)
        except FileNotFoundError:
            self._write_format()
            return
        except OSError as exc:
            raise StoreError(f"cannot read {name}: {sentence(exc)}", errno=exc.errno) from exc
        try:
            version = json.loads(text)["version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            version = None
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise StoreError(
                f"{name} does not say which format the store has: if all else is well, remove"
                " that file, it will be written anew"
            )
        if version > ondisk.STORE_FORMAT_VERSION:
            raise StoreError(
                f"the store {show(self.path)} has format {version} and this program reads up to"
                f" {ondisk.STORE_FORMAT_VERSION}: it was written by a newer unionfs2, use it"
            )

    def _write_format(self) -> None:
        text = json.dumps({"version": ondisk.STORE_FORMAT_VERSION}).encode() + b"\n"
        try:
            write_file_atomic(self.state_fd, ondisk.STORE_FORMAT_NAME, text, 0o600)
        except OSError as exc:
            if exc.errno not in _READ_ONLY:
                raise

    # --- links ---

    def open_links(self) -> None:
        """Open ``l``, make it when it is missing; anything but a directory is a reason."""
        try:
            self.links_made = _ensure(self.fd, ondisk.LINKS_NAME, ondisk.HOME_MODE, self.owner)
        except OSError as exc:
            if exc.errno not in _READ_ONLY:
                raise
        if self.links_fd >= 0:
            os.close(self.links_fd)
            self.links_fd = -1
        self.links_reason = None
        try:
            self.links_fd = open_dir(self.fd, ondisk.LINKS_NAME)
        except (NotADirectoryError, FileNotFoundError) as exc:
            what = "is missing" if isinstance(exc, FileNotFoundError) else "is not a directory"
            self.links_reason = f"the link directory {show(self.path)}/l {what}; {WAY_OUT}"

    def is_empty(self, name: bytes) -> bool:
        """Whether a directory of the private state has no entries."""
        try:
            fd = open_dir(self.state_fd, name)
        except OSError:
            return True
        try:
            return not names_in(fd)
        finally:
            os.close(fd)


def _ensure(dir_fd: int, name: bytes, mode: int, owner: Owner | None) -> bool:
    """Make directory *name* unless something has that name; whether it was made."""
    if sc.lstat_or_none(name, dir_fd) is not None:
        return False
    try:
        make_dir(dir_fd, name, mode, owner)
    except FileExistsError:
        return False
    return True

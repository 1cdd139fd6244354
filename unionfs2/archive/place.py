"""Where a member of an archive goes: its path, resolved inside the root directory and nowhere else.

A path is cleaned by its text first, as container engines do it: leading slashes and "." go, ".."
takes away the component before it and is refused where there is none. What is left is walked one
component at a time with descriptors; no component that is a mount point is entered. A symbolic
link on the way is followed as it would be inside a chroot of the root directory: an absolute target
begins at the root, ".." of the root is the root. The last component is never followed.

Invariant: a descriptor returned by parent() or directory() stays open until the next trim().
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final

from unionfs2 import ondisk, whiteout
from unionfs2 import syscalls as sc
from unionfs2.errors import ArchiveError, LimitError, show
from unionfs2.storemodel import Limits

_FDS_MAX: Final = 96
_ALIASES_MAX: Final = 4096
_LINKS_MAX: Final = 40  # symbolic links in one path, as the kernel counts
_ODD: Final = frozenset({b"", b".", b".."})
_MARK: Final = ondisk.WHITEOUT_PREFIX
_META: Final = ondisk.WHITEOUT_META_PREFIX

#: Called with the canonical path of a directory that had to be made for something below it, and
#: whether a deletion mark stood there.
Made = Callable[[bytes, bool], None]


def clean(path: bytes, limits: Limits, what: str = "member") -> list[bytes]:
    """Components of *path*; none for the root itself."""
    if len(path) > limits.path_bytes_max:
        raise LimitError(
            f'a path of {len(path)} bytes ("{show(path[:60])}...") is longer than the'
            f" {limits.path_bytes_max} allowed"
        )
    parts = path.split(b"/")
    if not _ODD.isdisjoint(parts):
        parts = _clean(parts, path, what)
    if len(parts) > limits.depth_max:
        raise LimitError(
            f'"{show(path[:60])}..." lies {len(parts)} directories deep, allowed are'
            f" {limits.depth_max}"
        )
    if b"\0" in path:
        raise ArchiveError(f'{what} "{show(path)}" has a zero byte in its name')
    return parts


def _clean(parts: list[bytes], path: bytes, what: str) -> list[bytes]:
    if not path:
        raise ArchiveError(f"a {what} of the archive has no name")
    kept: list[bytes] = []
    for part in parts:
        if part == b"..":
            if not kept:
                raise ArchiveError(f'{what} "{show(path)}" leads out of the layer')
            kept.pop()
        elif part and part != b".":
            kept.append(part)
    return kept


def is_metadata(parts: list[bytes]) -> bool:
    """Whether the member belongs to AUFS itself and is not unpacked."""
    return any(
        part.startswith(_META) and (part != ondisk.WHITEOUT_OPAQUE or at < len(parts) - 1)
        for at, part in enumerate(parts)
    )


def check_marks(parts: list[bytes], path: bytes) -> None:
    """A deletion mark is the last component or none, and deletes a proper name."""
    if any(part.startswith(_MARK) for part in parts[:-1]):
        raise ArchiveError(
            f'member "{show(path)}" lies below a deletion mark, which is no directory'
        )
    last = parts[-1]
    if last.startswith(_MARK) and last[len(_MARK) :] in _ODD:
        raise ArchiveError(f'member "{show(path)}" is a deletion mark of a name that cannot exist')


class Places:
    """Directories below *root_fd* by canonical path (without a slash at either end)."""

    def __init__(self, root_fd: int, limits: Limits, marks: set[bytes], made: Made) -> None:
        self._limits = limits
        self._marks = marks  # canonical paths of deletion marks, kept by the caller
        self._made = made
        self._root = sc.open_at(b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
        self._fds: dict[bytes, int] = {b"": self._root}
        self._aliases: dict[bytes, bytes] = {}

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def trim(self) -> None:
        """Close some descriptors if there are many. Between two members only."""
        if len(self._fds) > _FDS_MAX:
            for path in list(self._fds)[1 : _FDS_MAX // 2]:
                os.close(self._fds.pop(path))
        if len(self._aliases) > _ALIASES_MAX:
            self._aliases.clear()

    def forget(self, path: bytes) -> None:
        """What stood at *path* is gone: a directory, or a symbolic link that led somewhere."""
        below = path + b"/"
        for known in [p for p in self._fds if p == path or p.startswith(below)]:
            os.close(self._fds.pop(known))
        self._aliases.clear()

    def directory(self, path: bytes, *, make: bool = True) -> tuple[int, bytes]:
        """Descriptor and canonical path of the directory *path*, made where it is missing.

        Raises ENOENT when it is missing and *make* is false, ArchiveError when something else is
        in the way.
        """
        canonical = self._aliases.get(path, path)
        fd = self._fds.get(canonical)
        if fd is not None:
            return fd, canonical
        return self._walk(path, make=make)

    def _walk(self, path: bytes, *, make: bool) -> tuple[int, bytes]:
        # Beginning at the deepest directory that is open spares most of the way.
        start = path
        while start not in self._fds:
            start = start.rpartition(b"/")[0]
        todo = (path[len(start) + 1 :] if start else path).split(b"/")[::-1]
        here, links = start, 0
        fd, owned = self._fds[start], False
        try:
            while todo:
                name = todo.pop()
                if name in (b"", b"."):
                    continue
                if name == b"..":
                    here = here.rpartition(b"/")[0]
                    fd, owned = self._climb(here, fd, owned=owned)
                    continue
                target, child = self._step(fd, name, here, make=make)
                if target is not None:
                    links += 1
                    if links > _LINKS_MAX:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                    todo += target.split(b"/")[::-1]
                    self._check_depth(path, len(todo))
                    if target.startswith(b"/"):
                        here = b""
                        fd, owned = self._climb(here, fd, owned=owned)
                    continue
                if owned:
                    os.close(fd)
                here = here + b"/" + name if here else name
                fd, owned = child, True
                if len(self._fds) < _FDS_MAX:
                    fd, owned = self._keep(here, fd), False
                self._check_depth(path, here.count(b"/"))
            fd, owned = self._keep(here, fd) if owned else fd, False
        finally:
            if owned:
                os.close(fd)
        if here != path:
            self._aliases[path] = here
        return fd, here

    def _check_depth(self, path: bytes, depth: int) -> None:
        if depth > 2 * self._limits.depth_max:
            raise LimitError(f'"{show(path[:60])}" leads more than {self._limits.depth_max} deep')

    def _keep(self, path: bytes, fd: int) -> int:
        """Remember *fd* for *path*; the one that was known already wins."""
        known = self._fds.setdefault(path, fd)
        if known != fd:
            os.close(fd)
        return known

    def _climb(self, path: bytes, fd: int, *, owned: bool) -> tuple[int, bool]:
        """The directory *path*, reached by ".." or by an absolute link."""
        if owned:
            os.close(fd)
        known = self._fds.get(path)
        if known is not None:
            return known, False
        # Canonical and known to exist, so this is not followed anywhere.
        found, _ = self._walk(path, make=False)
        return found, False

    def _step(
        self, dir_fd: int, name: bytes, here: bytes, *, make: bool
    ) -> tuple[bytes | None, int]:
        """(None, descriptor of a directory) or (target of a symbolic link, -1)."""
        path = here + b"/" + name if here else name
        marked = False
        try:
            return None, sc.open_dir_no_xdev(name, dir_fd)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            if exc.errno != errno.ENOENT:
                st = sc.lstat_at(name, dir_fd)
                if stat.S_ISLNK(st.st_mode):
                    return os.fsencode(os.readlink(name, dir_fd=dir_fd)), -1
                marked = path in self._marks or whiteout.is_device(st)
                if not marked:
                    raise ArchiveError(
                        f'something lies below "{show(path)}", which is no directory'
                    ) from exc
            if not make:
                raise
        if marked:
            sc.unlink(name, dir_fd=dir_fd)
        sc.mkdir(name, 0o700, dir_fd=dir_fd)
        self._made(path, marked)
        return None, sc.open_dir_no_xdev(name, dir_fd)

"""How an object is described so that two mounts can be compared.

Inode numbers are told only for objects of the lower layers, which both sides share; every other
number becomes 0 here and an equality class in a whole view. Times that a script or a layer set are
exact, all others are "now".
"""

from __future__ import annotations

import os
import stat
from hashlib import blake2b
from typing import NamedTuple

from tests.differential import rawcalls
from tests.differential.script import NOW_BEGIN, NOW_END

Moment = int | str

#: A shell on the machine may have device numbers that a comparison must not see for others.
_DEVICES = (stat.S_IFCHR, stat.S_IFBLK)


class Look(NamedTuple):
    """stat(2) of one object, as far as section 17 of the format compares it."""

    kind: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime: Moment
    atime: Moment
    lower_ino: int


def moment(ns: int) -> Moment:
    """Exact when a script set it, else "now"."""
    return "now" if NOW_BEGIN < ns < NOW_END else ns


def look(st: os.stat_result, lower_inos: frozenset[int]) -> Look:
    """What of *st* is compared. Access times of directories depend on who listed them."""
    kind = stat.S_IFMT(st.st_mode)
    return Look(
        kind,
        st.st_mode & 0o7777,
        st.st_nlink,
        st.st_uid,
        st.st_gid,
        st.st_rdev if kind in _DEVICES else 0,
        st.st_size,
        moment(st.st_mtime_ns),
        0 if kind == stat.S_IFDIR else moment(st.st_atime_ns),
        st.st_ino if st.st_ino in lower_inos else 0,
    )


def digest(data: bytes) -> bytes:
    """Short data as it is, long data as length and hash."""
    if len(data) <= 48:
        return data
    return b"%d bytes, %s" % (len(data), blake2b(data, digest_size=12).hexdigest().encode())


def read_all(fd: int) -> bytes:
    """Everything from the start of *fd*."""
    parts = []
    offset = 0
    while part := os.pread(fd, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


Listed = tuple[bytes, int, str]


def listing(fd: int) -> list[Listed]:
    """Names of open directory *fd*: kind byte, and whether d_ino is what lstat(2) says.

    A name that is listed twice appears twice. Order is not told.
    """
    return sorted(
        (entry.name, entry.kind, _same_ino(fd, entry)) for entry in rawcalls.getdents_all(fd)
    )


def _same_ino(fd: int, entry: rawcalls.DirEntry) -> str:
    if entry.name == b"..":
        return ""  # above the root it leaves the mount
    try:
        st = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
    except OSError as exc:
        return f"errno {exc.errno}"
    return "same" if st.st_ino == entry.ino else "other"


class Seen(NamedTuple):
    """One path of a merged view. *content*: digest of data, target of a link, listing, errno."""

    look: Look
    content: object
    xattrs: tuple[tuple[bytes, object], ...]
    first_name: bytes


View = dict[bytes, Seen]


class _Walk:
    """Reads a whole mount by directory descriptors, so that no path is too long."""

    def __init__(self, lower_inos: frozenset[int]) -> None:
        self.lower_inos = lower_inos
        self.view: View = {}
        self.first: dict[int, bytes] = {}

    def directory(self, fd: int, path: bytes) -> None:
        st = os.fstat(fd)
        names = listing(fd)
        self.note(path, st, tuple(names), b"/proc/self/fd/%d/." % fd)
        for name in sorted({name for name, _kind, _same in names} - {b".", b".."}):
            self.entry(fd, name, path + b"/" + name if path else name)

    def entry(self, dir_fd: int, name: bytes, path: bytes) -> None:
        try:
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except OSError as exc:
            self.view[path] = Seen(Look(*([0] * 10)), ("errno", exc.errno), (), b"")
            return
        if stat.S_ISDIR(st.st_mode):
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
            try:
                self.directory(fd, path)
            finally:
                os.close(fd)
            return
        self.note(path, st, self.content(dir_fd, name, st), b"/proc/self/fd/%d/%b" % (dir_fd, name))

    def content(self, dir_fd: int, name: bytes, st: os.stat_result) -> object:
        if stat.S_ISLNK(st.st_mode):
            return os.readlink(name, dir_fd=dir_fd)
        if not stat.S_ISREG(st.st_mode):
            return None
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=dir_fd)
            try:
                return digest(read_all(fd))
            finally:
                os.close(fd)
        except OSError as exc:
            return ("errno", exc.errno)

    def note(self, path: bytes, st: os.stat_result, content: object, where: bytes) -> None:
        first = b""
        if not stat.S_ISDIR(st.st_mode):
            first = self.first.setdefault(st.st_ino, path)
        self.view[path] = Seen(look(st, self.lower_inos), content, xattrs(where), first)


def xattrs(where: bytes) -> tuple[tuple[bytes, object], ...]:
    """All extended attributes of a path that is not followed, sorted; errno for a value."""
    try:
        names = os.listxattr(where, follow_symlinks=False)
    except OSError as exc:
        return ((b"listxattr", ("errno", exc.errno)),)
    found: list[tuple[bytes, object]] = []
    for name in sorted(os.fsencode(name) for name in names):
        try:
            found.append((name, digest(os.getxattr(where, name, follow_symlinks=False))))
        except OSError as exc:
            found.append((name, ("errno", exc.errno)))
    return tuple(found)


def view(root_fd: int, lower_inos: frozenset[int]) -> View:
    """The whole merged view below *root_fd*, the root itself under the empty path."""
    walk = _Walk(lower_inos)
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=root_fd)
    try:
        walk.directory(fd, b"")
    finally:
        os.close(fd)
    return walk.view

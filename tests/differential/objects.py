"""Building layers from literals, and proving afterwards that nothing changed them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

from tests.differential.script import Layer, Object

_WHITEOUT_DEVICE = os.makedev(0, 0)


def build(root: bytes, layer: Layer) -> None:
    """Create the objects of *layer* below the directory *root* (made when missing).

    Parents that are not listed are made with plain modes, so that a shrunk layer still builds.
    An object whose place was taken by the shrinking (a parent that became a file) is left out.
    """
    _directory(root)
    built = [item for item in layer if _create(root, item)]
    for item in built:
        _finish(os.path.join(root, item.path), item)
    for item in reversed(built):
        where = os.path.join(root, item.path)
        os.utime(where, ns=(item.atime, item.mtime), follow_symlinks=False)


def _directory(path: bytes) -> None:
    if not os.path.isdir(path):
        os.mkdir(path, 0o755)
        os.chmod(path, 0o755)


def _create(root: bytes, item: Object) -> bool:
    where = os.path.join(root, item.path)
    parts = item.path.split(b"/")
    try:
        for depth in range(1, len(parts)):
            _directory(os.path.join(root, *parts[:depth]))
        _make(root, where, item)
    except (FileExistsError, NotADirectoryError):
        return False
    except FileNotFoundError:
        if item.kind == "link":
            return False
        raise
    return True


def _make(root: bytes, where: bytes, item: Object) -> None:
    kind, content = item.kind, item.content
    if kind == "dir":
        if item.path:
            os.mkdir(where)
    elif kind == "file":
        _write(where, [(0, content or b"")], None)
    elif kind == "sparse":
        _write(where, content[1], content[0])
    elif kind == "symlink":
        os.symlink(content, where)
    elif kind == "link":
        os.link(os.path.join(root, content), where, follow_symlinks=False)
    else:
        os.mknod(where, _node_type(kind) | 0o600, _device(item))


def _node_type(kind: str) -> int:
    types = {
        "fifo": stat.S_IFIFO,
        "sock": stat.S_IFSOCK,
        "chr": stat.S_IFCHR,
        "blk": stat.S_IFBLK,
        "whiteout": stat.S_IFCHR,
    }
    return types[kind]


def _device(item: Object) -> int:
    if item.kind in {"chr", "blk"}:
        return os.makedev(*item.content)
    return _WHITEOUT_DEVICE if item.kind == "whiteout" else 0


def _write(where: bytes, pieces: Iterable[tuple[int, bytes]], size: int | None) -> None:
    fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for offset, data in pieces:
            os.pwrite(fd, data, offset)
        if size is not None:
            os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _finish(where: bytes, item: Object) -> None:
    if item.kind == "link":
        return
    os.chown(where, item.uid, item.gid, follow_symlinks=False)
    if item.kind != "symlink":
        os.chmod(where, item.mode)
    for key, value in item.xattrs:
        os.setxattr(where, key, value, follow_symlinks=False)
    if any(key.startswith(b"system.posix_acl") for key, _ in item.xattrs):
        return  # the ACL is the mode now
    if item.mode & 0o6000 and item.kind != "symlink":
        os.chmod(where, item.mode)


class Print(NamedTuple):
    """All that stat and xattrs tell of one object, inode number and ctime included."""

    st: tuple[int, ...]
    xattrs: tuple[tuple[str, bytes], ...]


def fingerprint(root: bytes) -> dict[bytes, Print]:
    """State of a tree to the nanosecond, read without leaving a trace (O_NOATIME).

    ctime is part of it, so data needs no reading: nothing can change it without a new ctime.
    """
    found: dict[bytes, Print] = {}
    _fingerprint(root, b"", found)
    return found


def _fingerprint(root: bytes, path: bytes, found: dict[bytes, Print]) -> None:
    where = os.path.join(root, path) if path else root
    st = os.stat(where, follow_symlinks=False)
    found[path] = Print(
        (
            st.st_ino,
            st.st_mode,
            st.st_nlink,
            st.st_uid,
            st.st_gid,
            st.st_rdev,
            st.st_size,
            st.st_atime_ns,
            st.st_mtime_ns,
            st.st_ctime_ns,
        ),
        tuple(
            (key, os.getxattr(where, key, follow_symlinks=False))
            for key in sorted(os.listxattr(where, follow_symlinks=False))
        ),
    )
    if stat.S_ISDIR(st.st_mode):
        for name in names_quietly(where):
            _fingerprint(root, path + b"/" + name if path else name, found)


def names_quietly(where: bytes) -> list[bytes]:
    """Names in a directory without touching its access time."""
    fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME)
    try:
        return sorted(os.fsencode(name) for name in os.listdir(fd))
    finally:
        os.close(fd)

"""The core by path: short commands on a UnionFS, and its whole view as a value.

``Shell(fs)`` walks to the parent and calls the core once, as one request of a door would; nothing
is cached between two commands but what the core caches. ``view(fs)`` reads everything that can be
seen, through the core alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace

from unionfs2.handles import FileHandle
from unionfs2.model import Caller, SetAttr
from unionfs2.nodes import Dir, Node
from unionfs2.union import UnionFS

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
_READ_BYTES = 1 << 20


def me(umask: int = 0o022) -> Caller:
    """This process as the caller."""
    return Caller(os.geteuid(), os.getegid(), os.getpid(), umask)


class Shell:
    """Commands on *fs*; paths are str or bytes, relative to the root of the union."""

    def __init__(self, fs: UnionFS, caller: Caller | None = None) -> None:
        self.fs = fs
        self.caller = caller or me()

    # --- finding -----------------------------------------------------------------------------

    def node(self, path: str | bytes) -> Node:
        """The node at *path*; ENOENT and ENOTDIR as a path walk gives them."""
        return self.fs.walk(os.fsencode(path))

    def dir(self, path: str | bytes) -> Dir:
        """The directory at *path*."""
        return self.fs.directory(self.node(path).id)

    def split(self, path: str | bytes) -> tuple[Dir, bytes]:
        """(parent, name) of *path*."""
        head, name = os.path.split(os.fsencode(path))
        return self.dir(head), name

    def exists(self, path: str | bytes) -> bool:
        """Whether a lookup of *path* in its parent finds something."""
        return self.fs.lookup(*self.split(path)) is not None

    def stat(self, path: str | bytes) -> os.stat_result:
        return self.fs.getattr(self.node(path))

    def ino(self, path: str | bytes) -> int:
        return self.node(path).ino

    def nlink(self, path: str | bytes) -> int:
        node = self.node(path)
        return self.fs.nlink_of(node, self.fs.getattr(node))

    def names(self, path: str | bytes = b"") -> list[bytes]:
        """Names of a listing, sorted; a name that comes twice comes twice here, too."""
        return sorted(entry.name for entry in self.fs.listing(self.dir(path)))

    def hold(self, path: str | bytes) -> Node:
        """The node at *path*, counted once, as the kernel does with what it was told of."""
        node = self.node(path)
        node.lookups += 1
        return node

    # --- data --------------------------------------------------------------------------------

    def open(self, path: str | bytes, flags: int = os.O_RDONLY) -> FileHandle:
        return self.fs.open_file(self.node(path), flags, self.caller)

    def read(self, path: str | bytes) -> bytes:
        handle = self.open(path)
        try:
            return _whole(self.fs, handle)
        finally:
            self.fs.release(handle)

    def write(self, path: str | bytes, data: bytes, *, flags: int = 0, offset: int = 0) -> None:
        """Open for writing (copy-up), write, release."""
        handle = self.open(path, os.O_WRONLY | flags)
        try:
            assert self.fs.write(handle, offset, data) == len(data)
        finally:
            self.fs.release(handle)

    def create(self, path: str | bytes, data: bytes = b"", mode: int = 0o644) -> None:
        parent, name = self.split(path)
        handle, _ = self.fs.create(parent, name, mode, os.O_WRONLY, self.caller)
        try:
            if data:
                self.fs.write(handle, 0, data)
        finally:
            self.fs.release(handle)

    # --- names -------------------------------------------------------------------------------

    def mkdir(self, path: str | bytes, mode: int = 0o755) -> None:
        self.fs.mkdir(*self.split(path), mode, self.caller)

    def mknod(self, path: str | bytes, mode: int, rdev: int = 0) -> None:
        self.fs.mknod(*self.split(path), mode, rdev, self.caller)

    def symlink(self, path: str | bytes, target: bytes) -> None:
        self.fs.symlink(*self.split(path), target, self.caller)

    def link(self, path: str | bytes, new: str | bytes) -> None:
        self.fs.link(self.node(path), *self.split(new))

    def unlink(self, path: str | bytes) -> None:
        self.fs.unlink(*self.split(path))

    def rmdir(self, path: str | bytes) -> None:
        self.fs.rmdir(*self.split(path))

    def rename(self, old: str | bytes, new: str | bytes, flags: int = 0) -> None:
        self.fs.rename(*self.split(old), *self.split(new), flags)

    # --- attributes --------------------------------------------------------------------------

    def setattr(self, path: str | bytes, new: SetAttr) -> None:
        self.fs.setattr(self.node(path), new)

    def chmod(self, path: str | bytes, mode: int) -> None:
        self.setattr(path, SetAttr(mode=mode))

    def truncate(self, path: str | bytes, size: int) -> None:
        self.setattr(path, SetAttr(size=size))

    def setxattr(self, path: str | bytes, key: bytes, value: bytes, flags: int = 0) -> None:
        self.fs.setxattr(self.node(path), key, value, flags, self.caller)

    def getxattr(self, path: str | bytes, key: bytes) -> bytes:
        return self.fs.getxattr(self.node(path), key)

    def removexattr(self, path: str | bytes, key: bytes) -> None:
        self.fs.removexattr(self.node(path), key)

    def xattrs(self, path: str | bytes) -> dict[bytes, bytes]:
        node = self.node(path)
        return {key: self.fs.getxattr(node, key) for key in self.fs.listxattr(node, self.caller)}


@dataclass(frozen=True)
class Seen:
    """What the core says of one object; *size* of a directory is None."""

    kind: int
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int | None
    mtime_ns: int
    nlink: int
    ino: int
    xattrs: tuple[tuple[bytes, bytes], ...]
    data: bytes | None = None
    target: bytes | None = None


View = dict[bytes, Seen]


def view(fs: UnionFS, *, hold: bool = False) -> View:
    """Everything that lookup finds, by path; the root is ``b""``.

    Asserts that a listing has no name twice, that kinds agree, and that what is listed can be
    looked up unless the core says otherwise. *hold* counts every node once, as if the kernel knew
    it.
    """
    return dict(_look(fs, fs.root, b"", hold=hold))


def _look(fs: UnionFS, node: Node, path: bytes, *, hold: bool) -> Iterator[tuple[bytes, Seen]]:
    yield path, _seen(fs, node)
    if not isinstance(node, Dir):
        return
    entries = fs.listing(node)
    assert len(entries) == len({entry.name for entry in entries}), path
    for entry in sorted(entries):
        found = fs.lookup(node, entry.name)
        if found is None:
            assert fs.listed_although_hidden(node, entry.name), (path, entry)
            continue
        child, st = found
        assert stat.S_IFMT(st.st_mode) == entry.kind == child.kind, (path, entry)
        child.lookups += 1  # reading closes a handle, which would end a node nobody counts on
        yield from _look(fs, child, path + b"/" + entry.name if path else entry.name, hold=hold)
        if not hold:
            fs.forget(child.id, 1)


def _seen(fs: UnionFS, node: Node) -> Seen:
    st = fs.getattr(node)
    seen = Seen(
        kind=node.kind,
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        rdev=st.st_rdev,
        size=None if node.is_dir else st.st_size,
        mtime_ns=st.st_mtime_ns,
        nlink=fs.nlink_of(node, st),
        ino=node.ino,
        xattrs=tuple(sorted((key, fs.getxattr(node, key)) for key in fs.listxattr(node))),
    )
    if node.is_regular:
        handle = fs.open_file(node, os.O_RDONLY | os.O_NOATIME)
        try:
            return replace(seen, data=_whole(fs, handle))
        finally:
            fs.release(handle)
    if node.kind == stat.S_IFLNK:
        return replace(seen, target=fs.readlink(node))
    return seen


def _whole(fs: UnionFS, handle: FileHandle) -> bytes:
    pieces = []
    offset = 0
    while piece := fs.read(handle, offset, _READ_BYTES):
        pieces.append(piece)
        offset += len(piece)
    return b"".join(pieces)

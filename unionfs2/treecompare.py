"""Comparison of two trees, step by step, in the order of the bytes of the paths.

Rules, whichever trees are compared. A name that only the new tree has is added, and so is
everything below it; one that only the old tree has is deleted, what was below it is not listed.
A name that both have is changed when type, mode, owner, device number, modification time, size
(not of directories), target, extended attributes or content differ, or when a name was added to
or deleted from the directory itself. A directory where there was a file counts what is below as
added. The root is never listed. Names of one file are looked at one by one.

Content is read only where everything else is equal and the two are not evidently one file: the
same inode number, and the same time of the last change of the inode (ctime), which no program can
set. In a union an object keeps its inode number when it is copied up, hence the second half. Two
changes within one tick of the file system's clock have the same ctime; a copy made in the very
tick in which the original came into being, and given its times and size, is not told apart.

The walk keeps one list of names per level of depth, and no object.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from .nodes import Dir
from .storemodel import Kind
from .treeview import MergedView, Seen, View, leave, same_places

_PIECE_BYTES = 1 << 18


class Pair(NamedTuple):
    """One directory of the new tree, and what had its place in the old one.

    *path* ends with a slash. *shortcut* says that the old directory is what the new one has below
    its first real directory, so only names of the first one can differ.
    """

    path: bytes
    new: Dir
    old: Dir | None
    shortcut: bool = False


class Step(NamedTuple):
    """What one path is in both trees; *kind* is None where nothing differs."""

    path: bytes
    kind: Kind | None
    new: Seen | None
    old: Seen | None
    child: Pair | None = None


class Comparison(ABC):
    """What to look at in a pair of directories; walk() does the rest."""

    @abstractmethod
    def names(self, pair: Pair) -> list[bytes]:
        """Every name that may differ, in the order of their bytes."""

    @abstractmethod
    def look(self, pair: Pair, name: bytes) -> Step:
        """Compare one name."""

    @abstractmethod
    def trim(self) -> None:
        """Close descriptors beyond the limit."""


class TwoTrees(Comparison):
    """Two views of any sort, compared name by name."""

    def __init__(self, new: View, old: View) -> None:
        self.new = new
        self.old = old

    def names(self, pair: Pair) -> list[bytes]:
        names = self.new.names(pair.new)
        if pair.old is None:
            return names
        before = self.old.names(pair.old)
        return names if names == before else sorted({*names, *before})

    def look(self, pair: Pair, name: bytes) -> Step:
        new = self.new.look(pair.new, name)
        old = None if pair.old is None else self.old.look(pair.old, name)
        child = None
        if new is not None and new.dir is not None:
            before = None if old is None else old.dir
            if before is not None and self._same_directory(new.dir, before):
                return Step(pair.path + name, None, new, old)
            child = Pair(pair.path + name + b"/", new.dir, before)
        return self.judge(pair.path + name, new, old, child)

    def _same_directory(self, new: Dir, old: Dir) -> bool:
        """Directories of plain trees are never known to be equal."""
        if not isinstance(self.new, MergedView) or not isinstance(self.old, MergedView):
            return False
        return same_places(new.lowers, old.lowers)

    def judge(self, path: bytes, new: Seen | None, old: Seen | None, child: Pair | None) -> Step:
        """The step for what was found on both sides."""
        kind: Kind | None = None
        if new is None:
            kind = None if old is None else Kind.DELETED
        elif old is None:
            kind = Kind.ADDED
        elif differ(new, old) or (
            child is not None and child.old is not None and self._names_changed(child)
        ):
            kind = Kind.CHANGED
        return Step(path, kind, new, old, child)

    def _names_changed(self, pair: Pair) -> bool:
        return any(self.came_or_went(pair, name) for name in self.names(pair))

    def came_or_went(self, pair: Pair, name: bytes) -> bool:
        """Whether one tree has *name* in this directory and the other has not."""
        assert pair.old is not None
        new = self.new.look(pair.new, name)
        return (new is None) != (self.old.look(pair.old, name) is None)

    def trim(self) -> None:
        self.new.trim()
        if self.old is not self.new:
            self.old.trim()


class _Frame:
    """One directory on the way: names to come, and subdirectories whose turn comes later."""

    __slots__ = ("names", "pair", "waiting")

    def __init__(self, pair: Pair, names: list[bytes]) -> None:
        self.pair = pair
        names.reverse()
        self.names = names
        # (name and slash, pair). Names between "a" and "a/" begin with "a", so the last one put
        # here is always the first whose turn it is.
        self.waiting: list[tuple[bytes, Pair]] = []

    def next_child(self) -> Pair | None:
        """The subdirectory whose content comes before the next name."""
        if self.waiting and (not self.names or self.waiting[-1][0] < self.names[-1]):
            return self.waiting.pop()[1]
        return None


def walk(comparison: Comparison, root: Pair) -> Iterator[Step]:
    """Every path that may differ, root excluded, in the order of the bytes of the paths."""
    frames = [_Frame(root, comparison.names(root))]
    while frames:
        comparison.trim()
        frame = frames[-1]
        child = frame.next_child()
        if child is not None:
            frames.append(_Frame(child, comparison.names(child)))
        elif frame.names:
            name = frame.names.pop()
            step = comparison.look(frame.pair, name)
            yield step
            if step.child is not None:
                frame.waiting.append((name + b"/", step.child))
        else:
            frames.pop()
            leave(frame.pair.new)
            if frame.pair.old is not None:
                leave(frame.pair.old)


# --- one object ----------------------------------------------------------------------------------


def differ(new: Seen, old: Seen) -> bool:
    """Whether anything of the object itself differs; what a directory holds is not looked at."""
    a, b = new.st, old.st
    if (a.st_mode, a.st_uid, a.st_gid, a.st_mtime_ns) != (
        b.st_mode,
        b.st_uid,
        b.st_gid,
        b.st_mtime_ns,
    ):
        return True
    kind = new.kind
    if kind != stat.S_IFDIR and a.st_size != b.st_size:
        return True
    if kind in (stat.S_IFCHR, stat.S_IFBLK) and a.st_rdev != b.st_rdev:
        return True
    if _is_one(new, old):
        return _hollow_differ(new, old)
    if kind == stat.S_IFLNK and new.readlink() != old.readlink():
        return True
    if new.xattrs() != old.xattrs():
        return True
    return kind == stat.S_IFREG and _contents_differ(new, old)


def _is_one(new: Seen, old: Seen) -> bool:
    """Whether both are evidently one object. Each mount of a union has a device of its own."""
    a, b = new.st, old.st
    if a.st_ino != b.st_ino or a.st_ctime_ns != b.st_ctime_ns:
        return False
    return a.st_dev == b.st_dev or new.view.dialect is None or old.view.dialect is None


def _hollow_differ(new: Seen, old: Seen) -> bool:
    """One file without data of its own, seen above two different stacks of layers."""
    dialect = new.view.dialect
    if dialect is None or new.view is old.view or new.kind != stat.S_IFREG:
        return False
    return dialect.metacopy in new.names_of_xattrs() and _contents_differ(new, old)


def _contents_differ(new: Seen, old: Seen) -> bool:
    if not new.st.st_size:
        return False
    one = new.open()
    try:
        other = old.open()
        try:
            return not _same_file(one, other) and not same_content(one, other)
        finally:
            os.close(other)
    finally:
        os.close(one)


def _same_file(one: int, other: int) -> bool:
    """Whether both descriptors are of one inode with one ctime; devices of unions vary."""
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_ino, a.st_ctime_ns) == (b.st_ino, b.st_ctime_ns)


def same_content(one: int, other: int) -> bool:
    """Compare two open files; what is a hole in both is not read."""
    offset = 0
    while True:
        offset = min(_next_data(one, offset), _next_data(other, offset))
        a = os.pread(one, _PIECE_BYTES, offset)
        b = os.pread(other, len(a) or _PIECE_BYTES, offset)
        while len(b) < len(a):
            more = os.pread(other, len(a) - len(b), offset + len(b))
            if not more:
                return False
            b += more
        if a != b:
            return False
        if not a:
            return True
        offset += len(a)


def _next_data(fd: int, offset: int) -> int:
    """Offset of the next byte that is stored, the end of the file where none is."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:
        return max(offset, os.fstat(fd).st_size)

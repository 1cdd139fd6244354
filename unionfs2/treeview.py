"""Directory trees to read: the merged view of layers without a mount, and plain trees.

``MergedView`` shows what a mount of the layers would show, through the lookup of the core
(walk.py), and needs no right beyond reading them. It follows redirect marks and attribute-only
files (metacopy) always, inside the layers: it is for comparing and exporting, so a layer that was
written with these features is shown whole. ``PlainView`` shows one directory tree as it is, a
mounted union for example, without giving a meaning to any mark.

Nothing is cached: an object is a ``Seen``, made anew by each look, and a directory lives as long
as whoever walks through it keeps it. Descriptors are bounded by the cache of the branches; call
``trim()`` between two steps. Depth has no limit.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from . import merge, opening, whiteout
from . import syscalls as sc
from .branch import Branch, FdCache, RealDir
from .closing import Closing
from .names import read_names
from .nodes import Dir
from .walk import Walk, find_data, first_of, oserror, positions_from
from .whiteout import Dialect

_S_IFMT = 0o170000
_S_IFDIR = stat.S_IFDIR
_FDS_OF_PLAIN_VIEW = 128


@dataclass(slots=True)
class Seen:
    """One object of a tree: its attributes, and where it really is.

    *parents* are the real directories in which its name was looked for, *position* tells which
    one had it; *dir* is the merged directory if it is one.
    """

    view: View
    st: os.stat_result
    name: bytes
    parents: tuple[RealDir, ...]
    position: int
    dir: Dir | None = None

    @property
    def kind(self) -> int:
        """S_IFMT part of the mode."""
        return self.st.st_mode & _S_IFMT

    @property
    def holder(self) -> RealDir:
        """The real directory that holds the object."""
        return self.parents[self.position]

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode number of the real object."""
        return self.st.st_dev, self.st.st_ino

    def readlink(self) -> bytes:
        """Target of a symbolic link."""
        return os.readlink(self.name, dir_fd=self.holder.at())

    def names_of_xattrs(self) -> list[bytes]:
        """Names of the attributes on disk."""
        return sc.listxattr_at(self.name, self.holder.at())

    def xattrs(self) -> dict[bytes, bytes]:
        """Attributes as the tree shows them, without private marks."""
        keys = self.names_of_xattrs()
        if not keys:
            return {}
        dialect = self.view.dialect
        found = {}
        for key in keys:
            shown = key if dialect is None else dialect.to_view(key)
            if shown is not None:
                found[shown] = sc.getxattr_at(self.name, self.holder.at(), key)
        return found

    def data_place(self) -> tuple[RealDir, bytes]:
        """(directory, name) of the real file that has the content of a regular file."""
        return self.view.data_place(self)

    def open(self) -> int:
        """A descriptor to read the content of a regular file from; leaves access times alone."""
        directory, name = self.data_place()
        return directory.branch.open_file(name, directory.at())


class View(Closing):
    """A tree that can be walked: ``root``, then ``names()`` and ``look()``."""

    #: Whose marks are private here; None where no attribute means anything.
    dialect: Dialect | None
    root: Dir

    @abstractmethod
    def names(self, directory: Dir) -> list[bytes]:
        """Names in *directory* in the order of their bytes; look() may not find some of them."""

    @abstractmethod
    def look(self, directory: Dir, name: bytes) -> Seen | None:
        """The object called *name*, None when the tree has none."""

    @abstractmethod
    def data_place(self, seen: Seen) -> tuple[RealDir, bytes]: ...

    @abstractmethod
    def trim(self) -> None:
        """Close descriptors beyond the limit. needs: no step in progress."""

    @abstractmethod
    def close(self) -> None:
        """Close every descriptor; no Seen and no Dir of this view is of use afterwards."""

    def find(self, path: bytes) -> Seen | None:
        """The object at *path* below the root (not the root); symbolic links are not followed."""
        above, _, name = path.strip(b"/").rpartition(b"/")
        if name in (b".", b".."):
            raise oserror(errno.EINVAL, path)
        directory = self.directory(above)
        return None if directory is None or not name else self.look(directory, name)

    def directory(self, path: bytes, start: Dir | None = None) -> Dir | None:
        """The directory at *path* below *start* or the root, None when there is none."""
        here = start or self.root
        for part in path.split(b"/"):
            if part in (b"", b"."):
                continue
            if part == b"..":
                raise oserror(errno.EINVAL, path)
            seen = self.look(here, part)
            if seen is None or seen.dir is None:
                return None
            here = seen.dir
        return here


class MergedView(View):
    """What a mount of layers shows."""

    def __init__(self, opened: opening.Opened) -> None:
        self._opened = opened
        self.stack = opened.stack
        self.dialect: Dialect = opened.dialect
        self.root = opened.stack.root

    @classmethod
    def open(cls, layers: Sequence[bytes], dialect: Dialect) -> MergedView:
        """The view of one layer or more, top-most first. Raises LayerError, OSError."""
        return cls(opening.open_view(layers, dialect))

    def close(self) -> None:
        self.stack.close()
        self._opened.close()

    def trim(self) -> None:
        self.stack.cache.trim()

    def without_top(self) -> Dir:
        """The root of the same view without its top-most layer; needs: two layers or more."""
        return Dir(self.root.ino, None, self.root.lowers[1:], whiteouts=True)

    def names(self, directory: Dir) -> list[bytes]:
        return sorted(entry.name for entry in merge.listing(self.stack, directory))

    def look(self, directory: Dir, name: bytes) -> Seen | None:
        found = first_of(directory, name, directory.holders(name))
        if found is None:
            return None
        holders, st = found
        return self._shown(directory.lowers, (holders & -holders).bit_length() - 1, name, st)

    def _shown(
        self, lowers: tuple[RealDir, ...], position: int, name: bytes, st: os.stat_result
    ) -> Seen | None:
        seen = Seen(self, st, name, lowers, position)
        if st.st_mode & _S_IFMT == _S_IFDIR:
            seen.dir = self.merged(seen)
        elif whiteout.is_whiteout(self.dialect, st, name, lowers[position].at()):
            return None
        return seen

    def merged(self, seen: Seen) -> Dir:
        """The directory *seen* with everything that merges with it."""
        walk = Walk(self.stack, seen.parents, seen.name)
        lowers = walk.run(positions_from(seen.position, len(seen.parents)), seen.st)
        made = Dir(seen.st.st_ino, None, tuple(lowers), whiteouts=len(lowers) > 1)
        made.xwhiteouts = walk.xwhiteouts
        made.index = walk.names
        return made

    def data_place(self, seen: Seen) -> tuple[RealDir, bytes]:
        return find_data(self.stack, seen.parents, seen.position, seen.name)


class PlainView(View):
    """One directory tree, of which every object is what it is."""

    dialect = None

    def __init__(self, dir_fd: int) -> None:
        """Show the tree at *dir_fd*, of which a copy is kept; mounts below it are not entered."""
        self._cache = FdCache(_FDS_OF_PLAIN_VIEW)
        fd = os.open(sc.fd_path(dir_fd), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._branch = Branch(1, b"", fd, self._cache, private=False)
        self.root = Dir(0, None, (self._branch.root,), whiteouts=False)

    def close(self) -> None:
        self._cache.close_all()
        self._branch.close()

    def trim(self) -> None:
        self._cache.trim()

    def names(self, directory: Dir) -> list[bytes]:
        return sorted(entry.name for entry in read_names(directory.top))

    def look(self, directory: Dir, name: bytes) -> Seen | None:
        # Listings of unions show stray whiteouts, which then do not exist: no error.
        st = sc.lstat_or_none(name, directory.top.at())
        if st is None:
            return None
        seen = Seen(self, st, name, directory.lowers, 0)
        if st.st_mode & _S_IFMT == _S_IFDIR:
            below = directory.top.child(name)
            seen.dir = Dir(st.st_ino, None, (below,), whiteouts=False)
        return seen

    def data_place(self, seen: Seen) -> tuple[RealDir, bytes]:
        return seen.holder, seen.name


def leave(directory: Dir) -> None:
    """Close the descriptors of *directory*; they open again when needed."""
    for low in directory.lowers:
        low.release()


def same_places(one: tuple[RealDir, ...], other: tuple[RealDir, ...]) -> bool:
    """Whether both are the same real directories, so that their views have the same content."""
    if len(one) != len(other):
        return False
    return all(a is b or _identity(a) == _identity(b) for a, b in zip(one, other, strict=True))


def _identity(directory: RealDir) -> tuple[int, int]:
    parent = directory.parent
    st = (
        os.stat(directory.branch.root_fd)
        if parent is None
        else sc.lstat_at(directory.name, parent.at())
    )
    return st.st_dev, st.st_ino

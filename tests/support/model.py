"""ModelUnion: a union file system in dictionaries, written for clarity only.

A layer is a tree of nested ``MDir``; the top one is the upper. Nothing is cached: each question
walks all layers again by the rules of the format (a whiteout ends the search, a non-directory ends
the merge, an opaque directory ends it below itself), and each change edits the upper as the table
of operations says. ``view()`` and ``upper`` are then what the core's view and upper directory have
to look like. Errors are OSError with the errno of the call.

Left out on purpose: owners, times, inode numbers. The default profile only: no redirects.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field, replace

Path = tuple[bytes, ...]


@dataclass
class MFile:
    """Anything but a directory; hard links are the same object under two names."""

    kind: int = stat.S_IFREG
    mode: int = 0o644
    data: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


@dataclass
class MDir:
    """A directory of one layer."""

    entries: dict[bytes, MNode] = field(default_factory=dict)
    mode: int = 0o755
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    opaque: bool = False


@dataclass
class MWhiteout:
    """A deletion mark."""


MNode = MFile | MDir | MWhiteout

# What a view shows of one object: (kind, mode, data, attributes, link count of a non-directory)
Shown = tuple[int, int, bytes, tuple[tuple[bytes, bytes], ...], int]


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class ModelUnion:
    """*layers*, topmost first; the first one is the upper."""

    def __init__(self, upper: MDir, lowers: list[MDir]) -> None:
        self.upper = upper
        self.lowers = lowers

    # --- looking -----------------------------------------------------------------------------

    def stack_at(self, path: Path) -> list[MDir] | MFile:
        """All directories that merge at *path*, topmost first, or the one object there."""
        dirs: list[MDir] = [self.upper, *self.lowers]
        for position, name in enumerate(path):
            found = _step(dirs, name)
            if isinstance(found, MFile):
                if position < len(path) - 1:
                    raise fail(errno.ENOTDIR)
                return found
            dirs = found
        return dirs

    def exists(self, path: Path) -> bool:
        try:
            self.stack_at(path)
        except OSError:
            return False
        return True

    def names(self, path: Path) -> list[bytes]:
        dirs = self.dirs_at(path)
        names = {name for directory in dirs for name in directory.entries}
        return sorted(name for name in names if self.exists((*path, name)))

    def dirs_at(self, path: Path) -> list[MDir]:
        found = self.stack_at(path)
        if isinstance(found, MFile):
            raise fail(errno.ENOTDIR)
        return found

    def view(self) -> dict[Path, Shown]:
        """Everything visible, by path; the root is ``()``."""
        return dict(self._look(()))

    def _look(self, path: Path) -> list[tuple[Path, Shown]]:
        found = self.stack_at(path)
        if isinstance(found, MFile):
            links = sum(
                found is one for layer in (self.upper, *self.lowers) for one in all_of(layer)
            )
            return [(path, (found.kind, found.mode, found.data, _items(found.xattrs), links))]
        top = found[0]
        out: list[tuple[Path, Shown]] = [
            (path, (stat.S_IFDIR, top.mode, b"", _items(top.xattrs), 0))
        ]
        for name in self.names(path):
            out += self._look((*path, name))
        return out

    # --- the upper ---------------------------------------------------------------------------

    def _upper_dir(self, path: Path) -> MDir:
        """The upper directory at *path*, with its missing ancestors copied up."""
        here = self.upper
        for depth in range(1, len(path) + 1):
            name = path[depth - 1]
            top = self.dirs_at(path[:depth])[0]
            below = here.entries.get(name)
            if not isinstance(below, MDir):
                below = MDir({}, top.mode, dict(top.xattrs))
                here.entries[name] = below
            here = below
        return here

    def _in_upper(self, path: Path) -> bool:
        here: MNode | None = self.upper
        for name in path:
            here = here.entries.get(name) if isinstance(here, MDir) else None
        return here is not None and not isinstance(here, MWhiteout)

    def _copied_up(self, path: Path) -> MFile | MDir:
        """The upper object at *path*; a copy of the lower one if it was not there yet."""
        found = self.stack_at(path)
        if not isinstance(found, MFile):
            return self._upper_dir(path)
        parent = self._upper_dir(path[:-1])
        if not self._in_upper(path):
            parent.entries[path[-1]] = replace(found, xattrs=dict(found.xattrs))
        copied = parent.entries[path[-1]]
        assert isinstance(copied, MFile)
        return copied

    def _lower_shows(self, path: Path) -> bool:
        """Whether removing *path* from the upper would bring something lower back."""
        for directory in self._lower_dirs(path[:-1]):
            below = directory.entries.get(path[-1])
            if below is not None:
                return not isinstance(below, MWhiteout)
        return False

    def _lower_dirs(self, path: Path) -> list[MDir]:
        return [d for d in self.dirs_at(path) if not any(d is one for one in all_of(self.upper))]

    def _gone(self, path: Path) -> None:
        """Take the upper's name away, or hide the lower's."""
        shows = self._lower_shows(path)
        parent = self._upper_dir(path[:-1])
        if shows:
            parent.entries[path[-1]] = MWhiteout()
        else:
            del parent.entries[path[-1]]

    # --- making ------------------------------------------------------------------------------

    def _place_for_new(self, path: Path) -> None:
        self.dirs_at(path[:-1])
        if self.exists(path):
            raise fail(errno.EEXIST)

    def make(self, path: Path, node: MFile) -> None:
        """create, mknod, symlink."""
        self._place_for_new(path)
        self._upper_dir(path[:-1]).entries[path[-1]] = node

    def mkdir(self, path: Path, mode: int) -> None:
        self._place_for_new(path)
        parent = self._upper_dir(path[:-1])
        over_whiteout = isinstance(parent.entries.get(path[-1]), MWhiteout)
        parent.entries[path[-1]] = MDir({}, mode, opaque=over_whiteout)

    def link(self, path: Path, new: Path) -> None:
        if not isinstance(self.stack_at(path), MFile):
            self.dirs_at(new[:-1])
            raise fail(errno.EPERM)
        self._place_for_new(new)
        node = self._copied_up(path)
        self._upper_dir(new[:-1]).entries[new[-1]] = node

    # --- removing ----------------------------------------------------------------------------

    def unlink(self, path: Path) -> None:
        if not isinstance(self.stack_at(path), MFile):
            raise fail(errno.EISDIR)
        self._gone(path)

    def rmdir(self, path: Path) -> None:
        self.dirs_at(path)
        if self.names(path) or (self._has_stray_marks(path) and not self._lower_shows(path)):
            raise fail(errno.ENOTEMPTY)
        self._gone(path)

    def _has_stray_marks(self, path: Path) -> bool:
        """A directory of the upper alone is left to its file system, whiteouts and all."""
        return self._is_pure_upper(path) and bool(self.dirs_at(path)[0].entries)

    # --- changing ----------------------------------------------------------------------------

    def open_for_writing(self, path: Path) -> MFile:
        found = self.stack_at(path)
        if not isinstance(found, MFile):
            raise fail(errno.EISDIR)
        if found.kind != stat.S_IFREG:
            raise fail(errno.ENXIO)
        node = self._copied_up(path)
        assert isinstance(node, MFile)
        return node

    def write(self, path: Path, offset: int, data: bytes) -> None:
        node = self.open_for_writing(path)
        grown = node.data.ljust(offset, b"\0")
        node.data = grown[:offset] + data + grown[offset + len(data) :]

    def truncate(self, path: Path, size: int) -> None:
        node = self.open_for_writing(path)
        node.data = node.data[:size].ljust(size, b"\0")

    def chmod(self, path: Path, mode: int) -> None:
        self._copied_up(path).mode = mode

    def setxattr(self, path: Path, key: bytes, value: bytes) -> None:
        self._copied_up(path).xattrs[key] = value

    def removexattr(self, path: Path, key: bytes) -> None:
        found = self.stack_at(path)
        top = found if isinstance(found, MFile) else found[0]
        if key not in top.xattrs:
            raise fail(errno.ENODATA)
        del self._copied_up(path).xattrs[key]

    # --- moving ------------------------------------------------------------------------------

    def rename(self, old: Path, new: Path, *, noreplace: bool = False) -> None:
        self.dirs_at(old[:-1])
        self.dirs_at(new[:-1])
        source = self.stack_at(old)
        if noreplace and self.exists(new):
            raise fail(errno.EEXIST)
        if old == new or self._same_file(old, new):
            return
        if old[: len(new)] == new:
            raise fail(errno.ENOTEMPTY)
        if isinstance(source, MFile):
            self._move_file(old, new)
        else:
            self._move_directory(old, new)

    def _same_file(self, one: Path, other: Path) -> bool:
        """Two names of one file of the upper; lower ones part at the first change."""
        if not self.exists(other) or not self._in_upper(one) or not self._in_upper(other):
            return False
        return self.stack_at(one) is self.stack_at(other)

    def _move_file(self, old: Path, new: Path) -> None:
        if self.exists(new) and not isinstance(self.stack_at(new), MFile):
            raise fail(errno.EISDIR)
        node = self._copied_up(old)
        parent = self._upper_dir(new[:-1])
        self._gone(old)
        parent.entries[new[-1]] = node

    def _move_directory(self, old: Path, new: Path) -> None:
        if new[: len(old)] == old:
            raise fail(errno.EINVAL)
        if self.exists(new) and isinstance(self.stack_at(new), MFile):
            raise fail(errno.ENOTDIR)
        if not self._is_pure_upper(old):
            raise fail(errno.EXDEV)
        occupied = self.exists(new) and self._has_stray_marks(new)
        if self.exists(new) and self.names(new) and not occupied:
            raise fail(errno.ENOTEMPTY)
        parent = self._upper_dir(new[:-1])
        node = self._upper_dir(old)
        if len(self.dirs_at(new[:-1])) > 1:
            node.opaque = True
        if occupied:  # found out last, by the upper's file system
            raise fail(errno.ENOTEMPTY)
        self._gone(old)
        parent.entries[new[-1]] = node

    def _is_pure_upper(self, path: Path) -> bool:
        return self._in_upper(path) and len(self.dirs_at(path)) == 1

    def exchange(self, one: Path, other: Path) -> None:
        self.dirs_at(one[:-1])
        self.dirs_at(other[:-1])
        first = self.stack_at(one)
        second = self.stack_at(other)
        if one == other or self._same_file(one, other):
            return
        if one == other[: len(one)] or other == one[: len(other)]:
            raise fail(errno.EINVAL)
        for path, found in ((one, first), (other, second)):
            if not isinstance(found, MFile) and not self._is_pure_upper(path):
                raise fail(errno.EXDEV)
        a, b = self._copied_up(one), self._copied_up(other)
        parents = [self._upper_dir(path[:-1]) for path in (one, other)]
        for node, into in ((a, other), (b, one)):
            if isinstance(node, MDir) and len(self.dirs_at(into[:-1])) > 1:
                node.opaque = True
        parents[0].entries[one[-1]] = b
        parents[1].entries[other[-1]] = a


def _step(dirs: list[MDir], name: bytes) -> list[MDir] | MFile:
    """One component of a walk through merged directories."""
    merged: list[MDir] = []
    for directory in dirs:
        found = directory.entries.get(name)
        if found is None:
            continue
        if isinstance(found, MWhiteout):
            break
        if isinstance(found, MFile):
            if not merged:
                return found
            break
        merged.append(found)
        if found.opaque:
            break
    if not merged:
        raise fail(errno.ENOENT)
    return merged


def all_of(directory: MDir) -> list[MNode]:
    """The directory and every node below, once for each name."""
    out: list[MNode] = [directory]
    for node in directory.entries.values():
        out += all_of(node) if isinstance(node, MDir) else [node]
    return out


def _items(xattrs: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(sorted(xattrs.items()))

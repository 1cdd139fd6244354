"""The way down through the layers under one name, and what redirect marks do to it.

Source: ovl_lookup(), ovl_lookup_layer() and ovl_check_redirect() in fs/overlayfs/namei.c. A walk
begins with a name and the lower directories of its parent. Each directory met joins the merge;
a redirect mark changes the name for the layers below, or leaves the parent's directories behind
and starts again at the roots of the layers below; an opaque directory, a whiteout and a file end
it. Absolute redirects pass through directories that may carry marks of their own, and those change
the path for the layers below, or end the way, in the same manner. What was moved away from below
an opaque directory is not hidden by it: an absolute redirect takes its verdict back.

``find_data`` is the same way for a file: from one that holds attributes only (metacopy) down to
the one that holds the data.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from . import ondisk, whiteout
from . import syscalls as sc
from .branch import DIR_TO_LIST, RealDir
from .names import LowerNames
from .whiteout import Dialect

if TYPE_CHECKING:
    from .nodes import Dir
    from .stack import Stack

_S_IFDIR = stat.S_IFDIR
_S_IFREG = stat.S_IFREG
_S_IFMT = 0o170000
# Holders of a name from which on their names are read as they are met.
_WORTH_SCAN = 4
# Instead of a descriptor.
_ABSENT = -1
_REFUSED = -2
# The part of the cache that one walk may fill with directories that are likely to be used.
_KEPT_PART = 8


def oserror(number: int, name: bytes | None = None) -> OSError:
    """The OSError of errno *number*."""
    return OSError(number, os.strerror(number), name)


def is_opaque(dialect: Dialect, name: bytes, dir_fd: int, keys: list[bytes]) -> bool:
    """Whether the directory *name* with attributes *keys* hides what is below it."""
    if dialect.opaque not in keys:
        return False
    return sc.getxattr_at(name, dir_fd, dialect.opaque) == ondisk.OPAQUE_YES


def positions_from(start: int, count: int) -> int:
    """Bits of the positions from *start* on, of *count*."""
    return (1 << count) - (1 << start)


def first_of(directory: Dir, name: bytes, holders: int) -> tuple[int, os.stat_result] | None:
    """(the *holders* from the first on that has *name*, its stat); None where none has it."""
    while holders:
        st = directory.lowers[(holders & -holders).bit_length() - 1].stat_of(name)
        if st is not None:
            return holders, st
        directory.misses += 1
        holders &= holders - 1
    return None


def _positions(bits: int) -> list[int]:
    """Numbers of the bits that are set, the least first."""
    return [number for number, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]


class Walk:
    """Collects the lower directories that merge under one name, top-most first.

    Where many directories have the name, each of them is opened once: its marks are read through
    that descriptor, and its names into ``names``. From where on this goes no further (a redirect,
    a whiteout, a directory that may not be read), the way goes on by name.
    """

    __slots__ = (
        "absent",
        "found",
        "name",
        "names",
        "parents",
        "redirected",
        "stack",
        "stop",
        "top",
        "xwhiteouts",
    )

    def __init__(self, stack: Stack, parents: tuple[RealDir, ...], name: bytes) -> None:
        self.stack = stack
        self.parents = parents
        self.name: bytes | tuple[bytes, ...] = name
        self.stop = False
        self.redirected = False
        self.xwhiteouts = False
        self.found: list[RealDir] = []
        # stat of the first one found, whose inode number the directory shows.
        self.top: os.stat_result | None = None
        # Directories that were asked and did not have the name.
        self.absent = 0
        # Of what was found, if that is several directories and they were read.
        self.names: LowerNames | None = None

    def redirect(self, name: bytes, dir_fd: int) -> None:
        """Apply the redirect mark of the object found under *name* (ovl_check_redirect())."""
        value = self._read_redirect(name, dir_fd)
        self.redirected = True
        if value.startswith(b"/"):
            self.stop = False
            self.name = tuple(_redirect_parts(value))
            self.parents = tuple(b.root for b in self.stack.lowers)
        elif isinstance(self.name, tuple):
            self.name = (*self.name[:-1], value)
        else:
            self.name = value

    def _read_redirect(self, name: bytes, dir_fd: int) -> bytes:
        """The value of the mark; EINVAL, EACCES or EPERM for one that must not be followed."""
        value = sc.getxattr_at(name, dir_fd, self.stack.dialect.redirect)
        _redirect_parts(value)
        if not self.stack.policy.follow_redirects:
            raise oserror(errno.EPERM, name)
        return value

    def run(self, holders: int, first: os.stat_result | None) -> list[RealDir]:
        """Lower directories of those at the positions *holders*, which are bits.

        *first* is the stat of the top-most of them if known. What was found, and the stat of the
        first of that, is also in ``found`` and ``top``.
        """
        self.top = first
        try:
            self._collect(holders, first)
        except OSError:
            for place in self.found:
                place.release()
            raise
        return self.found

    def _collect(self, holders: int, first: os.stat_result | None) -> None:
        if holders & (holders - 1) and self.stack.untouched and isinstance(self.name, bytes):
            positions = _positions(holders)
            if len(positions) >= _WORTH_SCAN:
                holders = self._scan(self.name, positions, holders)
        scanned = len(self.found)
        while holders and not self.stop:
            bit = holders & -holders
            low = self.parents[bit.bit_length() - 1]
            holders ^= bit
            hit = self._step(low, None if self.found else first)
            first = None
            if hit is None:
                continue
            before = self.parents, self.name
            place, st = hit
            self.top = self.top or st
            if not self._is_lowest(low):
                self._read_marks(place)
            self.found.append(place)
            if (self.parents, self.name) != before:
                holders = self._below(low, bit)
        if len(self.found) != scanned or scanned < 2:
            self.names = None

    def _below(self, low: RealDir, bit: int) -> int:
        """Where to look on after a redirect was met at *bit*."""
        start = bit.bit_length()
        if isinstance(self.name, tuple):
            # Branch indexes of lowers start at 1: go on with the branch below this one.
            start = low.branch.index
        return positions_from(start, len(self.parents))

    def _scan(self, name: bytes, positions: list[int], holders: int) -> int:
        """Meet the directories at *holders*; gives back those that are left to the other way."""
        parents, found = self.parents, self.found
        names = self.names = LowerNames()
        read = sc.SmallDirectories().read
        lowest, marks = len(self.stack.lowers), self.stack.dialect.marks
        keep = self.stack.cache.limit // _KEPT_PART
        for position in positions:
            low = parents[position]
            fd = self._open(name, low)
            if fd < 0:
                if fd == _REFUSED:
                    return holders >> position << position
                continue
            branch = low.branch
            place = RealDir(branch, low, name)
            try:
                if self.top is None:
                    self.top = os.stat(fd)
                if branch.index < lowest and not marks.isdisjoint(sc.xattrs_of(fd)):
                    self._read_marks(place)
                raw = read(fd)
                if raw != b"":
                    names.take(len(found), raw, fd)
                    if keep:
                        # It will be asked for a name.
                        keep -= 1
                        place.adopt(fd)
            finally:
                if place.fd < 0:
                    os.close(fd)
            found.append(place)
            if self.stop:
                break
            if self.name is not name:
                return self._below(low, 1 << position)
        return 0

    def _open(self, name: bytes, low: RealDir) -> int:
        """Descriptor of directory *name* in *low*, else _ABSENT or _REFUSED."""
        dir_fd = low.fd
        try:
            if dir_fd >= 0:
                return os.open(name, DIR_TO_LIST, dir_fd=dir_fd)
            return low.open_names(name)
        except FileNotFoundError:
            self.absent += 1
            return _ABSENT
        except OSError:
            return _REFUSED

    def _is_lowest(self, low: RealDir) -> bool:
        """Nothing is below the lowest layer, so its marks mean nothing."""
        return low.branch.index >= len(self.stack.lowers)

    def _step(
        self, low: RealDir, known: os.stat_result | None
    ) -> tuple[RealDir, os.stat_result] | None:
        holder = self._holder(low)
        if holder is None:
            return None
        low, name = holder
        st = known or low.stat_of(name)
        if st is None:
            self.absent += 1
            return None
        if st.st_mode & _S_IFMT != _S_IFDIR:
            self.stop = True  # a whiteout, or a file below a directory
            return None
        return low.child(name), st

    def _holder(self, low: RealDir) -> tuple[RealDir, bytes] | None:
        """(directory, name) to look at in the layer of *low*; None where the way ends before."""
        if not isinstance(self.name, tuple):
            return low, self.name
        parts = self.name
        reached = self._descend(low, parts[:-1])
        return None if reached is None else (reached, parts[-1])

    def _descend(self, low: RealDir, parts: tuple[bytes, ...]) -> RealDir | None:
        """Walk an absolute redirect in one branch; whiteouts and files on the way end it.

        Marks on the way speak about the layers below, not about the rest of the way in this one.
        """
        for position, part in enumerate(parts):
            st = low.stat_of(part)
            if st is None:
                return None
            if st.st_mode & _S_IFMT != _S_IFDIR:
                self.stop = True
                return None
            if not self._is_lowest(low):
                fd, lent = low.lend()
                try:
                    self._read_marks_on_the_way(part, fd, len(parts) - position)
                finally:
                    if lent:
                        os.close(fd)
            low = low.child(part)
        return low

    def _read_marks_on_the_way(self, part: bytes, dir_fd: int, rest: int) -> None:
        dialect = self.stack.dialect
        keys = sc.listxattr_at(part, dir_fd)
        if is_opaque(dialect, part, dir_fd, keys):
            self.stop = True
        elif dialect.redirect in keys:
            self._change_prefix(part, dir_fd, rest)

    def _change_prefix(self, name: bytes, dir_fd: int, rest: int) -> None:
        """An ancestor was renamed: the path but for its last *rest* components is another one."""
        assert isinstance(self.name, tuple)
        value = self._read_redirect(name, dir_fd)
        tail = self.name[-rest:]
        if value.startswith(b"/"):
            self.stop = False
            self.name = (*_redirect_parts(value), *tail)
        else:
            self.name = (*self.name[: -rest - 1], value, *tail)

    def _read_marks(self, place: RealDir) -> None:
        assert place.parent is not None
        fd, lent = place.parent.lend()
        try:
            self._apply_marks(place, fd)
        finally:
            if lent:
                os.close(fd)

    def _apply_marks(self, place: RealDir, dir_fd: int) -> None:
        keys = sc.listxattr_at(place.name, dir_fd)
        if not keys:
            return
        dialect = self.stack.dialect
        if dialect.opaque in keys:
            value = sc.getxattr_at(place.name, dir_fd, dialect.opaque)
            if value == ondisk.OPAQUE_YES:
                self.stop = True
                return
            if value == ondisk.OPAQUE_XWHITEOUTS:
                place.branch.xwhiteouts = self.xwhiteouts = True
        if dialect.redirect in keys:
            self.redirect(place.name, dir_fd)

    # --- data of files ---------------------------------------------------------------------------

    def data(self, position: int) -> tuple[RealDir, bytes]:
        """(directory, name) of the file that holds the data of the metacopy at *position*."""
        dialect = self.stack.dialect
        low = self.parents[position]
        holder: tuple[RealDir, bytes] | None = (low, self._plain_name())
        while holder is not None:
            if self._is_data(holder):
                return holder
            if self._is_lowest(holder[0]):
                break
            before = self.parents
            keys = sc.listxattr_at(holder[1], holder[0].at())
            if dialect.redirect in keys:
                self.redirect(holder[1], holder[0].at())
            position = holder[0].branch.index if self.parents is not before else position + 1
            holder, position = self._next_file(position)
        raise oserror(errno.EIO, self._plain_name())

    def _plain_name(self) -> bytes:
        return self.name[-1] if isinstance(self.name, tuple) else self.name

    def _is_data(self, holder: tuple[RealDir, bytes]) -> bool:
        return self.stack.dialect.metacopy not in sc.listxattr_at(holder[1], holder[0].at())

    def _next_file(self, position: int) -> tuple[tuple[RealDir, bytes] | None, int]:
        """The next regular file under the name; None where anything else comes first."""
        dialect = self.stack.dialect
        while not self.stop and position < len(self.parents):
            holder = self._holder(self.parents[position])
            if holder is not None:
                dir_fd = holder[0].at()
                st = sc.lstat_or_none(holder[1], dir_fd)
                if st is not None:
                    regular = st.st_mode & _S_IFMT == _S_IFREG
                    if not regular or whiteout.is_whiteout(dialect, st, holder[1], dir_fd):
                        break
                    return holder, position
            position += 1
        return None, position


def find_data(
    stack: Stack, parents: tuple[RealDir, ...], position: int, name: bytes
) -> tuple[RealDir, bytes]:
    """Where the data of file *name* in ``parents[position]`` is, which may be that file itself.

    EIO when no layer below has it, as the kernel's lookup answers.
    """
    return Walk(stack, parents, name).data(position)


def _redirect_parts(value: bytes) -> list[bytes]:
    """Components of a redirect; EINVAL when malformed, EACCES for dots, as the kernel answers."""
    absolute = value.startswith(b"/")
    parts = value[1:].split(b"/") if absolute else [value]
    if not absolute and b"/" in value:
        raise oserror(errno.EINVAL, value)
    if any(not part for part in parts):
        raise oserror(errno.EINVAL, value)
    if any(part in (b".", b"..") for part in parts):
        raise oserror(errno.EACCES, value)
    return parts

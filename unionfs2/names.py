"""Names in real directories: reading one, and knowing which of many have a name.

Lower directories do not change while they are mounted, so what was read of them once stays true:
``LowerNames`` answers in one step which of a thousand lower directories to ask.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import Any

from . import syscalls as sc
from . import whiteout
from .branch import RealDir
from .model import Entry

_S_IFDIR = stat.S_IFDIR
_S_IFREG = stat.S_IFREG
_S_IFLNK = stat.S_IFLNK


# Entry.kind of a character device 0:0: no kind that a file can have.
WHITEOUT = 0o160000


def read_names(directory: RealDir) -> list[Entry]:
    """Names of one real directory with inode number and kind, in its own order."""
    if not directory.branch.reads_freely:
        return _read_unseen(directory)
    fd, lent = directory.lend()
    try:
        # By a path of bytes, so that the names are bytes; it opens the directory once more.
        with os.scandir(sc.fd_path(fd)) as names:
            return _entries(names)
    finally:
        if lent:
            os.close(fd)


def _read_unseen(directory: RealDir) -> list[Entry]:
    """The same through one descriptor, which was opened so that no access time changes."""
    fd = directory.open_list()
    try:
        with os.scandir(fd) as names:
            return [e._replace(name=os.fsencode(e.name)) for e in _entries(names)]
    finally:
        os.close(fd)


def read_few(directory: RealDir, reader: sc.SmallDirectories) -> list[Entry]:
    """Like read_names(), cheaper for a directory that is known to be small."""
    fd = directory.open_list()
    try:
        raw = reader.read(fd)
        if raw is not None:
            return [_entry(fd, *entry) for entry in sc.entries_in(raw)]
    finally:
        os.close(fd)
    return read_names(directory)


# Without the function in Python that NamedTuple makes, which takes as long as all the rest.
_new = tuple.__new__


def _entries(names: Iterable[os.DirEntry[Any]]) -> list[Entry]:
    # What is asked of each costs no system call but for the kinds that are rare, and for file
    # systems that do not tell kinds.
    return [
        _new(
            Entry,
            (
                found.name,
                found.inode(),
                _S_IFLNK
                if found.is_symlink()
                else _S_IFREG
                if found.is_file()
                else _S_IFDIR
                if found.is_dir()
                else _other_kind(found),
            ),
        )
        for found in names
    ]


def _other_kind(found: os.DirEntry[Any]) -> int:
    try:
        return _kind_of(found.stat(follow_symlinks=False))
    except FileNotFoundError:
        return WHITEOUT


def _entry(dir_fd: int, name: bytes, ino: int, d_type: int) -> Entry:
    kind = d_type << 12
    if kind in _PLAIN:
        return _new(Entry, (name, ino, kind))
    st = sc.lstat_or_none(name, dir_fd)
    return Entry(name, ino, WHITEOUT if st is None else _kind_of(st))


# Kinds that can be no whiteout, so that it is enough to know them.
_PLAIN = frozenset((_S_IFREG, _S_IFDIR, _S_IFLNK))


def _kind_of(st: os.stat_result) -> int:
    return WHITEOUT if whiteout.is_device(st) else stat.S_IFMT(st.st_mode)


class UpperNames:
    """Which names the upper directory of one node can have, so that it is not asked for others.

    Nobody else changes an upper directory while it is mounted. One that was made here begins empty;
    another is read when it was asked in vain several times.

    Invariant: while names are known, every name in the directory is among them.
    """

    __slots__ = ("_misses", "_names")

    #: Fruitless questions that cost as much as reading a small directory, and bytes of a small one.
    WORTH_MISSES = 8
    SMALL = 1 << 15
    NAMES_MAX = 1 << 16

    def __init__(self, names: set[bytes] | None = None) -> None:
        self._names = names
        self._misses = 0

    def arrives(self, name: bytes) -> None:
        """*name* is about to get into the directory."""
        names = self._names
        if names is not None:
            names.add(name)
            if len(names) > self.NAMES_MAX:
                self._names = None

    def went(self, name: bytes) -> None:
        """Nothing is left under *name*."""
        if self._names is not None:
            self._names.discard(name)

    def lack(self, name: bytes) -> bool:
        """Whether it is known that *name* is not in the directory."""
        return self._names is not None and name not in self._names

    def missed(self, directory: RealDir) -> None:
        """*directory* was asked for a name that it does not have."""
        self._misses += 1
        if self._misses == self.WORTH_MISSES:
            try:
                if os.stat(directory.at()).st_size <= self.SMALL:
                    self._names = {entry.name for entry in read_names(directory)}
            except OSError:
                return


class LowerNames:
    """Which of the lower directories of one node have a name, marks included.

    Directories are positions in the node's ``lowers`` and bits of a mask, so the least bit is the
    top-most of them. A directory that is not small is not read with the others: it may have any
    name, until so many were asked for in vain that reading it would have been cheaper. One that is
    huge, or cannot be read, stays so.

    Invariant: a bit that is missing from an answer belongs to a directory without that name.
    """

    __slots__ = ("_masks", "_raw", "_unread", "_worth", "filled", "large")

    #: Fruitless questions to each directory on average after which a table is made although
    #: nobody reads them anyway: reading a small directory costs as much.
    WORTH_MISSES = 5
    #: Bytes of a directory for one such question: an entry is some thirty bytes long, and read in
    #: a third of the time that a question takes.
    _BYTES_PER_MISS = 96
    #: Bytes of a directory, and names in it, from which on they are not kept.
    HUGE = 1 << 22
    _NAMES_MAX = 1 << 17

    def __init__(self) -> None:
        self._masks: dict[bytes, int] = {}
        # What small directories hold, as it was read: most nodes are never looked into.
        self._raw: list[tuple[int, bytes]] = []
        # For each unread directory the number of misses that makes it worth to be read.
        self._worth: dict[int, int] = {}
        self._unread = 0
        #: Directories that have names at all, and those that are not small.
        self.filled = 0
        self.large = 0

    @classmethod
    def of(cls, lowers: tuple[RealDir, ...]) -> LowerNames:
        """Read what is small of *lowers*."""
        names, read = cls(), sc.SmallDirectories().read
        for position, directory in enumerate(lowers):
            try:
                fd = directory.open_list()
            except OSError:
                names.put_off(position, cls.HUGE)
                continue
            try:
                names.take(position, read(fd), fd)
            finally:
                os.close(fd)
        return names

    def take(self, position: int, raw: bytes | None, fd: int) -> None:
        """Add the directory *fd*, of which SmallDirectories.read() returned *raw*."""
        if raw is None:
            self.put_off(position, os.stat(fd).st_size)
        elif raw:
            self._raw.append((1 << position, raw))
            self.filled |= 1 << position

    def put_off(self, position: int, size: int) -> None:
        """Add a directory of *size* bytes that is not read yet."""
        bit = 1 << position
        self.filled |= bit
        self.large |= bit
        self._unread |= bit
        if size < self.HUGE:
            self._worth[bit] = max(size // self._BYTES_PER_MISS, self.WORTH_MISSES)

    def add(self, parts: list[tuple[int, list[bytes]]]) -> None:
        """Add the names of directories, each given with its bit."""
        masks = self._masks
        again = []
        for bit, names in parts:
            self.filled |= bit
            for name in names:
                if name in masks:
                    masks[name] |= bit
                    again.append(name)
                else:
                    masks[name] = bit
        # Many names are in the same directories: they share one number.
        shared: dict[int, int] = {}
        for name in again:
            mask = masks[name]
            masks[name] = shared.setdefault(mask, mask)

    def _read(self, bit: int, names: list[bytes]) -> None:
        self.add([(bit, names)])
        self._unread &= ~bit
        self._worth.pop(bit, None)

    def learn(self, position: int, entries: list[Entry]) -> None:
        """Somebody has read a directory anyway: keep what was not known and is not too much."""
        bit = 1 << position
        if self._unread & bit and len(entries) <= self._NAMES_MAX:
            self._read(bit, [entry.name for entry in entries])

    def holders(self, name: bytes, lowers: tuple[RealDir, ...], misses: int) -> int:
        """The directories to ask for *name*, after *misses* fruitless questions so far."""
        if self._raw:
            self._unpack()
        unread = self._unread
        if not unread:
            return self._masks.get(name, 0)
        if self._worth and misses >= min(self._worth.values()):
            self._read_large(lowers, misses // len(self._worth))
            unread = self._unread
        return self._masks.get(name, 0) | unread

    def _unpack(self) -> None:
        raw, self._raw = self._raw, []
        self.add([(bit, sc.names_in(part)) for bit, part in raw])

    def _read_large(self, lowers: tuple[RealDir, ...], misses: int) -> None:
        for bit, worth in list(self._worth.items()):
            if worth <= misses:
                try:
                    entries = read_names(lowers[bit.bit_length() - 1])
                except OSError:
                    del self._worth[bit]
                    continue
                self._read(bit, [entry.name for entry in entries])

"""Names in real directories: reading one, and finding the first of many that has a name.

Lower directories do not change while they are mounted, so what was read of them once stays true:
``LowerIndex`` answers in one step which of a thousand lower directories to ask.
"""

from __future__ import annotations

import os
import stat

from . import whiteout
from .branch import RealDir
from .model import Entry

_S_IFDIR = stat.S_IFDIR
_S_IFREG = stat.S_IFREG
_S_IFLNK = stat.S_IFLNK


def read_names(directory: RealDir) -> list[Entry]:
    """Names of one real directory with inode number and kind, in its own order."""
    fd = directory.open_list()
    try:
        with os.scandir(fd) as names:
            return [_entry(name) for name in names]
    finally:
        os.close(fd)


def _entry(found: os.DirEntry[str]) -> Entry:
    # is_*() answer from d_type; only other kinds, and file systems without d_type, cost a stat.
    if found.is_file(follow_symlinks=False):
        kind = _S_IFREG
    elif found.is_dir(follow_symlinks=False):
        kind = _S_IFDIR
    elif found.is_symlink():
        kind = _S_IFLNK
    else:
        kind = _other_kind(found)
    return Entry(os.fsencode(found.name), found.inode(), kind)


# Entry.kind of a character device 0:0: no kind that a file can have.
WHITEOUT = 0o160000


def _other_kind(found: os.DirEntry[str]) -> int:
    try:
        st = found.stat(follow_symlinks=False)
    except FileNotFoundError:
        return WHITEOUT
    return WHITEOUT if whiteout.is_device(st) else stat.S_IFMT(st.st_mode)


class LowerIndex:
    """For each name the position of the top-most lower directory that has it, marks included."""

    __slots__ = ("_first",)

    #: Lower directories from which on an index is kept at all, and looked-up names from which on
    #: it is made without a listing.
    WORTH_LAYERS = 8
    WORTH_LOOKUPS = 8

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}

    @classmethod
    def of(cls, lowers: tuple[RealDir, ...]) -> LowerIndex:
        """Read all *lowers*."""
        index = cls()
        for position, directory in enumerate(lowers):
            index.add(read_names(directory), position)
        return index

    def add(self, names: list[Entry], position: int) -> None:
        """Add one directory; from the top down."""
        first = self._first
        for entry in names:
            first.setdefault(entry.name, position)

    def start(self, name: bytes, missing: int) -> int:
        """Position of the first lower with *name*; *missing* where none has it."""
        return self._first.get(name, missing)

"""Filling pyfuse3's EntryAttributes in one step, and telling st_ino from the node id.

pyfuse3 has one property for two numbers: the id under which the kernel asks again, and the
inode number that programs see. A union needs both, since st_ino must stay what it was before a
copy-up, a remount, or a change to the kernel's overlay, while ids are ours to count. The struct
behind the object (fuse_entry_param of fuse_lowlevel.h) has two fields, so the second is written
in memory. Where it lies is probed, not assumed: a layout that is not understood falls back to the
properties and inode numbers that count nodes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from typing import Any, Final

_log = logging.getLogger(__name__)
_PROBE_INO: Final = 0x5AFE_1D0F_C0DE_0001
_NS: Final = 1_000_000_000
#: nodeid, generation, then struct stat of x86-64 and the two timeouts.
_X86_64: Final = struct.Struct("=QQ QQQIII4xQqqqqqqqqq24xdd")
_INO: Final = struct.Struct("=Q")


class AttrWriter:
    """Writes attributes into EntryAttributes objects of class *entry_type*."""

    def __init__(self, entry_type: type[Any], timeout_s: float) -> None:
        self._type = entry_type
        self._timeout_s = timeout_s
        self._start, self._ino_at = _find_layout(entry_type)
        self._buffer = ctypes.c_char * _X86_64.size
        self._pack = _X86_64.pack_into
        self._fast = self._start >= 0 and self._fast_layout_fits()
        if self._ino_at < 0:
            _log.warning("this pyfuse3 has an unknown layout: inode numbers will not be stable")

    @property
    def keeps_inode_numbers(self) -> bool:
        """Whether st_ino is the real one."""
        return self._ino_at >= 0

    def entry(self, node_id: int, ino: int, nlink: int, st: os.stat_result) -> Any:
        """A new EntryAttributes for a node; *node_id* 0 for a name without a node."""
        entry = self._type()
        if self._fast:
            self._fill(entry, node_id, ino, nlink, st)
        else:
            self._fill_slowly(entry, node_id, ino, nlink, st)
        return entry

    def name_only(self, ino: int, kind: int) -> Any:
        """For a listing: inode number and kind, no attributes (FUSE: node id 0)."""
        entry = self._type()
        entry.st_mode = kind
        entry.st_ino = 0
        self._set_ino(entry, ino)
        return entry

    def negative(self) -> Any:
        """The answer to a lookup of a name that does not exist, to be remembered."""
        entry = self._type()
        entry.st_ino = 0
        entry.entry_timeout = self._timeout_s
        return entry

    def _fill(self, entry: Any, node_id: int, ino: int, nlink: int, st: os.stat_result) -> None:
        atime, mtime, ctime = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
        self._pack(
            self._buffer.from_address(id(entry) + self._start),
            0,
            node_id,
            0,
            0,
            ino,
            nlink,
            st.st_mode,
            st.st_uid,
            st.st_gid,
            st.st_rdev,
            st.st_size,
            st.st_blksize,
            st.st_blocks,
            atime // _NS,
            atime % _NS,
            mtime // _NS,
            mtime % _NS,
            ctime // _NS,
            ctime % _NS,
            self._timeout_s,
            self._timeout_s,
        )

    def _fill_slowly(
        self, entry: Any, node_id: int, ino: int, nlink: int, st: os.stat_result
    ) -> None:
        entry.st_ino = node_id
        entry.st_mode = st.st_mode
        entry.st_nlink = nlink
        entry.st_uid = st.st_uid
        entry.st_gid = st.st_gid
        entry.st_rdev = st.st_rdev
        entry.st_size = st.st_size
        entry.st_blksize = st.st_blksize
        entry.st_blocks = st.st_blocks
        entry.st_atime_ns = st.st_atime_ns
        entry.st_mtime_ns = st.st_mtime_ns
        entry.st_ctime_ns = st.st_ctime_ns
        entry.entry_timeout = self._timeout_s
        entry.attr_timeout = self._timeout_s
        self._set_ino(entry, ino)

    def _set_ino(self, entry: Any, ino: int) -> None:
        if self._ino_at >= 0:
            field = (ctypes.c_char * _INO.size).from_address(id(entry) + self._ino_at)
            _INO.pack_into(field, 0, ino)

    def _fast_layout_fits(self) -> bool:
        """Write distinct values the fast way, read them back through the properties."""
        if self._start + _X86_64.size > self._type.__basicsize__:
            return False
        entry = self._type()
        times = (1_000_000_001, 2_000_000_002, 3_000_000_003)
        st = os.stat_result(
            (0o100644, 7, 8, 1, 9, 10, 11, 1, 2, 3, 1.0, 2.0, 3.0, *times, 512, 12, 13)
        )
        self._fill(entry, 21, 22, 23, st)
        read = (
            entry.st_ino,
            entry.st_mode,
            entry.st_nlink,
            entry.st_uid,
            entry.st_gid,
            entry.st_size,
            entry.st_blksize,
            entry.st_blocks,
            entry.st_rdev,
            entry.entry_timeout,
            entry.attr_timeout,
        )
        seen = (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns)
        timeout = self._timeout_s
        expected = (
            21, 0o100644, 23, 9, 10, 11, st.st_blksize, st.st_blocks, st.st_rdev, timeout, timeout,
        )  # fmt: skip
        return read == expected and seen == (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)


def _find_layout(entry_type: type[Any]) -> tuple[int, int]:
    """(offset of the node id, offset of st_ino) in an object, -1 where not found."""
    entry = entry_type()
    entry.st_ino = _PROBE_INO
    raw = ctypes.string_at(id(entry), entry_type.__basicsize__)
    needle = _INO.pack(_PROBE_INO)
    first = raw.find(needle)
    second = raw.find(needle, first + 1)
    if first < 0 or second < 0 or raw.find(needle, second + 1) >= 0:
        return -1, -1
    return first, second

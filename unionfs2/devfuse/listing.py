"""Requests about directories: READDIR and READDIRPLUS without an open handle, FSYNCDIR.

The kernel names the directory and the position from which to go on, and keeps what it was given
(cached readdir). Positions must therefore mean the same for everybody who reads, also when names
come and go between two requests: a name keeps its position as long as the list is remembered, one
that goes leaves a gap, one that comes is put at the end. So whoever reads on meets each name that
was there all the time exactly once, as POSIX demands.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Final

from unionfs2 import nodes as nd
from unionfs2 import syscalls as sc
from unionfs2.stack import oserror

from . import abi, codec
from .workers import Later

if TYPE_CHECKING:
    from collections.abc import Callable

    from unionfs2.model import Entry
    from unionfs2.nodes import Dir

    from .codec import Request
    from .door import Door, Handler, Outcome

_DOTS: Final = 2
#: Lists that are remembered, and how many names they may have together.
_LISTS_MAX: Final = 64
_NAMES_MAX: Final = 200_000
_ENTRY_PLUS: Final = abi.DIRENTPLUS_OUT.size
_ENTRY_PLAIN: Final = abi.DIRENT_OUT.size


class Listings:
    """Handlers of one door, and the lists that it remembers."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._fs = door.fs
        self._lookup = door.stack.lookup
        self._lists: OrderedDict[Dir, list[Entry | None]] = OrderedDict()
        self._names = 0

    def handlers(self) -> dict[int, Handler]:
        return {
            abi.OPENDIR: self.opendir,
            abi.RELEASEDIR: self.releasedir,
            abi.READDIR: self.readdir,
            abi.READDIRPLUS: self.readdirplus,
            abi.FSYNCDIR: self.fsyncdir,
        }

    def opendir(self, req: Request, *_: int) -> Outcome:
        if self._door.settings.stateless_dirs:
            raise oserror(errno.ENOSYS)  # which the kernel remembers: no more of these
        self._door.directory(req.nodeid)
        return codec.opened(req.unique, 0, abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR)

    def releasedir(self, req: Request, *_: int) -> Outcome:
        return codec.ok(req.unique)

    def fsyncdir(self, req: Request, *_: int) -> Outcome:
        fd = self._fs.open_for_sync(self._door.directory(req.nodeid))
        if fd is None:
            return codec.ok(req.unique)
        unique = req.unique
        return Later(
            partial(sc.fsync, fd), lambda _: codec.ok(unique), cleanup=partial(os.close, fd)
        )

    # --- what is remembered --------------------------------------------------------------------

    def _entries(self, node: Dir, offset: int) -> list[Entry | None]:
        known = self._lists.get(node)
        if known is not None and offset:
            self._lists.move_to_end(node)
            return known
        fresh: list[Entry | None] = list(self._fs.listing(node))
        if known is not None:
            fresh = _in_old_places(known, fresh)
            self._names -= len(known)
        self._lists[node] = fresh
        self._lists.move_to_end(node)
        self._names += len(fresh)
        while len(self._lists) > _LISTS_MAX or (self._names > _NAMES_MAX and len(self._lists) > 1):
            self._names -= len(self._lists.popitem(last=False)[1])
        return fresh

    # --- answers -------------------------------------------------------------------------------

    def readdir(self, req: Request, _fh: int, offset: int, size: int, *_: int) -> Outcome:
        return self._listed(req, offset, size, _ENTRY_PLAIN, codec.dirent, self._plain)

    def readdirplus(self, req: Request, _fh: int, offset: int, size: int, *_: int) -> Outcome:
        return self._listed(req, offset, size, _ENTRY_PLUS, codec.direntplus_unknown, self._plus)

    def _listed(
        self,
        req: Request,
        offset: int,
        size: int,
        fixed: int,
        dot: Callable[[bytes, int, int, int], bytes],
        one: Callable[[Dir, Entry, int], bytes | None],
    ) -> Outcome:
        """Names from *offset* on, as many as *size* bytes hold, each made by *one*."""
        node = self._door.directory(req.nodeid)
        entries = self._entries(node, offset)
        parts = self._dots(node, offset, size, dot, fixed)
        room = size - sum(map(len, parts))
        for position in range(max(0, offset - _DOTS), len(entries)):
            found = entries[position]
            if found is None:
                continue
            room -= fixed + (len(found.name) + 7 & ~7)
            if room < 0:
                break
            part = one(node, found, position + _DOTS + 1)
            if part is not None:
                parts.append(part)
        return codec.data(req.unique, b"".join(parts))

    def _plain(self, node: Dir, found: Entry, next_offset: int) -> bytes | None:
        """One name; None for one that is not to be shown."""
        ino = self._number(node, found)
        return None if ino is None else codec.dirent(found.name, ino, next_offset, found.kind)

    def _plus(self, node: Dir, found: Entry, next_offset: int) -> bytes | None:
        """One name with its node; None for one that was removed since the names were taken."""
        try:
            hit = self._lookup(node, found.name)
        except OSError:
            # Listed, but not to be looked at (refused redirect, metacopy ...).
            if self._fs.needs_lookup(node, found.name):
                raise
            return codec.direntplus_unknown(found.name, found.ino, next_offset, found.kind)
        if hit is None:
            if not self._fs.listed_although_hidden(node, found.name):
                return None
            return codec.direntplus_unknown(found.name, found.ino, next_offset, found.kind)
        child, st = hit
        if child.flags & nd.IMMUTABLE:
            # A lookup of its own, which sees to it that the kernel asks before it writes.
            self._door.stack.nodes.reap(child)
            return codec.direntplus_unknown(found.name, child.ino, next_offset, child.kind)
        child.lookups += 1
        nlink = self._fs.nlink_of(child, st)
        return codec.direntplus(found.name, next_offset, child.id, child.ino, nlink, st)

    def _number(self, node: Dir, found: Entry) -> int | None:
        """The st_ino of a name, without a lookup where the listing has it; None: not to be shown.

        The number of a merged directory is that of its top-most lower part, that of a copied-up
        object is that of its origin; everything else has the number of its real object.
        """
        name = found.name
        child = node.children.get(name)
        if child is not None:
            return child.ino
        certain = found.kind not in (stat.S_IFDIR, stat.S_IFCHR, stat.S_IFREG)
        if not node.merged and not node.impure and not node.whiteouts:
            certain = certain or found.kind != stat.S_IFCHR
        elif found.kind == stat.S_IFREG and not node.impure:
            certain = not self._may_hide(node)
        if certain and not self._door.stack.mixed_fs:
            return found.ino
        try:
            hit = self._lookup(node, name)
        except OSError:
            if self._fs.needs_lookup(node, name):
                raise
            return found.ino
        if hit is None:
            return found.ino if self._fs.listed_although_hidden(node, name) else None
        self._door.stack.nodes.reap(hit[0])
        return hit[0].ino

    @staticmethod
    def _may_hide(node: Dir) -> bool:
        """Whether files of a merged directory may be whiteouts of the attribute form."""
        return any(low.branch.xwhiteouts for low in node.lowers)

    @staticmethod
    def _dots(node: Dir, offset: int, size: int, pack: object, fixed: int) -> list[bytes]:
        parts: list[bytes] = []
        for position, (name, of) in enumerate(((b".", node), (b"..", node.parent or node))):
            if position >= offset and size >= (len(parts) + 1) * (fixed + 8):
                parts.append(pack(name, of.ino, position + 1, stat.S_IFDIR))  # type: ignore[operator]
        return parts


def _in_old_places(known: list[Entry | None], fresh: list[Entry | None]) -> list[Entry | None]:
    """*fresh* with every name at the position that it has in *known*, new ones at the end."""
    if known == fresh:
        return known
    left = {entry.name: entry for entry in fresh if entry is not None}
    placed = [left.pop(entry.name, None) if entry is not None else None for entry in known]
    return [*placed, *left.values()]

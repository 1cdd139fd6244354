"""Which layer provides a path, and what every other layer of the chain holds there.

The answer follows the lookup of the overlay and says of each layer where it was looked at, what is
there, whether it counts, and if not, which layer hides it and by what. A directory that was moved
(redirect mark) sends the layers below it to another path; what they have at the path asked for is
then hidden by the move. Path components are names of directories, symbolic links are not followed.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from . import ondisk, whiteout
from . import syscalls as sc
from .branch import RealDir
from .treeview import MergedView, Seen
from .walk import oserror
from .whiteout import Dialect

_KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
WHITEOUT: Final = "whiteout"
VISIBLE: Final = "visible"
MERGED: Final = "merged"
DATA: Final = "data"


@dataclass(frozen=True, slots=True)
class Hidden:
    """Why what a layer holds does not count: a layer above it holds something at *path*.

    *reason* is the kind of that object, or "opaque directory", or "moved directory".
    """

    layer: int
    path: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Held:
    """What one layer holds; *layer* counts from 0, the top-most.

    *kind* is None for nothing, "whiteout", or the type. *path* is where in the layer it is, with a
    slash in front. *role* is "visible" for what the merged view shows, "merged" for a directory
    that adds entries to the visible one, "data" for the file with the content of a visible file
    that has attributes only, "" for what does not count. *size* is that of a file in bytes.
    """

    layer: int
    path: bytes
    kind: str | None = None
    role: str = ""
    hidden: Hidden | None = None
    size: int = 0
    mode: int = 0
    mtime_ns: int = 0
    opaque: bool = False
    redirect: bytes | None = None
    metacopy: bool = False


def which(chain: Sequence[bytes], path: bytes, dialect: Dialect) -> list[Held]:
    """What each layer of *chain*, top-most first, holds at *path* of the merged view.

    The path is visible if one of the answers has the role "visible". Raises LayerError, OSError;
    EINVAL for a path with ``..`` or a malformed redirect mark.
    """
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise oserror(errno.EINVAL, path)
    with MergedView.open(chain, dialect) as view:
        return _Search(view).run(parts)


class _Search:
    """Goes down the components and remembers which layers dropped out, and why."""

    def __init__(self, view: MergedView) -> None:
        self.view = view
        self.dialect = view.dialect
        self.out: dict[int, Hidden] = {}

    def run(self, parts: list[bytes]) -> list[Held]:
        lowers = self.view.root.lowers
        if not parts:
            return [
                self._describe(low, b".", b"/", MERGED if n else VISIBLE)
                for n, low in enumerate(lowers)
            ]
        for depth, part in enumerate(parts[:-1], 1):
            self.view.trim()
            seen = self._first(lowers, part)
            lowers = self._enter(seen, b"/" + b"/".join(parts[:depth]))
        return self._answer(lowers, parts)

    def _answer(self, lowers: tuple[RealDir, ...], parts: list[bytes]) -> list[Held]:
        path = b"/" + b"/".join(parts)
        seen = self._first(lowers, parts[-1])
        taking_part = self._enter(seen, path)
        # What is at the path itself, or at the other path to which a move further up leads.
        found: dict[int, Held] = {}
        for low in lowers:
            found[_layer(low)] = self._describe(low, parts[-1], _path_of(low, parts[-1]))
        for branch in self.view.stack.lowers:
            if branch.index - 1 not in found:
                found[branch.index - 1] = self._literal(branch.root, parts, path)
        for number, low in enumerate(taking_part):
            assert low.parent is not None
            role = MERGED if number else VISIBLE
            where = _path_of(low.parent, low.name)
            found[_layer(low)] = self._describe(low.parent, low.name, where, role)
        if seen is not None and seen.dir is None and not self._is_whiteout(seen):
            self._mark_file(seen, found)
        return [self._explained(found[layer]) for layer in sorted(found)]

    def _mark_file(self, seen: Seen, found: dict[int, Held]) -> None:
        layer = _layer(seen.holder)
        found[layer] = replace(found[layer], role=VISIBLE)
        if found[layer].metacopy:
            holder, name = seen.data_place()
            where = _path_of(holder, name)
            found[_layer(holder)] = self._describe(holder, name, where, DATA)

    def _explained(self, held: Held) -> Held:
        if held.role or held.kind is None:
            return held
        return replace(held, hidden=self.out.get(held.layer))

    # --- one level -----------------------------------------------------------------------------

    def _first(self, lowers: tuple[RealDir, ...], name: bytes) -> Seen | None:
        """The first object under *name*, whiteouts included."""
        for position, low in enumerate(lowers):
            st = sc.lstat_or_none(name, low.at())
            if st is not None:
                seen = Seen(self.view, st, name, lowers, position)
                if stat.S_ISDIR(st.st_mode):
                    seen.dir = self.view.merged(seen)
                return seen
        return None

    def _enter(self, seen: Seen | None, path: bytes) -> tuple[RealDir, ...]:
        """The directories that merge as *seen*; notes what hides the layers below."""
        if seen is None:
            return ()
        if seen.dir is None:
            self._hide(_layer(seen.holder), path, self._kind(seen))
            return ()
        merged = seen.dir.lowers
        last = merged[-1]
        for low in merged:
            assert low.parent is not None
            held = self._describe(low.parent, low.name, path)
            if held.opaque and low is last:
                self._hide(_layer(low), path, "opaque directory")
            elif held.redirect is not None:
                self._hide(_layer(low), path, "moved directory", but=merged)
        for position in range(seen.position + 1, len(seen.parents)):
            low = seen.parents[position]
            st = sc.lstat_or_none(seen.name, low.at())
            if st is not None and not stat.S_ISDIR(st.st_mode):
                # A file below a directory does not show, and ends the search as a whiteout does.
                at = Seen(self.view, st, seen.name, seen.parents, position)
                self.out.setdefault(
                    _layer(low), Hidden(_layer(seen.holder), path, _KINDS[stat.S_IFDIR])
                )
                self._hide(_layer(low), path, self._kind(at), but=merged)
        return merged

    def _hide(self, layer: int, path: bytes, reason: str, *, but: tuple[RealDir, ...] = ()) -> None:
        """Note that *layer* hides all layers below it but some, where nothing hid them before."""
        spared = {_layer(low) for low in but}
        for below in range(layer + 1, len(self.view.stack.lowers)):
            if below not in spared:
                self.out.setdefault(below, Hidden(layer, path, reason))

    # --- one object ----------------------------------------------------------------------------

    def _is_whiteout(self, seen: Seen) -> bool:
        return whiteout.is_whiteout(self.dialect, seen.st, seen.name, seen.holder.at())

    def _kind(self, seen: Seen) -> str:
        return WHITEOUT if self._is_whiteout(seen) else _KINDS[seen.kind]

    def _literal(self, root: RealDir, parts: list[bytes], path: bytes) -> Held:
        """What a layer that takes no part has at the very path that was asked for."""
        holder = root
        for part in parts[:-1]:
            st = sc.lstat_or_none(part, holder.at())
            if st is None or not stat.S_ISDIR(st.st_mode):
                return Held(_layer(root), path)
            holder = holder.child(part)
        return self._describe(holder, parts[-1], path)

    def _describe(self, holder: RealDir, name: bytes, path: bytes, role: str = "") -> Held:
        dir_fd = holder.at()
        st = sc.lstat_or_none(name, dir_fd)
        if st is None:
            return Held(_layer(holder), path)
        seen = Seen(self.view, st, name, (holder,), 0)
        held = Held(
            _layer(holder),
            path,
            self._kind(seen),
            role,
            mode=stat.S_IMODE(st.st_mode),
            mtime_ns=st.st_mtime_ns,
        )
        if held.kind not in ("file", "directory"):
            return held
        keys = seen.names_of_xattrs()
        metacopy = held.kind == "file" and self.dialect.metacopy in keys
        redirect = opaque = None
        if self.dialect.redirect in keys and (metacopy or held.kind == "directory"):
            redirect = sc.getxattr_at(name, dir_fd, self.dialect.redirect)
        if self.dialect.opaque in keys and held.kind == "directory":
            opaque = sc.getxattr_at(name, dir_fd, self.dialect.opaque)
        return replace(
            held,
            size=st.st_size if held.kind == "file" else 0,
            opaque=opaque == ondisk.OPAQUE_YES,
            redirect=redirect,
            metacopy=metacopy,
        )


def _layer(directory: RealDir) -> int:
    return directory.branch.index - 1


def _path_of(holder: RealDir, name: bytes) -> bytes:
    """Path of *name* in *holder* from the root of its layer."""
    parts = [name]
    here: RealDir | None = holder
    while here is not None and here.parent is not None:
        parts.append(here.name)
        here = here.parent
    return b"/" + b"/".join(reversed(parts))

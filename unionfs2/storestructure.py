"""The structural steps of a store: short, under the store lock, whole or undone.

Each step is one rename of a layer directory, followed by what is derived from it. Whoever dies in
between leaves the state of the lock at "busy", and the next holder runs mend(). The first fsync
after a step makes it last; nothing that a step takes out is deleted before that.

Invariant: whatever becomes visible in HOME was durable before (Staging.seal()).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from . import mountcalls, ondisk, storelayout
from . import syscalls as sc
from .errors import (
    HasChildrenError,
    LayerExistsError,
    LayerInUseError,
    StoreError,
    UnknownLayerError,
    show,
)
from .storefiles import (
    is_temp_name,
    names_in,
    open_dir,
    opened_dir,
    read_file,
    remove_file,
    symlink_atomic,
    write_synced,
)
from .storehome import Home
from .storeindex import Index, scan
from .storelayout import name_of_id
from .storelock import LayerLock, StoreLock
from .storemodel import LayerId
from .storeread import Layer, read_record
from .storestaging import Staging, is_abandoned, move_in, move_to_trash


class Structure:
    """Home, lock and index of one open store."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.lock = StoreLock(home.state_fd if home.state_fd >= 0 else None, self.mend_locked)
        # Valid while the stamp is; touched under the store lock only.
        self._index: Index | None = None
        self._stamp: tuple[int, ...] = ()

    def current(self) -> Index:
        """The index, read again if it has to be. needs: store lock."""
        stamp = self._now()
        if self._index is None or stamp != self._stamp:
            self._index = scan(self.home.fd, self.links_fd)
            self._stamp = stamp
        return self._index

    @property
    def links_fd(self) -> int | None:
        """Descriptor of ``l``, None when it cannot be used."""
        return self.home.links_fd if self.home.links_fd >= 0 else None

    def _now(self) -> tuple[int, ...]:
        stamp = [self.lock.generation]
        for fd in (self.home.fd, self.home.links_fd):
            if fd >= 0:
                st = os.fstat(fd)
                stamp += [st.st_mtime_ns, st.st_nlink, st.st_ino]
        return tuple(stamp)

    def _restamp(self) -> None:
        """The index holds what this step did. needs: store lock, exclusive, after begin()."""
        self._stamp = self._now()

    def sync(self) -> None:
        """Make the last steps durable."""
        sc.fsync(self.home.fd)
        if self.home.links_fd >= 0:
            sc.fsync(self.home.links_fd)

    def exists(self, name: bytes) -> bool:
        """Whether HOME has an entry of this name, of whatever type."""
        return sc.lstat_or_none(name, self.home.fd) is not None

    def taken(self, layer: LayerId) -> LayerExistsError:
        """The exception for an id that is in use."""
        return LayerExistsError(
            f"layer {show(layer)} exists already in {show(self.home.path)}: choose another id"
        )

    def free_short_name(self) -> str:
        """A short name that no link has."""
        while True:
            short = storelayout.new_short_name()
            if self.links_fd is None or sc.lstat_or_none(short.encode(), self.links_fd) is None:
                return short

    def _refuse_without_links(self) -> None:
        if self.home.links_reason is not None:
            raise StoreError(self.home.links_reason)

    # --- steps ------------------------------------------------------------------------------------

    def appear(
        self,
        new: LayerId,
        parent: Layer | None,
        link: str,
        lower: tuple[str, ...],
        staging: Staging,
    ) -> str:
        """Make a sealed layer visible, durably; its link, which a clash may have changed.

        Raises LayerExistsError, UnknownLayerError (the parent went away), OSError; then nothing
        has changed.
        """
        self._refuse_without_links()
        name = name_of_id(new)
        with self.lock.exclusive() as held:
            index = self.current()
            _refuse_lost_parent(index, parent)
            while link in index.claims or link in index.links:
                link = self.free_short_name()
                staging.relink(link)
            if self.exists(name):
                raise self.taken(new)
            held.begin()
            move_in(self.home, self.home.staging_fd, staging.name, name)
            try:
                sc.symlink(
                    storelayout.link_target(new), link.encode("ascii"), dir_fd=self.home.links_fd
                )
            except BaseException:
                self._take_back(new, staging)
                raise
            index.add(new, link, lower)
            index.set_link(link, new)
            self._restamp()
            staging.installed = True
        try:
            self.sync()
        except OSError:
            self._disappear(new, link, staging)
            raise
        return link

    def _take_back(self, layer: LayerId, staging: Staging) -> None:
        sc.rename(name_of_id(layer), self.home.fd, staging.name, self.home.staging_fd)
        staging.installed = False

    def _disappear(self, new: LayerId, link: str, staging: Staging) -> None:
        """Undo appear(), unless somebody has built on it."""
        with contextlib.suppress(OSError, StoreError), self.lock.exclusive() as held:
            index = self.current()
            if not index.children(new) and index.own.get(new) == link:
                held.begin()
                self._take_back(new, staging)
                self._drop_links(index, new)
                index.remove(new)
                self._restamp()

    def exchange(
        self,
        old: Layer,
        parent: Layer | None,
        lower: tuple[str, ...],
        staging: Staging,
        lock: LayerLock,
    ) -> None:
        """Put a sealed layer in the place of *old*, whose directory *staging* owns afterwards."""
        name = name_of_id(old.id)
        with self.lock.exclusive() as held:
            index = self.current()
            refuse_children(index, old.id, "changed")
            _refuse_lost_parent(index, parent)
            held.begin()
            self._swap(staging, name)
            index.remove(old.id)
            index.add(old.id, old.link, lower)
            self._restamp()
            # The lock follows the layer.
            lock.fd, staging.base_fd = staging.base_fd, lock.fd
        self.sync()

    def _swap(self, staging: Staging, name: bytes) -> None:
        home = self.home
        try:
            sc.rename(staging.name, home.staging_fd, name, home.fd, sc.RENAME_EXCHANGE)
            return
        except OSError as exc:
            if exc.errno not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
                raise
        # Two renames; mend() does the second one if we cannot.
        write_synced(staging.base_fd, ondisk.REPLACES_NAME, name)
        sc.fsync(staging.base_fd)
        aside = staging.name + b"-old"
        sc.rename(name, home.fd, aside, home.staging_fd)
        try:
            sc.rename(staging.name, home.staging_fd, name, home.fd)
        except BaseException:
            sc.rename(aside, home.staging_fd, name, home.fd)
            raise
        staging.name = aside
        remove_file(staging.base_fd, ondisk.REPLACES_NAME)

    def rename(self, old: Layer, target: LayerId, lock: LayerLock) -> None:
        """Rename a layer whose record says already that this commits it."""
        self._refuse_without_links()
        home = self.home
        before, after = name_of_id(old.id), name_of_id(target)
        with self.lock.exclusive() as held:
            index = self.current()
            if self.exists(after):
                raise self.taken(target)
            held.begin()
            move_in(home, home.fd, before, after)
            names = index.names_of(old.id)
            try:
                for short in names:
                    self.point(short, target)
                self._mark(lock.fd)
            except OSError:
                sc.rename(after, home.fd, before, home.fd)
                for short in names:
                    self.point(short, old.id)
                remove_file(lock.fd, ondisk.COMMITTED_NAME)
                raise
            index.rename(old.id, target)
            self._restamp()
            lock.id = target
        sc.fsync(lock.fd)
        self.sync()

    def _mark(self, fd: int) -> None:
        with contextlib.suppress(FileExistsError):
            write_synced(fd, ondisk.COMMITTED_NAME, b"", owner=self.home.owner)

    def mark(self, fd: int) -> None:
        """Write the mark of a committed layer, durably."""
        self._mark(fd)
        sc.fsync(fd)

    def point(self, short: str, layer: LayerId) -> None:
        """Make ``l/<short>`` lead to *layer*, whatever was there. needs: store lock, exclusive."""
        symlink_atomic(self.home.links_fd, short.encode("ascii"), storelayout.link_target(layer))

    def take_out(self, layer: LayerId) -> bytes | None:
        """Move a layer to the trash, durably; its name there.

        Raises HasChildrenError, OSError. A link that cannot be removed is left to mend().
        """
        with self.lock.exclusive() as held:
            index = self.current()
            refuse_children(index, layer, "removed")
            held.begin()
            trashed = move_to_trash(self.home, self.home.fd, name_of_id(layer))
            try:
                self._drop_links(index, layer)
                index.remove(layer)
                self._restamp()
            except OSError:
                self._index = None
                held.leave_busy()
        self.sync()
        return trashed

    def _drop_links(self, index: Index, layer: LayerId) -> None:
        for short in index.leading.get(layer, set()).copy():
            sc.unlink(short.encode("ascii"), dir_fd=self.home.links_fd)
            index.drop_link(short)

    # --- mending ----------------------------------------------------------------------------------

    def mend_locked(self) -> bool:
        """Finish what a dead process began; False when the disk would not let us.

        needs: store lock, exclusive, after begin(). Links that are missing, or lead to no layer,
        are made again from the layers' own files; links to nothing that nobody names are removed;
        committed layers are marked so. What is wrong in any other way is left to check().
        """
        self._index = None
        try:
            self._finish_swaps()
            if self.links_fd is not None:
                self._mend_links(self.links_fd)
            self.sync()
        except OSError:
            return False  # a full disk, perhaps: nobody should be kept from removing layers
        return True

    def _mend_links(self, links_fd: int) -> None:
        for name in names_in(links_fd):
            if is_temp_name(name):
                sc.unlink(name, dir_fd=links_fd)
        index = scan(self.home.fd, links_fd)
        for short in self.dead_links(index):
            sc.unlink(short.encode("ascii"), dir_fd=links_fd)
        for short, layer in wrong_links(index):
            st = sc.lstat_or_none(short.encode("ascii"), links_fd)
            if st is None or stat.S_ISLNK(st.st_mode):
                self.point(short, layer)
        for layer in index.own:
            self._mend_mark(layer)

    def dead_links(self, index: Index) -> list[str]:
        """Links that lead to no layer and that no layer names."""
        named = {short for lower in index.lowers.values() for short in lower}
        return [
            short
            for short, target in index.links.items()
            if short not in index.claims
            and short not in named
            and target is not None
            and not self.exists(name_of_id(target))
        ]

    def _mend_mark(self, layer: LayerId) -> None:
        try:
            fd = open_dir(self.home.fd, name_of_id(layer))
        except OSError:
            return
        try:
            if sc.lstat_or_none(ondisk.COMMITTED_NAME, fd) is None and self._is_renamed(fd, layer):
                self.mark(fd)
        finally:
            os.close(fd)

    @staticmethod
    def _is_renamed(fd: int, layer: LayerId) -> bool:
        try:
            return read_record(fd, layer).committed_as == layer
        except StoreError:
            return False

    def _finish_swaps(self) -> None:
        """Complete _swap() where it died between its two renames."""
        home = self.home
        if home.staging_fd < 0:
            return
        for name in names_in(home.staging_fd):
            target = self._replaced_by(name)
            if target is not None and not self.exists(target):
                sc.rename(name, home.staging_fd, target, home.fd)
                with opened_dir(home.fd, target) as fd:
                    remove_file(fd, ondisk.REPLACES_NAME)

    def _replaced_by(self, name: bytes) -> bytes | None:
        if not is_abandoned(self.home, name):
            return None
        try:
            with opened_dir(self.home.staging_fd, name) as fd:
                target = read_file(fd, ondisk.REPLACES_NAME, ondisk.ID_BYTES_MAX)
        except OSError:
            return None
        return None if storelayout.id_of_name(target) is None else target


def wrong_links(index: Index) -> list[tuple[str, LayerId]]:
    """Short names whose link is missing or leads to no layer, and the layer that has the name."""
    return [
        (short, owner)
        for short, claimants in index.claims.items()
        if (owner := index.resolve(short)) in claimants and index.links.get(short) != owner
    ]


def refuse_mounted(home: Home, layer: LayerId) -> None:
    """Raise LayerInUseError when something is mounted at or below HOME/<id>."""
    mounts = mountcalls.mounts_below(os.path.join(home.path, name_of_id(layer)))
    if mounts:
        raise LayerInUseError(
            f"layer {show(layer)} is in use: {show(mounts[0].target)} is mounted; unmount it first"
        )


def refuse_children(index: Index, layer: LayerId, what: str) -> None:
    """Raise HasChildrenError when *layer*, about to be *what*, has children."""
    names = sorted(index.children(layer))
    if not names:
        return
    shown = ", ".join(show(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    count = "another layer is" if len(names) == 1 else f"{len(names)} other layers are"
    raise HasChildrenError(f"layer {show(layer)} cannot be {what}: {count} built on it: {shown}")


def _refuse_lost_parent(index: Index, parent: Layer | None) -> None:
    if parent is not None and (
        index.own.get(parent.id) != parent.link or index.lowers.get(parent.id) != parent.lower
    ):
        raise UnknownLayerError(
            f"the parent layer {show(parent.id)} has been removed or changed by somebody else"
        )

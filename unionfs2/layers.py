"""The layer store: which layers there are, what they are built on, and how that changes.

A store is a directory laid out as Docker's overlay2 lays it out (storelayout), with this project's
own state in ``.unionfs2`` (storehome). Layers written by Docker work as they are.

How changes stay whole: a new layer is complete and durable in the staging directory before one
rename makes it visible; a removed one disappears by one rename; a filled one takes the place of the
empty one by an exchange of names; a committed one is renamed, and its record says beforehand that
this rename commits it. What is derived, the links in ``l``, follows, and is mended whenever a
process died in between (storestructure).

Who may do what when: storelock. Every method takes the locks that it needs; those with a parameter
*lock* accept the lock on their layer if the caller holds it already (layer_lock()), and must be
given it then, because a second lock would wait for the first.

Invariant: HOME/<id> is a complete layer at any instant.
Invariant: while the store lock is not held, ``l/<link of id>`` leads to ``../<id>/diff`` for every
layer that this program made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from . import ondisk, storelayout
from .closing import Closing
from .errors import (
    CommittedError,
    DepthError,
    QuotaError,
    StoreError,
    show,
)
from .store_options import StoreOptions
from .storecopy import copy_tree
from .storefiles import FILE_MODE, Owner, opened_dir, write_file_atomic
from .storehome import Home
from .storeindex import Index, looks_like_layer, scan
from .storelock import LayerLock, lock_layer
from .storemodel import LayerId, Quota
from .storeread import Layer, open_layer, opened_diff, read_layer, read_record
from .storerecord import DialectName, Pending, Record, format_record
from .storestaging import Staging, is_abandoned
from .storestructure import Structure, refuse_children, refuse_mounted
from .storetrash import clear_staging, delete_trash, empty_trash
from .storetrees import Undeleted

__all__ = ["KEEP", "Layer", "LayerLock", "LayerStore", "Record", "Staging", "Undeleted"]


class _Keep:
    """Type of KEEP."""


#: For install_diff(): the layer stays on its parent.
KEEP: Final = _Keep()


class LayerStore(Closing):
    """An open store. Safe for threads; several processes may have it open."""

    def __init__(self, home: Home, options: StoreOptions) -> None:
        self._home = home
        self._structure = Structure(home)
        self.options = options

    @classmethod
    def open(
        cls,
        home: bytes,
        *,
        options: StoreOptions | None = None,
        create: bool = True,
        owner: tuple[int, int] | None = None,
    ) -> LayerStore:
        """Open the store at *home*; with *create* it is made if there is none.

        *owner* (uid, gid) owns the directories that are made: root of the containers. Clears up
        what dead processes left. Raises StoreError (not a store, a newer format), OSError.
        """
        owned = None if owner is None else Owner(*owner)
        store = cls(Home(home, owned, create=create), options or StoreOptions())
        try:
            store._tidy()
        except BaseException:
            store.close()
            raise
        return store

    def _tidy(self) -> None:
        with self._structure.lock.shared():
            pass  # mends after a crash
        if not self.read_only:
            if self._home.links_made:
                self.mend()
            self.clear_staging()
            self.empty_trash()

    def close(self) -> None:
        """Close the store; layers in the making are lost."""
        self._home.close()

    # --- places -----------------------------------------------------------------------------------

    @property
    def home(self) -> bytes:
        """Path of the store, absolute and without links."""
        return self._home.path

    @property
    def home_fd(self) -> int:
        """Descriptor of HOME."""
        return self._home.fd

    @property
    def state_fd(self) -> int:
        """Descriptor of HOME/.unionfs2; -1 in a read-only store that has none."""
        return self._home.state_fd

    @property
    def state_path(self) -> bytes:
        """Path of HOME/.unionfs2."""
        return os.path.join(self.home, ondisk.STORE_NAME)

    @property
    def empty_path(self) -> bytes:
        """An empty directory, for mounts that need one more lower."""
        return os.path.join(self.state_path, ondisk.EMPTY_NAME)

    @property
    def owner(self) -> tuple[int, int] | None:
        """Who owns new directories, None for the caller."""
        return self._home.owner

    @property
    def read_only(self) -> bool:
        """Whether nothing can be changed here."""
        return self._home.state_fd < 0 or self._structure.lock.read_only

    @property
    def structure(self) -> Structure:
        """Home, lock and index, for those who check and mend the store."""
        return self._structure

    def layer_path(self, layer: LayerId) -> bytes:
        """HOME/<id>."""
        return os.path.join(self.home, storelayout.name_of_id(layer))

    def diff_path(self, layer: LayerId) -> bytes:
        """HOME/<id>/diff."""
        return os.path.join(self.layer_path(layer), ondisk.DIFF_NAME)

    def work_path(self, layer: LayerId) -> bytes:
        """HOME/<id>/work."""
        return os.path.join(self.layer_path(layer), ondisk.WORK_NAME)

    def merged_path(self, layer: LayerId) -> bytes:
        """HOME/<id>/merged."""
        return os.path.join(self.layer_path(layer), ondisk.MERGED_NAME)

    def lower_dirs(self, layer: Layer) -> tuple[bytes, ...]:
        """Diff directories below *layer*, uppermost first."""
        return tuple(self.diff_path(below) for below in layer.chain)

    def lower_links(self, layer: Layer) -> tuple[bytes, ...]:
        """The same through the short links: HOME/l/X."""
        head = os.path.join(self.home, ondisk.LINKS_NAME)
        return tuple(os.path.join(head, short.encode("ascii")) for short in layer.lower)

    # --- asking -----------------------------------------------------------------------------------

    def ids(self) -> tuple[LayerId, ...]:
        """All layers, damaged ones too, sorted."""
        with self._structure.lock.shared():
            return tuple(self._structure.current().ids)

    def exists(self, layer: LayerId) -> bool:
        """Whether there is such a layer, though perhaps a damaged one."""
        try:
            name = storelayout.name_of_id(storelayout.check_id(layer))
            with opened_dir(self._home.fd, name) as fd:
                return looks_like_layer(fd)
        except (OSError, StoreError):
            return False

    def layer(self, layer: LayerId) -> Layer:
        """What is known of a layer. Raises UnknownLayerError, DamagedLayerError, StoreError.

        A missing link in ``l`` is made again on the way.
        """
        with self._structure.lock.shared():
            found, broken = read_layer(self._home, self._structure.current(), layer)
        if broken and not self.read_only:
            self.mend()
        return found

    def children(self, layer: LayerId) -> tuple[LayerId, ...]:
        """Layers built directly on this one, sorted; empty also for an unknown layer."""
        with self._structure.lock.shared():
            return tuple(sorted(self._structure.current().children(layer)))

    def parents(self) -> dict[LayerId, LayerId | None]:
        """The parent of every layer, None for base layers and where it cannot be told."""
        with self._structure.lock.shared():
            index = self._structure.current()
            return {layer: index.parent(layer) for layer in index.ids}

    def index(self) -> Index:
        """The structure as it is now, to look at; it is not kept up to date."""
        with self._structure.lock.shared():
            return scan(self._home.fd, self._structure.links_fd)

    # --- locks ------------------------------------------------------------------------------------

    def layer_lock(self, layer: LayerId, *, wait: bool = True) -> LayerLock:
        """The lock on a layer, a context manager. Raises UnknownLayerError, LayerInUseError."""
        return lock_layer(layer, lambda: open_layer(self._home, layer), wait=wait)

    @contextlib.contextmanager
    def layer_locks(self, layers: Iterable[LayerId]) -> Iterator[dict[LayerId, LayerLock]]:
        """Locks on several layers, in the one order that cannot deadlock."""
        with contextlib.ExitStack() as stack:
            yield {
                layer: stack.enter_context(self.layer_lock(layer)) for layer in sorted(set(layers))
            }

    @contextlib.contextmanager
    def _locked(self, layer: LayerId, lock: LayerLock | None) -> Iterator[LayerLock]:
        if lock is not None:
            assert lock.fd >= 0, "the lock given is closed"
            assert lock.id == layer, "the lock given is on another layer"
            yield lock
            return
        with self.layer_lock(layer) as own:
            yield own

    # --- making -----------------------------------------------------------------------------------

    def create(
        self,
        layer: LayerId | None = None,
        parent: LayerId | None = None,
        *,
        writable: bool = False,
        label: str = "",
        quota: Quota | None = None,
        dialect: DialectName | None = None,
        template: LayerId | None = None,
        staging: Staging | None = None,
        commit: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> Layer:
        """Make a layer on *parent*; it appears whole, by one rename, or not at all.

        Its diff is empty, or a copy of that of *template*, or the one in *staging*, which is used
        up. *commit* freezes it at once; *record* holds more fields of Record. The dialect is that
        of the template, or trusted. Raises LayerExistsError, UnknownLayerError and
        DamagedLayerError (of the parent), DepthError, QuotaError, StoreError, OSError; then
        nothing has changed.
        """
        if quota and not writable:
            raise QuotaError(
                "limits (size=, inodes=) are possible for writable layers only: create the layer"
                " writable, or leave them out"
            )
        assert template is None or staging is None, "one content is enough"
        new = storelayout.new_id() if layer is None else storelayout.check_id(layer)
        if self._structure.exists(storelayout.name_of_id(new)):
            raise self._structure.taken(new)
        below = None if parent is None else self.layer(parent)
        if template is not None and dialect is None:
            dialect = self.layer(template).record.dialect
        fields: dict[str, Any] = {
            "writable": writable,
            "dialect": dialect or "trusted",
            "label": label,
            "quota": quota or None,
            "created": time.time(),
            "committed_as": new if commit else None,
        }
        filled = staging is not None or template is not None
        with contextlib.ExitStack() as stack:
            if staging is None:
                staging = stack.enter_context(self.stage(parent))
            if template is not None:
                with opened_diff(self._home, template) as diff_fd:
                    copy_tree(diff_fd, staging.fd)
            return self._install_new(
                new,
                below,
                staging,
                Record(**{**fields, **(record or {})}),
                filled=filled,
            )

    def _install_new(
        self,
        new: LayerId,
        parent: Layer | None,
        staging: Staging,
        record: Record,
        *,
        filled: bool,
    ) -> Layer:
        lower = self._lower_on(new, parent)
        commit = record.committed_as == new
        link = self._structure.free_short_name()
        staging.seal(link, lower, record, committed=commit, filled=filled)
        link = self._structure.appear(new, parent, link, lower, staging)
        chain = (parent.id, *parent.chain) if parent is not None else ()
        return Layer(new, link, lower, chain, commit, commit, staging.record)

    def _lower_on(self, new: LayerId, parent: Layer | None) -> tuple[str, ...]:
        """The lower of a layer on *parent*. Raises DepthError."""
        if parent is None:
            return ()
        lower = (parent.link, *parent.lower)
        if len(lower) > self.options.layers_max:
            raise DepthError(
                f"layer {show(new)} would have {len(lower)} layers below it and the store allows"
                f" {self.options.layers_max}: flatten one of them, or raise the limit with the"
                " storage option layers_max"
            )
        return lower

    @contextlib.contextmanager
    def stage(self, like: LayerId | None = None) -> Iterator[Staging]:
        """A layer in the making, for install_diff() or create(); thrown away if not used.

        Its diff root has mode, owner and attributes of the diff root of *like*: the parent for a
        new layer, the layer itself for one that is filled.
        """
        with contextlib.ExitStack() as stack:
            with self._structure.lock.shared():
                self._refuse_read_only()
                model = None
                if like is not None:
                    model = stack.enter_context(opened_diff(self._home, like))
                staging = Staging.make(self._home)
                stack.callback(self._give_up, staging)
            if model is not None:
                staging.inherit(model)
            yield staging

    def _give_up(self, staging: Staging) -> None:
        trashed = staging.close()
        if trashed is not None:
            delete_trash(self._home, trashed)

    def _refuse_read_only(self) -> None:
        if self.read_only:
            raise StoreError(
                f"the store {show(self.home)} cannot be changed: it is read-only",
                errno=errno.EROFS,
            )

    # --- filling ----------------------------------------------------------------------------------

    def install_diff(
        self,
        layer: LayerId,
        staging: Staging,
        *,
        lock: LayerLock | None = None,
        parent: LayerId | _Keep | None = KEEP,
        commit: bool = False,
        **record: Any,
    ) -> Layer:
        """Replace the content of *layer* by what is staged, in one step, and change its record.

        A ``tar-split`` belongs into ``staging.base_fd`` before. *parent* moves the layer onto
        another one. The layer lock given is on the new directory afterwards. Raises
        CommittedError, HasChildrenError, LayerInUseError (mounted), DepthError, OSError; then
        nothing has changed, unless it is the last sync that failed.
        """
        with self._locked(layer, lock) as held:
            old = self.layer(layer)
            self._refuse_change(old)
            below, lower = None, old.lower
            if not isinstance(parent, _Keep):
                below = None if parent is None else self.layer(parent)
                lower = self._lower_on(layer, below)
                if old.link in lower:
                    raise StoreError(f"layer {show(layer)} cannot be built on itself")
            if commit:
                record["committed_as"] = layer
            changed = dataclasses.replace(old.record, **record)
            staging.seal(old.link, lower, changed, committed=commit, filled=True)
            self._structure.exchange(old, below, lower, staging, held)
        return self.layer(layer)

    def _refuse_change(self, layer: Layer) -> None:
        with self._structure.lock.shared():
            refuse_children(self._structure.current(), layer.id, "changed")
        if layer.committed:
            raise CommittedError(
                f"layer {show(layer.id)} is committed and never changes again: create a layer"
                " on top of it"
            )
        refuse_mounted(self._home, layer.id)

    def update_record(
        self, layer: LayerId, *, lock: LayerLock | None = None, **fields: Any
    ) -> Record:
        """Change fields of the record, durably; also of committed layers."""
        with self._locked(layer, lock) as held:
            record = dataclasses.replace(read_record(held.fd, layer), **fields)
            self._write_record(held.fd, record)
        return record

    def _write_record(self, fd: int, record: Record, pending: Pending | None = None) -> None:
        text = format_record(record, pending)
        write_file_atomic(fd, ondisk.RECORD_NAME, text, FILE_MODE, self._home.owner)

    # --- committing -------------------------------------------------------------------------------

    def freeze(self, layer: LayerId, *, lock: LayerLock | None = None, **fields: Any) -> Layer:
        """Commit a layer under the name it has; no change if it is committed already."""
        with self._locked(layer, lock) as held:
            found = self.layer(layer)
            record = dataclasses.replace(found.record, committed_as=layer, **fields)
            if record != found.record:
                self._write_record(held.fd, record)
            self._structure.mark(held.fd)
        return self.layer(layer)

    def commit(
        self,
        layer: LayerId,
        new: LayerId | None = None,
        *,
        lock: LayerLock | None = None,
        **fields: Any,
    ) -> Layer:
        """Freeze a layer under the id *new*, a generated one if None; the old id is gone.

        Raises LayerExistsError, CommittedError, LayerInUseError (mounted), OSError; then the
        layer is what it was, unless it is the last sync that failed.
        """
        target = storelayout.new_id() if new is None else storelayout.check_id(new)
        if target == layer:
            return self.freeze(layer, lock=lock, **fields)
        with self._locked(layer, lock) as held:
            found = self.layer(layer)
            self._refuse_commit(found)
            if self._structure.exists(storelayout.name_of_id(target)):
                raise self._structure.taken(target)
            fields = {"writable": False, **fields, "committed_as": target}
            record = dataclasses.replace(found.record, **fields)
            self._write_record(held.fd, found.record, Pending(target, record))
            self._structure.rename(found, target, held)
            with contextlib.suppress(OSError):
                self._write_record(held.fd, record)  # says the same in fewer words
        return self.layer(target)

    def _refuse_commit(self, layer: Layer) -> None:
        if layer.frozen:
            raise CommittedError(f"layer {show(layer.id)} is committed already")
        refuse_mounted(self._home, layer.id)

    # --- removing ---------------------------------------------------------------------------------

    def discard(self, layer: LayerId, *, lock: LayerLock | None = None) -> list[Undeleted]:
        """Remove a layer, damaged or not: its name at once, its content after that.

        Returns what could not be deleted and stays in the trash. Raises UnknownLayerError,
        HasChildrenError, LayerInUseError (mounted), OSError; then the layer is what it was,
        unless it is the last sync that failed.
        """
        with self._locked(layer, lock) as held:
            refuse_mounted(self._home, layer)
            trashed = self._structure.take_out(layer)
            # Before anything is deleted: who waits for the layer learns at once that it is gone.
            held.close()
        return [] if trashed is None else delete_trash(self._home, trashed)

    # --- tidying ----------------------------------------------------------------------------------

    def empty_trash(self) -> list[Undeleted]:
        """Delete what removals left behind; returns what could not be deleted."""
        self._refuse_read_only()
        return empty_trash(self._home)

    def clear_staging(self) -> int:
        """Throw away layers whose makers died; how many there were."""
        return clear_staging(self._home, self._structure.lock)

    def is_abandoned(self, name: bytes) -> bool:
        """Whether nobody works on the staged layer *name* (of Staging) any more."""
        with self._structure.lock.shared():
            return is_abandoned(self._home, name)

    def mend(self) -> None:
        """Make links again that can be told from the layers, remove those to nothing."""
        with self._structure.lock.exclusive() as held:
            held.begin()
            if not self._structure.mend_locked():
                held.leave_busy()

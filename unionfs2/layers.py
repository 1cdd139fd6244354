"""The layer store: which layers there are, what they are built on, and how that changes.

A store is a directory laid out as Docker's overlay2 lays it out (storelayout), with this project's
own state in ``.unionfs2`` (storehome). Layers written by Docker work as they are.

How changes stay whole: a new layer is complete and durable in the staging directory before one
rename makes it visible; a removed one disappears by one rename; a filled one takes the place of the
empty one by an exchange of names; a committed one is renamed, and its record says beforehand that
this rename commits it. What is derived, the links in ``l``, follows, and is mended whenever a
process died in between: the state of the store lock tells.

Who may do what when: storelock. Every method takes the locks that it needs; those with a parameter
*lock* accept the lock on their layer if the caller holds it already (layer_lock()).

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from . import mountcalls, ondisk, storelayout
from . import syscalls as sc
from .errors import (
    CommittedError,
    DamagedLayerError,
    DepthError,
    HasChildrenError,
    LayerExistsError,
    LayerInUseError,
    QuotaError,
    StoreError,
    UnknownLayerError,
    show,
)
from .store_options import StoreOptions
from .storecopy import copy_tree
from .storefiles import (
    FILE_MODE,
    Owner,
    Undeleted,
    delete_tree,
    names_in,
    open_dir,
    opened_dir,
    read_file,
    symlink_atomic,
    write_file_atomic,
    write_synced,
)
from .storehome import Home
from .storeindex import Index, looks_like_layer, read_link, read_lower, scan
from .storelock import Held, LayerLock, StoreLock, lock_layer, try_lock
from .storemodel import LayerId, Quota
from .storerecord import (
    RECORD_BYTES_MAX,
    DialectName,
    Record,
    format_record,
    parse_record,
)
from .storestaging import Staging, move_in, move_to_trash

__all__ = ["KEEP", "Layer", "LayerLock", "LayerStore", "Record", "Staging"]


class _Keep:
    """Type of KEEP."""


#: For install_diff(): the layer stays on its parent.
KEEP: Final = _Keep()


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, as its files describe it at one moment."""

    id: LayerId
    link: str  # short name
    lower: tuple[str, ...]  # short names below, uppermost first
    chain: tuple[LayerId, ...]  # the layers that those mean
    committed: bool  # never changes again: marked so, or has children
    record: Record

    @property
    def parent(self) -> LayerId | None:
        """The layer directly below."""
        return self.chain[0] if self.chain else None


class LayerStore:
    """An open store. Safe for threads; several processes may have it open."""

    def __init__(self, home: Home, options: StoreOptions) -> None:
        self._home = home
        self.options = options
        self._lock = StoreLock(home.state_fd if home.state_fd >= 0 else None, self._mend)
        # Valid while the stamp is; touched under the store lock only.
        self._index: Index | None = None
        self._stamp: tuple[int, ...] = ()

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
        place = Home(home, owned, create=create)
        store = cls(place, options or StoreOptions())
        try:
            with store._lock.shared():
                pass  # mends after a crash
            if not store.read_only:
                store.clear_staging()
                store.empty_trash()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close the store; layers in the making are lost."""
        self._home.close()

    def __enter__(self) -> LayerStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
        return self._home.state_fd < 0 or self._lock.read_only

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
        with self._lock.shared():
            return tuple(self._current().ids)

    def exists(self, layer: LayerId) -> bool:
        """Whether there is such a layer, though perhaps a damaged one."""
        try:
            with opened_dir(
                self._home.fd, storelayout.name_of_id(storelayout.check_id(layer))
            ) as fd:
                return looks_like_layer(fd)
        except (OSError, StoreError):
            return False

    def layer(self, layer: LayerId) -> Layer:
        """What is known of a layer. Raises UnknownLayerError, DamagedLayerError, StoreError.

        A missing link in ``l`` is made again on the way.
        """
        with self._lock.shared():
            found, broken = self._read(layer)
        if broken and not self.read_only:
            with self._lock.exclusive() as held:
                held.begin()
                self._mend()
        return found

    def children(self, layer: LayerId) -> tuple[LayerId, ...]:
        """Layers built directly on this one, sorted; empty also for an unknown layer."""
        with self._lock.shared():
            return tuple(sorted(self._current().children(layer)))

    def parents(self) -> dict[LayerId, LayerId | None]:
        """The parent of every layer, None for base layers and where it cannot be told."""
        with self._lock.shared():
            index = self._current()
            return {layer: index.parent(layer) for layer in index.ids}

    def index(self) -> Index:
        """The structure as it is now, to look at. Not kept up to date."""
        with self._lock.shared():
            return scan(self._home.fd, self._links_fd())

    def _links_fd(self) -> int | None:
        return self._home.links_fd if self._home.links_fd >= 0 else None

    def _current(self) -> Index:
        """The index, read again if it has to be. needs: store lock."""
        stamp = self._now()
        if self._index is None or stamp != self._stamp:
            self._index = scan(self._home.fd, self._links_fd())
            self._stamp = stamp
        return self._index

    def _now(self) -> tuple[int, ...]:
        links = self._home.links_fd
        times = [os.fstat(fd).st_mtime_ns for fd in (self._home.fd, links) if fd >= 0]
        return (self._lock.generation, *times)

    def _read(self, layer: LayerId) -> tuple[Layer, bool]:
        """The layer, and whether a link has to be mended. needs: store lock."""
        fd = self._open_layer(layer)
        try:
            link = read_link(fd, layer)
            lower = read_lower(fd, layer, link)
            record = self._read_record(fd, layer)
            marked = sc.lstat_or_none(ondisk.COMMITTED_NAME, fd) is not None
            if sc.lstat_or_none(ondisk.DIFF_NAME, fd) is None:
                raise storelayout.damaged(layer, "diff", "is missing")
        finally:
            os.close(fd)
        index = self._current()
        if self._home.links_reason is not None and lower:
            raise DamagedLayerError(
                f"layer {show(layer)} cannot be used: {self._home.links_reason}"
            )
        chain, broken = self._chain(index, layer, link, lower)
        committed = marked or record.committed_as == layer or bool(index.children(layer))
        return Layer(layer, link, lower, chain, committed, record), broken

    @staticmethod
    def _chain(
        index: Index, layer: LayerId, link: str, lower: tuple[str, ...]
    ) -> tuple[tuple[LayerId, ...], bool]:
        if index.resolve(link) != layer:
            others = sorted(index.claims.get(link, set()) - {layer})
            whose = index.links.get(link) or next(iter(others), None)
            raise storelayout.damaged(
                layer, "link", f"holds {link}, which belongs to layer {show(whose)}"
            )
        broken = index.links.get(link) != layer
        chain = []
        for short in lower:
            below = index.resolve(short)
            if below is None:
                raise storelayout.damaged(layer, "lower", _unresolved(index, short))
            if below == layer:
                raise storelayout.damaged(layer, "lower", f"names the layer itself (l/{short})")
            broken |= index.links.get(short) != below
            chain.append(below)
        return tuple(chain), broken

    def _open_layer(self, layer: LayerId) -> int:
        name = storelayout.name_of_id(storelayout.check_id(layer))
        try:
            fd = open_dir(self._home.fd, name)
        except FileNotFoundError as exc:
            raise UnknownLayerError(
                f"there is no layer {show(layer)} in {show(self.home)}"
            ) from exc
        except (NotADirectoryError, OSError) as exc:
            if exc.errno not in {errno.ENOTDIR, errno.ELOOP}:
                raise
            raise DamagedLayerError(
                f"layer {show(layer)} is damaged: {show(self.layer_path(layer))} is not a"
                f" directory; {storelayout.WAY_OUT}"
            ) from exc
        if not looks_like_layer(fd):
            os.close(fd)
            raise UnknownLayerError(
                f"{show(self.layer_path(layer))} is not a layer: it has neither link nor diff"
            )
        return fd

    @staticmethod
    def _read_record(fd: int, layer: LayerId) -> Record:
        try:
            return parse_record(layer, read_file(fd, ondisk.RECORD_NAME, RECORD_BYTES_MAX))
        except FileNotFoundError:
            return Record()
        except OSError as exc:
            raise storelayout.damaged(
                layer, "layer.json", f"cannot be read: {os.strerror(exc.errno or 0)}"
            ) from exc

    # --- locks ------------------------------------------------------------------------------------

    def layer_lock(self, layer: LayerId, *, wait: bool = True) -> LayerLock:
        """The lock on a layer, a context manager. Raises UnknownLayerError, LayerInUseError."""
        return lock_layer(layer, lambda: self._open_layer(layer), wait=wait)

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
        dialect: DialectName = "trusted",
        template: LayerId | None = None,
        staging: Staging | None = None,
        commit: bool = False,
        record: dict[str, Any] | None = None,
    ) -> Layer:
        """Make a layer on *parent*; it appears whole, by one rename, or not at all.

        Its diff is empty, or a copy of that of *template*, or the one in *staging*, which is used
        up. *commit* freezes it at once; *record* holds more fields of Record. Raises
        LayerExistsError, UnknownLayerError and DamagedLayerError (of the parent), DepthError,
        QuotaError, StoreError, OSError; then nothing has changed.
        """
        if quota and not writable:
            raise QuotaError(
                "a limit (size=, inodes=) is possible for writable layers only: create the layer"
                " writable or leave the limit out"
            )
        new = storelayout.new_id() if layer is None else storelayout.check_id(layer)
        if sc.lstat_or_none(storelayout.name_of_id(new), self._home.fd) is not None:
            raise self._taken(new)
        below = None if parent is None else self.layer(parent)
        lower = self._lower_on(new, below)
        fields: dict[str, Any] = {
            "writable": writable,
            "dialect": dialect,
            "label": label,
            "quota": quota or None,
            "created": time.time(),
            **(record or {}),
        }
        if commit:
            fields["committed_as"] = new
        filled = staging is not None or template is not None
        with contextlib.ExitStack() as stack:
            if staging is None:
                staging = self._stage_like(parent)
                stack.callback(self._give_up, staging)
            if template is not None:
                self._copy_template(template, staging)
            link = self._free_short_name()
            staging.seal(link, lower, Record(**fields), committed=commit, filled=filled)
            self._appear(new, below, link, lower, staging)
        return self.layer(new)

    def _lower_on(self, new: LayerId, parent: Layer | None) -> tuple[str, ...]:
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

    def _taken(self, layer: LayerId) -> LayerExistsError:
        return LayerExistsError(
            f"layer {show(layer)} exists already in {show(self.home)}: choose another id"
        )

    def _free_short_name(self) -> str:
        while True:
            short = storelayout.new_short_name()
            if self._home.links_fd < 0:
                return short
            if sc.lstat_or_none(short.encode("ascii"), self._home.links_fd) is None:
                return short

    def _appear(
        self,
        new: LayerId,
        parent: Layer | None,
        link: str,
        lower: tuple[str, ...],
        staging: Staging,
    ) -> None:
        """Make a sealed layer visible, and durably so."""
        if self._home.links_reason is not None:
            raise StoreError(self._home.links_reason)
        name = storelayout.name_of_id(new)
        with self._lock.exclusive() as held:
            index = self._current()
            if parent is not None and index.own.get(parent.id) != parent.link:
                raise UnknownLayerError(f"the parent layer {show(parent.id)} has just been removed")
            while link in index.claims or link in index.links:
                link = self._free_short_name()
                staging.relink(link)
            if sc.lstat_or_none(name, self._home.fd) is not None:
                raise self._taken(new)
            held.begin()
            move_in(self._home, self._home.staging_fd, staging.name, name)
            try:
                self._make_link(link, new)
            except OSError:
                sc.rename(name, self._home.fd, staging.name, self._home.staging_fd)
                raise
            index.add(new, link, lower)
            index.links[link] = new
            self._restamp()
            staging.installed = True
        self._sync()

    def _make_link(self, short: str, layer: LayerId) -> None:
        sc.symlink(
            storelayout.link_target(layer), short.encode("ascii"), dir_fd=self._home.links_fd
        )

    def _restamp(self) -> None:
        """The index holds what this change did. needs: store lock, exclusive, after begin()."""
        self._stamp = self._now()

    def _sync(self) -> None:
        sc.fsync(self._home.fd)
        if self._home.links_fd >= 0:
            sc.fsync(self._home.links_fd)

    # --- staging ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stage(self, like: LayerId | None = None) -> Iterator[Staging]:
        """A layer in the making, for install_diff() or create(); thrown away if not used.

        Its diff root has mode, owner and attributes of the diff root of *like*.
        """
        staging = self._stage_like(like)
        try:
            yield staging
        finally:
            self._give_up(staging)

    def _stage_like(self, like: LayerId | None) -> Staging:
        with self._lock.shared():
            self._refuse_read_only()
            staging = Staging.make(self._home)
        try:
            if like is not None:
                with self._opened_diff(like) as diff_fd:
                    staging.inherit(diff_fd)
        except BaseException:
            self._give_up(staging)
            raise
        return staging

    def _refuse_read_only(self) -> None:
        if self.read_only:
            raise StoreError(
                f"the store {show(self.home)} cannot be changed: it is read-only",
                errno=errno.EROFS,
            )

    def _give_up(self, staging: Staging) -> None:
        trashed = staging.close()
        if trashed is not None:
            self._delete_trash(trashed)

    def _copy_template(self, template: LayerId, staging: Staging) -> None:
        with self._opened_diff(template) as diff_fd:
            copy_tree(diff_fd, staging.fd)

    @contextlib.contextmanager
    def _opened_diff(self, layer: LayerId) -> Iterator[int]:
        fd = self._open_layer(layer)
        try:
            with opened_dir(fd, ondisk.DIFF_NAME) as diff_fd:
                yield diff_fd
        finally:
            os.close(fd)

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
        nothing has changed.
        """
        with self._locked(layer, lock) as held_layer:
            old = self.layer(layer)
            self._refuse_change(old)
            below = None
            lower = old.lower
            if not isinstance(parent, _Keep):
                below = None if parent is None else self.layer(parent)
                lower = self._lower_on(layer, below)
                if old.link in lower:
                    raise StoreError(f"layer {show(layer)} cannot be built on itself")
            if commit:
                record["committed_as"] = layer
            changed = dataclasses.replace(old.record, **record)
            staging.seal(old.link, lower, changed, committed=commit, filled=True)
            self._exchange(old, lower, staging, held_layer, below)
        return self.layer(layer)

    def _refuse_change(self, layer: Layer) -> None:
        children = self.children(layer.id)
        if children:
            raise _has_children(layer.id, children, "changed")
        if layer.committed:
            raise CommittedError(
                f"layer {show(layer.id)} is committed and never changes again: create a layer"
                " on top of it"
            )
        self._refuse_mounted(layer.id)

    def _refuse_mounted(self, layer: LayerId) -> None:
        mounts = mountcalls.mounts_below(self.layer_path(layer))
        if mounts:
            raise LayerInUseError(
                f"layer {show(layer)} is in use: {show(mounts[0].target)} is mounted;"
                " unmount it first"
            )

    def _exchange(
        self,
        old: Layer,
        lower: tuple[str, ...],
        staging: Staging,
        lock: LayerLock,
        below: Layer | None,
    ) -> None:
        name = storelayout.name_of_id(old.id)
        with self._lock.exclusive() as held:
            index = self._current()
            children = index.children(old.id)
            if children:
                raise _has_children(old.id, children, "changed")
            if below is not None and index.own.get(below.id) != below.link:
                raise UnknownLayerError(f"the parent layer {show(below.id)} has just been removed")
            held.begin()
            sc.rename(staging.name, self._home.staging_fd, name, self._home.fd, sc.RENAME_EXCHANGE)
            index.remove(old.id)
            index.add(old.id, old.link, lower)
            self._restamp()
            # The lock follows the layer; the staging object now owns what was there before.
            lock.fd, staging.base_fd = staging.base_fd, lock.fd
        self._sync()

    def update_record(
        self, layer: LayerId, *, lock: LayerLock | None = None, **fields: Any
    ) -> Record:
        """Change fields of the record, durably; also of committed layers."""
        with self._locked(layer, lock) as held:
            record = dataclasses.replace(self._read_record(held.fd, layer), **fields)
            self._write_record(held.fd, record)
        return record

    def _write_record(self, fd: int, record: Record) -> None:
        write_file_atomic(
            fd, ondisk.RECORD_NAME, format_record(record), FILE_MODE, self._home.owner
        )

    # --- committing -------------------------------------------------------------------------------

    def freeze(self, layer: LayerId, *, lock: LayerLock | None = None, **fields: Any) -> Layer:
        """Commit a layer under the name it has; no change if it is committed already."""
        with self._locked(layer, lock) as held:
            found = self.layer(layer)
            record = dataclasses.replace(found.record, committed_as=layer, **fields)
            if record != found.record:
                self._write_record(held.fd, record)
            self._mark(held.fd)
            sc.fsync(held.fd)
        return self.layer(layer)

    def _mark(self, fd: int) -> None:
        with contextlib.suppress(FileExistsError):
            write_synced(fd, ondisk.COMMITTED_NAME, b"", owner=self._home.owner)

    def commit(
        self,
        layer: LayerId,
        new: LayerId | None = None,
        *,
        lock: LayerLock | None = None,
        **fields: Any,
    ) -> Layer:
        """Freeze a layer under the id *new*, a generated one if None; the old id is gone.

        Raises LayerExistsError, CommittedError, LayerInUseError (mounted), OSError.
        """
        target = storelayout.new_id() if new is None else storelayout.check_id(new)
        if target == layer:
            return self.freeze(layer, lock=lock, **fields)
        with self._locked(layer, lock) as held:
            found = self.layer(layer)
            self._refuse_commit(found)
            fields = {"writable": False, **fields, "committed_as": target}
            record = dataclasses.replace(found.record, **fields)
            if sc.lstat_or_none(storelayout.name_of_id(target), self._home.fd) is not None:
                raise self._taken(target)
            self._write_record(held.fd, record)
            self._rename(found, target, held)
        return self.layer(target)

    def _refuse_commit(self, layer: Layer) -> None:
        if layer.committed and not self.children(layer.id):
            raise CommittedError(f"layer {show(layer.id)} is committed already")
        self._refuse_mounted(layer.id)

    def _rename(self, old: Layer, target: LayerId, lock: LayerLock) -> None:
        """Rename a layer whose record says already that this commits it."""
        if self._home.links_reason is not None:
            raise StoreError(self._home.links_reason)
        home = self._home
        names = storelayout.name_of_id(old.id), storelayout.name_of_id(target)
        with self._lock.exclusive() as held:
            index = self._current()
            if sc.lstat_or_none(names[1], home.fd) is not None:
                raise self._taken(target)
            held.begin()
            move_in(home, home.fd, names[0], names[1])
            moved = []
            try:
                for short in sorted(index.names_of(old.id)):
                    moved.append(short)
                    self._point(short, target)
                self._mark(lock.fd)
            except OSError:
                sc.rename(names[1], home.fd, names[0], home.fd)
                for short in moved:
                    self._point(short, old.id)
                raise
            self._index = None
            lock.id = target
        sc.fsync(lock.fd)
        self._sync()

    def _point(self, short: str, layer: LayerId) -> None:
        symlink_atomic(self._home.links_fd, short.encode("ascii"), storelayout.link_target(layer))

    # --- removing ---------------------------------------------------------------------------------

    def discard(self, layer: LayerId, *, lock: LayerLock | None = None) -> list[Undeleted]:
        """Remove a layer, damaged or not: its name at once, its content after that.

        Returns what could not be deleted and stays in the trash. Raises UnknownLayerError,
        HasChildrenError, LayerInUseError (mounted), OSError.
        """
        with self._locked(layer, lock) as held_layer:
            self._refuse_mounted(layer)
            with self._lock.exclusive() as held:
                trashed = self._take_out(layer, held)
            held_layer.close()
        self._sync()
        return self._delete_trash(trashed) if trashed is not None else []

    def _take_out(self, layer: LayerId, held: Held) -> bytes | None:
        index = self._current()
        children = index.children(layer)
        if children:
            raise _has_children(layer, children, "removed")
        held.begin()
        trashed = move_to_trash(self._home, self._home.fd, storelayout.name_of_id(layer))
        for short in index.names_of(layer):
            if index.links.get(short) == layer:
                sc.unlink(short.encode("ascii"), dir_fd=self._home.links_fd)
                del index.links[short]
        index.remove(layer)
        self._restamp()
        return trashed

    def empty_trash(self) -> list[Undeleted]:
        """Delete what removals left behind; returns what could not be deleted."""
        left: list[Undeleted] = []
        if not self.read_only:
            for name in names_in(self._home.trash_fd):
                left += self._delete_trash(name)
        return left

    def _delete_trash(self, name: bytes) -> list[Undeleted]:
        """Delete one entry of the trash, unless somebody else is at it."""
        try:
            guard = open_dir(self._home.trash_fd, name)
        except OSError:
            return delete_tree(self._home.trash_fd, name)
        try:
            with contextlib.suppress(OSError):
                diff = open_dir(guard, ondisk.DIFF_NAME)
                os.close(guard)
                guard = diff
            # Not the layer's own lock: who waits for that must learn at once that it is gone.
            return delete_tree(self._home.trash_fd, name) if try_lock(guard) else []
        finally:
            os.close(guard)

    def clear_staging(self) -> int:
        """Throw away layers whose makers died; how many there were."""
        staging_fd = self._home.staging_fd
        with self._lock.exclusive():
            trashed = [
                move_to_trash(self._home, staging_fd, name)
                for name in names_in(staging_fd)
                if self._is_abandoned(name)
            ]
        for entry in trashed:
            if entry is not None:
                self._delete_trash(entry)
        return len(trashed)

    def _is_abandoned(self, name: bytes) -> bool:
        try:
            fd = open_dir(self._home.staging_fd, name)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # no directory, so nobody's
        try:
            return try_lock(fd)
        finally:
            os.close(fd)

    # --- mending ----------------------------------------------------------------------------------

    def _mend(self) -> None:
        """Finish what a dead process began. needs: store lock, exclusive.

        Links that are missing, or lead to no layer, are made again from the layers' own files;
        links to nothing that nobody names are removed.
        """
        self._index = None
        if self._home.links_fd < 0:
            return
        index = scan(self._home.fd, self._home.links_fd)
        for short, target in index.links.items():
            if target is None or target in index.own:
                continue
            if short not in index.claims and not any(short in x for x in index.lowers.values()):
                sc.unlink(short.encode("ascii"), dir_fd=self._home.links_fd)
        for short, claimants in index.claims.items():
            owner = index.resolve(short)
            if owner in claimants and index.links.get(short) != owner:
                self._point(short, owner)
        self._sync()

    def mend(self) -> None:
        """Make links again that can be told from the layers, remove those to nothing."""
        with self._lock.exclusive() as held:
            held.begin()
            self._mend()


def _unresolved(index: Index, short: str) -> str:
    claimants = sorted(index.claims.get(short, set()))
    if claimants:
        names = ", ".join(show(layer) for layer in claimants)
        return f"names l/{short}, which more than one layer could be: {names}"
    if short in index.links:
        target = index.links[short]
        what = "no layer" if target is None else f"layer {show(target)}, which is missing"
        return f"names l/{short}, which leads to {what}"
    return f"names l/{short}, which no layer has"


def _has_children(layer: LayerId, children: Iterable[LayerId], what: str) -> HasChildrenError:
    names = sorted(children)
    shown = ", ".join(show(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return HasChildrenError(
        f"layer {show(layer)} cannot be {what}: {len(names)} other"
        f" layer{'s are' if len(names) > 1 else ' is'} built on it: {shown}"
    )

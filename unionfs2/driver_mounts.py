"""get and put: a layer as a directory, mounted for as long as somebody has asked for it.

Everything about one layer happens under its lock, so threads and processes take turns. What is
mounted is read from the kernel, what was asked from the references (references.py); after a crash
of the caller both still agree.

Which mount a layer gets:

* writable: the layers below as lowers, its ``diff`` as upper;
* read-only, when it is committed or has children, or when asked: its ``diff`` is a lower, too;
* none at all for a layer without parent that may still change: then ``diff`` itself is the tree, as
  in the original. A limit that our server enforces, or a place of the caller's own, needs a mount.

A mount that is there already is shared as it is. The FUSE server of a mount may have died: ``get``
then replaces the mount, ``put`` takes it away and says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from . import locks, mountcalls, mounts, ondisk, quotacalls, references
from . import syscalls as sc
from .backends import Choice
from .driver_core import Chosen, Core
from .errors import (
    LayerInUseError,
    MountError,
    OptionError,
    QuotaError,
    TargetError,
    UnionFSError,
    show,
)
from .layers import Layer, LayerLock
from .mountcalls import MountEntry
from .mounter import FUSE_TYPE, OVERLAY_TYPE, Mounted, is_ours
from .options import MountSpec
from .references import Reference
from .storefiles import Owner, is_dir, make_dir, open_dir, opened_dir
from .storelock import try_lock
from .storemodel import LayerId

#: Servers that are being started at the same time, in this process; each costs a processor.
_STARTING: Final = threading.BoundedSemaphore(max(2, 2 * (os.cpu_count() or 1)))


@dataclass(frozen=True, slots=True)
class LayerMount:
    """How a layer is mounted at the moment, in this mount namespace."""

    target: bytes
    backend: str
    count: int
    read_only: bool
    pid: int | None  # of the FUSE server


class _Live(NamedTuple):
    """A mount that is there, and the reference for it: made up when nothing was written down."""

    entry: MountEntry
    reference: Reference

    @property
    def target(self) -> bytes:
        return self.entry.target

    @property
    def read_only(self) -> bool:
        return b"ro" in self.entry.options


class _Found(NamedTuple):
    """The mount of a layer in this namespace, and what is written down about other ones."""

    live: _Live | None
    others: tuple[Reference, ...]


class Mounts:
    """Mounts of the layers of one store."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = core.store
        self._owner = None if core.store.owner is None else Owner(*core.store.owner)

    # --- asking -----------------------------------------------------------------------------------

    def state(self, layer: LayerId) -> LayerMount | None:
        """How *layer* is mounted here; None when it is not. Needs no lock, promises no more."""
        live = self._find(layer).live
        if live is None:
            return None
        known = live.reference
        return LayerMount(live.target, known.backend, known.count, live.read_only, known.pid)

    def states(self) -> dict[LayerId, LayerMount]:
        """Every layer that is mounted here, and how."""
        candidates = {*self._core.references.layers(), *self._mounted_below_home()}
        found = {layer: self.state(layer) for layer in sorted(candidates)}
        return {layer: state for layer, state in found.items() if state is not None}

    def in_use(self) -> frozenset[LayerId]:
        """Layers that are mounted, here or in another mount namespace."""
        elsewhere = {
            layer
            for layer in self._core.references.layers()
            if references.elsewhere(self._core.references.load(layer))
        }
        return frozenset({*self.states(), *elsewhere})

    def refuse_mounted(self, layer: LayerId, what: str) -> None:
        """Raise LayerInUseError when *layer* is mounted, here or in another namespace."""
        found = self._find(layer)
        if found.live is not None:
            raise LayerInUseError(
                f"layer {show(layer)} cannot be {what} while it is mounted at"
                f" {show(found.live.target)}: unmount it first"
            )
        self._refuse_elsewhere(layer, found.others, what)

    @staticmethod
    def _refuse_elsewhere(layer: LayerId, others: tuple[Reference, ...], what: str) -> None:
        for other in references.elsewhere(others):
            raise LayerInUseError(
                f"layer {show(layer)} cannot be {what} while it is mounted in another mount"
                f" namespace, {other.namespace}, at {other.target}: unmount it there first"
            )

    def _find(self, layer: LayerId) -> _Found:
        known = self._core.references.load(layer)
        for reference in known:
            entry = references.layer_mount(os.fsencode(reference.target))
            if entry is not None and references.is_here(reference, entry):
                others = tuple(other for other in known if other is not reference)
                return _Found(_Live(entry, reference), others)
        here = references.namespace()
        others = tuple(reference for reference in known if reference.namespace != here)
        entry = references.layer_mount(self._store.merged_path(layer))
        return _Found(None if entry is None else _Live(entry, _reference(entry)), others)

    # --- get --------------------------------------------------------------------------------------

    def get(
        self,
        layer: LayerId,
        label: str = "",
        *,
        backend: Choice | None = None,
        read_only: bool = False,
        target: bytes | None = None,
    ) -> Path:
        """See Driver.get()."""
        with self._store.layer_lock(layer) as lock:
            known = self._store.layer(layer)
            place = None if target is None else os.path.realpath(target)
            merged = self._store.merged_path(layer)
            found = self._find(layer)
            live = found.live
            if live is not None:
                self._refuse_other_use(known, live, place, read_only=read_only)
                if self._answers(live):
                    more = replace(live.reference, count=live.reference.count + 1)
                    self._core.references.save(layer, (*found.others, more))
                    return _path(live.target)
                self._take_dead(layer, live)
                place = live.target if place is None and live.target != merged else place
            read_only = read_only or known.committed
            if self._is_plain(known, read_only=read_only, target=place):
                return _path(self._store.diff_path(layer))
            return self._mount_new(known, lock, found, label, backend, place, read_only=read_only)

    def _is_plain(self, layer: Layer, *, read_only: bool, target: bytes | None) -> bool:
        """Whether ``diff`` by itself is the tree of *layer*, and nothing else was asked."""
        by_server = layer.record.quota and layer.record.project_id is None
        return not (layer.chain or read_only or by_server or target is not None)

    @staticmethod
    def _refuse_other_use(
        layer: Layer, live: _Live, target: bytes | None, *, read_only: bool
    ) -> None:
        if target is not None and target != live.target:
            raise LayerInUseError(
                f"layer {show(layer.id)} is mounted at {show(live.target)} already:"
                " use that, or unmount it first"
            )
        if live.read_only and not (read_only or layer.committed):
            raise LayerInUseError(
                f"layer {show(layer.id)} is mounted read-only at {show(live.target)}:"
                " unmount it first, or ask for it read-only"
            )

    def _take_dead(self, layer: LayerId, live: _Live) -> None:
        self._core.warn(
            f"the FUSE server of layer {show(layer)} at {show(live.target)} has ended:"
            " it is mounted again, what was not synced may be lost"
        )
        mounts.detach(live.target, fuse=True, lazy=True)

    def _mount_new(
        self,
        layer: Layer,
        lock: LayerLock,
        found: _Found,
        label: str,
        backend: Choice | None,
        target: bytes | None,
        *,
        read_only: bool,
    ) -> Path:
        before = found.live.reference if found.live is not None else None  # of a dead server
        others = tuple(references.elsewhere(found.others))
        if not (read_only and all(other.read_only for other in others)):
            self._refuse_elsewhere(layer.id, others, "mounted")
        spec = self._spec(layer, label, read_only=read_only)
        chosen = self._choose(layer, spec, backend)
        made = self._make_places(layer, lock, spec, merged=target is None)
        place = self._store.merged_path(layer.id) if target is None else target
        made = made or bool(before and before.made_target)
        try:
            done = self._mount(spec, place, chosen, backend or self._core.backend)
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    sc.rmdir(ondisk.MERGED_NAME, dir_fd=lock.fd)
            raise
        entry = references.layer_mount(place)
        if entry is None:
            raise MountError(f"the mount on {show(place)} is gone again: somebody unmounted it")
        reference = replace(
            _reference(entry),
            count=1 + (before.count if before else 0),
            read_only=read_only,
            made_target=made,
            pid=done.pid,
            pid_start=None if done.pid is None else mounts.started(done.pid),
        )
        try:
            self._core.references.save(layer.id, (*others, reference))
        except BaseException:
            mounts.detach(place, fuse=done.backend == "fuse", lazy=True)
            raise
        self._own_work(lock, spec)
        return _path(place)

    def _spec(self, layer: Layer, label: str, *, read_only: bool) -> MountSpec:
        core = self._core
        spec = core.lower_spec(layer) if read_only else core.upper_spec(layer)
        label = label or layer.record.label
        if label:
            if "\0" in label or '"' in label:
                raise OptionError(
                    f"mount label {show(label)!r} has a NUL or a double quote: correct it"
                )
            spec = spec._replace(context=(("context", os.fsencode(label)),))
        return spec

    def _choose(self, layer: Layer, spec: MountSpec, asked: Choice | None) -> Chosen:
        by_server = spec.quota_bytes is not None or spec.quota_inodes is not None
        if by_server and (asked or self._core.backend) == "native":
            raise QuotaError(
                f"layer {show(layer.id)} has a limit that only the FUSE server keeps here:"
                " mount it with the fuse backend"
            )
        return self._core.choose(spec, layer.record.dialect, asked)

    def _make_places(self, layer: Layer, lock: LayerLock, spec: MountSpec, *, merged: bool) -> bool:
        """Make what a mount needs and is not there; whether the mount point was made."""
        if spec.upper is not None and not is_dir(lock.fd, ondisk.WORK_NAME):
            make_dir(lock.fd, ondisk.WORK_NAME, ondisk.PRIVATE_MODE, self._owner)
        project = layer.record.project_id
        if spec.upper is not None and project is not None:
            with opened_dir(lock.fd, ondisk.WORK_NAME) as work_fd:
                # What moves from work to upper must count as the same project.
                quotacalls.set_project(work_fd, project)
        if not merged or is_dir(lock.fd, ondisk.MERGED_NAME):
            return False
        make_dir(lock.fd, ondisk.MERGED_NAME, ondisk.PRIVATE_MODE, self._owner)
        return True

    def _mount(self, spec: MountSpec, target: bytes, chosen: Chosen, asked: Choice) -> Mounted:
        if chosen.backend == "fuse":
            return self._mount_fuse(spec, target)
        try:
            locks.check(spec)
            self._core.kernel.attach(spec, target)
        except MountError as exc:
            if asked != "auto" or isinstance(exc, TargetError):
                raise
            # The probe said yes, this very mount says no: a feature of a layer, or of a label.
            try:
                return self._mount_fuse(spec, target)
            except UnionFSError as second:
                raise MountError(f"no backend can do this; native: {exc}; fuse: {second}") from exc
        return Mounted("native", target)

    def _mount_fuse(self, spec: MountSpec, target: bytes) -> Mounted:
        with _STARTING:
            done = self._core.fuse.mount(spec, target)
        for text in done.warnings:
            self._core.warn(text)
        return done

    def _own_work(self, lock: LayerLock, spec: MountSpec) -> None:
        """Give work/work to the mapped root, which a move from lower to upper needs there."""
        owner = self._store.owner
        if owner is None or spec.upper is None:
            return
        with contextlib.suppress(FileNotFoundError):
            inner = os.path.join(ondisk.WORK_NAME, ondisk.WORK_NAME)
            sc.chown(inner, *owner, dir_fd=lock.fd, follow_symlinks=False)

    # --- put --------------------------------------------------------------------------------------

    def put(self, layer: LayerId, *, force: bool = False) -> bool:
        """See Driver.put()."""
        with self._store.layer_lock(layer) as lock:
            return self._put(layer, lock, force=force)

    def _put(self, layer: LayerId, lock: LayerLock, *, force: bool) -> bool:
        found = self._find(layer)
        live = found.live
        if live is None:
            self._core.references.save(layer, references.elsewhere(found.others))
            return False
        alive = self._answers(live)
        if alive and live.reference.count > 1 and not force:
            fewer = replace(live.reference, count=live.reference.count - 1)
            self._core.references.save(layer, (*found.others, fewer))
            return True
        self._end(layer, lock, live, found.others, lazy=force or not alive)
        if not alive:
            raise MountError(
                f"the FUSE server of layer {show(layer)} had ended before {show(live.target)}"
                " was unmounted: what programs had not synced may be missing in the layer"
            )
        return True

    def end(self, layer: LayerId, lock: LayerLock) -> None:
        """Take the mount of *layer* away, lazily, whoever uses it. For force."""
        found = self._find(layer)
        if found.live is not None:
            self._end(layer, lock, found.live, found.others, lazy=True)
        self._refuse_elsewhere(layer, found.others, "removed")
        self._core.references.drop(layer)

    def _end(
        self,
        layer: LayerId,
        lock: LayerLock,
        live: _Live,
        known: tuple[Reference, ...],
        *,
        lazy: bool,
    ) -> None:
        entry, reference = live
        self._unmount(entry, lazy=lazy)
        others = references.elsewhere(known)
        if entry.target == self._store.merged_path(layer) and not others:
            self._renew_target(lock, made=reference.made_target)
            if not lazy:
                _await_end(reference)
        self._core.references.save(layer, others)

    def _unmount(self, entry: MountEntry, *, lazy: bool) -> None:
        if entry.fstype == FUSE_TYPE:
            self._core.fuse.unmount(entry.target, lazy=lazy)
        else:
            mounts.detach(entry.target, fuse=False, lazy=lazy)

    def _renew_target(self, lock: LayerLock, *, made: bool) -> None:
        """Remove the mount point, so that copies of the mount in other namespaces let go.

        The kernel detaches what is mounted on a directory that is removed. A mount point that
        belongs to the layer is made again.
        """
        try:
            sc.rmdir(ondisk.MERGED_NAME, dir_fd=lock.fd)
        except OSError as exc:
            # EBUSY: something else is mounted there. ENOTEMPTY: somebody's files; both stay.
            if exc.errno not in {errno.EBUSY, errno.ENOTEMPTY, errno.ENOENT, errno.EROFS}:
                raise
            return
        if not made:
            make_dir(lock.fd, ondisk.MERGED_NAME, ondisk.PRIVATE_MODE, self._owner)

    @staticmethod
    def _answers(live: _Live) -> bool:
        """Whether the mount does its work: its server, if it needs one, answers."""
        entry, reference = live
        if entry.fstype != FUSE_TYPE:
            return True
        if reference.pid is not None and not references.server_runs(reference):
            return False
        try:
            os.statvfs(entry.target)
        except OSError as exc:
            return exc.errno not in {errno.ENOTCONN, errno.ECONNABORTED}
        return True

    # --- mounts for a look ------------------------------------------------------------------------

    @contextlib.contextmanager
    def view(self, layer: LayerId | None) -> Iterator[int]:
        """Descriptor of the merged tree of *layer* to read from; of an empty one for None.

        A layer that is mounted is looked at through that mount, which sees what programs have
        written; any other through a private read-only one.
        """
        with contextlib.ExitStack() as stack:
            if layer is None:
                path = self._store.empty_path
            elif self.state(layer) is not None:
                path = os.fsencode(self.get(layer, read_only=True))
                stack.callback(self._put_quietly, layer)
            else:
                path = self._private(self._store.layer(layer), stack)
            fd = sc.open_at(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(sc.close, fd)
            yield fd

    def _put_quietly(self, layer: LayerId) -> None:
        try:
            self.put(layer)
        except UnionFSError as exc:
            self._core.warn(str(exc))

    def _private(self, layer: Layer, stack: contextlib.ExitStack) -> bytes:
        """Mount *layer* read-only where nobody looks; *stack* takes it away."""
        spec = self._core.lower_spec(layer)
        chosen = self._core.choose(spec, layer.record.dialect)
        staging = stack.enter_context(self._store.stage())
        done = self._mount(spec, staging.path, chosen, self._core.backend)
        stack.callback(self._take_private, done)
        return staging.path

    def _take_private(self, done: Mounted) -> None:
        entry = references.layer_mount(done.target)
        if entry is not None:
            try:
                self._unmount(entry, lazy=False)
            except UnionFSError:
                self._unmount(entry, lazy=True)

    # --- the end ----------------------------------------------------------------------------------

    def cleanup(self) -> list[str]:
        """See Driver.cleanup()."""
        done: list[str] = []
        for layer in sorted({*self._core.references.layers(), *self._mounted_below_home()}):
            try:
                done += self._clean_layer(layer)
            except (UnionFSError, OSError) as exc:
                done.append(f"layer {show(layer)} stays mounted: {exc}")
        return done + self.clean_stale(dry_run=False)

    def clean_stale(self, *, dry_run: bool) -> list[str]:
        """Take away what only dead processes could need: their mounts for a look, references."""
        done: list[str] = []
        staged = os.path.join(self._store.state_path, ondisk.STAGING_NAME)
        for entry in reversed(mountcalls.mounts_below(staged)):
            name = entry.target[len(staged) + 1 :].split(b"/", 1)[0]
            if is_ours(entry) and self._is_abandoned(name):
                if not dry_run:
                    self._unmount(entry, lazy=True)
                said = "would unmount" if dry_run else "unmounted"
                done.append(f"{said} {show(entry.target)}, left by a process that died")
        for layer in self._core.references.layers():
            if not self._store.exists(layer):
                if not dry_run:
                    self._core.references.drop(layer)
                said = "would forget" if dry_run else "forgot"
                done.append(f"{said} the mounts of layer {show(layer)}, which is gone")
        return done

    def _is_abandoned(self, staged: bytes) -> bool:
        """Whether nobody works in the staging directory called *staged* any more."""
        try:
            fd = open_dir(self._store.state_fd, os.path.join(ondisk.STAGING_NAME, staged))
        except OSError:
            return False
        try:
            return try_lock(fd)
        finally:
            sc.close(fd)

    def _mounted_below_home(self) -> Iterator[LayerId]:
        known = set(self._store.ids())
        for entry in mountcalls.mounts_below(self._store.home):
            name, _, rest = entry.target[len(self._store.home) + 1 :].partition(b"/")
            layer = LayerId(os.fsdecode(name))
            kind = entry.fstype in (OVERLAY_TYPE, FUSE_TYPE)
            if rest == ondisk.MERGED_NAME and kind and layer in known:
                yield layer

    def _clean_layer(self, layer: LayerId) -> list[str]:
        if not self._store.exists(layer):
            return []
        with self._store.layer_lock(layer) as lock:
            found = self._find(layer)
            live = found.live
            if live is None:
                self._core.references.save(layer, references.elsewhere(found.others))
                return []
            if not is_ours(live.entry):
                return []  # another program's, which found this store before us
            self._end(layer, lock, live, found.others, lazy=not self._answers(live))
            return [f"unmounted layer {show(layer)} from {show(live.target)}"]


def _reference(entry: MountEntry) -> Reference:
    """What can be told of a mount that nobody wrote down: somebody has asked for it once."""
    return Reference(
        target=os.fsdecode(entry.target),
        backend=references.backend_of(entry),
        namespace=references.namespace(),
        mount_id=entry.mount_id,
        device=entry.device,
        count=1,
        read_only=b"ro" in entry.options,
    )


def _await_end(reference: Reference) -> None:
    """Wait for the FUSE server to have let go of the layer."""
    if reference.pid is None or not references.server_runs(reference):
        return
    try:
        handle = os.pidfd_open(reference.pid)
    except OSError:
        return
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if references.server_runs(reference):
            poll.poll(mounts.SERVER_END_TIMEOUT_S * 1000)
    finally:
        os.close(handle)


def _path(target: bytes) -> Path:
    return Path(os.fsdecode(target))

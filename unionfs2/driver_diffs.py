"""apply, diff, changes: a layer as a tar stream, and back.

A difference to a layer's own parent is read from the layer's directory alone (``native``, the fast
way); one to any other layer is found by comparing two trees through mounts (``naive``), and so is
every difference where the kernel copies opaque marks up, which makes a layer's own directory lie.

What is unpacked goes into a staging directory and takes the layer's place by one rename, after its
digest was found right. Whoever asks for the layer meanwhile waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from . import changes, ondisk, whiteout
from . import syscalls as sc
from .archive.compress import open_compressed
from .archive.digest import Chunk, Readable, Writable
from .archive.read import unpack
from .archive.split import SplitWriter, rebuild
from .driver_core import DIRECT, Core, Parent, Progress
from .driver_layers import Layers
from .driver_mounts import Mounts
from .errors import (
    CommittedError,
    DamagedLayerError,
    DigestError,
    HasChildrenError,
    LayerExistsError,
    show,
)
from .exports import diff_naive, diff_native
from .layers import Layer, Staging
from .storecopy import copy_tree
from .storefiles import opened_dir
from .storemodel import Applied, Change, Digest, IdMaps, LayerId, Limits, Size
from .storetrees import tree_size, walk
from .treeview import MergedView
from .whiteout import Dialect

_PIPE_BYTES: Final = 1 << 20


class Diffs:
    """Streams of the layers of one store."""

    def __init__(self, core: Core, mounts: Mounts, layers: Layers, ids: IdMaps) -> None:
        self._core = core
        self._store = core.store
        self._mounts = mounts
        self._layers = layers
        self._ids = ids

    # --- in ---------------------------------------------------------------------------------------

    def apply(
        self,
        layer: LayerId,
        stream: Readable,
        parent: Parent,
        *,
        expected: Digest | None,
        progress: Progress | None,
    ) -> Applied:
        """See Driver.apply()."""
        self._core.refuse_read_only()
        if isinstance(parent, str):
            self._store.layer(LayerId(parent))  # a name that means nothing is a mistake
        with self._store.layer_lock(layer) as lock:
            known = self._store.layer(layer)
            self._refuse_filling(known)
            with self._store.stage(layer) as staging, self._diff_of(layer) as diff_fd:
                self._limit(known, staging)
                empty = not os.listdir(diff_fd)
                if not empty:
                    copy_tree(diff_fd, staging.fd)
                chain = self._store.lower_dirs(known)
                dialect = Dialect(userxattr=known.record.dialect == "user")
                done = self._unpack(
                    stream, staging, layer, dialect, chain, expected, progress, recorded=empty
                )
                if not empty:
                    done = done._replace(size=tree_size(staging.fd))
                self._store.install_diff(
                    layer,
                    staging,
                    lock=lock,
                    commit=not known.record.writable,
                    size=done.size,
                    diff_id=done.diff_id if empty else None,
                )
        return done

    def _refuse_filling(self, layer: Layer) -> None:
        children = self._store.children(layer.id)
        if children:
            raise HasChildrenError(
                f"layer {show(layer.id)} cannot be filled: layer {show(children[0])} is built on"
                " it; create a new layer"
            )
        if layer.committed:
            raise CommittedError(
                f"layer {show(layer.id)} cannot be filled: it is committed; create a layer on top"
                " of it"
            )
        self._mounts.refuse_mounted(layer.id, "filled")
        self._core.check_dialect(layer)

    def _limit(self, layer: Layer, staging: Staging) -> None:
        record = layer.record
        if record.project_id is not None and record.quota is not None:
            self._layers.limit(staging, record.project_id, record.quota)

    @contextlib.contextmanager
    def _diff_of(self, layer: LayerId) -> Iterator[int]:
        """Descriptor of the diff directory, no link followed on the way."""
        home_fd, name = self._store.home_fd, os.fsencode(layer)
        with opened_dir(home_fd, name) as fd, opened_dir(fd, ondisk.DIFF_NAME) as diff_fd:
            yield diff_fd

    def import_layer(
        self,
        layer: LayerId,
        parent: LayerId | None,
        stream: Readable,
        *,
        expected: Digest | None,
        record: dict[str, Any],
        progress: Progress | None,
        writable: bool = False,
        commit: bool = True,
        strip: bool = False,
    ) -> Applied:
        """See Driver.import_layer(). *record* holds more fields for the layer's record.

        With *strip* deletions are left out, because there is nothing below that they could mean.
        """
        self._core.refuse_read_only()
        if self._store.exists(layer):
            raise LayerExistsError(f"layer {show(layer)} exists already: choose another id")
        below = None if parent is None else self._store.layer(parent)
        dialect = self._core.dialect if below is None else below.record.dialect
        chain = () if below is None else self._chain(below)
        with self._store.stage(parent) as staging:
            marks = Dialect(userxattr=dialect == "user")
            done = self._unpack(
                stream, staging, layer, marks, chain, expected, progress, recorded=True
            )
            fields = {"size": done.size, "diff_id": done.diff_id, **record}
            if strip and _strip_marks(staging.fd, marks):
                fields |= {"size": tree_size(staging.fd), "diff_id": None}
                sc.unlink(ondisk.TAR_SPLIT_NAME, dir_fd=staging.base_fd)
            self._store.create(
                layer,
                parent,
                writable=writable,
                dialect=dialect,
                staging=staging,
                commit=commit,
                record=fields,
            )
        return done

    def _chain(self, layer: Layer) -> tuple[bytes, ...]:
        """Directories that make up the tree of *layer*, uppermost first."""
        return (self._store.diff_path(layer.id), *self._store.lower_dirs(layer))

    def _unpack(
        self,
        stream: Readable,
        staging: Staging,
        layer: LayerId,
        dialect: Dialect,
        chain: tuple[bytes, ...],
        expected: Digest | None,
        progress: Progress | None,
        *,
        recorded: bool,
    ) -> Applied:
        options = self._store.options
        limits = Limits(
            bytes_max=options.apply_size_max or Limits().bytes_max,
            entries_max=options.apply_entries_max or Limits().entries_max,
        )
        with contextlib.ExitStack() as stack:
            view = None
            if chain:
                view = stack.enter_context(MergedView.open(chain, dialect))
            below = _Below(view)
            split = None
            if recorded:
                split = stack.enter_context(SplitWriter.create(staging.base_fd))
            plain, _ = open_compressed(stream)
            done = unpack(
                plain,
                staging.fd,
                dialect=dialect,
                ids=self._ids,
                limits=limits,
                below=below.directory,
                names_below=below.names,
                split=split,
                ignore_chown_errors=options.ignore_chown_errors,
                progress=progress,
            )
        if expected is not None and done.diff_id != expected:
            raise DigestError(
                f"the stream for layer {show(layer)} has digest {done.diff_id}, declared was"
                f" {expected}: it is damaged or another one; get it again"
            )
        return done

    # --- out --------------------------------------------------------------------------------------

    def diff(
        self,
        layer: LayerId,
        out: Writable,
        parent: Parent,
        *,
        exact: bool,
        progress: Progress | None,
    ) -> Digest:
        """See Driver.diff()."""
        with self._prepared(layer, parent, exact=exact) as write:
            return write(out if progress is None else _Metered(out, progress))

    @contextlib.contextmanager
    def _prepared(
        self, layer: LayerId, parent: Parent, *, exact: bool
    ) -> Iterator[Callable[[Writable], Digest]]:
        """Everything mounted and open that a stream needs: what then writes it."""
        known = self._store.layer(layer)
        dialect = Dialect(userxattr=known.record.dialect == "user")
        direct = self._is_direct(known, parent)
        with contextlib.ExitStack() as stack:
            if exact and direct and known.record.diff_id is not None:
                fd = self._split_of(layer, stack)
                if fd is not None:
                    yield lambda out: self._rebuild(known, fd, out)
                    return
            if direct and self._by_itself(known):
                yield lambda out: self._native(known, dialect, out)
                return
            old, new = self._two_views(known, parent, stack)
            yield lambda out: self._naive(old, new, out)

    def _is_direct(self, layer: Layer, parent: Parent) -> bool:
        return parent is DIRECT or parent == layer.parent

    def _by_itself(self, layer: Layer) -> bool:
        """Whether the layer's own directory tells truly what it changes."""
        return not layer.chain or not self._core.native(layer.record.dialect).opaque_copied_up

    def _two_views(
        self, layer: Layer, parent: Parent, stack: contextlib.ExitStack
    ) -> tuple[int | None, int]:
        """Descriptors of the trees to compare; None where there is nothing to compare with."""
        before = layer.parent if parent is DIRECT else parent
        old = None
        if before is not None:
            old = stack.enter_context(self._mounts.view(LayerId(before)))
        return old, stack.enter_context(self._mounts.view(layer.id))

    def open_diff(
        self, layer: LayerId, parent: Parent, *, exact: bool
    ) -> contextlib.AbstractContextManager[Readable]:
        """See Driver.open_diff()."""
        return self._open_diff(layer, parent, exact=exact)

    @contextlib.contextmanager
    def _open_diff(self, layer: LayerId, parent: Parent, *, exact: bool) -> Iterator[Readable]:
        # Mounts are made here, before there is a second thread: a forked FUSE server wants that.
        with self._prepared(layer, parent, exact=exact) as write:
            reader = _PipeReader(write)
            try:
                yield reader
            finally:
                reader.close()

    def changes(self, layer: LayerId, parent: Parent) -> list[Change]:
        """See Driver.changes()."""
        known = self._store.layer(layer)
        if self._is_direct(known, parent) and self._by_itself(known):
            dialect = Dialect(userxattr=known.record.dialect == "user")
            lowers = self._store.lower_dirs(known)
            return list(changes.native(self._store.diff_path(layer), lowers, dialect))
        with contextlib.ExitStack() as stack:
            old, new = self._two_views(known, parent, stack)
            return list(changes.naive(old, new))

    def diff_size(self, layer: LayerId, parent: Parent) -> Size:
        """See Driver.diff_size()."""
        known = self._store.layer(layer)
        if self._is_direct(known, parent):
            return self._layers.size(known)
        with contextlib.ExitStack() as stack:
            old, new = self._two_views(known, parent, stack)
            with changes.tree_steps(old, new) as steps:
                return changes.size_of(steps)

    def digest_of(self, layer: Layer) -> Digest:
        """The digest of what *layer* was unpacked from, computed anew; for a deep check.

        Without a record of the stream nothing can be told: the recorded digest is believed.
        """
        with contextlib.ExitStack() as stack:
            fd = self._split_of(layer.id, stack)
            if fd is None:
                assert layer.record.diff_id is not None
                return layer.record.diff_id
            with self._diff_of(layer.id) as diff_fd:
                return rebuild(fd, diff_fd, _Nowhere())

    # --- ways to write a stream -------------------------------------------------------------------

    def _native(self, layer: Layer, dialect: Dialect, out: Writable) -> Digest:
        top, lowers = self._store.diff_path(layer.id), self._store.lower_dirs(layer)
        return diff_native(top, lowers, out, dialect=dialect, ids=self._ids)[0]

    def _naive(self, old: int | None, new: int, out: Writable) -> Digest:
        return diff_naive(old, new, out, ids=self._ids)[0]

    def _split_of(self, layer: LayerId, stack: contextlib.ExitStack) -> int | None:
        with opened_dir(self._store.home_fd, os.fsencode(layer)) as fd:
            try:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                split = sc.open_at(ondisk.TAR_SPLIT_NAME, flags, dir_fd=fd)
            except FileNotFoundError:
                return None
        stack.callback(sc.close, split)
        return split

    def _rebuild(self, layer: Layer, split_fd: int, out: Writable) -> Digest:
        """The stream that the layer was unpacked from, which its digest must confirm."""
        with self._diff_of(layer.id) as diff_fd:
            digest = rebuild(split_fd, diff_fd, out)
        if digest != layer.record.diff_id:
            raise DamagedLayerError(
                f"layer {show(layer.id)} does not give the stream that it was unpacked from:"
                f" digest {digest}, recorded is {layer.record.diff_id}; what it holds was changed"
                " meanwhile, see unionfs2 check --deep"
            )
        return digest


def _strip_marks(root_fd: int, dialect: Dialect) -> bool:
    """Take whiteouts and opaque marks away; whether there were any."""
    found = False
    for item in walk(root_fd):
        if whiteout.is_whiteout(dialect, item.st, item.name, item.dir_fd):
            sc.unlink(item.name, dir_fd=item.dir_fd)
            found = True
        elif dialect.opaque in sc.listxattr_at(item.name, item.dir_fd):
            path = sc.entry_path(item.dir_fd, item.name)
            sc.removexattr(path, dialect.opaque, follow_symlinks=False)
            found = True
    return found


class _Below:
    """Answers of the layers below for directories that a stream passes through."""

    def __init__(self, view: MergedView | None) -> None:
        self._view = view

    def directory(self, path: bytes) -> int | None:
        """Descriptor of the directory that is seen at *path*, None when there is none."""
        if self._view is None:
            return None
        self._view.trim()
        seen = self._view.find(path)
        if seen is None or seen.dir is None:
            return None
        return sc.open_dir(seen.name, seen.holder.at())

    def names(self) -> list[bytes]:
        """Names in the root."""
        if self._view is None:
            return []
        return [
            name
            for name in self._view.names(self._view.root)
            if self._view.look(self._view.root, name) is not None
        ]


class _Nowhere:
    """Takes everything and keeps nothing."""

    def write(self, data: Chunk, /) -> None:
        """Forget *data*."""


class _Metered:
    """Tells how many bytes went by."""

    def __init__(self, out: Writable, progress: Progress) -> None:
        self._out = out
        self._progress = progress
        self._written = 0

    def write(self, data: Chunk, /) -> None:
        self._out.write(data)
        self._written += len(data)
        self._progress(self._written)


class _Ended(Exception):  # noqa: N818 - not an error: nobody wants the rest of the stream
    """The reader has closed its end."""


class _PipeReader:
    """A stream that a thread writes, to be read by whoever has this.

    The thread never outlives close(). Its exception comes out of the read() that finds the end.
    """

    def __init__(self, write: Callable[[Writable], Digest]) -> None:
        self._read_fd, self._write_fd = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._write_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._failure: BaseException | None = None
        self._write = write
        self._thread = threading.Thread(target=self._run, name="unionfs2-diff", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write(self._Sink(self._write_fd))
        except _Ended:
            pass
        except BaseException as exc:  # noqa: BLE001 - handed to the reader
            self._failure = exc
        finally:
            os.close(self._write_fd)

    class _Sink:
        def __init__(self, fd: int) -> None:
            self._fd = fd

        def write(self, data: Chunk, /) -> None:
            view = memoryview(data)
            try:
                while view:
                    view = view[os.write(self._fd, view) :]
            except BrokenPipeError as exc:
                raise _Ended from exc

    def read(self, size: int = -1, /) -> bytes:
        """At most *size* bytes, all that is left when negative; b"" at the end."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        data = os.read(self._read_fd, size)
        if not data and size:
            self._thread.join()
            if self._failure is not None:
                raise self._failure
        return data

    def close(self) -> None:
        """End the thread, wherever it is; a second call does nothing."""
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1
            self._thread.join()

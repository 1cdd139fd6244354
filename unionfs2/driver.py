"""The graph driver: layers, and mounts of them, as one object.

    with Driver.open("storage") as driver:
        base = driver.create()
        with open("base.tar", "rb") as tar:
            driver.apply(base, tar)
        box = driver.create(parent=base, writable=True)
        with driver.mounted(box) as root:
            (root / "hello").write_text("hi")
        print(list(driver.changes(box)))             # [Change(path=b'/hello', kind=<Kind.ADDED>)]

Every function of Docker's overlay2 driver is here under its name in Python's spelling, and more
(commit, check, repair, prune, tree, usage, which, flatten, rebase). All raise UnionFSError, with
one sentence for people and an ``errno``, or OSError from a system call.

A driver may be used by several threads, and several processes may have one store open: what is
mounted and who has asked for it is kept on disk and compared with the kernel's list of mounts.
Closing a driver unmounts nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .backends import Choice
from .closing import Closing
from .driver_core import DIRECT, Core, Parent
from .driver_layers import Layers, LayerStatus, Status, Usage
from .driver_mounts import Mounts
from .errors import OptionError
from .fuse_mount import FuseMounter
from .layers import LayerStore
from .mounter import Mounter
from .store_options import StoreOptions
from .storemodel import Applied, Change, Digest, IdMaps, IdRange, LayerId, Size

if TYPE_CHECKING:
    from .archive.digest import Readable, Writable
    from .driver_diffs import Diffs
    from .driver_trees import Finding, Rebased, TreeNode, Trees
    from .driver_trees import Holding as Holding

__all__ = [
    "DIRECT",
    "Driver",
    "LayerStatus",
    "Parent",
    "Status",
    "Usage",
]

_log = logging.getLogger(__name__)


class Driver(Closing):
    """An open store. Use open(); close() or a ``with`` block gives its descriptors back."""

    def __init__(self, store: LayerStore, core: Core, ids: IdMaps) -> None:
        #: The layers as such: ids, chains, records, and their locks.
        self.store = store
        self._core = core
        self._mounts = Mounts(core)
        self._layers = Layers(core, self._mounts)
        self._ids = ids

    # What reads and writes streams is loaded at its first use: mounting needs none of it.

    @functools.cached_property
    def _diffs(self) -> Diffs:
        from .driver_diffs import Diffs  # noqa: PLC0415

        return Diffs(self._core, self._mounts, self._layers, self._ids)

    @functools.cached_property
    def _trees(self) -> Trees:
        from .driver_trees import Trees  # noqa: PLC0415

        return Trees(self._core, self._mounts, self._layers, self._diffs)

    @classmethod
    def open(
        cls,
        home: str | bytes | os.PathLike[str],
        *,
        options: Sequence[str] = (),
        backend: Choice | None = None,
        uid_maps: Iterable[tuple[int, int, int]] = (),
        gid_maps: Iterable[tuple[int, int, int]] = (),
        fuse: Mounter | None = None,
        create: bool = True,
        warn: Callable[[str], None] | None = None,
    ) -> Driver:
        """Open the store at *home*, and make it if there is none (``Init`` of the original).

        *options* are "key=value" texts (store_options); *backend* overrides the option of that
        name: "native" and "fuse" insist, "auto" prefers the kernel. *uid_maps* and *gid_maps* are
        triples (id in the container, id on the disk, count). *fuse* replaces the FUSE mounter,
        whose default suits a process with threads. *warn* hears sentences that are no errors; they
        are logged otherwise. What exists keeps its owner and mode.

        Raises OptionError, StoreError (ENOENT without *create*; a newer format),
        UnavailableError (an insisted-on backend does not work; the reason is in the text), OSError.
        """
        said = warn or _log.warning
        parsed = StoreOptions.parse(options)
        ids = IdMaps(_ranges(uid_maps), _ranges(gid_maps))
        owner = ids.to_host(0, 0) if ids else None
        store = LayerStore.open(os.fsencode(home), options=parsed, create=create, owner=owner)
        try:
            core = Core(
                store,
                backend=backend or parsed.backend,
                fuse=fuse or FuseMounter(),
                warn=said,
            )
        except BaseException:
            store.close()
            raise
        for text in parsed.warnings:
            said(text)
        return cls(store, core, ids)

    def close(self) -> None:
        """Give the descriptors back. Mounts stay, and so do the references to them."""
        self._core.close()
        self.store.close()

    # --- about the store --------------------------------------------------------------------------

    def status(self) -> Status:
        """What the store lies on, what works here and why, how many layers and mounts there are.

        Raises OSError. ``Status.pairs()`` is the table for people.
        """
        return self._layers.status(str(sys.modules[__package__].__version__))

    def ids(self) -> tuple[LayerId, ...]:
        """All layers, damaged ones too, sorted. Raises OSError."""
        return self.store.ids()

    def layers(self) -> tuple[LayerStatus, ...]:
        """All layers as a list shows them; damaged ones have a reason. Raises OSError."""
        return self._layers.layer_list()

    def tree(self) -> tuple[TreeNode, ...]:
        """All layers as a forest, each after its parent. Raises OSError."""
        return self._trees.tree()

    def usage(self, layers: Iterable[LayerId] | None = None) -> tuple[Usage, ...]:
        """What *layers*, all by default, take: bytes of files (st_size) and inodes.

        The size of a layer that never changes again is measured once. Raises UnknownLayerError
        (ENOENT), DamagedLayerError (EUCLEAN; of all layers, damaged ones are warned of), OSError.
        """
        return self._layers.usage(layers)

    def cleanup(self) -> list[str]:
        """Unmount every layer of this store that this program mounted here; for an engine's end.

        References are given up with their mounts, those to mounts that are gone are forgotten, and
        what dead processes left behind is removed. A mount that is busy stays. Returns sentences
        about what was done and what was not. Raises OSError.
        """
        done = self._mounts.cleanup()
        if not self.store.read_only:
            self.store.clear_staging()
            self.store.empty_trash()
        return done

    # --- about one layer --------------------------------------------------------------------------

    def exists(self, layer: str) -> bool:
        """Whether there is such a layer, though perhaps a damaged one. Never raises."""
        return self.store.exists(LayerId(layer))

    def is_parent(self, layer: str, parent: str | None) -> bool:
        """Whether *layer* stands directly on *parent*; None asks whether it stands on nothing.

        Raises UnknownLayerError (ENOENT), DamagedLayerError (EUCLEAN), OSError.
        """
        return self.store.layer(LayerId(layer)).parent == parent

    def get_metadata(self, layer: str) -> dict[str, str]:
        """Where the parts of *layer* lie: UpperDir, LowerDir, WorkDir, MergedDir.

        A directory that does not exist is left out; LowerDir is joined by colons, those of names
        escaped. ``Options`` is the ``-o`` text and ``Command`` the line to mount it by hand;
        ``Mounted``, ``Backend`` and ``Count`` say how it is mounted now. Raises UnknownLayerError
        (ENOENT), DamagedLayerError (EUCLEAN), DialectError (EOPNOTSUPP), OSError.
        """
        return self._layers.metadata(LayerId(layer))

    def inspect(self, layer: str) -> dict[str, object]:
        """Everything known of *layer*, as JSON takes it. Raises as get_metadata()."""
        return self._layers.inspect(LayerId(layer))

    def which(self, layer: str, path: bytes) -> list[Holding]:
        """Which layers of the chain hold *path*, uppermost first, and which one is seen.

        Raises UnknownLayerError (ENOENT), DamagedLayerError (EUCLEAN), OSError.
        """
        return self._trees.which(LayerId(layer), path)

    # --- making and removing ----------------------------------------------------------------------

    def create(
        self,
        layer: str | None = None,
        parent: str | None = None,
        *,
        writable: bool = False,
        label: str = "",
        options: Mapping[str, str] | Iterable[str] | None = None,
        template: str | None = None,
    ) -> LayerId:
        """A new, empty layer on *parent*, or with the content of *template*; returns its id.

        *layer* is its id, generated when None. One that is not *writable* becomes committed by the
        first apply(); until then it can be written to all the same. *label* is a security label
        for its mounts. *options* may be ``size`` and ``inodes``, for writable layers only: kept by
        project quota of the file system, or by the FUSE server. The layer appears whole or not at
        all. Raises StoreError (EINVAL, a bad id), LayerExistsError (EEXIST), UnknownLayerError
        (ENOENT, the parent), DamagedLayerError (EUCLEAN), DepthError (EMLINK), OptionError
        (EINVAL), QuotaError (EOPNOTSUPP), OSError.
        """
        return self._layers.create(
            layer, parent, writable=writable, label=label, options=options, template=template
        )

    def create_read_write(
        self,
        layer: str | None = None,
        parent: str | None = None,
        *,
        label: str = "",
        options: Mapping[str, str] | Iterable[str] | None = None,
        template: str | None = None,
    ) -> LayerId:
        """Like create() with writable=True."""
        return self.create(
            layer, parent, writable=True, label=label, options=options, template=template
        )

    def remove(self, layer: str, *, force: bool = False) -> bool:
        """Remove *layer*: at once by name, then its content. False when there is no such layer.

        With *force* a layer that is mounted is unmounted lazily first, whoever uses it, and
        images that are made of it are not asked; children and mounts in other mount namespaces
        cannot be forced. Raises StoreError (EINVAL, an empty id; EROFS), LayerInUseError (EBUSY,
        mounted, or images need it), HasChildrenError (EBUSY, with their names), ImageError
        (EUCLEAN, a damaged image record), OSError.
        """
        return self._layers.remove(layer, force=force)

    def commit(self, layer: str, new_id: str | None = None, *, keep: bool = False) -> LayerId:
        """Freeze *layer* under the id *new_id*, generated when None; returns that.

        The old id is gone, or with *keep* a new, empty writable layer on top of the committed one.
        Raises UnknownLayerError (ENOENT), LayerExistsError (EEXIST), CommittedError (EROFS),
        LayerInUseError (EBUSY, mounted), StoreError, OSError.
        """
        return self._layers.commit(LayerId(layer), new_id, keep=keep)

    # --- mounting ---------------------------------------------------------------------------------

    def get(
        self,
        layer: str,
        label: str = "",
        *,
        backend: Choice | None = None,
        read_only: bool = False,
        target: str | bytes | os.PathLike[str] | None = None,
    ) -> Path:
        """The tree of *layer* as a directory, mounted if need be; to be given back with put().

        Each get() counts, across processes. A layer that is committed or has children is mounted
        read-only. One without parent that is neither is its own directory and is not mounted, as
        in the original. *target* mounts in a directory of the caller's instead of
        ``HOME/<id>/merged``; *label* is a security label; *backend* is for this mount only. A
        mount that is there already is shared as it is. When its FUSE server has died it is mounted
        anew, and that is warned of.

        Raises UnknownLayerError (ENOENT), DamagedLayerError (EUCLEAN), DialectError (EOPNOTSUPP),
        LayerInUseError (EBUSY: mounted at another place, read-only, or in another mount
        namespace), QuotaError (EOPNOTSUPP), OptionError (EINVAL), UnavailableError (ENODEV),
        MountError with the kernel's errno, OSError.
        """
        place = None if target is None else os.fsencode(target)
        return self._mounts.get(
            LayerId(layer), label, backend=backend, read_only=read_only, target=place
        )

    def put(self, layer: str, *, force: bool = False) -> bool:
        """Give back one get(); the last one unmounts. False when the layer is not mounted.

        A mount without any get(), of a process that died, is ended by one put(). With *force* the
        mount is taken away lazily, whoever uses it and however often it was asked for. That the
        FUSE server had died is raised after the mount is gone. Raises UnknownLayerError (ENOENT),
        BusyError (EBUSY; then it still counts), MountError, OSError.
        """
        return self._mounts.put(LayerId(layer), force=force)

    @contextlib.contextmanager
    def mounted(
        self,
        layer: str,
        label: str = "",
        *,
        backend: Choice | None = None,
        read_only: bool = False,
        target: str | bytes | os.PathLike[str] | None = None,
    ) -> Iterator[Path]:
        """get() for the length of a ``with`` block, put() at its end. Raises what they raise."""
        path = self.get(layer, label, backend=backend, read_only=read_only, target=target)
        try:
            yield path
        finally:
            self.put(layer)

    # --- content ----------------------------------------------------------------------------------

    def apply(
        self,
        layer: str,
        stream: Readable,
        parent: Parent = DIRECT,
        *,
        expected: Digest | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Applied:
        """Unpack the tar *stream*, compressed or not, into *layer*; all of it or nothing.

        *stream* needs ``read(n)`` only. *expected* is the DiffID it must have. What the layer holds
        already stays below the stream's content. A layer that was not created writable is
        committed by this. *parent* is what the stream was taken against; the result is the same
        for any. *progress* hears the bytes read so far. Raises ArchiveError (EBADMSG), LimitError
        (EFBIG), DigestError (EBADMSG), CommittedError (EROFS), HasChildrenError and
        LayerInUseError (EBUSY), UnknownLayerError (ENOENT), OSError.
        """
        return self._diffs.apply(
            LayerId(layer), stream, parent, expected=expected, progress=progress
        )

    def import_layer(
        self,
        layer: str,
        parent: str | None,
        stream: Readable,
        *,
        expected: Digest | None = None,
        chain_id: Digest | None = None,
        created_by: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Applied:
        """create() and apply() in one step: a committed layer appears whole, or none does.

        Raises LayerExistsError (EEXIST) when somebody was faster, and what those two raise.
        """
        return self._diffs.import_layer(
            LayerId(layer),
            None if parent is None else LayerId(parent),
            stream,
            expected=expected,
            record={"chain_id": chain_id, "created_by": created_by},
            progress=progress,
        )

    def diff(
        self,
        layer: str,
        out: Writable,
        parent: Parent = DIRECT,
        *,
        exact: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Digest:
        """Write what *layer* changes as an uncompressed tar stream; returns its digest.

        Against its own parent by default, everything for None, else against any other layer.
        Deletions are ``.wh.`` names; the same layer gives the same bytes each time. With *exact*
        a layer that was unpacked from a stream gives that very stream, where it was recorded.
        *progress* hears the bytes written so far. Raises UnknownLayerError (ENOENT),
        DamagedLayerError (EUCLEAN), ArchiveError (EBADMSG, a name that no stream can carry), what
        get() raises where trees are compared, OSError.
        """
        return self._diffs.diff(LayerId(layer), out, parent, exact=exact, progress=progress)

    def open_diff(
        self, layer: str, parent: Parent = DIRECT, *, exact: bool = False
    ) -> contextlib.AbstractContextManager[Readable]:
        """diff() as something to read from, for a ``with`` block; errors come out of read()."""
        return self._diffs.open_diff(LayerId(layer), parent, exact=exact)

    def diff_between(
        self,
        old: str | None,
        new: str,
        out: Writable,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Digest:
        """What turns the tree of *old* into that of *new*, as diff() writes it."""
        return self.diff(new, out, None if old is None else LayerId(old), progress=progress)

    def diff_size(self, layer: str, parent: Parent = DIRECT) -> Size:
        """Bytes (st_size, hard links once) and inodes of what diff() would write.

        Raises as diff().
        """
        return self._diffs.diff_size(LayerId(layer), parent)

    def changes(self, layer: str, parent: Parent = DIRECT) -> list[Change]:
        """Paths that *layer* adds, changes or deletes, sorted. Raises as diff()."""
        return self._diffs.changes(LayerId(layer), parent)

    # --- the store's health -----------------------------------------------------------------------

    def check(
        self, *, deep: bool = False, progress: Callable[[int], None] | None = None
    ) -> list[Finding]:
        """What is wrong with the store, each with a reason; *deep* reads all content. OSError."""
        return self._trees.check(deep=deep, progress=progress)

    def repair(self) -> list[str]:
        """Mend what can be mended, set aside the rest; sentences about what was done. OSError."""
        return self._trees.repair()

    def prune(
        self,
        *,
        dry_run: bool = False,
        unused: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Remove what interrupted work left behind; sentences about what was (or would be) removed.

        With *unused* also committed layers that no layer, image or mount needs. *progress* hears
        the bytes freed so far. Raises StoreError (EROFS), OSError.
        """
        return self._trees.prune(dry_run=dry_run, unused=unused, progress=progress)

    # --- new layers from old ----------------------------------------------------------------------

    def flatten(
        self,
        layer: str,
        new_id: str | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> LayerId:
        """A new committed layer without parent that shows the same tree as *layer*.

        Raises as diff(), create() and apply().
        """
        return self._trees.flatten(LayerId(layer), new_id, progress=progress)

    def rebase(
        self,
        layer: str,
        parent: str | None,
        new_id: str | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Rebased:
        """A new layer on *parent* with the changes of *layer*, and where both disagree.

        The layer wins; *layer* itself stays. Raises as diff(), create() and apply().
        """
        below = None if parent is None else LayerId(parent)
        return self._trees.rebase(LayerId(layer), below, new_id, progress=progress)


def _ranges(triples: Iterable[tuple[int, int, int]]) -> tuple[IdRange, ...]:
    ranges = tuple(IdRange(*triple) for triple in triples)
    for item in ranges:
        start, end = min(item.container, item.host), max(item.container, item.host)
        if start < 0 or item[2] < 1 or end + item[2] > 1 << 32:
            raise OptionError(
                f"id map {item.container}:{item.host}:{item.count} is not possible: ids are"
                " numbers below 2^32, and a range has at least one"
            )
    return ranges

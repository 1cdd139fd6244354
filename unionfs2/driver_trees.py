"""Work on many layers at once: the forest, its health, and new layers made from old ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import imagerecords, rebasing, storecheck, storelayout, storeprune, storerepair
from . import which as whichlayer
from .driver_core import DIRECT, Core, Progress
from .driver_diffs import Diffs
from .driver_layers import Layers, LayerStatus
from .driver_mounts import Mounts
from .errors import StoreError, UnionFSError, sentence, show
from .rebasing import Conflict
from .storecheck import Finding
from .storemodel import LayerId
from .whiteout import Dialect

__all__ = ["Conflict", "Finding", "Holding", "Rebased", "TreeNode", "Trees"]


@dataclass(frozen=True, slots=True)
class Holding:
    """What one layer holds at a path.

    *path* is where in the layer, which differs where a directory was moved. *kind* is the type, or
    "whiteout". *role* is "visible", "merged" (a directory that adds to the visible one), "data"
    (the content of a visible file that has attributes only), or "" when *hidden_by* has something
    that hides it: *reason* says what.
    """

    layer: LayerId
    path: bytes
    kind: str
    role: str
    hidden_by: LayerId | None
    reason: str
    size: int  # bytes
    mode: int
    mtime_ns: int
    opaque: bool

    @property
    def visible(self) -> bool:
        """Whether this is what the merged tree shows, or a part of it."""
        return bool(self.role)


@dataclass(frozen=True, slots=True)
class TreeNode:
    """A layer in the forest: how deep it lies, and who stands directly on it."""

    layer: LayerStatus
    depth: int
    children: tuple[LayerId, ...]


@dataclass(frozen=True, slots=True)
class Rebased:
    """The new layer, and where its changes met those between the two parents."""

    id: LayerId
    conflicts: tuple[Conflict, ...]


class Trees:
    """What goes beyond one layer of one store."""

    def __init__(self, core: Core, mounts: Mounts, layers: Layers, diffs: Diffs) -> None:
        self._core = core
        self._store = core.store
        self._mounts = mounts
        self._layers = layers
        self._diffs = diffs

    def tree(self) -> tuple[TreeNode, ...]:
        """See Driver.tree()."""
        listed = {layer.id: layer for layer in self._layers.layer_list()}
        children: dict[LayerId | None, list[LayerId]] = {}
        for layer in listed.values():
            # What stands on something that is missing is shown all the same.
            parent = layer.parent if layer.parent in listed else None
            children.setdefault(parent, []).append(layer.id)
        nodes: list[TreeNode] = []
        waiting = [(layer, 0) for layer in reversed(children.get(None, []))]
        while waiting:
            layer_id, depth = waiting.pop()
            own = children.get(layer_id, [])
            nodes.append(TreeNode(listed[layer_id], depth, tuple(own)))
            waiting += [(child, depth + 1) for child in reversed(own)]
        seen = {node.layer.id for node in nodes}
        # Layers that are each other's parents, which only damage can bring about.
        nodes += [TreeNode(listed[layer], 0, ()) for layer in listed if layer not in seen]
        return tuple(nodes)

    def which(self, layer: LayerId, path: bytes) -> list[Holding]:
        """See Driver.which()."""
        known = self._store.layer(layer)
        dialect = Dialect(userxattr=known.record.dialect == "user")
        chain = (known.id, *known.chain)
        held = whichlayer.which([self._store.diff_path(each) for each in chain], path, dialect)
        return [_holding(one, chain) for one in held if one.kind is not None]

    # --- new layers from old ----------------------------------------------------------------------

    def flatten(self, layer: LayerId, new_id: str | None, *, progress: Progress | None) -> LayerId:
        """See Driver.flatten()."""
        new = _new_id(new_id)
        with self._diffs.open_diff(layer, None, exact=False) as stream:
            self._diffs.import_layer(
                new,
                None,
                stream,
                expected=None,
                record={"created_by": f"unionfs2 flatten {layer}"},
                progress=progress,
            )
        return new

    def rebase(
        self,
        layer: LayerId,
        parent: LayerId | None,
        new_id: str | None,
        *,
        progress: Progress | None,
    ) -> Rebased:
        """See Driver.rebase()."""
        new = _new_id(new_id)
        known = self._store.layer(layer)
        if parent is not None and (parent == layer or layer in self._store.layer(parent).chain):
            raise StoreError(
                f"layer {show(layer)} cannot be put on {show(parent)}, which is built on it:"
                " choose another parent"
            )
        found = tuple(self._conflicts(layer, parent))
        record = known.record
        with self._diffs.open_diff(layer, DIRECT, exact=False) as stream:
            self._diffs.import_layer(
                new,
                parent,
                stream,
                expected=None,
                record={"label": record.label, "created_by": record.created_by},
                progress=progress,
                writable=record.writable,
                commit=known.frozen,
                strip=parent is None,
            )
        return Rebased(new, found)

    def _conflicts(self, layer: LayerId, parent: LayerId | None) -> Iterator[Conflict]:
        known = self._store.layer(layer)
        old = self._store.lower_dirs(known)
        new: tuple[bytes, ...] = ()
        dialect = new_dialect = Dialect(userxattr=known.record.dialect == "user")
        if parent is not None:
            below = self._store.layer(parent)
            new = (self._store.diff_path(parent), *self._store.lower_dirs(below))
            new_dialect = Dialect(userxattr=below.record.dialect == "user")
        return rebasing.conflicts(self._store.diff_path(layer), old, new, dialect, new_dialect)

    # --- health -----------------------------------------------------------------------------------

    def check(self, *, deep: bool, progress: Progress | None) -> list[Finding]:
        """See Driver.check()."""
        return storecheck.check(
            self._store, deep=deep, digest=self._diffs.digest_of, progress=progress
        )

    def repair(self) -> list[str]:
        """See Driver.repair()."""
        self._core.refuse_read_only()
        return [str(line) for line in storerepair.repair(self._store)]

    def prune(self, *, dry_run: bool, unused: bool, progress: Progress | None) -> list[str]:
        """See Driver.prune()."""
        self._core.refuse_read_only()
        done = self._mounts.clean_stale(dry_run=dry_run)
        verb = "would remove" if dry_run else "removed"
        for gone in storeprune.prune(self._store, dry_run=dry_run):
            done.append(str(gone) if gone.error else f"{verb} {gone}")
        if unused:
            with imagerecords.locked(self._store):
                done += self._prune_unused(dry_run=dry_run, progress=progress)
        return done

    def _prune_unused(self, *, dry_run: bool, progress: Progress | None) -> list[str]:
        """Remove committed layers that no image, layer or mount needs, children first.

        needs: image lock, so that the images are asked once for all layers.
        """
        keep = imagerecords.roots(self._store) | self._mounts.in_use()
        # What has no date was made by another program, for a use that nobody here knows of.
        keep |= {layer.id for layer in self._layers.layer_list() if layer.created is None}
        done: list[str] = []
        freed = 0
        for layer in storeprune.unused_layers(self._store, keep):
            freed += self._layers.size(self._store.layer(layer)).bytes
            if not dry_run:
                try:
                    self._layers.remove_unasked(layer, force=False)
                except (UnionFSError, OSError) as exc:
                    done.append(f"layer {show(layer)} stays: {sentence(exc)}")
                    continue
            done.append(f"{'would remove' if dry_run else 'removed'} unused layer {show(layer)}")
            if progress is not None:
                progress(freed)
        return done


def _holding(held: whichlayer.Held, chain: tuple[LayerId, ...]) -> Holding:
    hidden = held.hidden
    return Holding(
        layer=chain[held.layer],
        path=held.path,
        kind=str(held.kind),
        role=held.role,
        hidden_by=None if hidden is None else chain[hidden.layer],
        reason="" if hidden is None else hidden.reason,
        size=held.size,
        mode=held.mode,
        mtime_ns=held.mtime_ns,
        opaque=held.opaque,
    )


def _new_id(text: str | None) -> LayerId:
    return storelayout.new_id() if text is None else storelayout.check_id(text)

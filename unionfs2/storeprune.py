"""Removing what nobody needs: left-overs always, committed layers only when asked."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .errors import StoreError, UnionFSError, sentence, show
from .layers import LayerStore
from .storecheck import Finding, StructureCheck
from .storefiles import open_dir
from .storeindex import Index, scan
from .storemodel import LayerId
from .storetrees import delete_tree

#: Findings that are nothing but rubbish.
_RUBBISH = frozenset(
    {
        "staging-abandoned",
        "trash",
        "temp-file",
        "link-dangling",
        "link-duplicate",
        "reference-dead",
    }
)


@dataclass(frozen=True, slots=True)
class Pruned:
    """One thing that was removed, or would be; ``error`` says why it could not be."""

    kind: str
    layer: LayerId | None
    path: bytes
    error: str | None = None

    def __str__(self) -> str:
        what = f"layer {show(self.layer)}" if self.kind == "layer" else show(self.path)
        return what if self.error is None else f"{what} stays: {self.error}"


def prune(
    store: LayerStore, *, dry_run: bool = False, keep: Collection[LayerId] | None = None
) -> list[Pruned]:
    """Remove left-overs: dead makers' layers, trash, links and references to nothing.

    With *keep*, the layers that images and other users need, also every committed layer that
    neither one of those, nor a layer that is not committed, is built on. With *dry_run* nothing
    is removed. The caller sees to it that *keep* stays true meanwhile.
    """
    done = _prune_rubbish(store, dry_run=dry_run)
    if keep is not None:
        done += _prune_layers(store, unused_layers(store, keep), dry_run=dry_run)
    return done


def _prune_rubbish(store: LayerStore, *, dry_run: bool) -> list[Pruned]:
    structure = store.structure
    with structure.lock.shared() if dry_run else structure.lock.exclusive() as held:
        if not dry_run:
            held.begin()
        index = scan(store.home_fd, structure.links_fd)
        findings = [
            item for item in StructureCheck(store, index).findings() if item.code in _RUBBISH
        ]
        done = [Pruned(item.code, None, item.path) for item in findings]
        if not dry_run:
            done = [_remove(store, item) for item in findings]
            structure.sync()
    if not dry_run:
        store.clear_staging()
        store.empty_trash()
    return done


def _remove(store: LayerStore, finding: Finding) -> Pruned:
    error = None
    if finding.code not in {"staging-abandoned", "trash"}:  # those after the lock is given back
        try:
            error = _delete(store, finding.path)
        except OSError as exc:
            error = sentence(exc)
    return Pruned(finding.code, None, finding.path, error)


def _delete(store: LayerStore, path: bytes) -> str | None:
    """Delete a file or a directory (an image in the making is one); why it could not be."""
    *folders, name = os.path.relpath(path, store.home).split(b"/")
    fd = os.dup(store.home_fd)
    try:
        for folder in folders:
            above, fd = fd, open_dir(fd, folder)
            os.close(above)
        left = delete_tree(fd, name)
    finally:
        os.close(fd)
    return os.strerror(left[0].errno) if left else None


# --- layers ---------------------------------------------------------------------------------------


def unused_layers(store: LayerStore, keep: Collection[LayerId]) -> list[LayerId]:
    """Committed layers that nobody needs, children before their parents."""
    needed: set[LayerId] = set()
    committed: dict[LayerId, int] = {}
    index = store.index()
    for layer in index.ids:
        try:
            found = store.layer(layer)
        except (StoreError, OSError):
            # Damaged: it stays, and so does whatever it may be built on.
            needed |= {layer, *_named_by(index.lowers.get(layer, ()), index)}
            continue
        if layer in keep or not found.frozen:
            needed |= {layer, *found.chain}
        else:
            committed[layer] = len(found.chain)
    return sorted(committed.keys() - needed, key=lambda layer: (-committed[layer], layer))


def _named_by(lower: tuple[str, ...], index: Index) -> Iterator[LayerId]:
    for short in lower:
        yield from index.claims.get(short, set())
        target = index.links.get(short)
        if target is not None:
            yield target


def _prune_layers(store: LayerStore, layers: list[LayerId], *, dry_run: bool) -> list[Pruned]:
    done = []
    for layer in layers:
        error = None
        if not dry_run:
            try:
                store.discard(layer)
            except (UnionFSError, OSError) as exc:
                error = sentence(exc)
        done.append(Pruned("layer", layer, store.layer_path(layer), error))
    return done

"""One layer, read from its files and checked against the index.

Every refusal is a DamagedLayerError that names layer, file, value and the way out; whatever is
wrong with one layer, all others can be read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import ondisk, storelayout
from . import syscalls as sc
from .errors import DamagedLayerError, UnknownLayerError, show
from .storefiles import open_dir, opened_dir, read_file
from .storehome import Home
from .storeindex import Index, looks_like_layer, read_link, read_lower
from .storelayout import WAY_OUT, damaged
from .storemodel import LayerId
from .storerecord import RECORD_BYTES_MAX, Record, parse_record


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, as its files describe it at one moment."""

    id: LayerId
    link: str  # short name
    lower: tuple[str, ...]  # short names below, uppermost first
    chain: tuple[LayerId, ...]  # the layers that those mean
    frozen: bool  # marked as committed
    committed: bool  # never changes again: frozen, or has children
    record: Record

    @property
    def parent(self) -> LayerId | None:
        """The layer directly below."""
        return self.chain[0] if self.chain else None


def open_layer(home: Home, layer: LayerId) -> int:
    """Descriptor of HOME/<id>. Raises UnknownLayerError, DamagedLayerError, StoreError."""
    name = storelayout.name_of_id(storelayout.check_id(layer))
    shown = show(os.path.join(home.path, name))
    try:
        fd = open_dir(home.fd, name)
    except FileNotFoundError as exc:
        raise UnknownLayerError(f"there is no layer {show(layer)} in {show(home.path)}") from exc
    except OSError as exc:
        if exc.errno not in {errno.ENOTDIR, errno.ELOOP}:
            raise
        raise DamagedLayerError(
            f"layer {show(layer)} is damaged: {shown} is not a directory; {WAY_OUT}"
        ) from exc
    if looks_like_layer(fd):
        return fd
    identity = os.fstat(fd)
    os.close(fd)
    now = sc.lstat_or_none(name, home.fd)
    if now is None or (now.st_dev, now.st_ino) != (identity.st_dev, identity.st_ino):
        # Removed or replaced between the two looks: what we saw was on its way out.
        return open_layer(home, layer)
    raise UnknownLayerError(
        f"{shown} is not a layer: it has neither {ondisk.LINK_NAME.decode()} nor"
        f" {ondisk.DIFF_NAME.decode()}; {WAY_OUT}"
    )


@contextmanager
def opened_diff(home: Home, layer: LayerId) -> Iterator[int]:
    """Descriptor of HOME/<id>/diff for the length of a block.

    needs: store lock, or a lock on the layer, while it is opened.
    """
    fd = open_layer(home, layer)
    try:
        with opened_dir(fd, ondisk.DIFF_NAME) as diff_fd:
            yield diff_fd
    except NotADirectoryError as exc:
        raise damaged(layer, "diff", "is not a directory") from exc
    finally:
        os.close(fd)


def read_layer(home: Home, index: Index, layer: LayerId) -> tuple[Layer, bool]:
    """The layer, and whether one of its links in ``l`` has to be mended.

    needs: store lock. Raises UnknownLayerError, DamagedLayerError, StoreError.
    """
    fd = open_layer(home, layer)
    try:
        link = read_link(fd, layer)
        lower = read_lower(fd, layer, link)
        record = read_record(fd, layer)
        marked = sc.lstat_or_none(ondisk.COMMITTED_NAME, fd) is not None
        _check_diff(fd, layer)
    finally:
        os.close(fd)
    if home.links_reason is not None and lower:
        raise DamagedLayerError(f"layer {show(layer)} cannot be used: {home.links_reason}")
    chain, broken = _chain(index, layer, link, lower)
    frozen = marked or record.committed_as == layer
    committed = frozen or bool(index.children(layer))
    return Layer(layer, link, lower, chain, frozen, committed, record), broken


def read_record(fd: int, layer: LayerId) -> Record:
    """The record of the layer whose directory is *fd*; the defaults where Docker wrote none."""
    try:
        text = read_file(fd, ondisk.RECORD_NAME, RECORD_BYTES_MAX)
    except FileNotFoundError:
        return Record()
    except OSError as exc:
        reason = exc.strerror or os.strerror(exc.errno or errno.EIO)
        raise damaged(layer, "layer.json", f"cannot be read ({reason})") from exc
    return parse_record(layer, text)


def _check_diff(fd: int, layer: LayerId) -> None:
    try:
        os.close(sc.open_dir(ondisk.DIFF_NAME, fd))
    except FileNotFoundError as exc:
        raise damaged(layer, "diff", "is missing") from exc
    except NotADirectoryError as exc:
        raise damaged(layer, "diff", "is not a directory") from exc


def _chain(
    index: Index, layer: LayerId, link: str, lower: tuple[str, ...]
) -> tuple[tuple[LayerId, ...], bool]:
    if index.resolve(link) != layer:
        others = index.claims.get(link, set()) - {layer}
        whose = index.links.get(link) or min(others, default=None)
        raise damaged(layer, "link", f"holds {link}, which leads to layer {show(whose)}")
    broken = index.links.get(link) != layer
    chain: list[LayerId] = []
    for short in lower:
        below = index.resolve(short)
        if below is None:
            raise damaged(layer, "lower", why_unresolved(index, short))
        if below == layer or below in chain:
            what = "the layer itself" if below == layer else f"layer {show(below)} twice"
            raise damaged(layer, "lower", f"names {what} (l/{short})")
        broken |= index.links.get(short) != below
        chain.append(below)
    return tuple(chain), broken


def why_unresolved(index: Index, short: str) -> str:
    """Why Index.resolve() finds no layer for a short name, as the end of a sentence."""
    claimants = sorted(index.claims.get(short, set()))
    target = index.links.get(short)
    if target is not None and target in index.own and claimants:
        return (
            f"names l/{short}, which leads to layer {show(target)} though layer"
            f" {show(claimants[0])} has that link"
        )
    if claimants:
        names = ", ".join(show(layer) for layer in claimants)
        return f"names l/{short}, which more than one layer could be: {names}"
    if short in index.links:
        what = "no layer" if target is None else f"layer {show(target)}, which is missing"
        return f"names l/{short}, which leads to {what}"
    return f"names l/{short}, which no layer has"

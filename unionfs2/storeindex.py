"""What a store consists of, read once: short names, links, lowers, and who is built on whom.

The truth is ``HOME/<id>`` and its ``link`` file; the entries of ``l`` are derived from it. What
contradicts itself stays in the index as it was found, so that one bad layer never hides another:
the question which layer a short name means is answered, or refused with a reason, at use.

An index is a value of one moment. Its user keeps it as long as the generation of the store and
the times of HOME and of ``l`` stay what they were (LayerStore), and applies its own changes.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from . import ondisk, storelayout
from . import syscalls as sc
from .errors import StoreError
from .storefiles import names_in, open_dir, read_file
from .storemodel import LayerId

T = TypeVar("T")

_LINK_BYTES_MAX: Final = 4096


@dataclass(slots=True)
class Index:
    """Who has which short name, and what is built on it."""

    #: Short name in the ``link`` file, None where that cannot be read or is malformed.
    own: dict[LayerId, str | None] = field(default_factory=dict)
    #: Short names in ``lower``; absent where that cannot be read or is malformed.
    lowers: dict[LayerId, tuple[str, ...]] = field(default_factory=dict)
    #: Entry of ``l`` -> layer its target names, None for any other target or type.
    links: dict[str, LayerId | None] = field(default_factory=dict)
    #: Layer -> entries of ``l`` that lead to it.
    leading: dict[LayerId, set[str]] = field(default_factory=dict)
    #: Short name -> layers whose ``link`` file holds it.
    claims: dict[str, set[LayerId]] = field(default_factory=dict)
    #: Short name -> layers whose ``lower`` begins with it.
    tops: dict[str, set[LayerId]] = field(default_factory=dict)
    #: Layers whose ``lower`` is not their parent's name and lower: hand-made or damaged.
    irregular: set[LayerId] = field(default_factory=set)

    @property
    def ids(self) -> list[LayerId]:
        """All layers, sorted."""
        return sorted(self.own)

    def resolve(self, short: str) -> LayerId | None:
        """The layer that a short name means; None when nobody or more than one could be meant."""
        claimants = self.claims.get(short, set())
        target = self.links.get(short)
        if target in claimants:
            return target
        if target is not None and target in self.own:
            # A second name of a layer, as peers left them: good unless somebody else claims it.
            return None if claimants else target
        return next(iter(claimants)) if len(claimants) == 1 else None

    def names_of(self, layer: LayerId) -> set[str]:
        """Every short name that leads to *layer*, or would once its link is mended."""
        own = self.own.get(layer)
        return self.leading.get(layer, set()) | ({own} if own else set())

    def parent(self, layer: LayerId) -> LayerId | None:
        """The layer directly below; None for a base layer and where it cannot be told."""
        lower = self.lowers.get(layer)
        return self.resolve(lower[0]) if lower else None

    def children(self, layer: LayerId) -> set[LayerId]:
        """Layers built on *layer*: its children, and whoever else has it in its lower."""
        names = self.names_of(layer)
        found: set[LayerId] = set()
        for short in names:
            if self.resolve(short) == layer:
                found |= self.tops.get(short, set())
        found |= {user for user in self.irregular if names & set(self.lowers.get(user, ()))}
        return found - {layer}

    # --- changes ---

    def add(self, layer: LayerId, own: str | None, lower: tuple[str, ...] | None) -> None:
        """A layer that was found or made; its link is noted by the caller."""
        self.own[layer] = own
        if own is not None:
            self.claims.setdefault(own, set()).add(layer)
        if lower is not None:
            self.lowers[layer] = lower
            if lower:
                self.tops.setdefault(lower[0], set()).add(layer)

    def remove(self, layer: LayerId) -> None:
        """A layer that was taken away; its links are noted by the caller."""
        own = self.own.pop(layer, None)
        if own is not None:
            self.claims[own].discard(layer)
            if not self.claims[own]:
                del self.claims[own]
        lower = self.lowers.pop(layer, ())
        if lower:
            self.tops[lower[0]].discard(layer)
            if not self.tops[lower[0]]:
                del self.tops[lower[0]]
        self.irregular.discard(layer)

    def rename(self, old: LayerId, new: LayerId) -> None:
        """A layer that has another id now, its links included."""
        own, lower, odd = self.own[old], self.lowers.get(old), old in self.irregular
        self.remove(old)
        self.add(new, own, lower)
        if odd:
            self.irregular.add(new)
        for short in self.leading.get(old, set()).copy():
            self.set_link(short, new)

    def set_link(self, short: str, target: LayerId | None) -> None:
        """An entry of ``l`` that was found or made."""
        self.drop_link(short)
        self.links[short] = target
        if target is not None:
            self.leading.setdefault(target, set()).add(short)

    def drop_link(self, short: str) -> None:
        """An entry of ``l`` that is gone."""
        target = self.links.pop(short, None)
        if target is not None:
            self.leading[target].discard(short)
            if not self.leading[target]:
                del self.leading[target]

    def classify(self, layer: LayerId) -> None:
        """Note whether *layer*'s lower is what its parent's files say it should be."""
        lower = self.lowers.get(layer)
        parent = self.parent(layer)
        self.irregular.discard(layer)
        if lower and (parent is None or self.lowers.get(parent) != lower[1:]):
            self.irregular.add(layer)


def scan(home_fd: int, links_fd: int | None) -> Index:
    """Read the whole store. Never fails because of one layer; OSError of HOME and ``l`` only."""
    index = Index()
    for name in names_in(home_fd):
        layer = storelayout.id_of_name(name)
        if layer is not None:
            _scan_layer(index, home_fd, name, layer)
    if links_fd is not None:
        for name in names_in(links_fd):
            if storelayout.is_short_name(name):
                index.set_link(sys.intern(name.decode("ascii")), read_target(links_fd, name))
    for layer in index.lowers:
        index.classify(layer)
    return index


def _scan_layer(index: Index, home_fd: int, name: bytes, layer: LayerId) -> None:
    try:
        fd = open_dir(home_fd, name)
    except OSError:
        return  # a file or a link is no layer; neither is what just went away
    try:
        if looks_like_layer(fd):
            own = _parse(lambda: read_link(fd, layer))
            lower = _parse(lambda: read_lower(fd, layer, own))
            index.add(layer, own, lower)
    finally:
        os.close(fd)


def _parse(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (OSError, StoreError):
        return None


def looks_like_layer(fd: int) -> bool:
    """Whether a directory in HOME is a layer, though perhaps a damaged one."""
    return any(
        sc.lstat_or_none(name, fd) is not None
        for name in (ondisk.LINK_NAME, ondisk.DIFF_NAME, ondisk.LOWER_NAME, ondisk.RECORD_NAME)
    )


def read_link(fd: int, layer: LayerId) -> str:
    """Short name of the layer whose directory is *fd*. Raises DamagedLayerError."""
    text = _read(fd, layer, ondisk.LINK_NAME, _LINK_BYTES_MAX)
    if text is None:
        raise storelayout.damaged(layer, "link", "is missing")
    return sys.intern(storelayout.parse_link(layer, text))


def read_lower(fd: int, layer: LayerId, own: str | None) -> tuple[str, ...]:
    """Short names below a layer, uppermost first. Raises DamagedLayerError."""
    text = _read(fd, layer, ondisk.LOWER_NAME, storelayout.TEXT_BYTES_MAX)
    if text is None:
        return ()
    return tuple(map(sys.intern, storelayout.parse_lower(layer, text, own)))


def _read(fd: int, layer: LayerId, name: bytes, limit: int) -> bytes | None:
    try:
        return read_file(fd, name, limit)
    except FileNotFoundError:
        return None
    except OSError as exc:
        what = "is too long"
        if exc.errno in {errno.EINVAL, errno.ELOOP, errno.ENXIO}:
            what = "is not a regular file"
        elif exc.errno != errno.EFBIG:
            what = f"cannot be read ({os.strerror(exc.errno or errno.EIO)})"
        raise storelayout.damaged(layer, name.decode(), what) from exc


def read_target(links_fd: int, name: bytes) -> LayerId | None:
    """Layer that ``l/<name>`` leads to; None when it is anything else than such a link."""
    try:
        return storelayout.layer_of_target(os.readlink(name, dir_fd=links_fd))
    except OSError:
        return None

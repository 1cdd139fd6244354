"""Small values that pass between the layer store, the driver and their users."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple, NewType

#: Name of a layer: one path component, opaque to everybody but its maker.
LayerId = NewType("LayerId", str)

#: "sha256:" and 64 lower-case hex digits (OCI image-spec, descriptor.md).
Digest = NewType("Digest", str)


class Kind(str, enum.Enum):
    """What happened to a path, as ``docker diff`` writes it."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"

    def __str__(self) -> str:
        return self.value


class Change(NamedTuple):
    """One path that a layer changes: absolute inside the layer, so it begins with a slash."""

    path: bytes
    kind: Kind


class Size(NamedTuple):
    """What a tree takes: bytes of distinct inodes (st_size of files), number of inodes."""

    bytes: int = 0
    inodes: int = 0


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of a writable layer; None is no limit. Bytes count allocated blocks."""

    size_bytes: int | None = None
    inodes: int | None = None

    def __bool__(self) -> bool:
        return self.size_bytes is not None or self.inodes is not None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tar stream may ask for at most, so that no archive fills a machine by surprise."""

    bytes_max: int = 1 << 40  # of all files together, holes included
    entries_max: int = 20_000_000
    path_bytes_max: int = 4096
    header_bytes_max: int = 1 << 20  # of one extended header
    depth_max: int = 1024  # of directories


class Applied(NamedTuple):
    """What apply() did: digest of the uncompressed stream, and what is on disk now."""

    diff_id: Digest
    size: Size
    entries: int

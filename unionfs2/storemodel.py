"""Small values that pass between the layer store, the driver and their users."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import NamedTuple, NewType

from .errors import ArchiveError

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


class IdRange(NamedTuple):
    """*length* ids: *container* and up inside, *host* and up on the disk."""

    container: int
    host: int
    length: int


@dataclass(frozen=True, slots=True)
class IdMaps:
    """How ids of a tar stream, the container's, become ids on the disk. Empty: they stay."""

    uid: tuple[IdRange, ...] = ()
    gid: tuple[IdRange, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.uid or self.gid)

    def uid_to_host(self, uid: int) -> int:
        """User id on the disk. ArchiveError when the container's *uid* is not mapped."""
        return _map_id(self.uid, uid, "user", to_host=True)

    def gid_to_host(self, gid: int) -> int:
        """Group id on the disk. ArchiveError when the container's *gid* is not mapped."""
        return _map_id(self.gid, gid, "group", to_host=True)

    def uid_to_container(self, uid: int) -> int:
        """User id in the container. ArchiveError when no id of it is stored as *uid*."""
        return _map_id(self.uid, uid, "user", to_host=False)

    def gid_to_container(self, gid: int) -> int:
        """Group id in the container. ArchiveError when no id of it is stored as *gid*."""
        return _map_id(self.gid, gid, "group", to_host=False)

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        """Owner and group on the disk."""
        return self.uid_to_host(uid), self.gid_to_host(gid)

    def to_container(self, uid: int, gid: int) -> tuple[int, int]:
        """Owner and group in the container."""
        return self.uid_to_container(uid), self.gid_to_container(gid)


def _map_id(ranges: tuple[IdRange, ...], number: int, what: str, *, to_host: bool) -> int:
    if not ranges:
        return number
    for item in ranges:
        source, target = (item.container, item.host) if to_host else (item.host, item.container)
        if source <= number < source + item.length:
            return target + number - source
    where = "in the container" if to_host else "on the disk"
    raise ArchiveError(
        f"{what} id {number} {where} is not covered by the id maps of the store",
        errno=errno.EOVERFLOW,
    )

"""Small frozen values that pass between the core and its doors."""

from __future__ import annotations

from typing import NamedTuple, NewType

NodeId = NewType("NodeId", int)
HandleId = NewType("HandleId", int)


class Caller(NamedTuple):
    """Who asks: ids in the user namespace of the mount, umask as the process has it."""

    uid: int
    gid: int
    pid: int = 0
    umask: int = 0


class Entry(NamedTuple):
    """One name of a listing: d_ino as the merged view shows it, kind as S_IFMT bits."""

    name: bytes
    ino: int
    kind: int


class SetAttr(NamedTuple):
    """Fields to change; None leaves a field alone. Times in ns since the epoch."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None

"""Unpacking and packing in tests: directories as arguments, bytes as streams, GNU tar beside it."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support.tree import Snapshot, snapshot
from unionfs2.archive.read import unpack
from unionfs2.archive.split import SplitWriter, rebuild
from unionfs2.archive.write import pack
from unionfs2.storemodel import Applied
from unionfs2.whiteout import Dialect

TRUSTED: Final = Dialect(userxattr=False)
USER: Final = Dialect(userxattr=True)

#: Options with which GNU tar keeps everything.
GNU_ALL: Final = ("--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of directory *path*, which is made if missing."""
    path.mkdir(exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def extract(data: bytes, path: Path, *, dialect: Dialect = TRUSTED, **options: Any) -> Applied:
    """unpack() of *data* into *path*."""
    with opened(path) as fd:
        return unpack(io.BytesIO(data), fd, dialect=dialect, **options)


def packed(path: Path, *, dialect: Dialect = TRUSTED, **options: Any) -> bytes:
    """pack() of *path*."""
    out = io.BytesIO()
    with opened(path) as fd:
        pack(fd, out, dialect=dialect, **options)
    return out.getvalue()


def extract_recorded(data: bytes, path: Path, record: Path, **options: Any) -> Applied:
    """extract() that keeps what rebuilt() needs in the directory *record*."""
    with opened(record) as fd, SplitWriter.create(fd) as split:
        return extract(data, path, split=split, **options)


def rebuilt(path: Path, record: Path) -> bytes:
    """rebuild() from what extract_recorded() left."""
    out = io.BytesIO()
    split_fd = os.open(record / "tar-split", os.O_RDONLY)
    try:
        with opened(path) as fd:
            rebuild(split_fd, fd, out)
    finally:
        os.close(split_fd)
    return out.getvalue()


def gnu_tar(path: Path, *options: str) -> bytes:
    """What GNU tar makes of the directory *path*."""
    command = ["tar", "-C", str(path), "--sort=name", *GNU_ALL, *options, "-cf", "-", "."]
    return subprocess.run(command, check=True, capture_output=True).stdout


def gnu_untar(data: bytes, path: Path, *options: str) -> str:
    """Let GNU tar extract *data* into *path*; returns what it complained about."""
    path.mkdir(exist_ok=True)
    command = ["tar", "-C", str(path), *GNU_ALL, "-p", *options, "-xf", "-"]
    done = subprocess.run(command, check=True, input=data, capture_output=True)
    return done.stderr.decode(errors="replace")


def looked(path: Path, keep: Callable[[bytes], bool] = lambda _: True) -> Snapshot:
    """snapshot() without the paths that *keep* refuses."""
    return {name: entry for name, entry in snapshot(path).items() if keep(name)}

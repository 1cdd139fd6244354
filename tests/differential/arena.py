"""Where a run puts its directories: a scratch file system of its own, removed afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.differential import rawcalls
from tests.differential.objects import names_quietly
from tests.differential.sides import force_unmount

#: Making a file system for the arena; "dir" is a plain directory of the machine's own.
_MAKERS: Final = {
    "ext4": ["mkfs.ext4", "-q", "-U", "random", "-O", "^has_journal", "-N", "60000"],
    "xfs": ["mkfs.xfs", "-q"],
}
KINDS: Final = ("ext4", "xfs", "tmpfs", "dir")


class ArenaError(Exception):
    """This kind of scratch file system cannot be had here; the message says why."""


def best() -> str:
    """ext4 where an image can be mounted, else a plain directory."""
    try:
        with arena("ext4"):
            return "ext4"
    except ArenaError:
        return "dir"


@contextmanager
def arena(kind: str = "ext4") -> Iterator[bytes]:
    """A directory (mode 0755) on a fresh file system of *kind*. ArenaError."""
    base = Path(tempfile.mkdtemp(prefix="unionfs2-diff-", dir=_fast_place(kind)))
    base.chmod(0o755)
    place = base / "arena"
    place.mkdir()
    try:
        with _mounted(kind, base, place):
            yield os.fsencode(place)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _fast_place(kind: str) -> str:
    # An image in memory makes the fsync of every copy-up cheap; real directories stay on disk.
    if kind in _MAKERS and os.access("/dev/shm", os.W_OK):
        return "/dev/shm"
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()


@contextmanager
def _mounted(kind: str, base: Path, place: Path) -> Iterator[None]:
    if kind == "dir":
        try:
            yield
        finally:
            clear(os.fsencode(place))
        return
    if kind == "tmpfs":
        _mount_tmpfs(place)
    else:
        _mount_image(kind, base / "image", place)
    try:
        yield
    finally:
        force_unmount(os.fsencode(place))


def _mount_tmpfs(place: Path) -> None:
    try:
        rawcalls.mount(b"arena", os.fsencode(place), b"tmpfs", 0, b"mode=755")
    except OSError as exc:
        raise ArenaError(f"mount of a tmpfs: {exc.strerror}") from exc


def _mount_image(kind: str, image: Path, place: Path) -> None:
    with image.open("wb") as file:
        file.truncate(512 << 20)
    for command in (
        [*_MAKERS[kind], str(image)],
        ["mount", "-o", "loop", "-t", kind, str(image), str(place)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=60)
        except FileNotFoundError as exc:
            raise ArenaError(f"{command[0]} is not installed") from exc
        if done.returncode:
            raise ArenaError(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")


def clear(where: bytes) -> None:
    """Empty a directory, whatever modes its contents have; mounts below are detached first."""
    for name in names_quietly(where):
        path = os.path.join(where, name)
        force_unmount(path)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, onerror=_make_writable)
        else:
            os.unlink(path)


def _make_writable(function: object, path: bytes | str, _info: object) -> None:
    """Give an owner without privilege its rights back, and try once more."""
    parent = os.path.dirname(path)
    os.chmod(parent, 0o700)
    if os.path.isdir(path) and not os.path.islink(path):
        os.chmod(path, 0o700)
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.unlink(path)

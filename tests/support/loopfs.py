"""A file system of one's own, in a file: made, mounted, unmounted."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Smallest that each mkfs takes; the files are sparse.
_SIZES: Final = {"ext4": 32 << 20, "xfs": 320 << 20}
_MAKE: Final = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
}
_WITH_QUOTA: Final = {
    "ext4": ("-O", "quota,project", "-E", "quotatype=prjquota"),
    "xfs": (),
}


class CannotError(Exception):
    """It cannot be made or mounted here; the text says why."""


@contextlib.contextmanager
def mounted(kind: str, directory: Path, *, quota: bool = True) -> Iterator[Path]:
    """An empty file system of *kind*, limiting projects unless *quota* is False."""
    image, target = directory / f"{kind}.image", directory / kind
    with image.open("wb") as file:
        file.truncate(_SIZES[kind])
    target.mkdir()
    try:
        _run([*_MAKE[kind], *(_WITH_QUOTA[kind] if quota else ()), str(image)])
        options = "loop,prjquota" if quota else "loop"
        _run(["mount", "-t", kind, "-o", options, str(image), str(target)])
        try:
            yield target
        finally:
            _run(["umount", str(target)])  # the loop device goes with it
    finally:
        target.rmdir()
        image.unlink()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
    except OSError as exc:
        raise CannotError(f"{command[0]}: {exc.strerror}") from exc
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["it failed"]
        raise CannotError(f"{command[0]}: {words[0]}")

"""A file system of one's own to measure on: ext4, fresh, with a journal, in a sparse file.

What a directory costs depends on what was deleted beside it before: ext4 without a journal, for
one, does not take a deleted inode again for minutes, and looks at each of them whenever it needs
one, so that a run slows itself down. A fresh image is the same on every machine and in every run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench import targets

SIZE: Final = 24 << 30


def why_not() -> str | None:
    """Why an image cannot be made here; None when it can."""
    if os.geteuid() != 0:
        return "mounting it needs root"
    if shutil.which("mkfs.ext4") is None:
        return "mkfs.ext4 is not installed"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    return None


@contextlib.contextmanager
def image(folder: Path) -> Iterator[Path]:
    """A directory on a new file system whose image lies in `folder`; all of it goes at the end."""
    file, place = folder / "image", folder / "disk"
    place.mkdir()
    with file.open("wb") as created:
        created.truncate(SIZE)
    targets.run_checked(["mkfs.ext4", "-q", "-F", "-m", "0", os.fspath(file)])
    # No inode tables are to be written by the kernel while we measure.
    options = "loop,noinit_itable"
    targets.run_checked(["mount", "-o", options, os.fspath(file), os.fspath(place)])
    try:
        yield place
    finally:
        try:
            targets.unmount(place)
        except OSError:  # somebody is still in there
            targets.unmount(place, lazy=True)

"""What a directory tree takes, counted without the code under test: the oracle of the limits."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

BLOCK = 4096


class Held(NamedTuple):
    """Bytes and inodes as a project quota counts them, whiteouts free."""

    bytes: int
    inodes: int


def cost(st: os.stat_result) -> int:
    """Bytes that one inode counts for."""
    if stat.S_ISREG(st.st_mode):
        return min(st.st_blocks * 512, -(-st.st_size // BLOCK) * BLOCK)
    return st.st_blocks * 512


def held(root: Path) -> Held:
    """Everything in *root*, itself included."""
    seen: dict[int, int] = {}
    pending = [os.fspath(root)]
    while pending:
        here = pending.pop()
        st = os.lstat(here)
        if stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
            continue
        seen[st.st_ino] = cost(st)
        if stat.S_ISDIR(st.st_mode):
            pending += [os.path.join(here, name) for name in os.listdir(here)]
    return Held(sum(seen.values()), len(seen))

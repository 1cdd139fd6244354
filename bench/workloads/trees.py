"""Lower trees that several families of work share. The same numbers give the same bytes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from bench.workloads.model import Tree

MIB: Final = 1 << 20
PER_DIRECTORY: Final = 100


def small_file(root: Path, number: int) -> str:
    """Path of one of the files of `build_small_files`."""
    return f"{root}/tree/{number // PER_DIRECTORY:03}/file-{number:05}"


def build_small_files(root: Path, size: int) -> None:
    """`size` files of 4 KiB in directories of 100."""
    rng = random.Random(1)
    for number in range(size):
        path = Path(small_file(root, number))
        if number % PER_DIRECTORY == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(rng.randbytes(4096))


def build_nothing(root: Path, size: int) -> None:
    """An empty directory."""
    del size
    (root / "empty").mkdir()


def build_large_file(root: Path, size: int) -> None:
    """One file of `size` MiB, each of them different."""
    block = random.Random(2).randbytes(MIB)
    with (root / "large").open("wb") as file:
        for number in range(size):
            file.write(number.to_bytes(8, "little") + block[8:])


class Words:
    """An endless source of text that looks like source code; equal seeds give equal text."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        names = [f"{self._rng.getrandbits(64):016x}" for _ in range(500)]
        self._lines = [f"# {name} {name[::-1]} {name[:7]}\n" for name in names]

    def text(self, mean_bytes: int) -> str:
        """Lines of about `mean_bytes` together, exponentially distributed as files are."""
        wanted = int(self._rng.expovariate(1 / mean_bytes)) + 44
        return "".join(self._rng.choices(self._lines, k=wanted // 44))


SMALL_FILES = Tree("small-files", build_small_files)
NOTHING = Tree("nothing", build_nothing)
LARGE_FILE = Tree("large-file", build_large_file)

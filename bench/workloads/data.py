"""Contents: reading and writing much, in order and at random, by calls and by mapping."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path
from typing import Final

from bench.workloads.model import Workload
from bench.workloads.trees import LARGE_FILE, MIB, NOTHING

PAGE: Final = 4096
PAGES: Final = MIB // PAGE
RANDOM_PER_MIB: Final = 20
READ_MIB: Final = 1024
READ_AGAIN: Final = 4
WRITE_MIB: Final = 256
_LINE = b"line %08d of a log that is written line by line\n"


def read_sequential(root: Path, size: int) -> None:
    """Read the large file from its beginning to its end, 1 MiB at a time."""
    buffer = mmap.mmap(-1, MIB)
    fd = os.open(root / "large", os.O_RDONLY)
    for _ in range(size):
        if os.readv(fd, [buffer]) != MIB:
            raise AssertionError("a short read")
    os.close(fd)


def read_sequential_again(root: Path, size: int) -> None:
    """The same, 4 times over."""
    for _ in range(READ_AGAIN):
        read_sequential(root, size)


def read_random(root: Path, size: int) -> None:
    """4 KiB at random places of the large file, 20 for each MiB of it."""
    rng = random.Random(4)
    fd = os.open(root / "large", os.O_RDONLY)
    for _ in range(size * RANDOM_PER_MIB):
        os.pread(fd, PAGE, rng.randrange(size * PAGES) * PAGE)
    os.close(fd)


def read_mapped(root: Path, size: int) -> None:
    """Map the large file and touch every page of it in order."""
    fd = os.open(root / "large", os.O_RDONLY)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        if len(mapped[::PAGE]) != size * PAGES:
            raise AssertionError("the file is shorter than it was")
    os.close(fd)


def write_sequential(root: Path, size: int) -> None:
    """Write a new file of `size` MiB, 1 MiB at a time, and fsync it."""
    block = memoryview(random.Random(5).randbytes(MIB))
    fd = os.open(root / "new", os.O_WRONLY | os.O_CREAT, 0o644)
    for _ in range(size):
        os.write(fd, block)
    os.fsync(fd)
    os.close(fd)


def make_file(root: Path, size: int) -> None:
    """A new file of `size` MiB, written and synced."""
    write_sequential(root, size)


def write_random(root: Path, size: int) -> None:
    """Write 4 KiB at random places of the new file, as often as it has pages."""
    rng = random.Random(6)
    page = rng.randbytes(PAGE)
    fd = os.open(root / "new", os.O_WRONLY)
    for _ in range(size * PAGES):
        os.pwrite(fd, page, rng.randrange(size * PAGES) * PAGE)
    os.close(fd)


def write_small(root: Path, size: int) -> None:
    """Append `size` lines to one new file, a write each."""
    fd = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in range(size):
        os.write(fd, _LINE % number)
    os.close(fd)


def write_mapped(root: Path, size: int) -> None:
    """Fill a new file through a shared mapping, and have the mapping written back."""
    block = random.Random(7).randbytes(MIB)
    with (root / "mapped").open("w+b") as file:
        os.ftruncate(file.fileno(), size * MIB)
        with mmap.mmap(file.fileno(), size * MIB) as mapped:
            for number in range(size):
                mapped[number * MIB : (number + 1) * MIB] = block
            mapped.flush()


WORKLOADS = [
    Workload(
        "read-seq", "read 1 GiB", "reading", LARGE_FILE, READ_MIB, read_sequential, unit="MiB"
    ),
    Workload(
        "read-seq-again", "the same again, 4 times", "reading", LARGE_FILE, READ_MIB,
        read_sequential_again, read_sequential, unit="MiB", times=READ_AGAIN,
    ),
    Workload(
        "read-random", "20,480 times 4 KiB of 1 GiB", "reading", LARGE_FILE, READ_MIB, read_random,
        unit="read", times=RANDOM_PER_MIB,
    ),
    Workload(
        "read-mmap", "touch every page of 1 GiB", "reading", LARGE_FILE, READ_MIB, read_mapped,
        unit="MiB",
    ),
    Workload(
        "write-seq", "write 256 MiB and fsync", "writing", NOTHING, WRITE_MIB, write_sequential,
        unit="MiB", changes=True,
    ),
    Workload(
        "write-random", "16,384 times 4 KiB into 64 MiB", "writing", NOTHING, 64, write_random,
        make_file, unit="write", times=PAGES, changes=True,
    ),
    Workload(
        "write-small", "30,000 lines of a log", "writing", NOTHING, 30_000, write_small,
        unit="write", changes=True,
    ),
    Workload(
        "write-mmap", "fill 128 MiB through a mapping, msync", "writing", NOTHING, 128,
        write_mapped, unit="MiB", changes=True,
    ),
]  # fmt: skip

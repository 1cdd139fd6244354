"""What is measured: named, plain functions of a path.

A workload builds a lower tree once (`build`, shared by all targets and repeats, never changed),
may set the mounted tree up (`before`, not timed) and then works in it (`work`, timed). Each of the
functions can be called by hand on any directory, under a profiler for example.

Cold means: mounted freshly, after ``sync`` and dropping the kernel's names and inodes (``echo 2``),
with the page cache of the backing files warm where they were read or written before: the runner
reads the lower files once in every repeat. So a cold figure tells about a union, not about a disk.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
_BLOCK = MIB


@dataclass(frozen=True, slots=True)
class Workload:
    """One thing to measure. `operations` divides the time; `size` is the number given to all."""

    name: str
    what: str
    size: int
    build: Callable[[Path, int], None]
    work: Callable[[Path, int], None]
    before: Callable[[Path, int], None] | None = None
    unit: str = "operation"

    def scaled(self, divisor: int) -> Workload:
        """The same with a smaller size, for a quick look."""
        size = max(8, self.size // divisor)
        return Workload(self.name, self.what, size, self.build, self.work, self.before, self.unit)


# --- lower trees ----------------------------------------------------------------------------------


def build_nothing(lower: Path, size: int) -> None:
    """An empty lower."""
    del size
    (lower / "empty").mkdir()


def build_small_files(lower: Path, size: int) -> None:
    """`size` files of 4 KiB in directories of 100."""
    rng = random.Random(1)
    for number in range(size):
        path = _small_file(lower, number)
        if number % 100 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(rng.randbytes(4096))


def _small_file(root: Path, number: int) -> Path:
    return root / f"tree/{number // 100:03}/file-{number:05}"


def build_flat(lower: Path, size: int) -> None:
    """`size` empty files in one directory."""
    (lower / "flat").mkdir()
    for number in range(size):
        (lower / f"flat/entry-{number:06}").touch()


def build_large_file(lower: Path, size: int) -> None:
    """One file of `size` MiB."""
    block = random.Random(2).randbytes(_BLOCK)
    with (lower / "large").open("wb") as file:
        for number in range(size):
            file.write(number.to_bytes(8, "little") + block[8:])


def build_archive(lower: Path, size: int) -> None:
    """A tar archive of `size` files like those of a source tree, beside nothing else."""
    source = lower / "source"
    source.mkdir()
    rng = random.Random(3)
    for number in range(size):
        path = source / f"package-{number // 50}/module-{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(int(rng.expovariate(1 / 6000))))
    subprocess.run(["tar", "-C", lower, "-cf", lower / "source.tar", "source"], check=True)
    subprocess.run(["rm", "-rf", source], check=True)


# --- looking --------------------------------------------------------------------------------------


def stat_each(root: Path, size: int) -> None:
    """Stat each small file once."""
    for number in range(size):
        os.stat(_small_file(root, number))


def walk(root: Path, size: int) -> None:
    """List every directory and stat every entry, as find and ls -lR do."""
    del size
    pending = [os.fspath(root)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def read_each(root: Path, size: int) -> None:
    """Open, read and close each small file."""
    for number in range(size):
        fd = os.open(_small_file(root, number), os.O_RDONLY)
        os.read(fd, 8192)
        os.close(fd)


def read_all_warm(root: Path, size: int) -> None:
    """As read_each, five times over."""
    for _ in range(5):
        read_each(root, size)


def stat_missing(root: Path, size: int) -> None:
    """Ask for names that do not exist, each once, as a search path does."""
    for number in range(size):
        try:
            os.stat(root / f"tree/{number % 30:03}/missing-{number}")
        except OSError as exc:
            if exc.errno != errno.ENOENT:
                raise


def stat_missing_again(root: Path, size: int) -> None:
    """The same few missing names, ten times."""
    for _ in range(10):
        stat_missing(root, size // 10)


def list_large(root: Path, size: int) -> None:
    """List one large directory twice."""
    for _ in range(2):
        if len(os.listdir(root / "flat")) != size:
            raise AssertionError("the listing is not complete")


# --- data -----------------------------------------------------------------------------------------


def read_sequential(root: Path, size: int) -> None:
    """Read the large file from its beginning to its end, 1 MiB at a time."""
    buffer = mmap.mmap(-1, _BLOCK)
    fd = os.open(root / "large", os.O_RDONLY)
    for _ in range(size):
        if os.readv(fd, [buffer]) != _BLOCK:
            raise AssertionError("a short read")
    os.close(fd)


def read_random(root: Path, size: int) -> None:
    """4 KiB at random places of the large file, 20 for each MiB of it."""
    rng = random.Random(4)
    fd = os.open(root / "large", os.O_RDONLY)
    for _ in range(size * 20):
        os.pread(fd, 4096, rng.randrange(size * 256) * 4096)
    os.close(fd)


def write_sequential(root: Path, size: int) -> None:
    """Write a new file of `size` MiB, 1 MiB at a time, and fsync it."""
    block = memoryview(os.urandom(_BLOCK))
    fd = os.open(root / "new", os.O_WRONLY | os.O_CREAT, 0o644)
    for _ in range(size):
        os.write(fd, block)
    os.fsync(fd)
    os.close(fd)


def write_small(root: Path, size: int) -> None:
    """Append `size` lines to one new file, a write each."""
    fd = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in range(size):
        os.write(fd, b"line %08d of a log that is written line by line\n" % number)
    os.close(fd)


# --- changing -------------------------------------------------------------------------------------


def untar(root: Path, size: int) -> None:
    """Unpack the archive next to itself."""
    subprocess.run(["tar", "-C", root, "-xf", root / "source.tar"], check=True)
    if len(os.listdir(root / "source")) != -(-size // 50):
        raise AssertionError("the archive was not unpacked completely")


def remove_tree(root: Path, size: int) -> None:
    """Remove the lower tree of small files."""
    del size
    subprocess.run(["rm", "-rf", root / "tree"], check=True)
    if (root / "tree").exists():
        raise AssertionError("the tree is still there")


def remove_unpacked(root: Path, size: int) -> None:
    """Remove what untar unpacked."""
    del size
    subprocess.run(["rm", "-rf", root / "source"], check=True)


def create_unlink(root: Path, size: int) -> None:
    """Create and unlink files, one after the other."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(size):
        name = f"f{number}"
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=fd))
        os.unlink(name, dir_fd=fd)
    os.close(fd)


def create_rename(root: Path, size: int) -> None:
    """Write a small file aside and rename it over the old one, as editors and dpkg do."""
    for number in range(size):
        new = root / f"config-{number % 50}.new"
        new.write_bytes(b"content")
        new.rename(root / f"config-{number % 50}")


def append_copy_up(root: Path, size: int) -> None:
    """Append a line to each small lower file: one copy-up each."""
    for number in range(size):
        with _small_file(root, number).open("ab") as file:
            file.write(b"x")


def chown_copy_up(root: Path, size: int) -> None:
    """Change the owner of each small lower file: one copy-up each."""
    for number in range(size):
        os.chown(_small_file(root, number), 1000, 1000)


def first_write_to_large(root: Path, size: int) -> None:
    """Open the large lower file for writing: one large copy-up."""
    del size
    os.close(os.open(root / "large", os.O_WRONLY))


ALL = [
    Workload("stat-cold", "stat 3 000 files", 3000, build_small_files, stat_each, unit="file"),
    Workload(
        "stat-warm", "the same again", 3000, build_small_files, stat_each, stat_each, unit="file"
    ),
    Workload("walk-cold", "find and stat", 3000, build_small_files, walk, unit="file"),
    Workload("read-cold", "read 3 000 of 4 KiB", 3000, build_small_files, read_each, unit="file"),
    Workload(
        "read-warm", "read all 5 times", 1000, build_small_files, read_all_warm, read_each
    ),
    Workload("missing-cold", "names not there", 3000, build_small_files, stat_missing),
    Workload("missing-again", "the same 10 times", 3000, build_small_files, stat_missing_again),
    Workload("list-large", "list a directory twice", 20_000, build_flat, list_large, unit="entry"),
    Workload("read-seq", "256 MiB", 256, build_large_file, read_sequential, unit="MiB"),
    Workload("read-random", "20 of 4 KiB per MiB", 64, build_large_file, read_random, unit="MiB"),
    Workload("write-seq", "256 MiB and fsync", 256, build_nothing, write_sequential, unit="MiB"),
    Workload("write-small", "lines of a log", 5000, build_nothing, write_small, unit="write"),
    Workload("untar", "1 500 files", 1500, build_archive, untar, unit="file"),
    Workload("rm-lower", "rm -rf of 3 000", 3000, build_small_files, remove_tree, unit="file"),
    Workload(
        "rm-upper", "rm -rf of 1 500 new", 1500, build_archive, remove_unpacked, untar, unit="file"
    ),
    Workload("create-unlink", "one by one", 2000, build_nothing, create_unlink),
    Workload("create-rename", "replace by rename", 1000, build_nothing, create_rename),
    Workload("copyup-append", "append to 300", 300, build_small_files, append_copy_up, unit="file"),
    Workload("copyup-chown", "chown of 300", 300, build_small_files, chown_copy_up, unit="file"),
    Workload(
        "copyup-large", "open 128 MiB to write", 128, build_large_file, first_write_to_large,
        unit="MiB",
    ),
]  # fmt: skip
BY_NAME = {workload.name: workload for workload in ALL}

# what a release is first asked about
HEADLINE = ("stat-cold", "read-cold", "untar", "rm-lower", "read-seq", "write-seq")

"""Names that come and go, and lower files that are changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from bench.workloads.model import Step, Tree, Workload, command
from bench.workloads.trees import LARGE_FILE, NOTHING, SMALL_FILES, Words, small_file

ARCHIVED: Final = 2000
_PER_PACKAGE: Final = 50
COPY_UP: Final = 300


def build_archive(root: Path, size: int) -> None:
    """A tar archive of `size` files like those of a source tree, beside nothing else."""
    source = root / "source"
    words = Words(3)
    for number in range(size):
        path = source / f"package-{number // _PER_PACKAGE}/module-{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words.text(6000))
    command(["tar", "-C", root, "-cf", root / "source.tar", "source"])
    command(["rm", "-rf", source])


def untar(root: Path, size: int) -> None:
    """Unpack the archive next to itself."""
    command(["tar", "-C", root, "-xf", root / "source.tar"])
    if len(os.listdir(root / "source")) != -(-size // _PER_PACKAGE):
        raise AssertionError("the archive was not unpacked completely")


def remove_tree(root: Path, size: int) -> None:
    """Remove the lower tree of small files."""
    del size
    command(["rm", "-rf", root / "tree"])
    if (root / "tree").exists():
        raise AssertionError("the tree is still there")


def remove_unpacked(root: Path, size: int) -> None:
    """Remove what untar unpacked."""
    del size
    command(["rm", "-rf", root / "source"])


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
        new = f"{root}/config-{number % 50}.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(fd, b"content")
        os.close(fd)
        os.rename(new, f"{root}/config-{number % 50}")


def append_copy_up(root: Path, size: int) -> None:
    """Append a line to each small lower file: one copy-up each."""
    for number in range(size):
        fd = os.open(small_file(root, number), os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"x")
        os.close(fd)


def chown_copy_up(root: Path, size: int) -> None:
    """Change the owner of each small lower file: one copy-up each."""
    uid = 1000 if os.geteuid() == 0 else -1  # without privilege the owner is set to what it is
    for number in range(size):
        os.chown(small_file(root, number), uid, -1)


def first_write_to_large(root: Path, size: int) -> None:
    """Change one byte of the large lower file: one large copy-up."""
    del size
    fd = os.open(root / "large", os.O_WRONLY)
    os.pwrite(fd, b"x", 0)
    os.close(fd)


def _copy_up(name: str, what: str, work: Step) -> Workload:
    return Workload(name, what, "copy-up", SMALL_FILES, COPY_UP, work, changes=True)


_ARCHIVE = Tree("archive", build_archive)
WORKLOADS = [
    Workload("untar", "unpack 2,000 files", "changing", _ARCHIVE, ARCHIVED, untar, changes=True),
    Workload(
        "rm-lower", "rm -rf of 3,000 lower files", "changing", SMALL_FILES, 3000, remove_tree,
        changes=True,
    ),
    Workload(
        "rm-upper", "rm -rf of 2,000 new files", "changing", _ARCHIVE, ARCHIVED, remove_unpacked,
        untar, changes=True,
    ),
    Workload(
        "create-unlink", "4,000, one by one", "changing", NOTHING, 4000, create_unlink, changes=True
    ),
    Workload(
        "create-rename", "replace by rename, 2,000 times", "changing", NOTHING, 2000,
        create_rename, changes=True,
    ),
    _copy_up("copyup-append", "append to 300 lower files", append_copy_up),
    _copy_up("copyup-chown", "chown of 300 lower files", chown_copy_up),
    Workload(
        "copyup-large", "change a byte of 128 MiB", "copy-up", LARGE_FILE, 128,
        first_write_to_large, unit="MiB", changes=True,
    ),
]  # fmt: skip

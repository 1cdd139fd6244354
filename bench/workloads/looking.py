"""Asking for names, attributes and small contents; nothing is changed."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Final

from bench.workloads.model import Step, Tree, Workload, command
from bench.workloads.trees import PER_DIRECTORY, SMALL_FILES, small_file

FILES: Final = 6000
AGAIN: Final = 8
#: Directories on the module path of an interpreter, and modules that are found in the last of them.
SEARCH_PATH: Final = 60
IMPORTS: Final = 20

# --- trees ----------------------------------------------------------------------------------------


def build_directories(entries: int) -> Step:
    """Builds directories of `entries` empty files each, `size` files together."""

    def build(root: Path, size: int) -> None:
        for number in range(size):
            if number % entries == 0:
                directory = root / f"listed/{number // entries:04}"
                directory.mkdir(parents=True)
            os.close(os.open(f"{directory}/entry-{number:06}", os.O_WRONLY | os.O_CREAT, 0o644))

    return build


def build_search_path(root: Path, size: int) -> None:
    """Directories for a module path, each with other modules in it."""
    del size
    for place in range(SEARCH_PATH):
        directory = root / f"path/{place:02}"
        directory.mkdir(parents=True)
        for number in range(IMPORTS):
            word = "wanted" if place == SEARCH_PATH - 1 else f"other_{place}"
            (directory / f"{word}_{number}.py").write_text(f"value = {number}\n")


# --- work -----------------------------------------------------------------------------------------


def stat_each(root: Path, size: int) -> None:
    """Stat each small file once."""
    for number in range(size):
        os.stat(small_file(root, number))


def walk(root: Path, size: int) -> None:
    """List every directory and stat every entry, as find and ls -lR do."""
    found = 0
    pending = [os.fspath(root)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    found += 1
    if found != size:
        raise AssertionError(f"{found} files instead of {size}")


def read_each(root: Path, size: int) -> None:
    """Open, read and close each small file."""
    for number in range(size):
        fd = os.open(small_file(root, number), os.O_RDONLY)
        os.read(fd, 8192)
        os.close(fd)


def stat_missing(root: Path, size: int) -> None:
    """Ask for names that do not exist, each once, as a search path does."""
    directories = -(-size // PER_DIRECTORY)
    for number in range(size):
        try:
            os.stat(f"{root}/tree/{number % directories:03}/missing-{number}")
        except OSError as exc:
            if exc.errno != errno.ENOENT:
                raise


def start_interpreter(root: Path, size: int) -> None:
    """Start Python with a long module path and import modules from its end."""
    path = ":".join(f"{root}/path/{place:02}" for place in range(SEARCH_PATH))
    program = ", ".join(f"wanted_{number}" for number in range(IMPORTS))
    words = [sys.executable, "-S", "-B", "-c", f"import {program}"]
    for _ in range(size):
        command(words, PYTHONPATH=path)


def list_directories(root: Path, size: int) -> None:
    """List each directory once."""
    listed = root / "listed"
    if sum(len(os.listdir(listed / name)) for name in os.listdir(listed)) != size:
        raise AssertionError("the listings are not complete")


def again(step: Step, times: int = AGAIN) -> Step:
    """The same step several times."""

    def work(root: Path, size: int) -> None:
        for _ in range(times):
            step(root, size)

    return work


def _small(
    name: str, what: str, work: Step, before: Step | None = None, times: int = 1
) -> Workload:
    return Workload(name, what, "looking", SMALL_FILES, FILES, work, before, times=times)


def _listing(entries: int, directories: int) -> Workload:
    name = f"list-{entries}"
    tree = Tree(name, build_directories(entries))
    what = f"list {directories} of {entries:,} entries"
    files = entries * directories
    return Workload(name, what, "listing", tree, files, list_directories, unit="entry")


WORKLOADS = [
    _small("stat-cold", "stat 6,000 files", stat_each),
    _small("stat-warm", "the same again, 8 times", again(stat_each), stat_each, AGAIN),
    _small("walk-cold", "list and stat 6,000 files", walk),
    _small("walk-warm", "the same again, 8 times", again(walk), walk, AGAIN),
    _small("read-cold", "open, read and close 6,000 of 4 KiB", read_each),
    _small("read-warm", "the same again, 8 times", again(read_each), read_each, AGAIN),
    _small("missing-cold", "6,000 names that are not there", stat_missing),
    _small("missing-again", "the same again, 8 times", again(stat_missing), stat_missing, AGAIN),
    Workload(
        "start-python", "10 interpreters, 20 imports, 60 directories to search", "looking",
        Tree("search-path", build_search_path), 10, start_interpreter, unit="start",
    ),
    _listing(100, 400),
    _listing(10_000, 10),
    _listing(100_000, 1),
]  # fmt: skip

"""walk: a large lower tree is listed and every object looked at, and the server's memory weighed.

Resident bytes per known inode: what the server gained between mounting and the end of the walk,
over the number of objects it had to tell the kernel about. The kernel must still know them all, so
the machine needs about 2 KiB of free memory per object.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from devtools import stress_rig

BYTES_PER_INODE_MAX = 1536
FILES_PER_DIRECTORY = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of this kind."""
    stress_rig.add_place_arguments(parser)
    parser.add_argument("--files", type=int, default=1_000_000, help="files of the lower tree")
    parser.add_argument("--bytes-max", type=int, default=BYTES_PER_INODE_MAX, help="what may be")


def run(arguments: argparse.Namespace) -> int:
    """Run it; 0 when the memory per inode stayed below the limit."""
    started = time.monotonic()
    with stress_rig.open_place(arguments, lambda lower: _build(lower, arguments.files)) as place:
        built = time.monotonic()
        before = place.sample()
        inodes = _walk(place.root)
        walked = time.monotonic()
        after = place.sample()
        table = stress_rig.Table(["phase", "seconds", "RSS KiB", "descriptors"])
        print(f"walk on {place.name}: {arguments.files} lower files, {inodes} inodes", flush=True)
        table.row("built, mount", built - started, *_figures(before))
        table.row("walked", walked - built, *_figures(after))
        if stress_rig.drop_caches(2):
            table.row("forgotten", time.monotonic() - walked, *_figures(place.settled_sample()))
    if before is None or after is None:
        print("no FUSE server here: memory is not judged")
        return stress_rig.verdict("walk", [])
    each = (after.rss_kib - before.rss_kib) * 1024 / inodes
    print(f"resident bytes per known inode: {each:.0f} (limit {arguments.bytes_max})")
    over = each >= arguments.bytes_max
    return stress_rig.verdict("walk", [f"{each:.0f} bytes per known inode"] if over else [])


def _figures(sample: object) -> tuple[object, object]:
    return getattr(sample, "rss_kib", None), getattr(sample, "fds", None)


def _build(lower: Path, files: int) -> None:
    for start in range(0, files, FILES_PER_DIRECTORY):
        directory = lower / f"dir-{start // FILES_PER_DIRECTORY:05}"
        directory.mkdir()
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        for number in range(start, min(start + FILES_PER_DIRECTORY, files)):
            os.close(os.open(f"file-{number:07}", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        os.close(fd)


def _walk(root: Path) -> int:
    """List everything and stat everything; how many objects there are."""
    inodes = 1
    for directory in sorted(root.iterdir()):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            inodes += 1
            for name in os.listdir(fd):
                os.stat(name, dir_fd=fd, follow_symlinks=False)
                inodes += 1
        finally:
            os.close(fd)
    return inodes

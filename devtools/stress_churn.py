"""churn: files made and removed one after the other, every name a new one.

Whatever a server keeps per name, per inode or per open file must go with it: its resident memory
and its descriptors after the last file are those after the first tenth, within a stated tolerance.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from devtools import stress_rig

RSS_TOLERANCE_KIB = 2048
FDS_TOLERANCE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of this kind."""
    stress_rig.add_place_arguments(parser)
    parser.add_argument("--count", type=int, default=1_000_000, help="files to make and remove")
    parser.add_argument("--samples", type=int, default=20, help="looks at the server")


def run(arguments: argparse.Namespace) -> int:
    """Run it; 0 when memory and descriptors stayed bounded."""
    with stress_rig.open_place(arguments, _build) as place:
        print(f"churn on {place.name}: {arguments.count} create+unlink", flush=True)
        directory = os.open(place.root / "d", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return stress_rig.verdict("churn", _churn(arguments, place, directory))
        finally:
            os.close(directory)


def _build(lower: Path) -> None:
    (lower / "d").mkdir()
    for number in range(10):
        (lower / f"d/below-{number}").touch()


def _churn(arguments: argparse.Namespace, place: stress_rig.Place, directory: int) -> list[str]:
    table = stress_rig.Table(["files", "seconds", "us/file", "RSS KiB", "descriptors"])
    step = max(1, arguments.count // arguments.samples)
    started = before = time.monotonic()
    seen = [place.sample()]
    table.row(0, 0.0, None, seen[0] and seen[0].rss_kib, seen[0] and seen[0].fds)
    for start in range(0, arguments.count, step):
        numbers = range(start, min(start + step, arguments.count))
        for number in numbers:
            name = f"file-{number}"
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=directory))
            os.unlink(name, dir_fd=directory)
        now = time.monotonic()
        sample = place.settled_sample()
        seen.append(sample)
        per_file_us = (now - before) / len(numbers) * 1e6
        row = (sample.rss_kib, sample.fds) if sample else (None, None)
        table.row(numbers[-1] + 1, now - started, per_file_us, *row)
        before = time.monotonic()
    left = [name for name in os.listdir(directory) if name.startswith("file-")]
    problems = [f"{len(left)} files are left"] if left else []
    reference, last = seen[max(1, len(seen) // 10)], seen[-1]
    if reference is None or last is None:
        print("no FUSE server here: memory and descriptors are not judged")
        return problems
    growth, fds = last.rss_kib - reference.rss_kib, last.fds - reference.fds
    print(
        f"after the first tenth: resident {growth:+} KiB (tolerance {RSS_TOLERANCE_KIB}), "
        f"descriptors {fds:+} (tolerance {FDS_TOLERANCE})"
    )
    if growth > RSS_TOLERANCE_KIB:
        problems.append(f"resident memory grew by {growth} KiB after the first tenth")
    if fds > FDS_TOLERANCE:
        problems.append(f"descriptors grew by {fds} after the first tenth")
    return problems

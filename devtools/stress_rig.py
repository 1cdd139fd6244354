"""Where a stress run works, and the watch over the server behind it.

A run works in a directory the caller names, or in a mount of its own: fresh layers in a scratch
folder, mounted the way the benchmarks mount, removed at the end whatever happened. The server is
looked at from outside only, through /proc, so every target can be stressed, the kernel's overlay
and a plain directory included (they have no server, and what is judged about one is left out).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import fuse_server, targets
from unionfs2 import mounts, transports

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_SETTLE_S = 5.0
_SETTLE_STEP_S = 0.1


@dataclass(slots=True)
class Place:
    """A directory to stress. `layers` and `target` are there for a mount of our own only."""

    root: Path
    name: str
    layers: targets.Layers | None = None
    target: targets.Target | None = None

    def server(self) -> int | None:
        """Process id of the FUSE server, None where there is none."""
        if not fuse_server.is_mounted(self.root):
            return None
        return fuse_server.find_server(self.root)

    def sample(self) -> fuse_server.Sample | None:
        """Memory and descriptors of the server now."""
        server = self.server()
        return None if server is None else fuse_server.sample(server)

    def settled_sample(self) -> fuse_server.Sample | None:
        """As `sample`, once the server has nothing left to forget: when two looks agree."""
        before = self.sample()
        deadline = time.monotonic() + _SETTLE_S
        while before is not None and time.monotonic() < deadline:
            time.sleep(_SETTLE_STEP_S)
            now = self.sample()
            if now is None or (now.rss_kib, now.fds) == (before.rss_kib, before.fds):
                return now
            before = now
        return before

    @property
    def can_remount(self) -> bool:
        return self.layers is not None and self.target is not None

    def remount(self) -> None:
        """Unmount and mount again; only for a mount of our own."""
        assert self.target is not None
        assert self.layers is not None
        self.target.unmount(self.layers)
        self.target.mount(self.layers)


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say where to work; read by `open_place`."""
    parser.add_argument(
        "--directory", type=Path, help="work in this directory instead of a mount of our own"
    )
    parser.add_argument(
        "--target",
        choices=sorted(targets.all_targets()),
        default="unionfs2",
        help="what to mount (default: %(default)s)",
    )
    parser.add_argument("--options", default="", help="further mount options for unionfs2")
    parser.add_argument(
        "--transport",
        choices=transports.SERVED,
        help="what serves unionfs2 (default: whichever it takes itself)",
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for the layers (default: the temporary folder)"
    )
    parser.add_argument("--seed", type=int, help="repeat the run that printed this seed")


@contextlib.contextmanager
def open_place(
    arguments: argparse.Namespace, build_lower: Callable[[Path], None] | None = None
) -> Iterator[Place]:
    """The place these arguments ask for; `build_lower` fills the lower directory before mounting.

    In a directory of the caller's it fills a folder of its own, which is removed again.
    """
    if arguments.directory is not None:
        with _own_folder(arguments.directory) as folder:
            if build_lower is not None:
                build_lower(folder)
            yield Place(folder, os.fspath(arguments.directory))
        return
    transport = arguments.transport if arguments.target == "unionfs2" else None
    options = [arguments.options, f"transport={transport}" if transport else ""]
    target = targets.all_targets(",".join(filter(None, options)))[arguments.target]
    reason = target.unavailable()
    if reason is not None:
        raise SystemExit(f"stress: target {target.name} cannot be used: {reason}")
    with _own_folder(arguments.scratch) as base:
        lower = base / "lower"
        lower.mkdir()
        if build_lower is not None:
            build_lower(lower)
        layers = targets.Layers.below(base, (lower,))
        target.prepare(layers)
        try:
            target.mount(layers)
            _check_transport(layers.merged, transport)
            yield Place(layers.merged, target.name, layers, target)
            target.unmount(layers)
        finally:
            targets.clear_away(layers.merged)


def _check_transport(merged: Path, asked: str | None) -> None:
    wanted = os.fsencode(merged.resolve())
    served = {status.transport for status in mounts.list_mounts() if status.target == wanted}
    if asked is not None and served != {asked}:
        raise SystemExit(f"stress: {merged} is served by {served}, not {asked}")


@contextlib.contextmanager
def _own_folder(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="unionfs2-stress-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, onerror=_retry_removal)


def _retry_removal(function: Callable[..., object], path: str, _: object) -> None:
    """Directories without permission bits are made removable; everything else is an error."""
    if function in {os.open, os.scandir} and stat.S_IMODE(os.lstat(path).st_mode) != stat.S_IRWXU:
        Path(path).chmod(stat.S_IRWXU)
        shutil.rmtree(path)
        return
    raise  # noqa: PLE0704  # rmtree calls this while it handles the exception


def seed_of(arguments: argparse.Namespace) -> int:
    """The seed asked for, or a new one."""
    seed: int | None = arguments.seed
    return int.from_bytes(os.urandom(4), "little") if seed is None else seed


def drop_caches(what: int) -> bool:
    """Drop the kernel's clean page cache (1), its inodes and names (2) or both (3).

    False when we may not.
    """
    try:
        _DROP_CACHES.write_text(str(what))
    except PermissionError:
        return False
    return True


@dataclass(slots=True)
class Table:
    """Rows printed in columns as they come."""

    columns: Sequence[str]
    width: int = 12
    _started: bool = field(default=False, init=False)

    def row(self, *cells: object) -> None:
        """Print one row, the heading before the first."""
        if not self._started:
            self._started = True
            self._print(self.columns)
        self._print([_shown(cell) for cell in cells])

    def _print(self, cells: Sequence[str]) -> None:
        print("  ".join(cell.rjust(self.width) for cell in cells), flush=True)


def _shown(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return str(cell)


def verdict(what: str, problems: Sequence[str]) -> int:
    """Print the outcome; the exit status that belongs to it."""
    for problem in problems:
        print(f"  FAILED: {problem}", file=sys.stderr)
    print(f"{what}: {'failed' if problems else 'passed'}", flush=True)
    return 1 if problems else 0

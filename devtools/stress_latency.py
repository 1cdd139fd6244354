"""latency: how long small requests take while the server has long work to do.

One process changes a byte of a large lower file, which must be copied up for it, or writes and
fsyncs a large new file. Meanwhile this one asks for things elsewhere, a few milliseconds apart, and
remembers the longest answer of each kind. The same is measured before, with nothing else going on.
What is asked for was read from the layers before, so that an answer waits for the server and not
for the disk.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

from devtools import stress_rig

LIMIT_MS = 50.0
POOL_DIRECTORIES = 400
POOL_FILES = 50
_CHUNK = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of this kind."""
    stress_rig.add_place_arguments(parser)
    parser.add_argument("--mib", type=int, default=2048, help="size of the file copied up")
    parser.add_argument(
        "--during",
        choices=sorted(LONG_WORK),
        default="copy-up",
        help="the long work (default: %(default)s)",
    )
    parser.add_argument("--every-ms", type=float, default=3.0, help="pause between requests")
    parser.add_argument("--limit-ms", type=float, default=LIMIT_MS, help="longest answer allowed")


def run(arguments: argparse.Namespace) -> int:
    """Run it; 0 when every answer came in time."""

    def build(lower: Path) -> None:
        _build(lower, arguments.mib)

    with stress_rig.open_place(arguments, build) as place:
        print(f"latency on {place.name}: {arguments.during} of {arguments.mib} MiB", flush=True)
        os.sync()
        if place.layers is not None:
            _warm(place.layers.lower[0])
        probe = Probe(place.root / "pool", arguments.every_ms / 1000)
        idle = probe.during(_pause(1.0))
        started = time.monotonic()
        child = Child(LONG_WORK[arguments.during], place.root, arguments.mib)
        busy = probe.during(child.works)
        print(f"{arguments.during} took {time.monotonic() - started:.2f} s")
        problems = _report(arguments, idle, busy)
        if child.status != 0:
            problems.append(f"{arguments.during} failed")
        if arguments.during == "copy-up":
            problems += _copied(place)
    return stress_rig.verdict("latency", problems)


def _build(lower: Path, mib: int) -> None:
    chunk = os.urandom(_CHUNK)
    with (lower / "big").open("wb") as big:
        for _ in range(0, mib << 20, _CHUNK):
            big.write(chunk)
    for directory in range(POOL_DIRECTORIES):
        (lower / f"pool/{directory:04}").mkdir(parents=True)
        for file in range(POOL_FILES):
            (lower / f"pool/{directory:04}/{file:03}").touch()


def _warm(lower: Path) -> None:
    for directory, _, files in os.walk(lower / "pool"):
        for name in files:
            os.lstat(Path(directory) / name)


def _copy_up(root: Path, mib: int) -> None:
    """Change a byte of the lower file; `mib` is its size.

    Opening it for writing is not enough: the kernel may answer that without asking the server.
    """
    del mib
    fd = os.open(root / "big", os.O_WRONLY)
    os.pwrite(fd, b"x", 0)
    os.close(fd)


def _write_and_sync(root: Path, mib: int) -> None:
    """Write a new file, and wait until it is on the disk."""
    chunk = os.urandom(_CHUNK)
    with (root / "new").open("wb", buffering=0) as new:
        for _ in range(0, mib << 20, _CHUNK):
            new.write(chunk)
        os.fsync(new.fileno())


LONG_WORK: dict[str, Callable[[Path, int], None]] = {
    "copy-up": _copy_up,
    "fsync": _write_and_sync,
}


class Child:
    """Long work in a process of its own."""

    def __init__(self, work: Callable[[Path, int], None], root: Path, mib: int) -> None:
        self.status: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                work(root, mib)
                code = 0
            finally:
                os._exit(code)

    def works(self) -> bool:
        """Whether it is still at it; `status` is its exit status once it is not."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self.status = os.waitstatus_to_exitcode(status)
        return not pid


def _pause(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


class Probe:
    """Small requests of several kinds, each name asked for once where it says uncached."""

    def __init__(self, pool: Path, pause_s: float) -> None:
        self._pause_s = pause_s
        paths = [
            pool / f"{directory:04}/{file:03}"
            for file in range(POOL_FILES)
            for directory in range(0, POOL_DIRECTORIES, 2)
        ]
        self._fresh = iter(paths)
        self._listed = (pool / f"{directory:04}" for directory in range(1, POOL_DIRECTORIES, 2))
        self._missing = (pool / f"none-{number}" for number in itertools.count())
        self._cached = pool
        self.kinds: dict[str, Callable[[], object]] = {
            "stat, cached": lambda: os.stat(self._cached),
            "stat, uncached": lambda: os.stat(next(self._fresh)),
            "stat, missing": self._stat_missing,
            "readdir": lambda: os.listdir(next(self._listed)),
        }

    def _stat_missing(self) -> None:
        try:
            os.stat(next(self._missing))
        except OSError as exc:
            if exc.errno != errno.ENOENT:
                raise

    def during(self, going_on: Callable[[], bool]) -> dict[str, list[float]]:
        """Milliseconds of every answer until `going_on` says no. A kind ends with its names."""
        found: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        kinds = itertools.cycle(list(self.kinds.items()))
        while going_on():
            kind, ask = next(kinds)
            started = time.perf_counter()
            try:
                ask()
            except StopIteration:
                continue
            found[kind].append((time.perf_counter() - started) * 1000)
            time.sleep(self._pause_s)
        return found


def _report(
    arguments: argparse.Namespace, idle: dict[str, list[float]], busy: dict[str, list[float]]
) -> list[str]:
    """Print the table; what was too slow."""
    table = stress_rig.Table(
        ["request", "when", "answers", "median ms", "99 % ms", "longest ms"], width=14
    )
    problems = []
    for kind, alone in idle.items():
        for when, found in (("idle", alone), (arguments.during, busy[kind])):
            if not found:
                table.row(kind, when, 0, None, None, None)
                continue
            ordered = sorted(found)
            figures = (ordered[len(found) // 2], ordered[int(len(found) * 0.99)], ordered[-1])
            table.row(kind, when, len(found), *figures)
            if when != "idle" and ordered[-1] > arguments.limit_ms:
                problems.append(f"{kind}: {ordered[-1]:.1f} ms, limit {arguments.limit_ms}")
        if not busy[kind]:
            problems.append(f"{kind}: not one answer meanwhile; take a larger file")
    return problems


def _copied(place: stress_rig.Place) -> list[str]:
    """A copy-up that did not happen proves nothing."""
    if place.layers is None or place.name == "plain":
        return []
    above = place.layers.upper / "big"
    expected = os.stat(place.root / "big").st_size
    if above.exists() and above.stat().st_size == expected:
        return []
    return ["the file was not copied up"]

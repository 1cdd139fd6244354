"""mixed: several processes do everything to the same few directories at once.

Each process draws operations and names from its own seed; names are few, so the processes meet.
An operation may fail only as it may on a local file system: `ALLOWED` lists the errno values that a
plain directory on ext4 gave over long runs (`stress mixed --target plain --derive` prints them).
Lower directories are never renamed, since a union answers EXDEV there by design.

The parent watches: a process that makes no progress for `HANG_S` is a hang, and the server is ended
so that nothing stays blocked. At the end the tree must be the same by listing and by stat, and the
same again after a remount.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import errno
import hashlib
import mmap
import os
import random
import signal
import stat
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench import fuse_server
from devtools import stress_rig

HANG_S = 30.0
DIRECTORIES = 4
NAMES = 24
SAMPLE_S = 5.0
JUDGED_SAMPLES = 9  # fewer are all warming up
FDS_TOLERANCE = 16
RSS_TOLERANCE_KIB = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_PR_SET_PDEATHSIG = 1

ALLOWED: dict[str, set[int]] = {
    "create": {errno.ENOENT, errno.EEXIST, errno.ELOOP, errno.ENXIO},
    "write": {errno.ENOENT, errno.ELOOP},
    "append": {errno.ENOENT, errno.ELOOP, errno.ENXIO},
    "read": {errno.ENOENT, errno.ELOOP},
    "truncate": {errno.ENOENT, errno.EINVAL, errno.ELOOP},
    "unlink": {errno.ENOENT},
    "rename": {errno.ENOENT, errno.EINVAL, errno.ENOTEMPTY},
    "noreplace": {errno.ENOENT, errno.EEXIST},
    "exchange": {errno.ENOENT},
    "link": {errno.ENOENT, errno.EEXIST},
    "symlink": {errno.ENOENT, errno.EEXIST},
    "readlink": {errno.ENOENT, errno.EINVAL},
    "mkdir": {errno.ENOENT, errno.EEXIST},
    "rmdir": {errno.ENOENT, errno.ENOTEMPTY},
    "mkfifo": {errno.ENOENT, errno.EEXIST},
    "stat": {errno.ENOENT},
    "readdir": {errno.ENOENT},
    "chmod": {errno.ENOENT, errno.ELOOP},
    "utime": {errno.ENOENT},
    "setxattr": {errno.ENOENT, errno.EPERM},
    "removexattr": {errno.ENOENT, errno.ENODATA, errno.EPERM},
    "listxattr": {errno.ENOENT},
}


class Worker:
    """One process: random operations on random names below `root`."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.rng = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[tuple[str, int]] = collections.Counter()
        self.operations: dict[str, tuple[Callable[[], object], int]] = {
            "create": (self._create, 12),
            "write": (self._write, 8),
            "append": (self._append, 6),
            "read": (self._read, 8),
            "truncate": (self._truncate, 4),
            "unlink": (lambda: os.unlink(self._path()), 10),
            "rename": (self._rename, 8),
            "noreplace": (lambda: self._rename_with(_RENAME_NOREPLACE), 2),
            "exchange": (lambda: self._rename_with(_RENAME_EXCHANGE), 2),
            "link": (self._link, 5),
            "symlink": (lambda: os.symlink(self._name(), self._path()), 3),
            "readlink": (lambda: os.readlink(self._path()), 1),
            "mkdir": (lambda: os.mkdir(self._directory_path()), 3),
            "rmdir": (lambda: os.rmdir(self._directory_path()), 2),
            "mkfifo": (lambda: os.mkfifo(self._path()), 1),
            "stat": (lambda: os.lstat(self._path()), 10),
            "readdir": (self._list, 4),
            "chmod": (self._chmod, 3),
            "utime": (self._utime, 2),
            "setxattr": (self._set_xattr, 3),
            "removexattr": (self._remove_xattr, 1),
            "listxattr": (lambda: os.listxattr(self._path(), follow_symlinks=False), 1),
        }
        self._names = list(self.operations)
        self._weights = [weight for _, weight in self.operations.values()]

    def step(self) -> str | None:
        """One operation; a sentence when its error is none that a local file system gives."""
        name = self.rng.choices(self._names, self._weights)[0]
        self.counts[name] += 1
        try:
            self.operations[name][0]()
        except OSError as exc:
            code = exc.errno or 0
            self.errors[name, code] += 1
            if code not in ALLOWED[name]:
                return f"{name} answered {errno.errorcode.get(code, code)} ({exc})"
        return None

    # --- names: files and links "f..", directories made here "n..", in lower directories "d.." ---

    def _directory(self, *, below: bool | None = None) -> Path:
        """One of the lower directories, or one below it: always, never, or by chance."""
        directory = self.root / f"d{self.rng.randrange(DIRECTORIES)}"
        if self.rng.random() < 0.25 if below is None else below:
            directory /= f"n{self.rng.randrange(4)}"
        return directory

    def _name(self) -> str:
        return f"f{self.rng.randrange(NAMES)}"

    def _path(self) -> Path:
        return self._directory() / self._name()

    def _directory_path(self, *, below: bool | None = None) -> Path:
        return self._directory(below=below) / f"n{self.rng.randrange(4)}"

    # --- operations ---

    def _open(self, flags: int, mode: int = 0o644) -> int:
        """Never blocks on a fifo, never follows a link to who knows where."""
        return os.open(self._path(), flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, mode)

    def _create(self) -> None:
        exclusive = os.O_EXCL if self.rng.random() < 0.5 else 0
        fd = self._open(os.O_WRONLY | os.O_CREAT | exclusive)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.write(fd, self.rng.randbytes(self.rng.randrange(1, 20_000)))
        finally:
            os.close(fd)

    def _write(self) -> None:
        fd = self._open(os.O_RDWR)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.pwrite(fd, self.rng.randbytes(500), self.rng.randrange(50_000))
                if self.rng.random() < 0.02:
                    os.fsync(fd)
        finally:
            os.close(fd)

    def _append(self) -> None:
        fd = self._open(os.O_WRONLY | os.O_APPEND)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.write(fd, b"a line of text\n" * self.rng.randrange(1, 50))
        finally:
            os.close(fd)

    def _read(self) -> None:
        fd = self._open(os.O_RDONLY)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.pread(fd, 20_000, self.rng.randrange(20_000))
            elif stat.S_ISDIR(os.fstat(fd).st_mode):
                os.listdir(fd)
        finally:
            os.close(fd)

    def _truncate(self) -> None:
        path = self._path()
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            os.truncate(path, self.rng.randrange(60_000))

    def _rename(self) -> None:
        if self.rng.random() < 0.15:
            # within one depth: the number of directories stays bounded
            below = self.rng.random() < 0.3
            os.rename(self._directory_path(below=below), self._directory_path(below=below))
        else:
            os.rename(self._path(), self._path())

    def _rename_with(self, flags: int) -> None:
        old, new = os.fsencode(self._path()), os.fsencode(self._path())
        if _libc.renameat2(-100, old, -100, new, flags) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), os.fsdecode(old))

    def _link(self) -> None:
        os.link(self._path(), self._path(), follow_symlinks=False)

    def _list(self) -> None:
        names = os.listdir(self._directory())
        if len(names) != len(set(names)):
            raise AssertionError(f"a name twice in one listing: {sorted(names)}")

    def _chmod(self) -> None:
        path = self._path()
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            os.chmod(path, self.rng.choice([0o600, 0o640, 0o644, 0o666]))

    def _utime(self) -> None:
        times = (self.rng.randrange(1 << 60), self.rng.randrange(1 << 60))
        os.utime(self._path(), ns=times, follow_symlinks=False)

    def _set_xattr(self) -> None:
        name, value = f"user.x{self.rng.randrange(3)}", self.rng.randbytes(20)
        os.setxattr(self._path(), name, value, follow_symlinks=False)

    def _remove_xattr(self) -> None:
        name = f"user.x{self.rng.randrange(3)}"
        os.removexattr(self._path(), name, follow_symlinks=False)


@dataclass(slots=True)
class Outcome:
    """What a group of workers reports, added up."""

    operations: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: collections.Counter[tuple[str, int]] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)


class Group:
    """Workers in processes of their own, watched through counters in shared memory."""

    def __init__(self, root: Path, seeds: list[int], *, seconds: float, operations: int) -> None:
        self._progress = mmap.mmap(-1, 8 * len(seeds))
        self._pipes: list[int] = []
        self.pids: list[int] = []
        self._seen = [(0, time.monotonic())] * len(seeds)
        for number, seed in enumerate(seeds):
            read_end, write_end = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read_end)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                self._child(number, write_end, Worker(root, seed), seconds, operations)
            os.close(write_end)
            self._pipes.append(read_end)
            self.pids.append(pid)

    def _child(
        self, number: int, pipe: int, worker: Worker, seconds: float, operations: int
    ) -> None:
        """Work until the time or the number is used up; tell by the pipe; never return."""
        code = 1
        problems: list[str] = []
        try:
            end = time.monotonic() + seconds if seconds else float("inf")
            done = 0
            while time.monotonic() < end and (not operations or done < operations):
                problem = worker.step()
                if problem is not None and len(problems) < 20:
                    problems.append(problem)
                done += 1
                struct.pack_into("<q", self._progress, 8 * number, done)
            code = 0
        except BaseException:  # noqa: BLE001  # the parent is told, whatever it is
            problems.append(traceback.format_exc())
        finally:
            counts = ";".join(f"{name}={count}" for name, count in worker.counts.items())
            errors = ";".join(f"{n}/{c}={count}" for (n, c), count in worker.errors.items())
            text = "\0".join([counts, errors, *problems])
            with os.fdopen(pipe, "wb") as out:
                out.write(text.encode(errors="surrogateescape"))
            os._exit(code)

    def hanging(self) -> list[int]:
        """Workers that have not finished an operation for `HANG_S`."""
        now = time.monotonic()
        found = []
        for number, pid in enumerate(self.pids):
            (done,) = struct.unpack_from("<q", self._progress, 8 * number)
            if done != self._seen[number][0]:
                self._seen[number] = (done, now)
            elif now - self._seen[number][1] > HANG_S and _alive(pid):
                found.append(pid)
        return found

    def finished(self) -> bool:
        return not any(_alive(pid) for pid in self.pids)

    def end(self) -> None:
        """End the workers at once; for a run that is given up."""
        for pid in self.pids:
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def collect(self) -> Outcome:
        """Wait for all and add up what they tell."""
        outcome = Outcome()
        for pipe, pid in zip(self._pipes, self.pids, strict=True):
            with os.fdopen(pipe, "rb") as told:
                text = told.read().decode(errors="surrogateescape")
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if not text:
                outcome.problems.append(f"worker {pid} ended with {status} and said nothing")
                continue
            counts, errors, *problems = text.split("\0")
            _add(outcome, counts, errors)
            outcome.problems += problems
        outcome.operations = outcome.counts.total()
        self._progress.close()
        return outcome


def _add(outcome: Outcome, counts: str, errors: str) -> None:
    for item in filter(None, counts.split(";")):
        name, _, count = item.partition("=")
        outcome.counts[name] += int(count)
    for item in filter(None, errors.split(";")):
        key, _, count = item.partition("=")
        name, _, code = key.partition("/")
        outcome.errors[name, int(code)] += int(count)


def _alive(pid: int) -> bool:
    """Whether a child of ours has not ended; it stays to be waited for."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, options) is None


def build_lower(lower: Path) -> None:
    """Four directories, two thirds of whose names exist."""
    rng = random.Random(0)
    for directory in range(DIRECTORIES):
        (lower / f"d{directory}").mkdir()
        for name in range(NAMES * 2 // 3):
            (lower / f"d{directory}/f{name}").write_bytes(rng.randbytes(rng.randrange(30_000)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of this kind."""
    stress_rig.add_place_arguments(parser)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument(
        "--derive",
        action="store_true",
        help="print every errno seen, for the table of allowed ones",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run it; 0 without a hang, a strange error, a growing server or a damaged tree."""
    seed = stress_rig.seed_of(arguments)
    seeds = [seed + number for number in range(arguments.processes)]
    with stress_rig.open_place(arguments, build_lower) as place:
        print(f"mixed on {place.name}: {arguments.processes} processes, seed {seed}", flush=True)
        first = place.sample()
        group = Group(place.root, seeds, seconds=arguments.minutes * 60, operations=0)
        try:
            problems, fds = _watch(place, group)
        except BaseException:
            group.end()
            raise
        outcome = group.collect()
        problems += outcome.problems
        _print_outcome(outcome, derive=arguments.derive)
        problems += _judge_descriptors(place, first, fds)
        if not problems:
            problems += tree_problems(place)
    return stress_rig.verdict("mixed", problems)


def _watch(place: stress_rig.Place, group: Group) -> tuple[list[str], list[int]]:
    """Sample the server until the workers end; problems, and the descriptor counts."""
    table = stress_rig.Table(["seconds", "RSS KiB", "descriptors"])
    started = time.monotonic()
    fds: list[int] = []
    next_sample = started
    while not group.finished():
        time.sleep(0.1)
        hanging = group.hanging()
        if hanging:
            return [_end_hang(place, group, hanging)], fds
        if time.monotonic() >= next_sample:
            next_sample += SAMPLE_S
            sample = place.sample()
            if sample is not None:
                fds.append(sample.fds)
                table.row(time.monotonic() - started, sample.rss_kib, sample.fds)
    return [], fds


def _end_hang(place: stress_rig.Place, group: Group, hanging: list[int]) -> str:
    """Say where the workers stand, then end server and workers, so that nobody waits for ever."""
    where = "; ".join(f"{pid} in {_wait_channel(pid)}" for pid in hanging)
    server = place.server()
    for pid in [*([server] if server is not None else []), *group.pids]:
        os.kill(pid, signal.SIGKILL)
    return f"no progress for {HANG_S:.0f} s: {where}"


def _wait_channel(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stack").read_text().splitlines()[0].split()[-1]
    except (OSError, IndexError):
        return "an unknown place"


def _judge_descriptors(
    place: stress_rig.Place, first: fuse_server.Sample | None, fds: list[int]
) -> list[str]:
    """Idle again, the server needs no more descriptors than at first; nor did the end of the run.

    While names are known to the kernel a server may keep their directories open.
    """
    stress_rig.drop_caches(2)
    idle = place.settled_sample()
    if idle is None or first is None:
        return []
    third = max(1, len(fds) // 3)
    early, late = max(fds[: third + 1], default=0), max(fds[-third:], default=0)
    print(
        f"descriptors: {first.fds} fresh, at most {early} early and {late} late in the run, "
        f"{idle.fds} idle afterwards (tolerance {FDS_TOLERANCE})"
    )
    problems = []
    if idle.fds > first.fds + FDS_TOLERANCE:
        problems.append(f"{idle.fds} descriptors are left, {first.fds} were there at first")
    if len(fds) >= JUDGED_SAMPLES and late > early + FDS_TOLERANCE:
        problems.append(f"descriptors grew from {early} to {late} during the run")
    return problems


def _print_outcome(outcome: Outcome, *, derive: bool) -> None:
    table = stress_rig.Table(["operation", "count", "failed"])
    for name, count in outcome.counts.most_common():
        failed = {c: n for (what, c), n in outcome.errors.items() if what == name}
        table.row(name, count, sum(failed.values()))
        if derive:
            names = ", ".join(errno.errorcode.get(c, str(c)) for c in sorted(failed))
            print(f"    {names}")
    table.row("all", outcome.operations, outcome.errors.total())


# --- is the tree sound? ---------------------------------------------------------------------------


def tree_problems(place: stress_rig.Place) -> list[str]:
    """Listing and stat must agree, and a remount must show the same tree."""
    before = _snapshot(place.root)
    problems = [value for value in before.values() if value.startswith("listed, but")]
    if place.can_remount:
        place.remount()
        after = _snapshot(place.root)
        problems += [
            f"{path} was {before.get(path)}, after a remount {after.get(path)}"
            for path in sorted(set(before) | set(after))
            if before.get(path) != after.get(path)
        ]
    return problems[:20]


def _snapshot(root: Path) -> dict[str, str]:
    """What stands at every path, in words that compare."""
    found = {}
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(directory) / name
            found[os.fspath(path.relative_to(root))] = _described(path)
    return found


def _described(path: Path) -> str:
    try:
        status = os.lstat(path)
        words = [f"{status.st_mode:o} {status.st_nlink} {status.st_mtime_ns}"]
        if stat.S_ISREG(status.st_mode):
            words.append(f"{status.st_size} {hashlib.sha256(path.read_bytes()).hexdigest()}")
        elif stat.S_ISLNK(status.st_mode):
            words.append(os.readlink(path))
        words += [
            f"{name}={os.getxattr(path, name, follow_symlinks=False).hex()}"
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        ]
        return " ".join(words)
    except OSError as exc:
        return f"listed, but {path}: {exc}"


# --- rounds ---------------------------------------------------------------------------------------


def add_round_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of this kind."""
    stress_rig.add_place_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--ops", type=int, default=20_000, help="operations of a process in a round"
    )
    parser.add_argument("--processes", type=int, default=4)


def run_rounds(arguments: argparse.Namespace) -> int:
    """The same work again and again; 0 when the server's memory stays as after the second."""
    seed = stress_rig.seed_of(arguments)
    seeds = [seed + number for number in range(arguments.processes)]
    problems: list[str] = []
    resident: list[int] = []
    with stress_rig.open_place(arguments, _no_lower) as place:
        print(f"rounds on {place.name}: {arguments.processes} processes, seed {seed}", flush=True)
        table = stress_rig.Table(["round", "seconds", "RSS KiB", "private KiB", "descriptors"])
        for number in range(1, arguments.rounds + 1):
            started = time.monotonic()
            problems += _one_round(place, seeds, arguments.ops)
            if problems:
                break
            if not stress_rig.drop_caches(2):
                sys.exit("stress: dropping caches between rounds needs root")
            sample = place.settled_sample()
            seconds = time.monotonic() - started
            if sample is None:
                table.row(number, seconds, None, None, None)
                continue
            resident.append(sample.rss_kib)
            table.row(number, seconds, sample.rss_kib, sample.private_kib, sample.fds)
    if len(resident) > 2:
        growth = max(resident[2:]) - resident[1]
        print(f"growth after the second: {growth:+} KiB (tolerance {RSS_TOLERANCE_KIB} KiB)")
        if growth > RSS_TOLERANCE_KIB:
            problems.append(f"resident memory grew by {growth} KiB after the second round")
    return stress_rig.verdict("rounds", problems)


def _no_lower(lower: Path) -> None:
    """The rounds bring their own tree, as each must begin with the same one."""
    (lower / "d").mkdir()


def _one_round(place: stress_rig.Place, seeds: list[int], operations: int) -> list[str]:
    work = place.root / "round"
    work.mkdir()
    build_lower(work)
    group = Group(work, seeds, seconds=0, operations=operations)
    try:
        while not group.finished():
            time.sleep(0.05)
            hanging = group.hanging()
            if hanging:
                problems = [_end_hang(place, group, hanging)]
                group.collect()
                return problems
    except BaseException:
        group.end()
        raise
    problems = group.collect().problems
    _remove(work)
    return problems


def _remove(directory: Path) -> None:
    for parent, directories, files in os.walk(directory, topdown=False):
        for name in files:
            os.unlink(Path(parent) / name)
        for name in directories:
            path = Path(parent) / name
            (os.unlink if path.is_symlink() else os.rmdir)(path)
    directory.rmdir()

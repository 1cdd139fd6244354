"""fsx: random operations on one file at a time, compared with a model in memory.

Every file begins as a lower file, is first read through a descriptor opened before anything is
written, and is then written, truncated, mapped, appended to, closed and reopened; the old
descriptor must go on seeing what the others write. After `ops_per_file` operations the next lower
file takes its turn, so copy-up is met again and again.

Invariant: after every operation, `File.model` is what the file must contain.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import mmap
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from devtools import stress_rig

SIZE_MAX = 256 << 10
LOG_TAIL = 40


class CorruptionError(Exception):
    """The file is not what the model says."""


class File:
    """One file under test: its descriptors, a held mapping, and the model."""

    def __init__(self, path: Path, model: bytearray, rng: random.Random) -> None:
        self.path = path
        self.model = model
        self.rng = rng
        self.log: collections.deque[str] = collections.deque(maxlen=LOG_TAIL)
        self.counts: collections.Counter[str] = collections.Counter()
        self.reader = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.check("first read", os.pread(self.reader, SIZE_MAX * 2, 0), 0)
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.held: mmap.mmap | None = None

    def close(self) -> None:
        self.release_mapping()
        os.close(self.fd)
        os.close(self.reader)

    def release_mapping(self) -> None:
        """Give up the held mapping: the file may change its size."""
        if self.held is not None:
            self.held.close()
            self.held = None

    def note(self, text: str) -> None:
        self.log.append(text)
        self.counts[text.split(" ", maxsplit=1)[0]] += 1

    def check(self, what: str, got: bytes, offset: int) -> None:
        """Compare bytes read from `offset` with the model; CorruptionError names the first."""
        expected = bytes(self.model[offset : offset + max(len(got), 1)])
        if got == expected[: len(got)] and len(got) >= len(expected):
            return
        for index in range(max(len(got), len(expected))):
            mine, theirs = expected[index : index + 1], got[index : index + 1]
            if mine != theirs:
                raise CorruptionError(
                    f"{what}: byte {offset + index} is {theirs.hex() or 'missing'}, "
                    f"expected {mine.hex() or 'end of file'} (size {len(self.model)})"
                )

    def check_size(self) -> None:
        for size in (os.fstat(self.fd).st_size, self.path.stat().st_size):
            if size != len(self.model):
                raise CorruptionError(f"size is {size}, expected {len(self.model)}")

    # --- ranges ---

    def _range(self, limit: int) -> tuple[int, int]:
        """A random (offset, length) with offset + length <= limit, often aligned, mostly short."""
        offset = self.rng.randrange(limit)
        if self.rng.random() < 0.3:
            offset &= ~4095
        length = min(limit - offset, 1 + int(self.rng.expovariate(1 / 9000)))
        return offset, length

    def _fill(self, length: int) -> bytes:
        return self.rng.randbytes(length)

    def _put(self, offset: int, data: bytes) -> None:
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data

    # --- operations ---

    def read(self) -> None:
        offset, length = self._range(SIZE_MAX)
        fd = self.reader if self.rng.random() < 0.4 else self.fd
        self.note(f"read {offset}+{length} {'old' if fd == self.reader else 'new'}")
        got = os.pread(fd, length, offset)
        wanted = max(0, min(length, len(self.model) - offset))
        if len(got) != wanted:
            raise CorruptionError(f"read {offset}+{length} gave {len(got)} bytes, not {wanted}")
        self.check("read", got, offset) if got else None

    def write(self) -> None:
        offset, length = self._range(SIZE_MAX)
        data = self._fill(length)
        self.note(f"write {offset}+{length}")
        done = os.pwrite(self.fd, data, offset)
        if done != length:
            raise CorruptionError(f"write of {length} bytes wrote {done}")
        self._put(offset, data)

    def append(self) -> None:
        length = min(1 + int(self.rng.expovariate(1 / 3000)), SIZE_MAX - len(self.model))
        if length <= 0:
            return
        data = self._fill(length)
        self.note(f"append +{length}")
        with contextlib.closing(_Descriptor(self.path, os.O_WRONLY | os.O_APPEND)) as fd:
            os.write(fd.number, data)
        self.model.extend(data)

    def truncate(self) -> None:
        size = 0 if self.rng.random() < 0.05 else self.rng.randrange(SIZE_MAX)
        how = self.rng.choice(["fd", "path"])
        self.note(f"truncate {size} {how}")
        self.release_mapping()
        if how == "fd":
            os.ftruncate(self.fd, size)
        else:
            os.truncate(self.path, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        self.check_size()

    def map_read(self) -> None:
        if not self.model:
            return
        offset, length = self._range(len(self.model))
        self.note(f"map_read {offset}+{length}")
        view = self._view()
        self.check("map_read", view[offset : offset + length], offset)
        self._maybe_hold(view)

    def map_write(self) -> None:
        if not self.model:
            return
        offset, length = self._range(len(self.model))
        self.note(f"map_write {offset}+{length}")
        view = self._view()
        data = self._fill(length)
        view[offset : offset + length] = data
        self._put(offset, data)
        if self.rng.random() < 0.3:
            view.flush()
        self._maybe_hold(view)

    def _view(self) -> mmap.mmap:
        """The held mapping where it covers the file, else a new one."""
        if self.held is not None:
            if len(self.held) == len(self.model):
                return self.held
            self.release_mapping()
        return mmap.mmap(self.fd, len(self.model))

    def _maybe_hold(self, view: mmap.mmap) -> None:
        if self.rng.random() < 0.5:
            self.held = view
        else:
            self.held = None
            view.close()

    def reopen(self) -> None:
        self.note("reopen")
        self.release_mapping()
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        if self.rng.random() < 0.2:
            os.close(self.reader)
            self.reader = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def sync(self) -> None:
        self.note("fsync")
        (os.fsync if self.rng.random() < 0.5 else os.fdatasync)(self.fd)

    def rename(self) -> None:
        self.note("rename")
        other = self.path.with_name(self.path.name + "'")
        self.path.rename(other)
        self.path = other

    def compare_all(self) -> None:
        """The whole file, by each descriptor."""
        self.note("compare")
        self.check_size()
        for what, fd in (("old descriptor", self.reader), ("descriptor", self.fd)):
            got = os.pread(fd, SIZE_MAX * 2, 0)
            if len(got) != len(self.model):
                raise CorruptionError(f"{what}: {len(got)} bytes, expected {len(self.model)}")
            self.check(what, got, 0) if got else None


class _Descriptor:
    """A descriptor that contextlib.closing can close."""

    def __init__(self, path: Path, flags: int) -> None:
        self.number = os.open(path, flags | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.number)


OPERATIONS: list[tuple[Callable[[File], None], int]] = [
    (File.read, 30),
    (File.write, 25),
    (File.map_read, 12),
    (File.map_write, 12),
    (File.truncate, 8),
    (File.append, 6),
    (File.reopen, 4),
    (File.compare_all, 2),
    (File.sync, 1),
    (File.rename, 1),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of this kind."""
    stress_rig.add_place_arguments(parser)
    parser.add_argument("--ops", type=int, default=100_000, help="operations in all")
    parser.add_argument("--ops-per-file", type=int, default=2_000, help="then the next lower file")
    parser.add_argument(
        "--remount-every", type=int, default=10_000, help="operations between remounts, 0: never"
    )
    parser.add_argument(
        "--drop-every", type=int, default=1_000, help="operations between dropped caches, 0: never"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run it; 0 when no byte was wrong."""
    seed = stress_rig.seed_of(arguments)
    rng = random.Random(seed)
    files = -(-arguments.ops // arguments.ops_per_file)
    contents = [bytearray(rng.randbytes(rng.randrange(1, SIZE_MAX))) for _ in range(files)]

    def build(lower: Path) -> None:
        (lower / "d").mkdir()
        for number, content in enumerate(contents):
            (lower / f"d/{number}").write_bytes(content)

    counts: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    started = time.monotonic()
    with stress_rig.open_place(arguments, build) as place:
        print(f"fsx on {place.name}: {arguments.ops} operations, seed {seed}", flush=True)
        done = 0
        for number, content in enumerate(contents):
            file = File(place.root / f"d/{number}", content, rng)
            try:
                ops = min(arguments.ops_per_file, arguments.ops - done)
                file = _work(place, file, arguments, done, ops)
                done += ops
            except CorruptionError as exc:
                problems.append(f"operation {done + file.counts.total()}, seed {seed}: {exc}")
                print("\n".join(f"    {line}" for line in file.log))
                break
            finally:
                counts += file.counts
                file.close()
    elapsed = time.monotonic() - started
    table = stress_rig.Table(["operation", "count"])
    for name, count in counts.most_common():
        table.row(name, count)
    table.row("all", counts.total())
    print(f"{elapsed:.1f} s, {len(problems)} corruptions")
    return stress_rig.verdict("fsx", problems)


def _work(
    place: stress_rig.Place, file: File, arguments: argparse.Namespace, before: int, ops: int
) -> File:
    """Apply `ops` random operations; the file as it then is (a remount reopens it)."""
    operations = [operation for operation, _ in OPERATIONS]
    weights = [weight for _, weight in OPERATIONS]
    for index in range(before + 1, before + ops + 1):
        file.rng.choices(operations, weights)[0](file)
        if arguments.drop_every and index % arguments.drop_every == 0:
            file.note("drop_caches")
            os.fsync(file.fd)
            stress_rig.drop_caches(3)
        if arguments.remount_every and index % arguments.remount_every == 0 and place.can_remount:
            file = _remounted(place, file)
    file.compare_all()
    return file


def _remounted(place: stress_rig.Place, file: File) -> File:
    file.compare_all()
    file.close()
    place.remount()
    again = File(file.path, file.model, file.rng)
    again.log, again.counts = file.log, file.counts
    again.note("remount")
    return again

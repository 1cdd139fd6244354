"""What the limits count is what the upper directory holds, whatever was done to it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from tests.property.test_model import CoreAndModel
from tests.support import probe
from tests.support.held import BLOCK, Held, cost, held
from tests.support.shell import RENAME_EXCHANGE, Shell
from tests.support.unions import memory_directory
from unionfs2.handles import FileHandle
from unionfs2.options import MountSpec
from unionfs2.union import UnionFS

KIB = 1 << 10


class CountedModel(CoreAndModel):
    """The histories of the model, counted: the count never strays from the upper."""

    options: ClassVar[dict[str, int]] = {"quota_bytes": 1 << 40, "quota_inodes": 1 << 40}

    @invariant()
    def count_agrees(self) -> None:
        if self.fs is not None:
            ledger = self.fs.stack.ledger
            assert ledger is not None
            assert Held(ledger.used_bytes, ledger.used_inodes) == held(self.upper)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_histories_of_the_model_are_counted(place: str, tmp_path: Path) -> None:
    probe.need("trusted-xattr", "mknod-whiteout")
    limits = settings(
        max_examples=40,
        stateful_step_count=25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    where = memory_directory() if place == "memory" else tmp_path
    with tempfile.TemporaryDirectory(prefix="unionfs2-model-", dir=where) as base:
        run_state_machine_as_test(type("Machine", (CountedModel,), {"base": base}), settings=limits)


# --- long histories with data, open files and limits that bite ------------------------------------


class History:
    """Random operations on a small union; after each one the count is what is there."""

    # What one step takes at most: a copy-up of the largest file, and what is reserved for names.
    STEP_MAX = 700 * KIB

    def __init__(self, home: Path, seed: int, *, sparse: bool) -> None:
        self.random = random.Random(seed)
        self.sparse = sparse
        self.refused = 0
        self.upper = home / "upper"
        lower = home / "lower"
        for path in (lower, self.upper, home / "work"):
            path.mkdir()
        _fill(lower, self.random, sparse=sparse)
        self.limit_bytes = self.random.randrange(60, 900) * KIB
        self.limit_inodes = self.random.randrange(7, 30)
        self.spec = MountSpec(
            lower=(os.fsencode(lower),),
            upper=os.fsencode(self.upper),
            work=os.fsencode(home / "work"),
            userxattr=False,
            quota_bytes=self.limit_bytes,
            quota_inodes=self.limit_inodes,
        )
        self.fs = UnionFS.open(self.spec)
        self.open: list[FileHandle] = []

    def close(self) -> None:
        self.fs.close()

    @property
    def counted(self) -> Held:
        ledger = self.fs.stack.ledger
        assert ledger is not None
        return Held(ledger.used_bytes, ledger.used_inodes)

    @property
    def there(self) -> Held:
        """The upper, and what was deleted from it and is still open."""
        found = held(self.upper)
        nameless: dict[int, int] = {}
        for handle in self.open:
            st = os.fstat(handle.fd)
            if handle.in_upper and not st.st_nlink:
                nameless[st.st_ino] = cost(st)
        return Held(found.bytes + sum(nameless.values()), found.inodes + len(nameless))

    @property
    def free(self) -> tuple[Callable[[], None], ...]:
        return (self.unlink, self.rmdir, self.rename, self.setxattr)

    def step(self) -> None:
        act = self.random.choice(self._acts())
        before = self.there
        try:
            act()
        except OSError as exc:
            if exc.errno == errno.EDQUOT:
                self.refused += 1
                assert self.there == before
                short = self.limit_bytes - before.bytes < self.STEP_MAX
                assert short or self.limit_inodes - before.inodes < 6
        after = self.there
        assert self.counted == after
        # Deleting, moving and attributes are never refused for a block of a directory; ext4 keeps
        # the list of many extents in blocks of its own.
        if after.bytes > before.bytes and act not in self.free:
            assert after.bytes <= self.limit_bytes + self.sparse * 2 * BLOCK, act
        if after.inodes > before.inodes:
            assert after.inodes <= self.limit_inodes

    def _acts(self) -> list[Callable[[], None]]:
        return [
            *[self.create] * 4,
            *[self.write] * 8,
            *[self.rewrite] * 4,
            self.mkdir,
            self.symlink,
            self.link,
            *[self.unlink] * 3,
            self.rmdir,
            *[self.rename] * 3,
            self.truncate,
            self.chmod,
            self.setxattr,
            self.open_one,
            *[self.close_one] * 2,
            self.remount,
        ]

    def path(self) -> bytes:
        depth = self.random.choice((1, 1, 2, 2, 3))
        return b"/".join(self.random.choice((b"a", b"b", b"c", b"d")) for _ in range(depth))

    @property
    def sh(self) -> Shell:
        return Shell(self.fs)

    def data(self) -> bytes:
        return b"x" * self.random.choice((1, 100, 4095, 4096, 4097, 20_000, 130_000, 300_000))

    def offset(self, size: int) -> int:
        if self.sparse and self.random.random() < 0.4:
            return self.random.randrange(0, 600_000)
        return self.random.randrange(0, size + 1) if size else 0

    def create(self) -> None:
        self.sh.create(self.path(), b"")

    def write(self) -> None:
        handle = self.sh.open(self.path(), os.O_RDWR | self.random.choice((0, 0, os.O_TRUNC)))
        try:
            self._write(handle)
        finally:
            self.fs.release(handle)

    def rewrite(self) -> None:
        writable = [handle for handle in self.open if handle.writable]
        if writable:
            self._write(self.random.choice(writable))

    def _write(self, handle: FileHandle) -> None:
        data = self.data()
        offset = self.offset(os.fstat(handle.fd).st_size)
        done = self.fs.write(handle, offset, data)
        assert 0 < done <= len(data)
        assert os.pread(handle.fd, done, offset) == data[:done]
        if done < len(data):
            with pytest.raises(OSError, match="quota") as caught:
                self.fs.write(handle, offset + done, data[done:])
            assert caught.value.errno == errno.EDQUOT

    def mkdir(self) -> None:
        self.sh.mkdir(self.path())

    def symlink(self) -> None:
        self.sh.symlink(self.path(), b"t" * self.random.choice((5, 59, 60, 1000)))

    def link(self) -> None:
        self.sh.link(self.path(), self.path())

    def unlink(self) -> None:
        self.sh.unlink(self.path())

    def rmdir(self) -> None:
        self.sh.rmdir(self.path())

    def rename(self) -> None:
        flags = self.random.choice((0, 0, 0, RENAME_EXCHANGE))
        self.sh.rename(self.path(), self.path(), flags)

    def truncate(self) -> None:
        path, size = self.path(), self.random.choice((0, 10, 5000, 100_000, 900_000))
        if not self.sparse:
            size = min(size, self.sh.stat(path).st_size)
        self.fs.release(self.sh.open(path, os.O_WRONLY))
        self.sh.truncate(path, size)

    def chmod(self) -> None:
        self.sh.chmod(self.path(), 0o700)

    def setxattr(self) -> None:
        self.sh.setxattr(self.path(), b"user.k", b"v" * self.random.choice((1, 1000)))

    def open_one(self) -> None:
        flags = self.random.choice((os.O_RDONLY, os.O_RDWR, os.O_WRONLY))
        self.open.append(self.sh.open(self.path(), flags))

    def close_one(self) -> None:
        if self.open:
            self.fs.release(self.open.pop(self.random.randrange(len(self.open))))

    def remount(self) -> None:
        if self.random.random() < 0.2:
            self.open.clear()
            self.fs.close()
            self.fs = UnionFS.open(self.spec)


def _fill(lower: Path, rng: random.Random, *, sparse: bool) -> None:
    for name in ("a", "b"):
        (lower / name).mkdir()
        (lower / name / "c").mkdir()
        (lower / name / "c" / "d").write_bytes(b"y" * rng.randrange(0, 50_000))
        (lower / name / "a").write_bytes(b"y" * rng.randrange(0, 500_000))
        (lower / name / "b").symlink_to("z" * rng.choice((10, 200)))
    (lower / "d").write_bytes(b"y" * 4096)
    (lower / "a" / "d").hardlink_to(lower / "d")
    if sparse:
        with open(lower / "c", "wb") as file:
            file.truncate(500_000)
            file.seek(200_000)
            file.write(b"middle")


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory in memory or on the disk."""
    if request.param == "disk":
        yield tmp_path
        return
    home = Path(tempfile.mkdtemp(prefix="unionfs2-quota-", dir=memory_directory()))
    yield home
    shutil.rmtree(home)


@pytest.mark.parametrize("place", ["memory", "disk"], indirect=True)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_long_histories_are_counted(place: Path, *, sparse: bool) -> None:
    probe.need("trusted-xattr", "mknod-whiteout")
    refused = 0
    for seed in range(12):
        home = place / str(seed)
        home.mkdir()
        history = History(home, seed, sparse=sparse)
        try:
            for _ in range(250):
                history.step()
        finally:
            history.close()
        refused += history.refused
        shutil.rmtree(home)
    assert refused > 20  # the limits did bite

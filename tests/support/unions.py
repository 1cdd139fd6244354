"""Directories of one union, and the core over them: no mount of the union, no privilege needed.

Tests ask for the fixture ``unions`` and build what they need::

    def test_it(unions):
        u = unions({"file": "lower"}, upper={"other": ""})     # layers, topmost first
        u.sh.unlink("file")
        assert u.on_disk("file").kind == "whiteout"

Whatever a test does to the fs, everything is closed at its end.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import pytest

from tests.support import probe
from tests.support.shell import Shell
from tests.support.tree import Entry, Tree, build, snapshot
from unionfs2.options import MountSpec
from unionfs2.union import UnionFS

_MEMORY: Final = "/dev/shm"
_Test = TypeVar("_Test", bound=Callable[..., None])


class Union:
    """Layers below *home*, and ``fs`` over them; ``sh`` has its commands by path."""

    def __init__(
        self,
        home: Path,
        lowers: tuple[Tree, ...],
        upper: Tree | None,
        *,
        userxattr: bool,
        **options: Any,
    ) -> None:
        self.home = home
        self.userxattr = userxattr
        self.prefix = "user.overlay." if userxattr else "trusted.overlay."
        self.lowers = [home / f"l{number}" for number in range(1, len(lowers) + 1)]
        for path, tree in zip(self.lowers, lowers, strict=True):
            build(path, tree, userxattr=userxattr)
        self.upper = home / "upper"
        self.work = home / "work"
        if upper is not None:
            build(self.upper, upper, userxattr=userxattr)
            self.work.mkdir(exist_ok=True)
        self.spec = MountSpec(
            lower=tuple(os.fsencode(path) for path in self.lowers),
            upper=None if upper is None else os.fsencode(self.upper),
            work=None if upper is None else os.fsencode(self.work),
            userxattr=userxattr,
            **options,
        )
        for path in (*self.lowers, self.upper):  # whatever umask a core has left
            if path.exists():
                path.chmod(0o755)
        self._open: list[UnionFS] = []
        self._fs: UnionFS | None = None

    @property
    def fs(self) -> UnionFS:
        """The core, opened at the first use."""
        if self._fs is None:
            self._fs = self.another()
        return self._fs

    @property
    def sh(self) -> Shell:
        return Shell(self.fs)

    def another(self, *, clean_work: bool = True) -> UnionFS:
        """One more core over the same directories."""
        fs = UnionFS.open(self.spec, clean_work=clean_work)
        self._open.append(fs)
        return fs

    def reopen(self) -> UnionFS:
        """End the core as an unmount does, and start a new one."""
        self.close()
        return self.fs

    def end(self, fs: UnionFS) -> None:
        """Close one that another() gave."""
        self._open.remove(fs)
        fs.close()

    def abandon(self, end: Callable[[UnionFS], None]) -> None:
        """Give the current core to *end*, which stops it in its own way; the next is a new one."""
        fs = self.fs
        self._fs = None
        self._open.remove(fs)
        end(fs)

    def close(self) -> None:
        """End every core over these directories."""
        self._fs = None
        while self._open:
            self._open.pop().close()

    def key(self, suffix: str) -> str:
        """Name of a mark on disk."""
        return self.prefix + suffix

    def on_disk(self, path: str, *, layer: int = 0) -> Entry | None:
        """What layer *layer* (0: the upper) has at *path*, None for nothing."""
        return snapshot(self.layer(layer)).get(os.fsencode(path))

    def layer(self, number: int) -> Path:
        return self.lowers[number - 1] if number else self.upper

    def marks(self, path: str, *, layer: int = 0) -> dict[str, bytes]:
        """Marks of the overlay format on the object at *path* of a layer, by suffix."""
        entry = self.on_disk(path, layer=layer)
        assert entry is not None, f"nothing at {path}"
        start = len(self.prefix)
        return {k[start:]: v for k, v in entry.xattrs if k.startswith(self.prefix)}

    def in_work_after_open(self) -> list[str]:
        """Names in the work directory proper once a new core has opened it."""
        self.reopen()
        return self.in_work()

    def in_work(self) -> list[str]:
        """Names in the work directory proper."""
        return sorted(os.listdir(self.work / "work"))


class Unions(Protocol):
    """Makes unions for one test."""

    def __call__(self, *lowers: Tree, upper: Tree | None = ..., **options: Any) -> Union: ...


@cache
def memory_directory() -> str | None:
    """A directory in memory that can hold a whole union, for tests that make thousands."""
    keys = ["user.probe", "trusted.probe"] if probe.has_trusted_xattr() else ["user.probe"]
    try:
        with tempfile.TemporaryDirectory(dir=_MEMORY) as name:
            for key in keys:
                os.setxattr(name, key, b"probe")
            os.close(os.open(name, os.O_TMPFILE | os.O_RDWR))
            os.mknod(os.path.join(name, "whiteout"), stat.S_IFCHR)
    except OSError:
        return None
    return _MEMORY


@pytest.fixture(params=["trusted", "user"])
def userxattr(request: pytest.FixtureRequest) -> bool:
    """Both dialects; trusted where it can be written."""
    if request.param == "trusted":
        probe.need("trusted-xattr")
    else:
        probe.need("user-xattr")
    return bool(request.param == "user")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where unions of a test are made."""
    return tmp_path


@pytest.fixture
def unions(home: Path, userxattr: bool) -> Iterator[Unions]:
    """Makes unions in the dialect of the test; all are closed afterwards."""
    made: list[Union] = []

    def make(*lowers: Tree, upper: Tree | None = None, **options: Any) -> Union:
        place = home / f"u{len(made)}"
        place.mkdir()
        options.setdefault("userxattr", userxattr)
        read_only = options.pop("lower_only", False)
        tree = None if read_only else upper or {}
        union = Union(place, lowers, tree, **options)
        made.append(union)
        return union

    yield make
    for union in made:
        union.close()


def trusted_only(test: _Test) -> _Test:
    """For tests of what only ``trusted.overlay.*`` has."""
    one_dialect = pytest.mark.parametrize("userxattr", [False], ids=["trusted"])
    marked: _Test = pytest.mark.needs("trusted-xattr")(one_dialect(test))
    return marked


def open_fds() -> int:
    """Number of open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))

"""Random chains of layers, of the sort that nobody would write by hand.

``make(rng, home)`` builds one: some layers come from literals with every mark of the format, some
from work on a mount (the kernel's overlay with one set of options or another, or our core). The
same random state gives the same chain, apart from times that the system sets.

``mounted(layers)`` is the kernel's view of a chain as a descriptor; nothing is attached anywhere,
so nothing can be left behind.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.support.shell import Shell
from tests.support.tree import (
    Device,
    Dir,
    Fifo,
    File,
    HardLink,
    Node,
    Symlink,
    Whiteout,
    build,
)
from unionfs2 import mountcalls
from unionfs2.model import SetAttr
from unionfs2.nodes import Dir as DirNode
from unionfs2.options import MountSpec
from unionfs2.union import UnionFS

NAMES = (b"a", b"b", b"c", b"d", b"a-", b"a.b", b"a0", b"\xff\n", b"L" * 255)
_WEIGHTS = (6, 6, 5, 4, 2, 1, 1, 1, 0.2)
_CONTENTS = (b"", b"", b"one", b"two", b"six", b"x" * 70_000, b"y" * 70_000)
_TIMES = (1_000_000_000, 1_500_000_000_000_000_005)
_MODES = (0o644, 0o600, 0o4755)
_CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")

Path_ = tuple[bytes, ...]
Rng = random.Random


@dataclass
class Chain:
    """Layer directories, top-most first, and the dialect of their marks."""

    layers: list[Path]
    userxattr: bool
    made_by: list[str]


# --- literals -----------------------------------------------------------------------------------


def _name(rng: Rng) -> bytes:
    return rng.choices(NAMES, _WEIGHTS)[0]


class _Literal:
    """One random tree."""

    def __init__(self, rng: Rng, *, userxattr: bool, base: bool) -> None:
        self.rng = rng
        self.prefix = "user.overlay." if userxattr else "trusted.overlay."
        self.base = base
        self.files: list[bytes] = []

    def tree(self, prefix: bytes = b"", depth: int = 0) -> dict[bytes, Node]:
        rng = self.rng
        count = rng.randrange(1, 7) if depth == 0 else rng.randrange(3 + self.base)
        return {
            name: self.node(prefix + name, depth)
            for name in sorted({_name(rng) for _ in range(count)})
        }

    def node(self, path: bytes, depth: int) -> Node:
        rng = self.rng
        kinds: dict[Callable[[], Node], float] = {
            lambda: self.file(path): 35,
            lambda: self.directory(path, depth): (70 if self.base else 35) if depth < 4 else 0,
            Whiteout: 2 if self.base else 12,
            self.marked: 1 if self.base else 5,
            lambda: Symlink(target=rng.choice((b"a", b"/b/c")), **self.common(mode=False)): 8,
            lambda: Fifo(**self.common()): 2,
            lambda: Device(minor=rng.choice((3, 5)), **self.common()): 2,
            self.link: 6 if self.files else 0,
        }
        return rng.choices(list(kinds), list(kinds.values()))[0]()

    def common(self, *, mode: bool = True) -> dict[str, Any]:
        rng = self.rng
        found: dict[str, Any] = {"mtime_ns": rng.choice(_TIMES), "uid": rng.choice((0, 0, 0, 7))}
        if mode:
            found["mode"] = rng.choice(_MODES)
        return found

    def xattrs(self) -> dict[str, bytes]:
        rng = self.rng
        keys = ("user.k", "trusted.k", "security.capability", self.prefix + "overlay.opaque")
        if rng.random() < 0.8:
            return {}
        key = rng.choice(keys)
        return {key: _CAPABILITY if key.startswith("security") else rng.choice((b"1", b"y"))}

    def file(self, path: bytes) -> Node:
        self.files.append(path)
        rng = self.rng
        if rng.random() < 0.04:
            return File(size=300_000, pieces={200_000: rng.choice((b"i", b"j"))}, **self.common())
        return File(rng.choice(_CONTENTS), xattrs=self.xattrs(), **self.common())

    def directory(self, path: bytes, depth: int) -> Node:
        rng = self.rng
        common = self.common() | {"mode": rng.choice((0o755, 0o755, 0o700))}
        opaque = not self.base and rng.random() < 0.25
        xattrs = {key: value for key, value in self.xattrs().items() if key[:4] != "secu"}
        return Dir(self.tree(path + b"/", depth + 1), opaque=opaque, xattrs=xattrs, **common)

    def marked(self) -> Node:
        """The other form of a whiteout; not always an empty file, and then it is none."""
        data = b"" if self.rng.random() < 0.8 else b"no"
        return File(data, xattrs={self.prefix + "whiteout": b""}, **self.common())

    def link(self) -> Node:
        return HardLink(self.rng.choice(self.files))


# --- work ---------------------------------------------------------------------------------------


class Worker(Protocol):
    """Ways to change a tree by path."""

    def paths(self) -> dict[bytes, int]:
        """Every path with its S_IFMT."""

    def create(self, path: bytes, data: bytes) -> None: ...
    def write(self, path: bytes, data: bytes) -> None: ...
    def touch(self, path: bytes) -> None:
        """Open for writing and close."""

    def mkdir(self, path: bytes) -> None: ...
    def symlink(self, path: bytes, target: bytes) -> None: ...
    def mknod(self, path: bytes, mode: int, rdev: int) -> None: ...
    def link(self, path: bytes, new: bytes) -> None: ...
    def unlink(self, path: bytes) -> None: ...
    def rmdir(self, path: bytes) -> None: ...
    def rename(self, path: bytes, new: bytes) -> None: ...
    def chmod(self, path: bytes, mode: int) -> None: ...
    def chown(self, path: bytes, uid: int) -> None: ...
    def utime(self, path: bytes, mtime_ns: int) -> None: ...
    def setxattr(self, path: bytes, key: bytes, value: bytes) -> None: ...
    def removexattr(self, path: bytes, key: bytes) -> None: ...


class OnMount:
    """Work by system calls below a directory."""

    def __init__(self, root: bytes) -> None:
        self.root = root

    def _at(self, path: bytes) -> bytes:
        return self.root + b"/" + path

    def paths(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        todo = [b""]
        while todo:
            prefix = todo.pop()
            for name in os.listdir(self._at(prefix)):
                path = prefix + name
                try:
                    kind = stat.S_IFMT(os.lstat(self._at(path)).st_mode)
                except FileNotFoundError:
                    continue  # a stray whiteout
                found[path] = kind
                if kind == stat.S_IFDIR:
                    todo.append(path + b"/")
        return found

    def create(self, path: bytes, data: bytes) -> None:
        with open(self._at(path), "xb") as file:
            file.write(data)

    def write(self, path: bytes, data: bytes) -> None:
        with open(self._at(path), "r+b") as file:
            file.write(data)

    def touch(self, path: bytes) -> None:
        os.close(os.open(self._at(path), os.O_WRONLY))

    def mkdir(self, path: bytes) -> None:
        os.mkdir(self._at(path))

    def symlink(self, path: bytes, target: bytes) -> None:
        os.symlink(target, self._at(path))

    def mknod(self, path: bytes, mode: int, rdev: int) -> None:
        os.mknod(self._at(path), mode, rdev)

    def link(self, path: bytes, new: bytes) -> None:
        os.link(self._at(path), self._at(new), follow_symlinks=False)

    def unlink(self, path: bytes) -> None:
        os.unlink(self._at(path))

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self._at(path))

    def rename(self, path: bytes, new: bytes) -> None:
        os.rename(self._at(path), self._at(new))

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def chown(self, path: bytes, uid: int) -> None:
        os.chown(self._at(path), uid, -1, follow_symlinks=False)

    def utime(self, path: bytes, mtime_ns: int) -> None:
        os.utime(self._at(path), ns=(mtime_ns, mtime_ns), follow_symlinks=False)

    def setxattr(self, path: bytes, key: bytes, value: bytes) -> None:
        os.setxattr(self._at(path), key, value)

    def removexattr(self, path: bytes, key: bytes) -> None:
        os.removexattr(self._at(path), key)


class OnCore:
    """The same work through our core, without a mount."""

    def __init__(self, fs: UnionFS) -> None:
        self.fs = fs
        self.sh = Shell(fs)

    def paths(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        todo: list[tuple[bytes, DirNode]] = [(b"", self.fs.root)]
        while todo:
            prefix, node = todo.pop()
            for entry in self.fs.listing(node):
                looked = self.fs.lookup(node, entry.name)
                if looked is None:
                    continue
                found[prefix + entry.name] = looked[0].kind
                if isinstance(looked[0], DirNode):
                    todo.append((prefix + entry.name + b"/", looked[0]))
        return found

    def create(self, path: bytes, data: bytes) -> None:
        self.sh.create(path, data)

    def write(self, path: bytes, data: bytes) -> None:
        self.sh.write(path, data)

    def touch(self, path: bytes) -> None:
        self.fs.release(self.sh.open(path, os.O_WRONLY))

    def mkdir(self, path: bytes) -> None:
        self.sh.mkdir(path)

    def symlink(self, path: bytes, target: bytes) -> None:
        self.sh.symlink(path, target)

    def mknod(self, path: bytes, mode: int, rdev: int) -> None:
        self.sh.mknod(path, mode, rdev)

    def link(self, path: bytes, new: bytes) -> None:
        self.sh.link(path, new)

    def unlink(self, path: bytes) -> None:
        self.sh.unlink(path)

    def rmdir(self, path: bytes) -> None:
        self.sh.rmdir(path)

    def rename(self, path: bytes, new: bytes) -> None:
        self.sh.rename(path, new)

    def chmod(self, path: bytes, mode: int) -> None:
        self.sh.chmod(path, mode)

    def chown(self, path: bytes, uid: int) -> None:
        self.sh.setattr(path, SetAttr(uid=uid))

    def utime(self, path: bytes, mtime_ns: int) -> None:
        self.sh.setattr(path, SetAttr(atime_ns=mtime_ns, mtime_ns=mtime_ns))

    def setxattr(self, path: bytes, key: bytes, value: bytes) -> None:
        self.sh.setxattr(path, key, value)

    def removexattr(self, path: bytes, key: bytes) -> None:
        self.sh.removexattr(path, key)


def work(rng: Rng, worker: Worker, count: int) -> None:
    """*count* random changes; what the tree refuses does not happen."""
    for _ in range(count):
        paths = worker.paths()
        with contextlib.suppress(OSError):
            _change(rng, worker, paths)


def _change(rng: Rng, worker: Worker, paths: dict[bytes, int]) -> None:
    directories = [
        b"",
        *sorted(path + b"/" for path, kind in paths.items() if kind == stat.S_IFDIR),
    ]
    new = rng.choice(directories) + _name(rng)
    if not paths or rng.random() < 0.25:
        _make(rng, worker, new)
        path = new
    else:
        path = rng.choice(sorted(paths))
        path = _alter(rng, worker, path, paths, new)
    if rng.random() < 0.7:
        time = rng.choice(_TIMES)
        for each in (path, os.path.dirname(path)):
            if each and rng.random() < 0.8:
                with contextlib.suppress(OSError):
                    worker.utime(each, time)


def _make(rng: Rng, worker: Worker, new: bytes) -> None:
    choice = rng.randrange(7)
    if choice < 3:
        worker.create(new, rng.choice(_CONTENTS))
    elif choice < 5:
        worker.mkdir(new)
    elif choice == 5:
        worker.symlink(new, rng.choice((b"a", b"b")))
    else:
        worker.mknod(new, stat.S_IFIFO | 0o600, 0)


def _alter(rng: Rng, worker: Worker, path: bytes, paths: dict[bytes, int], new: bytes) -> bytes:
    """One change of *path*; where it is afterwards."""
    kind = paths[path]
    choice = rng.choice(
        ("remove", "again", "rename", "rename", "link", "mode", "owner", "xattr", "time")
        + ("data", "data", "touch") * (kind == stat.S_IFREG)
        + ("rename",) * 5 * (kind == stat.S_IFDIR)
    )
    if choice == "rename":
        worker.rename(path, new)
        return new
    if choice in ("remove", "again"):
        below = [other for other in paths if other.startswith(path + b"/")]
        for other in sorted((*below, path), reverse=True):
            (worker.rmdir if paths[other] == stat.S_IFDIR else worker.unlink)(other)
        if choice == "again":
            _make(rng, worker, path)
    elif choice == "link":
        worker.link(path, new)
    elif choice == "data":
        worker.write(path, rng.choice(_CONTENTS))
    elif choice == "touch":
        worker.touch(path)
    else:
        _attributes(rng, worker, path, kind, choice)
    return path


def _attributes(rng: Rng, worker: Worker, path: bytes, kind: int, choice: str) -> None:
    if choice == "mode" and kind != stat.S_IFLNK:
        worker.chmod(path, rng.choice((0o755, 0o700) if kind == stat.S_IFDIR else _MODES))
    elif choice == "owner":
        worker.chown(path, rng.choice((0, 7)))
    elif choice == "time":
        worker.utime(path, rng.choice(_TIMES))
    elif choice == "xattr" and kind in (stat.S_IFREG, stat.S_IFDIR):
        if rng.random() < 0.3:
            worker.removexattr(path, b"user.k")
        else:
            worker.setxattr(path, b"user.k", rng.choice((b"1", b"2")))


# --- chains -------------------------------------------------------------------------------------

#: Ways to make a layer above others, with the share of each.
WAYS = {"literal": 4, "kernel": 1, "redirect_dir": 2, "metacopy": 3, "core": 2}
# Chains in which directories move again and again, and through each other.
_RENAMING = {"literal": 1, "kernel": 1, "redirect_dir": 4, "metacopy": 4}
_OPTIONS: dict[str, dict[bytes, bytes]] = {
    "kernel": {},
    "redirect_dir": {b"redirect_dir": b"on"},
    "metacopy": {b"redirect_dir": b"on", b"metacopy": b"on"},
}


def make(
    rng: Rng, home: Path, *, ways: dict[str, int] | None = None, userxattr: bool | None = None
) -> Chain:
    """A chain of two to five layers in *home*, an empty directory."""
    if userxattr is None:
        userxattr = rng.random() < 0.15
    chain = Chain([], userxattr, [])
    count = rng.choice((2, 2, 2, 3, 3, 4, 5))
    if ways is None:
        ways = _RENAMING if rng.random() < 0.3 else WAYS
    ways = dict(ways)
    if userxattr:
        ways.pop("redirect_dir", None)
        ways.pop("metacopy", None)
    for number in range(count):
        layer = home / f"{count - 1 - number}"
        way = rng.choices(list(ways), list(ways.values()))[0] if number else "literal"
        add(rng, chain, layer, way)
    return chain


def add(rng: Rng, chain: Chain, layer: Path, way: str) -> None:
    """Put one more layer on *chain*."""
    userxattr = chain.userxattr
    if way == "literal":
        literal = _Literal(rng, userxattr=userxattr, base=not chain.layers)
        build(layer, literal.tree(), userxattr=userxattr)
    else:
        layer.mkdir()
        with tempfile.TemporaryDirectory(dir=layer.parent, prefix="work-") as scratch:
            maker = _on_core if way == "core" else _on_kernel
            maker(rng, chain, layer, Path(scratch), way)
    chain.layers.insert(0, layer)
    chain.made_by.insert(0, way)


def _on_core(rng: Rng, chain: Chain, layer: Path, scratch: Path, _: str) -> None:
    spec = MountSpec(
        lower=tuple(os.fsencode(path) for path in chain.layers),
        upper=os.fsencode(layer),
        work=os.fsencode(scratch),
        userxattr=chain.userxattr,
    )
    # What a mount of this kind refuses to show (metacopy) cannot be worked on.
    with UnionFS.open(spec) as fs, contextlib.suppress(PermissionError):
        work(rng, OnCore(fs), rng.randrange(1, 16))


def _on_kernel(rng: Rng, chain: Chain, layer: Path, scratch: Path, way: str) -> None:
    with writable(chain, layer, scratch, way) as root, contextlib.suppress(PermissionError):
        work(rng, OnMount(root), rng.randrange(1, 16))


@contextlib.contextmanager
def writable(chain: Chain, layer: Path, work_dir: Path, way: str) -> Iterator[bytes]:
    """A path to a mount of *chain* with *layer* as its upper; *way* is one of the kernel's."""
    fd = _mount(chain.layers, chain.userxattr, _OPTIONS[way], upper=layer, work_dir=work_dir)
    try:
        yield b"/proc/self/fd/%d" % fd
    finally:
        os.close(fd)


def _mount(
    layers: Sequence[Path],
    userxattr: bool,
    options: dict[bytes, bytes],
    *,
    upper: Path | None = None,
    work_dir: Path | None = None,
) -> int:
    context = mountcalls.fsopen(b"overlay")
    try:
        for layer in layers:
            mountcalls.fsconfig_string(context, b"lowerdir+", os.fsencode(layer))
        if upper is not None:
            mountcalls.fsconfig_string(context, b"upperdir", os.fsencode(upper))
            mountcalls.fsconfig_string(context, b"workdir", os.fsencode(work_dir or b""))
        if userxattr:
            mountcalls.fsconfig_flag(context, b"userxattr")
        for key, value in options.items():
            mountcalls.fsconfig_string(context, key, value)
        mountcalls.fsconfig_create(context)
        return mountcalls.fsmount(context, 0)
    finally:
        os.close(context)


@contextlib.contextmanager
def mounted(layers: Sequence[Path], *, userxattr: bool, empty: Path) -> Iterator[int]:
    """The kernel's view of *layers* as a descriptor; *empty* serves where one layer is too few."""
    options = {} if userxattr else _OPTIONS["metacopy"]
    lowers = [*layers, empty] if len(layers) < 2 else list(layers)
    fd = _mount(lowers, userxattr, options)
    try:
        yield fd
    finally:
        os.close(fd)

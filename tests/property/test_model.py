"""The core against a model in dictionaries: value or errno of each call, view, upper directory."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path as OsPath
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.support import probe
from tests.support.model import MDir, MFile, MNode, ModelUnion, MWhiteout, Path, Shown, all_of
from tests.support.shell import RENAME_EXCHANGE, RENAME_NOREPLACE, Shell, View, view
from tests.support.unions import memory_directory
from unionfs2.nodes import DEAD, Dir
from unionfs2.options import MountSpec
from unionfs2.union import UnionFS

_NAMES = (b"a", b"b", b"\xff\n")
_MODES = (0o700, 0o744, 0o755, 0o1700)  # a plain user has to get in
_OPAQUE = {False: "trusted.overlay.opaque", True: "user.overlay.opaque"}

names = st.sampled_from(_NAMES)
paths = st.lists(names, min_size=1, max_size=3).map(tuple)
modes = st.sampled_from(_MODES)
contents = st.sampled_from((b"", b"x", b"longer content"))
keys = st.sampled_from((b"user.k", b"user.l"))


def _files() -> st.SearchStrategy[MNode]:
    regular = st.builds(MFile, st.just(stat.S_IFREG), modes, contents)
    links = st.builds(MFile, st.just(stat.S_IFLNK), st.just(0o777), st.sampled_from((b"a", b"b/c")))
    fifos = st.builds(MFile, st.just(stat.S_IFIFO), modes)
    return st.one_of(regular, regular, links, fifos, st.builds(MWhiteout))


def _trees() -> st.SearchStrategy[MDir]:
    nodes = st.recursive(
        _files(),
        lambda below: st.builds(
            MDir, st.dictionaries(names, below, max_size=3), modes, opaque=st.booleans()
        ),
        max_leaves=8,
    )
    return st.builds(MDir, st.dictionaries(names, nodes, max_size=3))


class CoreAndModel(RuleBasedStateMachine):
    """Every rule does one operation on both and compares; the invariants compare what is there."""

    userxattr = False
    options: ClassVar[dict[str, int]] = {}  # of the mount, besides its layers
    base = ""  # holds the directories of all histories, and goes with them whatever happens

    def __init__(self) -> None:
        super().__init__()
        self.home = OsPath(tempfile.mkdtemp(dir=self.base))
        self.fs: UnionFS | None = None
        self.model = ModelUnion(MDir(), [])

    @initialize(trees=st.lists(_trees(), min_size=2, max_size=4), linked=st.lists(names))
    def mount(self, trees: list[MDir], linked: list[bytes]) -> None:
        for tree, name in zip(reversed(trees), linked, strict=False):
            _add_link(tree, name)
        places = [self.home / str(number) for number in range(len(trees))]
        for tree, place in zip(trees, places, strict=True):
            place.mkdir()
            place.chmod(tree.mode)
            _write(tree, place, {}, opaque=_OPAQUE[self.userxattr])
        (self.home / "work").mkdir()
        self.spec = MountSpec(
            lower=tuple(os.fsencode(place) for place in places[1:]),
            upper=os.fsencode(places[0]),
            work=os.fsencode(self.home / "work"),
            userxattr=self.userxattr,
            **self.options,  # type: ignore[arg-type]  # each field's own type
        )
        self.upper = places[0]
        self.model = ModelUnion(trees[0], trees[1:])
        self.fs = UnionFS.open(self.spec)

    def teardown(self) -> None:
        if self.fs is not None:
            self.fs.close()
        shutil.rmtree(self.home)

    def both(
        self, real: Callable[[Shell], object], modelled: Callable[[ModelUnion], object]
    ) -> None:
        """Do it twice; the same value or errno."""
        assert self.fs is not None
        ours = _outcome(lambda: real(Shell(self.fs)))  # type: ignore[arg-type]
        expected = _outcome(lambda: modelled(self.model))
        assert ours == expected

    # --- rules -------------------------------------------------------------------------------

    @rule(path=paths, mode=modes)
    def create(self, path: Path, mode: int) -> None:
        self.both(
            lambda sh: sh.create(_join(path), mode=mode),
            lambda m: m.make(path, MFile(mode=mode & ~0o022)),
        )

    @rule(path=paths)
    def symlink(self, path: Path) -> None:
        self.both(
            lambda sh: sh.symlink(_join(path), b"to"),
            lambda m: m.make(path, MFile(stat.S_IFLNK, 0o777, b"to")),
        )

    @rule(path=paths, mode=modes)
    def mkfifo(self, path: Path, mode: int) -> None:
        self.both(
            lambda sh: sh.mknod(_join(path), stat.S_IFIFO | mode),
            lambda m: m.make(path, MFile(stat.S_IFIFO, mode & ~0o022)),
        )

    @rule(path=paths, mode=modes)
    def mkdir(self, path: Path, mode: int) -> None:
        self.both(lambda sh: sh.mkdir(_join(path), mode), lambda m: m.mkdir(path, mode & ~0o022))

    @rule(path=paths, new=paths)
    def link(self, path: Path, new: Path) -> None:
        self.both(lambda sh: sh.link(_join(path), _join(new)), lambda m: m.link(path, new))

    @rule(path=paths)
    def unlink(self, path: Path) -> None:
        self.both(lambda sh: sh.unlink(_join(path)), lambda m: m.unlink(path))

    @rule(path=paths)
    def rmdir(self, path: Path) -> None:
        self.both(lambda sh: sh.rmdir(_join(path)), lambda m: m.rmdir(path))

    @rule(old=paths, new=paths)
    def rename(self, old: Path, new: Path) -> None:
        self.both(lambda sh: sh.rename(_join(old), _join(new)), lambda m: m.rename(old, new))

    @rule(old=paths, new=paths)
    def rename_noreplace(self, old: Path, new: Path) -> None:
        self.both(
            lambda sh: sh.rename(_join(old), _join(new), RENAME_NOREPLACE),
            lambda m: m.rename(old, new, noreplace=True),
        )

    @rule(one=paths, other=paths)
    def exchange(self, one: Path, other: Path) -> None:
        self.both(
            lambda sh: sh.rename(_join(one), _join(other), RENAME_EXCHANGE),
            lambda m: m.exchange(one, other),
        )

    @rule(path=paths, offset=st.integers(0, 9), data=st.sampled_from((b"new", b"12345")))
    def write(self, path: Path, offset: int, data: bytes) -> None:
        self.both(
            lambda sh: sh.write(_join(path), data, offset=offset),
            lambda m: m.write(path, offset, data),
        )

    @rule(path=paths, size=st.integers(0, 20))
    def truncate(self, path: Path, size: int) -> None:
        def real(sh: Shell) -> None:
            sh.fs.release(sh.open(_join(path), os.O_WRONLY))
            sh.truncate(_join(path), size)

        self.both(real, lambda m: m.truncate(path, size))

    @rule(path=paths, mode=modes)
    def chmod(self, path: Path, mode: int) -> None:
        if not self.is_link(path):
            self.both(lambda sh: sh.chmod(_join(path), mode), lambda m: m.chmod(path, mode))

    @rule(path=paths, key=keys, value=contents)
    def setxattr(self, path: Path, key: bytes, value: bytes) -> None:
        if self.takes_xattrs(path):
            self.both(
                lambda sh: sh.setxattr(_join(path), key, value),
                lambda m: m.setxattr(path, key, value),
            )

    @rule(path=paths, key=keys)
    def removexattr(self, path: Path, key: bytes) -> None:
        if self.takes_xattrs(path):
            self.both(
                lambda sh: sh.removexattr(_join(path), key), lambda m: m.removexattr(path, key)
            )

    @rule()
    def remount(self) -> None:
        assert self.fs is not None
        self.fs.close()
        self.fs = UnionFS.open(self.spec)

    def is_link(self, path: Path) -> bool:
        """chmod of a symlink is refused by the VFS of a mount, before any file system."""
        if not self.model.exists(path):
            return False
        found = self.model.stack_at(path)
        return isinstance(found, MFile) and found.kind == stat.S_IFLNK

    def takes_xattrs(self, path: Path) -> bool:
        """user.* is for regular files and directories; the VFS refuses others."""
        if not self.model.exists(path):
            return True
        found = self.model.stack_at(path)
        return not isinstance(found, MFile) or found.kind == stat.S_IFREG

    # --- what is there -----------------------------------------------------------------------

    @invariant()
    def views_agree(self) -> None:
        if self.fs is not None:
            assert _shown(view(self.fs)) == self.model.view()

    @invariant()
    def upper_agrees(self) -> None:
        if self.fs is not None:
            on_disk = _read(self.upper, opaque=_OPAQUE[self.userxattr])
            assert _plain(on_disk) == _plain(self.model.upper)

    @invariant()
    def names_of_the_upper_are_known(self) -> None:
        for node in self.fs.stack.nodes.by_id.values() if self.fs is not None else ():
            if isinstance(node, Dir) and node.upper is not None and not node.flags & DEAD:
                there = os.listdir(os.fsencode(f"/proc/self/fd/{node.upper.at()}"))
                assert not [name for name in there if node.upper_names.lack(name)]

    @invariant()
    def work_is_tidy(self) -> None:
        if self.fs is not None:
            left = os.listdir(self.home / "work" / "work")
            assert len(left) <= 1, left  # the whiteout that others are linked to


def _join(path: Path) -> bytes:
    return b"/".join(path)


def _outcome(act: Callable[[], object]) -> object:
    try:
        act()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return None


def _shown(seen: View) -> dict[Path, Shown]:
    out = {}
    for path, entry in seen.items():
        is_dir = stat.S_ISDIR(entry.kind)
        content = entry.data or entry.target or b""
        parts = tuple(path.split(b"/")) if path else ()
        nlink = 0 if is_dir else entry.nlink
        out[parts] = (entry.kind, entry.mode, content, entry.xattrs, nlink)
    return out


def _add_link(tree: MDir, name: bytes) -> None:
    """Give some file of *tree* one more name in its root, if it has a file and the name is free."""
    files = [node for node in all_of(tree) if isinstance(node, MFile)]
    if files:
        tree.entries.setdefault(name, files[0])


def _write(tree: MDir, place: OsPath, made: dict[int, bytes], *, opaque: str) -> None:
    """Make *tree* in the directory *place*; *made* has the files so far, by identity."""
    for name, node in tree.entries.items():
        path = os.path.join(os.fsencode(place), name)
        if isinstance(node, MWhiteout):
            os.mknod(path, stat.S_IFCHR)
        elif isinstance(node, MDir):
            os.mkdir(path)
            _write(node, OsPath(os.fsdecode(path)), made, opaque=opaque)
            if node.opaque:
                os.setxattr(path, opaque, b"y")
            os.chmod(path, node.mode)
        elif id(node) in made:
            os.link(made[id(node)], path, follow_symlinks=False)
        else:
            _write_file(node, path)
            made[id(node)] = path


def _write_file(node: MFile, path: bytes) -> None:
    if node.kind == stat.S_IFLNK:
        os.symlink(node.data, path)
        return
    os.mknod(path, node.kind | 0o600)
    if node.data:
        OsPath(os.fsdecode(path)).write_bytes(node.data)
    os.chmod(path, node.mode)


def _read(place: OsPath, *, opaque: str) -> MDir:
    """The directory *place* as a tree of the model."""
    xattrs = {os.fsencode(k): os.getxattr(place, k) for k in os.listxattr(place)}
    out = MDir({}, stat.S_IMODE(place.lstat().st_mode))
    out.opaque = xattrs.get(opaque.encode()) == b"y"
    out.xattrs = {k: v for k, v in xattrs.items() if b".overlay." not in k}
    for entry in os.scandir(place):
        info = entry.stat(follow_symlinks=False)
        path = place / entry.name
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFCHR:
            node: MNode = MWhiteout()
        elif kind == stat.S_IFDIR:
            node = _read(path, opaque=opaque)
        else:
            node = MFile(kind, stat.S_IMODE(info.st_mode))
            if kind == stat.S_IFREG:
                node.data = path.read_bytes()
                shown = {os.fsencode(k): os.getxattr(path, k) for k in os.listxattr(path)}
                node.xattrs = {k: v for k, v in shown.items() if b".overlay." not in k}
            elif kind == stat.S_IFLNK:
                node.data = os.fsencode(os.readlink(path))
        out.entries[os.fsencode(entry.name)] = node
    return out


def _plain(node: MNode, *, root: bool = True) -> object:
    """A tree as nested tuples; the opaque mark of a root means nothing."""
    if not isinstance(node, MDir):
        return node
    below = {name: _plain(inner, root=False) for name, inner in sorted(node.entries.items())}
    return (node.mode, node.xattrs, node.opaque and not root, below)


@pytest.mark.parametrize("userxattr", [False, True], ids=["trusted", "user"])
def test_the_core_does_what_the_model_does(userxattr: bool) -> None:
    probe.need("user-xattr" if userxattr else "trusted-xattr", "mknod-whiteout")
    limits = settings(
        max_examples=60,
        stateful_step_count=25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with tempfile.TemporaryDirectory(prefix="unionfs2-model-", dir=memory_directory()) as base:
        fields = {"userxattr": userxattr, "base": base}
        run_state_machine_as_test(type("Machine", (CoreAndModel,), fields), settings=limits)


def test_the_model_knows_its_own_rules() -> None:
    """The table of operations, read off the model's upper: the model is worth comparing with."""
    lower = MDir({b"f": MFile(), b"d": MDir({b"x": MFile()})})
    model = ModelUnion(MDir(), [lower])
    model.unlink((b"f",))
    assert model.upper.entries == {b"f": MWhiteout()}
    model.mkdir((b"f",), 0o700)
    assert model.upper.entries[b"f"] == MDir({}, 0o700, opaque=True)
    with pytest.raises(OSError, match="Invalid cross-device link"):
        model.rename((b"d",), (b"e",))
    model.rename((b"d", b"x"), (b"x",))
    directory: MNode = MDir({b"x": MWhiteout()})
    assert model.upper.entries[b"d"] == directory
    model.rmdir((b"d",))
    hidden: MNode = MWhiteout()
    assert model.upper.entries[b"d"] == hidden
    assert list(itertools.chain(model.names(()))) == [b"f", b"x"]

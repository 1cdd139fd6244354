"""What counts as a change: every rule by hand, natively and through mounts of the kernel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import chains, probe
from tests.support.tree import (
    Device,
    Dir,
    Fifo,
    File,
    HardLink,
    Node,
    Symlink,
    Tree,
    Whiteout,
    build,
)
from unionfs2 import changes
from unionfs2.errors import DamagedLayerError, LayerError
from unionfs2.storemodel import Change
from unionfs2.treecompare import same_content
from unionfs2.whiteout import Dialect

pytestmark = pytest.mark.needs("mknod-whiteout", "user-xattr")

T = 1_000_000_000
D: dict[str, Any] = {"mtime_ns": T}

Found = Callable[..., list[str]]


@pytest.fixture(params=[False, True], ids=["trusted", "user"])
def userxattr(request: pytest.FixtureRequest) -> bool:
    if not request.param:
        probe.need("trusted-xattr")
    return bool(request.param)


def _lines(found: Iterator[Change]) -> list[str]:
    return [f"{change.kind} {os.fsdecode(change.path)}" for change in found]


@pytest.fixture
def found(tmp_path: Path, userxattr: bool) -> Found:
    """Layers, top-most first, to the list of changes; both ways must say the same."""

    def run(*trees: Tree) -> list[str]:
        layers = [tmp_path / f"l{number}" for number in range(len(trees))]
        for layer, tree in zip(layers, trees, strict=True):
            build(layer, tree, userxattr=userxattr)
        paths = [os.fsencode(layer) for layer in layers]
        dialect = Dialect(userxattr=userxattr)
        native = _lines(changes.native(paths[0], paths[1:], dialect))
        assert _lines(changes.between(paths, paths[1:], dialect)) == native
        if probe.can_mount_overlay() == probe.YES:
            empty = tmp_path / "empty"
            empty.mkdir(exist_ok=True)
            with (
                chains.mounted(layers, userxattr=userxattr, empty=empty) as new,
                chains.mounted(
                    layers[1:] or [empty], userxattr=userxattr, empty=empty_two(tmp_path)
                ) as old,
            ):
                assert _lines(changes.naive(old, new)) == native
        return native

    return run


def empty_two(tmp_path: Path) -> Path:
    """One more empty directory: the same one twice is refused."""
    path = tmp_path / "empty2"
    path.mkdir(exist_ok=True)
    return path


# --- added and deleted ---------------------------------------------------------------------------


def test_a_layer_without_parents_adds_everything(found: Found) -> None:
    assert found({"d": {"e": {"f": ""}}, "g": "x"}) == ["A /d", "A /d/e", "A /d/e/f", "A /g"]


def test_an_empty_layer_changes_nothing(found: Found) -> None:
    assert found({}, {"a": "", "d": {"b": ""}}) == []


def test_added_directories_list_what_is_in_them(found: Found) -> None:
    assert found({"n": {"x": {"y": ""}}}, {"a": ""}) == ["A /n", "A /n/x", "A /n/x/y"]


@pytest.mark.parametrize("attribute_form", [False, True])
def test_a_deleted_directory_is_one_line(
    found: Found, userxattr: bool, attribute_form: bool
) -> None:
    key = "user.overlay.whiteout" if userxattr else "trusted.overlay.whiteout"
    mark: Node = File("", xattrs={key: b""}) if attribute_form else Whiteout()
    assert found({"d": mark, "f": mark}, {"d": {"x": {"y": ""}}, "f": ""}) == ["D /d", "D /f"]


def test_a_stray_whiteout_says_nothing(found: Found) -> None:
    assert found({"w": Whiteout(), "new": {"w": Whiteout()}}, {"a": ""}) == ["A /new"]


def test_what_a_lower_layer_deleted_is_added_anew(found: Found) -> None:
    lines = found(
        {"f": "1", "g": Whiteout()}, {"f": Whiteout(), "g": Whiteout()}, {"f": "", "g": ""}
    )
    assert lines == ["A /f"]


def test_paths_come_in_the_order_of_their_bytes(found: Found) -> None:
    lines = found({"a": {"z": {"q": ""}, "z!": ""}, "a!": {"k": ""}, "a-": "", "a0": ""})
    assert lines == [
        *("A /a", "A /a!", "A /a!/k", "A /a-", "A /a/z", "A /a/z!", "A /a/z/q", "A /a0"),
    ]


# --- changed -------------------------------------------------------------------------------------

OLD = File("old", mode=0o644, uid=1, gid=1, mtime_ns=T, xattrs={"user.k": b"1"})


@pytest.mark.parametrize(
    "new",
    [
        File("old", mode=0o600, uid=1, gid=1, mtime_ns=T, xattrs={"user.k": b"1"}),
        File("old", mode=0o644, uid=2, gid=1, mtime_ns=T, xattrs={"user.k": b"1"}),
        File("old", mode=0o644, uid=1, gid=2, mtime_ns=T, xattrs={"user.k": b"1"}),
        File("old", mode=0o644, uid=1, gid=1, mtime_ns=T + 1, xattrs={"user.k": b"1"}),
        File("old!", mode=0o644, uid=1, gid=1, mtime_ns=T, xattrs={"user.k": b"1"}),
        File("new", mode=0o644, uid=1, gid=1, mtime_ns=T, xattrs={"user.k": b"1"}),
        File("old", mode=0o644, uid=1, gid=1, mtime_ns=T, xattrs={"user.k": b"2"}),
        File("old", mode=0o644, uid=1, gid=1, mtime_ns=T, xattrs={"user.l": b"1"}),
        File("old", mode=0o644, uid=1, gid=1, mtime_ns=T),
    ],
    ids=["mode", "uid", "gid", "mtime", "size", "content", "xattr", "xattr name", "no xattr"],
)
def test_one_difference_is_a_change(found: Found, new: File) -> None:
    assert found({"f": new}, {"f": OLD}) == ["C /f"]


def test_a_file_that_was_only_touched_is_not_changed(found: Found) -> None:
    assert found({"d": Dir({"f": OLD}, **D)}, {"d": Dir({"f": OLD}, **D)}) == []


def test_other_objects(found: Found) -> None:
    old: Tree = {
        "to": Symlink(target="a", **D),
        "same": Symlink(target="a", **D),
        "dev": Device(minor=3, **D),
        "pipe": Fifo(**D),
        "samedev": Device(minor=3, **D),
    }
    new: Tree = {
        "to": Symlink(target="b", **D),
        "same": Symlink(target="a", **D),
        "dev": Device(minor=5, **D),
        "pipe": Fifo(mode=0o600, **D),
        "samedev": Device(minor=3, **D),
    }
    if not probe.can_mknod():
        pytest.skip("devices cannot be made")
    assert found(new, old) == ["C /dev", "C /pipe", "C /to"]


def test_types_that_replace_each_other(found: Found) -> None:
    new: Tree = {"df": "file", "fd": {"x": {"y": ""}}, "dl": Symlink(target="fd"), "lf": "file"}
    old: Tree = {"df": {"gone": ""}, "fd": "", "dl": {"gone": ""}, "lf": Symlink(target="df")}
    assert found(new, old) == ["C /df", "C /dl", "C /fd", "A /fd/x", "A /fd/x/y", "C /lf"]


def test_a_directory_changes_with_its_attributes_and_its_names(found: Found) -> None:
    old: Tree = {
        "mode": Dir({}, **D),
        "added": Dir({"x": ""}, **D),
        "deleted": Dir({"x": ""}, **D),
        "inside": Dir({"x": File("1", **D)}, **D),
        "deep": Dir({"er": Dir({}, **D)}, **D),
        "stray": Dir({"x": ""}, **D),
    }
    new: Tree = {
        "mode": Dir({}, mode=0o700, **D),
        "added": Dir({"y": ""}, **D),
        "deleted": Dir({"x": Whiteout()}, **D),
        "inside": Dir({"x": File("2", **D)}, **D),
        "deep": Dir({"er": Dir({"new": ""}, **D)}, **D),
        "stray": Dir({"y": Whiteout()}, **D),
    }
    assert found(new, old) == [
        *("C /added", "A /added/y", "C /deep/er", "A /deep/er/new", "C /deleted", "D /deleted/x"),
        *("C /inside/x", "C /mode"),
    ]


def test_an_opaque_directory_is_compared_with_what_it_hides(found: Found) -> None:
    old: Tree = {"d": Dir({"same": File("s", **D), "gone": {"x": ""}, "k": {"l": ""}}, **D)}
    new: Tree = {"d": Dir({"same": File("s", **D), "new": "", "k": {"m": ""}}, opaque=True, **D)}
    assert found(new, old) == ["C /d", "D /d/gone", "C /d/k", "D /d/k/l", "A /d/k/m", "A /d/new"]


def test_an_opaque_directory_with_the_same_content_changes_nothing(found: Found) -> None:
    tree = {"f": File("s", **D)}
    assert found({"d": Dir(tree, opaque=True, **D)}, {"d": Dir(tree, **D)}) == []


def test_hard_links_are_looked_at_name_by_name(found: Found) -> None:
    f = File("data", **D)
    old: Tree = {"one": f, "two": HardLink("one"), "three": f}
    new: Tree = {"one": f, "two": File("DATA", **D), "four": HardLink("one")}
    assert found(new, old) == ["A /four", "C /two"]


def test_holes_are_content_as_any_other(found: Found) -> None:
    size = 1 << 22
    full = File(size=size, pieces={0: bytes(size)}, **D)
    hole = File(size=size, **D)
    other = File(size=size, pieces={size - 5: b"x"}, **D)
    assert found({"a": hole, "b": other}, {"a": full, "b": hole}) == ["C /b"]


def test_holes_of_a_huge_file_are_not_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(tmp_path, {name: File(size=1 << 40, pieces={1 << 39: b"x"})})
    with open(tmp_path / "a", "rb") as one, open(tmp_path / "b", "rb") as other:
        assert same_content(one.fileno(), other.fileno())


def test_escaped_marks_are_content(found: Found, userxattr: bool) -> None:
    prefix = "user." if userxattr else "trusted."
    nested = {f"{prefix}overlay.overlay.opaque": b"y"}
    private = {f"{prefix}overlay.impure": b"y"}
    old: Tree = {"n": Dir({}, **D), "p": Dir({}, **D)}
    new: Tree = {"n": Dir({}, xattrs=nested, **D), "p": Dir({}, xattrs=private, **D)}
    assert found(new, old) == ["C /n"]


# --- directories that were moved, files without data ---------------------------------------------


def _mark(path: Path, suffix: str, value: bytes) -> None:
    os.setxattr(path, f"trusted.overlay.{suffix}", value)


@pytest.mark.needs("trusted-xattr", "overlay")
@pytest.mark.parametrize("way", ["redirect_dir", "metacopy"])
def test_what_work_on_a_mount_leaves(tmp_path: Path, way: str) -> None:
    build(
        tmp_path / "low",
        {"x": Dir({"y": Dir({"f": File("data", **D)}, **D)}, **D), "big": File("data", **D)},
    )
    chain = chains.Chain([tmp_path / "low"], userxattr=False, made_by=[])

    def on(name: str, *acts: Callable[[chains.OnMount], object]) -> list[str]:
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-work").mkdir()
        with chains.writable(chain, tmp_path / name, tmp_path / f"{name}-work", way) as root:
            for act in acts:
                act(chains.OnMount(root))
        chain.layers.insert(0, tmp_path / name)
        top, *lowers = (os.fsencode(layer) for layer in chain.layers)
        native = _lines(changes.native(top, lowers, Dialect(userxattr=False)))
        with (
            chains.mounted(chain.layers, userxattr=False, empty=empty_two(tmp_path)) as new,
            chains.mounted(chain.layers[1:], userxattr=False, empty=empty_two(tmp_path)) as old,
        ):
            assert native == _lines(changes.naive(old, new))
        return native

    moved = on("1", lambda w: w.rename(b"x", b"z"), lambda w: w.chmod(b"big", 0o600))
    assert moved == ["C /big", "D /x", "A /z", "A /z/y", "A /z/y/f"]
    # Absolute, through a directory that is itself called otherwise further down.
    again = on("2", lambda w: w.rename(b"z/y", b"q"), lambda w: w.utime(b"z", T))
    assert again == ["A /q", "A /q/f", "C /z", "D /z/y"]
    back = on("3", lambda w: w.rename(b"q", b"z/y"), lambda w: w.utime(b"z", T))
    assert back == ["D /q", "C /z", "A /z/y", "A /z/y/f"]
    there_and_back = on(
        "4",
        lambda w: w.rename(b"z/y", b"t"),
        lambda w: w.rename(b"t", b"z/y"),
        lambda w: w.utime(b"z", T),
    )
    assert there_and_back == []
    assert on("5", lambda w: w.touch(b"z/y/f"), lambda w: w.chmod(b"big", 0o600)) == []
    assert on("6", lambda w: w.chmod(b"big", 0o644), lambda w: w.rename(b"big", b"a")) == [
        *("A /a", "D /big"),
    ]
    assert on("7", lambda w: w.write(b"a", b"DATA"), lambda w: w.utime(b"a", T)) == ["C /a"]


@pytest.mark.needs("trusted-xattr")
@pytest.mark.parametrize(
    ("value", "word"), [(b"a/b", "malformed"), (b"/", "malformed"), (b"..", "dot component")]
)
def test_a_mark_that_cannot_be_followed_is_one_sentence(
    tmp_path: Path, value: bytes, word: str
) -> None:
    build(tmp_path / "top", {"good": "", "d": {}})
    build(tmp_path / "low", {"d": {}})
    _mark(tmp_path / "top" / "d", "redirect", value)
    layers = [os.fsencode(tmp_path / name) for name in ("top", "low")]
    with pytest.raises(DamagedLayerError, match=f"^/d has a redirect .*{word}"):
        list(changes.native(layers[0], layers[1:], Dialect(userxattr=False)))


@pytest.mark.needs("trusted-xattr")
def test_data_that_is_nowhere_is_one_sentence(tmp_path: Path) -> None:
    build(tmp_path / "top", {"f": File(size=3, **D)})
    build(tmp_path / "low", {"f": File("abc", **D)})
    build(tmp_path / "other", {})
    for name in ("top", "low"):
        _mark(tmp_path / name / "f", "metacopy", b"")
    layers = [os.fsencode(tmp_path / name) for name in ("top", "low", "other")]
    with pytest.raises(DamagedLayerError, match=r"^/f has the mark of a file without data"):
        list(changes.native(layers[0], layers[1:], Dialect(userxattr=False)))


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="No such file"):
        list(changes.native(os.fsencode(tmp_path / "none"), (), Dialect(userxattr=True)))


# --- trees of any shape --------------------------------------------------------------------------


def _deep(root: Path, depth: int) -> int:
    """A chain of directories far deeper than a path can be; a descriptor of the last."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(b"d", dir_fd=fd)
        below = os.open(b"d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def test_depth_has_no_limit(tmp_path: Path) -> None:
    depth = 3000
    roots = [tmp_path / name for name in ("new", "old")]
    try:
        for root in roots:
            root.mkdir()
            fd = _deep(root, depth)
            os.close(os.open(b"f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
            if root.name == "new":
                os.close(os.open(b"g", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
            os.close(fd)
        new, old = (os.fsencode(root) for root in roots)
        before = len(os.listdir("/proc/self/fd"))
        dialect = Dialect(userxattr=True)
        assert [c.path for c in changes.native(new, (), dialect)][-1] == b"/d" * depth + b"/g"
        fds = [os.open(root, os.O_RDONLY) for root in (old, new)]
        found = {change.path: str(change.kind) for change in changes.naive(*fds)}
        for fd in fds:
            os.close(fd)
        assert found[b"/d" * depth + b"/g"] == "A"
        assert b"/d" * depth + b"/f" not in found or found[b"/d" * depth + b"/f"] == "C"
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        # rmtree() of older Pythons recurses.
        subprocess.run(["rm", "-rf", *roots], check=True)


@pytest.mark.parametrize("count", [2, 128, 500])
def test_many_layers(tmp_path: Path, count: int) -> None:
    for number in range(count):
        build(tmp_path / f"{number}", {"d": {f"{number}": "", "same": f"{number}"}})
    layers = [os.fsencode(tmp_path / f"{number}") for number in range(count)]
    found_ = changes.native(layers[0], layers[1:], Dialect(userxattr=True))
    assert _lines(found_) == ["C /d", "A /d/0", "C /d/same"]


def test_an_abandoned_list_closes_everything(tmp_path: Path) -> None:
    build(tmp_path / "top", {"a": {"b": ""}, "c": ""})
    before = len(os.listdir("/proc/self/fd"))
    found_ = changes.native(os.fsencode(tmp_path / "top"), (), Dialect(userxattr=True))
    next(found_)
    assert len(os.listdir("/proc/self/fd")) > before
    del found_
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_is_written_and_no_access_time_moves(tmp_path: Path) -> None:
    build(tmp_path / "top", {"f": File("new", **D), "d": Dir({"x": ""}, **D)})
    build(tmp_path / "low", {"f": File("old", **D), "d": Dir({"x": ""}, **D)})
    watched = [tmp_path / side / name for side in ("top", "low") for name in ("f", "d")]
    for path in watched:
        os.utime(path, ns=(1, T))
    layers = [os.fsencode(tmp_path / name) for name in ("top", "low")]
    lines = _lines(changes.native(layers[0], layers[1:], Dialect(userxattr=True)))
    assert "C /f" in lines
    assert [os.stat(path).st_atime_ns for path in watched] == [1] * len(watched)


@pytest.mark.needs("user-xattr")
def test_sizes_of_changes(tmp_path: Path) -> None:
    build(
        tmp_path / "new",
        {"a": "12345", "b": HardLink("a"), "d": {"c": "1"}, "same": File("s", **D)},
    )
    build(tmp_path / "old", {"same": File("s", **D), "gone": "123"})
    fds = [os.open(tmp_path / name, os.O_RDONLY) for name in ("old", "new")]
    try:
        with changes.tree_steps(*fds) as steps:
            assert changes.size_of(steps) == (6, 3)
    finally:
        for fd in fds:
            os.close(fd)

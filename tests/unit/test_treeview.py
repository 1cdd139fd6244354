"""The merged view without a mount, its bounds, and what an export asks of it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.support import chains
from tests.support.shell import Shell
from tests.support.tree import Dir, File, Symlink, Tree, Whiteout, build
from tests.support.unions import open_fds, trusted_only
from unionfs2 import exports
from unionfs2.errors import DamagedLayerError
from unionfs2.layersource import LayerSource
from unionfs2.options import MountSpec
from unionfs2.treeview import MergedView, PlainView
from unionfs2.union import UnionFS
from unionfs2.whiteout import Dialect

USER = Dialect(userxattr=True)
TRUSTED = Dialect(userxattr=False)


def _chain(home: Path, *trees: Tree, userxattr: bool = True) -> list[bytes]:
    layers = [home / f"l{number}" for number in range(len(trees))]
    for layer, tree in zip(layers, trees, strict=True):
        build(layer, tree, userxattr=userxattr)
    return [os.fsencode(layer) for layer in layers]


def _names(view: MergedView, path: bytes = b"") -> list[bytes]:
    directory = view.directory(path)
    assert directory is not None
    return [name for name in view.names(directory) if view.look(directory, name) is not None]


@pytest.mark.needs("user-xattr", "mknod-whiteout")
def test_one_layer_is_a_view(tmp_path: Path) -> None:
    chain = _chain(tmp_path, {"d": {"f": "data", "gone": Whiteout()}, "to": Symlink(target="d")})
    before = open_fds()
    with MergedView.open(chain, USER) as view:
        assert _names(view) == [b"d", b"to"]
        assert _names(view, b"d") == [b"f"]
        seen = view.find(b"d/f")
        link = view.find(b"/to/")
        assert seen is not None
        assert link is not None
        fd = seen.open()
        assert os.read(fd, 10) == b"data"
        os.close(fd)
        assert link.readlink() == b"d"
        assert view.find(b"to/f") is None
        assert view.find(b"d/none/x") is None
    assert open_fds() == before


@pytest.mark.parametrize("path", [b"..", b"d/..", b"../x", b"d/../d"])
def test_no_way_leads_out(tmp_path: Path, path: bytes) -> None:
    chain = _chain(tmp_path, {"d": {}})
    with MergedView.open(chain, USER) as view, pytest.raises(OSError, match="Invalid argument"):
        view.find(path)


@pytest.mark.needs("user-xattr")
def test_private_marks_are_hidden_and_escaped_ones_shown(tmp_path: Path) -> None:
    marks = {"user.overlay.impure": b"y", "user.overlay.overlay.opaque": b"y", "user.k": b"v"}
    chain = _chain(tmp_path, {"d": Dir({}, xattrs=marks)})
    with MergedView.open(chain, USER) as view:
        seen = view.find(b"d")
        assert seen is not None
        assert seen.xattrs() == {b"user.overlay.opaque": b"y", b"user.k": b"v"}


def test_descriptors_are_bounded(tmp_path: Path) -> None:
    build(tmp_path / "wide", {f"{n}": {"x": {"y": ""}} for n in range(400)})
    before = open_fds()
    fd = os.open(tmp_path / "wide", os.O_RDONLY)
    try:
        with PlainView(fd) as view:
            for name in view.names(view.root):
                seen = view.look(view.root, name)
                assert seen is not None
                assert seen.dir is not None
                assert view.names(seen.dir) == [b"x"]
                view.trim()
                assert open_fds() < before + 140
    finally:
        os.close(fd)
    assert open_fds() == before


# --- marks on the way of an absolute redirect ----------------------------------------------------


@trusted_only
@pytest.mark.needs("overlay")
@pytest.mark.parametrize(
    ("first", "then"),
    [
        # The directory on the way was itself moved, to another parent or within its own.
        ([(b"x", b"z")], (b"z/y", b"q")),
        ([(b"x", b"e/z")], (b"e/z/y", b"q")),
    ],
)
def test_what_moved_out_of_a_moved_directory(
    userxattr: bool,
    tmp_path: Path,
    first: list[tuple[bytes, bytes]],
    then: tuple[bytes, bytes],
) -> None:
    chain = chains.Chain([tmp_path / "base"], userxattr=userxattr, made_by=[])
    build(tmp_path / "base", {"x": {"y": {"f": "data"}}, "e": {}})
    for number, moves in enumerate((first, [then])):
        layer, work = tmp_path / f"{number}", tmp_path / f"work{number}"
        layer.mkdir()
        work.mkdir()
        with chains.writable(chain, layer, work, "redirect_dir") as root:
            for old, new in moves:
                chains.OnMount(root).rename(old, new)
        chain.layers.insert(0, layer)
    with MergedView.open([os.fsencode(layer) for layer in chain.layers], TRUSTED) as view:
        assert view.find(b"q/f") is not None
    spec = MountSpec(lower=tuple(map(os.fsencode, chain.layers)), userxattr=False)
    with UnionFS.open(spec) as fs:
        assert Shell(fs).read("q/f") == b"data"


# --- exports -------------------------------------------------------------------------------------


def _members(stream: io.BytesIO) -> dict[str, bytes | None]:
    stream.seek(0)
    with tarfile.open(fileobj=stream) as archive:
        found: dict[str, bytes | None] = {}
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            found[member.name] = None if file is None else file.read()
        return found


@pytest.mark.needs("user-xattr", "mknod-whiteout")
def test_a_moved_directory_is_exported_whole(tmp_path: Path) -> None:
    chain = _chain(
        tmp_path,
        {
            "new": Dir(
                {"own": "1", "hollow": File(size=4, xattrs={"user.overlay.metacopy": b""})},
                xattrs={"user.overlay.redirect": b"/old"},
            ),
            "old": Whiteout(),
        },
        {"old": {"f": "low", "hollow": "data", "d": {"x": ""}}, "new": {"hidden": ""}},
    )
    stream = io.BytesIO()
    exports.diff_native(chain[0], chain[1:], stream, dialect=USER)
    assert _members(stream) == {
        ".": None,
        ".wh.old": b"",
        "new": None,
        "new/.wh..wh..opq": b"",
        "new/d": None,
        "new/d/x": b"",
        "new/f": b"low",
        "new/hollow": b"data",
        "new/own": b"1",
    }


@pytest.mark.needs("user-xattr")
def test_an_export_without_the_data_says_so(tmp_path: Path) -> None:
    hollow = File(size=4, xattrs={"user.overlay.metacopy": b""})
    chain = _chain(tmp_path, {"d": {"f": hollow}}, {"d": {}})
    with (
        LayerSource.open(chain[0], chain[1:], USER) as source,
        pytest.raises(DamagedLayerError, match=r"^d/f has no data of its own"),
    ):
        source.open_data(b"d/f")


def test_a_naive_stream_has_the_changes_and_the_way_to_them(tmp_path: Path) -> None:
    same = File("s", mtime_ns=5)
    old: Tree = {
        "a": Dir({"b": Dir({"f": File("1", mtime_ns=5), "same": same}, mtime_ns=5)}, mtime_ns=5),
        "a-": Dir({"same": same}, mtime_ns=5),
        "gone": {"x": ""},
    }
    new: Tree = {
        "a": Dir({"b": Dir({"f": File("2", mtime_ns=5), "same": same}, mtime_ns=5)}, mtime_ns=5),
        "a-": Dir({"same": same}, mtime_ns=5),
        "new": "n",
    }
    build(tmp_path / "old", old)
    build(tmp_path / "new", new)
    fds = [os.open(tmp_path / name, os.O_RDONLY) for name in ("old", "new")]
    stream = io.BytesIO()
    try:
        exports.diff_naive(fds[0], fds[1], stream)
    finally:
        for fd in fds:
            os.close(fd)
    assert _members(stream) == {
        ".": None,
        "a": None,
        "a/b": None,
        "a/b/f": b"2",
        ".wh.gone": b"",
        "new": b"n",
    }

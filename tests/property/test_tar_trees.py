"""Random trees through the archive and back; random streams made again byte for byte."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.archives import extract, extract_recorded, packed, rebuilt
from tests.support.tarmake import archive, entry, gnu_long, pax
from tests.support.tree import (
    Device,
    Dir,
    Fifo,
    File,
    Symlink,
    Whiteout,
    build,
    differences,
    snapshot,
)
from unionfs2.errors import ArchiveError

pytestmark = pytest.mark.needs("root", "mknod", "trusted-xattr", "user-xattr")

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

names = st.one_of(
    st.sampled_from(
        [b"a", b"b", b"a b", b"n" * 130, b"-", b"\xff", "\u00e4".encode(), b".x", b"a\nb"]
    ),
    st.binary(min_size=1, max_size=12).filter(
        lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..") and n[:4] != b".wh."
    ),
)
common: dict[str, Any] = {
    "mode": st.integers(0, 0o7777),
    "uid": st.sampled_from([0, 1, 65534, 3_000_000_000]),
    "gid": st.sampled_from([0, 7, 4_000_000_000]),
    "mtime_ns": st.integers(-(10**18), 4 * 10**18),
    "xattrs": st.dictionaries(
        st.sampled_from(["user.a", "user.b=c", "user.%3D", "trusted.t", "user.\u00e4"]),
        st.binary(max_size=40),
        max_size=2,
    ),
}
private = {k: v for k, v in common.items() if k != "xattrs"}
files = st.builds(File, st.binary(max_size=3000), **common)
sparse = st.builds(
    File,
    size=st.integers(9000, 200_000),
    pieces=st.dictionaries(st.integers(0, 8000), st.binary(max_size=20), max_size=3),
    **common,
)
leaves = st.one_of(
    files,
    sparse,
    st.builds(Symlink, target=st.binary(min_size=1, max_size=200).filter(lambda t: b"\0" not in t)),
    st.builds(Fifo, **private),
    st.builds(
        Device, kind=st.sampled_from("bc"), major=st.integers(1, 500), minor=st.integers(0, 1 << 18)
    ),
    st.just(Whiteout()),
)
trees = st.recursive(
    st.dictionaries(names, leaves, max_size=4),
    lambda inner: st.dictionaries(
        names, leaves | st.builds(Dir, inner, opaque=st.booleans(), **common), max_size=4
    ),
    max_leaves=12,
)


def _is_whiteout(path: Path) -> frozenset[bytes]:
    return frozenset(p for p, e in snapshot(path).items() if e.kind == "whiteout")


@SETTINGS
@given(tree=trees)
def test_a_tree_comes_back(tree: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="unionfs2-tar-") as name:
        home = Path(name)
        build(home / "source", tree)
        data = packed(home / "source")
        done = extract_recorded(data, home / "copy", home / "record")
        marks = _is_whiteout(home / "source")
        # In an opaque directory a deletion says nothing, and a mark has no attributes.
        left, right = snapshot(home / "source"), snapshot(home / "copy")
        for path in marks:
            del left[path]
            right.pop(path, None)
        assert differences(left, right) == []
        assert rebuilt(home / "copy", home / "record") == data
        again = packed(home / "copy")
        extract(again, home / "third")
        assert packed(home / "third") == again
        assert done.diff_id.startswith("sha256:")


members = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"a",
                b"b",
                b"a/b",
                b"a/c",
                b"b/a/c",
                b"l",
                b"l/x",
                b".wh.a",
                b"a/.wh..wh..opq",
                b"a/.wh.b",
                b"d/../a",
                b"n" * 120,
            ]
        ),
        st.sampled_from([b"0", b"0", b"5", b"1", b"2", b"6"]),
        st.binary(max_size=1500),
        st.sampled_from([b"a", b"b", b"a/b", b".", b"l"]),
    ),
    max_size=12,
)


@SETTINGS
@given(items=members, tail=st.sampled_from([0, 512, 9216]))
def test_any_accepted_stream_can_be_made_again(
    items: list[tuple[bytes, bytes, bytes, bytes]], tail: int
) -> None:
    parts = []
    for number, (path, kind, content, link) in enumerate(items):
        body = content if kind == b"0" and b".wh." not in path else b""
        head = gnu_long(path) if len(path) > 100 else b""
        if number % 3 == 1:
            head += pax({b"mtime": b"5.5", b"comment": content[:20].replace(b"\0", b"")})
        parts.append(head + entry(path[:100], body, kind, link=link, mtime=number))
    data = archive(*parts) + bytes(tail)
    with tempfile.TemporaryDirectory(prefix="unionfs2-tar-") as name:
        home = Path(name)
        try:
            extract_recorded(data, home / "x", home / "record")
        except (ArchiveError, OSError):
            return
        assert rebuilt(home / "x", home / "record") == data
        again = packed(home / "x")
        extract(again, home / "y")
        assert packed(home / "y") == again


@SETTINGS
@given(tree=trees)
def test_tarfile_reads_what_we_write(tree: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="unionfs2-tar-") as name:
        home = Path(name)
        build(home / "source", tree)
        seen = snapshot(home / "source")
        with tarfile.open(
            fileobj=io.BytesIO(packed(home / "source")), encoding="utf-8", errors="surrogateescape"
        ) as ours:
            found = {m.name.encode("utf-8", "surrogateescape"): m for m in ours.getmembers()}
        marks = [path for path in found if b".wh." in path]
        for path in marks:
            del found[path]
        assert set(found) == {path for path, e in seen.items() if e.kind != "whiteout"}
        for path, member in found.items():
            entry_ = seen[path]
            assert (member.uid, member.gid, member.mode) == (entry_.uid, entry_.gid, entry_.mode)
            if entry_.kind == "file":
                assert member.size == entry_.size
        shutil.rmtree(home / "source")

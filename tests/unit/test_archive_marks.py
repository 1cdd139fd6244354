"""Deletions in a stream, what they become on the disk, and back; directories passed through."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from pathlib import Path
from unittest import mock

import pytest

from tests.support.archives import TRUSTED, USER, extract, opened, packed
from tests.support.tarmake import archive, entry, pax
from tests.support.tree import Dir, File, Whiteout, build, differences, snapshot
from unionfs2 import syscalls as sc
from unionfs2 import whiteout
from unionfs2.errors import ArchiveError, LimitError
from unionfs2.storemodel import IdMaps, IdRange, Limits
from unionfs2.whiteout import Dialect

pytestmark = pytest.mark.needs("root", "mknod", "trusted-xattr", "user-xattr", "acl")

DIR, HARD, SYM, CHAR = b"5", b"1", b"2", b"3"


def _kinds(path: Path) -> dict[bytes, str]:
    return {name: e.kind for name, e in snapshot(path).items() if name != b"."}


def _opaque(path: Path, key: str = "trusted.overlay.opaque") -> bytes | None:
    return os.getxattr(path, key) if key in os.listxattr(path) else None


@pytest.mark.parametrize("dialect", [TRUSTED, USER], ids=["trusted", "user"])
def test_a_deletion_and_an_opaque_directory(tmp_path: Path, dialect: Dialect) -> None:
    data = archive(
        entry(b"d/", b"", DIR, mode=0o755),
        entry(b"d/.wh..wh..opq"),
        entry(b"d/f", b"1"),
        entry(b"e/.wh.gone"),
    )
    done = extract(data, tmp_path / "x", dialect=dialect)
    assert done.size == (1, 4)
    assert done.entries == 4
    assert _kinds(tmp_path / "x") == {
        b"d": "dir",
        b"d/f": "file",
        b"e": "dir",
        b"e/gone": "whiteout",
    }
    assert _opaque(tmp_path / "x" / "d", dialect.opaque.decode()) == b"y"
    again = tmp_path / "again"
    extract(packed(tmp_path / "x", dialect=dialect), again, dialect=dialect)
    assert differences(snapshot(tmp_path / "x"), snapshot(again), ignore=("mtime_ns",)) == []


PARTS = {
    "deleted": entry(b".wh.d"),
    "described": entry(b"d/", b"", DIR, mode=0o711),
    "inside": entry(b"d/f", b"1"),
}


@pytest.mark.parametrize("order", list(itertools.permutations(PARTS)), ids="-".join)
def test_a_deletion_never_hides_what_the_same_stream_brings(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    extract(archive(*[PARTS[part] for part in order]), tmp_path / "x")
    assert _kinds(tmp_path / "x") == {b"d": "dir", b"d/f": "file"}
    assert _opaque(tmp_path / "x" / "d") == b"y"
    assert stat.S_IMODE((tmp_path / "x" / "d").stat().st_mode) == 0o711


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_deletion_and_a_file_of_one_name(tmp_path: Path, order: tuple[int, int]) -> None:
    parts = entry(b".wh.f"), entry(b"f", b"new")
    done = extract(archive(*[parts[n] for n in order]), tmp_path / "x")
    assert (tmp_path / "x" / "f").read_text() == "new"
    assert done.size == (3, 1)


def test_no_whiteout_stays_in_an_opaque_directory(tmp_path: Path) -> None:
    data = archive(entry(b"d/.wh.x"), entry(b"d/e/.wh.y"), entry(b"d/.wh..wh..opq"))
    done = extract(data, tmp_path / "x")
    assert _kinds(tmp_path / "x") == {b"d": "dir", b"d/e": "dir"}
    assert done.size == (0, 2)


def test_an_opaque_root_deletes_each_name_below(tmp_path: Path) -> None:
    data = archive(entry(b"kept", b"1"), entry(b".wh..wh..opq"))
    extract(data, tmp_path / "x", names_below=lambda: [b"kept", b"old", b"older"])
    assert _kinds(tmp_path / "x") == {b"kept": "file", b"old": "whiteout", b"older": "whiteout"}
    assert _opaque(tmp_path / "x") == b"y"


def test_aufs_metadata_is_left_out(tmp_path: Path) -> None:
    data = archive(entry(b".wh..wh.plnk/", b"", DIR), entry(b".wh..wh.plnk/1.2", b"x"), entry(b"f"))
    extract(data, tmp_path / "x")
    assert _kinds(tmp_path / "x") == {b"f": "file"}


def test_where_devices_are_refused_a_deletion_is_an_attribute(tmp_path: Path) -> None:
    refused = PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    with mock.patch.object(sc, "mknod", side_effect=refused):
        extract(archive(entry(b"d/.wh.x"), entry(b".wh.y")), tmp_path / "x", dialect=USER)
        with pytest.raises(
            ArchiveError, match='"dev" is a device, and making one is not permitted'
        ):
            extract(archive(entry(b"dev", b"", CHAR, major=1, minor=3)), tmp_path / "y")
    for directory, name in ((tmp_path / "x" / "d", b"x"), (tmp_path / "x", b"y")):
        assert _opaque(directory, "user.overlay.opaque") == b"x"
        with opened(directory) as fd:
            assert whiteout.is_whiteout(USER, sc.lstat_at(name, fd), name, fd)
    seen = extract(packed(tmp_path / "x", dialect=USER), tmp_path / "again", dialect=USER)
    assert seen.entries == 4
    assert _kinds(tmp_path / "again") == {b"d": "dir", b"d/x": "whiteout", b"y": "whiteout"}


def test_marks_cannot_be_forged(tmp_path: Path) -> None:
    keys = ("opaque", "redirect", "metacopy", "whiteout", "overlay.opaque")
    forged = pax({f"SCHILY.xattr.trusted.overlay.{key}".encode(): b"y" for key in keys})
    data = archive(forged, entry(b"d/", b"", DIR))
    extract(data, tmp_path / "x")
    found = sorted(os.listxattr(tmp_path / "x" / "d"))
    assert found == sorted(f"trusted.overlay.overlay.{key}" for key in keys)
    # They come out as what they were, for an overlay inside of this one.
    assert b"SCHILY.xattr.trusted.overlay.redirect=y\n" in packed(tmp_path / "x")


def test_private_attributes_do_not_leave_the_layer(tmp_path: Path) -> None:
    marks = {"trusted.overlay.origin": b"o", "trusted.overlay.impure": b"y", "user.kept": b"1"}
    build(tmp_path / "x", {"d": Dir({"f": File("1", xattrs=marks)}, xattrs=marks)})
    data = packed(tmp_path / "x")
    assert b"overlay" not in data
    assert data.count(b"user.kept=1") == 2


@pytest.mark.parametrize(("key", "name"), [("redirect", "d"), ("metacopy", "f")])
def test_what_needs_the_layers_below_says_so(tmp_path: Path, key: str, name: str) -> None:
    build(tmp_path / "x", {"d": {}, "f": File(size=5)})
    os.setxattr(tmp_path / "x" / name, f"trusted.overlay.{key}", b"elsewhere")
    with pytest.raises(ArchiveError, match=f'"{name}" .*{key}.*together with the layers below'):
        packed(tmp_path / "x")


@pytest.mark.parametrize("name", [".wh.x", ".wh..wh..opq", "d/.wh.y"])
def test_a_file_named_like_a_deletion_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x" / name).parent.mkdir(parents=True)
    (tmp_path / "x" / name).touch()
    with pytest.raises(ArchiveError, match=r"rename the file"):
        packed(tmp_path / "x")


def test_the_stream_of_a_layer_is_in_order(tmp_path: Path) -> None:
    build(
        tmp_path / "x",
        {"b": Dir({"z": "", "a": "", "gone": Whiteout()}, opaque=True), "a": "", "b-c": ""},
    )
    data = packed(tmp_path / "x")
    names = [
        data[at : at + 100].rstrip(b"\0")
        for at in range(0, len(data) - 1024, 512)
        if data[at + 257 : at + 263] == b"ustar\0" and data[at + 156 : at + 157] != b"x"
    ]
    assert names == [
        b"./", b"a", b"b/", b"b/.wh..wh..opq", b"b/a", b"b/.wh.gone", b"b/z", b"b-c",
    ]  # fmt: skip


# --- a directory that is not empty ----------------------------------------------------------------


def test_onto_what_was_there_before(tmp_path: Path) -> None:
    build(
        tmp_path / "x",
        {
            "kept": "1",
            "gone": {"deep": {"f": "1"}},
            "hidden": {"old": "1", "both": {"old": "1"}},
            "over": {"f": "1"},
            "file": "old",
            "white": Whiteout(),
        },
    )
    data = archive(
        entry(b".wh.gone"),
        entry(b"hidden/both/new", b"2"),
        entry(b"hidden/.wh..wh..opq"),
        entry(b"over", b"now a file"),
        entry(b"file", b"new"),
        entry(b"white/f", b"1"),
    )
    done = extract(data, tmp_path / "x")
    assert _kinds(tmp_path / "x") == {
        b"kept": "file",
        b"gone": "whiteout",
        b"hidden": "dir",
        b"hidden/both": "dir",
        b"hidden/both/new": "file",
        b"over": "file",
        b"file": "file",
        b"white": "dir",
        b"white/f": "file",
    }
    assert _opaque(tmp_path / "x" / "white") == b"y"
    assert done.size == (1 + 1 + 10 + 3 + 1, 9)


# --- directories that are passed through ----------------------------------------------------------


def test_a_directory_passed_through_is_as_it_was_below(tmp_path: Path) -> None:
    build(
        tmp_path / "low",
        {"a": Dir({"b": Dir({}, mode=0o1711, uid=5, gid=6, mtime_ns=7, xattrs={"user.k": b"v"})})},
    )
    os.setxattr(tmp_path / "low" / "a" / "b", "trusted.overlay.opaque", b"y")
    asked = []

    def below(path: bytes) -> int | None:
        asked.append(path)
        try:
            return os.open(tmp_path / "low" / os.fsdecode(path), os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None

    data = archive(entry(b"a/b/c/f", b"1"), entry(b".wh.w"), entry(b"w/b/f", b"1"))
    extract(data, tmp_path / "x", below=below)
    seen = snapshot(tmp_path / "x")
    b = seen[b"a/b"]
    assert (b.mode, b.uid, b.gid, b.mtime_ns, b.xattrs) == (0o1711, 5, 6, 7, (("user.k", b"v"),))
    for new in (b"a/b/c", b"w", b"w/b"):
        entry_ = seen[new]
        assert (entry_.mode, entry_.uid, entry_.gid, entry_.mtime_ns) == (0o755, 0, 0, 0)
    assert sorted(asked) == [b"a", b"a/b", b"a/b/c"]


def test_ids_are_mapped_both_ways(tmp_path: Path) -> None:
    ids = IdMaps(uid=(IdRange(0, 100000, 1000),), gid=(IdRange(0, 200000, 1000),))
    acl = {b"SCHILY.acl.access": b"user::rw-,user:5:r--,group::r--,group:6:r--,mask::r--,other::-"}
    data = archive(
        pax(acl), entry(b"f", b"1", uid=1, gid=2), entry(b"d/e", b"", SYM, uid=3, gid=4, link=b"x")
    )
    extract(data, tmp_path / "x", ids=ids)
    seen = snapshot(tmp_path / "x")
    assert [(seen[p].uid, seen[p].gid) for p in (b"f", b"d", b"d/e")] == [
        (100001, 200002),
        (100000, 200000),
        (100003, 200004),
    ]
    value = os.getxattr(tmp_path / "x" / "f", "system.posix_acl_access")
    assert (100005).to_bytes(4, "little") in value
    assert (200006).to_bytes(4, "little") in value
    os.chown(tmp_path / "x", 100000, 200000)
    again = packed(tmp_path / "x", ids=ids)
    assert b"user:5:r--\n" in again
    assert b"group:6:r--\n" in again
    extract(again, tmp_path / "y", ids=ids)
    seen = snapshot(tmp_path / "x")
    assert differences(seen, snapshot(tmp_path / "y"), ignore=("mtime_ns",)) == []
    with pytest.raises(ArchiveError, match="user id 1000 in the container is not covered"):
        extract(archive(entry(b"f", uid=1000)), tmp_path / "z", ids=ids)


def test_ranges_of_ids() -> None:
    maps = IdMaps(uid=(IdRange(0, 1000, 1), IdRange(1, 5000, 10)))
    assert [maps.uid_to_host(n) for n in (0, 1, 10)] == [1000, 5000, 5009]
    assert [maps.uid_to_container(n) for n in (1000, 5000, 5009)] == [0, 1, 10]
    assert maps.to_host(1, 77) == (5000, 77)
    assert not IdMaps()
    for number in (999, 1001, 5010):
        with pytest.raises(ArchiveError) as caught:
            maps.to_container(number, 0)
        assert caught.value.errno == errno.EOVERFLOW


def test_limits_are_kept_before_the_disk_is_filled(tmp_path: Path) -> None:
    data = archive(entry(b"small", b"1"), entry(b"large", bytes(5000)))
    with pytest.raises(LimitError, match='"large" the files of the archive take 5001 bytes'):
        extract(data, tmp_path / "x", limits=Limits(bytes_max=5000))
    assert _kinds(tmp_path / "x") == {b"small": "file"}

"""Archives of GNU tar and of Python's tarfile, and ours read by both."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.support.archives import (
    extract_recorded,
    gnu_tar,
    gnu_untar,
    packed,
    rebuilt,
)
from tests.support.tree import (
    Device,
    Dir,
    Fifo,
    File,
    HardLink,
    Symlink,
    Tree,
    build,
    differences,
    snapshot,
)

pytestmark = pytest.mark.needs("root", "mknod", "trusted-xattr", "user-xattr", "acl", "command:tar")

ACL = bytes.fromhex(
    "0200000001000600ffffffff020004000100000004000400ffffffff10000600ffffffff20000400ffffffff"
)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")

# What every format can say.
PLAIN: Tree = {
    "file": File("content", mode=0o640, uid=1000, gid=1001, mtime_ns=1_600_000_000_000_000_000),
    "empty": File("", mtime_ns=0),
    "blocks": File(b"x" * 1024, mtime_ns=5_000_000_000),
    "large": File(bytes(range(256)) * 9000, mtime_ns=6_000_000_000),
    "suid": File("s", mode=0o6755, uid=3, gid=4, mtime_ns=7_000_000_000),
    "dir": Dir(
        {
            "sub": Dir({"f": File("1", mtime_ns=1_000_000_000)}, mode=0o1777, mtime_ns=10**9),
            "closed": Dir({"f": File("2", mtime_ns=10**9)}, mode=0o0, uid=5, mtime_ns=2 * 10**9),
        },
        mode=0o2750,
        mtime_ns=3 * 10**9,
    ),
    "link": Symlink("dir/sub", uid=9, mtime_ns=4 * 10**9),
    "dangling": Symlink("../../outside", mtime_ns=4 * 10**9),
    "second": HardLink("file"),
    "pipe": Fifo(mode=0o600, mtime_ns=10**9),
    "null": Device("c", 1, 3, mode=0o666, mtime_ns=10**9),
    "disk": Device("b", 259, 70000, mode=0o660, gid=6, mtime_ns=10**9),
}


def _aged(entries: Tree) -> Dir:
    return Dir(entries, mtime_ns=2 * 10**9)


LONG: Tree = {
    "n" * 90: _aged({"n" * 90: _aged({"f": File("deep", mtime_ns=10**9)})}),
    "l" * 255: File("long", mtime_ns=10**9),
    "to": Symlink("t" * 300, mtime_ns=10**9),
    "again": HardLink("l" * 255),
    "d" * 200: _aged({"e" * 200: _aged({"f" * 200: File("deeper", mtime_ns=10**9)})}),
}
RICH: Tree = {
    "times": File("t", mtime_ns=1_600_000_000_123_456_789),
    "old": File("o", mtime_ns=-1_500_000_000),
    "rich": File(
        "r",
        mode=0o664,
        uid=3_000_000_000,
        gid=4_000_000_000,
        xattrs={
            "user.plain": b"v",
            "user.bin": bytes(range(256)),
            "user.empty": b"",
            "trusted.t": b"1",
        },
    ),
    "odd": File("o", xattrs={"user.a=b%3D\n": b"line\n=", "security.x": b"s"}),
    "capable": File("c", mode=0o755, uid=7, xattrs={"security.capability": CAPABILITY}),
    "listed": File("a", mode=0o664, xattrs={"system.posix_acl_access": ACL}),
    "default": Dir(
        {"inside": File("i", mode=0o600)},
        mode=0o750,
        xattrs={"system.posix_acl_default": ACL, "user.d": b"1"},
    ),
    "\u00fcml\u00e4ut": File("u"),
    b"\xff\xfe": File("binary"),
    "a\nb": File("newline"),
    "tagged": Symlink("x", xattrs={"trusted.l": b"1"}),
}
SPARSE: Tree = {
    "hole": File(size=1 << 20),
    "island": File(size=1 << 22, pieces={1 << 20: b"x" * 5000}),
    "end": File(size=(1 << 20) + 7, pieces={(1 << 20) + 6: b"e"}),
    "begin": File(size=1 << 20, pieces={0: b"b" * 4096}),
    "many": File(size=1 << 22, pieces={n << 14: b"p" for n in range(100)}),
}


def _equal(left: Path, right: Path, *ignore: str) -> None:
    assert differences(snapshot(left), snapshot(right), ignore=ignore) == []


def _source(tmp_path: Path, *trees: Tree) -> Path:
    source = tmp_path / "source"
    for tree in trees:
        build(source, tree)
    os.utime(source, ns=(1, 5 * 10**9))
    return source


def _check_reading(tmp_path: Path, data: bytes, expected: Path) -> None:
    """*data* unpacked by us is *expected*, and its stream can be made again."""
    ours = tmp_path / "ours"
    done = extract_recorded(data, ours, tmp_path / "record")
    _equal(expected, ours)
    assert rebuilt(ours, tmp_path / "record") == data
    seen = snapshot(ours)
    distinct = {entry.links or (path,): entry for path, entry in seen.items() if path != b"."}
    assert done.size.inodes == len(distinct)
    assert done.size.bytes == sum(e.size for e in distinct.values() if e.kind == "file")


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes_is_read_as_it_reads_it(tmp_path: Path, form: str) -> None:
    trees = {"v7": (PLAIN,), "oldgnu": (PLAIN, LONG), "gnu": (PLAIN, LONG), "ustar": (PLAIN,)}
    source = _source(tmp_path, *trees.get(form, (PLAIN, LONG, RICH)))
    if form == "v7":
        for name in ("pipe", "null", "disk"):  # it has no devices
            (source / name).unlink()
        os.utime(source, ns=(1, 5 * 10**9))
    bare = () if form == "posix" else ("--no-xattrs", "--no-acls")
    data = gnu_tar(source, f"--format={form}", *bare)
    theirs = tmp_path / "theirs"
    gnu_untar(data, theirs)
    _equal(source, theirs)
    _check_reading(tmp_path, data, theirs)


@pytest.mark.parametrize(
    "options",
    [
        ("--format=oldgnu", "--no-xattrs", "--no-acls"),
        ("--format=gnu", "--no-xattrs", "--no-acls"),
        ("--format=posix", "--sparse-version=0.0"),
        ("--format=posix", "--sparse-version=0.1"),
        ("--format=posix", "--sparse-version=1.0"),
    ],
)
def test_sparse_files_of_gnu_tar(tmp_path: Path, options: tuple[str, ...]) -> None:
    source = _source(tmp_path, SPARSE)
    if "posix" not in options[0]:
        for name in os.listdir(source):
            os.utime(source / name, ns=(1, 10**9))
        os.utime(source, ns=(1, 5 * 10**9))
    data = gnu_tar(source, "--sparse", *options)
    assert len(data) < 1 << 20
    _check_reading(tmp_path, data, source)
    for path in (tmp_path / "ours").iterdir():
        assert path.stat().st_blocks * 512 < 1 << 20, path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tarfile_writes_is_read_as_it_reads_it(tmp_path: Path, form: int) -> None:
    source = _source(tmp_path, PLAIN, LONG if form != tarfile.USTAR_FORMAT else {})
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        archive.add(source, arcname=".")
    data = out.getvalue()
    theirs = tmp_path / "theirs"
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
        archive.extractall(theirs, numeric_owner=True)
    _check_reading(tmp_path, data, source)
    _equal(theirs, tmp_path / "ours", "mtime_ns")  # tarfile leaves those of links alone


def test_ours_is_read_by_gnu_tar(tmp_path: Path) -> None:
    source = _source(tmp_path, PLAIN, LONG, RICH, SPARSE)
    theirs = tmp_path / "theirs"
    data = packed(source)
    assert len(data) < 4 << 20
    complaints = gnu_untar(data, theirs, "--warning=no-unknown-keyword", "--warning=no-timestamp")
    assert complaints == ""
    _equal(source, theirs)
    for name in SPARSE:
        assert (theirs / str(name)).stat().st_blocks * 512 <= 1 << 20


def test_ours_is_read_by_tarfile(tmp_path: Path) -> None:
    source = _source(tmp_path, PLAIN, LONG, RICH, SPARSE)
    theirs = tmp_path / "theirs"
    with tarfile.open(fileobj=io.BytesIO(packed(source))) as archive:
        archive.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
        archive.extractall(theirs, numeric_owner=True)
    # tarfile keeps no attributes; its times are floating-point numbers, and links have none.
    expected, found = snapshot(source), snapshot(theirs)
    assert differences(expected, found, ignore=("xattrs", "mtime_ns", "mode")) == []
    for path, entry in expected.items():
        late = abs(entry.mtime_ns - found[path].mtime_ns)
        assert late < 1000 or entry.kind == "symlink", path


def test_ours_is_read_by_us_and_written_again(tmp_path: Path) -> None:
    source = _source(tmp_path, PLAIN, LONG, RICH, SPARSE)
    data = packed(source)
    _check_reading(tmp_path, data, source)
    assert packed(tmp_path / "ours") == data


def test_a_copy_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    source = _source(tmp_path, PLAIN, LONG, RICH, SPARSE)
    copy = tmp_path / "copy"
    gnu_untar(gnu_tar(source, "--sparse", "--format=posix"), copy)
    # Made in another order, so that listings come in another one too.
    other = tmp_path / "other"
    other.mkdir()
    gnu_untar(gnu_tar(source, "--format=posix", "--sort=inode", "--sparse"), other)
    assert packed(copy) == packed(source) == packed(other)

"""Which directories have a name: known in one step, read when that pays, never more than needed."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.shell import me
from tests.support.tree import Dir, Fifo, Symlink, Tree, Whiteout
from tests.support.unions import Union, Unions, open_fds, trusted_only
from unionfs2 import names, opening
from unionfs2 import syscalls as sc
from unionfs2.branch import RealDir
from unionfs2.model import Entry
from unionfs2.names import LowerNames, UpperNames


def index_of(u: Union, path: str) -> LowerNames:
    index = u.sh.dir(path).index
    assert index is not None
    return index


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[RealDir]:
    """Directories that were listed, in order."""
    listed: list[RealDir] = []
    real = names.read_names

    def noting(directory: RealDir) -> list[Entry]:
        listed.append(directory)
        return real(directory)

    monkeypatch.setattr(names, "read_names", noting)
    return listed


# --- the table ----------------------------------------------------------------------------------


def test_a_name_leads_to_its_directories() -> None:
    table = LowerNames()
    table.add([(1, [b"a"]), (2, [b"a", b"b"]), (8, [b"a", b"b"])])
    assert [table.holders(name, (), 0) for name in (b"a", b"b", b"c")] == [11, 10, 0]
    assert table.filled == 11


def test_names_of_the_same_directories_share_one_number() -> None:
    table = LowerNames()
    table.add([(1 << position, [b"a", b"b"]) for position in range(200)])
    assert table.holders(b"a", (), 0) == (1 << 200) - 1
    assert table.holders(b"a", (), 0) is table.holders(b"b", (), 0)


def test_what_was_not_read_may_have_any_name(unions: Unions, reads: list[RealDir]) -> None:
    u = unions({"d": {"a": ""}}, {"d": {"b": ""}})
    lowers = u.sh.dir("d").lowers
    table = LowerNames()
    table.add([(1, [b"a"])])
    table.put_off(1, 10 * LowerNames._BYTES_PER_MISS)
    assert table.holders(b"a", lowers, 9) == 3
    assert table.holders(b"none", lowers, 9) == 2
    assert reads == []
    # Asked in vain often enough, it was read.
    assert table.holders(b"a", lowers, 10) == 1
    assert reads == [lowers[1]]
    assert table.holders(b"b", lowers, 10) == 2
    assert table.holders(b"none", lowers, 10) == 0


def test_misses_are_shared_by_what_is_not_read(unions: Unions, reads: list[RealDir]) -> None:
    u = unions({"d": {"a": ""}}, {"d": {"b": ""}})
    lowers = u.sh.dir("d").lowers
    table = LowerNames()
    for position, worth in ((0, 10), (1, 20)):
        table.put_off(position, worth * LowerNames._BYTES_PER_MISS)
    assert table.holders(b"b", lowers, 19) == 3
    assert table.holders(b"b", lowers, 20) == 2
    assert reads == [lowers[0]]


def test_what_is_huge_is_never_read(unions: Unions, reads: list[RealDir]) -> None:
    u = unions({"d": {}}, {"d": {"b": ""}})
    table = LowerNames()
    table.put_off(1, LowerNames.HUGE)
    assert table.holders(b"b", u.sh.dir("d").lowers, 10**9) == 2
    assert reads == []


def test_a_listing_of_somebody_else_is_learnt_from_unless_it_is_huge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LowerNames, "_NAMES_MAX", 2)
    table = LowerNames()
    table.put_off(0, LowerNames.HUGE)
    table.learn(0, [Entry(b"%d" % n, 1, 0) for n in range(3)])
    assert table.holders(b"x", (), 0) == 1
    table.learn(0, [Entry(b"%d" % n, 1, 0) for n in range(2)])
    assert [table.holders(name, (), 0) for name in (b"0", b"x")] == [1, 0]


# --- small directories --------------------------------------------------------------------------


def read(reader: sc.SmallDirectories, path: Path) -> bytes | None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return reader.read(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
def test_a_small_directory_is_read_whole(home: Path, count: int) -> None:
    reader = sc.SmallDirectories()
    expected = sorted(os.fsencode(f"{'n' * n}{n}") for n in range(count))
    for name in expected:
        (home / os.fsdecode(name)).touch()
    for _ in range(2):
        raw = read(reader, home)
        assert raw is not None
        assert sorted(sc.names_in(raw)) == expected


def test_an_empty_directory_is_nothing_whatever_was_read_before(home: Path) -> None:
    reader = sc.SmallDirectories()
    for directory in ("empty", "full", "large"):
        (home / directory).mkdir()
    for name in (b"abcdefg", b".x", b"..y", b"\xff\n"):
        (home / "full" / os.fsdecode(name)).touch()
    for number in range(200):
        (home / "large" / f"{number}").touch()
    for _ in range(2):
        assert read(reader, home / "empty") == b""
        raw = read(reader, home / "full")
        assert raw is not None
        assert sorted(sc.names_in(raw)) == [b"..y", b".x", b"abcdefg", b"\xff\n"]
        assert read(reader, home / "empty") == b""
        assert read(reader, home / "large") is None


def test_a_directory_read_in_pieces_is_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal or a file system may cut it."""
    for number in range(9):
        (home / f"{number}").touch()
    real = sc._getdents
    monkeypatch.setattr(sc, "_getdents", lambda fd, at, size: real(fd, at, min(size, 56)))
    raw = read(sc.SmallDirectories(), home)
    assert raw is not None
    assert sorted(sc.names_in(raw)) == [b"%d" % n for n in range(9)]


def test_a_directory_that_cannot_be_read_is_not_empty(home: Path) -> None:
    fd = os.open(home, os.O_PATH)
    try:
        assert sc.SmallDirectories().read(fd) is None
    finally:
        os.close(fd)


# --- lookups ------------------------------------------------------------------------------------


def test_a_lookup_of_a_directory_takes_its_names_along(unions: Unions) -> None:
    layers: list[Tree] = [{"d": {f"f{n}": "", "same": {}}} for n in range(6)]
    u = unions(*layers)
    node = u.sh.dir("d")
    index = index_of(u, "d")
    assert [index.holders(b"f%d" % n, node.lowers, 0) for n in range(6)] == [1, 2, 4, 8, 16, 32]
    assert index.holders(b"same", node.lowers, 0) == 63
    assert index.holders(b"none", node.lowers, 0) == 0
    assert len(u.sh.dir("d/same").lowers) == 6


def test_only_directories_with_the_name_are_walked(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[Tree] = [{"d": {f"own{n}": {"f": ""}, "x": ""}} for n in range(20)]
    u = unions(*layers)
    u.sh.dir("d")
    asked: list[bytes] = []
    real = os.stat

    def noting(name: bytes, **how: Any) -> os.stat_result:
        asked.append(name)
        return real(name, **how)

    monkeypatch.setattr(os, "stat", noting)
    assert u.sh.exists("d/own17/f")
    assert not u.sh.exists("d/none")
    assert asked.count(b"own17") == 1
    assert b"none" not in asked


def test_a_table_is_made_when_fruitless_questions_have_cost_as_much(unions: Unions) -> None:
    """Of the root, whose directories nobody has read when they were met."""
    layers: list[Tree] = [{"same": "", f"f{n}": ""} for n in range(4)]
    u = unions(*layers)
    root = u.fs.root

    def has_table() -> bool:
        return root.index is not None

    for _ in range(50):
        assert u.fs.lookup(root, b"same") is not None
    for number in range(LowerNames.WORTH_MISSES):
        assert not has_table()
        assert u.fs.lookup(root, b"none%d" % number) is None
    assert u.fs.lookup(root, b"f3") is not None
    assert has_table()
    assert root.holders(b"f2") == 4
    assert u.fs.lookup(root, b"none") is None


def test_one_lower_directory_is_not_asked_again_and_again(unions: Unions) -> None:
    u = unions({f"f{number}": "" for number in range(20)})
    root = u.fs.root
    for number in range(LowerNames.WORTH_MISSES):
        assert root.holders(b"none") == 1
        assert u.fs.lookup(root, b"none%d" % number) is None
    assert root.holders(b"none") == 0
    assert root.holders(b"f19") == 1
    assert u.fs.lookup(root, b"f19") is not None
    assert sorted(u.sh.names()) == sorted(b"f%d" % number for number in range(20))


# --- the upper ----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Names that an upper directory was asked for."""
    names_asked: list[bytes] = []
    real = sc.lstat_or_none

    def noting(name: bytes, dir_fd: int) -> os.stat_result | None:
        names_asked.append(name)
        return real(name, dir_fd)

    monkeypatch.setattr(sc, "lstat_or_none", noting)
    return names_asked


def test_a_directory_made_here_is_asked_for_what_came_to_it(
    unions: Unions, asked: list[bytes]
) -> None:
    u = unions({"low": {"f": "data", "g": ""}})
    sh = u.sh
    sh.hold("low")
    u.fs.mkdir(u.fs.root, b"new", 0o755, me())[0].lookups += 1
    sh.write("low/f", b"more")
    sh.unlink("low/g")
    asked.clear()
    assert not sh.exists("new/none")
    assert not sh.exists("low/none")
    assert asked == []
    assert sh.exists("low/f")
    assert not sh.exists("low/g")
    assert asked == [b"f", b"g"]
    sh.create("low/g", b"again")
    sh.rename("low/g", "new/h")
    sh.link("new/h", "low/i")
    assert (sh.read("new/h"), sh.read("low/i")) == (b"again", b"again")
    assert not sh.exists("low/g")
    assert sorted(sh.names("low")) == [b"f", b"i"]


def test_a_directory_that_was_there_is_read_after_misses(
    unions: Unions, asked: list[bytes]
) -> None:
    u = unions({}, upper={"d": {"there": "", "gone": Whiteout()}})
    sh = u.sh
    sh.hold("d")
    for number in range(UpperNames.WORTH_MISSES):
        assert not sh.exists(f"d/none{number}")
    asked.clear()
    assert not sh.exists("d/none")
    assert asked == []
    assert sh.exists("d/there")
    assert not sh.exists("d/gone")
    sh.create("d/gone")
    sh.unlink("d/there")
    assert sh.names("d") == [b"gone"]
    assert not sh.exists("d/there")


def test_many_names_of_an_upper_are_not_kept(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UpperNames, "NAMES_MAX", 3)
    u = unions({}, upper={"d": {}})
    sh = u.sh
    u.fs.mkdir(u.fs.root, b"new", 0o755, me())[0].lookups += 1
    for number in range(5):
        sh.create(f"new/{number}")
        assert not sh.exists("new/none")
    assert len(sh.names("new")) == 5
    assert all(sh.exists(f"new/{number}") for number in range(5))


def test_a_large_upper_directory_is_not_read(
    unions: Unions, asked: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UpperNames, "SMALL", 0)
    u = unions({}, upper={"d": {"f": ""}})
    u.sh.hold("d")
    for number in range(3 * UpperNames.WORTH_MISSES):
        assert not u.sh.exists(f"d/none{number}")
    assert len(asked) >= 3 * UpperNames.WORTH_MISSES


def test_a_large_directory_touched_once_is_not_read(unions: Unions, reads: list[RealDir]) -> None:
    large: Tree = {f"name-{n:04}": "" for n in range(300)}
    layers: list[Tree] = [{"d": {f"f{n}": ""}} for n in range(4)]
    u = unions(*layers, {"d": large})
    assert u.sh.exists("d/name-0123")
    assert u.sh.exists("d/f0")
    assert not u.sh.exists("d/none")
    for number in range(300):
        assert u.sh.exists(f"d/name-{number:04}")
    assert reads == []
    for number in range(300):
        assert not u.sh.exists(f"d/none-{number:04}")
    assert len(reads) == 1
    node = u.sh.dir("d")
    assert node.holders(b"name-0299") == 16
    assert node.holders(b"none") == 0


def test_listings_skip_what_is_empty(unions: Unions, reads: list[RealDir]) -> None:
    layers: list[Tree] = [{"d": {"f": ""} if n == 30 else {}} for n in range(60)]
    u = unions(*layers)
    assert index_of(u, "d").filled == 1 << 30
    assert u.sh.names("d") == [b"f"]


@pytest.mark.parametrize("fitting", [True, False])
def test_kinds_and_numbers_of_many_layers(
    unions: Unions, monkeypatch: pytest.MonkeyPatch, fitting: bool
) -> None:
    """Small directories are read in a way of their own."""
    if not fitting:
        monkeypatch.setattr(sc.SmallDirectories, "BYTES", 48)
    top: Tree = {"f": "", "d": {}, "l": Symlink("x"), "p": Fifo(), "w": Whiteout(), "x": ""}
    low: Tree = {"f": {}, "w": "", "x": "low", b"\xff\n": "", "low": ""}
    u = unions({"m": top}, *({"m": {}} for _ in range(5)), {"m": low})
    os.setxattr(u.lowers[0] / "m/x", u.key("whiteout"), b"")
    os.setxattr(u.lowers[0] / "m", u.key("opaque"), b"x")
    expected = {
        b"f": (stat.S_IFREG, 0),
        b"d": (stat.S_IFDIR, 0),
        b"l": (stat.S_IFLNK, 0),
        b"p": (stat.S_IFIFO, 0),
        b"\xff\n": (stat.S_IFREG, 6),
        b"low": (stat.S_IFREG, 6),
    }
    entries = u.fs.listing(u.sh.dir("m"))
    assert {entry.name: entry.kind for entry in entries} == {k: v[0] for k, v in expected.items()}
    for entry in entries:
        where = os.fsencode(u.lowers[expected[entry.name][1]] / "m")
        assert entry.ino == os.lstat(where + b"/" + entry.name).st_ino


def test_what_ends_a_walk_ends_the_table(unions: Unions) -> None:
    low: Tree = {"w": {"low": ""}, "o": {"low": ""}, "f": {"low": ""}}
    parts: list[Tree] = [
        {"w": {f"{n}": ""}, "o": {f"{n}": ""}, "f": {f"{n}": ""}} for n in range(4)
    ]
    u = unions(*parts, {"w": Whiteout(), "o": Dir({"last": ""}, opaque=True), "f": "file"}, low)
    for path, last in (("w", []), ("o", [b"last"]), ("f", [])):
        assert u.sh.names(path) == [b"0", b"1", b"2", b"3", *last]
        assert not u.sh.exists(f"{path}/low")
        assert u.sh.exists(f"{path}/3")
        assert len(u.sh.dir(path).lowers) == 4 + len(last)
        assert u.sh.dir(path).index is not None


@trusted_only
@pytest.mark.parametrize("value", [b"old", b"/x/old"])
@pytest.mark.parametrize("layer", [1, 3, 5])
def test_redirects_leave_the_table(unions: Unions, layer: int, value: bytes) -> None:
    """Below the mark another name counts, whichever directories have the first one."""
    parts: list[Tree] = [
        {"d": {f"d{n}": ""}, "old": {f"o{n}": ""}, "x": {"old": {f"x{n}": ""}}} for n in range(1, 6)
    ]
    u = unions(*parts)
    os.setxattr(u.layer(layer) / "d", u.key("redirect"), value)
    below = "x" if value.startswith(b"/") else "o"
    expected = [b"d%d" % n for n in range(1, layer + 1)]
    expected += [os.fsencode(f"{below}{n}") for n in range(layer + 1, 6)]
    assert u.sh.names("d") == sorted(expected)
    for name in expected:
        assert u.sh.exists(f"d/{os.fsdecode(name)}")
    assert not u.sh.exists("d/d5") or layer == 5


@trusted_only
def test_a_refused_lookup_leaves_nothing_open(unions: Unions) -> None:
    layers: list[Tree] = [{"d": {"f": ""}} for _ in range(6)]
    u = unions(*layers, redirect_dir="nofollow")
    os.setxattr(u.layer(5) / "d", u.key("redirect"), b"old")
    assert u.fs.root is not None
    fds = open_fds()
    with pytest.raises(PermissionError):
        u.sh.dir("d")
    assert open_fds() == fds


def test_without_private_clones_names_are_read_when_it_pays(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_clone", lambda fd: -1)
    layers: list[Tree] = [{"d": {f"f{n}": ""}} for n in range(5)]
    u = unions(*layers)
    times = [os.stat(lower / "d").st_atime_ns for lower in u.lowers]
    node = u.sh.dir("d")
    assert node.index is None
    for number in range(20):
        assert not u.sh.exists(f"d/none{number}")
    assert index_of(u, "d").holders(b"f4", node.lowers, 0) == 16
    assert u.sh.names("d") == [b"f%d" % n for n in range(5)]
    assert [os.stat(lower / "d").st_atime_ns for lower in u.lowers] == times


@pytest.mark.needs("root")
@pytest.mark.parametrize("userxattr", [True])
def test_a_directory_that_may_not_be_read_is_asked(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[Tree] = [{"d": {f"f{n}": ""}} for n in range(6)]
    u = unions(*layers)
    real = os.open

    def refusing(path: bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        listed = flags & os.O_DIRECTORY and not flags & os.O_PATH
        fd = real(path, flags, mode, dir_fd=dir_fd)
        if listed and os.path.samestat(os.stat(fd), os.stat(u.lowers[3] / "d")):
            os.close(fd)
            raise PermissionError(errno.EACCES, "no", path)
        return fd

    assert u.fs.root is not None
    monkeypatch.setattr(os, "open", refusing)
    for number in range(60):
        assert u.sh.exists(f"d/f{number % 6}")
        assert not u.sh.exists(f"d/none{number}")
    assert u.sh.dir("d").holders(b"none") == 8


# --- descriptors --------------------------------------------------------------------------------


@pytest.fixture
def _few_fds() -> Iterator[None]:
    """What an ordinary process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1024:
        pytest.skip("the hard limit of open files is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("userxattr", [True])
@pytest.mark.usefixtures("_few_fds")
def test_five_hundred_layers_with_few_descriptors(
    unions: Unions, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    if not private:
        monkeypatch.setattr(opening, "_clone", lambda fd: -1)
    count = 500
    layers: list[Tree] = [{"a": {"b": {"c": {f"f{n}": ""}}}} for n in range(count)]
    u = unions(*layers)
    u.sh.hold("a/b/c")
    limit = u.fs.stack.cache.limit
    for number in range(0, count, 25):
        assert u.sh.exists(f"a/b/c/f{number}")
        assert not u.sh.exists(f"a/b/c/none{number}")
        assert open_fds() < count + 2 * limit
    assert len(u.sh.names("a/b/c")) == count
    assert open_fds() < count + 2 * limit
    u.sh.unlink("a/b/c/f499")
    assert not u.sh.exists("a/b/c/f499")
    u.fs.trim()
    assert len(u.fs.stack.cache) <= limit

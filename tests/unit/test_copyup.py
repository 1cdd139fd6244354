"""Copy-up: what arrives in the upper, what does not, and what is left as it was."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import probe
from tests.support.shell import Shell
from tests.support.tree import Device, Dir, Fifo, File, HardLink, Node, Socket, Symlink
from tests.support.unions import Union, Unions, trusted_only
from unionfs2 import copyup
from unionfs2 import syscalls as sc
from unionfs2.model import SetAttr

OLD_NS = 1_234_567_890_123_456_789
PIECE = 1 << 20


def bring_up(u: Union, path: str) -> None:
    """Copy up and change nothing."""
    copyup.whole(u.fs.stack, u.sh.node(path))


KINDS: dict[str, Node] = {
    "file": File("data", mode=0o4751, mtime_ns=OLD_NS, xattrs={"user.a": b"1", "user.b": b""}),
    "empty": File("", mode=0o000 if probe.is_root() else 0o400, mtime_ns=OLD_NS),
    "dir": Dir({"x": ""}, mode=0o3711, mtime_ns=OLD_NS, xattrs={"user.a": b"1"}),
    "symlink": Symlink(b"some\xff/where", mtime_ns=OLD_NS),
    "fifo": Fifo(mode=0o620, mtime_ns=OLD_NS),
    "socket": Socket(mode=0o701, mtime_ns=OLD_NS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_but_the_number_arrives(unions: Unions, kind: str) -> None:
    u = unions({kind: KINDS[kind]})
    bring_up(u, kind)
    if kind != "symlink" or probe.is_root():  # nobody else can read a link without a trace
        assert len({os.lstat(u.layer(n) / kind).st_atime_ns for n in (0, 1)}) == 1
    ours, theirs = u.on_disk(kind), u.on_disk(kind, layer=1)
    assert ours is not None
    assert theirs is not None
    marks = [key for key, _ in ours.xattrs if key.startswith(u.prefix)]
    assert [k for k in marks if k != u.key("origin")] == []
    kept = tuple(item for item in ours.xattrs if item[0] not in marks)
    assert (kept, ours.nlink) == (theirs.xattrs, 2 if kind == "dir" else 1)
    for field in ("kind", "mode", "uid", "gid", "rdev", "mtime_ns", "data", "target"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert kind == "dir" or ours.size == theirs.size


@pytest.mark.needs("root")
def test_devices_and_owners(unions: Unions) -> None:
    u = unions({
        "null": Device("c", 1, 3, mode=0o666, uid=5, gid=6),
        "loop": Device("b", 7, 0),
        "file": File("", uid=7, gid=8, mode=0o6755),
        "link": Symlink("x", uid=9, gid=10),
        "dir": Dir({}, uid=11, gid=12),
    })  # fmt: skip
    for name in ("null", "loop", "file", "link", "dir"):
        bring_up(u, name)
        ours, theirs = u.on_disk(name), u.on_disk(name, layer=1)
        assert ours is not None
        assert theirs is not None
        assert (ours.kind, ours.mode, ours.uid, ours.gid, ours.rdev) == (
            theirs.kind, theirs.mode, theirs.uid, theirs.gid, theirs.rdev,
        )  # fmt: skip


@trusted_only
def test_capabilities_and_other_namespaces(unions: Unions) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    xattrs = {"security.capability": capability, "trusted.mine": b"1", "user.overlay.opaque": b"y"}
    u = unions({"f": File("x", uid=3, xattrs=xattrs)})
    bring_up(u, "f")
    entry = u.on_disk("f")
    assert entry is not None
    assert {k: v for k, v in entry.xattrs if k != u.key("origin")} == xattrs


def test_our_own_marks_stay_below_escaped_ones_do_not(unions: Unions) -> None:
    u = unions({"d": Dir({}, opaque=True), "f": File("")})
    os.setxattr(u.lowers[0] / "f", u.key("protattr.not"), b"x")
    os.setxattr(u.lowers[0] / "f", u.key("overlay.opaque"), b"y")
    bring_up(u, "d")
    bring_up(u, "f")
    assert set(u.marks("d")) == {"origin"}
    assert set(u.marks("f")) == {"origin", "overlay.opaque"}


@pytest.mark.needs("acl")
def test_access_lists(unions: Unions) -> None:
    acl = bytes.fromhex(
        "0200000001000700ffffffff020004000100000004000500ffffffff10000500ffffffff20000500ffffffff"
    )
    keys = ("system.posix_acl_access", "system.posix_acl_default")
    u = unions({"d": Dir({}, xattrs=dict.fromkeys(keys, acl))})
    bring_up(u, "d")
    assert {key: os.getxattr(u.upper / "d", key) for key in keys} == dict.fromkeys(keys, acl)
    assert (u.upper / "d").stat().st_mode == (u.lowers[0] / "d").stat().st_mode


def test_marks_after_a_copy(unions: Unions) -> None:
    u = unions({"d": {"e": {"f": ""}}})
    u.sh.chmod("d/e/f", 0o600)
    assert u.marks(".")["impure"] == b"y"
    assert set(u.marks("d")) == {"origin", "impure"}
    assert set(u.marks("d/e")) == {"origin", "impure"}
    assert set(u.marks("d/e/f")) == {"origin"}
    assert u.in_work() == []


def test_a_broken_hard_link(unions: Unions) -> None:
    u = unions({"a": File("old", mtime_ns=OLD_NS), "b": HardLink("a")})
    u.sh.write("a", b"new")
    assert u.sh.read("b") == b"old"
    assert (u.sh.read("a"), u.sh.nlink("a"), u.sh.nlink("b")) == (b"new", 1, 2)
    assert u.marks("a") == {}
    assert u.on_disk("b") is None


def test_times_of_the_parent_are_put_back(unions: Unions) -> None:
    u = unions({"d": Dir({"f": "", "l": Symlink("x"), "s": {}}, mtime_ns=OLD_NS)})
    bring_up(u, "d")
    for name in ("f", "l", "s"):
        bring_up(u, f"d/{name}")
    info = (u.upper / "d").stat()
    assert (info.st_mtime_ns, info.st_atime_ns) == (OLD_NS, OLD_NS)


# --- data ---------------------------------------------------------------------------------------


def extents(path: Path) -> list[tuple[int, int]]:
    """(start, end) of the data of a sparse file."""
    out = []
    with path.open("rb") as stream:
        fd, at, size = stream.fileno(), 0, path.stat().st_size
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno == errno.ENXIO:
                    break
                raise
            at = os.lseek(fd, start, os.SEEK_HOLE)
            out.append((start, at))
    return out


@pytest.mark.parametrize(
    ("size", "islands"),
    [(5 * PIECE, []), (5 * PIECE, [3 * PIECE + 5]), (5 * PIECE + 1, [0, 5 * PIECE]), (1, [])],
)
@pytest.mark.parametrize("reflink", [True, False])
def test_holes_stay_holes(
    unions: Unions,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    islands: list[int],
    reflink: bool,
) -> None:
    if not reflink:
        monkeypatch.setattr(sc, "clone_data", lambda src, dst: False)
    u = unions({"f": File(size=size, pieces=dict.fromkeys(islands, b"i"))})
    bring_up(u, "f")
    ours, theirs = u.upper / "f", u.lowers[0] / "f"
    assert ours.stat().st_size == size
    assert ours.read_bytes() == theirs.read_bytes()
    if extents(theirs) != [(0, size)]:  # the file system knows holes
        for start, end in extents(ours):
            assert any(start <= at < end for at in islands)
        assert ours.stat().st_blocks * 512 <= len(islands) * PIECE + 65536


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, 0])
def test_every_way_of_copying(unions: Unions, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Without reflinks, without copy_file_range(2), and where that copies nothing."""

    def refuse(*_: object) -> int:
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    monkeypatch.setattr(sc, "clone_data", lambda src, dst: False)
    monkeypatch.setattr(sc, "copy_range", refuse)
    data = os.urandom(2 * PIECE + 77)
    u = unions({"f": File(data)})
    bring_up(u, "f")
    assert (u.upper / "f").read_bytes() == data


def test_short_writes_are_continued(unions: Unions, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(sc, "clone_data", lambda src, dst: False)
    monkeypatch.setattr(sc, "copy_range", lambda *_: 0)
    monkeypatch.setattr(sc, "pwrite", lambda fd, data, at: real(fd, bytes(data[:1000]), at))
    data = os.urandom(4567)
    u = unions({"f": File(data)})
    bring_up(u, "f")
    assert (u.upper / "f").read_bytes() == data


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_without_a_search_for_holes(
    unions: Unions, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file system without SEEK_DATA; a lower file that shrinks under it is an error."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sc, "clone_data", lambda src, dst: False)
    u = unions({"f": File("x" * 100), "g": File(size=2 * PIECE + 1)})
    job = copyup.prepare(u.fs.stack, u.sh.node("f"))
    assert job is not None
    monkeypatch.setattr(os, "lseek", refuse)
    bring_up(u, "g")
    assert (u.upper / "g").read_bytes() == bytes(2 * PIECE + 1)
    (u.lowers[0] / "f").write_bytes(b"x")
    with pytest.raises(OSError, match="Input/output error"):
        job.run()
    job.close()
    assert not (u.upper / "f").exists()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_without_unnamed_files(
    unions: Unions, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """O_TMPFILE is refused by some file systems; the copy then has a name in the work directory."""
    real = os.open

    def no_tmpfile(path: bytes, flags: int, mode: int = 0o777, *, dir_fd: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(sc, "create_at", no_tmpfile)
    u = unions({"f": File("data", mtime_ns=OLD_NS), "g": File("g")})
    bring_up(u, "f")
    job = copyup.prepare(u.fs.stack, u.sh.node("g"))
    assert job is not None
    assert len(u.in_work()) == 1
    job.close()
    assert u.in_work() == []
    assert (u.upper / "f").read_bytes() == b"data"
    assert (u.upper / "f").stat().st_mtime_ns == OLD_NS
    assert not (u.upper / "g").exists()


@pytest.mark.parametrize("size", [0, 3, 4, 100])
@pytest.mark.parametrize("shared", [True, False])
def test_a_truncation_copies_no_more_than_it_keeps(
    unions: Unions, monkeypatch: pytest.MonkeyPatch, size: int, shared: bool
) -> None:
    """A clone is of the whole file, and cut afterwards."""
    copied, written = [], []
    real_link = sc.link_fd

    def link(fd: int, name: bytes, dir_fd: int) -> None:
        written.append(os.fstat(fd).st_size)
        real_link(fd, name, dir_fd)

    monkeypatch.setattr(sc, "link_fd", link)
    real = copyup.copy_data

    def watched(src: int, dst: int, length: int) -> None:
        copied.append(length)
        real(src, dst, length)

    def cloned(src: int, dst: int) -> bool:
        if shared:
            os.pwrite(dst, os.pread(src, 99, 0), 0)
        return shared

    monkeypatch.setattr(copyup, "copy_data", watched)
    monkeypatch.setattr(sc, "clone_data", cloned)
    u = unions({"f": File("data", mode=0o6755)})
    u.fs.stack.clones = True  # as far as one knows
    u.sh.truncate("f", size)
    assert (u.upper / "f").read_bytes() == b"data"[:size].ljust(size, b"\0")
    assert copied == ([min(size, 4)] if size and not shared else [])
    assert len(written) == 1, "what the copy has too much is cut before it has its name"
    assert written[0] == min(size, 4)


def test_data_is_flushed_before_the_name_is_there(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "link_fd", "futimes", "utimes_path"):
        real: Callable[..., object] = getattr(sc, name)

        def note(*args: object, name: str = name, real: Callable[..., object] = real) -> object:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(sc, name, note)
    bring_up(unions({"f": "data"}), "f")
    assert calls == ["futimes", "fsync", "link_fd", "utimes_path"]
    calls.clear()
    bring_up(unions({"f": "data"}, volatile=True), "f")
    assert "fsync" not in calls


# --- what does and does not copy up -------------------------------------------------------------

COPYING: dict[str, Callable[[Shell], object]] = {
    "open for writing": lambda sh: sh.fs.release(sh.open("f", os.O_WRONLY)),
    "open for both": lambda sh: sh.fs.release(sh.open("f", os.O_RDWR)),
    "open with O_TRUNC": lambda sh: sh.fs.release(sh.open("f", os.O_RDONLY | os.O_TRUNC)),
    "truncate": lambda sh: sh.truncate("f", 1),
    "chmod": lambda sh: sh.chmod("f", 0o600),
    "chown": lambda sh: sh.setattr("f", SetAttr(uid=os.geteuid())),
    "utimes": lambda sh: sh.setattr("f", SetAttr(atime_ns=1)),
    "setxattr": lambda sh: sh.setxattr("f", b"user.x", b""),
    "removexattr": lambda sh: sh.removexattr("f", b"user.there"),
    "link": lambda sh: sh.link("f", "g"),
    "rename": lambda sh: sh.rename("f", "g"),
}


@pytest.mark.parametrize("what", COPYING)
def test_what_copies_up(unions: Unions, what: str) -> None:
    u = unions({"f": File("data", xattrs={"user.there": b""})})
    COPYING[what](u.sh)
    assert [name for name in ("f", "g") if (u.upper / name).is_file()]


def test_what_does_not_copy_up(unions: Unions) -> None:
    u = unions({"f": "data", "p": Fifo(), "d": {}})
    u.sh.read("f")
    u.fs.release(u.sh.open("f", os.O_RDONLY | os.O_CREAT))
    u.sh.names("d")
    for path, act, number in (
        ("f", lambda: u.sh.removexattr("f", b"user.absent"), errno.ENODATA),
        ("p", lambda: u.sh.open("p", os.O_WRONLY), errno.ENXIO),
        ("d", lambda: u.sh.open("d", os.O_WRONLY), errno.EISDIR),
        ("d", lambda: u.sh.create("d"), errno.EEXIST),
        ("f", lambda: u.sh.rename("f", "d"), errno.EISDIR),
        ("d", lambda: u.sh.rename("d", "e"), errno.EXDEV),
    ):
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            act()
        assert (path, caught.value.errno) == (path, number)
    assert os.listdir(u.upper) == []


def test_reading_leaves_the_lower_atime_alone(unions: Unions) -> None:
    u = unions({"f": "data", "d": {"x": ""}})
    for name in ("f", "d"):
        os.utime(u.lowers[0] / name, ns=(5, 6))
    before = [(u.lowers[0] / name).stat().st_atime_ns for name in ("f", "d")]
    u.sh.read("f")
    u.sh.names("d")
    bring_up(u, "f")
    bring_up(u, "d")
    assert [(u.lowers[0] / name).stat().st_atime_ns for name in ("f", "d")] == before


def test_a_taken_name_is_not_replaced(unions: Unions) -> None:
    """Somebody else put an object into the upper meanwhile: EEXIST, and theirs stays."""
    u = unions({"f": "low", "l": Symlink("x"), "d": {}})
    for name in ("f", "l", "d"):
        node = u.sh.node(name)
        (u.upper / name).write_bytes(b"theirs")
        with pytest.raises(FileExistsError):
            copyup.whole(u.fs.stack, node)
        assert (u.upper / name).read_bytes() == b"theirs"
    assert u.in_work() == []


def test_a_copy_that_is_overtaken_by_unlink(unions: Unions) -> None:
    u = unions({"f": "data"})
    node = u.sh.hold("f")
    job = copyup.prepare(u.fs.stack, node)
    assert job is not None
    u.sh.unlink("f")
    job.run()
    with pytest.raises(FileExistsError):
        job.publish()
    job.close()
    assert not u.sh.exists("f")


def test_unmapped_owners(unions: Unions, monkeypatch: pytest.MonkeyPatch) -> None:
    """EOVERFLOW: the copy could not have the owner that the lower object has."""
    u = unions({"f": "", "d": {"x": ""}, "l": Symlink("x")})
    monkeypatch.setattr(copyup, "_unmapped", frozenset({os.geteuid()}))
    acts: tuple[Callable[[], object], ...] = (
        lambda: u.sh.chmod("f", 0o600),
        lambda: u.sh.chmod("d", 0o700),
        lambda: u.sh.create("d/y"),
        lambda: u.sh.link("l", "m"),
    )
    for act in acts:
        with pytest.raises(OSError, match=r"\[Errno 75\]"):
            act()
    assert os.listdir(u.upper) == []


def test_kinds_are_what_they_were(unions: Unions) -> None:
    u = unions(KINDS)
    before = {name: stat.S_IFMT((u.lowers[0] / name).lstat().st_mode) for name in KINDS}
    for name in KINDS:
        bring_up(u, name)
    assert {name: u.sh.node(name).kind for name in KINDS} == before
    u.reopen()
    assert {name: u.sh.node(name).kind for name in KINDS} == before

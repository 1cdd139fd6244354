"""Each request becomes one call of the core, and its result the reply: nothing else happens."""

from __future__ import annotations

import errno
import os
import stat
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest

from tests.door.fakes import CTX, FakeCore, door_of, stat_of
from unionfs2.fs_ops import Door
from unionfs2.handles import DirHandle
from unionfs2.model import Caller, Entry, SetAttr
from unionfs2.nodes import Dir

CALLER = Caller(11, 12, 0, 0o027)
ST = stat_of(
    stat.S_IFREG | 0o4711,
    st_ino=1,
    st_nlink=3,
    st_uid=5,
    st_gid=6,
    st_size=7,
    st_blksize=4096,
    st_blocks=8,
    st_rdev=9,
    st_atime_ns=1_000_000_001,
    st_mtime_ns=2_000_000_002,
    st_ctime_ns=3_000_000_003,
)
NO_ATTRS: dict[str, bool] = dict.fromkeys(
    (f"update_{name}" for name in ("mode", "uid", "gid", "size", "atime", "mtime", "ctime")), False
)


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def door(core: FakeCore, invalidated: list[tuple[Any, ...]]) -> Door:
    return door_of(core)


@pytest.fixture
def invalidated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the kernel was told to forget."""
    told: list[tuple[Any, ...]] = []

    def record(inode: int, *, attr_only: bool = False) -> None:
        told.append((inode, attr_only))

    monkeypatch.setattr(pyfuse3, "invalidate_inode", record)
    return told


def check_entry(entry: pyfuse3.EntryAttributes, *, nlink: int = 3) -> None:
    """All attributes of ST arrived."""
    assert (entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid) == (ST.st_mode, nlink, 5, 6)
    assert (entry.st_size, entry.st_blksize, entry.st_blocks, entry.st_rdev) == (7, 4096, 8, 9)
    times = (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns)
    assert times == (1_000_000_001, 2_000_000_002, 3_000_000_003)
    assert entry.entry_timeout == entry.attr_timeout > 1e6


MAKERS = [
    ("mknod", (b"f", stat.S_IFIFO | 0o644, 77), (b"f", stat.S_IFIFO | 0o644, 77, CALLER)),
    ("mkdir", (b"f", 0o755), (b"f", 0o755, CALLER)),
    ("symlink", (b"f", b"target"), (b"f", b"target", CALLER)),
]


@pytest.mark.parametrize(("name", "arguments", "passed"), MAKERS)
async def test_making(
    core: FakeCore, door: Door, name: str, arguments: tuple[Any, ...], passed: tuple[Any, ...]
) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    core.answers[name] = (node, ST)
    check_entry(await getattr(door, name)(1, *arguments, CTX))
    assert core.calls == [(name, core.root, *passed)]
    assert node.lookups == 1


async def test_lookup_counts_what_is_found(core: FakeCore, door: Door) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    core.answers["lookup"] = (node, ST)
    for count in (1, 2):
        check_entry(await door.lookup(1, b"f", CTX))
        assert node.lookups == count
    assert core.calls == [("lookup", core.root, b"f")] * 2


async def test_a_missing_name_is_remembered(core: FakeCore, door: Door) -> None:
    entry = await door.lookup(1, b"f", CTX)
    assert entry.st_ino == 0
    assert entry.entry_timeout > 1e6


async def test_a_merged_directory_has_one_link(core: FakeCore, door: Door) -> None:
    node = core.add(stat.S_IFDIR, 7, b"d")
    core.answers["getattr"] = ST
    check_entry(await door.getattr(7, CTX))
    node.lowers = (object(), object())
    check_entry(await door.getattr(7, CTX), nlink=1)


async def test_forget(core: FakeCore, door: Door) -> None:
    await door.forget([(7, 2), (8, 1)])
    assert core.calls == [("forget", 7, 2), ("forget", 8, 1)]


async def test_link(core: FakeCore, door: Door) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    core.answers["link"] = (node, ST)
    check_entry(await door.link(7, 1, b"new", CTX))
    assert core.calls[-1] == ("link", node, core.root, b"new")
    assert node.lookups == 1


@pytest.mark.parametrize("name", ["unlink", "rmdir"])
async def test_removing(
    core: FakeCore, door: Door, invalidated: list[tuple[Any, ...]], name: str
) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    core.answers[name] = node
    await getattr(door, name)(1, b"f", CTX)
    assert core.calls == [(name, core.root, b"f")]
    assert invalidated == []


async def test_an_open_file_that_is_unlinked_has_new_attributes(
    core: FakeCore, door: Door, invalidated: list[tuple[Any, ...]]
) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    node.handles, node.lookups = [core.handle(node, 3)], 1
    core.answers["unlink"] = node
    await door.unlink(1, b"f", CTX)
    assert invalidated == [(7, True)]


async def test_rename(core: FakeCore, door: Door) -> None:
    other = core.add(stat.S_IFDIR, 8, b"d")
    core.add(stat.S_IFREG, 7, b"f")
    await door.rename(1, b"f", 8, b"g", 1, CTX)
    expected = (core.root, b"f", other, b"g", 1)
    assert core.calls == [("check_rename", *expected), ("rename", *expected)]


async def test_readlink(core: FakeCore, door: Door) -> None:
    node = core.add(stat.S_IFLNK, 7, b"l")
    core.answers["readlink"] = b"\xfftarget"
    assert await door.readlink(7, CTX) == b"\xfftarget"
    assert core.calls == [("readlink", node)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((), SetAttr()),
        (("mode",), SetAttr(mode=stat.S_IFREG | 0o4711)),
        (("uid",), SetAttr(uid=5)),
        (("gid",), SetAttr(gid=6)),
        (("size",), SetAttr(size=7)),
        (("atime",), SetAttr(atime_ns=1_000_000_001)),
        (("mtime",), SetAttr(mtime_ns=2_000_000_002)),
        (("ctime",), SetAttr()),
        (("size", "mtime"), SetAttr(size=7, mtime_ns=2_000_000_002)),
    ],
)
@pytest.mark.parametrize("number", [None, 3, 4])
async def test_setattr(
    core: FakeCore, door: Door, fields: tuple[str, ...], expected: SetAttr, number: int | None
) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    handle = core.handle(node, 3)
    core.answers["setattr"] = ST
    wanted: Any = SimpleNamespace(**{**NO_ATTRS, **{f"update_{name}": True for name in fields}})
    entry = pyfuse3.EntryAttributes()
    for name in ("mode", "uid", "gid", "size", "atime_ns", "mtime_ns"):
        setattr(entry, f"st_{name}", getattr(ST, f"st_{name}"))
    check_entry(await door.setattr(7, entry, wanted, number, CTX))
    used = handle if number == 3 else None
    assert core.calls == [
        ("check_setattr", node, expected),
        ("setattr", node, expected, used, CALLER),
    ]


async def test_statfs(core: FakeCore, door: Door) -> None:
    real = os.statvfs("/")
    core.answers["statfs"] = real
    answer = await door.statfs(CTX)
    for name in (
        "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail",
    ):  # fmt: skip
        assert getattr(answer, name) == getattr(real, name)
    assert answer.f_namemax == 255


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "mask", "allowed"),
    [
        (0, 0, 0o000, os.R_OK | os.W_OK, True),
        (0, 0, 0o666, os.X_OK, False),
        (0, 0, 0o001, os.X_OK, True),
        (5, 0, 0o700, 7, True),
        (5, 6, 0o077, os.R_OK, False),
        (1, 6, 0o070, 7, True),
        (1, 6, 0o707, os.R_OK, False),
        (1, 1, 0o004, os.R_OK, True),
        (1, 1, 0o004, os.W_OK, False),
        (1, 1, 0o000, os.F_OK, True),
    ],
)
async def test_access(
    core: FakeCore, door: Door, uid: int, gid: int, mode: int, mask: int, allowed: bool
) -> None:
    core.add(stat.S_IFREG, 7, b"f")
    core.answers["getattr"] = stat_of(stat.S_IFREG | mode, st_uid=5, st_gid=6)
    ctx: Any = SimpleNamespace(uid=uid, gid=gid, pid=0, umask=0)
    assert await door.access(7, mask, ctx) is allowed


async def test_extended_attributes(core: FakeCore, door: Door) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    core.answers["getxattr"] = b"value"
    core.answers["listxattr"] = [b"user.a"]
    assert await door.getxattr(7, b"user.a", CTX) == b"value"
    assert await door.listxattr(7, CTX) == [b"user.a"]
    await door.setxattr(7, b"user.a", b"v", CTX)
    await door.removexattr(7, b"user.a", CTX)
    assert core.calls == [
        ("getxattr", node, b"user.a"),
        ("listxattr", node, CALLER),
        ("check_setxattr", node, b"user.a"),
        ("setxattr", node, b"user.a", b"v", 0, CALLER),
        ("removexattr", node, b"user.a", CALLER),
    ]


async def test_removing_from_a_lower_file_asks_first(core: FakeCore, door: Door) -> None:
    """An absent attribute copies nothing up."""
    node = core.add(stat.S_IFREG, 7, b"f", lower=True)
    core.answers["check_removexattr"] = OSError(errno.ENODATA, "absent")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await door.removexattr(7, b"user.a", CTX)
    assert caught.value.errno == errno.ENODATA
    assert core.calls == [("check_removexattr", node, b"user.a", CALLER)]


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("due", [True, False])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDONLY | os.O_NOATIME])
async def test_open(core: FakeCore, door: Door, flags: int, due: bool) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    core.answers["open_file"] = handle = core.handle(node, 33)
    core.answers["atime_is_due"] = due
    info = await door.open(7, flags, CTX)
    assert info.fh == 33
    assert info.keep_cache == (not due or bool(flags & os.O_NOATIME))
    assert core.calls[0] == ("open_file", node, flags, None)
    assert handle.node is node


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
async def test_open_for_writing_is_checked_first(core: FakeCore, door: Door, flags: int) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    core.answers["open_file"] = core.handle(node, 33)
    await door.open(7, flags, CTX)
    assert core.calls[:2] == [
        ("check_open", node, flags),
        ("open_file", node, flags, CALLER),
    ]


async def test_create(core: FakeCore, door: Door) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    core.answers["create"] = (core.handle(node, 33), ST)
    info, entry = await door.create(1, b"f", 0o644, os.O_RDWR, CTX)
    assert info.fh == 33
    check_entry(entry)
    assert node.lookups == 1
    assert core.calls == [("create", core.root, b"f", 0o644, os.O_RDWR, CALLER)]


async def test_read(core: FakeCore, door: Door, tmp_path: Any) -> None:
    data = os.urandom(300_000)
    (tmp_path / "f").write_bytes(data)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    core.handle(core.add(stat.S_IFREG, 7, b"f"), fd)
    try:
        for offset, size in ((0, 10), (5, 131_072), (0, 1 << 20), (0, 3 << 20), (299_999, 99)):
            assert bytes(await door.read(fd, offset, size)) == data[offset : offset + size]
        assert bytes(await door.read(fd, 300_000, 10)) == b""
    finally:
        os.close(fd)


async def test_read_where_the_cache_cannot_be_asked(
    core: FakeCore, door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "f").write_bytes(b"data")
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    core.handle(core.add(stat.S_IFREG, 7, b"f"), fd)
    number = errno.EOPNOTSUPP

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", refuse)
    assert bytes(await door.read(fd, 1, 9)) == b"ata"
    number = errno.EIO
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await door.read(fd, 1, 9)
    assert caught.value.errno == errno.EIO
    os.close(fd)


async def test_what_is_not_cached_is_read_from_the_disk(
    core: FakeCore, door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Nothing cached, or a part only: the answer is whole all the same."""
    data = os.urandom(200_000)
    (tmp_path / "f").write_bytes(data)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    core.handle(core.add(stat.S_IFREG, 7, b"f"), fd)
    real = os.preadv

    def nothing(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "not cached")

    def a_part(fd: int, buffers: Any, offset: int, _: int) -> int:
        return real(fd, [buffers[0][:4096]], offset)

    for cached in (nothing, a_part):
        monkeypatch.setattr(os, "preadv", cached)
        for size in (50_000, 150_000, 900_000):
            assert bytes(await door.read(fd, 10, size)) == data[10 : 10 + size]
    os.close(fd)


@pytest.mark.parametrize("size", [1, 300_000])
async def test_write(core: FakeCore, door: Door, size: int) -> None:
    node = core.add(stat.S_IFREG, 7, b"f")
    handle = core.handle(node, 33)
    core.answers["write"] = size
    assert await door.write(33, 5, b"x" * size) == size
    assert core.calls == [("write", handle, 5, b"x" * size)]


async def test_the_rest_of_a_files_life(core: FakeCore, door: Door) -> None:
    handle = core.handle(core.add(stat.S_IFREG, 7, b"f"), 33)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await door.flush(33)
    assert caught.value.errno == errno.ENOSYS
    await door.fsync(33, datasync=True)
    await door.release(33)
    assert core.calls == [("sync", handle, ("data_only", True)), ("release", handle)]


# --- listings -----------------------------------------------------------------------------------


class Replies:
    """Stands for the kernel's buffer, with room for some names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int = 99) -> None:
        self.room = room
        self.names: list[tuple[bytes, int, int]] = []
        monkeypatch.setattr(pyfuse3, "readdir_reply", self._reply)

    def _reply(self, token: object, name: bytes, entry: Any, next_id: int) -> bool:
        if len(self.names) >= self.room:
            return False
        self.names.append((name, stat.S_IFMT(entry.st_mode), next_id))
        return True


def listing_of(core: FakeCore, *names: bytes) -> DirHandle:
    handle = DirHandle(5, core.root)
    core.answers["listing handle"] = handle
    core.answers["listing"] = [Entry(name, 9, stat.S_IFREG) for name in names]
    nodes = {name: core.add(stat.S_IFREG, 20 + n, name) for n, name in enumerate(names)}
    core.answers["lookup"] = lambda parent, name: (nodes[name], ST)
    return handle


async def test_opening_and_closing_a_listing(core: FakeCore, door: Door) -> None:
    node = core.add(stat.S_IFDIR, 7, b"d")
    core.answers["opendir"] = handle = DirHandle(5, node)
    assert await door.opendir(7, CTX) == 5
    core.answers["listing handle"] = handle
    await door.releasedir(5)
    assert core.calls == [("opendir", node), ("releasedir", handle)]


async def test_a_listing_in_pieces(
    core: FakeCore, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing_of(core, b"a", b"b", b"c")
    got: list[bytes] = []
    start = 0
    while True:
        replies = Replies(monkeypatch, room=2)
        await door.readdir(5, start, object())  # type: ignore[arg-type]
        if not replies.names:
            break
        got += [name for name, _, _ in replies.names]
        start = replies.names[-1][2]
    assert got == [b".", b"..", b"a", b"b", b"c"]
    assert [call for call in core.calls if call[0] == "listing"] == [("listing", core.root)]
    children = core.root.children
    assert [children[name].lookups for name in (b"a", b"b", b"c")] == [1, 1, 1]


async def test_a_name_without_room_is_not_counted(
    core: FakeCore, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing_of(core, b"a")
    Replies(monkeypatch, room=2)
    await door.readdir(5, 0, object())  # type: ignore[arg-type]
    node = core.root.children[b"a"]
    assert node.lookups == 0
    assert ("reap", node) in core.calls


async def test_the_names_are_taken_anew_from_the_start(
    core: FakeCore, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing_of(core, b"a", b"b")
    Replies(monkeypatch)
    await door.readdir(5, 0, object())  # type: ignore[arg-type]
    core.answers["listing"] = [Entry(b"b", 9, stat.S_IFREG)]
    late = Replies(monkeypatch)
    await door.readdir(5, 3, object())  # type: ignore[arg-type]
    assert [name for name, _, _ in late.names] == [b"b"]
    again = Replies(monkeypatch)
    await door.readdir(5, 0, object())  # type: ignore[arg-type]
    assert [name for name, _, _ in again.names] == [b".", b"..", b"b"]


@pytest.mark.parametrize("listed", [True, False])
async def test_a_name_that_is_gone_or_hidden(
    core: FakeCore, door: Door, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    listing_of(core, b"a")
    core.answers["lookup"] = None
    core.answers["listed_although_hidden"] = listed
    replies = Replies(monkeypatch)
    await door.readdir(5, 0, object())  # type: ignore[arg-type]
    assert (b"a", stat.S_IFREG, 3) in replies.names or not listed
    assert len(replies.names) == (3 if listed else 2)


@pytest.mark.parametrize("needed", [True, False])
async def test_a_name_that_must_not_be_looked_at(
    core: FakeCore, door: Door, monkeypatch: pytest.MonkeyPatch, needed: bool
) -> None:
    listing_of(core, b"a")
    core.answers["lookup"] = OSError(errno.EPERM, "hollow")
    core.answers["needs_lookup"] = needed
    replies = Replies(monkeypatch)
    if needed:
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await door.readdir(5, 0, object())  # type: ignore[arg-type]
        assert caught.value.errno == errno.EPERM
    else:
        await door.readdir(5, 0, object())  # type: ignore[arg-type]
        assert replies.names[-1] == (b"a", stat.S_IFREG, 3)


async def test_syncing_a_directory(core: FakeCore, door: Door) -> None:
    core.answers["listing handle"] = DirHandle(5, core.root)
    await door.fsyncdir(5, datasync=False)
    read_end, write_end = os.pipe()
    os.close(write_end)
    core.answers["open_for_sync"] = read_end
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await door.fsyncdir(5, datasync=False)
    assert caught.value.errno == errno.EINVAL, "a pipe cannot be synced"
    with pytest.raises(OSError, match=r"\[Errno 9\]"):
        os.fstat(read_end)


async def test_a_full_cache_is_trimmed_between_requests(core: FakeCore, door: Door) -> None:
    core.answers["getattr"] = ST
    for size, trims in ((10, 0), (11, 1)):
        core.stack.cache.size = size
        await door.getattr(1, CTX)
        assert core.stack.cache.trims == trims


async def test_the_kernel_is_told_what_changed_behind_its_back(
    core: FakeCore, door: Door, invalidated: list[tuple[Any, ...]]
) -> None:
    known, unknown = core.add(stat.S_IFDIR, 7, b"d"), core.add(stat.S_IFDIR, 8, b"e")
    known.lookups = 1

    def changing(*_: object) -> None:
        core.stack.changed += [known, unknown]
        raise OSError(errno.ENOSPC, "full")

    core.answers["rmdir"] = changing
    with pytest.raises(pyfuse3.FUSEError):
        await door.rmdir(1, b"x", CTX)
    assert invalidated == [(7, True)]
    assert core.stack.changed == []


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTCONN, errno.EIO])
async def test_telling_may_fail(
    core: FakeCore,
    door: Door,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pyfuse3, "invalidate_inode", refuse)
    node = core.add(stat.S_IFDIR, 7, b"d")
    node.lookups = 1
    core.stack.changed.append(node)
    core.answers["getattr"] = ST
    check_entry(await door.getattr(7, CTX))
    assert len(caplog.records) == (number == errno.EIO)


def test_the_start_is_announced(core: FakeCore) -> None:
    told: list[bool] = []
    door = Door(core, acl=False, ready=lambda: told.append(True))  # type: ignore[arg-type]
    assert not told
    door.init()
    assert told == [True]
    assert not door.enable_acl
    assert isinstance(core.root, Dir)

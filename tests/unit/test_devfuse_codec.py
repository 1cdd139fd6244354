"""Every message of the protocol, made by hand and taken apart by hand."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.fusewire import (
    UNIQUE,
    Answer,
    Attr,
    Dirent,
    Entry,
    attr_of,
    dirents,
    entry,
    message,
    parse,
)
from unionfs2.devfuse import abi, codec
from unionfs2.devfuse.codec import ProtocolError, Request

# sizeof() of the structs of include/uapi/linux/fuse.h; an answer comes after its head of 16 bytes.
SIZES: Final = {
    "IN_HEADER": 40,  # fuse_in_header
    "OUT_HEADER": 16,  # fuse_out_header
    "INIT_IN": 16,  # fuse_init_in up to 7.35; 64 since, flags2 being the next 4
    "INIT_FLAGS2": 4,
    "GETATTR_IN": 16,
    "SETATTR_IN": 88,
    "MKNOD_IN": 16,
    "MKDIR_IN": 8,
    "RENAME_IN": 8,
    "RENAME2_IN": 16,
    "LINK_IN": 8,
    "OPEN_IN": 8,
    "CREATE_IN": 16,
    "RELEASE_IN": 24,
    "FLUSH_IN": 24,
    "READ_IN": 40,
    "WRITE_IN": 40,
    "FSYNC_IN": 16,
    "SETXATTR_IN": 8,  # FUSE_COMPAT_SETXATTR_IN_SIZE
    "SETXATTR_EXT_IN": 16,
    "GETXATTR_IN": 8,
    "ACCESS_IN": 8,
    "INTERRUPT_IN": 8,
    "FORGET_IN": 8,
    "BATCH_FORGET_IN": 8,
    "FORGET_ONE": 16,
    "IOCTL_IN": 32,
    "FALLOCATE_IN": 32,
    "LSEEK_IN": 24,
    "COPY_FILE_RANGE_IN": 56,
    "SYNCFS_IN": 8,
    "STATX_IN": 24,
    "INIT_OUT": 64,
    "ENTRY_OUT": 16 + 128,  # fuse_entry_out: 40 and a fuse_attr of 88
    "ATTR_OUT": 16 + 104,
    "DIRENTPLUS_OUT": 152,  # fuse_direntplus: fuse_entry_out and a fuse_dirent of 24
    "DIRENT_OUT": 24,
    "OPEN_OUT": 16 + 16,
    "WRITE_OUT": 16 + 8,
    "GETXATTR_OUT": 16 + 8,
    "STATFS_OUT": 16 + 80,
    "LSEEK_OUT": 16 + 8,
    "IOCTL_OUT": 16 + 16,
    "OPEN_PART": 16,
    "STATX_OUT": 16 + 288,
    "INVAL_INODE_OUT": 16 + 24,
    "INVAL_ENTRY_OUT": 16 + 16,
    "DELETE_OUT": 16 + 24,
    "STORE_OUT": 16 + 24,
    "BACKING_MAP": 16,
}


def test_every_struct_has_the_size_that_the_kernel_gives_it() -> None:
    structs = {n: v.size for n, v in vars(abi).items() if isinstance(v, struct.Struct)}
    assert structs == SIZES


def pack(form: str, *values: Any) -> bytes:
    return struct.pack("<" + form, *values)


HANDLE: Final = 0xA1A2A3A4A5A6A7A8
OWNER: Final = 0xB1B2B3B4B5B6B7B8
#: A fuse_open_in, fuse_read_in ... and what it means.
_OPEN: Final = (pack("II", os.O_RDWR, 7), (os.O_RDWR, 7))
_READ: Final = (
    pack("QQIIQII", HANDLE, 1 << 40, 4096, 2, OWNER, os.O_RDONLY, 0xDEAD),
    (HANDLE, 1 << 40, 4096, 2, OWNER, os.O_RDONLY),
)
_RELEASE: Final = (
    pack("QIIQ", HANDLE, os.O_RDWR, 1, OWNER),
    (HANDLE, os.O_RDWR, 1, OWNER),
)
_CREATE: Final = (pack("IIII", os.O_RDWR, 0o100644, 0o22, 5), (os.O_RDWR, 0o100644, 0o22, 5))
_RANGE: Final = (
    pack("QQQQQQQ", 1, 2, 3, 4, 5, 6, 7),
    (1, 2, 3, 4, 5, 6, 7),
)
_LOCK: Final = pack("QQQQIIII", HANDLE, OWNER, 0, 99, 1, 4242, 0, 0)

#: Opcode, what follows the header, and the arguments that it stands for.
MESSAGES: Final[dict[str, tuple[int, bytes, tuple[Any, ...]]]] = {
    "LOOKUP": (1, b"name\0", (b"name",)),
    "FORGET": (2, pack("Q", 3), (3,)),
    "GETATTR": (3, pack("IIQ", 1, 0, HANDLE), (1, 0, HANDLE)),
    "SETATTR": (
        4,
        pack("IIQQQ", 0x1FF, 0xDEAD, HANDLE, 1 << 33, OWNER)
        + pack("QQQIII", 11, 12, 13, 21, 22, 23)
        + pack("IIIII", 0o100600, 0xDEAD, 1000, 2000, 0xDEAD),
        (0x1FF, HANDLE, 1 << 33, OWNER, 11, 12, 13, 21, 22, 23, 0o100600, 1000, 2000),
    ),
    "READLINK": (5, b"", ()),
    "SYMLINK": (6, b"link\0../else/where\0", (b"link", b"../else/where")),
    "MKNOD": (
        8,
        pack("IIII", 0o20644, 0x501, 0o27, 0xDEAD) + b"null\0",
        (0o20644, 0x501, 0o27, b"null"),
    ),
    "MKDIR": (9, pack("II", 0o755, 0o22) + b"dir\0", (0o755, 0o22, b"dir")),
    "UNLINK": (10, b"gone\0", (b"gone",)),
    "RMDIR": (11, b"gone.d\0", (b"gone.d",)),
    "RENAME": (12, pack("Q", 77) + b"old\0new\0", (77, b"old", b"new")),
    "LINK": (13, pack("Q", 78) + b"second\0", (78, b"second")),
    "OPEN": (14, *_OPEN),
    "READ": (15, *_READ),
    "WRITE": (
        16,
        pack("QQIIQII", HANDLE, 512, 4, 5, OWNER, os.O_APPEND, 0xDEAD) + b"\0\1\2\3",
        (HANDLE, 512, 5, os.O_APPEND, b"\0\1\2\3"),
    ),
    "STATFS": (17, b"", ()),
    "RELEASE": (18, *_RELEASE),
    "FSYNC": (20, pack("QII", HANDLE, 1, 0), (HANDLE, 1)),
    "SETXATTR": (
        21,
        pack("IIII", 5, 1, 1, 0xDEAD) + b"user.a/b\0value",
        (5, 1, pack("II", 1, 0xDEAD) + b"user.a/b\0value"),
    ),
    "GETXATTR": (22, pack("II", 64, 0xDEAD) + b"user./../x\0", (64, b"user./../x")),
    "LISTXATTR": (23, pack("II", 64, 0xDEAD), (64,)),
    "REMOVEXATTR": (24, b"user.a/b\0", (b"user.a/b",)),
    "FLUSH": (25, pack("QIIQ", HANDLE, 0xDEAD, 0xDEAD, OWNER), (HANDLE, OWNER)),
    "INIT": (
        26,
        pack("IIIII", 7, 45, 131072, 0xF0000001, 0x123) + bytes(44),
        (7, 45, 131072, 0xF0000001, pack("I", 0x123) + bytes(44)),
    ),
    "OPENDIR": (27, *_OPEN),
    "READDIR": (28, *_READ),
    "RELEASEDIR": (29, *_RELEASE),
    "FSYNCDIR": (30, pack("QII", HANDLE, 0, 0), (HANDLE, 0)),
    "GETLK": (31, _LOCK, ()),
    "SETLK": (32, _LOCK, ()),
    "SETLKW": (33, _LOCK, ()),
    "ACCESS": (34, pack("II", 4, 0xDEAD), (4,)),
    "CREATE": (35, _CREATE[0] + b"new\0", (*_CREATE[1], b"new")),
    "INTERRUPT": (36, pack("Q", 1234), (1234,)),
    "BMAP": (37, pack("QII", 9, 512, 0), ()),
    "DESTROY": (38, b"", ()),
    "IOCTL": (
        39,
        pack("QIIQII", HANDLE, 16, 0x80086601, 0x7FFF0000, 3, 4) + b"abc",
        (HANDLE, 16, 0x80086601, 0x7FFF0000, 3, 4, b"abc"),
    ),
    "POLL": (40, pack("QQII", HANDLE, 1, 2, 3), ()),
    "NOTIFY_REPLY": (41, bytes(40), ()),
    "BATCH_FORGET": (
        42,
        pack("II", 2, 0xDEAD) + pack("QQQQ", 5, 1, 6, 2),
        (2, pack("QQQQ", 5, 1, 6, 2)),
    ),
    "FALLOCATE": (43, pack("QQQII", HANDLE, 10, 20, 3, 0xDEAD), (HANDLE, 10, 20, 3)),
    "READDIRPLUS": (44, *_READ),
    "RENAME2": (45, pack("QII", 77, 2, 0xDEAD) + b"old\0new\0", (77, 2, b"old", b"new")),
    "LSEEK": (46, pack("QQII", HANDLE, 1 << 35, 3, 0xDEAD), (HANDLE, 1 << 35, 3)),
    "COPY_FILE_RANGE": (47, *_RANGE),
    "SETUPMAPPING": (48, bytes(40), ()),
    "REMOVEMAPPING": (49, bytes(4), ()),
    "SYNCFS": (50, bytes(8), ()),
    "TMPFILE": (51, _CREATE[0] + b"/\0", (*_CREATE[1], b"/\0")),
    "STATX": (52, pack("IIQII", 1, 0xDEAD, HANDLE, 2, 0x7FF), (1, HANDLE, 2, 0x7FF)),
    "COPY_FILE_RANGE_64": (53, *_RANGE),
}

each_message = pytest.mark.parametrize("name", MESSAGES)


def decoded(text: bytes) -> Request:
    """Decode, in a buffer with other bytes behind."""
    return codec.decode(bytearray(text + b"\xff" * 100), len(text))


def test_every_request_of_the_protocol_has_a_row_and_a_case() -> None:
    """Opcodes of 7.45: 1 to 53 without 7 and 19, which never were."""
    assert set(abi.ROWS) == set(range(1, 54)) - {7, 19}
    assert {row.name: code for code, row in abi.ROWS.items()} == {
        name: case[0] for name, case in MESSAGES.items()
    }
    assert len(MESSAGES) == 51


@each_message
def test_a_message_is_read(name: str) -> None:
    opcode, body, expected = MESSAGES[name]
    req = decoded(message(opcode, body, nodeid=42, uid=1, gid=2, pid=3))
    assert (req.opcode, req.unique, req.nodeid) == (opcode, UNIQUE, 42)
    assert (req.uid, req.gid, req.pid) == (1, 2, 3)
    assert tuple(bytes(a) if isinstance(a, memoryview) else a for a in req.args) == expected
    assert repr(req).startswith(f"{name} {UNIQUE} of node 42 by 1:2")


@each_message
def test_extensions_do_not_belong_to_the_arguments(name: str) -> None:
    opcode, body, expected = MESSAGES[name]
    req = decoded(message(opcode, body, extensions=b"x" * 16))
    assert tuple(bytes(a) if isinstance(a, memoryview) else a for a in req.args) == expected


@each_message
def test_whatever_is_cut_off_is_refused_or_read_whole(name: str) -> None:
    """No cut makes a number out of bytes that are not there."""
    opcode, body, expected = MESSAGES[name]
    fixed = abi.ROWS[opcode].layout
    numbers_known = []
    for length in range(len(body)):
        try:
            req = decoded(message(opcode, body[:length]))
        except ProtocolError as exc:
            numbers_known.append(exc.unique)
            continue
        assert fixed is None or length >= fixed.size
        numbers = [a for a in expected if isinstance(a, int)]
        assert [a for a in req.args if isinstance(a, int)] == numbers
    assert set(numbers_known) <= {UNIQUE}


def test_data_of_a_write_is_not_copied() -> None:
    buffer = bytearray(message(16, MESSAGES["WRITE"][1]))
    data = codec.decode(buffer, len(buffer)).args[-1]
    buffer[-1] = 0xEE
    assert bytes(data) == b"\0\1\2\xee"


def test_an_opcode_that_nobody_knows_is_a_request_without_arguments() -> None:
    req = decoded(message(999, b"abc"))
    assert (req.opcode, req.args) == (999, ())
    assert "999" in repr(req)


@pytest.mark.parametrize("length", [0, 1, 16, 39])
def test_less_than_a_header_has_no_number(length: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        codec.decode(message(3)[:length], length)
    assert caught.value.unique == 0


@pytest.mark.parametrize("wrong", [-1, 1, 1 << 20])
def test_a_length_that_is_not_that_of_the_message(wrong: int) -> None:
    text = bytearray(message(5))
    struct.pack_into("<I", text, 0, len(text) + wrong)
    with pytest.raises(ProtocolError) as caught:
        codec.decode(text, len(text))
    assert caught.value.unique == UNIQUE


def test_a_request_without_a_number_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        decoded(message(5, unique=0))
    assert caught.value.unique == 0


def test_extensions_longer_than_the_message() -> None:
    text = bytearray(message(1, b"name\0"))
    struct.pack_into("<H", text, 36, 1)
    with pytest.raises(ProtocolError, match="extensions"):
        codec.decode(text, len(text))


BAD_NAMES: Final = [b"", b"\0", b"a", b"a/b\0", b"/\0", b"a\0b\0", b".\0", b"..\0", b"../a\0"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("request_name", ["LOOKUP", "UNLINK", "RMDIR", "MKNOD", "MKDIR", "CREATE"])
def test_a_name_that_is_no_component_of_a_path(request_name: str, name: bytes) -> None:
    opcode = MESSAGES[request_name][0]
    layout = abi.ROWS[opcode].layout
    with pytest.raises(ProtocolError):
        decoded(message(opcode, bytes(layout.size if layout else 0), name))


@pytest.mark.parametrize("name", [b"a", b"\0", b"a\0b\0", b""])
@pytest.mark.parametrize("opcode", [abi.GETXATTR, abi.REMOVEXATTR])
def test_a_name_of_an_attribute_ends_and_is_one(opcode: int, name: bytes) -> None:
    head = bytes(8) if opcode == abi.GETXATTR else b""
    with pytest.raises(ProtocolError):
        decoded(message(opcode, head, name))


BAD_PAIRS: Final = [
    b"", b"a", b"a\0", b"a\0b", b"\0b\0", b"a\0\0", b"a\0b\0c\0", b"a/\0b\0", b".\0b\0", b"..\0b\0",
]  # fmt: skip


@pytest.mark.parametrize("opcode", [abi.SYMLINK, abi.RENAME, abi.RENAME2])
@pytest.mark.parametrize("names", BAD_PAIRS)
def test_two_names_that_are_not_two(opcode: int, names: bytes) -> None:
    head = {abi.SYMLINK: 0, abi.RENAME: 8, abi.RENAME2: 16}[opcode]
    with pytest.raises(ProtocolError):
        decoded(message(opcode, bytes(head), names))


@pytest.mark.parametrize("opcode", [abi.RENAME, abi.RENAME2])
@pytest.mark.parametrize("second", [b"a/b", b"..", b"."])
def test_a_new_name_is_a_component_too(opcode: int, second: bytes) -> None:
    head = 8 if opcode == abi.RENAME else 16
    with pytest.raises(ProtocolError):
        decoded(message(opcode, bytes(head), b"a\0", second, b"\0"))


@pytest.mark.parametrize("size", [3, 5, 0, 0xFFFFFFFF])
def test_a_write_whose_size_is_not_that_of_its_data(size: int) -> None:
    with pytest.raises(ProtocolError, match="4 bytes of data"):
        decoded(message(16, pack("QQIIQII", 0, 0, size, 0, 0, 0, 0), b"data"))


@pytest.mark.parametrize("where", [1 << 63, (1 << 64) - 1])
def test_positions_are_signed(where: int) -> None:
    args = decoded(message(15, pack("QQIIQII", 0, where, 1, 0, 0, 0, 0))).args
    assert args[1] == where - (1 << 64)


def test_the_arguments_of_setxattr_in_both_forms() -> None:
    text = b"user.a\0value"
    assert codec.setxattr_args(text, 5, extended=False) == (0, b"user.a", b"value")
    extended = pack("II", 1, 0xDEAD) + text
    assert codec.setxattr_args(extended, 5, extended=True) == (1, b"user.a", b"value")


@pytest.mark.parametrize(
    ("rest", "size", "extended"),
    [
        (b"user.a\0value", 4, False),
        (b"user.a\0value", 6, False),
        (b"user.a", 0, False),
        (b"\0value", 5, False),
        (b"", 0, False),
        (bytes(7), 0, True),
        (bytes(8), 0, True),
    ],
)
def test_setxattr_that_does_not_fit(rest: bytes, size: int, extended: bool) -> None:
    with pytest.raises(ProtocolError):
        codec.setxattr_args(rest, size, extended=extended)


def test_forgets_in_one_message() -> None:
    data = pack("QQQQ", 5, 1, 6, 1 << 40)
    assert codec.forgets(2, data) == [(5, 1), (6, 1 << 40)]
    assert codec.forgets(1, data) == [(5, 1)]
    assert codec.forgets(0, data) == []
    for count in (3, 0xFFFFFFFF):
        with pytest.raises(ProtocolError):
            codec.forgets(count, data)


# --- answers --------------------------------------------------------------------------------------

FOREVER: Final = 10**9


@pytest.fixture
def st(tmp_path: Path) -> os.stat_result:
    """Attributes with a time before 1970."""
    os.utime(tmp_path, ns=(-1_500_000_000, 1_700_000_000_123_456_789))
    return os.stat(tmp_path)


def whole(reply: codec.Reply) -> Answer:
    return parse(b"".join(reply) if isinstance(reply, list) else bytes(reply))


def test_short_answers() -> None:
    assert codec.ok(9) == bytes.fromhex("10000000 00000000 0900000000000000")
    assert codec.failed(9, 2) == bytes.fromhex("10000000 feffffff 0900000000000000")
    assert whole(codec.data(9, b"abc")) == Answer(0, 9, b"abc")
    assert whole(codec.data(9, memoryview(b""))) == Answer(0, 9, b"")
    assert whole(codec.written(9, 5)) == Answer(0, 9, pack("II", 5, 0))
    assert whole(codec.copied_64(9, 1 << 33)) == Answer(0, 9, pack("Q", 1 << 33))
    assert whole(codec.sized(9, 5)) == Answer(0, 9, pack("II", 5, 0))
    assert whole(codec.position(9, 1 << 33)) == Answer(0, 9, pack("Q", 1 << 33))
    assert whole(codec.ioctl(9, b"abc")) == Answer(0, 9, pack("iIII", 0, 0, 0, 0) + b"abc")
    assert whole(codec.opened(9, HANDLE, 2, 3)) == Answer(0, 9, pack("QIi", HANDLE, 2, 3))


def test_an_entry(st: os.stat_result) -> None:
    found = whole(codec.entry(9, 42, 1 << 50, 3, st))
    assert (found.error, found.unique, len(found.body)) == (0, 9, 128)
    assert entry(found.body) == Entry(42, 0, FOREVER, FOREVER, 0, 0, attr_of(st, 1 << 50, 3))
    assert entry(found.body).attr.atime == -2
    assert entry(found.body).attr.atimensec == 500_000_000


def test_an_entry_that_is_not_there_may_be_remembered() -> None:
    found = whole(codec.no_entry(9))
    assert (found.error, len(found.body)) == (0, 128)
    assert entry(found.body) == Entry(0, 0, FOREVER, 0, 0, 0, Attr(*[0] * 16))


def test_attributes(st: os.stat_result) -> None:
    found = whole(codec.attr(9, 1 << 50, 3, st))
    assert struct.unpack_from("<QII", found.body) == (FOREVER, 0, 0)
    assert Attr(*struct.unpack("<QQQqqqIIIIIIIIII", found.body[16:])) == attr_of(st, 1 << 50, 3)


def test_an_entry_that_is_open(st: os.stat_result) -> None:
    found = whole(codec.with_open(codec.entry(9, 42, 43, 1, st), 9, HANDLE, 2))
    assert found.unique == 9
    assert found.body[:128] == codec.entry(9, 42, 43, 1, st)[16:]
    assert found.body[128:] == pack("QIi", HANDLE, 2, 0)


def test_a_device_number(tmp_path: Path) -> None:
    """32 bits: 12 of the major, 20 of the minor, as the kernel's new_encode_dev()."""
    null = os.stat("/dev/null")
    found = entry(whole(codec.entry(9, 42, 43, 1, null)).body).attr
    assert found.rdev == 0x103
    assert stat.S_ISCHR(found.mode)


def test_statfs(tmp_path: Path) -> None:
    real = os.statvfs(tmp_path)
    found = whole(codec.statfs(9, real, 200))
    assert found.body == pack(
        "QQQQQIIII24x",
        real.f_blocks, real.f_bfree, real.f_bavail, real.f_files, real.f_ffree,
        real.f_bsize, 200, real.f_frsize, 0,
    )  # fmt: skip


def test_notifications() -> None:
    assert parse(codec.inval_inode(42, -1, 0)) == Answer(2, 0, pack("Qqq", 42, -1, 0))
    assert parse(codec.inval_entry(42, b"ab")) == Answer(3, 0, pack("QII", 42, 2, 0) + b"ab\0")
    assert parse(codec.delete(42, 43, b"ab")) == Answer(6, 0, pack("QQII", 42, 43, 2, 0) + b"ab\0")


@pytest.mark.parametrize("name", [b"a" * n for n in (1, 7, 8, 9, 255)])
def test_names_of_listings(name: bytes, st: os.stat_result) -> None:
    plain = codec.dirent(name, 77, 5, stat.S_IFDIR)
    assert dirents(plain, plus=False) == [Dirent(name, 77, 5, 4)]
    node = Entry(42, 0, FOREVER, FOREVER, 0, 0, attr_of(st, 77, 2))
    plus = codec.direntplus(name, 5, 42, 77, 2, st)
    assert dirents(plus, plus=True) == [Dirent(name, 77, 5, 4, node)]
    unknown = codec.direntplus_unknown(name, 77, 5, stat.S_IFREG)
    nothing = Entry(0, 0, 0, 0, 0, 0, Attr(*[0] * 16))
    assert dirents(unknown, plus=True) == [Dirent(name, 77, 5, 8, nothing)]
    assert [d.name for d in dirents(plus + unknown + plus, plus=True)] == [name] * 3

"""The corpus: every archive with a name, its limits, and what must come of it.

``hostile(outside)`` yields them all; *outside* is the absolute path of a directory that they try to
reach. It lies beside the directory into which they are unpacked, under the name ``outside``.
Nothing here uses the code under test to make an archive.

``Outcome.REFUSED`` means an error that says why; ``CONFINED`` that the archive is legal and stays
inside; ``EITHER`` that only the outside counts.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.tarmake import END, archive, entry, gnu_long, header, octal, pax, record, sealed
from unionfs2.storemodel import Limits

DIR, FILE, HARD, SYM, CHAR, BLOCK, FIFO = b"5", b"0", b"1", b"2", b"3", b"4", b"6"
DEFAULT = Limits(bytes_max=1 << 24, entries_max=5000)
GNU = b"ustar  \0"


class Outcome(enum.Enum):
    """What unpacking must end with, beside an untouched outside."""

    REFUSED = "refused"
    CONFINED = "confined"
    EITHER = "either"


class Hostile(NamedTuple):
    """One archive."""

    name: str
    data: bytes
    outcome: Outcome = Outcome.EITHER
    limits: Limits = DEFAULT


def hostile(outside: bytes) -> Iterator[Hostile]:
    """The whole corpus; names are unique."""
    yield from names()
    yield from marks()
    yield from through_links(outside)
    yield from hard_links(outside)
    yield from replaced(outside)
    yield from attributes()
    yield from numbers()
    yield from extended()
    yield from sparse()
    yield from bombs()
    yield from ends()
    yield from truncated()
    yield from flipped()


def _refused(name: str, *parts: bytes, limits: Limits = DEFAULT) -> Hostile:
    return Hostile(name, archive(*parts), Outcome.REFUSED, limits)


def _confined(name: str, *parts: bytes) -> Hostile:
    return Hostile(name, archive(*parts), Outcome.CONFINED)


def _either(name: str, *parts: bytes, limits: Limits = DEFAULT) -> Hostile:
    return Hostile(name, archive(*parts), Outcome.EITHER, limits)


# --- where a member wants to go -------------------------------------------------------------------

LEAVING = (
    b"..",
    b"../",
    b"../x",
    b"../outside/x",
    b"../outside/kept",
    b"/..",
    b"/../outside/kept",
    b"//../outside/kept",
    b"./../outside/kept",
    b"a/../../outside/kept",
    b"a/b/../../../outside/kept",
    b"a/./../../outside/kept",
    b"a//..//../outside/kept",
    b"../root/../outside/kept",
    b"..//outside//kept",
    b"a/../..",
)
INSIDE = (
    b"/x",
    b"//x",
    b"/etc/passwd",
    b"./x",
    b"././/x",
    b"a/../x",
    b"a/b/../../x",
    b"...",
    b".../x",
    b"..x",
    b"x..",
    b"..\\outside\\kept",
    b"C:\\x",
    b"~root",
    b"$(touch x)",
    b"-rf",
    b" ",
    b"\n",
    b"\x1b[2J",
    b"\xff\xfe",
    b"a\\..\\..\\x",
)
KINDS = {
    "file": (FILE, b"evil", b""),
    "directory": (DIR, b"", b""),
    "symlink": (SYM, b"", b"target"),
    "fifo": (FIFO, b"", b""),
    "device": (CHAR, b"", b""),
}


def _spelt(path: bytes, kind: bytes, data: bytes, link: bytes) -> Iterator[tuple[str, bytes]]:
    """A member with the name *path*, said in each of the ways that tar has."""
    fields: dict[str, int | bytes] = {"link": link, "major": 1, "minor": 3}
    yield "header", entry(path, data, kind, **fields)
    yield "old header", entry(path, data, kind, magic=b"", **fields)
    yield "gnu", gnu_long(path) + entry(b"innocent", data, kind, magic=GNU, **fields)
    yield "pax", pax({b"path": path}) + entry(b"innocent", data, kind, **fields)
    yield "global", pax({b"path": path}, b"g") + entry(b"innocent", data, kind, **fields)
    head, _, tail = path.rpartition(b"/")
    if head and tail:
        yield "prefix", entry(tail, data, kind, prefix=head, **fields)


def names() -> Iterator[Hostile]:
    """Names that lead out, or look as if they did."""
    for path in LEAVING:
        for what, (kind, data, link) in KINDS.items():
            for how, member in _spelt(path, kind, data, link):
                yield _refused(f"leaving {path!r} {what} {how}", member)
    for path in INSIDE:
        for how, member in _spelt(path, FILE, b"x", b""):
            yield _confined(f"odd {path!r} {how}", member)
    yield _refused("no name", entry(b"", b"x"))
    yield _refused("root as a file", entry(b"./", b"x"))
    yield _refused("root as a symlink", entry(b".", b"", SYM, link=b"../outside"))
    yield _refused("root as a hard link", entry(b"/", b"", HARD, link=b"x"))
    yield _refused("root as a device", entry(b"./", b"", BLOCK, major=8))
    yield _refused("component of 256", pax({b"path": b"x" * 256}), entry(b"y", b"data"))
    yield _confined("component of 255", pax({b"path": b"x" * 255}), entry(b"y", b"data"))
    yield _refused("path of 5000", pax({b"path": b"a/" * 2500}), entry(b"y", b"data"))
    yield _refused("gnu path of 100000", gnu_long(b"a" * 100_000), entry(b"y", b"d", magic=GNU))
    yield _refused("zero byte in a name", pax({b"path": b"a\0b"}), entry(b"y", b"data"))
    yield _refused("zero byte in a target", pax({b"linkpath": b"a\0b"}), entry(b"y", b"", SYM))
    yield _refused("symlink to nothing", entry(b"l", b"", SYM))
    yield _refused("symlink of 5000", pax({b"linkpath": b"x" * 5000}), entry(b"l", b"", SYM))


def marks() -> Iterator[Hostile]:
    """Deletion marks: of nothing, of parents, of what comes later."""
    for name in (b".wh.", b".wh..", b".wh...", b"d/.wh.", b"d/.wh..", b"d/.wh..."):
        for what, (kind, data, link) in KINDS.items():
            yield _refused(f"mark {name!r} as {what}", entry(name, data, kind, link=link))
    for name in (b".wh.x/y", b".wh.x/y/z", b"d/.wh.x/y", b".wh.x/.wh.y", b".wh.x/.wh..wh..opq"):
        yield _either(f"below a mark {name!r}", entry(name, b"data"))
    yield _refused("file below a mark", entry(b".wh.x"), entry(b".wh.x/y", b"data"))
    for what in ("directory", "symlink", "fifo", "device"):
        kind, data, link = KINDS[what]
        yield _refused(f"mark is a {what}", entry(b".wh.x", data, kind, link=link))
    yield _confined("mark with content", entry(b".wh.x", b"content"))
    yield _confined("mark of a parent, later", entry(b"d/f", b"1"), entry(b".wh.d"))
    yield _confined("mark of a parent, before", entry(b".wh.d"), entry(b"d/f", b"1"))
    yield _confined(
        "mark of a file, both orders", entry(b".wh.f"), entry(b"f", b"1"), entry(b".wh.f")
    )
    yield _confined("mark twice", entry(b".wh.f"), entry(b".wh.f"))
    yield _confined("opaque root", entry(b".wh..wh..opq"), entry(b"f", b"1"))
    yield _confined("opaque twice", entry(b"d/.wh..wh..opq"), entry(b"d/.wh..wh..opq"))
    yield _refused("opaque below a file", entry(b"f", b"1"), entry(b"f/.wh..wh..opq"))
    yield _refused("mark below a file", entry(b"f", b"1"), entry(b"f/.wh.x"))
    yield _confined("metadata", entry(b".wh..wh.plnk/1.2", b"x"), entry(b"d/.wh..wh.aufs", b"y"))
    yield _confined("whiteout device", entry(b"gone", b"", CHAR))
    yield _confined("file over whiteout device", entry(b"x", b"", CHAR), entry(b"x", b"1"))
    yield _refused("hard link to a mark", entry(b".wh.x"), entry(b"y", b"", HARD, link=b".wh.x"))
    yield _refused("hard link to the deleted", entry(b".wh.x"), entry(b"y", b"", HARD, link=b"x"))
    yield _refused("hard link to metadata", entry(b"y", b"", HARD, link=b".wh..wh.plnk/1.2"))
    yield _confined(
        "mark as a hard link", entry(b".wh.x"), entry(b".wh.y", b"", HARD, link=b".wh.x")
    )


# --- links ----------------------------------------------------------------------------------------


def _targets(outside: bytes) -> tuple[bytes, ...]:
    return (
        outside,
        b"/" + outside,
        b"../outside",
        b"../outside/",
        b"./../outside/.",
        b"..",
        b"../..",
        b"/",
        b"/proc/self/root" + outside,
        b"/proc/self/cwd",
        b"/proc/self/fd/0",
        b"/proc/thread-self/root",
        b"../" * 40 + outside[1:],
        b"a/../../outside",
        b"l",
        b"missing/../../outside",
    )


def _uses(via: bytes) -> dict[str, bytes]:
    """Ways of changing something through the directory *via*."""
    return {
        "new file": entry(via + b"/new", b"evil"),
        "file over file": entry(via + b"/kept", b"evil"),
        "directory": entry(via + b"/dir", b"", DIR, mode=0o777),
        "directory itself": entry(via + b"/", b"", DIR, mode=0o777, uid=7, mtime=5),
        "directory itself, dot": entry(via + b"/.", b"", DIR, mode=0o777),
        "symlink": entry(via + b"/link", b"", SYM, link=b"x"),
        "symlink over file": entry(via + b"/kept", b"", SYM, link=b"x"),
        "fifo": entry(via + b"/fifo", b"", FIFO),
        "device": entry(via + b"/null", b"", CHAR, major=1, minor=3),
        "deletion": entry(via + b"/.wh.kept"),
        "opaque": entry(via + b"/.wh..wh..opq"),
        "whiteout device": entry(via + b"/kept", b"", CHAR),
        "hard link in": entry(b"mine", b"1") + entry(via + b"/hard", b"", HARD, link=b"mine"),
        "hard link out": entry(b"stolen", b"", HARD, link=via + b"/kept"),
        "deeper": entry(via + b"/dir/deep/file", b"evil"),
        "attributes": pax({b"SCHILY.xattr.user.evil": b"1"}) + entry(via, b"", DIR, mode=0o777),
        "onto the link": entry(via, b"evil"),
        "up again": entry(via + b"/../outside/kept", b"evil"),
    }


def through_links(outside: bytes) -> Iterator[Hostile]:
    """A symbolic link first, then something through it."""
    for target in _targets(outside):
        link = pax({b"linkpath": target}) + entry(b"l", b"", SYM)
        for use, members in _uses(b"l").items():
            yield _either(f"through {target[-40:]!r} {len(target)}: {use}", link, members)
    for use, members in _uses(b"a/b/c").items():
        chain = entry(b"a", b"", SYM, link=b"x"), entry(b"x/b", b"", SYM, link=b"../y")
        last = entry(b"y/c", b"", SYM, link=b"../../outside")
        yield _either(f"chain of links: {use}", *chain, last, members)
    for use, members in _uses(b"hard").items():
        link = entry(b"l", b"", SYM, link=b"../outside")
        hard = entry(b"hard", b"", HARD, link=b"l")
        yield _either(f"hard link to a symlink: {use}", link, hard, members)
    loop = entry(b"p", b"", SYM, link=b"q"), entry(b"q", b"", SYM, link=b"p")
    yield _refused("loop of two", *loop, entry(b"p/x", b"evil"))
    long = [entry(b"l%d" % n, b"", SYM, link=b"l%d" % (n + 1)) for n in range(60)]
    yield _refused("chain of sixty", *long, entry(b"l0/x", b"evil"))
    fan = [entry(b"f%d" % n, b"", SYM, link=(b"f%d/" % (n + 1)) * 8) for n in range(30)]
    yield _either("links that multiply", *fan, entry(b"f0/x", b"evil"))


def hard_links(outside: bytes) -> Iterator[Hostile]:
    """Hard links to what is not a file of the layer."""
    targets = (
        outside + b"/kept",
        b"../outside/kept",
        b"/../outside/kept",
        b"a/../../outside/kept",
        b"/etc/passwd",
        b"/proc/self/environ",
        b"..",
        b".",
        b"/",
        b"",
        b"missing",
        b"missing/file",
        b"file/below",
        b"x" * 300,
    )
    for target in targets:
        how = {
            "header": entry(b"h", b"", HARD, link=target),
            "pax": pax({b"linkpath": target}) + entry(b"h", b"", HARD, link=b"file"),
            "gnu": gnu_long(target, b"K") + entry(b"h", b"", HARD, link=b"file", magic=GNU),
        }
        if not target:
            del how["pax"], how["gnu"]  # an empty record takes the header's word back
        if len(target) > 100:
            del how["header"]
        for name, member in how.items():
            yield _refused(f"hard link to {target[:40]!r} {name}", entry(b"file", b"1"), member)
            after = entry(b"h", b"evil")
            yield _refused(f"hard link to {target[:40]!r} {name}, then written", member, after)
    yield _refused(
        "hard link to a directory", entry(b"d", b"", DIR), entry(b"h", b"", HARD, link=b"d")
    )
    yield _confined("hard link to itself", entry(b"f", b"1"), entry(b"f", b"", HARD, link=b"f"))
    yield _refused(
        "hard link over its parent", entry(b"d/f", b"1"), entry(b"d", b"", HARD, link=b"d/f")
    )
    yield _confined(
        "hard link with a size",
        entry(b"f", b"12345"),
        header(b"h", HARD, link=b"f", size=5),
        entry(b"g", b"1"),
    )
    for use, members in _uses(b"h").items():
        link = entry(b"l", b"", SYM, link=outside)
        yield _either(
            f"hard link of a link out: {use}", link, entry(b"h", b"", HARD, link=b"l"), members
        )


def replaced(outside: bytes) -> Iterator[Hostile]:
    """Directories that turn into links while the archive is read, and the other way round."""
    turn = entry(b"d", b"", SYM, link=b"../outside")
    before = {
        "described": entry(b"d", b"", DIR, mode=0o777, uid=7, mtime=5),
        "passed through": entry(b"d/first", b"1"),
        "with marks": entry(b"d/.wh.x") + entry(b"d/.wh..wh..opq"),
        "deep": entry(b"d/e/f/g", b"1") + entry(b"d/e/", b"", DIR, mode=0o700),
        "with a default list": pax({b"SCHILY.acl.default": b"user::rwx,group::rwx,other::rwx"})
        + entry(b"d", b"", DIR),
    }
    for what, first in before.items():
        yield _confined(f"directory {what}, then a link", first, turn)
        for use, members in _uses(b"d").items():
            yield _either(f"directory {what}, then a link: {use}", first, turn, members)
        yield _confined(f"directory {what}, link, directory", first, turn, first)
        yield _confined(f"directory {what}, then a file", first, entry(b"d", b"file"))
        yield _refused(
            f"directory {what}, file, through it", first, entry(b"d", b"1"), entry(b"d/x")
        )
    yield _confined("link, then a directory over it", turn, entry(b"d", b"", DIR, mode=0o777))
    kinds = [entry(b"x", data, kind, link=link) for kind, data, link in KINDS.values()]
    for i, first in enumerate(kinds):
        for j, second in enumerate(kinds):
            if 4 not in (i, j):
                yield _confined(f"kind {i} then kind {j} of one name", first, second)
    yield _confined("file five times", *[entry(b"f", b"%d" % n) for n in range(5)])


# --- what a member says of itself -----------------------------------------------------------------

FORGED = (
    "opaque",
    "redirect",
    "metacopy",
    "whiteout",
    "origin",
    "impure",
    "protattr",
    "upper",
    "nlink",
)


def attributes() -> Iterator[Hostile]:
    """Extended attributes and access lists."""
    for space in ("trusted", "user"):
        for suffix in (*FORGED, "", "overlay.opaque"):
            key = f"SCHILY.xattr.{space}.overlay.{suffix}".encode()
            for value in (b"y", b"/../../outside", b""):
                yield _either(f"forged {key!r}={value!r}", pax({key: value}), entry(b"d", b"", DIR))
                yield _either(f"forged {key!r}={value!r} on a file", pax({key: value}), entry(b"f"))
    for key in (
        b"",
        b"user.",
        b"user",
        b"nonsense",
        b"system.posix_acl_access",
        b"security.capability",
    ):
        for value in (b"", b"x", b"\xff" * 20, b"\x02\0\0\0" + b"\xff" * 8):
            record_ = pax({b"SCHILY.xattr." + key: value})
            yield _either(f"attribute {key!r}={value[:4]!r}", record_, entry(b"f", b"1"))
    yield _refused("attribute without a name", pax({b"SCHILY.xattr.": b"1"}), entry(b"f"))
    yield _refused("zero byte in a key", pax({b"SCHILY.xattr.user.a\0b": b"1"}), entry(b"f"))
    yield _refused("key of 300", pax({b"SCHILY.xattr.user." + b"k" * 300: b"1"}), entry(b"f"))
    yield _refused("value of 100000", pax({b"SCHILY.xattr.user.v": bytes(100_000)}), entry(b"f"))
    yield _confined("another system's", pax({b"SCHILY.xattr.com.apple.x": b"1"}), entry(b"f"))
    yield _refused("no base 64", pax({b"LIBARCHIVE.xattr.user.a": b"!!!"}), entry(b"f"))
    for text in (
        b"x",
        b"user",
        b"user::rwz",
        b"user:root:rwx",
        b"other:5:r--",
        b"::",
        b"user:99999999999:r",
    ):
        yield _refused(f"access list {text!r}", pax({b"SCHILY.acl.access": text}), entry(b"f"))


def numbers() -> Iterator[Hostile]:
    """Fields that should be numbers."""
    for field in ("size", "mode", "uid", "gid", "mtime"):
        for value in (
            b"99999999",
            b"0x12",
            b"-1",
            b"+7",
            b"1_0",
            b"0o7",
            b"nonsense",
            b"7 7",
            b"\xc0",
        ):
            member = entry(b"f", b"", **{field: value})
            yield _either(f"{field} is {value!r}", member)
        for number in (-1, -(1 << 40), 1 << 62, (1 << 56) - 1):
            wide = 12 if field in ("size", "mtime") else 8
            raw = (number % (1 << 8 * wide)) | (0 if number < 0 else 0x80 << 8 * (wide - 1))
            data = (raw % (1 << 8 * wide)).to_bytes(wide, "big")
            yield _either(f"{field} is {number} in base 256", entry(b"f", b"", **{field: data}))
    for size in (-1, -512, -(1 << 63)):
        yield _refused(f"size {size}", header(b"f", size=octal(size, 12)), entry(b"g", b"1"))
    for key in (b"size", b"uid", b"gid", b"mtime"):
        for value in (b"-1", b"x", b"1e9", b" 5", b"9" * 30, b"0x10", b"1" * 500, b"4294967295"):
            yield _either(f"pax {key!r} is {value!r}", pax({key: value}), entry(b"f"))
    yield _refused("owner that means nobody", pax({b"uid": b"4294967295"}), entry(b"f"))
    for major, minor in ((1 << 20, 0), (0, 1 << 20), (-1, 0), (4095, (1 << 20) - 1)):
        fields = {"major": octal(major, 8), "minor": octal(minor, 8)}
        yield _either(f"device {major}:{minor}", entry(b"dev", b"", BLOCK, **fields))
    for check in (b"", b"0", b"777777", b"nonsense", b"\xff" * 8):
        yield _refused(f"checksum {check!r}", header(b"f", checksum=check))
    for kind in [bytes([n]) for n in range(256) if bytes([n]) not in b"\x0001234567gxXLKSDVM"]:
        yield _refused(f"type {kind!r}", entry(b"f", b"data", kind))
    yield _refused("continued volume", entry(b"f", b"data", b"M", magic=GNU))


def extended() -> Iterator[Hostile]:
    """Extended headers that do not keep their own rules."""
    broken = (
        b"x",
        b"5",
        b"5 ",
        b"0 a=b\n",
        b"1 a=b\n",
        b"6 a=b\n",
        b"7 a=b\n",
        b"60 a=b\n",
        b"999999999999999 a=b\n",
        b"6 a=bX",
        b"6  =b\n",
        b"5 =b\n",
        b"6 a:b\n",
        b"-6 a=b\n",
        b"06 a=b\n",
        b" 6 a=b\n",
        b"6 a=b\n6 a=",
        b"\0\0\0\0",
        b"\xff" * 20,
    )
    for data in broken:
        for kind in (b"x", b"g", b"X"):
            yield _either(f"records {data!r} in {kind!r}", pax(data, kind), entry(b"f", b"1"))
    for kind in (b"x", b"g", b"L", b"K", b"X"):
        yield _refused(
            f"nothing after {kind!r}", entry(b"h", record(b"a", b"b"), kind), entry(b"f", kind=b"?")
        )
        yield Hostile(f"end after {kind!r}", archive(entry(b"h", record(b"a", b"b"), kind)))
        yield _refused(f"size of {kind!r} is huge", header(b"h", kind, size=1 << 40), entry(b"f"))
        yield _refused(f"size of {kind!r} is negative", header(b"h", kind, size=octal(-1, 12)))
        many = entry(b"h", record(b"a", b"b"), kind) * 200
        small = Limits(entries_max=10)
        yield _refused(f"two hundred {kind!r}", many, entry(b"f"), limits=small)
    grows = pax({b"comment": b"x" * 60_000}, b"g") * 30
    yield _refused("global headers that add up", grows, entry(b"f"))
    yield _confined("nothing but a volume label", entry(b"label", b"", b"V", magic=GNU))
    yield _confined("dump directory", entry(b"d/", b"Yfile\0\0", b"D", magic=GNU))


def _old_sparse(
    pieces: list[tuple[int, int]], real: int, data: bytes, more: bytes = b"\0"
) -> bytes:
    block = bytearray(header(b"s", b"S", size=len(data), magic=GNU))
    for at, (offset, length) in enumerate(pieces[:4]):
        block[386 + 24 * at : 410 + 24 * at] = octal(offset, 12) + octal(length, 12)
    block[482:483] = more
    block[483:495] = octal(real, 12)
    return sealed(bytes(block)) + data + bytes(-len(data) % 512)


def _sparse_1_0(text: bytes, real: bytes, data: bytes = b"") -> bytes:
    records = {
        b"GNU.sparse.major": b"1",
        b"GNU.sparse.minor": b"0",
        b"GNU.sparse.name": b"s",
        b"GNU.sparse.realsize": real,
    }
    text += bytes(-len(text) % 512)
    return pax(records) + entry(b"GNUSparseFile.0/s", text + data)


def sparse() -> Iterator[Hostile]:
    """Maps of sparse files."""
    maps: dict[str, list[tuple[int, int]]] = {
        "overlap": [(0, 512), (256, 512)],
        "backwards": [(4096, 512), (0, 512)],
        "beyond": [(1 << 20, 512), (1 << 20, 512)],
        "too little": [(0, 100)],
        "too much": [(0, 5000)],
        "huge offset": [((1 << 33) - 1, 1024)],
    }
    for what, pieces in maps.items():
        data = bytes(1024)
        yield _refused(f"old sparse: {what}", _old_sparse(pieces, 4096, data))
        flat = b",".join(b"%d,%d" % piece for piece in pieces)
        keys = {b"GNU.sparse.size": b"4096", b"GNU.sparse.map": flat}
        yield _refused(f"sparse 0.1: {what}", pax(keys), entry(b"s", data))
        pairs = [(b"GNU.sparse.size", b"4096")]
        for offset, length in pieces:
            pairs += [
                (b"GNU.sparse.offset", b"%d" % offset),
                (b"GNU.sparse.numbytes", b"%d" % length),
            ]
        yield _refused(f"sparse 0.0: {what}", pax(pairs), entry(b"s", data))
        text = b"%d\n" % len(pieces) + b"".join(b"%d\n%d\n" % piece for piece in pieces)
        yield _refused(f"sparse 1.0: {what}", _sparse_1_0(text, b"4096", data))
    for text in (
        b"",
        b"x\n",
        b"-1\n",
        b"99999999999\n0\n0\n",
        b"1\n0\n",
        b"1\nx\n0\n",
        b"1 0 0",
        b"9" * 400,
    ):
        yield _refused(f"sparse 1.0 map {text[:20]!r}", _sparse_1_0(text, b"4096"))
    for real in (b"-1", b"x", b"", b"9" * 25):
        yield _either(f"sparse 1.0 of size {real!r}", _sparse_1_0(b"0\n", real))
    leaving = {
        b"GNU.sparse.name": b"../outside/kept",
        b"GNU.sparse.size": b"4",
        b"GNU.sparse.map": b"0,4",
    }
    yield _refused("sparse name that leaves", pax(leaving), entry(b"innocent", b"evil"))
    yield _refused("old sparse without an end", _old_sparse([(0, 512)], 512, b"", b"\1") * 3)
    yield _refused("old sparse of star", entry(b"s", b"data", b"S"))
    newer = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"7", b"GNU.sparse.realsize": b"1"}
    yield _refused("sparse version", pax(newer), entry(b"s", bytes(512)))


# --- too much -------------------------------------------------------------------------------------


def bombs() -> Iterator[Hostile]:
    """Small archives that ask for much."""
    small = Limits(
        bytes_max=100_000, entries_max=50, path_bytes_max=200, header_bytes_max=2000, depth_max=20
    )
    files = [entry(b"f%d" % n) for n in range(51)]
    yield _refused("entries", *files, limits=small)
    links = [entry(b"l%d" % n, b"", HARD, link=b"f0") for n in range(51)]
    yield _refused("hard links", files[0], *links, limits=small)
    yield _refused("the same file again and again", *[files[0]] * 60, limits=small)
    yield _refused(
        "directories on the way", *[entry(b"%d/a/b/c/d/e" % n) for n in range(20)], limits=small
    )
    yield _refused("depth", entry(b"a/" * 21 + b"f"), limits=small)
    yield _refused("path", pax({b"path": b"a" * 201}), entry(b"f"), limits=small)
    yield _refused("bytes in one file", entry(b"f", bytes(100_001)), limits=small)
    yield _refused(
        "bytes in many files", *[entry(b"%d" % n, bytes(30_000)) for n in range(4)], limits=small
    )
    yield _refused("a claim", header(b"f", size=1 << 50), limits=small)
    yield _refused("holes", _sparse_1_0(b"0\n", b"%d" % (1 << 60)), limits=small)
    yield _refused("old holes", _old_sparse([], (1 << 32), b""), limits=small)
    pieces = b",".join([b"0,0"] * 1000)
    lots = pax({b"GNU.sparse.size": b"1", b"GNU.sparse.map": pieces})
    yield _refused("pieces", lots, entry(b"s"), limits=small)
    text = b"5000\n" + b"0\n0\n" * 5000
    yield _refused("pieces before data", _sparse_1_0(text, b"1"), limits=small)
    yield _refused("header", pax({b"comment": b"x" * 2001}), entry(b"f"), limits=small)
    yield _refused("gnu name", gnu_long(b"x" * 2001), entry(b"f", magic=GNU), limits=small)
    xattrs = pax({b"SCHILY.xattr.user.%d" % n: b"v" * 90 for n in range(30)})
    yield _refused("attributes", xattrs, entry(b"f"), limits=small)
    cut = Limits(bytes_max=1000, entries_max=5)
    yield Hostile("zeros without end", archive(entry(b"f")) + bytes(70 << 20), Outcome.REFUSED, cut)
    deep = [entry(b"/".join([b"d"] * n) + b"/", b"", DIR) for n in (500, 1024)]
    yield _confined("a thousand deep", *deep, entry(b"/".join([b"d"] * 1024), b"file instead"))


def ends() -> Iterator[Hostile]:
    """Streams that do not end as they should."""
    good = entry(b"f", b"data")
    whole = good + END
    for name, data in {
        "empty stream": b"",
        "one byte": b"\0",
        "no end": good,
        "half a block of zeros": good + bytes(256),
        "garbage only": b"\x7fELF" + bytes(range(256)) * 20,
        "text": b"this is no archive\n" * 100,
        "garbage after the end": whole + b"x",
        "garbage far after the end": whole + bytes(10_000) + b"x",
        "archive after the end": whole + whole,
        "garbage between the zeros": good + bytes(512) + b"x" * 512,
        "member between the zeros": good + bytes(512) + whole,
        "gzip": b"\x1f\x8b\x08" + bytes(600),
        "zip": b"PK\x03\x04" + bytes(600),
        "cpio": b"070701" + b"0" * 600,
    }.items():
        yield Hostile(name, data, Outcome.REFUSED)
    for name, data in {
        "one block of zeros": good + bytes(512),
        "nothing": END,
        "padded to a record": whole + bytes(10_240),
        "padded oddly": whole + bytes(77),
    }.items():
        yield Hostile(name, data, Outcome.CONFINED)


def _sample() -> bytes:
    """A small archive with a bit of everything."""
    return archive(
        entry(b"./", b"", DIR, mode=0o755),
        entry(b"d/", b"", DIR, mode=0o750),
        pax({b"mtime": b"5.25", b"SCHILY.xattr.user.k": b"v"}),
        entry(b"d/file", b"content " * 100),
        entry(b"d/link", b"", SYM, link=b"file"),
        entry(b"hard", b"", HARD, link=b"d/file"),
        gnu_long(b"long/" + b"n" * 120),
        entry(b"long", b"x", magic=GNU),
        _old_sparse([(4096, 512)], 8192, b"s" * 512),
        _sparse_1_0(b"1\n4096\n512\n", b"8192", b"t" * 512),
        entry(b"d/.wh.gone"),
    )


def truncated() -> Iterator[Hostile]:
    """A good archive, cut."""
    data = _sample()
    for cut in range(0, len(data) - 1024, 512):
        yield Hostile(f"cut at {cut}", data[:cut], Outcome.REFUSED)
        for more in (1, 100, 511):
            yield Hostile(f"cut at {cut + more}", data[: cut + more], Outcome.REFUSED)


def flipped() -> Iterator[Hostile]:
    """One bit of a header wrong: as an accident, and with the checksum put right again."""
    before, after = entry(b"a", b"1"), entry(b"z", b"2")
    block = header(b"dir/../name", link=b"../t", prefix=b"p/q", size=3)
    for at in range(512):
        for bit in (0, 6):
            wrong = bytearray(block)
            wrong[at] ^= 1 << bit
            yield _either(
                f"bit {bit} of byte {at}", before, bytes(wrong), b"abc".ljust(512, b"\0"), after
            )
            again = sealed(bytes(wrong))
            if again != block:
                yield _either(
                    f"bit {bit} of byte {at}, sealed",
                    before,
                    again,
                    b"abc".ljust(512, b"\0"),
                    after,
                )
    records = record(b"mtime", b"5.5") + record(b"path", b"some/where") + record(b"size", b"3")
    for at in range(len(records)):
        for new in (b"\0", b"\n", b"=", b" ", b"9", b"/"):
            data = records[:at] + new + records[at + 1 :]
            yield _either(f"record byte {at} is {new!r}", pax(data), entry(b"f", b"abc"))

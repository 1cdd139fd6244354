"""Tar archives from raw parts, well formed or not, without the code under test.

``entry(b"name", b"data")`` is one member; keyword arguments set any field of the header, also to
nonsense. ``pax({b"path": b"x"})`` is an extended header. ``archive(*parts)`` adds the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

END = bytes(1024)


def octal(value: int | bytes, width: int) -> bytes:
    """A numeric field; bytes are taken as they are."""
    if isinstance(value, bytes):
        return value.ljust(width, b"\0")[:width]
    if value < 0 or value >= 8 ** (width - 1):
        return (value % (1 << 8 * width) | (0 if value < 0 else 0x80 << 8 * (width - 1))).to_bytes(
            width, "big"
        )
    return b"%0*o\0" % (width - 1, value)


def pad(data: bytes) -> bytes:
    """*data* up to a whole number of blocks."""
    return data + bytes(-len(data) % 512)


def sealed(block: bytes) -> bytes:
    """*block* with the checksum that it ought to have."""
    total = sum(block[:148]) + sum(block[156:]) + 256
    return block[:148] + b"%06o\0 " % total + block[156:]


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int | bytes = 0,
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 1_000_000,
    link: bytes = b"",
    major: int | bytes = 0,
    minor: int | bytes = 0,
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    """One header block."""
    block = b"".join(
        (
            name.ljust(100, b"\0")[:100],
            octal(mode, 8),
            octal(uid, 8),
            octal(gid, 8),
            octal(size, 12),
            octal(mtime, 12),
            bytes(8),
            kind,
            link.ljust(100, b"\0")[:100],
            magic.ljust(8, b"\0"),
            bytes(64),
            octal(major, 8),
            octal(minor, 8),
            prefix.ljust(167, b"\0")[:167],
        )
    )
    if checksum is not None:
        return block[:148] + checksum.ljust(8, b"\0") + block[156:]
    return sealed(block)


def entry(name: bytes, data: bytes = b"", kind: bytes = b"0", **fields: int | bytes) -> bytes:
    """A header and its data."""
    fields.setdefault("size", len(data))
    return header(name, kind, **fields) + pad(data)  # type: ignore[arg-type]


def record(key: bytes, value: bytes) -> bytes:
    """One PAX record with the right length."""
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total = length + len(str(total))
    return b"%d %b=%b\n" % (total, key, value)


def pax(
    records: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]] | bytes, kind: bytes = b"x"
) -> bytes:
    """An extended header; bytes are taken as its content as they are."""
    if not isinstance(records, bytes):
        items = records.items() if isinstance(records, Mapping) else records
        records = b"".join(record(key, value) for key, value in items)
    return entry(b"PaxHeaders/x", records, kind)


def gnu_long(name: bytes, kind: bytes = b"L") -> bytes:
    """A GNU long name, or long link name with *kind* K."""
    return entry(b"././@LongLink", name + b"\0", kind, magic=b"ustar  \0")


def archive(*parts: bytes) -> bytes:
    """All *parts* and the blocks of zeros that end an archive."""
    return b"".join(parts) + END

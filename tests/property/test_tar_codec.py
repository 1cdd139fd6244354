"""What the codec writes it reads as the same; what it is given at random it answers in words."""

from __future__ import annotations

import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs2.archive import acltext, pax, sparse, tar
from unionfs2.archive.compress import GZIP, NONE, ZSTD, compressor, kind_of, open_compressed
from unionfs2.archive.digest import Readable, StreamHash
from unionfs2.archive.members import MemberReader
from unionfs2.archive.source import Input
from unionfs2.archive.writer import find_pieces
from unionfs2.errors import ArchiveError
from unionfs2.storemodel import Limits

names = st.binary(min_size=1, max_size=300).filter(
    lambda n: b"\0" not in n and not n.startswith(b"/") and not n.endswith(b"/")
)


def _is_a_sentence(exc: Exception) -> None:
    assert str(exc)
    assert str(exc).isprintable()


@given(
    name=names,
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 8**7 - 1),
    size=st.integers(0, 8**11 - 1),
    mtime=st.integers(0, 8**11 - 1),
    link=st.binary(max_size=100).filter(lambda n: b"\0" not in n),
)
def test_a_header_comes_back(
    name: bytes, mode: int, uid: int, size: int, mtime: int, link: bytes
) -> None:
    new = tar.NewHeader(name, b"0", mode, uid, 7, size, mtime, link, 3, 4)
    block = tar.build_header(new)
    assert len(block) == 512
    found = tar.parse_header(block)
    assert found is not None
    if tar.split_name(name) is not None:
        assert found.name == name
    said = (found.mode, found.uid, found.gid, found.size, found.mtime, found.link)
    assert said == (mode, uid, 7, size, mtime, link)
    assert found.ustar


@given(st.integers(-(1 << 80), 1 << 80), st.sampled_from([8, 12]))
def test_numbers_in_base_256(number: int, width: int) -> None:
    bits = 8 * width - 2
    number %= 1 << bits
    field = (number | 0x80 << 8 * (width - 1)).to_bytes(width, "big")
    assert tar.parse_number(field, "x") == number
    negative = (-number - 1) % (1 << 8 * width)
    assert tar.parse_number(negative.to_bytes(width, "big"), "x") == -number - 1


@given(st.binary(min_size=512, max_size=512).filter(any))
def test_any_block_is_a_header_or_an_error(block: bytes) -> None:
    with pytest.raises(ArchiveError):
        tar.parse_header(block)
    fixed = block[:148] + b"%06o\0 " % tar.checksum(block) + block[156:]
    try:
        header = tar.parse_header(fixed)
    except ArchiveError as exc:
        _is_a_sentence(exc)
    else:
        assert header is not None


keys = st.binary(min_size=1, max_size=40).filter(lambda k: b"=" not in k)


@given(st.lists(st.tuples(keys, st.binary(max_size=2000))))
def test_records_come_back(records: list[pax.Record]) -> None:
    assert list(pax.parse_records(pax.build_records(records))) == records


@given(st.integers(900, 1100), st.integers(0, 20))
def test_a_record_counts_the_digits_of_its_length(size: int, key: int) -> None:
    data = pax.build_record(b"k" * (key + 1), b"v" * size)
    assert int(data.partition(b" ")[0]) == len(data)


@given(st.binary(max_size=300))
def test_any_records_are_read_or_refused(data: bytes) -> None:
    try:
        assert all(key for key, _ in pax.parse_records(data))
    except ArchiveError as exc:
        _is_a_sentence(exc)


@given(st.binary(min_size=1, max_size=60))
def test_names_of_attributes_come_back(name: bytes) -> None:
    key = pax.xattr_key(name)
    assert b"=" not in key
    assert pax.xattr_name(key) == name


@given(st.integers(-(10**27), 10**27))
def test_times_come_back(ns: int) -> None:
    if abs(ns) <= tar.SECONDS_MAX * 10**9:
        assert pax.parse_time(pax.build_time(ns), b"mtime") == ns


entries = st.tuples(st.integers(0, 7), st.integers(0, 0xFFFFFFFE))


@given(st.lists(entries, max_size=5), st.lists(entries, max_size=5), st.integers(0, 0o7777))
def test_access_lists_come_back(
    users: list[tuple[int, int]], groups: list[tuple[int, int]], bits: int
) -> None:
    text = b"user::rwx\ngroup::r-x\nmask::rw-\nother::---\n"
    for word, items in ((b"user", users), (b"group", groups)):
        for perm, who in items:
            letters = bytes(
                c if perm & b else ord("-") for c, b in zip(b"rwx", (4, 2, 1), strict=True)
            )
            text += b"%b:%d:%b\n" % (word, who, letters)
    value = acltext.parse(text)
    assert acltext.parse(acltext.build(value)) == value
    assert sorted(acltext.build(value).split()) == sorted(text.split())
    moved = acltext.mapped(value, lambda n: n ^ 1, lambda n: n ^ 1)
    assert acltext.mapped(moved, lambda n: n ^ 1, lambda n: n ^ 1) == value


@given(st.binary(max_size=200))
def test_any_access_list_is_read_or_refused(text: bytes) -> None:
    try:
        acltext.build(acltext.parse(text))
    except ArchiveError as exc:
        _is_a_sentence(exc)


maps = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=60)


def _pieces(steps: list[tuple[int, int]]) -> tuple[list[sparse.Piece], int]:
    at = 0
    pieces = []
    for gap, length in steps:
        at += gap * sparse.GRAIN
        pieces.append((at, length * sparse.GRAIN))
        at += length * sparse.GRAIN
    return pieces, at


@given(maps)
def test_maps_come_back(steps: list[tuple[int, int]]) -> None:
    pieces, size = _pieces(steps)
    text = sparse.build_map(pieces)
    reader = sparse.MapText()
    found = None
    for at in range(0, len(text), 512):
        assert found is None
        found = reader.feed(text[at : at + 512])
    assert found == pieces
    assert sparse.check(pieces, size, sum(length for _, length in pieces)) == pieces


def test_a_map_of_too_many_pieces_becomes_coarser() -> None:
    pieces = [(n * 8192, 4096) for n in range(100_000)]
    size = pieces[-1][0] + 5000
    coarse = sparse.coarsen(pieces, size)
    assert len(coarse) <= sparse.PIECES_MAX
    assert sparse.coarsen(coarse, size) == coarse
    covered = sum(length for _, length in coarse)
    assert covered >= sum(length for _, length in pieces)
    assert sum(coarse[-1]) <= size


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([b"", b"x", bytes(7)])), max_size=8))
def test_holes_are_found_by_content(places: list[tuple[int, bytes]]) -> None:
    size = 31 * sparse.GRAIN + 5
    fd = os.memfd_create("holes")
    try:
        os.ftruncate(fd, size)
        for grain, data in places:
            os.pwrite(fd, data, grain * sparse.GRAIN + 17)
        pieces = find_pieces(fd, size)
        content = os.pread(fd, size, 0)
    finally:
        os.close(fd)
    assert pieces is not None
    full = {at // 4096 for at, byte in enumerate(content) if byte}
    said = [range(offset // 4096, -(-(offset + length) // 4096)) for offset, length in pieces]
    assert full == {grain for piece in said for grain in piece}
    rest = bytearray(content)
    for offset, length in pieces:
        rest[offset : offset + length] = bytes(length)
    assert not any(rest)


@given(st.binary(max_size=3000), st.integers(1, 700))
def test_any_stream_ends_in_members_or_an_error(data: bytes, step: int) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(step)

    hashed = StreamHash()
    kept: list[bytes] = []
    source = Input(Slow(data), hashed, keep=kept.append)
    reader = MemberReader(source, Limits())
    try:
        while (member := reader.next()) is not None:
            kept.extend(map(bytes, source.content(member.stored)))
    except ArchiveError as exc:
        _is_a_sentence(exc)
    else:
        assert b"".join(kept) == data


def _drain(reader: Readable, step: int) -> bytes:
    return b"".join(iter(lambda: reader.read(step), b""))


@given(
    st.sampled_from([NONE, GZIP, ZSTD]),
    st.lists(st.binary(max_size=5000), max_size=5),
    st.integers(1, 4000),
    st.data(),
)
def test_compressed_streams_come_back(
    kind: str, parts: list[bytes], step: int, data: st.DataObject
) -> None:
    def compressed() -> bytes:
        out = io.BytesIO()
        with compressor(kind, out) as writer:
            for part in parts:
                writer.write(part)
        assert writer.size == len(out.getvalue())
        return out.getvalue()

    whole = b"".join(parts)
    packed = compressed()
    assert packed == compressed()
    if kind == NONE:
        assert packed == whole
        return
    assert kind_of(packed) == kind
    for stream in (packed, packed + packed):
        reader, found = open_compressed(io.BytesIO(stream))
        assert found == kind
        assert _drain(reader, step) == whole * (len(stream) // len(packed))
    cut = data.draw(st.integers(6, len(packed) - 1))
    reader, _ = open_compressed(io.BytesIO(packed[:cut]))
    with pytest.raises(ArchiveError, match="cut short"):
        _drain(reader, step)


def test_a_bomb_is_met_in_portions() -> None:
    for kind in (GZIP, ZSTD):
        out = io.BytesIO()
        with compressor(kind, out) as writer:
            for _ in range(256):
                writer.write(bytes(1 << 20))
        assert len(out.getvalue()) < 1 << 20
        reader, _ = open_compressed(io.BytesIO(out.getvalue()))
        assert len(reader.read(1 << 16)) == 1 << 16
        assert max(len(getattr(reader, "_ready", b"")), 0) <= 1 << 20

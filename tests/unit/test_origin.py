"""The handle of the object that a copy came from: bytes both ways, and bytes nobody wrote."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.unions import Unions, trusted_only
from unionfs2 import ondisk, origin
from unionfs2 import syscalls as sc
from unionfs2.syscalls import FileId

UUID = bytes(range(16))
EXT4 = FileId(1, b"\x15\x00\x00\x00\x99\xaa\xbb\xcc")
NATIVE = 0x01 if sys.byteorder == "big" else 0x00
FOREIGN = NATIVE ^ 0x01


def test_the_bytes_that_the_kernel_writes() -> None:
    raw = origin.encode(UUID, EXT4)
    assert raw == bytes((0, 0xFB, 29, NATIVE, 1)) + UUID + EXT4.fid


def test_a_file_system_without_a_uuid() -> None:
    assert origin.encode(None, EXT4)[5:21] == bytes(16)


@settings(database=None, deadline=None)
@given(
    st.binary(min_size=16, max_size=16), st.integers(0, 255), st.binary(min_size=1, max_size=128)
)
def test_round_trip(uuid: bytes, kind: int, fid: bytes) -> None:
    handle = FileId(kind, fid)
    assert origin.decode(origin.encode(uuid, handle)) == (uuid, handle)


@settings(database=None, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_read_without_harm(raw: bytes) -> None:
    found = origin.decode(raw)
    if found is not None:
        assert raw.startswith(bytes((0, 0xFB)))
        assert found[1].fid == raw[21 : raw[2]]


@pytest.mark.parametrize("length", range(30))
def test_truncated(length: int) -> None:
    raw = origin.encode(UUID, EXT4)
    assert (origin.decode(raw[:length]) is not None) == (length == 29)


@pytest.mark.parametrize(
    ("position", "value", "known"),
    [
        (0, 1, False),  # version
        (1, 0xFA, False),  # magic
        (2, 21, False),  # nothing behind the header
        (2, 28, True),  # a shorter fid
        (2, 30, False),  # longer than what is there
        (3, FOREIGN, False),
        (3, FOREIGN | 0x02, True),  # any endian
        (3, NATIVE | 0x04, True),  # of an upper object
        (3, NATIVE | 0x08, False),  # a flag of the future
    ],
)
def test_each_byte_of_the_header(position: int, value: int, known: bool) -> None:
    raw = bytearray(origin.encode(UUID, EXT4))
    raw[position] = value
    assert (origin.decode(bytes(raw)) is not None) == known


@trusted_only
def test_an_object_is_found_by_its_handle(unions: Unions) -> None:
    u = unions({"d": {"f": "x"}})
    lower = u.fs.stack.lowers[0]
    at = u.sh.dir("d").lowers[0].at()
    raw = origin.of_object(lower, b"f", at)
    found = origin.resolve(raw, u.fs.stack.lowers)
    assert found is not None
    assert found[0].st_ino == (u.lowers[0] / "d/f").stat().st_ino
    assert found[1] is lower
    (u.lowers[0] / "d/f").unlink()
    assert origin.resolve(raw, u.fs.stack.lowers) is None


@trusted_only
def test_a_handle_of_another_file_system_is_not_tried(unions: Unions) -> None:
    u = unions({"f": "x"})
    stack = u.fs.stack
    raw = bytearray(origin.of_object(stack.lowers[0], b"f", stack.lowers[0].root_fd))
    assert origin.resolve(bytes(raw), stack.lowers) is not None
    raw[5] ^= 0xFF
    assert origin.resolve(bytes(raw), stack.lowers) is None


def test_no_handles_no_origin(unions: Unions) -> None:
    """Where handles cannot be opened the kernel writes an empty value, too."""
    u = unions({"f": "x"})
    branch = u.fs.stack.lowers[0]
    branch.identity = branch.identity._replace(handle_fd=-1)
    assert origin.of_object(branch, b"f", branch.root_fd) == b""
    u.sh.chmod("f", 0o600)
    assert u.marks("f") == {"origin": b""}


def test_an_object_that_is_gone_has_no_handle(unions: Unions) -> None:
    branch = unions({}).fs.stack.lowers[0]
    assert origin.of_object(branch, b"missing", branch.root_fd) == b""


@trusted_only
def test_the_kernel_agrees_on_the_handle(unions: Unions, tmp_path: Path) -> None:
    """What name_to_handle_at(2) says is what is stored behind the header."""
    u = unions({"f": "x"})
    u.sh.chmod("f", 0o600)
    raw = u.marks("f")["origin"]
    decoded = origin.decode(raw)
    assert decoded is not None
    fd = os.open(u.lowers[0], os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert decoded[1] == sc.name_to_handle(b"f", fd)
        assert decoded[0] == (sc.fs_uuid(fd) or ondisk.UUID_NULL)
    finally:
        os.close(fd)

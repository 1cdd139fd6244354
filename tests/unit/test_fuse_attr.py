"""Attributes into pyfuse3's objects: the quick way, the slow way, and an unknown layout."""

from __future__ import annotations

import ctypes
import logging
import os
import stat
import struct
from typing import Any

import pyfuse3
import pytest

from unionfs2 import fuse_attr
from unionfs2.fuse_attr import AttrWriter

_PROBE = struct.Struct("=Q")


def stat_of(*, size: int = 1 << 40) -> os.stat_result:
    times = (1_700_000_000_123_456_789, 1_600_000_000_987_654_321, -1_500_000_001)
    head = (stat.S_IFREG | 0o4755, 1 << 60, 5, 77, 4_294_967_295, 4_294_967_294, size)
    seconds = tuple(ns // 10**9 for ns in times)
    return os.stat_result(
        (*head, *seconds, *(ns / 1e9 for ns in times), *times, 4096, 1 << 33, 259)
    )


NAMES = (
    "mode",
    "uid",
    "gid",
    "rdev",
    "size",
    "blksize",
    "blocks",
    "atime_ns",
    "mtime_ns",
    "ctime_ns",
)


@pytest.fixture(params=["quick", "slow"])
def writer(request: pytest.FixtureRequest) -> AttrWriter:
    writer = AttrWriter(pyfuse3.EntryAttributes, 3600.5)
    if request.param == "slow":
        writer._fast = False
    elif not writer._fast:
        pytest.skip("this pyfuse3 has another layout")
    return writer


def shown_ino(entry: Any) -> int:
    """The second number, which has no property: where the kernel would read it."""
    start, ino_at = fuse_attr._find_layout(type(entry))
    assert start >= 0
    raw = ctypes.string_at(id(entry) + ino_at, 8)
    return int(_PROBE.unpack(raw)[0])


def test_all_fields_arrive(writer: AttrWriter) -> None:
    st = stat_of()
    entry = writer.entry(21, 1 << 59, 3, st)
    assert {n: getattr(entry, f"st_{n}") for n in NAMES} == {
        n: getattr(st, f"st_{n}") for n in NAMES
    }
    assert (entry.st_ino, entry.st_nlink, entry.generation) == (21, 3, 0)
    assert (entry.entry_timeout, entry.attr_timeout) == (3600.5, 3600.5)
    assert shown_ino(entry) == 1 << 59


def test_objects_do_not_share_their_fields(writer: AttrWriter) -> None:
    one, other = writer.entry(1, 11, 1, stat_of()), writer.entry(2, 12, 2, stat_of(size=5))
    assert (one.st_ino, one.st_nlink, one.st_size) == (1, 1, 1 << 40)
    assert (other.st_ino, other.st_nlink, other.st_size) == (2, 2, 5)
    assert (shown_ino(one), shown_ino(other)) == (11, 12)


def test_a_name_of_a_listing(writer: AttrWriter) -> None:
    entry = writer.name_only(99, stat.S_IFDIR)
    assert (entry.st_ino, entry.st_mode, shown_ino(entry)) == (0, stat.S_IFDIR, 99)


def test_a_missing_name(writer: AttrWriter) -> None:
    entry = writer.negative()
    assert (entry.st_ino, entry.entry_timeout) == (0, 3600.5)


def test_this_pyfuse3_keeps_inode_numbers() -> None:
    """If this fails, st_ino changes with every mount: the layout has to be learnt anew."""
    assert AttrWriter(pyfuse3.EntryAttributes, 1.0).keeps_inode_numbers


class Unknown:
    """An object of whose memory nothing is known, with the same properties."""

    def __init__(self) -> None:
        self.__dict__.update(dict.fromkeys(("st_ino", "generation"), 0))

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value


def test_an_unknown_layout_is_filled_through_properties(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        writer = AttrWriter(Unknown, 5.0)
    assert not writer.keeps_inode_numbers
    assert len(caplog.records) == 1
    st = stat_of()
    entry = writer.entry(21, 1 << 59, 3, st)
    assert {n: getattr(entry, f"st_{n}") for n in NAMES} == {
        n: getattr(st, f"st_{n}") for n in NAMES
    }
    assert (entry.st_ino, entry.st_nlink, entry.entry_timeout) == (21, 3, 5.0)
    assert writer.name_only(99, stat.S_IFDIR).st_ino == 0
    assert writer.negative().st_ino == 0


@pytest.mark.parametrize("spoilt", range(13))
def test_the_quick_way_is_taken_only_when_all_reads_back(
    monkeypatch: pytest.MonkeyPatch, spoilt: int
) -> None:
    """Two fields changed over: the probe notices, whichever they are."""
    real = fuse_attr._X86_64

    class Spoilt:
        size = real.size

        @staticmethod
        def pack_into(buffer: Any, offset: int, *values: Any) -> None:
            changed = list(values)
            # Skips the two fields that no property shows: generation and st_ino.
            shown = [0, *range(4, 12), 12, 14, 16, 18]
            changed[shown[spoilt]] += 1
            real.pack_into(buffer, offset, *changed)

    monkeypatch.setattr(fuse_attr, "_X86_64", Spoilt)
    writer = AttrWriter(pyfuse3.EntryAttributes, 5.0)
    assert not writer._fast
    assert writer.keeps_inode_numbers
    assert writer.entry(21, 22, 3, stat_of()).st_size == 1 << 40


def test_an_object_too_small_for_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_attr, "_X86_64", struct.Struct("=200Q"))
    assert not AttrWriter(pyfuse3.EntryAttributes, 5.0)._fast

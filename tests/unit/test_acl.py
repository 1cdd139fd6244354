"""What an object made in the work directory inherits, against what the file system does itself."""

from __future__ import annotations

import itertools
import os
import stat
import struct
from pathlib import Path

import pytest

from unionfs2.acl import inherit

Entry = tuple[int, int, int]
NOBODY = 0xFFFFFFFF
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32

MINIMAL = [(USER_OBJ, 7), (GROUP_OBJ, 5), (OTHER, 1)]
EXTENDED = [(USER_OBJ, 6), (USER, 7), (GROUP_OBJ, 7), (MASK, 6), (OTHER, 4)]
WITH_GROUP = [(USER_OBJ, 7), (GROUP_OBJ, 1), (GROUP, 7), (MASK, 7), (OTHER, 0)]


def pack(entries: list[tuple[int, int]]) -> bytes:
    ids = {USER: 1, GROUP: 1}
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, perm, ids.get(tag, NOBODY)) for tag, perm in entries
    )


@pytest.mark.needs("acl")
@pytest.mark.parametrize("entries", [MINIMAL, EXTENDED, WITH_GROUP])
@pytest.mark.parametrize("mode", [0o777, 0o640, 0o000, 0o4711, 0o066])
@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFDIR])
def test_the_file_system_agrees(
    tmp_path: Path, entries: list[tuple[int, int]], mode: int, kind: int
) -> None:
    default = pack(entries)
    os.setxattr(tmp_path, "system.posix_acl_default", default)
    made = tmp_path / "made"
    if kind == stat.S_IFDIR:
        made.mkdir(mode & 0o777)
        mode &= 0o777
    else:
        os.mknod(made, kind | mode)
    ours = inherit(default, kind | mode)
    assert ours.mode == made.stat().st_mode
    try:
        theirs = os.getxattr(made, "system.posix_acl_access")
    except OSError:
        theirs = None
    assert ours.access == theirs


def test_type_and_special_bits_pass() -> None:
    for kind, special in itertools.product((stat.S_IFREG, stat.S_IFIFO), (0o4000, 0o1000)):
        assert inherit(pack(MINIMAL), kind | special | 0o777).mode == kind | special | 0o751


def test_a_plain_list_needs_no_attribute() -> None:
    assert inherit(pack(MINIMAL), 0o777).access is None
    assert inherit(pack(EXTENDED), 0o777).access is not None

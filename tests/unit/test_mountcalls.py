from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs2 import mountcalls
from unionfs2.mountcalls import find_mount, parse_mountinfo, super_option, super_option_all

OVERLAY = (
    rb"45 27 0:39 / /tmp/m\040y\012 rw,nodev,relatime shared:7 master:1 - overlay un\040ion "
    rb"rw,lowerdir+=/a\054:\134x,lowerdir+=/b,upperdir=/u,workdir=/w,uuid=on"
)
ROOT = b"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard"


def test_one_line_of_mountinfo() -> None:
    (entry,) = parse_mountinfo(OVERLAY + b"\n")
    assert entry.mount_id == 45
    assert entry.parent_id == 27
    assert entry.device == os.makedev(0, 39)
    assert entry.target == b"/tmp/m y\n"
    assert entry.options == (b"rw", b"nodev", b"relatime")
    assert (entry.fstype, entry.source) == (b"overlay", b"un ion")
    assert super_option_all(entry, b"lowerdir+") == [b"/a,:\\x", b"/b"]
    assert super_option(entry, b"upperdir") == b"/u"
    assert super_option(entry, b"index") is None


def test_order_is_kept_and_empty_sources_are_read() -> None:
    text = ROOT + b"\n" + OVERLAY + b"\n" + b"46 45 0:40 / /e rw -  tmpfs  rw\n"
    assert [entry.mount_id for entry in parse_mountinfo(text)] == [27, 45, 46]


@given(st.binary(min_size=1, max_size=30))
def test_octal_escapes_are_undone(path: bytes) -> None:
    escaped = b"".join(b"\\%03o" % c if c in b" \t\n\\" else bytes((c,)) for c in path)
    assert mountcalls.unescape_octal(escaped) == path


def test_this_machine_has_a_root() -> None:
    entry = find_mount(b"/")
    assert entry is not None
    assert entry.target == b"/"
    assert find_mount(b"/there/is/no/such/mount") is None


def test_errors_carry_errno_and_name(tmp_path: Path) -> None:
    target = os.fsencode(tmp_path / "missing")
    with pytest.raises(OSError, match="missing") as caught:
        mountcalls.umount(target)
    # ENOENT from the path walk, EPERM where the right to unmount is asked first.
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)
    with pytest.raises(OSError, match="nofs") as caught:
        mountcalls.fsopen(b"nofs")
    assert caught.value.errno in (errno.ENODEV, errno.EPERM)

"""What a copy-up changes about the directory it happens in, besides its restored times."""

from __future__ import annotations

import os

from tests.semantics.rig import Rig


def test_ctime_of_the_parent_follows_a_copy_up(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    (rig.top / "d").mkdir()
    (rig.lower / "d/file").touch()
    merged = rig.mount()
    before = (merged / "d").stat()
    (merged / "d/file").chmod(0o600)
    after = (merged / "d").stat()
    assert after.st_mtime_ns == before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns
    assert after.st_ctime_ns == (rig.top / "d").stat().st_ctime_ns


def test_size_of_the_parent_follows_a_copy_up_of_a_directory(rig: Rig) -> None:
    tmpfs = rig.base / "tmpfs"
    tmpfs.mkdir()
    rig.mount_tmpfs(tmpfs)
    rig.upper, rig.work = tmpfs / "upper", tmpfs / "work"
    for directory in (rig.upper, rig.work):
        directory.mkdir()
    (rig.lower / "d").mkdir()
    (rig.lower / "d/file").touch()
    merged = rig.mount()
    assert os.stat(merged).st_size == rig.top.stat().st_size
    (merged / "d/file").chmod(0o600)
    assert os.stat(merged).st_size == rig.top.stat().st_size
    rig.unmount()

"""Inode numbers, link counts and statfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.semantics.rig import FUSE, NATIVE, Rig


def _build(rig: Rig) -> None:
    (rig.lower / "d/e").mkdir(parents=True)
    (rig.lower / "d/file").write_text("below")
    (rig.lower / "d/symlink").symlink_to("file")
    os.mkfifo(rig.lower / "d/fifo")
    (rig.top / "pure/sub").mkdir(parents=True)
    (rig.top / "pure/file").write_text("above")


def _numbers(merged: Path) -> dict[str, int]:
    """Inode number of every object by its path; the root is ''."""
    found = {"": os.lstat(merged).st_ino}
    for directory, directories, files in os.walk(merged):
        for name in (*directories, *files):
            path = Path(directory) / name
            found[os.fspath(path.relative_to(merged))] = os.lstat(path).st_ino
    return found


def _copy_everything_up(merged: Path) -> None:
    for directory, directories, files in os.walk(merged):
        for name in (*directories, *files):
            os.chown(Path(directory) / name, 7, 7, follow_symlinks=False)


def test_inode_number_is_stable_through_copy_up(rig: Rig) -> None:
    _build(rig)
    merged = rig.mount()
    before = _numbers(merged)
    _copy_everything_up(merged)
    assert (rig.top / "d/e").exists()
    assert _numbers(merged) == before


def test_inode_number_is_stable_over_a_remount(rig: Rig) -> None:
    _build(rig)
    merged = rig.mount()
    before = _numbers(merged)
    rig.remount()
    assert _numbers(merged) == before


def test_inode_number_is_stable_over_copy_up_and_remount(rig: Rig) -> None:
    _build(rig)
    merged = rig.mount()
    before = _numbers(merged)
    _copy_everything_up(merged)
    rig.remount()
    assert _numbers(merged) == before


def test_inode_number_follows_a_rename(rig: Rig) -> None:
    _build(rig)
    merged = rig.mount()
    before = _numbers(merged)
    (merged / "d/file").rename(merged / "moved")
    (merged / "pure").rename(merged / "d/pure")
    for _ in range(2):
        after = _numbers(merged)
        assert after["moved"] == before["d/file"]
        assert after["d/pure"] == before["pure"]
        assert after["d/pure/file"] == before["pure/file"]
        rig.remount()


@pytest.mark.parametrize(("first", "second"), [(NATIVE, FUSE), (FUSE, NATIVE)])
def test_inode_numbers_are_the_same_by_fuse_and_by_the_kernel(
    both: Rig, first: str, second: str
) -> None:
    _build(both)
    merged = both.mount(backend=first)
    before = _numbers(merged)
    both.remount(backend=second)
    assert _numbers(merged) == before
    _copy_everything_up(merged)
    (merged / "d/file").rename(merged / "d/moved")
    before["d/moved"] = before.pop("d/file")
    both.remount(backend=first)
    assert _numbers(merged) == before


def test_all_objects_are_on_one_device(rig: Rig) -> None:
    _build(rig)
    merged = rig.mount()
    paths = [merged, *merged.rglob("*")]
    device = os.lstat(merged).st_dev
    assert {os.lstat(path).st_dev for path in paths if not path.is_dir()} == {device}
    assert {os.lstat(path).st_dev for path in paths if path.is_dir()} == {device}


def test_different_files_have_different_numbers(rig: Rig) -> None:
    _build(rig)
    numbers = _numbers(rig.mount())
    assert len(set(numbers.values())) == len(numbers)


def test_link_counts_of_directories(rig: Rig) -> None:
    """A merged directory has 1 (its subdirectories are not counted), a plain one its own."""
    _build(rig)
    merged = rig.mount()
    assert os.lstat(merged).st_nlink == 1
    assert os.lstat(merged / "d").st_nlink == 3  # in one lower only
    assert os.lstat(merged / "pure").st_nlink == 3
    (merged / "d/e/new").mkdir()
    assert os.lstat(merged / "d").st_nlink == 1
    assert os.lstat(merged / "d/e").st_nlink == 1
    assert os.lstat(merged / "d/e/new").st_nlink == 2
    (merged / "pure/another").mkdir()
    assert os.lstat(merged / "pure").st_nlink == 4
    rig.remount()
    assert os.lstat(merged / "d").st_nlink == 1
    assert os.lstat(merged / "pure").st_nlink == 4


def test_link_counts_of_files(rig: Rig) -> None:
    (rig.lower / "one").touch()
    (rig.lower / "two").touch()
    os.link(rig.lower / "two", rig.lower / "two again")
    merged = rig.mount()
    assert os.lstat(merged / "one").st_nlink == 1
    assert os.lstat(merged / "two").st_nlink == 2
    os.link(merged / "one", merged / "one again")
    assert os.lstat(merged / "one").st_nlink == 2
    (merged / "two").chmod(0o600)
    assert os.lstat(merged / "two").st_nlink == 1
    assert os.lstat(merged / "two again").st_nlink == 2


def test_statfs_is_that_of_the_upper(rig: Rig) -> None:
    merged = rig.mount()
    ours, theirs = os.statvfs(merged), os.statvfs(rig.top)
    for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(ours, field) == getattr(theirs, field), field
    # other programs use the file system meanwhile
    for field in ("f_bfree", "f_bavail", "f_ffree"):
        assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=0.05), field


def test_statfs_of_a_small_upper_shows_it_full(rig: Rig) -> None:
    rig.use_small_upper()
    merged = rig.mount()
    before = os.statvfs(merged)
    assert before.f_blocks * before.f_frsize == 1 << 20
    (merged / "data").write_bytes(bytes(512 << 10))
    after = os.statvfs(merged)
    assert (before.f_bfree - after.f_bfree) * after.f_frsize == 512 << 10
    with pytest.raises(OSError, match="No space"):
        (merged / "more").write_bytes(bytes(1 << 20))


def test_times_are_kept_to_the_nanosecond(rig: Rig) -> None:
    (rig.lower / "f").touch()
    os.utime(rig.lower / "f", ns=(1_111_111_111_123_456_789, 1_222_222_222_987_654_321))
    merged = rig.mount() / "f"
    assert merged.stat().st_mtime_ns == 1_222_222_222_987_654_321
    merged.chmod(0o600)
    assert merged.stat().st_mtime_ns == 1_222_222_222_987_654_321
    assert merged.stat().st_atime_ns == 1_111_111_111_123_456_789
    os.utime(merged, ns=(1, 999_999_999))
    assert merged.stat().st_mtime_ns == 999_999_999
    assert (rig.top / "f").stat().st_atime_ns == 1

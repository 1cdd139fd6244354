"""Rename with all flags."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.semantics.rig import Rig
from tests.semantics.system import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    is_whiteout,
    renameat2,
)


def _errno(old: Path, new: Path, flags: int = 0) -> int:
    with pytest.raises(OSError) as refused:  # noqa: PT011  # the errno is what the test compares
        renameat2(old, new, flags)
    assert refused.value.errno is not None
    return refused.value.errno


def test_rename_replaces_and_hides_the_old_name(rig: Rig) -> None:
    for name in ("a", "b"):
        (rig.lower / name).write_text(name)
    merged = rig.mount()
    (merged / "a").rename(merged / "b")
    assert os.listdir(merged) == ["b"]
    assert (merged / "b").read_text() == "a"
    assert is_whiteout(rig.top / "a")
    rig.remount()
    assert os.listdir(merged) == ["b"]


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_noreplace_refuses_an_existing_name(rig: Rig, where: str) -> None:
    tree = rig.lower if where == "lower" else rig.top
    for name in ("a", "b"):
        (tree / name).write_text(name)
    merged = rig.mount()
    assert _errno(merged / "a", merged / "b", RENAME_NOREPLACE) == errno.EEXIST
    assert (merged / "b").read_text() == "b"
    renameat2(merged / "a", merged / "c", RENAME_NOREPLACE)
    assert (merged / "c").read_text() == "a"


def test_noreplace_onto_a_deleted_name_works(rig: Rig) -> None:
    for name in ("a", "b"):
        (rig.lower / name).write_text(name)
    merged = rig.mount()
    (merged / "b").unlink()
    renameat2(merged / "a", merged / "b", RENAME_NOREPLACE)
    assert (merged / "b").read_text() == "a"
    assert os.listdir(merged) == ["b"]


def test_exchange_swaps_two_files(rig: Rig) -> None:
    (rig.lower / "a").write_text("a")
    (rig.top / "b").write_text("b")
    merged = rig.mount()
    numbers = (merged / "a").stat().st_ino, (merged / "b").stat().st_ino
    renameat2(merged / "a", merged / "b", RENAME_EXCHANGE)
    assert ((merged / "a").read_text(), (merged / "b").read_text()) == ("b", "a")
    assert ((merged / "b").stat().st_ino, (merged / "a").stat().st_ino) == numbers
    assert not [path for path in rig.top.iterdir() if is_whiteout(path)]


def test_exchange_swaps_a_file_and_a_pure_directory(rig: Rig) -> None:
    (rig.lower / "file").write_text("file")
    (rig.top / "directory").mkdir()
    (rig.top / "directory/inside").touch()
    merged = rig.mount()
    renameat2(merged / "file", merged / "directory", RENAME_EXCHANGE)
    assert (merged / "directory").read_text() == "file"
    assert os.listdir(merged / "file") == ["inside"]
    rig.remount()
    assert os.listdir(merged / "file") == ["inside"]


def test_exchange_needs_both_names(rig: Rig) -> None:
    (rig.lower / "a").touch()
    (rig.lower / "deleted").touch()
    merged = rig.mount()
    (merged / "deleted").unlink()
    assert _errno(merged / "a", merged / "missing", RENAME_EXCHANGE) == errno.ENOENT
    assert _errno(merged / "a", merged / "deleted", RENAME_EXCHANGE) == errno.ENOENT


@pytest.mark.parametrize(
    "flags",
    [
        RENAME_WHITEOUT,
        RENAME_NOREPLACE | RENAME_EXCHANGE,
        RENAME_WHITEOUT | RENAME_EXCHANGE,
        8,
    ],
)
def test_whiteout_and_meaningless_flags_are_refused(rig: Rig, flags: int) -> None:
    (rig.lower / "a").touch()
    (rig.lower / "b").touch()
    merged = rig.mount()
    assert _errno(merged / "a", merged / "b", flags) == errno.EINVAL
    assert sorted(os.listdir(merged)) == ["a", "b"]


def test_whiteout_flag_is_refused_onto_a_free_name_too(rig: Rig) -> None:
    (rig.lower / "a").touch()
    merged = rig.mount()
    for flags in (RENAME_WHITEOUT, RENAME_WHITEOUT | RENAME_NOREPLACE):
        assert _errno(merged / "a", merged / "free", flags) == errno.EINVAL
    assert os.listdir(merged) == ["a"]


def test_directory_with_a_lower_part_gives_exdev(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    (rig.top / "pure").mkdir()
    merged = rig.mount()
    assert _errno(merged / "d", merged / "e") == errno.EXDEV
    assert _errno(merged / "d", merged / "pure", RENAME_EXCHANGE) == errno.EXDEV
    renameat2(merged / "pure", merged / "moved", 0)
    assert sorted(os.listdir(merged)) == ["d", "moved"]


def test_pure_directory_onto_a_deleted_one_hides_its_content(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    (rig.lower / "d/old").touch()
    merged = rig.mount()
    (merged / "d/old").unlink()
    (merged / "d").rmdir()
    (merged / "new").mkdir()
    (merged / "new/inside").touch()
    (merged / "new").rename(merged / "d")
    assert os.listdir(merged / "d") == ["inside"]
    rig.remount()
    assert os.listdir(merged / "d") == ["inside"]


def test_directory_onto_a_full_one_and_types_that_do_not_match(rig: Rig) -> None:
    (rig.lower / "full").mkdir()
    (rig.lower / "full/x").touch()
    (rig.lower / "file").touch()
    merged = rig.mount()
    (merged / "d").mkdir()
    assert _errno(merged / "d", merged / "full") == errno.ENOTEMPTY
    assert _errno(merged / "d", merged / "file") == errno.ENOTDIR
    assert _errno(merged / "file", merged / "d") == errno.EISDIR
    assert _errno(merged / "d", merged / "d/inside") == errno.EINVAL
    assert _errno(merged / "full", merged / "full/inside") in (errno.EINVAL, errno.EXDEV)


def test_directory_onto_a_merged_one_that_looks_empty(rig: Rig) -> None:
    (rig.lower / "emptied").mkdir()
    (rig.lower / "emptied/x").touch()
    merged = rig.mount()
    (merged / "emptied/x").unlink()
    (merged / "d").mkdir()
    (merged / "d/inside").touch()
    (merged / "d").rename(merged / "emptied")
    assert os.listdir(merged / "emptied") == ["inside"]
    rig.remount()
    assert os.listdir(merged / "emptied") == ["inside"]


def test_rename_of_one_hard_link_onto_the_other_changes_nothing(rig: Rig) -> None:
    merged = rig.mount()
    (merged / "a").write_text("a")
    os.link(merged / "a", merged / "b")
    (merged / "a").rename(merged / "b")
    assert sorted(os.listdir(merged)) == ["a", "b"]


def test_special_files_and_symlinks_are_renamed(rig: Rig) -> None:
    os.mkfifo(rig.lower / "fifo")
    (rig.lower / "symlink").symlink_to("x")
    os.mknod(rig.lower / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    merged = rig.mount()
    for name in ("fifo", "symlink", "null"):
        before = os.lstat(merged / name)
        (merged / name).rename(merged / f"{name}2")
        after = os.lstat(merged / f"{name}2")
        assert (before.st_mode, before.st_ino, before.st_rdev) == (
            after.st_mode,
            after.st_ino,
            after.st_rdev,
        )


def test_rename_across_directories_of_different_origin(rig: Rig) -> None:
    (rig.lower / "below").mkdir()
    (rig.lower / "below/file").write_text("x")
    (rig.top / "pure").mkdir()
    merged = rig.mount()
    (merged / "below/file").rename(merged / "pure/file")
    (merged / "pure/file").rename(merged / "below/back")
    assert os.listdir(merged / "below") == ["back"]
    assert os.listdir(merged / "pure") == []
    rig.remount()
    assert (merged / "below/back").read_text() == "x"


def test_a_replaced_directory_keeps_its_numbers_for_its_holder(rig: Rig) -> None:
    (rig.lower / "old").mkdir()
    (rig.lower / "old" / "x").write_text("x")
    merged = rig.mount()
    (merged / "new").mkdir()
    (merged / "old" / "x").unlink()
    fd = os.open(merged / "old", os.O_RDONLY)
    try:
        before = os.fstat(fd)
        (merged / "new").rename(merged / "old")
        after = os.fstat(fd)
        assert (after.st_ino, after.st_nlink) == (before.st_ino, 1)
        assert os.stat(merged / "old").st_ino != after.st_ino
    finally:
        os.close(fd)
    assert os.listdir(merged / "old") == []

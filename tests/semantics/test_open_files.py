"""Open files: unlinked, renamed, copied up by somebody else in between."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.semantics.callers import as_caller
from tests.semantics.rig import Rig


@pytest.fixture(params=["lower", "upper"])
def file(request: pytest.FixtureRequest, rig: Rig) -> Path:
    """A file of the lower or of the upper, in a directory with it."""
    tree = rig.lower if request.param == "lower" else rig.top
    (tree / "d").mkdir()
    (tree / "d/file").write_bytes(b"old content")
    return rig.mount() / "d/file"


def test_open_but_unlinked_file_is_still_read(file: Path) -> None:
    with file.open("rb") as reader:
        file.unlink()
        assert not file.exists()
        assert reader.read() == b"old content"
        assert os.fstat(reader.fileno()).st_size == 11


def test_open_but_unlinked_file_is_still_written(file: Path) -> None:
    with file.open("r+b", buffering=0) as handle:
        file.unlink()
        handle.seek(0, os.SEEK_END)
        handle.write(b" and more")
        handle.seek(0)
        assert handle.read() == b"old content and more"
        handle.truncate(3)
        assert os.fstat(handle.fileno()).st_size == 3
        os.fsync(handle.fileno())


def test_open_but_unlinked_written_file_has_no_links(file: Path) -> None:
    with file.open("r+b", buffering=0) as handle:
        handle.write(b"w")  # before, known difference "copy-up-at-first-write"
        os.fsync(handle.fileno())  # which the kernel may hold back
        file.unlink()
        assert os.fstat(handle.fileno()).st_nlink == 0


def test_created_and_unlinked_file_takes_metadata_changes(rig: Rig) -> None:
    merged = rig.mount()
    fd = os.open(merged / "temporary", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        (merged / "temporary").unlink()
        os.fchmod(fd, 0o640)
        os.fchown(fd, 7, 8)
        os.utime(fd, ns=(1, 2))
        os.setxattr(fd, "user.note", b"here")
        found = os.fstat(fd)
        assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o640, 7, 8)
        assert found.st_mtime_ns == 2
        assert os.getxattr(fd, "user.note") == b"here"
    finally:
        os.close(fd)


def test_unlinked_name_can_be_made_again_and_is_another_file(file: Path) -> None:
    with file.open("r+b", buffering=0) as old:
        file.unlink()
        file.write_bytes(b"new")
        old.write(b"OLD")
        old.seek(0)
        assert old.read() == b"OLD content"
        assert file.read_bytes() == b"new"
        assert os.fstat(old.fileno()).st_ino != file.stat().st_ino


def test_space_of_an_unlinked_file_is_freed_at_close(rig: Rig) -> None:
    merged = rig.mount()
    with (merged / "big").open("wb") as handle:
        handle.write(bytes(1 << 20))
        (merged / "big").unlink()
    assert not list(rig.top.iterdir())
    left = [path for path in rig.work.rglob("*") if path.is_file() and path.stat().st_size]
    assert not left


def test_open_but_renamed_file_is_read_and_written_under_its_new_name(file: Path) -> None:
    new = file.with_name("renamed")
    with file.open("r+b", buffering=0) as handle:
        file.rename(new)
        handle.write(b"OLD")
        assert new.read_bytes() == b"OLD content"
        assert os.fstat(handle.fileno()).st_ino == new.stat().st_ino


def test_file_opened_read_only_and_renamed_sees_writes_under_its_new_name(file: Path) -> None:
    new = file.with_name("renamed")
    with file.open("rb", buffering=0) as reader:
        file.rename(new)
        with new.open("r+b") as writer:
            writer.write(b"NEW")
        assert reader.read() == b"NEW content"


def test_open_file_replaced_by_a_rename_keeps_its_content(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"replacement")
    with file.open("r+b", buffering=0) as handle:
        other.rename(file)
        assert handle.read() == b"old content"
        handle.write(b"!")
        assert file.read_bytes() == b"replacement"


def _rename_away(path: Path) -> None:
    path.rename(path.with_name("moved"))


@pytest.mark.parametrize("vanish", [Path.unlink, _rename_away], ids=["unlinked", "renamed"])
def test_reader_follows_a_copy_up_by_another_handle_and_then_a_vanished_name(
    file: Path, vanish: Callable[[Path], None]
) -> None:
    with file.open("rb", buffering=0) as reader:
        with file.open("r+b") as writer:
            writer.write(b"NEW")
        vanish(file)
        assert reader.read() == b"NEW content"
        assert os.fstat(reader.fileno()).st_size == 11


def test_writer_of_an_unlinked_file_is_seen_by_a_reader_opened_before_the_copy_up(
    file: Path,
) -> None:
    with file.open("rb", buffering=0) as reader, file.open("r+b", buffering=0) as writer:
        file.unlink()
        writer.write(b"NEW")
        assert reader.read() == b"NEW content"


@pytest.mark.parametrize("read_before", [False, True], ids=["not-yet-read", "already-read"])
def test_descriptor_opened_read_only_before_copy_up_sees_later_writes(
    file: Path, read_before: bool
) -> None:
    with file.open("rb", buffering=0) as reader:
        if read_before:
            assert reader.read() == b"old content"
        with file.open("r+b", buffering=0) as writer:
            writer.write(b"NEW")
            assert os.pread(reader.fileno(), 100, 0) == b"NEW content"
            writer.truncate(3)
            assert os.pread(reader.fileno(), 100, 0) == b"NEW"
            assert os.fstat(reader.fileno()).st_size == 3
        assert os.pread(reader.fileno(), 100, 0) == b"NEW"


def test_descriptor_opened_read_only_before_copy_up_sees_metadata_changes(file: Path) -> None:
    with file.open("rb") as reader:
        file.chmod(0o600)
        os.utime(file, ns=(5, 6))
        found = os.fstat(reader.fileno())
        assert found.st_mode & 0o777 == 0o600
        assert found.st_mtime_ns == 6
        os.fchmod(reader.fileno(), 0o644)
        assert file.stat().st_mode & 0o777 == 0o644


def test_descriptor_of_another_process_sees_writes_after_copy_up(file: Path) -> None:
    with file.open("rb", buffering=0) as reader:
        file.chmod(0o666)
        as_caller(lambda: file.write_bytes(b"by alice"))
        assert reader.read() == b"by alice"


def test_many_descriptors_before_copy_up_all_see_the_write(file: Path) -> None:
    readers = [os.open(file, os.O_RDONLY) for _ in range(20)]
    try:
        file.write_bytes(b"new")
        assert {os.pread(reader, 100, 0) for reader in readers} == {b"new"}
    finally:
        for reader in readers:
            os.close(reader)


def test_removed_directory_is_still_usable_by_its_descriptor(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    merged = rig.mount() / "d"
    fd = os.open(merged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        merged.rmdir()
        assert os.listdir(fd) == []
        with pytest.raises(FileNotFoundError):
            os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    finally:
        os.close(fd)


def test_directory_renamed_while_open_is_the_same_directory(rig: Rig) -> None:
    (rig.top / "d").mkdir()
    merged = rig.mount()
    fd = os.open(merged / "d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (merged / "d").rename(merged / "e")
        os.close(os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        assert (merged / "e/new").exists()
    finally:
        os.close(fd)


def test_file_below_a_renamed_directory_stays_open(rig: Rig) -> None:
    (rig.top / "d").mkdir()
    (rig.top / "d/file").write_bytes(b"old")
    merged = rig.mount()
    with (merged / "d/file").open("r+b", buffering=0) as handle:
        (merged / "d").rename(merged / "e")
        handle.write(b"new")
        assert (merged / "e/file").read_bytes() == b"new"
        assert (merged / "e/file").stat().st_ino == os.fstat(handle.fileno()).st_ino

"""Hard links and symbolic links."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.semantics.rig import Rig
from tests.semantics.system import is_whiteout


@pytest.fixture(params=["lower", "upper"])
def file(request: pytest.FixtureRequest, rig: Rig) -> Path:
    tree = rig.lower if request.param == "lower" else rig.top
    (tree / "file").write_bytes(b"content")
    (rig.lower / "d").mkdir()
    return rig.mount() / "file"


def test_hard_link_is_the_same_file(file: Path) -> None:
    other = file.with_name("d") / "other"
    os.link(file, other)
    assert os.path.samestat(file.stat(), other.stat())
    assert file.stat().st_nlink == other.stat().st_nlink == 2


def test_write_through_one_link_is_seen_through_the_other(file: Path) -> None:
    other = file.with_name("other")
    os.link(file, other)
    with other.open("ab") as handle:
        handle.write(b" more")
    assert file.read_bytes() == b"content more"
    other.chmod(0o600)
    assert file.stat().st_mode & 0o777 == 0o600


def test_unlinking_one_link_leaves_the_other(file: Path) -> None:
    other = file.with_name("other")
    os.link(file, other)
    file.unlink()
    assert other.read_bytes() == b"content"
    assert other.stat().st_nlink == 1
    with pytest.raises(FileNotFoundError):
        file.stat()


def test_open_file_survives_as_its_other_link(file: Path) -> None:
    with file.open("r+b", buffering=0) as handle:
        os.link(file, file.with_name("other"))
        file.unlink()
        handle.write(b"C")
        assert file.with_name("other").read_bytes() == b"Content"
        assert os.fstat(handle.fileno()).st_nlink == 1


def test_links_are_kept_over_a_remount(rig: Rig) -> None:
    (rig.lower / "file").write_bytes(b"content")
    merged = rig.mount()
    os.link(merged / "file", merged / "other")
    rig.remount()
    assert os.path.samestat((merged / "file").stat(), (merged / "other").stat())
    assert (merged / "file").stat().st_nlink == 2


def test_link_over_a_whiteout(rig: Rig) -> None:
    (rig.lower / "gone").write_bytes(b"hidden")
    merged = rig.mount()
    (merged / "gone").unlink()
    (merged / "file").write_bytes(b"content")
    os.link(merged / "file", merged / "gone")
    assert (merged / "gone").read_bytes() == b"content"
    assert (merged / "gone").stat().st_nlink == 2


def test_link_to_an_existing_name_is_refused(file: Path) -> None:
    other = file.with_name("other")
    other.touch()
    with pytest.raises(FileExistsError):
        os.link(file, other)
    assert other.stat().st_size == 0


def test_link_of_a_directory_is_refused(file: Path) -> None:
    with pytest.raises(PermissionError) as refused:
        os.link(file.with_name("d"), file.with_name("e"))
    assert refused.value.errno == errno.EPERM


def test_lower_hard_links_part_at_copy_up(rig: Rig) -> None:
    (rig.lower / "a").write_bytes(b"content")
    os.link(rig.lower / "a", rig.lower / "b")
    merged = rig.mount()
    assert (merged / "a").stat().st_nlink == 2
    (merged / "a").write_bytes(b"changed")
    assert (merged / "b").read_bytes() == b"content"
    assert (merged / "a").stat().st_nlink == 1
    assert (merged / "b").stat().st_nlink == 2


def test_hard_link_of_a_symlink_and_of_a_fifo(rig: Rig) -> None:
    (rig.lower / "symlink").symlink_to("nowhere")
    os.mkfifo(rig.lower / "fifo")
    merged = rig.mount()
    for name in ("symlink", "fifo"):
        os.link(merged / name, merged / f"{name}2", follow_symlinks=False)
        first, second = os.lstat(merged / name), os.lstat(merged / f"{name}2")
        assert os.path.samestat(first, second)
        assert first.st_mode == second.st_mode
        assert first.st_nlink == 2


def test_symlink_target_is_any_bytes_and_up_to_a_page(rig: Rig) -> None:
    long = b"x" * 4095
    os.symlink(long, rig.lower / "long")
    merged = rig.mount()
    odd = b"a\nb\xff:,\\ c"
    os.symlink(odd, merged / "odd")
    os.symlink(long, merged / "long2")
    assert os.readlink(os.fsencode(merged / "odd")) == odd
    assert os.readlink(os.fsencode(merged / "long")) == long
    assert os.readlink(os.fsencode(merged / "long2")) == long
    assert os.lstat(merged / "odd").st_size == len(odd)


def test_symlink_metadata_changes_leave_the_target_alone(rig: Rig) -> None:
    (rig.lower / "file").write_text("")
    (rig.lower / "symlink").symlink_to("file")
    merged = rig.mount()
    os.chown(merged / "symlink", 7, 8, follow_symlinks=False)
    os.utime(merged / "symlink", ns=(1, 2), follow_symlinks=False)
    found = os.lstat(merged / "symlink")
    assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (7, 8, 2)
    assert os.stat(merged / "file").st_uid == 0
    assert os.readlink(merged / "symlink") == "file"


def test_an_unlinked_lower_file_cannot_be_linked(rig: Rig) -> None:
    (rig.lower / "a").write_text("a")
    merged = rig.mount()
    fd = os.open(merged / "a", os.O_RDONLY)
    try:
        (merged / "a").unlink()
        with pytest.raises(FileNotFoundError):
            # With a directory descriptor Python calls linkat(2), which can follow the link.
            os.link(f"/proc/self/fd/{fd}", merged / "b", src_dir_fd=fd, follow_symlinks=True)
    finally:
        os.close(fd)
    assert os.listdir(merged) == []
    assert is_whiteout(rig.top / "a")

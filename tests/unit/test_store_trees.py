"""Trees: walked, measured, copied and deleted, however deep, and never left."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tree import File, HardLink, Symlink, build
from unionfs2 import mountcalls, syscalls
from unionfs2.storecopy import copy_tree
from unionfs2.storefiles import (
    is_temp_name,
    read_file,
    temp_name,
    write_file_atomic,
)
from unionfs2.storemodel import Size
from unionfs2.storetrees import delete_tree, tree_size, walk

_DEPTH = 1500


@pytest.fixture
def here(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def _few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def make_deep(dir_fd: int, name: str) -> None:
    os.mkdir(name, dir_fd=dir_fd)
    fd = os.open(name, os.O_RDONLY, dir_fd=dir_fd)
    for _ in range(_DEPTH):
        os.mkdir("d", dir_fd=fd)
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        above, fd = fd, os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(above)
    os.close(fd)


@pytest.mark.usefixtures("_few_descriptors")
def test_depth_has_no_limit(here: int) -> None:
    make_deep(here, "deep")
    deep = os.open("deep", os.O_RDONLY, dir_fd=here)
    assert tree_size(deep) == Size(0, 2 * _DEPTH)
    os.mkdir("copy", dir_fd=here)
    copy = os.open("copy", os.O_RDONLY, dir_fd=here)
    copy_tree(deep, copy)
    assert tree_size(copy) == Size(0, 2 * _DEPTH)
    os.close(deep)
    os.close(copy)
    assert delete_tree(here, b"deep") == delete_tree(here, b"copy") == []
    assert os.listdir(here) == []


def test_a_walk_is_sorted_and_follows_no_link(here: int, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").touch()
    build(tmp_path / "in", {"b": {"c": ""}, "a": Symlink("../outside"), "d": ""})
    fd = os.open("in", os.O_RDONLY, dir_fd=here)
    assert [found.path for found in walk(fd)] == [b"a", b"b", b"b/c", b"d"]
    os.close(fd)
    assert delete_tree(here, b"in") == []
    assert (tmp_path / "outside" / "x").exists()


def test_sizes_count_every_inode_once(here: int, tmp_path: Path) -> None:
    build(
        tmp_path,
        {
            "a": "12345",
            "again": HardLink("a"),
            "hole": File(size=1000),
            "link": Symlink("a"),
            "dir": {"f": "1"},
        },
    )
    assert tree_size(here) == Size(5 + 1000 + 1, 5)


@pytest.mark.needs("root")
def test_a_mount_is_not_entered(here: int, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("x")
    (tmp_path / "tree" / "mnt").mkdir(parents=True)
    (tmp_path / "tree" / "f").touch()
    target = os.fsencode(tmp_path / "tree" / "mnt")
    mountcalls.mount(os.fsencode(tmp_path / "outside"), target, None, mountcalls.MS_BIND, b"")
    try:
        fd = os.open("tree", os.O_RDONLY, dir_fd=here)
        assert tree_size(fd) == Size(0, 2)
        os.close(fd)
        left = delete_tree(here, b"tree")
        assert left == [(b"tree/mnt", errno.EXDEV)]
        assert (tmp_path / "outside" / "precious").exists()
        assert os.listdir(tmp_path / "tree") == ["mnt"]
    finally:
        mountcalls.umount(target)
    assert delete_tree(here, b"tree") == []


@pytest.mark.needs("root")
def test_immutable_files_are_deleted(here: int, tmp_path: Path) -> None:
    (tmp_path / "tree" / "dir").mkdir(parents=True)
    (tmp_path / "tree" / "dir" / "f").touch()
    (tmp_path / "tree" / "empty").mkdir()
    for name in ("tree/dir/f", "tree/dir", "tree/empty", "tree"):
        fd = os.open(tmp_path / name, os.O_RDONLY)
        try:
            syscalls.set_inode_flags(fd, syscalls.FS_IMMUTABLE_FL)
        except OSError as exc:
            pytest.skip(f"no immutable files here: {exc}")
        finally:
            os.close(fd)
    assert delete_tree(here, b"tree") == []


def test_what_is_gone_is_deleted(here: int) -> None:
    assert delete_tree(here, b"nothing") == []


def test_a_file_is_replaced_whole(here: int, tmp_path: Path) -> None:
    write_file_atomic(here, b"f", b"old", 0o640)
    write_file_atomic(here, b"f", b"new", 0o640)
    assert read_file(here, b"f", 10) == b"new"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert os.listdir(here) == ["f"]


@pytest.mark.parametrize("name", ["link", "fifo", "directory", "long"])
def test_only_short_regular_files_are_read(here: int, tmp_path: Path, name: str) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "long").write_text("x" * 11)
    with pytest.raises(OSError, match=r"not a regular|levels of|too large"):
        read_file(here, os.fsencode(name), 10)


def test_temporary_names_are_known_again() -> None:
    assert is_temp_name(temp_name(b"layer.json"))
    for name in (b"layer.json", b".tmp", b"x.tmp", b"x.0123456789abcdeg.tmp"):
        assert not is_temp_name(name)

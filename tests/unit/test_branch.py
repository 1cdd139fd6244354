"""Real directories as descriptors: bounded in number, reopened at need, of any depth."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import probe
from tests.support.tree import Tree, build
from tests.support.unions import Union, Unions, open_fds
from unionfs2 import opening
from unionfs2 import syscalls as sc
from unionfs2.branch import Branch, FdCache, RealDir


@pytest.fixture
def lower(tmp_path: Path) -> Iterator[Branch]:
    """A branch with room for three descriptors."""
    build(tmp_path / "b", {f"d{n}": {"e": {"f": {}}} for n in range(8)})
    cache = FdCache(3)
    fd = os.open(tmp_path / "b", os.O_PATH | os.O_DIRECTORY)
    made = Branch(1, b"b", fd, cache, private=False)
    yield made
    cache.close_all()
    made.close()


def test_directories_open_at_the_first_use(lower: Branch) -> None:
    fds = open_fds()
    deep = lower.root.child(b"d0").child(b"e").child(b"f")
    assert open_fds() == fds
    assert os.stat(deep.at()).st_ino == os.stat("d0/e/f", dir_fd=lower.root_fd).st_ino
    assert deep.at() == deep.at()
    assert open_fds() == fds + 3
    assert not os.get_inheritable(deep.at())


def test_no_more_than_the_limit_stay_open(lower: Branch) -> None:
    fds = open_fds()
    dirs = [lower.root.child(b"d%d" % n) for n in range(8)]
    for directory in dirs:
        directory.at()
    assert len(lower.cache) == 8
    lower.cache.trim()
    assert len(lower.cache) == 3
    assert open_fds() == fds + 3
    assert {os.stat(d.at()).st_ino for d in dirs} == {
        os.stat(d.name, dir_fd=lower.root_fd).st_ino for d in dirs
    }


def test_what_was_used_lately_stays(lower: Branch) -> None:
    dirs = [lower.root.child(b"d%d" % n) for n in range(5)]
    for directory in dirs:
        directory.at()
        directory.used = False
    kept = dirs[:3]
    for directory in kept:
        directory.at()
    lower.cache.trim()
    assert [d for d in dirs if d.fd >= 0] == kept


def test_a_descriptor_is_closed_once(lower: Branch) -> None:
    fds = open_fds()
    directory = lower.root.child(b"d0")
    directory.at()
    directory.release()
    directory.release()
    lower.root.release()
    assert (directory.fd, open_fds()) == (-1, fds)
    assert lower.root.at() == lower.root_fd


def test_a_directory_is_followed_through_a_move(lower: Branch) -> None:
    directory = lower.root.child(b"d0")
    inside = directory.child(b"e")
    number = os.stat(inside.at()).st_ino
    os.rename("d0", "d1/moved", src_dir_fd=lower.root_fd, dst_dir_fd=lower.root_fd)
    directory.move(lower.root.child(b"d1"), b"moved")
    lower.cache.close_all()
    assert os.stat(inside.at()).st_ino == number


def test_what_is_gone_cannot_be_opened(lower: Branch) -> None:
    for name, number in ((b"missing", errno.ENOENT), (b"link", errno.ENOTDIR)):
        if number == errno.ENOTDIR:
            os.symlink("d0", "link", dir_fd=lower.root_fd)
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            lower.root.child(name).at()
        assert caught.value.errno == number
    closed = RealDir(lower, None, b"")
    with pytest.raises(OSError, match=r"\[Errno 116\]"):
        closed.child(b"x").at()


def test_paths_longer_than_path_max(unions: Unions) -> None:
    """Twenty names of 255 bytes below each other, in the lower and then in the upper."""
    name = "n" * 255
    u = unions({})
    fd = os.open(u.lowers[0], os.O_PATH)
    for _ in range(20):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    u.fs.stack.cache.limit = 2
    path = "/".join([name] * 20)
    for number in range(3):
        u.sh.create(f"{path}/f{number}", b"deep")
        u.fs.trim()
        assert len(u.fs.stack.cache) <= 2
    assert u.sh.read(f"{path}/f0") == b"deep"
    u.reopen()
    assert u.sh.names(path) == [b"f0", b"f1", b"f2"]


def test_depth_has_no_limit(unions: Unions) -> None:
    """No recursion: deeper than Python's stack."""
    u = unions({})
    here, name = u.fs.root, b"d"
    for _ in range(1500):
        found, _ = u.fs.mkdir(here, name, 0o755, u.sh.caller)
        here = u.fs.directory(found.id)
    u.fs.stack.cache.close_all()
    handle, _ = u.fs.create(here, b"f", 0o644, os.O_WRONLY, u.sh.caller)
    u.fs.release(handle)
    assert [entry.name for entry in u.fs.listing(here)] == [b"f"]
    while here.parent is not None:
        parent = here.parent
        for entry in u.fs.listing(here):
            u.fs.unlink(here, entry.name)
        u.fs.rmdir(parent, here.name)
        here = parent
    assert u.sh.names() == []


def test_a_walk_keeps_within_the_limit(unions: Unions) -> None:
    tree: Tree = {f"d{n}": {f"e{m}": {"f": ""} for m in range(5)} for n in range(20)}
    u = unions(tree, tree)
    u.fs.stack.cache.limit = 10
    for n in range(20):
        for m in range(5):
            u.sh.hold(f"d{n}/e{m}/f")
            u.fs.trim()
            assert len(u.fs.stack.cache) <= 10
    for n in range(20):
        u.sh.write(f"d{n}/e3/f", b"new")
        u.fs.trim()
    assert u.sh.read("d19/e3/f") == b"new"
    assert len(u.fs.stack.cache) <= 10 + 6


# --- mounts below a layer -----------------------------------------------------------------------


def mounted_on(u: Union, *paths: str) -> None:
    for path in paths:
        probe.sys_mount("none", str(u.home / path), "tmpfs")
        (u.home / path / "foreign").touch()


@pytest.mark.needs("root")
@pytest.mark.parametrize("private", [True, False])
def test_what_is_mounted_below_a_layer_is_not_entered(
    unions: Unions, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    if not private:
        monkeypatch.setattr(opening, "_clone", lambda fd: -1)
        monkeypatch.setattr(opening, "_clone_pair", lambda *_: None)
    u = unions({"m": {"own": ""}, "other": ""}, upper={"n": {"own": ""}})
    mounted_on(u, "l1/m", "upper/n")
    if private:
        assert u.sh.names("m") == [b"own"]
        assert u.sh.names("n") == [b"own"]
    else:
        for name in ("m", "n"):
            with pytest.raises(OSError, match=r"\[Errno 18\]"):
                u.sh.names(name)
    assert u.sh.read("other") == b""
    u.close()
    for path in ("l1/m", "upper/n"):
        probe.sys_umount(str(u.home / path), probe.MNT_DETACH)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_without_openat2(
    lower: Branch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Old kernels and seccomp filters: the device is compared instead."""

    def refuse(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(sc, "_syscall", refuse)
    fd = sc.open_dir_no_xdev(b"d0", lower.root_fd)
    os.close(fd)
    if probe.is_root():
        probe.sys_mount("none", str(tmp_path / "b/d1"), "tmpfs")
        try:
            with pytest.raises(OSError, match=r"\[Errno 18\]"):
                sc.open_dir_no_xdev(b"d1", lower.root_fd)
        finally:
            probe.sys_umount(str(tmp_path / "b/d1"), probe.MNT_DETACH)

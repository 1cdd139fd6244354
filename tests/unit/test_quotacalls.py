from __future__ import annotations

import errno
import os
import secrets
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import loopfs, probe
from unionfs2 import quotacalls
from unionfs2.quotacalls import Usage
from unionfs2.storemodel import Quota

KIB = 1 << 10
MIB = 1 << 20
NOTHING = Usage(0, 0, None, None)
# ext4 says that the quota is exceeded; XFS, for projects, that the disk is full.
FULL = (errno.EDQUOT, errno.ENOSPC)


class Opened:
    """Descriptors of directories, closed at the end."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def __call__(self, path: Path) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.fds.append(fd)
        return fd

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def opened() -> Iterator[Opened]:
    made = Opened()
    yield made
    made.close()


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that limits projects."""
    probe.need("root", f"{request.param}-project-quota")
    with loopfs.mounted(str(request.param), tmp_path) as path:
        yield path


@pytest.fixture(params=[True, False], ids=["by-descriptor", "by-device"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both system calls, the newer one where the kernel has it."""
    if request.param and not quotacalls._have_quotactl_fd:
        pytest.skip("needs quotactl_fd(2)")
    monkeypatch.setattr(quotacalls, "_have_quotactl_fd", request.param)


def project_at(path: Path) -> int:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags)
    try:
        return quotacalls.project_of(fd)
    finally:
        os.close(fd)


# --- where it cannot be done ----------------------------------------------------------------------


def test_other_file_systems_are_named(opened: Opened) -> None:
    reason = quotacalls.supported(opened(Path("/proc")))
    assert reason == "the file system is proc, and only ext4 and xfs have project quota"


@pytest.mark.needs("root", "command:mkfs.ext4")
def test_a_file_system_that_is_not_mounted_for_it(tmp_path: Path) -> None:
    try:
        with loopfs.mounted("ext4", tmp_path, quota=False) as path:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _refuses(fd)
            finally:
                os.close(fd)
    except loopfs.CannotError as exc:
        pytest.skip(f"needs a file system in a file: {exc}")


def _refuses(fd: int) -> None:
    reason = quotacalls.supported(fd)
    assert reason is not None
    assert reason.startswith("the file system is ext4, and it ")
    with pytest.raises(OSError, match=r".") as caught:
        quotacalls.set_limits(fd, 5, Quota(MIB, 5))
    assert caught.value.errno in (errno.ESRCH, errno.ENOSYS)


# --- where it can ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
def test_limits_are_set_read_and_lifted(disk: Path, opened: Opened) -> None:
    fd = opened(disk)
    assert quotacalls.supported(fd) is None
    project = quotacalls.free_project(fd)
    assert quotacalls.usage(fd, project) == NOTHING
    quotacalls.set_limits(fd, project, Quota(MIB + 1, 20))
    usage = quotacalls.usage(fd, project)
    assert usage.inodes_max == 20
    assert usage.bytes_max is not None
    assert MIB < usage.bytes_max <= MIB + 4 * KIB
    quotacalls.set_limits(fd, project, Quota(None, 7))
    assert quotacalls.usage(fd, project) == Usage(0, 0, None, 7)
    quotacalls.clear(fd, project)
    assert quotacalls.usage(fd, project) == NOTHING


def test_a_number_in_use_is_not_given(
    disk: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quotacalls.PROJECT_FIRST
    picks = iter([0, 1, 2, 3])
    monkeypatch.setattr(secrets, "randbelow", lambda _: next(picks))
    (disk / "tree").mkdir()
    quotacalls.set_project(opened(disk / "tree"), first)
    quotacalls.set_limits(opened(disk), first + 1, Quota(MIB))
    assert quotacalls.free_project(opened(disk), {first + 2}) == first + 3


def test_a_tree_is_numbered_and_hands_its_number_on(disk: Path, opened: Opened) -> None:
    tree = disk / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "link").symlink_to("a")
    os.mkfifo(tree / "a" / "fifo")
    fd = opened(tree)
    left = quotacalls.set_project(fd, 77)
    assert left in (0, 2)  # the link and the fifo
    (tree / "a" / "b" / "new").touch()
    for name in (".", "a", "a/b", "a/file", "a/b/new"):
        assert project_at(tree / name) == 77
    assert project_at(disk) == 0
    assert quotacalls.usage(fd, 77).inodes == 7 - left
    quotacalls.set_project(fd, 0)
    (tree / "later").mkdir()
    assert project_at(tree / "later") == project_at(tree / "a" / "b" / "new") == 0


def test_what_is_mounted_in_a_tree_is_not_entered(disk: Path, opened: Opened) -> None:
    (disk / "tree" / "point").mkdir(parents=True)
    (disk / "other").mkdir()
    (disk / "other" / "inner").mkdir()
    command = ["mount", "--bind", str(disk / "other"), str(disk / "tree" / "point")]
    subprocess.run(command, check=True)
    try:
        quotacalls.set_project(opened(disk / "tree"), 9)
    finally:
        subprocess.run(["umount", str(disk / "tree" / "point")], check=True)
    assert project_at(disk / "other") == project_at(disk / "other" / "inner") == 0


def test_a_numbered_tree_may_move_and_strangers_may_not_move_in(disk: Path, opened: Opened) -> None:
    for name in ("staging/diff", "staging/plain", "home"):
        (disk / name).mkdir(parents=True)
    quotacalls.set_project(opened(disk / "staging" / "diff"), 5)
    (disk / "staging" / "diff" / "file").touch()
    (disk / "staging").rename(disk / "home" / "id")
    layer = disk / "home" / "id"
    with pytest.raises(OSError, match=r".") as caught:
        (layer / "plain").rename(layer / "diff" / "plain")
    assert caught.value.errno == errno.EXDEV
    (layer / "diff" / "file").rename(layer / "file")
    (layer / "file").rename(layer / "diff" / "again")


@pytest.mark.needs("overlay")
def test_the_overlay_is_limited_for_root_too(disk: Path, opened: Opened) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (disk / name).mkdir()
    (disk / "lower" / "low").write_bytes(b"l" * 300 * KIB)
    fd = opened(disk)
    project = quotacalls.free_project(fd)
    for name in ("upper", "work"):
        quotacalls.set_project(opened(disk / name), project)
    quotacalls.set_limits(fd, project, Quota(MIB, 12))
    layers = ",".join(f"{name}dir={disk / name}" for name in ("lower", "upper", "work"))
    merged = disk / "merged"
    probe.sys_mount("overlay", str(merged), "overlay", 0, layers)
    try:
        status = os.statvfs(merged)
        assert (status.f_blocks * status.f_frsize, status.f_files) == (MIB, 12)
        (merged / "low").chmod(0o600)
        assert stat.S_IMODE((disk / "upper" / "low").stat().st_mode) == 0o600
        with pytest.raises(OSError, match=r".") as caught:
            (merged / "large").write_bytes(bytes(2 * MIB))
        assert caught.value.errno in FULL
        (merged / "large").unlink()
        for number in range(12 - quotacalls.usage(fd, project).inodes):
            (merged / str(number)).touch()
        with pytest.raises(OSError, match=r".") as caught:
            (merged / "one more").touch()
        assert caught.value.errno in FULL
    finally:
        probe.sys_umount(str(merged))

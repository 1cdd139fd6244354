"""System calls: nothing else changes a disk, and what each wrapper adds to its call."""

from __future__ import annotations

import ast
import errno
import os
import stat
from pathlib import Path

import pytest

from tests.support import probe
from tests.test_architecture import LEVELS
from unionfs2 import syscalls as sc

PACKAGE = Path(sc.__file__).parent
CORE = tuple(
    name
    for level in ("2 what is on disk", "3 union logic", "4a transports")
    for name in LEVELS[level]
)
CHANGING = {
    "chmod", "chown", "copy_file_range", "fchmod", "fchown", "fdatasync", "ftruncate", "lchown",
    "lchmod", "link", "makedirs", "mkdir", "mkfifo", "mknod", "posix_fallocate", "pwrite",
    "pwritev", "remove", "removedirs", "removexattr", "rename", "renames", "replace", "rmdir",
    "sendfile", "setxattr", "splice", "symlink", "sync", "truncate", "unlink", "utime", "write",
    "writev",
}  # fmt: skip
CHANGING_FLAGS = {"O_CREAT", "O_TRUNC", "O_TMPFILE"}


def changes_past_the_seam(source: str) -> list[str]:
    """Calls of os.* that change a disk; os.open() with a flag that does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "os"):
            continue
        flags = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)} & CHANGING_FLAGS
        if node.func.attr in CHANGING or (node.func.attr == "open" and flags):
            found.append(f"{node.lineno}: os.{node.func.attr}")
    return found


@pytest.mark.parametrize("module", CORE)
def test_the_core_changes_a_disk_through_this_module_only(module: str) -> None:
    sources = [PACKAGE / f"{module}.py"]
    if (PACKAGE / module).is_dir():
        sources = sorted((PACKAGE / module).glob("*.py"))
    for source in sources:
        if source.name in {"device.py", "splicing.py"}:
            continue  # write to /dev/fuse, to memory and to pipes
        assert changes_past_the_seam(source.read_text(encoding="utf-8")) == []


def test_the_search_finds_something() -> None:
    assert changes_past_the_seam("os.chmod(p, 1)\nos.open(p, os.O_RDWR | os.O_CREAT)") == [
        "1: os.chmod",
        "2: os.open",
    ]
    assert changes_past_the_seam("os.open(p, os.O_RDONLY)\nsc.chmod(p, 1)\nx.os.chmod()") == []


def test_every_change_of_this_module_is_in_the_list() -> None:
    source = (PACKAGE / "syscalls.py").read_text(encoding="utf-8")
    part = source.partition("# --- changing -")[2].partition("#: Names through which")[0]
    tree = ast.parse(part.lstrip("-"))
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    names |= {
        target.id
        for n in tree.body
        if isinstance(n, ast.Assign)
        for target in n.targets
        if isinstance(target, ast.Name)
    }
    helpers = {"setxattr_at"}  # goes through setxattr
    public = {name for name in names if not name.startswith("_")} - helpers
    assert public == set(sc.MUTATORS)
    assert all(callable(getattr(sc, name)) for name in sc.MUTATORS)


@pytest.mark.parametrize("modern", [True, False])
def test_chmod_follows_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modern: bool
) -> None:
    if not modern:
        monkeypatch.setattr(sc, "_have_fchmodat2", False)
    (tmp_path / "f").touch(0o644)
    (tmp_path / "l").symlink_to("f")
    fd = os.open(tmp_path, os.O_PATH)
    sc.chmod(b"f", fd, 0o4711)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o4711
    with pytest.raises(OSError, match=r"\[Errno"):
        sc.chmod(b"l", fd, 0)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o4711
    with pytest.raises(FileNotFoundError):
        sc.chmod(b"missing", fd, 0)
    os.close(fd)


def test_times_to_the_nanosecond_before_and_after_the_epoch(tmp_path: Path) -> None:
    (tmp_path / "l").symlink_to("nowhere")
    (tmp_path / "f").touch()
    fd = os.open(tmp_path, os.O_PATH)
    for atime, mtime in ((1_700_000_000_123_456_789, -1), (-999_999_999, 0)):
        for name in (b"l", b"f"):
            sc.utimes(name, fd, atime, mtime)
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            assert (info.st_atime_ns, info.st_mtime_ns) == (atime, mtime)
    sc.utimes(b"f", fd, None, 5)
    sc.utimes(b"f", fd, 6, None)
    for handle in (os.open(tmp_path / "f", os.O_RDONLY), os.open(tmp_path / "f", os.O_PATH)):
        sc.futimes(handle, None, 7)
        info = os.fstat(handle)
        assert (info.st_atime_ns, info.st_mtime_ns) == (6, 7)
        sc.futimes(handle, None, 5)
        os.close(handle)
    os.close(fd)
    with pytest.raises(OSError, match=r"\[Errno 9\]"):
        sc.utimes(b"f", 10**6, 0, 0)


def test_rename_flags(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        sc.rename(b"a", fd, b"b", fd, sc.RENAME_NOREPLACE)
    sc.rename(b"a", fd, b"b", fd, sc.RENAME_EXCHANGE)
    assert (tmp_path / "a").read_text() == "b"
    sc.rename(b"a", fd, b"b", fd)
    assert sorted(os.listdir(tmp_path)) == ["b"]
    if probe.can_mknod_whiteout():
        sc.rename(b"b", fd, b"c", fd, sc.RENAME_WHITEOUT)
        info = (tmp_path / "b").lstat()
        assert stat.S_ISCHR(info.st_mode)
        assert info.st_rdev == 0
    os.close(fd)


def test_links_to_links_and_to_open_files(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    (tmp_path / "l").symlink_to("nowhere")
    sc.link(b"l", fd, b"m", fd)
    assert os.readlink(tmp_path / "m") == "nowhere"
    unnamed = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(unnamed, b"data")
    sc.link_fd(unnamed, b"n", fd)
    assert (tmp_path / "n").read_text() == "data"
    with pytest.raises(FileExistsError):
        sc.link_fd(unnamed, b"n", fd)
    os.close(unnamed)
    os.close(fd)


def test_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    assert sc.lstat_or_none(b"f", fd) is None
    (tmp_path / "f").touch()
    found = sc.lstat_or_none(b"f", fd)
    assert found is not None
    assert sc.listxattr_at(b"f", fd) == []
    with pytest.raises(OSError, match=r"\[Errno 61\]"):
        sc.getxattr_at(b"f", fd, b"user.absent")
    with pytest.raises(NotADirectoryError):
        sc.lstat_or_none(b"f/x", fd)
    assert sc.attributes_at(b"f", fd) & (sc.STATX_ATTR_APPEND | sc.STATX_ATTR_IMMUTABLE) == 0
    with pytest.raises(FileNotFoundError):
        sc.attributes_at(b"missing", fd)
    assert sc.mount_id(fd) > 0
    assert sc.mount_id(10**6) == 0
    os.close(fd)


@pytest.mark.needs("user-xattr")
@pytest.mark.parametrize("direct", [True, False])
def test_attribute_names_with_and_without_the_newer_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    if direct and not sc._have_listxattrat:
        pytest.skip("the kernel is older than 6.13")
    monkeypatch.setattr(sc, "_have_listxattrat", direct)
    fd = os.open(tmp_path, os.O_PATH)
    (tmp_path / "f").touch()
    (tmp_path / "l").symlink_to("f")
    keys = {b"user.%d" % number for number in range(40)} | {b"user.\xff"}
    for key in keys:
        os.setxattr(os.fsencode(tmp_path / "f"), key, b"")
    assert {key for key in sc.listxattr_at(b"f", fd) if key.startswith(b"user.")} == keys
    assert [key for key in sc.listxattr_at(b"l", fd) if key.startswith(b"user.")] == []
    with pytest.raises(FileNotFoundError):
        sc.listxattr_at(b"missing", fd)
    os.close(fd)


def test_file_systems_without_attributes_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    for number, answer in ((errno.EOPNOTSUPP, []), (errno.EIO, None)):

        def refuse(*_: object, number: int = number, **__: object) -> list[str]:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "listxattr", refuse)
        if answer is None:
            with pytest.raises(OSError, match=r"\[Errno 5\]"):
                sc.listxattr_at(b"f", fd)
        else:
            assert sc.listxattr_at(b"f", fd) == answer
    os.close(fd)


def test_directories_only_and_never_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "l").symlink_to("d")
    (tmp_path / "f").touch()
    fd = os.open(tmp_path, os.O_PATH)
    for name, number in ((b"l", errno.ENOTDIR), (b"f", errno.ENOTDIR), (b"no", errno.ENOENT)):
        for opener in (sc.open_dir, sc.open_dir_no_xdev):
            with pytest.raises(OSError, match=r"\[Errno") as caught:
                opener(name, fd)
            assert caught.value.errno == number
    for opener in (sc.open_dir, sc.open_dir_no_xdev):
        below = opener(b"d", fd)
        assert os.listdir(f"/proc/self/fd/{below}") == ["e"]
        assert not os.get_inheritable(below)
        os.close(below)
    os.close(fd)


@pytest.mark.needs("root")
def test_handles_lead_back(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("data")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    handle = sc.name_to_handle(b"f", fd)
    again = sc.open_by_handle(fd, handle, os.O_RDONLY)
    assert os.read(again, 9) == b"data"
    os.close(again)
    (tmp_path / "f").unlink()
    with pytest.raises(OSError, match=r"\[Errno 116\]"):
        sc.open_by_handle(fd, handle, os.O_PATH)
    with pytest.raises(FileNotFoundError):
        sc.name_to_handle(b"f", fd)
    os.close(fd)

"""Names: long ones, odd bytes, paths beyond PATH_MAX, and odd names of the layers themselves."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.semantics.rig import Rig

NAMES = {
    "255-bytes": b"n" * 255,
    "255-bytes-of-utf-8": "ü".encode() * 127 + b"x",
    "newline": b"two\nlines",
    "not-utf-8": b"caf\xe9\xff\x80",
    "colon": b"a:b::c",
    "comma": b"a,b",
    "backslash": b"a\\b\\",
    "blanks-and-quotes": b" a 'b\" #c=d\t",
    "control-bytes": bytes(byte for byte in range(1, 32)),
    "dots": b"...",
    "like-a-temporary": b"#1",
    "like-a-mark": b".wh.name",
}


@pytest.fixture(params=sorted(NAMES))
def name(request: pytest.FixtureRequest) -> bytes:
    return NAMES[request.param]


def test_odd_name_through_every_operation(rig: Rig, name: bytes) -> None:
    lower = os.fsencode(rig.lower)
    with open(lower + b"/" + name, "wb") as file:
        file.write(b"below")
    top = os.fsencode(rig.mount())
    path = top + b"/" + name
    assert os.listdir(top) == [name]
    with open(path, "r+b") as file:
        assert file.read() == b"below"
        file.write(b" above")
    os.mkdir(top + b"/d")
    inside = top + b"/d/" + name
    os.rename(path, inside)
    os.link(inside, path)
    os.unlink(inside)
    os.symlink(name, inside)
    assert os.readlink(inside) == name
    os.setxattr(path, "user.a", b"1")
    assert os.getxattr(path, "user.a") == b"1"
    os.unlink(path)
    with pytest.raises(FileNotFoundError):
        os.stat(path)
    os.mkdir(path)
    with open(path + b"/" + name, "wb"):
        pass
    assert sorted(os.listdir(top)) == sorted([b"d", name])
    rig.remount()
    assert os.listdir(path) == [name]
    os.unlink(path + b"/" + name)
    os.rmdir(path)
    assert os.listdir(top) == [b"d"]


def test_name_of_256_bytes_is_too_long(rig: Rig) -> None:
    top = os.fsencode(rig.mount()) + b"/"
    long = top + b"n" * 256
    (rig.merged / "f").touch()
    for call in (
        lambda: os.stat(long),
        lambda: os.mkdir(long),
        lambda: os.open(long, os.O_WRONLY | os.O_CREAT),
        lambda: os.rename(top + b"f", long),
        lambda: os.link(top + b"f", long),
        lambda: os.symlink("x", long),
        lambda: os.unlink(long),
    ):
        with pytest.raises(OSError, match="too long") as refused:
            call()
        assert refused.value.errno == errno.ENAMETOOLONG


DEEP = [b"%02d" % number + b"d" * 248 for number in range(20)]  # 5 000 bytes of path


@contextlib.contextmanager
def _descended(top: Path, *, make: bool) -> Iterator[int]:
    """A descriptor of the directory at the bottom of DEEP."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in DEEP:
            if make:
                os.mkdir(part, dir_fd=fd)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _write_at(fd: int, name: str, data: bytes) -> None:
    with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, dir_fd=fd), "wb") as file:
        file.write(data)


def _read_at(fd: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY, dir_fd=fd), "rb") as file:
        return file.read()


def test_path_longer_than_path_max_in_the_lower_is_read_and_copied_up(rig: Rig) -> None:
    with _descended(rig.lower, make=True) as fd:
        _write_at(fd, "file", b"below")
    merged = rig.mount()
    with _descended(merged, make=False) as fd:
        assert os.listdir(fd) == ["file"]
        assert _read_at(fd, "file") == b"below"
        _write_at(fd, "file", b"above")
        _write_at(fd, "new", b"new")
    with _descended(rig.top, make=False) as fd:
        assert _read_at(fd, "file") == b"above"
        assert _read_at(fd, "new") == b"new"


def test_path_longer_than_path_max_is_made_renamed_and_removed(rig: Rig) -> None:
    merged = rig.mount()
    with _descended(merged, make=True) as fd:
        _write_at(fd, "file", b"data")
        os.rename("file", "other", src_dir_fd=fd, dst_dir_fd=fd)
        os.link("other", "third", src_dir_fd=fd, dst_dir_fd=fd)
        os.symlink("third", "fourth", dir_fd=fd)
        assert _read_at(fd, "fourth") == b"data"
        assert os.stat("other", dir_fd=fd).st_nlink == 2
        for name in ("other", "third", "fourth"):
            os.unlink(name, dir_fd=fd)
        os.mkdir("dir", dir_fd=fd)
        os.rmdir("dir", dir_fd=fd)
        assert os.listdir(fd) == []


@pytest.mark.parametrize(
    "odd", ["a:b", "a,b", "a\\b", "a b", "two\nlines", "caf\udce9", "quo\"te's", "a\\:b,\\,c", "=#"]
)
def test_layers_with_odd_names(rig: Rig, odd: str) -> None:
    base = rig.base / odd
    base.mkdir()
    rig.upper, rig.work = base / f"u{odd}", base / f"w{odd}"
    rig.lowers = [base / f"l{odd}", base / f"m{odd}"]
    for directory in (*rig.lowers, rig.upper, rig.work):
        directory.mkdir()
    (rig.lowers[0] / "first").touch()
    (rig.lowers[1] / "second").touch()
    at = base / f"mnt{odd}"
    at.mkdir()
    merged = rig.mount(at=at)
    (merged / "third").touch()
    assert sorted(os.listdir(merged)) == ["first", "second", "third"]
    assert (rig.top / "third").exists()

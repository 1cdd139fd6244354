"""Immutable and append-only files: flags of a lower object, marks of an upper one."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import probe
from tests.support.unions import Union, Unions
from unionfs2.model import SetAttr

pytestmark = [
    pytest.mark.needs("root", "command:chattr"),
    pytest.mark.parametrize("userxattr", [False], ids=["trusted"]),
]


@pytest.fixture
def flagged(tmp_path: Path) -> Iterator[Callable[[Union], Union]]:
    """Sets the flags of the lower objects, and takes them away at the end."""
    done: list[Path] = []

    def change(flag: str, path: Path) -> None:
        subprocess.run(["chattr", flag, str(path)], check=True, capture_output=True)

    def apply(u: Union) -> Union:
        for name in ("i", "id", "a", "ad"):
            path = u.lowers[0] / name
            try:
                change(f"+{name[0]}", path)
            except subprocess.CalledProcessError as exc:
                pytest.skip(f"chattr: {exc.stderr.decode().strip()}")
            done.append(path)
        return u

    yield apply
    for path in done:
        change("-ia", path)


@pytest.fixture
def u(unions: Unions, flagged: Callable[[Union], Union]) -> Union:
    probe.need("trusted-xattr")
    return flagged(unions({"i": "fixed", "id": {"x": ""}, "a": "log", "ad": {"x": ""}, "f": ""}))


def errno_of(act: Callable[[], object]) -> int:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        act()
    return caught.value.errno or 0


def test_an_immutable_file(u: Union) -> None:
    for act in (
        lambda: u.sh.open("i", os.O_WRONLY),
        lambda: u.sh.open("i", os.O_WRONLY | os.O_APPEND),
        lambda: u.sh.chmod("i", 0),
        lambda: u.sh.setattr("i", SetAttr(mtime_ns=1)),
        lambda: u.sh.truncate("i", 0),
        lambda: u.sh.setxattr("i", b"user.x", b""),
        lambda: u.sh.unlink("i"),
        lambda: u.sh.rename("i", "j"),
        lambda: u.sh.rename("f", "i"),
        lambda: u.sh.link("i", "j"),
    ):
        assert errno_of(act) == errno.EPERM
    assert u.sh.read("i") == b"fixed"
    assert os.listdir(u.upper) == []


def test_entries_of_an_immutable_directory(u: Union) -> None:
    for act in (
        lambda: u.sh.create("id/new"),
        lambda: u.sh.unlink("id/x"),
        lambda: u.sh.rename("f", "id/f"),
        lambda: u.sh.rename("id/x", "x"),
        lambda: u.sh.rmdir("id"),
        lambda: u.sh.chmod("id", 0o700),
    ):
        assert errno_of(act) == errno.EPERM
    assert os.listdir(u.upper) == []


def test_an_append_only_file_stays_so_after_copy_up(u: Union) -> None:
    for act in (
        lambda: u.sh.open("a", os.O_WRONLY),
        lambda: u.sh.open("a", os.O_WRONLY | os.O_APPEND | os.O_TRUNC),
        lambda: u.sh.truncate("a", 0),
        lambda: u.sh.unlink("a"),
    ):
        assert errno_of(act) == errno.EPERM
    u.sh.write("a", b" more", flags=os.O_APPEND, offset=3)
    assert u.sh.read("a") == b"log more"
    assert u.marks("a")["protattr"] == b"a"
    u.reopen()
    assert errno_of(lambda: u.sh.open("a", os.O_WRONLY)) == errno.EPERM
    assert errno_of(lambda: u.sh.unlink("a")) == errno.EPERM
    u.sh.write("a", b"!", flags=os.O_APPEND, offset=8)


def test_an_append_only_directory_takes_names_and_gives_none(u: Union) -> None:
    u.sh.create("ad/new")
    assert u.marks("ad")["protattr"] == b"a"
    assert errno_of(lambda: u.sh.unlink("ad/x")) == errno.EPERM
    u.reopen()
    u.sh.create("ad/newer")
    assert errno_of(lambda: u.sh.unlink("ad/new")) == errno.EPERM


@pytest.mark.parametrize("value", [b"i", b"ai"])
def test_marks_of_the_upper(u: Union, value: bytes) -> None:
    (u.upper / "m").write_bytes(b"x")
    os.setxattr(u.upper / "m", u.key("protattr"), value)
    assert errno_of(lambda: u.sh.open("m", os.O_WRONLY | os.O_APPEND)) == errno.EPERM
    assert errno_of(lambda: u.sh.chmod("m", 0)) == errno.EPERM
    assert u.sh.read("m") == b"x"


def test_what_is_not_flagged_is_not_protected(u: Union) -> None:
    u.sh.write("f", b"x")
    u.sh.unlink("f")

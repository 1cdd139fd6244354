"""Read-only mounts answer EROFS to every change and write nothing."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.semantics.callers import as_caller
from tests.semantics.rig import Rig
from tests.semantics.system import RENAME_EXCHANGE, renameat2

CHANGES: dict[str, Callable[[Path], object]] = {
    "open for writing": lambda top: os.open(top / "file", os.O_WRONLY),
    "open for reading and writing": lambda top: os.open(top / "file", os.O_RDWR),
    "open truncating": lambda top: os.open(top / "file", os.O_RDONLY | os.O_TRUNC),
    "create": lambda top: os.open(top / "new", os.O_WRONLY | os.O_CREAT),
    "truncate": lambda top: os.truncate(top / "file", 0),
    "unlink": lambda top: os.unlink(top / "file"),
    "rmdir": lambda top: os.rmdir(top / "empty"),
    "mkdir": lambda top: os.mkdir(top / "new"),
    "mknod": lambda top: os.mknod(top / "new", stat.S_IFREG | 0o600),
    "mkfifo": lambda top: os.mkfifo(top / "new"),
    "symlink": lambda top: os.symlink("x", top / "new"),
    "link": lambda top: os.link(top / "file", top / "new"),
    "rename": lambda top: os.rename(top / "file", top / "new"),
    "exchange": lambda top: renameat2(top / "file", top / "other", RENAME_EXCHANGE),
    "chmod": lambda top: os.chmod(top / "file", 0o600),
    "chown": lambda top: os.chown(top / "file", 1, 1),
    "utime": lambda top: os.utime(top / "file", (1, 1)),
    "setxattr": lambda top: os.setxattr(top / "file", "user.a", b"1"),
    "removexattr": lambda top: os.removexattr(top / "file", "user.kept"),
    "touch in a directory": lambda top: (top / "d/new").touch(),
}


def _build(tree: Path) -> None:
    (tree / "d").mkdir()
    (tree / "empty").mkdir()
    (tree / "file").write_text("content")
    (tree / "other").write_text("other")
    os.setxattr(tree / "file", "user.kept", b"1")


@pytest.fixture(params=["no-upper", "ro-option"])
def merged(request: pytest.FixtureRequest, rig: Rig) -> Path:
    """A union without upper, or with one but mounted read-only."""
    if request.param == "no-upper":
        _build(rig.stack(2)[1])
        rig.upper = None
        return rig.mount()
    _build(rig.lower)
    return rig.mount(read_only=True)


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_every_change_answers_erofs(merged: Path, change: str) -> None:
    with pytest.raises(OSError, match="Read-only") as refused:
        CHANGES[change](merged)
    assert refused.value.errno == errno.EROFS
    assert (merged / "file").read_text() == "content"
    assert sorted(os.listdir(merged)) == ["d", "empty", "file", "other"]


def test_reading_works_and_access_says_not_writable(merged: Path) -> None:
    assert os.getxattr(merged / "file", "user.kept") == b"1"
    assert os.access(merged / "file", os.R_OK)
    assert not os.access(merged / "file", os.W_OK)
    assert not as_caller(lambda: os.access(merged / "file", os.W_OK))
    assert os.statvfs(merged).f_flag & os.ST_RDONLY


def test_existing_name_wins_over_read_only_for_exclusive_creation(merged: Path) -> None:
    with pytest.raises(FileExistsError):
        os.mkdir(merged / "d")
    with pytest.raises(FileExistsError):
        os.open(merged / "file", os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def test_devices_and_fifos_of_a_read_only_union_open_for_writing(rig: Rig) -> None:
    lower = rig.stack(2)[0]
    os.mknod(lower / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    rig.upper = None
    merged = rig.mount()
    fd = os.open(merged / "null", os.O_WRONLY)
    assert os.write(fd, b"gone") == 4
    os.close(fd)

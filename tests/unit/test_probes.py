"""What a place can do: asked by doing, remembered until something changes."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults import inject
from unionfs2 import probes, syscalls
from unionfs2.errors import MountError
from unionfs2.native_overlay import NativeMounter
from unionfs2.probes import Probes
from unionfs2.storerecord import DialectName

pytestmark = pytest.mark.needs("root")


class Place:
    """A store's home, state and scratch directories."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home_fd = os.open(root, os.O_RDONLY)
        (root / "state").mkdir()
        self.state_fd = os.open(root / "state", os.O_RDONLY)
        (root / "scratch").mkdir()
        self.scratch = os.fsencode(root / "scratch")

    def probes(self) -> Probes:
        return Probes(self.home_fd, self.state_fd)

    @property
    def remembered(self) -> set[str]:
        path = self.root / "state" / "probes.json"
        return set(json.loads(path.read_text())["known"]) if path.exists() else set()

    def close(self) -> None:
        os.close(self.home_fd)
        os.close(self.state_fd)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    assert os.listdir(made.scratch) == []
    made.close()


@pytest.mark.needs("trusted-xattr", "user-xattr", "mknod-whiteout")
def test_the_file_system_of_the_tests_can_all_that_matters(place: Place) -> None:
    found = place.probes().backing(place.scratch)
    assert (found.trusted_xattr, found.user_xattr, found.whiteout) == (None, None, None)
    assert found.d_type
    assert found.filesystem == probes.filesystem_name(place.home_fd)
    assert not found.filesystem.startswith("0x")


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("dialect", ["trusted", "user"])
def test_native_overlay_works(place: Place, dialect: DialectName) -> None:
    found = place.probes().native(place.scratch, dialect)
    assert found == probes.Native(None, opaque_copied_up=False)
    assert place.remembered == {f"native-{dialect}"}


@pytest.mark.needs("overlay")
def test_answers_are_remembered(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place.probes()
    answers = first.backing(place.scratch), first.native(place.scratch, "trusted")
    monkeypatch.setattr(probes, "_probe_backing", None)
    monkeypatch.setattr(probes, "_probe_native", None)
    again = place.probes()
    assert not again.needs_scratch("backing", "native-trusted")
    assert again.needs_scratch("native-user")
    assert (again.backing(b"/nowhere"), again.native(b"/nowhere", "trusted")) == answers


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"key": [], "known": {}}', '{"known": {"backing": {}}}']
)
def test_a_damaged_memory_is_no_memory(place: Place, text: str) -> None:
    (place.root / "state" / "probes.json").write_text(text)
    assert place.probes().needs_scratch("backing")


def test_answers_of_another_version_are_asked_again(place: Place) -> None:
    place.probes().backing(place.scratch)
    path = place.root / "state" / "probes.json"
    value = json.loads(path.read_text())
    value["known"]["backing"]["a_new_question"] = True
    path.write_text(json.dumps(value))
    assert place.probes().needs_scratch("backing")


def test_another_kernel_is_asked_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.probes().backing(place.scratch)
    now = os.uname()
    other = type(now)((now[0], now[1], "9.9.9", now[3], now[4]))
    monkeypatch.setattr(os, "uname", lambda: other)
    assert place.probes().needs_scratch("backing")


def test_a_whiteout_that_comes_back_as_something_else_is_noticed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mknod(name: bytes, _mode: int, _device: int, *, dir_fd: int) -> None:
        os.mknod(name, stat.S_IFREG | 0o600, 0, dir_fd=dir_fd)

    monkeypatch.setattr(syscalls, "mknod", mknod)
    found = place.probes().backing(place.scratch)
    assert found.whiteout == "whiteouts cannot be made: Operation not supported"


def test_no_space_is_no_lasting_answer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "mknod", full)
        found = place.probes().backing(place.scratch)
    assert found.whiteout == "whiteouts cannot be made: No space left on device"
    assert place.remembered == set()
    assert place.probes().backing(place.scratch).whiteout is None


def test_a_refused_mount_is_told_in_words(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MountError("cannot mount overlay: Invalid argument", errno=errno.EINVAL)

    monkeypatch.setattr(NativeMounter, "mount", refuse)
    found = place.probes().native(place.scratch, "trusted")
    assert found.reason is not None
    assert found.reason.endswith("does not work here: cannot mount overlay: Invalid argument")
    assert place.remembered == {"native-trusted"}


def test_nothing_can_be_asked_where_nothing_can_be_written(place: Place) -> None:
    asked = Probes(place.home_fd, None)
    assert "written" in str(asked.backing(None).whiteout)
    assert "written" in str(asked.native(None, "trusted").reason)


def test_a_memory_that_cannot_be_written_is_no_error(place: Place) -> None:
    asked = place.probes()
    with inject(fail_at=10_000, error=errno.EIO) as counted:
        asked.backing(place.scratch)
    changes = len(counted.calls)
    (place.root / "state" / "probes.json").unlink()
    with inject(fail_at=changes, error=errno.ENOSPC) as faults:
        place.probes().backing(place.scratch)
    assert faults.fired
    assert os.listdir(place.root / "state") == []

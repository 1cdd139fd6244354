"""Set-user-id, set-group-id and security.capability go when the content or the owner changes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.semantics.callers import ALICE, TEAM, as_caller
from tests.semantics.rig import Rig
from tests.semantics.system import CAPABILITY, CAPABILITY_NAME, permissions


def _write(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"new")


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"new")


def _truncate(path: Path) -> None:
    os.truncate(path, 1)


def _ftruncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1)


def _open_truncating(path: Path) -> None:
    path.open("wb").close()


def _only_open(path: Path) -> None:
    path.open("r+b").close()


CHANGES: dict[str, Callable[[Path], None]] = {
    "write": _write,
    "append": _append,
    "truncate": _truncate,
    "ftruncate": _ftruncate,
    "O_TRUNC": _open_truncating,
}


@pytest.fixture(params=["lower", "upper"])
def program(request: pytest.FixtureRequest, rig: Rig) -> Path:
    """A program with every privilege, in the lower or in the upper, writable by others."""
    below = (rig.lower if request.param == "lower" else rig.top) / "program"
    below.write_bytes(b"content")
    os.chown(below, 0, TEAM)
    os.setxattr(below, CAPABILITY_NAME, CAPABILITY)
    below.chmod(0o6777)
    return rig.mount() / "program"


def _has_capability(path: Path) -> bool:
    with contextlib.suppress(OSError):
        os.getxattr(path, CAPABILITY_NAME)
        return True
    return False


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_suid_and_sgid_cleared_when_a_user_changes_the_content(program: Path, change: str) -> None:
    as_caller(lambda: CHANGES[change](program), uid=ALICE)
    assert permissions(program) == 0o777


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_suid_and_sgid_kept_when_root_changes_the_content(program: Path, change: str) -> None:
    CHANGES[change](program)
    assert permissions(program) == 0o6777


@pytest.mark.parametrize("change", ["write", "append"])
def test_capability_removed_by_a_write_even_of_root(program: Path, change: str) -> None:
    assert _has_capability(program)
    CHANGES[change](program)
    assert not _has_capability(program)


@pytest.mark.parametrize("change", ["truncate", "ftruncate", "O_TRUNC"])
def test_capability_removed_by_truncating(program: Path, change: str) -> None:
    CHANGES[change](program)
    assert not _has_capability(program)


def test_capability_removed_by_a_write_of_a_user(program: Path) -> None:
    as_caller(lambda: _write(program), uid=ALICE)
    assert not _has_capability(program)


def test_everything_kept_when_only_opened_for_writing(program: Path) -> None:
    as_caller(lambda: _only_open(program), uid=ALICE)
    assert permissions(program) == 0o6777
    assert _has_capability(program)


def test_chown_clears_all_three(program: Path) -> None:
    os.chown(program, ALICE, -1)
    assert permissions(program) == 0o777
    assert not _has_capability(program)


def test_chgrp_clears_all_three(program: Path) -> None:
    os.chown(program, -1, ALICE)
    assert permissions(program) == 0o777
    assert not _has_capability(program)


def test_chown_to_the_same_owner_clears_too(program: Path) -> None:
    os.chown(program, 0, TEAM)
    assert permissions(program) == 0o777


def test_chown_by_descriptor_clears_all_three(program: Path) -> None:
    with program.open("rb") as file:
        os.fchown(file.fileno(), ALICE, ALICE)
    assert permissions(program) == 0o777
    assert not _has_capability(program)


def test_sgid_without_group_execute_survives_chown(program: Path) -> None:
    program.chmod(0o2766)
    os.chown(program, ALICE, -1)
    assert permissions(program) == 0o2766


def test_chown_of_a_directory_keeps_its_setgid(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    (rig.lower / "d").chmod(0o2775)
    merged = rig.mount() / "d"
    os.chown(merged, ALICE, TEAM)
    assert permissions(merged) == 0o2775


def test_copy_up_itself_keeps_all_three(program: Path) -> None:
    os.utime(program, (1, 2))
    assert permissions(program) == 0o6777
    assert _has_capability(program)


def test_capability_survives_chmod(program: Path) -> None:
    program.chmod(0o4755)
    assert _has_capability(program)
    assert permissions(program) == 0o4755


def test_writes_through_one_descriptor_clear_each_time(program: Path) -> None:
    with program.open("r+b", buffering=0) as file:
        for _ in range(3):
            os.setxattr(program, CAPABILITY_NAME, CAPABILITY)
            file.write(b"x")
            assert not _has_capability(program)


@pytest.mark.parametrize("change", ["write", "append"])
def test_privileges_given_after_a_write_stay(program: Path, rig: Rig, change: str) -> None:
    """Also where the write is still in the cache of the kernel when they come."""
    with program.open("r+b" if change == "write" else "ab", buffering=0) as file:
        file.write(b"new")
        os.fchmod(file.fileno(), 0o6755)
        os.setxattr(file.fileno(), CAPABILITY_NAME, CAPABILITY)
    assert permissions(program) == 0o6755
    assert _has_capability(program)
    assert permissions(rig.top / "program") == 0o6755
    assert _has_capability(rig.top / "program")


def test_a_capability_given_to_a_new_file_stays(rig: Rig) -> None:
    merged = rig.mount()
    with (merged / "new").open("xb", buffering=0) as file:
        file.write(b"x" * 10000)
        os.setxattr(file.fileno(), CAPABILITY_NAME, CAPABILITY)
        file.flush()
    assert _has_capability(merged / "new")
    assert _has_capability(rig.top / "new")
    with (merged / "new").open("ab") as file:
        file.write(b"more")
    assert not _has_capability(merged / "new")

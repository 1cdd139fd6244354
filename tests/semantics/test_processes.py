"""Several processes at once on one union."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable

import pytest

from tests.semantics.rig import Rig

PROCESSES = 4
HANG_S = 60


def _together(action: Callable[[int], None]) -> None:
    """Run action(0), action(1) ... in processes of their own, released at one moment."""
    gate_read, gate_write = os.pipe()
    children = []
    for number in range(PROCESSES):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(HANG_S)
                os.close(gate_write)
                os.read(gate_read, 1)
                action(number)
                code = 0
            except BaseException:  # noqa: BLE001  # the child has nobody else to tell
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    os.close(gate_read)
    os.close(gate_write)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * PROCESSES


def test_processes_appending_to_one_lower_file_lose_nothing(rig: Rig) -> None:
    (rig.lower / "log").write_bytes(b"")
    merged = rig.mount() / "log"

    def append(number: int) -> None:
        with merged.open("ab", buffering=0) as log:
            for turn in range(100):
                log.write(b"%d-%03d\n" % (number, turn))

    _together(append)
    lines = merged.read_bytes().splitlines()
    assert sorted(lines) == sorted(
        b"%d-%03d" % (n, t) for n in range(PROCESSES) for t in range(100)
    )


def test_only_one_process_creates_a_name_exclusively(rig: Rig) -> None:
    names = [f"{number:03}" for number in range(60)]
    for name in names[::2]:
        (rig.lower / name).touch()
    merged = rig.mount()
    for name in names[::2]:
        (merged / name).unlink()

    def create(number: int) -> None:
        for name in names:
            try:
                fd = os.open(merged / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                continue
            os.write(fd, b"%d" % number)
            os.close(fd)

    _together(create)
    assert sorted(os.listdir(merged)) == names
    assert all((merged / name).stat().st_size == 1 for name in names)


def test_only_one_process_unlinks_and_only_one_renames_a_name(rig: Rig) -> None:
    (rig.lower / "won").mkdir()
    for number in range(60):
        (rig.lower / f"u{number:03}").touch()
        (rig.lower / f"r{number:03}").touch()
    merged = rig.mount()

    def remove(number: int) -> None:
        for turn in range(60):
            for action in (
                lambda turn=turn: (merged / f"u{turn:03}").unlink(),
                lambda turn=turn: (merged / f"r{turn:03}").rename(
                    merged / f"won/{turn:03}-{number}"
                ),
            ):
                try:
                    action()
                except FileNotFoundError:
                    pass

    _together(remove)
    assert os.listdir(merged) == ["won"]
    winners = Counter(name.split("-")[0] for name in os.listdir(merged / "won"))
    assert winners == {f"{number:03}": 1 for number in range(60)}


def test_processes_copying_up_one_file_at_once_make_one_copy(rig: Rig) -> None:
    for number in range(20):
        (rig.lower / f"{number}").write_bytes(bytes(300_000))
    merged = rig.mount()

    def mark(number: int) -> None:
        for turn in range(20):
            with (merged / f"{turn}").open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), b"x", number * 70_000)

    _together(mark)
    expected = bytearray(300_000)
    for number in range(PROCESSES):
        expected[number * 70_000] = ord("x")
    for turn in range(20):
        assert (merged / f"{turn}").read_bytes() == bytes(expected)
        assert (rig.top / f"{turn}").read_bytes() == bytes(expected)


def test_processes_making_and_removing_one_directory(rig: Rig) -> None:
    merged = rig.mount()
    allowed = {errno.EEXIST, errno.ENOENT, errno.ENOTEMPTY}

    def act(number: int) -> None:
        for _ in range(50):
            for action in (
                (merged / "d").mkdir,
                (merged / f"d/{number}").touch,
                (merged / f"d/{number}").unlink,
                (merged / "d").rmdir,
            ):
                try:
                    action()
                except OSError as exc:
                    if exc.errno not in allowed:
                        raise

    _together(act)
    if (merged / "d").exists():
        (merged / "d").rmdir()
    assert os.listdir(merged) == []


def test_reader_never_sees_a_file_replaced_by_rename_half_made(rig: Rig) -> None:
    (rig.lower / "config").write_bytes(b"A" * 5000)
    merged = rig.mount()

    def act(number: int) -> None:
        for turn in range(100):
            if number == 0:
                new = merged / "config.new"
                new.write_bytes(bytes([ord("A") + turn % 26]) * 5000)
                new.rename(merged / "config")
            else:
                data = (merged / "config").read_bytes()
                assert len(data) == 5000
                assert len(set(data)) == 1

    _together(act)


@pytest.mark.parametrize("kind", ["flock", "posix"])
def test_locks_exclude_other_processes_also_through_a_copy_up(rig: Rig, kind: str) -> None:
    (rig.lower / "f").write_bytes(b"x")
    merged = rig.mount() / "f"
    lock = fcntl.flock if kind == "flock" else fcntl.lockf
    with merged.open("rb" if kind == "flock" else "r+b") as holder:
        lock(holder, fcntl.LOCK_EX)
        merged.chmod(0o600)

        def refused(_: int) -> None:
            with merged.open("r+b") as other:
                try:
                    lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
                raise AssertionError("the lock did not exclude")

        _together(refused)


def test_directories_changed_below_each_other_by_several_processes(rig: Rig) -> None:
    """Lower trees are removed, recreated and filled by all; at the end the union agrees with it."""
    for number in range(PROCESSES):
        for inner in range(5):
            (rig.lower / f"{number}/{inner}").mkdir(parents=True)
            for file in range(5):
                (rig.lower / f"{number}/{inner}/{file}").write_text("below")
    merged = rig.mount()

    def act(number: int) -> None:
        top = merged / f"{number}"
        for inner in range(5):
            for file in range(5):
                (top / f"{inner}/{file}").unlink()
            (top / f"{inner}").rmdir()
            (top / f"{inner}").mkdir()
            (top / f"{inner}/new").write_text(f"{number}")
            assert os.listdir(top / f"{inner}") == ["new"]
            assert list(os.walk(merged))  # what vanishes meanwhile is passed over

    _together(act)
    rig.remount()
    for number in range(PROCESSES):
        for inner in range(5):
            assert os.listdir(merged / f"{number}/{inner}") == ["new"]
            assert (merged / f"{number}/{inner}/new").read_text() == f"{number}"

"""The tools of the tests, tested: trees as values, the fault seam, the sweep of mounts."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import fusedev, mounts, probe
from tests.support.faults import Crash, inject
from tests.support.tree import (
    Dir,
    Fifo,
    File,
    HardLink,
    Socket,
    Symlink,
    Tree,
    Whiteout,
    build,
    differences,
    snapshot,
)
from unionfs2 import syscalls
from unionfs2.creds import Actor

PLAIN: Tree = {
    "text": "hello",
    "large": b"x" * 5000,
    "empty": File(mode=0o4711, mtime_ns=1_000_000_001),
    "sparse": File(size=1 << 20, pieces={4096: b"island"}),
    b"\xff\n,:\\": "odd name",
    "dir": Dir({"inner": {"deep": "x"}}, mode=0o2770, mtime_ns=5),
    "again": HardLink("dir/inner/deep"),
    "to": Symlink("../nowhere"),
    "pipe": Fifo(),
    "sock": Socket(mode=0o600),
}


def test_a_tree_reads_back_as_it_was_built(tmp_path: Path) -> None:
    build(tmp_path / "t", PLAIN)
    seen = snapshot(tmp_path / "t")
    assert seen[b"text"].data == b"hello"
    assert seen[b"large"].data is not None
    assert seen[b"large"].data.startswith(b"sha256:")
    assert (seen[b"empty"].mode, seen[b"empty"].mtime_ns) == (0o4711, 1_000_000_001)
    assert seen[b"sparse"].size == 1 << 20
    assert (tmp_path / "t" / "sparse").stat().st_blocks * 512 < 1 << 20
    assert seen[b"\xff\n,:\\"].kind == "file"
    assert (seen[b"dir"].mode, seen[b"dir"].mtime_ns) == (0o2770, 5)
    assert seen[b"again"].links == (b"again", b"dir/inner/deep")
    assert seen[b"to"].target == b"../nowhere"
    assert (seen[b"pipe"].kind, seen[b"sock"].kind) == ("fifo", "socket")
    assert b"." in seen


@pytest.mark.needs("mknod-whiteout", "trusted-xattr")
def test_marks_of_the_overlay_format(tmp_path: Path) -> None:
    build(tmp_path, {"gone": Whiteout(), "hidden": Dir({}, opaque=True)})
    seen = snapshot(tmp_path)
    assert seen[b"gone"].kind == "whiteout"
    assert dict(seen[b"hidden"].xattrs)["trusted.overlay.opaque"] == b"y"


def test_equal_trees_have_no_differences(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(tmp_path / name, PLAIN)
    left, right = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert differences(left, right, ignore={"mtime_ns"}) == []


def test_each_difference_is_named(tmp_path: Path) -> None:
    build(tmp_path / "a", {"f": File("1", mode=0o600, mtime_ns=1), "left": ""})
    build(tmp_path / "b", {"f": File("2", mode=0o640, mtime_ns=1)})
    found = differences(snapshot(tmp_path / "a"), snapshot(tmp_path / "b"), ignore={"mtime_ns"})
    assert found == [
        f"b'f': mode is {0o600} on the left, {0o640} on the right",
        "b'f': data is b'1' on the left, b'2' on the right",
        "b'left': only on the left",
    ]


def test_the_nth_change_fails_and_the_others_happen(tmp_path: Path) -> None:
    with inject(fail_at=2, error=errno.ENOSPC) as faults:
        syscalls.mkdir(tmp_path / "one")
        with pytest.raises(OSError, match="injected") as caught:
            syscalls.mkdir(tmp_path / "two")
        syscalls.mkdir(tmp_path / "three")
    assert caught.value.errno == errno.ENOSPC
    assert faults.fired
    assert faults.calls == ["mkdir"] * 3
    assert sorted(os.listdir(tmp_path)) == ["one", "three"]


def test_after_a_crash_nothing_changes_any_more(tmp_path: Path) -> None:
    with inject(fail_at=2, crash=True):
        syscalls.mkdir(tmp_path / "one")
        for name in ("two", "three"):
            with pytest.raises(Crash):
                syscalls.mkdir(tmp_path / name)
    syscalls.mkdir(tmp_path / "after")
    assert sorted(os.listdir(tmp_path)) == ["after", "one"]


@pytest.mark.parametrize("owner", ["dead", "alive", "unknown"])
@pytest.mark.needs("root")
def test_the_sweep_detaches_mounts_of_dead_sessions_only(tmp_path: Path, owner: str) -> None:
    session = tmp_path / "pytest-0"
    target = session / "a b"
    target.mkdir(parents=True)
    probe.sys_mount("none", str(target), "tmpfs")
    lock = None
    if owner == "dead":
        script = f"from tests.support.mounts import *; claim(Path({str(session)!r}))"
        subprocess.run([sys.executable, "-c", script], check=True)
    elif owner == "alive":
        lock = mounts.claim(session)
    expected = [os.fsencode(target)] if owner == "dead" else []
    assert mounts.sweep(tmp_path) == expected
    if lock is not None:
        os.close(lock)
    mounts.detach(tmp_path)


def test_requirements_are_spelt_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(probe.REQUIRE_VARIABLE, "fuse, overlay")
    assert probe.required() == {"fuse", "overlay"}
    monkeypatch.setenv(probe.REQUIRE_VARIABLE, "fuze")
    with pytest.raises(pytest.UsageError, match="fuze"):
        probe.required()


def test_a_missing_ability_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probe.ABILITIES, "overlay", lambda: probe.Answer("it is Sunday"))
    monkeypatch.delenv(probe.REQUIRE_VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs overlay: it is Sunday"):
        probe.need("overlay")
    monkeypatch.setenv(probe.REQUIRE_VARIABLE, "overlay")
    with pytest.raises(pytest.fail.Exception, match="it is Sunday"):
        probe.need("overlay")


@pytest.mark.needs("private-fuse")
def test_an_ordinary_user_gets_a_fuse_device_of_its_own() -> None:
    before = os.stat("/dev/fuse")
    command = fusedev.as_user(["sh", "-c", "id -u; exec 3<>/dev/fuse"], uid=1234, gid=1234)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1234\n"
    after = os.stat("/dev/fuse")
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)


@pytest.mark.needs("root")
@pytest.mark.parametrize("turn", ["first", "second"])
def test_no_test_inherits_what_a_union_did_to_the_process(turn: str) -> None:
    assert probe.get_securebits() == 0
    umask = os.umask(0)
    assert umask != 0, turn
    Actor()
    assert probe.get_securebits() != 0

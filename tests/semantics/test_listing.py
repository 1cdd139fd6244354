"""Listing directories: complete and without repeats, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

import pytest

from tests.semantics.rig import Rig
from tests.semantics.system import DirStream


def _touch(tree: Path, *names: str) -> None:
    for name in names:
        (tree / name).touch()


def _names(path: Path) -> list[str]:
    with contextlib.closing(DirStream(path)) as stream:
        return sorted(os.fsdecode(entry.name) for entry in stream.rest())


def test_merged_listing_has_each_name_once_and_no_whiteouts(rig: Rig) -> None:
    rig.stack(3)
    for tree in (rig.top, *rig.lowers):
        (tree / "d").mkdir()
        _touch(tree / "d", "everywhere")
    _touch(rig.lowers[2] / "d", "deepest", "deleted", "hidden")
    _touch(rig.lowers[0] / "d", "topmost", "deleted")
    os.mknod(rig.lowers[1] / "d/hidden", stat.S_IFCHR, 0)
    merged = rig.mount() / "d"
    (merged / "deleted").unlink()
    assert _names(merged) == [".", "..", "deepest", "everywhere", "topmost"]
    rig.remount()
    assert _names(merged) == [".", "..", "deepest", "everywhere", "topmost"]


def test_names_present_throughout_are_listed_once_while_others_come_and_go(rig: Rig) -> None:
    """About 4 000 names: far more than fit in one answer to getdents."""
    stay = {f"stay-{number:04}-{'x' * 40}" for number in range(2000)}
    _touch(rig.lower, *sorted(stay)[::2])
    _touch(rig.lower, *(f"go-{number:04}-{'x' * 40}" for number in range(1000)))
    _touch(rig.top, *sorted(stay)[1::2])
    merged = rig.mount()
    go = iter(sorted(merged.glob("go-*")))
    seen: list[str] = []
    with contextlib.closing(DirStream(merged)) as stream:
        while (entry := stream.read()) is not None:
            seen.append(os.fsdecode(entry.name))
            if len(seen) % 3 == 0 and (victim := next(go, None)) is not None:
                victim.unlink()
                (merged / f"new-{len(seen):04}-{'x' * 40}").touch()
    kept = [name for name in seen if name.startswith("stay-")]
    assert sorted(kept) == sorted(stay)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_removing_each_name_as_it_is_read_empties_the_directory(rig: Rig, where: str) -> None:
    (rig.lower / "d").mkdir()
    (rig.top / "d").mkdir()
    tree = (rig.lower if where == "lower" else rig.top) / "d"
    _touch(tree, *(f"{number:04}-{'x' * 40}" for number in range(2000)))
    merged = rig.mount() / "d"
    with contextlib.closing(DirStream(merged)) as stream:
        while (entry := stream.read()) is not None:
            if entry.name not in (b".", b".."):
                (merged / os.fsdecode(entry.name)).unlink()
    assert _names(merged) == [".", ".."]
    merged.rmdir()


def test_renaming_each_name_as_it_is_read_keeps_the_others_listed(rig: Rig) -> None:
    names = {f"old-{number:03}" for number in range(300)}
    _touch(rig.lower, *names)
    merged = rig.mount()
    seen = set()
    with contextlib.closing(DirStream(merged)) as stream:
        while (entry := stream.read()) is not None:
            name = os.fsdecode(entry.name)
            if name.startswith("old-"):
                seen.add(name)
                (merged / name).rename(merged / f"renamed-{name[4:]}")
    assert seen == names


@pytest.mark.parametrize("where", ["lower", "upper", "merged"])
def test_telldir_and_seekdir_come_back_to_the_same_entry(rig: Rig, where: str) -> None:
    for tree in (rig.lower, rig.top):
        (tree / "plain").mkdir()
    if where in ("lower", "merged"):
        _touch(rig.lower, *(f"l{number:04}" for number in range(1000)))
    if where in ("upper", "merged"):
        _touch(rig.top, *(f"u{number:04}" for number in range(1000)))
    merged = rig.mount()
    with contextlib.closing(DirStream(merged)) as stream:
        marks = []
        while True:
            position = stream.tell()
            entry = stream.read()
            if entry is None:
                break
            marks.append((position, entry))
        for position, entry in marks[::97] + marks[::-89]:
            stream.seek(position)
            assert stream.read() == entry
        position, _ = marks[len(marks) // 2]
        stream.seek(position)
        assert stream.rest() == [entry for _, entry in marks[len(marks) // 2 :]]


def test_position_stays_valid_while_the_directory_changes(rig: Rig) -> None:
    names = [f"n{number:04}" for number in range(1000)]
    _touch(rig.lower, *names)
    merged = rig.mount()
    with contextlib.closing(DirStream(merged)) as stream:
        first = [stream.read() for _ in range(500)]
        position = stream.tell()
        later = {os.fsdecode(entry.name) for entry in stream.rest()}
        for entry in first[5:50]:
            assert entry is not None
            (merged / os.fsdecode(entry.name)).unlink()
        _touch(merged, "new1", "new2")
        stream.seek(position)
        again = {os.fsdecode(entry.name) for entry in stream.rest()}
        assert again - {"new1", "new2"} == later


def test_rewinddir_shows_what_changed(rig: Rig) -> None:
    _touch(rig.lower, "a", "b")
    merged = rig.mount()
    with contextlib.closing(DirStream(merged)) as stream:
        stream.rest()
        (merged / "a").unlink()
        _touch(merged, "c")
        stream.rewind()
        assert sorted(entry.name for entry in stream.rest()) == [b".", b"..", b"b", b"c"]


def test_two_streams_of_one_directory_do_not_disturb_each_other(rig: Rig) -> None:
    _touch(rig.lower, *(f"{number:03}" for number in range(500)))
    merged = rig.mount()
    first, second = DirStream(merged), DirStream(merged)
    with contextlib.closing(first), contextlib.closing(second):
        seen_first, seen_second = [], []
        while (entry := first.read()) is not None:
            seen_first.append(entry.name)
            seen_second += [other.name for other in (second.read(), second.read()) if other]
        seen_second += [entry.name for entry in second.rest()]
    assert len(seen_first) == 502
    assert sorted(seen_first) == sorted(seen_second)


def test_100_000_entries(rig: Rig) -> None:
    half = 50_000
    for tree, mark in ((rig.lower, "l"), (rig.top, "u")):
        for number in range(half):
            os.close(os.open(tree / f"{mark}{number:05}", os.O_WRONLY | os.O_CREAT))
    merged = rig.mount()
    names = os.listdir(merged)
    assert len(names) == len(set(names)) == 2 * half
    (merged / "l00000").unlink()
    (merged / "new").touch()
    after = set(os.listdir(merged))
    assert after == (set(names) - {"l00000"}) | {"new"}


def _one_of_each(tree: Path, mark: str) -> None:
    (tree / f"{mark}file").touch()
    (tree / f"{mark}directory").mkdir()
    (tree / f"{mark}symlink").symlink_to("x")
    os.mkfifo(tree / f"{mark}fifo")
    os.mknod(tree / f"{mark}char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(tree / f"{mark}block", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tree / f"{mark}socket"))


def test_d_type_and_d_ino_agree_with_stat(rig: Rig) -> None:
    _one_of_each(rig.lower, "l")
    _one_of_each(rig.lower, "c")
    _one_of_each(rig.top, "u")
    (rig.top / "ldirectory").mkdir()
    merged = rig.mount()
    for path in merged.glob("c*"):
        os.chown(path, 1, 1, follow_symlinks=False)
    with contextlib.closing(DirStream(merged)) as stream:
        entries = {os.fsdecode(entry.name): entry for entry in stream.rest()}
    assert len(entries) == 23
    for name, entry in entries.items():
        if name == "..":
            assert entry.type == stat.S_IFDIR >> 12
            continue
        found = os.lstat(merged / name)
        assert entry.type == stat.S_IFMT(found.st_mode) >> 12, name
        assert entry.ino == found.st_ino, name


def test_d_ino_agrees_with_stat_below_copied_up_and_pure_directories(rig: Rig) -> None:
    (rig.lower / "d/e").mkdir(parents=True)
    _touch(rig.lower / "d", "one", "two")
    _touch(rig.lower / "d/e", "three")
    merged = rig.mount()
    (merged / "d/one").write_text("copied up")
    (merged / "pure").mkdir()
    (merged / "d/two").rename(merged / "pure/two")
    (merged / "d/e/three").chmod(0o600)
    for directory in ("", "d", "d/e", "pure"):
        with contextlib.closing(DirStream(merged / directory)) as stream:
            for entry in stream.rest():
                if entry.name != b"..":
                    found = os.lstat(merged / directory / os.fsdecode(entry.name))
                    assert entry.ino == found.st_ino, (directory, entry.name)


def test_dot_entries_come_once(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    (rig.top / "d").mkdir()
    merged = rig.mount() / "d"
    with contextlib.closing(DirStream(merged)) as stream:
        assert sorted(entry.name for entry in stream.rest()) == [b".", b".."]


def test_listing_after_the_directory_was_removed_is_empty(rig: Rig) -> None:
    (rig.top / "d").mkdir()
    merged = rig.mount() / "d"
    with contextlib.closing(DirStream(merged)) as stream:
        merged.rmdir()
        assert {entry.name for entry in stream.rest()} <= {b".", b".."}

"""What a mount takes part of: many layers, mounts below layers, a mount over its own layer."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.semantics.rig import FUSE, NATIVE, Rig
from tests.support.transports import TRANSPORTS


def test_mounting_over_the_lower_directory(rig: Rig) -> None:
    (rig.lower / "file").write_text("below")
    (rig.lower / "d").mkdir()
    merged = rig.mount(at=rig.lower)
    assert (merged / "file").read_text() == "below"
    (merged / "file").write_text("above")
    (merged / "d/new").touch()
    assert (rig.top / "file").read_text() == "above"
    assert sorted(os.listdir(merged)) == ["d", "file"]
    rig.unmount()
    assert (rig.lower / "file").read_text() == "below"
    assert os.listdir(rig.lower / "d") == []


def test_mounting_over_the_upper_directory(rig: Rig) -> None:
    (rig.lower / "file").write_text("below")
    merged = rig.mount(at=rig.top)
    (merged / "new").touch()
    assert sorted(os.listdir(merged)) == ["file", "new"]
    rig.unmount()
    assert os.listdir(rig.top) == ["new"]


def test_mounting_inside_a_lower(rig: Rig) -> None:
    (rig.lower / "mnt").mkdir()
    (rig.lower / "file").write_text("below")
    merged = rig.mount(at=rig.lower / "mnt")
    assert sorted(os.listdir(merged)) == ["file", "mnt"]
    assert os.listdir(merged / "mnt") == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tree", ["lower", "upper"])
def test_file_system_mounted_below_a_layer_is_not_entered(rig: Rig, tree: str, when: str) -> None:
    layer = rig.lower if tree == "lower" else rig.top
    (layer / "d").mkdir()
    (layer / "d/covered").write_text("of the layer")
    if when == "before":
        rig.mount_tmpfs(layer / "d")
        (layer / "d/foreign").touch()
    merged = rig.mount()
    if when == "after":
        rig.mount_tmpfs(layer / "d")
        (layer / "d/foreign").touch()
    assert os.listdir(merged / "d") == ["covered"]
    assert (merged / "d/covered").read_text() == "of the layer"
    with pytest.raises(FileNotFoundError):
        (merged / "d/foreign").stat()
    (merged / "d/new").touch()
    assert sorted(os.listdir(merged / "d")) == ["covered", "new"]
    assert sorted(os.listdir(layer / "d")) == ["foreign"]


def test_layer_renamed_while_mounted_stays_in_use(rig: Rig) -> None:
    (rig.lower / "file").write_text("below")
    merged = rig.mount()
    rig.lower.rename(rig.base / "elsewhere")
    rig.top.rename(rig.base / "upper-elsewhere")
    assert (merged / "file").read_text() == "below"
    (merged / "file").write_text("above")
    assert (rig.base / "upper-elsewhere/file").read_text() == "above"


def test_layer_given_by_a_symlink(rig: Rig) -> None:
    real = rig.base / "real"
    real.mkdir()
    (real / "file").touch()
    link = rig.base / "link"
    link.symlink_to(real)
    rig.lowers = [link]
    assert os.listdir(rig.mount()) == ["file"]


def _fill(lowers: list[Path]) -> None:
    """A file of each layer, one of all, and marks in the middle."""
    last = len(lowers) - 1
    for number, lower in enumerate(lowers):
        (lower / "d").mkdir()
        (lower / f"d/only-{number}").write_text(f"{number}")
        (lower / "d/all").write_text(f"{number}")
    (lowers[last] / "deep").write_text("deepest")
    (lowers[last] / "cut").mkdir()
    (lowers[last] / "cut/hidden").touch()
    (lowers[last] / "gone").touch()
    middle = lowers[last // 2]
    os.mknod(middle / "gone", stat.S_IFCHR, 0)
    (middle / "cut").mkdir(exist_ok=True)
    os.setxattr(middle / "cut", "trusted.overlay.opaque", b"y" if last > 1 else b"n")


def _check_stack(rig: Rig, count: int) -> None:
    _fill(rig.stack(count))
    merged = rig.mount()
    assert (merged / "d/all").read_text() == "0"
    assert sorted(os.listdir(merged / "d")) == sorted(
        ["all", *(f"only-{number}" for number in range(count))]
    )
    assert (merged / f"d/only-{count - 1}").read_text() == f"{count - 1}"
    assert (merged / "deep").read_text() == "deepest"
    if count > 2:
        assert sorted(os.listdir(merged)) == ["cut", "d", "deep"]
        assert os.listdir(merged / "cut") == []
    (merged / "deep").write_text("changed")
    (merged / "d/all").unlink()
    (merged / f"d/only-{count - 1}").unlink()
    (merged / "d/new").touch()
    rig.remount()
    assert (merged / "deep").read_text() == "changed"
    assert sorted(os.listdir(merged / "d")) == sorted(
        ["new", *(f"only-{number}" for number in range(count - 1))]
    )


@pytest.mark.parametrize("count", [2, 3, 128, 500])
def test_stack_of_layers(rig: Rig, count: int) -> None:
    _check_stack(rig, count)


@pytest.mark.parametrize("way", TRANSPORTS, indirect=True)
def test_stack_of_1000_layers(rig: Rig) -> None:
    """More than the kernel takes, so by FUSE only."""
    _check_stack(rig, 1000)


def test_many_layers_without_upper(rig: Rig) -> None:
    lowers = rig.stack(100)
    for number, lower in enumerate(lowers):
        (lower / f"{number}").touch()
    rig.upper = None
    merged = rig.mount()
    assert len(os.listdir(merged)) == 100


def test_layer_written_by_one_backend_is_read_by_the_other(both: Rig) -> None:
    (both.lower / "d/e").mkdir(parents=True)
    for name in ("d/kept", "d/deleted", "d/e/changed"):
        (both.lower / name).write_text("below")

    def look() -> dict[str, str]:
        return {
            os.fspath(path.relative_to(both.merged)): path.read_text() if path.is_file() else "/"
            for path in sorted(both.merged.rglob("*"))
        }

    both.mount(backend=FUSE)
    (both.merged / "d/deleted").unlink()
    (both.merged / "d/e/changed").write_text("fuse")
    (both.merged / "pure").mkdir()
    (both.merged / "pure/file").write_text("fuse")
    seen = look()
    both.remount(backend=NATIVE)
    assert look() == seen
    (both.merged / "d/kept").write_text("kernel")
    (both.merged / "pure/file").unlink()
    (both.merged / "d/e/changed").unlink()
    (both.merged / "d/e").rmdir()
    (both.merged / "d/e").mkdir()
    seen = look()
    both.remount(backend=FUSE)
    assert look() == seen


def test_nothing_is_left_in_work_after_unmount(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    for number in range(5):
        (rig.lower / f"d/{number}").write_text("x")
    merged = rig.mount()
    for number in range(4):
        (merged / f"d/{number}").unlink()
    (merged / "d/4").write_text("y")
    (merged / "d/4").unlink()
    (merged / "d").rmdir()
    (merged / "d").mkdir()
    rig.unmount()
    left = [path for path in rig.work.rglob("*") if path != rig.work / "work"]
    assert all(stat.S_ISCHR(os.lstat(path).st_mode) for path in left), left
    assert len(left) <= 1
    rig.mount()
    assert os.listdir(rig.merged) == ["d"]


def test_lower_is_never_written(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    (rig.lower / "d/f").write_text("x")
    (rig.lower / "s").symlink_to("d/f")
    for path in (rig.lower / "d/f", rig.lower / "d", rig.lower):
        os.utime(path, ns=(1, 2))
    paths = (rig.lower, rig.lower / "d", rig.lower / "d/f", rig.lower / "s")
    before = [(os.lstat(path), os.listxattr(path, follow_symlinks=False)) for path in paths]
    merged = rig.mount()
    (merged / "s").read_text()
    os.listdir(merged / "d")
    (merged / "d/f").read_text()
    (merged / "d/f").write_text("y")
    (merged / "d/f").unlink()
    (merged / "d").rmdir()
    rig.unmount()
    after = [(os.lstat(path), os.listxattr(path, follow_symlinks=False)) for path in paths]
    assert [a[0] for a in after] == [b[0] for b in before]
    assert [a[0].st_atime_ns for a in after] == [b[0].st_atime_ns for b in before]
    assert [a[1] for a in after] == [b[1] for b in before]

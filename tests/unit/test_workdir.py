"""The work directory: cleaned at the start, refused when marked, tidy at the end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support.tree import Symlink, Tree, build
from tests.support.unions import Union, Unions, open_fds
from unionfs2.errors import LayerError


def left(u: Union, tree: Tree) -> None:
    """What a crashed mount has in its work directory."""
    build(u.work / "work", tree)


def test_it_is_made_closed_to_others(unions: Unions) -> None:
    u = unions({"f": ""})
    u.sh.chmod("f", 0o600)
    assert stat.S_IMODE((u.work / "work").stat().st_mode) == (0 if os.geteuid() == 0 else 0o700)


def test_leftovers_of_any_depth_go(unions: Unions, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    u = unions({})
    left(
        u,
        {
            "#1": "half",
            "#2": {"a": {"b": {"c": ""}}},
            "#3": Symlink(os.fspath(tmp_path)),
            "incompat": {},
        },
    )
    os.chmod(u.work / "work/#2/a", 0)
    (u.work / "beside").write_text("mine")
    assert u.in_work_after_open() == []
    assert (tmp_path / "precious").read_text() == "data"
    assert (u.work / "beside").read_text() == "mine"


def test_a_file_in_its_place_is_replaced(unions: Unions) -> None:
    u = unions({"f": ""})
    (u.work / "work").write_text("a file")
    u.sh.unlink("f")
    assert not u.sh.exists("f")


def test_another_live_mount_keeps_its_things(unions: Unions) -> None:
    u = unions({"f": "", "g": ""})
    u.sh.unlink("f")
    assert len(u.in_work()) == 1
    other = u.another(clean_work=False)
    assert len(u.in_work()) == 1
    u.sh.unlink("g")
    u.end(other)
    u.close()
    assert u.in_work() == []


@pytest.mark.parametrize("mark", ["volatile", "something of the future"])
def test_a_mark_of_incompatibility_is_refused(unions: Unions, mark: str) -> None:
    u = unions({})
    left(u, {"incompat": {mark: {}}})
    fds = open_fds()
    with pytest.raises(LayerError, match=f"incompat/{mark}.*remove that mark"):
        _ = u.fs
    assert open_fds() == fds
    assert (u.work / "work/incompat" / mark).is_dir()


def test_a_volatile_mount_marks_and_a_later_one_is_refused(unions: Unions) -> None:
    u = unions({"f": ""}, volatile=True)
    u.sh.chmod("f", 0o600)
    dirty = u.work / "work/incompat/volatile/dirty"
    assert stat.S_IMODE(dirty.stat().st_mode) == 0
    with pytest.raises(LayerError, match="incompat/volatile"):
        u.reopen()
    for path in (dirty, dirty.parent, dirty.parent.parent):
        path.rmdir() if path.is_dir() else path.unlink()
    u.reopen()
    assert dirty.exists()


def test_what_cannot_be_used_is_named(unions: Unions) -> None:
    u = unions({})
    u.work.rmdir()
    with pytest.raises(LayerError, match=r"cannot open work directory .*/work: No such file"):
        _ = u.fs

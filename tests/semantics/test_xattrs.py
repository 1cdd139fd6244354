"""Extended attributes and POSIX ACLs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.semantics.callers import ALICE, BOB, TEAM, as_caller
from tests.semantics.rig import Rig
from tests.semantics.system import (
    ACL_ACCESS,
    ACL_DEFAULT,
    ACL_GROUP,
    ACL_GROUP_OBJ,
    ACL_MASK,
    ACL_NO_ID,
    ACL_OTHER,
    ACL_USER_OBJ,
    acl,
    permissions,
    simple_acl,
)


@pytest.fixture(params=["lower-file", "upper-file", "lower-directory", "upper-directory"])
def path(request: pytest.FixtureRequest, rig: Rig) -> Path:
    """One object, not yet changed through the mount."""
    where, kind = str(request.param).split("-")
    below = (rig.lower if where == "lower" else rig.top) / "object"
    below.touch() if kind == "file" else below.mkdir()
    below.chmod(0o755)
    os.setxattr(below, "user.old", b"old value")
    return rig.mount() / "object"


def _errno(action: object) -> int:
    assert callable(action)
    with pytest.raises(OSError) as refused:  # noqa: PT011  # the errno is what the test compares
        action()
    assert refused.value.errno is not None
    return refused.value.errno


def test_set_get_list_remove(path: Path) -> None:
    assert os.getxattr(path, "user.old") == b"old value"
    os.setxattr(path, "user.new", b"\0binary\xff")
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "trusted.new", b"t")
    assert os.getxattr(path, "user.new") == b"\0binary\xff"
    assert os.getxattr(path, "user.empty") == b""
    listed = {name for name in os.listxattr(path) if not name.startswith("security.")}
    assert listed == {"user.old", "user.new", "user.empty", "trusted.new"}
    os.removexattr(path, "user.old")
    assert _errno(lambda: os.getxattr(path, "user.old")) == errno.ENODATA
    assert _errno(lambda: os.removexattr(path, "user.old")) == errno.ENODATA


def test_create_flag_refuses_an_existing_attribute(path: Path) -> None:
    os.setxattr(path, "user.new", b"1", os.XATTR_CREATE)
    for name in ("user.new", "user.old"):
        assert _errno(lambda: os.setxattr(path, name, b"2", os.XATTR_CREATE)) == errno.EEXIST  # noqa: B023
    assert os.getxattr(path, "user.new") == b"1"
    assert os.getxattr(path, "user.old") == b"old value"


def test_replace_flag_refuses_a_missing_attribute(path: Path) -> None:
    assert _errno(lambda: os.setxattr(path, "user.new", b"1", os.XATTR_REPLACE)) == errno.ENODATA
    os.setxattr(path, "user.old", b"2", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.old") == b"2"
    assert "user.new" not in os.listxattr(path)


def test_attributes_survive_copy_up_and_remount(path: Path, rig: Rig) -> None:
    os.setxattr(path, "user.new", b"1")
    path.chmod(0o700)
    rig.remount()
    assert os.getxattr(path, "user.old") == b"old value"
    assert os.getxattr(path, "user.new") == b"1"


def test_removing_an_absent_attribute_copies_nothing_up(rig: Rig) -> None:
    (rig.lower / "f").touch()
    merged = rig.mount() / "f"
    assert _errno(lambda: os.removexattr(merged, "user.none")) == errno.ENODATA
    assert not list(rig.top.iterdir())


def test_large_values_and_long_names(path: Path) -> None:
    value = os.urandom(2000)
    os.setxattr(path, "user.large", value)
    assert os.getxattr(path, "user.large") == value
    name = "user." + "n" * 250
    os.setxattr(path, name, b"1")
    assert name in os.listxattr(path)
    assert _errno(lambda: os.setxattr(path, name + "n", b"1")) == errno.ERANGE
    assert _errno(lambda: os.setxattr(path, "user.huge", bytes(70_000))) == errno.E2BIG


def test_unknown_namespace_is_refused(path: Path) -> None:
    assert _errno(lambda: os.setxattr(path, "nonsense.a", b"1")) == errno.EOPNOTSUPP
    assert _errno(lambda: os.getxattr(path, "nonsense.a")) == errno.EOPNOTSUPP


def test_overlay_marks_are_hidden(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    (rig.lower / "d/f").touch()
    (rig.lower / "gone").mkdir()
    merged = rig.mount()
    (merged / "d/f").chmod(0o600)
    (merged / "gone").rmdir()
    (merged / "gone").mkdir()
    for name, mark in (("d/f", "origin"), ("d", "origin"), ("d", "impure"), ("gone", "opaque")):
        assert f"trusted.overlay.{mark}" in os.listxattr(rig.top / name), name
        assert not [xattr for xattr in os.listxattr(merged / name) if "overlay" in xattr]
        code = _errno(lambda: os.getxattr(merged / name, f"trusted.overlay.{mark}"))  # noqa: B023
        assert code == errno.ENODATA


def test_overlay_names_of_the_caller_are_escaped_on_disk(rig: Rig) -> None:
    (rig.lower / "f").touch()
    merged = rig.mount()
    for name in ("f", "."):
        os.setxattr(merged / name, "trusted.overlay.opaque", b"y")
        assert os.getxattr(merged / name, "trusted.overlay.opaque") == b"y"
        assert "trusted.overlay.opaque" in os.listxattr(merged / name)
        assert os.getxattr(rig.top / name, "trusted.overlay.overlay.opaque") == b"y"
    rig.remount()
    assert os.getxattr(merged / "f", "trusted.overlay.opaque") == b"y"
    os.removexattr(merged / "f", "trusted.overlay.opaque")
    assert "trusted.overlay.overlay.opaque" not in os.listxattr(rig.top / "f")


def test_escaped_names_nest_and_are_copied_up_unchanged(rig: Rig) -> None:
    (rig.lower / "f").touch()
    os.setxattr(rig.lower / "f", "trusted.overlay.overlay.overlay.x", b"deep")
    merged = rig.mount() / "f"
    assert os.getxattr(merged, "trusted.overlay.overlay.x") == b"deep"
    merged.chmod(0o600)
    assert os.getxattr(rig.top / "f", "trusted.overlay.overlay.overlay.x") == b"deep"
    assert "trusted.overlay.overlay.x" in os.listxattr(merged)


def test_names_that_only_look_like_marks_are_ordinary(rig: Rig) -> None:
    merged = rig.mount() / "f"
    merged.touch()
    for name in ("trusted.overlay", "trusted.overlayx", "user.overlay.opaque"):
        os.setxattr(merged, name, b"1")
        assert name in os.listxattr(merged)
        assert os.getxattr(rig.top / "f", name) == b"1"
    assert _errno(lambda: os.setxattr(merged, "trusted.overlay.", b"1")) == errno.EINVAL


def test_trusted_attributes_are_for_root_only(rig: Rig) -> None:
    (rig.lower / "f").touch()
    (rig.lower / "f").chmod(0o666)
    os.setxattr(rig.lower / "f", "trusted.secret", b"1")
    os.setxattr(rig.lower / "f", "user.open", b"1")
    merged = rig.mount() / "f"
    assert as_caller(lambda: os.listxattr(merged)) == ["user.open"]
    assert _errno(lambda: as_caller(lambda: os.getxattr(merged, "trusted.secret"))) == errno.ENODATA
    code = _errno(lambda: as_caller(lambda: os.setxattr(merged, "trusted.a", b"1")))
    assert code == errno.EPERM


def test_user_attributes_follow_file_permissions(rig: Rig) -> None:
    (rig.lower / "f").touch()
    os.setxattr(rig.lower / "f", "user.a", b"1")
    (rig.lower / "f").chmod(0o644)
    merged = rig.mount() / "f"
    assert as_caller(lambda: os.getxattr(merged, "user.a")) == b"1"
    assert _errno(lambda: as_caller(lambda: os.setxattr(merged, "user.a", b"2"))) == errno.EACCES
    merged.chmod(0o600)
    assert _errno(lambda: as_caller(lambda: os.getxattr(merged, "user.a"))) == errno.EACCES


def test_symlinks_take_no_user_but_trusted_attributes(rig: Rig) -> None:
    (rig.lower / "s").symlink_to("x")
    merged = rig.mount() / "s"

    def put(name: str) -> None:
        os.setxattr(merged, name, b"1", follow_symlinks=False)

    assert _errno(lambda: put("user.a")) == errno.EPERM
    put("trusted.a")
    assert os.getxattr(merged, "trusted.a", follow_symlinks=False) == b"1"


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_acl_of_a_layer_is_enforced(rig: Rig, where: str) -> None:
    tree = rig.lower if where == "lower" else rig.top
    (tree / "f").write_text("secret")
    os.setxattr(tree / "f", ACL_ACCESS, simple_acl(ALICE, 4, mask=4, group=0, other=0))
    merged = rig.mount() / "f"
    assert as_caller(merged.read_text, uid=ALICE) == "secret"
    for uid in (BOB, TEAM):
        assert _errno(lambda: as_caller(merged.read_text, uid=uid)) == errno.EACCES  # noqa: B023
    assert _errno(lambda: as_caller(lambda: merged.write_text("x"), uid=ALICE)) == errno.EACCES


def test_acl_set_through_the_mount_is_enforced_at_once(path: Path) -> None:
    path.chmod(0o700)
    assert _errno(lambda: as_caller(lambda: os.open(path, os.O_RDONLY))) == errno.EACCES
    os.setxattr(path, ACL_ACCESS, simple_acl(ALICE, 5, mask=5, group=0, other=0))
    as_caller(lambda: os.open(path, os.O_RDONLY))
    assert permissions(path) == 0o750
    os.setxattr(path, ACL_ACCESS, simple_acl(ALICE, 0, mask=5, group=0, other=0))
    assert _errno(lambda: as_caller(lambda: os.open(path, os.O_RDONLY))) == errno.EACCES
    os.removexattr(path, ACL_ACCESS)
    assert ACL_ACCESS not in os.listxattr(path)
    assert _errno(lambda: as_caller(lambda: os.open(path, os.O_RDONLY))) == errno.EACCES


def test_acl_reaches_the_upper_and_survives(path: Path, rig: Rig) -> None:
    value = simple_acl(ALICE, 5, mask=5)
    os.setxattr(path, ACL_ACCESS, value)
    assert os.getxattr(rig.top / "object", ACL_ACCESS) == value
    assert os.getxattr(path, ACL_ACCESS) == value
    assert ACL_ACCESS in os.listxattr(path)
    rig.remount()
    assert os.getxattr(path, ACL_ACCESS) == value


def test_acl_for_a_group_counts_supplementary_groups(path: Path) -> None:
    value = acl(
        (ACL_USER_OBJ, 7, ACL_NO_ID),
        (ACL_GROUP_OBJ, 0, ACL_NO_ID),
        (ACL_GROUP, 4, TEAM),
        (ACL_MASK, 4, ACL_NO_ID),
        (ACL_OTHER, 0, ACL_NO_ID),
    )
    os.setxattr(path, ACL_ACCESS, value)
    as_caller(lambda: os.open(path, os.O_RDONLY), groups=[TEAM])
    assert _errno(lambda: as_caller(lambda: os.open(path, os.O_RDONLY))) == errno.EACCES


def test_chmod_changes_the_mask_of_an_acl(path: Path) -> None:
    os.setxattr(path, ACL_ACCESS, simple_acl(ALICE, 7, mask=7))
    path.chmod(0o700)
    assert os.getxattr(path, ACL_ACCESS) == simple_acl(ALICE, 7, mask=0)
    assert permissions(path) == 0o700


def test_acl_that_says_no_more_than_the_mode_is_not_kept(path: Path) -> None:
    plain = acl(
        (ACL_USER_OBJ, 6, ACL_NO_ID), (ACL_GROUP_OBJ, 4, ACL_NO_ID), (ACL_OTHER, 0, ACL_NO_ID)
    )
    os.setxattr(path, ACL_ACCESS, plain)
    assert permissions(path) == 0o640
    assert ACL_ACCESS not in os.listxattr(path)


def test_acl_is_set_by_the_owner_only_and_must_be_valid(path: Path) -> None:
    value = simple_acl(ALICE, 7)
    code = _errno(lambda: as_caller(lambda: os.setxattr(path, ACL_ACCESS, value)))
    assert code == errno.EPERM
    assert _errno(lambda: os.setxattr(path, ACL_ACCESS, b"nonsense")) == errno.EOPNOTSUPP
    assert _errno(lambda: os.setxattr(path, ACL_ACCESS, value[:-8])) == errno.EINVAL


def test_default_acl_is_for_directories_only(rig: Rig) -> None:
    (rig.lower / "f").touch()
    (rig.lower / "d").mkdir()
    merged = rig.mount()
    value = simple_acl(ALICE, 7)
    assert _errno(lambda: os.setxattr(merged / "f", ACL_DEFAULT, value)) == errno.EACCES
    os.setxattr(merged / "d", ACL_DEFAULT, value)
    assert os.getxattr(rig.top / "d", ACL_DEFAULT) == value
    os.removexattr(merged / "d", ACL_DEFAULT)
    assert os.listxattr(merged / "d") == []


def test_acl_is_copied_up(rig: Rig) -> None:
    (rig.lower / "d").mkdir()
    os.setxattr(rig.lower / "d", ACL_DEFAULT, simple_acl(BOB, 5))
    (rig.lower / "d/f").touch()
    os.setxattr(rig.lower / "d/f", ACL_ACCESS, simple_acl(ALICE, 6, mask=6))
    merged = rig.mount()
    os.utime(merged / "d/f", (1, 1))
    assert os.getxattr(rig.top / "d/f", ACL_ACCESS) == simple_acl(ALICE, 6, mask=6)
    assert os.getxattr(rig.top / "d", ACL_DEFAULT) == simple_acl(BOB, 5)


def test_sgid_is_dropped_when_a_user_outside_the_group_sets_an_acl(rig: Rig) -> None:
    (rig.lower / "f").touch()
    os.chown(rig.lower / "f", ALICE, TEAM)
    (rig.lower / "f").chmod(0o2755)
    merged = rig.mount() / "f"
    as_caller(lambda: os.setxattr(merged, ACL_ACCESS, simple_acl(BOB, 5, mask=5)), uid=ALICE)
    assert not permissions(merged) & 0o2000


def test_names_of_attributes_may_have_slashes_and_dots_in_them(path: Path) -> None:
    for name in ("user.a/b", "user./", "user.."):
        os.setxattr(path, name, b"value")
        assert os.getxattr(path, name) == b"value"
        assert name in os.listxattr(path)
        os.removexattr(path, name)
        assert name not in os.listxattr(path)

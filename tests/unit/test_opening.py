"""From a MountSpec to a stack, and every way in which that ends early: with nothing left open."""

from __future__ import annotations

import errno
import os
import resource
from typing import Any

import pytest

from tests.support.unions import Union, Unions, open_fds, trusted_only
from unionfs2 import opening, privilege
from unionfs2 import syscalls as sc
from unionfs2.branch import Identity
from unionfs2.errors import LayerError, OptionError
from unionfs2.union import UnionFS


def refused(u: Union, kind: type[Exception], text: str, **changes: Any) -> Any:
    fds = open_fds()
    with pytest.raises(kind, match=text) as caught:
        UnionFS.open(u.spec._replace(**changes))
    assert open_fds() == fds
    return caught.value


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"redirect_dir": "on"}, "redirect_dir=on"),
        ({"metacopy": True}, "metacopy=on"),
        ({"index": True}, "index=on"),
        ({"nfs_export": True}, "nfs_export=on"),
        ({"data": (b"/d",)}, "data-only"),
        ({"lower": ()}, "no lower directory"),
    ],
)
def test_options_of_the_kernel_alone(unions: Unions, changes: dict[str, Any], text: str) -> None:
    refused(unions({}), OptionError, text, **changes)


@pytest.mark.parametrize("role", ["lower", "upper", "work"])
def test_directories_that_are_none(unions: Unions, role: str) -> None:
    u = unions({})
    for path, number in ((b"/nowhere/at all", errno.ENOENT), (b"/proc/version", errno.ENOTDIR)):
        value: Any = (path,) if role == "lower" else path
        error = refused(
            u, LayerError, f"cannot open {role} directory {path.decode()}", **{role: value}
        )
        assert error.errno == number


def test_opening_and_closing_leaves_nothing(unions: Unions) -> None:
    u = unions({"f": ""}, {"g": ""})
    fds = open_fds()
    u.sh.chmod("f", 0o600)
    u.sh.unlink("g")
    u.sh.names()
    u.close()
    assert open_fds() == fds
    assert u.in_work() == []
    with UnionFS.open(u.spec) as fs:
        assert fs.lookup(fs.root, b"g") is None
    assert open_fds() == fds


def test_too_few_descriptors_are_said_so(unions: Unions) -> None:
    u = unions({}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (97, hard))
    try:
        error = refused(u, LayerError, "2 layers need more open files than the limit of 97")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert error.errno == errno.EMFILE


def test_the_dialect_is_chosen_by_privilege(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    u = unions({})
    for answer, name in ((True, "user"), (False, "trusted")):
        monkeypatch.setattr(privilege, "default_userxattr", lambda a=answer: a)
        with UnionFS.open(u.spec._replace(userxattr=None)) as fs:
            assert fs.stack.dialect.name == name


@pytest.mark.parametrize(
    ("uuid", "impure", "written"),
    [
        ("auto", False, True),
        ("auto", True, False),
        ("on", True, True),
        ("off", False, False),
        ("null", False, False),
    ],
)
def test_the_instance_id(unions: Unions, uuid: str, impure: bool, written: bool) -> None:
    u = unions({}, uuid=uuid)
    if impure:
        os.setxattr(u.upper, u.key("impure"), b"y")
    before = u.upper.stat().st_mtime_ns
    _ = u.fs
    value = u.marks(".").get("uuid")
    assert (value is not None) == written
    assert value is None or len(value) == 16
    assert u.upper.stat().st_mtime_ns == before
    u.reopen()
    assert u.marks(".").get("uuid") == value


def test_an_upper_without_attributes_still_opens(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no attributes here")

    monkeypatch.setattr(sc, "setxattr", refuse)
    u = unions({"f": "data"})
    assert u.sh.read("f") == b"data"
    assert u.marks(".") == {}


def test_layers_stay_where_they_were_when_they_are_moved(unions: Unions) -> None:
    u = unions({"f": "lower"}, upper={"g": "upper"})
    _ = u.fs
    for path in (u.lowers[0], u.upper):
        path.rename(path.with_suffix(".moved"))
        path.mkdir()
    assert u.sh.names() == [b"f", b"g"]
    u.sh.rename("f", "h")
    assert (u.upper.with_suffix(".moved") / "h").read_text() == "lower"
    for path in (u.lowers[0], u.upper):
        path.rmdir()
        path.with_suffix(".moved").rename(path)


def test_shared_trees_where_clones_are_not_allowed(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plain user opens them: everything works on the directories themselves."""
    monkeypatch.setattr(opening, "_clone", lambda fd: -1)
    monkeypatch.setattr(opening, "_clone_pair", lambda *_: None)
    u = unions({"d": {"f": "lower"}})
    assert not u.fs.stack.lowers[0].private
    u.sh.write("d/f", b"L")
    assert u.sh.read("d/f") == b"Lower"
    assert u.sh.names("d") == [b"f"]


@trusted_only
def test_a_pair_that_cannot_be_cloned_is_used_as_it_is(
    unions: Unions, monkeypatch: pytest.MonkeyPatch
) -> None:
    fds = open_fds()
    u = unions({"f": ""})
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    assert not u.fs.stack.root.upper.branch.private  # type: ignore[union-attr]
    u.sh.chmod("f", 0o600)
    u.close()
    assert open_fds() == fds


@trusted_only
def test_file_systems_are_numbered_once(unions: Unions) -> None:
    u = unions({}, {}, {})
    stack = u.fs.stack
    assert [branch.fs_index for branch in stack.lowers] == [0, 0, 0]
    assert not stack.mixed_fs
    assert len({branch.identity for branch in stack.lowers}) == 1
    assert stack.lowers[0].identity.handle_fd >= 0


def test_whether_handles_decode_is_tried(unions: Unions, monkeypatch: pytest.MonkeyPatch) -> None:
    u = unions({})
    fd = os.open(u.lowers[0], os.O_PATH)
    fds = open_fds()

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(sc, "open_by_handle", refuse)
    assert Identity.of(fd).handle_fd == -1
    assert open_fds() == fds
    os.close(fd)

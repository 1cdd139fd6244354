"""What holds for both spellings of the marks, and that neither minds the other."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tree import Dir, Tree, Whiteout
from tests.support.unions import Unions
from tests.support.unions import home as home
from tests.support.unions import unions as unions
from tests.support.unions import userxattr as userxattr
from unionfs2.whiteout import Dialect, is_device

TRUSTED, USER = Dialect(userxattr=False), Dialect(userxattr=True)
SUFFIXES = ("opaque", "whiteout", "origin", "impure", "redirect", "metacopy", "uuid", "protattr")

each_dialect = pytest.mark.parametrize("dialect", [TRUSTED, USER], ids=lambda d: d.name)
keys = st.one_of(
    st.binary(max_size=20),
    st.sampled_from((b"overlay.", b"overlay", b"opaque", b"overlay.overlay.x")),
)
prefixes = st.sampled_from((b"", b"user.", b"trusted.", b"user.overlay.", b"trusted.overlay."))


@each_dialect
def test_the_marks_are_spelt_alike(dialect: Dialect) -> None:
    for suffix in SUFFIXES:
        key = f"{dialect.name}.overlay.{suffix}".encode()
        assert getattr(dialect, suffix) == key
        assert dialect.is_private(key)
        assert dialect.to_view(key) is None


def test_no_mark_of_one_is_a_mark_of_the_other() -> None:
    for one, other in ((TRUSTED, USER), (USER, TRUSTED)):
        for suffix in SUFFIXES:
            key = getattr(one, suffix)
            assert not other.is_private(key)
            assert other.to_view(key) == other.to_disk(key) == key


@pytest.mark.parametrize("dialect", [TRUSTED, USER], ids=lambda d: d.name)
@settings(database=None, deadline=None)
@given(prefix=prefixes, rest=keys)
def test_what_a_caller_sets_is_what_a_caller_sees(
    dialect: Dialect, prefix: bytes, rest: bytes
) -> None:
    """And it is never one of our own marks."""
    key = prefix + rest
    if key == dialect.prefix:
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            dialect.to_disk(key)
        assert caught.value.errno == errno.EINVAL
        return
    on_disk = dialect.to_disk(key)
    assert dialect.to_view(on_disk) == key
    assert not dialect.is_private(on_disk)


@pytest.mark.parametrize("dialect", [TRUSTED, USER], ids=lambda d: d.name)
@settings(database=None, deadline=None)
@given(prefix=prefixes, rest=keys)
def test_what_is_shown_can_be_asked_for(dialect: Dialect, prefix: bytes, rest: bytes) -> None:
    on_disk = prefix + rest
    shown = dialect.to_view(on_disk)
    assert (shown is None) == (dialect.is_private(on_disk) or on_disk == dialect.escaped)
    if shown is not None:
        assert dialect.to_disk(shown) == on_disk


@each_dialect
def test_an_escaped_name_without_a_name_is_hidden(dialect: Dialect) -> None:
    assert dialect.to_view(dialect.escaped) is None


# --- on disk ------------------------------------------------------------------------------------


def test_marks_of_all_operations_are_in_one_namespace(unions: Unions, userxattr: bool) -> None:
    u = unions({"f": "", "d": {"x": ""}, "gone": {}}, upper={"pure": {}})
    u.sh.chmod("d/x", 0o600)
    u.sh.rmdir("gone")
    u.sh.mkdir("gone")
    u.sh.rename("pure", "moved")
    u.sh.unlink("f")
    marked = {"d": {"origin", "impure"}, "d/x": {"origin"}, "gone": {"opaque"}, "moved": {"opaque"}}
    foreign = "trusted." if userxattr else "user."
    for path, suffixes in marked.items():
        entry = u.on_disk(path)
        assert entry is not None
        assert {key for key, _ in entry.xattrs} == {u.key(suffix) for suffix in suffixes}
        assert not [key for key, _ in entry.xattrs if key.startswith(foreign)]
    assert set(u.marks(".")) == {"impure", "uuid"}


def test_what_one_mount_wrote_the_next_one_reads(unions: Unions) -> None:
    lower: Tree = {"f": "", "d": {"x": "", "y": ""}, "gone": {"z": ""}}
    u = unions(lower)
    u.sh.unlink("f")
    u.sh.unlink("d/x")
    u.sh.unlink("gone/z")
    u.sh.rmdir("gone")
    u.sh.mkdir("gone")
    u.reopen()
    assert u.sh.names() == [b"d", b"gone"]
    assert u.sh.names("d") == [b"y"]
    assert u.sh.names("gone") == []


def test_whiteouts_are_devices_in_both(unions: Unions) -> None:
    u = unions({"f": "", "g": "", "d": {}}, upper={"g": Whiteout(mode=0o644)})
    assert not u.sh.exists("g")
    u.sh.unlink("f")
    u.sh.rmdir("d")
    for name in ("f", "d"):
        info = (u.upper / name).lstat()
        assert is_device(info)
        assert (info.st_mode & 0o7777, info.st_size) == (0, 0)
        assert os.listxattr(u.upper / name, follow_symlinks=False) == []


def test_an_upper_of_the_other_dialect_shows_what_is_hidden(
    unions: Unions, userxattr: bool
) -> None:
    """Only device whiteouts mean the same to both: a warning of the format reference."""
    u = unions({"d": {"x": ""}, "f": ""}, upper={"d": Dir({}, opaque=True), "f": Whiteout()})
    assert not u.sh.exists("d/x")
    u.close()
    os.removexattr(u.upper / "d", u.key("opaque"))
    other = USER if not userxattr else TRUSTED
    try:
        os.setxattr(u.upper / "d", other.opaque, b"y")
    except PermissionError:
        pytest.skip("trusted.* cannot be set here")
    assert u.sh.exists("d/x")
    assert not u.sh.exists("f")

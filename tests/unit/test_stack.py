"""Lookup through many layers, and what each mark means on the way."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator

import pytest

from tests.support.tree import Dir, File, HardLink, Tree, Whiteout
from tests.support.unions import Union, Unions, trusted_only
from unionfs2 import syscalls as sc
from unionfs2.nodes import Dir as DirNode


@pytest.fixture
def _many_fds() -> Iterator[None]:
    """A thousand layers need two thousand descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def mark(u: Union, layer: int, path: str, suffix: str, value: bytes) -> None:
    os.setxattr(u.layer(layer) / path, u.key(suffix), value, follow_symlinks=False)


def errno_of_lookup(u: Union, path: str) -> int:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        u.sh.exists(path)
    return caught.value.errno or 0


@pytest.mark.parametrize("count", [2, 128, 500, 1000])
@pytest.mark.usefixtures("_many_fds")
@pytest.mark.parametrize("userxattr", [True])
def test_names_of_any_number_of_layers(unions: Unions, count: int) -> None:
    lowers: list[Tree] = [{"all": {f"n{n}": f"{n}", "same": f"{n}"}} for n in range(count)]
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 3 * count:
        pytest.skip("the hard limit of open files is too low")
    u = unions(*lowers)
    last = count - 1
    # One name at a time, then many, then all: with and without the index of names.
    assert u.sh.read(f"all/n{last}") == b"%d" % last
    assert u.sh.read("all/n0") == b"0"
    assert not u.sh.exists("all/missing")
    for number in range(0, count, max(1, count // 20)):
        assert u.sh.read(f"all/n{number}") == b"%d" % number
    assert u.sh.read("all/same") == b"0"
    assert not u.sh.exists("all/missing either")
    assert u.sh.names("all") == sorted([b"same", *(b"n%d" % n for n in range(count))])
    node = u.sh.dir("all")
    assert len(node.lowers) == count
    u.sh.unlink("all/same")
    u.sh.write(f"all/n{last}", b"up", flags=os.O_TRUNC)
    assert not u.sh.exists("all/same")
    assert u.sh.read(f"all/n{last}") == b"up"


@pytest.mark.parametrize("count", [3, 30])
def test_what_ends_the_search(unions: Unions, count: int) -> None:
    """A whiteout, a file below a directory, a directory below a file, an opaque directory."""
    top: Tree = {"w": Whiteout(), "df": {"top": ""}, "fd": "file", "o": Dir({}, opaque=True)}
    middle: Tree = {"w": "m", "df": "file", "fd": {"m": ""}, "o": {"m": ""}}
    low: Tree = {"w": "low", "df": {"low": ""}, "fd": {"low": ""}, "o": {"low": ""}, "only": ""}
    u = unions(top, *({} for _ in range(count - 3)), middle, low)
    for _ in range(2):  # the second time through the index, where there is one
        for _ in range(10):
            assert not u.sh.exists("w")
            assert u.sh.exists("only")
        assert u.sh.names("df") == [b"top"]
        assert u.sh.read("fd") == b"file"
        assert u.sh.names("o") == []
        assert not u.sh.exists("o/low")
        assert u.sh.names() == [b"df", b"fd", b"o", b"only"]


def test_an_opaque_middle_layer_takes_part_itself(unions: Unions) -> None:
    u = unions({"d": {"1": ""}}, {"d": Dir({"2": ""}, opaque=True)}, {"d": {"3": ""}})
    assert u.sh.names("d") == [b"1", b"2"]
    assert not u.sh.exists("d/3")


@pytest.mark.parametrize(("value", "hides"), [(b"y", True), (b"n", False), (b"yes", False)])
def test_only_one_y_is_opaque(unions: Unions, value: bytes, hides: bool) -> None:
    u = unions({"d": {"low": ""}}, upper={"d": {"up": ""}})
    mark(u, 0, "d", "opaque", value)
    assert u.sh.exists("d/low") != hides


def test_roots_merge_whatever_they_are_marked(unions: Unions) -> None:
    u = unions({"1": ""}, {"2": ""})
    for layer in (0, 1):
        os.setxattr(u.layer(layer), u.key("opaque"), b"y")
    assert u.sh.names() == [b"1", b"2"]


def test_the_other_dialect_means_nothing(unions: Unions, userxattr: bool) -> None:
    u = unions({"d": {"low": ""}}, upper={"d": {}})
    other = "trusted.overlay.opaque" if userxattr else "user.overlay.opaque"
    try:
        os.setxattr(u.upper / "d", other, b"y")
    except PermissionError:
        pytest.skip("trusted.* cannot be set here")
    assert u.sh.exists("d/low")


# --- whiteouts as attributes --------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_empty_file_with_the_mark_is_a_whiteout(unions: Unions, layer: int) -> None:
    u = unions({}, {}, {"f": "low"})
    (u.layer(layer) / "f").unlink(missing_ok=True)
    (u.layer(layer) / "f").touch()
    mark(u, layer, "f", "whiteout", b"")
    assert not u.sh.exists("f") or layer == 2
    u.sh.create("g")
    assert u.sh.exists("g")


def test_a_file_with_data_is_no_whiteout(unions: Unions) -> None:
    u = unions({"f": "data"}, {"f": "low"})
    mark(u, 1, "f", "whiteout", b"y")
    assert u.sh.read("f") == b"data"


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_removed_over_an_attribute_whiteout_leaves_none(unions: Unions, layer: int) -> None:
    u = unions({"f": ""}, {"f": "low"}, upper={})
    if layer == 0:
        (u.upper / "f").touch()
    mark(u, layer, "f", "whiteout", b"")
    if layer == 1:
        u.sh.create("f", b"new")
        u.sh.unlink("f")
        assert u.on_disk("f") is None
    assert not u.sh.exists("f")


# --- what must not be shown ---------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_a_hollow_file_is_refused(unions: Unions, layer: int) -> None:
    u = unions({"f": "hollow"}, {"f": "data"}, upper={"f": "hollow"} if layer == 0 else {})
    mark(u, layer, "f", "metacopy", b"")
    assert errno_of_lookup(u, "f") == errno.EPERM


def test_a_name_that_is_too_long(unions: Unions) -> None:
    u = unions({})
    u.sh.create("n" * 255)
    assert u.sh.exists("n" * 255)
    assert errno_of_lookup(u, "n" * 256) == errno.ENAMETOOLONG


# --- redirects ----------------------------------------------------------------------------------

MALFORMED = {
    b"": errno.EINVAL,
    b"a/b": errno.EINVAL,
    b"../x": errno.EINVAL,
    b"/": errno.EINVAL,
    b"//x": errno.EINVAL,
    b"/x/": errno.EINVAL,
    b"/x//y": errno.EINVAL,
    b".": errno.EACCES,
    b"..": errno.EACCES,
    b"/..": errno.EACCES,
    b"/x/./y": errno.EACCES,
}


@trusted_only
@pytest.mark.parametrize(("value", "number"), MALFORMED.items())
@pytest.mark.parametrize("layer", [0, 1])
def test_malformed_redirects(unions: Unions, layer: int, value: bytes, number: int) -> None:
    upper: Tree = {"d": {}} if layer == 0 else {}
    u = unions({"d": {}, "x": {}}, {"x": {}}, upper=upper)
    mark(u, layer, "d", "redirect", value)
    assert errno_of_lookup(u, "d") == number


@trusted_only
def test_redirects_are_followed(unions: Unions) -> None:
    low: Tree = {"old": {"r": ""}, "x": {"y": {"a": ""}}, "new": {"wrong": ""}}
    u = unions({"mid": {"m": ""}}, low, upper={"new": {"u": ""}, "abs": {}, "chain": {}})
    mark(u, 0, "new", "redirect", b"old")
    mark(u, 0, "abs", "redirect", b"/x/y")
    mark(u, 0, "chain", "redirect", b"mid")
    mark(u, 1, "mid", "redirect", b"old")
    assert u.sh.names("new") == [b"r", b"u"]
    assert u.sh.names("abs") == [b"a"]
    assert u.sh.names("chain") == [b"m", b"r"]


@trusted_only
def test_an_absolute_redirect_restarts_below_its_own_layer(unions: Unions) -> None:
    low: Tree = {"x": {"y": {"3": ""}}}
    u = unions({"x": {"y": {"1": ""}}}, {"d": {"2": ""}, "x": {"y": {"no": ""}}}, low)
    mark(u, 2, "d", "redirect", b"/x/y")
    assert u.sh.names("d") == [b"2", b"3"]


@trusted_only
def test_an_absolute_redirect_counts_layers_not_directories(unions: Unions) -> None:
    """The parent is missing in the first layer: its list of directories is shorter."""
    top: Tree = {"x": {"y": {"1": ""}}}
    u = unions(top, {"p": {"d": {"2": ""}}, "x": {"y": {"no": ""}}}, {"x": {"y": {"3": ""}}})
    mark(u, 2, "p/d", "redirect", b"/x/y")
    assert u.sh.names("p/d") == [b"2", b"3"]


@trusted_only
@pytest.mark.parametrize("stop", ["whiteout", "file", "opaque"])
def test_an_absolute_redirect_ends_where_its_way_ends(unions: Unions, stop: str) -> None:
    way: dict[str, Tree] = {
        "whiteout": {"x": Whiteout()},
        "file": {"x": "file"},
        "opaque": {"x": Dir({"y": {"2": ""}}, opaque=True)},
    }
    u = unions(way[stop], {"x": {"y": {"3": ""}}}, upper={"d": {}})
    mark(u, 0, "d", "redirect", b"/x/y")
    assert u.sh.names("d") == ([b"2"] if stop == "opaque" else [])


@trusted_only
def test_redirects_can_be_refused(unions: Unions) -> None:
    u = unions({"old": {"r": ""}}, upper={"d": {}}, redirect_dir="nofollow")
    mark(u, 0, "d", "redirect", b"old")
    assert errno_of_lookup(u, "d") == errno.EPERM


@pytest.mark.parametrize("userxattr", [True])
def test_user_marks_never_redirect(unions: Unions) -> None:
    """Anybody could write them (ovl_fs_params_verify())."""
    u = unions({"secret": {"r": ""}}, upper={"d": {}})
    mark(u, 0, "d", "redirect", b"/secret")
    assert errno_of_lookup(u, "d") == errno.EPERM


# --- what lookup writes -------------------------------------------------------------------------


@trusted_only
@pytest.mark.parametrize("read_only", [False, True])
def test_a_merged_directory_gets_its_origin(unions: Unions, read_only: bool) -> None:
    u = unions({"d": {}}, upper={"d": {}}, read_only=read_only)
    number = (u.lowers[0] / "d").stat().st_ino
    assert u.sh.ino("d") == number
    assert set(u.marks("d")) == {"origin"}
    assert u.marks(".")["impure"] == b"y"


def test_an_origin_is_never_replaced(unions: Unions) -> None:
    u = unions({"d": {"f": ""}}, upper={"d": {}})
    mark(u, 0, "d", "origin", b"garbage")
    assert u.sh.names("d") == [b"f"]
    assert u.marks("d") == {"origin": b"garbage"}


@trusted_only
def test_an_origin_of_another_type(unions: Unions) -> None:
    u = unions({"f": "file", "d": {}}, upper={})
    u.sh.chmod("f", 0o600)
    (u.lowers[0] / "f").unlink()
    value = u.marks("f")["origin"]
    u.close()
    # The handle of a live directory under a file.
    handle = sc.name_to_handle(os.fsencode(u.lowers[0] / "d"), sc.AT_FDCWD)
    mark(u, 0, "f", "origin", value[:21] + handle.fid)
    assert errno_of_lookup(u, "f") == errno.EIO


@trusted_only
def test_an_origin_with_several_names_is_not_the_number(unions: Unions) -> None:
    """Two copies of one object would show one number."""
    u = unions({"f": ""})
    u.sh.chmod("f", 0o600)
    u.close()
    os.link(u.lowers[0] / "f", u.lowers[0] / "g")
    assert u.sh.ino("f") == (u.upper / "f").stat().st_ino


@trusted_only
def test_the_numbers_of_the_view(unions: Unions) -> None:
    """st_ino is the lower's through copy-up and a new mount, but not for a broken hard link."""
    u = unions({"f": "", "d": {}, "h": "", "h2": HardLink("h")})
    before = {name: u.sh.ino(name) for name in ("f", "d", "h")}
    lower = {name: (u.lowers[0] / name).stat().st_ino for name in before}
    assert before == lower
    for name in before:
        u.sh.chmod(name, 0o700)
    after = {name: u.sh.ino(name) for name in before}
    assert (after["f"], after["d"]) == (before["f"], before["d"])
    assert after["h"] == (u.upper / "h").stat().st_ino
    u.reopen()
    assert {name: u.sh.ino(name) for name in before} == after
    assert u.sh.ino("") == u.upper.stat().st_ino


def test_link_counts_of_the_view(unions: Unions) -> None:
    u = unions({"m": {"s": {}}, "l": {"s": {}, "t": {}}}, upper={"m": {}, "p": {"s": {}}})
    counts = {name: u.sh.nlink(name) for name in ("m", "p", "l", "")}
    assert counts == {"m": 1, "p": 3, "l": (u.lowers[0] / "l").stat().st_nlink, "": 1}


def test_a_node_is_found_again_by_its_name(unions: Unions) -> None:
    u = unions({"d": {"f": File("x")}})
    assert u.sh.node("d/f") is u.sh.node("d/f")
    assert isinstance(u.sh.node("d"), DirNode)
    assert u.sh.node("d/f").kind == stat.S_IFREG

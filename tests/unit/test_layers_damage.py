"""Damaged stores: one clear sentence each, all other layers work, repair mends or puts aside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.stores import (
    SHORT_A,
    assert_clean,
    codes,
    docker_store,
    fill,
    lid,
    open_store,
)
from unionfs2 import syscalls
from unionfs2.errors import DamagedLayerError, LayerInUseError, StoreError, UnknownLayerError
from unionfs2.storecheck import check
from unionfs2.storemodel import Digest, Size
from unionfs2.storerepair import repair

A, B, C, X = lid("a"), lid("b"), lid("c"), lid("x")
DIGEST = Digest("sha256:" + "7" * 64)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "syncfs"):
        monkeypatch.setattr(syscalls, name, lambda fd: None)


def ours(home: Path) -> None:
    """The same chain as docker_store(), but ours, and a layer x that stands alone."""
    with open_store(home) as store:
        store.create(A)
        store.create(B, A)
        store.create(C, B)
        store.create(X)
        for layer in (A, B, C, X):
            fill(store, layer, {"name": layer})


def docker(home: Path) -> None:
    docker_store(home)
    (home / "x" / "diff").mkdir(parents=True)
    (home / "x").chmod(0o710)
    (home / "x" / "link").write_text("X" * 26)
    (home / "l" / ("X" * 26)).symlink_to("../x/diff")


class Damage(NamedTuple):
    """What is done to a store, the sentence about which layer, and what repair leaves."""

    harm: Callable[[Path], object]
    layer: str
    sentence: str
    code: str
    left: str = "abcx"  # layers after repair of a store of ours
    left_docker: str = "abcx"  # and of one that Docker wrote


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda home: (home / name).write_text(text)


def remove(name: str) -> Callable[[Path], object]:
    def harm(home: Path) -> None:
        if (home / name).is_dir():
            shutil.rmtree(home / name)
        else:
            (home / name).unlink()

    return harm


def replace_by_link(name: str, target: str) -> Callable[[Path], object]:
    def harm(home: Path) -> None:
        (home / name).rename(home.parent / "moved")
        (home / name).symlink_to(target)

    return harm


def link_of(home: Path, layer: str) -> str:
    return (home / layer / "link").read_text()


def name_itself(home: Path) -> None:
    (home / "c" / "lower").write_text(f"l/{link_of(home, 'c')}:l/{link_of(home, 'a')}")


def make_cycle(home: Path) -> None:
    (home / "a" / "lower").write_text(f"l/{link_of(home, 'b')}")


def name_twice(home: Path) -> None:
    (home / "c" / "lower").write_text(f"l/{link_of(home, 'a')}:l/{link_of(home, 'a')}")


def point_elsewhere(target: str) -> Callable[[Path], object]:
    def harm(home: Path) -> None:
        link = home / "l" / link_of(home, "x")
        link.unlink()
        link.symlink_to(target)

    return harm


def take_link(home: Path) -> None:
    (home / "x" / "link").write_text(link_of(home, "a"))


def dangle(home: Path) -> None:
    lower = (home / "c" / "lower").read_text().split(":")
    (home / "c" / "lower").write_text(":".join(["l/" + "N" * 26, *lower[1:]]))


def put_directory(home: Path) -> None:
    (home / "x" / "link").unlink()
    (home / "x" / "link").mkdir()


def put_file(home: Path) -> None:
    shutil.rmtree(home / "x")
    (home / "x").touch()


DAMAGES = {
    "link empty": Damage(write("x/link", ""), "x", "link is empty", "link-damaged"),
    "link missing": Damage(remove("x/link"), "x", "link is missing", "link-damaged"),
    "link garbage": Damage(
        write("x/link", "../../etc"), "x", r"link holds '\.\./\.\./etc', not a name", "link-damaged"
    ),
    "link of another": Damage(
        take_link, "x", r"link holds \w{26}, which leads to layer a", "link-taken"
    ),
    "link is a directory": Damage(
        put_directory,
        "x",
        "link is not a regular file",
        "link-damaged",
    ),
    "lower empty": Damage(
        write("c/lower", ""), "c", "lower is empty", "lower-damaged", left_docker="abx"
    ),
    "lower of another form": Damage(
        write("c/lower", "l/../../etc"),
        "c",
        r"lower holds 'l/\.\./\.\./etc', not l/ and 26",
        "lower-damaged",
        left_docker="abx",
    ),
    "lower absolute": Damage(
        write("c/lower", f"/l/{SHORT_A}"),
        "c",
        "lower holds '/l/A+', not l/",
        "lower-damaged",
        left_docker="abx",
    ),
    "lower names itself": Damage(
        name_itself,
        "c",
        r"lower names the layer itself \(l/\w{26}\)",
        "lower-damaged",
        left_docker="abx",
    ),
    "lower names a layer twice": Damage(
        name_twice, "c", r"lower names l/\w{26} twice", "lower-damaged", left_docker="abx"
    ),
    "lower names nobody": Damage(
        dangle, "c", "lower names l/N{26}, which no layer has", "lower-broken", left_docker="abx"
    ),
    "record garbage": Damage(
        write("x/layer.json", "{"), "x", r"layer\.json is not JSON", "record-damaged"
    ),
    "record empty": Damage(
        write("x/layer.json", ""), "x", r"layer\.json is empty", "record-damaged"
    ),
    "record of another form": Damage(
        write("x/layer.json", "[1]"), "x", "is not a JSON object", "record-damaged"
    ),
    "record with a wrong value": Damage(
        write("x/layer.json", '{"version": 1, "writable": "maybe"}'),
        "x",
        r"layer\.json has writable = 'maybe', not true or false",
        "record-damaged",
    ),
    "record without version": Damage(
        write("x/layer.json", "{}"), "x", "version = None", "record-damaged"
    ),
    "record too deep": Damage(
        write("x/layer.json", "[" * 100_000), "x", "is not JSON", "record-damaged"
    ),
    "diff missing": Damage(remove("x/diff"), "x", "diff is missing", "diff-missing", "abc", "abc"),
    "diff is a link": Damage(
        replace_by_link("x/diff", "/etc"),
        "x",
        "diff is not a directory",
        "diff-missing",
        "abc",
        "abc",
    ),
    "layer is a link": Damage(
        replace_by_link("x", "a"), "x", "is not a directory", "layer-stray", "abc", "abc"
    ),
    "layer is a file": Damage(
        put_file,
        "x",
        "is not a directory",
        "layer-stray",
        "abc",
        "abc",
    ),
}


@pytest.mark.parametrize("make", [ours, docker], ids=["ours", "docker's"])
@pytest.mark.parametrize("case", DAMAGES)
def test_one_sentence_and_all_others_work(
    tmp_path: Path, case: str, make: Callable[[Path], None]
) -> None:
    damage = DAMAGES[case]
    home = tmp_path / "home"
    make(home)
    with open_store(home) as store:
        store.ids()
        damage.harm(home)
        with pytest.raises(DamagedLayerError, match=damage.sentence) as caught:
            store.layer(lid(damage.layer))
        text = str(caught.value)
        assert text.startswith(f"layer {damage.layer} is damaged: ")
        assert text.endswith("see unionfs2 check, mend with unionfs2 repair")
        assert "\n" not in text
        for layer in {"a", "b", "c", "x"} - {damage.layer}:
            store.layer(lid(layer))
        store.ids()
        store.parents()
        for layer in "abcx":
            store.children(lid(layer))
        store.create(lid("new"), A)
        store.discard(lid("new"))
        found = codes(check(store))
        assert damage.code in found, found
        before = set(store.ids())
        results = repair(store)
        assert all(result.done for result in results), list(map(str, results))
        left = damage.left if make is ours else damage.left_docker
        assert "".join(store.ids()) == left
        assert_clean(store)
        aside = home / ".unionfs2" / "quarantine"
        for layer in before - set(store.ids()):
            assert list(aside.glob(f"*-{layer}"))
        for item in aside.glob("*"):
            if not item.name.endswith(".txt"):
                assert (aside / f"{item.name}.txt").read_text().startswith(str(home))
        if make is ours:
            for layer in store.ids():
                assert (home / layer / "diff" / "name").read_text() == layer
        assert repair(store) == []


@pytest.mark.parametrize("make", [ours, docker], ids=["ours", "docker's"])
@pytest.mark.parametrize(
    # What is no directory is no layer to remove.
    "case",
    [case for case, damage in DAMAGES.items() if damage.code != "layer-stray"],
)
def test_a_damaged_layer_can_be_removed(
    tmp_path: Path, case: str, make: Callable[[Path], None]
) -> None:
    damage = DAMAGES[case]
    home = tmp_path / "home"
    make(home)
    damage.harm(home)
    with open_store(home) as store:
        store.discard(lid(damage.layer))
        assert damage.layer not in store.ids()
        store.mend()
        assert [f for f in check(store) if f.code != "link-dangling"] == []


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("../nowhere/diff", "link-wrong"),
        ("/etc", "link-wrong"),
        ("../x/../../../etc", "link-wrong"),
        ("../x", "link-wrong"),
        ("../.unionfs2/diff", "link-wrong"),
    ],
)
@pytest.mark.parametrize("make", [ours, docker], ids=["ours", "docker's"])
def test_a_link_that_leads_to_no_layer_is_made_again_at_use(
    tmp_path: Path, make: Callable[[Path], None], target: str, code: str
) -> None:
    home = tmp_path / "home"
    make(home)
    with open_store(home) as store:
        point_elsewhere(target)(home)
        assert codes(check(store)) == [code]
        assert store.layer(X).chain == ()
        assert os.readlink(home / "l" / link_of(home, "x")) == "../x/diff"
        assert_clean(store)


def test_a_link_that_leads_to_another_layer_is_not_believed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    docker(home)
    with open_store(home) as store:
        (home / "l" / SHORT_A).unlink()
        (home / "l" / SHORT_A).symlink_to("../x/diff")
        with pytest.raises(DamagedLayerError, match=r"link holds A+, which leads to layer x"):
            store.layer(A)
        with pytest.raises(DamagedLayerError, match="leads to layer x though layer a has that"):
            store.layer(B)
        assert store.layer(X).chain == ()
        assert codes(check(store)) == ["link-stolen", "lower-broken", "lower-broken"]
        repair(store)
        assert_clean(store)
        assert store.layer(C).chain == ("b", "a")


def test_a_cycle_is_told_by_every_layer_in_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    ours(home)
    make_cycle(home)
    with open_store(home) as store:
        assert store.layer(X).chain == ()
        assert set(store.ids()) == {"a", "b", "c", "x"}
        # Each lower alone is possible, so each layer can be read; together they are not.
        assert "lower-irregular" in codes(check(store))
        with pytest.raises(StoreError):
            store.discard(A)
        with pytest.raises(StoreError):
            store.discard(B)


def test_a_record_of_a_newer_version_is_for_a_newer_program(tmp_path: Path) -> None:
    home = tmp_path / "home"
    ours(home)
    text = '{"version": 2, "anything": 1}'
    (home / "x" / "layer.json").write_text(text)
    with open_store(home) as store:
        with pytest.raises(DamagedLayerError, match=r"version 2.*reads up to 1.*newer unionfs2"):
            store.layer(X)
        (finding,) = check(store)
        assert (finding.code, finding.repair) == ("record-newer", None)
        (result,) = repair(store)
        assert not result.done
        assert (home / "x" / "layer.json").read_text() == text


@pytest.mark.parametrize("kind", ["link", "file", "missing"])
def test_a_link_directory_that_is_none(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "home"
    ours(home)
    shutil.rmtree(home / "l")
    if kind == "link":
        (home / "l").symlink_to("a/diff")
    elif kind == "file":
        (home / "l").write_text("x")
    with open_store(home) as store:
        if kind == "missing":  # made at opening; the links with it
            assert_clean(store)
            return
        assert store.ids() == ("a", "b", "c", "x")
        assert store.layer(X).chain == ()
        with pytest.raises(DamagedLayerError, match=r"layer c cannot be used: .*/l is not a dir"):
            store.layer(C)
        with pytest.raises(StoreError, match="is not a directory"):
            store.create(lid("new"))
        store.discard(C)
        assert "links-damaged" in codes(check(store))
        repair(store)
        assert_clean(store)
        assert store.layer(B).chain == ("a",)
    assert os.listdir(home / "a" / "diff") == ["name"]


# --- check and repair, the rest -------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    ours(tmp_path / "home")
    return tmp_path / "home"


def findings_after(home: Path, harm: Callable[[Path], object]) -> list[str]:
    """Codes that check() finds after some harm; repair() has to mend it all."""
    with open_store(home) as store:
        harm(home)
        found = check(store)
        for finding in found:
            assert finding.path.startswith(os.fsencode(home))
            assert finding.code in str(finding)
        results = repair(store)
        assert all(result.done for result in results), list(map(str, results))
        assert_clean(store)
    return codes(found)


def test_left_overs_are_found_and_removed(home: Path) -> None:
    def harm(home: Path) -> None:
        state = home / ".unionfs2"
        (state / "staging" / "dead" / "diff").mkdir(parents=True)
        (state / "trash" / "dead" / "diff").mkdir(parents=True)
        (state / "references" / "nobody.json").write_text("{}")
        (state / "references" / "a.json").write_text("{}")
        (home / "l" / ("D" * 26)).symlink_to("../nobody/diff")
        (home / "l" / ("E" * 26)).symlink_to("../a/diff")
        (home / "l" / f"x.{'0' * 16}.tmp").symlink_to("../a/diff")
        for folder in (state, home / "a"):
            temp = folder / f"layer.json.{'0' * 16}.tmp"
            temp.touch()
            os.utime(temp, (1, 1))

    assert findings_after(home, harm) == [
        "link-dangling",
        "link-duplicate",
        "reference-dead",
        "staging-abandoned",
        "temp-file",
        "temp-file",
        "temp-file",
        "trash",
    ]
    assert (home / ".unionfs2" / "references" / "a.json").exists()


def test_what_is_no_layer_is_put_aside(home: Path) -> None:
    def harm(home: Path) -> None:
        (home / "stray" / "deep").mkdir(parents=True)
        (home / "stray" / "deep" / "file").write_text("precious")
        (home / "alias").symlink_to("a")
        (home / "l" / "lower-case").symlink_to("../a/diff")
        (home / "l" / ("F" * 26)).write_text("a file")
        (home / "l" / ("G" * 26)).symlink_to("/etc")
        (home / "backingFsBlockDev").touch()
        (home / "lost+found").mkdir()

    assert findings_after(home, harm) == [
        "directory-stray",
        "layer-stray",
        "link-stray",
        "link-stray",
        "link-stray",
    ]
    aside = home / ".unionfs2" / "quarantine"
    (kept,) = aside.glob("*-stray")
    assert (kept / "deep" / "file").read_text() == "precious"
    assert "is a directory but not a layer" in (aside / f"{kept.name}.txt").read_text()
    assert (home / "lost+found").exists()


def test_missing_directories_are_made(home: Path) -> None:
    def harm(home: Path) -> None:
        (home / "b" / "work").rmdir()
        (home / "b" / "merged").rmdir()
        (home / "c" / "merged").rmdir()
        (home / "c" / "merged").touch()

    assert findings_after(home, harm) == ["merged-missing", "merged-missing", "work-missing"]


def test_modes_that_let_others_in_are_closed(home: Path) -> None:
    def harm(home: Path) -> None:
        home.chmod(0o711)
        (home / "a").chmod(0o755)
        (home / ".unionfs2").chmod(0o755)

    assert findings_after(home, harm) == ["mode-open", "mode-open"]
    assert (home / "a").stat().st_mode & 0o777 == 0o750
    with open_store(home) as store:
        home.chmod(0o710)
        (home / "b").chmod(0o755)
        assert check(store) == []  # nobody gets as far as there


def test_a_lost_lower_is_restored_from_the_record(home: Path) -> None:
    old = (home / "c" / "lower").read_text()
    assert findings_after(home, lambda home: (home / "c" / "lower").unlink()) == ["lower-missing"]
    assert (home / "c" / "lower").read_text() == old


def test_a_layer_whose_parent_is_gone_is_put_aside_with_its_children(home: Path) -> None:
    assert findings_after(home, lambda home: shutil.rmtree(home / "a")) == [
        "lower-broken",
        "lower-broken",
    ]
    with open_store(home) as store:
        assert store.ids() == ("x",)
    (kept,) = (home / ".unionfs2" / "quarantine").glob("*-c")
    assert (kept / "diff" / "name").read_text() == "c"


@pytest.mark.needs("root", "trusted-xattr", "user-xattr")
def test_marks_of_the_other_dialect_are_found(home: Path) -> None:
    def harm(home: Path) -> None:
        (home / "b" / "diff" / "dir").mkdir()
        os.setxattr(home / "b" / "diff" / "dir", "user.overlay.opaque", b"y")

    assert findings_after(home, harm) == ["dialect-wrong"]
    with open_store(home) as store:
        assert store.layer(B).record.dialect == "user"
        os.setxattr(home / "b" / "diff", "trusted.overlay.opaque", b"y")
        (finding,) = check(store)
        assert (finding.code, finding.repair) == ("dialect-wrong", None)


def test_recorded_sizes_and_digests_are_compared_when_asked(home: Path) -> None:
    with open_store(home) as store:
        store.freeze(C, size=Size(1, 1), diff_id=DIGEST)
        store.freeze(X, size=Size(2, 1))
        assert check(store) == []
        seen: list[int] = []
        found = check(store, deep=True, digest=lambda layer: DIGEST, progress=seen.append)
        assert codes(found) == ["size-wrong"]
        assert "has 1 bytes in 1 inodes, not 2 in 1" in found[0].reason
        assert seen == [1, 2, 3, 4]
        other = Digest("sha256:" + "8" * 64)
        found = check(store, deep=True, digest=lambda layer: other)
        assert codes(found) == ["digest-wrong", "size-wrong"]
        repair(store, deep=True)
        assert store.layer(X).record.size == Size(1, 1)
        assert check(store, deep=True) == []


def test_a_layer_in_use_is_not_touched_by_repair(home: Path) -> None:
    (home / "x" / "link").write_text("")
    with open_store(home) as store, open_store(home) as other:
        with other.layer_lock(X):
            results = repair(store)
            assert [r.done for r in results] == [False]
            assert "somebody works on layer x" in str(results[0])
            with pytest.raises(LayerInUseError):
                store.layer_lock(X, wait=False)
        assert all(r.done for r in repair(store))
        assert_clean(store)


def test_a_link_known_to_nobody_is_replaced(home: Path) -> None:
    def harm(home: Path) -> None:
        (home / "l" / link_of(home, "x")).unlink()
        (home / "x" / "link").unlink()
        (home / "x" / "layer.json").unlink()

    assert findings_after(home, harm) == ["link-damaged"]


def test_a_store_without_anything_but_layers_is_made_whole(home: Path) -> None:
    for name in ("l", ".unionfs2"):
        shutil.rmtree(home / name)
    for layer in "abcx":
        (home / layer / "layer.json").unlink()
    with open_store(home) as store:
        assert_clean(store)
        assert store.layer(C).chain == ("b", "a")


def test_an_unknown_layer_is_unknown_not_damaged(home: Path) -> None:
    with open_store(home) as store, pytest.raises(UnknownLayerError):
        store.layer(lid("nobody"))

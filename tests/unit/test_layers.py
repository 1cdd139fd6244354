"""The layer store: what each method does and refuses."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stores import (
    SHORT_A,
    assert_clean,
    content_of,
    docker_store,
    fill,
    lid,
    open_store,
)
from tests.support.tree import (
    Dir,
    File,
    HardLink,
    Symlink,
    Tree,
    Whiteout,
    build,
    differences,
    snapshot,
)
from unionfs2 import mountcalls, storelayout, syscalls
from unionfs2.errors import (
    CommittedError,
    DepthError,
    HasChildrenError,
    LayerExistsError,
    LayerInUseError,
    QuotaError,
    StoreError,
    UnknownLayerError,
    errno_of,
)
from unionfs2.layers import LayerStore
from unionfs2.storemodel import Digest, Quota, Size

A, B, C, D = lid("a"), lid("b"), lid("c"), lid("d")
DIGEST = Digest("sha256:" + "7" * 64)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "syncfs"):
        monkeypatch.setattr(syscalls, name, lambda fd: None)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Iterator[LayerStore]:
    with open_store(home) as opened:
        yield opened
        for layer in opened.ids():
            assert opened.layer(layer).id == layer
        assert_clean(opened)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# --- opening --------------------------------------------------------------------------------------


def test_a_new_store_has_the_layout_and_modes_of_the_format(home: Path) -> None:
    umask = os.umask(0o077)
    try:
        with open_store(home / "deep" / "er") as store:
            store.create(A)
            store.create(B, A)
    finally:
        os.umask(umask)
    place = home / "deep" / "er"
    assert mode_of(place) == mode_of(place / "l") == mode_of(place / "b") == 0o710
    assert mode_of(place / "b" / "diff") == 0o755
    assert mode_of(place / "b" / "work") == mode_of(place / "b" / "merged") == 0o700
    assert mode_of(place / "b" / "link") == mode_of(place / "b" / "lower") == 0o644
    assert mode_of(place / ".unionfs2") == 0o700
    assert sorted(p.name for p in (place / "a").iterdir()) == ["diff", "layer.json", "link"]
    link = (place / "b" / "link").read_text()
    assert os.readlink(place / "l" / link) == "../b/diff"
    assert (place / "b" / "lower").read_text() == "l/" + (place / "a" / "link").read_text()


def test_what_existed_keeps_its_mode_and_owner(home: Path) -> None:
    home.mkdir(mode=0o750)
    (home / "l").mkdir(mode=0o700)
    open_store(home).close()
    assert mode_of(home) == 0o750
    assert mode_of(home / "l") == 0o700


@pytest.mark.needs("root")
def test_the_owner_given_owns_what_is_made(home: Path) -> None:
    with LayerStore.open(os.fsencode(home), owner=(1000, 2000)) as store:
        store.create(A)
        store.create(B, A)
        store.update_record(B, label="x")
    for path in ("", "l", "b", "b/diff", "b/work", "b/merged", "b/link", "b/layer.json"):
        st = (home / path).lstat()
        assert (st.st_uid, st.st_gid) == (1000, 2000), path


def test_no_store_is_made_where_none_is_wanted(home: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no layer store at .*home"):
        open_store(home, create=False)
    assert not home.exists()
    home.touch()
    with pytest.raises(StoreError, match="is not a directory"):
        open_store(home)


def test_a_newer_or_unreadable_format_is_refused(home: Path) -> None:
    open_store(home).close()
    marker = home / ".unionfs2" / "format.json"
    marker.write_text('{"version": 2}')
    with pytest.raises(StoreError, match=r"format 2 .* reads up to 1.*newer unionfs2"):
        open_store(home)
    for text in ("", "{", "[]", '{"version": true}', '{"version": 0}'):
        marker.write_text(text)
        with pytest.raises(StoreError, match="does not say which format"):
            open_store(home)


def test_a_link_to_the_store_is_resolved_once(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    (tmp_path / "alias").symlink_to(home)
    with open_store(tmp_path / "alias") as store:
        assert store.home == os.fsencode(home)


# --- Docker's stores ------------------------------------------------------------------------------


def test_a_store_that_docker_wrote_works_as_it_is(home: Path) -> None:
    docker_store(home)
    with open_store(home) as store:
        assert_clean(store)
        assert store.ids() == ("a", "b", "c")
        assert store.layer(C).chain == ("b", "a")
        assert store.layer(B).committed
        assert not store.layer(B).frozen
        assert store.layer(C).record.writable
        assert store.children(A) == ("b",)
        assert store.lower_links(store.layer(B)) == (os.fsencode(home / "l" / SHORT_A),)
        assert store.lower_dirs(store.layer(B)) == (os.fsencode(home / "a" / "diff"),)
        store.create(D, C)
        store.discard(D)
        store.commit(C, D)
        assert_clean(store)
    assert (home / "backingFsBlockDev").exists()


def test_a_final_newline_in_link_and_lower_is_tolerated(home: Path) -> None:
    docker_store(home)
    for file in ("a/link", "b/link", "b/lower", "c/lower"):
        (home / file).write_text((home / file).read_text() + "\n")
    with open_store(home) as store:
        assert store.layer(C).chain == ("b", "a")
        assert_clean(store)


def test_a_second_name_of_a_layer_is_good_while_somebody_uses_it(home: Path) -> None:
    docker_store(home)
    other = "Z" * 26
    (home / "l" / other).symlink_to("../a/diff")
    (home / "b" / "lower").write_text(f"l/{other}")
    (home / "c" / "lower").write_text(f"l/{(home / 'b' / 'link').read_text()}:l/{other}")
    with open_store(home) as store:
        assert store.layer(B).chain == ("a",)
        assert store.children(A) == ("b",)
        with pytest.raises(HasChildrenError):
            store.discard(A)


# --- create ---------------------------------------------------------------------------------------


def test_ids_are_made_up_when_none_is_given(store: LayerStore) -> None:
    made = {store.create().id for _ in range(3)}
    assert len(made) == 3
    assert all(len(layer) == 64 and set(layer) <= set("0123456789abcdef") for layer in made)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("", "is empty"),
        (".", "begins with a dot"),
        ("..", "begins with a dot"),
        (".unionfs2", "begins with a dot"),
        ("a/b", "contains a slash"),
        ("a\nb", "control character"),
        ("a\0b", "control character"),
        ("l", "link directory"),
        ("x" * 256, "256 bytes long"),
        ("\udcff", "UTF-8"),
    ],
)
def test_an_impossible_id_is_refused_everywhere(store: LayerStore, layer: str, reason: str) -> None:
    for action in (store.create, store.layer, store.discard, store.freeze, store.layer_lock):
        with pytest.raises(StoreError, match=reason):
            action(lid(layer))
    assert not store.exists(lid(layer))


@pytest.mark.parametrize("layer", ["x" * 255, "ä" * 127, "with space", "colon:comma,", "L", "-x"])
def test_a_possible_id_works(store: LayerStore, layer: str) -> None:
    store.create(A)
    store.create(lid(layer), A)
    assert store.create(B, lid(layer)).chain == (layer, "a")
    store.discard(B)
    store.discard(lid(layer))


def test_an_id_is_used_once(store: LayerStore, home: Path) -> None:
    store.create(A)
    with pytest.raises(LayerExistsError, match="layer a exists already"):
        store.create(A)
    (home / "stray").touch()
    with pytest.raises(LayerExistsError):
        store.create(lid("stray"))
    with pytest.raises(UnknownLayerError, match="there is no layer nobody"):
        store.create(B, lid("nobody"))


def test_the_depth_is_checked_when_a_layer_is_made(home: Path) -> None:
    with open_store(home, "layers_max=3") as store:
        parent = None
        for number in range(4):
            parent = store.create(lid(str(number)), parent).id
        with pytest.raises(DepthError, match=r"4 layers below .* allows 3.* layers_max"):
            store.create(lid("4"), parent)
        assert_clean(store)
    with open_store(home, "layers_max=4") as store:
        assert len(store.create(lid("4"), lid("3")).chain) == 4


def test_a_chain_of_128_layers_is_the_default_limit(store: LayerStore) -> None:
    parent = None
    for number in range(129):
        parent = store.create(lid(f"{number:0200}"), parent).id
    assert parent is not None
    assert len(store.layer(parent).chain) == 128
    with pytest.raises(DepthError, match="128"):
        store.create(None, parent)


def test_limits_are_for_writable_layers(store: LayerStore) -> None:
    with pytest.raises(QuotaError, match="writable layers only"):
        store.create(A, quota=Quota(1 << 30))
    store.create(A, writable=True, quota=Quota(1 << 30, 5), label="l1")
    record = store.layer(A).record
    assert (record.quota, record.label, record.writable) == (Quota(1 << 30, 5), "l1", True)


@pytest.mark.needs("root", "trusted-xattr")
def test_the_root_of_a_child_has_the_attributes_of_its_parents(
    store: LayerStore, home: Path
) -> None:
    store.create(A)
    diff = home / "a" / "diff"
    os.chown(diff, 12, 34)
    diff.chmod(0o2771)
    os.setxattr(diff, "user.note", b"1")
    os.setxattr(diff, "trusted.overlay.opaque", b"y")
    os.setxattr(diff, "user.overlay.impure", b"y")
    store.create(B, A)
    child = home / "b" / "diff"
    st = child.stat()
    assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (12, 34, 0o2771)
    assert os.listxattr(child) == ["user.note"]


@pytest.mark.needs("root", "mknod-whiteout", "trusted-xattr")
def test_a_template_is_copied_to_the_last_attribute(store: LayerStore, home: Path) -> None:
    store.create(A)
    tree: Tree = {
        "file": File("text" * 5000, mode=0o4751, uid=3, gid=4, mtime_ns=1_234_567_890_123_456_789),
        "sparse": File(size=1 << 24, pieces={1 << 22: b"island"}),
        "dir": Dir(
            {"inner": "x", "again": HardLink("file"), "gone": Whiteout()},
            opaque=True,
            mode=0o1700,
            mtime_ns=5,
        ),
        "link": Symlink("file", xattrs={"trusted.note": b"2"}, mtime_ns=7),
    }
    build(home / "a" / "diff", tree)
    os.utime(home / "a" / "diff", ns=(1, 2))
    store.create(B, template=A)
    assert differences(snapshot(home / "a" / "diff"), snapshot(home / "b" / "diff")) == []
    assert (home / "b" / "diff" / "sparse").stat().st_blocks <= 4096
    os.remove(home / "a" / "diff" / "link")
    assert (home / "b" / "diff" / "link").is_symlink()


def test_a_template_passes_its_dialect_on(store: LayerStore) -> None:
    store.create(A, dialect="user")
    assert store.create(B, template=A).record.dialect == "user"
    assert store.create(C).record.dialect == "trusted"


def test_a_clash_of_short_names_is_survived(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create(A)
    taken = store.layer(A).link
    names = iter([taken, "Q" * 26])
    with monkeypatch.context() as patch:
        patch.setattr(storelayout, "new_short_name", lambda: next(names))
        assert store.create(B, A).link == "Q" * 26
    # Taken after it was chosen: by somebody else, between choice and rename.
    real = store.structure.free_short_name
    answers = iter([taken, "R" * 26])
    with monkeypatch.context() as patch:
        patch.setattr(store.structure, "free_short_name", lambda: next(answers))
        assert store.create(C, A).link == "R" * 26
    assert store.layer(C).record.link == "R" * 26
    assert real() not in {taken, "Q" * 26, "R" * 26}


def test_a_parent_that_changes_meanwhile_is_noticed(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create(A)
    store.create(B)
    real = store.structure.appear

    def appear(*args: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(store.structure, "appear", real)
            store.discard(A)
            store.create(A, B)
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(store.structure, "appear", appear)
        with pytest.raises(UnknownLayerError, match="removed or changed"):
            store.create(C, A)
    assert store.ids() == ("a", "b")


# --- staging and filling --------------------------------------------------------------------------


def stage_text(store: LayerStore, name: str, like: str | None = None) -> None:
    with store.stage(None if like is None else lid(like)) as staging:
        (Path(os.fsdecode(staging.path)) / name).write_text(name)


def test_what_is_staged_and_not_used_is_gone(store: LayerStore, home: Path) -> None:
    stage_text(store, "x")
    assert list((home / ".unionfs2" / "staging").iterdir()) == []
    assert list((home / ".unionfs2" / "trash").iterdir()) == []


def test_a_filled_layer_takes_the_place_of_the_empty_one(store: LayerStore, home: Path) -> None:
    store.create(A)
    store.create(B, A)
    link = store.layer(B).link
    with store.stage(B) as staging:
        (Path(os.fsdecode(staging.path)) / "f").write_text("new")
        (Path(os.fsdecode(staging.path)).parent / "tar-split").write_text("s")
        with store.layer_lock(B) as lock:
            layer = store.install_diff(
                B, staging, lock=lock, commit=True, diff_id=DIGEST, size=Size(3, 1)
            )
            with pytest.raises(LayerInUseError):
                store.layer_lock(B, wait=False)
    store.layer_lock(B, wait=False).close()
    assert (layer.link, layer.chain, layer.frozen) == (link, ("a",), True)
    assert (layer.record.diff_id, layer.record.size) == (DIGEST, Size(3, 1))
    assert content_of(store, B) == {"f": "new"}
    assert (home / "b" / "tar-split").read_text() == "s"
    assert (home / "b" / "committed").exists()
    with store.stage(B) as staging, pytest.raises(CommittedError):
        store.install_diff(B, staging)
    with store.stage(A) as staging, pytest.raises(HasChildrenError):
        store.install_diff(A, staging)


def test_a_staged_layer_becomes_a_new_one_by_one_rename(store: LayerStore, home: Path) -> None:
    store.create(A)
    with store.stage(A) as staging:
        (Path(os.fsdecode(staging.path)) / "f").write_text("new")
        layer = store.create(B, A, staging=staging, commit=True, record={"diff_id": DIGEST})
    assert layer.frozen
    assert store.layer(B) == layer
    assert content_of(store, B) == {"f": "new"}
    with store.stage() as staging, pytest.raises(LayerExistsError):
        store.create(B, staging=staging)


def test_a_layer_moves_onto_another_parent(store: LayerStore) -> None:
    for layer, parent in ((A, None), (B, A), (C, None)):
        store.create(layer, parent)
    with store.stage(C) as staging:
        assert store.install_diff(C, staging, parent=B).chain == ("b", "a")
    assert store.children(B) == ("c",)
    with store.stage(C) as staging:
        assert store.install_diff(C, staging, parent=None).chain == ()
    assert store.children(B) == ()
    with store.stage(C) as staging, pytest.raises(StoreError, match="itself"):
        store.install_diff(C, staging, parent=C)


# --- committing -----------------------------------------------------------------------------------


def test_commit_freezes_under_a_new_id(store: LayerStore, home: Path) -> None:
    store.create(A)
    store.create(B, A, writable=True)
    fill(store, B, {"f": "x"})
    store.create(C, B)
    layer = store.commit(B, D, created_by="me")
    assert store.ids() == ("a", "c", "d")
    assert (layer.frozen, layer.chain, layer.record.created_by) == (True, ("a",), "me")
    assert not layer.record.writable
    assert store.layer(C).chain == ("d", "a")
    assert content_of(store, D) == {"f": "x"}
    assert (home / "d" / "committed").read_bytes() == b""
    with pytest.raises(CommittedError, match="committed already"):
        store.commit(D, B)
    with pytest.raises(LayerExistsError):
        store.commit(C, A)
    assert store.layer(C).record == store.layer(C).record
    assert not store.layer(C).frozen


def test_commit_without_an_id_makes_one_up(store: LayerStore) -> None:
    store.create(A)
    assert len(store.commit(A).id) == 64


def test_commit_under_the_same_id_is_freezing(store: LayerStore) -> None:
    store.create(A)
    assert store.commit(A, A).frozen
    assert store.freeze(A, size=Size(0, 0)).record.size == Size(0, 0)


# --- discarding -----------------------------------------------------------------------------------


def test_discard_names_the_children(store: LayerStore, home: Path) -> None:
    store.create(A)
    store.create(B, A)
    store.create(C, A)
    with pytest.raises(HasChildrenError, match="2 other layers are built on it: b, c"):
        store.discard(A)
    for layer in (B, C, A):
        assert store.discard(layer) == []
    assert store.ids() == ()
    assert list((home / "l").iterdir()) == []
    with pytest.raises(UnknownLayerError):
        store.discard(A)


@pytest.mark.needs("root")
def test_nothing_is_removed_through_a_mount(store: LayerStore, home: Path) -> None:
    store.create(A)
    store.create(B, A)
    outside = home.parent / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    merged = os.fsencode(home / "b" / "merged")
    mountcalls.mount(os.fsencode(outside), merged, None, mountcalls.MS_BIND, b"")
    try:
        for action in (store.discard, store.commit):
            with pytest.raises(LayerInUseError, match="merged is mounted"):
                action(B)
        with store.stage(B) as staging, pytest.raises(LayerInUseError):
            store.install_diff(B, staging)
        assert (outside / "precious").exists()
    finally:
        mountcalls.umount(merged)
    store.discard(B)


def test_what_a_crash_left_is_deleted_at_the_next_opening(home: Path) -> None:
    open_store(home).close()
    for name in ("trash", "staging"):
        (home / ".unionfs2" / name / "x" / "diff" / "deep").mkdir(parents=True)
    with open_store(home) as store:
        assert_clean(store)


def test_what_somebody_works_on_is_left_alone(home: Path) -> None:
    with open_store(home) as one, one.stage() as staging:
        with open_store(home) as other:
            assert other.clear_staging() == 0
            assert not other.is_abandoned(staging.name)
        assert (home / ".unionfs2" / "staging" / os.fsdecode(staging.name)).exists()


# --- asking ---------------------------------------------------------------------------------------


def test_changes_by_others_are_seen(home: Path) -> None:
    with open_store(home) as one, open_store(home) as other:
        one.create(A)
        assert other.ids() == ("a",)
        other.create(B, A)
        assert one.children(A) == ("b",)
        assert one.parents() == {"a": None, "b": "a"}
        one.commit(B, C)
        assert other.children(A) == ("c",)
        other.discard(C)
        assert one.children(A) == ()


def test_a_link_that_is_missing_is_made_again_at_use(home: Path) -> None:
    docker_store(home)
    with open_store(home) as store:
        (home / "l" / SHORT_A).unlink()
        assert store.layer(C).chain == ("b", "a")
        assert os.readlink(home / "l" / SHORT_A) == "../a/diff"
        assert_clean(store)


def test_directories_that_are_no_layers_are_not_listed(home: Path) -> None:
    open_store(home).close()
    for name in ("lost+found", "empty"):
        (home / name).mkdir()
    (home / "alias").symlink_to("lost+found")
    with open_store(home) as store:
        assert store.ids() == ()
        assert not store.exists(lid("empty"))
        with pytest.raises(UnknownLayerError, match="is not a layer"):
            store.layer(lid("empty"))


def test_the_record_can_be_changed_and_keeps_what_it_does_not_know(
    store: LayerStore, home: Path
) -> None:
    store.create(A)
    file = home / "a" / "layer.json"
    file.write_text(file.read_text().replace('"label"', '"future": [1], "label"'))
    record = store.update_record(A, size=Size(5, 6), label="é\udc80")
    assert record.extra == {"future": [1]}
    assert store.layer(A).record == record


# --- stores that cannot be written ----------------------------------------------------------------


@pytest.mark.needs("root")
@pytest.mark.parametrize("ours", [True, False], ids=["our state", "docker's"])
def test_a_read_only_store_can_be_read(tmp_path: Path, ours: bool) -> None:
    home = docker_store(tmp_path / "home")
    if ours:
        with open_store(home) as store:
            store.create(D, C)
    path = os.fsencode(home)
    mountcalls.mount(path, path, None, mountcalls.MS_BIND, b"")
    try:
        remount = mountcalls.MS_BIND | mountcalls.MS_RDONLY | 32
        mountcalls.mount(b"none", path, None, remount, b"")
        with open_store(home) as store:
            assert store.read_only
            assert store.layer(C).chain == ("b", "a")
            assert store.children(B) == ("c",)
            for action in (store.discard, store.freeze, store.commit, store.create):
                with pytest.raises((StoreError, OSError)) as caught:
                    action(lid("new") if action == store.create else C)
                assert errno_of(caught.value) == errno.EROFS
    finally:
        mountcalls.umount(path)

"""Layers come, go, are frozen and described; the same on both backends."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from tests.contract.conftest import Opener, by_fuse
from tests.support import probe
from tests.support.tree import build
from unionfs2 import mountcalls
from unionfs2.backends import Choice
from unionfs2.driver import Driver
from unionfs2.errors import (
    CommittedError,
    DamagedLayerError,
    DepthError,
    HasChildrenError,
    LayerExistsError,
    LayerInUseError,
    OptionError,
    QuotaError,
    StoreError,
    UnavailableError,
    UnionFSError,
    UnknownLayerError,
)
from unionfs2.storemodel import LayerId, Quota, Size

pytestmark = pytest.mark.needs("root")


# --- opening -------------------------------------------------------------------------------------


def test_a_new_store_is_closed_to_others(driver: Driver, home: Path) -> None:
    assert stat.S_IMODE(home.stat().st_mode) == 0o710
    assert stat.S_IMODE((home / "l").stat().st_mode) == 0o710
    assert stat.S_IMODE((home / ".unionfs2").stat().st_mode) == 0o700
    assert driver.ids() == ()
    assert driver.layers() == ()
    assert driver.tree() == ()
    assert driver.usage() == ()


def test_what_exists_keeps_its_owner_and_mode(opener: Opener, home: Path) -> None:
    home.mkdir(mode=0o700)
    os.chown(home, 12, 34)
    opener()
    assert (home.stat().st_uid, home.stat().st_gid) == (12, 34)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_store_that_must_exist(opener: Opener, home: Path) -> None:
    with pytest.raises(StoreError, match="no layer store") as caught:
        opener(create=False)
    assert caught.value.errno == errno.ENOENT
    assert not home.exists()


@pytest.mark.parametrize("option", ["nonsense", "nonsense=1", "layers_max=many", "siez=1G"])
def test_options_that_mean_nothing_are_refused(opener: Opener, option: str) -> None:
    with pytest.raises(OptionError) as caught:
        opener(options=[option])
    assert option.split("=", maxsplit=1)[0] in str(caught.value)


def test_the_one_option_of_the_original(opener: Opener, warnings_heard: list[str]) -> None:
    opener(options=["overlay2.override_kernel_check=true"])
    (sentence,) = warnings_heard
    assert "no effect" in sentence


@pytest.mark.parametrize("text", ["lowerdir=/a", "upperdir=/u,workdir=/w", "userxattr", "size=1G"])
def test_a_mount_option_that_the_store_sets_itself(opener: Opener, text: str) -> None:
    with pytest.raises(OptionError, match="mountopt"):
        opener(options=[f"mountopt={text}"])


def test_mount_options_reach_the_mounts(opener: Opener) -> None:
    driver = opener(options=["mountopt=nodev,noexec"])
    box = driver.create("box", driver.create("base"))
    with driver.mounted(box) as root:
        flags = os.statvfs(root).f_flag
        assert flags & os.ST_NODEV
        assert flags & os.ST_NOEXEC


def test_status(driver: Driver, backend: Choice) -> None:
    box = driver.create("box", driver.create("base"))
    driver.get(box)
    status = driver.status()
    assert (status.layers, status.mounts, status.damaged) == (2, 1, 0)
    assert status.backend == backend
    assert status.backend_reason == "asked for"
    assert (status.native, status.fuse) == (None, None)
    assert status.d_type
    assert status.native_diff
    assert json.loads(json.dumps(status.as_json()))["layers"] == 2
    names = [name for name, _ in status.pairs()]
    for name in ("Backing Filesystem", "Supports d_type", "Native Overlay Diff", "Backend"):
        assert name in names
    driver.put(box)


def test_auto_prefers_the_kernel_and_says_why_not(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe.need("overlay", "fuse")
    driver = opener(backend="auto")
    assert driver.status().backend == "native"
    monkeypatch.setattr(driver._core, "native_reason", lambda _: "it is raining")
    status = driver.status()
    assert (status.backend, status.backend_reason) == ("fuse", "it is raining")
    box = driver.create("box", driver.create("base"))
    with driver.mounted(box):
        assert driver.get_metadata(box)["Backend"] == "fuse"


def test_a_backend_that_does_not_work_is_refused(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unionfs2.driver_core import Core

    monkeypatch.setattr(Core, "native_reason", lambda *_: "it is raining")
    with pytest.raises(UnavailableError, match="raining"):
        opener(backend="native")


# --- create --------------------------------------------------------------------------------------


def test_what_create_makes(driver: Driver) -> None:
    base = driver.create("base")
    box = driver.create_read_write("box", "base", label="")
    for layer, names in ((base, set()), (box, {b"lower", b"work", b"merged"})):
        found = set(os.listdir(driver.store.layer_path(layer)))
        assert found == {b"diff", b"link", b"layer.json"} | names
    assert driver.store.layer(box).parent == base
    assert driver.store.layer(box).record.writable
    assert not driver.store.layer(base).record.writable


def test_generated_ids_are_64_hex_digits(driver: Driver) -> None:
    made = driver.create()
    assert len(made) == 64
    assert set(made) <= set("0123456789abcdef")


@pytest.mark.parametrize("bad", ["", "a/b", "..", ".hidden", "l", "x" * 256, "a\nb", "nul\0"])
def test_bad_ids(driver: Driver, bad: str) -> None:
    with pytest.raises(StoreError) as caught:
        driver.create(bad)
    assert "\n" not in str(caught.value)
    assert not driver.exists(bad)
    assert driver.ids() == ()


def test_a_long_id_works_everywhere(driver: Driver) -> None:
    base, box = "b" * 255, "é" * 100
    driver.create(base)
    driver.create(box, base, writable=True)
    with driver.mounted(box) as root:
        (root / "file").touch()
    assert driver.remove(box)
    assert driver.remove(base)


def test_an_id_is_taken_once(driver: Driver) -> None:
    driver.create("base")
    with pytest.raises(LayerExistsError):
        driver.create("base")
    assert driver.check() == []


def test_an_unknown_parent(driver: Driver) -> None:
    with pytest.raises(UnknownLayerError):
        driver.create("box", "nobody")
    assert driver.ids() == ()


def test_the_root_is_like_that_of_the_parent(driver: Driver) -> None:
    root = driver.get(driver.create("base"))
    os.chown(root, 7, 8)
    root.chmod(0o1750)
    os.setxattr(root, "user.k", b"v")
    driver.create("box", "base")
    with driver.mounted("box") as top:
        found = top.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (7, 8, 0o1750)
        assert os.getxattr(top, "user.k") == b"v"


def test_a_template(driver: Driver) -> None:
    driver.create("base")
    driver.create("like", "base", writable=True)
    with driver.mounted("like") as root:
        build(root, {"dir": {"file": "x"}})
    driver.create("box", "base", writable=True, template="like")
    with driver.mounted("box") as root:
        assert (root / "dir" / "file").read_text() == "x"
        (root / "dir" / "file").write_text("changed")
    with driver.mounted("like") as root:
        assert (root / "dir" / "file").read_text() == "x"


def test_a_chain_of_128_layers_and_not_one_more(driver: Driver) -> None:
    parent = driver.create("layer-0")
    build(driver.get(parent), {"from-0": "0"})
    for number in range(1, 129):
        layer = driver.create(f"layer-{number}", parent)
        if number < 128:
            build(driver.store.diff_path(layer), {f"from-{number}": str(number)})
        parent = layer
    with pytest.raises(DepthError, match="129 layers below it and the store allows 128") as caught:
        driver.create("too-deep", parent)
    assert caught.value.errno == errno.EMLINK
    with driver.mounted(parent) as root:
        assert len(os.listdir(root)) == 128
        assert (root / "from-0").read_text() == "0"
        assert (root / "from-127").read_text() == "127"
        (root / "from-64").unlink()
    assert [str(change.kind) for change in driver.changes(parent)] == ["D"]


def test_a_deeper_chain_when_asked(opener: Opener) -> None:
    driver = opener(options=["layers_max=140"])
    parent = driver.create()
    for _ in range(135):
        parent = driver.create(None, parent)
    build(driver.store.diff_path(driver.store.layer(parent).chain[-1]), {"deep": "d"})
    with driver.mounted(parent) as root:
        assert (root / "deep").read_text() == "d"


# --- limits --------------------------------------------------------------------------------------


def test_a_limit(driver: Driver, backend: Choice) -> None:
    driver.create("base")
    if backend == "native" and driver.status().project_quota is not None:
        with pytest.raises(QuotaError, match="native"):
            driver.create("box", "base", writable=True, options={"size": "1M"})
        assert driver.ids() == ("base",)
        return
    driver.create("box", "base", writable=True, options={"size": "1M", "inodes": "10"})
    assert driver.store.layer(LayerId("box")).record.quota == Quota(1 << 20, 10)
    for _ in range(2):
        with driver.mounted("box") as root:
            with pytest.raises(OSError, match=r"quota|space") as caught:
                (root / "big").write_bytes(bytes(2 << 20))
            assert caught.value.errno in {errno.EDQUOT, errno.ENOSPC}
            (root / "big").unlink()


@by_fuse
def test_a_limited_base_layer(driver: Driver) -> None:
    driver.create("box", writable=True, options={"size": "1M"})
    with driver.mounted("box") as root:
        assert root.name == "merged"
        with pytest.raises(OSError, match=r"quota|space"):
            (root / "big").write_bytes(bytes(2 << 20))
    with pytest.raises(QuotaError, match="fuse"):
        driver.get("box", backend="native")


@by_fuse
def test_the_default_limit_of_a_store(opener: Opener) -> None:
    driver = opener(options=["overlay2.size=1M"])
    driver.create("base")
    assert driver.store.layer(LayerId("base")).record.quota is None
    driver.create("box", "base", writable=True)
    assert driver.store.layer(LayerId("box")).record.quota == Quota(1 << 20, None)


def test_only_writable_layers_have_limits(driver: Driver) -> None:
    with pytest.raises(QuotaError):
        driver.create("base", options={"size": "1G"})
    with pytest.raises(OptionError, match="siez"):
        driver.create("base", writable=True, options={"siez": "1G"})
    assert driver.ids() == ()


# --- remove --------------------------------------------------------------------------------------


def test_remove(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base")
    with driver.mounted("box") as root:
        build(root, {"dir": {"file": "x"}})
    assert driver.remove("box") is True
    assert driver.remove("box") is False
    assert not driver.exists("box")
    assert driver.remove("base") is True
    assert os.listdir(os.path.join(driver.store.home, b"l")) == []
    assert os.listdir(os.path.join(driver.store.state_path, b"trash")) == []


def test_an_empty_id_removes_nothing(driver: Driver) -> None:
    driver.create("base")
    with pytest.raises(StoreError, match="empty"):
        driver.remove("")
    assert driver.ids() == ("base",)


@pytest.mark.parametrize("force", [False, True])
def test_a_layer_with_children_stays(driver: Driver, *, force: bool) -> None:
    driver.create("base")
    for name in ("one", "two"):
        driver.create(name, "base")
    path = driver.get("base")
    with pytest.raises(HasChildrenError, match="one, two") as caught:
        driver.remove("base", force=force)
    assert caught.value.errno == errno.EBUSY
    assert path.is_mount()
    driver.put("base")


def test_a_mounted_layer_stays_unless_forced(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base")
    path = driver.get("box")
    (path / "file").write_text("x")
    with (path / "file").open("rb") as held:
        with pytest.raises(LayerInUseError, match="mounted at") as caught:
            driver.remove("box")
        assert caught.value.errno == errno.EBUSY
        assert held.read() == b"x"
        assert driver.remove("box", force=True)
    assert not path.exists()
    assert driver.ids() == ("base",)
    assert os.listdir(os.path.join(driver.store.state_path, b"references")) == []


def test_what_is_mounted_inside_a_layer_survives(driver: Driver, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    build(tmp_path, {"precious": {"file": "keep me"}})
    base = driver.create("base")
    inside = driver.get(base) / "inside"
    inside.mkdir()
    probe.sys_mount(str(precious), str(inside), "none", mountcalls.MS_BIND)
    try:
        with pytest.raises(LayerInUseError):
            driver.remove(base)
    finally:
        probe.sys_umount(os.fsencode(inside))
    assert (precious / "file").read_text() == "keep me"
    assert driver.remove(base)


# --- commit --------------------------------------------------------------------------------------


def test_commit(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base", writable=True)
    with driver.mounted("box") as root:
        (root / "file").write_text("12345")
    done = driver.commit("box")
    assert driver.ids() == tuple(sorted(("base", done)))
    assert driver.store.layer(done).committed
    assert driver.store.layer(done).record.size == Size(5, 1)
    assert driver.usage([done])[0].own == Size(5, 1)
    with pytest.raises(CommittedError) as caught:
        driver.commit(done)
    assert caught.value.errno == errno.EROFS


def test_commit_and_go_on(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base", writable=True)
    for number in range(3):
        with driver.mounted("box") as root:
            assert len(os.listdir(root)) == number
            (root / str(number)).touch()
        assert driver.commit("box", f"step-{number}", keep=True) == f"step-{number}"
    assert driver.store.layer(LayerId("box")).chain == ("step-2", "step-1", "step-0", "base")
    assert driver.store.layer(LayerId("box")).record.writable
    assert driver.changes("box") == []


def test_a_mounted_layer_is_not_committed(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base", writable=True)
    with driver.mounted("box"), pytest.raises(LayerInUseError):
        driver.commit("box", "done")
    assert driver.ids() == ("base", "box")
    driver.create("taken")
    with pytest.raises(LayerExistsError):
        driver.commit("box", "taken")
    with pytest.raises(UnknownLayerError):
        driver.commit("nobody", "done")


# --- asking --------------------------------------------------------------------------------------


def test_exists_and_is_parent(driver: Driver) -> None:
    driver.create("base")
    driver.create("mid", "base")
    driver.create("top", "mid")
    assert [driver.exists(name) for name in ("base", "top", "nobody", "", "../x")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert driver.is_parent("top", "mid")
    assert not driver.is_parent("top", "base")
    assert driver.is_parent("base", None)
    assert not driver.is_parent("mid", None)
    with pytest.raises(UnknownLayerError):
        driver.is_parent("nobody", None)


def test_metadata(driver: Driver, home: Path) -> None:
    driver.create("base")
    driver.create("mid", "base")
    driver.create("box", "mid")
    assert driver.get_metadata("base")["UpperDir"] == str(home / "base" / "diff")
    assert not {"LowerDir", "WorkDir", "MergedDir"} & driver.get_metadata("base").keys()
    found = driver.get_metadata("box")
    assert found["UpperDir"] == str(home / "box" / "diff")
    assert found["WorkDir"] == str(home / "box" / "work")
    assert found["MergedDir"] == str(home / "box" / "merged")
    escaped = str(home).replace(",", r"\,").replace(":", r"\:")
    assert found["LowerDir"] == f"{escaped}/mid/diff:{escaped}/base/diff"
    assert found["Mounted"] == "false"
    with pytest.raises(UnknownLayerError):
        driver.get_metadata("nobody")


def test_a_mount_by_hand(driver: Driver, backend: Choice, tmp_path: Path) -> None:
    from unionfs2 import mount, parse_options, unmount

    build(driver.get(driver.create("base")), {"file": "x"})
    driver.create("box", "base")
    options = driver.get_metadata("box")["Options"]
    target = os.fsencode(tmp_path / "by-hand")
    os.mkdir(target)
    mount(parse_options(os.fsencode(options)).spec, target, backend)
    assert os.listdir(target) == [b"file"]
    unmount(target)


def test_inspect_is_json(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base", writable=True)
    with driver.mounted("box") as root:
        found = json.loads(json.dumps(driver.inspect("box")))
        assert found["mount"]["path"] == str(root)
    assert found["parent"] == "base"
    assert found["chain"] == ["base"]
    assert found["writable"]
    assert json.loads(json.dumps(driver.inspect("base")))["children"] == ["box"]


def test_the_list_and_the_tree(driver: Driver) -> None:
    for name, parent in (("b", None), ("a", "b"), ("c", "b"), ("d", "a"), ("e", None)):
        driver.create(name, parent)
    assert [(layer.id, layer.parent) for layer in driver.layers()] == [
        ("a", "b"),
        ("b", None),
        ("c", "b"),
        ("d", "a"),
        ("e", None),
    ]
    assert [(node.layer.id, node.depth, node.children) for node in driver.tree()] == [
        ("b", 0, ("a", "c")),
        ("a", 1, ("d",)),
        ("d", 2, ()),
        ("c", 1, ()),
        ("e", 0, ()),
    ]


def test_usage(driver: Driver) -> None:
    build(driver.get(driver.create("base")), {"ten": "x" * 10})
    for name, parent, size in (("mid", "base", 100), ("one", "mid", 1000), ("two", "base", 5)):
        driver.create(name, parent)
        build(driver.store.diff_path(LayerId(name)), {"file": "x" * size})
    found = {usage.id: (usage.own, usage.exclusive, usage.shared) for usage in driver.usage()}
    assert found == {
        "base": (Size(10, 1), Size(), Size(10, 1)),
        "mid": (Size(100, 1), Size(), Size(110, 2)),
        "one": (Size(1000, 1), Size(1100, 2), Size(10, 1)),
        "two": (Size(5, 1), Size(5, 1), Size(10, 1)),
    }


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["link", "lower"])
@pytest.mark.parametrize("text", [b"", b"l/NONSENSE", b"../../etc"])
def test_a_damaged_layer_hides_no_other(driver: Driver, file: str, text: bytes) -> None:
    driver.create("base")
    driver.create("sick", "base")
    driver.create("well", "base")
    with open(os.path.join(driver.store.layer_path(LayerId("sick")), file.encode()), "wb") as out:
        out.write(text)
    actions = (
        lambda: driver.get("sick"),
        lambda: driver.changes("sick"),
        lambda: driver.get_metadata("sick"),
        lambda: driver.create("child", "sick"),
        lambda: driver.commit("sick"),
    )
    for action in actions:
        with pytest.raises(DamagedLayerError, match="sick") as caught:
            action()
        assert "\n" not in str(caught.value)
    with driver.mounted("well"):
        pass
    (sick,) = [layer for layer in driver.layers() if layer.reason]
    assert sick.id == "sick"
    assert driver.status().damaged == 1
    assert [usage.id for usage in driver.usage()] == ["base", "well"]
    assert driver.exists("sick")
    assert driver.check() != []
    assert driver.remove("sick")
    assert driver.check() == []


def test_repair_and_prune_are_reachable(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base")
    os.unlink(os.path.join(driver.store.layer_path(LayerId("box")), b"link"))
    assert driver.check() != []
    assert driver.repair() != []
    assert driver.check() == []
    assert driver.prune() == []


def test_prune_of_unused_layers(driver: Driver) -> None:
    driver.create("base")
    driver.create("box", "base", writable=True)
    one = driver.commit("box", "one")
    driver.store.freeze(LayerId("base"))
    driver.create("apart")
    driver.store.freeze(LayerId("apart"))
    driver.create("mounted")
    driver.store.freeze(LayerId("mounted"))
    driver.create("open", writable=True)
    driver.get("mounted")
    said = driver.prune(unused=True, dry_run=True)
    assert len(said) == 3
    assert len(driver.ids()) == 5
    seen: list[int] = []
    assert len(driver.prune(unused=True, progress=seen.append)) == 3
    assert driver.ids() == ("mounted", "open")
    assert len(seen) == 3
    assert one == "one"
    driver.put("mounted")


# --- id maps -------------------------------------------------------------------------------------


def test_directories_belong_to_the_mapped_root(opener: Opener, home: Path) -> None:
    driver = opener(uid_maps=[(0, 100_000, 65_536)], gid_maps=[(0, 200_000, 65_536)])
    driver.create("base")
    driver.create("box", "base")
    for path in (home, home / "l", *(home / "box" / name for name in ("diff", "work", "merged"))):
        assert (path.stat().st_uid, path.stat().st_gid) == (100_000, 200_000), path
    with driver.mounted("box"):
        inner = (home / "box" / "work" / "work").stat()
        assert (inner.st_uid, inner.st_gid) == (100_000, 200_000)


@pytest.mark.parametrize("triple", [(0, -1, 5), (0, 0, 0), (0, 1 << 32, 1)])
def test_impossible_maps(opener: Opener, triple: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match="id map"):
        opener(uid_maps=[triple])


def test_a_store_without_room_for_ids_says_so(opener: Opener) -> None:
    with pytest.raises(UnionFSError, match="not covered"):
        opener(uid_maps=[(1, 100_000, 10)])

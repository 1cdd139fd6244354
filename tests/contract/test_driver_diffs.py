"""Streams into layers and out of them; the same on both backends."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.conftest import Opener
from tests.support.tree import (
    Device,
    Dir,
    File,
    HardLink,
    Symlink,
    Tree,
    build,
    differences,
    snapshot,
)
from unionfs2.backends import Choice
from unionfs2.driver import DIRECT, Driver
from unionfs2.errors import (
    ArchiveError,
    CommittedError,
    DamagedLayerError,
    DigestError,
    HasChildrenError,
    LayerExistsError,
    LayerInUseError,
    LimitError,
    StoreError,
    UnknownLayerError,
)
from unionfs2.storemodel import Change, Digest, Kind, LayerId

pytestmark = pytest.mark.needs("root")

BASE: Tree = {
    "file": File("below", mode=0o640, uid=5, gid=6),
    "dir": {"inner": "x", "again": HardLink("dir/inner"), "deep": {"er": {"file": "d"}}},
    "gone": "g",
    "link": Symlink("dir/inner"),
    "null": Device("c", 1, 3),
    "replaced": {"a": "a"},
}


def digest_of(data: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def tar_of(*members: tuple[str, bytes | None]) -> bytes:
    """A stream of small files; None is a directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
            else:
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def names_in(stream: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        return [member.name for member in tar]


def stream_of(driver: Driver, layer: str, *args: str | None, exact: bool = False) -> bytes:
    out = io.BytesIO()
    parent = args[0] if args else DIRECT
    digest = driver.diff(layer, out, parent, exact=exact)
    assert digest == digest_of(out.getvalue())
    return out.getvalue()


def change(path: bytes, kind: str) -> Change:
    return Change(path, Kind(kind))


@pytest.fixture
def base(driver: Driver) -> LayerId:
    made = driver.create("base")
    build(driver.get(made), BASE)
    return made


@pytest.fixture
def box(driver: Driver, base: LayerId) -> LayerId:
    """A layer that does one of everything to *base*."""
    made = driver.create("box", base, writable=True)
    with driver.mounted(made) as root:
        (root / "gone").unlink()
        (root / "file").chmod(0o600)
        (root / "dir" / "inner").write_text("changed")
        (root / "replaced" / "a").unlink()
        (root / "replaced").rmdir()
        build(root, {"replaced": {"b": "b"}, "new": {"sub": {"file": "n"}}})
        os.setxattr(root / "new", "user.k", b"v")
    return made


CHANGES = [
    change(b"/dir", "C"),
    change(b"/dir/again", "C"),
    change(b"/dir/inner", "C"),
    change(b"/file", "C"),
    change(b"/gone", "D"),
    change(b"/new", "A"),
    change(b"/new/sub", "A"),
    change(b"/new/sub/file", "A"),
    change(b"/replaced", "C"),
    change(b"/replaced/a", "D"),
    change(b"/replaced/b", "A"),
]


# --- changes -------------------------------------------------------------------------------------


def _without_links(changes: list[Change]) -> list[Change]:
    """Hard links break by copying up on either backend, so the second name may stay as it was."""
    return [found for found in changes if found.path not in {b"/dir/again", b"/dir"}]


def test_changes(driver: Driver, box: LayerId) -> None:
    assert _without_links(driver.changes(box)) == _without_links(CHANGES)
    assert driver.changes(box, "base") == driver.changes(box)


def test_both_ways_find_the_same(
    driver: Driver, box: LayerId, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = driver.changes(box)
    monkeypatch.setattr(driver._diffs, "_by_itself", lambda _: False)
    assert driver.changes(box) == native


def test_everything_is_added_without_a_parent(driver: Driver, box: LayerId) -> None:
    with driver.mounted(box) as root:
        names = sorted(b"/" + path for path in snapshot(root) if path not in (b"", b"."))
    assert [found.path for found in driver.changes(box, None)] == names
    assert {found.kind for found in driver.changes(box, None)} == {Kind.ADDED}


def test_changes_between_any_two(driver: Driver, box: LayerId) -> None:
    driver.create("side", "base")
    with driver.mounted("side") as root:
        (root / "gone").write_text("kept, and changed")
    found = driver.changes(box, "side")
    assert change(b"/gone", "D") in found
    back = driver.changes("side", box)
    assert change(b"/gone", "A") in back
    assert change(b"/new", "D") in back
    assert driver.changes(box, box) == []


def test_changes_of_a_layer_that_is_mounted(driver: Driver, box: LayerId) -> None:
    with driver.mounted(box) as root:
        (root / "just-now").write_text("x")
        assert change(b"/just-now", "A") in driver.changes(box)
        assert change(b"/just-now", "A") in driver.changes(box, None)
        assert driver.inspect(box)["mount"]["count"] == 1  # type: ignore[index]


def test_unknown_layers(driver: Driver, base: LayerId) -> None:
    for action in (
        lambda: driver.changes("nobody"),
        lambda: driver.changes(base, "nobody"),
        lambda: driver.diff_size("nobody"),
        lambda: driver.diff("nobody", io.BytesIO()),
        lambda: driver.apply("nobody", io.BytesIO()),
        lambda: driver.which("nobody", b"/"),
    ):
        with pytest.raises(UnknownLayerError):
            action()


def test_nothing_stays_mounted(driver: Driver, box: LayerId) -> None:
    driver.changes(box, None)
    driver.create("side", "base")
    stream_of(driver, box, "side")
    driver.diff_size(box, "side")
    driver.flatten(box)
    home = os.fsencode(os.path.realpath(os.fsdecode(driver.store.home)))
    assert home not in Path("/proc/self/mountinfo").read_bytes().replace(b"\\040", b" ")
    assert os.listdir(os.path.join(driver.store.state_path, b"staging")) == []


# --- out and in again ----------------------------------------------------------------------------


def test_diff_and_apply_give_the_same_tree(driver: Driver, box: LayerId) -> None:
    driver.create("copy", "base")
    done = driver.apply("copy", io.BytesIO(stream_of(driver, box)))
    assert done.diff_id == digest_of(stream_of(driver, box))
    with driver.mounted(box, read_only=True) as one, driver.mounted("copy") as two:
        assert differences(snapshot(one), snapshot(two), ignore={"ino", "nlink"}) == []
    assert driver.store.layer(LayerId("copy")).committed
    assert driver.changes("copy") == driver.changes(box)


def test_the_same_layer_gives_the_same_bytes(driver: Driver, box: LayerId) -> None:
    first = stream_of(driver, box)
    assert stream_of(driver, box) == first
    names = names_in(first)
    assert ".wh.gone" in names
    assert "replaced/.wh..wh..opq" in names
    assert not any(name.startswith("/") for name in names)


def test_a_naive_diff_gives_the_same_tree(driver: Driver, box: LayerId) -> None:
    driver.create("side", "base")
    with driver.mounted("side") as root:
        (root / "file").unlink()
        (root / "more").mkdir()
    driver.create("onto", "side")
    driver.apply("onto", io.BytesIO(stream_of(driver, box, "side")), "side")
    with driver.mounted(box, read_only=True) as one, driver.mounted("onto") as two:
        assert differences(snapshot(one), snapshot(two), ignore={"ino", "nlink"}) == []


def test_diff_of_everything(driver: Driver, box: LayerId) -> None:
    driver.create("flat")
    driver.apply("flat", io.BytesIO(stream_of(driver, box, None)))
    with driver.mounted(box) as one, driver.mounted("flat") as two:
        assert differences(snapshot(one), snapshot(two), ignore={"ino", "nlink"}) == []


def test_diff_between(driver: Driver, box: LayerId, base: LayerId) -> None:
    out = io.BytesIO()
    driver.diff_between(base, box, out)
    assert ".wh.gone" in names_in(out.getvalue())
    back = io.BytesIO()
    driver.diff_between(box, base, back)
    assert ".wh.new" in names_in(back.getvalue())


def test_exactly_what_came_in_goes_out(driver: Driver) -> None:
    stream = tar_of(("z", b"1"), ("a/b/c", b"2"), ("./d", None)) + bytes(4096)
    driver.create("base")
    done = driver.apply("base", io.BytesIO(stream))
    assert done.diff_id == digest_of(stream)
    assert stream_of(driver, "base", exact=True) == stream
    assert stream_of(driver, "base") != stream
    (Path(os.fsdecode(driver.store.diff_path(LayerId("base")))) / "z").write_text("9")
    with pytest.raises((DamagedLayerError, ArchiveError)):
        driver.diff("base", io.BytesIO(), exact=True)
    assert [found.code for found in driver.check(deep=True)] == ["digest-wrong"]
    assert driver.check() == []


def test_a_stream_to_read_from(driver: Driver, box: LayerId) -> None:
    with driver.open_diff(box) as stream:
        parts = []
        while data := stream.read(1000):
            parts.append(data)
        assert stream.read(1) == b""
    assert b"".join(parts) == stream_of(driver, box)
    threads = set(threading.enumerate())
    with driver.open_diff(box) as stream:
        stream.read(1)
    assert set(threading.enumerate()) <= threads


def test_an_error_comes_out_of_the_stream(driver: Driver, base: LayerId) -> None:
    (Path(os.fsdecode(driver.store.diff_path(base))) / ".wh.real").touch()
    with driver.open_diff(base) as stream, pytest.raises(ArchiveError, match=r"\.wh\.real"):
        list(iter(lambda: stream.read(1 << 16), b""))


def test_piped_from_layer_to_layer(driver: Driver, box: LayerId) -> None:
    driver.create("copy", "base")
    with driver.open_diff(box) as stream:
        driver.apply("copy", stream)
    assert driver.changes("copy") == driver.changes(box)


def test_progress_counts_up_to_the_end(driver: Driver, base: LayerId) -> None:
    (Path(os.fsdecode(driver.store.diff_path(base))) / "big").write_bytes(bytes(3 << 20) + b"x")
    out = io.BytesIO()
    heard: list[int] = []
    driver.diff(base, out, progress=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == len(out.getvalue())
    heard.clear()
    driver.create("copy")
    driver.apply("copy", io.BytesIO(out.getvalue()), progress=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == len(out.getvalue())


# --- apply ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_compressed_stream(driver: Driver, compress: Callable[[bytes], bytes]) -> None:
    stream = tar_of(("file", b"x"))
    driver.create("base")
    done = driver.apply("base", io.BytesIO(compress(stream)), expected=digest_of(stream))
    assert (done.size.bytes, done.size.inodes, done.entries) == (1, 1, 1)
    assert driver.diff_size("base") == done.size


def test_a_wrong_digest_leaves_the_layer_as_it_was(driver: Driver) -> None:
    driver.create("base")
    with pytest.raises(DigestError, match="sha256") as caught:
        driver.apply("base", io.BytesIO(tar_of(("file", b"x"))), expected=digest_of(b"other"))
    assert "\n" not in str(caught.value)
    assert os.listdir(driver.get("base")) == []
    assert not driver.store.layer(LayerId("base")).committed
    assert driver.check() == []


@pytest.mark.parametrize("cut", [1, 100, 512, 700, 1500])
def test_a_stream_that_is_cut_short(driver: Driver, cut: int) -> None:
    driver.create("base")
    with pytest.raises(ArchiveError) as caught:
        driver.apply("base", io.BytesIO(tar_of(("file", b"x" * 600))[:cut]))
    assert caught.value.errno == errno.EBADMSG
    assert os.listdir(driver.get("base")) == []
    assert os.listdir(os.path.join(driver.store.state_path, b"staging")) == []


def test_nothing_leaves_the_layer(driver: Driver, home: Path) -> None:
    driver.create("base")
    with pytest.raises(ArchiveError):
        driver.apply("base", io.BytesIO(tar_of(("../../escaped", b"x"))))
    assert not list(home.rglob("escaped"))


def test_declared_limits(opener: Opener) -> None:
    driver = opener(options=["apply_size_max=1k", "apply_entries_max=2"])
    for number, members in enumerate(
        ([("big", bytes(2048))], [("a", b""), ("b", b""), ("c", b"")])
    ):
        driver.create(f"layer-{number}")
        with pytest.raises(LimitError):
            driver.apply(f"layer-{number}", io.BytesIO(tar_of(*members)))
    driver.apply("layer-0", io.BytesIO(tar_of(("a", bytes(1024)))))


def test_apply_is_refused_where_it_would_change_others(driver: Driver, box: LayerId) -> None:
    stream = tar_of(("file", b"x"))
    with pytest.raises(HasChildrenError):
        driver.apply("base", io.BytesIO(stream))
    with driver.mounted(box), pytest.raises(LayerInUseError):
        driver.apply(box, io.BytesIO(stream))
    done = driver.commit(box)
    with pytest.raises(CommittedError):
        driver.apply(done, io.BytesIO(stream))
    driver.create("last")
    driver.apply("last", io.BytesIO(stream))
    with pytest.raises(CommittedError):
        driver.apply("last", io.BytesIO(stream))


def test_apply_to_a_layer_with_content(driver: Driver, box: LayerId) -> None:
    driver.apply(box, io.BytesIO(tar_of(("new/more", b"m"), (".wh.file", b""), ("new/sub", b"s"))))
    assert not driver.store.layer(box).committed
    with driver.mounted(box) as root:
        assert sorted(os.listdir(root / "new")) == ["more", "sub"]
        assert (root / "new" / "sub").read_text() == "s"
        assert not (root / "file").exists()
        assert (root / "replaced" / "b").read_text() == "b"
    assert driver.store.layer(box).record.diff_id is None


def test_directories_on_the_way_are_those_below(driver: Driver, base: LayerId) -> None:
    root = Path(os.fsdecode(driver.store.diff_path(base)))
    os.chown(root / "dir", 7, 8)
    (root / "dir").chmod(0o2751)
    driver.create("top", base)
    driver.apply("top", io.BytesIO(tar_of(("dir/added", b"x"))))
    with driver.mounted("top") as merged:
        found = (merged / "dir").stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (7, 8, 0o2751)
        assert "inner" in os.listdir(merged / "dir")


def test_import_makes_a_whole_layer_or_none(driver: Driver) -> None:
    stream = tar_of(("file", b"x"))
    done = driver.import_layer("one", None, io.BytesIO(stream), expected=digest_of(stream))
    assert driver.store.layer(LayerId("one")).committed
    assert driver.store.layer(LayerId("one")).record.diff_id == done.diff_id
    with pytest.raises(LayerExistsError):
        driver.import_layer("one", None, io.BytesIO(stream))
    with pytest.raises(DigestError):
        driver.import_layer("two", "one", io.BytesIO(stream), expected=digest_of(b""))
    assert driver.ids() == ("one",)
    assert driver.check(deep=True) == []


def test_ids_are_shifted(opener: Opener) -> None:
    shifted = opener(uid_maps=[(0, 100_000, 65_536)], gid_maps=[(0, 200_000, 65_536)])
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.uid, info.gid = 5, 6
        tar.addfile(info)
    shifted.create("base")
    shifted.apply("base", io.BytesIO(stream.getvalue()))
    with shifted.mounted("base") as root:
        assert ((root / "file").stat().st_uid, (root / "file").stat().st_gid) == (100_005, 200_006)
    with tarfile.open(fileobj=io.BytesIO(stream_of(shifted, "base"))) as tar:
        assert (tar.getmember("file").uid, tar.getmember("file").gid) == (5, 6)


# --- sizes ---------------------------------------------------------------------------------------


def test_sizes(driver: Driver, box: LayerId) -> None:
    assert driver.diff_size("base").bytes == 5 + 1 + 1 + 1 + 1
    own = driver.diff_size(box)
    assert own.bytes >= len("below") + len("changed") + 1 + 1
    everything = driver.diff_size(box, None)
    assert everything.bytes > own.bytes - 1
    driver.create("side", "base")
    assert driver.diff_size(box, "side").bytes == sum(
        len(text) for text in ("below", "changed", "b", "n")
    )


# --- which, flatten, rebase ----------------------------------------------------------------------


def test_which(driver: Driver, box: LayerId) -> None:
    found = driver.which(box, b"/file")
    assert [(one.layer, one.visible) for one in found] == [(box, True), ("base", False)]
    assert [one.layer for one in driver.which(box, b"/gone")] == [box, "base"]
    assert not any(one.visible for one in driver.which(box, b"/gone"))
    assert driver.which(box, b"/nowhere") == []


def test_flatten(driver: Driver, box: LayerId) -> None:
    flat = driver.flatten(box, "flat")
    assert driver.store.layer(flat).chain == ()
    assert driver.store.layer(flat).committed
    with driver.mounted(box, read_only=True) as one, driver.mounted(flat) as two:
        assert differences(snapshot(one), snapshot(two), ignore={"ino", "nlink"}) == []
    assert driver.changes(flat, box) == []
    with pytest.raises(LayerExistsError):
        driver.flatten(box, "flat")


def test_rebase(driver: Driver, box: LayerId) -> None:
    driver.create("other", "base")
    with driver.mounted("other") as root:
        (root / "apart").write_text("a")
    done = driver.rebase(box, "other", "moved")
    assert (done.id, done.conflicts) == ("moved", ())
    assert driver.store.layer(LayerId("moved")).parent == "other"
    assert driver.store.layer(LayerId("moved")).record.writable
    assert not driver.store.layer(LayerId("moved")).committed
    assert driver.changes("moved") == driver.changes(box)
    with driver.mounted("moved") as root:
        assert (root / "apart").read_text() == "a"
        assert not (root / "gone").exists()


def test_rebase_names_conflicts(driver: Driver, box: LayerId) -> None:
    driver.create("other", "base")
    with driver.mounted("other") as root:
        (root / "file").write_text("otherwise")
        (root / "gone").unlink()
    done = driver.rebase(box, "other")
    assert [conflict.path for conflict in done.conflicts] == [b"/file"]
    with driver.mounted(done.id) as root:
        assert (root / "file").read_text() == "below"


def test_rebase_onto_nothing_and_onto_its_own_child(driver: Driver, box: LayerId) -> None:
    done = driver.rebase(box, None)
    assert driver.store.layer(done.id).parent is None
    with driver.mounted(done.id) as root:
        assert sorted(os.listdir(root)) == ["dir", "file", "new", "replaced"]
    driver.create("child", box)
    with pytest.raises(StoreError, match="built on it"):
        driver.rebase(box, "child")


# --- as container engines test a graph driver ----------------------------------------------------


def _fill(root: Path, count: int, seed: int) -> None:
    for number in range(count):
        (root / f"file-{number}").write_bytes(bytes((number * 7 + seed) % 256 for _ in range(64)))


def test_an_empty_layer_is_empty(driver: Driver) -> None:
    driver.create("empty")
    with driver.mounted("empty") as root:
        assert os.listdir(root) == []
    assert driver.changes("empty") == []
    assert driver.diff_size("empty").bytes == 0


def test_a_snapshot_of_a_base(driver: Driver) -> None:
    root = driver.get(driver.create("base"))
    build(root, {"a file": File("x", mode=0o4755, uid=1, gid=2), "a subdir": Dir({}, mode=0o1705)})
    driver.create("snap", "base")
    with driver.mounted("snap") as top:
        assert (top / "a file").stat().st_mode & 0o7777 == 0o4755
        assert (top / "a subdir").stat().st_mode & 0o7777 == 0o1705
    assert driver.changes("snap") == []


def test_reading_through_many_layers(driver: Driver) -> None:
    root = driver.get(driver.create("layer-0"))
    _fill(root, 10, 0)
    for number in range(1, 20):
        driver.create(f"layer-{number}", f"layer-{number - 1}")
        build(driver.store.diff_path(LayerId(f"layer-{number}")), {f"only-{number}": str(number)})
    with driver.mounted("layer-19") as top:
        assert (top / "file-9").read_bytes() == (root / "file-9").read_bytes()
        for number in range(1, 20):
            assert (top / f"only-{number}").read_text() == str(number)


def test_changes_of_many_files(driver: Driver, backend: Choice) -> None:
    count = 400
    _fill(driver.get(driver.create("base")), count, 3)
    driver.create("box", "base", writable=True)
    expected = []
    with driver.mounted("box") as root:
        for number in range(0, count, 4):
            (root / f"file-{number}").unlink()
            expected.append(change(b"/file-%d" % number, "D"))
            (root / f"file-{number + 1}").write_bytes(b"changed %d" % number)
            expected.append(change(b"/file-%d" % (number + 1), "C"))
            (root / f"added-{number}").write_bytes(b"added")
            expected.append(change(b"/added-%d" % number, "A"))
    assert driver.changes("box") == sorted(expected)
    driver.create("again", "base")
    with driver.open_diff("box") as stream:
        driver.apply("again", stream)
    assert driver.changes("again") == sorted(expected)
    assert driver.changes("again", "box") == []
    assert backend in {"native", "fuse"}


# --- both backends by name -----------------------------------------------------------------------


def test_both_backends_leave_the_same_layer(
    driver: Driver, base: LayerId, opener: Opener, backend: Choice, other: Choice
) -> None:
    streams = {}
    for chosen in (backend, other):
        driver.create(f"by-{chosen}", base, writable=True)
        with opener(backend=chosen).mounted(f"by-{chosen}") as root:
            (root / "gone").unlink()
            (root / "file").chmod(0o600)
            (root / "replaced" / "a").unlink()
            (root / "replaced").rmdir()
            build(root, {"replaced": {"b": File("b", mtime_ns=10**18)}})
            for path in (root / "replaced", root):
                os.utime(path, ns=(10**18, 10**18))
        streams[chosen] = stream_of(driver, f"by-{chosen}")
    assert driver.changes(f"by-{backend}") == driver.changes(f"by-{other}")
    assert driver.changes(f"by-{backend}", f"by-{other}") == []
    assert names_in(streams[backend]) == names_in(streams[other])
    assert streams[backend] == streams[other]

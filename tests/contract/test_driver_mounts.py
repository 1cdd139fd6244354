"""get and put: counts, processes, crashes, places; the same on both backends."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contract.conftest import Opener, by_fuse
from tests.support import probe
from tests.support.transports import NATIVE, assert_served_by
from tests.support.tree import build, differences, snapshot
from unionfs2 import mountcalls, mounts, references
from unionfs2.backends import Choice
from unionfs2.driver import Driver
from unionfs2.errors import (
    BusyError,
    DialectError,
    LayerInUseError,
    MountError,
    OptionError,
    UnionFSError,
    UnknownLayerError,
)
from unionfs2.storemodel import LayerId

pytestmark = pytest.mark.needs("root")


@pytest.fixture
def box(driver: Driver) -> LayerId:
    """A writable layer on one that has a file and a directory."""
    base = driver.create("base")
    build(driver.get(base), {"file": "below", "dir": {"inner": "x"}})
    return driver.create("box", "base", writable=True)


def _mount_of(driver: Driver, layer: str) -> mountcalls.MountEntry | None:
    return references.layer_mount(driver.store.merged_path(LayerId(layer)))


def _count(driver: Driver, layer: str) -> int:
    (found,) = [status for status in driver.layers() if status.id == layer]
    return found.mounted


# --- the tree ------------------------------------------------------------------------------------


def test_it_is_served_by_what_was_asked_for(driver: Driver, box: LayerId, way: str) -> None:
    with driver.mounted(box) as root:
        assert_served_by(root, None if way == NATIVE else way)


def test_what_is_written_is_there_the_next_time(driver: Driver, box: LayerId) -> None:
    with driver.mounted(box) as root:
        assert sorted(os.listdir(root)) == ["dir", "file"]
        (root / "file").unlink()
        (root / "dir" / "new").write_text("n")
    assert _mount_of(driver, box) is None
    upper = driver.store.diff_path(box)
    assert stat.S_ISCHR(os.lstat(upper + b"/file").st_mode)
    with driver.mounted(box) as root:
        assert sorted(os.listdir(root)) == ["dir"]
        assert sorted(os.listdir(root / "dir")) == ["inner", "new"]


def test_a_layer_without_parent_is_its_own_directory(driver: Driver) -> None:
    base = driver.create()
    path = driver.get(base)
    assert os.fsencode(path) == driver.store.diff_path(base)
    (path / "file").touch()
    assert driver.put(base) is False
    assert _mount_of(driver, base) is None


def test_a_layer_with_children_is_read_only(driver: Driver, box: LayerId) -> None:
    before = os.listdir(driver.store.layer_path(LayerId("base")))
    for layer, names in (("base", ["dir", "file"]), (box, ["dir", "file", "own"])):
        if layer == box:
            with driver.mounted(box) as root:
                (root / "own").touch()
            driver.create("top", box)
        with driver.mounted(layer) as root:
            assert sorted(os.listdir(root)) == names
            with pytest.raises(OSError, match="Read-only") as caught:
                (root / "more").touch()
            assert caught.value.errno == errno.EROFS
    assert sorted(os.listdir(driver.store.layer_path(LayerId("base")))) == sorted(before)


def test_a_committed_layer_is_read_only(driver: Driver, box: LayerId) -> None:
    with driver.mounted(box) as root:
        (root / "file").unlink()
    done = driver.commit(box, "done")
    with driver.mounted(done) as root:
        assert sorted(os.listdir(root)) == ["dir"]
        assert os.statvfs(root).f_flag & os.ST_RDONLY


def test_read_only_when_asked(driver: Driver, box: LayerId) -> None:
    with driver.mounted(box, read_only=True) as root:
        with pytest.raises(OSError, match="Read-only"):
            (root / "more").touch()
        with pytest.raises(LayerInUseError, match="read-only"):
            driver.get(box)
        with driver.mounted(box, read_only=True) as again:
            assert again == root


def test_a_mount_of_its_own_place(driver: Driver, box: LayerId, tmp_path: Path) -> None:
    target = tmp_path / "my place"
    target.mkdir()
    assert driver.get(box, target=target) == target
    (target / "new").touch()
    assert driver.get(box) == target
    assert driver.get_metadata(box)["MergedDir"] == str(target)
    with pytest.raises(LayerInUseError, match="my place"):
        driver.get(box, target=tmp_path)
    with pytest.raises(LayerInUseError, match="my place"):
        driver.remove(box)
    assert driver.put(box)
    assert driver.put(box)
    assert references.layer_mount(os.fsencode(target)) is None
    assert target.exists()
    assert os.listdir(target) == []
    assert os.listdir(driver.store.diff_path(box)) == [b"new"]


def test_a_base_layer_at_a_place_of_its_own(driver: Driver, tmp_path: Path) -> None:
    base = driver.create()
    target = tmp_path / "place"
    target.mkdir()
    with driver.mounted(base, target=target) as root:
        assert root == target
        (root / "file").touch()
    assert os.listdir(driver.store.diff_path(base)) == [b"file"]


def test_a_missing_place_is_refused(driver: Driver, box: LayerId, tmp_path: Path) -> None:
    with pytest.raises(UnionFSError, match="does not exist"):
        driver.get(box, target=tmp_path / "nowhere")
    assert _count(driver, box) == 0
    with driver.mounted(box):
        pass


# --- counting ------------------------------------------------------------------------------------


def test_the_last_put_unmounts(driver: Driver, box: LayerId) -> None:
    paths = {driver.get(box) for _ in range(3)}
    assert len(paths) == 1
    assert _count(driver, box) == 3
    for left in (2, 1, 0):
        assert driver.put(box) is True
        assert (_mount_of(driver, box) is not None) is bool(left)
    assert driver.put(box) is False
    assert os.listdir(os.path.join(driver.store.state_path, b"references")) == []


def test_unknown_layers(driver: Driver) -> None:
    with pytest.raises(UnknownLayerError) as caught:
        driver.get("nobody")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(UnknownLayerError):
        driver.put("nobody")


def test_a_restarted_process_agrees_with_the_kernel(opener: Opener, driver: Driver) -> None:
    box = driver.create("box", driver.create("base"), writable=True)
    path = driver.get(box)
    driver.get(box)
    driver.close()
    again = opener()
    assert _count(again, box) == 2
    assert again.get(box) == path
    for _ in range(3):
        assert again.put(box)
    assert _mount_of(again, box) is None


def test_a_put_without_get_ends_a_mount_that_nobody_wrote_down(
    driver: Driver, box: LayerId
) -> None:
    driver.get(box)
    os.unlink(os.path.join(driver.store.state_path, b"references", os.fsencode(box)))
    assert _count(driver, box) == 1
    assert driver.put(box) is True
    assert _mount_of(driver, box) is None


def test_a_get_of_a_mount_that_nobody_wrote_down_counts_it(driver: Driver, box: LayerId) -> None:
    path = driver.get(box)
    os.unlink(os.path.join(driver.store.state_path, b"references", os.fsencode(box)))
    assert driver.get(box) == path
    assert _count(driver, box) == 2
    driver.put(box)
    assert driver.put(box)


def test_references_to_a_mount_that_somebody_unmounted_count_nothing(
    driver: Driver, box: LayerId
) -> None:
    driver.get(box)
    driver.get(box)
    probe.sys_umount(driver.store.merged_path(box), probe.MNT_DETACH)
    assert _count(driver, box) == 0
    assert driver.put(box) is False
    with driver.mounted(box) as root:
        assert (root / "file").exists()
        assert _count(driver, box) == 1


def test_two_processes_share_a_mount(driver: Driver, box: LayerId, backend: Choice) -> None:
    script = (
        "import sys; from unionfs2 import Driver\n"
        "d = Driver.open(sys.argv[1], backend=sys.argv[2]); print(d.get('box'), flush=True)\n"
        "sys.stdin.read(); d.put('box')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, os.fsdecode(driver.store.home), str(backend)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        path = Path(child.stdout.readline().rstrip("\n"))
        assert driver.get(box) == path
        assert _count(driver, box) == 2
        driver.put(box)
        assert (path / "file").exists()
        child.stdin.close()
        assert child.wait() == 0
    assert _mount_of(driver, box) is None


def test_a_busy_mount_still_counts(driver: Driver, box: LayerId) -> None:
    root = driver.get(box)
    with (root / "file").open("rb") as file:
        with pytest.raises(BusyError):
            driver.put(box)
        assert _count(driver, box) == 1
        assert driver.put(box, force=True)
        assert _mount_of(driver, box) is None
        assert file.read() == b"below"
    assert driver.put(box) is False


def test_force_gives_up_every_reference(driver: Driver, box: LayerId) -> None:
    for _ in range(3):
        driver.get(box)
    assert driver.put(box, force=True)
    assert _count(driver, box) == 0


# --- what goes wrong -----------------------------------------------------------------------------


def _kill_server(driver: Driver, layer: str) -> None:
    pid = driver.inspect(layer)["mount"]["pid"]  # type: ignore[index]
    os.kill(pid, signal.SIGKILL)
    for _ in range(200):
        if not mounts.started(pid):
            return
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
            return
        time.sleep(0.01)


@by_fuse
def test_get_replaces_the_mount_of_a_dead_server(
    driver: Driver, box: LayerId, warnings_heard: list[str]
) -> None:
    path = driver.get(box)
    (path / "kept").write_text("k")
    _kill_server(driver, box)
    with pytest.raises(OSError, match="not connected"):
        os.statvfs(path)
    assert driver.get(box) == path
    assert (path / "kept").read_text() == "k"
    (sentence,) = warnings_heard
    assert "FUSE server" in sentence
    assert "\n" not in sentence
    assert _count(driver, box) == 2
    driver.put(box)
    assert driver.put(box)
    assert _mount_of(driver, box) is None


@by_fuse
def test_put_reports_a_dead_server_and_unmounts(driver: Driver, box: LayerId) -> None:
    driver.get(box)
    _kill_server(driver, box)
    with pytest.raises(MountError, match="had ended") as caught:
        driver.put(box)
    assert "\n" not in str(caught.value)
    assert _mount_of(driver, box) is None
    assert driver.put(box) is False
    with driver.mounted(box) as root:
        assert (root / "file").exists()


def test_a_mark_of_a_volatile_mount_stays(driver: Driver, box: LayerId) -> None:
    mark = os.fsdecode(driver.store.work_path(box)) + "/work/incompat/volatile"
    os.makedirs(mark)
    with pytest.raises(UnionFSError, match="volatile"):
        driver.get(box)
    assert os.path.isdir(mark)
    assert _count(driver, box) == 0
    assert _mount_of(driver, box) is None


def test_a_label_that_no_module_knows(driver: Driver, box: LayerId) -> None:
    if os.path.exists("/sys/fs/selinux/enforce"):
        pytest.skip("this machine has labels")
    with pytest.raises(UnionFSError) as caught:
        driver.get(box, "system_u:object_r:container_file_t:s0:c1,c2")
    assert "\n" not in str(caught.value)
    assert _mount_of(driver, box) is None
    with pytest.raises(OptionError, match="quote"):
        driver.get(box, 'a"b')
    with driver.mounted(box):
        pass


def test_layers_of_two_dialects_do_not_mix(driver: Driver, box: LayerId) -> None:
    driver.store.update_record(LayerId("base"), dialect="user")
    with pytest.raises(DialectError, match="layer base has its marks in user") as caught:
        driver.get(box)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_a_layer_of_the_other_dialect_is_mounted_as_it_is(driver: Driver) -> None:
    base = driver.create("base")
    driver.store.update_record(base, dialect="user")
    build(driver.get(base), {"dir": {"inner": "x"}})
    box = driver.create("box", base)
    with driver.mounted(box) as root:
        (root / "dir" / "inner").unlink()
        (root / "dir").rmdir()
        (root / "dir").mkdir()
    assert os.getxattr(driver.store.diff_path(box) + b"/dir", "user.overlay.opaque") == b"y"


def test_another_mount_namespace(driver: Driver, box: LayerId, backend: Choice) -> None:
    script = (
        "import sys; from unionfs2 import Driver\n"
        "d = Driver.open(sys.argv[1], backend=sys.argv[2]); print(d.get('box'), flush=True)\n"
        "sys.stdin.read(); d.put('box')"
    )
    home = os.fsdecode(driver.store.home)
    child = subprocess.Popen(
        ["unshare", "-m", sys.executable, "-c", script, home, str(backend)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        assert child.stdout.readline()
        assert _mount_of(driver, box) is None
        refused: list[Callable[[], object]] = [
            lambda: driver.get(box),
            lambda: driver.remove(box),
            lambda: driver.remove(box, force=True),
            lambda: driver.commit(box),
        ]
        for action in refused:
            with pytest.raises(LayerInUseError, match="another mount namespace"):
                action()
        child.stdin.close()
        assert child.wait() == 0
    with driver.mounted(box):
        pass


# --- written by one backend, read by the other ---------------------------------------------------


def test_what_one_backend_writes_the_other_shows(
    driver: Driver, box: LayerId, opener: Opener, other: Choice
) -> None:
    with driver.mounted(box) as root:
        (root / "file").unlink()
        (root / "dir" / "inner").unlink()
        (root / "dir").rmdir()
        build(root, {"dir": {"new": "n"}, "to": {"x": "y"}})
        (root / "dir" / "new").chmod(0o4711)
        os.setxattr(root / "to", "user.k", b"v")
        here = snapshot(root)
    with opener(backend=other).mounted(box) as root:
        assert differences(here, snapshot(root)) == []
        (root / "to" / "z").touch()
    with driver.mounted(box) as root:
        assert sorted(os.listdir(root / "to")) == ["x", "z"]


# --- many at once --------------------------------------------------------------------------------


def test_64_threads(driver: Driver, backend: Choice) -> None:
    base = driver.create("base")
    build(driver.get(base), {"file": "x"})
    shared = [driver.create(f"shared-{number}", base, writable=True) for number in range(4)]
    rounds = 2 if backend == "native" else 1
    barrier = threading.Barrier(64)

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(rounds):
            own = driver.create(f"own-{number}-{turn}", base, writable=True)
            mine = own if backend == "native" or number < 8 else shared[number % 4]
            for layer in (mine, shared[number % 4]):
                root = driver.get(layer)
                assert (root / "file").read_text() == "x"
                (root / f"of-{number}").write_text(str(number))
                driver.put(layer)
            assert driver.remove(own)
            assert not driver.exists(own)

    with ThreadPoolExecutor(64) as pool:
        for done in [pool.submit(work, number) for number in range(64)]:
            done.result()
    assert driver.ids() == ("base", *shared)
    for layer in shared:
        assert _mount_of(driver, layer) is None
        assert len(os.listdir(driver.store.diff_path(layer))) == 16
    assert driver.check() == []


# --- the end -------------------------------------------------------------------------------------


def test_cleanup(driver: Driver, box: LayerId, opener: Opener) -> None:
    driver.get(box)
    driver.get(box)
    busy = driver.create("busy", "base")
    held = (driver.get(busy) / "file").open("rb")
    said = opener().cleanup()
    assert _mount_of(driver, box) is None
    assert len(said) == 2
    assert said[0].startswith(f"unmounted layer {box} from ") or "busy" in said[0]
    assert _mount_of(driver, busy) is not None
    held.close()
    driver.cleanup()
    assert _mount_of(driver, busy) is None
    assert driver.cleanup() == []


def test_a_mount_that_is_not_ours_survives_cleanup(driver: Driver, box: LayerId) -> None:
    place = os.fsdecode(driver.store.home) + "/elsewhere"
    os.mkdir(place)
    probe.sys_mount("none", place, "tmpfs")
    try:
        driver.get(box)
        driver.cleanup()
        assert mountcalls.find_mount(os.fsencode(place)) is not None
    finally:
        probe.sys_umount(os.fsencode(place))

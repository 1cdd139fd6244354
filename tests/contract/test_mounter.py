"""What every Mounter promises, whichever way it mounts.

Parameters are the transports of FUSE, and the kernel's overlay by each of its interfaces.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import probe
from tests.support.transports import TRANSPORTS
from unionfs2 import mountcalls, mounts
from unionfs2.errors import (
    BusyError,
    InUseError,
    LayerError,
    MountError,
    OptionError,
    TargetError,
)
from unionfs2.fuse_mount import FuseMounter
from unionfs2.layercheck import check_layers
from unionfs2.mounter import Mounted, Mounter
from unionfs2.native_overlay import NativeMounter, legacy_data
from unionfs2.options import MountSpec

pytestmark = pytest.mark.needs("root")


class _FuseMounterOf(FuseMounter):
    """Mounts with one of the transports, and makes sure that it is the one that serves."""

    def __init__(self, transport: str) -> None:
        super().__init__()
        self.transport = transport

    def mount(self, spec: MountSpec, target: bytes) -> Mounted:
        done = super().mount(spec._replace(transport=self.transport), target)
        assert done.transport == self.transport
        return done


MAKERS: dict[str, Callable[[], Mounter]] = {
    **{name: functools.partial(_FuseMounterOf, name) for name in TRANSPORTS},
    "native-fd": lambda: NativeMounter(("fd",)),
    "native-string": lambda: NativeMounter(("string",)),
    "native-legacy": lambda: NativeMounter(("legacy",)),
}


@pytest.fixture(params=MAKERS)
def mounter(request: pytest.FixtureRequest, state: Path) -> Mounter:
    probe.need("fuse" if request.param in TRANSPORTS else "overlay")
    return MAKERS[request.param]()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of these mounts stay out of the machine's own."""
    directory = tmp_path / "state"
    directory.mkdir()
    monkeypatch.setenv("UNIONFS2_STATE", str(directory))
    return directory


class Rig:
    """Layers with one file each, an upper, a work directory and a mount point."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("l1", "l2", "u", "w", "m"):
            (root / name).mkdir()
        (root / "l1" / "one").write_text("1")
        (root / "l2" / "two").write_text("2")
        self.target = os.fsencode(root / "m")
        self.spec = MountSpec(
            lower=(self("l1"), self("l2")), upper=self("u"), work=self("w"), userxattr=False
        )

    def __call__(self, name: str) -> bytes:
        return os.fsencode(self.root / name)

    def names(self, of: str = "m") -> list[str]:
        return sorted(os.listdir(self.root / of))

    def mounted(self) -> mountcalls.MountEntry | None:
        return mountcalls.find_mount(self.target)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    yield Rig(tmp_path)
    while (entry := mountcalls.find_mount(os.fsencode(tmp_path / "m"))) is not None:
        mounts.detach(entry.target, fuse=entry.fstype != b"overlay", lazy=True)


# --- mounting and unmounting ----------------------------------------------------------------------


def test_it_answers_when_mount_returns(mounter: Mounter, rig: Rig) -> None:
    assert mounter.probe(rig.spec) is None
    done = mounter.mount(rig.spec, rig.target)
    assert (done.backend, done.target, done.warnings) == (mounter.name, rig.target, ())
    assert rig.names() == ["one", "two"]
    (rig.root / "m" / "new").write_text("n")
    (rig.root / "m" / "one").unlink()
    assert stat.S_ISCHR(os.lstat(rig("u/one")).st_mode)
    mounter.unmount(rig.target)
    assert rig.mounted() is None
    assert rig.names() == []
    assert rig.names("u") == ["new", "one"]


def test_the_server_has_ended_after_unmount(mounter: Mounter, rig: Rig) -> None:
    done = mounter.mount(rig.spec, rig.target)
    mounter.unmount(rig.target)
    assert (done.pid is not None) is (mounter.name == "fuse")
    if done.pid is not None:
        assert not _runs(done.pid)
    again = mounter.mount(rig.spec._replace(exclusive=True), rig.target)
    assert again.warnings == ()
    mounter.unmount(rig.target)


def _runs(pid: int) -> bool:
    """Whether *pid* still does anything; a zombie that init has not fetched does not."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat_line.rpartition(")")[2].split()[0] not in ("Z", "X")


def test_it_is_listed_while_it_lives(mounter: Mounter, rig: Rig, state: Path) -> None:
    mounter.mount(rig.spec, rig.target)
    (found,) = [status for status in mounts.list_mounts() if status.target == rig.target]
    assert found.backend == mounter.name
    assert found.transport == getattr(mounter, "transport", None)
    assert found.since is not None
    assert f"upperdir={rig.root}/u" in found.options
    mounter.unmount(rig.target)
    assert rig.target not in [status.target for status in mounts.list_mounts()]
    assert list(state.iterdir()) == []


def test_without_an_upper_it_is_read_only(mounter: Mounter, rig: Rig) -> None:
    mounter.mount(rig.spec._replace(upper=None, work=None), rig.target)
    assert rig.names() == ["one", "two"]
    with pytest.raises(OSError, match="Read-only") as caught:
        (rig.root / "m" / "new").touch()
    assert caught.value.errno == errno.EROFS
    assert not os.access(rig.target, os.W_OK)
    assert os.statvfs(rig.target).f_flag & os.ST_RDONLY
    mounter.unmount(rig.target)


def test_ro_with_an_upper(mounter: Mounter, rig: Rig) -> None:
    mounter.mount(rig.spec._replace(read_only=True), rig.target)
    with pytest.raises(OSError, match="Read-only"):
        (rig.root / "m" / "new").touch()
    mounter.unmount(rig.target)


def test_generic_flags_are_applied(mounter: Mounter, rig: Rig) -> None:
    flags = rig.spec._replace(nosuid=True, nodev=True, noexec=True, atime="noatime")
    mounter.mount(flags, rig.target)
    entry = rig.mounted()
    assert entry is not None
    assert {b"rw", b"nosuid", b"nodev", b"noexec", b"noatime"} <= set(entry.options)
    mounter.unmount(rig.target)


def test_the_dialect_is_as_asked(mounter: Mounter, rig: Rig) -> None:
    mounter.mount(rig.spec._replace(userxattr=True), rig.target)
    (rig.root / "l2" / "dir").mkdir()
    os.unlink(rig("m/one"))
    os.mkdir(rig("m/one"))
    assert os.getxattr(rig("u/one"), "user.overlay.opaque") == b"y"
    mounter.unmount(rig.target)


def test_odd_names(mounter: Mounter, rig: Rig) -> None:
    odd = {}
    for key in ("l", "u", "w", "m"):
        odd[key] = os.path.join(os.fsencode(rig.root), key.encode() + b'o:,\\ \n"#=\xff')
        os.mkdir(odd[key])
    with open(odd["l"] + b"/inside", "wb") as file:
        file.write(b"x")
    spec = MountSpec(
        lower=(odd["l"], rig("l1")), upper=odd["u"], work=odd["w"], source=b"odd source,name"
    )
    mounter.mount(spec, odd["m"])
    assert sorted(os.listdir(odd["m"])) == [b"inside", b"one"]
    with open(odd["m"] + b"/new", "wb"):
        pass
    assert os.listdir(odd["u"]) == [b"new"]
    mounter.unmount(odd["m"])
    assert os.listdir(odd["m"]) == []


def test_relative_paths_count_from_the_current_directory(
    mounter: Mounter, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rig.root / "l1")
    mounter.mount(MountSpec(lower=(b".", b"./../l2"), upper=b"../u", work=b"../u/../w"), b"../m")
    assert rig.names() == ["one", "two"]
    mounter.unmount(b"../m")


def test_a_mount_point_behind_a_link(mounter: Mounter, rig: Rig) -> None:
    os.symlink("m", rig.root / "link")
    done = mounter.mount(rig.spec, rig("link"))
    assert done.target == rig.target
    mounter.unmount(rig("link"))
    assert rig.mounted() is None


@pytest.mark.parametrize("over", ["l1", "l2", "u"])
def test_mounting_over_a_layer(mounter: Mounter, rig: Rig, over: str) -> None:
    mounter.mount(rig.spec, rig(over))
    assert rig.names(over) == ["one", "two"]
    (rig.root / over / "new").touch()
    mounter.unmount(rig(over))
    assert "new" in rig.names("u")


def test_mounts_below_a_layer_are_not_entered(mounter: Mounter, rig: Rig) -> None:
    for layer in ("l1", "u"):
        (rig.root / layer / f"sub-{layer}").mkdir()
        (rig.root / layer / f"sub-{layer}" / "hidden-below").touch()
    covered = [rig(f"{layer}/sub-{layer}") for layer in ("l1", "u")]
    for path in covered:
        probe.sys_mount("none", os.fsdecode(path), "tmpfs")
        (Path(os.fsdecode(path)) / "on-the-mount").touch()
    try:
        mounter.mount(rig.spec, rig.target)
        for layer in ("l1", "u"):
            assert rig.names(f"m/sub-{layer}") == ["hidden-below"]
        mounter.unmount(rig.target)
    finally:
        for path in covered:
            probe.sys_umount(path)


@pytest.mark.parametrize("count", [128, 500])
def test_many_layers(mounter: Mounter, rig: Rig, count: int) -> None:
    paths = []
    for number in range(count):
        path = rig.root / "many" / f"{number:03}"
        path.mkdir(parents=True)
        (path / f"f{number:03}").touch()
        paths.append(os.fsencode(path))
    spec = rig.spec._replace(lower=tuple(paths))
    if len(legacy_data(spec)) > 4095 and count == 500 and mounter_is_legacy(mounter):
        with pytest.raises(OptionError, match="4095"):
            mounter.mount(spec, rig.target)
        return
    mounter.mount(spec, rig.target)
    assert len(rig.names()) == count
    mounter.unmount(rig.target)


def mounter_is_legacy(mounter: Mounter) -> bool:
    return getattr(mounter, "_ways", ()) == ("legacy",)


def test_long_paths(mounter: Mounter, rig: Rig) -> None:
    deep = rig.root / "/".join(["x" * 200] * 4)
    for name in ("l", "u", "w"):
        (deep / name).mkdir(parents=True)
    (deep / "l" / "deep-file").touch()
    spec = MountSpec(
        lower=(os.fsencode(deep / "l"), rig("l1")),
        upper=os.fsencode(deep / "u"),
        work=os.fsencode(deep / "w"),
    )
    mounter.mount(spec, rig.target)
    assert rig.names() == ["deep-file", "one"]
    mounter.unmount(rig.target)


# --- leftovers and use by others ------------------------------------------------------------------


def test_leftovers_of_a_crash_are_cleaned(mounter: Mounter, rig: Rig) -> None:
    for name in ("w/work/#12", "w/work/#13"):
        (rig.root / name).mkdir(parents=True)
    (rig.root / "w" / "work" / "#12" / "part").write_text("half")
    (rig.root / "w" / "ours").touch()
    os.chmod(rig("w/work"), 0)
    mounter.mount(rig.spec, rig.target)
    assert rig.names("w/work") == []
    assert "ours" in rig.names("w")
    mounter.unmount(rig.target)


def test_a_volatile_mount_leaves_its_mark(mounter: Mounter, rig: Rig) -> None:
    mounter.mount(rig.spec._replace(volatile=True), rig.target)
    mounter.unmount(rig.target)
    assert os.path.exists(rig("w/work/incompat/volatile/dirty"))
    for volatile in (True, False):
        with pytest.raises(LayerError, match="volatile") as caught:
            mounter.mount(rig.spec._replace(volatile=volatile), rig.target)
        assert "remove" in str(caught.value)
    subprocess.run(["rm", "-r", rig("w/work/incompat/volatile")], check=True)
    mounter.mount(rig.spec, rig.target)
    mounter.unmount(rig.target)


@pytest.mark.parametrize("first", ["fuse", "native"])
def test_an_upper_in_use_is_warned_about_or_refused(mounter: Mounter, rig: Rig, first: str) -> None:
    probe.need("fuse", "overlay")
    holder: Mounter = FuseMounter() if first == "fuse" else NativeMounter()
    (rig.root / "first").mkdir()
    holder.mount(rig.spec, rig("first"))
    try:
        with pytest.raises(InUseError, match="in use"):
            mounter.mount(rig.spec._replace(exclusive=True), rig.target)
        assert rig.mounted() is None
        done = mounter.mount(rig.spec, rig.target)
        assert [("in use" in text, "\n" in text) for text in done.warnings] == [(True, False)] * 2
        assert rig.names() == ["one", "two"]
        mounter.unmount(rig.target)
    finally:
        holder.unmount(rig("first"))
    mounter.mount(rig.spec._replace(exclusive=True), rig.target)
    mounter.unmount(rig.target)


# --- refusals: one sentence, and nothing is mounted or left behind --------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"lower": (b"/no/such", b"/")}, LayerError, "does not exist"),
        ({"lower": ()}, OptionError, "lowerdir="),
        ({"work": None}, OptionError, "workdir="),
        ({"work": b"/no/such"}, LayerError, "does not exist"),
        ({"squash_to_root": True}, OptionError, "squash_to_root"),
        ({"xattr_permissions": 2}, OptionError, "xattr_permissions"),
    ],
)
def test_refused(
    mounter: Mounter, rig: Rig, changes: dict[str, object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        mounter.mount(rig.spec._replace(**changes), rig.target)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert rig.mounted() is None


def test_a_missing_mount_point(mounter: Mounter, rig: Rig) -> None:
    with pytest.raises(TargetError, match="does not exist"):
        mounter.mount(rig.spec, rig("nowhere"))


def test_a_mount_point_that_is_a_file(mounter: Mounter, rig: Rig) -> None:
    with pytest.raises(TargetError, match="not a directory"):
        mounter.mount(rig.spec, rig("l1/one"))


def test_a_busy_mount_point(mounter: Mounter, rig: Rig) -> None:
    mounter.mount(rig.spec, rig.target)
    with pytest.raises(TargetError, match="busy") as caught:
        mounter.mount(rig.spec, rig.target)
    assert caught.value.errno == errno.EBUSY
    mounter.unmount(rig.target)


def test_unmounting_what_is_not_ours(mounter: Mounter, rig: Rig) -> None:
    with pytest.raises(TargetError, match="not a unionfs2 mount"):
        mounter.unmount(rig.target)
    probe.sys_mount("none", str(rig.root / "m"), "tmpfs")
    try:
        with pytest.raises(TargetError, match="not a unionfs2 mount"):
            mounter.unmount(rig.target)
    finally:
        probe.sys_umount(rig.target)


def test_a_busy_mount_stays_until_it_may_go(mounter: Mounter, rig: Rig) -> None:
    mounter.mount(rig.spec, rig.target)
    with (rig.root / "m" / "one").open("rb") as file:
        with pytest.raises(BusyError, match="busy"):
            mounter.unmount(rig.target)
        assert rig.names() == ["one", "two"]
        mounter.unmount(rig.target, lazy=True)
        assert rig.mounted() is None
        assert file.read() == b"1"


# --- agreement of the layer checks with the kernel ------------------------------------------------


@pytest.mark.needs("overlay")
@pytest.mark.parametrize(
    ("lower", "upper", "work", "expected"),
    [
        (("l1", "l2"), "u", "w", 0),
        (("l1", "l2"), None, None, 0),
        (("l1",), "u", "w", 0),
        (("l1", "l2"), "l1/in", "w", 0),
        (("l1", "l2"), "u", "l2/in", 0),
        (("no", "l2"), "u", "w", errno.ENOENT),
        (("l1", "l2"), "no", "w", errno.ENOENT),
        (("l1", "l2"), "u", "no", errno.ENOENT),
        (("l1",), None, None, errno.EINVAL),
        (("l1", "l2"), "u", None, errno.EINVAL),
        (("l1", "l2"), "u", "u", errno.EINVAL),
        (("l1", "l2"), "u", "u/in", errno.EINVAL),
        (("l1", "l2"), "w/in", "w", errno.EINVAL),
        (("l1", "l1"), "u", "w", errno.ELOOP),
        (("l1", "l1/in"), "u", "w", errno.ELOOP),
        (("l1/in", "l1"), "u", "w", errno.ELOOP),
        (("l1", "u"), "u", "w", errno.ELOOP),
        (("l1", "u/in"), "u", "w", errno.ELOOP),
        (("l1", "w"), "u", "w", errno.ELOOP),
        (("l1", "w/in"), "u", "w", errno.ELOOP),
    ],
)
def test_the_layer_checks_agree_with_the_kernel(
    rig: Rig, lower: tuple[str, ...], upper: str | None, work: str | None, expected: int
) -> None:
    for name in ("l1/in", "l2/in", "u/in", "w/in"):
        (rig.root / name).mkdir()
    spec = MountSpec(
        lower=tuple(rig(name) for name in lower),
        upper=rig(upper) if upper else None,
        work=rig(work) if work else None,
    )
    data = legacy_data(spec)
    if upper and not work:
        data += b",upperdir=" + rig(upper)
    try:
        mountcalls.mount(b"none", rig.target, b"overlay", 0, data)
        mountcalls.umount(rig.target)
        kernel = 0
    except OSError as exc:
        kernel = exc.errno or -1
    try:
        check_layers(spec, "native")
        ours = 0
    except (LayerError, OptionError) as exc:
        ours = exc.errno
    assert (ours, kernel) == (expected, expected)


@pytest.mark.needs("overlay")
def test_the_kernels_limit_of_layers(rig: Rig) -> None:
    paths = [rig(f"many/{number}") for number in range(501)]
    for path in paths:
        os.makedirs(path)
    context = mountcalls.fsopen(b"overlay")
    try:
        for path in paths[:500]:
            mountcalls.fsconfig_string(context, b"lowerdir+", path)
        with pytest.raises(OSError, match="Invalid argument"):
            mountcalls.fsconfig_string(context, b"lowerdir+", paths[500])
    finally:
        os.close(context)


# --- one backend each -----------------------------------------------------------------------------


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("way", ["fd", "string", "legacy"])
def test_a_silent_fall_back_to_read_only_is_an_error(rig: Rig, state: Path, way: str) -> None:
    (rig.root / "w/work/a/b/c").mkdir(parents=True)
    with pytest.raises(MountError, match="read-only") as caught:
        NativeMounter((way,)).mount(rig.spec, rig.target)
    assert f"{rig.root}/w/work" in str(caught.value)
    assert rig.mounted() is None


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("way", ["fd", "string", "legacy"])
def test_the_kernels_own_words_reach_the_caller(rig: Rig, state: Path, way: str) -> None:
    os.symlink("nowhere", rig("l1/link"))
    with pytest.raises(MountError) as caught:
        # Encrypted, case-folded and the like aside, this is what a caller can get wrong here.
        NativeMounter((way,)).mount(rig.spec._replace(context=(("nolabel", b"x"),)), rig.target)
    assert "Invalid argument" in str(caught.value)
    if way != "legacy":
        assert "nolabel" in str(caught.value)
    assert rig.mounted() is None


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("way", ["fd", "string", "legacy"])
@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"index": True}, b"index"),
        ({"metacopy": True, "redirect_dir": "on"}, b"metacopy"),
        ({"uuid": "null"}, b"uuid"),
        ({"nfs_export": True}, b"nfs_export"),
        ({"fsync": "strict"}, b"fsync"),
    ],
)
def test_options_reach_the_kernel(
    rig: Rig, state: Path, way: str, changes: dict[str, object], shown: bytes
) -> None:
    mounter = NativeMounter((way,))
    mounter.mount(rig.spec._replace(**changes), rig.target)  # type: ignore[arg-type]
    entry = rig.mounted()
    assert entry is not None
    assert mountcalls.super_option(entry, shown) not in (None, b"off")
    mounter.unmount(rig.target)


def _fails(number: int) -> Callable[..., int]:
    def call(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.needs("overlay")
@pytest.mark.parametrize(
    ("call", "number", "way"),
    [
        ("fsopen", errno.ENOSYS, "lowerdir="),
        ("fsconfig_fd", errno.EINVAL, "lowerdir+="),
        (None, 0, "lowerdir+="),
    ],
)
def test_older_kernels(
    rig: Rig,
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str | None,
    number: int,
    way: str,
) -> None:
    if call is not None:
        monkeypatch.setattr(mountcalls, call, _fails(number))
    mounter = NativeMounter()
    assert mounter.probe(rig.spec) is None
    mounter.mount(rig.spec, rig.target)
    entry = rig.mounted()
    assert entry is not None
    assert f",{way}{rig.root}/l1" in entry.super_options.decode()
    mounter.unmount(rig.target)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENODEV, "modprobe overlay"), (errno.EPERM, "CAP_SYS_ADMIN")]
)
def test_no_overlay_here(
    rig: Rig, state: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    monkeypatch.setattr(mountcalls, "fsopen", _fails(number))
    assert words in str(NativeMounter().probe(rig.spec))
    with pytest.raises(MountError, match=words):
        NativeMounter().mount(rig.spec, rig.target)


@pytest.mark.needs("overlay")
def test_an_upper_in_use_that_index_forbids(rig: Rig, state: Path) -> None:
    (rig.root / "first").mkdir()
    NativeMounter().mount(rig.spec, rig("first"))
    try:
        with pytest.raises(MountError, match="busy") as caught:
            NativeMounter().mount(rig.spec._replace(index=True), rig.target)
        assert caught.value.errno == errno.EBUSY
    finally:
        NativeMounter().unmount(rig("first"))


@pytest.mark.needs("overlay")
def test_data_only_layers(rig: Rig, state: Path) -> None:
    mounter = NativeMounter()
    try:
        mounter.mount(rig.spec._replace(data=(rig("l2"),), lower=(rig("l1"),)), rig.target)
    except MountError as exc:
        pytest.skip(f"this kernel takes data-only layers under other conditions only: {exc}")
    assert rig.names() == ["one"]
    mounter.unmount(rig.target)


@pytest.mark.needs("fuse")
def test_fuse_refuses_what_only_the_kernel_does(rig: Rig, state: Path) -> None:
    for changes in ({"index": True}, {"metacopy": True}, {"data": (rig("l1"),)}):
        spec = rig.spec._replace(**changes)
        assert "native backend" in str(FuseMounter().probe(spec))
        with pytest.raises(OptionError, match="native backend"):
            FuseMounter().mount(spec, rig.target)


@pytest.mark.needs("fuse")
def test_a_library_caller_with_threads_may_mount_through_fuse(rig: Rig, state: Path) -> None:
    program = (
        "import os, sys, threading\n"
        "from unionfs2.fuse_mount import FuseMounter\n"
        "from unionfs2.options import MountSpec\n"
        "stop = threading.Event()\n"
        "threading.Thread(target=stop.wait).start()\n"
        "l1, l2, target = map(os.fsencode, sys.argv[1:])\n"
        "FuseMounter().mount(MountSpec(lower=(l1, l2)), target)\n"
        "print(sorted(os.listdir(target)))\n"
        "FuseMounter().unmount(target)\n"
        "stop.set()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, rig("l1"), rig("l2"), rig.target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[b'one', b'two']\n", "")

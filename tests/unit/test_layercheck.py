from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import places, probe
from unionfs2 import privilege
from unionfs2 import syscalls as sc
from unionfs2.errors import BackingError, LayerError, OptionError, PrivilegeError, UnionFSError
from unionfs2.layercheck import check_layers
from unionfs2.options import MountSpec

pytestmark = pytest.mark.needs("mknod-whiteout", "user-xattr")


class Bench:
    """Directories l1, l2, l3, u and w, and the spec made of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("l1", "l2", "l3", "u", "w"):
            (root / name).mkdir()
        self.spec = MountSpec(
            lower=(self("l1"), self("l2")), upper=self("u"), work=self("w"), userxattr=True
        )

    def __call__(self, name: str) -> bytes:
        return os.fsencode(self.root / name)

    def make(self, name: str) -> bytes:
        (self.root / name).mkdir(parents=True)
        return self(name)

    def refusal(self, **changes: object) -> UnionFSError:
        """What the spec with *changes* is refused with; one line that names the way out."""
        with pytest.raises(UnionFSError) as caught:
            check_layers(self.spec._replace(**changes), "native")  # type: ignore[arg-type]
        text = str(caught.value)
        assert "\n" not in text
        assert ": " in text
        return caught.value


@pytest.fixture
def bench() -> Iterator[Bench]:
    with places.open_directory() as root:
        yield Bench(root)


# --- accepted, as the kernel accepts it -----------------------------------------------------------


def test_an_ordinary_spec(bench: Bench) -> None:
    check_layers(bench.spec, "fuse")
    assert os.listdir(bench("w")) == []
    assert os.listdir(bench("u")) == []


def test_one_lower_with_upper_and_two_lowers_without(bench: Bench) -> None:
    check_layers(bench.spec._replace(lower=(bench("l1"),)))
    check_layers(bench.spec._replace(upper=None, work=None))
    check_layers(bench.spec._replace(lower=(bench("l1"),), data=(bench("l2"),), upper=None))


def test_passing_through_takes_privilege(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = bench.spec._replace(passthrough=True)
    monkeypatch.setattr(privilege, "has_initial_capability", lambda _: True)
    check_layers(spec)
    monkeypatch.setattr(privilege, "has_initial_capability", lambda _: False)
    with pytest.raises(PrivilegeError, match="passthrough needs CAP_SYS_ADMIN"):
        check_layers(spec)


def test_a_workdir_without_upper_is_not_looked_at(bench: Bench) -> None:
    check_layers(bench.spec._replace(upper=None, work=b"/there/is/no/such/directory"))


@pytest.mark.parametrize("inside", ["u", "w"])
def test_upper_or_work_inside_a_lower(bench: Bench, inside: str) -> None:
    path = bench.make(f"l1/deep/{inside}")
    key = "upper" if inside == "u" else "work"
    check_layers(bench.spec._replace(**{key: path}))  # type: ignore[arg-type]


def test_names_that_only_begin_alike_do_not_overlap(bench: Bench) -> None:
    check_layers(bench.spec._replace(lower=(bench("l1"), bench.make("l1x"), bench.make("l"))))


def test_symbolic_links_and_odd_names_are_followed(bench: Bench) -> None:
    odd = os.path.join(os.fsencode(bench.root), b"o:,\\ \n\xff")
    os.mkdir(odd)
    os.symlink(odd, bench("link"))
    check_layers(bench.spec._replace(lower=(bench("link"), bench("l2"))))


def test_leftovers_of_a_crashed_mount_are_no_obstacle(bench: Bench) -> None:
    bench.make("w/work/#1")
    bench.make("w/index")
    bench.make("w/work/incompat")
    check_layers(bench.spec)


def test_a_file_named_work_is_no_obstacle(bench: Bench) -> None:
    (bench.root / "w" / "work").touch()
    check_layers(bench.spec)


# --- the shape of the spec ------------------------------------------------------------------------


def test_no_lower(bench: Bench) -> None:
    exc = bench.refusal(lower=())
    assert isinstance(exc, OptionError)
    assert "lowerdir=" in str(exc)


def test_nothing_to_merge(bench: Bench) -> None:
    exc = bench.refusal(lower=(bench("l1"),), upper=None, work=None)
    assert isinstance(exc, OptionError)
    assert "nothing to merge" in str(exc)


def test_upper_without_work(bench: Bench) -> None:
    exc = bench.refusal(work=None)
    assert isinstance(exc, OptionError)
    assert "workdir=" in str(exc)


def test_too_many_layers_for_the_kernel(bench: Bench) -> None:
    paths = tuple(bench.make(f"many/{number}") for number in range(501))
    assert "500" in str(bench.refusal(lower=paths))
    check_layers(bench.spec._replace(lower=paths), "fuse")
    check_layers(bench.spec._replace(lower=paths[:500]), "native")


# --- single directories ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "role"),
    [
        ({"lower": (b"/no/such", b"/")}, "lower directory /no/such"),
        ({"upper": b"/no/such"}, "upper directory /no/such"),
        ({"work": b"/no/such"}, "work directory /no/such"),
        ({"data": (b"/no/such",)}, "data directory /no/such"),
    ],
)
def test_missing(bench: Bench, changes: dict[str, object], role: str) -> None:
    exc = bench.refusal(**changes)
    assert isinstance(exc, LayerError)
    assert (exc.errno, f"{role} does not exist" in str(exc)) == (errno.ENOENT, True)


@pytest.mark.parametrize("key", ["lower", "upper", "work"])
def test_not_a_directory(bench: Bench, key: str) -> None:
    (bench.root / "file").touch()
    value = (bench("l2"), bench("file")) if key == "lower" else bench("file")
    exc = bench.refusal(**{key: value})
    assert exc.errno == errno.ENOTDIR
    assert f"{key} directory {bench.root}/file is not a directory" in str(exc)


# --- directories among themselves -----------------------------------------------------------------


def test_duplicate_layer(bench: Bench) -> None:
    exc = bench.refusal(lower=(bench("l1"), bench("l2"), bench("l1")))
    assert (exc.errno, "twice" in str(exc)) == (errno.ELOOP, True)


def test_duplicate_layer_by_another_name(bench: Bench) -> None:
    os.symlink(bench("l1"), bench("again"))
    exc = bench.refusal(lower=(bench("l1"), bench("again")))
    assert "also reached as" in str(exc)


@pytest.mark.parametrize("key", ["upper", "work"])
def test_lower_equals_a_writable_directory(bench: Bench, key: str) -> None:
    path = bench("u" if key == "upper" else "w")
    exc = bench.refusal(lower=(bench("l1"), path))
    assert (exc.errno, f"as {key} and as lower" in str(exc)) == (errno.ELOOP, True)


@pytest.mark.parametrize("outer", ["l1", "u", "w"])
@pytest.mark.parametrize("first", [True, False])
def test_lower_inside_another_directory(bench: Bench, outer: str, first: bool) -> None:
    inner = bench.make(f"{outer}/deep/er")
    lower = (inner, bench("l1")) if first else (bench("l1"), inner)
    exc = bench.refusal(lower=lower)
    assert exc.errno == errno.ELOOP
    assert f"{bench.root}/{outer}/deep/er is inside" in str(exc)


def test_upper_equals_work(bench: Bench) -> None:
    assert "are both" in str(bench.refusal(work=bench("u")))


@pytest.mark.parametrize(("outer", "inner"), [("u", "work"), ("w", "upper")])
def test_upper_and_work_inside_each_other(bench: Bench, outer: str, inner: str) -> None:
    exc = bench.refusal(**{inner: bench.make(f"{outer}/sub/dir")})
    assert (exc.errno, f"{inner} directory" in str(exc)) == (errno.EINVAL, True)


# --- the file system below the upper --------------------------------------------------------------


def _lacking(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sc, call, fail)


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("setxattr_at", errno.EOPNOTSUPP, "does not take user.overlay.opaque attributes"),
        ("mknod", errno.EPERM, "cannot hold whiteouts"),
        ("rename", errno.EINVAL, "cannot exchange two names"),
    ],
)
def test_backing_file_system_lacks_something(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str, number: int, words: str
) -> None:
    _lacking(monkeypatch, call, number)
    exc = bench.refusal()
    assert isinstance(exc, BackingError)
    assert words in str(exc)
    monkeypatch.undo()
    assert os.listdir(bench("w")) == []


def test_whiteouts_that_come_back_as_something_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mknod(path: bytes, mode: int, device: int, *, dir_fd: int) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, dir_fd=dir_fd))

    monkeypatch.setattr(sc, "mknod", mknod)
    assert "into something else" in str(bench.refusal())
    assert os.listdir(bench("w")) == []


def test_trusted_attributes_without_privilege(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lacking(monkeypatch, "setxattr_at", errno.EPERM)
    exc = bench.refusal(userxattr=False)
    assert isinstance(exc, PrivilegeError)
    assert "userxattr" in str(exc)


def test_the_dialect_is_chosen_by_privilege(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []
    real = sc.setxattr_at

    def spy(name: bytes, dir_fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
        keys.append(key)
        real(name, dir_fd, b"user.overlay.opaque", value, flags)

    monkeypatch.setattr(sc, "setxattr_at", spy)
    monkeypatch.setattr(sc, "getxattr_at", lambda name, dir_fd, key: b"y")
    for privileged in (True, False):
        monkeypatch.setattr(privilege, "default_userxattr", lambda value=not privileged: value)
        check_layers(bench.spec._replace(userxattr=None))
    assert keys == [b"trusted.overlay.opaque", b"user.overlay.opaque"]


# --- what an earlier mount left behind ------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o700, 0o000])
def test_volatile_leftovers(bench: Bench, mode: int) -> None:
    bench.make("w/work/incompat/volatile")
    for name in ("w/work/incompat", "w/work"):
        os.chmod(bench(name), mode)
    exc = bench.refusal()
    assert "volatile" in str(exc)
    assert f"{bench.root}/w/work/incompat/volatile" in str(exc)
    assert os.stat(bench("w/work")).st_mode & 0o777 == mode


def test_unknown_incompatible_feature(bench: Bench) -> None:
    bench.make("w/work/incompat/time-travel")
    assert "time-travel" in str(bench.refusal())


# --- as an ordinary user --------------------------------------------------------------------------


def _as_nobody(bench: Bench, **changes: object) -> str:
    """The refusal that uid 65534 gets, empty if none; decided in a child process."""
    probe.need("root")
    for name in ("u", "w"):
        os.chown(bench(name), 65534, 65534)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            check_layers(bench.spec._replace(**changes))  # type: ignore[arg-type]
        except UnionFSError as exc:
            os.write(write_end, str(exc).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(pid, 0)
    return text


def test_unreadable_layer(bench: Bench) -> None:
    os.chmod(bench("l2"), 0o700)
    assert "l2 cannot be read" in _as_nobody(bench)


def test_unwritable_upper(bench: Bench) -> None:
    os.chown(bench("u"), 0, 0)
    text = _as_nobody(bench, upper=bench.make("other"))
    assert os.fsdecode(bench("l1")) not in text
    assert "other is not writable" in text


def test_an_ordinary_user_with_hidden_work(bench: Bench) -> None:
    bench.make("w/work/incompat")
    for name in ("w/work/incompat", "w/work"):
        os.chmod(bench(name), 0)
        os.chown(bench(name), 65534, 65534)
    assert _as_nobody(bench) == ""
    assert os.stat(bench("w/work")).st_mode & 0o777 == 0


# --- several file systems and mounts --------------------------------------------------------------


@pytest.fixture
def mounted(bench: Bench) -> Iterator[Bench]:
    """A bench in which l3 is a tmpfs with directories u and w."""
    probe.need("root")
    probe.sys_mount("none", os.fsdecode(bench("l3")), "tmpfs")
    bench.make("l3/u")
    bench.make("l3/w")
    yield bench
    probe.sys_umount(bench("l3"), probe.MNT_DETACH)


def _bind(bench: Bench, request: pytest.FixtureRequest, source: str, target: str) -> None:
    probe.sys_mount(os.fsdecode(bench(source)), os.fsdecode(bench(target)), "", 4096)
    request.addfinalizer(lambda: probe.sys_umount(bench(target), probe.MNT_DETACH))


def test_upper_and_work_on_different_file_systems(mounted: Bench) -> None:
    assert "different file systems" in str(mounted.refusal(work=mounted("l3/w")))


def test_upper_and_work_reached_through_different_mounts(
    mounted: Bench, request: pytest.FixtureRequest
) -> None:
    mounted.make("bind")
    mounted.make("side/w")
    _bind(mounted, request, "side", "bind")
    assert "different mounts" in str(mounted.refusal(work=mounted("bind/w")))


def test_a_bind_mount_is_the_same_directory(mounted: Bench, request: pytest.FixtureRequest) -> None:
    mounted.make("bind")
    _bind(mounted, request, "l1", "bind")
    assert "also reached as" in str(mounted.refusal(lower=(mounted("l1"), mounted("bind"))))
    inner = mounted.make("l1/inner")
    assert "is inside" in str(mounted.refusal(lower=(mounted("bind"), inner)))


def test_a_mount_inside_a_layer_is_not_part_of_it(
    mounted: Bench, request: pytest.FixtureRequest
) -> None:
    mounted.make("l1/hole")
    mounted.make("side/deep")
    _bind(mounted, request, "side", "l1/hole")
    check_layers(mounted.spec._replace(lower=(mounted("l1"), mounted("l1/hole/deep"))))
    check_layers(mounted.spec._replace(lower=(mounted("l1"), mounted("l3/u"))))


def test_read_only_upper(mounted: Bench) -> None:
    remount_read_only = 1 | 32
    probe.sys_mount("none", os.fsdecode(mounted("l3")), "tmpfs", remount_read_only)
    exc = mounted.refusal(upper=mounted("l3/u"), work=mounted("l3/w"))
    assert isinstance(exc, BackingError)
    assert (exc.errno, "read-only" in str(exc)) == (errno.EROFS, True)


@pytest.mark.needs("overlay")
def test_upper_on_an_overlay(mounted: Bench, request: pytest.FixtureRequest) -> None:
    mounted.make("m")
    mounted.make("u/up")
    mounted.make("u/wo")
    data = f"lowerdir={mounted.root}/l1,upperdir={mounted.root}/u,workdir={mounted.root}/w"
    probe.sys_mount("none", os.fsdecode(mounted("m")), "overlay", 0, data)
    request.addfinalizer(lambda: probe.sys_umount(mounted("m"), probe.MNT_DETACH))
    exc = mounted.refusal(lower=(mounted("l2"),), upper=mounted("m/up"), work=mounted("m/wo"))
    assert isinstance(exc, BackingError)

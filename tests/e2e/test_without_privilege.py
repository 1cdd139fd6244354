"""An ordinary user: fusermount3, and both backends in a user namespace."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.e2e.conftest import MAIN, Result, Site, refused
from tests.support import fusedev
from tests.support.transports import TRANSPORTS, WAYS, backend_words

pytestmark = pytest.mark.needs("root", "private-fuse")

USER = 65534

# Work in the mount point $1 as somebody would, then show what is there.
WORK = (
    'cd "$1" && echo new > new && rm one && mkdir two.d && mv two.d renamed && '
    "rm -r dir && mkdir dir && ls && cd /"
)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    return str(request.param)


@pytest.fixture
def home(site: Site) -> Site:
    (site.root / "l2" / "dir").mkdir()
    (site.root / "l2" / "dir" / "below").touch()
    site.give_to(USER)
    return site


def as_user(site: Site, script: str, *words: str) -> Result:
    command = ["sh", "-ec", script, "sh", *words]
    return site.run(*fusedev.as_user(command, uid=USER, gid=USER))


def in_namespace(site: Site, script: str, *words: str) -> Result:
    command = ["sh", "-ec", script, "sh", *words]
    return site.run(*fusedev.in_user_namespace(command, uid=USER, gid=USER))


def check_upper(site: Site) -> None:
    """What WORK left in the upper: whiteouts and user.* marks, for root's kernel mount too."""
    assert site.names("u") == ["dir", "new", "one", "renamed"]
    assert stat.S_ISCHR(os.lstat(site.root / "u" / "one").st_mode)
    assert os.getxattr(site.root / "u" / "dir", "user.overlay.opaque") == b"y"
    assert {(site.root / "u" / name).lstat().st_uid for name in site.names("u")} == {USER}


def check_by_the_kernel(site: Site) -> None:
    """Root mounts the same directories with the kernel's overlay and sees the same."""
    done = site.main(
        "mount", "--backend", "native", "-o", f"{site.options},userxattr", site.mountpoint
    )
    assert done.stderr == ""
    assert site.names() == ["dir", "new", "renamed", "two"]
    assert site.names("m/dir") == []
    assert site.main("umount", site.mountpoint).returncode == 0


@pytest.mark.needs("overlay")
def test_an_ordinary_user_mounts_works_and_unmounts(home: Site) -> None:
    fuse, main = " ".join(home.fuse_words), " ".join(MAIN)
    script = (
        f'{fuse} -o "$2" "$1"; {WORK}; grep "$1 " /proc/self/mounts; {main} mounts | grep "$1 "; '
        f'{main} umount "$1"; ls "$1"'
    )
    done = as_user(home, script, str(home.mountpoint), home.options)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:4] == ["dir", "new", "renamed", "two"]
    assert lines[4].startswith(f"unionfs2 {home.mountpoint} fuse.unionfs2 rw,nosuid,nodev")
    assert "allow_other" not in lines[4]
    assert lines[5].split()[:3] == [str(home.mountpoint), "fuse", home.transport]
    assert len(lines) == 6  # nothing is left at the mount point
    check_upper(home)
    check_by_the_kernel(home)


def test_generic_flags_reach_the_helper(home: Site) -> None:
    script = (
        f'{" ".join(home.fuse_words)} -o "$2" "$1"; grep "$1 " /proc/self/mounts; '
        'fusermount3 -u "$1"'
    )
    flags = "noexec,noatime,nodiratime,ro,dev,suid"
    done = as_user(home, script, str(home.mountpoint), f"{home.options},{flags}")
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout.split()[3].split(",")
    assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= set(shown)


def test_allow_other_needs_the_administrators_word(home: Site) -> None:
    if "\nuser_allow_other" in Path("/etc/fuse.conf").read_text():
        pytest.skip("this machine allows it")
    done = as_user(
        home,
        f'{" ".join(home.fuse_words)} -o "$2,allow_other" "$1"',
        str(home.mountpoint),
        home.options,
    )
    refused(done, 1, "user_allow_other")


def test_trusted_attributes_are_refused_in_words(home: Site) -> None:
    done = as_user(
        home,
        f'{" ".join(home.fuse_words)} -o "$2,nouserxattr" "$1"',
        str(home.mountpoint),
        home.options,
    )
    refused(done, 1, "userxattr")


def test_unreadable_layers_are_refused_in_words(home: Site) -> None:
    os.chown(home.root / "l2", 0, 0)
    (home.root / "l2").chmod(0o700)
    done = as_user(
        home, f'{" ".join(home.fuse_words)} -o "$2" "$1"', str(home.mountpoint), home.options
    )
    refused(done, 32, "l2 cannot be read")


def test_the_native_backend_is_refused_in_words(home: Site) -> None:
    script = f'{" ".join(MAIN)} mount --backend native -o "$2" "$1"'
    done = as_user(home, script, str(home.mountpoint), home.options)
    refused(done, 1, "CAP_SYS_ADMIN", "unionfs2")


def test_auto_falls_back_to_fuse(home: Site) -> None:
    script = f'{" ".join(MAIN)} mount -o "$2" "$1"; ls "$1"; fusermount3 -u "$1"'
    done = as_user(home, script, str(home.mountpoint), home.options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["dir", "one", "two"]


def test_signals_unmount_by_fusermount3(home: Site) -> None:
    script = (
        f'{" ".join(home.fuse_words)} -o "$2" "$1"; '
        'pid=$(sed \'s/.*"pid": \\([0-9]*\\).*/\\1/\' "$3"/*.json); kill $pid; '
        'for i in $(seq 200); do grep -q "$1 " /proc/self/mounts || break; sleep 0.05; done; '
        'ls "$1"'
    )
    done = as_user(home, script, str(home.mountpoint), home.options, str(home.root / "state"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.needs("userns-overlay", "overlay")
@pytest.mark.parametrize("transport", [None])
@pytest.mark.parametrize("way", [*WAYS, "auto"])
def test_root_of_a_user_namespace(home: Site, way: str) -> None:
    main, words = " ".join(MAIN), [] if way == "auto" else backend_words(way)
    script = (
        f'{main} mount {" ".join(words)} -o "$2" "$1"; {WORK}; '
        f'grep "$1 " /proc/self/mounts; {main} umount "$1"; ls "$1"'
    )
    done = in_namespace(home, script, str(home.mountpoint), home.options)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:4] == ["dir", "new", "renamed", "two"]
    assert ("fuse.unionfs2" if way in TRANSPORTS else "overlay") in lines[4]
    assert ("allow_other" if way in TRANSPORTS else "userxattr") in lines[4]
    assert len(lines) == 5
    check_upper(home)
    check_by_the_kernel(home)


@pytest.mark.needs("userns-overlay")
def test_a_namespace_without_mounts_of_its_own(home: Site) -> None:
    """CAP_SYS_ADMIN here, but not over the mount namespace: the helper is tried instead."""
    inner = ["unshare", "--user", "--map-root-user", "--", *home.fuse_words]
    command = [*inner, "-o", home.options, str(home.mountpoint)]
    done = home.run(*fusedev.as_user(command, uid=USER, gid=USER))
    # Whether the set-user-id helper may mount from there is up to the kernel; the words are ours.
    if done.returncode:
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("fuse-unionfs2: ")

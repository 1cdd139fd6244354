"""What this machine lets a test do, found out by doing it once.

Every probe answers with an ``Answer``: true when the ability is there, else with the reason in one
sentence. A test states what it needs with ``@pytest.mark.needs("fuse", "overlay")`` or, in the
middle of a test or fixture, with ``need("overlay")``. What is missing skips the test with the
reason, unless UNIONFS2_REQUIRE (names, comma-separated) lists it: then the test fails, so that a
machine that should be able to do everything cannot quietly skip.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.support import fusedev, loopfs

REQUIRE_VARIABLE: Final = "UNIONFS2_REQUIRE"

_PR_GET_SECUREBITS: Final = 27
_PR_SET_SECUREBITS: Final = 28

MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MNT_DETACH: Final = 2


class Answer(NamedTuple):
    """Result of a probe; *reason* is empty when the ability is there."""

    reason: str

    def __bool__(self) -> bool:
        return not self.reason


YES: Final = Answer("")


# --- plain libc calls: probes must not rest on the code under test --------------------------------


_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def sys_mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    words = (os.fsencode(word) for word in (source, target, fstype))
    _check(_libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(data)), f"mount {fstype}")


def sys_umount(target: str | bytes, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), "umount")


def get_securebits() -> int:
    """How this thread's capabilities follow its ids (capabilities(7))."""
    return int(_libc.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0))


def set_securebits(bits: int) -> None:
    """See get_securebits()."""
    _check(_libc.prctl(_PR_SET_SECUREBITS, bits, 0, 0, 0), "prctl(PR_SET_SECUREBITS)")


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    # Below pytest's own root, so that the answer is about the file system that the tests use.
    with tempfile.TemporaryDirectory(prefix="unionfs2-probe-") as name:
        yield Path(name)


def _reason(what: str, exc: OSError) -> Answer:
    return Answer(f"{what}: {exc.strerror or exc}")


# --- probes ---------------------------------------------------------------------------------------


@cache
def is_root() -> Answer:
    """The tests run as uid 0 with CAP_SYS_ADMIN in the initial user namespace."""
    if os.geteuid() != 0:
        return Answer("not running as root")
    if Path("/proc/self/uid_map").read_text(encoding="ascii").split() != ["0", "0", "4294967295"]:
        return Answer("root of a user namespace only")
    with _scratch() as directory:
        try:
            sys_mount("none", str(directory), "tmpfs")
        except OSError as exc:
            return _reason("root without CAP_SYS_ADMIN", exc)
        sys_umount(str(directory))
    return YES


@cache
def can_mount_fuse() -> Answer:
    """A FUSE mount can be made: by mount(2), or by fusermount3 and an accessible /dev/fuse."""
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        return _reason("/dev/fuse cannot be opened", exc)
    try:
        with _scratch() as directory:
            data = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
            try:
                sys_mount("probe", str(directory), "fuse.probe", MS_NOSUID | MS_NODEV, data)
            except OSError as exc:
                if exc.errno == errno.EPERM and shutil.which("fusermount3"):
                    return YES
                return _reason("FUSE cannot be mounted", exc)
            sys_umount(str(directory), MNT_DETACH)
    finally:
        os.close(fd)
    return YES


@cache
def can_mount_overlay() -> Answer:
    """The kernel's overlay can be mounted on the temporary directory, and deletes lower files."""
    with _scratch() as directory:
        for name in ("lower", "upper", "work", "merged"):
            (directory / name).mkdir()
        (directory / "lower" / "file").touch()
        layers = ",".join(f"{name}dir={directory / name}" for name in ("lower", "upper", "work"))
        try:
            sys_mount("overlay", str(directory / "merged"), "overlay", 0, layers)
        except OSError as exc:
            return _reason("the kernel's overlay cannot be mounted", exc)
        try:
            (directory / "merged" / "file").unlink()
        except OSError as exc:
            return _reason("a lower file cannot be deleted on the kernel's overlay", exc)
        finally:
            sys_umount(str(directory / "merged"), MNT_DETACH)
        if not stat.S_ISCHR((directory / "upper" / "file").lstat().st_mode):
            return Answer("the kernel's overlay wrote no whiteout")
    return YES


def _can_make_node(device: int) -> Answer:
    with _scratch() as directory:
        try:
            os.mknod(directory / "node", stat.S_IFCHR | 0o600, device)
        except OSError as exc:
            return _reason("mknod of a character device", exc)
    return YES


@cache
def can_mknod() -> Answer:
    """Devices other than whiteouts can be made."""
    return _can_make_node(os.makedev(1, 3))


@cache
def can_mknod_whiteout() -> Answer:
    """Whiteouts, character devices 0:0, can be made."""
    return _can_make_node(0)


def _can_set_xattr(name: str) -> Answer:
    with _scratch() as directory:
        try:
            os.setxattr(directory, name, b"probe")
        except OSError as exc:
            return _reason(f"setting {name}", exc)
    return YES


@cache
def has_trusted_xattr() -> Answer:
    """trusted.* can be set in the temporary directory."""
    return _can_set_xattr("trusted.probe")


@cache
def has_user_xattr() -> Answer:
    """user.* can be set in the temporary directory."""
    return _can_set_xattr("user.probe")


@cache
def has_posix_acl() -> Answer:
    """The temporary directory's file system stores POSIX ACLs."""
    # version 2; user:: rwx, user:1 r--, group:: r-x, mask:: r-x, other:: r-x
    acl = bytes.fromhex(
        "0200000001000700ffffffff020004000100000004000500ffffffff10000500ffffffff20000500ffffffff"
    )
    with _scratch() as directory:
        try:
            os.setxattr(directory, "system.posix_acl_access", acl)
        except OSError as exc:
            return _reason("setting a POSIX ACL", exc)
    return YES


def _try_command(what: str, command: Sequence[str]) -> Answer:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False
        )
    except OSError as exc:
        return _reason(what, exc)
    except subprocess.TimeoutExpired:
        return Answer(f"{what}: no answer within 20 s")
    if done.returncode == 0:
        return YES
    text = done.stderr.decode(errors="replace").strip().replace("\n", "; ")
    return Answer(f"{what}: {text or f'exit status {done.returncode}'}")


@cache
def can_userns() -> Answer:
    """A user namespace with its own mount namespace can be made (without other ids mapped)."""
    return _try_command(
        "user namespace", ["unshare", "--user", "--map-root-user", "--mount", "true"]
    )


@cache
def can_userns_overlay() -> Answer:
    """Root of a user namespace can mount the kernel's overlay with ``userxattr``."""
    script = (
        'mount -t tmpfs none "$0" && cd "$0" && mkdir l u w m && '
        "mount -t overlay none -o userxattr,lowerdir=l,upperdir=u,workdir=w m"
    )
    with _scratch() as directory:
        return _try_command(
            "overlay in a user namespace",
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(directory)],
        )


@cache
def can_use_private_fuse() -> Answer:
    """Root can give an ordinary user a /dev/fuse of its own, and fusermount3 is there."""
    if not shutil.which("fusermount3"):
        return Answer("fusermount3 is not installed")
    if not is_root():
        return is_root()
    script = ["sh", "-c", "exec 3<>/dev/fuse"]
    return _try_command("private /dev/fuse", fusedev.as_user(script, uid=65534, gid=65534))


def has_command(name: str) -> Answer:
    """The program *name* is on PATH."""
    return YES if shutil.which(name) else Answer(f"{name} is not installed")


def _can_limit_projects(kind: str) -> Answer:
    if not is_root():
        return is_root()
    with _scratch() as directory:
        try:
            with loopfs.mounted(kind, directory):
                return YES
        except loopfs.CannotError as exc:
            return Answer(str(exc))


@cache
def has_ext4_project_quota() -> Answer:
    """An ext4 of our own can be mounted with project quota."""
    return _can_limit_projects("ext4")


@cache
def has_xfs_project_quota() -> Answer:
    """An XFS of our own can be mounted with project quota."""
    return _can_limit_projects("xfs")


ABILITIES: Final[dict[str, Callable[[], Answer]]] = {
    "root": is_root,
    "fuse": can_mount_fuse,
    "overlay": can_mount_overlay,
    "mknod": can_mknod,
    "mknod-whiteout": can_mknod_whiteout,
    "trusted-xattr": has_trusted_xattr,
    "user-xattr": has_user_xattr,
    "acl": has_posix_acl,
    "userns": can_userns,
    "userns-overlay": can_userns_overlay,
    "private-fuse": can_use_private_fuse,
    "ext4-project-quota": has_ext4_project_quota,
    "xfs-project-quota": has_xfs_project_quota,
}


# --- skip or fail ---------------------------------------------------------------------------------


def required() -> frozenset[str]:
    """Names in UNIONFS2_REQUIRE."""
    words = os.environ.get(REQUIRE_VARIABLE, "").split(",")
    names = frozenset(word.strip() for word in words if word.strip())
    unknown = {name for name in names if name not in ABILITIES and not name.startswith("command:")}
    if unknown:
        known = ", ".join(ABILITIES)
        raise pytest.UsageError(
            f"{REQUIRE_VARIABLE} names {', '.join(sorted(unknown))}; known are {known}"
        )
    return names


def ask(name: str) -> Answer:
    """Answer of the probe *name*; ``command:NAME`` asks for a program."""
    kind, _, program = name.partition(":")
    return has_command(program) if kind == "command" else ABILITIES[name]()


def need(*names: str) -> None:
    """Go on only with all abilities *names*; otherwise skip, or fail where they are required."""
    for name in names:
        answer = ask(name)
        if answer:
            continue
        if name in required():
            pytest.fail(f"{REQUIRE_VARIABLE} lists {name}, but {answer.reason}", pytrace=False)
        pytest.skip(f"needs {name}: {answer.reason}")

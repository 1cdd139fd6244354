"""What a place can do, found out by doing it: a store's file system, the kernel's overlay, FUSE.

Nothing is concluded from a version number or a name. A file is cloned, a whiteout is made and read
back, an overlay is mounted over two lower layers and a directory of theirs deleted through it. What
was found is remembered in the store for as long as nothing it depends on can have changed: this
boot, this kernel, this user with these rights, this file system, this version of the program.

Answers are reasons: None means that it works, a text says in words why not. A failure that another
moment may not have (no space, no memory, no descriptors) is an answer, but never remembered.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from . import (
    attach,
    mountcalls,
    mounts,
    ondisk,
    privilege,
    quotacalls,
    storefiles,
    storelock,
    storetrees,
)
from . import syscalls as sc
from .errors import UnionFSError, errno_of, sentence
from .native_overlay import NativeMounter
from .options import MountSpec
from .storerecord import DialectName

_CACHE_NAME: Final = b"probes.json"
_CACHE_BYTES_MAX: Final = 1 << 16
_FORMAT: Final = 1

_DT_DIR: Final = 4
_DT_REG: Final = 8

# f_type of statfs(2), from include/uapi/linux/magic.h and the file systems themselves.
_NAMES: Final[dict[int, str]] = {
    0xEF53: "extfs",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0xF2F52010: "f2fs",
    0x794C7630: "overlayfs",
    0x61756673: "aufs",
    0xF15F: "ecryptfs",
    0x65735546: "fuse",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x47504653: "gpfs",
    0x0BD00BD0: "lustre",
    0x52654973: "reiserfs",
    0x3153464A: "jfs",
    0x4D44: "vfat",
    0x2011BAB0: "exfat",
    0x7366746E: "ntfs3",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
    0x9660: "isofs",
    0x3434: "nilfs2",
    0x24051905: "ubifs",
}
#: File systems that the original refuses below its home; here the probe decides, with a warning.
WEAK_FILESYSTEMS: Final = frozenset({"aufs", "ecryptfs", "overlayfs", "nfs", "cifs", "smb2"})

_PASSING: Final = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.EINTR,
        errno.EAGAIN,
        errno.EIO,
        errno.EBUSY,
    }
)


@dataclass(frozen=True, slots=True)
class Backing:
    """The file system that a store lies on. Each text is a reason, None says that it works."""

    filesystem: str
    d_type: bool
    trusted_xattr: str | None
    user_xattr: str | None
    whiteout: str | None  # making a character device 0:0 and reading it back as one
    reflink: bool
    project_quota: str | None


@dataclass(frozen=True, slots=True)
class Native:
    """The kernel's overlay on the store's file system."""

    reason: str | None
    #: Copying a directory up copies its opaque mark with it: then only comparing merged trees
    #: tells what a layer changes. Kernels before 4.10 without a fix.
    opaque_copied_up: bool = False


class _PassingError(Exception):
    """Holds an answer that must not be remembered."""


class Probes:
    """Asks about one store. *scratch* makes an empty directory on its file system and removes it.

    *state_fd* is the directory where answers are kept, None when nothing can be written.
    """

    def __init__(self, home_fd: int, state_fd: int | None) -> None:
        self._home_fd = home_fd
        self._state_fd = state_fd
        self._known: dict[str, Any] = self._read()

    def backing(self, scratch: bytes | None) -> Backing:
        """What the file system can do; *scratch* is an empty directory on it, by path."""
        if scratch is None:
            return _unwritable(self._home_fd)
        known = self._known.get("backing")
        if known is not None:
            return Backing(**known)
        found, lasting = _probe_backing(scratch)
        if lasting:
            self._remember("backing", asdict(found))
        return found

    def native(self, scratch: bytes | None, dialect: DialectName) -> Native:
        """Whether the kernel's overlay works there with marks of *dialect*."""
        if scratch is None:
            return Native(f"the store cannot be written to: {os.strerror(errno.EROFS)}")
        name = f"native-{dialect}"
        known = self._known.get(name)
        if known is not None:
            return Native(**known)
        found, lasting = _probe_native(scratch, dialect)
        if lasting:
            self._remember(name, asdict(found))
        return found

    @property
    def complete(self) -> bool:
        """Whether everything is known, so that no scratch directory is needed."""
        return {"backing", "native-trusted", "native-user"} <= self._known.keys()

    def needs_scratch(self, *names: str) -> bool:
        """Whether one of *names* ("backing", "native-trusted", ...) is still to be found out."""
        return any(name not in self._known for name in names)

    # --- the memory ---

    def _read(self) -> dict[str, Any]:
        if self._state_fd is None:
            return {}
        try:
            text = storefiles.read_file(self._state_fd, _CACHE_NAME, _CACHE_BYTES_MAX)
            value = json.loads(text)
            known = value["known"] if value["key"] == self._key() else {}
            return {name: _checked(name, answer) for name, answer in known.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def _remember(self, name: str, answer: dict[str, Any]) -> None:
        self._known[name] = answer
        if self._state_fd is None:
            return
        text = json.dumps({"key": self._key(), "known": self._known}, indent=1).encode() + b"\n"
        temp = storefiles.temp_name(_CACHE_NAME)
        try:
            sc.close(storefiles.write_file(self._state_fd, temp, text, 0o600))
            sc.rename(temp, self._state_fd, _CACHE_NAME, self._state_fd)
        except OSError:
            storefiles.remove_file(self._state_fd, temp)

    def _key(self) -> list[str]:
        """What the answers depend on, as plain texts."""
        place = os.fstat(self._home_fd)
        return [
            str(_FORMAT),
            storelock.boot_id().decode("ascii", "replace"),
            os.uname().release,
            f"{place.st_dev}:{sc.fs_magic(self._home_fd):x}",
            str(os.geteuid()),
            _capabilities(),
            _link("/proc/self/ns/user"),
        ]


_SHAPES: Final[dict[str, Callable[..., object]]] = {
    "backing": Backing,
    "native-trusted": Native,
    "native-user": Native,
}


def _checked(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    _SHAPES[name](**answer)  # KeyError or TypeError: written by another version
    return answer


def _capabilities() -> str:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next((line.split()[1] for line in file if line.startswith("CapEff:")), "")


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def fuse() -> str | None:
    """Why FUSE cannot be used here; cheap, so never remembered."""
    return attach.fuse_reason()


# --- the file system ------------------------------------------------------------------------------


def filesystem_name(fd: int) -> str:
    """Name of the file system that *fd* is on, by its magic number, in hex when unknown."""
    magic = sc.fs_magic(fd)
    return _NAMES.get(magic, f"0x{magic:x}")


def _unwritable(home_fd: int) -> Backing:
    reason = "the store cannot be written to"
    return Backing(filesystem_name(home_fd), True, reason, reason, reason, False, reason)


def _probe_backing(scratch: bytes) -> tuple[Backing, bool]:
    fd = sc.open_at(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    passing: list[OSError] = []

    def ask(what: str, probe: Callable[[int], None]) -> str | None:
        try:
            probe(fd)
        except OSError as exc:
            if exc.errno in _PASSING:
                passing.append(exc)
            return f"{what}: {os.strerror(exc.errno or errno.EIO)}"
        return None

    try:
        sc.mkdir(b"dir", 0o700, dir_fd=fd)
        sc.close(sc.create_at(b"file", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=fd))
        found = Backing(
            filesystem=filesystem_name(fd),
            d_type=_has_d_type(fd),
            trusted_xattr=ask("trusted.overlay.* cannot be kept", _xattr(ondisk.TRUSTED_PREFIX)),
            user_xattr=ask("user.overlay.* cannot be kept", _xattr(ondisk.USER_PREFIX)),
            whiteout=ask("whiteouts cannot be made", _whiteout),
            reflink=_reflinks(fd),
            project_quota=quotacalls.supported(fd),
        )
    finally:
        for name in (b"dir", b"file", b"clone", b"gone"):
            storetrees.delete_tree(fd, name)
        sc.close(fd)
    return found, not passing


def _has_d_type(fd: int) -> bool:
    types = sc.entry_types(fd)
    return types.get(b"dir") == _DT_DIR and types.get(b"file") == _DT_REG


def _xattr(prefix: bytes) -> Callable[[int], None]:
    key = prefix + ondisk.SUFFIX_OPAQUE

    def probe(fd: int) -> None:
        sc.setxattr_at(b"dir", fd, key, ondisk.OPAQUE_YES)
        if sc.getxattr_at(b"dir", fd, key) != ondisk.OPAQUE_YES:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    return probe


def _whiteout(fd: int) -> None:
    sc.mknod(b"gone", stat.S_IFCHR | 0o600, 0, dir_fd=fd)
    made = sc.lstat_at(b"gone", fd)
    if not stat.S_ISCHR(made.st_mode) or made.st_rdev != 0:
        # Some network and virtual file systems answer "done" and keep something else.
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def _reflinks(fd: int) -> bool:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    source = sc.create_at(b"file", flags, 0o600, dir_fd=fd)
    try:
        sc.pwrite(source, bytes(4096), 0)
        copy = sc.create_at(b"clone", flags, 0o600, dir_fd=fd)
        try:
            return sc.clone_data(source, copy)
        finally:
            sc.close(copy)
    finally:
        sc.close(source)


# --- the kernel's overlay -------------------------------------------------------------------------


def _probe_native(scratch: bytes, dialect: DialectName) -> tuple[Native, bool]:
    """Mount two lower layers and an upper, delete a directory of the lowers, read the mark back."""
    if not privilege.may_mount():
        return Native(
            "the kernel's overlay needs CAP_SYS_ADMIN: become root, enter a user namespace, "
            "or use the fuse backend"
        ), True
    fd = sc.open_at(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        spec = _lay_out(fd, scratch, dialect)
        target = os.path.realpath(scratch + b"/merged")
        NativeMounter().mount(spec, target)
        try:
            return _look(fd, scratch, dialect), True
        finally:
            mounts.unmount(target, lazy=True)
    except (UnionFSError, OSError) as exc:
        lasting = errno_of(exc) not in _PASSING
        return Native(f"the kernel's overlay does not work here: {sentence(exc)}"), lasting
    finally:
        for name in (b"one", b"two", b"upper", b"work", b"merged"):
            storetrees.delete_tree(fd, name)
        sc.close(fd)


def _lay_out(fd: int, scratch: bytes, dialect: DialectName) -> MountSpec:
    """Layers: ``two`` at the bottom has gone/ and kept/, ``one`` above it makes kept/ opaque."""
    for name in (b"one", b"two", b"upper", b"work", b"merged"):
        sc.mkdir(name, 0o700, dir_fd=fd)
    for name in (b"two/gone", b"two/kept", b"one/kept"):
        sc.mkdir(name, 0o700, dir_fd=fd)
    sc.setxattr_at(b"one/kept", fd, _prefix(dialect) + ondisk.SUFFIX_OPAQUE, ondisk.OPAQUE_YES)
    return MountSpec(
        lower=(scratch + b"/one", scratch + b"/two"),
        upper=scratch + b"/upper",
        work=scratch + b"/work",
        userxattr=dialect == "user",
    )


def _prefix(dialect: DialectName) -> bytes:
    return ondisk.USER_PREFIX if dialect == "user" else ondisk.TRUSTED_PREFIX


def _look(fd: int, scratch: bytes, dialect: DialectName) -> Native:
    merged = sc.open_at(scratch + b"/merged", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sc.rmdir(b"gone", dir_fd=merged)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        sc.close(sc.create_at(b"kept/new", flags, 0o600, dir_fd=merged))
    finally:
        sc.close(merged)
    mark = sc.lstat_at(b"upper/gone", fd)
    if not stat.S_ISCHR(mark.st_mode) or mark.st_rdev != 0:
        return Native("the kernel's overlay writes something else than whiteouts here")
    try:
        copied = sc.getxattr_at(b"upper/kept", fd, _prefix(dialect) + ondisk.SUFFIX_OPAQUE)
    except OSError:
        copied = b""
    return Native(None, opaque_copied_up=copied == ondisk.OPAQUE_YES)


def staged_mounts(path: bytes) -> list[bytes]:
    """Mount points below *path*, the newest first: what a dead process left there."""
    return [entry.target for entry in mountcalls.mounts_below(path)][::-1]

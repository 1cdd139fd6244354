"""The one way to the operating system for mounts.

mount(2), umount2(2), the calls on descriptors of Linux 5.2 and later, and the list in /proc.
glibc wraps the newer calls only since 2.36, so they go by number; numbers from 424 up are the
same on every architecture. All functions raise OSError with the errno of the call; ENOSYS says
that the kernel (or a seccomp filter) does not have it. Descriptors are close-on-exec.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_NR_OPEN_TREE: Final = 428
_NR_MOVE_MOUNT: Final = 429
_NR_FSOPEN: Final = 430
_NR_FSCONFIG: Final = 431
_NR_FSMOUNT: Final = 432
_NR_MOUNT_SETATTR: Final = 442

_AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000

# mount(2) flags (include/uapi/linux/mount.h)
MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_SYNCHRONOUS: Final = 16
MS_DIRSYNC: Final = 128
MS_NOSYMFOLLOW: Final = 256
MS_NOATIME: Final = 1024
MS_NODIRATIME: Final = 2048
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_POSIXACL: Final = 1 << 16
MS_PRIVATE: Final = 1 << 18
MS_RELATIME: Final = 1 << 21
MS_STRICTATIME: Final = 1 << 24

# umount2(2) flags
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

# fd-based mounting
OPEN_TREE_CLONE: Final = 1
_OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_SET_FD: Final = 5
_FSCONFIG_CMD_CREATE: Final = 6

# attributes of one mount, for fsmount() and mount_setattr()
MOUNT_ATTR_RDONLY: Final = 0x01
MOUNT_ATTR_NOSUID: Final = 0x02
MOUNT_ATTR_NODEV: Final = 0x04
MOUNT_ATTR_NOEXEC: Final = 0x08
MOUNT_ATTR_NOATIME: Final = 0x10
MOUNT_ATTR_STRICTATIME: Final = 0x20
MOUNT_ATTR_NODIRATIME: Final = 0x80
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x200000


def _check(result: int, what: bytes | str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


# --- classic calls --------------------------------------------------------------------------------


def mount(source: bytes, target: bytes, fstype: bytes | None, flags: int, data: bytes) -> None:
    """Classic mount; the kernel reads at most one page of *data*, so callers check the length."""
    mount_flags = ctypes.c_ulong(flags)
    _check(_libc.mount(source, target, fstype, mount_flags, data or None), target)


def umount(target: bytes, flags: int = 0) -> None:
    """Call umount2(2) with MNT_* flags."""
    _check(_libc.umount2(target, flags), target)


# --- fd-based calls -------------------------------------------------------------------------------


def fsopen(fstype: bytes) -> int:
    """A configuration context for a new mount of *fstype*. ENODEV: no such file system."""
    return _check(_syscall(_NR_FSOPEN, fstype, _FSOPEN_CLOEXEC), fstype)


def fsconfig_flag(context: int, key: bytes) -> None:
    """Set *key*, an option without a value."""
    _check(_syscall(_NR_FSCONFIG, context, _FSCONFIG_SET_FLAG, key, None, 0), key)


def fsconfig_string(context: int, key: bytes, value: bytes) -> None:
    """Set *key*; the kernel takes at most 255 bytes of value (EINVAL)."""
    _check(_syscall(_NR_FSCONFIG, context, _FSCONFIG_SET_STRING, key, value, 0), key)


def fsconfig_fd(context: int, key: bytes, fd: int) -> None:
    """Set *key* to an object by descriptor, which may be O_PATH."""
    _check(_syscall(_NR_FSCONFIG, context, _FSCONFIG_SET_FD, key, None, fd), key)


def fsconfig_create(context: int) -> None:
    """Create the superblock from what was configured."""
    _check(_syscall(_NR_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0))


def fsmount(context: int, attributes: int) -> int:
    """A detached mount of a created context, with MOUNT_ATTR_* bits."""
    return _check(_syscall(_NR_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes))


def move_mount(mount_fd: int, target_fd: int) -> None:
    """Attach the detached mount *mount_fd* at the directory *target_fd* (may be O_PATH)."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _check(_syscall(_NR_MOVE_MOUNT, mount_fd, b"", target_fd, b"", flags))


def open_tree(dir_fd: int, path: bytes = b"", flags: int = OPEN_TREE_CLONE) -> int:
    """Descriptor of the mount at *path*; with OPEN_TREE_CLONE a detached private copy of it.

    Without AT_RECURSIVE in *flags* whatever is mounted below is not part of the copy.
    """
    flags |= _OPEN_TREE_CLOEXEC | (0 if path else AT_EMPTY_PATH)
    return _check(_syscall(_NR_OPEN_TREE, dir_fd, path, flags), path or None)


def mount_setattr(mount_fd: int, attributes_set: int, attributes_clear: int = 0) -> None:
    """Change MOUNT_ATTR_* bits of the mount *mount_fd* (Linux 5.12)."""
    attr = struct.pack("=QQQQ", attributes_set, attributes_clear, 0, 0)
    _check(_syscall(_NR_MOUNT_SETATTR, mount_fd, b"", AT_EMPTY_PATH, attr, len(attr)))


def read_log(context: int) -> list[str]:
    """Messages that the kernel left in a configuration context, oldest first, without prefix.

    Each read of the context gives one line "e fstype: text" (or w, i); ENODATA is the end.
    """
    lines: list[str] = []
    while True:
        try:
            raw = os.read(context, 4096)
        except OSError as exc:
            if exc.errno == errno.ENODATA:
                return lines
            raise
        if not raw:
            return lines
        text = raw.decode("utf-8", "backslashreplace").strip()
        lines.append(re.sub(r"^[ewi] (\w+: )?", "", text))


# --- the list of mounts ---------------------------------------------------------------------------


class MountEntry(NamedTuple):
    """One line of mountinfo (proc_pid_mountinfo(5)); texts with the octal escapes undone."""

    mount_id: int
    parent_id: int
    device: int
    root: bytes
    target: bytes
    options: tuple[bytes, ...]
    fstype: bytes
    source: bytes
    super_options: bytes  # as the kernel wrote it, see super_option()


_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


def unescape_octal(text: bytes) -> bytes:
    r"""Undo the \040-like escapes of /proc/self/mounts and mountinfo."""
    return _OCTAL.sub(lambda match: bytes((int(match[1], 8),)), text)


def parse_mountinfo(text: bytes) -> Iterator[MountEntry]:
    """The entries of a mountinfo text, in its order: what is mounted on top comes later."""
    for line in text.split(b"\n"):
        if not line:
            continue
        left, _, right = line.partition(b" - ")
        head = left.split(b" ")
        fstype, source, super_options = (*right.split(b" "), b"", b"")[:3]
        major, _, minor = head[2].partition(b":")
        yield MountEntry(
            int(head[0]),
            int(head[1]),
            os.makedev(int(major), int(minor)),
            unescape_octal(head[3]),
            unescape_octal(head[4]),
            tuple(head[5].split(b",")),
            unescape_octal(fstype),
            unescape_octal(source),
            super_options,
        )


def read_mountinfo(pid: int | str = "self") -> list[MountEntry]:
    """Every mount that process *pid* sees."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return list(parse_mountinfo(file.read()))


def find_mount(target: bytes) -> MountEntry | None:
    """The topmost mount at the path *target* (absolute, without links), None if there is none."""
    with open("/proc/self/mountinfo", "rb") as file:
        lines = file.read().split(b"\n")
    # A machine may have thousands of mounts: only what looks alike is parsed.
    shown = b" " + _escape_octal(target) + b" "
    candidates = b"\n".join(line for line in lines if shown in line)
    found = [entry for entry in parse_mountinfo(candidates) if entry.target == target]
    return found[-1] if found else None


def mounts_below(path: bytes) -> list[MountEntry]:
    """The mounts at and below the directory *path* (absolute, without links)."""
    with open("/proc/self/mountinfo", "rb") as file:
        text = file.read()
    shown = b" " + _escape_octal(path)
    if shown not in text:
        return []
    lines = b"\n".join(line for line in text.split(b"\n") if shown in line)
    return [
        entry
        for entry in parse_mountinfo(lines)
        if entry.target == path or entry.target.startswith(path.rstrip(b"/") + b"/")
    ]


def _escape_octal(path: bytes) -> bytes:
    """*path* as mountinfo shows a mount point (show_mountinfo() in fs/proc_namespace.c)."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else b"%c" % byte for byte in path)


def super_option(entry: MountEntry, name: bytes) -> bytes | None:
    """Value of one option of the file system, octal escapes undone, None when it is not there."""
    values = super_option_all(entry, name)
    return values[-1] if values else None


def super_option_all(entry: MountEntry, name: bytes) -> list[bytes]:
    """All values of an option that may be repeated, such as ``lowerdir+``."""
    values: list[bytes] = []
    for element in entry.super_options.split(b","):
        key, _, value = element.partition(b"=")
        if key == name:
            values.append(unescape_octal(value))
    return values

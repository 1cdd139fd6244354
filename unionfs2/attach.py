"""Obtain a descriptor of /dev/fuse that is mounted on a directory.

mount(2) where this process may (root, also of a user namespace), the setuid helper fusermount3
otherwise. The descriptor is what a FUSE server reads requests from; who mounts keeps nothing.
Permissions are always checked by the kernel (default_permissions): the server acts with the
mounter's rights and could not tell.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import TYPE_CHECKING, Final

from . import mountcalls, privilege
from .errors import MountError, OptionError, PrivilegeError, UnavailableError, show
from .mounter import FUSE_TYPE, mount_flags, open_target
from .options import MountSpec, escape

if TYPE_CHECKING:
    import socket

DEVICE: Final = "/dev/fuse"
HELPER: Final = "fusermount3"
_HELPER_CONFIG: Final = "/etc/fuse.conf"
_SUBTYPE: Final = FUSE_TYPE.partition(b".")[2]


def fuse_reason() -> str | None:
    """Why FUSE cannot be used here, None when it may be tried; nothing is mounted."""
    try:
        os.close(_open_device())
    except MountError as exc:
        return str(exc)
    if privilege.may_mount() or _find_helper() is not None:
        return None
    return _helper_missing()


def attach(spec: MountSpec, target: bytes) -> int:
    """Mount FUSE on *target* (absolute, no links) and return its /dev/fuse descriptor.

    Raises TargetError, UnavailableError, PrivilegeError, OptionError or MountError.
    """
    target_fd = open_target(target)
    try:
        if privilege.may_mount():
            try:
                return _by_mount(spec, target, target_fd)
            except PermissionError:
                # Privileged, but not towards the namespace that owns the mounts.
                pass
        return _by_helper(spec, target)
    finally:
        os.close(target_fd)


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise UnavailableError(
            f"{DEVICE} does not exist: load the module (modprobe fuse), "
            "or give the container that device"
        ) from exc
    except PermissionError as exc:
        raise PrivilegeError(
            f"{DEVICE} cannot be opened: {os.strerror(exc.errno or 0)}, "
            "its permissions or the container's device rules must allow reading and writing"
        ) from exc
    except OSError as exc:
        raise UnavailableError(
            f"{DEVICE} cannot be opened: {os.strerror(exc.errno or 0)}, "
            "load the module (modprobe fuse)"
        ) from exc


# --- mount(2) -------------------------------------------------------------------------------------


def _by_mount(spec: MountSpec, target: bytes, target_fd: int) -> int:
    fd = _open_device()
    # Flag MS_POSIXACL: the kernel then leaves the umask to us (fs/fuse/inode.c, dont_mask), which
    # directories with a default ACL need.
    flags = mount_flags(spec) | mountcalls.MS_POSIXACL
    place = b"/proc/self/fd/%d" % target_fd
    try:
        mountcalls.mount(spec.source, place, FUSE_TYPE, flags, _mount_data(spec, fd))
    except PermissionError:
        os.close(fd)
        raise
    except OSError as exc:
        os.close(fd)
        if exc.errno == errno.ENODEV:
            raise UnavailableError(
                "this kernel has no FUSE file system: load the module (modprobe fuse)"
            ) from exc
        raise MountError(
            f"cannot mount FUSE on {show(target)}: {os.strerror(exc.errno or 0)}", errno=exc.errno
        ) from exc
    return fd


def _mount_data(spec: MountSpec, fd: int) -> bytes:
    parts = [
        b"fd=%d,rootmode=%o" % (fd, stat.S_IFDIR),
        b"user_id=%d,group_id=%d" % (os.geteuid(), os.getegid()),
        b"default_permissions",
    ]
    if spec.allow_other is not False:
        parts.append(b"allow_other")
    parts += [b'%s="%s"' % (option.encode(), label) for option, label in spec.context]
    return b",".join(parts)


# --- fusermount3 ----------------------------------------------------------------------------------


def _find_helper() -> str | None:
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(directory or ".", HELPER)
        if os.access(path, os.X_OK):
            return path
    return None


def _helper_missing() -> str:
    return f"mounting without privilege needs {HELPER}, which is not on PATH: install fuse3"


def _by_helper(spec: MountSpec, target: bytes) -> int:
    """Let fusermount3 mount; it sends the descriptor over the socket in _FUSE_COMMFD."""
    helper = _find_helper()
    if helper is None:
        raise UnavailableError(_helper_missing())
    if spec.context:
        raise OptionError(
            f"option {spec.context[0][0]}= needs the privilege to mount: leave it out"
        )
    # The helper opens the device with the rights of its caller; ask first, for a better answer.
    os.close(_open_device())
    import socket  # noqa: PLC0415 - costs milliseconds, needed without privilege only
    import subprocess  # noqa: PLC0415

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [os.fsencode(helper), b"-o", _helper_options(spec), b"--", target],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode != 0:
            raise _helper_failed(spec, target, done.stderr)
        theirs.close()
        return _receive(ours, target)


def _helper_options(spec: MountSpec) -> bytes:
    words = [
        b"ro" if spec.read_only else b"rw",
        b"nosuid",
        b"nodev",
        b"fsname=" + escape(spec.source),
        b"subtype=" + _SUBTYPE,
        b"default_permissions",
    ]
    for wanted, word in (
        (spec.noexec, b"noexec"),
        (spec.nosymfollow, b"nosymfollow"),
        # The helper knows no other word about access times, nor do they mean anything: the kernel
        # leaves access times to a FUSE server (S_NOATIME in fs/fuse/inode.c).
        (spec.atime == "noatime", b"noatime"),
        (spec.sync, b"sync"),
        (spec.dirsync, b"dirsync"),
        (spec.allow_other, b"allow_other"),
    ):
        if wanted:
            words.append(word)
    return b",".join(words)


def _helper_failed(spec: MountSpec, target: bytes, stderr: bytes) -> MountError:
    text = stderr.decode("utf-8", "replace").strip().removeprefix(f"{HELPER}: ")
    if spec.allow_other and "user_allow_other" in text:
        return PrivilegeError(
            f"allow_other is not permitted: add the line user_allow_other to {_HELPER_CONFIG}, "
            "or leave the option out"
        )
    if "/dev/fuse" in text or "fuse device" in text:
        return UnavailableError(f"{HELPER} cannot use {DEVICE}: {text}")
    return MountError(f"{HELPER} cannot mount on {show(target)}: {text or 'it gave no reason'}")


def _receive(ours: socket.socket, target: bytes) -> int:
    """The descriptor that the helper has sent before it ended (SCM_RIGHTS)."""
    import socket  # noqa: PLC0415 - see _by_helper()

    descriptor = struct.Struct("=i")
    room = socket.CMSG_LEN(descriptor.size)
    _, ancillary, _, _ = ours.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fd: int = descriptor.unpack_from(data)[0]
            return fd
    raise MountError(f"{HELPER} mounted {show(target)} but sent no descriptor: unmount it")

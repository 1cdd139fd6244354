"""Running the machine where its mounts concern nobody: private namespaces.

In a private mount namespace everything mounted disappears with its last process. In a user
namespace an ordinary user is root over its own mounts, which is where ``userxattr`` belongs.
"""

from __future__ import annotations

import os
import stat
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.differential import rawcalls

#: Who the namespace belongs to, when root makes it for the purpose, and the ids it maps to.
OWNER: Final = 61234
_SUBORDINATE: Final = 700_000


def private_mounts() -> None:
    """Move this process into a mount namespace of its own."""
    rawcalls.unshare(rawcalls.CLONE_NEWNS)
    rawcalls.mount(b"none", b"/", b"", rawcalls.MS_REC | rawcalls.MS_PRIVATE, None)


def cover_fuse_device() -> None:
    """In a private mount namespace: a /dev/fuse that everybody may open, over the real one."""
    if os.stat("/dev/fuse").st_mode & 0o006 == 0o006:
        return
    place = tempfile.mkdtemp(prefix="unionfs2-fuse-")
    try:
        rawcalls.mount(b"fuse-node", os.fsencode(place), b"tmpfs", 0, b"mode=755")
        node = Path(place) / "fuse"
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(10, 229))
        node.chmod(0o666)
        rawcalls.mount(os.fsencode(node), b"/dev/fuse", b"", rawcalls.MS_BIND, None)
        rawcalls.umount(os.fsencode(place), rawcalls.MNT_DETACH)
    finally:
        os.rmdir(place)


def in_user_namespace(work: Callable[[], int]) -> int:
    """Exit status of *work*, run by an ordinary user who is root of a user namespace.

    As real root: user OWNER with 64 k ids mapped, and a /dev/fuse it may open. As anybody else:
    that user, with one id mapped, and /dev/fuse as the machine has it.
    """
    asks, asked = os.pipe()
    mapped, maps = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(asks, asked, mapped, maps, work)
    os.close(asked)
    os.close(mapped)
    try:
        if os.read(asks, 1):
            _write_maps(pid)
            os.write(maps, b"m")
    finally:
        os.close(asks)
        os.close(maps)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(asks: int, asked: int, mapped: int, maps: int, work: Callable[[], int]) -> None:
    status = 70
    try:
        os.close(asks)
        os.close(maps)
        if os.geteuid() == 0:
            private_mounts()
            cover_fuse_device()
            os.setgroups([])
            os.setresgid(OWNER, OWNER, OWNER)
            os.setresuid(OWNER, OWNER, OWNER)
        rawcalls.unshare(rawcalls.CLONE_NEWUSER | rawcalls.CLONE_NEWNS)
        os.write(asked, b"a")
        if os.read(mapped, 1):
            rawcalls.mount(b"none", b"/", b"", rawcalls.MS_REC | rawcalls.MS_PRIVATE, None)
            status = work()
    except BaseException:  # noqa: BLE001 - the last frame of a process
        traceback.print_exc()
    finally:
        os._exit(status)


def _write_maps(pid: int) -> None:
    place = Path(f"/proc/{pid}")
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        ids = f"0 {OWNER} 1\n1 {_SUBORDINATE} 65535\n"
        (place / "uid_map").write_text(ids)
        (place / "gid_map").write_text(ids)
        return
    (place / "setgroups").write_text("deny")
    (place / "uid_map").write_text(f"0 {uid} 1\n")
    (place / "gid_map").write_text(f"0 {gid} 1\n")

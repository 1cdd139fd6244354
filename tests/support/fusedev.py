"""A /dev/fuse that an ordinary user may open, without touching the machine's own.

Many machines keep /dev/fuse at mode 0600. The command lines made here run in a private mount
namespace, where a node of mode 0666 on a fresh tmpfs covers it. Node and mounts vanish with the
namespace, that is with the last process in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# Arguments: uid, gid, then the command. The tmpfs is put on /mnt, which exists everywhere and
# of which only this namespace sees the cover; a temporary directory may not allow devices.
_SCRIPT: Final = """
set -e
mount -t tmpfs -o mode=0755 none /mnt
mknod -m 0666 /mnt/fuse c 10 229
mount --bind /mnt/fuse /dev/fuse
umount -l /mnt
uid=$1 gid=$2
shift 2
exec setpriv --reuid "$uid" --regid "$gid" --clear-groups -- "$@"
"""


def as_user(command: Sequence[str], *, uid: int, gid: int) -> list[str]:
    """Command line that runs *command* as *uid*:*gid* with a usable /dev/fuse; root must run it.

    fusermount3 keeps its set-user-id bit there. All mounts made by *command* are private to it.
    """
    namespace = ["unshare", "--mount", "--propagation", "private"]
    return [*namespace, "sh", "-c", _SCRIPT, "sh", str(uid), str(gid), *command]


def in_user_namespace(command: Sequence[str], *, uid: int, gid: int) -> list[str]:
    """As as_user(), then root of a new user namespace that maps only *uid* and *gid*."""
    inner = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]
    return as_user([*inner, "--", *command], uid=uid, gid=gid)

"""A project that ordinary users cannot reach (below /root, say) made reachable for the tests.

Many tests act as ordinary users, who then must be able to run this very Python. Where a directory
above the project is closed to them, the tests run in a mount namespace of their own in which that
directory holds nothing but the way to the project. The machine itself is left as it is.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

# Arguments: the closed directory, the project, then the command. /mnt only keeps hold of the
# project while its way is covered.
_SCRIPT: Final = """
set -e
closed=$1 project=$2
shift 2
umask 022
mount -t tmpfs -o mode=0755 none /mnt
mkdir /mnt/project
mount --rbind "$project" /mnt/project
mount -t tmpfs -o mode=0755 none "$closed"
mkdir -p "$project"
mount --rbind /mnt/project "$project"
umount -l /mnt
cd "$project"
exec "$@"
"""


def closed_directory(project: Path) -> Path | None:
    """The topmost directory above *project* that others may not search; None if there is none."""
    for directory in (*reversed(project.parents), project):
        if not directory.stat().st_mode & stat.S_IXOTH:
            return directory
    return None


def prefix(project: Path) -> list[str]:
    """What to put before a command so that everybody can reach *project* in it.

    Empty where nothing is needed, and without privilege, as nobody else is acted as then.
    """
    closed = closed_directory(project)
    if closed is None or os.geteuid() != 0:
        return []
    namespace = ["unshare", "--mount", "--propagation", "private"]
    return [*namespace, "sh", "-c", _SCRIPT, "sh", str(closed), str(project)]

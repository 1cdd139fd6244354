"""The FUSE mounter of the commands: they have no threads, so the server is forked off."""

from __future__ import annotations

import os
from collections.abc import Callable

from unionfs2.fuse_mount import FuseMounter, Ready
from unionfs2.mounter import Mounted
from unionfs2.options import MountSpec


def _body(spec: MountSpec, target: bytes, ready: Ready, warn: Callable[[str], None]) -> None:
    # Loaded in the server only: the starting process does not need what a server needs.
    from unionfs2.serving import serve_mount  # noqa: PLC0415

    serve_mount(spec, target, ready, warn, pid=os.getpid())


def fork_mounter() -> FuseMounter:
    """A FuseMounter that forks; for processes without threads."""
    return FuseMounter(_body)


def mount_by_fork(spec: MountSpec, target: bytes) -> Mounted:
    """Mount through FUSE by a forked server; return when the mount answers."""
    return fork_mounter().mount(spec, target)

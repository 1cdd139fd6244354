"""Mounts that a test or an aborted test run left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path

from tests.support import probe

# Held locked by a session for as long as it lives; the lock dies with the process.
SESSION_LOCK = ".unionfs2-session"

_OCTAL = re.compile(rb"\\([0-7]{3})")


def below(directory: Path) -> list[bytes]:
    """Mount points at or below *directory*, the deepest and newest first."""
    prefix = os.fsencode(directory)
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        target = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), line.split(b" ")[4])
        if target == prefix or target.startswith(prefix + b"/"):
            found.append(target)
    return found[::-1]


def detach(directory: Path) -> list[bytes]:
    """Lazily unmount everything at or below *directory*; what was there."""
    targets = below(directory)
    for target in targets:
        # A mount may go together with the one below it.
        with contextlib.suppress(OSError):
            probe.sys_umount(target, probe.MNT_DETACH)
    return targets


def claim(session_root: Path) -> int:
    """Mark *session_root* as belonging to this process; keep the descriptor open."""
    fd = os.open(session_root / SESSION_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _is_dead(session_root: Path) -> bool:
    try:
        fd = os.open(session_root / SESSION_LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False  # not ours, or not yet claimed
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def sweep(tests_root: Path) -> list[bytes]:
    """Detach the mounts of sessions below *tests_root* whose process is gone; what was there."""
    roots = {
        tests_root / os.fsdecode(target[len(os.fsencode(tests_root)) + 1 :]).split("/")[0]
        for target in below(tests_root)
        if target != os.fsencode(tests_root)
    }
    return [target for root in sorted(roots) if _is_dead(root) for target in detach(root)]

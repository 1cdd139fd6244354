"""How much the kernel reads ahead on a FUSE mount, for every door."""

from __future__ import annotations

import os

from . import mountcalls
from .logger import Log

_log = Log(__name__)


def widen(mountpoint: str, size: int) -> None:
    """Let the kernel ask for up to *size* bytes at once: fewer messages for long reads.

    The protocol caps read-ahead at what the kernel offers (128 KiB); once it is settled, root may
    raise it. The device is read from the list of mounts: a path into the mount would keep it
    busy for somebody who unmounts at once.
    """
    entry = mountcalls.find_mount(os.fsencode(mountpoint))
    if entry is None:
        return
    name = f"/sys/class/bdi/{os.major(entry.device)}:{os.minor(entry.device)}/read_ahead_kb"
    try:
        with open(name, "w", encoding="ascii") as setting:
            setting.write(str(size >> 10))
    except OSError as exc:
        _log.debug("read-ahead stays as it is: %s", exc)

"""The transports that a FUSE mount is tested on, each in turn, and proof of which one served.

Suites take their parameters from here, so one more name in ``unionfs2.transports.SERVED`` is one
more run of everything that a server's behaviour matters to.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from unionfs2 import mounts, transports
from unionfs2.transports import Transport

#: What there is to be tested.
TRANSPORTS: Final[tuple[Transport, ...]] = transports.SERVED

NATIVE: Final = "native"
#: Ways to mount, for suites that the kernel's overlay takes part in.
WAYS: Final[tuple[str, ...]] = (NATIVE, *TRANSPORTS)


def backend_of(way: str) -> str:
    """The backend of one of WAYS."""
    return NATIVE if way == NATIVE else "fuse"


def backend_words(way: str) -> list[str]:
    """Words of a command line that ask for *way*."""
    if way == NATIVE:
        return ["--backend", NATIVE]
    return ["--backend", "fuse", "--transport", way]


def serving(target: Path | bytes | str) -> str | None:
    """The transport that the status of the mount at *target* tells."""
    wanted = os.fsencode(target)
    found = [status.transport for status in mounts.list_mounts() if status.target == wanted]
    assert found, f"no unionfs2 mount at {target!r}"
    return found[-1]


def assert_served_by(target: Path | bytes | str, transport: str | None) -> None:
    """The mount at *target* is served by what was asked for; None for the kernel's overlay."""
    found = serving(target)
    assert found == transport, f"{target!r} is served by {found}, not {transport}"

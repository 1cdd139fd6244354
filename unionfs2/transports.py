"""Which program speaks to /dev/fuse for a mount: one of two, behind the same core.

``pyfuse3`` is the door of fs_ops.py, on libfuse and trio; ``devfuse`` speaks the protocol itself.
Which of them this version has, and which one ``auto`` takes, is decided here and nowhere else.
"""

from __future__ import annotations

from typing import Final, Literal

Transport = Literal["pyfuse3", "devfuse"]

#: Every name that may be asked for.
NAMES: Final[tuple[Transport, ...]] = ("pyfuse3", "devfuse")

#: Those that can serve; ``auto`` takes the first.
SERVED: Final[tuple[Transport, ...]] = ("devfuse", "pyfuse3")


def chosen(asked: str) -> Transport:
    """The transport for a mount that asks for *asked*: ``auto``, or one of NAMES."""
    for name in NAMES:
        if name == asked:
            return name
    return SERVED[0]


def refusal(asked: str) -> str | None:
    """Why *asked* cannot serve in this version; None when it can."""
    if chosen(asked) in SERVED:
        return None
    return f"transport={asked} is not part of this version: leave it out"

"""The table of differences from the kernel that are meant, and nothing else.

Each row says in docs/semantics.md ("Differences from the kernel") what the kernel does, what the
FUSE mount does and why; a test compares the ids with that section. A row excuses exactly the calls
its predicate accepts. Whatever has a lasting effect on one side only does not belong into random
histories: the generator leaves those calls out, the catalogue makes them where nothing follows.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, NamedTuple

from tests.differential.script import Op
from tests.differential.worker import Answer

Excuses = Callable[[Op, Answer, Answer], bool]


class Known(NamedTuple):
    """One meant difference: id (anchor in the document), reason, the calls it covers."""

    ident: str
    reason: str
    excuses: Excuses


def _refused(*names: str, ours: int) -> Excuses:
    """The kernel may do it, we answer *ours*."""

    def excuses(op: Op, kernel: Answer, other: Answer) -> bool:
        return op.name in names and other[0] == ours and kernel[0] != ours

    return excuses


def _holes(op: Op, kernel: Answer, other: Answer) -> bool:
    return op.name == "lseek" and op.args[2] in {3, 4} and kernel[:2] != other[:2]


KNOWN: Final[tuple[Known, ...]] = (
    Known(
        "fallocate",
        "pyfuse3 has no handler for FUSE_FALLOCATE",
        _refused("fallocate", ours=errno.EOPNOTSUPP),
    ),
    Known(
        "seek-hole",
        "pyfuse3 has no handler for FUSE_LSEEK: the kernel answers as if there were no holes",
        _holes,
    ),
    Known(
        "tmpfile",
        "pyfuse3 has no handler for FUSE_TMPFILE",
        _refused("tmpfile", ours=errno.EOPNOTSUPP),
    ),
    Known(
        "inode-flags",
        "pyfuse3 has no handler for FUSE_IOCTL: lsattr and chattr are not available",
        _refused("getflags", "setflags", ours=errno.ENOTTY),
    ),
)


def excuse(op: Op, kernel: Answer, other: Answer) -> Known | None:
    """The row that covers a difference in one answer, None when nothing does."""
    for row in KNOWN:
        if row.excuses(op, kernel, other) and _same_touched(kernel, other):
            return row
    return None


def _same_touched(kernel: Answer, other: Answer) -> bool:
    return kernel[2] == other[2] or kernel[0] != other[0]

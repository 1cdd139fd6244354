"""The table of differences from the kernel that are meant, and nothing else.

A difference holds for one transport or for both: what pyfuse3 has no handler for is no excuse for
devfuse. Each row says in docs/semantics.md ("Differences from the kernel") what the kernel does,
what the FUSE mount does and why; a test compares ids and transports with that section. A row
excuses exactly the calls its predicate accepts. Whatever has a lasting effect on one side only
does not belong into random histories: the generator leaves those calls out, the catalogue makes
them where nothing follows.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from tests.differential.looks import Listed, Look
from tests.differential.script import Op
from tests.differential.worker import Answer

Excuses = Callable[[Op, Answer, Answer], bool]

#: Where a difference holds, as the document writes it behind the id.
PYFUSE3: Final = frozenset({"pyfuse3"})
DEVFUSE: Final = frozenset({"devfuse"})
BOTH: Final = PYFUSE3 | DEVFUSE


class Known(NamedTuple):
    """One meant difference: id (anchor in the document), reason, the calls it covers, where."""

    ident: str
    reason: str
    excuses: Excuses
    transports: frozenset[str] = BOTH


def _never(_op: Op, _kernel: Answer, _other: Answer) -> bool:
    """For differences that the worker or the comparison of uppers takes care of."""
    return False


def _refused(*names: str, ours: int) -> Excuses:
    """The kernel may do it, we answer *ours*."""

    def excuses(op: Op, kernel: Answer, other: Answer) -> bool:
        return op.name in names and other[0] == ours and kernel[0] != ours

    return excuses


def _holes(op: Op, kernel: Answer, other: Answer) -> bool:
    return op.name == "lseek" and op.args[2] in {3, 4} and kernel[:2] != other[:2]


def _directory_seek(op: Op, kernel: Answer, other: Answer) -> bool:
    if op.name != "lseek" or op.args[1:] == (0, os.SEEK_SET):
        return False
    seen = [look for _slot, look in (*kernel[2], *other[2])]
    return all(isinstance(look, Look) and look.kind == stat.S_IFDIR for look in seen)


def _copied_by_reading(op: Op, kernel: Answer, other: Answer) -> bool:
    if op.name != "copy_range" or kernel[:2] != other[:2]:
        return False
    pairs = zip(kernel[2], other[2], strict=True)
    return all(
        isinstance(mine, Look) and isinstance(its, Look) and mine == its._replace(atime=mine.atime)
        for (_slot, mine), (_same, its) in pairs
    )


def _chown_nothing(op: Op, kernel: Answer, other: Answer) -> bool:
    if op.name not in {"chown", "lchown", "fchown"} or op.args[1:] != (-1, -1):
        return False
    return kernel[0] == errno.EPERM and other[0] == 0


def _entry_number(op: Op, kernel: Answer, other: Answer) -> bool:
    if op.name not in {"readdir", "freaddir"} or kernel[0] or other[0]:
        return False
    return same_listing(kernel[1], other[1])


def same_listing(kernel: Sequence[Listed], other: Sequence[Listed]) -> bool:
    """Equal, or at least one d_ino that is st_ino for us and something else for the kernel."""
    return len(kernel) == len(other) and all(
        a == b or (a[:2] == b[:2] and a[2] == "other" and b[2] == "same")
        for a, b in zip(kernel, other, strict=True)
    )


def _asked_first(op: Op, kernel: Answer, other: Answer) -> bool:
    if op.name not in {"setxattr", "fsetxattr"} or kernel[2] != other[2]:
        return False
    return kernel[0] == errno.EPERM and other[0] in {errno.ENODATA, errno.EEXIST}


def _forgotten_link(op: Op, kernel: Answer, other: Answer) -> bool:
    return op.name == "rename" and kernel[0] == errno.ESTALE and other[0] == 0


def _listed_before(op: Op, kernel: Answer, other: Answer) -> bool:
    if op.name != "readdir_unlink" or kernel[0] or other[0]:
        return False
    seen, left = kernel[1]
    stray = (errno.ENOENT,)
    return ([e for e in seen if e[1:] != stray], left) == (
        [e for e in other[1][0] if e[1:] != stray],
        other[1][1],
    )


def _protected_open(op: Op, kernel: Answer, other: Answer) -> bool:
    if op.name != "open_close" or kernel[1:] != other[1:]:
        return False
    return kernel[0] == errno.EPERM and other[0] == 0


KNOWN: Final[tuple[Known, ...]] = (
    Known(
        "fallocate",
        "pyfuse3 has no handler for FUSE_FALLOCATE",
        _refused("fallocate", ours=errno.EOPNOTSUPP),
        PYFUSE3,
    ),
    Known(
        "seek-hole",
        "pyfuse3 has no handler for FUSE_LSEEK: the kernel answers as if there were no holes",
        _holes,
        PYFUSE3,
    ),
    Known(
        "tmpfile",
        "pyfuse3 has no handler for FUSE_TMPFILE",
        _refused("tmpfile", ours=errno.EOPNOTSUPP),
        PYFUSE3,
    ),
    Known(
        "inode-flags",
        "pyfuse3 has no handler for FUSE_IOCTL: lsattr and chattr are not available",
        _refused("getflags", "setflags", ours=errno.ENOTTY),
        PYFUSE3,
    ),
    Known(
        "entry-number",
        "until a directory is marked impure the kernel lists merged directories in it with the"
        " number of the upper; ours is st_ino from the start",
        _entry_number,
    ),
    Known(
        "setxattr-fails",
        "the kernel copies up before the upper refuses a setxattr (absent, exists, not supported,"
        " too long); ours does not, and asks whether the attribute is there before it asks for"
        " permission. The worker brings the object up on both sides after such a failure",
        _asked_first,
        PYFUSE3,
    ),
    Known(
        "rename-not-empty",
        "asked for a rename that leaves a whiteout, ext4 changes the mtime of the source's parent"
        " before it finds the target not empty; ours finds out first. The worker sets that mtime"
        " on both sides after such a failure",
        _never,
    ),
    Known(
        "setgid-on-write",
        "a FUSE write does not tell who writes, so set-group-id without group execute survives a"
        " write by somebody outside the group. The worker clears it on both sides",
        _never,
        PYFUSE3,
    ),
    Known(
        "suid-on-truncate-userns",
        "root of a user namespace keeps set-user-id when it truncates on the kernel's overlay; our"
        " server's own truncate clears it. The worker clears it on both sides, there only",
        _never,
    ),
    Known(
        "lost-identity",
        "with userxattr the kernel forgets which names are one file; renaming one onto the other"
        " may even be ESTALE",
        _forgotten_link,
    ),
    Known(
        "listed-before",
        "a listing that began before the directory was copied up: the kernel goes on with the"
        " lower directory, stray whiteouts included, ours with the merged one",
        _listed_before,
    ),
    Known(
        "directory-seek",
        "the FUSE client moves in a directory by itself and takes any position, the end included",
        _directory_seek,
    ),
    Known(
        "copy-atime",
        "pyfuse3 has no handler for FUSE_COPY_FILE_RANGE: the FUSE client copies by reading, which"
        " counts as a read of the source",
        _copied_by_reading,
        PYFUSE3,
    ),
    Known(
        "chown-nothing",
        "the FUSE client does not see a mode change in chown(-1, -1) of a set-group-id file"
        " without group execute, so the owner check of such a change does not happen",
        _chown_nothing,
    ),
    Known(
        "copy-up-at-first-write",
        "devfuse is not asked about opens, so a file opened for writing is copied up by what"
        " changes it first. The worker sets the times of such a file to what they are, on both"
        " sides; where a history tells it not to, uppers are compared without what only the open"
        " has brought up (opened.py)",
        _never,
        DEVFUSE,
    ),
    Known(
        "truncate-same-size",
        "where the FUSE client holds writes back it keeps the times of files by itself, and sets"
        " none when truncate(2) leaves the size. The worker sets mtime on both sides after such a"
        " call",
        _never,
        DEVFUSE,
    ),
    Known(
        "protected-open",
        "devfuse is not asked about opens, so an immutable or append-only file can be opened for"
        " writing; the first write is refused",
        _protected_open,
        DEVFUSE,
    ),
)


#: Known differences without a row: neither the generator nor the catalogue makes these calls, but
#: for "fifo-atime", which read_atime() knows.
AVOIDED: Final[dict[str, frozenset[str]]] = {
    "mmap-old-descriptor": BOTH,
    "change-unlinked-node": BOTH,
    "mmap-write-clears": BOTH,
    "directory-read": BOTH,
    "userxattr-whiteout-listing": BOTH,
    "unmarked-whiteout-listing": BOTH,
    "fifo-atime": BOTH,
    "touch-append-only": BOTH,
    "fallocate-ranges": DEVFUSE,
}

#: The one known difference that is about a field, not about a call.
READ_ATIME: Final = "read-atime"


#: Known differences that only a mount has whose writes are held back.
HELD_BACK: Final = frozenset({"truncate-same-size"})


def table() -> dict[str, frozenset[str]]:
    """Every known difference by id, and where it holds."""
    return {READ_ATIME: BOTH, **AVOIDED, **{row.ident: row.transports for row in KNOWN}}


def idents(transport: str | None, *, holds_back: bool = True) -> frozenset[str]:
    """What is known of *transport*; everything when it is not one of ours.

    *holds_back*: whether the kernel holds writes back on that mount.
    """
    found = {ident for ident, where in table().items() if transport is None or transport in where}
    return frozenset(found if holds_back else found - HELD_BACK)


def read_atime(kernel: Look, other: Look) -> Look:
    """*other*, with the kernel's access time where only the kernel noticed a read.

    Reads that the page cache answers, and reads at the end of a file, never reach a FUSE server,
    so it cannot update the access time of the upper file. The other way round is a difference:
    nothing but a read that counts for the kernel may set the access time.
    """
    if stat.S_ISFIFO(kernel.kind) and other.atime == "now":
        return other._replace(atime=kernel.atime)  # fifo-atime
    if kernel.atime == "now" and isinstance(other.atime, int) and kernel.kind != stat.S_IFDIR:
        return other._replace(atime="now")
    return other


def without_cached_reads(kernel: Answer, other: Answer) -> Answer:
    """*other* with read_atime() applied to everything in it that is a stat."""
    value = other[1]
    if isinstance(value, Look) and isinstance(kernel[1], Look):
        value = read_atime(kernel[1], value)
    mine = dict(kernel[2])
    touched = tuple((path, _touched_atime(mine.get(path), seen)) for path, seen in other[2])
    return other[0], value, touched


def _touched_atime(kernel: Look | int | None, other: Look | int) -> Look | int:
    if isinstance(kernel, Look) and isinstance(other, Look):
        return read_atime(kernel, other)
    return other


def excuse(op: Op, kernel: Answer, other: Answer, transport: str | None) -> Known | None:
    """The row that covers a difference in one answer on *transport*, None when nothing does."""
    for row in KNOWN:
        if transport in row.transports and row.excuses(op, kernel, other):
            return row
    return None

"""Upper and work directories as they are on disk, reduced to what section 17 compares."""

from __future__ import annotations

import fcntl
import os
import stat
from collections import defaultdict
from typing import Final, NamedTuple

from tests.differential import rawcalls
from tests.differential.looks import Look, digest, look
from tests.differential.objects import names_quietly

#: FS_*_FL bits which a copy-up may carry over or must lose: S, i, a, d, A.
_FLAG_MASK: Final = 0x08 | 0x10 | 0x20 | 0x40 | 0x80


class Stored(NamedTuple):
    """One object of an upper directory."""

    look: Look
    content: bytes | None
    xattrs: tuple[tuple[bytes, bytes], ...]
    flags: int
    first_name: bytes
    blocks: int


WHITEOUT: Final = "whiteout"
Upper = dict[bytes, Stored | str]


def upper(root: bytes) -> Upper:
    """Every object of an upper directory; a whiteout is nothing but a whiteout."""
    found: Upper = {}
    names: dict[int, bytes] = {}
    _read(root, b"", found, names)
    return found


def _read(root: bytes, path: bytes, found: Upper, names: dict[int, bytes]) -> None:
    where = os.path.join(root, path) if path else root
    item = found[path] = stored(where)
    if isinstance(item, str):
        return
    if not stat.S_ISDIR(item.look.kind):
        number = os.stat(where, follow_symlinks=False).st_ino
        found[path] = item._replace(first_name=names.setdefault(number, path))
    else:
        for name in names_quietly(where):
            _read(root, path + b"/" + name if path else name, found, names)


def stored(where: bytes) -> Stored | str:
    """One object as it is on disk, without the names it has."""
    st = os.stat(where, follow_symlinks=False)
    if stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
        return WHITEOUT
    return Stored(
        look(st, frozenset()),
        _content(where, st),
        _xattrs(where),
        _flags(where, st),
        b"",
        st.st_blocks,
    )


def _content(where: bytes, st: os.stat_result) -> bytes | None:
    if stat.S_ISLNK(st.st_mode):
        return os.readlink(where)
    if not stat.S_ISREG(st.st_mode):
        return None
    fd = os.open(where, os.O_RDONLY | os.O_NOATIME)
    try:
        return digest(os.read(fd, max(st.st_size, 1)))
    finally:
        os.close(fd)


def _xattrs(where: bytes) -> tuple[tuple[bytes, bytes], ...]:
    names = sorted(os.fsencode(name) for name in os.listxattr(where, follow_symlinks=False))
    return tuple((name, os.getxattr(where, name, follow_symlinks=False)) for name in names)


def _flags(where: bytes, st: os.stat_result) -> int:
    if not stat.S_ISREG(st.st_mode) and not stat.S_ISDIR(st.st_mode):
        return 0
    buffer = bytearray(8)
    fd = os.open(where, os.O_RDONLY | os.O_NOATIME)
    try:
        fcntl.ioctl(fd, rawcalls.FS_IOC_GETFLAGS, buffer)
    except OSError:
        return 0
    finally:
        os.close(fd)
    return int.from_bytes(buffer[:4], "little") & _FLAG_MASK


def level_access_times(root: bytes, other: bytes) -> None:
    """Give the files below *other* the access times of their like below *root*.

    What one side has noted of reads, and the other has not, was excused by then; the next mount of
    the same directories must not bring it up again.
    """
    for where, _, names in os.walk(root):
        for name in names:
            path = os.path.join(where, name)
            like = os.path.join(other, os.path.relpath(path, root))
            try:
                mine, its = os.lstat(path), os.lstat(like)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(its.st_mode) and mine.st_atime_ns != its.st_atime_ns:
                os.utime(like, ns=(mine.st_atime_ns, its.st_mtime_ns))


def links_outside(found: Upper) -> dict[bytes, int]:
    """Files with more links than names in the upper: a temporary name stayed somewhere."""
    names: dict[bytes, int] = defaultdict(int)
    links: dict[bytes, int] = {}
    for item in found.values():
        if isinstance(item, Stored) and item.first_name:
            names[item.first_name] += 1
            links[item.first_name] = item.look.nlink
    return {path: links[path] - count for path, count in names.items() if links[path] != count}


def is_temp(name: bytes) -> bool:
    """Is it "#" and lower-case hex?"""
    return name[:1] == b"#" and not set(name[1:]) - set(b"0123456789abcdef") and len(name) > 1


def work_complaints(work: bytes) -> list[str]:
    """What must not be in a work directory after unmount: all but ``work/`` and one whiteout."""
    wrong = [f"{name!r} in the work directory" for name in os.listdir(work) if name != b"work"]
    inner = os.path.join(work, b"work")
    if not os.path.isdir(inner):
        return [*wrong, "no directory 'work' in the work directory"]
    left = []
    for name in sorted(os.listdir(inner)):
        st = os.stat(os.path.join(inner, name), follow_symlinks=False)
        is_whiteout = stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
        left.append(name)
        if not is_whiteout or not is_temp(name):
            wrong.append(f"{name!r} (mode {st.st_mode:o}) left in work/work")
    if len(left) > 1:
        wrong.append(f"{len(left)} objects left in work/work, at most one whiteout is allowed")
    return wrong

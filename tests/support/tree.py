"""Trees as values: build one from a literal, read one back as something comparable.

A literal is a mapping from names to nodes::

    build(path, {
        "file": "text",                                     # str or bytes: a regular file
        "dir": {"inner": b"data"},                          # a mapping: a directory
        "tuned": File("x", mode=0o4755, uid=7, xattrs={"user.a": b"1"}, mtime_ns=5),
        "sparse": File(size=1 << 32, pieces={4096: b"island"}),
        "again": HardLink("dir/inner"),                     # path from the root of the tree
        "gone": Whiteout(), "hidden": Dir({}, opaque=True), # marks of the overlay format
        "to": Symlink("file"), "pipe": Fifo(), "sock": Socket(), "null": Device("c", 1, 3),
    })

``snapshot(path)`` reads a directory into ``{path: Entry}``; ``differences(a, b)`` says in
sentences where two such values differ. Names may be str or bytes; snapshots have bytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Union

Name = str | bytes
Path_ = str | bytes | Path

_READ_BYTES: Final = 1 << 20
_INLINE_BYTES_MAX: Final = 64


# --- literals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Node:
    """Metadata; None means: mode as in _MODES, owner and time as the system gives them."""

    mode: int | None = field(default=None, kw_only=True)
    uid: int | None = field(default=None, kw_only=True)
    gid: int | None = field(default=None, kw_only=True)
    mtime_ns: int | None = field(default=None, kw_only=True)
    xattrs: Mapping[str, bytes] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class File(_Node):
    """A regular file: *data*, or *size* bytes of hole with *pieces* of data at offsets."""

    data: Name = b""
    size: int | None = field(default=None, kw_only=True)
    pieces: Mapping[int, bytes] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Dir(_Node):
    """A directory; *opaque* marks it so."""

    entries: Tree = field(default_factory=dict)
    opaque: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Symlink(_Node):
    """A symbolic link."""

    target: Name = b""


@dataclass(frozen=True)
class Fifo(_Node):
    """A named pipe."""


@dataclass(frozen=True)
class Socket(_Node):
    """A socket that nobody listens on."""


@dataclass(frozen=True)
class Device(_Node):
    """A device node; *kind* is ``c`` or ``b``."""

    kind: str = "c"
    major: int = 1
    minor: int = 3


@dataclass(frozen=True)
class Whiteout(_Node):
    """The deletion mark that the kernel writes."""


@dataclass(frozen=True)
class HardLink:
    """One more name of the file at *target*, a path from the root of the tree."""

    target: Name


Node = Union[  # with a string in it, which | cannot have
    str, bytes, "Tree", File, Dir, Symlink, Fifo, Socket, Device, Whiteout, HardLink
]
Tree = Mapping[Any, Node]  # names, str or bytes; a Mapping is not covariant in its keys

_MODES: Final[dict[type[_Node], int]] = {Dir: 0o755, Whiteout: 0}


def build(root: Path_, tree: Tree, *, userxattr: bool = False) -> None:
    """Make *tree* in the directory *root*, which is made if missing.

    Opaque marks are ``user.overlay.opaque`` with *userxattr*, else ``trusted.overlay.opaque``.
    Modes do not depend on the umask. Hard links are made last, times of directories after that.
    """
    builder = _Builder(os.fsencode(root), "user." if userxattr else "trusted.")
    os.makedirs(builder.root, exist_ok=True)
    builder.fill(builder.root, tree)
    builder.finish()


class _Builder:
    def __init__(self, root: bytes, prefix: str) -> None:
        self.root = root
        self.opaque_key = prefix + "overlay.opaque"
        self._links: list[tuple[bytes, bytes]] = []
        self._times: list[tuple[bytes, int]] = []

    def fill(self, directory: bytes, tree: Tree) -> None:
        for name, node in tree.items():
            path = os.path.join(directory, os.fsencode(name))
            if isinstance(node, HardLink):
                self._links.append((os.path.join(self.root, os.fsencode(node.target)), path))
            elif isinstance(node, (str, bytes)):
                self._make(path, File(node))
            elif isinstance(node, Mapping):
                self._make(path, Dir(node))
            else:
                self._make(path, node)

    def _make(self, path: bytes, node: _Node) -> None:
        _create(path, node)
        if isinstance(node, Dir):
            self.fill(path, node.entries)
            if node.opaque:
                node = replace(node, xattrs={**node.xattrs, self.opaque_key: b"y"})
        if node.uid is not None or node.gid is not None:
            uid, gid = (-1 if number is None else number for number in (node.uid, node.gid))
            os.chown(path, uid, gid, follow_symlinks=False)
        if not isinstance(node, Symlink):
            os.chmod(path, _MODES.get(type(node), 0o644) if node.mode is None else node.mode)
        for key, value in node.xattrs.items():
            os.setxattr(path, key, value, follow_symlinks=False)
        if node.mtime_ns is not None:
            self._times.append((path, node.mtime_ns))

    def finish(self) -> None:
        for target, path in self._links:
            os.link(target, path, follow_symlinks=False)
        for path, mtime_ns in self._times:
            os.utime(path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)


def _create(path: bytes, node: _Node) -> None:
    if isinstance(node, File):
        _write(path, node)
    elif isinstance(node, Dir):
        os.mkdir(path)
    elif isinstance(node, Symlink):
        os.symlink(os.fsencode(node.target), path)
    elif isinstance(node, Fifo):
        os.mkfifo(path)
    elif isinstance(node, Socket):
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif isinstance(node, Whiteout):
        os.mknod(path, stat.S_IFCHR, 0)
    elif isinstance(node, Device):
        kind = {"c": stat.S_IFCHR, "b": stat.S_IFBLK}[node.kind]
        os.mknod(path, kind | 0o600, os.makedev(node.major, node.minor))
    else:
        raise TypeError(f"{node!r} is no node of a tree")


def _write(path: bytes, node: File) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", closefd=False) as stream:
            stream.write(os.fsencode(node.data))
        for offset, piece in node.pieces.items():
            os.pwrite(fd, piece, offset)
        if node.size is not None:
            os.ftruncate(fd, node.size)
    finally:
        os.close(fd)


# --- snapshots ----------------------------------------------------------------------------------

_KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


@dataclass(frozen=True)
class Entry:
    """What a caller sees of one object, apart from inode number, atime, ctime and blocks.

    *data* is the content up to 64 bytes, ``sha256:`` and a digest beyond, ``error:`` and the name
    of the errno where reading fails. *links* are all names of the object in the tree, where it has
    more than one. *kind* is ``whiteout`` for a character device 0:0, and ``listed`` for a name that
    is in the listing and nowhere else.
    """

    kind: str
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime_ns: int
    nlink: int
    xattrs: tuple[tuple[str, bytes], ...]
    data: bytes | None = None
    target: bytes | None = None
    links: tuple[bytes, ...] = ()


Snapshot = dict[bytes, Entry]

LISTED_ONLY: Final = Entry("listed", 0, 0, 0, 0, 0, 0, 0, ())


def snapshot(root: Path_, *, on_entry: Callable[[bytes], None] | None = None) -> Snapshot:
    """Everything at and below *root*, by path from *root*; the root itself is ``b"."``.

    Raises AssertionError when a listing has a name twice or a type unlike that of stat. *on_entry*
    is called with each path, for progress. Mounts below *root* are entered like directories.
    """
    entries: Snapshot = {}
    names_of: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    for path, full, info in _walk(os.fsencode(root)):
        entries[path] = LISTED_ONLY if info is None else _entry(full, info)
        if info and info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
            names_of[info.st_dev, info.st_ino].append(path)
        if on_entry:
            on_entry(path)
    for names in names_of.values():
        if len(names) > 1:
            group = tuple(sorted(names))
            for path in names:
                entries[path] = replace(entries[path], links=group)
    return entries


# path from the root, a path that works now (through an open directory), lstat if there is one
_Found = tuple[bytes, bytes, os.stat_result | None]


def _walk(root: bytes) -> Iterator[_Found]:
    yield b".", root, os.lstat(root)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield from _walk_directory(fd, b"")
    finally:
        os.close(fd)


def _walk_directory(dir_fd: int, prefix: bytes) -> Iterator[_Found]:
    # Through descriptors, so that no path is too long and no symbolic link is followed.
    for name in _checked_names(dir_fd, prefix):
        full = b"/proc/self/fd/%d/%b" % (dir_fd, name)
        info = _lstat_or_none(full)
        yield prefix + name, full, info
        if info and stat.S_ISDIR(info.st_mode):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=dir_fd)
            try:
                yield from _walk_directory(fd, prefix + name + b"/")
            finally:
                os.close(fd)


def _lstat_or_none(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _checked_names(dir_fd: int, prefix: bytes) -> list[bytes]:
    with os.scandir(dir_fd) as listing:
        found = list(listing)
    names = sorted(os.fsencode(entry.name) for entry in found)
    assert len(names) == len(set(names)), f"{prefix!r} lists a name twice: {names}"
    for entry in found:
        info = _lstat_or_none(b"/proc/self/fd/%d/%b" % (dir_fd, os.fsencode(entry.name)))
        if info is not None:
            listed = (entry.is_dir(follow_symlinks=False), entry.is_symlink())
            seen = (stat.S_ISDIR(info.st_mode), stat.S_ISLNK(info.st_mode))
            assert listed == seen, f"{prefix!r}{entry.name!r}: d_type and st_mode differ"
    return names


def _entry(path: bytes, info: os.stat_result) -> Entry:
    kind = _KINDS[stat.S_IFMT(info.st_mode)]
    if kind == "char" and info.st_rdev == 0:
        kind = "whiteout"
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(info.st_mode),
        uid=info.st_uid,
        gid=info.st_gid,
        rdev=info.st_rdev,
        size=info.st_size,
        mtime_ns=info.st_mtime_ns,
        nlink=info.st_nlink,
        xattrs=_xattrs(path),
        data=_data(path) if kind == "file" else None,
        target=os.readlink(path) if kind == "symlink" else None,
    )


def _xattrs(path: bytes) -> tuple[tuple[str, bytes], ...]:
    try:
        keys = os.listxattr(path, follow_symlinks=False)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return ()
        raise
    return tuple((key, os.getxattr(path, key, follow_symlinks=False)) for key in sorted(keys))


def _data(path: bytes) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            fd = os.open(path, flags | os.O_NOATIME)
        except PermissionError:  # not the owner
            fd = os.open(path, flags)
        try:
            return _content(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        return b"error:" + errno.errorcode.get(exc.errno or 0, "?").encode()


def _content(fd: int) -> bytes:
    size = 0
    head = b""
    digest = hashlib.sha256()
    while piece := os.read(fd, _READ_BYTES):
        size += len(piece)
        head = head or piece
        digest.update(piece)
    if size == len(head) <= _INLINE_BYTES_MAX:
        return head
    return b"sha256:" + digest.hexdigest().encode()


# --- comparison ---------------------------------------------------------------------------------


def differences(left: Snapshot, right: Snapshot, *, ignore: Collection[str] = ()) -> list[str]:
    """One sentence per difference between two snapshots; *ignore* names fields of Entry."""
    names = [item.name for item in fields(Entry) if item.name not in ignore]
    found = []
    for path in sorted(left.keys() | right.keys()):
        one, other = left.get(path), right.get(path)
        if one is None or other is None:
            found.append(f"{path!r}: only on the {'right' if one is None else 'left'}")
            continue
        for name in names:
            a, b = getattr(one, name), getattr(other, name)
            if a != b:
                found.append(f"{path!r}: {name} is {a!r} on the left, {b!r} on the right")
    return found

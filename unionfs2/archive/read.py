"""A tar stream into a diff directory: OCI deletions become the marks of the overlay format.

Theory. A layer stands alone: it is unpacked without looking at the layers below, apart from the
attributes of directories that the stream passes through without describing them. Rules:

* Nothing is written outside the root directory (``place``), whatever the stream says.
* The last entry of a name wins. A directory over a directory keeps what is in it; anything else
  replaces what was there.
* A deletion applies to the layers below, never to what the same stream brings, in whatever order
  the two come. If both meet in one name and it is a directory, that directory becomes opaque.
* A stream cannot forge marks: attributes of the overlay are escaped, as they are for a nested one.
* Owner before attributes and mode, because chown takes capabilities and setuid bits away; times
  last. Directories get theirs at the very end, deepest first, so that neither a restrictive mode
  nor a default access control list gets in the way of what comes later.

Whoever calls this throws the directory away after an error.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from unionfs2 import ondisk, storefiles, storetrees, whiteout
from unionfs2 import syscalls as sc
from unionfs2.errors import ArchiveError, LimitError, show
from unionfs2.storemodel import Applied, IdMaps, Limits, Size
from unionfs2.whiteout import Dialect

from . import place, tar
from .attributes import Attributes
from .digest import Readable, StreamHash
from .members import Member, MemberReader, stream_bytes_max
from .source import Input, Progress

if TYPE_CHECKING:
    from .split import SplitWriter

#: Answers for a directory of the layers below, by path: a descriptor of what is visible there,
#: closed by unpack(), or None when there is no directory.
Below = Callable[[bytes], "int | None"]

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES: Final = {
    tar.CHAR_DEVICE: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.FIFO: stat.S_IFIFO,
}
_MAJOR_MAX: Final = (1 << 12) - 1
_MINOR_MAX: Final = (1 << 20) - 1


def unpack(
    stream: Readable,
    root_fd: int,
    *,
    dialect: Dialect,
    ids: IdMaps | None = None,
    limits: Limits | None = None,
    below: Below | None = None,
    names_below: Callable[[], Iterable[bytes]] | None = None,
    split: SplitWriter | None = None,
    ignore_chown_errors: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Unpack the uncompressed tar *stream* into the directory *root_fd*, to the stream's end.

    Returns the digest of the stream, what it put on the disk (everything below *root_fd*) and the
    number of entries. *progress* is told the bytes read so far. *names_below* lists the root of the
    layers below; each of these names is deleted when the stream declares the root opaque, because
    an overlay does not heed that mark on a root. *split* receives what rebuilds the stream.

    Raises ArchiveError, LimitError, or OSError with the path of the member as its file name.
    Nothing is synced. With *ignore_chown_errors*, owners and attributes that only root may set
    are left out where they are refused.
    """
    hashed = StreamHash()
    limits = limits or Limits()
    source = Input(
        stream,
        hashed,
        keep=split.keep if split is not None else None,
        progress=progress,
        bytes_max=stream_bytes_max(limits),
    )
    unpacker = None
    try:
        attributes = Attributes(dialect, ids or IdMaps(), lenient=ignore_chown_errors)
        unpacker = Unpacker(root_fd, source, dialect, attributes, limits, below, split)
        unpacker.names_below = names_below
        entries = unpacker.run()
        if split is not None:
            split.finish()
        return Applied(hashed.digest(), unpacker.size(), entries)
    finally:
        hashed.close()
        if unpacker is not None:
            unpacker.close()


@dataclass(slots=True)
class _Directory:
    """A directory of the stream; its attributes are set at the end."""

    member: Member | None = None
    implied: bool = False
    opaque: bool = False
    xwhiteouts: bool = False


class Unpacker:
    """One run of unpack()."""

    names_below: Callable[[], Iterable[bytes]] | None = None

    def __init__(
        self,
        root_fd: int,
        source: Input,
        dialect: Dialect,
        attributes: Attributes,
        limits: Limits,
        below: Below | None,
        split: SplitWriter | None,
    ) -> None:
        self._root_fd = root_fd
        self._in = source
        self._dialect = dialect
        self._attributes = attributes
        self._limits = limits
        self._below = below
        self._split = split
        self._reader = MemberReader(source, limits)
        self._dirs: dict[bytes, _Directory] = {}
        self._white: set[bytes] = set()
        # What was there before is told apart from what the stream brings only if there is any.
        self._mine: set[bytes] | None = set() if storefiles.names_in(root_fd) else None
        self._recount = self._mine is not None
        self._bytes = 0
        self._inodes = 0
        self._places = place.Places(root_fd, limits, self._white, self._implied)
        self._types = {
            tar.REGULAR: self._file,
            tar.DIRECTORY: self._directory,
            tar.SYMLINK: self._symlink,
            tar.HARD_LINK: self._hard_link,
            tar.CHAR_DEVICE: self._node,
            tar.BLOCK_DEVICE: self._node,
            tar.FIFO: self._node,
        }

    def close(self) -> None:
        """Close all descriptors."""
        self._places.close()

    def size(self) -> Size:
        """What is below the root now."""
        if self._recount:
            return storetrees.tree_size(self._root_fd)
        return Size(self._bytes, self._inodes)

    def run(self) -> int:
        """Unpack everything; returns the number of entries."""
        entries = 0
        reader = self._reader
        while (member := reader.next()) is not None:
            entries += 1
            if entries > self._limits.entries_max:
                raise LimitError(f"the archive has more than {self._limits.entries_max} entries")
            self._places.trim()
            try:
                self._place(member)
            except OSError as exc:
                raise _named(exc, member.path) from exc
        self._finish()
        return entries

    # --- one member --------------------------------------------------------------------------

    def _place(self, member: Member) -> None:
        path = member.path
        parts = place.clean(path, self._limits)
        if b".wh." in path and parts:
            if place.is_metadata(parts):
                self._in.skip(member.stored)
                return
            place.check_marks(parts, path)
            if parts[-1].startswith(ondisk.WHITEOUT_PREFIX):
                self._mark(member, parts)
                return
        if not parts:
            if member.type != tar.DIRECTORY:
                raise ArchiveError(
                    f'member "{show(path)}" would replace the root of the layer, which is a'
                    " directory"
                )
            self._dir_at(b"").member = member
            return
        name = parts.pop()
        fd, parent = self._places.directory(b"/".join(parts))
        canonical = parent + b"/" + name if parent else name
        self._types[member.type](member, fd, name, canonical)
        if self._mine is not None:
            self._mine.add(canonical)

    def _file(self, member: Member, fd: int, name: bytes, path: bytes) -> None:
        file_fd = self._made(lambda: sc.create_at(name, _CREATE, 0o600, dir_fd=fd), fd, name, path)
        try:
            if member.pieces is None:
                self._write(file_fd, 0, member.stored)
            else:
                for offset, length in member.pieces:
                    self._write(file_fd, offset, length)
                sc.ftruncate(file_fd, member.size)
            self._bytes += member.size
            self._attributes.of_file(file_fd, member)
        finally:
            os.close(file_fd)
        if self._split is not None:
            self._split.content(path, member.stored, member.pieces)

    def _write(self, fd: int, offset: int, length: int) -> None:
        for piece in self._in.content(length):
            done = sc.pwrite(fd, piece, offset)
            while done < len(piece):
                done += sc.pwrite(fd, piece[done:], offset + done)
            offset += len(piece)

    def _directory(self, member: Member, fd: int, name: bytes, path: bytes) -> None:
        entry = self._dirs.get(path)
        if entry is None:
            try:
                sc.mkdir(name, 0o700, dir_fd=fd)
                self._inodes += 1
            except FileExistsError:
                self._directory_over(fd, name, path)
            self._count_inodes(path)
            entry = self._dir_at(path)
        entry.member = member
        entry.implied = False

    def _directory_over(self, fd: int, name: bytes, path: bytes) -> None:
        """Something is there that this stream did not describe as a directory."""
        st = sc.lstat_at(name, fd)
        if stat.S_ISDIR(st.st_mode):
            return
        deleted = path in self._white or whiteout.is_device(st)
        self._remove(fd, name, path)
        sc.mkdir(name, 0o700, dir_fd=fd)
        self._dir_at(path).opaque = deleted

    def _symlink(self, member: Member, fd: int, name: bytes, path: bytes) -> None:
        target = member.link
        if not target or b"\0" in target:
            raise ArchiveError(f'symbolic link "{show(member.path)}" has no proper target')
        self._made(lambda: sc.symlink(target, name, dir_fd=fd), fd, name, path)
        self._attributes.of_object(member, fd, name)

    def _node(self, member: Member, fd: int, name: bytes, path: bytes) -> None:
        major, minor = member.major, member.minor
        kind = _NODES[member.type]
        if kind == stat.S_IFCHR and not major and not minor:
            # On an overlay this device is a deletion mark, whoever wrote it.
            self._whiteout(fd, name, path)
            return
        if not (0 <= major <= _MAJOR_MAX and 0 <= minor <= _MINOR_MAX):
            raise ArchiveError(f'device "{show(member.path)}" has impossible numbers')
        device = os.makedev(major, minor)
        try:
            self._made(lambda: sc.mknod(name, kind | 0o600, device, dir_fd=fd), fd, name, path)
        except PermissionError as exc:
            if kind == stat.S_IFIFO:
                raise
            raise ArchiveError(
                f'"{show(member.path)}" is a device, and making one is not permitted: apply the'
                " layer as root, outside of a user namespace",
                errno=errno.EPERM,
            ) from exc
        self._attributes.of_object(member, fd, name)

    def _hard_link(self, member: Member, fd: int, name: bytes, path: bytes) -> None:
        parts = place.clean(member.link, self._limits, "the target of a hard link,")
        if not parts or any(part.startswith(ondisk.WHITEOUT_PREFIX) for part in parts):
            raise self._bad_link(member)
        source = parts.pop()
        try:
            source_fd, parent = self._places.directory(b"/".join(parts), make=False)
            st = sc.lstat_at(source, source_fd)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise
            raise self._bad_link(member) from exc
        if stat.S_ISDIR(st.st_mode) or whiteout.is_device(st):
            raise self._bad_link(member)
        found = parent + b"/" + source if parent else source
        if found == path:
            return  # a file that was archived twice is a link to itself the second time
        if found.startswith(path + b"/"):
            raise self._bad_link(member)  # it would replace what it links to
        self._made(lambda: sc.link(source, source_fd, name, fd), fd, name, path)
        self._inodes -= 1

    def _bad_link(self, member: Member) -> ArchiveError:
        return ArchiveError(
            f'"{show(member.path)}" is a hard link to "{show(member.link)}", which is no file of'
            " this layer so far"
        )

    def _made(self, make: Callable[[], int | None], fd: int, name: bytes, path: bytes) -> int:
        """make(), after what stands in the way is gone; counts the inode."""
        try:
            made = make()
        except FileExistsError:
            self._remove(fd, name, path)
            made = make()
        self._inodes += 1
        self._count_inodes(path)
        return made if made is not None else -1

    def _count_inodes(self, path: bytes) -> None:
        # Directories that are only passed through count too: a short archive could name many.
        if self._inodes > self._limits.entries_max:
            raise LimitError(
                f'with "{show(path)}" the archive makes more than {self._limits.entries_max} files'
            )

    def _remove(self, fd: int, name: bytes, path: bytes) -> None:
        """Take *path* away: a later entry replaces it."""
        if self._split is not None:
            self._split.removed(path, fd, name)
        st = sc.lstat_at(name, fd)
        if stat.S_ISDIR(st.st_mode) or stat.S_ISLNK(st.st_mode):
            self._drop(path)
        self._recount = True
        self._white.discard(path)
        left = storetrees.delete_tree(fd, name)
        if left:
            raise OSError(left[0].errno, os.strerror(left[0].errno), left[0].path)

    def _drop(self, path: bytes) -> None:
        """Forget directories at and below *path*, and descriptors, which may lead there."""
        below = path + b"/"
        for known in [p for p in self._dirs if p == path or p.startswith(below)]:
            del self._dirs[known]
        self._white.difference_update([p for p in self._white if p.startswith(below)])
        self._places.forget(path)

    # --- directories and deletions -----------------------------------------------------------

    def _dir_at(self, path: bytes) -> _Directory:
        return self._dirs.setdefault(path, _Directory())

    def _implied(self, path: bytes, marked: bool) -> None:  # noqa: FBT001 - a callback
        """A directory was made because something lies below it."""
        self._dirs[path] = _Directory(implied=True, opaque=marked)
        self._white.discard(path)
        self._inodes += 1
        self._recount = self._recount or marked
        self._count_inodes(path)

    def _mark(self, member: Member, parts: list[bytes]) -> None:
        """A name that begins with .wh.: a deletion, or all of a directory's lower content."""
        if member.type not in (tar.REGULAR, tar.HARD_LINK):
            raise ArchiveError(f'deletion mark "{show(member.path)}" is not a plain file')
        self._in.skip(member.stored)
        mark = parts.pop()
        fd, parent = self._places.directory(b"/".join(parts))
        if mark == ondisk.WHITEOUT_OPAQUE:
            self._make_opaque(parent)
            return
        name = mark[len(ondisk.WHITEOUT_PREFIX) :]
        self._whiteout(fd, name, parent + b"/" + name if parent else name)

    def _make_opaque(self, path: bytes) -> None:
        self._dir_at(path).opaque = True
        if self._mine is not None:
            self._clear_old(path)

    def _whiteout(self, fd: int, name: bytes, path: bytes) -> None:
        """Hide *path* in the layers below, and what was there before this stream."""
        if path in self._white:
            return
        st = sc.lstat_or_none(name, fd)
        if st is not None:
            if self._mine is None or path in self._mine or self._holds_mine(path):
                if stat.S_ISDIR(st.st_mode):
                    self._make_opaque(path)
                return
            self._remove(fd, name, path)
        self._inodes += 1
        self._count_inodes(path)
        try:
            sc.mknod(name, stat.S_IFCHR, 0, dir_fd=fd)
        except PermissionError:
            self._make_xwhiteout(fd, name, path)
        self._white.add(path)
        if self._mine is not None:
            self._mine.add(path)

    def _make_xwhiteout(self, fd: int, name: bytes, path: bytes) -> None:
        """The other form of a deletion mark, for where devices are refused."""
        os.close(sc.create_at(name, _CREATE, 0o600, dir_fd=fd))
        try:
            sc.setxattr_at(name, fd, self._dialect.whiteout, b"")
        except OSError as exc:
            raise ArchiveError(
                f'the deletion of "{show(path)}" can be written neither as a device nor as'
                f" attribute {show(self._dialect.whiteout)}: use a file system with extended"
                " attributes, or the dialect of this user",
                errno=exc.errno,
            ) from exc
        self._dir_at(path.rpartition(b"/")[0]).xwhiteouts = True

    def _holds_mine(self, path: bytes) -> bool:
        below = path + b"/"
        return path in self._dirs or any(p.startswith(below) for p in self._mine or ())

    def _clear_old(self, path: bytes) -> None:
        """Remove what was below *path* before this stream; it did not bring it."""
        assert self._mine is not None
        fd, _ = self._places.directory(path, make=False)
        prefix = path + b"/" if path else b""
        list_fd = sc.open_at(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
        try:
            names = storefiles.names_in(list_fd)
        finally:
            os.close(list_fd)
        for name in names:
            below = prefix + name
            if not (below in self._mine or self._holds_mine(below)):
                self._remove(fd, name, below)
            elif below not in self._dirs or self._dirs[below].member is None:
                if stat.S_ISDIR(sc.lstat_at(name, fd).st_mode):
                    self._clear_old(below)
            else:
                self._clear_old(below)

    # --- the end -----------------------------------------------------------------------------

    def _finish(self) -> None:
        """Marks and attributes of directories, deepest first."""
        opaque = {path for path, entry in self._dirs.items() if entry.opaque}
        if b"" in opaque and self.names_below is not None:
            for name in self.names_below():
                if sc.lstat_or_none(name, self._places.directory(b"")[0]) is None:
                    self._whiteout(self._places.directory(b"")[0], name, name)
        elif opaque:
            self._drop_idle_whiteouts(opaque - {b""})
        for path in sorted(self._dirs, reverse=True):
            self._places.trim()
            try:
                self._finish_directory(path, self._dirs[path], opaque)
            except OSError as exc:
                raise _named(exc, path or b".") from exc

    def _drop_idle_whiteouts(self, opaque: set[bytes]) -> None:
        """In an opaque directory nothing is left to delete, and the kernel would list the mark."""
        for path in sorted(self._white):
            if _within(path, opaque):
                parent, _, name = path.rpartition(b"/")
                sc.unlink(name, dir_fd=self._places.directory(parent)[0])
                self._white.discard(path)
                self._inodes -= 1

    def _finish_directory(self, path: bytes, entry: _Directory, opaque: set[bytes]) -> None:
        parent, _, name = path.rpartition(b"/")
        fd, _ = self._places.directory(parent, make=False)
        name = name or b"."
        if entry.member is not None:
            self._attributes.of_object(entry.member, fd, name)
        elif entry.implied:
            self._inherit(path, fd, name, hidden=_within(path, opaque))
        mark = ondisk.OPAQUE_YES if entry.opaque else ondisk.OPAQUE_XWHITEOUTS
        if entry.opaque or entry.xwhiteouts:
            try:
                sc.setxattr_at(name, fd, self._dialect.opaque, mark)
            except OSError as exc:
                raise ArchiveError(
                    f'directory "{show(path)}" cannot be made opaque: attribute'
                    f" {show(self._dialect.opaque)}: {exc.strerror}",
                    errno=exc.errno,
                ) from exc

    def _inherit(self, path: bytes, fd: int, name: bytes, *, hidden: bool) -> None:
        """Attributes of a directory that the stream only passes through."""
        below_fd = self._below(path) if self._below is not None and not hidden else None
        if below_fd is None:
            member = Member(path, tar.DIRECTORY, 0o755, 0, 0, 0)
            self._attributes.of_object(member, fd, name)
            return
        try:
            self._attributes.copy(below_fd, fd, name)
        finally:
            os.close(below_fd)


def _within(path: bytes, directories: set[bytes]) -> bool:
    """Whether *path* is one of *directories* or lies below one."""
    while path:
        if path in directories:
            return True
        path = path.rpartition(b"/")[0]
    return b"" in directories


def _named(exc: OSError, path: bytes) -> OSError:
    """*exc* with the path of the member instead of the last component."""
    number = exc.errno or errno.EIO
    return OSError(number, exc.strerror or os.strerror(number), path)

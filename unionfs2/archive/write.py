"""A diff directory as a tar stream: marks of the overlay format become OCI deletions.

Everything in the directory is written, sorted by the bytes of the names in each directory, parents
first, "./" for the root at the very beginning. Attributes of the overlay are left out, escaped ones
come out as what they stand for, so a stream that is unpacked and packed again says the same.

Objects that are not complete in the directory itself, a file whose content lies in a layer below
(metacopy) or a directory that was moved (redirect), need a ``Source`` that knows the layers below.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import Final, Protocol

from unionfs2 import ondisk, storefiles, storetrees, whiteout
from unionfs2 import syscalls as sc
from unionfs2.errors import ArchiveError, show
from unionfs2.storemodel import Digest, IdMaps, Size
from unionfs2.whiteout import Dialect

from .digest import Writable
from .writer import Seen, TarWriter

_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Source(Protocol):
    """What the layers below contribute; paths are relative to the root of the layer."""

    def open_data(self, path: bytes) -> int:
        """Descriptor with the content of the metacopy file *path*."""
        ...

    def hides(self, path: bytes) -> bool:
        """Whether the moved directory *path* hides something of the layers below."""
        ...

    def below(self, path: bytes) -> Iterator[Seen]:
        """All that the moved directory *path* shows, parents first, sorted in each directory."""
        ...


def pack(
    root_fd: int,
    out: Writable,
    *,
    dialect: Dialect,
    ids: IdMaps | None = None,
    source: Source | None = None,
) -> tuple[Digest, Size]:
    """Write the diff directory *root_fd* to *out*; digest of the stream and what it holds.

    Equal directories give equal bytes. Raises ArchiveError for what a layer cannot say: a file
    named ``.wh.*``, a redirect or metacopy without *source*. Sockets are left out.
    """
    with TarWriter(out, ids) as writer:
        _Packer(writer, dialect, source).run(root_fd)
        return writer.finish()


class _Object:
    """One object of the directory, in the form that TarWriter takes."""

    __slots__ = ("_dialect", "_dir_fd", "_name", "fd", "marks", "path", "st", "view")

    def __init__(self, dialect: Dialect, path: bytes, dir_fd: int, name: bytes) -> None:
        self._dialect = dialect
        self._dir_fd = dir_fd
        self._name = name
        self.path = path
        self.st = sc.lstat_at(name, dir_fd)
        self.fd = -1
        self.marks: dict[bytes, bytes] = {}
        self.view: dict[bytes, bytes] = {}

    def read_xattrs(self) -> None:
        """Sort the attributes into marks of the overlay and what the merged view shows."""
        # Opening first costs nothing extra: the content is wanted anyway.
        mode, st = stat.S_IFMT(self.st.st_mode), self.st
        target: int | bytes
        if mode == stat.S_IFREG and st.st_size:
            target = self.fd = self._open()
            keys = os.listxattr(target)
        else:
            target = sc.entry_path(self._dir_fd, self._name)
            keys = _keys(target)
        for text in keys:
            key = os.fsencode(text)
            shown = self._dialect.to_view(key)
            if isinstance(target, int):
                value = os.getxattr(target, key)
            else:
                value = os.getxattr(target, key, follow_symlinks=False)
            if shown is None:
                self.marks[key] = value
            else:
                self.view[shown] = value

    def _open(self) -> int:
        try:
            return sc.open_at(self._name, _OPEN | os.O_NOATIME, dir_fd=self._dir_fd)
        except PermissionError:  # not the owner
            return sc.open_at(self._name, _OPEN, dir_fd=self._dir_fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def readlink(self) -> bytes:
        return os.fsencode(os.readlink(self._name, dir_fd=self._dir_fd))

    def xattrs(self) -> dict[bytes, bytes]:
        return self.view

    def open(self) -> int:
        return os.dup(self.fd)


def _keys(path: bytes) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return []
        raise


class _Packer:
    def __init__(self, writer: TarWriter, dialect: Dialect, source: Source | None) -> None:
        self._writer = writer
        self._dialect = dialect
        self._source = source

    def run(self, root_fd: int) -> None:
        """Write the tree; iterative, so that any depth will do."""
        place = storetrees.Descent(root_fd)
        try:
            self._object(b"", root_fd, b".")
            todo = [(b"", storefiles.names_in(root_fd)[::-1])]
            while todo:
                prefix, names = todo[-1]
                if not names:
                    todo.pop()
                    if todo:
                        place.leave()
                    continue
                name = names.pop()
                path = prefix + name
                if self._object(path, place.fd, name):
                    place.enter(name)
                    todo.append((path + b"/", storefiles.names_in(place.fd)[::-1]))
        finally:
            place.close()

    def _object(self, path: bytes, dir_fd: int, name: bytes) -> bool:
        """Write one object; whether it is a directory to go into."""
        item = _Object(self._dialect, path, dir_fd, name)
        st = item.st
        if whiteout.is_device(st):
            self._writer.whiteout(path)
            return False
        try:
            item.read_xattrs()
            if stat.S_ISREG(st.st_mode):
                self._file(item)
                return False
            self._writer.add(item)
            return stat.S_ISDIR(st.st_mode) and self._directory(item)
        finally:
            item.close()

    def _file(self, item: _Object) -> None:
        if not item.st.st_size and self._dialect.whiteout in item.marks:
            self._writer.whiteout(item.path)
            return
        if self._dialect.metacopy in item.marks and item.st.st_size:
            source = self._needed(item.path, "has its content in a layer below (metacopy)")
            fd = source.open_data(item.path)
            try:
                self._writer.add_object(item.path, item.st, item, data=fd)
            finally:
                os.close(fd)
            return
        self._writer.add_object(item.path, item.st, item, data=item.fd)

    def _directory(self, item: _Object) -> bool:
        """Marks of a directory; whether its entries here are its content."""
        if self._dialect.redirect in item.marks:
            source = self._needed(item.path, "was moved here from another place (redirect)")
            if source.hides(item.path):
                self._writer.opaque(item.path)
            for seen in source.below(item.path):
                self._writer.add(seen)
            return False
        if item.marks.get(self._dialect.opaque) == ondisk.OPAQUE_YES:
            self._writer.opaque(item.path)
        return True

    def _needed(self, path: bytes, what: str) -> Source:
        if self._source is None:
            raise ArchiveError(
                f'"{show(path)}" {what}, so this directory alone does not say what it is: pack it'
                " together with the layers below"
            )
        return self._source

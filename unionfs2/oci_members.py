"""Files of an image source by name: a directory, or a tar archive that is read where it lies.

What holds here:

* A name is relative and clean ("a/b"). It finds a regular file inside the source or nothing: no
  component of it is followed if it is a symbolic link, nothing is ever written or unpacked.
* An archive is indexed once, header by header, and its members are then read by offset. What
  cannot be read that way (compressed, a pipe) is copied to an anonymous file first, which
  disappears with the process.
* Members that an archive calls "../x" or "/x" are no file of the source. Of two members with one
  name the later counts, as it would after unpacking.
* No content is believed: whoever reads compares digests.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from . import syscalls as sc
from .archive import pax, tar
from .archive.compress import open_compressed
from .archive.digest import Readable
from .errors import ArchiveError, ImageError, LimitError, sentence, show

#: How much passes through memory at a time.
CHUNK: Final = 1 << 20

_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LINK_HOPS_MAX: Final = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """What an archive of images may ask for at most."""

    members_max: int = 1_000_000
    header_bytes_max: int = 1 << 20  # of one extended header
    spool_bytes_max: int = 1 << 40  # of an archive that has to be copied first


class Section:
    """Bytes *offset* to *offset* + *size* of an open file as a stream of its own."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd = fd
        self._offset = offset
        self._left = size

    def read(self, size: int = CHUNK, /) -> bytes:
        """At most *size* bytes; none at the end. ArchiveError when the file ends before."""
        want = min(size if size >= 0 else self._left, self._left)
        if not want:
            return b""
        data = os.pread(self._fd, want, self._offset)
        if not data:
            raise ArchiveError(f"the file ends {self._left} bytes too early")
        self._offset += len(data)
        self._left -= len(data)
        return data


class Member(NamedTuple):
    """A file of a source: its size and a stream of its content."""

    size: int
    stream: Readable


class Members(Protocol):
    """Files of a source by name."""

    @property
    def name(self) -> str:
        """The source, for messages."""
        ...

    def open(self, name: bytes, *, follow: bool = False) -> Member | None:
        """The file *name*, None when there is none; *follow* allows links inside the source.

        The stream is good until the next open() or close().
        """
        ...

    def close(self) -> None:
        """Give up all descriptors."""
        ...


def normal(name: bytes) -> bytes | None:
    """The name of a member, clean; None when it leads out of the source or names its root."""
    if name.startswith(b"/"):
        return None
    parts = [part for part in name.split(b"/") if part not in {b"", b"."}]
    return None if not parts or b".." in parts else b"/".join(parts)


def link_target(name: bytes, target: bytes) -> bytes | None:
    """Where the symbolic link *name* leads, None when that is outside the source."""
    if target.startswith(b"/"):
        return None
    parts = name.split(b"/")[:-1]
    for part in target.split(b"/"):
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        elif part not in {b"", b"."}:
            parts.append(part)
    return b"/".join(parts) or None


# --- a directory ----------------------------------------------------------------------------------


class DirectoryMembers:
    """Files below a directory."""

    def __init__(self, path: bytes) -> None:
        self.name = show(path)
        self._root = os.open(path, _OPEN_DIR)
        self._fd = -1

    def close(self) -> None:
        self._done()
        os.close(self._root)

    def _done(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def open(self, name: bytes, *, follow: bool = False) -> Member | None:
        self._done()
        for _ in range(_LINK_HOPS_MAX if follow else 1):
            fd = self._walk(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            if fd is None:
                return None
            try:
                st = os.fstat(fd)
                if stat.S_ISREG(st.st_mode):
                    self._fd = sc.reopen(fd, os.O_RDONLY)
                    return Member(st.st_size, Section(self._fd, 0, st.st_size))
                if not stat.S_ISLNK(st.st_mode):
                    raise ImageError(f"{self.name}: {show(name)} is not a regular file")
                target = os.readlink(b"", dir_fd=fd)
            finally:
                os.close(fd)
            inside = link_target(name, target) if follow else None
            if inside is None:
                raise _link_refused(self.name, name, target, follow=follow)
            name = inside
        raise ImageError(f"{self.name}: {show(name)} is one of too many symbolic links in a row")

    def _walk(self, name: bytes, flags: int) -> int | None:
        fd = self._root
        try:
            for part in (parts := name.split(b"/")):
                below = sc.open_at(part, flags | (os.O_DIRECTORY if part is not parts[-1] else 0),
                                   dir_fd=fd)  # fmt: skip
                if fd != self._root:
                    os.close(fd)
                fd = below
        except OSError as exc:
            if fd != self._root:
                os.close(fd)
            if exc.errno == errno.ENOENT:
                return None
            if exc.errno == errno.ENOTDIR:
                raise ImageError(
                    f"{self.name}: a directory in {show(name)} is not a directory itself"
                ) from None
            raise
        return fd


def _link_refused(source: str, name: bytes, target: bytes, *, follow: bool) -> ImageError:
    why = "which leads out of it" if follow else "where only a regular file can be trusted"
    return ImageError(f"{source}: {show(name)} is a symbolic link to {show(target)}, {why}")


# --- an archive -----------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """Where a member lies; or, for a link, what it names."""

    offset: int
    size: int
    link: bytes | None = None
    symbolic: bool = False


class TarMembers:
    """Members of an uncompressed tar archive in an open file, which close() closes."""

    def __init__(self, fd: int, name: str, limits: SourceLimits) -> None:
        self.name = name
        self._fd = fd
        self._entries = _Indexer(fd, os.fstat(fd).st_size, name, limits).run()

    def close(self) -> None:
        os.close(self._fd)

    def open(self, name: bytes, *, follow: bool = False) -> Member | None:
        for _ in range(_LINK_HOPS_MAX):
            entry = self._entries.get(name)
            if entry is None:
                return None
            if entry.link is None:
                if entry.size < 0:
                    raise ImageError(f"{self.name}: {show(name)} is not a regular file")
                return Member(entry.size, Section(self._fd, entry.offset, entry.size))
            # A hard link is the file itself; it names its target from the root of the archive.
            inside = None
            if not entry.symbolic:
                inside = normal(entry.link)
            elif follow:
                inside = link_target(name, entry.link)
            if inside is None:
                raise _link_refused(self.name, name, entry.link, follow=follow)
            name = inside
        raise ImageError(f"{self.name}: {show(name)} is one of too many links in a row")


class _Indexer:
    """Reads the headers of an archive, jumping over the content."""

    def __init__(self, fd: int, end: int, name: str, limits: SourceLimits) -> None:
        self._fd = fd
        self._end = end
        self._name = name
        self._limits = limits
        self._at = 0
        # What extended headers said about the next member: pax keys.
        self._next: dict[bytes, bytes] = {}
        self._global: dict[bytes, bytes] = {}

    def run(self) -> dict[bytes, _Entry]:
        """Clean names to entries. Raises ArchiveError, LimitError."""
        entries: dict[bytes, _Entry] = {}
        count = 0
        while True:
            at = self._at
            try:
                header = tar.parse_header(self._take(tar.BLOCK))
                if header is None:
                    return entries
                count += 1
                if count > self._limits.members_max:
                    raise LimitError(f"more than {self._limits.members_max} members")
                found = self._member(header)
            except ArchiveError as exc:
                raise type(exc)(f"{self._name}, at byte {at}: {exc}") from None
            if found is not None:
                name, entry = found
                entries[name] = entry

    def _take(self, size: int) -> bytes:
        data = os.pread(self._fd, size, self._at)
        if len(data) != size:
            raise ArchiveError("the archive is cut short")
        self._at += size
        return data

    def _member(self, header: tar.Header) -> tuple[bytes, _Entry] | None:
        kind = header.type
        if kind in {tar.PAX_LOCAL, tar.PAX_LOCAL_SOLARIS, tar.PAX_GLOBAL}:
            into = self._global if kind == tar.PAX_GLOBAL else self._next
            for key, value in pax.parse_records(self._extension(header)):
                into[key] = value
            return None
        if kind in {tar.GNU_LONG_NAME, tar.GNU_LONG_LINK}:
            key = b"path" if kind == tar.GNU_LONG_NAME else b"linkpath"
            self._next[key] = self._extension(header).partition(b"\0")[0]
            return None
        said = {**self._global, **self._next}
        self._next = {}
        return self._entry(header, said)

    def _extension(self, header: tar.Header) -> bytes:
        if not 0 <= header.size <= self._limits.header_bytes_max:
            raise LimitError(f"an extended header of {header.size} bytes")
        data = self._take(header.size)
        self._at += tar.padding(header.size)
        return data

    def _entry(self, header: tar.Header, said: dict[bytes, bytes]) -> tuple[bytes, _Entry] | None:
        if header.type == tar.GNU_SPARSE or any(key.startswith(b"GNU.sparse.") for key in said):
            raise ArchiveError("a sparse member, which no archive of images has")
        regular = header.type in {tar.REGULAR, tar.REGULAR_V7, tar.CONTIGUOUS}
        size = header.size
        if b"size" in said:
            size = pax.parse_decimal(said[b"size"], b"size")
        linked = header.type in {tar.HARD_LINK, tar.SYMLINK}
        if linked or header.type == tar.DIRECTORY:
            size = 0  # GNU tar and others ignore the field there
        offset = self._at
        if size < 0 or offset + size > self._end:
            raise ArchiveError(
                f"member {show(header.name)} claims {size} bytes, but the archive ends before"
            )
        self._at += size + tar.padding(size)
        name = normal(said.get(b"path", header.name))
        if name is None:
            return None
        if linked:
            target = said.get(b"linkpath", header.link)
            return name, _Entry(0, 0, target, symbolic=header.type == tar.SYMLINK)
        return name, _Entry(offset, size if regular else -1)


# --- opening --------------------------------------------------------------------------------------


def anonymous_file(directory: bytes) -> int:
    """A new open file in *directory* that has no name and goes with its last descriptor."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return sc.create_at(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as exc:
        if exc.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT}:
            raise
    name = b".%b.tmp" % os.urandom(8).hex().encode("ascii")
    fd = sc.create_at(os.path.join(directory, name), flags | os.O_CREAT | os.O_EXCL, 0o600)
    sc.unlink(os.path.join(directory, name))
    return fd


class FileWriter:
    """Appends to an open file. ``size`` is what was written."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take all of *data*."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += sc.pwrite(self.fd, view[done:], self.size + done)
        self.size += done
        return done


def open_members(
    source: bytes | Readable,
    *,
    spool: bytes,
    limits: SourceLimits | None = None,
    progress: Progress | None = None,
) -> Members:
    """Open a directory or archive by path, or an archive as a stream (for instance stdin).

    *spool* is a directory for what must be copied first; *progress* then gets bytes taken from
    the source and their total, 0 when unknown. Raises ImageError, ArchiveError, OSError.
    """
    limits = limits or SourceLimits()
    if not isinstance(source, bytes):
        return _spooled(source, "the archive on standard input", spool, limits, progress, 0)
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise ImageError(f"image source {sentence(exc)}", errno=exc.errno) from None
    try:
        st = os.fstat(fd)
        if stat.S_ISDIR(st.st_mode):
            return DirectoryMembers(source)
        name = show(source)
        if stat.S_ISREG(st.st_mode):
            if _is_tar(os.pread(fd, tar.BLOCK, 0)):
                members = TarMembers(fd, name, limits)
                fd = -1
                return members
            return _spooled(Section(fd, 0, st.st_size), name, spool, limits, progress, st.st_size)
        return _spooled(_Descriptor(fd), name, spool, limits, progress, 0)
    finally:
        if fd >= 0:
            os.close(fd)


class _Descriptor:
    """Reads a pipe or device."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int, /) -> bytes:
        return os.read(self._fd, size)


def _is_tar(block: bytes) -> bool:
    try:
        return len(block) == tar.BLOCK and tar.parse_header(block) is not None
    except ArchiveError:
        return False


class _Counted:
    """Tells *progress* what has been read."""

    def __init__(self, stream: Readable, progress: Progress | None, total: int) -> None:
        self._stream = stream
        self._progress = progress
        self._total = total
        self._done = 0

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._done += len(data)
        if self._progress is not None:
            self._progress(self._done, self._total)
        return data


def _spooled(
    stream: Readable,
    name: str,
    spool: bytes,
    limits: SourceLimits,
    progress: Progress | None,
    total: int,
) -> TarMembers:
    fd = anonymous_file(spool)
    try:
        out = FileWriter(fd)
        try:
            reader, _ = open_compressed(_Counted(stream, progress, total))
            while piece := reader.read(CHUNK):
                if out.size + len(piece) > limits.spool_bytes_max:
                    raise LimitError(f"it has more than {limits.spool_bytes_max} bytes")
                out.write(piece)
        except ArchiveError as exc:
            raise type(exc)(f"{name}: {exc}") from None
        return TarMembers(fd, name, limits)
    except BaseException:
        os.close(fd)
        raise

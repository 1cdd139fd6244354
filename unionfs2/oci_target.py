"""Where exported images are written: a layout directory, an archive file, or a stream.

What holds here:

* Deterministic: names, order, owners, modes and times of an archive depend on the content alone.
* Nothing half done: an archive is written beside its place and renamed; a new layout directory too.
  A layout that exists gains the blobs first, then ``index.json`` is replaced in one step, and the
  blobs are taken away again when something fails before. A stream cannot be taken back; its reader
  sees an archive without an end.
* A blob is finished in a file of its own before it gets its name, because its name is its digest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

from . import oci_model as om
from . import syscalls as sc
from .archive import pax, tar
from .archive.digest import Writable
from .errors import ImageError, sentence, show
from .oci_members import CHUNK, FileWriter, anonymous_file
from .storefiles import (
    FILE_MODE,
    make_dir,
    names_in,
    opened_dir,
    read_file,
    remove_file,
    temp_name,
    write_file_atomic,
    write_synced,
)
from .storemodel import Digest
from .storetrees import delete_tree

_DIR_MODE: Final = 0o755
_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LAYOUT: Final = om.dump_json({"imageLayoutVersion": om.LAYOUT_VERSION})


class BlobWriter:
    """A blob in the making: hashed and counted while it is written."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._out = FileWriter(fd)
        self._hash = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take all of *data*."""
        self._hash.update(data)
        return self._out.write(data)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._out.size

    @property
    def digest(self) -> Digest:
        """Digest of what was written so far."""
        return Digest("sha256:" + self._hash.hexdigest())


class Target(Protocol):
    """What an export writes to."""

    def blob(self) -> contextlib.AbstractContextManager[BlobWriter]:
        """A blob, which is added under its digest when the block ends without an error."""
        ...

    def add(self, data: bytes) -> None:
        """Add a small blob."""
        ...

    def finish(self, entries: Sequence[om.Descriptor], extra: Mapping[bytes, bytes]) -> None:
        """Write the index of *entries*, the files *extra*, and make everything visible."""
        ...

    def abandon(self) -> None:
        """Leave nothing; after finish() without effect."""
        ...


# --- a directory ----------------------------------------------------------------------------------


class DirectoryTarget:
    """An OCI layout directory, new or to be added to."""

    def __init__(self, path: bytes) -> None:
        self._path = os.path.abspath(path)
        self._added: list[bytes] = []
        self._temp: bytes | None = None
        parent, self._name = os.path.split(self._path)
        self._parent_fd = os.open(parent, _OPEN_DIR)
        self._fd = self._blobs_fd = -1
        self._old: list[object] = []
        try:
            self._enter()
        except BaseException:
            self.abandon()
            raise

    def _enter(self) -> None:
        try:
            self._fd = os.open(self._path, _OPEN_DIR)
        except FileNotFoundError:
            self._temp = b".%b" % temp_name(self._name)
            make_dir(self._parent_fd, self._temp, _DIR_MODE)
            self._fd = sc.open_at(self._temp, _OPEN_DIR, dir_fd=self._parent_fd)
        except NotADirectoryError:
            raise ImageError(
                f"{show(self._path)} is a file: an OCI layout needs a directory, or choose the"
                " format oci-archive",
                errno=errno.ENOTDIR,
            ) from None
        else:
            self._adopt()
        # Component by component: a link in a layout must not lead us elsewhere.
        with _made_dir(self._fd, om.BLOBS) as blobs, _made_dir(blobs, b"sha256") as fd:
            self._blobs_fd = os.dup(fd)

    def _adopt(self) -> None:
        """Look at a directory that exists: empty, or a layout."""
        there = names_in(self._fd)
        if not there:
            return
        shown = show(self._path)
        if om.LAYOUT_FILE not in there or om.INDEX_FILE not in there:
            raise ImageError(
                f"{shown} has files but is no OCI layout: choose an empty or new directory",
                errno=errno.ENOTEMPTY,
            )
        om.parse_layout(
            read_file(self._fd, om.LAYOUT_FILE, om.DOCUMENT_BYTES_MAX), f"{shown}: oci-layout"
        )
        index = read_file(self._fd, om.INDEX_FILE, om.DOCUMENT_BYTES_MAX)
        om.parse_index(index, f"{shown}: index.json")
        self._old = list(om.parse_object(index, f"{shown}: index.json").raw["manifests"])

    @contextlib.contextmanager
    def blob(self) -> Iterator[BlobWriter]:
        temp = temp_name(b".blob")
        fd = sc.create_at(temp, _CREATE, FILE_MODE, dir_fd=self._blobs_fd)
        try:
            writer = BlobWriter(fd)
            yield writer
            sc.fsync(fd)
            name = om.hex_of(writer.digest).encode("ascii")
            if sc.lstat_or_none(name, self._blobs_fd) is None:
                self._added.append(name)
            # One that is there is replaced all the same: it may be damaged.
            sc.rename(temp, self._blobs_fd, name, self._blobs_fd)
        except BaseException:
            remove_file(self._blobs_fd, temp)
            raise
        finally:
            os.close(fd)

    def add(self, data: bytes) -> None:
        with self.blob() as writer:
            writer.write(data)

    def finish(self, entries: Sequence[om.Descriptor], extra: Mapping[bytes, bytes]) -> None:
        assert not extra, "a layout has no other files"
        index = _index(self._kept(entries), entries)
        sc.fsync(self._blobs_fd)
        # From here on the index may name the blobs, also when writing it seems to fail.
        self._added = []
        if self._temp is None:
            if om.LAYOUT_FILE not in names_in(self._fd):
                write_file_atomic(self._fd, om.LAYOUT_FILE, _LAYOUT)
            write_file_atomic(self._fd, om.INDEX_FILE, index)
        else:
            write_synced(self._fd, om.LAYOUT_FILE, _LAYOUT)
            write_synced(self._fd, om.INDEX_FILE, index)
            sc.fsync(self._fd)
            _rename_new(self._temp, self._name, self._parent_fd, self._path)
            self._temp = None
            sc.fsync(self._parent_fd)
        self._close()

    def _kept(self, entries: Sequence[om.Descriptor]) -> list[object]:
        """What the index says already, without what *entries* say anew."""
        names = {name for item in entries for name in item.names}
        digests = {item.digest for item in entries if not item.names}
        kept: list[object] = []
        for number, raw in enumerate(self._old):
            assert isinstance(raw, dict)
            item = om.descriptor(om.Fields(raw, f"index.json, entry {number}"))
            if not set(item.names) & names and (item.names or item.digest not in digests):
                kept.append(raw)
        return kept

    def abandon(self) -> None:
        for name in self._added:
            remove_file(self._blobs_fd, name)
        self._added = []
        if self._temp is not None:
            with contextlib.suppress(OSError):
                delete_tree(self._parent_fd, self._temp)
            self._temp = None
        self._close()

    def _close(self) -> None:
        for fd in (self._fd, self._blobs_fd, self._parent_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._blobs_fd = self._parent_fd = -1


@contextlib.contextmanager
def _made_dir(dir_fd: int, name: bytes) -> Iterator[int]:
    try:
        make_dir(dir_fd, name, _DIR_MODE)
    except FileExistsError:
        pass
    with opened_dir(dir_fd, name) as fd:
        yield fd


def _rename_new(temp: bytes, name: bytes, dir_fd: int, path: bytes) -> None:
    try:
        sc.rename(temp, dir_fd, name, dir_fd, sc.RENAME_NOREPLACE)
    except FileExistsError:
        raise ImageError(
            f"{show(path)} has appeared meanwhile: choose another place", errno=errno.EEXIST
        ) from None
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
        sc.rename(temp, dir_fd, name, dir_fd)  # rename(2) of a directory replaces empty ones only


def _index(kept: Sequence[object], entries: Sequence[om.Descriptor]) -> bytes:
    return om.dump_json(
        {
            "schemaVersion": 2,
            "mediaType": om.OCI_INDEX,
            "manifests": [*kept, *(om.pointer(item) for item in entries)],
        }
    )


# --- an archive -----------------------------------------------------------------------------------


class ArchiveTarget:
    """A tar archive with the files of an OCI layout, and whatever else finish() is given.

    *spool* is a directory for blobs in the making.
    """

    def __init__(self, out: Writable, spool: bytes) -> None:
        self._out = out
        self._spool = spool
        self._there: set[Digest] = set()

    def _header(self, name: bytes, kind: bytes, mode: int, size: int) -> None:
        header = tar.NewHeader(name=name, type=kind, mode=mode, size=size)
        if not tar.fits_size(size):
            records = pax.build_records([(b"size", b"%d" % size)])
            extended = tar.NewHeader(name=b"PaxHeaders/" + name[-64:], type=tar.PAX_LOCAL,
                                     mode=FILE_MODE, size=len(records))  # fmt: skip
            self._out.write(tar.build_header(extended))
            self._out.write(records + bytes(tar.padding(len(records))))
        self._out.write(tar.build_header(header))

    def _file(self, name: bytes, data: bytes) -> None:
        self._header(name, tar.REGULAR, FILE_MODE, len(data))
        self._out.write(data + bytes(tar.padding(len(data))))

    def _begin_blob(self, digest: Digest) -> bool:
        if not self._there:
            for name in (b"blobs/", b"blobs/sha256/"):
                self._header(name, tar.DIRECTORY, _DIR_MODE, 0)
        if digest in self._there:
            return False
        self._there.add(digest)
        return True

    @contextlib.contextmanager
    def blob(self) -> Iterator[BlobWriter]:
        fd = anonymous_file(self._spool)
        try:
            writer = BlobWriter(fd)
            yield writer
            if self._begin_blob(writer.digest):
                self._header(om.blob_path(writer.digest), tar.REGULAR, FILE_MODE, writer.size)
                self._copy(fd, writer.size)
        finally:
            os.close(fd)

    def _copy(self, fd: int, size: int) -> None:
        done = 0
        while done < size:
            data = os.pread(fd, min(CHUNK, size - done), done)
            if not data:
                raise OSError(errno.EIO, "a temporary file has become shorter")
            self._out.write(data)
            done += len(data)
        self._out.write(bytes(tar.padding(size)))

    def add(self, data: bytes) -> None:
        digest = om.digest_of(data)
        if self._begin_blob(digest):
            self._file(om.blob_path(digest), data)

    def finish(self, entries: Sequence[om.Descriptor], extra: Mapping[bytes, bytes]) -> None:
        files = {om.INDEX_FILE: _index((), entries), om.LAYOUT_FILE: _LAYOUT, **extra}
        for name in sorted(files):
            self._file(name, files[name])
        self._out.write(bytes(2 * tar.BLOCK))

    def abandon(self) -> None:
        """Nothing can be taken back from a stream."""


class FileTarget(ArchiveTarget):
    """An archive in a file, which appears, or replaces another, when it is complete."""

    def __init__(self, path: bytes, spool: bytes) -> None:
        self._path = os.path.abspath(path)
        parent, self._name = os.path.split(self._path)
        if os.path.isdir(self._path):
            raise ImageError(
                f"{show(self._path)} is a directory: an archive needs a file name, or choose the"
                " format oci",
                errno=errno.EISDIR,
            )
        self._dir_fd = os.open(parent, _OPEN_DIR)
        self._temp = b".%b" % temp_name(self._name)
        try:
            # As open(2) does for everybody else: the umask decides.
            self._fd = sc.create_at(self._temp, _CREATE, 0o666, dir_fd=self._dir_fd)
        except BaseException:
            os.close(self._dir_fd)
            raise
        super().__init__(FileWriter(self._fd), spool)

    def finish(self, entries: Sequence[om.Descriptor], extra: Mapping[bytes, bytes]) -> None:
        super().finish(entries, extra)
        sc.fsync(self._fd)
        sc.rename(self._temp, self._dir_fd, self._name, self._dir_fd)
        sc.fsync(self._dir_fd)
        self._close()

    def abandon(self) -> None:
        if self._fd >= 0:
            remove_file(self._dir_fd, self._temp)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            os.close(self._dir_fd)
            self._fd = self._dir_fd = -1


class _PipeWriter:
    """Writes to a pipe or device by path, which is neither replaced nor renamed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done:])
        return done


class PipeTarget(ArchiveTarget):
    """An archive into a named pipe or device."""

    def __init__(self, path: bytes, spool: bytes) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        super().__init__(_PipeWriter(self._fd), spool)

    def finish(self, entries: Sequence[om.Descriptor], extra: Mapping[bytes, bytes]) -> None:
        super().finish(entries, extra)
        self.abandon()

    def abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_target(target: bytes | Writable, *, directory: bool, spool: bytes) -> Target:
    """A target for *target*: a path, or for archives also a stream. Raises ImageError, OSError."""
    if not isinstance(target, bytes):
        if directory:
            raise ImageError("an OCI layout directory cannot be written to a stream: choose the"
                             " format oci-archive or docker-archive")  # fmt: skip
        return ArchiveTarget(target, spool)
    try:
        if directory:
            return DirectoryTarget(target)
        if _is_pipe(target):
            return PipeTarget(target, spool)
        return FileTarget(target, spool)
    except OSError as exc:
        raise ImageError(f"cannot write an image to {sentence(exc)}", errno=exc.errno) from None


def _is_pipe(path: bytes) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)

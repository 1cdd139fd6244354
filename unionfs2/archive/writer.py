"""Objects to a tar stream, the same bytes for the same objects every time.

The form is fixed: ustar headers; a PAX header before a member only where something does not fit,
with its records sorted; numeric owners without names; no access times, no process ids, no padding
beyond the two closing blocks. Sparse files are written in GNU's form 1.0, and what counts as a hole
is found in the content, because two copies of a file rarely have the same holes. Deletions have
neither owner nor time.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final, Protocol

from unionfs2 import ondisk
from unionfs2.closing import Closing
from unionfs2.errors import ArchiveError, show
from unionfs2.storemodel import Digest, IdMaps, Size

from . import acltext, pax, sparse, tar
from .digest import Writable
from .sink import ShortFile, Sink
from .tar import BLOCK, NewHeader

_SCAN_BYTES: Final = 1 << 20
_BILLION: Final = 1_000_000_000
_KINDS: Final = {
    stat.S_IFREG: tar.REGULAR,
    stat.S_IFDIR: tar.DIRECTORY,
    stat.S_IFLNK: tar.SYMLINK,
    stat.S_IFCHR: tar.CHAR_DEVICE,
    stat.S_IFBLK: tar.BLOCK_DEVICE,
    stat.S_IFIFO: tar.FIFO,
}
_MARK_MODE: Final = 0o600
#: Attributes that belong to the machine and not to the files: labels of its security policy.
LOCAL_XATTRS: Final = frozenset({b"security.selinux"})


class Seen(Protocol):
    """One object to be written; *path* is relative to the root of the layer, b"" is the root."""

    @property
    def path(self) -> bytes: ...
    @property
    def st(self) -> os.stat_result: ...
    def readlink(self) -> bytes:
        """Target of a symbolic link."""
        ...

    def xattrs(self) -> dict[bytes, bytes]:
        """Attributes as the merged view shows them."""
        ...

    def open(self) -> int:
        """Descriptor for the content of a regular file, at its beginning; the caller closes it."""
        ...


class TarWriter(Closing):
    """Writes members to *out*. finish() ends the archive; leaving the block closes everything.

    Names are checked: a file whose name begins with ``.wh.`` would come back as a deletion.
    """

    def __init__(self, out: Writable, ids: IdMaps | None = None) -> None:
        self._sink = Sink(out)
        self._write = self._sink.write
        self._ids = ids or IdMaps()
        self._links: dict[tuple[int, int], bytes] = {}
        self._bytes = 0
        self._inodes = 0

    @property
    def offset(self) -> int:
        """Bytes of the stream so far."""
        return self._sink.offset

    def close(self) -> None:
        """End the helper thread; what was not flushed is lost."""
        self._sink.close()

    def finish(self) -> tuple[Digest, Size]:
        """End the archive; digest of the stream, and what it holds (as tree_size() counts)."""
        self._write(bytes(2 * BLOCK))
        return self._sink.finish(), Size(self._bytes, self._inodes)

    # --- members -----------------------------------------------------------------------------

    def add(self, seen: Seen) -> bool:
        """Write one object; False for a socket, which no archive can hold.

        A second name of a file becomes a hard link to the first. Raises ArchiveError for a name
        that cannot be written or a file that changes meanwhile.
        """
        return self.add_object(seen.path, seen.st, seen)

    def add_object(
        self, path: bytes, st: os.stat_result, seen: Seen, *, data: int | None = None
    ) -> bool:
        """add() with the content from the descriptor *data*, which stays open."""
        kind = _KINDS.get(stat.S_IFMT(st.st_mode))
        if kind is None:
            return False
        self._check_name(path)
        if st.st_nlink > 1 and kind != tar.DIRECTORY:
            first = self._links.setdefault((st.st_dev, st.st_ino), path)
            if first != path:
                self._write(self._head(path, tar.HARD_LINK, st, link=first))
                return True
        xattrs = seen.xattrs()
        self._inodes += bool(path)
        if kind == tar.REGULAR:
            self._file(path, st, xattrs, seen, data)
        else:
            link = seen.readlink() if kind == tar.SYMLINK else b""
            self._write(self._head(path, kind, st, link=link, xattrs=xattrs))
        return True

    def whiteout(self, path: bytes) -> None:
        """The name *path* of the layers below is deleted."""
        parent, slash, name = path.rpartition(b"/")
        self._check_name(path)
        self._mark(parent + slash + ondisk.WHITEOUT_PREFIX + name)

    def opaque(self, path: bytes) -> None:
        """All that the layers below have in the directory *path* is deleted."""
        self._mark(path + b"/" + ondisk.WHITEOUT_OPAQUE if path else ondisk.WHITEOUT_OPAQUE)

    def _mark(self, path: bytes) -> None:
        records = _path_records(b"path", path)
        self._write(_with_records(NewHeader(path, tar.REGULAR, _MARK_MODE), records))
        self._inodes += not path.endswith(ondisk.WHITEOUT_OPAQUE)

    def _check_name(self, path: bytes) -> None:
        if b".wh." in path and path.rpartition(b"/")[2].startswith(ondisk.WHITEOUT_PREFIX):
            raise ArchiveError(
                f'"{show(path)}" begins with .wh., which means a deletion in a layer: rename the'
                " file"
            )

    def _file(
        self,
        path: bytes,
        st: os.stat_result,
        xattrs: dict[bytes, bytes],
        seen: Seen,
        data: int | None,
    ) -> None:
        size = st.st_size
        self._bytes += size
        if not size:
            self._write(self._head(path, tar.REGULAR, st, xattrs=xattrs))
            return
        fd = seen.open() if data is None else data
        try:
            pieces = find_pieces(fd, size) if st.st_blocks * 512 < size else None
            if pieces is None:
                self._write(self._head(path, tar.REGULAR, st, size=size, xattrs=xattrs))
                self._copy(fd, 0, size, path)
                self._write(bytes(tar.padding(size)))
            else:
                self._sparse(path, st, xattrs, fd, pieces)
        finally:
            if data is None:
                os.close(fd)

    def _sparse(
        self,
        path: bytes,
        st: os.stat_result,
        xattrs: dict[bytes, bytes],
        fd: int,
        pieces: list[sparse.Piece],
    ) -> None:
        parent, slash, name = path.rpartition(b"/")
        size = st.st_size
        # A hole at the end is closed by an empty piece, as GNU tar wants it.
        ends = bool(pieces) and sum(pieces[-1]) == size
        text = sparse.build_map(pieces if ends else [*pieces, (size, 0)])
        stored = len(text) + sum(length for _, length in pieces)
        extra = [
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", path),
            (b"GNU.sparse.realsize", b"%d" % size),
        ]
        hidden = parent + slash + b"GNUSparseFile.0/" + name
        self._write(
            self._head(hidden, tar.REGULAR, st, size=stored, xattrs=xattrs, extra=extra) + text
        )
        for offset, length in pieces:
            self._copy(fd, offset, length, path)
        self._write(bytes(tar.padding(stored)))

    # --- headers -----------------------------------------------------------------------------

    def _head(
        self,
        path: bytes,
        kind: bytes,
        st: os.stat_result,
        *,
        size: int = 0,
        link: bytes = b"",
        xattrs: dict[bytes, bytes] | None = None,
        extra: list[pax.Record] | None = None,
    ) -> bytes:
        """Header of one member, with a PAX header before it where one is needed."""
        name = (path + b"/" if path else b"./") if kind == tar.DIRECTORY else path
        uid, gid = st.st_uid, st.st_gid
        if self._ids:
            uid, gid = self._ids.to_container(uid, gid)
        seconds, ns = divmod(st.st_mtime_ns, _BILLION)
        records = _path_records(b"path", name)
        if extra:
            records = extra  # a sparse file: its name is said there, the header's is nothing
            if not _is_utf8(path):
                records = [(b"hdrcharset", b"BINARY"), *records]
        if link:
            records += _path_records(b"linkpath", link)
        if ns or not tar.fits_size(seconds):
            records.append((b"mtime", pax.build_time(st.st_mtime_ns)))
        if not tar.fits_id(uid):
            records.append((b"uid", b"%d" % uid))
        if not tar.fits_id(gid):
            records.append((b"gid", b"%d" % gid))
        if not tar.fits_size(size):
            records.append((b"size", b"%d" % size))
        if xattrs:
            self._xattr_records(records, xattrs)
        major, minor = 0, 0
        if kind in (tar.CHAR_DEVICE, tar.BLOCK_DEVICE):
            major, minor = os.major(st.st_rdev), os.minor(st.st_rdev)
        header = NewHeader(
            name, kind, st.st_mode & 0o7777, uid, gid, size, seconds, link, major, minor
        )
        return _with_records(header, records)

    def _xattr_records(self, records: list[pax.Record], xattrs: dict[bytes, bytes]) -> None:
        for key, value in xattrs.items():
            if key in LOCAL_XATTRS:
                continue
            stored = value
            if key in _ACL_KEYS:
                if self._ids:
                    stored = acltext.mapped(
                        value, self._ids.uid_to_container, self._ids.gid_to_container
                    )
                # Engines read the attribute, tar programs the text.
                records.append((_ACL_KEYS[key], acltext.build(stored)))
            records.append((pax.xattr_key(key), stored))

    def _copy(self, fd: int, offset: int, length: int, path: bytes) -> None:
        try:
            self._sink.copy(fd, offset, length)
        except ShortFile:
            raise ArchiveError(f'"{show(path)}" became shorter while it was read') from None


_ACL_KEYS: Final = {
    ondisk.ACL_ACCESS: pax.ACL_ACCESS,
    ondisk.ACL_DEFAULT: pax.ACL_DEFAULT,
}


def _path_records(key: bytes, value: bytes) -> list[pax.Record]:
    """Nothing for a name that a plain header holds, else the record that says it."""
    fits = len(value) <= 100 or (key == b"path" and tar.split_name(value) is not None)
    if fits and value.isascii():
        return []
    records = [(key, value)]
    if not _is_utf8(value):
        records.insert(0, (b"hdrcharset", b"BINARY"))
    return records


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _with_records(header: NewHeader, records: list[pax.Record]) -> bytes:
    if not records:
        return tar.build_header(header)
    # hdrcharset governs what follows it; the rest is sorted so that nothing depends on chance.
    unique = sorted(set(records), key=lambda item: (item[0] != b"hdrcharset", item))
    data = pax.build_records(unique)
    name = header.name.rstrip(b"/").rpartition(b"/")[2][:80]
    extended = NewHeader(b"PaxHeaders.0/" + name, tar.PAX_LOCAL, 0o644, size=len(data))
    if tar.split_name(header.name) is None:
        header = header._replace(name=header.name[-100:].lstrip(b"/"))
    return b"".join(
        (
            tar.build_header(extended),
            data,
            bytes(tar.padding(len(data))),
            tar.build_header(header),
        )
    )


# --- holes ----------------------------------------------------------------------------------------


def find_pieces(fd: int, size: int) -> list[sparse.Piece] | None:
    """Where a file has other bytes than zeros, by whole grains; None if there is no hole."""
    pieces: list[sparse.Piece] = []
    at = 0
    while at < size:
        start, stop = _extent(fd, at, size)
        for block in range(start, stop, _SCAN_BYTES):
            _scan(fd, block, min(stop, block + _SCAN_BYTES), pieces)
        at = max(stop, at + 1)
    if pieces == [(0, size)]:
        return None
    return sparse.coarsen(pieces, size)


def _extent(fd: int, at: int, size: int) -> tuple[int, int]:
    """The next stretch from *at* that may hold data, widened to whole grains."""
    try:
        start = os.lseek(fd, at, os.SEEK_DATA)
        stop = os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return size, size
        if exc.errno != errno.EINVAL:
            raise
        return at, size
    start -= start % sparse.GRAIN
    stop += -stop % sparse.GRAIN
    return max(at, start), min(size, max(stop, at + 1))


_ZEROS: Final = bytes(sparse.GRAIN)


def _scan(fd: int, start: int, stop: int, pieces: list[sparse.Piece]) -> None:
    data = os.pread(fd, stop - start, start)
    if data.count(0) == len(data):
        return
    for at in range(0, len(data), sparse.GRAIN):
        grain = data[at : at + sparse.GRAIN]
        if grain == _ZEROS or not grain.strip(b"\0"):
            continue
        offset = start + at
        if pieces and sum(pieces[-1]) == offset:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + len(grain))
        else:
            pieces.append((offset, len(grain)))

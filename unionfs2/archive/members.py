"""Members of a tar stream: headers, what extends them, and the data in between.

``MemberReader`` puts headers, PAX records, GNU long names and sparse maps together and checks what
can be checked before anything is written. Nothing here touches a file system.

The end of an archive is two blocks of zeros; one at the very end of the stream is accepted, as GNU
tar does. Only zeros may follow. A stream that just ends was cut short: whoever wrote it meant more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from unionfs2 import ondisk
from unionfs2.errors import ArchiveError, LimitError, show
from unionfs2.storemodel import Limits

from . import acltext, pax, sparse, tar
from .source import Input
from .tar import BLOCK, Header

# Headers and padding may take this much more than the declared bytes of content.
_OVERHEAD_BYTES: Final = 64 << 20


@dataclass(slots=True)
class Member:
    """One entry of an archive. *size* is that of the file, *stored* what the stream holds of it."""

    path: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    stored: int = 0
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[sparse.Piece] | None = None
    offset: int = 0

    @property
    def has_data(self) -> bool:
        """Whether it is a regular file; only these have content."""
        return self.type == tar.REGULAR


_FILES: Final = frozenset({tar.REGULAR, tar.REGULAR_V7, tar.CONTIGUOUS, tar.GNU_SPARSE})
_EMPTY: Final = frozenset(
    {
        tar.HARD_LINK,
        tar.SYMLINK,
        tar.CHAR_DEVICE,
        tar.BLOCK_DEVICE,
        tar.DIRECTORY,
        tar.FIFO,
    }
)
_PAX_LOCAL: Final = frozenset({tar.PAX_LOCAL, tar.PAX_LOCAL_SOLARIS})
_EXTENSIONS: Final = _PAX_LOCAL | {tar.PAX_GLOBAL, tar.GNU_LONG_NAME, tar.GNU_LONG_LINK}


class _Extended:
    """What the headers before a member's own said of it."""

    __slots__ = ("libarchive", "name", "offsets", "values", "xattrs")

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.xattrs: dict[bytes, bytes] = {}
        self.libarchive: dict[bytes, bytes] = {}
        self.offsets: list[bytes] = []  # of a sparse map in format 0.0
        self.name = b""

    def copy(self) -> _Extended:
        new = _Extended()
        new.values = self.values.copy()
        new.xattrs = self.xattrs.copy()
        new.libarchive = self.libarchive.copy()
        return new

    def add(self, data: bytes, *, is_global: bool) -> None:
        for key, value in pax.parse_records(data):
            if key.startswith(pax.XATTR_SCHILY):
                self.xattrs[pax.xattr_name(key)] = value
            elif key.startswith(pax.XATTR_LIBARCHIVE):
                name, decoded = pax.libarchive_xattr(key, value)
                self.libarchive[name] = decoded
            elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes") and not is_global:
                self.offsets.append(value)
            elif value:
                self.values[key] = value
            else:
                self.values.pop(key, None)

    def all_xattrs(self) -> dict[bytes, bytes]:
        found = {**self.libarchive, **self.xattrs}
        for key, name in (
            (pax.ACL_ACCESS, ondisk.ACL_ACCESS),
            (pax.ACL_DEFAULT, ondisk.ACL_DEFAULT),
        ):
            if key in self.values and name not in found:
                found[name] = acltext.parse(self.values[key])
        for name in found:
            if not name or b"\0" in name:
                raise ArchiveError(f'an extended attribute has the impossible name "{show(name)}"')
        return found


class MemberReader:
    """Members of *source*, one after the other; their content is read from *source* in between."""

    def __init__(self, source: Input, limits: Limits) -> None:
        self._in = source
        self._limits = limits
        self._global = _Extended()
        self._global_bytes = 0
        self._headers = 0
        self._bytes = 0
        self._pad = 0

    def next(self) -> Member | None:
        """The next member, None after the last. All of the previous content must be read."""
        if self._pad:
            self._in.skip(self._pad)
            self._pad = 0
        at = self._in.offset
        try:
            return self._next()
        except ArchiveError as exc:
            text = str(exc)
            if text.startswith(("tar stream", "the stream")):
                raise
            raise type(exc)(f"tar stream, byte {at}: {text}", errno=exc.errno) from exc

    def _next(self) -> Member | None:
        extended: _Extended | None = None
        long_name = long_link = b""
        while True:
            at = self._in.offset
            block = self._in.block()
            header = self._parse(block, begun=extended is not None or bool(long_name or long_link))
            if header is None:
                return None
            self._count_header()
            kind = header.type
            if kind not in _EXTENSIONS:
                if kind == tar.GNU_VOLUME:
                    continue
                break
            data = self._extension(header)
            if kind == tar.PAX_GLOBAL:
                self._global_bytes += len(data)
                self._check_header_bytes(self._global_bytes)
                self._global.add(data, is_global=True)
            elif kind == tar.GNU_LONG_NAME:
                long_name = data.partition(b"\0")[0]
            elif kind == tar.GNU_LONG_LINK:
                long_link = data.partition(b"\0")[0]
            else:
                extended = extended or self._global.copy()
                extended.add(data, is_global=False)
        if extended is None and (self._global.values or self._global.xattrs):
            extended = self._global.copy()
        return self._build(header, block, extended, long_name, long_link, at)

    def _parse(self, block: bytes, *, begun: bool) -> Header | None:
        header = tar.parse_header(block) if block else None
        if header is not None:
            return header
        if not block or begun:
            raise ArchiveError(
                "the stream ends without the blocks of zeros that end an archive, so it was cut"
                " short"
            )
        # The second block of zeros; at the very end of the stream it may be missing.
        second = self._in.block()
        if second and second != tar.ZERO_BLOCK:
            raise ArchiveError("a block of zeros stands in the middle of the archive")
        self._in.finish()
        return None

    def _count_header(self) -> None:
        self._headers += 1
        if self._headers > 4 * self._limits.entries_max + 16:
            raise LimitError(f"more headers than {self._limits.entries_max} entries can have")

    def _check_header_bytes(self, size: int) -> None:
        if size > self._limits.header_bytes_max:
            raise LimitError(
                f"an extended header has {size} bytes, allowed are {self._limits.header_bytes_max}"
            )

    def _extension(self, header: Header) -> bytes:
        if header.size < 0:
            raise ArchiveError(f"the size of an extended header is {header.size}")
        self._check_header_bytes(header.size)
        data = self._in.take(header.size)
        self._in.take(tar.padding(header.size))
        return data

    # --- from headers to a member ------------------------------------------------------------

    def _build(
        self,
        header: Header,
        block: bytes,
        extended: _Extended | None,
        long_name: bytes,
        long_link: bytes,
        at: int,
    ) -> Member:
        path = long_name or header.name
        kind = header.type
        if kind == tar.REGULAR_V7 and path.endswith(b"/"):
            kind = tar.DIRECTORY
        member = Member(
            path=path,
            type=tar.REGULAR if kind in _FILES else kind,
            mode=header.mode & 0o7777,
            uid=header.uid,
            gid=header.gid,
            mtime_ns=header.mtime * 1_000_000_000,
            size=header.size,
            link=long_link or header.link,
            major=header.major,
            minor=header.minor,
            offset=at,
        )
        if extended is not None:
            _apply(member, extended)
        if kind in _FILES:
            self._sparse(member, header, block, extended)
        elif kind in _EMPTY:
            member.size = 0
        elif kind == tar.GNU_DUMP_DIR:
            member.type = tar.DIRECTORY
            self._in.skip(member.size + tar.padding(member.size))
            member.size = 0
        else:
            raise ArchiveError(
                f'"{show(member.path)}" is of type "{show(kind)}", which is no kind of file'
            )
        self._check(member)
        return member

    def _check(self, member: Member) -> None:
        if not (0 <= member.uid <= tar.ID_MAX and 0 <= member.gid <= tar.ID_MAX):
            raise ArchiveError(
                f'"{show(member.path)}" belongs to {member.uid}:{member.gid}, which are no ids'
            )
        if abs(member.mtime_ns) > tar.SECONDS_MAX * 1_000_000_000:
            raise ArchiveError(f'"{show(member.path)}" has an impossible time')
        if member.size < 0 or member.stored < 0:
            raise ArchiveError(f'"{show(member.path)}" has the size {member.size}')
        self._bytes += max(member.size, member.stored)
        if self._bytes > self._limits.bytes_max:
            raise LimitError(
                f'with "{show(member.path)}" the files of the archive take {self._bytes} bytes,'
                f" allowed are {self._limits.bytes_max}"
            )

    def _sparse(
        self, member: Member, header: Header, block: bytes, extended: _Extended | None
    ) -> None:
        if member.size < 0:
            raise ArchiveError(f'"{show(member.path)}" has the size {member.size}')
        stored = member.size
        self._pad = tar.padding(stored)
        pieces: list[sparse.Piece] | None = None
        if header.type == tar.GNU_SPARSE:
            if not header.gnu:
                raise ArchiveError("a sparse file is in a form that only old versions of star know")
            pieces = self._old_map(block)
            member.size = sparse.old_real_size(block)
        elif extended is not None:
            pieces, taken = self._pax_map(member, extended)
            stored -= taken
        if pieces is not None:
            member.pieces = sparse.check(pieces, member.size, stored)
        member.stored = stored

    def _old_map(self, block: bytes) -> list[sparse.Piece]:
        pieces, more = sparse.old_entries(block, is_header=True)
        taken = 0
        while more:
            taken += BLOCK
            self._check_header_bytes(taken)
            extension, more = sparse.old_entries(self._in.take(BLOCK), is_header=False)
            pieces += extension
        return pieces

    def _pax_map(
        self, member: Member, extended: _Extended
    ) -> tuple[list[sparse.Piece] | None, int]:
        """Map of a file in a PAX form of GNU tar, and how many bytes of its data it took."""
        values = extended.values
        size = values.get(b"GNU.sparse.realsize", values.get(b"GNU.sparse.size"))
        if size is None:
            return None, 0
        stored = member.size
        member.path = values.get(b"GNU.sparse.name", member.path)
        member.size = pax.parse_decimal(size, b"GNU.sparse.size")
        if values.get(b"GNU.sparse.major") == b"1":
            if values.get(b"GNU.sparse.minor") != b"0":
                raise ArchiveError("a sparse file is in a form newer than 1.0")
            return self._map_before_data(stored)
        if b"GNU.sparse.map" in values:
            return sparse.parse_list(values[b"GNU.sparse.map"]), 0
        return sparse.pairs(extended.offsets), 0

    def _map_before_data(self, stored: int) -> tuple[list[sparse.Piece], int]:
        text = sparse.MapText()
        taken = 0
        while True:
            taken += BLOCK
            if taken > stored:
                raise ArchiveError("the map of a sparse file does not end within its data")
            self._check_header_bytes(taken)
            pieces = text.feed(self._in.take(BLOCK))
            if pieces is not None:
                return pieces, taken


def _apply(member: Member, extended: _Extended) -> None:
    """Overwrite what the header said with what PAX records say."""
    values = extended.values
    if b"path" in values:
        member.path = values[b"path"]
    if b"linkpath" in values:
        member.link = values[b"linkpath"]
    for name in (b"uid", b"gid", b"size"):
        if name in values:
            setattr(member, name.decode(), pax.parse_decimal(values[name], name))
    if b"mtime" in values:
        member.mtime_ns = pax.parse_time(values[b"mtime"], b"mtime")
    if b"SCHILY.devmajor" in values:
        member.major = pax.parse_decimal(values[b"SCHILY.devmajor"], b"SCHILY.devmajor")
    if b"SCHILY.devminor" in values:
        member.minor = pax.parse_decimal(values[b"SCHILY.devminor"], b"SCHILY.devminor")
    if b"GNU.sparse.name" in values and member.type == tar.REGULAR:
        member.path = values[b"GNU.sparse.name"]
    member.xattrs = extended.all_xattrs()


def stream_bytes_max(limits: Limits) -> int:
    """How long a stream within *limits* may be."""
    return limits.bytes_max + max(limits.bytes_max, _OVERHEAD_BYTES)

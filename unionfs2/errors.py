"""Exceptions of unionfs2, what each means, and the two numbers it turns into.

A caller of the library sees only OSError (a system call said so) and UnionFSError (we said so).
Doors turn both into an errno with errno_of(); commands turn both into an exit status with
exit_code_of(). Texts are one sentence that names the thing, its value and the way out, because
container engines show them verbatim and nothing else.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar, Final

# Exit statuses of mount(8) (mount(8), "EXIT STATUS"); they may be ORed when several targets are
# worked on. 16 (writing /etc/mtab) is kept unused: nothing writes that file any more.
EXIT_OK: Final = 0
EXIT_USAGE: Final = 1  # wrong invocation, or no permission
EXIT_SYSTEM: Final = 2  # out of memory, cannot fork, a missing helper or device
EXIT_DAMAGED: Final = 3  # of "check": the store has findings (no bit mask; used alone)
EXIT_INTERNAL: Final = 4  # a bug in this program
EXIT_USER: Final = 8  # interrupted by the user
EXIT_FAIL: Final = 32  # the mount, or unmount, failed
EXIT_SOMEOK: Final = 64  # some of several targets succeeded


class UnionFSError(Exception):
    """Anything that unionfs2 refuses by itself. The text is one sentence for people.

    ``errno`` is what a file system request would be answered with and ``exit_code`` the status
    of a command; both can be narrowed per instance.
    """

    errno: int = errno.EIO
    exit_code: int = EXIT_FAIL
    #: Name under which an error crosses a process boundary; stable, so renames keep it.
    kind: ClassVar[str] = "error"

    def __init__(
        self, message: str, *, errno: int | None = None, exit_code: int | None = None
    ) -> None:
        super().__init__(message)
        if errno is not None:
            self.errno = errno
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(UnionFSError):
    """The command line is wrong: a missing argument, or arguments that exclude each other."""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE
    kind = "usage"


class OptionError(UnionFSError):
    """An option is unknown, malformed, contradicts another, or cannot be done by this backend."""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE
    kind = "option"


class LayerError(UnionFSError):
    """A layer directory is missing, of the wrong type, unreadable or clashes with another."""

    errno = errno.EINVAL
    kind = "layer"


class BackingError(LayerError):
    """The file system below the upper directory lacks something an upper needs."""

    errno = errno.EOPNOTSUPP
    kind = "backing"


class InUseError(UnionFSError):
    """The upper or work directory belongs to another live mount and ``exclusive`` was asked."""

    errno = errno.EBUSY
    kind = "in-use"


class MountError(UnionFSError):
    """Mounting failed: the kernel, a helper or the server process said no."""

    kind = "mount"


class TargetError(MountError):
    """The mount point is missing, not a directory, busy, or not mounted by us."""

    errno = errno.ENOENT
    kind = "target"


class PrivilegeError(MountError):
    """A right is missing that the chosen way of mounting needs."""

    errno = errno.EPERM
    exit_code = EXIT_USAGE
    kind = "privilege"


class UnavailableError(MountError):
    """This machine lacks the means: no /dev/fuse, no fusermount3, no overlay in the kernel."""

    errno = errno.ENODEV
    exit_code = EXIT_SYSTEM
    kind = "unavailable"


class BusyError(MountError):
    """The mount cannot be taken away now because something still uses it."""

    errno = errno.EBUSY
    kind = "busy"


class StoreError(UnionFSError):
    """The layer store cannot be used as asked: not a store, a newer format, a bad argument."""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE
    kind = "store"


class UnknownLayerError(StoreError):
    """There is no layer with this id."""

    errno = errno.ENOENT
    kind = "unknown-layer"


class LayerExistsError(StoreError):
    """A layer with this id exists already."""

    errno = errno.EEXIST
    kind = "layer-exists"


class LayerInUseError(StoreError):
    """The layer is mounted, or another process works on it."""

    errno = errno.EBUSY
    kind = "layer-in-use"


class HasChildrenError(StoreError):
    """Other layers are built on this one."""

    errno = errno.EBUSY
    kind = "has-children"


class CommittedError(StoreError):
    """The layer is committed: its content never changes again."""

    errno = errno.EROFS
    kind = "committed"


class DepthError(StoreError):
    """The chain of layers would be longer than the store allows."""

    errno = errno.EMLINK
    kind = "depth"


class DamagedLayerError(StoreError):
    """What the store knows of one layer is missing, malformed or contradicts itself."""

    errno = errno.EUCLEAN
    kind = "damaged-layer"


class DialectError(StoreError):
    """The marks of a layer are written in attributes that this mount does not read."""

    errno = errno.EOPNOTSUPP
    kind = "dialect"


class QuotaError(StoreError):
    """A limit was asked for that cannot be kept here."""

    errno = errno.EOPNOTSUPP
    kind = "quota"


class ArchiveError(StoreError):
    """A tar stream is malformed, cut short, or holds what must not be unpacked."""

    errno = errno.EBADMSG
    kind = "archive"


class LimitError(ArchiveError):
    """A tar stream is larger than the declared limits allow."""

    errno = errno.EFBIG
    kind = "limit"


class DigestError(ArchiveError):
    """Content does not have the digest that was declared for it."""

    kind = "digest"


class ImageError(StoreError):
    """An image archive or layout is malformed, incomplete or unknown."""

    kind = "image"


_BY_KIND: Final[dict[str, type[UnionFSError]]] = {
    cls.kind: cls
    for cls in (
        UnionFSError,
        UsageError,
        OptionError,
        LayerError,
        BackingError,
        InUseError,
        MountError,
        TargetError,
        PrivilegeError,
        UnavailableError,
        BusyError,
        StoreError,
        UnknownLayerError,
        LayerExistsError,
        LayerInUseError,
        HasChildrenError,
        CommittedError,
        DepthError,
        DamagedLayerError,
        DialectError,
        QuotaError,
        ArchiveError,
        LimitError,
        DigestError,
        ImageError,
    )
}


def errno_of(exc: BaseException) -> int:
    """The errno a request is answered with: its own, ENOMEM for no memory, else EIO.

    EIO also stands for a bug; the door that calls this logs the traceback of such a case.
    """
    if isinstance(exc, (OSError, UnionFSError)):
        return exc.errno or errno.EIO
    if isinstance(exc, MemoryError):
        return errno.ENOMEM
    return errno.EIO


def is_expected(exc: BaseException) -> bool:
    """True for what the program foresees; anything else is a bug and deserves its traceback."""
    return isinstance(exc, UnionFSError) or (isinstance(exc, OSError) and exc.errno is not None)


def exit_code_of(exc: BaseException) -> int:
    """Exit status of a command that ends with *exc*, as mount(8) numbers them."""
    if isinstance(exc, UnionFSError):
        return exc.exit_code
    if isinstance(exc, KeyboardInterrupt):
        return EXIT_USER
    if isinstance(exc, PermissionError):
        return EXIT_USAGE
    if isinstance(exc, MemoryError):
        return EXIT_SYSTEM
    if isinstance(exc, OSError):
        return EXIT_FAIL
    return EXIT_INTERNAL


def sentence(exc: BaseException) -> str:
    """What to show a person: our own text, or "path: reason" of a system call."""
    if isinstance(exc, OSError) and exc.errno is not None:
        reason = exc.strerror or os.strerror(exc.errno)
        return reason if exc.filename is None else f"{show(exc.filename)}: {reason}"
    text = str(exc)
    return text if isinstance(exc, UnionFSError) else f"{type(exc).__name__}: {text}"


def show(name: object) -> str:
    """A file name for a message: text as it is, odd bytes and control characters escaped."""
    if isinstance(name, (bytes, str, os.PathLike)):
        raw = os.fsencode(name)
        text = raw.decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return str(name)


def to_record(exc: BaseException) -> dict[str, str | int]:
    """*exc* as plain values that JSON can carry to another process; see from_record()."""
    kind = exc.kind if isinstance(exc, UnionFSError) else MountError.kind
    return {
        "kind": kind,
        "message": sentence(exc),
        "errno": errno_of(exc),
        "exit_code": exit_code_of(exc),
    }


def from_record(record: dict[str, str | int]) -> UnionFSError:
    """The exception that to_record() described; an unknown kind becomes a UnionFSError."""
    cls = _BY_KIND.get(str(record["kind"]), UnionFSError)
    return cls(
        str(record["message"]), errno=int(record["errno"]), exit_code=int(record["exit_code"])
    )

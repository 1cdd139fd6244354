"""The kernel's own overlay, mounted from the same MountSpec.

Three ways, the best that the kernel has: layers as descriptors (no escaping, no length limit,
nothing that a rename in between could change), ``lowerdir+`` with strings (Linux 6.8), and the
classic mount(2), whose single page of text is measured before the call because the kernel cuts
it silently.

What the kernel does silently is looked for afterwards: a work directory that it could not clean
makes it mount read-only without a word, and that is an error here unless read-only was asked.
Mounts below a layer are not part of the overlay: the kernel clones only the layer's own mount.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

from . import locks, mountcalls, mounts, privilege
from .errors import MountError, OptionError, PrivilegeError, UnavailableError, sentence, show
from .layercheck import check_layers
from .mounter import (
    Mounted,
    mount_attributes,
    mount_flags,
    open_target,
    resolve_target,
)
from .options import (
    Backend,
    MountSpec,
    absolute,
    escape,
    format_lowerdir,
    unsupported,
)

#: Bytes of option text that mount(2) really reads: a page without its final NUL.
LEGACY_DATA_MAX: Final = 4095
#: Bytes of one string value of fsconfig(2).
STRING_MAX: Final = 255

# What fsconfig(2) says of a key, or a type of value, that it does not know (fs/fs_parser.c).
_UNKNOWN_FORM: Final = re.compile("Unknown parameter|Bad value|.*: Bad value")

_PARAMETERS: Final = "/sys/module/overlay/parameters"


class _NotHereError(Exception):
    """This kernel does not know this way of mounting; try the next one.

    ``error`` is what to say when there is no other way.
    """

    def __init__(self, error: MountError | None = None) -> None:
        super().__init__()
        self.error = error


class NativeMounter:
    """Mounts with the kernel's overlay. *ways* narrows what is tried, for tests."""

    name: Backend = "native"

    def __init__(self, ways: tuple[str, ...] = ("fd", "string", "legacy")) -> None:
        self._ways = ways

    def probe(self, spec: MountSpec) -> str | None:
        reasons = unsupported(spec, "native")
        return reasons[0] if reasons else machine_reason()

    def mount(self, spec: MountSpec, target: bytes) -> Mounted:
        spec = absolute(spec, os.getcwdb())
        target = resolve_target(target)
        check_layers(spec, "native")
        warnings = locks.check(spec)
        if spec.userxattr is None:
            spec = spec._replace(userxattr=privilege.default_userxattr())
        with ExitStack() as stack:
            target_fd = open_target(target)
            stack.callback(os.close, target_fd)
            _mount_best_way(spec, target, target_fd, self._ways)
        mounts.record(target, "native", spec)
        return Mounted("native", target, warnings=tuple(warnings))

    def attach(self, spec: MountSpec, target: bytes) -> None:
        """Mount *spec*, absolute and known to be sound, with little beyond the system calls.

        For a caller that made the layers itself and keeps its own record of the mount. What goes
        wrong is looked into afterwards, so the errors are those of mount(), except that a second
        use of an upper is not noticed (locks.check()).
        """
        target_fd = open_target(target)
        try:
            _mount_best_way(spec, target, target_fd, self._ways)
        except MountError:
            check_layers(spec, "native")
            raise
        finally:
            os.close(target_fd)

    def unmount(self, target: bytes, *, lazy: bool = False) -> None:
        mounts.unmount(target, lazy=lazy)


def machine_reason() -> str | None:
    """Why the kernel's overlay cannot be used here, found by making a small one; None if it can.

    The mount is never attached anywhere, except on kernels without fsopen(2), where it appears in
    a private temporary directory for a moment.
    """
    if not privilege.may_mount():
        return (
            "the kernel's overlay needs CAP_SYS_ADMIN: become root, enter a user namespace, "
            "or use the fuse backend"
        )
    import tempfile  # noqa: PLC0415 - costs milliseconds, and not every mount asks

    with tempfile.TemporaryDirectory(prefix="unionfs2-probe-") as scratch:
        base = os.fsencode(scratch)
        lower = (base + b"/a", base + b"/b")
        target = base + b"/m"
        for path in (*lower, target):
            os.mkdir(path)
        spec = MountSpec(lower=lower, userxattr=privilege.default_userxattr())
        try:
            _try_scratch(spec, target)
        except (MountError, OSError) as exc:
            return f"the kernel's overlay does not work here: {sentence(exc)}"
    return None


def _try_scratch(spec: MountSpec, target: bytes) -> None:
    target_fd = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            with _context() as context:
                _flags_and_words(context, spec, target)
                mountcalls.fsconfig_string(context, b"lowerdir", format_lowerdir(spec.lower))
                mountcalls.fsconfig_create(context)
                os.close(mountcalls.fsmount(context, 0))
        except _NotHereError:
            _legacy(spec, target, target_fd)
            mountcalls.umount(target)
    finally:
        os.close(target_fd)


def _mount_best_way(spec: MountSpec, target: bytes, target_fd: int, ways: tuple[str, ...]) -> None:
    table: dict[str, Callable[[MountSpec, bytes, int], None]] = {
        "fd": _by_descriptors,
        "string": _by_strings,
        "legacy": _legacy,
    }
    error: MountError | None = None
    for way in ways:
        try:
            table[way](spec, target, target_fd)
        except _NotHereError as exc:
            error = exc.error or error
            continue
        return
    raise error or UnavailableError(
        f"cannot mount overlay on {show(target)}: this kernel has none of the ways tried "
        f"({', '.join(ways)}), use the fuse backend"
    )


# --- fsopen(2) and fsconfig(2) --------------------------------------------------------------------


@contextmanager
def _context() -> Iterator[int]:
    try:
        context = mountcalls.fsopen(b"overlay")
    except OSError as exc:
        if exc.errno == errno.ENOSYS:
            raise _NotHereError from exc
        if exc.errno == errno.ENODEV:
            raise UnavailableError(
                "this kernel has no overlay file system: load the module (modprobe overlay) "
                "or use the fuse backend"
            ) from exc
        raise PrivilegeError(
            f"the kernel's overlay cannot be used: {os.strerror(exc.errno or 0)}, "
            f"{_HINTS[errno.EPERM]}",
            errno=exc.errno,
        ) from exc
    try:
        yield context
    finally:
        os.close(context)


def _by_descriptors(spec: MountSpec, target: bytes, target_fd: int) -> None:
    """Layers as O_PATH descriptors (Linux 6.13)."""
    with _context() as context, ExitStack() as stack:

        def give(key: bytes, path: bytes) -> None:
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            mountcalls.fsconfig_fd(context, key, fd)

        _layers(context, spec, target, give)
        _finish(context, spec, target, target_fd)


def _by_strings(spec: MountSpec, target: bytes, target_fd: int) -> None:
    """One ``lowerdir+`` per layer (Linux 6.8); paths over the limit go through /proc/self/fd."""
    with _context() as context, ExitStack() as stack:

        def give(key: bytes, path: bytes) -> None:
            # upperdir and workdir are unescaped once, lowerdir+ and datadir+ never.
            value = escape(path, b"\\") if key in (b"upperdir", b"workdir") else path
            if len(value) > STRING_MAX:
                value = _by_number(path, stack)
            mountcalls.fsconfig_string(context, key, value)

        _layers(context, spec, target, give)
        _finish(context, spec, target, target_fd)


def _by_number(path: bytes, stack: ExitStack) -> bytes:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return b"/proc/self/fd/%d" % fd


def _layers(
    context: int, spec: MountSpec, target: bytes, give: Callable[[bytes, bytes], None]
) -> None:
    """Give every layer; a refusal of the very first one says that the kernel lacks this form."""
    try:
        give(b"lowerdir+", spec.lower[0])
    except OSError as exc:
        words = mountcalls.read_log(context)
        # EOPNOTSUPP: file systems of the old mount API take no descriptors (vfs_fsconfig()).
        unknown = exc.errno in (errno.EINVAL, errno.EOPNOTSUPP)
        if unknown and all(_UNKNOWN_FORM.match(line) for line in words):
            raise _NotHereError from exc
        raise _failed(target, exc, words, f"lowerdir={show(spec.lower[0])}") from exc
    rest = [(b"lowerdir+", path) for path in spec.lower[1:]]
    rest += [(b"datadir+", path) for path in spec.data]
    if spec.upper is not None and spec.work is not None:
        rest += [(b"upperdir", spec.upper), (b"workdir", spec.work)]
    for key, path in rest:
        try:
            give(key, path)
        except OSError as exc:
            raise _failed(
                target, exc, mountcalls.read_log(context), f"{key.decode()}={show(path)}"
            ) from exc


def _flags_and_words(context: int, spec: MountSpec, target: bytes) -> None:
    for key, value in _parameters(spec):
        try:
            if value is None:
                mountcalls.fsconfig_flag(context, key)
            else:
                mountcalls.fsconfig_string(context, key, value)
        except OSError as exc:
            shown = show(key if value is None else key + b"=" + value)
            raise _failed(target, exc, mountcalls.read_log(context), shown) from exc


def _finish(context: int, spec: MountSpec, target: bytes, target_fd: int) -> None:
    """Create the mount, look at it, and only then put it in its place."""
    _flags_and_words(context, spec, target)
    try:
        mountcalls.fsconfig_string(context, b"source", spec.source)
        for wanted, flag in (
            (spec.read_only, b"ro"),
            (spec.sync, b"sync"),
            (spec.dirsync, b"dirsync"),
        ):
            if wanted:
                mountcalls.fsconfig_flag(context, flag)
        mountcalls.fsconfig_create(context)
        mount_fd = mountcalls.fsmount(context, mount_attributes(spec))
    except OSError as exc:
        words = mountcalls.read_log(context)
        error = _failed(target, exc, words)
        if exc.errno == errno.EINVAL and not words:
            # Before Linux 6.5 overlay takes any key, and finds out now, without a word.
            raise _NotHereError(error) from exc
        raise error from exc
    try:
        _refuse_silent_read_only(spec, os.fstatvfs(mount_fd))
        mountcalls.move_mount(mount_fd, target_fd)
    except OSError as exc:
        raise _failed(target, exc) from exc
    finally:
        os.close(mount_fd)


# --- mount(2) -------------------------------------------------------------------------------------


def _legacy(spec: MountSpec, target: bytes, target_fd: int) -> None:
    with ExitStack() as stack:
        data = legacy_data(spec)
        if len(data) > LEGACY_DATA_MAX:
            data = legacy_data(_with_numbers(spec, stack))
        if len(data) > LEGACY_DATA_MAX:
            raise OptionError(
                f"the options of {show(target)} are {len(data)} bytes long and this kernel reads "
                f"{LEGACY_DATA_MAX}: use fewer layers or the fuse backend"
            )
        place = b"/proc/self/fd/%d" % target_fd
        try:
            mountcalls.mount(spec.source, place, b"overlay", mount_flags(spec), data)
        except OSError as exc:
            if exc.errno == errno.ENODEV:
                raise UnavailableError(
                    "this kernel has no overlay file system: load the module (modprobe overlay) "
                    "or use the fuse backend"
                ) from exc
            raise _failed(target, exc) from exc
    try:
        _refuse_silent_read_only(spec, os.statvfs(target))
    except MountError:
        mountcalls.umount(target)
        raise


def legacy_data(spec: MountSpec) -> bytes:
    """The option text of *spec* for mount(2), escaped as the kernel unescapes it."""
    parts = [b"lowerdir=" + format_lowerdir(spec.lower, spec.data)]
    if spec.upper is not None and spec.work is not None:
        parts += [b"upperdir=" + escape(spec.upper), b"workdir=" + escape(spec.work)]
    for key, value in _parameters(spec):
        quoted = b'"%b"' % value if value is not None and key.endswith(b"context") else value
        parts.append(key if quoted is None else key + b"=" + quoted)
    return b",".join(parts)


def _with_numbers(spec: MountSpec, stack: ExitStack) -> MountSpec:
    return spec._replace(
        lower=tuple(_by_number(path, stack) for path in spec.lower),
        data=tuple(_by_number(path, stack) for path in spec.data),
        upper=None if spec.upper is None else _by_number(spec.upper, stack),
        work=None if spec.work is None else _by_number(spec.work, stack),
    )


# --- the same for all ways ------------------------------------------------------------------------


def _parameters(spec: MountSpec) -> Iterator[tuple[bytes, bytes | None]]:
    """What differs from the shared profile, and what a module parameter would make differ."""
    for wanted, key, value in (
        (spec.userxattr, b"userxattr", None),
        (spec.volatile, b"volatile", None),
        (spec.fsync == "strict", b"fsync", b"strict"),
        (spec.uuid != "auto", b"uuid", spec.uuid.encode()),
        (spec.verity != "off", b"verity", spec.verity.encode()),
        (spec.xino != "off" or _module_default("xino_auto"), b"xino", spec.xino.encode()),
    ):
        if wanted:
            yield key, value
    for name in ("metacopy", "index", "nfs_export"):
        if getattr(spec, name):
            yield name.encode(), b"on"
        elif _module_default(name) and not _implied_off(spec, name):
            yield name.encode(), b"off"
    implied = spec.userxattr or spec.metacopy
    if spec.redirect_dir != "follow" or (_module_default("redirect_dir") and not implied):
        yield b"redirect_dir", spec.redirect_dir.encode()
    for option, label in spec.context:
        yield option.encode(), label


def _implied_off(spec: MountSpec, name: str) -> bool:
    """Options that another option switches itself; naming them would be a contradiction."""
    if name == "index":
        return spec.nfs_export
    return name == "metacopy" and bool(spec.userxattr)


def _module_default(name: str) -> bool:
    """Whether the administrator or the distribution switched the option *name* on for all."""
    try:
        with open(f"{_PARAMETERS}/{name}", "rb") as file:
            return file.read(1) == b"Y"
    except OSError:
        return False


def _refuse_silent_read_only(spec: MountSpec, status: os.statvfs_result) -> None:
    if spec.upper is None or spec.read_only or not status.f_flag & os.ST_RDONLY:
        return
    assert spec.work is not None
    raise MountError(
        f"the kernel could not clean {show(spec.work)}/work and would mount read-only: "
        "remove that directory, or give a new workdir=",
        errno=errno.EROFS,
    )


_HINTS: Final = {
    errno.EPERM: "mounting needs CAP_SYS_ADMIN in the user namespace that owns the mounts",
    errno.ELOOP: "layers overlap, or the overlay nests too deeply",
    errno.EBUSY: "the upper or work directory is in use by another mount, which index=on forbids",
    errno.EINVAL: "the kernel's log (dmesg) may say which option it does not like",
    errno.ENOMEM: "the kernel is out of memory",
}


def _failed(target: bytes, exc: OSError, words: Sequence[str] = (), what: str = "") -> MountError:
    """An error of the kernel with its own *words*, where it left some in the context."""
    reason = os.strerror(exc.errno or 0)
    where = f" with {what}" if what else ""
    hint = "; ".join(words) or _HINTS.get(exc.errno or 0, "")
    tail = f" ({hint})" if hint else ""
    kind = PrivilegeError if exc.errno == errno.EPERM else MountError
    return kind(f"cannot mount overlay on {show(target)}{where}: {reason}{tail}", errno=exc.errno)

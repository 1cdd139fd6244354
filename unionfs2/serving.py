"""The life of one FUSE server: check, lock, open the layers, mount, serve, unmount.

The order matters. Layers are opened before the mount exists, so the mount point may lie on or in
a layer. The lock comes before the work directory is touched. What is unmounted at the end is this
very mount, told by its id: somebody may have put another one in the same place already.
"""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from . import attach, locks, mountcalls, mounts, privilege, syscalls, transports
from .errors import BusyError, MountError, sentence
from .fuse_mount import Ready
from .layercheck import check_layers
from .logger import Log
from .mountcalls import MountEntry
from .mounter import open_target, resolve_target
from .options import MountSpec, absolute
from .transports import Transport

if TYPE_CHECKING:
    from .union import UnionFS

_log = Log(__name__)


def _no_ready(transport: Transport | None = None) -> None:
    """Nobody waits for the mount."""


def _no_warning(text: str) -> None:
    """Nobody hears of it but the log."""


def serve(
    spec: MountSpec,
    target: str | bytes | os.PathLike[str],
    *,
    ready: Ready = _no_ready,
    warn: Callable[[str], None] = _no_warning,
) -> None:
    """Mount *spec* on *target* and be its server, in this thread, until somebody unmounts it.

    Calls *ready* once the mount answers, and *warn* before that. With ``transport="devfuse"`` each
    thread of a process may serve a mount; pyfuse3 serves one per process. Give it a thread of its
    own: the thread leaves the umask and the current directory of the others and keeps its
    capabilities when it changes ids; in the main thread it takes SIGTERM, SIGINT and SIGHUP as the
    wish to unmount, and tunes the interpreter for a server. Raises UnionFSError or OSError.
    """
    spec = absolute(spec, os.getcwdb())
    path = resolve_target(os.fsencode(target))
    os.close(open_target(path))
    syscalls.unshare_fs_state()
    umask = os.umask(0)
    try:
        # No pid: who unmounts waits for the end of a server process, and this one may go on.
        serve_mount(spec, path, ready, warn, pid=None)
    finally:
        os.umask(umask)


def serve_mount(
    spec: MountSpec,
    target: bytes,
    ready: Ready = _no_ready,
    warn: Callable[[str], None] = _no_warning,
    *,
    pid: int | None,
) -> None:
    """Mount *spec* (absolute paths) on *target* and serve it until it is unmounted.

    Calls *ready* once requests are answered; *warn* before that. *pid* is this process if it ends
    with the mount. Raises UnionFSError or OSError.
    """
    make_room_for_descriptors()
    if spec.userxattr is None:
        spec = spec._replace(userxattr=privilege.default_userxattr())
    check_layers(spec, "fuse")
    serve_requests = load_serve(transports.chosen(spec.transport))
    held = locks.acquire(spec)
    try:
        for text in held.warnings:
            _log.warning("%s", text)
            warn(text)
        _serve_locked(spec, target, serve_requests, ready, pid, clean_work=not held.in_use)
    finally:
        held.close()


def _serve_locked(
    spec: MountSpec,
    target: bytes,
    serve_requests: Serve,
    ready: Ready,
    pid: int | None,
    *,
    clean_work: bool,
) -> None:
    # The heavy half is loaded here so that the starting process stays light.
    from .union import UnionFS  # noqa: PLC0415

    transport = transport_of(serve_requests)
    with UnionFS.open(spec, clean_work=clean_work) as fs:
        # Without an upper the mount is read-only as a whole, as the kernel's overlay is.
        fuse_fd = attach.attach(spec._replace(read_only=spec.read_only or not spec.upper), target)
        entry = mountcalls.find_mount(target)
        try:
            record = mounts.record(target, "fuse", spec, pid, transport)
            try:
                serve_requests(
                    fs,
                    fuse_fd,
                    mountpoint=os.fsdecode(target),
                    spec=spec,
                    ready=lambda: ready(transport),
                    unmount=lambda: unmount_own(entry),
                    debug=spec.debug,
                )
            finally:
                mounts.forget(record)
        finally:
            unmount_own(entry)


#: Descriptors for which there is room from the start.
_DESCRIPTORS: Final = 8192

#: The module of each transport; it has a function serve().
_MODULES: Final[dict[Transport, str]] = {
    "pyfuse3": "unionfs2.fs_ops",
    "devfuse": "unionfs2.devfuse",
}


class Serve(Protocol):
    """Answer requests of *fuse_fd* until it is unmounted or a signal asks to end."""

    __module__: str

    def __call__(
        self,
        fs: UnionFS,
        fuse_fd: int,
        *,
        mountpoint: str,
        spec: MountSpec,
        ready: Callable[[], None],
        unmount: Callable[[], None] | None,
        debug: bool,
    ) -> None: ...


def load_serve(transport: Transport) -> Serve:
    """The function that serves; of the libraries, only those that *transport* uses are loaded."""
    serve: Serve
    if transport == "devfuse":
        from .devfuse import serve  # noqa: PLC0415
    else:
        from .fs_ops import serve  # noqa: PLC0415
    return serve


def transport_of(serve: Serve) -> Transport | None:
    """The transport that *serve* really belongs to, whatever was asked for."""
    for transport, module in _MODULES.items():
        if f"{serve.__module__}.".startswith(f"{module}."):
            return transport
    return None


def make_room_for_descriptors() -> None:
    """Use as many descriptors as this process may without asking anybody.

    And have the kernel make the table for many of them at once. It would double it again and again,
    and where threads share it wait some milliseconds each time until nobody uses the old one
    (expand_fdtable() of fs/file.c).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            _log.debug("the limit of open files stays at %d", soft)
    last = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _DESCRIPTORS) - 1
    try:
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, last))
    except OSError as exc:
        _log.debug("the table of open files stays as it is: %s", exc)


def unmount_own(entry: MountEntry | None) -> None:
    """Unmount the mount *entry* if it is still there and on top; lazily when it is busy."""
    if entry is None:
        return
    now = mountcalls.find_mount(entry.target)
    if now is None or now.mount_id != entry.mount_id:
        return
    try:
        try:
            mounts.detach(entry.target, fuse=True, lazy=False)
        except BusyError:
            # Those who still use it lose the server; what they have written must not get lost.
            _write_back(entry.target)
            mounts.detach(entry.target, fuse=True, lazy=True)
    except MountError as exc:
        _log.error("%s", sentence(exc))


def _write_back(target: bytes) -> None:
    try:
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        _log.debug("not written back: %s", sentence(exc))
        return
    try:
        syscalls.syncfs(fd)
    except OSError as exc:
        _log.error("not all was written back: %s", sentence(exc))
    finally:
        os.close(fd)

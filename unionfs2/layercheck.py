"""Is this spec a mount that makes sense? Asked by both mounters before anything is mounted.

The answers agree with what the kernel's overlay accepts (fs/overlayfs/super.c), so that a spec
does not work through one backend only; where the kernel says EINVAL or ELOOP, this says which
layer, and what to do. Upper or work inside a lower layer is accepted, as there.

Two directories are compared where they lie on their file system, not by the names they are
reached by: a bind mount of a directory is that directory, and what is mounted inside a layer is
not part of it.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from typing import Final, NamedTuple

from . import ondisk, privilege
from . import syscalls as sc
from .errors import BackingError, LayerError, OptionError, PrivilegeError, sentence, show
from .mountcalls import MountEntry, read_mountinfo
from .options import Backend, MountSpec, refuse_unsupported

_OPTION: Final = {"upper": "upperdir", "work": "workdir", "lower": "lowerdir", "data": "lowerdir"}
_PROBE_PREFIX: Final = b".unionfs2-probe-"


class _Layer(NamedTuple):
    role: str  # upper | work | lower | data
    path: bytes
    fd: int  # O_PATH
    identity: tuple[int, int]
    mount_id: int
    place: tuple[int, bytes]  # device, path from the root of that file system

    def __str__(self) -> str:
        return f"{self.role} directory {show(self.path)}"

    def contains(self, other: _Layer) -> bool:
        """Whether *other* lies somewhere below this directory, on the same file system."""
        device, path = self.place
        return other.place[0] == device and other.place[1].startswith(path.rstrip(b"/") + b"/")


def check_layers(spec: MountSpec, backend: Backend | None = None) -> None:
    """Raise OptionError, LayerError, BackingError or PrivilegeError unless *spec* can be mounted.

    *backend* adds what that one does not support. The work directory is written to while probing
    what its file system can do, and left as it was.
    """
    if backend is not None:
        refuse_unsupported(spec, backend)
    if spec.passthrough and not privilege.has_initial_capability(privilege.CAP_SYS_ADMIN):
        # fuse_backing_open() asks for it, whoever owns the mount.
        raise PrivilegeError(
            "passthrough needs CAP_SYS_ADMIN in the initial user namespace: "
            "mount as root or leave it out"
        )
    _check_shape(spec)
    with ExitStack() as stack:
        layers = _open_layers(spec, stack)
        _check_overlap(layers)
        by_role = {layer.role: layer for layer in layers}
        if spec.upper is not None:
            _check_pair(by_role["upper"], by_role["work"])
            _check_incompat(by_role["work"])
            _check_backing(spec, by_role["upper"], by_role["work"])


def _check_shape(spec: MountSpec) -> None:
    if not spec.lower:
        raise OptionError("there is no lower layer: give at least one with lowerdir=DIR")
    if spec.upper is not None and spec.work is None:
        raise OptionError(
            f"upperdir={show(spec.upper)} needs a work directory: give workdir=DIR, "
            "an empty directory on the same file system"
        )
    if spec.upper is None and len(spec.lower) == 1 and not spec.data:
        raise OptionError(
            f"there is nothing to merge with lowerdir={show(spec.lower[0])}: "
            "give a second lower layer, or upperdir= and workdir="
        )


# --- each directory by itself ---------------------------------------------------------------------


def _open_layers(spec: MountSpec, stack: ExitStack) -> list[_Layer]:
    wanted: list[tuple[str, bytes]] = []
    if spec.upper is not None and spec.work is not None:
        wanted += [("upper", spec.upper), ("work", spec.work)]
    wanted += [("lower", path) for path in spec.lower]
    wanted += [("data", path) for path in spec.data]
    mounts = {entry.mount_id: entry for entry in read_mountinfo()}
    return [_open_layer(role, path, mounts, stack) for role, path in wanted]


def _open_layer(role: str, path: bytes, mounts: dict[int, MountEntry], stack: ExitStack) -> _Layer:
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        os.close(sc.reopen(fd, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as exc:
        raise _cannot_open(role, path, exc) from exc
    status = os.fstat(fd)
    mount_id = sc.mount_id(fd)
    place = _place(fd, status.st_dev, mounts.get(mount_id))
    return _Layer(role, path, fd, (status.st_dev, status.st_ino), mount_id, place)


def _cannot_open(role: str, path: bytes, exc: OSError) -> LayerError:
    what = f"{role} directory {show(path)}"
    if exc.errno == errno.ENOENT:
        text = f"{what} does not exist: create it or correct {_OPTION[role]}="
    elif exc.errno == errno.ENOTDIR:
        text = f"{what} is not a directory: give a directory in {_OPTION[role]}="
    elif exc.errno in (errno.EACCES, errno.EPERM):
        text = f"{what} cannot be read: change its permissions or mount as another user"
    elif exc.errno == errno.ENOTCONN:
        text = f"{what} lies on a FUSE mount whose server has ended: unmount that one first"
    else:
        text = f"{what} cannot be opened: {os.strerror(exc.errno or 0)}"
    return LayerError(text, errno=exc.errno)


def _place(fd: int, device: int, entry: MountEntry | None) -> tuple[int, bytes]:
    """Where *fd* lies on its file system: what the names of its dentry's ancestors are."""
    path = os.readlink(sc.fd_path(fd))
    if entry is None:
        return device, path
    target = entry.target.rstrip(b"/")
    if path != target and not path.startswith(target + b"/"):
        return device, path  # below a root that this process cannot see
    return entry.device, os.path.normpath(entry.root + path[len(target) :]).replace(b"//", b"/")


# --- directories among themselves -----------------------------------------------------------------


def _check_overlap(layers: list[_Layer]) -> None:
    """No layer twice, and no lower layer inside another directory of the mount (ELOOP)."""
    seen: dict[tuple[int, int], _Layer] = {}
    for layer in layers:
        earlier = seen.setdefault(layer.identity, layer)
        if earlier is not layer:
            raise _overlap(layer, earlier)
    places = {layer.place: layer for layer in layers}
    for layer in layers:
        if layer.role in ("lower", "data"):
            outer = _enclosing(layer, places)
            if outer is not None:
                raise LayerError(
                    f"{layer} is inside {outer}: layers must be separate trees, "
                    f"correct {_OPTION[layer.role]}=",
                    errno=errno.ELOOP,
                )


def _enclosing(layer: _Layer, places: dict[tuple[int, bytes], _Layer]) -> _Layer | None:
    device, path = layer.place
    while path not in (b"/", b""):
        path = os.path.dirname(path)
        outer = places.get((device, path))
        if outer is not None:
            return outer
    return None


def _overlap(layer: _Layer, earlier: _Layer) -> LayerError:
    if {layer.role, earlier.role} == {"upper", "work"}:
        return LayerError(
            f"upper and work are both {show(earlier.path)}: "
            "give an empty directory beside the upper one as workdir="
        )
    same = "" if layer.path == earlier.path else f" (also reached as {show(earlier.path)})"
    twice = "twice" if layer.role == earlier.role else f"as {earlier.role} and as {layer.role}"
    return LayerError(
        f"directory {show(layer.path)}{same} is given {twice}: each layer may take part only once",
        errno=errno.ELOOP,
    )


def _check_pair(upper: _Layer, work: _Layer) -> None:
    if upper.identity[0] != work.identity[0]:
        raise LayerError(
            f"{upper} and {work} are on different file systems: "
            "give a workdir= on the file system of the upper directory"
        )
    if upper.mount_id != work.mount_id:
        raise LayerError(
            f"{upper} and {work} are on one file system but reached through different mounts: "
            "give both by paths below the same mount"
        )
    for inner, outer in ((upper, work), (work, upper)):
        if outer.contains(inner):
            raise LayerError(
                f"{inner} is inside {outer}: give an empty directory beside the upper as workdir="
            )


# --- what the file system below the upper can do --------------------------------------------------


def _check_backing(spec: MountSpec, upper: _Layer, work: _Layer) -> None:
    _check_writable(upper)
    _check_writable(work)
    name = _PROBE_PREFIX + b"%d-%s" % (os.getpid(), os.urandom(4).hex().encode())
    try:
        sc.mkdir(name, 0o700, dir_fd=work.fd)
    except OSError as exc:
        raise BackingError(
            f"{work} cannot be written to: {sentence_of_errno(exc)}", errno=exc.errno
        ) from exc
    try:
        probe = sc.open_dir(name, work.fd)
        try:
            _probe_xattr(spec, upper, work, name)
            _probe_whiteout(upper, probe)
            _probe_rename(upper, probe)
        finally:
            _empty(probe)
            sc.close(probe)
    finally:
        sc.rmdir(name, dir_fd=work.fd)


def sentence_of_errno(exc: OSError) -> str:
    """The bare reason of *exc*, without the name of a temporary file that nobody knows."""
    return os.strerror(exc.errno) if exc.errno else sentence(exc)


def _check_writable(layer: _Layer) -> None:
    if os.statvfs(layer.fd).f_flag & os.ST_RDONLY:
        raise BackingError(
            f"{layer} is on a read-only file system: remount it writable, "
            "or leave out upperdir= and workdir= for a read-only mount",
            errno=errno.EROFS,
        )
    if not os.access(sc.fd_path(layer.fd), os.W_OK | os.X_OK, effective_ids=True):
        raise LayerError(
            f"{layer} is not writable for you: change its permissions or mount as another user",
            errno=errno.EACCES,
        )


def _unfit(upper: _Layer, lack: str, exc: OSError | None = None) -> BackingError:
    reason = f" ({sentence_of_errno(exc)})" if exc else ""
    return BackingError(
        f"the file system of {upper} {lack}{reason}: use a directory on ext4, xfs, btrfs or tmpfs"
    )


def _probe_xattr(spec: MountSpec, upper: _Layer, work: _Layer, name: bytes) -> None:
    user = privilege.default_userxattr() if spec.userxattr is None else spec.userxattr
    key = (ondisk.USER_PREFIX if user else ondisk.TRUSTED_PREFIX) + ondisk.SUFFIX_OPAQUE
    try:
        sc.setxattr_at(name, work.fd, key, ondisk.OPAQUE_YES)
        if sc.getxattr_at(name, work.fd, key) != ondisk.OPAQUE_YES:
            raise _unfit(upper, f"does not keep {show(key)} attributes")
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES) and not user:
            raise PrivilegeError(
                f"setting {show(key)} on {work} is not permitted: "
                "use the option userxattr, or mount as root"
            ) from exc
        raise _unfit(upper, f"does not take {show(key)} attributes", exc) from exc


def _probe_whiteout(upper: _Layer, probe: int) -> None:
    # Read back: some file systems make another kind of object and report success.
    try:
        sc.mknod(b"w", stat.S_IFCHR | ondisk.WORK_MODE, 0, dir_fd=probe)
        made = sc.lstat_at(b"w", probe)
    except OSError as exc:
        raise _unfit(upper, "cannot hold whiteouts, character devices 0:0", exc) from exc
    if not stat.S_ISCHR(made.st_mode) or made.st_rdev != 0:
        raise _unfit(upper, "turns whiteouts, character devices 0:0, into something else")


def _probe_rename(upper: _Layer, probe: int) -> None:
    try:
        sc.mkdir(b"d", 0o700, dir_fd=probe)
        sc.rename(b"w", probe, b"d", probe, sc.RENAME_EXCHANGE)
    except OSError as exc:
        raise _unfit(upper, "cannot exchange two names in one step", exc) from exc


def _empty(probe: int) -> None:
    for name in (b"w", b"d"):
        try:
            sc.unlink(name, dir_fd=probe)
        except FileNotFoundError:
            continue
        except OSError:  # a directory: EISDIR, or EPERM on some file systems
            sc.rmdir(name, dir_fd=probe)


# --- what an earlier mount left behind ------------------------------------------------------------


def _check_incompat(work: _Layer) -> None:
    """A mark in work/work/incompat says that this version must not use the directory (EINVAL)."""
    with ExitStack() as stack:
        try:
            inner = _open_hidden(ondisk.WORK_NAME, work.fd, stack)
            names = os.listdir(_open_hidden(ondisk.INCOMPAT_NAME, inner, stack))
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError:
            return  # not ours: preparing the work directory will fail and say so
    where = os.path.join(work.path, ondisk.WORK_NAME, ondisk.INCOMPAT_NAME)
    if "volatile" in names:
        raise LayerError(
            f"{work} was last used by a volatile mount, so its upper directory may be incomplete "
            f"after a crash: remove {show(where)}/volatile to use it anyway"
        )
    if names:
        raise LayerError(
            f"{work} has a mark of a feature that is not known here, {show(where)}/{names[0]}: "
            "mount it where it was used last, or give a new workdir="
        )


def _open_hidden(name: bytes, dir_fd: int, stack: ExitStack) -> int:
    """Open a directory whose mode may be 0000, which shuts out an owner without privilege."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=dir_fd)
    except PermissionError:
        mode = stat.S_IMODE(sc.lstat_at(name, dir_fd).st_mode)
        sc.chmod(name, dir_fd, 0o700)
        stack.callback(sc.chmod, name, dir_fd, mode)
        fd = os.open(name, flags, dir_fd=dir_fd)
    stack.callback(os.close, fd)
    return fd

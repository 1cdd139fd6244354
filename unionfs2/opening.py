"""From a MountSpec to a Stack: opens the branches and makes the upper ready.

Layers are opened once, as private clones of the one mount they are on where that is allowed
(open_tree(2)), so nothing mounted below a layer is entered and later renames of a layer directory
do not matter. Without that right, mount points below a layer are refused one by one.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from contextlib import ExitStack

from . import mountcalls, ondisk, privilege, quota, workdir
from . import syscalls as sc
from .branch import Branch, FdCache, Identity
from .errors import LayerError, OptionError, show
from .options import MountSpec, refuse_unsupported
from .stack import Policy, Stack
from .whiteout import Dialect

_LOWER_SET = mountcalls.MOUNT_ATTR_RDONLY | mountcalls.MOUNT_ATTR_NOATIME
_ATIME_BITS = 0x70
_ATIME_OF = {
    "relatime": 0,
    "noatime": mountcalls.MOUNT_ATTR_NOATIME,
    "strictatime": mountcalls.MOUNT_ATTR_STRICTATIME,
}
_FDS_PER_BRANCH = 1
_FDS_RESERVED = 64
_CACHE_MAX = 4096


class Opened:
    """A stack and what has to be given back after it."""

    def __init__(self, stack: Stack, resources: ExitStack, dialect: Dialect) -> None:
        self.stack = stack
        self.dialect = dialect
        self._resources = resources

    def close(self) -> None:
        self._resources.close()


def open_stack(spec: MountSpec, *, clean_work: bool = True) -> Opened:
    """Open all branches of *spec*. Raises LayerError, OptionError, OSError; leaves nothing open.

    *clean_work* is False while another live mount uses the same work directory.
    """
    refuse_unsupported(spec, "fuse")
    if not spec.lower:
        raise OptionError("no lower directory given: add lowerdir=DIR[:DIR...]")
    userxattr = privilege.default_userxattr() if spec.userxattr is None else spec.userxattr
    dialect = Dialect(userxattr=userxattr)
    with ExitStack() as resources:
        cache = FdCache(_cache_limit(len(spec.lower)))
        resources.callback(cache.close_all)
        lowers = [
            _open_lower(index, path, cache, resources) for index, path in enumerate(spec.lower, 1)
        ]
        upper: Branch | None = None
        work_fd = -1
        if spec.upper is not None and spec.work is not None:
            upper, work_fd = _open_upper(spec, cache, resources, clean=clean_work)
        _identify(lowers, upper, resources)
        if upper is not None:
            _mark_instance(spec, upper, dialect)
        policy = Policy(
            keeps_atime=spec.atime != "noatime",
            follow_redirects=spec.redirect_dir != "nofollow" and not userxattr,
            volatile=spec.volatile or spec.fsync == "off",
            read_only=spec.read_only,
            overrides_modes=privilege.has_capability(privilege.CAP_DAC_OVERRIDE),
        )
        stack = Stack(lowers, upper, work_fd, dialect, cache, policy)
        if upper is not None and not spec.read_only and (spec.quota_bytes or spec.quota_inodes):
            stack.ledger = _open_ledger(spec, stack, upper, work_fd)
        return Opened(stack, resources.pop_all(), dialect)


def open_view(layers: Sequence[bytes], dialect: Dialect) -> Opened:
    """The read-only view of *layers*, top-most first, one or more; nothing is mounted or written.

    Unlike a mount it follows redirects and metacopy whatever the options of mounts are: the view
    is for comparing and exporting what is there, always inside the layers. Raises LayerError.
    """
    with ExitStack() as resources:
        cache = FdCache(_cache_limit(len(layers)))
        resources.callback(cache.close_all)
        lowers = [
            _open_lower(index, path, cache, resources) for index, path in enumerate(layers, 1)
        ]
        stack = Stack(
            lowers, None, -1, dialect, cache, Policy(read_only=True, follow_metacopy=True)
        )
        return Opened(stack, resources.pop_all(), dialect)


def _cache_limit(branches: int) -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    free = limit - branches * _FDS_PER_BRANCH - _FDS_RESERVED
    if free < 32:
        raise LayerError(
            f"{branches} layers need more open files than the limit of {limit} allows:"
            " raise it (ulimit -n) or use fewer layers",
            errno=errno.EMFILE,
        )
    return min(_CACHE_MAX, free // 2)


def _open_lower(index: int, path: bytes, cache: FdCache, resources: ExitStack) -> Branch:
    fd = _open_root("lower", path)
    clone = _clone(fd)
    if clone >= 0:
        os.close(fd)
    branch = Branch(index, path, clone if clone >= 0 else fd, cache, private=clone >= 0)
    branch.untouched = clone >= 0 and _make_read_only(clone)
    resources.callback(branch.close)
    return branch


def _make_read_only(clone: int) -> bool:
    """Reading through a read-only mount leaves access times alone; False where not allowed.

    In a user namespace the atime flags are locked, but read-only may be added.
    """
    for wanted, cleared in ((_LOWER_SET, _ATIME_BITS), (mountcalls.MOUNT_ATTR_RDONLY, 0)):
        try:
            mountcalls.mount_setattr(clone, wanted, cleared)
        except OSError:
            continue
        return True
    return False


def _open_root(role: str, path: bytes) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise LayerError(
            f"cannot open {role} directory {show(path)}: {os.strerror(exc.errno or 0)};"
            " check the path and its permissions",
            errno=exc.errno or errno.EIO,
        ) from exc


def _clone(fd: int) -> int:
    """A private clone of the mount of *fd*, rooted there; -1 where that is not allowed."""
    try:
        return mountcalls.open_tree(fd)
    except OSError:
        return -1


def _open_upper(
    spec: MountSpec, cache: FdCache, resources: ExitStack, *, clean: bool
) -> tuple[Branch, int]:
    assert spec.upper is not None
    assert spec.work is not None
    upper_fd = _open_root("upper", spec.upper)
    try:
        base_fd = _open_root("work", spec.work)
    except LayerError:
        os.close(upper_fd)
        raise
    private = False
    pair = _clone_pair(upper_fd, base_fd, _ATIME_OF[spec.atime])
    if pair is not None:
        os.close(upper_fd)
        os.close(base_fd)
        upper_fd, base_fd = pair
        private = True
    upper = Branch(0, spec.upper, upper_fd, cache, private=private)
    resources.callback(upper.close)
    try:
        work_fd = workdir.prepare(base_fd, spec.work, clean=clean, volatile=spec.volatile)
    except OSError as exc:
        raise LayerError(
            f"cannot use work directory {show(spec.work)}: {os.strerror(exc.errno or 0)};"
            " check that it is writable",
            errno=exc.errno or errno.EIO,
        ) from exc
    finally:
        os.close(base_fd)
    resources.callback(os.close, work_fd)
    return upper, work_fd


def _clone_pair(upper_fd: int, base_fd: int, atime: int) -> tuple[int, int] | None:
    """Both directories reached through one clone, so that rename works between them.

    The clone updates access times as the union mount is asked to, not as its own mount does.
    """
    paths = [os.readlink(sc.fd_path(fd)) for fd in (upper_fd, base_fd)]
    common = os.path.commonpath(paths)
    if sc.mount_id(upper_fd) != sc.mount_id(base_fd):
        return None
    try:
        tree = mountcalls.open_tree(sc.AT_FDCWD, common)
    except OSError:
        return None
    opened: list[int] = []
    try:
        mountcalls.mount_setattr(tree, atime, _ATIME_BITS)
    except OSError:
        pass  # then the mount below decides
    try:
        for fd, path in zip((upper_fd, base_fd), paths, strict=True):
            below = os.path.relpath(path, common)
            opened.append(os.open(below, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree))
            if not os.path.samestat(os.stat(opened[-1]), os.stat(fd)):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    except OSError:
        for fd in opened:
            os.close(fd)
        return None
    finally:
        os.close(tree)
    return opened[0], opened[1]


def _open_ledger(spec: MountSpec, stack: Stack, upper: Branch, work_fd: int) -> quota.Ledger:
    """Count what *upper* holds; what an empty directory takes is tried in the work directory."""
    name = stack.w.names.next()
    sc.mkdir(name, 0o700, dir_fd=work_fd)
    try:
        empty = quota.charge(sc.lstat_at(name, work_fd))
    finally:
        sc.rmdir(name, dir_fd=work_fd)
    ledger = quota.Ledger(spec.quota_bytes, spec.quota_inodes, empty_directory=empty)
    ledger.count(upper, stack.cache)
    return ledger


def _identify(lowers: list[Branch], upper: Branch | None, resources: ExitStack) -> None:
    """Number the file systems and learn what their handles need; one descriptor for each."""
    known: dict[int, tuple[int, Identity]] = {}
    if upper is not None:
        known[upper.dev] = (0, Identity(None, -1))
    for branch in lowers:
        entry = known.get(branch.dev)
        if entry is None or (entry[0] == 0 and entry[1].handle_fd < 0):
            identity = Identity.of(branch.root_fd)
            if identity.handle_fd >= 0:
                resources.callback(os.close, identity.handle_fd)
            entry = (len(known) if entry is None else entry[0], identity)
            known[branch.dev] = entry
        branch.fs_index, branch.identity = entry


def _mark_instance(spec: MountSpec, upper: Branch, dialect: Dialect) -> None:
    """Give a new upper its instance id (ovl_init_uuid_xattr()); best effort like the kernel."""
    if spec.uuid in ("off", "null"):
        return
    path = sc.fd_path(upper.root_fd)
    try:
        keys = [os.fsencode(key) for key in os.listxattr(path)]
        if dialect.uuid in keys or (spec.uuid == "auto" and dialect.impure in keys):
            return
        sc.setxattr(path, dialect.uuid, os.urandom(ondisk.UUID_BYTES))
    except OSError:
        return

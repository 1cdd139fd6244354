"""Copy-up: bring one object to the upper branch, as fs/overlayfs/copy_up.c does.

Three steps: *prepare* (missing ancestors, ``impure`` on the parent), *copy* into an unnamed or
work-directory file, *publish* under the name. A ``CopyJob`` owns descriptors only, so its
``run()`` may happen in another thread while the core goes on; ``publish()`` belongs to the core.

Invariant: the upper shows either nothing or the complete object under the name, at any instant.
Invariant: a name that exists in the upper is never replaced (EEXIST).
Invariant: atime and mtime of the parent are what they were before.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from . import nodes as nd
from . import ondisk, origin
from . import syscalls as sc
from .branch import RealDir
from .names import UpperNames
from .nodes import Dir, Node
from .quota import NAME_RESERVE, NO_ROOM, Room, charge, round_up, symlink_charge
from .stack import OwnerMayWrite, Stack, oserror

# Data goes in pieces as in the kernel (OVL_COPY_UP_CHUNK_SIZE), holes are skipped between them.
_CHUNK = 1 << 20
# Pieces of a file without holes.
_DENSE_CHUNK = 16 << 20
# Files up to this size are copied by one read and one write.
_AT_ONCE = 64 << 10
_SECTOR = 512  # unit of st_blocks
_KEPT_FLAGS = sc.FS_SYNC_FL | sc.FS_NOATIME_FL
_PROTECTING = sc.FS_IMMUTABLE_FL | sc.FS_APPEND_FL
_SKIPPABLE = frozenset((errno.EOPNOTSUPP, errno.EPERM, errno.ENODATA))


class CopyJob:
    """A regular file on its way up. ``run()`` touches nothing but its own two descriptors."""

    __slots__ = (
        "_nameless",
        "_origin",
        "_room",
        "_src",
        "_stack",
        "_tmp",
        "_tmp_name",
        "node",
        "size",
        "st",
    )

    def __init__(
        self,
        stack: Stack,
        node: Node,
        st: os.stat_result,
        size: int,
        room: Room = NO_ROOM,
        *,
        nameless: bool = False,
    ) -> None:
        self._stack = stack
        self._room = room.keep()
        self.node = node
        self.st = st
        self.size = size
        self._src = -1
        self._tmp = -1
        self._tmp_name = b""
        self._nameless = nameless
        low = node.low
        assert low is not None
        try:
            # Here and not in run(), which must not touch directories: they may be closed meanwhile.
            self._origin = _origin_of(node) if st.st_nlink == 1 else None
            self._src = _open_lower(node, low)
            self._tmp, self._tmp_name = _open_temp(stack)
        except OSError:
            self.close()
            raise

    def run(self) -> None:
        """Copy data and everything else that belongs to the object. May take long."""
        if self.size:
            self._copy()
        if self.size < self.st.st_size or not self.size:
            sc.ftruncate(self._tmp, self.size)
        bare = bool(self.node.flags & nd.NO_XATTRS)
        copy_metadata(self._stack, self.st, self._tmp, self._src, self._origin, bare=bare)
        if self.size < self.st.st_size:
            # A truncation that is already done here: not every file system would notice it later.
            sc.touch_mtime(self._tmp)
        if not self._stack.policy.volatile:
            sc.fsync(self._tmp)

    def _copy(self) -> None:
        if self._stack.clones:
            if sc.clone_data(self._src, self._tmp):
                return
        elif self.size <= _AT_ONCE and self.st.st_blocks * _SECTOR >= self.st.st_size:
            # Small and without holes: cheaper than asking the kernel to find that out.
            data = os.pread(self._src, self.size, 0)
            if len(data) == self.size and sc.pwrite(self._tmp, data, 0) == self.size:
                return
        copy_data(self._src, self._tmp, self.size)

    def hand_over(self) -> int:
        """The descriptor of the copy, open for reading and writing, or -1; it is the caller's."""
        fd, self._tmp = self._tmp, -1
        return fd

    def publish(self) -> None:
        """Give the copy its name. needs: the node was not changed since prepare."""
        node, stack = self.node, self._stack
        parent = node.parent
        if node.low is not None and parent is None and self._nameless:
            self._publish_nameless()
            return
        if node.low is None or node.flags & nd.DEAD or parent is None:
            # Unlinked while it was copied: the kernel's overlay answers EEXIST, too.
            raise oserror(errno.EEXIST, node.name)
        upper = parent.upper
        assert upper is not None
        parent.upper_names.arrives(node.name)
        with _ParentTimes(upper), OwnerMayWrite(stack, upper):
            if self._tmp_name:
                sc.rename(
                    self._tmp_name, stack.w.work_fd, node.name, upper.at(), sc.RENAME_NOREPLACE
                )
                self._tmp_name = b""
            else:
                sc.link_fd(self._tmp, node.name, upper.at())
        if stack.ledger is not None:
            stack.ledger.added(os.fstat(self._tmp))
            self._room.release()
        _arrived(stack, node, self.st)
        _switch_handles(node, upper)

    def _publish_nameless(self) -> None:
        """The copy becomes the object of a node whose name has gone; it goes with the node."""
        node = self.node
        if not node.id:
            raise oserror(errno.ESTALE, node.name)  # forgotten meanwhile: nobody would close it
        if node.orphan >= 0:
            os.close(node.orphan)
        node.orphan, self._tmp = self._tmp, -1
        node.low = None
        node.flags = node.flags & ~nd.NO_XATTRS | (nd.ORIGIN if self.st.st_nlink == 1 else 0)
        self._stack.changed.append(node)

    def close(self) -> None:
        """Give back what is left; safe at any point."""
        self._room.release()
        for fd in (self._src, self._tmp):
            if fd >= 0:
                os.close(fd)
        self._src = self._tmp = -1
        if self._tmp_name:
            _discard(self._stack, self._tmp_name)
            self._tmp_name = b""


def _open_lower(node: Node, low: RealDir) -> int:
    if node.orphan >= 0:
        return sc.reopen(node.orphan, os.O_RDONLY)
    return low.branch.open_file(node.name, low.at())


def _open_temp(stack: Stack) -> tuple[int, bytes]:
    work_fd = stack.w.work_fd
    try:
        flags = os.O_TMPFILE | os.O_RDWR | os.O_NOATIME | os.O_CLOEXEC
        return sc.create_at(b".", flags, 0o600, dir_fd=work_fd), b""
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
    name = stack.w.names.next()
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    return sc.create_at(name, flags, 0o600, dir_fd=work_fd), name


def _discard(stack: Stack, name: bytes) -> None:
    try:
        sc.unlink(name, dir_fd=stack.w.work_fd)
    except OSError:
        return  # the next mount empties the work directory


class _ParentTimes:
    """Puts atime and mtime of the parent back (best effort, as ovl_do_copy_up())."""

    __slots__ = ("_dir", "_st")

    def __init__(self, directory: RealDir) -> None:
        self._dir = directory
        self._st = os.stat(directory.at())

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        here, times = self._dir, (self._st.st_atime_ns, self._st.st_mtime_ns)
        try:
            if here.parent is None:
                sc.utimes_path(sc.fd_path(here.at()), *times)
            else:
                sc.utimes(here.name, here.parent.at(), *times)
        except OSError:
            return


def _switch_handles(node: Node, upper: RealDir) -> None:
    for handle in node.handles or ():
        if not handle.in_upper:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = _open_as(node.name, flags | handle.flags & os.O_NOATIME, upper.at())
            handle.replace(fd)


def _open_as(name: bytes, flags: int, dir_fd: int) -> int:
    try:
        return os.open(name, flags, dir_fd=dir_fd)
    except PermissionError:
        return os.open(name, flags & ~os.O_NOATIME, dir_fd=dir_fd)


def _arrived(stack: Stack, node: Node, st: os.stat_result) -> None:
    """The object of *node* is in the upper now."""
    node.low = None
    stack.changed.append(node)
    if node.parent is not None:
        stack.changed.append(node.parent)  # its ctime, on tmpfs also its size
        assert node.parent.upper is not None
        stack.recount_directory(node.parent.upper)
    if node.flags & nd.NO_XATTRS:
        node.flags |= nd.NO_CAPABILITY
    node.flags &= ~nd.NO_XATTRS
    if st.st_nlink == 1:
        node.flags |= nd.ORIGIN
        return
    # A broken hard link is a file of its own from here on, with a number of its own.
    assert stack.upper is not None
    if node.parent is not None:
        stack.relisted.append(node.parent)
    node.ino = stack.ino_of(stack.stat(node), stack.upper)


# --- what a copy needs --------------------------------------------------------------------------


def room(stack: Stack, *nodes: Node, size: int = 0, inodes: int = 0, names: int = 0) -> Room:
    """Room for bringing *nodes* up with all missing ancestors, and for what is given besides.

    *names*: how many new names get into directories. Without a limit it costs nothing.
    """
    if stack.ledger is None:
        return NO_ROOM
    missing: set[Dir] = set()
    for node in nodes:
        if node.low is not None:
            st = stack.stat(node)
            size += _copy_charge(node, st, st.st_size)
            inodes += 1
            names += 1
        _missing(node, missing)
    names += bool(missing)
    size += len(missing) * stack.ledger.empty_directory + names * NAME_RESERVE
    return stack.ledger.room(size, inodes + len(missing))


def _missing(node: Node, found: set[Dir]) -> None:
    """Add the directories that have to be copied up for *node* to *found*."""
    here = node if isinstance(node, Dir) else node.parent
    while here is not None and here.upper is None:
        found.add(here)
        here = here.parent


def _copy_charge(node: Node, st: os.stat_result, size: int) -> int:
    """What the copy of a lower non-directory takes at most, of its first *size* bytes."""
    if stat.S_ISLNK(st.st_mode):
        return symlink_charge(st.st_size)
    if not node.is_regular or not size:
        return 0
    if charge(st) == round_up(st.st_size):
        return round_up(size)
    low = node.low
    assert low is not None
    fd = low.branch.open_file(node.name, low.at())
    try:
        return sum(round_up(length) for _, length in _pieces(fd, size))
    finally:
        os.close(fd)


# --- data ---------------------------------------------------------------------------------------


def copy_data(src: int, dst: int, size: int) -> None:
    """Copy *size* bytes, leaving out holes between pieces of 1 MiB (ovl_copy_up_file())."""
    pieces = ((0, size),) if _is_dense(src, size) else _pieces(src, size)
    for offset, length in pieces:
        done = 0
        while done < length:
            done += _copy_piece(src, dst, offset + done, min(length - done, _DENSE_CHUNK))
    if os.fstat(dst).st_size < size:
        sc.ftruncate(dst, size)


def _is_dense(fd: int, size: int) -> bool:
    """Whether there is no hole in the first *size* bytes, nor blocks that nobody has written."""
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE) >= size
    except OSError:
        return False


def _pieces(src: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is copied of the first *size* bytes."""
    offset = 0
    while offset < size:
        try:
            offset = max(offset, os.lseek(src, offset, os.SEEK_DATA))
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return  # nothing but a hole up to the end
            if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        if offset >= size:
            return
        length = min(_CHUNK, size - offset)
        yield offset, length
        offset += length


def _copy_piece(src: int, dst: int, offset: int, length: int) -> int:
    try:
        done = sc.copy_range(src, dst, length, offset, offset)
        if done:
            return done
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    data = os.pread(src, min(length, _CHUNK), offset)
    if not data:
        raise oserror(errno.EIO)  # the lower file became shorter under our hands
    view = memoryview(data)
    done = 0
    while done < len(data):
        done += sc.pwrite(dst, view[done:], offset + done)
    return done


# --- metadata -----------------------------------------------------------------------------------


def copy_metadata(
    stack: Stack,
    st: os.stat_result,
    dst: int,
    src: int,
    origin_value: bytes | None,
    *,
    bare: bool = False,
) -> None:
    """Owner, mode, attributes, flags, origin and times for an open new file or directory.

    *bare*: *src* is known to have no attributes.
    Owner first, because chown strips ``security.capability``; mode after the attributes, because
    a server without privilege may need the write bit to set them; times last.
    """
    if (st.st_uid, st.st_gid) != stack.owner_of_new(dst):
        sc.fchown(dst, st.st_uid, st.st_gid)
    if not bare:
        copy_xattrs(stack, src, dst, follow=True)
    copy_flags(stack, src, dst)
    if origin_value is not None:
        set_origin(stack, origin_value, dst, follow=True)
    sc.fchmod(dst, stat.S_IMODE(st.st_mode))
    sc.futimes(dst, st.st_atime_ns, st.st_mtime_ns)


def copy_xattrs(stack: Stack, src: bytes | int, dst: bytes | int, *, follow: bool) -> None:
    """Copy all attributes but our own marks, between paths or open files.

    One that the upper cannot store is left out, except ``security.*`` and ACLs
    (ovl_copy_xattr(), ovl_must_copy_xattr()).
    """
    try:
        keys = [os.fsencode(key) for key in os.listxattr(src, follow_symlinks=follow)]
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return
        raise
    for key in keys:
        if stack.dialect.is_private(key):
            continue
        try:
            value = os.getxattr(src, key, follow_symlinks=follow)
            sc.setxattr(dst, key, value, 0, follow_symlinks=follow)
        except OSError as exc:
            must = key.startswith(ondisk.SECURITY_PREFIX) or key in (
                ondisk.ACL_ACCESS,
                ondisk.ACL_DEFAULT,
            )
            if must or exc.errno not in _SKIPPABLE:
                raise


def copy_flags(stack: Stack, src: int, dst: int) -> None:
    """Copy sync and noatime to the inode, immutable and append-only to ``protattr``.

    Source: ovl_copy_fileattr().
    """
    flags = sc.inode_flags(src)
    if flags & _PROTECTING:
        value = (b"a" if flags & sc.FS_APPEND_FL else b"") + (
            b"i" if flags & sc.FS_IMMUTABLE_FL else b""
        )
        sc.setxattr(dst, stack.dialect.protattr, value, 0)
    if flags & _KEPT_FLAGS:
        sc.set_inode_flags(dst, sc.inode_flags(dst) | flags & _KEPT_FLAGS)


def _origin_of(node: Node) -> bytes:
    """Where a copy of *node* will have come from."""
    if isinstance(node, Dir):
        low = node.lowers[0]
        assert low.parent is not None
        return origin.of_object(low.branch, low.name, low.parent.at())
    assert node.low is not None
    return origin.of_object(node.low.branch, node.name, node.low.at())


def set_origin(stack: Stack, value: bytes, dst: bytes | int, *, follow: bool) -> None:
    """Remember where the copy came from; an upper without attributes does without."""
    try:
        sc.setxattr(dst, stack.dialect.origin, value, 0, follow_symlinks=follow)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise


# --- the operations -----------------------------------------------------------------------------


def may_be_unmapped() -> bool:
    """Whether check_mapped() has anything to find: not in the initial user namespace."""
    return _unmapped is not None


def check_mapped(st: os.stat_result, name: bytes) -> None:
    """EOVERFLOW for an owner without a number in the mounter's user namespace."""
    if _unmapped is not None and (st.st_uid in _unmapped or st.st_gid in _unmapped):
        raise oserror(errno.EOVERFLOW, name)


def _overflow_ids() -> frozenset[int] | None:
    """Ids shown for unmapped owners; None in the initial namespace, where all are mapped."""
    try:
        with open("/proc/self/uid_map", "rb") as uid_map:
            fields = uid_map.read().split()
        if fields[:2] == [b"0", b"0"] and len(fields) == 3 and int(fields[2]) == 0xFFFFFFFF:
            return None
        ids = set()
        for name in ("overflowuid", "overflowgid"):
            with open(f"/proc/sys/kernel/{name}", "rb") as number:
                ids.add(int(number.read()))
    except OSError:
        return frozenset({65534})
    return frozenset(ids)


_unmapped = _overflow_ids()


def directory(stack: Stack, node: Dir) -> RealDir:
    """The upper directory of *node*, copied up with all missing ancestors first."""
    if node.upper is None:
        _copy_chain(stack, node)
    assert node.upper is not None
    return node.upper


def _copy_chain(stack: Stack, node: Dir) -> None:
    if node.flags & nd.DEAD:
        # A removed lower directory: the kernel stumbles over the whiteout in its place.
        raise oserror(errno.ENOTDIR, node.name)
    _ = stack.w  # so the root is in the upper, and the walk ends there at the latest
    chain = []
    here: Dir | None = node
    while here is not None and here.upper is None:
        chain.append(here)
        here = here.parent
    with room(stack, node):
        for missing in reversed(chain):
            _copy_directory(stack, missing)


def _copy_directory(stack: Stack, node: Dir) -> None:
    parent = node.parent
    assert parent is not None
    assert parent.upper is not None
    w = stack.w
    low = node.lowers[0]
    st = os.stat(low.at())
    check_mapped(st, node.name)
    stack.mark_impure(parent)
    name = w.names.next()
    sc.mkdir(name, 0o700, dir_fd=w.work_fd)
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        dst = os.open(name, flags, dir_fd=w.work_fd)
        try:
            src = low.open_list()
            try:
                copy_metadata(stack, st, dst, src, _origin_of(node))
            finally:
                os.close(src)
        finally:
            os.close(dst)
        parent.upper_names.arrives(node.name)
        with _ParentTimes(parent.upper), OwnerMayWrite(stack, parent.upper):
            _move_directory(stack, name, st, node.name, parent.upper)
    except OSError:
        sc.rmdir(name, dir_fd=w.work_fd)
        raise
    node.upper = parent.upper.child(node.name)
    node.upper_names = UpperNames(set())
    node.whiteouts = True
    node.flags &= ~nd.NO_XATTRS
    if stack.ledger is not None:
        stack.ledger.added(os.stat(node.upper.at()))
        stack.recount_directory(parent.upper)
    stack.changed += (node, parent)
    if node.flags & nd.STRAYS:
        node.flags &= ~nd.STRAYS
        stack.relisted.append(node)


def _move_directory(
    stack: Stack, temp: bytes, st: os.stat_result, name: bytes, to: RealDir
) -> None:
    """Publish a directory copy; moving one changes its "..", so it has to be writable itself."""
    work_fd = stack.w.work_fd
    mode = stat.S_IMODE(st.st_mode)
    closed = not stack.policy.overrides_modes and not mode & stat.S_IWUSR
    if closed:
        sc.chmod(temp, work_fd, mode | stat.S_IRWXU)
    sc.rename(temp, work_fd, name, to.at(), sc.RENAME_NOREPLACE)
    if closed:
        sc.chmod(name, to.at(), mode)


def prepare(
    stack: Stack, node: Node, *, limit: int | None = None, nameless: bool = False
) -> CopyJob | None:
    """First step for a non-directory. A regular file gives a job; anything else is complete.

    None when there is nothing left to do. *limit*: bytes wanted at most (0 for O_TRUNC).
    *nameless*: a regular file whose name has gone gets a copy without one, because somebody may
    write to it who opened it before; the kernel's overlay has copied it at that open.
    Raises EROFS, EOVERFLOW, EPERM, ENOSPC, EDQUOT ...; nothing visible has changed then, except
    that ancestors may be in the upper.
    """
    if node.low is None:
        return None
    w = stack.w
    parent = node.parent
    if parent is None and nameless and node.is_regular:
        st = stack.stat(node)
        check_mapped(st, node.name)
        size = st.st_size if limit is None else min(limit, st.st_size)
        return CopyJob(stack, node, st, size, nameless=True)
    if parent is None:
        was_in = node.last_parent
        if was_in is None or was_in.flags & nd.DEAD:
            raise oserror(errno.ENOENT, node.name)
        # The kernel gets this far before it finds the whiteout in the way.
        stack.mark_impure(was_in)
        raise oserror(errno.EEXIST, node.name)
    st = stack.stat(node)
    check_mapped(st, node.name)
    size = st.st_size if limit is None else min(limit, st.st_size)
    needed = NO_ROOM
    if stack.ledger is not None:
        charged = _copy_charge(node, st, size)
        needed = room(stack, parent, size=charged, inodes=1, names=1)
    with needed:
        directory(stack, parent)
        stack.mark_impure(parent)
        if node.is_regular:
            return CopyJob(stack, node, st, size, needed)
        _copy_special(stack, node, st, w.names.next())
    return None


def _copy_special(stack: Stack, node: Node, st: os.stat_result, temp: bytes) -> None:
    """Symlink, fifo, socket or device: made in the work directory and moved into place."""
    assert node.low is not None
    assert node.parent is not None
    work_fd = stack.w.work_fd
    upper = node.parent.upper
    assert upper is not None
    is_link = stat.S_ISLNK(st.st_mode)
    if is_link:
        sc.symlink(os.readlink(node.name, dir_fd=node.low.at()), temp, dir_fd=work_fd)
    else:
        sc.mknod(temp, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=work_fd)
    try:
        sc.chown(temp, st.st_uid, st.st_gid, dir_fd=work_fd, follow_symlinks=False)
        if not is_link:
            sc.chmod(temp, work_fd, stat.S_IMODE(st.st_mode))
        src = sc.entry_path(node.low.at(), node.name)
        dst = sc.entry_path(work_fd, temp)
        copy_xattrs(stack, src, dst, follow=False)
        if st.st_nlink == 1:
            set_origin(stack, _origin_of(node), dst, follow=False)
        sc.utimes(temp, work_fd, st.st_atime_ns, st.st_mtime_ns)
        node.parent.upper_names.arrives(node.name)
        with _ParentTimes(upper), OwnerMayWrite(stack, upper):
            sc.rename(temp, work_fd, node.name, upper.at(), sc.RENAME_NOREPLACE)
    except OSError:
        _discard(stack, temp)
        raise
    if stack.ledger is not None:
        stack.ledger.added(sc.lstat_at(node.name, upper.at()))
    _arrived(stack, node, st)


def whole(stack: Stack, node: Node, *, limit: int | None = None) -> None:
    """All steps at once, for callers that may wait."""
    if isinstance(node, Dir):
        directory(stack, node)
        return
    job = prepare(stack, node, limit=limit)
    if job is not None:
        try:
            job.run()
            job.publish()
        finally:
            job.close()

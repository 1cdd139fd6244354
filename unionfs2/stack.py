"""The stack of branches and the lookup of names in it.

Lookup follows ovl_lookup() and ovl_lookup_single() of fs/overlayfs/namei.c: from the upper down
through the lower directories of the parent, ended by a whiteout, by a non-directory, or by an
opaque directory; redirect marks change the name or start again at the roots.

What this module refuses to know: how anything is changed. The one thing it writes is the
``origin`` of a merged upper directory that has none, because the kernel does so at lookup.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from . import nodes as nd
from . import ondisk, origin, whiteout
from . import syscalls as sc
from .branch import Branch, FdCache, RealDir
from .nodes import Dir, Node, NodeTable
from .quota import Ledger
from .walk import Walk, first_of, is_opaque, positions_from
from .walk import oserror as oserror
from .whiteout import Dialect, TempNames, WhiteoutMaker

_S_IFDIR = stat.S_IFDIR
_S_IFREG = stat.S_IFREG
_S_IFCHR = stat.S_IFCHR
_S_IFMT = 0o170000
_INO_BITS = 56
_NO_CLONES = (0xEF53, 0x01021994)  # ext2/3/4, tmpfs (linux/magic.h)
_OWNER_WX = stat.S_IWUSR | stat.S_IXUSR

Found = tuple[Node, os.stat_result]


def _no_fd(_: Node) -> int:
    return -1


class Policy(NamedTuple):
    """What the mount options say to the core."""

    follow_redirects: bool = True
    keeps_atime: bool = True
    volatile: bool = False
    read_only: bool = False
    overrides_modes: bool = True
    follow_metacopy: bool = False


class OwnerMayWrite:
    """For a server without CAP_DAC_OVERRIDE: write to a directory that its owner may not change.

    The kernel's overlay has the mounter's rights in there; a plain user gets them for the moment
    of the change. The mode is right again before anybody is answered.
    """

    __slots__ = ("_fd", "_mode")

    def __init__(self, stack: Stack, directory: RealDir) -> None:
        self._fd = -1
        if stack.policy.overrides_modes:
            return
        fd = directory.at()
        st = os.stat(fd)
        if st.st_mode & _OWNER_WX != _OWNER_WX and st.st_uid == os.geteuid():
            self._fd = fd
            self._mode = stat.S_IMODE(st.st_mode)

    def __enter__(self) -> None:
        if self._fd >= 0:
            sc.chmod_fd(self._fd, self._mode | _OWNER_WX)

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            sc.chmod_fd(self._fd, self._mode)


class Writable(NamedTuple):
    """What a mount with an upper has beside it."""

    root: RealDir
    work_fd: int
    names: TempNames
    whiteouts: WhiteoutMaker


class Stack:
    """Branches, dialect and node table of one mount; every operation module works on one."""

    def __init__(
        self,
        lowers: list[Branch],
        upper: Branch | None,
        work_fd: int,
        dialect: Dialect,
        cache: FdCache,
        policy: Policy,
    ) -> None:
        self.lowers = lowers
        self.upper = upper
        self.dialect = dialect
        self.cache = cache
        self.policy = policy
        self.nodes = NodeTable()
        self.mixed_fs = any(b.fs_index for b in lowers)
        # Whether lower directories can be opened and read without a trace.
        self.untouched = all(b.untouched for b in lowers)
        branches = [upper, *lowers] if upper is not None else lowers
        self.name_max = max(os.fstatvfs(b.root_fd).f_namemax for b in branches)
        # Whether copies may share data with the originals: not on file systems that never can.
        self.clones = upper is not None and sc.fs_magic(upper.root_fd) not in _NO_CLONES
        # Counts what the upper holds; None without a limit.
        self.ledger: Ledger | None = None
        # A door may have a descriptor of a node that loses its name (-1: it has none).
        self.spare_fd: Callable[[Node], int] = _no_fd
        # The name that was not found last: who creates it asks again at once.
        self._absent: tuple[Dir, bytes] | None = None
        # Nodes whose attributes copy-up changed; a door that caches empties the list.
        self.changed: list[Node] = []
        # Directories whose listing copy-up changed although no name came or went; likewise.
        self.relisted: list[Dir] = []
        self._new_owner: tuple[int, int] | None = None
        self._writable: Writable | None = None
        if upper is not None:
            names = TempNames()
            makers = WhiteoutMaker(work_fd, names)
            self._writable = Writable(upper.root, work_fd, names, makers)
        self.root = self._make_root()

    @property
    def w(self) -> Writable:
        """The upper and what belongs to it; EROFS on a mount that must not change."""
        if self._writable is None or self.policy.read_only:
            raise oserror(errno.EROFS)
        return self._writable

    def close(self) -> None:
        """Leave the work directory as empty as it was found."""
        for node in self.nodes.by_id.values():
            if node.orphan >= 0:
                os.close(node.orphan)
                node.orphan = -1
        if self._writable is not None:
            self._writable.whiteouts.close()

    def _make_root(self) -> Dir:
        top = self.upper if self.upper is not None else self.lowers[0]
        ino = os.stat(top.root_fd).st_ino
        lowers = tuple(b.root for b in self.lowers)
        root = Dir(ino, self.upper.root if self.upper is not None else None, lowers, whiteouts=True)
        for low in lowers:
            if self._has_xwhiteouts(low.at()):
                low.branch.xwhiteouts = root.xwhiteouts = True
        if root.upper is not None:
            keys = [os.fsencode(key) for key in os.listxattr(sc.fd_path(root.upper.at()))]
            root.impure = self.dialect.impure in keys
        self.nodes.add(root, None, b"")
        root.lookups = 1
        return root

    def _has_xwhiteouts(self, fd: int) -> bool:
        try:
            return os.getxattr(sc.fd_path(fd), self.dialect.opaque) == ondisk.OPAQUE_XWHITEOUTS
        except OSError:
            return False

    def owner_of_new(self, fd: int) -> tuple[int, int]:
        """(uid, gid) of what this process makes in the work directory, such as *fd*."""
        if self._new_owner is None:
            st = os.fstat(fd)
            self._new_owner = st.st_uid, st.st_gid
        return self._new_owner

    # --- inode numbers -----------------------------------------------------------------------

    def ino_of(self, st: os.stat_result, branch: Branch) -> int:
        """st_ino as the view shows it: real on one file system, else with its number on top."""
        if self.mixed_fs and branch.fs_index:
            return st.st_ino | branch.fs_index << _INO_BITS
        return st.st_ino

    # --- attributes --------------------------------------------------------------------------

    def place(self, node: Node) -> tuple[int, bytes]:
        """(directory descriptor, name) under which the object of an attached non-root lives."""
        low = node.low
        if low is not None:
            return low.at(), node.name
        parent = node.parent
        if parent is None:
            raise oserror(errno.ESTALE, node.name)
        if node.is_dir:
            top = node.top  # type: ignore[attr-defined]
            return top.parent.at(), top.name
        upper = parent.upper
        assert upper is not None
        return upper.at(), node.name

    def stat(self, node: Node) -> os.stat_result:
        """Attributes of the real object; inode number and link count are the node's affair."""
        if node.is_dir:
            top = node.top  # type: ignore[attr-defined]
            if top.fd >= 0:
                return os.stat(top.fd)
        if node.orphan >= 0:
            return os.stat(node.orphan)
        dir_fd, name = self.place(node)
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    # --- the limit ---------------------------------------------------------------------------

    def before(self, node: Node) -> os.stat_result | None:
        """What recount() has to know from before a change; None where nothing is counted."""
        return None if self.ledger is None else self.stat(node)

    def recount(self, node: Node, before: os.stat_result | None) -> None:
        """After the blocks of the upper object of *node* may have changed."""
        if before is None or self.ledger is None or node.flags & nd.DEAD:
            return
        after = self.stat(node)
        if after.st_nlink or node.handles:
            self.ledger.changed(before, after)

    def recount_directory(self, directory: RealDir) -> None:
        """After names came to or went from a directory of the upper, or marks did."""
        if self.ledger is not None:
            self.ledger.directory_changed(directory.at())

    # --- paths ---------------------------------------------------------------------------------

    def object_path(self, node: Node) -> tuple[bytes, bool]:
        """(path, follow) for calls without an *at form, of the object itself."""
        if node.orphan >= 0:
            return sc.fd_path(node.orphan), True
        if node.is_dir:
            return sc.fd_path(node.top.at()), True  # type: ignore[attr-defined]
        dir_fd, name = self.place(node)
        return sc.entry_path(dir_fd, name), False

    # --- lookup ------------------------------------------------------------------------------

    def lookup(self, parent: Dir, name: bytes) -> Found | None:
        """The visible entry *name* of *parent*, None when there is none.

        Raises ENAMETOOLONG, EPERM for what this mount must not show (metacopy, redirect with
        nofollow), EINVAL for a malformed redirect, EIO for an origin of another type.
        """
        node = parent.children.get(name)
        if node is not None:
            return node, self.stat(node)
        if len(name) > self.name_max:
            raise oserror(errno.ENAMETOOLONG, name)
        upper = parent.upper
        if upper is not None:
            if parent.flags & nd.DEAD:
                return None  # another directory may have its name by now
            known = parent.upper_names
            if not known.lack(name):
                st = sc.lstat_or_none(name, upper.at())
                if st is not None:
                    if st.st_mode & _S_IFMT == _S_IFDIR:
                        return self._upper_dir(parent, name, st)
                    return self._upper_object(parent, name, st)
                known.missed(upper)
        holders = parent.holders(name)
        if not holders:
            self._absent = (parent, name)
            return None
        low = parent.lowers[(holders & -holders).bit_length() - 1]
        try:
            st = os.stat(name, dir_fd=low.at(), follow_symlinks=False)
        except FileNotFoundError:
            parent.misses += 1
            found = first_of(parent, name, holders & (holders - 1))
            if found is None:
                self._absent = (parent, name)
                return None
            holders, st = found
            low = parent.lowers[(holders & -holders).bit_length() - 1]
        if st.st_mode & _S_IFMT == _S_IFDIR:
            return self._lower_dir(parent, name, st, holders)
        return self._lower_object(parent, name, st, low)

    def is_absent(self, parent: Dir, name: bytes) -> bool:
        """Whether there is no visible entry *name*; free if that was the last thing looked up."""
        if self._absent == (parent, name):
            self._absent = None
            return True
        found = self.lookup(parent, name)
        self._absent = None
        return found is None

    def require(self, parent: Dir, name: bytes) -> Found:
        """lookup() that raises ENOENT."""
        found = self.lookup(parent, name)
        if found is None:
            raise oserror(errno.ENOENT, name)
        return found

    def _lower_object(
        self, parent: Dir, name: bytes, st: os.stat_result, low: RealDir
    ) -> Found | None:
        kind = st.st_mode & _S_IFMT
        flags = 0
        if kind == _S_IFREG:
            keys = sc.listxattr_at(name, low.at())
            if not keys:
                flags = nd.NO_XATTRS
            elif self.dialect.metacopy in keys and not self.policy.follow_metacopy:
                raise oserror(errno.EPERM, name)
            elif st.st_size == 0 and self.dialect.whiteout in keys:
                return None
        elif kind == _S_IFCHR and st.st_rdev == 0:
            return None
        branch = low.branch
        if st.st_nlink > 1 and self.upper is None:
            return self._shared(parent, name, st, low, flags)
        node = Node(kind, self.ino_of(st, branch), low, flags)
        self.nodes.add(node, parent, name)
        return node, st

    def _shared(
        self, parent: Dir, name: bytes, st: os.stat_result, low: RealDir | None, flags: int
    ) -> Found:
        """One node for all names of an object that cannot be copied up any more."""
        key = (st.st_dev, st.st_ino)
        node = self.nodes.by_inode.get(key)
        if node is not None:
            self.nodes.attach(node, parent, name)
            return node, st
        branch = low.branch if low is not None else self.upper
        assert branch is not None
        node = Node(st.st_mode & _S_IFMT, self.ino_of(st, branch), low, flags)
        self.nodes.add(node, parent, name)
        self.nodes.link_key(node, key)
        return node, st

    def _upper_object(self, parent: Dir, name: bytes, st: os.stat_result) -> Found | None:
        assert parent.upper is not None
        upper_fd = parent.upper.fd
        kind = st.st_mode & _S_IFMT
        if kind == _S_IFCHR and st.st_rdev == 0:
            return None
        shared = st.st_nlink > 1
        if self.nodes.by_inode:
            # Also with one link left: the name under which the object was known may be the one
            # that went.
            node = self.nodes.by_inode.get((st.st_dev, st.st_ino))
            if node is not None:
                self.nodes.attach(node, parent, name)
                return node, st
        keys = sc.listxattr_at(name, upper_fd)
        flags = 0 if keys else nd.NO_XATTRS
        assert self.upper is not None
        ino = self.ino_of(st, self.upper)
        if keys:
            dialect = self.dialect
            if kind == _S_IFREG:
                if dialect.metacopy in keys:
                    raise oserror(errno.EPERM, name)
                if st.st_size == 0 and dialect.whiteout in keys:
                    return None
            if dialect.origin in keys:
                known = self._origin_ino(name, upper_fd, st)
                if known is not None:
                    ino = known
                    flags |= nd.ORIGIN
            flags |= self._protection(name, upper_fd, keys)
        node = Node(kind, ino, None, flags | nd.PROTECTION_KNOWN)
        self.nodes.add(node, parent, name)
        if shared:
            self.nodes.link_key(node, (st.st_dev, st.st_ino))
        return node, st

    def _origin_ino(self, name: bytes, upper_fd: int, st: os.stat_result) -> int | None:
        raw = sc.getxattr_at(name, upper_fd, self.dialect.origin)
        found = origin.resolve(raw, self.lowers) if raw else None
        if found is None:
            return None
        low, branch = found
        if whiteout.is_device(low):
            return None
        if not origin.same_type(low.st_mode, st.st_mode):
            raise oserror(errno.EIO, name)
        # A lower file with several names is broken by copy-up: its number is not the copy's.
        return self.ino_of(low, branch) if low.st_nlink == 1 else None

    def _protection(self, name: bytes, dir_fd: int, keys: list[bytes]) -> int:
        if self.dialect.protattr not in keys:
            return 0
        value = sc.getxattr_at(name, dir_fd, self.dialect.protattr)
        flags = nd.APPEND_ONLY if b"a" in value else 0
        return flags | (nd.IMMUTABLE if b"i" in value else 0)

    # --- directories -------------------------------------------------------------------------

    def _upper_dir(self, parent: Dir, name: bytes, st: os.stat_result) -> Found:
        assert parent.upper is not None
        assert self.upper is not None
        upper_fd = parent.upper.at()
        keys = sc.listxattr_at(name, upper_fd)
        dialect = self.dialect
        walk = Walk(self, parent.lowers, name)
        if keys:
            if self.is_opaque(name, upper_fd, keys):
                walk.stop = True
            elif dialect.redirect in keys:
                walk.redirect(name, upper_fd)
        if walk.redirected:
            lowers = walk.run(positions_from(0, len(walk.parents)), None)
        else:
            lowers = walk.run(0 if walk.stop else parent.holders(name), None)
            parent.misses += walk.absent
        ino = self.ino_of(st, self.upper)
        has_origin = dialect.origin in keys
        if lowers:
            assert walk.top is not None
            ino = self.ino_of(walk.top, lowers[0].branch)
            if not has_origin:
                self._fix_origin(parent, name, lowers[0])
        node = Dir(
            ino, parent.upper.child(name), tuple(lowers), whiteouts=bool(lowers) or has_origin
        )
        node.impure = dialect.impure in keys
        node.xwhiteouts = walk.xwhiteouts
        node.index = walk.names
        node.flags |= self._protection(name, upper_fd, keys) | nd.PROTECTION_KNOWN
        self.nodes.add(node, parent, name)
        return node, st

    def _lower_dir(self, parent: Dir, name: bytes, st: os.stat_result, holders: int) -> Found:
        walk = Walk(self, parent.lowers, name)
        lowers = walk.run(holders, st)
        parent.misses += walk.absent
        node = Dir(
            self.ino_of(st, lowers[0].branch), None, tuple(lowers), whiteouts=len(lowers) > 1
        )
        node.xwhiteouts = walk.xwhiteouts
        node.index = walk.names
        self.nodes.add(node, parent, name)
        return node, st

    def is_opaque(self, name: bytes, dir_fd: int, keys: list[bytes]) -> bool:
        """Whether the directory *name* with attributes *keys* hides what is below it."""
        return is_opaque(self.dialect, name, dir_fd, keys)

    def _fix_origin(self, parent: Dir, name: bytes, low: RealDir) -> None:
        """Store the origin of a merged upper directory that has none (ovl_fix_origin()).

        Best effort: a read-only upper file system must not make the lookup fail.
        """
        assert parent.upper is not None
        assert low.parent is not None
        try:
            value = origin.of_object(low.branch, low.name, low.parent.at())
            sc.setxattr_at(name, parent.upper.at(), self.dialect.origin, value)
            self.mark_impure(parent)
            if self.ledger is not None:
                st = sc.lstat_at(name, parent.upper.at())
                self.ledger.changed(st, st)
        except OSError:
            return

    def mark_impure(self, parent: Dir) -> None:
        """Say that *parent* may hold objects with an origin (ovl_set_impure())."""
        if parent.impure or parent.upper is None:
            return
        with OwnerMayWrite(self, parent.upper):
            sc.setxattr(sc.fd_path(parent.upper.at()), self.dialect.impure, ondisk.IMPURE_YES)
        parent.impure = True
        self.recount_directory(parent.upper)

    # --- what lies below ----------------------------------------------------------------------

    def lower_positive(self, parent: Dir, name: bytes) -> bool:
        """Whether removing *name* from the upper would bring a lower one back.

        The first lower directory that has the name decides (ovl_lower_positive()).
        """
        found = first_of(parent, name, parent.holders(name))
        if found is None:
            return False
        holders, st = found
        low = parent.lowers[(holders & -holders).bit_length() - 1]
        return not whiteout.is_whiteout(self.dialect, st, name, low.at())

    def upper_whiteout(self, parent: Dir, name: bytes) -> bool:
        """Whether the upper directory of *parent* holds a whiteout called *name*."""
        if parent.upper is None or parent.upper_names.lack(name):
            return False
        dir_fd = parent.upper.at()
        st = sc.lstat_or_none(name, dir_fd)
        return st is not None and whiteout.is_whiteout(self.dialect, st, name, dir_fd)

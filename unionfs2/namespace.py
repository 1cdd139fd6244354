"""Making and removing names: create, mknod, mkdir, symlink, link, unlink, rmdir.

Every way in which a name comes to exist goes through ``_make``: directly in the upper directory
when nothing is in the way, through the work directory when a whiteout has to be replaced
(ovl_create_or_link() in fs/overlayfs/dir.c). Every way in which a name goes, goes through
``_drop``.

Invariant: after each single system call the merged view shows the state before or after the
operation, never a third one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from . import acl, copyup, merge, ondisk, protect
from . import nodes as nd
from . import syscalls as sc
from .creds import Actor
from .model import Caller
from .names import UpperNames
from .nodes import Dir, Node
from .quota import symlink_charge
from .stack import Found, Stack, oserror

# Makes the object called name in a directory: (name, dir_fd, mode) -> None.
_Maker = Callable[[bytes, int, int], None]


class Creator:
    """Creation on behalf of callers."""

    __slots__ = ("_actor", "_stack")

    def __init__(self, stack: Stack, actor: Actor) -> None:
        self._stack = stack
        self._actor = actor

    # --- new objects -------------------------------------------------------------------------

    def create(
        self, parent: Dir, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """A regular file, opened with *flags*; gives its descriptor, too."""
        opened: list[int] = []
        flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

        def make(at_name: bytes, dir_fd: int, bits: int) -> None:
            opened.append(sc.create_at(at_name, flags, bits, dir_fd=dir_fd))

        try:
            node, st = self._make(parent, name, stat.S_IFREG | stat.S_IMODE(mode), caller, make)
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        return node, st, opened[0]

    def tmpfile(
        self, parent: Dir, mode: int, flags: int, caller: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """A regular file without a name (O_TMPFILE), open; it may get one by link().

        EOPNOTSUPP where the upper has no such files. Source: ovl_tmpfile() in fs/overlayfs/dir.c.
        """
        stack = self._stack
        _ = stack.w
        if parent.flags & nd.DEAD:
            raise oserror(errno.ENOENT, parent.name)
        copyup.check_mapped(stack.stat(parent), parent.name)
        flags = flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW) | os.O_TMPFILE | os.O_CLOEXEC
        with copyup.room(stack, parent, inodes=1):
            upper_fd = copyup.directory(stack, parent).at()
            with self._actor.acting(caller):
                fd = sc.create_at(b".", flags, stat.S_IMODE(mode), dir_fd=upper_fd)
            st = os.fstat(fd)
            if not self._actor.may_switch and st.st_gid != caller.gid:
                st = self._give_group_to(fd, parent, caller, st)
        assert stack.upper is not None
        node = Node(stat.S_IFREG, stack.ino_of(st, stack.upper), None, nd.NO_CAPABILITY)
        node.flags |= nd.PROTECTION_KNOWN
        node.orphan = sc.reopen(fd, os.O_PATH)
        stack.nodes.add(node, None, b"")
        return node, st, fd

    def _give_group_to(
        self, fd: int, parent: Dir, caller: Caller, st: os.stat_result
    ) -> os.stat_result:
        if not self._stack.stat(parent).st_mode & stat.S_ISGID:
            try:
                sc.fchown(fd, -1, caller.gid)
            except PermissionError:
                return st
        return os.fstat(fd)

    def mknod(self, parent: Dir, name: bytes, mode: int, rdev: int, caller: Caller) -> Found:
        """File, fifo, socket or device; a character device 0:0 is EPERM (ovl_mknod())."""
        if stat.S_ISCHR(mode) and rdev == 0:
            raise oserror(errno.EPERM, name)
        if stat.S_IFMT(mode) == 0:
            mode |= stat.S_IFREG

        def make(at_name: bytes, dir_fd: int, bits: int) -> None:
            sc.mknod(at_name, bits, rdev, dir_fd=dir_fd)

        return self._make(parent, name, mode, caller, make)

    def symlink(self, parent: Dir, name: bytes, target: bytes, caller: Caller) -> Found:
        def make(at_name: bytes, dir_fd: int, _: int) -> None:
            sc.symlink(target, at_name, dir_fd=dir_fd)

        size = symlink_charge(len(target))
        return self._make(parent, name, stat.S_IFLNK | 0o777, caller, make, size)

    def mkdir(self, parent: Dir, name: bytes, mode: int, caller: Caller) -> Found:
        def make(at_name: bytes, dir_fd: int, bits: int) -> None:
            sc.mkdir(at_name, stat.S_IMODE(bits), dir_fd=dir_fd)

        ledger = self._stack.ledger
        size = 0 if ledger is None else ledger.empty_directory
        return self._make(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), caller, make, size)

    def _make(
        self, parent: Dir, name: bytes, mode: int, caller: Caller, make: _Maker, size: int = 0
    ) -> Found:
        """*size*: bytes that the object takes, where somebody counts."""
        self._check_new(parent, name)
        with copyup.room(self._stack, parent, size=size, inodes=1, names=1):
            return self._make_now(parent, name, mode, caller, make)

    def _make_now(self, parent: Dir, name: bytes, mode: int, caller: Caller, make: _Maker) -> Found:
        stack = self._stack
        upper = copyup.directory(stack, parent)
        upper_fd = upper.at()
        parent.upper_names.arrives(name)
        opaque = False
        try:
            with self._actor.acting(caller):
                make(name, upper_fd, mode)
        except FileExistsError:
            if not stack.upper_whiteout(parent, name):
                raise
            self._over_whiteout(parent, name, mode, caller, make)
            opaque = stat.S_ISDIR(mode)
        st = sc.lstat_at(name, upper_fd)
        st = self._give_group(parent, name, upper_fd, caller, st)
        if stack.ledger is not None:
            stack.ledger.added(st)
            stack.recount_directory(upper)
        node = self._new_node(parent, name, st)
        if opaque:
            node.flags |= nd.OPAQUE
        stack.nodes.add(node, parent, name)
        return node, st

    def _check_new(self, parent: Dir, name: bytes) -> None:
        stack = self._stack
        _ = stack.w
        if parent.flags & nd.DEAD:
            raise oserror(errno.ENOENT, name)
        if not stack.is_absent(parent, name):
            raise oserror(errno.EEXIST, name)
        protect.check_add(stack, parent)
        if copyup.may_be_unmapped():
            copyup.check_mapped(stack.stat(parent), name)

    def _new_node(self, parent: Dir, name: bytes, st: os.stat_result) -> Node:
        stack = self._stack
        assert parent.upper is not None
        assert stack.upper is not None
        ino = stack.ino_of(st, stack.upper)
        if stat.S_ISDIR(st.st_mode):
            made = Dir(ino, parent.upper.child(name), (), whiteouts=False)
            made.upper_names = UpperNames(set())
            node: Node = made
        else:
            node = Node(stat.S_IFMT(st.st_mode), ino, None, nd.NO_CAPABILITY)
        node.flags |= nd.PROTECTION_KNOWN
        return node

    def _give_group(
        self, parent: Dir, name: bytes, dir_fd: int, caller: Caller, st: os.stat_result
    ) -> os.stat_result:
        """A server that may not switch ids gives the caller's group afterwards."""
        if self._actor.may_switch or st.st_gid == caller.gid:
            return st
        if self._stack.stat(parent).st_mode & stat.S_ISGID:
            return st
        try:
            sc.chown(name, -1, caller.gid, dir_fd=dir_fd, follow_symlinks=False)
        except PermissionError:
            return st
        return sc.lstat_at(name, dir_fd)

    def _over_whiteout(
        self, parent: Dir, name: bytes, mode: int, caller: Caller, make: _Maker
    ) -> None:
        """Made in the work directory, then moved over the whiteout (ovl_create_over_whiteout()).

        What the backing file system would have done in the parent is done by hand: group of a
        setgid parent, default ACL, umask.
        """
        stack = self._stack
        assert parent.upper is not None
        upper_fd = parent.upper.at()
        mark = None if stack.ledger is None else sc.lstat_at(name, upper_fd)
        parent_st = os.stat(upper_fd)
        default = _default_acl(upper_fd) if not stat.S_ISLNK(mode) else None
        access = None
        if default is not None:
            mode, access = acl.inherit(default, mode)
        elif not stat.S_ISLNK(mode):
            mode &= ~caller.umask
        gid = None
        if parent_st.st_mode & stat.S_ISGID:
            gid = parent_st.st_gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        work_fd = stack.w.work_fd
        temp = stack.w.names.next()
        with self._actor.acting(caller, gid, umask=False):
            make(temp, work_fd, mode)
        try:
            self._finish_temp(temp, mode, access, default)
            if stat.S_ISDIR(mode):
                sc.setxattr_at(temp, work_fd, stack.dialect.opaque, ondisk.OPAQUE_YES)
                sc.rename(temp, work_fd, name, upper_fd, sc.RENAME_EXCHANGE)
            else:
                sc.rename(temp, work_fd, name, upper_fd)
        except OSError:
            _remove_temp(stack, temp, is_dir=stat.S_ISDIR(mode))
            raise
        if mark is not None:
            removed(stack, mark)
        if stat.S_ISDIR(mode):
            _remove_temp(stack, temp, is_dir=False)

    def _finish_temp(
        self, temp: bytes, mode: int, access: bytes | None, default: bytes | None
    ) -> None:
        work_fd = self._stack.w.work_fd
        if stat.S_ISLNK(mode):
            return
        st = sc.lstat_at(temp, work_fd)
        if st.st_mode != mode:
            sc.chmod(temp, work_fd, stat.S_IMODE(mode))
        if access is not None:
            sc.setxattr_at(temp, work_fd, ondisk.ACL_ACCESS, access)
        if default is not None and stat.S_ISDIR(mode):
            sc.setxattr_at(temp, work_fd, ondisk.ACL_DEFAULT, default)

    # --- hard links --------------------------------------------------------------------------

    def link(self, node: Node, parent: Dir, name: bytes) -> Found:
        """A further name for a non-directory, which is copied up first (ovl_link())."""
        stack = self._stack
        if node.is_dir:
            raise oserror(errno.EPERM, name)
        self._check_new(parent, name)
        protect.check_metadata(stack, node)
        if node.parent is None and node.low is not None:
            raise oserror(errno.ENOENT, name)
        with copyup.room(stack, node, parent, names=1):
            return self._link_now(node, parent, name)

    def _link_now(self, node: Node, parent: Dir, name: bytes) -> Found:
        stack = self._stack
        copyup.whole(stack, node)
        upper = copyup.directory(stack, parent)
        upper_fd = upper.at()
        if node.flags & nd.ORIGIN:
            stack.mark_impure(parent)
        parent.upper_names.arrives(name)
        try:
            self._link_to(node, name, upper_fd)
        except FileExistsError:
            if not stack.upper_whiteout(parent, name):
                raise
            mark = None if stack.ledger is None else sc.lstat_at(name, upper_fd)
            temp = stack.w.names.next()
            self._link_to(node, temp, stack.w.work_fd)
            try:
                sc.rename(temp, stack.w.work_fd, name, upper_fd)
            except OSError:
                _remove_temp(stack, temp, is_dir=False)
                raise
            if mark is not None:
                removed(stack, mark)
        stack.recount_directory(upper)
        st = sc.lstat_at(name, upper_fd)
        stack.nodes.link_key(node, (st.st_dev, st.st_ino))
        stack.nodes.attach(node, parent, name)
        return node, st

    def _link_to(self, node: Node, name: bytes, dir_fd: int) -> None:
        if node.orphan >= 0:
            # Unlinked: the kernel answers ENOENT for link count 0 by itself.
            sc.link_fd(node.orphan, name, dir_fd)
            return
        from_fd, from_name = self._stack.place(node)
        sc.link(from_name, from_fd, name, dir_fd)

    # --- removal -----------------------------------------------------------------------------

    def unlink(self, parent: Dir, name: bytes) -> Node:
        """Remove a non-directory; leaves a whiteout where a lower object would come back."""
        stack = self._stack
        _ = stack.w
        node, st = stack.require(parent, name)
        if node.is_dir:
            raise oserror(errno.EISDIR, name)
        protect.check_remove(stack, parent, node)
        hide = node.low is not None or stack.lower_positive(parent, name)
        upper = copyup.directory(stack, parent)
        upper_fd = upper.at()
        with Keeping(stack, node, parent, name):
            if node.low is not None:
                parent.upper_names.arrives(name)
                stack.w.whiteouts.put(name, upper_fd)
            elif hide:
                self._replace_by_whiteout(name, upper_fd)
            else:
                sc.unlink(name, dir_fd=upper_fd)
                parent.upper_names.went(name)
        given_back(stack, node, st)
        stack.recount_directory(upper)
        dropped(stack, node, parent, name)
        return node

    def _replace_by_whiteout(self, name: bytes, upper_fd: int, flags: int = 0) -> bytes:
        w = self._stack.w
        temp = w.whiteouts.temp()
        try:
            sc.rename(temp, w.work_fd, name, upper_fd, flags)
        except OSError:
            _remove_temp(self._stack, temp, is_dir=False)
            raise
        return temp

    def rmdir(self, parent: Dir, name: bytes) -> Node:
        """Remove a directory that looks empty (ovl_do_remove())."""
        stack = self._stack
        _ = stack.w
        node, st = stack.require(parent, name)
        if not isinstance(node, Dir):
            raise oserror(errno.ENOTDIR, name)
        protect.check_remove(stack, parent, node)
        hide = node.upper is None or stack.lower_positive(parent, name)
        marks: list[bytes] = []
        if hide or not node.pure_upper:
            marks = merge.whiteouts_of_empty(stack, node)
        upper = copyup.directory(stack, parent)
        upper_fd = upper.at()
        with Keeping(stack, node, parent, name):
            if node.upper is None:
                parent.upper_names.arrives(name)
                stack.w.whiteouts.put(name, upper_fd)
            elif hide:
                temp = self._replace_by_whiteout(name, upper_fd, sc.RENAME_EXCHANGE)
                discard_directory(stack, temp, marks)
            elif marks:
                temp = stack.w.names.next()
                sc.rename(name, upper_fd, temp, stack.w.work_fd)
                discard_directory(stack, temp, marks)
            else:
                sc.rmdir(name, dir_fd=upper_fd)
        given_back(stack, node, st)
        stack.recount_directory(upper)
        dropped(stack, node, parent, name)
        node.flags |= nd.DEAD
        return node


def _default_acl(dir_fd: int) -> bytes | None:
    try:
        return os.getxattr(sc.fd_path(dir_fd), ondisk.ACL_DEFAULT)
    except OSError:
        return None


def _remove_temp(stack: Stack, temp: bytes, *, is_dir: bool) -> None:
    """Best effort: whatever stays in the work directory is removed by the next mount."""
    try:
        if is_dir:
            sc.rmdir(temp, dir_fd=stack.w.work_fd)
        else:
            sc.unlink(temp, dir_fd=stack.w.work_fd)
    except OSError:
        return


def discard_directory(stack: Stack, temp: bytes, marks: list[bytes]) -> None:
    """Delete a directory that was moved to the work directory; it holds whiteouts at most."""
    try:
        fd = sc.open_dir(temp, stack.w.work_fd)
        try:
            for mark in marks:
                if stack.ledger is not None:
                    removed(stack, sc.lstat_at(mark, fd))
                sc.unlink(mark, dir_fd=fd)
        finally:
            os.close(fd)
    except OSError:
        pass
    _remove_temp(stack, temp, is_dir=True)


def removed(stack: Stack, st: os.stat_result) -> None:
    """Give back an object of the upper whose name went, if that was the last one."""
    if stack.ledger is not None and (stat.S_ISDIR(st.st_mode) or st.st_nlink == 1):
        stack.ledger.removed(st)


def given_back(stack: Stack, node: Node | None, st: os.stat_result) -> None:
    """A name of *node*, or of a whiteout, went from the disk; *st* is from before.

    What is open stays counted until its last handle is closed (files.release()).
    """
    if node is None or (node.in_upper and not node.handles):
        removed(stack, st)


class Keeping:
    """While the last known name of a node goes: hold its object for those who use it.

    If the name stays, because of an error, the object is let go again: a node that has its place
    is found there, also after a later copy-up.
    """

    __slots__ = ("_node",)

    def __init__(self, stack: Stack, node: Node | None, parent: Dir, name: bytes) -> None:
        self._node: Node | None = None
        if node is None or node.orphan >= 0 or node.aliases:
            return
        if node.parent is not parent or node.name != name or not node.is_busy():
            return
        if isinstance(node, Dir):
            node.orphan = os.dup(node.top.at())
        elif node.low is not None:
            return  # stays where it is, for nobody changes a lower directory
        elif (spare := stack.spare_fd(node)) >= 0:
            node.orphan = spare
        else:
            dir_fd, at_name = stack.place(node)
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            node.orphan = os.open(at_name, flags, dir_fd=dir_fd)
        self._node = node

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._node is not None:
            os.close(self._node.orphan)
            self._node.orphan = -1


def dropped(stack: Stack, node: Node, parent: Dir, name: bytes) -> None:
    """The name is gone from the disk; forget the place, and the node if nobody uses it."""
    still_named = stack.nodes.detach(node, parent, name)
    if still_named and node.orphan >= 0:
        os.close(node.orphan)
        node.orphan = -1
    if not still_named:
        if node.orphan >= 0 and not node.is_dir and os.stat(node.orphan).st_nlink:
            pass  # another name exists that was not looked up yet; it will find this node
        else:
            stack.nodes.unlink_key(node)
        stack.nodes.reap(node)
    if isinstance(node, Dir) and node.upper is not None:
        node.upper.release()

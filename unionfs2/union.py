"""UnionFS: one short method per operation, the whole API of the core.

Synchronous, and unaware of FUSE and trio. A door translates requests into these calls. Methods
raise OSError with the errno to answer, or a UnionFSError. Unless a docstring says otherwise a
failed call has changed nothing that can be seen, apart from copied-up ancestors.

Lookup counts: ``lookup``, ``create``, ``mknod``, ``mkdir``, ``symlink`` and ``link`` do not move
them; a door that hands a node out adds to its ``lookups`` and gives it back with ``forget``.

Not thread-safe: one thread calls it. Long work is split off as a ``CopyJob`` (``begin_copy_up``)
or works on a descriptor only (``read``, ``write``, ``sync``).
"""

from __future__ import annotations

import errno
import os
import stat

from . import attrs, copyup, files, merge, opening, protect
from . import rename as renaming
from .closing import Closing
from .copyup import CopyJob
from .creds import Actor
from .handles import DirHandle, FileHandle
from .model import Caller, Entry, SetAttr
from .namespace import Creator
from .nodes import ROOT_ID, Dir, Node
from .options import MountSpec
from .rename import Place
from .stack import Found, Stack, oserror


class UnionFS(Closing):
    """The merged tree of one MountSpec."""

    def __init__(self, opened: opening.Opened) -> None:
        self._opened = opened
        self.stack: Stack = opened.stack
        self.actor = Actor()
        self._creator = Creator(self.stack, self.actor)
        self._next_dir_handle = 1
        self.files: dict[int, FileHandle] = {}
        self.listings: dict[int, DirHandle] = {}

    @classmethod
    def open(cls, spec: MountSpec, *, clean_work: bool = True) -> UnionFS:
        """Open the layers of *spec*. Raises LayerError, OptionError or OSError.

        *clean_work* is False while another live mount uses the same work directory.
        """
        return cls(opening.open_stack(spec, clean_work=clean_work))

    def close(self) -> None:
        """Close everything that is open; open handles end with it."""
        for handle in list(self.files.values()):
            os.close(handle.fd)
        self.files.clear()
        self.listings.clear()
        self.stack.close()
        self._opened.close()

    # --- nodes -------------------------------------------------------------------------------

    @property
    def root(self) -> Dir:
        return self.stack.root

    def node(self, node_id: int) -> Node:
        """The node with this id; ESTALE for one that was forgotten."""
        node = self.stack.nodes.by_id.get(node_id)
        if node is None:
            raise oserror(errno.ESTALE)
        return node

    def directory(self, node_id: int) -> Dir:
        """Like node(), ENOTDIR unless it is a directory."""
        node = self.node(node_id)
        if not isinstance(node, Dir):
            raise oserror(errno.ENOTDIR, node.name)
        return node

    def forget(self, node_id: int, count: int) -> None:
        if node_id != ROOT_ID:
            self.stack.nodes.forget(node_id, count)

    def trim(self) -> None:
        """Close descriptors beyond the limit. needs: no operation in progress."""
        self.stack.cache.trim()

    def walk(self, path: bytes) -> Node:
        """The node at *path* below the root, without following symlinks; for library users."""
        node: Node = self.root
        for part in path.split(b"/"):
            if part in (b"", b"."):
                continue
            if not isinstance(node, Dir):
                raise oserror(errno.ENOTDIR, path)
            node = self.stack.require(node, part)[0]
        return node

    # --- reading -----------------------------------------------------------------------------

    def lookup(self, parent: Dir, name: bytes) -> Found | None:
        """(node, stat of its object), None where the name does not exist."""
        return self.stack.lookup(parent, name)

    def getattr(self, node: Node) -> os.stat_result:
        """stat of the real object; st_ino and st_nlink are ino_of() and nlink_of()."""
        return self.stack.stat(node)

    @staticmethod
    def nlink_of(node: Node, st: os.stat_result) -> int:
        """1 for a merged directory, else what the real object says (ovl_getattr())."""
        if isinstance(node, Dir) and node.merged:
            return 1
        return st.st_nlink

    def readlink(self, node: Node) -> bytes:
        if node.kind != stat.S_IFLNK:
            raise oserror(errno.EINVAL, node.name)
        path, follow = self.stack.object_path(node)
        if follow:
            return os.readlink(b"", dir_fd=node.orphan)
        return os.readlink(path)

    def statfs(self) -> os.statvfs_result:
        """statvfs of the upper, of the top-most lower without one; a limit shows."""
        real = os.fstatvfs(self.root.top.at())
        ledger = self.stack.ledger
        return real if ledger is None else ledger.statfs(real)

    @property
    def name_max(self) -> int:
        return self.stack.name_max

    def listing(self, node: Dir) -> list[Entry]:
        """All visible names, without "." and ".."; d_ino is that of the real object."""
        return merge.listing(self.stack, node)

    @staticmethod
    def listed_although_hidden(node: Dir, name: bytes) -> bool:
        return merge.listed_although_hidden(node, name)

    @staticmethod
    def needs_lookup(node: Dir, name: bytes) -> bool:
        """Whether a listing that cannot look *name* up has to fail with the same error."""
        return merge.needs_lookup(node, name)

    # --- extended attributes -----------------------------------------------------------------

    def getxattr(self, node: Node, key: bytes) -> bytes:
        return attrs.get_xattr(self.stack, node, key)

    def listxattr(self, node: Node, caller: Caller | None = None) -> list[bytes]:
        return attrs.list_xattrs(self.stack, node, caller)

    def setxattr(
        self, node: Node, key: bytes, value: bytes, flags: int = 0, caller: Caller | None = None
    ) -> None:
        attrs.set_xattr(self.stack, node, key, value, flags, caller)

    def removexattr(self, node: Node, key: bytes, caller: Caller | None = None) -> None:
        attrs.remove_xattr(self.stack, node, key, caller)

    # --- attributes --------------------------------------------------------------------------

    def setattr(
        self,
        node: Node,
        new: SetAttr,
        handle: attrs.Resizable | None = None,
        caller: Caller | None = None,
    ) -> os.stat_result:
        attrs.set_attributes(self.stack, node, new, handle, caller)
        return self.stack.stat(node)

    def check_setattr(self, node: Node, new: SetAttr) -> None:
        """What setattr() would be refused for before anything is copied up."""
        attrs.check_attributes(self.stack, node, new)

    def check_setxattr(self, node: Node, key: bytes) -> None:
        """What setxattr() would be refused for before anything is copied up."""
        attrs.check_xattr(self.stack, node, key)

    def check_removexattr(self, node: Node, key: bytes, caller: Caller | None = None) -> None:
        """What removexattr() would be refused for before anything is copied up."""
        attrs.check_removal(self.stack, node, key, caller)

    # --- names -------------------------------------------------------------------------------

    def mknod(self, parent: Dir, name: bytes, mode: int, rdev: int, caller: Caller) -> Found:
        return self._creator.mknod(parent, name, mode, rdev, caller)

    def mkdir(self, parent: Dir, name: bytes, mode: int, caller: Caller) -> Found:
        return self._creator.mkdir(parent, name, mode, caller)

    def symlink(self, parent: Dir, name: bytes, target: bytes, caller: Caller) -> Found:
        return self._creator.symlink(parent, name, target, caller)

    @staticmethod
    def check_link(node: Node) -> None:
        """ENOENT for a lower file whose name is gone, before anything is copied up."""
        if node.parent is None and not node.in_upper:
            raise oserror(errno.ENOENT)

    def link(self, node: Node, parent: Dir, name: bytes) -> Found:
        return self._creator.link(node, parent, name)

    def unlink(self, parent: Dir, name: bytes) -> Node:
        return self._creator.unlink(parent, name)

    def rmdir(self, parent: Dir, name: bytes) -> Node:
        return self._creator.rmdir(parent, name)

    def rename(self, parent: Dir, name: bytes, to: Dir, to_name: bytes, flags: int = 0) -> None:
        renaming.rename(self.stack, Place(parent, name), Place(to, to_name), flags)

    def check_rename(
        self, parent: Dir, name: bytes, to: Dir, to_name: bytes, flags: int = 0
    ) -> None:
        """What rename() would be refused for before anything is copied up."""
        renaming.check(self.stack, Place(parent, name), Place(to, to_name), flags)

    # --- files -------------------------------------------------------------------------------

    def begin_copy_up(
        self, node: Node, limit: int | None = None, *, nameless: bool = False
    ) -> CopyJob | None:
        """Start bringing a non-directory up; a job is left only for data to be copied.

        The caller runs job.run() anywhere, then job.publish() and job.close() here. *limit*:
        bytes wanted at most. *nameless*: see copyup.prepare().
        """
        return copyup.prepare(self.stack, node, limit=limit, nameless=nameless)

    def check_open(self, node: Node, flags: int) -> None:
        """What an open would be refused for before anything is copied up."""
        files.check_open(self.stack, node, flags)

    def open_file(self, node: Node, flags: int, caller: Caller | None = None) -> FileHandle:
        handle = files.open_file(self.stack, node, flags, caller)
        self.files[handle.fd] = handle
        return handle

    def create(
        self, parent: Dir, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[FileHandle, os.stat_result]:
        """A new regular file, open."""
        node, st, fd = self._creator.create(parent, name, mode, files.passed_flags(flags), caller)
        handle = files.adopt(self.stack, node, fd, flags)
        self.files[handle.fd] = handle
        return handle, st

    def create_nameless(
        self, parent: Dir, mode: int, flags: int, caller: Caller
    ) -> tuple[FileHandle, os.stat_result]:
        """A new regular file without a name (O_TMPFILE), open."""
        node, st, fd = self.make_nameless(parent, mode, files.passed_flags(flags), caller)
        handle = files.adopt(self.stack, node, fd, flags)
        self.files[handle.fd] = handle
        return handle, st

    def make_file(
        self, parent: Dir, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """A new regular file and a descriptor of it, for doors without handles."""
        return self._creator.create(parent, name, mode, flags, caller)

    def make_nameless(
        self, parent: Dir, mode: int, flags: int, caller: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """Like make_file(), without a name (O_TMPFILE)."""
        return self._creator.tmpfile(parent, mode, flags, caller)

    def check_write(self, node: Node, *, append: bool) -> None:
        """What a write would be refused for: EROFS, EPERM for protected files."""
        _ = self.stack.w
        protect.check_write(self.stack, node, append=append)

    def kill_suid_sgid(self, node: Node, caller: Caller) -> None:
        """Clear suid and sgid as the kernel asks with a change of data."""
        files.kill_suid_sgid(self.stack, node, caller)

    def drop_privileges(self, node: Node, caller: Caller) -> None:
        """The same, where the kernel does not say whether *caller* may keep them."""
        files.drop_privileges(self.stack, node, caller)

    @staticmethod
    def fallocate(handle: FileHandle, mode: int, offset: int, length: int) -> None:
        """Allocate or punch in an open file (fallocate(2))."""
        files.fallocate(handle, mode, offset, length)

    def file(self, handle_id: int) -> FileHandle:
        handle = self.files.get(handle_id)
        if handle is None:
            raise oserror(errno.EBADF)
        return handle

    def read(self, handle: FileHandle, offset: int, size: int) -> bytes:
        return files.read(handle, offset, size)

    def write(self, handle: FileHandle, offset: int, data: bytes | memoryview) -> int:
        return files.write(handle, offset, data)

    def sync(self, handle: FileHandle, *, data_only: bool = False) -> None:
        files.sync(self.stack, handle, data_only=data_only)

    def atime_is_due(self, handle: FileHandle) -> bool:
        """Whether the next read of this upper file changes its access time."""
        return self.stack.policy.keeps_atime and files.atime_is_due(handle)

    def release(self, handle: FileHandle) -> None:
        self.files.pop(handle.fd, None)
        files.release(self.stack, handle)

    # --- listings ----------------------------------------------------------------------------

    def opendir(self, node: Dir) -> DirHandle:
        handle = DirHandle(self._next_dir_handle, node)
        self._next_dir_handle += 1
        self.listings[handle.id] = handle
        return handle

    def dir_handle(self, handle_id: int) -> DirHandle:
        handle = self.listings.get(handle_id)
        if handle is None:
            raise oserror(errno.EBADF)
        return handle

    def releasedir(self, handle: DirHandle) -> None:
        self.listings.pop(handle.id, None)

    def open_for_sync(self, node: Dir) -> int | None:
        """A descriptor to fsync a directory with, None where there is nothing to sync."""
        if node.upper is None or self.stack.policy.volatile or node.orphan >= 0:
            return None
        return node.upper.open_list()


__all__ = ["UnionFS"]

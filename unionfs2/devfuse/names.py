"""Requests about names: LOOKUP and FORGET, everything that makes, moves and removes them."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from unionfs2 import syscalls as sc
from unionfs2.nodefiles import OPEN_FLAGS
from unionfs2.nodes import IMMUTABLE, ROOT_ID, Dir

from . import abi, codec
from .door import caller_of

if TYPE_CHECKING:
    from unionfs2.nodes import Node

    from .codec import Request
    from .door import Door, Handler, Outcome, Quick

_S_IFMT = 0o170000
_TYPELESS = (0, stat.S_IFREG)


class Names:
    """Handlers of one door."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._fs = door.fs
        self._by_id = door.stack.nodes.by_id
        self._lookup = door.stack.lookup

    def quick(self) -> dict[int, Quick]:
        return {abi.LOOKUP: self.quick_lookup}

    def handlers(self) -> dict[int, Handler]:
        return {
            abi.LOOKUP: self.lookup,
            abi.FORGET: self.forget,
            abi.BATCH_FORGET: self.batch_forget,
            abi.MKNOD: self.mknod,
            abi.MKDIR: self.mkdir,
            abi.SYMLINK: self.symlink,
            abi.READLINK: self.readlink,
            abi.LINK: self.link,
            abi.UNLINK: self.unlink,
            abi.RMDIR: self.rmdir,
            abi.RENAME: self.rename,
            abi.RENAME2: self.rename2,
        }

    def lookup(self, req: Request, name: bytes) -> Outcome:
        found = self._lookup(self._door.directory(req.nodeid), name)
        if found is None:
            return codec.no_entry(req.unique)
        return self._door.entry(req, found)

    def quick_lookup(
        self, buffer: codec.Buffer, length: int, unique: int, node_id: int
    ) -> bytes | None:
        """LOOKUP without ceremony; None: the long way, which finds out what is wrong."""
        parent = self._by_id.get(node_id)
        if parent is None or not parent.is_dir:
            return None
        found = self._lookup(parent, codec.one_name(buffer, length))  # type: ignore[arg-type]
        if found is None:
            return codec.no_entry(unique)
        node, st = found
        if node.flags & IMMUTABLE:
            return None
        node.lookups += 1
        nlink = 1 if node.is_dir and node.merged else st.st_nlink  # type: ignore[attr-defined]
        return codec.entry(unique, node.id, node.ino, nlink, st)

    def forget(self, req: Request, count: int) -> Outcome:
        self._forget(req.nodeid, count)
        return None

    def batch_forget(self, _: Request, count: int, data: bytes) -> Outcome:
        for node_id, lookups in codec.forgets(count, data):
            self._forget(node_id, lookups)
        return None

    def _forget(self, node_id: int, count: int) -> None:
        node = self._by_id.get(node_id)
        if node is None or node_id == ROOT_ID:
            return
        self._fs.forget(node_id, count)
        if not node.id:
            self._door.files.drop(node)
            self._door.refusing.pop(node, None)

    # --- making ------------------------------------------------------------------------------

    def mknod(self, req: Request, mode: int, rdev: int, umask: int, name: bytes) -> Outcome:
        door = self._door
        parent, caller = door.directory(req.nodeid), caller_of(req, umask)
        if mode & _S_IFMT not in _TYPELESS or not door.settings.stateless:
            return door.entry(req, self._fs.mknod(parent, name, mode, rdev, caller))
        # It is about to be written: the kernel makes files this way when opens send no message.
        node, st, fd = self._fs.make_file(parent, name, mode, OPEN_FLAGS, caller)
        door.files.adopt(node, fd)
        return door.entry(req, (node, st))

    def mkdir(self, req: Request, mode: int, umask: int, name: bytes) -> Outcome:
        parent = self._door.directory(req.nodeid)
        return self._door.entry(req, self._fs.mkdir(parent, name, mode, caller_of(req, umask)))

    def symlink(self, req: Request, name: bytes, target: bytes) -> Outcome:
        parent = self._door.directory(req.nodeid)
        return self._door.entry(req, self._fs.symlink(parent, name, target, caller_of(req)))

    def readlink(self, req: Request) -> Outcome:
        return codec.data(req.unique, self._fs.readlink(self._door.node(req.nodeid)))

    def link(self, req: Request, old_id: int, name: bytes) -> Outcome:
        door = self._door
        node, parent = door.node(old_id), door.directory(req.nodeid)
        self._fs.check_link(node)
        return door.copied_up(node, lambda: door.entry(req, self._fs.link(node, parent, name)))

    # --- removing and moving -----------------------------------------------------------------

    def unlink(self, req: Request, name: bytes) -> Outcome:
        door = self._door
        parent = door.directory(req.nodeid)
        door.check_free(parent.children.get(name))
        node = self._fs.unlink(parent, name)
        self._removed(node)
        return codec.ok(req.unique)

    def _removed(self, node: Node) -> None:
        """The kernel counts the link down by itself; a lower file keeps its count."""
        if node.low is not None or node.handles:
            self._door.stack.changed.append(node)

    def rmdir(self, req: Request, name: bytes) -> Outcome:
        self._fs.rmdir(self._door.directory(req.nodeid), name)
        return codec.ok(req.unique)

    def rename(self, req: Request, new_parent: int, old: bytes, new: bytes) -> Outcome:
        return self.rename2(req, new_parent, 0, old, new)

    def rename2(self, req: Request, new_parent: int, flags: int, old: bytes, new: bytes) -> Outcome:
        door, fs = self._door, self._fs
        source_dir, target_dir = door.directory(req.nodeid), door.directory(new_parent)
        source, target = source_dir.children.get(old), target_dir.children.get(new)
        door.check_free(source)
        door.check_free(target)
        fs.check_rename(source_dir, old, target_dir, new, flags)
        source, target = source_dir.children.get(old), target_dir.children.get(new)

        def move() -> Outcome:
            self._move(source_dir, old, target_dir, new, flags)
            if target is not None and not flags & sc.RENAME_EXCHANGE:
                self._removed(target)
            return codec.ok(req.unique)

        def second() -> Outcome:
            if flags & sc.RENAME_EXCHANGE and target is not None:
                return door.copied_up(target, move)
            return move()

        return second() if source is None else door.copied_up(source, second)

    def _move(self, old_dir: Dir, old: bytes, new_dir: Dir, new: bytes, flags: int) -> None:
        try:
            self._fs.rename(old_dir, old, new_dir, new, flags)
        except OSError:
            # A backing file system may have touched the directories all the same.
            self._door.stack.changed += (old_dir, new_dir)
            raise

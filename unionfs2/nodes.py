"""The node table: what the kernel (or another door) knows of the union, and for how long.

A node is an identity. It lives as long as somebody counts on it: lookups not yet forgotten, open
handles, or child nodes. Its place (parent and name) may change or vanish meanwhile.

Invariant: ``parent.children[name] is node`` for every attached node, and for every alias of it.
Invariant: a node without a place that is still known holds ``orphan``, a descriptor of its object,
unless that is a lower non-directory, which stays under its name in its lower directory.
Invariant: ``by_inode`` holds only upper objects (lower ones without an upper) with several links.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from .names import LowerNames, UpperNames

if TYPE_CHECKING:
    from .branch import RealDir
    from .handles import FileHandle

ROOT_ID = 1

# Node.flags
ORIGIN = 0x01  # copied up from a lower object whose inode number it keeps (OVL_TYPE_ORIGIN)
NO_XATTRS = 0x04  # the object was seen without any attribute; cleared when one may have come
IMMUTABLE = 0x08  # shown immutable: immutable lower object, or "i" in protattr
APPEND_ONLY = 0x10  # likewise append-only
PROTECTION_KNOWN = 0x20  # the two bits above were looked up
DEAD = 0x40  # removed; no new entries
NO_CAPABILITY = 0x100  # made here, and nobody has given it a capability since
OPAQUE = 0x80  # directory known to carry the opaque mark
STRAYS = 0x200  # directory listed with whiteouts, which its copy-up hides

# Of a directory without an upper, which nobody tells anything.
_NO_UPPER = UpperNames()


class Node:
    """A file of any type but directory.

    ``low`` is the directory of the lower branch that holds it under ``name``; None when the
    object is in the upper, under the parent's upper directory.
    """

    __slots__ = (
        "aliases",
        "flags",
        "handles",
        "id",
        "ino",
        "kind",
        "last_parent",
        "link_key",
        "lookups",
        "low",
        "name",
        "orphan",
        "parent",
    )

    is_dir = False

    def __init__(self, kind: int, ino: int, low: RealDir | None, flags: int = 0) -> None:
        self.id = 0
        self.parent: Dir | None = None
        self.name = b""
        self.kind = kind
        self.ino = ino
        self.low = low
        self.flags = flags
        self.lookups = 0
        self.handles: list[FileHandle] | None = None
        self.aliases: dict[tuple[Dir, bytes], None] | None = None
        self.orphan = -1
        self.last_parent: Dir | None = None  # where an unlinked node was
        self.link_key: tuple[int, int] | None = None

    @property
    def in_upper(self) -> bool:
        return self.low is None

    @property
    def is_regular(self) -> bool:
        return self.kind == stat.S_IFREG

    def is_busy(self) -> bool:
        return bool(self.lookups or self.handles)


class Dir(Node):
    """A directory: at most one upper and any number of lower real directories, top-most first."""

    __slots__ = (
        "children",
        "impure",
        "index",
        "lowers",
        "misses",
        "upper",
        "upper_names",
        "whiteouts",
        "xwhiteouts",
    )

    is_dir = True

    def __init__(
        self, ino: int, upper: RealDir | None, lowers: tuple[RealDir, ...], *, whiteouts: bool
    ) -> None:
        super().__init__(stat.S_IFDIR, ino, None, ORIGIN if lowers else 0)
        self.upper = upper
        # What is known of the names in the upper; whoever adds one tells it before.
        self.upper_names = _NO_UPPER if upper is None else UpperNames()
        self.lowers = lowers
        self.children: dict[bytes, Node] = {}
        # May hold whiteouts although nothing merges any more (OVL_WHITEOUTS in the kernel).
        self.whiteouts = whiteouts
        self.impure = False
        # Whether one of the lowers is marked opaque=x.
        self.xwhiteouts = False
        # Made by the lookup that met several lowers, or when it pays.
        self.index: LowerNames | None = None
        # How often a lower directory was asked for a name that it does not have.
        self.misses = 0

    @property
    def in_upper(self) -> bool:
        return self.upper is not None

    @property
    def merged(self) -> bool:
        """Built from two or more real directories (OVL_TYPE_MERGE)."""
        return len(self.lowers) > 1 or (self.upper is not None and bool(self.lowers))

    def holders(self, name: bytes) -> int:
        """Positions in ``lowers``, as bits, where *name* has to be looked for."""
        index = self.index
        if index is None:
            count = len(self.lowers)
            if not count or self.misses < LowerNames.WORTH_MISSES * count:
                return (1 << count) - 1
            index = self.index = LowerNames.of(self.lowers)
        return index.holders(name, self.lowers, self.misses)

    @property
    def pure_upper(self) -> bool:
        return not self.lowers and not self.whiteouts

    @property
    def top(self) -> RealDir:
        return self.upper if self.upper is not None else self.lowers[0]

    def is_busy(self) -> bool:
        return bool(self.lookups or self.handles or self.children)


class NodeTable:
    """All known nodes by id."""

    __slots__ = ("_next", "by_id", "by_inode")

    def __init__(self) -> None:
        self.by_id: dict[int, Node] = {}
        self.by_inode: dict[tuple[int, int], Node] = {}
        self._next = ROOT_ID

    def add(self, node: Node, parent: Dir | None, name: bytes) -> None:
        node.id = self._next
        self._next += 1
        self.by_id[node.id] = node
        if parent is not None:
            self.attach(node, parent, name)

    def renumber(self, node: Node, node_id: int) -> None:
        """Give *node* the id under which the kernel knows it. needs: nobody else has it."""
        self.by_id.pop(node.id, None)
        node.id = node_id
        self.by_id[node_id] = node

    def begin_above(self, node_id: int) -> None:
        """No id up to *node_id* is given to a node that comes."""
        self._next = max(self._next, node_id + 1)

    @staticmethod
    def attach(node: Node, parent: Dir, name: bytes) -> None:
        """Give *node* a place; a second place becomes an alias."""
        parent.children[name] = node
        if node.parent is None:
            node.parent = parent
            node.name = name
            if node.orphan >= 0:
                os.close(node.orphan)
                node.orphan = -1
        elif node.parent is not parent or node.name != name:
            if node.aliases is None:
                node.aliases = {}
            node.aliases[(parent, name)] = None

    @staticmethod
    def detach(node: Node, parent: Dir, name: bytes) -> bool:
        """Take one place away. True when the node has another one left."""
        parent.children.pop(name, None)
        if node.parent is parent and node.name == name:
            if node.aliases:
                (other_parent, other_name), _ = node.aliases.popitem()
                node.parent = other_parent
                node.name = other_name
                return True
            node.parent = None
            node.last_parent = parent
            return False
        if node.aliases is not None:
            node.aliases.pop((parent, name), None)
        return node.parent is not None

    @staticmethod
    def place_moved(node: Node, old: tuple[Dir, bytes], new: tuple[Dir, bytes]) -> None:
        """After a rename: the place *old* of *node* is now *new*.

        needs: ``old`` no longer refers to *node*; *new* is free to be taken over.
        """
        if node.parent is old[0] and node.name == old[1]:
            node.parent, node.name = new
        elif node.aliases is not None:
            node.aliases.pop(old, None)
            node.aliases[new] = None
        new[0].children[new[1]] = node

    def forget(self, node_id: int, count: int) -> None:
        """The kernel dropped *count* lookups."""
        node = self.by_id.get(node_id)
        if node is None:
            return
        node.lookups = max(0, node.lookups - count)
        if not node.lookups:
            self.reap(node)

    def reap(self, node: Node) -> None:
        """Drop *node* if nobody counts on it, then its ancestors for which the same holds."""
        current: Node | None = node
        while current is not None and current.id > ROOT_ID and not current.is_busy():
            parent, aliases = current.parent, current.aliases
            self._remove(current)
            for other, _ in aliases or ():
                self.reap(other)
            current = parent

    def _remove(self, node: Node) -> None:
        self.by_id.pop(node.id, None)
        if node.aliases:
            for parent, name in node.aliases:
                if parent.children.get(name) is node:
                    del parent.children[name]
            node.aliases = None
        if node.parent is not None and node.parent.children.get(node.name) is node:
            del node.parent.children[node.name]
        self.unlink_key(node)
        if node.orphan >= 0:
            os.close(node.orphan)
            node.orphan = -1
        if isinstance(node, Dir):
            self._release(node)
        node.id = 0

    def link_key(self, node: Node, key: tuple[int, int]) -> None:
        """Other names of the same object (device, inode) shall find *node*."""
        if node.link_key != key:
            self.unlink_key(node)
            node.link_key = key
        self.by_inode[key] = node

    def unlink_key(self, node: Node) -> None:
        """needs: to be called before the inode number can be given to another file."""
        if node.link_key is not None:
            if self.by_inode.get(node.link_key) is node:
                del self.by_inode[node.link_key]
            node.link_key = None

    @staticmethod
    def _release(node: Dir) -> None:
        if node.upper is not None:
            node.upper.release()
        for low in node.lowers:
            low.release()

"""What the kernel knows by number, as a value: another process can go on with the same mount.

``dump`` writes the node table down, parents first, and ``restore`` builds it up again on a core
newly opened over the same layers. Everything else lives on disk or in the kernel; the descriptor
of the device travels on its own (SCM_RIGHTS), as do those of objects whose names have gone.

What cannot be rebuilt is left out, and the kernel gets ESTALE for it: a removed directory, a lower
file that was removed while open, and an object whose name is not there any more or is another one.
Open handles are not carried over either: this is for stateless connections.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from unionfs2 import nodes as nd
from unionfs2.nodes import ROOT_ID, Dir, Node, NodeTable
from unionfs2.union import UnionFS


class Known(NamedTuple):
    """One node. *parent* is 0 where no name is left, which ``orphans()`` has a descriptor for."""

    id: int
    parent: int
    name: bytes
    aliases: tuple[tuple[int, bytes], ...]
    lookups: int
    kind: int
    ino: int


def dump(table: NodeTable) -> list[Known]:
    """All nodes: directories first, each after its parent. needs: nothing is being worked on."""
    return [_known(node) for node in _in_order(table)]


def orphans(table: NodeTable) -> dict[int, int]:
    """id -> descriptor of what restore() can take without a name; they stay *table*'s."""
    return {
        node.id: node.orphan
        for node in table.by_id.values()
        if node.orphan >= 0 and node.low is None and not node.is_dir
    }


def _in_order(table: NodeTable) -> Iterator[Node]:
    waiting: list[Dir] = [node for node in table.by_id.values() if isinstance(node, Dir)]
    waiting.sort(key=_depth)
    yield from waiting
    yield from (node for node in table.by_id.values() if not node.is_dir)


def _depth(node: Dir) -> int:
    depth = 0
    parent = node.parent
    while parent is not None:
        depth += 1
        parent = parent.parent
    return depth


def _known(node: Node) -> Known:
    parent = node.parent.id if node.parent is not None else 0
    aliases = tuple((other.id, name) for other, name in node.aliases or ())
    return Known(node.id, parent, node.name, aliases, node.lookups, node.kind, node.ino)


def restore(fs: UnionFS, known: Iterable[Known], orphan: Mapping[int, int]) -> list[int]:
    """Give the nodes of *fs* the ids and counts of *known*; the ids that are lost.

    *orphan*: descriptors by id, which belong to *fs* from then on. needs: nobody has used *fs*.
    """
    table = fs.stack.nodes
    known = list(known)
    table.begin_above(max((item.id for item in known), default=ROOT_ID))
    lost: list[int] = []
    done: set[Node] = set()
    for item in known:
        if item.id == ROOT_ID:
            fs.root.lookups = item.lookups
            continue
        node = _found(fs, item) if item.parent else _nameless(fs, item, orphan)
        if node is None or node in done:  # two that have become names of one object
            lost.append(item.id)
            continue
        done.add(node)
        table.renumber(node, item.id)
        node.lookups = item.lookups
        for parent_id, name in item.aliases:
            parent = table.by_id.get(parent_id)
            if isinstance(parent, Dir) and parent.children.get(name) is not node:
                table.attach(node, parent, name)
    for node in [node for node in table.by_id.values() if not node.is_busy()]:
        table.reap(node)
    return lost


def _found(fs: UnionFS, item: Known) -> Node | None:
    parent = fs.stack.nodes.by_id.get(item.parent)
    if not isinstance(parent, Dir):
        return None
    try:
        hit = fs.lookup(parent, item.name)
    except OSError:
        return None
    if hit is None or hit[0].kind != item.kind or hit[0].ino != item.ino:
        return None
    return hit[0]


def _nameless(fs: UnionFS, item: Known, orphan: Mapping[int, int]) -> Node | None:
    fd = orphan.get(item.id)
    if fd is None:
        return None
    node = Node(item.kind, item.ino, None, nd.PROTECTION_KNOWN)
    node.orphan = fd
    fs.stack.nodes.add(node, None, b"")
    st = os.fstat(fd)
    if st.st_nlink:  # some other name of it may be looked up
        fs.stack.nodes.link_key(node, (st.st_dev, st.st_ino))
    return node

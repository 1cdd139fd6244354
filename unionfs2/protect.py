"""Immutable and append-only files (chattr +i, +a) as the merged view enforces them.

A lower object has the flag on its inode; a copied-up one has it in ``protattr`` only, because a
flag on the upper inode would stop the overlay itself (ovl_set_protattr() in util.c).
"""

from __future__ import annotations

import errno

from . import nodes as nd
from . import syscalls as sc
from .nodes import Dir, Node
from .stack import Stack, oserror


def flags(stack: Stack, node: Node) -> int:
    """nodes.IMMUTABLE and nodes.APPEND_ONLY bits of *node*; looked up once."""
    if not node.flags & nd.PROTECTION_KNOWN:
        node.flags |= _lower_flags(stack, node) | nd.PROTECTION_KNOWN
    return node.flags & (nd.IMMUTABLE | nd.APPEND_ONLY)


def _lower_flags(stack: Stack, node: Node) -> int:
    if node.parent is None:
        return 0
    if isinstance(node, Dir):
        if node.upper is not None:
            return 0
        bits = sc.attributes_at(b"", node.lowers[0].at())
    else:
        dir_fd, name = stack.place(node)
        bits = sc.attributes_at(name, dir_fd)
    found = nd.IMMUTABLE if bits & sc.STATX_ATTR_IMMUTABLE else 0
    return found | (nd.APPEND_ONLY if bits & sc.STATX_ATTR_APPEND else 0)


def check_metadata(stack: Stack, node: Node) -> None:
    """EPERM where attributes must not change."""
    if flags(stack, node):
        raise oserror(errno.EPERM, node.name)


def check_write(stack: Stack, node: Node, *, append: bool) -> None:
    """EPERM where data must not change; appending to an append-only file may."""
    found = flags(stack, node)
    if found & nd.IMMUTABLE or (found and not append):
        raise oserror(errno.EPERM, node.name)


def check_add(stack: Stack, parent: Dir) -> None:
    """EPERM for a new entry in an immutable directory."""
    if flags(stack, parent) & nd.IMMUTABLE:
        raise oserror(errno.EPERM, parent.name)


def check_remove(stack: Stack, parent: Dir, node: Node) -> None:
    """EPERM for taking *node* out of *parent* (may_delete() in fs/namei.c)."""
    if flags(stack, parent) or flags(stack, node):
        raise oserror(errno.EPERM, node.name)

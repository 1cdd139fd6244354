"""Listings: the names of one or many real directories as the merged view shows them.

Rules of ovl_dir_read_merged() (fs/overlayfs/readdir.c): the top-most layer that has a name
decides; whiteouts hide. A directory that is not merged is passed through as it is, stray
whiteouts included.
"""

from __future__ import annotations

import errno
import stat

from . import nodes as nd
from . import syscalls as sc
from . import whiteout
from .branch import RealDir
from .model import Entry
from .names import WHITEOUT, read_names
from .nodes import Dir
from .stack import Stack, oserror

_S_IFREG = stat.S_IFREG


def hides(stack: Stack, directory: RealDir, entry: Entry, *, attribute_form: bool) -> bool:
    """Whether *entry* is a whiteout as far as listings see it.

    The attribute form counts in merged directories of which a part is marked ``opaque=x``, in
    every layer where such a mark was met (ovl_dir_read_merged()).
    """
    if entry.kind == WHITEOUT:
        return True
    if entry.kind != _S_IFREG or not attribute_form or not directory.branch.xwhiteouts:
        return False
    dir_fd = directory.at()
    st = sc.lstat_or_none(entry.name, dir_fd)
    return (
        st is not None and st.st_size == 0 and whiteout.has_mark(stack.dialect, entry.name, dir_fd)
    )


def listing(stack: Stack, node: Dir) -> list[Entry]:
    """All visible names of *node*, without "." and "..".

    Inode numbers are those of the real objects; whoever needs st_ino looks the name up.
    """
    if node.flags & nd.DEAD:
        return []  # another directory may have its name by now
    if not node.merged and not node.whiteouts:
        return [_as_device(entry) for entry in read_names(node.top)]
    return _merged(stack, node, attribute_form=node.merged and node.xwhiteouts)


def _merged(stack: Stack, node: Dir, *, attribute_form: bool) -> list[Entry]:
    merged: dict[bytes, Entry | None] = {}
    layers = [node.upper, *node.lowers] if node.upper is not None else list(node.lowers)
    index = node.new_index()
    for position, directory in enumerate(layers, len(node.lowers) - len(layers)):
        names = read_names(directory)
        if index is not None and position >= 0:
            index.add(names, position)
        for entry in names:
            if entry.name not in merged:
                merged[entry.name] = (
                    None if hides(stack, directory, entry, attribute_form=attribute_form) else entry
                )
    if index is not None:
        node.index = index
    return [entry for entry in merged.values() if entry is not None]


def _as_device(entry: Entry) -> Entry:
    return entry._replace(kind=stat.S_IFCHR) if entry.kind == WHITEOUT else entry


def whiteouts_of_empty(stack: Stack, node: Dir) -> list[bytes]:
    """Whiteouts in the upper directory of *node*; ENOTEMPTY if anything else is there.

    Stray whiteouts count for nothing, although a listing may show them; those of the attribute
    form count as files, although a listing hides them (both as ovl_check_empty_dir() does).
    """
    if _merged(stack, node, attribute_form=False):
        raise oserror(errno.ENOTEMPTY, node.name)
    if node.upper is None:
        return []
    return [entry.name for entry in read_names(node.upper)]


def needs_lookup(node: Dir, name: bytes) -> bool:
    """Whether listing *name* involves its lookup: upper names of an impure directory.

    Source: ovl_calc_d_ino() and ovl_cache_update() in fs/overlayfs/readdir.c.
    """
    if node.upper is None or not node.impure:
        return False
    return sc.lstat_or_none(name, node.upper.at()) is not None


def listed_although_hidden(node: Dir, name: bytes) -> bool:
    """Whether a name that lookup denies is nevertheless shown by listings.

    So it is with a stray whiteout in a directory that is not merged, and with an attribute
    whiteout without ``opaque=x``. Listing a merged, impure directory looks every upper name up, so
    what lookup denies is not listed there.
    """
    if (node.merged or node.whiteouts) and needs_lookup(node, name):
        return False
    layers = [node.upper, *node.lowers] if node.upper is not None else list(node.lowers)
    for directory in layers:
        st = sc.lstat_or_none(name, directory.at())
        if st is None:
            continue
        if whiteout.is_device(st):
            return not node.merged and not node.whiteouts
        return not (node.merged and node.xwhiteouts and directory.branch.xwhiteouts)
    return False

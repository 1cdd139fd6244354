"""Listings: the names of one or many real directories as the merged view shows them.

Rules of ovl_dir_read_merged() (fs/overlayfs/readdir.c): the top-most layer that has a name
decides; whiteouts hide. A directory that is not merged is passed through as it is, stray
whiteouts included.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator

from . import nodes as nd
from . import syscalls as sc
from . import whiteout
from .branch import RealDir
from .model import Entry
from .names import WHITEOUT, read_few, read_names
from .nodes import Dir
from .stack import Stack, oserror

_S_IFREG = stat.S_IFREG


def _hidden(stack: Stack, directory: RealDir, entry: Entry) -> bool:
    """Whether *entry* is a whiteout of the attribute form.

    It counts in merged directories of which a part is marked ``opaque=x``, in every layer where
    such a mark was met (ovl_dir_read_merged()).
    """
    if entry.kind != _S_IFREG:
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
        entries = read_names(node.top)
        if any(entry[2] == WHITEOUT for entry in entries):
            node.flags |= nd.STRAYS
            entries = [_as_device(entry) for entry in entries]
        return entries
    return _merged(stack, node, attribute_form=node.merged and node.xwhiteouts)


def _merged(stack: Stack, node: Dir, *, attribute_form: bool) -> list[Entry]:
    merged: dict[bytes, Entry] = {}
    for directory, names in _parts(node):
        part = names
        if attribute_form and directory.branch.xwhiteouts:
            part = [_as_whiteout(e) if _hidden(stack, directory, e) else e for e in names]
        if merged:
            for entry in part:
                merged.setdefault(entry[0], entry)
        else:
            merged = {entry[0]: entry for entry in part}
    return [entry for entry in merged.values() if entry[2] != WHITEOUT]


def _parts(node: Dir) -> Iterator[tuple[RealDir, list[Entry]]]:
    """The directories of *node* that have names, top-most first, and what is in each."""
    if node.upper is not None:
        yield node.upper, read_names(node.upper)
    index = node.index
    reader = sc.SmallDirectories()
    for position, directory in enumerate(node.lowers):
        if index is None:
            yield directory, read_names(directory)
        elif index.large >> position & 1:
            names = read_names(directory)
            index.learn(position, names)
            yield directory, names
        elif index.filled >> position & 1:
            yield directory, read_few(directory, reader)


def _as_whiteout(entry: Entry) -> Entry:
    return entry._replace(kind=WHITEOUT)


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

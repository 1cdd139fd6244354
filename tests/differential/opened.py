"""Known difference "copy-up-at-first-write", in the uppers: what only an open has brought up.

The kernel copies a file up when it is opened for writing, with the directories above it; a server
that is not asked about opens does so at the first change. A regular file that only one upper has
is accepted when it is still the lower file, in everything but the marks of a copy-up. So is a
directory above it that is still the lower one and holds nothing else. Nothing more is accepted.

Through the mount one thing shows: a directory that is merged has one link, one that is only in the
lower as many as there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tests.differential import compare, leftovers
from tests.differential.leftovers import Stored, Upper
from tests.differential.looks import Look, View
from tests.differential.worker import Answer

IDENT: Final = "copy-up-at-first-write"

#: What a copy-up writes: on files, and on directories.
_FILE_MARKS: Final = frozenset({b"origin"})
_DIR_MARKS: Final = frozenset({b"origin", b"impure"})


def untouched(found: Upper, other: Upper, lowers: Sequence[bytes]) -> frozenset[bytes]:
    """Paths that only *found* has, and only because files were opened for writing."""
    extra = [path for path in found if path not in other]
    accepted: set[bytes] = set()
    # The deepest first: a directory is accepted for the sake of what is in it.
    for path in sorted(extra, key=lambda path: path.count(b"/"), reverse=True):
        item = found[path]
        below = _below(lowers, path)
        if isinstance(item, str) or below is None:
            continue
        if stat.S_ISREG(item.look.kind):
            is_same = item.look.nlink == 1 and bool(_marks(item) == _FILE_MARKS)
        else:
            children = set(_children(found, path))
            is_same = bool(children) and children <= accepted and _marks(item) <= _DIR_MARKS
        if is_same and _is_copy(item, below):
            accepted.add(path)
    return frozenset(accepted)


def without(found: Upper, paths: Iterable[bytes], other: Upper) -> Upper:
    """*found* as if the opens that brought *paths* up had never been.

    The size of a directory tells how many names there were; it is taken from *other*.
    """
    gone = set(paths)
    kept: Upper = {path: item for path, item in found.items() if path not in gone}
    for parent in {path.rpartition(b"/")[0] for path in gone} & kept.keys():
        item = kept[parent]
        assert isinstance(item, Stored)
        children = _children(found, parent)
        dirs = sum(1 for path in children if path in gone and _is_dir(found[path]))
        twin = other.get(parent)
        size = twin.look.size if isinstance(twin, Stored) else item.look.size
        look = item.look._replace(nlink=max(1, item.look.nlink - dirs), size=size)
        kept[parent] = _without_useless_impure(kept, parent, item._replace(look=look))
    return kept


def view_without_links(view: View) -> View:
    """*view* without the link counts of directories."""
    return {path: seen._replace(look=_without_links(seen.look)) for path, seen in view.items()}


def answer_without_links(answer: Answer) -> Answer:
    """*answer* without the link counts of directories."""
    number, value, touched = answer
    if isinstance(value, Look):
        value = _without_links(value)
    looks = (
        (path, _without_links(seen) if isinstance(seen, Look) else seen) for path, seen in touched
    )
    return number, value, tuple(looks)


def _without_links(look: Look) -> Look:
    return look._replace(nlink=0) if stat.S_ISDIR(look.kind) else look


def _without_useless_impure(kept: Upper, path: bytes, item: Stored) -> Stored:
    if compare.has_origin_below(kept, path):
        return item
    xattrs = tuple(pair for pair in item.xattrs if compare.suffix_of(pair[0]) != b"impure")
    return item._replace(xattrs=xattrs)


def _children(found: Mapping[bytes, object], path: bytes) -> list[bytes]:
    return [name for name in found if name and name.rpartition(b"/")[0] == path]


def _is_dir(item: Stored | str) -> bool:
    return isinstance(item, Stored) and stat.S_ISDIR(item.look.kind)


def _below(lowers: Sequence[bytes], path: bytes) -> Stored | None:
    """The topmost object of that name in the lowers; None for nothing, or a whiteout."""
    for lower in lowers:
        try:
            item = leftovers.stored(os.path.join(lower, path))
        except (FileNotFoundError, NotADirectoryError):
            continue
        return item if isinstance(item, Stored) else None
    return None


def _marks(item: Stored) -> set[bytes]:
    return {mark for key, _value in item.xattrs if (mark := compare.suffix_of(key))}


def _plain(item: Stored) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(pair for pair in item.xattrs if not compare.suffix_of(pair[0]))


def _is_copy(item: Stored, below: Stored) -> bool:
    """Whether *item* is what a copy-up of *below* makes, and nothing has changed it since."""
    mine, its = item.look, below.look
    if not (stat.S_ISREG(mine.kind) or stat.S_ISDIR(mine.kind)):
        return False
    if mine.atime == "now":  # it was read through the mount, which the lower does not notice
        its = its._replace(atime="now")
    if stat.S_ISDIR(mine.kind):
        # A directory of an upper has the entries that were copied up, so its own size and links.
        its = its._replace(size=mine.size, nlink=mine.nlink)
    look_is_same = mine == its._replace(nlink=mine.nlink)
    return look_is_same and (item.content, _plain(item), item.flags) == (
        below.content,
        _plain(below),
        below.flags,
    )

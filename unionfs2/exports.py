"""Tar streams of what changed: from a layer itself, and from a comparison of two trees.

Both say the same when they are unpacked onto the parent, the bytes differ: the first writes all
that the layer's directory holds, copied-up parents included; the second only what differs, and
above it the directories that lead there, with the attributes they have now. Deletions are empty
``.wh.`` files in both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from . import syscalls as sc
from .archive.digest import Writable
from .archive.write import pack
from .archive.writer import TarWriter
from .changes import steps_of_views
from .layersource import Exported, LayerSource
from .storemodel import Digest, IdMaps, Kind, Size
from .treecompare import Step
from .treeview import PlainView, Seen, View
from .whiteout import Dialect


def diff_native(
    top: bytes,
    lowers: Sequence[bytes],
    out: Writable,
    *,
    dialect: Dialect,
    ids: IdMaps | None = None,
) -> tuple[Digest, Size]:
    """The layer directory *top* over *lowers* as a stream; equal layers give equal bytes.

    Raises LayerError, ArchiveError, DamagedLayerError, OSError.
    """
    with LayerSource.open(top, lowers, dialect) as source:
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return pack(fd, out, dialect=dialect, ids=ids, source=source)
        finally:
            os.close(fd)


def diff_naive(
    old_fd: int | None, new_fd: int, out: Writable, *, ids: IdMaps | None = None
) -> tuple[Digest, Size]:
    """What the tree at *new_fd* has other than the one at *old_fd*, as a stream; None: all of it.

    Raises ArchiveError, OSError.
    """
    with ExitStack() as stack:
        old = None if old_fd is None else stack.enter_context(PlainView(old_fd))
        new = stack.enter_context(PlainView(new_fd))
        return write_steps(new, steps_of_views(new, old), out, ids=ids)


def write_steps(
    new: View, steps: Iterable[Step], out: Writable, *, ids: IdMaps | None = None
) -> tuple[Digest, Size]:
    """The changes among *steps*, which compare something with the view *new*, as a stream."""
    waiting: list[tuple[bytes, Seen]] = []
    with TarWriter(out, ids) as writer:
        writer.add(Exported(b"", _root_of(new)))
        for step in steps:
            path = step.path[1:]
            # A directory waits for the first change below it. Names that sort between it and
            # what is in it begin with its own name.
            while waiting and not path.startswith(waiting[-1][0]) and path > waiting[-1][0]:
                waiting.pop()
            if step.kind is None:
                if step.child is not None and step.new is not None:
                    waiting.append((path + b"/", step.new))
                continue
            _write_parents(writer, waiting, path)
            if step.kind is Kind.DELETED:
                writer.whiteout(path)
            else:
                assert step.new is not None
                writer.add(Exported(path, step.new))
        return writer.finish()


def _write_parents(writer: TarWriter, waiting: list[tuple[bytes, Seen]], path: bytes) -> None:
    """Write the directories above *path* that are not written yet."""
    above = [item for item in waiting if path.startswith(item[0])]
    for item in above:
        waiting.remove(item)
        writer.add(Exported(item[0][:-1], item[1]))


def _root_of(view: View) -> Seen:
    root = view.root.lowers[0]
    return Seen(view, sc.lstat_at(b".", root.at()), b".", (root,), 0)

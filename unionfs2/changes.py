"""What a layer changes, found in two ways that agree.

``native`` reads the layer's own directory: only where the layer takes part can anything differ
from its parents. It understands both forms of whiteouts, opaque directories, redirect marks and
attribute-only files, so no mount option makes it fall back to comparing everything. A layer
without parents costs no look below; others cost one look-up in the parents for each of their
entries. ``naive`` compares two whole trees, mounts of unions as a rule, and knows nothing of
marks. ``between`` compares any two chains of layers without a mount; layers that both have cost
nothing. The rules are those of treecompare.py for all.

Paths of the changes are absolute inside the tree, in the order of their bytes.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from . import syscalls as sc
from . import whiteout
from .errors import DamagedLayerError, show
from .nodes import Dir
from .storemodel import Change, Kind, Size
from .treecompare import Pair, Step, TwoTrees, walk
from .treeview import MergedView, PlainView, Seen, View, same_places
from .walk import is_opaque
from .whiteout import Dialect

_S_IFMT = 0o170000
_S_IFDIR = stat.S_IFDIR
_ROOT = b"/"


class _OneLayer(TwoTrees):
    """A view with its top-most layer and without, which is one look where the layer has nothing."""

    view: MergedView

    def __init__(self, view: MergedView) -> None:
        super().__init__(view, view)
        self.view = view

    def root(self) -> Pair:
        """The pair to begin with."""
        view = self.view
        old = view.without_top() if len(view.root.lowers) > 1 else None
        return Pair(_ROOT, view.root, old, shortcut=True)

    def names(self, pair: Pair) -> list[bytes]:
        if not pair.shortcut:
            return super().names(pair)
        return self.view.names(Dir(0, None, pair.new.lowers[:1], whiteouts=False))

    def look(self, pair: Pair, name: bytes) -> Step:
        path = pair.path + name
        try:
            if pair.shortcut:
                return self._look_in_layer(pair, name)
            step = super().look(pair, name)
        except OSError as exc:
            raise _explained(exc, path) from exc
        return step if step.child is None else step._replace(child=self._shortened(step.child))

    def came_or_went(self, pair: Pair, name: bytes) -> bool:
        if not pair.shortcut:
            return super().came_or_went(pair, name)
        assert pair.old is not None
        dir_fd = pair.new.lowers[0].at()
        st = sc.lstat_or_none(name, dir_fd)
        if st is None:
            return False
        gone = whiteout.is_whiteout(self.view.dialect, st, name, dir_fd)
        return gone == (self.view.look(pair.old, name) is not None)

    def _look_in_layer(self, pair: Pair, name: bytes) -> Step:
        view = self.view
        path = pair.path + name
        lowers = pair.new.lowers
        dir_fd = lowers[0].at()
        st = sc.lstat_or_none(name, dir_fd)
        if st is None:
            return Step(path, None, None, None)
        old = None if pair.old is None else view.look(pair.old, name)
        if st.st_mode & _S_IFMT == _S_IFDIR:
            new = Seen(view, st, name, lowers, 0)
            child = self._child(new, old, path + b"/")
            new.dir = child.new
            return self.judge(path, new, old, child)
        if whiteout.is_whiteout(view.dialect, st, name, dir_fd):
            return self.judge(path, None, old, None)
        return self.judge(path, Seen(view, st, name, lowers, 0), old, None)

    def _child(self, new: Seen, old: Seen | None, path: bytes) -> Pair:
        """The pair for a directory of the layer, without a look below wherever that is known."""
        dialect = self.view.dialect
        own = new.holder.child(new.name)
        below = None if old is None else old.dir
        dir_fd = new.holder.at()
        keys = sc.listxattr_at(new.name, dir_fd)
        if is_opaque(dialect, new.name, dir_fd, keys):
            alone = Dir(0, None, (own,), whiteouts=False)
            return Pair(path, alone, below, shortcut=below is None)
        if dialect.redirect in keys and len(self.view.root.lowers) > 1:
            return self._shortened(Pair(path, self.view.merged(new), below))
        lowers = (own,) if below is None else (own, *below.lowers)
        return Pair(path, Dir(0, None, lowers, whiteouts=True), below, shortcut=True)

    @staticmethod
    def _shortened(pair: Pair) -> Pair:
        """The same pair, with the shortcut where the old directory turns out to be below."""
        first, *rest = pair.new.lowers
        below = () if pair.old is None else pair.old.lowers
        if first.branch.index == 1 and same_places(tuple(rest), below):
            return pair._replace(shortcut=True)
        return pair


def _explained(exc: OSError, path: bytes) -> OSError | DamagedLayerError:
    """What the overlay format does not allow, as a sentence; other errors as they are."""
    what = {
        errno.EINVAL: "a redirect mark that is malformed",
        errno.EACCES: "a redirect mark with a dot component",
        errno.EIO: "the mark of a file without data, and no layer below has the data",
    }.get(exc.errno or 0)
    if what is None or (exc.errno == errno.EACCES and exc.filename == path):
        return exc
    return DamagedLayerError(f"{show(path)} has {what}: check that its parent layers are complete")


# --- lists of changes ----------------------------------------------------------------------------


def native(top: bytes, lowers: Sequence[bytes], dialect: Dialect) -> Iterator[Change]:
    """What the layer directory *top* changes in the merged view of *lowers*, top-most first.

    Raises LayerError, DamagedLayerError, OSError.
    """
    with layer_steps(top, lowers, dialect) as steps:
        yield from _changes(steps)


def between(
    new: Sequence[bytes], old: Sequence[bytes], dialect: Dialect, old_dialect: Dialect | None = None
) -> Iterator[Change]:
    """What the chain of layers *new* shows other than *old*, without a mount."""
    with chain_steps(new, old, dialect, old_dialect) as steps:
        yield from _changes(steps)


def naive(old_fd: int | None, new_fd: int) -> Iterator[Change]:
    """What the directory tree at *new_fd* has other than the one at *old_fd*; None is nothing."""
    with tree_steps(old_fd, new_fd) as steps:
        yield from _changes(steps)


def _changes(steps: Iterable[Step]) -> Iterator[Change]:
    for step in steps:
        if step.kind is not None:
            yield Change(step.path, step.kind)


@contextmanager
def layer_steps(top: bytes, lowers: Sequence[bytes], dialect: Dialect) -> Iterator[Iterator[Step]]:
    """The steps of native(), with the objects of both sides."""
    with MergedView.open((top, *lowers), dialect) as view:
        comparison = _OneLayer(view)
        yield walk(comparison, comparison.root())


@contextmanager
def chain_steps(
    new: Sequence[bytes], old: Sequence[bytes], dialect: Dialect, old_dialect: Dialect | None = None
) -> Iterator[Iterator[Step]]:
    """The steps of between(); an empty chain is an empty tree."""
    with ExitStack() as stack:
        before = None
        if old:
            before = stack.enter_context(MergedView.open(old, old_dialect or dialect))
        if not new:
            yield iter(()) if before is None else _all_gone(before)
            return
        after = stack.enter_context(MergedView.open(new, dialect))
        yield steps_of_views(after, before)


def _all_gone(view: View) -> Iterator[Step]:
    for name in view.names(view.root):
        old = view.look(view.root, name)
        if old is not None:
            yield Step(_ROOT + name, Kind.DELETED, None, old)


@contextmanager
def tree_steps(old_fd: int | None, new_fd: int) -> Iterator[Iterator[Step]]:
    """The steps of naive()."""
    with ExitStack() as stack:
        before = None if old_fd is None else stack.enter_context(PlainView(old_fd))
        yield steps_of_views(stack.enter_context(PlainView(new_fd)), before)


def steps_of_views(new: View, old: View | None) -> Iterator[Step]:
    """The comparison of two views; None is an empty tree."""
    root = Pair(_ROOT, new.root, None if old is None else old.root)
    return walk(TwoTrees(new, old or new), root)


def size_of(steps: Iterable[Step]) -> Size:
    """What added and changed objects take, each file once: bytes of regular files, inodes."""
    total = inodes = 0
    known: set[tuple[int, int]] = set()
    for step in steps:
        new = step.new
        if new is None or step.kind is None:
            continue
        if new.dir is None and new.st.st_nlink > 1:
            if new.identity in known:
                continue
            known.add(new.identity)
        inodes += 1
        if new.kind == stat.S_IFREG:
            total += new.st.st_size
    return Size(total, inodes)

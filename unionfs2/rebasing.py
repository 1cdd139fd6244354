"""What stands in the way of putting a layer on another parent.

A path is in conflict when the layer changes it and it is not the same in the new parent as in
the old one, or when one side deleted (or replaced by something else) a directory in which the
other side changed something. Not in conflict: what both sides deleted, what both made equal, and
directories that both only changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .changes import chain_steps, layer_steps
from .storemodel import Kind
from .treecompare import Step, differ
from .whiteout import Dialect


@dataclass(frozen=True, slots=True)
class Conflict:
    """One path: what the layer does to it, and what became of it between the two parents."""

    path: bytes
    ours: Kind
    theirs: Kind


def conflicts(
    top: bytes,
    old: Sequence[bytes],
    new: Sequence[bytes],
    dialect: Dialect,
    new_dialect: Dialect | None = None,
) -> Iterator[Conflict]:
    """Conflicts of the layer directory *top*, made for the chain *old*, with the chain *new*.

    In the order of the bytes of the paths; either chain may be empty. Raises LayerError,
    DamagedLayerError, OSError.
    """
    with (
        layer_steps(top, old, dialect) as ours,
        chain_steps(new, old, new_dialect or dialect, dialect) as theirs,
    ):
        yield from _meet(ours, theirs)


class _Side:
    """One list of changes, with what its deletions cover."""

    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps
        self.here: Step | None = None
        self._covers: list[tuple[bytes, Kind]] = []
        self.advance()

    def advance(self) -> None:
        for step in self._steps:
            if step.kind is not None:
                self.here = step
                return
        self.here = None

    def remember(self, step: Step) -> None:
        """Note that what the other side does below *step* is lost."""
        gone = step.new is None or step.new.dir is None
        if gone and step.kind is not None and step.old is not None and step.old.dir is not None:
            self._covers.append((step.path + b"/", step.kind))

    def covering(self, path: bytes) -> Kind | None:
        """What this side did to a directory above *path* so that nothing is left of it."""
        self._covers = [c for c in self._covers if path <= c[0] or path.startswith(c[0])]
        for prefix, kind in self._covers:
            if path.startswith(prefix):
                return kind
        return None


def _meet(ours_steps: Iterator[Step], theirs_steps: Iterator[Step]) -> Iterator[Conflict]:
    ours, theirs = _Side(ours_steps), _Side(theirs_steps)
    while ours.here is not None or theirs.here is not None:
        a, b = ours.here, theirs.here
        if a is not None and b is not None and a.path == b.path:
            if _clash(a, b):
                yield _conflict(a.path, a.kind, b.kind)
        elif b is None or (a is not None and a.path < b.path):
            assert a is not None
            above = theirs.covering(a.path)
            if above is not None and a.kind is not Kind.DELETED:
                yield _conflict(a.path, a.kind, above)
            b = None
        else:
            above = ours.covering(b.path)
            if above is not None and b.kind is not Kind.DELETED:
                yield _conflict(b.path, above, b.kind)
            a = None
        if a is not None:
            ours.remember(a)
            ours.advance()
        if b is not None:
            theirs.remember(b)
            theirs.advance()


def _conflict(path: bytes, ours: Kind | None, theirs: Kind | None) -> Conflict:
    assert ours is not None
    assert theirs is not None
    return Conflict(path, ours, theirs)


def _clash(ours: Step, theirs: Step) -> bool:
    if ours.new is None or theirs.new is None:
        return ours.new is not theirs.new
    if ours.new.dir is not None and theirs.new.dir is not None:
        return False
    return differ(ours.new, theirs.new)

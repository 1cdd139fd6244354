"""Whether everything that can say what a layer changes says the same of one random chain.

``disagreements(seed, home)`` makes the chain and compares: the native list against the naive one
taken from two mounts of the kernel's overlay, against the comparison of two chains without a
mount, the merged view against the kernel's, and what the parent becomes when the native and the
naive stream are unpacked onto it.
"""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import chains
from unionfs2 import changes, exports
from unionfs2.archive.read import unpack
from unionfs2.storemodel import Change
from unionfs2.treecompare import Pair, TwoTrees, walk
from unionfs2.treeview import MergedView, PlainView, View
from unionfs2.whiteout import Dialect


@dataclass
class Verdict:
    """What was compared, and every difference in a sentence."""

    chain: chains.Chain
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def expect(self, what: str, expected: object, found: object) -> None:
        if expected != found:
            self.wrong.append(f"{what}: {_difference(expected, found)}")


def _difference(expected: object, found: object) -> str:
    if isinstance(expected, list) and isinstance(found, list):
        missing = [str(item) for item in expected if item not in found]
        extra = [str(item) for item in found if item not in expected]
        return f"missing {missing}, too many {extra}" if missing or extra else "another order"
    return f"{expected!r} expected, {found!r} found"


def disagreements(seed: int, home: Path) -> Verdict:
    """Make and compare the chain of *seed* in the empty directory *home*."""
    chain = chains.make(random.Random(seed), home)
    return compare(chain, home)


def compare(chain: chains.Chain, home: Path) -> Verdict:
    """All comparisons of the top-most layer of *chain*."""
    verdict = Verdict(chain)
    empty = home / "empty"
    empty.mkdir()
    dialect = Dialect(userxattr=chain.userxattr)
    top, *lowers = (os.fsencode(layer) for layer in chain.layers)
    with (
        chains.mounted(chain.layers, userxattr=chain.userxattr, empty=empty) as new,
        chains.mounted(chain.layers[1:], userxattr=chain.userxattr, empty=empty) as old,
    ):
        expected = list(changes.naive(old, new))
        verdict.kinds.update(str(change.kind) for change in expected)
        verdict.expect("native", expected, list(changes.native(top, lowers, dialect)))
        between = list(changes.between((top, *lowers), lowers, dialect))
        verdict.expect("between", expected, between)
        verdict.expect("order", sorted(expected), expected)
        _compare_view(verdict, new, (top, *lowers), dialect)
        _compare_streams(verdict, home, new, old, dialect)
    return verdict


def _compare_view(verdict: Verdict, mount: int, layers: Sequence[bytes], dialect: Dialect) -> None:
    with PlainView(mount) as plain, MergedView.open(layers, dialect) as merged:
        verdict.expect("view", [], _differing(plain, merged))


def _differing(one: View, other: View) -> list[Change]:
    steps = walk(TwoTrees(one, other), Pair(b"/", one.root, other.root))
    return [Change(step.path, step.kind) for step in steps if step.kind is not None]


def _compare_streams(verdict: Verdict, home: Path, new: int, old: int, dialect: Dialect) -> None:
    chain = verdict.chain
    top, *lowers = (os.fsencode(layer) for layer in chain.layers)
    native, again, naive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    exports.diff_native(top, lowers, native, dialect=dialect)
    exports.diff_native(top, lowers, again, dialect=dialect)
    verdict.expect("second export", native.getvalue() == again.getvalue(), True)
    exports.diff_naive(old, new, naive)
    for what, stream in (("native", native), ("naive", naive)):
        applied = home / f"{what}-applied"
        applied.mkdir()
        fd = os.open(applied, os.O_RDONLY | os.O_DIRECTORY)
        try:
            stream.seek(0)
            unpack(stream, fd, dialect=dialect)
        finally:
            os.close(fd)
        layers = [applied, *chain.layers[1:]]
        empty = home / "empty"
        with (
            chains.mounted(layers, userxattr=chain.userxattr, empty=empty) as mount,
            PlainView(new) as wanted,
            PlainView(mount) as found,
        ):
            verdict.expect(f"{what} stream", [], _differing(wanted, found))

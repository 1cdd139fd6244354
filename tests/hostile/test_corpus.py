"""Every hostile archive: nothing outside changes, and an error is a sentence."""

from __future__ import annotations

import io
import os
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile import corpus
from tests.hostile.corpus import Hostile, Outcome
from tests.support.tree import Dir, File, HardLink, Snapshot, Symlink, build, differences, snapshot
from unionfs2.archive.read import unpack
from unionfs2.errors import ArchiveError, errno_of, sentence
from unionfs2.whiteout import Dialect

pytestmark = pytest.mark.needs("root", "mknod", "trusted-xattr", "user-xattr", "acl")

TRUSTED = Dialect(userxattr=False)


class Cell:
    """A directory to unpack into, and beside it one that must stay as it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / "root"
        self.outside = path / "outside"
        build(
            path,
            {
                "outside": Dir(
                    {
                        "kept": File("precious", mode=0o640, uid=5, xattrs={"user.a": b"1"}),
                        "dir": Dir({"deep": {"file": "also precious"}}, mode=0o700),
                        "again": HardLink("outside/kept"),
                        "to": Symlink("kept"),
                    },
                    mode=0o711,
                    mtime_ns=1_000_000_000,
                )
            },
        )
        self.before = self.look()

    def look(self) -> Snapshot:
        """All but what is inside the root."""
        seen = snapshot(self.outside)
        seen[b"listing"] = snapshot(self.outside)[b"."]
        names = sorted(os.fsencode(name) for name in os.listdir(self.path))
        assert set(names) <= {b"outside", b"root"}
        return seen

    def unpack(self, case: Hostile) -> Exception | None:
        self.root.mkdir(mode=0o700)
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            unpack(io.BytesIO(case.data), fd, dialect=TRUSTED, limits=case.limits)
        except (ArchiveError, OSError) as exc:
            return exc
        finally:
            os.close(fd)
        return None

    def clear(self) -> None:
        """A new root for the next archive."""
        if self.root.is_dir() and not self.root.is_symlink():
            shutil.rmtree(self.root) if self._is_shallow() else _remove_deep(self.root)

    def _is_shallow(self) -> bool:
        return not (self.root / "/".join(["d"] * 200)).exists()


def _remove_deep(path: Path) -> None:
    # shutil recurses; a tree of a thousand levels is moved apart first.
    fd = os.open(path, os.O_RDONLY)
    try:
        from unionfs2.storetrees import delete_tree

        for name in os.listdir(fd):
            assert delete_tree(fd, os.fsencode(name)) == []
    finally:
        os.close(fd)
    path.rmdir()


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Cell]:
    made = Cell(tmp_path)
    yield made
    made.clear()


def judge(cell: Cell, case: Hostile) -> str:
    """Unpack *case* and check everything; how it ended."""
    error = cell.unpack(case)
    found = differences(cell.before, cell.look())
    assert not found, f"{case.name}: the outside changed: {found}"
    if error is not None:
        text = sentence(error)
        assert text, case.name
        assert "\n" not in text, f"{case.name}: {text!r}"
        assert text.isprintable(), f"{case.name}: {text!r}"
        assert errno_of(error), case.name
        assert case.outcome is not Outcome.CONFINED, f"{case.name}: {text}"
    else:
        assert case.outcome is not Outcome.REFUSED, f"{case.name}: was accepted"
        forged = _forged(cell.root)
        assert not forged, f"{case.name}: {forged}"
    return "refused" if error is not None else "confined"


def _forged(root: Path) -> list[str]:
    """Marks on the disk that only the overlay itself writes."""
    found = []
    for at, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(at, name)
            keys = os.listxattr(path, follow_symlinks=False)
            allowed = ("trusted.overlay.overlay.", "trusted.overlay.opaque")
            found += [
                k for k in keys if k.startswith("trusted.overlay.") and not k.startswith(allowed)
            ]
    return found


GROUPS = (
    "names",
    "marks",
    "through_links",
    "hard_links",
    "replaced",
    "attributes",
    "numbers",
    "extended",
    "sparse",
    "bombs",
    "ends",
    "truncated",
    "flipped",
)


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_outside_changes(cell: Cell, group: str) -> None:
    make = getattr(corpus, group)
    outside = os.fsencode(cell.outside)
    cases = list(make(outside) if group in ("through_links", "hard_links", "replaced") else make())
    ended = Counter(judge_and_clear(cell, case) for case in cases)
    print(f"{group}: {len(cases)} archives, {dict(ended)}, 0 escapes")  # noqa: T201 - the figure that -s shows


def judge_and_clear(cell: Cell, case: Hostile) -> str:
    try:
        return judge(cell, case)
    finally:
        cell.clear()


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    count = Counter(case.name for case in corpus.hostile(b"/somewhere/outside"))
    assert [name for name, times in count.items() if times > 1] == []
    print(f"hostile archives: {len(count)}")  # noqa: T201 - as above
    assert len(count) >= 2000
    assert len({case.data for case in corpus.hostile(b"/somewhere/outside")}) > 1900


def test_a_deep_archive_needs_few_descriptors(cell: Cell) -> None:
    case = next(c for c in corpus.bombs() if c.name == "a thousand deep")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert judge(cell, case) == "confined"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""What a workload is.

A workload has a tree (built once in a run, shared by all targets and turns, never changed), may
set the mounted tree up (`before`, not timed) and then works in it (`work`, timed). Each of the
functions takes the place where the tree is seen and the size of the workload, and can be called by
hand on any directory, under a profiler for example.

Cold means: mounted freshly, after ``sync`` and dropping the kernel's names and inodes (``echo 2``),
with the page cache of the backing files warm where they were read or written before: the runner
reads the lower files once in every turn. So a cold figure tells about a union, not about a disk.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

Step = Callable[[Path, int], None]
SMALLEST: Final = 8
_COMMAND_TIMEOUT_S: Final = 120


@dataclass(frozen=True, slots=True)
class Tree:
    """Lower layers to build. With one layer `build` fills its root, else the roots below it."""

    name: str
    build: Step
    layers: int = 1

    def lowers(self, root: Path) -> tuple[Path, ...]:
        """The layer directories of a tree built at `root`, topmost first."""
        if self.layers == 1:
            return (root,)
        return tuple(root / f"{number}" for number in range(self.layers))


@dataclass(frozen=True, slots=True)
class Workload:
    """One thing to measure. It does `size` times `times` operations, each of them one `unit`."""

    name: str
    what: str
    family: str
    tree: Tree
    size: int
    work: Step
    before: Step | None = None
    unit: str = "file"
    times: int = 1
    changes: bool = False  # whether work or before write to the tree

    @property
    def operations(self) -> int:
        """How often `unit` is done by one call of `work`."""
        return self.size * self.times

    def scaled(self, divisor: int) -> Workload:
        """The same with a smaller size, for a quick look."""
        return replace(self, size=max(min(self.size, SMALLEST), self.size // divisor))


def command(words: Sequence[str | Path], **environment: str) -> None:
    """Run a program as users do; RuntimeError with its own words when it fails.

    Its environment is `environment` and PATH, so that no setting of the caller changes the work.
    """
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8", **environment},
        timeout=_COMMAND_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(map(str, words))[:300]}: exit {done.returncode}: {said}")

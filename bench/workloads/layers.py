"""The same lookups against more and more layers.

``lookup-N``: every directory exists in every layer and is merged; the files are dealt out to the
layers in turn, so that half of the layers lie above the one that has the name. ``lookup-own-N``:
every directory belongs to one layer, as most of those do that a package brings.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.workloads.model import Step, Tree, Workload

COUNTS: Final = (1, 2, 8, 32, 128, 500)
OWN_COUNTS: Final = (2, 128, 500)
FILES: Final = 3000
DIRECTORIES: Final = 30


def build_spread(layers: int) -> Step:
    """Builds `size` small files in 30 directories, spread over `layers`."""

    def build(root: Path, size: int) -> None:
        roots = Tree("", build, layers).lowers(root)
        for layer in roots:
            for number in range(DIRECTORIES):
                (layer / f"shared-{number:02}").mkdir(parents=True)
        for number in range(size):
            Path(_spread_file(roots[number % layers], number)).write_bytes(b"x" * 100)

    return build


def build_own(layers: int) -> Step:
    """Builds `size` small files in 30 directories, each of which is in one of `layers`."""

    def build(root: Path, size: int) -> None:
        roots = Tree("", build, layers).lowers(root)
        for layer in roots:
            layer.mkdir(parents=True, exist_ok=True)
        for number in range(DIRECTORIES):
            _own_layer(roots, number).joinpath(f"shared-{number:02}").mkdir()
        for number in range(size):
            layer = _own_layer(roots, number % DIRECTORIES)
            Path(_spread_file(layer, number)).write_bytes(b"x" * 100)

    return build


def _own_layer(roots: tuple[Path, ...], directory: int) -> Path:
    return roots[directory * len(roots) // DIRECTORIES]


def _spread_file(root: Path, number: int) -> str:
    return f"{root}/shared-{number % DIRECTORIES:02}/file-{number:05}"


def stat_spread(root: Path, size: int) -> None:
    """Stat each file once."""
    for number in range(size):
        os.stat(_spread_file(root, number))


def _lookup(name: str, build: Callable[[int], Step], what: str, layers: int) -> Workload:
    name = f"{name}-{layers}"
    tree = Tree(name, build(layers), layers)
    return Workload(name, f"{what} {layers} layers", "layers", tree, FILES, stat_spread)


WORKLOADS = [
    *[_lookup("lookup", build_spread, "stat 3,000 files of", layers) for layers in COUNTS],
    *[
        _lookup("lookup-own", build_own, "the same, each directory in one of", layers)
        for layers in OWN_COUNTS
    ],
]

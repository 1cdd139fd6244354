"""What an upper directory changes about the layers below it: added, changed, deleted."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

LINES_MAX: Final = 40


class Change(NamedTuple):
    """One line as ``docker diff`` prints it, with *inside* as the number of objects below."""

    kind: str
    path: Path
    is_dir: bool
    inside: int = 0
    opaque: bool = False


def _is_whiteout(info: os.stat_result) -> bool:
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def _is_opaque(directory: Path) -> bool:
    for prefix in ("trusted", "user"):
        try:
            if os.getxattr(directory, f"{prefix}.overlay.opaque") == b"y":
                return True
        except OSError:
            continue
    return False


def _visible(path: Path, lower: Sequence[Path]) -> bool:
    for layer in lower:
        current, is_last_layer = layer, False
        for position, part in enumerate(path.parts, 1):
            current /= part
            try:
                info = current.lstat()
            except FileNotFoundError:
                break
            if _is_whiteout(info):
                return False
            if position < len(path.parts):
                if not stat.S_ISDIR(info.st_mode):
                    return False
                is_last_layer = is_last_layer or _is_opaque(current)
        else:
            return True
        if is_last_layer:
            return False
    return False


def changes(upper: Path, lower: Sequence[Path]) -> Iterator[Change]:
    """Changes in *upper* to the merged *lower* layers (topmost first), parents before children.

    An added directory stands for everything in it.
    """
    yield from _changes(upper, Path(), lower)


def _changes(upper: Path, below: Path, lower: Sequence[Path]) -> Iterator[Change]:
    for name in sorted(os.listdir(upper / below)):
        path = below / name
        info = (upper / path).lstat()
        is_dir = stat.S_ISDIR(info.st_mode)
        if _is_whiteout(info):
            yield Change("D", path, is_dir=False)
        elif not _visible(path, lower):
            yield Change("A", path, is_dir, inside=_count(upper / path) if is_dir else 0)
        else:
            yield Change("C", path, is_dir, opaque=is_dir and _is_opaque(upper / path))
            if is_dir:
                yield from _changes(upper, path, lower)


def _count(directory: Path) -> int:
    return sum(len(dirs) + len(files) for _, dirs, files in os.walk(directory))


class _Group(NamedTuple):
    """Changes of one kind at or below one place; *depth* is the number of its parts."""

    kind: str
    depth: int
    items: list[Change]

    @property
    def place(self) -> Path:
        return Path(*self.items[0].path.parts[: self.depth])

    def split(self) -> list[_Group]:
        """The groups one level further down, at least one; [] when there is nothing to split."""
        if self.is_single:
            return []
        parts: dict[tuple[str, ...], list[Change]] = defaultdict(list)
        for item in self.items:
            parts[item.path.parts[: self.depth + 1]].append(item)
        return [_Group(self.kind, len(names), items) for names, items in parts.items()]

    @property
    def is_single(self) -> bool:
        """One change, and the place is its own."""
        return len(self.items) == 1 and self.place == self.items[0].path


def summary(found: Sequence[Change], *, lines_max: int = LINES_MAX) -> list[str]:
    """About *lines_max* lines for people: what is crowded stays together, the rest is listed.

    Directories that only lead to changes further down are left out.
    """
    shown = [item for item in found if item.kind != "C" or not item.is_dir or item.opaque]
    kinds = {kind: [item for item in shown if item.kind == kind] for kind in "ACD"}
    groups = [_Group(kind, 0, items) for kind, items in kinds.items() if items]
    while True:
        # Split where it costs the fewest lines, as long as there is room.
        splits = [
            (len(parts), index) for index, parts in enumerate(map(_Group.split, groups)) if parts
        ]
        count, index = min(splits, default=(0, 0))
        if not splits or len(groups) + count - 1 > lines_max:
            break
        groups[index : index + 1] = groups[index].split()
    return [_line(group) for group in sorted(groups, key=lambda group: (group.place, group.kind))]


def _line(group: _Group) -> str:
    first = group.items[0]
    line = f"{group.kind} /{group.place}"
    if not group.is_single:
        objects = sum(1 + item.inside for item in group.items)
        return f"{line}/...  ({objects:,} objects)"
    if first.inside:
        line += f"  (with {first.inside:,} objects)"
    if first.opaque:
        line += "  (opaque: hides what was there)"
    return line

"""Ratios of measurements, and the tables of a run.

A ratio is formed within one turn, between two targets that did the same next to each other, and
then the median over the turns is taken, with the smallest and the largest beside it. Ratios of
totals from different hours say nothing.

Copy-ups that reach the disk are not compared with copy-ups that do not. The kernel's overlay and
ours sync what they copy up, fuse-overlayfs never does: in workloads that copy up, both of a pair
are measured without syncing as soon as one of them does not sync.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import mounting, results
from bench.results import Measurement, Results
from bench.targets import OptionSet

BASELINES: Final = ("kernel", "fuse-overlayfs")
COPY_UP: Final = "copy-up"
_MARK: Final = "*"
_FAIRNESS: Final = (
    "measured without syncing on both sides (kernel-volatile, unionfs2-volatile), in the mean too:"
    "\n  one of the two never syncs what it copies up, as fuse-overlayfs does not"
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long, over the turns. `unsynced`: both sides without syncing copy-ups."""

    median: float
    least: float
    most: float
    unsynced: bool = False

    def __str__(self) -> str:
        mark = _MARK if self.unsynced else ""
        return f"{self.median:.2f}{mark} ({self.least:.2f}-{self.most:.2f})"


class Table:
    """The measurements of a run, asked for by workload and target."""

    def __init__(self, found: Results) -> None:
        self._sets = {one.name: one for one in found.sets}
        self.families = {m.workload: m.family for m in found.measurements}
        self.units = {m.workload: m.unit for m in found.measurements}
        self._records: dict[tuple[str, str], list[Measurement]] = {}
        for measurement in found.measurements:
            key = measurement.workload, measurement.target
            self._records.setdefault(key, []).append(measurement)

    @property
    def workloads(self) -> list[str]:
        """Names in the order in which they ran."""
        return list(self.families)

    @property
    def targets(self) -> list[str]:
        """Names of the targets that measured anything, in the order of a run."""
        measured = {target for _, target in self._records}
        return [name for name in self._sets if name in measured]

    def of(self, workload: str, target: str) -> list[Measurement]:
        """What was measured, one for each turn."""
        return self._records.get((workload, target), [])

    def ratio(self, workload: str, target: str, baseline: str) -> Ratio | None:
        """`target` as a multiple of `baseline`; None when there is no fair pair to compare."""
        pair = self._fair(workload, target, baseline)
        if pair is None:
            return None
        theirs = {m.turn: m.work_s for m in self.of(workload, pair[1])}
        found = [
            m.work_s / theirs[m.turn] for m in self.of(workload, pair[0]) if theirs.get(m.turn)
        ]
        if not found:
            return None
        unsynced = pair != (target, baseline)
        return Ratio(statistics.median(found), min(found), max(found), unsynced)

    def _fair(self, workload: str, target: str, baseline: str) -> tuple[str, str] | None:
        """The two sets that do the same, instead of `target` and `baseline`."""
        sets = self._sets.get(target), self._sets.get(baseline)
        if self.families.get(workload) != COPY_UP or sets[0] is None or sets[1] is None:
            return target, baseline
        if sets[0].synced == sets[1].synced:
            return target, baseline
        names = [_without_syncing(one) for one in sets if one is not None]
        if names[0] is None or names[1] is None or names[0] == names[1]:
            return None
        return names[0], names[1]

    def mean(self, target: str, baseline: str) -> tuple[float, int] | None:
        """Geometric mean of the median ratios, and of how many; mounting is not part of it."""
        found = [
            ratio.median
            for workload in self.workloads
            if self.families[workload] != mounting.FAMILY
            and (ratio := self.ratio(workload, target, baseline)) is not None
        ]
        return (geometric_mean(found), len(found)) if found else None


def _without_syncing(one: OptionSet) -> str | None:
    return one.unsynced if one.synced else one.name


def geometric_mean(values: Sequence[float]) -> float:
    """The mean for ratios."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


# --- the report -----------------------------------------------------------------------------------


def report(found: Results) -> str:
    """All tables of a run."""
    if not found.measurements:
        return "nothing was measured"
    table = Table(found)
    parts = [header(found), _times(table)]
    parts += [_ratios(table, baseline) for baseline in BASELINES if baseline in table.targets]
    parts += [_servers(table), _requests(found), _crowds(found), _refusals(found)]
    return "\n\n".join(part for part in parts if part)


def header(found: Results) -> str:
    """Where and when, and what served, in one line."""
    at = found.environment
    peer = at.get("fuse_overlayfs") or "no fuse-overlayfs"
    served = [f"{name} through {by}" for name, by in at.get("transports", {}).items()]
    return (
        f"commit {at.get('commit')}, {at.get('when')}, kernel {at.get('kernel')}, "
        f"{at.get('cpus')} x {at.get('cpu')}, {at.get('fs')}, Python {at.get('python')}, "
        f"{', '.join([peer, *served])}, "
        f"load {at.get('load')} before and {at.get('load_at_end')} after"
    )


def _times(table: Table) -> str:
    rows = [["work, ms (median)", *table.targets]]
    for workload in table.workloads:
        cells = (
            _median(m.work_s * 1000 for m in table.of(workload, target)) for target in table.targets
        )
        rows.append([workload, *cells])
    return aligned(rows)


def _median(values: Iterable[float | None], digits: int = 1) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{digits}f}" if known else "-"


def _ratios(table: Table, baseline: str) -> str:
    found = {
        (workload, name): table.ratio(workload, name, baseline)
        for workload in table.workloads
        for name in table.targets
        if name != baseline
    }
    names = [n for n in table.targets if any(found.get((w, n)) for w in table.workloads)]
    rows = [[f"times of {baseline}", *names]]
    for workload in table.workloads:
        ratios = [found[workload, name] for name in names]
        rows.append([workload, *("-" if ratio is None else str(ratio) for ratio in ratios)])
    means = [table.mean(name, baseline) for name in names]
    shown = ("-" if mean is None else f"{mean[0]:.2f} of {mean[1]}" for mean in means)
    rows.append(["geometric mean", *shown])
    notes = "The mean leaves out mount and unmount."
    if any(ratio is not None and ratio.unsynced for ratio in found.values()):
        notes += f"\n{_MARK} {_FAIRNESS}"
    return f"{aligned(rows)}\n{notes}"


def _servers(table: Table) -> str:
    """Processor time of the servers per operation, and their memory after the work."""
    served = [
        target
        for target in table.targets
        if any(m.server_cpu_s is not None for w in table.workloads for m in table.of(w, target))
    ]
    if not served:
        return ""
    rows = [["server: CPU us each; private, resident MiB", *served]]
    for workload in table.workloads:
        cells = [_server(table.of(workload, target)) for target in served]
        if any(cell != "-" for cell in cells):
            rows.append([f"{workload} ({table.units[workload]})", *cells])
    return aligned(rows)


def _server(records: Sequence[Measurement]) -> str:
    watched = [m for m in records if m.server_cpu_s is not None]
    if not watched:
        return "-"
    cpu = _median((m.server_cpu_s or 0) / m.operations * 1e6 for m in watched)
    private, resident = (
        _median((kib or 0) / 1024 for kib in values)
        for values in ([m.private_kib for m in watched], [m.rss_kib for m in watched])
    )
    return f"{cpu}; {private}, {resident}"


def _requests(found: Results) -> str:
    if not found.requests:
        return ""
    rows = [["round trips", "target", "all", "each", "by opcode, each"]]
    for one in found.requests:
        total = sum(one.by_opcode.values())
        each = ", ".join(
            f"{opcode} {count / one.operations:.3g}"
            for opcode, count in sorted(one.by_opcode.items(), key=lambda item: -item[1])
        )
        rows.append(
            [
                f"{one.workload} ({one.unit})",
                one.target,
                f"{total}",
                f"{total / one.operations:.3g}",
                each or "none",
            ]
        )
    return aligned(rows, left=(0, 1, 4))


def _crowds(found: Results) -> str:
    if not found.crowds:
        return ""
    rows = [["mounts at once (median)", "mounts", "mount, s", "unmount, s", "private MiB"]]
    for target in dict.fromkeys(crowd.target for crowd in found.crowds):
        mine = [crowd for crowd in found.crowds if crowd.target == target]
        rows.append(
            [
                target,
                f"{mine[0].mounts}",
                _median((crowd.mount_s for crowd in mine), 2),
                _median((crowd.unmount_s for crowd in mine), 2),
                _median(crowd.private_kib / 1024 for crowd in mine),
            ]
        )
    return aligned(rows)


def _refusals(found: Results) -> str:
    lines = [f"{one.workload}: not on {one.target}: {one.reason}" for one in found.refusals]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows as text in columns; those of `left` begin at the left. The first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * min(max(len(line) for line in lines), 120))
    return "\n".join(lines)


# --- two runs -------------------------------------------------------------------------------------


def change(before: Results, after: Results, baseline: str, target: str) -> str:
    """How the ratio of `target` to `baseline` moved from one run to another."""
    old, new = Table(before), Table(after)
    rows = [[f"{target}, times of {baseline}", "before", "after", "after/before"]]
    moved = []
    for workload in new.workloads:
        ratios = old.ratio(workload, target, baseline), new.ratio(workload, target, baseline)
        if ratios[0] is None or ratios[1] is None:
            continue
        moved.append(ratios[1].median / ratios[0].median)
        rows.append([workload, str(ratios[0]), str(ratios[1]), f"{moved[-1]:.2f}"])
    if moved:
        rows.append(["geometric mean", "", "", f"{geometric_mean(moved):.2f}"])
    return aligned(rows)


def main(argv: list[str]) -> int:
    """``./dev bench compare FILE [LATER]``."""
    parser = argparse.ArgumentParser(prog="./dev bench compare", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON file of a run")
    parser.add_argument("later", type=Path, nargs="?", help="that of a later run")
    parser.add_argument("--target", default="unionfs2")
    parser.add_argument("--baseline", default="kernel", help="for two files (default: kernel)")
    arguments = parser.parse_args(argv)
    found = results.load(arguments.results)
    if arguments.later is None:
        print(report(found))
    else:
        later = results.load(arguments.later)
        print(change(found, later, arguments.baseline, arguments.target))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Tables of ratios from measurements.

A ratio is formed within one repeat, between two targets that took their turn next to each other,
and then the median over the repeats is shown with the smallest and the largest beside it. Ratios
of totals from different hours say nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BASELINES = ("kernel", "fuse-overlayfs")
Record = dict[str, Any]


def load(path: Path) -> list[Record]:
    """Records of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _in_order(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(record[key] for record in records))


def ratios(
    records: Sequence[Record], workload: str, target: str, baseline: str, phase: str = "work_s"
) -> list[float]:
    """The ratio in each repeat that has both."""

    def by_turn(name: str) -> dict[tuple[Any, Any], float]:
        return {
            (record.get("when"), record["turn"]): record[phase]
            for record in records
            if record["workload"] == workload and record["target"] == name
        }

    mine, theirs = by_turn(target), by_turn(baseline)
    return [mine[turn] / theirs[turn] for turn in mine if theirs.get(turn)]


def report(records: Sequence[Record]) -> str:
    """Times of each target, then ratios to each baseline, then the mounts."""
    if not records:
        return "nothing was measured"
    parts = [_header(records), _times(records)]
    names = _in_order(records, "target")
    parts += [_ratio_table(records, baseline) for baseline in BASELINES if baseline in names]
    parts.append(_mounts(records))
    return "\n\n".join(parts)


def _header(records: Sequence[Record]) -> str:
    first = records[0]
    peer = first.get("fuse_overlayfs") or "no fuse-overlayfs"
    return (
        f"commit {first.get('commit')}, {first.get('when')}, kernel {first.get('kernel')}, "
        f"{first.get('cpus')} x {first.get('cpu')}, {first.get('fs')}, Python "
        f"{first.get('python')}, {peer}, load {first.get('load')} at the start"
    )


def _times(records: Sequence[Record]) -> str:
    names = _in_order(records, "target")
    rows = [["work, ms (median)", *names]]
    for workload in _in_order(records, "workload"):
        row = [workload]
        for name in names:
            found = [
                record["work_s"] * 1000
                for record in records
                if record["workload"] == workload and record["target"] == name
            ]
            row.append(f"{statistics.median(found):.1f}" if found else "-")
        rows.append(row)
    return _table(rows)


def _ratio_table(records: Sequence[Record], baseline: str) -> str:
    names = [name for name in _in_order(records, "target") if name != baseline]
    rows = [[f"times of {baseline}", *names]]
    medians: dict[str, list[float]] = {name: [] for name in names}
    for workload in _in_order(records, "workload"):
        row = [workload]
        for name in names:
            found = ratios(records, workload, name, baseline)
            if not found:
                row.append("-")
                continue
            median = statistics.median(found)
            medians[name].append(median)
            row.append(f"{median:.2f} ({min(found):.2f}-{max(found):.2f})")
        rows.append(row)
    means = [f"{_geometric(medians[name]):.2f}" if medians[name] else "-" for name in names]
    rows.append(["geometric mean", *means])
    return _table(rows)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _mounts(records: Sequence[Record]) -> str:
    rows = [["median, ms", "mount", "unmount"]]
    for name in _in_order(records, "target"):
        mine = [record for record in records if record["target"] == name]
        rows.append(
            [
                name,
                *(
                    f"{statistics.median(record[phase] for record in mine) * 1000:.1f}"
                    for phase in ("mount_s", "unmount_s")
                ),
            ]
        )
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def change(before: Sequence[Record], after: Sequence[Record], baseline: str, target: str) -> str:
    """How the ratio of `target` to `baseline` moved from one file of results to another."""
    rows = [[f"{target}, times of {baseline}", "before", "after", "after/before"]]
    for workload in _in_order(after, "workload"):
        old = ratios(before, workload, target, baseline)
        new = ratios(after, workload, target, baseline)
        if not old or not new:
            continue
        medians = statistics.median(old), statistics.median(new)
        rows.append(
            [
                workload,
                *(
                    f"{median:.2f} ({min(found):.2f}-{max(found):.2f})"
                    for median, found in zip(medians, (old, new), strict=True)
                ),
                f"{medians[1] / medians[0]:.2f}",
            ]
        )
    return _table(rows)


def main(argv: list[str]) -> int:
    """``python -m bench compare FILE [LATER]``."""
    parser = argparse.ArgumentParser(prog="bench compare", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON lines of a run")
    parser.add_argument("later", type=Path, nargs="?", help="those of a later run")
    parser.add_argument("--target", default="unionfs2")
    parser.add_argument("--baseline", default="kernel", help="for two files (default: kernel)")
    arguments = parser.parse_args(argv)
    records = load(arguments.results)
    if arguments.later is None:
        print(report(records))
    else:
        later = load(arguments.later)
        print(change(records, later, arguments.baseline, arguments.target))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

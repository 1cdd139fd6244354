"""``./dev bench row FILE``: a row for bench/RESULTS.md, but for its last column.

A cell is our time as a multiple of the kernel overlay's, with the peer's in brackets; the second
mean is our time as a multiple of the peer's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from bench import results
from bench.compare import Table

OURS: Final = "unionfs2"
KERNEL: Final = "kernel"
PEER: Final = "fuse-overlayfs"
COLUMNS: Final = (
    "stat-cold",
    "read-cold",
    "missing-cold",
    "lookup-128",
    "list-10000",
    "read-seq",
    "read-random",
    "write-seq",
    "write-small",
    "untar",
    "rm-lower",
    "copyup-append",
    "git-status",
    "pip-install",
    "readers-4",
)


def head() -> str:
    """The first two lines of the table."""
    names = ["date", "commit", "machine", "mean / kernel", "mean / peer", *COLUMNS, "what changed"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def row(found: results.Results, target: str = OURS) -> str:
    """One line of it."""
    table = Table(found)
    at = found.environment
    means = [_mean(table, target, KERNEL), _mean(table, target, PEER)]
    peer = _mean(table, PEER, KERNEL)
    cells = [
        str(at["when"])[:10],
        f"{at['commit']}",
        _machine(at),
        f"{means[0]} [{peer}]",
        means[1],
        *(f"{_cell(table, name, target)} [{_cell(table, name, PEER)}]" for name in COLUMNS),
    ]
    return f"| {' | '.join(cells)} |  |"


def _machine(at: dict[str, Any]) -> str:
    kernel = ".".join(str(at["kernel"]).split(".")[:2])
    return (
        f"{at['cpus']} CPUs, kernel {kernel}, {at['fs']}, Python {at['python']}, "
        f"{at['fuse_overlayfs'].replace(': version', '')}"
    )


def _mean(table: Table, target: str, baseline: str) -> str:
    mean = table.mean(target, baseline)
    return "-" if mean is None else f"{mean[0]:.2f}"


def _cell(table: Table, workload: str, target: str) -> str:
    ratio = table.ratio(workload, target, KERNEL)
    return "-" if ratio is None else f"{ratio.median:.3g}"


def main(argv: list[str]) -> int:
    """Print the row, with ``--head`` below the head of the table."""
    parser = argparse.ArgumentParser(prog="./dev bench row", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON file of a run")
    parser.add_argument("--target", default=OURS)
    parser.add_argument("--head", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.head:
        print(head())
    print(row(results.load(arguments.results), arguments.target))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

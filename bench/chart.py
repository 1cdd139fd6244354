"""Charts of a run, as SVG: ratios to the kernel's overlay, and lookups against many layers.

The text stays text and nothing depends on the day or on chance, so that a new drawing of the same
figures is the same file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, Final

from bench import mounting, results
from bench.compare import Table
from bench.results import Results
from bench.workloads import layers

BASELINE: Final = "kernel"
#: Target -> colour, in the order of the legend; a target that did not run is left out.
SHOWN: Final = {
    "fuse-overlayfs": "#8c96a3",
    "unionfs2-pyfuse3": "#e39b3c",
    "unionfs2": "#2f6fb4",
}
BASELINE_COLOUR: Final = "#3d8f5a"
_STYLE: Final = {
    "svg.hashsalt": "unionfs2",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def draw(found: Results, folder: Path) -> list[Path]:
    """Draw what the measurements are enough for; the files written."""
    import matplotlib as mpl  # noqa: PLC0415 - needed for charts only, and slow to load

    mpl.use("svg")
    table = Table(found)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with mpl.rc_context(_STYLE):
        for name, figure in (
            ("ratios", _ratio_figure(table, _caption(found))),
            ("layers", _layer_figure(table)),
        ):
            if figure is not None:
                path = folder / f"{name}.svg"
                figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
                drawn.append(path)
    return drawn


def _caption(found: Results) -> str:
    at = found.environment
    return (
        f"commit {at.get('commit')}, kernel {at.get('kernel')}, {at.get('cpus')} x "
        f"{at.get('cpu')}, {at.get('fs')}, {at.get('fuse_overlayfs')}"
    )


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    figure = Figure(figsize=(width, height), facecolor="white")
    return figure, figure.add_subplot()


def _ratio_figure(table: Table, caption: str) -> Any:
    """Horizontal bars, one group for each workload; the whiskers are the spread over the turns."""
    shown = [name for name in SHOWN if name in table.targets]
    ratios = {
        name: [(row, table.ratio(workload, name, BASELINE)) for row, workload in _rows(table)]
        for name in shown
    }
    if not any(ratio for found in ratios.values() for _, ratio in found):
        return None
    figure, axes = _figure(8, 1.2 + 0.1 * (len(shown) + 1) * len(_rows(table)))
    thickness = 0.85 / len(shown)
    for place, name in enumerate(shown):
        known = [(row, ratio) for row, ratio in ratios[name] if ratio is not None]
        medians = [ratio.median for _, ratio in known]
        axes.barh(
            [row + (place - (len(shown) - 1) / 2) * thickness for row, _ in known],
            [median - 1 for median in medians],
            left=1,
            height=thickness,
            color=SHOWN[name],
            label=_label(table, name),
            xerr=[
                [ratio.median - ratio.least for _, ratio in known],
                [ratio.most - ratio.median for _, ratio in known],
            ],
            error_kw={"elinewidth": 0.6, "ecolor": "#00000080"},
        )
    axes.set_xscale("log")
    axes.axvline(1, color=BASELINE_COLOUR, linewidth=1.2)
    axes.set_yticks([row for row, _ in _rows(table)], [workload for _, workload in _rows(table)])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    _plain_numbers(axes.xaxis)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel(f"times of the kernel's overlay (line), median and spread\n{caption}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(shown), frameon=False)
    return figure


def _rows(table: Table) -> list[tuple[int, str]]:
    """Workloads from the top down. Mounting is not among them: the kernel does it in no time."""
    return list(enumerate(w for w in table.workloads if table.families[w] != mounting.FAMILY))


def _label(table: Table, name: str) -> str:
    mean = table.mean(name, BASELINE)
    return name if mean is None else f"{name} (mean {mean[0]:.2f})"


def _layer_figure(table: Table) -> Any:
    """A line for each target: microseconds of one cold lookup against the number of layers."""
    lines = {
        name: points
        for name in (BASELINE, *SHOWN)
        if len(points := _lookup_points(table, name)) > 1
    }
    if not lines:
        return None
    figure, axes = _figure(6, 3.2)
    for name, points in lines.items():
        colour = SHOWN.get(name, BASELINE_COLOUR)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(layers.COUNTS, [f"{count}" for count in layers.COUNTS])
    axes.minorticks_off()
    _plain_numbers(axes.yaxis)
    axes.grid(linewidth=0.4)
    axes.set_xlabel("lower layers")
    axes.set_ylabel("us for one cold lookup")
    axes.legend(frameon=False)
    return figure


def _lookup_points(table: Table, target: str) -> list[tuple[int, float]]:
    return [
        (count, statistics.median(m.work_s / m.operations * 1e6 for m in measured))
        for count in layers.COUNTS
        if (measured := table.of(f"lookup-{count}", target))
    ]


def _plain_numbers(axis: Any) -> None:
    """10 instead of ten to the power of one."""
    from matplotlib.ticker import FuncFormatter  # noqa: PLC0415 - as above

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def main(argv: list[str]) -> int:
    """``./dev bench chart FILE``."""
    parser = argparse.ArgumentParser(prog="./dev bench chart", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON file of a run")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/bench"))
    arguments = parser.parse_args(argv)
    for path in draw(results.load(arguments.results), arguments.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``./dev bench``: run workloads on targets, print the tables, keep the results, draw the charts.

A workload is done on every target before any does it again; what is compared was measured within
the same minute. ``--list`` shows what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench import chart, compare, disk, measure, mounting, targets, workloads
from bench.environment import environment
from bench.turns import LEAST_REPEAT, Plan, Run

QUICK_DIVISOR: Final = 10
REPEAT: Final = 5
MINUTES: Final = 24.0
MOUNTING: Final = mounting.FAMILY
_ROOT = Path(__file__).resolve().parent.parent
CHARTS = _ROOT / "docs" / "bench"


def _parser() -> argparse.ArgumentParser:
    names = [*workloads.BY_NAME, MOUNTING]
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two turns")
    parser.add_argument("--headline", action="store_true", help=", ".join(workloads.HEADLINE))
    parser.add_argument("--workload", action="append", choices=names, metavar="NAME")
    parser.add_argument("--family", action="append", choices=_families(), default=[])
    parser.add_argument("--target", action="append", choices=list(targets.all_targets()))
    parser.add_argument("--repeat", type=int, help=f"turns (default: {REPEAT}, with --quick 2)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="most that it may take (default: %(default)g); "
        f"{LEAST_REPEAT} turns are done in any case",
    )
    parser.add_argument("--options", default="", help="further mount options for unionfs2")
    parser.add_argument("--peer", default="fuse-overlayfs", help="program of fuse-overlayfs")
    parser.add_argument("--crowd", type=int, help="mounts at once (default: 100, with --quick 10)")
    parser.add_argument(
        "--scratch", type=Path, help="folder to work in (default: a fresh ext4 image, as root)"
    )
    parser.add_argument("--output", type=Path, help="JSON file (default: one below build/bench)")
    parser.add_argument(
        "--charts", type=Path, help="draw into this folder (default: docs/bench for a whole run)"
    )
    parser.add_argument("--list", action="store_true", help="list workloads and targets")
    return parser


def _families() -> list[str]:
    return list(dict.fromkeys(workload.family for workload in workloads.ALL))


def main(argv: list[str]) -> int:
    """``./dev bench``; 0 when everything chosen was measured."""
    arguments = _parser().parse_args(argv)
    if arguments.list:
        _list()
        return 0
    output = arguments.output or _default_output()
    with targets.cleaning_up_when_told_to_end(), _scratch(arguments.scratch) as scratch:
        plan = _plan(arguments, scratch)
        found = Run(plan, scratch, output, arguments.peer).all()
    print(compare.report(found))
    print(f"\nresults: {output}")
    folder = arguments.charts or (CHARTS if _is_whole(arguments) else None)
    if folder is not None:
        for path in chart.draw(found, folder):
            print(f"chart: {path}")
    return 0


@contextlib.contextmanager
def _scratch(wanted: Path | None) -> Iterator[Path]:
    """A folder to work in: below `wanted`, else on a file system of our own if that can be."""
    folder = Path(tempfile.mkdtemp(prefix="unionfs2-bench-", dir=wanted))
    try:
        with contextlib.ExitStack() as stack:
            reason = disk.why_not()
            if wanted is not None:
                yield folder
            elif reason is None:
                yield stack.enter_context(disk.image(folder))
            else:
                print(f"measured in {folder}, not on an image: {reason}", file=sys.stderr)
                yield folder
    finally:
        shutil.rmtree(folder)


def _list() -> None:
    for workload in workloads.ALL:
        print(f"{workload.family:<10} {workload.name:<16} {workload.what}")
    print(f"{mounting.FAMILY:<10} {MOUNTING:<16} mount, unmount, and 100 mounts at once\n")
    for name, target in targets.all_targets().items():
        families = ", ".join(target.about.families) or "all"
        print(f"{name:<20} {target.about.options:<30} {families}")


def _plan(arguments: argparse.Namespace, scratch: Path) -> Plan:
    names = _names(arguments)
    chosen = [workloads.BY_NAME[name] for name in names if name != MOUNTING]
    if arguments.quick:
        chosen = [workload.scaled(QUICK_DIVISOR) for workload in chosen]
    known = targets.all_targets(arguments.options, arguments.peer)
    usable = _usable(known, arguments.target, scratch)
    return Plan(
        workloads=chosen,
        targets=[target for target, _ in usable.values()],
        transports={name: served for name, (_, served) in usable.items() if served},
        repeat=arguments.repeat or (2 if arguments.quick else REPEAT),
        minutes=arguments.minutes,
        mounting=MOUNTING in names,
        crowd=arguments.crowd or (10 if arguments.quick else mounting.CROWD),
        only_asked=arguments.target is not None,
    )


def _names(arguments: argparse.Namespace) -> list[str]:
    by_family = [w.name for w in workloads.ALL if w.family in arguments.family]
    asked = [*by_family, *(arguments.workload or ())]
    if arguments.headline:
        asked += workloads.HEADLINE
    return list(dict.fromkeys(asked)) or [*workloads.BY_NAME, MOUNTING]


def _is_whole(arguments: argparse.Namespace) -> bool:
    return not (
        arguments.quick
        or arguments.headline
        or arguments.workload
        or arguments.family
        or arguments.target
        or arguments.options
    )


def _default_output() -> Path:
    found = environment(_ROOT)
    when = found["when"][:19].replace(":", "")
    return _ROOT / "build" / "bench" / f"{when}-{found['commit']}.json"


def _usable(
    known: dict[str, targets.Target], wanted: list[str] | None, scratch: Path
) -> dict[str, tuple[targets.Target, str | None]]:
    """The targets to run on, with what serves them; one that was asked for must work here."""
    usable = {}
    for name, target in known.items():
        if wanted and name not in wanted:
            continue
        try:
            usable[name] = target, _tried(target, scratch)
        except targets.MountRefusedError as exc:
            reason = str(exc).splitlines()[-1]
            if wanted:
                raise SystemExit(f"bench: target {name} cannot be used: {reason}") from exc
            print(f"left out: {name}, {reason}", file=sys.stderr)
    return usable


def _tried(target: targets.Target, scratch: Path) -> str | None:
    """Mount an empty directory; the transport that served, None for what is not ours.

    MountRefusedError when that is not possible here.
    """
    reason = target.unavailable()
    if reason is not None:
        raise targets.MountRefusedError(reason)
    lower = scratch / "probe"
    lower.mkdir(exist_ok=True)
    with measure.fresh_layers(target, (lower,), scratch) as layers:
        target.prepare(layers)
        target.mount(layers)
        served = targets.served_by(layers) if target.name != "plain" else None
        target.unmount(layers)
    return served


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

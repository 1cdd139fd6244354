"""``./dev fuzz``: random operations on the kernel's overlay and on our mount, all compared.

    ./dev fuzz --minutes 10
    ./dev fuzz --histories 250 --ops 400          a fixed number of histories
    ./dev fuzz --seed 1234 --histories 1          one history again, from its seed
    ./dev fuzz --replay build/fuzz/seed-1234.py   a shrunk script again
    ./dev fuzz --transport pyfuse3                one of the programs that speak to /dev/fuse
    ./dev fuzz --options writeback=on             of our mount, as unionfs2(1) has them
    ./dev fuzz --side kernel                      the kernel against itself: must never differ

Exit status: 0 no difference, 1 differences (each with its seed and a script that replays), 2 the
machine cannot run here.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.differential import arena, campaign, pieces, privacy, script, sides
from tests.differential.campaign import Plan, Totals
from tests.differential.pieces import Dialect
from tests.differential.sides import Side
from unionfs2 import transports

#: Who meets the kernel; the transport means something to ours only.
SIDES: dict[str, Callable[[str], Side]] = {
    "fuse": sides.unionfs2_server,
    "limited": sides.unionfs2_limited,
    "command": sides.unionfs2_command,
    "kernel": lambda _: sides.KernelSide("kernel again"),
    "fuse-overlayfs": lambda _: sides.fuse_overlayfs(),
}
DIALECTS = {"trusted": pieces.TRUSTED, "userxattr": pieces.USERXATTR}
_ENDLESS = 10**9


def parser() -> argparse.ArgumentParser:
    """The arguments of ``./dev fuzz``."""
    found = argparse.ArgumentParser(prog="./dev fuzz", description=__doc__, allow_abbrev=False)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("--minutes", type=float, default=0.0, help="stop after this time")
    found.add_argument("--histories", type=int, default=0, help="stop after this many histories")
    found.add_argument("--ops", type=int, default=400, help="operations per history (%(default)s)")
    found.add_argument("--seed", type=int, help="first seed; history n has seed + n")
    found.add_argument("--side", choices=SIDES, default="fuse", help="who meets the kernel")
    found.add_argument("--transport", choices=("auto", *transports.SERVED), default="auto")
    found.add_argument("--options", default="", help="further mount options of the side 'fuse'")
    found.add_argument("--dialect", choices=DIALECTS, default="trusted")
    found.add_argument("--userns", action="store_true", help="as an ordinary user, userxattr")
    found.add_argument("--fs", choices=arena.KINDS, help="scratch file system (ext4)")
    found.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    found.add_argument("--replay", type=Path, help="run one script instead of random histories")
    found.add_argument("--report", type=Path, help="where scripts go (build/fuzz)")
    found.add_argument("--shrink-seconds", type=float, default=60.0)
    found.add_argument("--findings", type=int, default=10, help="stop after this many differences")
    return found


def plan_of(options: argparse.Namespace) -> Plan:
    """Arguments as a plan."""
    seed = options.seed if options.seed is not None else int(time.time()) % 1_000_000 * 1000
    count = options.histories or (_ENDLESS if options.minutes else 50)
    transport = transports.chosen(options.transport)
    return Plan(
        side=_side(options),
        transport=transport,
        dialect=_dialect(options).on(transport),
        seeds=range(seed, seed + count),
        op_count=options.ops,
        seconds=options.minutes * 60,
        arena=options.fs or ("dir" if options.userns else "ext4"),
        jobs=max(1, min(options.jobs, count)),
        report=_report(options),
        shrink_s=options.shrink_seconds,
        findings_max=options.findings,
    )


def _side(options: argparse.Namespace) -> Callable[[str], Side]:
    if options.options and options.side == "fuse":
        return functools.partial(sides.unionfs2_server, more=f",{options.options}")
    return SIDES[options.side]


def _report(options: argparse.Namespace) -> Path:
    found: Path | None = options.report
    if found is not None:
        return found.absolute()
    # The user of the namespace may not be allowed to write to the source tree.
    return Path("/tmp/unionfs2-fuzz") if options.userns else Path("build/fuzz").absolute()


def _dialect(options: argparse.Namespace) -> Dialect:
    if not options.userns:
        return DIALECTS[options.dialect]
    if os.geteuid() == 0:
        return pieces.USER_NAMESPACE
    return pieces.USER_NAMESPACE._replace(callers=("root",))


def _words(options: argparse.Namespace) -> str:
    """What has to be said again to meet the same two sides on the same file system."""
    words = " --userns" if options.userns else ""
    for name, usual in (("side", "fuse"), ("options", ""), ("dialect", "trusted"), ("fs", None)):
        value = getattr(options, name)
        if value != usual:
            words += f" --{name} {value}"
    return words


class _Progress:
    """One line that is rewritten on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.shown = 0
        self.last = time.monotonic()

    def __call__(self, totals: Totals) -> None:
        for finding in totals.findings[self.shown :]:
            print(f"\n{campaign.describe(finding)}", flush=True)
        self.shown = len(totals.findings)
        if sys.stdout.isatty():
            print(f"\r{totals.line()}", end="", flush=True)
        elif time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(totals.line(), flush=True)


def fuzz(plan: Plan, more: str = "") -> int:
    """Run a campaign and print what it found; *more* are words that a replay needs."""
    first = plan.seeds[0]
    print(f"seed {first}, {plan.op_count} operations per history, {plan.jobs} processes")
    progress = _Progress()
    totals = campaign.run(plan, progress)
    progress(totals)
    print(f"{'' if not sys.stdout.isatty() else chr(10)}total: {totals.line()}")
    for ident, count in sorted(totals.excused.items()):
        print(f"known difference {ident}: {count} times")
    for finding in totals.findings:
        words = f"./dev fuzz --transport {plan.transport}{more}"
        print(f"again: {words} --seed {finding.seed} --histories 1 --ops {plan.op_count}")
        print(f"short: {words} --replay {plan.report / f'seed-{finding.seed}.py'}")
    for failure in totals.failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if totals.failures else 1 if totals.findings else 0


def replay(plan: Plan, path: Path) -> int:
    """Run one saved history."""
    history = script.load(path.read_text(encoding="utf-8"))
    privacy.private_mounts()
    with campaign.machine_for(plan) as machine:
        outcome = machine.run(history)
    for difference in outcome.differences:
        print(difference)
    print(f"{outcome.op_count} operations, {len(outcome.differences)} differences")
    return 1 if outcome.differences else 0


def main(argv: list[str]) -> int:
    """Entry point of ``python -m devtools.fuzz``."""
    options = parser().parse_args(argv)
    plan = plan_of(options)

    def work() -> int:
        try:
            return replay(plan, options.replay) if options.replay else fuzz(plan, _words(options))
        except (arena.ArenaError, OSError) as exc:
            print(f"./dev fuzz: {exc}", file=sys.stderr)
            return 2

    return privacy.in_user_namespace(work) if options.userns else work()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

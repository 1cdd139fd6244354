"""Run workloads on targets, interleaved, and write one JSON line per measurement.

Interleaved means: in each repeat, every target does the workload once before any does it again, and
the order of the targets turns with each repeat. A machine that slows down meanwhile slows all of
them. Four phases are timed: prepare (not part of any comparison), mount, work, unmount.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from bench import compare, targets, workloads

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
QUICK_DIVISOR = 10


def environment(scratch: Path) -> dict[str, Any]:
    """Where the figures come from: kernel, processor, file system, commit, versions."""
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "fs": _said("stat", "-f", "-c", "%T", os.fspath(scratch)),
        "python": platform.python_version(),
        "commit": _commit(),
        "fuse_overlayfs": _peer_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _commit() -> str:
    here = os.fspath(Path(__file__).parent)
    commit = _said("git", "-C", here, "rev-parse", "--short", "HEAD")
    changed = _said("git", "-C", here, "status", "--porcelain", "-uno", "--", "../unionfs2")
    return commit + ("+changes" if changed else "")


def _peer_version() -> str:
    for line in _said("fuse-overlayfs", "--version").splitlines():
        if line.startswith("fuse-overlayfs"):
            return line
    return ""


def _said(*command: str) -> str:
    """Output of a program; empty when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# --- one measurement ------------------------------------------------------------------------------


def measure(
    workload: workloads.Workload, target: targets.Target, lower: Path, scratch: Path
) -> dict[str, float]:
    """Seconds of each phase of one workload on one target, everything fresh but `lower`."""
    base = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=scratch))
    phases: dict[str, float] = {}
    layers = targets.Layers.below(base, (lower,))
    try:
        with _timed(phases, "prepare"):
            target.prepare(layers)
            _warm(lower if target.name != "plain" else layers.merged)
            os.sync()
        _drop_names()
        with _timed(phases, "mount"):
            target.mount(layers)
        if workload.before is not None:
            workload.before(layers.merged, workload.size)
        with _timed(phases, "work"):
            workload.work(layers.merged, workload.size)
        with _timed(phases, "unmount"):
            target.unmount(layers)
    finally:
        targets.clear_away(layers.merged)
        shutil.rmtree(base)
    return phases


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - started


def _warm(tree: Path) -> None:
    """Bring the content of every file into the page cache."""
    buffer = bytearray(1 << 20)
    for directory, _, files in os.walk(tree):
        for name in files:
            with (Path(directory) / name).open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _drop_names() -> None:
    """Let the kernel forget names and inodes (as far as it can). Without root: a warmer start."""
    if os.access(_DROP_CACHES, os.W_OK):
        _DROP_CACHES.write_text("2")


# --- a run ----------------------------------------------------------------------------------------


def run(
    chosen: Sequence[workloads.Workload],
    on: Sequence[targets.Target],
    repeat: int,
    scratch: Path,
    out: TextIO,
) -> list[dict[str, Any]]:
    """Measure everything; the records, each also written to `out` as it is made."""
    records = []
    where = environment(scratch)
    for workload in chosen:
        lower = Path(tempfile.mkdtemp(prefix=f"lower-{workload.name}-", dir=scratch))
        try:
            workload.build(lower, workload.size)
            for turn in range(repeat):
                shift = turn % len(on)
                for target in [*on[shift:], *on[:shift]]:
                    phases = measure(workload, target, lower, scratch)
                    record = {
                        "workload": workload.name,
                        "target": target.name,
                        "turn": turn,
                        "size": workload.size,
                        "unit": workload.unit,
                        **{f"{name}_s": round(seconds, 6) for name, seconds in phases.items()},
                        **where,
                    }
                    records.append(record)
                    out.write(json.dumps(record) + "\n")
                    out.flush()
                    _tell(record)
        finally:
            shutil.rmtree(lower)
    return records


def _tell(record: dict[str, Any]) -> None:
    each_us = record["work_s"] / record["size"] * 1e6
    print(
        f"{record['workload']:<14} {record['target']:<15} {record['turn']}  "
        f"mount {record['mount_s'] * 1000:7.1f} ms  work {record['work_s'] * 1000:9.1f} ms  "
        f"({each_us:8.1f} us/{record['unit']})  unmount {record['unmount_s'] * 1000:6.1f} ms",
        file=sys.stderr,
        flush=True,
    )


def main(argv: list[str]) -> int:
    """``python -m bench run``; 0 when everything chosen was measured."""
    parser = argparse.ArgumentParser(prog="bench run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two repeats")
    parser.add_argument("--headline", action="store_true", help=", ".join(workloads.HEADLINE))
    parser.add_argument("--workload", action="append", choices=[w.name for w in workloads.ALL])
    parser.add_argument("--target", action="append", choices=list(targets.all_targets()))
    parser.add_argument("--repeat", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--options", default="", help="further mount options for unionfs2")
    parser.add_argument("--scratch", type=Path, help="folder to work in (default: temporary)")
    parser.add_argument("--output", type=Path, help="append JSON lines to this file")
    arguments = parser.parse_args(argv)
    names = arguments.workload or (
        workloads.HEADLINE if arguments.headline else list(workloads.BY_NAME)
    )
    chosen = [workloads.BY_NAME[name] for name in names]
    if arguments.quick:
        chosen = [workload.scaled(QUICK_DIVISOR) for workload in chosen]
    repeat = arguments.repeat or (2 if arguments.quick else 5)
    on = _usable(targets.all_targets(arguments.options), arguments.target)
    scratch = Path(tempfile.mkdtemp(prefix="unionfs2-bench-", dir=arguments.scratch))
    try:
        with (
            targets.cleaning_up_when_told_to_end(),
            (arguments.output or scratch / "results").open("a", encoding="utf-8") as out,
        ):
            records = run(chosen, on, repeat, scratch, out)
    finally:
        shutil.rmtree(scratch)
    print(compare.report(records))
    return 0


def _usable(known: dict[str, targets.Target], wanted: list[str] | None) -> list[targets.Target]:
    """The targets to run on; one that was asked for by name must work here."""
    usable = []
    for name, target in known.items():
        if wanted and name not in wanted:
            continue
        reason = target.unavailable()
        if reason is None:
            usable.append(target)
        elif wanted:
            raise SystemExit(f"bench: target {name} cannot be used: {reason}")
        else:
            print(f"left out: {name}, {reason}", file=sys.stderr)
    return usable


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Many random histories, in several processes, with progress and replayable findings."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tests.differential import arena, generate, privacy, script
from tests.differential.compare import Difference
from tests.differential.machine import Machine
from tests.differential.pieces import Dialect
from tests.differential.script import History
from tests.differential.shrink import Shrinker
from tests.differential.sides import KernelSide, Side

#: How much of a history that could not be shrunk is printed; the saved script has all of it.
_SHOWN: Final = 25


class Plan(NamedTuple):
    """What a campaign runs. *seeds* are used in order until *seconds* are over (0: no limit)."""

    side: Callable[[str], Side]
    transport: str
    dialect: Dialect
    seeds: range
    op_count: int
    seconds: float
    arena: str
    jobs: int
    report: Path
    shrink_s: float = 60.0
    findings_max: int = 10


class Finding(NamedTuple):
    """A history that differs, shrunk, and what differs in it."""

    seed: int
    history: History
    differences: tuple[Difference, ...]
    tries: int


class Result(NamedTuple):
    """One history done."""

    seed: int
    op_count: int
    excused: Counter[str]
    finding: Finding | None


class Totals:
    """Sum over all results of a campaign."""

    def __init__(self) -> None:
        self.histories = 0
        self.ops = 0
        self.excused: Counter[str] = Counter()
        self.findings: list[Finding] = []
        self.failures: list[str] = []
        self.began = time.monotonic()

    def add(self, result: Result) -> None:
        self.histories += 1
        self.ops += result.op_count
        self.excused += result.excused
        if result.finding is not None:
            self.findings.append(result.finding)

    @property
    def seconds(self) -> float:
        """Since the start of the campaign."""
        return time.monotonic() - self.began

    def line(self) -> str:
        """The totals in one line."""
        rate = self.ops / max(self.seconds, 0.001)
        known = f", {sum(self.excused.values())} known" if self.excused else ""
        return (
            f"{self.histories} histories, {self.ops} operations, {len(self.findings)} differences"
            f"{known}, {self.seconds:.0f} s, {rate:.0f} operations/s"
        )


def run_one(machine: Machine, seed: int, plan: Plan) -> Result:
    """One history, shrunk when it differs."""
    history, source = generate.history(seed, plan.op_count, plan.dialect)
    outcome = machine.run(history, source)
    finding = None
    if outcome.differences:
        shrinker = Shrinker(
            lambda h: machine.run(h).differences, outcome.differences[0].kind, plan.shrink_s
        )
        small = shrinker.shrink(outcome.history)
        again = machine.run(small).differences or outcome.differences
        finding = Finding(seed, small, again, shrinker.tries)
    return Result(seed, outcome.op_count, outcome.excused, finding)


@contextmanager
def machine_for(plan: Plan) -> Iterator[Machine]:
    """A machine with an arena of its own."""
    with (
        arena.arena(plan.arena) as place,
        Machine(KernelSide(), plan.side(plan.transport), place) as machine,
    ):
        yield machine


def _job(plan: Plan, index: int, deadline: float, results: multiprocessing.Queue[object]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        privacy.private_mounts()
        with machine_for(plan) as machine:
            for seed in plan.seeds[index :: plan.jobs]:
                if deadline and time.monotonic() > deadline:
                    break
                results.put(run_one(machine, seed, plan))
    except KeyboardInterrupt:
        results.cancel_join_thread()  # the parent has stopped reading
        return
    except Exception as exc:  # noqa: BLE001 - reported by the parent, which fails then
        results.put(f"job {index}: {type(exc).__name__}: {exc}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to clean up
    results.put(None)


def run(plan: Plan, progress: Callable[[Totals], None]) -> Totals:
    """Run all jobs; *progress* is called about once a second."""
    totals = Totals()
    deadline = time.monotonic() + plan.seconds if plan.seconds else 0.0
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[object] = context.Queue()
    jobs = [
        context.Process(target=_job, args=(plan, index, deadline, results))
        for index in range(plan.jobs)
    ]
    for job in jobs:
        job.start()
    running = len(jobs)
    try:
        while running and len(totals.findings) < plan.findings_max:
            try:
                item = results.get(timeout=1.0)
            except queue.Empty:
                running = sum(job.is_alive() for job in jobs)
                progress(totals)
                continue
            if item is None:
                running -= 1
            elif isinstance(item, Result):
                totals.add(item)
                if item.finding is not None:
                    write_report(plan.report, item.finding)
                progress(totals)
            else:
                totals.failures.append(str(item))
    finally:
        _stop(jobs)
    return totals


def _stop(jobs: list[multiprocessing.context.ForkProcess]) -> None:
    for job in jobs:
        if job.is_alive() and job.pid is not None:
            os.kill(job.pid, signal.SIGTERM)
    for job in jobs:
        job.join(30)
        if job.is_alive():
            job.kill()
            job.join()


def write_report(directory: Path, finding: Finding) -> Path:
    """Save a finding as a script that replays."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"seed-{finding.seed}.py"
    comment = "".join(f"# {line}\n" for d in finding.differences[:5] for line in str(d).split("\n"))
    path.write_text(comment + script.dump(finding.history), encoding="utf-8")
    return path


def describe(finding: Finding) -> str:
    """A finding for people: operations one per line, layers, differences."""
    lines = [f"seed {finding.seed}, after {finding.tries} tries of shrinking:"]
    for index, layer in enumerate(finding.history.layers):
        lines += [f"  lower {index + 1}: {text}" for text in _briefs(layer)]
    lines += [f"  upper: {text}" for text in _briefs(finding.history.upper)]
    for number, phase in enumerate(finding.history.phases):
        if len(phase) > _SHOWN:
            lines.append(f"  phase {number}: {len(phase) - _SHOWN} operations, then")
        lines += [f"  phase {number}: {script.show(op)}" for op in phase[-_SHOWN:]]
    lines += [str(difference) for difference in finding.differences[:5]]
    return "\n".join(lines)


def _briefs(layer: script.Layer) -> list[str]:
    shown = [_brief(item) for item in layer[:_SHOWN]]
    return [*shown, f"and {len(layer) - _SHOWN} more"] if len(layer) > _SHOWN else shown


def _brief(item: script.Object) -> str:
    content = f" {item.content!r:.60}" if item.content is not None else ""
    marks = "".join(f" {key.decode(errors='replace')}={value!r}" for key, value in item.xattrs)
    owner = f"{item.uid}:{item.gid}"
    return script.shorten(f"{item.kind} {item.path!r} {item.mode:o} {owner}{content}{marks}")

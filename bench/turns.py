"""One run: workloads on targets, in turns, and the results of it in one JSON file.

Alternating means: in each turn, every target does the workload once before any does it again, and
the order of the targets moves on with each turn. A machine that slows down meanwhile slows all of
them. The first turn is a warm-up that is not timed; the requests to FUSE servers are counted in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench import measure, mounting, results, tracing
from bench.environment import environment, load
from bench.targets import MountRefusedError, Target
from bench.workloads.model import Tree, Workload
from bench.workloads.trees import NOTHING

LEAST_REPEAT: Final = 3
CROWD_TURNS: Final = 2


@dataclass(slots=True)
class Plan:
    """What to measure, and how long."""

    workloads: list[Workload]
    targets: list[Target]
    transports: dict[str, str]  # target -> what serves it, where that is ours
    repeat: int
    minutes: float
    mounting: bool
    crowd: int
    only_asked: bool = False  # targets were named: their sets are not limited to families

    def on(self, workload: Workload) -> list[Target]:
        """The targets that do `workload`."""
        return [
            target
            for target in self.targets
            if self.only_asked
            or not target.about.families
            or workload.family in target.about.families
        ]


@dataclass(slots=True)
class Trees:
    """Lower trees below `place`, each built when it is first asked for."""

    place: Path
    _built: dict[tuple[str, int], Path] = field(default_factory=dict)

    def lowers(self, tree: Tree, size: int) -> tuple[Path, ...]:
        """The layers of `tree` with `size`, topmost first."""
        root = self._built.get((tree.name, size))
        if root is None:
            root = self.place / f"{tree.name}-{size}"
            root.mkdir()
            tree.build(root, size)
            self._built[tree.name, size] = root
        return tree.lowers(root)

    def warm(self, tree: Tree, size: int) -> None:
        """Have the contents of its files in the page cache."""
        measure.warm(self._built[tree.name, size])


# --- a run ----------------------------------------------------------------------------------------


class Run:
    """One run of a plan; `found` is saved to `output` after each workload."""

    def __init__(
        self, plan: Plan, scratch: Path, output: Path, peer: str = "fuse-overlayfs"
    ) -> None:
        self._plan = plan
        self._scratch = scratch
        self._output = output
        self._trees = Trees(scratch / "trees")
        self._trees.place.mkdir()
        self._deadline = time.monotonic() + plan.minutes * 60
        sets = [target.about for target in plan.targets]
        where = {**environment(scratch, peer), "transports": plan.transports}
        self.found = results.Results(where, sets)

    def all(self) -> results.Results:
        """Measure everything that is planned."""
        with tracing.open_tracer() as tracer:
            if tracer is None:
                print("requests are not counted: the kernel does not let us trace", file=sys.stderr)
            for number, workload in enumerate(self._plan.workloads):
                left = len(self._plan.workloads) - number + 2 * self._plan.mounting
                self._workload(workload, self._share(left), tracer)
                self._save()
        if self._plan.mounting:
            self._mounting()
        self._save()
        return self.found

    def _share(self, left: int) -> float:
        """When the next of `left` equal parts of the time has passed."""
        now = time.monotonic()
        return now + max(0.0, self._deadline - now) / left

    def _save(self) -> None:
        self.found.environment["load_at_end"] = load()
        self.found.save(self._output)

    def _workload(self, workload: Workload, until: float, tracer: tracing.Tracer | None) -> None:
        lowers = self._trees.lowers(workload.tree, workload.size)
        self._trees.warm(workload.tree, workload.size)
        able = [
            target
            for target in self._plan.on(workload)
            if self._warm_up(workload, target, lowers, tracer)
        ]
        for turn in self._turns(until):
            self._trees.warm(workload.tree, workload.size)
            for target in _rotated(able, turn):
                outcome = measure.measure(workload, target, lowers, self._scratch)
                record = _record(workload, target, turn, outcome)
                self.found.measurements.append(record)
                _tell(record)

    def _turns(self, until: float) -> Iterator[int]:
        """Turns until there are enough, or the time is up and there are enough for a median."""
        for turn in range(self._plan.repeat):
            if turn >= LEAST_REPEAT and time.monotonic() > until:
                return
            yield turn

    def _warm_up(
        self,
        workload: Workload,
        target: Target,
        lowers: tuple[Path, ...],
        tracer: tracing.Tracer | None,
    ) -> bool:
        """Do it once without a stopwatch; False when the target cannot."""
        try:
            outcome = measure.measure(workload, target, lowers, self._scratch, tracer)
        except MountRefusedError as exc:
            reason = str(exc).splitlines()[-1][-300:]
            self.found.refusals.append(results.Refusal(workload.name, target.name, reason))
            print(f"{workload.name}: not on {target.name}: {reason}", file=sys.stderr)
            return False
        if outcome.requests is not None:
            counts = dict(outcome.requests.most_common())
            self.found.requests.append(
                results.Requests(
                    workload.name, target.name, workload.operations, workload.unit, counts
                )
            )
        return True

    def _mounting(self) -> None:
        lower = self._trees.lowers(NOTHING, 1)[0]
        on = [
            target
            for target in self._plan.targets
            if target.name != "plain" and (self._plan.only_asked or not target.about.families)
        ]
        for turn in self._turns(self._share(2)):
            for target in _rotated(on, turn):
                for record in mounting.cycles(target, lower, self._scratch, turn):
                    self.found.measurements.append(record)
                    _tell(record)
        for turn in range(min(CROWD_TURNS, self._plan.repeat)):
            for target in _rotated(on, turn):
                crowd = mounting.crowd(target, lower, self._scratch, turn, self._plan.crowd)
                self.found.crowds.append(crowd)
                _tell_crowd(crowd)


def _rotated(on: Sequence[Target], turn: int) -> list[Target]:
    shift = turn % len(on) if on else 0
    return [*on[shift:], *on[:shift]]


def _record(
    workload: Workload, target: Target, turn: int, outcome: measure.Outcome
) -> results.Measurement:
    seconds = {f"{name}_s": round(value, 6) for name, value in outcome.phases.items()}
    cpu_s, memory = outcome.server_cpu_s, outcome.memory
    return results.Measurement(
        workload=workload.name,
        family=workload.family,
        target=target.name,
        turn=turn,
        operations=workload.operations,
        unit=workload.unit,
        server_cpu_s=None if cpu_s is None else round(cpu_s, 6),
        rss_kib=None if memory is None else memory.rss_kib,
        private_kib=None if memory is None else memory.private_kib,
        **seconds,
    )


def _tell(record: results.Measurement) -> None:
    each_us = record.work_s / record.operations * 1e6
    print(
        f"{record.workload:<16} {record.target:<18} {record.turn}  "
        f"mount {record.mount_s * 1000:6.1f} ms  work {record.work_s * 1000:8.1f} ms  "
        f"({each_us:8.1f} us/{record.unit})  unmount {record.unmount_s * 1000:5.1f} ms",
        file=sys.stderr,
        flush=True,
    )


def _tell_crowd(crowd: results.Crowd) -> None:
    print(
        f"{crowd.mounts:<3} at once       {crowd.target:<18} {crowd.turn}  "
        f"mount {crowd.mount_s:6.2f} s   unmount {crowd.unmount_s:6.2f} s   "
        f"private {crowd.private_kib / 1024:6.1f} MiB",
        file=sys.stderr,
        flush=True,
    )

"""One measurement: a fresh mount, its work, and what its server used meanwhile.

Four phases are timed: prepare (not part of any comparison), mount, work, unmount. Whatever fails,
nothing stays mounted and no server stays behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import fuse_server, targets
from bench.tracing import Tracer
from bench.workloads.model import Workload

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(slots=True)
class Outcome:
    """Seconds of each phase; of a FUSE server also its processor time, memory and requests."""

    phases: dict[str, float] = field(default_factory=dict)
    server_cpu_s: float | None = None
    memory: fuse_server.Sample | None = None
    requests: Counter[str] | None = None


def measure(
    workload: Workload,
    target: targets.Target,
    lowers: tuple[Path, ...],
    scratch: Path,
    tracer: Tracer | None = None,
) -> Outcome:
    """Do `workload` on a fresh mount of `target`. With `tracer`, requests of the work are counted.

    MountRefusedError when the target cannot mount these layers.
    """
    outcome = Outcome()
    with fresh_layers(target, lowers, scratch, read_only=not workload.changes) as layers:
        with _timed(outcome, "prepare"):
            target.prepare(layers)
        settle()
        with _timed(outcome, "mount"):
            target.mount(layers)
        if workload.before is not None:
            workload.before(layers.merged, workload.size)
        with _server_watched(outcome, layers.merged, tracer), _timed(outcome, "work"):
            workload.work(layers.merged, workload.size)
        unmount = target.unmounter(layers)
        with _timed(outcome, "unmount"):
            unmount()
    return outcome


@contextlib.contextmanager
def fresh_layers(
    target: targets.Target, lowers: tuple[Path, ...], scratch: Path, *, read_only: bool = False
) -> Iterator[targets.Layers]:
    """Upper, work and mount point of their own; afterwards none of it is left."""
    base = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=scratch))
    layers = targets.Layers.below(base, lowers, read_only=read_only)
    try:
        yield layers
    finally:
        targets.clear_away(layers.merged)
        shutil.rmtree(base)


@contextlib.contextmanager
def _timed(outcome: Outcome, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    outcome.phases[name] = time.perf_counter() - started


@contextlib.contextmanager
def _server_watched(outcome: Outcome, merged: Path, tracer: Tracer | None) -> Iterator[None]:
    server = fuse_server.find_server(merged)
    if server is None:
        yield
        return
    started = fuse_server.cpu_seconds(server)
    if tracer is None:
        yield
    else:
        with tracer.counting(fuse_server.connection_of(merged)) as outcome.requests:
            yield
    outcome.server_cpu_s = fuse_server.cpu_seconds(server) - started
    outcome.memory = fuse_server.sample(server)


def settle() -> None:
    """Write back what is dirty and let the kernel forget names and inodes, as far as it can.

    Without root nothing is forgotten: a warmer start.
    """
    os.sync()
    if os.access(_DROP_CACHES, os.W_OK):
        _DROP_CACHES.write_text("2")


def warm(tree: Path) -> None:
    """Bring the content of every file into the page cache."""
    buffer = bytearray(1 << 20)
    for directory, _, files in os.walk(tree):
        for name in files:
            path = Path(directory) / name
            if path.stat().st_size == 0:
                continue
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

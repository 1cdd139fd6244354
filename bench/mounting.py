"""Mounting itself: one mount after the other, and very many at once.

A mount is done when the command is back and the path answers, an unmount when the server is gone:
what a container engine waits for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from bench import fuse_server, targets
from bench.measure import fresh_layers
from bench.results import Crowd, Measurement

FAMILY: Final = "mounting"
CYCLES: Final = 5
CROWD: Final = 100


def cycles(
    target: targets.Target, lower: Path, scratch: Path, turn: int, count: int = CYCLES
) -> list[Measurement]:
    """`count` mounts and unmounts, one after the other: a measurement of each of the two."""
    prepare_s = mount_s = unmount_s = 0.0
    for _ in range(count):
        with fresh_layers(target, (lower,), scratch) as layers:
            started = time.perf_counter()
            target.prepare(layers)
            prepared = time.perf_counter()
            target.mount(layers)
            os.listdir(layers.merged)
            mount_s += time.perf_counter() - prepared
            unmount = target.unmounter(layers)
            mounted = time.perf_counter()
            unmount()
            unmount_s += time.perf_counter() - mounted
        prepare_s += prepared - started
    phases = (prepare_s / count, mount_s / count, unmount_s / count)
    return [
        _measurement(name, target.name, turn, count, work_s, phases)
        for name, work_s in (("mount", mount_s), ("unmount", unmount_s))
    ]


def _measurement(
    name: str, target: str, turn: int, count: int, work_s: float, phases: tuple[float, float, float]
) -> Measurement:
    prepare_s, mount_s, unmount_s = (round(seconds, 6) for seconds in phases)
    return Measurement(
        workload=name,
        family=FAMILY,
        target=target,
        turn=turn,
        operations=count,
        unit="mount",
        prepare_s=prepare_s,
        mount_s=mount_s,
        work_s=round(work_s, 6),
        unmount_s=unmount_s,
    )


def crowd(
    target: targets.Target, lower: Path, scratch: Path, turn: int, count: int = CROWD
) -> Crowd:
    """Ask for `count` mounts at once; then how long it took and what all servers hold."""
    with _many_layers(target, lower, scratch, count) as many:
        started = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            for _ in pool.map(target.mount, many):
                pass
        mount_s = time.perf_counter() - started
        servers = {fuse_server.find_server(layers.merged) for layers in many} - {None}
        samples = [fuse_server.sample(server) for server in servers if server is not None]
        unmounts = [target.unmounter(layers) for layers in many]
        started = time.perf_counter()
        for unmount in unmounts:
            unmount()
        unmount_s = time.perf_counter() - started
    return Crowd(
        target=target.name,
        turn=turn,
        mounts=count,
        mount_s=round(mount_s, 6),
        unmount_s=round(unmount_s, 6),
        private_kib=sum(sample.private_kib for sample in samples),
        rss_kib=sum(sample.rss_kib for sample in samples),
    )


@contextlib.contextmanager
def _many_layers(
    target: targets.Target, lower: Path, scratch: Path, count: int
) -> Iterator[list[targets.Layers]]:
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(fresh_layers(target, (lower,), scratch)) for _ in range(count)]
        yield many

"""``./dev stress crash``: end processes that change a layer store, at every step and at any time.

First the matrix: each operation of the store is killed, cut off from power, and failed by the disk
at each single change that it makes (tests/crash). Then chance: several processes work on one store
and are killed by SIGKILL at random times; whatever they reported as done must be there.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.crash import store_cases
from tests.crash.store_bench import MODES, Bench
from tests.support.unions import memory_directory
from unionfs2.driver import Driver
from unionfs2.errors import UnionFSError

_FILES_MAX = 6
_CHAIN_MAX = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the kind."""
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--stride", type=int, default=1, help="every n-th step of the matrix")
    parser.add_argument("--seconds", type=float, default=60.0, help="of random kills")
    parser.add_argument("--processes", type=int, default=4)


def run(arguments: argparse.Namespace) -> int:
    """0 when nothing was lost."""
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="unionfs2-crash-", dir=memory_directory()) as name:
        place = Path(name)
        points, losses = _matrix(place, arguments.only, arguments.stride)
        print(f"matrix: {points:,} points tried, {losses} losses", flush=True)
        print(f"random kills, seed {seed}", flush=True)
        done = _kill_at_random(place / "random", seed, arguments.seconds, arguments.processes)
        print(
            f"random: {done.kills:,} kills, {done.reported:,} operations reported done before,"
            f" {len(done.losses)} losses"
        )
        for loss in done.losses[:10]:
            print(f"  {loss}")
        return 1 if losses or done.losses else 0


def _matrix(place: Path, only: str, stride: int) -> tuple[int, int]:
    (place / "template").mkdir()
    template = store_cases.make_template(place / "template")
    points = losses = 0
    for number, (name, case) in enumerate(store_cases.cases(template).items()):
        if only not in name:
            continue
        own = place / f"case-{number}"
        own.mkdir()
        started = time.monotonic()
        try:
            tried = Bench(template, case, own).sweep(MODES, stride=stride)
        except AssertionError:
            losses += 1
            tried = 0
            traceback.print_exc(file=sys.stdout)
        points += tried
        print(f"  {name}: {tried} points, {time.monotonic() - started:.0f} s", flush=True)
    return points, losses


# --- chance ---------------------------------------------------------------------------------------


class Chance(NamedTuple):
    """What the second part found."""

    kills: int
    reported: int
    losses: list[str]


def _kill_at_random(home: Path, seed: int, seconds: float, processes: int) -> Chance:
    """Rounds: start workers, kill each after a random time, look at the store."""
    rng = random.Random(seed)
    deadline = time.monotonic() + seconds
    kills = reported = 0
    losses: list[str] = []
    truth: dict[str, str] = {}  # layer -> digest, as reported and not removed since
    Driver.open(home).close()
    for number in range(sys.maxsize):
        if time.monotonic() > deadline:
            break
        workers = [_start(home, rng.randrange(1 << 32), f"{number}-{i}") for i in range(processes)]
        for child, reader in workers:
            time.sleep(rng.uniform(0.0, 0.25))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            with open(reader, encoding="ascii") as stream:
                for line in stream.read().splitlines():
                    reported += _note(line, truth)
        losses += _lost(home, truth)
    return Chance(kills, reported, losses)


def _note(line: str, truth: dict[str, str]) -> int:
    """Enter what a worker said; a line that was cut off says nothing."""
    words = line.split()
    if words[-1:] != ["."]:
        return 0
    if words[0] == "removing":  # from here on it may be gone
        truth.pop(words[1], None)
        return 0
    truth[words[1]] = words[2]
    return 1


def _lost(home: Path, truth: dict[str, str]) -> list[str]:
    with Driver.open(home) as driver:
        if driver.check():
            driver.repair()
        losses = [
            str(finding) for finding in driver.check(deep=True) if not _is_young(finding.code)
        ]
        for layer, digest in truth.items():
            if not driver.exists(layer):
                losses.append(f"layer {layer} is gone")
                continue
            found = driver.diff(layer, io.BytesIO())
            if found != digest:
                losses.append(f"layer {layer} has {found}, reported was {digest}")
        driver.prune()
    return losses


def _is_young(code: str) -> bool:
    # Temporary files count as rubbish after an hour only.
    return code == "temp-file"


def _start(home: Path, seed: int, prefix: str) -> tuple[int, int]:
    """A worker and the pipe in which it reports; it ends by being killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _work(home, random.Random(seed), prefix, writer)
        except BaseException:  # noqa: BLE001 - this process ends here
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    return child, reader


def _work(home: Path, rng: random.Random, prefix: str, report: int) -> None:
    made: list[str] = []
    counts: Counter[str] = Counter()
    while True:
        counts["steps"] += 1
        name = f"layer-{prefix}-{counts['steps']}"
        with Driver.open(home) as driver:
            _step(driver, rng, name, made, report)


def _step(driver: Driver, rng: random.Random, name: str, made: list[str], report: int) -> None:
    """One operation, reported when it has returned."""
    files = {f"f{i}": rng.randbytes(rng.randrange(9000)) for i in range(rng.randrange(_FILES_MAX))}
    stream = store_cases.tar_of(files)
    parent = rng.choice(made[-_CHAIN_MAX:]) if made and rng.random() < 0.7 else None
    choice = rng.random()
    try:
        if choice < 0.4:
            driver.import_layer(name, parent, stream)
        elif choice < 0.6:
            driver.create(name, parent)
            driver.apply(name, stream)
        elif choice < 0.8:
            box = driver.create_read_write(f"{name}-box", parent)
            for path, data in files.items():
                (Path(os.fsdecode(driver.store.diff_path(box))) / path).write_bytes(data)
            driver.commit(box, name)
        elif made:
            gone = made[-1]
            os.write(report, f"removing {gone} .\n".encode())
            driver.remove(gone)
            made.remove(gone)
            return
        else:
            return
        made.append(name)
        os.write(report, f"done {name} {driver.diff(name, io.BytesIO())} .\n".encode())
    except UnionFSError:
        return  # a parent that somebody else removed

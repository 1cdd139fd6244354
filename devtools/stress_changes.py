"""Random chains of layers: what every way to tell their changes says must be the same.

Each chain is made from its own seed, so a chain with a difference is made again by
``./dev stress changes --seed SEED --pairs 1 --keep DIRECTORY``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.support import probe
from tests.support.agreement import Verdict, disagreements
from tests.support.unions import memory_directory

_NEEDED = ("overlay", "trusted-xattr", "mknod")
_REPORT_S = 20.0
_SHOWN_MAX = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``./dev stress changes``."""
    parser.add_argument("--pairs", type=int, default=2000, help="chains to make")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first chain")
    parser.add_argument("--keep", type=Path, help="make the chains here and leave them")


def run(arguments: argparse.Namespace) -> int:
    """Compare; 0 when nothing differs."""
    for name in _NEEDED:
        answer = probe.ask(name)
        if not answer:
            print(f"needs {name}: {answer.reason}")
            return 1
    started = shown = time.monotonic()
    kinds: Counter[str] = Counter()
    makers: Counter[str] = Counter()
    failed = 0
    for number, seed in enumerate(range(arguments.seed, arguments.seed + arguments.pairs), 1):
        verdict = _one(seed, arguments.keep)
        kinds += verdict.kinds
        makers.update(verdict.chain.made_by[:1])
        if verdict.wrong:
            failed += 1
            if failed <= _SHOWN_MAX:
                print(f"seed {seed}, made by {', '.join(verdict.chain.made_by)}:")
                print(*(f"  {sentence}" for sentence in verdict.wrong), sep="\n")
        if time.monotonic() - shown > _REPORT_S:
            shown = time.monotonic()
            print(f"{number} pairs, {failed} with differences", flush=True)
    taken = time.monotonic() - started
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in "ACD")
    ways = ", ".join(f"{count} {way}" for way, count in sorted(makers.items()))
    print(
        f"{arguments.pairs} pairs ({ways}), {counts}, in {taken:.0f} s: {failed} with differences"
    )
    return 1 if failed else 0


def _one(seed: int, keep: Path | None) -> Verdict:
    if keep is not None:
        home = keep / str(seed)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        return disagreements(seed, home)
    with tempfile.TemporaryDirectory(dir=memory_directory()) as home_name:
        return disagreements(seed, Path(home_name))

"""What a call of the core costs, without FUSE: ``python -m bench.micro.core``.

The difference between these figures and those of a mount is the price of the round trip. Each line
is the best of several runs, in microseconds per call: the best is what the code costs, the rest is
what else the machine did.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from unionfs2.model import Caller
from unionfs2.options import MountSpec, format_options, parse_options
from unionfs2.union import UnionFS

RUNS = 5
FILES = 1000
LAYERS = (1, 10, 100)
ROOT = Caller(uid=0, gid=0, umask=0o022)
Case = Callable[[], None]


def best_us(case: Case, calls: int, again: Case | None = None, runs: int = RUNS) -> float:
    """Microseconds of one of `calls` calls made by `case`; `again` undoes it, not timed."""
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        case()
        found.append(time.perf_counter() - started)
        if again is not None:
            again()
    return min(found) / calls * 1e6


def _build(base: Path, layers: int) -> MountSpec:
    """`layers` lower directories; the files are spread over them, the directory is in all."""
    lowers = [base / f"{number}" for number in range(layers)]
    for lower in lowers:
        (lower / "d").mkdir(parents=True)
    for number in range(FILES):
        (lowers[number % layers] / f"d/file-{number}").write_bytes(b"x" * 100)
    for name in ("upper", "work"):
        (base / name).mkdir()
    return MountSpec(
        lower=tuple(os.fsencode(lower) for lower in lowers),
        upper=os.fsencode(base / "upper"),
        work=os.fsencode(base / "work"),
    )


def _measure_union(base: Path, layers: int) -> dict[str, float]:
    with UnionFS.open(_build(base, layers)) as fs:
        directory = fs.directory(fs.walk(b"d").id)
        names = [b"file-%d" % number for number in range(FILES)]
        missing = [b"none-%d" % number for number in range(FILES)]
        new = [b"new-%d" % number for number in range(FILES)]

        def each(call: Callable[[bytes], object], of: list[bytes]) -> Case:
            def case() -> None:
                for name in of:
                    call(name)

            return case

        return {
            "lookup": best_us(each(lambda name: fs.lookup(directory, name), names), FILES),
            "lookup, missing": best_us(
                each(lambda name: fs.lookup(directory, name), missing), FILES
            ),
            "listing, per name": best_us(lambda: _list(fs), FILES),
            "mknod": best_us(
                each(lambda name: fs.mknod(directory, name, 0o100644, 0, ROOT), new),
                FILES,
                each(lambda name: fs.unlink(directory, name), new),
            ),
            "unlink lower": best_us(
                each(lambda name: fs.unlink(directory, name), names), FILES, runs=1
            ),
        }


def _list(fs: UnionFS) -> None:
    if len(fs.listing(fs.directory(fs.walk(b"d").id))) < FILES:
        raise AssertionError("the listing is not complete")


def _measure_options() -> dict[str, float]:
    lower = ":".join(f"/var/lib/storage/overlay/l/{number:026}" for number in range(128))
    text = f"lowerdir={lower},upperdir=/a/upper,workdir=/a/work,userxattr".encode()
    spec = parse_options(text).spec
    calls = 20

    def parse() -> None:
        for _ in range(calls):
            parse_options(text)

    def write() -> None:
        for _ in range(calls):
            format_options(spec)

    return {
        "parse 128 layers": best_us(parse, calls),
        "format 128 layers": best_us(write, calls),
    }


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="bench.micro.core", description=__doc__)
    parser.add_argument("--scratch", type=Path, help="folder for the layers (default: temporary)")
    arguments = parser.parse_args(argv)
    columns = {}
    for layers in LAYERS:
        base = Path(tempfile.mkdtemp(prefix="unionfs2-micro-", dir=arguments.scratch))
        try:
            columns[layers] = _measure_union(base, layers)
        finally:
            shutil.rmtree(base)
    print(f"{'us per call':<20}" + "".join(f"{f'{layers} layers':>12}" for layers in LAYERS))
    for name in columns[LAYERS[0]]:
        print(f"{name:<20}" + "".join(f"{columns[layers][name]:>12.2f}" for layers in LAYERS))
    for name, cost in _measure_options().items():
        print(f"{name:<20}{cost:>12.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

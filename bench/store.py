"""``./dev bench store``: the layer store beside the tools that do the same without one.

Each comparison runs its ways in turn, in another order with every repeat. Ours is durable when it
returns (a layer survives a power cut), GNU tar alone is not; so tar is also measured with a sync of
the file system behind it. One JSON line per measurement, then a table of medians, with the spread
over the repeats, and of ratios to the first way of each comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench import targets
from bench.environment import environment
from unionfs2 import mountcalls
from unionfs2.driver import Driver
from unionfs2.storemodel import LayerId

FILES: Final = 5000
TREE_BYTES: Final = 100 << 20
DIRECTORIES: Final = 250
MANY: Final = 1000
ROUNDS: Final = 50
CHAIN: Final = 100

Way = Callable[[], Callable[[], object]]
"""Prepares (not timed) and returns what is timed."""


@dataclass
class Comparison:
    """Ways to do one thing; the first is what the others are compared with."""

    name: str
    ways: dict[str, Way] = field(default_factory=dict)
    per: int = 1  # how many things one measurement does
    repeats: int | None = None


class Bench:
    """Scratch space, input tree, and one method per comparison."""

    def __init__(self, scratch: Path, *, quick: bool) -> None:
        self.scratch = scratch
        self._divisor = 10 if quick else 1
        self.tree = scratch / "tree"
        self.archive = scratch / "tree.tar"
        self._serial = 0

    def make_tree(self) -> None:
        """100 MiB in 5,000 files, sizes and contents drawn once with a fixed seed."""
        draw = random.Random(1)
        files, size = FILES // self._divisor, TREE_BYTES // self._divisor
        weights = [draw.expovariate(1) for _ in range(files)]
        pool = draw.randbytes(8 << 20)
        for number, weight in enumerate(weights):
            directory = self.tree / f"d{number % DIRECTORIES:03}"
            directory.mkdir(parents=True, exist_ok=True)
            length = int(size * weight / sum(weights))
            start = draw.randrange(len(pool) - 1)
            data = (pool[start:] + pool * (length // len(pool) + 1))[:length]
            (directory / f"f{number}").write_bytes(data)
        subprocess.run(["tar", "-C", self.tree, "-cf", self.archive, "."], check=True)
        os.sync()

    def _fresh(self, name: str) -> Path:
        self._serial += 1
        return self.scratch / f"{name}{self._serial}"

    @contextmanager
    def _driver(self, backend: str = "native") -> Iterator[Driver]:
        with Driver.open(self.scratch / "store", backend=backend) as driver:  # type: ignore[arg-type]
            yield driver

    # --- apply and diff --------------------------------------------------------------------------

    def apply(self) -> Comparison:
        def tar(*, sync: bool) -> Way:
            def prepare() -> Callable[[], object]:
                place = self._fresh("untar")
                place.mkdir()
                words = f"tar -C '{place}' --numeric-owner -xpf '{self.archive}'"
                words += f" && sync -f '{place}'" if sync else ""
                os.sync()
                return lambda: subprocess.run(["sh", "-c", words], check=True)

            return prepare

        def ours() -> Callable[[], object]:
            driver = Driver.open(self.scratch / "store", backend="native")
            layer = driver.create()
            os.sync()

            def timed() -> None:
                with self.archive.open("rb") as stream:
                    driver.apply(layer, stream)
                driver.close()

            return timed

        def command() -> Callable[[], object]:
            with self._driver() as driver:
                layer = driver.create()
            os.sync()
            return lambda: self._unionfs2("layer", "apply", layer, str(self.archive))

        return Comparison(
            "apply 100 MiB, 5,000 files",
            {
                "GNU tar -x": tar(sync=False),
                "GNU tar -x, sync -f": tar(sync=True),
                "Driver.apply": ours,
                "unionfs2 layer apply": command,
            },
        )

    def diff(self) -> Comparison:
        with self._driver() as driver:
            layer = driver.create()
            with self.archive.open("rb") as stream:
                driver.apply(layer, stream)
            content = driver.get_metadata(layer)["UpperDir"]

        def tar() -> Callable[[], object]:
            out = str(self._fresh("out"))
            words = ["tar", "-C", content, "--numeric-owner", "-cf", out, "."]
            return lambda: subprocess.run(words, check=True)

        def tar_hashed() -> Callable[[], object]:
            words = f"tar -C '{content}' --numeric-owner --xattrs -cf - . | tee '{{}}' | sha256sum"
            text = words.format(self._fresh("out"))
            return lambda: subprocess.run(["sh", "-c", text], check=True, capture_output=True)

        def ours(*, exact: bool) -> Way:
            def prepare() -> Callable[[], object]:
                place = self._fresh("out")

                def timed() -> None:
                    with self._driver() as driver, place.open("wb") as out:
                        driver.diff(layer, out, exact=exact)

                return timed

            return prepare

        def command() -> Callable[[], object]:
            return lambda: self._unionfs2("layer", "diff", layer, "-o", str(self._fresh("out")))

        return Comparison(
            "diff 100 MiB, 5,000 files",
            {
                "GNU tar -c": tar,
                "GNU tar -c --xattrs, sha256sum": tar_hashed,
                "Driver.diff": ours(exact=False),
                "Driver.diff, exact": ours(exact=True),
                "unionfs2 layer diff": command,
            },
        )

    def _unionfs2(self, *words: str) -> None:
        program = [targets.unionfs2_program(), "--root", str(self.scratch / "store"), *words]
        # Compiled modules are kept, as for any installed program.
        calm = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        subprocess.run(program, check=True, capture_output=True, env=calm)

    # --- many layers -----------------------------------------------------------------------------

    def create_remove(self) -> Comparison:
        count = MANY // self._divisor

        def bare() -> Callable[[], object]:
            place = self._fresh("bare")
            place.mkdir()

            def timed() -> None:
                for number in range(count):
                    (place / f"{number}" / "diff").mkdir(parents=True)
                    for name in ("link", "lower"):
                        (place / f"{number}" / name).write_bytes(b"x")
                for number in range(count):
                    shutil.rmtree(place / f"{number}")

            return timed

        def ours() -> Callable[[], object]:
            with self._driver() as driver:
                parent = driver.create()

            def timed() -> None:
                with self._driver() as driver:
                    layers = [driver.create(parent=parent) for _ in range(count)]
                    for layer in layers:
                        driver.remove(layer)

            return timed

        return Comparison(
            f"create and remove {count:,} layers, each",
            {"bare directories, never synced": bare, "Driver": ours},
            per=count,
            repeats=3,
        )

    # --- mounts ----------------------------------------------------------------------------------

    def _pair(self) -> tuple[LayerId, LayerId]:
        with self._driver() as driver:
            base = driver.create()
            return base, driver.create(parent=base, writable=True)

    def get_put(self) -> Comparison:
        _, box = self._pair()
        with self._driver() as driver:
            meta = driver.get_metadata(box)
        data = f"lowerdir={meta['LowerDir']},upperdir={meta['UpperDir']},workdir={meta['WorkDir']}"
        place = self._fresh("merged")
        place.mkdir()
        where = os.fsencode(place)

        def calls() -> Callable[[], object]:
            def timed() -> None:
                for _ in range(ROUNDS):
                    mountcalls.mount(b"overlay", where, b"overlay", 0, data.encode())
                    mountcalls.umount(where)

            return timed

        def programs() -> Callable[[], object]:
            def timed() -> None:
                for _ in range(ROUNDS):
                    words = ["mount", "-t", "overlay", "overlay", "-o", data, str(place)]
                    subprocess.run(words, check=True)
                    subprocess.run(["umount", place], check=True)

            return timed

        return Comparison(
            "Get and Put, each",
            {
                "mount(2), umount2(2)": calls,
                "mount(8), umount(8)": programs,
                "Driver, native": self._getting(box, "native", ROUNDS),
            },
            per=ROUNDS,
        )

    def get_put_fuse(self) -> Comparison:
        _, box = self._pair()
        with self._driver() as driver:
            meta = driver.get_metadata(box)
        place = self._fresh("merged")
        place.mkdir()
        options = "lowerdir={LowerDir},upperdir={UpperDir},workdir={WorkDir}".format_map(meta)
        rounds = ROUNDS // 10

        def peer() -> Callable[[], object]:
            def timed() -> None:
                for _ in range(rounds):
                    subprocess.run(["fuse-overlayfs", "-o", options, place], check=True)
                    targets.unmount_fuse(place)

            return timed

        ways: dict[str, Way] = {}
        if shutil.which("fuse-overlayfs"):
            ways["fuse-overlayfs, umount"] = peer
        ways["Driver, FUSE"] = self._getting(box, "fuse", rounds)
        return Comparison("Get and Put through FUSE, each", ways, per=rounds)

    def _getting(self, box: LayerId, backend: str, rounds: int) -> Way:
        def prepare() -> Callable[[], object]:
            driver = Driver.open(self.scratch / "store", backend=backend)  # type: ignore[arg-type]
            driver.get(box)
            driver.put(box)

            def timed() -> None:
                for _ in range(rounds):
                    driver.get(box)
                    driver.put(box)
                driver.close()

            return timed

        return prepare

    # --- usage -----------------------------------------------------------------------------------

    def usage(self) -> Comparison:
        home = self.scratch / "chain"
        with Driver.open(home, backend="native") as driver:
            parent = None
            for number in range(CHAIN):
                layer = driver.create(parent=parent, writable=True)
                content = Path(driver.get_metadata(layer)["UpperDir"])
                for name in range(20):
                    (content / f"{number}-{name}").write_bytes(b"x" * 5000)
                parent = driver.commit(layer)

        def du() -> Callable[[], object]:
            words = ["du", "--summarize", "--apparent-size", *map(str, home.glob("*/diff"))]
            return lambda: subprocess.run(words, check=True, capture_output=True)

        def ours() -> Callable[[], object]:
            def timed() -> None:
                with Driver.open(home, backend="native") as driver:
                    driver.usage()

            return timed

        return Comparison(f"usage of {CHAIN} layers", {"du": du, "Driver.usage": ours})


def measure(comparison: Comparison, repeats: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Time every way of *comparison*, interleaved; seconds per thing."""
    names = list(comparison.ways)
    for repeat in range(comparison.repeats or repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            timed = comparison.ways[name]()
            started = time.perf_counter()
            timed()
            seconds = (time.perf_counter() - started) / comparison.per
            tell({"kind": "store", "what": comparison.name, "way": name, "seconds": seconds})


def report(records: Sequence[dict[str, Any]]) -> Table:
    """Medians with the spread of the repeats, and how many times the first way's."""
    table = Table("what", "way", "median", "least to most", "times the first")
    for column in table.columns[2:]:
        column.justify = "right"
    rows: dict[str, dict[str, list[float]]] = {}
    for record in records:
        if record["kind"] == "store":
            ways = rows.setdefault(record["what"], {})
            ways.setdefault(record["way"], []).append(record["seconds"])
    for what, ways in rows.items():
        first = statistics.median(next(iter(ways.values())))
        for number, (way, seconds) in enumerate(ways.items()):
            median = statistics.median(seconds)
            table.add_row(
                "" if number else what,
                way,
                f"{median * 1000:,.2f} ms",
                f"{min(seconds) * 1000:,.2f} to {max(seconds) * 1000:,.2f}",
                f"{median / first:.2f}",
            )
        table.add_section()
    return table


def main(argv: list[str]) -> int:
    """Run the comparisons in a scratch folder; 0, or an exception of what failed."""
    parser = argparse.ArgumentParser(prog="./dev bench store", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--only", action="append", choices=COMPARISONS, default=[])
    parser.add_argument("--dir", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--output", type=Path, default=None, help="JSON lines go here")
    arguments = parser.parse_args(argv)
    if os.geteuid():
        parser.error("mounting the kernel's overlay needs root")
    scratch = Path(tempfile.mkdtemp(prefix="unionfs2-bench-", dir=arguments.dir))
    records: list[dict[str, Any]] = []
    console = Console(width=None if sys.stdout.isatty() else 120)

    def tell(record: dict[str, Any]) -> None:
        records.append(record)
        if record["kind"] == "store":
            console.print(
                f"  {record['what']}: {record['way']}: {record['seconds'] * 1000:,.2f} ms",
                markup=False,
                highlight=False,
            )

    with targets.cleaning_up_when_told_to_end():
        try:
            tell({"kind": "environment", **environment(scratch)})
            bench = Bench(scratch, quick=arguments.quick)
            bench.make_tree()
            for name in arguments.only or COMPARISONS:
                measure(getattr(bench, name)(), arguments.repeat, tell)
        finally:
            for entry in reversed(mountcalls.read_mountinfo()):
                if entry.target.startswith(os.fsencode(scratch) + b"/"):
                    mountcalls.umount(entry.target, mountcalls.MNT_DETACH)
            shutil.rmtree(scratch, ignore_errors=True)
    if arguments.output is not None:
        arguments.output.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    console.print(json.dumps(records[0]), markup=False, highlight=False)
    console.print(report(records))
    return 0


COMPARISONS: Final = ("apply", "diff", "create_remove", "get_put", "get_put_fuse", "usage")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``./dev demo``: a real root file system through FUSE and through the kernel, compared.

Three layers are made from Debian packages and mounted through FUSE below a writable upper
directory. Real software works inside. Then the same directories are mounted with the kernel's
overlay, and both views must be identical. The second half (demo_store.py) does the same with a
layer store and images. Everything lives below one folder (``build/demo``); packages and layers
are kept there for the next run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rich.table import Table

from devtools import rootfs
from devtools.changes import changes, summary
from devtools.demo_rig import (
    UNIONFS2,
    DemoError,
    Place,
    Times,
    compare,
    console,
    find_place,
    read_view,
    run,
    run_inside,
)
from devtools.demo_store import StoreDemo
from tests.support.tree import (
    Dir,
    File,
    HardLink,
    Symlink,
    Tree,
    Whiteout,
)
from tests.support.tree import build as build_tree

ROOT: Final = Path(__file__).resolve().parent.parent
STAMP_VERSION: Final = "1"  # raise it when the layers are made differently

BASE: Final = ("~E", "tzdata")  # all essential packages, and one to remove
TOOLS: Final = ("python3",)
TO_INSTALL: Final = ("hello", "less", "nano")

# What runs inside, as root of the mounted tree: what it shows, and the script for sh -e.
WORK: Final = (
    (
        "dpkg --verify: read and check every packaged file",
        # Missing is what the third layer hides, by a whiteout and an opaque directory.
        """
        dpkg --verify | sort >/var/tmp/verify
        printf 'missing     /etc/%s\\n' debian_version skel/.bash_logout skel/.bashrc |
            diff - /var/tmp/verify
        """,
    ),
    (
        f"dpkg -i {' '.join(TO_INSTALL)}",
        """
        dpkg -i /var/tmp/packages/*.deb
        hello
        """,
    ),
    (
        "dpkg -r tzdata",
        """
        dpkg -r tzdata
        test ! -e /usr/share/zoneinfo
        """,
    ),
    (
        "python -m compileall, over the standard library",
        """
        cd /usr/lib/python3.*/
        python3 -m compileall -q .
        python3 -c "import asyncio, json"
        """,
    ),
    (
        "tar: pack the standard library, unpack it elsewhere, compare",
        """
        cd /usr/lib/python3.*/
        tar -cf /var/tmp/stdlib.tar .
        mkdir /opt/stdlib
        tar -C /opt/stdlib -xf /var/tmp/stdlib.tar
        diff -r . /opt/stdlib
        """,
    ),
    (
        "rm -rf, mkdir again, mv, chmod -R, ln, sed -i, append",
        """
        rm -rf /usr/share/doc /usr/share/man /opt/stdlib/email
        mkdir /usr/share/doc
        echo new >/usr/share/doc/README
        mv /opt/stdlib /opt/python
        chmod -R go-rwx /usr/share/perl5
        ln /etc/passwd /etc/passwd.link
        sed -i s/layer/mount/ /etc/motd
        echo appended >>/etc/services.conf
        rm /etc/gone-again
        """,
    ),
)

# --- layers -------------------------------------------------------------------------------------

SITE: Final[Tree] = {
    "etc": {
        "motd": "Welcome to the third layer.\n",
        "services.conf": File("listen 80\n", mode=0o640, xattrs={"user.origin": b"demo"}),
        "gone-again": "deleted by the demo\n",
        "debian_version": Whiteout(),
        "skel": Dir({".profile": "umask 027\n"}, opaque=True),
    },
    "media": Whiteout(),
    "opt": {
        "app": {"run": File("#!/bin/sh\necho running\n", mode=0o755), "current": Symlink("run")},
        "app-run": HardLink("opt/app/run"),
    },
    "var": {"tmp": Dir({"packages": {}}, mode=0o1777)},
}


def make_layers(place: Place, times: Times) -> None:
    """Make the three layers, unless a complete set is there."""
    stamp = place.layers / ".complete"
    wanted = f"{STAMP_VERSION} uid {os.geteuid()}\n"
    if stamp.exists() and stamp.read_text(encoding="ascii") == wanted:
        console.print(f"  layers are in {place.layers} from an earlier run", markup=False)
        return
    if place.layers.exists():
        shutil.rmtree(place.layers)
    site, python, base = place.lower
    with times.step("download the packages of a Debian root file system") as show:
        show("asking apt which")
        base_names = rootfs.closure(BASE)
        all_names = rootfs.closure((*BASE, *TOOLS))
        python_names = [name for name in all_names if name not in base_names]
        show(f"{len(all_names) + len(TO_INSTALL)} packages")
        files = rootfs.download((*all_names, *TO_INSTALL), place.packages)
    for layer, names, below in ((base, base_names, None), (python, python_names, base)):
        with times.step(f"unpack layer {layer.name}, {len(names)} packages") as show:
            rootfs.unpack((files[name] for name in names), layer, below=below, progress=show)
    build_tree(site, SITE, userxattr=os.geteuid() != 0)
    for name in TO_INSTALL:
        shutil.copy(files[name], site / "var" / "tmp" / "packages")
    stamp.write_text(wanted, encoding="ascii")


# --- the two halves -----------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(place: Place, backend: str, times: Times) -> Iterator[None]:
    """The union mounted by *backend* for the length of the block."""
    with times.step(f"mount ({backend})"):
        run([UNIONFS2, "mount", "--backend", backend, "-o", place.options, place.merged])
    try:
        yield
        with times.step(f"unmount ({backend})"):
            run([UNIONFS2, "umount", place.merged])
    finally:
        place.unmount()


def work_inside(place: Place, times: Times) -> None:
    """Run real software with the merged view as its root."""
    for label, commands in WORK:
        with times.step(label):
            run_inside(place.merged, commands)


def show_changes(place: Place) -> None:
    """Print what the work left in the upper directory; the full list goes to a file."""
    found = list(changes(place.upper, place.lower))
    counts = Counter(change.kind for change in found)
    listing = place.root / "changes.txt"
    lines = (f"{change.kind} /{change.path}\n" for change in found)
    listing.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    console.print(
        f"\nIn the upper directory: {counts['A']:,} added (A), {counts['C']:,} changed (C), "
        f"{counts['D']:,} deleted (D); the full list is {listing}"
    )
    for line in summary(found):
        console.print(f"  {line}", markup=False)
    console.print()


def kernel_is_missing(place: Place) -> str | None:
    """Why the kernel's overlay cannot be mounted here at all, None when it can."""
    if os.geteuid():
        return "mounting the kernel's overlay needs root"
    probe = place.run / "probe"
    for name in ("a", "b", "c", "d"):
        (probe / name).mkdir(parents=True, exist_ok=True)
    layers = f"lowerdir={probe}/a,upperdir={probe}/b,workdir={probe}/c"
    try:
        run(["mount", "-t", "overlay", "-o", layers, "none", probe / "d"])
    except DemoError as exc:
        return str(exc).splitlines()[-1]
    run(["umount", probe / "d"])
    return None


def show_times(times: Times) -> None:
    """Print the table of steps."""
    table = Table("step", "seconds")
    table.columns[1].justify = "right"
    for label, seconds in times.rows:
        table.add_row(label, f"{seconds:.1f}")
    table.add_section()
    table.add_row("together", f"{sum(seconds for _, seconds in times.rows):.1f}")
    console.print(table)


def demo(place: Place) -> int:
    """Do everything; the exit status."""
    times = Times([])
    console.print("[bold]Layers[/bold]")
    make_layers(place, times)
    place.renew()
    console.print("[bold]Through FUSE[/bold]")
    with mounted(place, "fuse", times):
        work_inside(place, times)
        through_fuse = read_view(place.merged, "fuse", times)
    show_changes(place)
    reason = kernel_is_missing(place)
    found = 0
    if reason is None:
        console.print("[bold]The same directories through the kernel[/bold]")
        with mounted(place, "native", times):
            through_kernel = read_view(place.merged, "native", times)
        found += compare(through_fuse, through_kernel)
    else:
        console.print(f"{len(through_fuse[0]):,} objects read through FUSE.")
        console.print(f"Left out: the comparison with the kernel's overlay, because {reason}.")
    found += StoreDemo(place, times, native=reason is None).run()
    show_times(times)
    return 1 if found else 0


def main(argv: list[str]) -> int:
    """Parse *argv*; 0 when both views agree, 1 when they do not or the demo cannot run."""
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "demo", help="work here")
    arguments = parser.parse_args(argv)
    # A kill unwinds the stack like Ctrl-C does, so that nothing stays mounted.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        with find_place(arguments.dir) as place:
            return demo(place)
    except KeyboardInterrupt:
        console.print("demo: interrupted, nothing stays mounted")
        return 128 + signal.SIGINT
    except (DemoError, rootfs.RootfsError) as exc:
        console.print(f"demo: {exc}", style="red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

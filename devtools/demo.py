"""``./dev demo``: a real root file system through FUSE and through the kernel, compared.

Three layers are made from Debian packages and mounted through FUSE below a writable upper
directory. Real software works inside. Then the same directories are mounted with the kernel's
overlay, and both views must be identical. Everything lives below one folder (``build/demo``);
packages and layers are kept there for the next run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from devtools import rootfs
from devtools.changes import changes, summary
from tests.support.tree import (
    Dir,
    File,
    HardLink,
    Snapshot,
    Symlink,
    Tree,
    Whiteout,
    differences,
    snapshot,
)
from tests.support.tree import build as build_tree

ROOT: Final = Path(__file__).resolve().parent.parent
UNIONFS2: Final = Path(sys.executable).parent / "unionfs2"
STAMP_VERSION: Final = "1"  # raise it when the layers are made differently

BASE: Final = ("~E", "tzdata")  # all essential packages, and one to remove
TOOLS: Final = ("python3",)
TO_INSTALL: Final = ("hello", "less", "nano")

# What runs inside, as root of the mounted tree: (what it shows, shell commands).
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
INSIDE: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C",
    "DEBIAN_FRONTEND": "noninteractive",
}

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """The demo cannot go on; the text is what the user reads."""


# --- running and showing ------------------------------------------------------------------------


@dataclass
class Times:
    """Rows of the final table: what was done, and how long it took."""

    rows: list[tuple[str, float]]

    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[Callable[[str], None]]:
        """Time the block; show that it runs. Yields a function that shows a detail."""
        started = time.monotonic()
        if not console.is_terminal:
            console.print(f"  {label} ...", markup=False)
        with console.status(label) as status:
            yield lambda detail: status.update(f"{label}: {detail}")
        seconds = time.monotonic() - started
        self.rows.append((label, seconds))
        console.print(f"  [green]done[/green] {seconds:6.1f} s  {label}")


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Output of *command*; DemoError with its last lines when it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment or None,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise DemoError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{tail}")
    return done.stdout


# --- the folder ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The folder of the demo, and in it what needs a file system fit for layers.

    Invariant: neither path needs escaping in mount options.
    """

    root: Path
    scratch: Path

    @property
    def packages(self) -> Path:
        return self.root / "packages"

    @property
    def layers(self) -> Path:
        return self.scratch / "layers"

    @property
    def lower(self) -> tuple[Path, ...]:
        """The lower layers, topmost first."""
        return tuple(self.layers / name for name in ("3-site", "2-python", "1-base"))

    @property
    def run(self) -> Path:
        return self.scratch / "run"

    @property
    def upper(self) -> Path:
        return self.run / "upper"

    @property
    def merged(self) -> Path:
        return self.run / "merged"

    @property
    def options(self) -> str:
        """Mount options of the union."""
        lower = ":".join(map(str, self.lower))
        return f"lowerdir={lower},upperdir={self.upper},workdir={self.run / 'work'}"

    def mounts(self) -> list[str]:
        """What is mounted below, the newest first."""
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        targets = [line.split()[4] for line in text.splitlines()]
        return [target for target in reversed(targets) if target.startswith(f"{self.run}/")]

    def unmount(self) -> None:
        """Unmount whatever is mounted below, whoever mounted it."""
        for target in self.mounts():
            lazily = ["fusermount3", "-u", "-z"] if os.geteuid() else ["umount", "--lazy"]
            run([*lazily, target])

    def renew(self) -> None:
        """Remove what an earlier run left, its mounts first, and make empty directories."""
        self.unmount()
        if self.mounts():
            raise DemoError(f"{self.merged} is still mounted and cannot be unmounted")
        if self.run.exists():
            shutil.rmtree(self.run)
        for name in ("upper", "work", "merged"):
            (self.run / name).mkdir(parents=True)


@contextlib.contextmanager
def find_place(wanted: Path) -> Iterator[Place]:
    """The folder *wanted*, made if missing, with room for layers."""
    root = wanted.resolve()
    if set(str(root)) & set(":,\\ \n"):
        raise DemoError(f"{root} has a character that needs escaping; choose another --dir")
    root.mkdir(parents=True, exist_ok=True)
    if run(["stat", "--file-system", "--format=%T", root]).strip() != "overlayfs":
        yield Place(root, root)
        return
    # In a container the project itself may lie on an overlay, which can hold no whiteouts and no
    # other upper. Packages are kept there, layers are made anew in memory.
    if os.geteuid():
        raise DemoError(f"{root} is on an overlay file system; choose another --dir")
    scratch = root / "memory"
    scratch.mkdir(exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", "size=2g,mode=0755", "unionfs2-demo", scratch])
    try:
        yield Place(root, scratch)
    finally:
        run(["umount", "--lazy", scratch])


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
    enter = ["unshare", "--user", "--map-root-user", "--"] if os.geteuid() else []
    for label, commands in WORK:
        with times.step(label):
            run([*enter, "chroot", place.merged, "/bin/sh", "-ec", commands], **INSIDE)


View = tuple[Snapshot, dict[bytes, int]]


def read_view(place: Place, backend: str, times: Times) -> View:
    """Everything a caller sees in the mount, and the inode numbers beside it."""
    inodes: dict[bytes, int] = {}
    merged = os.fsencode(place.merged)

    def note(path: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):  # listed, but not there: snapshot() notes it
            inodes[path] = os.lstat(os.path.join(merged, path)).st_ino
        if len(inodes) % 500 == 0:
            show(f"{len(inodes):,} objects")

    with times.step(f"read and hash the whole view ({backend})") as show:
        return snapshot(place.merged, on_entry=note), inodes


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


def compare(through_fuse: View, through_kernel: View) -> int:
    """Print the verdict on the two views; the number of differences."""
    found = differences(through_fuse[0], through_kernel[0])
    found += [
        f"{path!r}: inode number is {number} on the left, {through_kernel[1][path]} on the right"
        for path, number in through_fuse[1].items()
        if through_kernel[1].get(path, number) != number
    ]
    for line in found[:20]:
        console.print(f"  {line}", markup=False)
    if len(found) > 20:
        console.print(f"  ... and {len(found) - 20:,} more")
    kinds = Counter(entry.kind for entry in through_fuse[0].values())
    what = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    console.print(
        "Compared, through FUSE and through the kernel: type, mode, owner, size, mtime, content, "
        f"symlink target, device, xattrs, nlink, hard links, inode number of {what}."
    )
    console.print(
        f"{len(through_fuse[0]):,} objects compared, {len(found):,} differences",
        style="bold red" if found else "bold green",
    )
    return len(found)


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
        through_fuse = read_view(place, "fuse", times)
    show_changes(place)
    reason = kernel_is_missing(place)
    if reason is not None:
        show_times(times)
        console.print(f"{len(through_fuse[0]):,} objects read through FUSE.")
        console.print(f"Left out: the comparison with the kernel's overlay, because {reason}.")
        return 0
    console.print("[bold]The same directories through the kernel[/bold]")
    with mounted(place, "native", times):
        through_kernel = read_view(place, "native", times)
    show_times(times)
    return 1 if compare(through_fuse, through_kernel) else 0


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

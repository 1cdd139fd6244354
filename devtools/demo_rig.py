"""What both halves of the demo share: running commands, showing steps, reading a view.

A demo talks to a terminal and stops at the first thing that goes wrong, with the words of whatever
went wrong.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.support.tree import Snapshot, differences, snapshot

UNIONFS2: Final = Path(sys.executable).parent / "unionfs2"
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


View = tuple[Snapshot, dict[bytes, int]]


def read_view(mount: Path, label: str, times: Times) -> View:
    """Everything a caller sees in *mount*, and the inode numbers beside it."""
    inodes: dict[bytes, int] = {}
    merged = os.fsencode(mount)

    def note(path: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):  # listed, but not there: snapshot() notes it
            inodes[path] = os.lstat(os.path.join(merged, path)).st_ino
        if len(inodes) % 500 == 0:
            show(f"{len(inodes):,} objects")

    with times.step(f"read and hash the whole view ({label})") as show:
        return snapshot(mount, on_entry=note), inodes


def run_inside(mount: Path, commands: str) -> None:
    """Run a script for ``sh -e`` with *mount* as its root."""
    enter = ["unshare", "--user", "--map-root-user", "--"] if os.geteuid() else []
    run([*enter, "chroot", mount, "/bin/sh", "-ec", commands], **INSIDE)


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

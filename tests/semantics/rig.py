"""One union of one test: its directories, its mount by either backend, its removal.

The native side is a plain mount(2) of the kernel's overlay and uses nothing of unionfs2, so that a
test that passes there is proved by the kernel. The FUSE side is the installed command. Everything
below `Rig.base` may be looked at directly. Invariant: `Rig.remove` leaves neither a mount nor a
server process nor a file, whatever the test did.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import targets
from tests.support import mounts
from tests.support.transports import assert_served_by

MS_RDONLY = 1
FUSE = "fuse"
NATIVE = "native"


class Rig:
    """Directories of one union; change them before `mount`.

    *transport* is what serves when it is mounted through FUSE; None leaves that to the command.
    """

    def __init__(self, backend: str, home: Path, transport: str | None = None) -> None:
        self.backend = backend
        self.transport = transport
        self.base = Path(tempfile.mkdtemp(dir=home))
        self.base.chmod(0o755)
        self.merged = self.base / "merged"
        self.work: Path = self.base / "work"
        self.upper: Path | None = self.base / "upper"
        self.lowers = [self.base / "lower"]
        for directory in (self.merged, self.work, self.base / "upper", self.base / "lower"):
            directory.mkdir()
        self._log = self.base / "server.log"
        self._mounted: list[tuple[Path, str]] = []

    @property
    def lower(self) -> Path:
        """The topmost lower."""
        return self.lowers[0]

    @property
    def top(self) -> Path:
        """The upper of a writable union."""
        assert self.upper is not None
        return self.upper

    def stack(self, count: int) -> list[Path]:
        """Make the lowers `count` directories, topmost first."""
        self.lowers = [self.base / f"{number}" for number in range(count)]
        for lower in self.lowers:
            lower.mkdir()
        return self.lowers

    def mount(
        self,
        *,
        backend: str | None = None,
        options: str = "",
        at: Path | None = None,
        read_only: bool = False,
    ) -> Path:
        """Mount and return the mount point."""
        backend = backend or self.backend
        at = at or self.merged
        text = self._option_text(backend) + (f",{options}" if options else "")
        if backend == NATIVE:
            with _working_in(self.base):
                targets.mount("overlay", at, "overlay", text, MS_RDONLY if read_only else 0)
        else:
            text += f",log={self._log}" + (",ro" if read_only else "")
            self._mount_fuse(text, at)
        self._mounted.append((at, backend))
        return at

    def _mount_fuse(self, text: str, at: Path) -> None:
        command = [targets.unionfs2_program(), "mount", "--backend", FUSE, "-o", text]
        if self.transport is not None:
            command += ["--transport", self.transport]
        targets.run_checked([*command, os.fspath(at)], timeout_s=targets.MOUNT_TIMEOUT_S)
        if self.transport is not None:
            assert_served_by(at.resolve(), self.transport)

    def _option_text(self, backend: str) -> str:
        """Options of the layers; relative ones for the kernel, which reads one page only."""

        def escaped(path: Path, special: str) -> str:
            if backend == NATIVE and path.is_relative_to(self.base):
                path = path.relative_to(self.base)
            return re.sub(f"[{re.escape(special)}]", lambda m: "\\" + m[0], os.fspath(path))

        text = "lowerdir=" + ":".join(escaped(lower, "\\:,") for lower in self.lowers)
        if self.upper is not None:
            text += ",upperdir=" + escaped(self.upper, "\\,")
            text += ",workdir=" + escaped(self.work, "\\,")
        return text

    def unmount(self) -> None:
        """Unmount what was mounted last; its server must end by itself."""
        at, backend = self._mounted.pop()
        (targets.unmount if backend == NATIVE else targets.unmount_fuse)(at)

    def remount(self, *, backend: str | None = None) -> Path:
        """Unmount, then mount the same layers again, perhaps by the other backend."""
        at = self._mounted[-1][0]
        self.unmount()
        return self.mount(backend=backend, at=at)

    def mount_tmpfs(self, at: Path) -> None:
        """Mount a file system of its own at `at`, removed with the rig."""
        targets.mount("tmpfs", at, "tmpfs", "size=1m")

    def use_small_upper(self) -> None:
        """From now on the upper is on a file system of 1 MiB."""
        small = self.base / "small"
        small.mkdir()
        self.mount_tmpfs(small)
        self.upper, self.work = small / "upper", small / "work"
        self.upper.mkdir()
        self.work.mkdir()

    def complaints(self) -> str:
        """What the servers of this rig had to say; a healthy one is silent."""
        return self._log.read_text() if self._log.exists() else ""

    def remove(self) -> None:
        """Leave nothing behind. RuntimeError when a server does not end with its mount."""
        try:
            while self._mounted:
                self.unmount()
        finally:
            for at in mounts.below(self.base):
                targets.clear_away(Path(os.fsdecode(at)))
            shutil.rmtree(self.base)


@contextlib.contextmanager
def _working_in(directory: Path) -> Iterator[None]:
    """Work in `directory` (contextlib.chdir is newer than the oldest Python supported)."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)

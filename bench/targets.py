"""What a workload can run on: one class per way of having a tree of layers at one path.

Each target mounts in the way its users do, with its default options, and says itself why it cannot
run here. `mount` returns when the path answers; `unmount` returns when nothing of the mount is
left, neither the mount nor its server process.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench import fuse_server

MOUNT_TIMEOUT_S = 30.0
SERVER_END_TIMEOUT_S = 20.0
_COPY_CHECK_S = 1.0
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Layers:
    """Directories of one mount; `lower` topmost first."""

    lower: tuple[Path, ...]
    upper: Path
    work: Path
    merged: Path

    @staticmethod
    def below(base: Path, lower: tuple[Path, ...]) -> Layers:
        """Fresh upper, work and mount point below `base`."""
        layers = Layers(lower, base / "upper", base / "work", base / "merged")
        for directory in (layers.upper, layers.work, layers.merged):
            directory.mkdir(parents=True)
        return layers

    def option_text(self) -> str:
        """The overlay options of these layers. Paths must not need escaping."""
        paths = [os.fspath(p) for p in (*self.lower, self.upper, self.work)]
        for path in paths:
            if set(path) & set(":,\\"):
                raise ValueError(f"layer path {path!r} holds one of ':,\\'; choose another folder")
        lower = ":".join(os.fspath(p) for p in self.lower)
        return f"lowerdir={lower},upperdir={self.upper},workdir={self.work}"


class Target(Protocol):
    """One way to have the layers at one path."""

    @property
    def name(self) -> str: ...

    def unavailable(self) -> str | None:
        """None when usable here, else the reason."""

    def prepare(self, layers: Layers) -> None:
        """Work that is not part of mounting and not timed."""

    def mount(self, layers: Layers) -> None: ...

    def unmount(self, layers: Layers) -> None: ...


class PlainDirectory:
    """No union at all: a copy of the lower tree, the floor for every figure."""

    name = "plain"

    def unavailable(self) -> str | None:
        return None

    def prepare(self, layers: Layers) -> None:
        for lower in reversed(layers.lower):
            run_checked(["cp", "-a", "--reflink=auto", f"{lower}/.", os.fspath(layers.merged)])

    def mount(self, layers: Layers) -> None:
        pass

    def unmount(self, layers: Layers) -> None:
        pass


class KernelOverlay:
    """The kernel's overlay with its default options."""

    name = "kernel"

    def unavailable(self) -> str | None:
        if os.geteuid() != 0:
            return "kernel overlay needs root here"
        if "overlay" not in Path("/proc/filesystems").read_text():
            return "this kernel has no overlay"
        return None

    def prepare(self, layers: Layers) -> None:
        pass

    def mount(self, layers: Layers) -> None:
        mount("overlay", layers.merged, "overlay", layers.option_text())

    def unmount(self, layers: Layers) -> None:
        unmount(layers.merged)


class FuseProgram:
    """A FUSE server started by command line, which returns once the mount answers."""

    def __init__(self, name: str, command: Callable[[Layers], list[str]]) -> None:
        self.name = name
        self._command = command

    def unavailable(self) -> str | None:
        nowhere = Path("/nonexistent")
        program = self._command(Layers((nowhere,), nowhere, nowhere, nowhere))[0]
        if shutil.which(program) is None:
            return f"program {program} is not installed"
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            return "/dev/fuse cannot be opened"
        return None

    def prepare(self, layers: Layers) -> None:
        pass

    def mount(self, layers: Layers) -> None:
        run_checked(self._command(layers), timeout_s=MOUNT_TIMEOUT_S)
        if not fuse_server.is_mounted(layers.merged):
            raise RuntimeError(f"{self.name} returned success, {layers.merged} is not mounted")

    def unmount(self, layers: Layers) -> None:
        unmount_fuse(layers.merged)


def unionfs2_program() -> str:
    """Path of the installed command: that of this interpreter's environment, else from PATH."""
    beside = Path(sys.executable).with_name("unionfs2")
    return os.fspath(beside) if beside.exists() else "unionfs2"


def unionfs2_target(options: str = "") -> FuseProgram:
    """Our FUSE mount, with further `options` (comma separated) when given."""
    tail = f",{options}" if options else ""

    def command(layers: Layers) -> list[str]:
        mount_options = layers.option_text() + tail
        merged = os.fspath(layers.merged)
        return [unionfs2_program(), "mount", "--backend", "fuse", "-o", mount_options, merged]

    return FuseProgram("unionfs2", command)


def fuse_overlayfs_target() -> FuseProgram:
    """The C peer, when installed."""

    def command(layers: Layers) -> list[str]:
        return ["fuse-overlayfs", "-o", layers.option_text(), os.fspath(layers.merged)]

    return FuseProgram("fuse-overlayfs", command)


def all_targets(options: str = "") -> dict[str, Target]:
    """Every target by name, in the order in which results are shown."""
    targets: list[Target] = [
        PlainDirectory(),
        KernelOverlay(),
        unionfs2_target(options),
        fuse_overlayfs_target(),
    ]
    return {target.name: target for target in targets}


def run_checked(command: list[str], *, timeout_s: float | None = None) -> None:
    """Run a program; RuntimeError with its own words when it fails.

    Its output goes to files, not pipes: a daemon that keeps the pipe open would never end a read.
    """
    with _scratch_file() as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise RuntimeError(f"{command[0]} did not return in {timeout_s} s") from exc
        if done.returncode != 0:
            output.seek(0)
            said = output.read().decode(errors="replace").strip()
            raise RuntimeError(f"{' '.join(command)[:400]}: exit {done.returncode}: {said}")


def _scratch_file() -> io.FileIO:
    return io.FileIO(os.memfd_create("output"), "r+")


def mount(source: str, target: Path, fstype: str, data: str, flags: int = 0) -> None:
    """Mount by the old system call. OSError carries the target as its file name."""
    args = (source.encode(), os.fsencode(target), fstype.encode(), flags, os.fsencode(data))
    if len(args[4]) > 4095:
        raise ValueError(f"{len(args[4])} bytes of mount options, the kernel reads 4095")
    if _libc.mount(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(target))


def unmount(target: Path, *, lazy: bool = False) -> None:
    """Unmount. OSError carries the target as its file name."""
    if _libc.umount2(os.fsencode(target), _MNT_DETACH if lazy else 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(target))


def unmount_fuse(merged: Path) -> None:
    """Unmount, and wait until the server has ended by itself; RuntimeError when it does not."""
    connection = fuse_server.connection_of(merged)
    server = fuse_server.find_server(merged)
    if server is None:
        raise RuntimeError(f"no process serves {merged}")
    pidfd = os.pidfd_open(server)
    try:
        unmount(merged)
        _end(pidfd, connection, f"server {server} of {merged}")
    finally:
        os.close(pidfd)


def _end(pidfd: int, connection: int, what: str) -> None:
    """Wait until a server whose mount is gone has ended; RuntimeError, and the end, if it has not.

    A mount namespace that somebody makes meanwhile has a copy of the mount, and the server is right
    to go on for it: it is ended without a complaint.
    """
    deadline = time.monotonic() + SERVER_END_TIMEOUT_S
    while not fuse_server.wait_gone(pidfd, _COPY_CHECK_S):
        copied = bool(fuse_server.holders(connection))
        if copied or time.monotonic() > deadline:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not copied:
                raise RuntimeError(f"{what} outlived its mount and was killed")
            return


@contextlib.contextmanager
def cleaning_up_when_told_to_end() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP end the program as Ctrl-C does: through every clean-up."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clear_away(merged: Path) -> None:
    """Make sure that nothing is mounted and no server runs, whatever state a failure left."""
    while fuse_server.is_mounted(merged):
        server = fuse_server.find_server(merged)
        unmount(merged, lazy=True)
        if server is not None:
            _end_soon(server)


def _end_soon(server: int) -> None:
    try:
        pidfd = os.pidfd_open(server)
    except ProcessLookupError:
        return
    try:
        if not fuse_server.wait_gone(pidfd, _COPY_CHECK_S):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)

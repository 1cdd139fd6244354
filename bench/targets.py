"""What a workload can run on: one class per way of having a tree of layers at one path.

Each target mounts in the way its users do, with the options of its set (SETS, one line each), and
says itself why it cannot run here. `mount` returns when the path answers; `unmount` returns when
nothing of the mount is left, neither the mount nor its server process.
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
from functools import partial
from pathlib import Path
from typing import Protocol

from bench import fuse_server
from unionfs2 import mounts

MOUNT_TIMEOUT_S = 30.0
SERVER_END_TIMEOUT_S = 20.0
_COPY_CHECK_S = 1.0
_MNT_DETACH = 2
_MS_BIND = 4096
#: Bytes of options that mount(2), and libfuse with it, take: a page without its final NUL.
OPTION_TEXT_MAX = 4095

_libc = ctypes.CDLL(None, use_errno=True)


class MountRefusedError(RuntimeError):
    """A target cannot mount these layers, or cannot mount at all; the text says what it said."""


@dataclass(frozen=True, slots=True)
class OptionSet:
    """A target as results name it: one file system with these mount options.

    `synced` tells whether a copied-up file is on the disk before it is seen. Copy-ups that are
    synced and copy-ups that are not are two different things, and are never compared; `unsynced`
    is the name of the set that stands in where the other side does not sync.
    """

    name: str
    options: str = ""
    synced: bool = True
    unsynced: str | None = None
    families: tuple[str, ...] = ()  # measured with these workloads only; empty: with all


KERNEL_SETS = (
    OptionSet("kernel", unsynced="kernel-volatile"),
    OptionSet("kernel-volatile", "volatile", synced=False, families=("copy-up",)),
)
PEER_SETS = (OptionSet("fuse-overlayfs", synced=False),)
OUR_SETS = (
    OptionSet("unionfs2-pyfuse3", "transport=pyfuse3", unsynced="unionfs2-pyfuse3-volatile"),
    OptionSet(
        "unionfs2-pyfuse3-volatile",
        "transport=pyfuse3,volatile",
        synced=False,
        families=("copy-up",),
    ),
    OptionSet("unionfs2", "transport=devfuse", unsynced="unionfs2-volatile"),
    OptionSet(
        "unionfs2-volatile", "transport=devfuse,volatile", synced=False, families=("copy-up",)
    ),
    OptionSet("unionfs2-asleep", "transport=devfuse,wakeful=off", families=("looking",)),
    OptionSet("unionfs2-nowb", "transport=devfuse,writeback=off", families=("writing",)),
    OptionSet(
        "unionfs2-passthrough", "transport=devfuse,passthrough=on", families=("reading", "writing")
    ),
)


@dataclass(frozen=True, slots=True)
class Layers:
    """Directories of one mount; `lower` topmost first. `read_only`: nobody is going to write."""

    lower: tuple[Path, ...]
    upper: Path
    work: Path
    merged: Path
    read_only: bool = False

    @staticmethod
    def below(base: Path, lower: tuple[Path, ...], *, read_only: bool = False) -> Layers:
        """Fresh upper, work and mount point below `base`."""
        layers = Layers(lower, base / "upper", base / "work", base / "merged", read_only)
        for directory in (layers.upper, layers.work, layers.merged):
            directory.mkdir(parents=True)
        return layers

    def option_text(self, *, relative: bool = False) -> str:
        """The overlay options of these layers. Paths must not need escaping.

        `relative` names the lower ones relative to `relative_to`, as a page has room for hundreds
        of short names only.
        """
        lower = [os.fspath(p.relative_to(self.relative_to) if relative else p) for p in self.lower]
        upper, work = os.fspath(self.upper), os.fspath(self.work)
        for path in (*lower, upper, work):
            if set(path) & set(":,\\"):
                raise ValueError(f"layer path {path!r} holds one of ':,\\'; choose another folder")
        return f"lowerdir={':'.join(lower)},upperdir={upper},workdir={work}"

    @property
    def relative_to(self) -> Path:
        """The directory from which the lower ones have short names."""
        return self.lower[0].parent

    def fitting(self, tail: str = "") -> tuple[str, Path | None]:
        """Options of at most a page with `tail`, and the directory to be in if they need one."""
        absolute = self.option_text() + tail
        if len(os.fsencode(absolute)) <= OPTION_TEXT_MAX:
            return absolute, None
        return self.option_text(relative=True) + tail, self.relative_to


class Target(Protocol):
    """One way to have the layers at one path."""

    @property
    def about(self) -> OptionSet: ...

    @property
    def name(self) -> str: ...

    def unavailable(self) -> str | None:
        """None when usable here, else the reason."""

    def prepare(self, layers: Layers) -> None:
        """Work that is not part of mounting and not timed."""

    def mount(self, layers: Layers) -> None:
        """Mount. MountRefusedError when the target cannot do it."""

    def unmount(self, layers: Layers) -> None: ...

    def unmounter(self, layers: Layers) -> Callable[[], None]:
        """What `unmount` does, with all that is to be looked up looked up: for a stopwatch."""


class PlainDirectory:
    """No union at all, the floor for every figure: the lower tree itself, or a copy to write to."""

    about = OptionSet("plain", synced=False)
    name = about.name

    def unavailable(self) -> str | None:
        return None

    def prepare(self, layers: Layers) -> None:
        if not self._shows_itself(layers) and len(layers.lower) == 1:
            run_checked(["cp", "-a", f"{layers.lower[0]}/.", os.fspath(layers.merged)])

    def mount(self, layers: Layers) -> None:
        if len(layers.lower) > 1:
            raise MountRefusedError("a plain directory has no layers")
        if self._shows_itself(layers):
            mount(os.fspath(layers.lower[0]), layers.merged, "", "", _MS_BIND)

    def unmount(self, layers: Layers) -> None:
        self.unmounter(layers)()

    def unmounter(self, layers: Layers) -> Callable[[], None]:
        if self._shows_itself(layers):
            return partial(unmount, layers.merged)
        return lambda: None

    def _shows_itself(self, layers: Layers) -> bool:
        return layers.read_only and os.geteuid() == 0


class KernelOverlay:
    """The kernel's overlay."""

    def __init__(self, option_set: OptionSet = KERNEL_SETS[0]) -> None:
        self.about = option_set
        self.name = option_set.name

    def unavailable(self) -> str | None:
        if os.geteuid() != 0:
            return "kernel overlay needs root here"
        if "overlay" not in Path("/proc/filesystems").read_text():
            return "this kernel has no overlay"
        return None

    def prepare(self, layers: Layers) -> None:
        pass

    def mount(self, layers: Layers) -> None:
        text, directory = layers.fitting(_tail(self.about.options))
        try:
            with contextlib.nullcontext() if directory is None else _inside(directory):
                mount("overlay", layers.merged, "overlay", text)
        except (OSError, ValueError) as exc:
            raise MountRefusedError(str(exc)) from exc

    def unmount(self, layers: Layers) -> None:
        self.unmounter(layers)()

    def unmounter(self, layers: Layers) -> Callable[[], None]:
        return partial(unmount, layers.merged)


class FuseProgram:
    """A FUSE server started by command line, which returns once the mount answers."""

    def __init__(self, option_set: OptionSet, program: str, further: str = "") -> None:
        self.about = option_set
        self.name = option_set.name
        self._program = program
        self._tail = _tail(option_set.options) + _tail(further)

    def unavailable(self) -> str | None:
        if shutil.which(self._program) is None:
            return f"program {self._program} is not installed"
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            return "/dev/fuse cannot be opened"
        return None

    def prepare(self, layers: Layers) -> None:
        pass

    def mount(self, layers: Layers) -> None:
        text, directory = layers.fitting(self._tail)
        words = [self._program, "-o", text, os.fspath(layers.merged)]
        try:
            run_checked(words, timeout_s=MOUNT_TIMEOUT_S, directory=directory)
        except RuntimeError as exc:
            raise MountRefusedError(str(exc).partition(": exit ")[2] or str(exc)) from exc
        if not fuse_server.is_mounted(layers.merged):
            raise MountRefusedError(f"{self.name} returned success and mounted nothing")

    def unmount(self, layers: Layers) -> None:
        self.unmounter(layers)()

    def unmounter(self, layers: Layers) -> Callable[[], None]:
        return partial(unmount_fuse, layers.merged, _server_of(layers.merged))


def _tail(options: str) -> str:
    return f",{options}" if options else ""


@contextlib.contextmanager
def _inside(directory: Path) -> Iterator[None]:
    """With another working directory, for names that are short from there."""
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chdir(directory)
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def served_by(layers: Layers) -> str | None:
    """The transport of a mount of ours, as its server told; None for any other mount."""
    return mounts.mounted(os.fsencode(layers.merged.resolve()), "fuse").transport


def unionfs2_program() -> str:
    """Path of the installed command: that of this interpreter's environment, else from PATH."""
    return _installed("unionfs2")


def _installed(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    return os.fspath(beside) if beside.exists() else name


def unionfs2_target(options: str = "") -> FuseProgram:
    """Our FUSE mount, with further `options` (comma separated) when given."""
    return FuseProgram(OptionSet("unionfs2"), _installed("fuse-unionfs2"), options)


def all_targets(options: str = "", peer: str = "fuse-overlayfs") -> dict[str, Target]:
    """Every target by name, in the order in which results are shown.

    `options` are added to every set of ours; `peer` is the program of fuse-overlayfs.
    """
    own = _installed("fuse-unionfs2")
    targets: list[Target] = [
        PlainDirectory(),
        *map(KernelOverlay, KERNEL_SETS),
        *(FuseProgram(option_set, peer) for option_set in PEER_SETS),
        *(FuseProgram(option_set, own, options) for option_set in OUR_SETS),
    ]
    return {target.name: target for target in targets}


def run_checked(
    command: list[str], *, timeout_s: float | None = None, directory: Path | None = None
) -> None:
    """Run a program in `directory`; RuntimeError with its own words when it fails.

    Its output goes to files, not pipes: a daemon that keeps the pipe open would never end a read.
    """
    with _scratch_file() as output:
        program = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=directory
        )
        if not _ended(program, timeout_s):
            program.kill()
            program.wait()
            raise RuntimeError(f"{command[0]} did not return in {timeout_s} s")
        if program.returncode != 0:
            output.seek(0)
            said = output.read().decode(errors="replace").strip()
            raise RuntimeError(f"{' '.join(command)[:400]}: exit {program.returncode}: {said}")


def _ended(program: subprocess.Popen[bytes], timeout_s: float | None) -> bool:
    """Wait for a program. Popen.wait() with a time limit looks every 50 ms: too coarse for us."""
    if timeout_s is not None:
        pidfd = os.pidfd_open(program.pid)
        try:
            if not fuse_server.wait_gone(pidfd, timeout_s):
                return False
        finally:
            os.close(pidfd)
    program.wait()
    return True


def _scratch_file() -> io.FileIO:
    return io.FileIO(os.memfd_create("output"), "r+")


def mount(source: str, target: Path, fstype: str, data: str, flags: int = 0) -> None:
    """Mount by the old system call. OSError carries the target as its file name."""
    args = (source.encode(), os.fsencode(target), fstype.encode(), flags, os.fsencode(data))
    if len(args[4]) > OPTION_TEXT_MAX:
        raise ValueError(f"{len(args[4])} bytes of mount options, mount(2) reads {OPTION_TEXT_MAX}")
    if _libc.mount(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(target))


def unmount(target: Path, *, lazy: bool = False) -> None:
    """Unmount. OSError carries the target as its file name."""
    if _libc.umount2(os.fsencode(target), _MNT_DETACH if lazy else 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(target))


def unmount_fuse(merged: Path, server: int | None = None) -> None:
    """Unmount, and wait until the server has ended by itself; RuntimeError when it does not.

    `server` spares looking for it.
    """
    connection = fuse_server.connection_of(merged)
    server = server or _server_of(merged)
    pidfd = os.pidfd_open(server)
    try:
        unmount(merged)
        _end(pidfd, connection, f"server {server} of {merged}")
    finally:
        os.close(pidfd)


def _server_of(merged: Path) -> int:
    server = fuse_server.find_server(merged)
    if server is None:
        raise RuntimeError(f"no process serves {merged}")
    return server


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

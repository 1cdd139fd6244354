"""Find and watch the process that serves a FUSE mount.

Knows: the number of a FUSE connection is the minor of the mount's device, and the kernel prints the
same number in ``/proc/PID/fdinfo/N`` of the server's ``/dev/fuse`` descriptor. Older kernels do not
print it; there the mount point must appear on the server's command line. The device is read from
mountinfo and never by stat, which would wait for a server that hangs.

Refuses to know: which program serves. The same watch works for every FUSE file system.
"""

from __future__ import annotations

import os
import re
import select
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_MOUNTINFO = Path("/proc/self/mountinfo")
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h


@dataclass(frozen=True, slots=True)
class Sample:
    """What one look at a process says: resident and private memory in KiB, open descriptors."""

    rss_kib: int
    private_kib: int
    fds: int
    threads: int


def is_mounted(path: Path) -> bool:
    """Whether a mount point stands at `path`; also true for a FUSE mount whose server is dead."""
    return _device_of_mount(path) is not None


def connection_of(path: Path) -> int:
    """Number of the FUSE connection of the topmost mount at `path`."""
    device = _device_of_mount(path)
    if device is None:
        raise ValueError(f"{path} is not a mount point")
    return os.minor(device)


def holders(connection: int) -> list[int]:
    """Processes in whose mount namespace the connection is mounted."""
    found = []
    for entry in _PROC.iterdir():
        try:
            lines = (entry / "mountinfo").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue  # the process ended, or is not ours to look at
        if any(line.split(b" ")[2] == b"0:%d" % connection for line in lines.splitlines()):
            found.append(int(entry.name))
    return found


def _device_of_mount(path: Path) -> int | None:
    """Device of the topmost mount at `path`; None when nothing is mounted there."""
    wanted = os.fsencode(path.parent.resolve() / path.name)
    device = None
    for line in _MOUNTINFO.read_bytes().splitlines():
        fields = line.split(b" ")
        if _unescaped(fields[4]) == wanted:
            major, minor = fields[2].split(b":")
            device = os.makedev(int(major), int(minor))
    return device


def _unescaped(field: bytes) -> bytes:
    """A field of mountinfo, where blanks and backslashes are written as octal numbers."""
    return re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), field)


def find_server(mountpoint: Path) -> int | None:
    """Process id of the server of `mountpoint`, or None when no visible process serves it."""
    device = _device_of_mount(mountpoint)
    if device is None or os.major(device) != 0:
        return None
    connection = os.minor(device)
    by_command_line: int | None = None
    wanted = os.fsencode(mountpoint)
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        numbers = _fuse_connections(pid)
        if connection in numbers:
            return pid
        if None in numbers and wanted in _command_line(pid):
            by_command_line = pid
    return by_command_line


def _fuse_connections(pid: int) -> set[int | None]:
    """Connections whose device a process holds; None stands for "the kernel does not tell"."""
    found: set[int | None] = set()
    try:
        fds = list((_PROC / str(pid) / "fd").iterdir())
    except OSError:
        return found  # the process ended, or is not ours to look at
    for fd in fds:
        try:
            if str(fd.readlink()) == "/dev/fuse":
                found.add(_connection_in(_PROC / str(pid) / "fdinfo" / fd.name))
        except OSError:
            continue  # closed meanwhile, as a busy server does
    return found


def _connection_in(fdinfo: Path) -> int | None:
    for line in fdinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "fuse_connection":
            return int(value)
    return None


def _command_line(pid: int) -> list[bytes]:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def sample(pid: int) -> Sample:
    """Memory and descriptors of a process now. OSError when it is gone."""
    base = _PROC / str(pid)
    rss = private = 0
    for line in (base / "smaps_rollup").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key == "Rss":
            rss = int(rest.split()[0])
        elif key in ("Private_Clean", "Private_Dirty"):
            private += int(rest.split()[0])
    fds = sum(1 for _ in (base / "fd").iterdir())
    threads = sum(1 for _ in (base / "task").iterdir())
    return Sample(rss_kib=rss, private_kib=private, fds=fds, threads=threads)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process since its start, of its ended threads too. OSError when gone.

    The clock is that of clock_getcpuclockid(3): it counts nanoseconds where /proc counts ticks.
    """
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


def wait_gone(pidfd: int, timeout_s: float) -> bool:
    """Wait for the process behind `pidfd` to end; False when it did not in time."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))

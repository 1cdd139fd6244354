"""The two mounts that are compared: how each one is mounted and unmounted, nothing else."""

from __future__ import annotations

import errno
import os
import pickle
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from tests.differential import rawcalls

REPOSITORY: Final = Path(__file__).resolve().parents[2]


class Stack(NamedTuple):
    """Directories of one mount, lowers topmost first, and further options as ``-o`` words."""

    lowers: tuple[bytes, ...]
    upper: bytes
    work: bytes
    target: bytes
    options: tuple[str, ...] = ()


class MountError(Exception):
    """A side did not mount; the message is its reason."""


class Side(Protocol):
    """One implementation of the union. A side serves one mount at a time."""

    name: str
    transport: str | None  # of our own FUSE mount; None for everything else
    holds_back: bool  # whether the kernel holds writes back there

    def mount(self, stack: Stack) -> None:
        """Mount and return when the mount answers. MountError."""

    def unmount(self) -> list[str]:
        """Unmount; sentences about anything that was not as it should be (log, exit status)."""

    def abandon(self) -> None:
        """Get rid of the mount by force, whatever state it is in."""

    def close(self) -> None:
        """The side is not used any more."""


def escape(path: bytes) -> bytes:
    """A path inside ``lowerdir=``."""
    return re.sub(rb"([\\:,])", rb"\\\1", path)


def escape_single(path: bytes) -> bytes:
    """A path that is a whole value (upperdir, workdir): colons are plain there."""
    return re.sub(rb"([\\,])", rb"\\\1", path)


def option_text(stack: Stack) -> bytes:
    """The ``-o`` text both the kernel and the FUSE programs read."""
    parts = [
        b"lowerdir=" + b":".join(escape(lower) for lower in stack.lowers),
        b"upperdir=" + escape_single(stack.upper),
        b"workdir=" + escape_single(stack.work),
        *(option.encode() for option in stack.options),
    ]
    return b",".join(parts)


def mounted_at(target: bytes) -> list[str]:
    """Mount options and super options of the mounts at *target*, as mountinfo shows them."""
    wanted = re.sub(rb"[\\ \n\t]", lambda m: b"\\%03o" % m[0][0], target)
    found = []
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split()
            if fields[4] == wanted:
                found.append(f"{fields[5].decode()} {fields[-1].decode(errors='replace')}")
    return found


def unmount_patiently(target: bytes, limit_s: float = 3.0) -> list[str]:
    """umount(2); while busy again and again, then lazily with a complaint."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            rawcalls.umount(target)
            return []
        except OSError as exc:
            if exc.errno != errno.EBUSY or time.monotonic() > deadline:
                problem = f"unmount of {os.fsdecode(target)}: {exc.strerror}"
                force_unmount(target)
                return [problem]
        time.sleep(0.02)


def force_unmount(target: bytes) -> None:
    """Detach whatever is mounted at *target*; never fails."""
    while mounted_at(target):
        try:
            rawcalls.umount(target, rawcalls.MNT_DETACH)
        except OSError:
            return


class KernelSide:
    """The kernel's own overlay, the reference."""

    transport: str | None = None
    holds_back = False

    def __init__(self, name: str = "kernel") -> None:
        self.name = name
        self._target = b""

    def mount(self, stack: Stack) -> None:
        try:
            rawcalls.mount(b"overlay", stack.target, b"overlay", 0, option_text(stack))
        except OSError as exc:
            raise MountError(f"kernel overlay: {exc.strerror}") from exc
        self._target = stack.target
        if not mounted_at(stack.target)[-1].startswith("rw"):
            self.unmount()
            raise MountError("kernel overlay came up read-only")

    def unmount(self) -> list[str]:
        target, self._target = self._target, b""
        return unmount_patiently(target)

    def abandon(self) -> None:
        if self._target:
            force_unmount(self._target)
        self._target = b""

    def close(self) -> None:
        self.abandon()


#: What must not appear in the output of a server; case matters as loggers write it.
_NOISE: Final = re.compile(r"Traceback|WARNING|ERROR|CRITICAL|Exception|[Ww]arning:")


#: pyfuse3 says so of a release that nobody waits for, when the unmount overtakes it.
_LATE_REPLY: Final = re.compile(
    r"ERROR:pyfuse3:fuse_release(dir)?\(\): fuse_reply_\* failed with No such file or directory"
)


class CommandSide:
    """A FUSE program that is started in the foreground, one process per mount.

    *command* is completed by ``-o OPTIONS TARGET`` at the place of ``{}``-less words: the words
    ``@options`` and ``@target`` are replaced.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        start_limit_s: float = 20.0,
        transport: str | None = None,
    ) -> None:
        self.name = name
        self.transport = transport
        self.holds_back = transport == "devfuse"
        self.command = command
        self.start_limit_s = start_limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._target = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - one file for the life of the side

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        return self._process.pid if self._process else None

    def mount(self, stack: Stack) -> None:
        words: dict[str, bytes] = {"@options": option_text(stack), "@target": stack.target}
        argv = [words.get(word, word.encode()) for word in self.command]
        self._log.seek(0)
        self._log.truncate()
        self._target = stack.target
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, cwd="/"
        )
        self._wait_until_mounted(stack.target)

    def _wait_until_mounted(self, target: bytes) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.start_limit_s
        while not mounted_at(target):
            if self._process.poll() is not None:
                raise MountError(f"{self.name}: status {self._process.returncode}: {self._text()}")
            if time.monotonic() > deadline:
                self.abandon()
                raise MountError(f"{self.name}: no mount after {self.start_limit_s:g} s")
            time.sleep(0.005)

    def _text(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()

    def unmount(self) -> list[str]:
        wrong = unmount_patiently(self._target)
        process = self._process
        assert process is not None
        try:
            status = process.wait(10)
        except subprocess.TimeoutExpired:
            wrong.append(f"{self.name}: still running 10 s after the unmount")
            self.abandon()
            return wrong
        self._process = None
        text = self._text()
        if status != 0:
            wrong.append(f"{self.name}: exit status {status}")
        if status != 0 or _NOISE.search(text):
            wrong.append(f"{self.name}: {text[-4000:]}")
        return wrong

    def abandon(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._target:
            force_unmount(self._target)

    def close(self) -> None:
        self.abandon()
        self._log.close()


class ServerSide:
    """Our FUSE mount, served by forks of one process that has imported everything (server.py)."""

    def __init__(self, transport: str, *, name: str = "unionfs2", more: str = "") -> None:
        self.name = name
        self.transport: str | None = transport
        if transport == "devfuse" and not {"writeback", "passthrough"} & set(
            re.split("[,=]", more)
        ):
            more += ",writeback=on"  # not as the free space has it
        self.holds_back = "writeback=on" in more
        # Options that the kernel does not have.
        self._more = f",transport={transport}{more}".encode()
        self._target = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - one file for the life of the side
        self._process: subprocess.Popen[bytes] | None = None

    def _ask(self, verb: str, *args: object) -> Any:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump((verb, *args), process.stdin)
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], 60)
        if not ready:
            process.kill()
            process.wait()
            raise MountError(f"{self.name}: no answer from the server process: {self._text()}")
        try:
            return pickle.load(process.stdout)
        except EOFError:
            raise MountError(f"{self.name}: the server process died: {self._text()}") from None

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.differential.server", str(self.transport)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=REPOSITORY,
        )

    def _text(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()

    def mount(self, stack: Stack) -> None:
        self._log.seek(0)
        self._log.truncate()
        self._target = stack.target
        served, reason = self._ask("mount", option_text(stack) + self._more, stack.target)
        if served != self.transport:
            self.abandon()
            raise MountError(f"{self.name}: {reason or f'{served} serves'}")

    def unmount(self) -> list[str]:
        wrong = unmount_patiently(self._target)
        status = self._ask("wait", 10.0)
        if status is None:
            wrong.append(f"{self.name}: still running 10 s after the unmount")
            self._ask("kill")
        elif status != 0:
            wrong.append(f"{self.name}: exit status {status}")
        self._target = b""
        text = self._text()
        if status != 0 or _NOISE.search(_LATE_REPLY.sub("", text)):
            wrong.append(f"{self.name}: {text[-4000:]}")
        return wrong

    def abandon(self) -> None:
        if not self._target:
            return
        self._ask("kill")
        force_unmount(self._target)
        self._target = b""

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.wait()
            process.stdout.close()
        self._log.close()


def unionfs2_server(transport: str, more: str = "") -> ServerSide:
    """Our FUSE mount, quick to start; *more* options begin with a comma."""
    return ServerSide(transport, more=more)


def unionfs2_limited(transport: str) -> ServerSide:
    """Our FUSE mount with limits that nobody reaches: it has to count right and change nothing."""
    limits = ",size=1000T,inodes=1000000000000,writeback=off"
    return ServerSide(transport, name="unionfs2 limited", more=limits)


def fuse_overlayfs() -> CommandSide:
    """Debian's fuse-overlayfs: a peer that differs, to see that differences are found."""
    return CommandSide("fuse-overlayfs", ["fuse-overlayfs", "-f", "-o", "@options", "@target"])


def unionfs2_command(transport: str) -> CommandSide:
    """Our FUSE mount as a user starts it."""
    words = ["mount", "--backend", "fuse", "--transport", transport, "-f", "-o", "@options"]
    if transport == "devfuse":
        words += ["-o", "writeback=on"]
    command = [sys.executable, "-m", "unionfs2", *words, "@target"]
    return CommandSide("unionfs2", command, transport=transport)

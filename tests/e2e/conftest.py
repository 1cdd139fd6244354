"""The commands as processes: run, inspect, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support import places

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FUSE = (sys.executable, "-W", "error", "-m", "unionfs2.cli.fuse")
MAIN = (sys.executable, "-W", "error", "-m", "unionfs2")

Word = str | bytes | Path
Result = subprocess.CompletedProcess[str]


class Site:
    """Layers, a mount point, and the commands with an environment of their own.

    *transport* is what the mounts of fuse() ask for, and what their records have to tell.
    """

    def __init__(self, root: Path, transport: str | None = None) -> None:
        self.root = root
        self.transport = transport
        for name in ("l1", "l2", "u", "w", "m", "state", "bin"):
            (root / name).mkdir()
        (root / "l1" / "one").write_text("1")
        (root / "l2" / "two").write_text("2")
        self.mountpoint = root / "m"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "UNIONFS2_STATE": str(root / "state"),
        }

    @property
    def layers(self) -> str:
        return f"lowerdir={self.root}/l1:{self.root}/l2"

    @property
    def options(self) -> str:
        return f"{self.layers},upperdir={self.root}/u,workdir={self.root}/w"

    @property
    def fuse_words(self) -> tuple[str, ...]:
        """The command that mounts through FUSE, by the transport under test."""
        return FUSE if self.transport is None else (*FUSE, "--transport", self.transport)

    def run(
        self, *words: Word, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Result:
        """Run a command to its end. It holds no pipe open afterwards, or this would not return."""
        return subprocess.run(
            [os.fsencode(word) for word in words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            timeout=60,
            check=False,
        )

    def fuse(self, *words: Word, environment: Mapping[str, str] | None = None) -> Result:
        return self.run(*self.fuse_words, *words, environment=environment)

    def main(self, *words: Word, environment: Mapping[str, str] | None = None) -> Result:
        return self.run(*MAIN, *words, environment=environment)

    def give_to(self, uid: int) -> None:
        """Make *uid* the owner of everything here, as if it had made it."""
        for path in (self.root, *self.root.rglob("*")):
            os.chown(path, uid, uid, follow_symlinks=False)

    def names(self, of: str = "m") -> list[str]:
        return sorted(os.listdir(self.root / of))

    def mount_lines(self) -> list[str]:
        """Lines of the kernel's list of mounts about the mount point, the newest last."""
        text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
        return [line for line in text.splitlines() if line.split(" ")[4] == str(self.mountpoint)]

    def server(self) -> int:
        """Process id of the server, from the record."""
        (record,) = (self.root / "state").glob("*.json")
        known = json.loads(record.read_text())
        assert self.transport in (None, known["transport"])
        pid: int = known["pid"]
        return pid

    def put_on_path(self, name: str, command: Sequence[str]) -> None:
        """A script *name* that runs *command*, first on PATH."""
        script = self.root / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
        script.chmod(0o755)
        self.environment["PATH"] = f"{self.root / 'bin'}:{os.environ['PATH']}"


@pytest.fixture
def transport() -> str | None:
    """Which transport is asked for; modules about servers have a fixture that names each."""
    return None


@pytest.fixture
def site(transport: str | None) -> Iterator[Site]:
    with places.open_directory() as root:
        yield Site(root, transport)


def is_running(pid: int) -> bool:
    """Whether *pid* still does anything; a zombie that init has not fetched does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether *condition* comes true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


@contextlib.contextmanager
def foreground(site: Site, *words: Word) -> Iterator[subprocess.Popen[str]]:
    """A command that stays in the foreground, mounted; killed at the end if it still runs."""
    with subprocess.Popen(
        [os.fsencode(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=site.environment,
    ) as process:
        try:
            assert eventually(lambda: bool(site.mount_lines()) or process.poll() is not None)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


def refused(result: Result, status: int, words: str, program: str = "fuse-unionfs2") -> None:
    """The command failed with *status* and exactly one line, which has *words* in it."""
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"{program}: ")
    assert words in result.stderr
    assert result.returncode == status

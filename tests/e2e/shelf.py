"""A store in a place with an awkward name, and the command that works on it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import pty
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.conftest import MAIN, REPOSITORY, Word
from tests.support import places
from tests.support.transports import NATIVE, TRANSPORTS, backend_of

#: Ids that a store has to take like any other.
ODD_IDS = ("a b", "a:b,c=d", "[red]", "-dash", "ümlaut", "x" * 200, "back\\slash", "$(touch x)")


class Done(NamedTuple):
    """A command that has ended."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()


@functools.cache
def bytecode_cache() -> str:
    """A directory for compiled modules, for this session: half of a short command is compiling."""
    path = tempfile.mkdtemp(prefix="unionfs2-test-", dir="/var/tmp")
    atexit.register(shutil.rmtree, path)
    os.chmod(path, 0o755)
    return path


class Shelf:
    """The store, and words that are given with every command."""

    def __init__(self, root: Path, way: str | None = None) -> None:
        self.root = root
        self.home = root / "st ore,a:b"
        (root / "state").mkdir()
        self.words: list[str] = [] if way is None else ["--backend", backend_of(way)]
        if way in TRANSPORTS:
            self.words += ["--storage-opt", f"mountopt=transport={way}"]
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self.environment = {
            **kept,
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONPYCACHEPREFIX": bytecode_cache(),
            "UNIONFS2_STATE": str(root / "state"),
            "UNIONFS2_ROOT": str(self.home),
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
        }
        (root / "bin").mkdir()
        script = root / "bin" / "unionfs2"
        script.write_text(f'#!/bin/sh\nexec {" ".join(MAIN)} "$@"\n')
        script.chmod(0o755)

    def run(
        self,
        *words: Word,
        given: bytes = b"",
        environment: Mapping[str, str] | None = None,
        stdout: int = subprocess.PIPE,
    ) -> Done:
        """Run ``unionfs2`` with *words*."""
        done = subprocess.run(
            [os.fsencode(word) for word in (*MAIN, *self.words, *words)],
            input=given,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={**self.environment, **(environment or {})},
            cwd=self.root,
            timeout=60,
            check=False,
        )
        err = done.stderr.decode("utf-8", "surrogateescape")
        return Done(done.returncode, done.stdout or b"", err)

    def ok(self, *words: Word, given: bytes = b"") -> str:
        """What a command that succeeds without a word on standard error prints."""
        done = self.run(*words, given=given)
        assert (done.status, done.err) == (0, ""), words
        return done.text.removesuffix("\n")

    def json(self, *words: Word) -> Any:
        return json.loads(self.ok(*words, "--format", "json"))

    def refused(self, *words: Word, status: int = 1, given: bytes = b"") -> str:
        """The one sentence of a command that fails."""
        done = self.run(*words, given=given)
        assert done.out == b""
        assert done.err.startswith("unionfs2: "), done.err
        assert done.err.count("\n") == 1, done.err
        assert done.status == status, done.err
        return done.err.removeprefix("unionfs2: ").removesuffix("\n")

    def shell(self, script: str, *words: str) -> Done:
        """Run *script* by bash; ``unionfs2`` is on its PATH."""
        done = subprocess.run(
            ["bash", "-c", script, "bash", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self.environment,
            cwd=self.root,
            timeout=60,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr.decode())

    def ids(self) -> list[str]:
        return self.ok("layer", "ls", "-q").splitlines()

    def leftovers(self) -> list[str]:
        """Names in the store's places for work in progress."""
        state = self.home / ".unionfs2"
        places_of_work = [state / "staging", state / "trash"]
        return [name for place in places_of_work if place.exists() for name in os.listdir(place)]


@contextlib.contextmanager
def shelf_of(way: str | None) -> Iterator[Shelf]:
    with places.open_directory() as root:
        yield Shelf(root, way)


HOW = [
    *(pytest.param(name, marks=pytest.mark.needs("fuse")) for name in TRANSPORTS),
    pytest.param(NATIVE, marks=pytest.mark.needs("overlay")),
]


def tar_of(tree: Mapping[str, str | None], *, owner: int = 0) -> bytes:
    """A tar stream of *tree*: names that end in a slash are directories."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in tree.items():
            member = tarfile.TarInfo(name)
            member.mtime = 1_700_000_000
            member.uid = member.gid = owner
            member.mode = 0o755 if name.endswith("/") else 0o644
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                data = (content or "").encode()
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


BASE = {
    "etc/": None,
    "etc/motd": "hello\n",
    "etc/hostname": "base\n",
    "usr/": None,
    "usr/tool": "t",
}


def names_in_tar(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


class Terminal:
    """A terminal for a command's streams, and all that was written to it."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO when the last user of the other end has gone
            while chunk := os.read(self._master, 65536):
                self._chunks.append(chunk)

    def text(self) -> str:
        """Close the terminal; what was written to it."""
        os.close(self.slave)
        self._reader.join()
        os.close(self._master)
        return b"".join(self._chunks).decode().replace("\r\n", "\n")

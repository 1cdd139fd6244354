"""Our FUSE mounts without the start-up time of an interpreter: ``python -m ...server TRANSPORT``.

The process imports everything once and forks one server per mount (pyfuse3 allows one session per
process). Requests are pickled tuples on standard input, answers on standard output:
``("mount", option text, target)`` answers the transport that serves and None, or None and the
reason of the failure, ``("wait", seconds)`` answers the exit status of the server or None when it
still runs, ``("kill",)`` ends it.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import BinaryIO

from tests.support.held import Held, cost, held
from unionfs2 import attach, transports
from unionfs2.options import MountSpec, parse_options
from unionfs2.serving import load_serve, transport_of
from unionfs2.union import UnionFS


class _Servers:
    """The one running server."""

    def __init__(self) -> None:
        self.pid = 0

    def mount(self, options: bytes, target: bytes) -> tuple[str | None, str | None]:
        """Fork a server; its transport, or the reason when it ends before it is ready."""
        ready_end, tell_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ready_end)
            _child(options, target, tell_end)
        os.close(tell_end)
        try:
            word = os.read(ready_end, 4096)
        finally:
            os.close(ready_end)
        kind, _, text = word.decode(errors="replace").partition(" ")
        return (text, None) if kind == "ready" else (None, text or "it died")

    def wait(self, seconds: float) -> int | None:
        """Exit status, None when the server still runs after *seconds*."""
        deadline = time.monotonic() + seconds
        while self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return None
            time.sleep(0.002)
        return 0

    def kill(self) -> None:
        """End the server at once, if it runs."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(10)


def _child(options: bytes, target: bytes, tell_end: int) -> None:
    """Be a server, and never return."""
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.umask(0)
        _serve(options, target, tell_end)
        status = 0
    except BaseException as exc:  # noqa: BLE001 - the last frame of a process
        traceback.print_exc()
        try:
            os.write(tell_end, f"failed {type(exc).__name__}: {exc}".encode())
        except OSError:
            pass  # it has been ready, and nobody listens any more
    finally:
        os._exit(status)


def _serve(options: bytes, target: bytes, tell_end: int) -> None:
    spec = parse_options(options).spec
    serve = load_serve(transports.chosen(spec.transport))
    with UnionFS.open(spec) as fs:
        fuse_fd = attach.attach(spec, target)

        def ready() -> None:
            os.write(tell_end, f"ready {transport_of(serve)}".encode())
            os.close(tell_end)

        place = os.fsdecode(target)
        serve(fs, fuse_fd, mountpoint=place, spec=spec, ready=ready, unmount=None, debug=False)
        _check_count(fs, spec)


def _check_count(fs: UnionFS, spec: MountSpec) -> None:
    """What a limited mount has counted is what is in its upper, and open without a name."""
    ledger = fs.stack.ledger
    if ledger is None or spec.upper is None:
        return
    there = held(Path(os.fsdecode(spec.upper)))
    nameless = {}
    for handle in fs.files.values():
        st = os.fstat(handle.fd)
        if handle.in_upper and not st.st_nlink:
            nameless[st.st_ino] = cost(st)
    expected = Held(there.bytes + sum(nameless.values()), there.inodes + len(nameless))
    counted = Held(ledger.used_bytes, ledger.used_inodes)
    if counted != expected:
        logging.getLogger(__name__).error("counted %s, but there is %s", counted, expected)


def _loop(source: BinaryIO, sink: BinaryIO) -> None:
    servers = _Servers()
    try:
        while True:
            verb, *args = pickle.load(source)
            answer = getattr(servers, verb)(*args)
            pickle.dump(answer, sink)
            sink.flush()
    except EOFError:
        servers.kill()


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    for name in sys.argv[1:]:
        load_serve(transports.chosen(name))
    _loop(sys.stdin.buffer, sys.stdout.buffer)

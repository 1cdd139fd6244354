"""Count the requests that a FUSE server gets, by opcode, without touching the server.

Knows: the kernel's tracepoint ``fuse:fuse_request_send`` fires once for each request that waits for
an answer (so not for FORGET), with the number of the connection and the opcode. A trace instance of
our own is made in a tracefs mounted in a private place, so that nobody else's tracing is disturbed
and nothing stays behind.

Tracing costs time: what is counted is never timed.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench import targets

_EVENT: Final = "events/fuse/fuse_request_send"
_BUFFER_KIB: Final = 16 << 10  # of each processor; a request takes about 40 bytes of it
_WRITTEN: Final = re.compile(r"entries-in-buffer/entries-written: (\d+)/(\d+)")
_OPCODE: Final = re.compile(r" opcode \d+ \((?:FUSE_)?(\w+)\)")


class Tracer:
    """A trace instance; counts one connection at a time."""

    def __init__(self, instance: Path) -> None:
        self._instance = instance
        self._write("tracing_on", "0")
        self._write("buffer_size_kb", f"{_BUFFER_KIB}")

    @contextlib.contextmanager
    def counting(self, connection: int) -> Iterator[Counter[str]]:
        """Requests of `connection` within, by opcode; filled in at the end.

        RuntimeError when there were more than the buffer holds.
        """
        counts: Counter[str] = Counter()
        self._write(f"{_EVENT}/filter", f"connection == {connection}")
        self._write("trace", "")
        self._write(f"{_EVENT}/enable", "1")
        self._write("tracing_on", "1")
        try:
            yield counts
        finally:
            self._write("tracing_on", "0")
            self._write(f"{_EVENT}/enable", "0")
        self._read(counts)

    def _read(self, counts: Counter[str]) -> None:
        with (self._instance / "trace").open(encoding="utf-8") as lines:
            for line in lines:
                found = _OPCODE.search(line)
                if found is not None:
                    counts[found[1]] += 1
                    continue
                written = _WRITTEN.search(line)
                if written is not None and written[1] != written[2]:
                    raise RuntimeError(f"only {written[1]} of {written[2]} requests were recorded")

    def _write(self, name: str, text: str) -> None:
        (self._instance / name).write_text(text)


@contextlib.contextmanager
def open_tracer() -> Iterator[Tracer | None]:
    """A tracer, or None where the kernel does not let us trace."""
    if os.geteuid() != 0:
        yield None
        return
    place = Path(tempfile.mkdtemp(prefix="unionfs2-bench-tracefs-"))
    try:
        with contextlib.ExitStack() as stack:
            yield _open(place, stack)
    finally:
        place.rmdir()


def _open(place: Path, stack: contextlib.ExitStack) -> Tracer | None:
    try:
        targets.mount("tracefs", place, "tracefs", "")
    except OSError:
        return None
    stack.callback(targets.unmount, place)
    if not (place / _EVENT).is_dir():
        return None
    instance = place / f"instances/unionfs2-bench-{os.getpid()}"
    try:
        instance.mkdir()
    except OSError:
        return None
    stack.callback(instance.rmdir)
    return Tracer(instance)

"""What a verb of the store says: its result on standard output, everything else on standard error.

* The result stands alone, so that ``cd $(unionfs2 layer mount ID)`` works.
* A table is drawn on a terminal, where ids and sizes are short. Anywhere else it is plain
  columns: whole ids, bytes, times without a space, no colour, nothing cut off.
* A progress bar appears on a terminal only, and only once a second has passed. It has no thread
  (a FUSE server is forked from this process): the work itself tells how far it is.

rich is loaded when a table or a bar is drawn.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from unionfs2.cli.common import say
from unionfs2.cli.settings import Common
from unionfs2.errors import show

if TYPE_CHECKING:
    from rich.progress import Progress

    from unionfs2.archive.digest import Chunk, Writable

PROGRAM: Final = "unionfs2"
_BAR_AFTER_S: Final = 1.0
_BAR_EVERY_S: Final = 0.1
_SHORT_ID: Final = 12
_LONG_ID: Final = 64
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class Bytes(int):
    """A cell: an amount of data."""

    __slots__ = ()


class Moment(float):
    """A cell: seconds since the epoch."""

    __slots__ = ()


class Ident(str):
    """A cell: a layer id or a digest, shortened for people when it is nothing but hex digits."""

    __slots__ = ()


Cell = str | int | float | None


def short(text: str) -> str:
    """The first digits of a generated id or of a digest; any other text as it is."""
    digits = text.removeprefix("sha256:")
    if len(digits) == _LONG_ID and all(c in "0123456789abcdef" for c in digits):
        return digits[:_SHORT_ID]
    return text


def human_size(size: int) -> str:
    """An amount of data for people, in binary units."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, len(_UNITS))
    return f"{size / 1024**power:.1f} {_UNITS[power - 1]}"


def utc(moment: float | None) -> str | None:
    """A time for programs (RFC 3339)."""
    if moment is None:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def render(cell: Cell, *, people: bool) -> str:
    """The text of one cell."""
    if cell is None or cell == "":
        return "-"
    if isinstance(cell, Bytes):
        return human_size(cell) if people else str(int(cell))
    if isinstance(cell, Moment):
        if people:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(cell))
        return utc(cell) or "-"
    if isinstance(cell, Ident) and people:
        return show(short(cell))
    return show(cell)


def escaped(path: bytes) -> str:
    """A path as text, reversibly: backslashes doubled, what is no text as hexadecimal escapes."""
    parts = []
    for char in path.decode("utf-8", "surrogateescape"):
        if char == "\\":
            parts.append("\\\\")
        elif char.isprintable():
            parts.append(char)
        else:
            parts += [f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape")]
    return "".join(parts)


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, two spaces apart."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


@dataclass(frozen=True, slots=True)
class Output:
    """The two standard streams as one command line wants them."""

    json: bool = False
    quiet: bool = False

    @classmethod
    def of(cls, common: Common) -> Output:
        return cls(json=common.json, quiet=common.quiet)

    # --- results ------------------------------------------------------------------------------

    def result(self, word: str | bytes, **record: Any) -> None:
        """The one word a verb answers with; as JSON, an object with the keys of *record*."""
        if self.json:
            self.as_json(record)
        else:
            write_line(os.fsencode(word))

    def as_json(self, value: Any) -> None:
        """*value* as JSON, whatever --format says."""
        import json  # noqa: PLC0415 - for programs only

        write_line(json.dumps(value, indent=2).encode())

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        records: Iterable[dict[str, Any]],
    ) -> None:
        """*rows* as a table, or *records* as a JSON array; with -q, the first column alone."""
        if self.json:
            self.as_json(list(records))
        elif self.quiet:
            for row in rows:
                write_line(os.fsencode(str(row[0])))
        elif sys.stdout.isatty():
            _draw_table(header, [[render(cell, people=True) for cell in row] for row in rows])
        else:
            texts = [[render(cell, people=False) for cell in row] for row in rows]
            write_line(plain_table(header, texts).encode())

    def pairs(self, pairs: Sequence[tuple[str, str]], record: dict[str, Any]) -> None:
        """Names with their values, one on each line, or *record* as a JSON object."""
        if self.json:
            self.as_json(record)
            return
        for name, value in pairs:
            write_line(f"{name}: {value}".encode())

    # --- words for people ---------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Something that a person may like to know, unless -q."""
        if not self.quiet:
            say(PROGRAM, text)

    def warn(self, text: str) -> None:
        """Something that is wrong but does not hinder, unless -q."""
        self.note(f"warning: {text}")

    def meter(self, title: str, total: int | None = None, unit: str = "bytes") -> Meter:
        """A progress bar for work on *total* bytes or others (None: unknown), if one is wanted."""
        return Meter(title, total, unit, shown=not self.quiet and sys.stderr.isatty())


def write_line(line: bytes) -> None:
    """One line on standard output. Bytes, because a path need not be text."""
    sys.stdout.flush()
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _draw_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415 - on a terminal only
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in an id are no markup
    Console().print(table)


# --- progress -------------------------------------------------------------------------------------


class Meter:
    """How far a long work is: call it with the amount done so far."""

    def __init__(self, title: str, total: int | None, unit: str, *, shown: bool) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._shown = shown
        self._next = time.monotonic() + _BAR_AFTER_S
        self._bar: Progress | None = None

    def __call__(self, done: int) -> None:
        if not self._shown:
            return
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _BAR_EVERY_S
        if self._bar is None:
            self._bar = _new_bar(self._unit)
            self._bar.start()
            self._bar.add_task(self._title, total=self._total)
        self._bar.update(self._bar.task_ids[0], completed=done)
        self._bar.refresh()

    def labelled(self, label: str, done: int, total: int) -> None:
        """The same for work that comes in parts, each with a total of its own (0: unknown)."""
        self._title, self._total = label, total or None
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=label, total=self._total)
        self(done)

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _new_bar(unit: str) -> Progress:
    from rich import progress  # noqa: PLC0415 - on a terminal, after a second
    from rich.console import Console  # noqa: PLC0415

    amounts: tuple[progress.ProgressColumn, ...] = (
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
    )
    if unit != "bytes":
        amounts = (progress.MofNCompleteColumn(), progress.TextColumn(unit, markup=False))
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *amounts,
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,  # or it would start a thread
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


class CountedReader:
    """A stream that tells a meter how much of it was read."""

    def __init__(self, stream: BinaryIO, meter: Meter) -> None:
        self._stream = stream
        self._meter = meter
        self._done = 0

    def read(self, size: int = -1) -> bytes:
        """As the stream's own."""
        data = self._stream.read(size)
        self._done += len(data)
        self._meter(self._done)
        return data


class CountedWriter:
    """A stream that tells a meter how much was written to it."""

    def __init__(self, stream: Writable, meter: Meter) -> None:
        self._stream = stream
        self._meter = meter
        self._done = 0

    def write(self, data: Chunk, /) -> object:
        """As the stream's own."""
        self._done += len(data)
        result = self._stream.write(data)
        self._meter(self._done)
        return result


# --- the log --------------------------------------------------------------------------------------


class _Words(logging.Formatter):
    """Lines like every other line for people: "unionfs2: warning: text"."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{PROGRAM}: {level}{super().format(record)}"


def set_up_log(common: Common) -> None:
    """Send what the library has to say to standard error, from --log-level upwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Words("%(message)s"))
    level = logging.ERROR if common.quiet else common.log_level.upper()
    logging.basicConfig(level=level, handlers=[handler], force=True)

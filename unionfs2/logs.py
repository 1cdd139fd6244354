"""Where a server process writes what it has to say: a file, the journal, or the terminal.

A daemon has no terminal, so without an option its messages go nowhere; errors of the mount
itself travel to the command that started it, not through here.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from typing import Final

from .errors import OptionError, UnavailableError, show
from .options import MountSpec

_JOURNAL: Final = "/run/systemd/journal/socket"
_SYSLOG: Final = "/dev/log"
_IDENTIFIER: Final = "unionfs2"
_FACILITY_DAEMON: Final = 3
_FORMAT: Final = "%(asctime)s unionfs2[%(process)d] %(levelname)s %(name)s: %(message)s"


class _JournalHandler(logging.Handler):
    """Entries in the native protocol of systemd's journal.

    One datagram per entry, "NAME=value" lines; a value with a newline is sent with its length.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._socket.send(self._datagram(record))
        except OSError:
            self.handleError(record)

    def _datagram(self, record: logging.LogRecord) -> bytes:
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_priority(record.levelno)),
            "SYSLOG_IDENTIFIER": _IDENTIFIER,
            "LOGGER": record.name,
        }
        return b"".join(_field(name.encode(), text) for name, text in fields.items())

    def close(self) -> None:
        self._socket.close()
        super().close()


class _SyslogHandler(_JournalHandler):
    """The older protocol: one line "<priority>identifier[pid]: text" per datagram."""

    def _datagram(self, record: logging.LogRecord) -> bytes:
        priority = _FACILITY_DAEMON * 8 + _priority(record.levelno)
        text = f"<{priority}>{_IDENTIFIER}[{record.process}]: {self.format(record)}"
        return text.encode("utf-8", "backslashreplace")


def _field(name: bytes, text: str) -> bytes:
    value = text.encode("utf-8", "backslashreplace")
    if b"\n" in value:
        return name + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
    return name + b"=" + value + b"\n"


def _priority(level: int) -> int:
    """The level as syslog(3) numbers it."""
    for limit, priority in (
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
    ):
        if level >= limit:
            return priority
    return 7


def set_up(spec: MountSpec, *, foreground: bool) -> None:
    """Send the log where *spec* says. Raises OptionError or UnavailableError when it cannot."""
    handlers: list[logging.Handler] = []
    if spec.log is not None:
        handlers.append(_file_handler(spec.log))
    if spec.journal:
        handlers.append(_journal_handler())
    if foreground and not handlers:
        handlers.append(logging.StreamHandler(sys.stderr))
    if not handlers:
        handlers.append(logging.NullHandler())
    for handler in handlers:
        plain = isinstance(handler, _JournalHandler)
        handler.setFormatter(logging.Formatter("%(message)s" if plain else _FORMAT))
    logging.basicConfig(level=logging.DEBUG if spec.debug else logging.INFO, handlers=handlers)
    logging.captureWarnings(capture=True)


def _file_handler(path: bytes) -> logging.Handler:
    try:
        return logging.FileHandler(
            os.fsdecode(path), encoding="utf-8", errors="backslashreplace", delay=False
        )
    except OSError as exc:
        raise OptionError(
            f"log file {show(path)} cannot be opened: {os.strerror(exc.errno or 0)}, "
            "give a writable file in log="
        ) from exc


def _journal_handler() -> logging.Handler:
    for handler, path in ((_JournalHandler, _JOURNAL), (_SyslogHandler, _SYSLOG)):
        try:
            return handler(path)
        except OSError:
            continue
    raise UnavailableError(
        f"there is no journal here, neither {_JOURNAL} nor {_SYSLOG} answers: use log=FILE"
    )

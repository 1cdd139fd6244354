"""Loggers that load the module logging when there is somebody to tell.

A server without a log has nobody, and would pay for loading it at each start, in time and in
memory. What stays below a warning is shown only where somebody set logging up, so it must be loaded
then; a warning or an error loads it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import logging

#: logging's own numbers.
_DEBUG: Final = 10
_INFO: Final = 20
_WARNING: Final = 30
_ERROR: Final = 40
_CRITICAL: Final = 50
#: The caller of Log.debug() and so on is three frames up.
_STACK: Final = 3


class Log:
    """A part of logging.Logger: the logger *name*."""

    __slots__ = ("_logger", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger: logging.Logger | None = None

    def debug(self, text: str, *args: object) -> None:
        if "logging" in sys.modules:
            self._tell(_DEBUG, text, args)

    def info(self, text: str, *args: object) -> None:
        if "logging" in sys.modules:
            self._tell(_INFO, text, args)

    def warning(self, text: str, *args: object) -> None:
        self._tell(_WARNING, text, args)

    def error(self, text: str, *args: object) -> None:
        self._tell(_ERROR, text, args)

    def exception(self, text: str, *args: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._tell(_ERROR, text, args, sys.exc_info()[1])

    def critical(self, text: str, *args: object, exc: BaseException | None = None) -> None:
        self._tell(_CRITICAL, text, args, exc)

    def _tell(
        self,
        level: int,
        text: str,
        args: tuple[object, ...],
        exc: BaseException | None = None,
    ) -> None:
        if self._logger is None:
            import logging  # noqa: PLC0415 - this is what the module is for

            self._logger = logging.getLogger(self._name)
        self._logger.log(level, text, *args, exc_info=exc, stacklevel=_STACK)

"""What can be closed can be used in a ``with`` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

_Self = TypeVar("_Self", bound="Closing")


class Closing(ABC):
    """Closed at the end of a ``with`` block, however that ends."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Give everything back that is held."""

    def __enter__(self: _Self) -> _Self:  # noqa: PYI019 - typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

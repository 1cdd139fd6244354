"""Sizes as people write them: ``10G``, ``1.5GiB``, ``4096``.

Units are binary, whatever their spelling, as container engines read the ``size=`` of a storage
option (docker-units, RAMInBytes): k, M, G, T, P, each alone, with ``B`` or with ``iB``, any case.
Invariant: ``parse_size(format_size(n)) == n`` for every n from 0 to SIZE_MAX.
"""

from __future__ import annotations

import re
from typing import Final

from .errors import OptionError

#: Largest size of a file, hence of anything that is counted in bytes (off_t).
SIZE_MAX: Final = (1 << 63) - 1

_UNITS: Final = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
_FORM: Final = re.compile(
    r"(\d*)(?:\.(\d+))?(?: ?([bkmgtp])(?:(?<!b)i?b)?)?", re.ASCII | re.IGNORECASE
)
# More digits are a mistake, and turning thousands of them into a number takes seconds.
_LENGTH_MAX: Final = 64


def parse_size(text: str, name: str = "size") -> int:
    """Bytes that *text* stands for, a fraction of a byte dropped.

    Raises OptionError, which calls the value by *name*, for anything but a number with a unit,
    for a negative one and for more than SIZE_MAX.
    """
    match = _FORM.fullmatch(text) if len(text) <= _LENGTH_MAX else None
    if match is None or not (match[1] or match[2]):
        shown = text if len(text) <= _LENGTH_MAX else text[:_LENGTH_MAX] + "..."
        why = "a size cannot be negative" if text.startswith("-") else "that is not a size"
        raise OptionError(f'option "{name}" got "{shown}", {why}: write it like 512M or 10G')
    decimals = match[2] or ""
    divisor = int("1" + "0" * len(decimals))
    value = (int(match[1] + decimals) << _UNITS[(match[3] or "b").lower()]) // divisor
    if value > SIZE_MAX:
        raise OptionError(f'option "{name}" got "{text}", which is too large: the most is 8191P')
    return value


def format_size(size: int) -> str:
    """The shortest exact text for *size* bytes: ``10G``, ``1536M``, ``4097``."""
    for unit, shift in sorted(_UNITS.items(), key=lambda item: -item[1]):
        if shift and size and not size & ((1 << shift) - 1):
            return f"{size >> shift}{unit.upper()}"
    return str(size)

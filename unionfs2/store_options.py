"""Storage options: ``key=value`` texts for a store and for a single layer.

Keys may be written in any case and with the prefix of a driver (``overlay2.size``, as container
engines write it). What is not known is refused with the nearest known key; what is known and
without effect is a warning.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from . import ondisk
from .errors import OptionError, UnionFSError, show
from .options import parse_options
from .sizes import SIZE_MAX, parse_size
from .storemodel import Quota

PREFIXES: Final = ("overlay2.", "overlay.", "unionfs2.")
LAYERS_MAX_NATIVE: Final = 500  # OVL_MAX_STACK of the kernel (fs/overlayfs/params.h)

Backend = Literal["auto", "native", "fuse"]


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What the storage options of a store say."""

    size: int | None = None  # bytes; limits of writable layers that name none
    inodes: int | None = None
    layers_max: int = ondisk.LAYERS_MAX_DEFAULT
    ignore_chown_errors: bool = False
    mountopt: str = ""
    apply_size_max: int | None = None
    apply_entries_max: int | None = None
    backend: Backend = "auto"
    warnings: tuple[str, ...] = ()

    @property
    def quota(self) -> Quota | None:
        """Limits of a writable layer that names none of its own."""
        return Quota(self.size, self.inodes) or None

    @classmethod
    def parse(cls, texts: Iterable[str]) -> StoreOptions:
        """Options from ``key=value`` texts; a later one wins. Raises OptionError."""
        values: dict[str, Any] = {}
        warnings: list[str] = []
        for text in texts:
            key, value = _split(text)
            if key == "override_kernel_check":
                _boolean(key, value)
                warning = (
                    "storage option override_kernel_check has no effect:"
                    " what the kernel can do is tried, not guessed from its version"
                )
                warnings += [warning] if warning not in warnings else []
                continue
            if key not in _READERS:
                raise _unknown(key, value, [*_READERS, "override_kernel_check"])
            values[key] = _READERS[key](key, value)
        options = cls(**values, warnings=tuple(warnings))
        if options.backend == "native" and options.layers_max > LAYERS_MAX_NATIVE:
            raise OptionError(
                f'storage option layers_max got "{options.layers_max}", and the kernel mounts at'
                f" most {LAYERS_MAX_NATIVE} layers: lower it, or choose backend=fuse"
            )
        return options


def parse_layer_options(options: Mapping[str, str] | Iterable[str] | None) -> Quota | None:
    """Limits from the storage options of one layer: ``size`` and ``inodes``. Raises OptionError."""
    if options is None:
        return None
    if isinstance(options, Mapping):
        pairs = [(_bare(key), value.strip()) for key, value in options.items()]
    else:
        pairs = [_split(text) for text in options]
    values: dict[str, int] = {}
    for key, value in pairs:
        if key not in _LIMITS:
            raise _unknown(key, value, list(_LIMITS))
        values[key] = _LIMITS[key](key, value)
    return Quota(values.get("size"), values.get("inodes")) or None


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise OptionError(f'storage option "{show(text)}" is malformed: write it as key=value')
    return _bare(key), value.strip()


def _bare(key: str) -> str:
    key = key.strip().lower()
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def _unknown(key: str, value: str, known: list[str]) -> OptionError:
    near = difflib.get_close_matches(key, known, 1)
    hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(sorted(known))}"
    return OptionError(f'unknown storage option "{show(key)}" with value "{show(value)}": {hint}')


# --- values ---------------------------------------------------------------------------------------

# As strconv.ParseBool() of Go reads them, and on/off, yes/no.
_TRUE: Final = frozenset({"1", "t", "true", "on", "yes"})
_FALSE: Final = frozenset({"0", "f", "false", "off", "no"})


def _boolean(key: str, value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise OptionError(f'storage option {key} got "{show(value)}": write true or false')


def _size(key: str, value: str) -> int:
    return parse_size(value, key)


def _limit(key: str, value: str) -> int:
    size = parse_size(value, key)
    if size == 0:
        raise OptionError(f'storage option {key} got "{value}": a limit of 0 leaves no room at all')
    return size


def _count(key: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 19 or int(value) > SIZE_MAX:
        raise OptionError(f'storage option {key} got "{show(value)}": write a whole number')
    return int(value)


def _positive(key: str, value: str) -> int:
    number = _count(key, value)
    if number < 1:
        raise OptionError(f'storage option {key} got "{value}": it has to be at least 1')
    return number


def _backend(key: str, value: str) -> str:
    if value not in {"auto", "native", "fuse"}:
        raise OptionError(f'storage option {key} got "{show(value)}": write auto, native or fuse')
    return value


def _mountopt(key: str, value: str) -> str:
    try:
        parse_options(os.fsencode(value))
    except UnionFSError as exc:
        raise OptionError(f"storage option {key}: {exc}") from exc
    return value


_READERS: Final[dict[str, Callable[[str, str], Any]]] = {
    "size": _limit,
    "inodes": _positive,
    "layers_max": _positive,
    "ignore_chown_errors": _boolean,
    "mountopt": _mountopt,
    "apply_size_max": _size,
    "apply_entries_max": _positive,
    "backend": _backend,
}
_LIMITS: Final[dict[str, Callable[[str, str], int]]] = {"size": _limit, "inodes": _positive}

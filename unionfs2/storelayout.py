"""The texts of a store: layer ids, short names, ``link``, ``lower`` and the links in ``l``.

Pure functions over bytes; what they refuse is refused in one sentence that names layer, file and
value. The layout is that of Docker's overlay2: ``HOME/l/<short name> -> ../<id>/diff``, ``link``
holds the short name of a layer, ``lower`` the short names below it, "l/A:l/B", uppermost first.
Short names keep a mount of 128 layers within one page of option text, whatever the ids are.

Invariant: a text that passes here leads nowhere but to the diff directory of a layer, because
neither a short name nor an id can hold a slash or be "..".
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from typing import Final

from . import ondisk
from .errors import DamagedLayerError, StoreError, show
from .storemodel import LayerId

#: What every sentence about a damaged layer ends with.
WAY_OUT: Final = "see unionfs2 check, mend with unionfs2 repair"

_SHORT_NAME: Final = re.compile(
    b"[%b]{%d}" % (b"A-Z0-9", ondisk.SHORT_NAME_LENGTH),
)
_TARGET: Final = re.compile(rb"\.\./([^/\0]+)/" + re.escape(ondisk.DIFF_NAME))
_CONTROL: Final = re.compile("[\x00-\x1f\x7f]")
_ALPHABET: Final = ondisk.SHORT_NAME_ALPHABET.decode()

# A lower of 100,000 layers is 2.9 MB; more than this is not what a store wrote.
TEXT_BYTES_MAX: Final = 16 << 20


# --- ids ------------------------------------------------------------------------------------------


def new_id() -> LayerId:
    """A fresh id: 64 hex digits of the system's random source, as container engines make them."""
    return LayerId(secrets.token_hex(32))


def check_id(text: str) -> LayerId:
    """*text* as the id of a layer. Raises StoreError when it cannot be one."""
    reason = _bad_id(text)
    if reason:
        raise StoreError(f"layer id {show(text)!r} {reason}")
    return LayerId(text)


def _bad_id(text: str) -> str | None:
    if not text:
        return "is empty: name the layer"
    if text.startswith("."):
        return "begins with a dot: such names are kept for the store itself"
    if "/" in text:
        return "contains a slash: an id is one path component"
    if _CONTROL.search(text):
        return "contains a control character"
    if os.fsencode(text) == ondisk.LINKS_NAME:
        return "is the name of the link directory"
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if length > ondisk.ID_BYTES_MAX:
        return f"is {length} bytes long: at most {ondisk.ID_BYTES_MAX} are possible"
    return None


def id_of_name(name: bytes) -> LayerId | None:
    """The id that a directory *name* in HOME stands for; None for what is no layer."""
    text = os.fsdecode(name)
    return None if _bad_id(text) else LayerId(text)


def name_of_id(layer: LayerId) -> bytes:
    """Directory name of a layer."""
    return os.fsencode(layer)


# --- short names ----------------------------------------------------------------------------------


def new_short_name() -> str:
    """A fresh short name; 36**26 of them make a clash a matter of damage, not of chance."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(ondisk.SHORT_NAME_LENGTH))


def is_short_name(name: bytes) -> bool:
    """Whether *name* has the form of an entry of the link directory."""
    return _SHORT_NAME.fullmatch(name) is not None


def parse_link(layer: LayerId, text: bytes) -> str:
    """Short name in a ``link`` file; a final newline is tolerated. Raises DamagedLayerError."""
    name = text.removesuffix(b"\n")
    if is_short_name(name):
        return name.decode("ascii")
    if not name:
        raise damaged(layer, "link", "is empty")
    raise damaged(
        layer,
        "link",
        f"holds {_excerpt(name)}, not a name of {ondisk.SHORT_NAME_LENGTH} letters A-Z and digits",
    )


def format_link(short: str) -> bytes:
    """Content of a ``link`` file."""
    return short.encode("ascii")


def link_target(layer: LayerId) -> bytes:
    """Content of the symbolic link ``l/<short name>`` of a layer."""
    return b"../%b/%b" % (name_of_id(layer), ondisk.DIFF_NAME)


def layer_of_target(target: bytes) -> LayerId | None:
    """Layer that a link in ``l`` leads to; None for any other target than ``../<id>/diff``."""
    match = _TARGET.fullmatch(target)
    return None if match is None else id_of_name(match[1])


# --- lower ----------------------------------------------------------------------------------------


def parse_lower(layer: LayerId, text: bytes, own: str | None = None) -> tuple[str, ...]:
    """Short names in a ``lower`` file, uppermost first. Raises DamagedLayerError.

    *own* is the short name of the layer itself, which must not be among them.
    """
    body = text.removesuffix(b"\n")
    if not body:
        raise damaged(layer, "lower", "is empty: a layer without parent has no such file")
    names = tuple(_lower_element(layer, element) for element in body.split(b":"))
    if own in names:
        raise damaged(layer, "lower", f"names the layer itself (l/{own})")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise damaged(layer, "lower", f"names l/{twice} twice")
    return names


def _lower_element(layer: LayerId, element: bytes) -> str:
    head, _, name = element.partition(b"/")
    if head != ondisk.LINKS_NAME or not is_short_name(name):
        raise damaged(
            layer,
            "lower",
            f"holds {_excerpt(element)}, not l/ and {ondisk.SHORT_NAME_LENGTH} letters and digits",
        )
    return name.decode("ascii")


def format_lower(names: Iterable[str]) -> bytes:
    """Content of a ``lower`` file."""
    return b":".join(b"%b/%b" % (ondisk.LINKS_NAME, name.encode("ascii")) for name in names)


# --- sentences ------------------------------------------------------------------------------------


def damaged(layer: LayerId, file: str, reason: str) -> DamagedLayerError:
    """The exception for a *file* of a layer that cannot be right."""
    return DamagedLayerError(f"layer {show(layer)} is damaged: {file} {reason}; {WAY_OUT}")


def _excerpt(value: bytes) -> str:
    shown = show(value[:80])
    return f"{shown!r}" + (" ..." if len(value) > 80 else "")

"""What a history is made of, as plain values: layer objects, operations, and their text form.

Paths in operations are bytes, in one of three forms: ``b"a/b"`` counts from the root of the mount,
``b"./a"`` from the working directory of the worker, ``b"@3/a"`` from the descriptor in slot 3
(``b"@3"`` is what that descriptor refers to). Data is ``(pattern, times)`` so that scripts stay
short. Times are nanoseconds, ``"now"`` or ``"omit"``.
"""

from __future__ import annotations

import ast
import pprint
import re
from typing import Any, Final, NamedTuple

Data = tuple[bytes, int]
Arg = bytes | int | str | Data | None

#: Times below this or above NOW_END are exact values; those between are "now".
NOW_BEGIN: Final = 1_700_000_000_000_000_000
NOW_END: Final = 3_500_000_000_000_000_000

#: Callers by name: uid, gid, supplementary groups. Numbers are those inside the user namespace.
CALLERS: Final[dict[str, tuple[int, int, tuple[int, ...]]]] = {
    "root": (0, 0, (0,)),
    "user": (1000, 1000, (1000, 2000, 2001)),
    "other": (1001, 1001, (1001, 2000)),
}


class Op(NamedTuple):
    """One call: who makes it, its name in worker.CALLS, its arguments."""

    caller: str
    name: str
    args: tuple[Arg, ...]


class Object(NamedTuple):
    """One object of a layer. *content* by kind: data or pieces, link target, device number.

    Kinds: dir, file, sparse (content: size and pieces), symlink, fifo, sock, chr, blk, whiteout,
    link (content: path of the first name in the same layer).
    """

    path: bytes
    kind: str
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    content: Any = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    mtime: int = 1_200_000_000_123_456_789
    atime: int = 1_100_000_000_987_654_321


Layer = tuple[Object, ...]


class History(NamedTuple):
    """Layers (topmost first), what the upper holds at the start, and operations per phase.

    The sides swap their upper directories between two phases and after the last one. *options*
    are extra mount options both sides get, *name* tells where the history came from.
    """

    name: str
    layers: tuple[Layer, ...]
    upper: Layer
    phases: tuple[tuple[Op, ...], ...]
    options: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of operations."""
        return sum(len(phase) for phase in self.phases)


def show(op: Op) -> str:
    """One operation as one line, for people."""
    text = f"{op.caller}: {op.name}({', '.join(_show_arg(op.name, arg) for arg in op.args)})"
    return shorten(text)


def shorten(text: str) -> str:
    """Long runs of one character as the character and a count."""
    return re.sub(r"([A-Za-z])\1{20,}", lambda m: f"<{m[1]}*{len(m[0])}>", text)


def _show_arg(name: str, arg: Arg) -> str:
    if isinstance(arg, int) and name in {"mkdir", "chmod", "fchmod", "mknod", "umask", "open"}:
        return oct(arg)
    return repr(arg)


def dump(history: History) -> str:
    """History as a Python literal which load() reads back."""
    plain = {
        "name": history.name,
        "options": history.options,
        "layers": tuple(tuple(tuple(o) for o in layer) for layer in history.layers),
        "upper": tuple(tuple(o) for o in history.upper),
        "phases": tuple(
            tuple((op.caller, op.name, *op.args) for op in phase) for phase in history.phases
        ),
    }
    return pprint.pformat(plain, width=110, sort_dicts=False) + "\n"


def load(text: str) -> History:
    """Inverse of dump(). ValueError or SyntaxError when *text* is no such literal."""
    plain = ast.literal_eval(text)
    return History(
        plain["name"],
        tuple(tuple(Object(*o) for o in layer) for layer in plain["layers"]),
        tuple(Object(*o) for o in plain["upper"]),
        tuple(
            tuple(Op(caller, name, tuple(args)) for caller, name, *args in phase)
            for phase in plain["phases"]
        ),
        tuple(plain["options"]),
    )

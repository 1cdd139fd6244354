"""Sides and rewrites that are wrong in one way each: the machine has to notice every one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from tests.differential import rawcalls
from tests.differential.script import Op
from tests.differential.sides import KernelSide, Stack

Tamper = Callable[[Stack], None]


class TamperedSide(KernelSide):
    """The kernel's overlay, and a hand that changes the directories after every unmount."""

    def __init__(self, tamper: Tamper) -> None:
        super().__init__("tampered")
        self._tamper = tamper
        self._stack: Stack | None = None

    def mount(self, stack: Stack) -> None:
        super().mount(stack)
        self._stack = stack

    def unmount(self) -> list[str]:
        wrong = super().unmount()
        if self._stack is not None:
            self._tamper(self._stack)
        return wrong


def _upper(stack: Stack) -> bytes:
    return os.path.join(stack.upper, b"copied")


def stray_whiteout(stack: Stack) -> None:
    os.mknod(os.path.join(stack.upper, b"stray"), 0o020000, 0)


def whiteout_became_file(stack: Stack) -> None:
    path = os.path.join(stack.upper, b"gone")
    os.unlink(path)
    os.mknod(path, 0o100000)


def origin_dropped(stack: Stack) -> None:
    os.removexattr(_upper(stack), "trusted.overlay.origin")


def origin_emptied(stack: Stack) -> None:
    os.setxattr(_upper(stack), "trusted.overlay.origin", b"")


def opaque_added(stack: Stack) -> None:
    os.setxattr(os.path.join(stack.upper, b"dir"), "trusted.overlay.opaque", b"y")


def impure_dropped(stack: Stack) -> None:
    os.removexattr(stack.upper, "trusted.overlay.impure")


def uuid_dropped(stack: Stack) -> None:
    os.removexattr(stack.upper, "trusted.overlay.uuid")


def plain_xattr_changed(stack: Stack) -> None:
    os.setxattr(_upper(stack), "user.note", b"other")


def data_changed(stack: Stack) -> None:
    st = os.stat(_upper(stack))
    with open(_upper(stack), "r+b") as file:
        file.write(b"X")
    os.utime(_upper(stack), ns=(st.st_atime_ns, st.st_mtime_ns))


def mtime_changed(stack: Stack) -> None:
    st = os.stat(_upper(stack))
    os.utime(_upper(stack), ns=(st.st_atime_ns, st.st_mtime_ns + 1))


def parent_mtime_changed(stack: Stack) -> None:
    os.utime(os.path.join(stack.upper, b"dir"))


def mode_changed(stack: Stack) -> None:
    os.chmod(_upper(stack), 0o4711)


def owner_changed(stack: Stack) -> None:
    os.chown(_upper(stack), 1000, -1)


def holes_filled(stack: Stack) -> None:
    with open(os.path.join(stack.upper, b"sparse"), "r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(data.replace(b"\0", b"\0"))


def link_split(stack: Stack) -> None:
    path = os.path.join(stack.upper, b"one")
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    with open(path, "wb") as file:
        file.write(data)


def work_left(stack: Stack) -> None:
    os.mkdir(os.path.join(stack.work, b"work", b"#77"))


def incompat_left(stack: Stack) -> None:
    os.mkdir(os.path.join(stack.work, b"incompat"))


def lower_touched(stack: Stack) -> None:
    path = os.path.join(stack.lowers[0], b"untouched")
    os.utime(path, ns=(1, os.stat(path).st_mtime_ns))


TAMPERS: Final[tuple[Tamper, ...]] = (
    stray_whiteout,
    whiteout_became_file,
    origin_dropped,
    origin_emptied,
    opaque_added,
    impure_dropped,
    uuid_dropped,
    plain_xattr_changed,
    data_changed,
    mtime_changed,
    parent_mtime_changed,
    mode_changed,
    owner_changed,
    holes_filled,
    link_split,
    work_left,
    incompat_left,
    lower_touched,
)


def _instead(name: str, new: Callable[[Op], Op]) -> Callable[[Op], Op]:
    def rewrite(op: Op) -> Op:
        return new(op) if op.name == name else op

    return rewrite


def _with(op: Op, index: int, value: bytes | int | str | tuple[bytes, int]) -> Op:
    return op._replace(args=(*op.args[:index], value, *op.args[index + 1 :]))


#: Operations that go wrong on one side: as if the call did something a little different.
REWRITES: Final[dict[str, Callable[[Op], Op]]] = {
    "chmod loses a bit": _instead("chmod", lambda op: _with(op, 1, 0o600)),
    "wrong caller": _instead("mkdir", lambda op: op._replace(caller="user")),
    "unlink does nothing": _instead("unlink", lambda op: Op("root", "lstat", op.args)),
    "write is short": _instead("write", lambda op: _with(op, 1, (b"w", 1))),
    "mtime is now": _instead("utimens", lambda op: _with(op, 2, "now")),
    "xattr has another value": _instead("setxattr", lambda op: _with(op, 2, (b"x", 1))),
    "rename replaces": _instead("rename", lambda op: _with(op, 2, 0)),
    "link follows": _instead("link", lambda op: _with(op, 2, rawcalls.AT_SYMLINK_FOLLOW)),
}

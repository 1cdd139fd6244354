"""Every operation that changes a union, once for each way the core has of doing it.

All cases run over the same layers, so each name says what it is: lower-only (``f``), upper-only
(``u``), upper over lower (``over``), hidden (``gone``), merged (``m``, ``d``) ...
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Final, NamedTuple

from tests.support.shell import RENAME_EXCHANGE, RENAME_NOREPLACE, Shell
from tests.support.tree import (
    Dir,
    Fifo,
    File,
    HardLink,
    Socket,
    Symlink,
    Tree,
    Whiteout,
)
from unionfs2.model import SetAttr

#: mtime of every object that is built; anything else was given by an operation.
BUILT_NS: Final = 1_000_000_000_000_000_001


def _file(data: str, mode: int = 0o644) -> File:
    return File(data, mode=mode, mtime_ns=BUILT_NS)


LOWER: Final[Tree] = {
    "f": File("lower", mode=0o4710, mtime_ns=BUILT_NS, xattrs={"user.a": b"1", "user.b": b"2"}),
    "gone": _file("hidden"),
    "gonedir": {"inner": _file("hidden")},
    "over": _file("under"),
    "d": Dir({"x": _file("in d"), "deep": Dir({"y": _file("deep")}, mode=0o2750)}, mode=0o1777),
    "emptyd": Dir({}, mode=0o700),
    "m": {"a": _file("a"), "b": _file("b")},
    "op": {"hidden": _file("hidden")},
    "sym": Symlink("target", mtime_ns=BUILT_NS),
    "pipe": Fifo(mode=0o620, mtime_ns=BUILT_NS),
    "sock": Socket(mode=0o600, mtime_ns=BUILT_NS),
    "h1": _file("linked"),
    "h2": HardLink("h1"),
    "sparse": File(size=2 << 20, pieces={(1 << 20) + 4096: b"island"}, mtime_ns=BUILT_NS),
    "bystander": {"file": _file("by"), "hidden": _file("by")},
}

UPPER: Final[Tree] = {
    "gone": Whiteout(),
    "gonedir": Whiteout(),
    "bystander": {"hidden": Whiteout()},
    "over": _file("over", 0o600),
    "m": Dir({"a": Whiteout(), "b": Whiteout()}, mode=0o3755),
    "op": Dir({}, opaque=True),
    "u": _file("upper"),
    "u1": _file("two names"),
    "u2": HardLink("u1"),
    "ud": {"z": _file("z")},
    "ue": {},
    "p": {"f": _file("pf"), "d": {"g": _file("g")}},
}


class Case(NamedTuple):
    """An operation that succeeds when nothing fails, and the paths it is about."""

    name: str
    act: Callable[[Shell], object]
    paths: tuple[str, ...]

    def part_of(self, tree: Tree) -> Tree:
        """What the operation needs of *tree*, and bystanders: less to build and to look at."""
        tops = {path.partition("/")[0] for path in self.paths} | {"bystander"}
        if "h1" in tops:
            tops.add("h2")
        if "u1" in tops:
            tops.add("u2")
        return {name: node for name, node in tree.items() if name in tops}


def _rename(old: str, new: str, flags: int = 0) -> Case:
    kind = {0: "to", RENAME_NOREPLACE: "to free", RENAME_EXCHANGE: "with"}[flags]
    return Case(f"rename {old} {kind} {new}", lambda sh: sh.rename(old, new, flags), (old, new))


def _link(old: str, new: str) -> Case:
    return Case(f"link {old} to {new}", lambda sh: sh.link(old, new), (old, new))


def _unlink(name: str) -> Case:
    return Case(f"unlink {name}", lambda sh: sh.unlink(name), (name,))


def _rmdir(name: str) -> Case:
    return Case(f"rmdir {name}", lambda sh: sh.rmdir(name), (name,))


def _setxattr(name: str) -> Case:
    return Case(f"setxattr {name}", lambda sh: sh.setxattr(name, b"user.new", b"value"), (name,))


def _make(name: str) -> list[Case]:
    """Each way of making an object, under one name."""
    acts: dict[str, Callable[[Shell], object]] = {
        "create": lambda sh: sh.create(name),
        "mkdir": lambda sh: sh.mkdir(name, 0o2750),
        "mkfifo": lambda sh: sh.mknod(name, stat.S_IFIFO | 0o640),
        "symlink": lambda sh: sh.symlink(name, b"to"),
    }
    return [Case(f"{kind} {name}", act, (name,)) for kind, act in acts.items()]


def _change(name: str) -> list[Case]:
    """Each change of one attribute."""
    owner = os.geteuid()
    acts: dict[str, Callable[[Shell], object]] = {
        "chown": lambda sh: sh.setattr(name, SetAttr(uid=owner)),
        "utimes": lambda sh: sh.setattr(name, SetAttr(mtime_ns=5, atime_ns=6)),
    }
    if name != "sym":
        acts["chmod"] = lambda sh: sh.chmod(name, 0o700)
    return [Case(f"{kind} {name}", act, (name,)) for kind, act in acts.items()]


def _write(name: str) -> list[Case]:
    """Each change of data."""
    acts: dict[str, Callable[[Shell], object]] = {
        "open": lambda sh: sh.fs.release(sh.open(name, os.O_RDWR)),
        "write": lambda sh: sh.write(name, b"new data"),
        "overwrite": lambda sh: sh.write(name, b"", flags=os.O_TRUNC),
        "cut": lambda sh: sh.truncate(name, 2),
        "empty": lambda sh: sh.truncate(name, 0),
        "extend": lambda sh: sh.truncate(name, 3 << 20),
    }
    return [Case(f"{kind} {name}", act, (name,)) for kind, act in acts.items()]


def _everything(sh: Shell) -> None:
    every = SetAttr(0o600, os.geteuid(), os.getegid(), size=3, atime_ns=6, mtime_ns=7)
    sh.setattr("d/x", every)


_FILES: Final = ("f", "over", "u", "h1", "sym", "d/x", "p/f")
_FILE_TARGETS: Final = ("new", "gone", "over", "u", "emptyd/new", "p/new")
_DIR_TARGETS: Final = ("new", "gone", "gonedir", "emptyd", "m", "op", "d/new", "p/new")
_EXCHANGED: Final = (
    ("f", "u"), ("f", "over"), ("f", "ud"), ("f", "d/x"), ("f", "p/f"), ("h1", "over"),
    ("ud", "ue"), ("ud", "p/d"), ("ud", "p/f"), ("u", "sym"), ("d/x", "p/d"),
)  # fmt: skip

CASES: Final = (
    *(case for name in ("new", "gone", "d/deep/new", "p/new") for case in _make(name)),
    Case("mkdir gonedir", lambda sh: sh.mkdir("gonedir"), ("gonedir",)),
    *(_link(old, new) for old in ("f", "u", "h1", "sym") for new in ("new", "gone", "p/new")),
    *(_unlink(name) for name in (*_FILES, "u1", "pipe", "d/deep/y")),
    *(_rmdir(name) for name in ("emptyd", "m", "op", "ue")),
    *(_rename(old, new) for old in _FILES for new in _FILE_TARGETS if old != new),
    _rename("h1", "h2"),
    *(_rename(old, new) for old in ("ud", "p/d", "ue") for new in _DIR_TARGETS),
    *(_rename("f", name, RENAME_NOREPLACE) for name in ("new", "gone", "p/new")),
    *(_rename(old, new, RENAME_EXCHANGE) for old, new in _EXCHANGED),
    *(
        case
        for name in ("f", "over", "u", "d", "d/deep", "m", "sym", "pipe", "sock", "h1", "u1")
        for case in _change(name)
    ),
    *(case for name in ("f", "over", "u", "h1", "sparse", "d/deep/y") for case in _write(name)),
    *(_setxattr(name) for name in ("f", "over", "u", "h1", "d/deep", "m")),
    Case("removexattr f", lambda sh: sh.removexattr("f", b"user.a"), ("f",)),
    Case("everything at once", _everything, ("d/x",)),
)

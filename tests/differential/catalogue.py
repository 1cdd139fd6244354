"""The scripted catalogue: named cases, each in a directory of its own, all in one history.

Rows of section 5 of the format are crossed with the kind of parent and with the caller; then come
the cases of section 17 that random histories meet too rarely. A case is a few objects per layer and
a few operations below its directory, so hundreds of them share one mount, and the caller's
operations of one case cannot disturb the next one.

A parent is one of

* merged: in the upper and in the lower;
* lower: only in the lower, copied up by the first change;
* pure: only in the upper;
* opaque: in the upper with the opaque mark, over a lower one with the same names.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from tests.differential import pieces
from tests.differential.pieces import Dialect
from tests.differential.script import Arg, History, Object, Op

_MODE: Final = 0o777
_OLD: Final = 1_400_000_000_111_222_333


class Case(NamedTuple):
    """Objects of the lowers (topmost first) and of the upper, and operations."""

    name: str
    lowers: tuple[tuple[Object, ...], ...]
    upper: tuple[Object, ...]
    ops: tuple[Op, ...]


class Scene:
    """Collects a case: paths are relative to the directory of the case."""

    def __init__(self, name: str, caller: str = "root", *, layers: int = 3) -> None:
        self.name = name
        self.caller = caller
        self.lowers: list[list[Object]] = [[] for _n in range(layers)]
        self.upper: list[Object] = []
        self.ops: list[Op] = []

    def path(self, name: bytes) -> bytes:
        """Where *name* is in the mount."""
        base = self.name.encode()
        return base + b"/" + name if name else base

    def low(self, name: bytes, kind: str = "file", layer: int = 0, **more: Any) -> Scene:
        """An object of a lower layer."""
        self.lowers[layer].append(self._object(name, kind, more))
        return self

    def up(self, name: bytes, kind: str = "file", **more: Any) -> Scene:
        """An object that is in the upper from the start."""
        self.upper.append(self._object(name, kind, more))
        return self

    def _object(self, name: bytes, kind: str, more: dict[str, Any]) -> Object:
        content = more.pop("content", None)
        if kind == "file" and content is None:
            content = b"content of " + name
        if kind == "link":
            assert isinstance(content, bytes)
            content = self.path(content)
        mode = more.pop("mode", 0o777 if kind == "dir" else 0o666)
        return Object(self.path(name), kind, mode, content=content, **more)

    def do(self, name: str, *args: Arg, by: str = "") -> Scene:
        """A call; arguments that are paths are given relative to the case."""
        self.ops.append(Op(by or self.caller, name, self._resolved(name, args)))
        return self

    def _resolved(self, name: str, args: Sequence[Arg]) -> tuple[Arg, ...]:
        found = list(args)
        for index in _PATHS.get(name, ()):
            value = found[index]
            if isinstance(value, bytes) and value[:1] not in {b"@", b"."}:
                found[index] = self.path(value)
        return tuple(found)

    def case(self) -> Case:
        """The finished case, with a last look at everything in it."""
        self.do("readdir", b"", by="root")
        lowers = tuple(tuple(objects) for objects in self.lowers)
        return Case(self.name, lowers, tuple(self.upper), tuple(self.ops))


_PATHS: Final = {
    "open": (1,),
    "tmpfile": (1,),
    "symlink": (1,),
    "link": (0, 1),
    "link_fd": (1,),
    "rename": (0, 1),
    **dict.fromkeys(
        (
            *("mkdir", "mknod", "unlink", "rmdir", "truncate", "chmod", "chown", "lchown"),
            *("utimens", "setxattr", "getxattr", "listxattr", "removexattr", "readlink", "stat"),
            *("lstat", "access", "statfs", "readdir", "readdir_seek", "readdir_unlink", "rmtree"),
            *("cat", "chdir", "exec", "spawn", "open_close", "overwrite"),
        ),
        (0,),
    ),
}

# --- section 5: operation x state x parent x caller -----------------------------------------------

PARENTS: Final = ("merged", "lower", "pure", "opaque")

#: What the name is before the operation. A pure parent has nothing below it.
_STATES: Final = ("absent", "lower", "upper", "both", "deleted", "deleted-pure")

Placer = Callable[[Scene, bytes, str], None]


def _place_parent(scene: Scene, name: bytes, parent: str) -> None:
    if parent in {"merged", "lower", "opaque"}:
        scene.low(name, "dir")
        scene.low(name + b"/hidden", layer=1)
    if parent in {"merged", "pure"}:
        scene.up(name, "dir")
    if parent == "opaque":
        scene.up(name, "dir", xattrs=((b"trusted.overlay.opaque", b"y"),))


def _place(scene: Scene, path: bytes, kind: str, state: str, parent: str) -> None:
    """Put an object of *kind* at *path* so that it is in *state* at the start or by operations."""
    content = b"pointed" if kind == "symlink" else (1, 3) if kind == "chr" else None
    more: dict[str, Any] = {"content": content} if content is not None else {}
    if state in {"lower", "both", "deleted"} and parent != "pure":
        scene.low(path, kind, **more)
    if state in {"upper", "both"} or (parent == "pure" and state != "absent"):
        scene.up(path, kind, **more)
    if state == "deleted-pure" and parent != "pure":
        scene.up(path, kind, **more)
    if state.startswith("deleted"):
        scene.do("rmdir" if kind == "dir" else "unlink", path, by="root")


_KINDS: Final = ("file", "dir", "symlink", "fifo", "chr")


def _removals() -> Iterator[Case]:
    for parent in PARENTS:
        for caller in ("root", "user"):
            for kind in _KINDS:
                for state in _STATES:
                    scene = Scene(f"rm-{parent}-{caller}-{kind}-{state}", caller)
                    _place_parent(scene, b"p", parent)
                    _place(scene, b"p/x", kind, state, parent)
                    remove, other = ("rmdir", "unlink") if kind == "dir" else ("unlink", "rmdir")
                    scene.do(other, b"p/x").do(remove, b"p/x").do(remove, b"p/x")
                    # Delete, create, delete of one name.
                    scene.do("mkdir", b"p/x", 0o755).do("readdir", b"p").do("rmdir", b"p/x")
                    yield scene.case()


def _creations() -> Iterator[Case]:
    make: dict[str, tuple[Arg, ...]] = {
        "open": (0, b"p/x", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o664),
        "mkdir": (b"p/x", 0o775),
        "mknod": (b"p/x", stat.S_IFIFO | 0o660, 0, 0),
        "symlink": (b"target", b"p/x"),
        "link": (b"source", b"p/x", 0),
    }
    for parent in PARENTS:
        for caller in ("root", "user"):
            for name, args in make.items():
                for state in ("absent", "lower", "deleted", "deleted-pure"):
                    scene = Scene(f"mk-{name}-{parent}-{caller}-{state}", caller)
                    scene.low(b"source")
                    _place_parent(scene, b"p", parent)
                    _place(scene, b"p/x", "file", state, parent)
                    scene.do("umask", 0o027)
                    scene.do(name, *args).do("lstat", b"p/x").do("listxattr", b"p/x", 0)
                    scene.do("umask", 0o022)
                    yield scene.case()


def _renames() -> Iterator[Case]:
    sources = [("file", "lower"), ("file", "both"), ("file", "upper"), ("symlink", "lower")]
    sources += [("dir", "lower"), ("dir", "both"), ("dir", "upper")]
    targets = [("file", "absent"), ("file", "lower"), ("file", "upper"), ("file", "deleted")]
    targets += [("dir", "lower"), ("dir", "both"), ("dir", "upper"), ("dir", "deleted")]
    for parent in PARENTS:
        for kind, state in sources:
            for other, other_state in targets:
                for flags in (0, 1, 2):
                    label = f"{parent}-{kind}-{state}-to-{other}-{other_state}-{flags}"
                    scene = Scene(f"mv-{label}", "user" if len(label) % 2 else "root")
                    _place_parent(scene, b"p", parent)
                    _place_parent(scene, b"q", "merged")
                    _place(scene, b"p/x", kind, state, parent)
                    _place(scene, b"q/y", other, other_state, "merged")
                    scene.do("rename", b"p/x", b"q/y", flags)
                    scene.do("lstat", b"p/x").do("readdir", b"p").do("readdir", b"q")
                    yield scene.case()


def _rename_special() -> Iterator[Case]:
    yield (Scene("mv-whiteout-refused").low(b"a").do("rename", b"a", b"b", 4).case())
    yield (
        Scene("mv-looks-empty")
        .low(b"t", "dir")
        .low(b"t/one")
        .low(b"t/two")
        .do("unlink", b"t/one")
        .do("unlink", b"t/two")
        .do("mkdir", b"s", 0o755)
        .do("open", 0, b"s/new", 0o102, 0o644)
        .do("rename", b"s", b"t", 0)
        .do("readdir", b"t")
        .case()
    )
    yield (
        Scene("mv-dir-into-itself")
        .up(b"d", "dir")
        .up(b"d/e", "dir")
        .do("rename", b"d", b"d/e/f", 0)
        .do("rename", b"d/e", b"d", 0)
        .case()
    )
    yield Scene("mv-same").low(b"a").do("rename", b"a", b"a", 0).do("rename", b"a", b"a", 2).case()
    yield (
        Scene("mv-hard-links")
        .low(b"a")
        .low(b"b", "link", content=b"a")
        .do("rename", b"a", b"b", 0)
        .do("lstat", b"a")
        .do("lstat", b"b")
        .case()
    )


# --- section 17 and the rest of the format --------------------------------------------------------


def _layers_in_the_middle() -> Iterator[Case]:
    for name, middle in (
        ("whiteout", Object(b"", "whiteout", 0)),
        ("opaque", Object(b"", "dir", _MODE, xattrs=((b"trusted.overlay.opaque", b"y"),))),
        ("not-opaque", Object(b"", "dir", _MODE, xattrs=((b"trusted.overlay.opaque", b"yes"),))),
        ("file", Object(b"", "file", 0o644, content=b"in the middle")),
    ):
        for top in (True, False):
            scene = Scene(f"middle-{name}-{'top' if top else 'bare'}")
            if top:
                scene.low(b"x", "dir").low(b"x/top")
            scene.lowers[1].append(middle._replace(path=scene.path(b"x")))
            if middle.kind == "dir":
                scene.low(b"x/middle", layer=1)
            scene.low(b"x", "dir", 2).low(b"x/bottom", layer=2)
            scene.do("readdir", b"x").do("cat", b"x/bottom").do("cat", b"x")
            scene.do("mkdir", b"x", 0o755).do("open", 0, b"x/bottom", 0o102, 0o644)
            scene.do("rmtree", b"x").do("lstat", b"x").do("mkdir", b"x", 0o700)
            yield scene.case()


def _trees() -> Iterator[Case]:
    scene = Scene("tree-again", "user")
    for depth in range(1, 5):
        path = b"/".join([b"t"] * depth)
        for layer in range(3):
            scene.low(path, "dir", layer)
            scene.low(path + b"/f%d" % layer, "file", layer)
    scene.do("rmtree", b"t").do("lstat", b"t")
    for depth in range(1, 5):
        scene.do("mkdir", b"/".join([b"t"] * depth), 0o755)
    scene.do("open", 0, b"t/t/f1", 0o102, 0o644).do("readdir", b"t/t").do("rmtree", b"t")
    yield scene.case()
    scene = Scene("delete-while-listing")
    scene.low(b"d", "dir").low(b"d", "dir", 1).up(b"d", "dir")
    for n in range(60):
        place = (scene.up, scene.low)[n % 2]
        place(b"d/name-%03d" % n)
    scene.do("readdir_seek", b"d").do("readdir_unlink", b"d").do("readdir", b"d")
    scene.do("rmdir", b"d")
    yield scene.case()


def _hard_links() -> Iterator[Case]:
    for change in ("chmod", "write", "unlink", "link"):
        scene = Scene(f"linked-{change}")
        scene.low(b"a").low(b"b", "link", content=b"a").low(b"c", "link", content=b"a")
        scene.do("lstat", b"a")
        if change == "chmod":
            scene.do("chmod", b"a", 0o600)
        elif change == "write":
            scene.do("open", 0, b"a", os.O_WRONLY, 0).do("write", 0, (b"new", 1)).do("close", 0)
        elif change == "unlink":
            scene.do("unlink", b"a")
        else:
            scene.do("link", b"a", b"d", 0).do("lstat", b"d")
        for name in (b"a", b"b", b"c"):
            scene.do("lstat", name).do("cat", name)
        yield scene.case()


def _special_bits() -> Iterator[Case]:
    ability = ((pieces.CAPABILITY, pieces.capability(1 << 10)),)
    changes: dict[str, tuple[tuple[str, tuple[Arg, ...]], ...]] = {
        "write": (("open", (0, b"x", os.O_RDWR, 0)), ("write", (0, (b"w", 1)))),
        "truncate": (("truncate", (b"x", 3)),),
        "trunc-open": (("open", (0, b"x", os.O_WRONLY | os.O_TRUNC, 0)),),
        "open-only": (("open", (0, b"x", os.O_RDWR, 0)), ("close", (0,))),
        "chown": (("chown", (b"x", -1, 1000)),),
        "chmod": (("chmod", (b"x", 0o6755)),),
        "chgrp-other": (("chown", (b"x", -1, 2000)),),
        "utimens": (("utimens", (b"x", _OLD, _OLD + 1, 1)),),
    }
    for where in ("low", "up"):
        for caller in ("root", "user"):
            for mode in (0o4777, 0o2777, 0o6777, 0o777, 0o2767):
                for label, calls in changes.items():
                    scene = Scene(f"bits-{where}-{caller}-{mode:o}-{label}", caller)
                    place = scene.low if where == "low" else scene.up
                    place(b"x", mode=mode, uid=1000, gid=1000, xattrs=ability)
                    for name, args in calls:
                        scene.do(name, *args)
                    scene.do("lstat", b"x").do("getxattr", b"x", pieces.CAPABILITY, 1)
                    yield scene.case()


def _inheritance() -> Iterator[Case]:
    default = ((pieces.ACL_DEFAULT, pieces.acl(7, 5, 0, users=((1001, 7),), groups=((2000, 5),))),)
    kinds: dict[str, dict[str, Any]] = {
        "setgid": {"mode": 0o2777, "gid": 2001},
        "acl": {"xattrs": default},
        "both": {"mode": 0o2777, "gid": 2001, "xattrs": default},
        "sticky": {"mode": 0o1777},
    }
    for label, more in kinds.items():
        for where in ("low", "up"):
            for caller in ("root", "user"):
                scene = Scene(f"inherit-{label}-{where}-{caller}", caller)
                place = scene.low if where == "low" else scene.up
                place(b"p", "dir", **more)
                scene.low(b"p/old")
                scene.low(b"p/others", uid=1001, mode=0o644)
                scene.do("unlink", b"p/old", by="root").do("umask", 0o077)
                scene.do("open", 0, b"p/old", 0o102, 0o666).do("open", 1, b"p/new", 0o102, 0o2775)
                scene.do("mkdir", b"p/dir", 0o777).do("mknod", b"p/fifo", 0o10666, 0, 0)
                scene.do("symlink", b"t", b"p/link").do("unlink", b"p/others").do("umask", 0o022)
                for name in (b"p/old", b"p/new", b"p/dir"):
                    scene.do("getxattr", name, pieces.ACL_ACCESS, 1)
                    scene.do("listxattr", name, 1)
                yield scene.case()


def _copy_up_triggers() -> Iterator[Case]:
    calls: dict[str, tuple[Arg, ...]] = {
        "open rw": ("open", 0, b"x", os.O_RDWR, 0),
        "open w": ("open", 0, b"x", os.O_WRONLY, 0),
        "open r trunc": ("open", 0, b"x", os.O_RDONLY | os.O_TRUNC, 0),
        "open creat": ("open", 0, b"x", os.O_RDONLY | os.O_CREAT, 0o600),
        "open path": ("open", 0, b"x", os.O_PATH, 0),
        "open append": ("open", 0, b"x", os.O_WRONLY | os.O_APPEND, 0),
        "access w": ("access", b"x", os.W_OK, 1),
        "truncate same": ("truncate", b"x", 12),
        "chmod": ("chmod", b"x", 0o640),
        "chown": ("chown", b"x", -1, -1),
        "lchown": ("lchown", b"x", 5, 6),
        "utimens": ("utimens", b"x", "omit", _OLD, 0),
        "utimens omit": ("utimens", b"x", "omit", "omit", 0),
        "setxattr": ("setxattr", b"x", b"user.k", (b"v", 1), 0, 0),
        "set acl": ("setxattr", b"x", pieces.ACL_ACCESS, (pieces.acl(6, 4, 0), 1), 0, 1),
        "remove acl absent": ("removexattr", b"x", pieces.ACL_ACCESS, 1),
        "remove default acl absent": ("removexattr", b"x", pieces.ACL_DEFAULT, 1),
        "empty default acl": ("setxattr", b"x", pieces.ACL_DEFAULT, (b"", 1), 0, 1),
        "removexattr absent": ("removexattr", b"x", b"user.none", 0),
        "removexattr": ("removexattr", b"x", b"user.there", 0),
        "link": ("link", b"x", b"y", 0),
        "rename": ("rename", b"x", b"y", 0),
    }
    for kind in ("file", "dir", "symlink", "fifo", "chr"):
        for caller in ("root", "other"):
            for label, (name, *args) in calls.items():
                scene = Scene(f"up-{kind}-{caller}-{label.replace(' ', '-')}", caller)
                content = {"symlink": b"to", "chr": (1, 3)}.get(kind)
                more: dict[str, Any] = {} if content is None else {"content": content}
                if kind in {"file", "dir"}:
                    more["xattrs"] = ((b"user.there", b"v"), (b"trusted.t", b"t"))
                scene.low(b"p", "dir").low(b"p/x", kind, uid=1000, gid=1000, **more)
                where = tuple(b"p/" + a if a in {b"x", b"y"} else a for a in args)
                scene.do(str(name), *where).do("lstat", b"p").do("lstat", b"p/x")
                yield scene.case()


def _names() -> Iterator[Case]:
    scene = Scene("names")
    for name in pieces.ODD_NAMES:
        scene.low(name).low(b"d" + name[:200], "dir").low(b"d" + name[:200] + b"/" + name)
    for name in pieces.ODD_NAMES:
        scene.do("chmod", name, 0o600).do("cat", b"d" + name[:200] + b"/" + name)
        scene.do("unlink", b"d" + name[:200] + b"/" + name).do("rmdir", b"d" + name[:200])
        scene.do("open", 0, b"d" + name[:200], 0o102, 0o644)
    scene.do("open", 0, b"n" * 256, 0o102, 0o644).do("mkdir", b"n" * 300, 0o755)
    scene.do("rename", b"-rf", b"n" * 256, 0).do("lstat", b"n" * 256)
    scene.do("symlink", b"t" * 4095, b"long-target").do("readlink", b"long-target")
    yield scene.case()


def _open_files() -> Iterator[Case]:
    scene = Scene("open-unlinked").low(b"x", content=b"data").low(b"y", content=b"data")
    scene.do("open", 0, b"x", os.O_RDONLY, 0).do("unlink", b"x").do("read", 0, 10).do("fstat", 0)
    scene.do("open", 1, b"y", os.O_RDWR, 0).do("unlink", b"y").do("pwrite", 1, (b"more", 3), 2)
    scene.do("pread", 1, 100, 0).do("fstat", 1).do("ftruncate", 1, 1).do("pread", 1, 100, 0)
    scene.do("fchmod", 1, 0o600).do("fsetxattr", 1, b"user.k", (b"v", 1), 0).do("link_fd", 1, b"z")
    scene.do("open", 2, b"new", 0o102, 0o644).do("unlink", b"new").do("write", 2, (b"w", 9))
    scene.do("mkdir", b"new", 0o755).do("fstat", 2)
    yield scene.case()
    scene = Scene("open-unlinked-change").low(b"x", content=b"data")
    scene.do("open", 0, b"x", os.O_RDONLY, 0).do("unlink", b"x").do("fchmod", 0, 0o600)
    scene.do("fchown", 0, 1, 1).do("fsetxattr", 0, b"user.k", (b"v", 1), 0).do("fstat", 0)
    yield scene.case()
    scene = Scene("open-renamed").low(b"x", content=b"data").low(b"d", "dir")
    scene.do("open", 0, b"x", os.O_RDONLY, 0).do("rename", b"x", b"d/y", 0).do("read", 0, 10)
    scene.do("open", 1, b"d/y", os.O_RDWR, 0).do("write", 1, (b"NEW", 1)).do("pread", 0, 10, 0)
    scene.do("fchmod", 0, 0o600).do("fstat", 0).do("rename", b"d/y", b"x", 0).do("fstat", 1)
    yield scene.case()
    scene = Scene("old-reader").low(b"x", content=b"old data")
    scene.do("open", 0, b"x", os.O_RDONLY, 0).do("read", 0, 3)
    scene.do("open", 1, b"x", os.O_WRONLY | os.O_APPEND, 0).do("write", 1, (b" and more", 2))
    scene.do("read", 0, 100).do("fstat", 0).do("pread", 0, 100, 0).do("flistxattr", 0)
    yield scene.case()
    scene = Scene("removed-directory").low(b"d", "dir").low(b"d/e", "dir")
    scene.do("open", 0, b"d/e", os.O_RDONLY | os.O_DIRECTORY, 0).do("chdir", b"d/e")
    scene.do("rmdir", b"d/e").do("open", 1, b"@0/f", 0o102, 0o644).do("mkdir", b"./g", 0o755)
    scene.do("fstat", 0).do("freaddir", 0)
    yield scene.case()
    scene = Scene("reader-of-a-directory").low(b"d", "dir").low(b"d/a")
    scene.do("open", 0, b"d", os.O_RDONLY | os.O_DIRECTORY, 0).do("freaddir", 0)
    scene.do("open", 1, b"d/b", 0o102, 0o644).do("unlink", b"d/a").do("freaddir", 0)
    yield scene.case()
    scene = Scene("append").low(b"x", content=b"12345")
    scene.do("open", 0, b"x", os.O_RDWR | os.O_APPEND, 0).do("pwrite", 0, (b"ab", 2), 1)
    scene.do("open", 1, b"x", os.O_RDWR, 0).do("lseek", 1, 0, 2).do("write", 1, (b"end", 1))
    scene.do("write", 0, (b"last", 1)).do("cat", b"x").do("mmap_write", 1, (b"M", 3), 2)
    scene.do("cat", b"x").do("ftruncate", 1, 100_000).do("mmap_read", 1).do("lstat", b"x")
    yield scene.case()
    scene = Scene("locks").low(b"x")
    scene.do("open", 0, b"x", os.O_RDONLY, 0).do("flock", 0, 1).do("open", 1, b"x", os.O_RDWR, 0)
    scene.do("flock", 1, 2).do("flock", 0, 8).do("flock", 1, 2).do("ofd_lock", 1, 1, 0, 10)
    scene.do("open", 2, b"x", os.O_RDWR, 0).do("ofd_lock", 2, 1, 5, 10).do("ofd_lock", 2, 1, 20, 5)
    yield scene.case()


def _attributes() -> Iterator[Case]:
    keys = (
        *(b"trusted.overlay.opaque", b"trusted.overlay.origin", b"trusted.overlay.overlay.opaque"),
        *(b"trusted.overlay.", b"trusted.overlay", b"trusted.overlayx", b"user.overlay.opaque"),
        *(b"security.odd", b"user.\xff\n", b"user." + b"k" * 250, b"user." + b"k" * 251),
        *(b"system.odd", b"odd", b"trusted.t"),
    )
    for where in ("low", "up"):
        for caller in ("root", "user"):
            for kind in ("file", "dir", "symlink"):
                scene = Scene(f"xattr-{where}-{caller}-{kind}", caller)
                place = scene.low if where == "low" else scene.up
                more: dict[str, Any] = {"content": b"to"} if kind == "symlink" else {}
                place(b"x", kind, uid=1000, **more)
                for key in keys:
                    scene.do("getxattr", b"x", key, 0).do("removexattr", b"x", key, 0)
                    scene.do("setxattr", b"x", key, (b"v", 3), os.XATTR_CREATE, 0)
                    scene.do("setxattr", b"x", key, (b"w", 3), os.XATTR_CREATE, 0)
                    scene.do("setxattr", b"x", key, (b"z", 3), os.XATTR_REPLACE, 0)
                    scene.do("getxattr", b"x", key, 0).do("listxattr", b"x", 0)
                scene.do("removexattr", b"x", keys[0], 0).do("listxattr", b"x", 0, by="other")
                scene.do("setxattr", b"x", b"user.big", (b"B", 3000), 0, 0)
                scene.do("setxattr", b"x", b"user.bigger", (b"B", 70_000), 0, 0)
                yield scene.case()
    for caller in ("root", "user", "other"):
        scene = Scene(f"acl-{caller}", caller)
        scene.low(b"f", uid=1000, gid=1000, mode=0o640).low(b"d", "dir", uid=1000, mode=0o750)
        rules = pieces.acl(6, 0, 0, users=((1001, 4),))
        scene.do("setxattr", b"f", pieces.ACL_ACCESS, (rules, 1), 0, 1).do("cat", b"f", by="other")
        scene.do("lstat", b"f").do("access", b"f", 4, 1, by="other").do("access", b"f", 4, 1)
        scene.do("chmod", b"f", 0o600).do("getxattr", b"f", pieces.ACL_ACCESS, 1)
        scene.do("cat", b"f", by="other").do("removexattr", b"f", pieces.ACL_ACCESS, 1)
        scene.do("setxattr", b"f", pieces.ACL_DEFAULT, (rules, 1), 0, 1)
        scene.do("setxattr", b"d", pieces.ACL_DEFAULT, (rules, 1), 0, 1).do("mkdir", b"d/e", 0o777)
        scene.do("setxattr", b"d", pieces.ACL_DEFAULT, (b"", 1), 0, 1).do("listxattr", b"d", 1)
        scene.do("setxattr", b"f", pieces.ACL_ACCESS, (pieces.acl(7, 5, 5), 1), 0, 1)
        scene.do("listxattr", b"f", 1).do("lstat", b"f")
        scene.do("setxattr", b"f", pieces.ACL_ACCESS, (b"\2\0\0\0bad", 1), 0, 1)
        yield scene.case()
        for mode in (0o2755, 0o2745, 0o755):
            scene = Scene(f"acl-none-{caller}-{mode:o}", caller).low(b"f", mode=mode, uid=1000)
            scene.do("removexattr", b"f", pieces.ACL_ACCESS, 1).do("lstat", b"f")
            yield scene.case()


def _strays() -> Iterator[Case]:
    yield (
        Scene("stray-pure")
        .up(b"d", "dir")
        .up(b"d/w", "whiteout")
        .do("readdir", b"d")
        .do("lstat", b"d/w")
        .do("unlink", b"d/w")
        .do("rmdir", b"d")
        .do("open", 0, b"d/w", 0o102, 0o644)
        .do("unlink", b"d/w")
        .do("rmdir", b"d")
        .case()
    )
    yield (
        Scene("stray-lower")
        .low(b"d", "dir")
        .low(b"d/w", "whiteout")
        .do("readdir", b"d")
        .do("lstat", b"d/w")
        .do("open", 0, b"d/w", 0o102, 0o644)
        .do("unlink", b"d/w")
        .do("rmdir", b"d")
        .case()
    )
    yield (
        Scene("stray-vanished-lower")
        .up(b"d", "dir", xattrs=((b"trusted.overlay.origin", b"garbage"),))
        .up(b"d/w", "whiteout")
        .do("readdir", b"d")
        .do("rmdir", b"d")
        .case()
    )
    mark = ((b"trusted.overlay.whiteout", b""),)
    for label, flag in (("marked", b"x"), ("unmarked", b"")):
        scene = Scene(f"xattr-whiteout-{label}")
        marks = ((b"trusted.overlay.opaque", flag),) if flag else ()
        scene.low(b"d", "dir", xattrs=marks).low(b"d/w", content=b"", xattrs=mark)
        scene.low(b"d/full", content=b"full", xattrs=mark)
        scene.low(b"d", "dir", 1).low(b"d/w", layer=1).low(b"d/full", layer=1)
        scene.do("readdir", b"d").do("lstat", b"d/w").do("cat", b"d/full")
        scene.do("open", 0, b"d/w", 0o102, 0o644).do("unlink", b"d/w").do("lstat", b"d/w")
        scene.do("rmtree", b"d")
        yield scene.case()
    scene = Scene("xattr-whiteout-upper").low(b"d", "dir").low(b"d/w")
    scene.up(b"d", "dir").up(b"d/w", content=b"", xattrs=mark)
    scene.do("lstat", b"d/w").do("mkdir", b"d/w", 0o755).do("readdir", b"d")
    yield scene.case()


def _foreign_marks() -> Iterator[Case]:
    """Marks which the default profile reads, or refuses, but never writes."""
    for label, value in (
        ("name", b"other"),
        ("path", b"/foreign-path/other"),
        ("slash", b"a/b"),
        ("dots", b".."),
        ("empty", b""),
        ("trailing", b"/foreign-trailing/other/"),
        ("nowhere", b"absent"),
    ):
        scene = Scene(f"foreign-{label}")
        scene.low(b"other", "dir", 1).low(b"other/inside", layer=1)
        scene.low(b"d", "dir", xattrs=((b"trusted.overlay.redirect", value),)).low(b"d/own")
        scene.do("lstat", b"d").do("readdir", b"d").do("cat", b"d/inside").do("rmtree", b"d")
        yield scene.case()
    for label, marks in (
        ("metacopy", ((b"trusted.overlay.metacopy", b""),)),
        ("metacopy-header", ((b"trusted.overlay.metacopy", b"\0\4\0\0"),)),
        ("redirected-file", ((b"trusted.overlay.redirect", b"other"),)),
        ("protattr", ((b"trusted.overlay.protattr", b"i"),)),
        ("nlink", ((b"trusted.overlay.nlink", b"U+1"),)),
        ("impure", ((b"trusted.overlay.impure", b"y"),)),
        ("bad-origin", ((b"trusted.overlay.origin", b"\0\xfb\x1dgarbage"),)),
        ("empty-origin", ((b"trusted.overlay.origin", b""),)),
        ("unknown", ((b"trusted.overlay.unknown", b"1"),)),
        ("escaped", ((b"trusted.overlay.overlay.opaque", b"y"),)),
    ):
        for where in ("low", "up"):
            scene = Scene(f"foreign-{label}-{where}")
            place = scene.low if where == "low" else scene.up
            scene.low(b"f", layer=2, content=b"below")
            place(b"f", xattrs=marks, content=b"above")
            scene.do("lstat", b"f").do("cat", b"f").do("listxattr", b"f", 1)
            scene.do("chmod", b"f", 0o600).do("cat", b"f").do("unlink", b"f").do("lstat", b"f")
            yield scene.case()


def _denied() -> Iterator[Case]:
    scene = Scene("denied", "user")
    scene.low(b"d", "dir", mode=0o755, uid=0).low(b"d/f", mode=0o600).low(b"d/e", "dir", mode=0o700)
    for name, *args in (
        ("unlink", b"d/f"),
        ("rmdir", b"d/e"),
        ("rename", b"d/f", b"d/g", 0),
        ("chmod", b"d/f", 0o777),
        ("chown", b"d/f", 1000, -1),
        ("truncate", b"d/f", 0),
        ("utimens", b"d/f", "now", "now", 1),
        ("utimens", b"d/f", 5, 5, 1),
        ("setxattr", b"d/f", b"user.k", (b"v", 1), 0, 1),
        ("getxattr", b"d/f", b"user.k", 1),
        ("open", 0, b"d/f", os.O_RDONLY, 0),
        ("open", 0, b"d/f", os.O_WRONLY, 0),
        ("open", 0, b"d/new", 0o102, 0o644),
        ("mkdir", b"d/new", 0o755),
        ("symlink", b"t", b"d/new"),
        ("link", b"d/f", b"d/new", 0),
        ("mknod", b"d/new", 0o10600, 0, 0),
        ("readdir", b"d/e"),
        ("chdir", b"d/e"),
        ("lstat", b"d/e/x"),
        ("access", b"d/f", os.R_OK, 1),
        ("access", b"d/f", os.R_OK, 0),
    ):
        scene.do(str(name), *args).do("lstat", b"d", by="root")
    yield scene.case()
    scene = Scene("devices")
    scene.do("mknod", b"w", 0o20000, 0, 0).do("mknod", b"c", 0o20666, 1, 3).do("cat", b"c")
    scene.do("mknod", b"b", 0o60600, 240, 1).do("mknod", b"n", 0o20600, 0, 1).do("readdir", b"")
    scene.do("mknod", b"w", 0o60000, 0, 0).do("mknod", b"s", 0o140666, 0, 0)
    scene.do("mknod", b"w2", 0o20000, 0, 0, by="user").do("mknod", b"c2", 0o20666, 1, 3, by="user")
    yield scene.case()


def _sparse() -> Iterator[Case]:
    for label, size, parts in (
        ("hole", 8 << 20, ()),
        ("island", 8 << 20, ((3 << 20, b"island"),)),
        ("ends", 6 << 20, ((0, b"begin"), ((6 << 20) - 3, b"end"))),
    ):
        scene = Scene(f"sparse-{label}").low(b"x", "sparse", content=(size, parts))
        scene.do("chmod", b"x", 0o600).do("lstat", b"x").do("open", 0, b"x", os.O_RDWR, 0)
        scene.do("pwrite", 0, (b"mark", 1), 5 << 20).do("pread", 0, 100, (5 << 20) - 10)
        yield scene.case()


#: What comes after an open for writing, until the file is closed.
_AFTER_OPEN: Final[dict[str, tuple[tuple[str, tuple[Arg, ...]], ...]]] = {
    "nothing": (),
    "fstat": (("fstat", (0,)),),
    "empty write": (("write", (0, (b"", 0))),),
    "seek": (("lseek", (0, 3, 0)),),
    "sync": (("fsync", (0,)),),
    "write": (("write", (0, (b"new", 1))),),
    "truncate": (("ftruncate", (0, 2)),),
    "chmod": (("fchmod", (0, 0o600)),),
    "times": (("futimens", (0, _OLD, _OLD + 1)),),
    "attribute": (("fsetxattr", (0, b"user.k", (b"v", 1), 0)),),
    "second": (("open", (1, b"p/q/x", os.O_RDWR, 0)), ("pwrite", (1, (b"2", 1), 5))),
    "reader": (("open", (1, b"p/q/x", os.O_RDONLY, 0)), ("pread", (1, 100, 0))),
    "unlink": (("unlink", (b"p/q/x",)),),  # its link count is that of the lower until it is written
    "unlink and write": (("unlink", (b"p/q/x",)), ("write", (0, (b"w", 9))), ("fstat", (0,))),
    "replace": (
        ("unlink", (b"p/q/x",)),
        ("open", (1, b"p/q/x", 0o102, 0o644)),
        ("write", (0, (b"old", 1))),
        ("write", (1, (b"new", 2))),
    ),
    "rename": (("rename", (b"p/q/x", b"p/y", 0)), ("write", (0, (b"w", 1)))),
    "link": (("link", (b"p/q/x", b"p/y", 0)), ("write", (0, (b"w", 1)))),
}


def _opens_for_writing() -> Iterator[Case]:
    """What an open for writing does by itself: the worker does not help here."""
    ability = ((pieces.CAPABILITY, pieces.capability(1 << 10)), (b"user.there", b"v"))
    for parent in ("merged", "lower", "opaque"):
        for caller in ("root", "user"):
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND):
                for label, calls in _AFTER_OPEN.items():
                    name = f"opened-{parent}-{caller}-{flags}-{label.replace(' ', '-')}"
                    scene = Scene(name, caller)
                    scene.do("unaided", "copy-up-at-first-write", by="root")
                    _place_parent(scene, b"p", parent)
                    place = scene.up if parent == "opaque" else scene.low
                    place(b"p/q", "dir", mode=0o2777, gid=2000)
                    place(b"p/q/x", mode=0o4766, uid=1000, gid=1000, xattrs=ability)
                    scene.do("open", 0, b"p/q/x", flags, 0)
                    for call, args in calls:
                        scene.do(call, *args)
                    scene.do("close", 0).do("lstat", b"p/q/x").do("readdir", b"p/q")
                    yield scene.case()
    scene = Scene("opened-sparse").low(b"x", "sparse", content=(6 << 20, [(3 << 20, b"island")]))
    scene.do("unaided", "copy-up-at-first-write", by="root")
    scene.do("open", 0, b"x", os.O_RDWR, 0).do("close", 0).do("lstat", b"x")
    yield scene.case()


def _protected() -> Iterator[Case]:
    """Immutable files, which the upper knows by a mark."""
    yield from _marked(b"i", b"ia")


def _append_only() -> Iterator[Case]:
    """Files that can be appended to only."""
    yield from _marked(b"a")


def _marked(*flags: bytes) -> Iterator[Case]:
    for flag in flags:
        for caller in ("root", "user"):
            scene = Scene(f"protected-{flag.decode()}-{caller}", caller)
            mark = ((b"trusted.overlay.protattr", flag),)
            scene.up(b"x", uid=1000, gid=1000, xattrs=mark).low(b"other")
            for mode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND):
                scene.do("open_close", b"x", mode).do("open_close", b"x", mode | os.O_TRUNC)
            for mode in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND):
                scene.do("overwrite", b"x", mode, (b"w", 3)).do("cat", b"x")
            scene.do("truncate", b"x", 0).do("chmod", b"x", 0o600).do("chown", b"x", 5, 5)
            scene.do("utimens", b"x", _OLD, _OLD, 1)
            scene.do("setxattr", b"x", b"user.k", (b"v", 1), 0, 1)
            scene.do("link", b"x", b"y", 0).do("rename", b"x", b"y", 0)
            scene.do("rename", b"other", b"x", 0).do("unlink", b"x").do("cat", b"x")
            yield scene.case()


def _data_calls() -> Iterator[Case]:
    """Calls that pyfuse3 has no handler for."""
    yield from _fallocations()
    for label, size, parts in (
        ("hole", 8 << 20, ()),
        ("island", 8 << 20, ((3 << 20, b"island"),)),
        ("none", 5000, ((0, b"x" * 5000),)),
    ):
        scene = Scene(f"seek-{label}").low(b"x", "sparse", content=(size, parts))
        for flags in (os.O_RDONLY, os.O_RDWR):
            scene.do("open", 0, b"x", flags, 0)
            for offset in (0, 4096, 3 << 20, size - 1, size, size + 1):
                scene.do("lseek", 0, offset, os.SEEK_DATA).do("lseek", 0, offset, os.SEEK_HOLE)
            scene.do("lseek", 0, 0, 1)
        yield scene.case()
    for parent in PARENTS:
        for caller in ("root", "user"):
            scene = Scene(f"tmpfile-{parent}-{caller}", caller)
            _place_parent(scene, b"p", parent)
            scene.do("umask", 0o027).do("tmpfile", 0, b"p", os.O_RDWR, 0o666).do("umask", 0o022)
            scene.do("fstat", 0).do("write", 0, (b"data", 3)).do("pread", 0, 100, 0)
            scene.do("fchmod", 0, 0o640).do("fsetxattr", 0, b"user.k", (b"v", 1), 0)
            scene.do("link_fd", 0, b"p/named", by="root").do("lstat", b"p/named").do("fstat", 0)
            scene.do("tmpfile", 1, b"p", os.O_WRONLY | os.O_EXCL, 0o600).do("write", 1, (b"w", 1))
            scene.do("link_fd", 1, b"p/refused", by="root").do("tmpfile", 2, b"p/named", 2, 0o600)
            yield scene.case()
    scene = Scene("copy-range").low(b"a", content=b"0123456789" * 1000).low(b"b", content=b"target")
    scene.do("open", 0, b"a", os.O_RDONLY, 0).do("open", 1, b"b", os.O_RDWR, 0)
    scene.do("copy_range", 0, 1, 5000, 100, 3).do("fstat", 1).do("pread", 1, 10_000, 0)
    scene.do("copy_range", 0, 1, 5000, 9990, 0).do("copy_range", 0, 1, 10, 20_000, 0)
    scene.do("copy_range", 1, 0, 10, 0, 0).do("open", 2, b"a", os.O_RDWR, 0)
    scene.do("copy_range", 2, 2, 100, 0, 50).do("copy_range", 2, 2, 100, 0, 5000).do("cat", b"a")
    yield scene.case()


def _fallocations() -> Iterator[Case]:
    ways = {"plain": 0, "keep": 1, "punch": 3, "zero": 0x10, "zero-keep": 0x11}
    ways |= {"punch-alone": 2}
    for where in ("low", "up"):
        for label, mode in ways.items():
            scene = Scene(f"allocate-{where}-{label}", "user")
            place = scene.low if where == "low" else scene.up
            place(b"x", mode=0o4766, uid=1000, content=b"0123456789" * 3000)
            scene.do("open", 0, b"x", os.O_RDWR, 0)
            for offset, length in ((4096, 8192), (5, 10), (20_000, 100_000), (0, 0), (-1, 5)):
                scene.do("fallocate", 0, mode, offset, length).do("fstat", 0)
            scene.do("pread", 0, 200_000, 0).do("lstat", b"x")
            scene.do("open", 1, b"x", os.O_RDONLY, 0).do("fallocate", 1, mode, 0, 4096)
            yield scene.case()


def _inode_flags() -> Iterator[Case]:
    """What chattr(1) does, and what follows from it."""
    yield from _flagged(0x80, 0x08 | 0x40, 0x10, 0)


def _append_flag() -> Iterator[Case]:
    """The same with files that can be appended to only."""
    yield from _flagged(0x20, 0)


def _flagged(*flags: int) -> Iterator[Case]:
    for kind in ("file", "dir"):
        for where in ("low", "up"):
            for caller in ("root", "user", "other"):
                scene = Scene(f"flags-{flags[0]}-{kind}-{where}-{caller}", caller)
                place = scene.low if where == "low" else scene.up
                place(b"x", kind, uid=1000, gid=1000)
                scene.do("open", 0, b"x", os.O_RDONLY, 0).do("getflags", 0)
                for bits in flags:
                    scene.do("setflags", 0, bits).do("getflags", 0).do("lstat", b"x")
                    if kind == "file":
                        scene.do("open_close", b"x", os.O_WRONLY)
                        scene.do("overwrite", b"x", os.O_WRONLY, (b"w", 1))
                    scene.do("chmod", b"x", 0o600 | bits & 0o77)
                scene.do("setflags", 0, 0, by="root").do("getflags", 0)
                yield scene.case()


def _known_calls() -> Iterator[Case]:
    """Calls that only the kernel answers: the table of known differences has exactly these."""
    scene = Scene("known").low(b"x", "sparse", content=(1 << 20, [(0, b"x")])).low(b"d", "dir")
    scene.do("open", 0, b"x", os.O_RDONLY, 0)
    scene.do("lseek", 0, 0, 4).do("lseek", 0, 8192, 3).do("getflags", 0)
    scene.do("open", 1, b"d", os.O_RDONLY, 0).do("lseek", 1, 0, 2)
    yield scene.case()


_FAMILIES: Final = (
    _removals,
    _creations,
    _renames,
    _rename_special,
    _layers_in_the_middle,
    _trees,
    _hard_links,
    _special_bits,
    _inheritance,
    _copy_up_triggers,
    _names,
    _open_files,
    _attributes,
    _strays,
    _foreign_marks,
    _denied,
    _sparse,
    _opens_for_writing,
    _protected,
    _append_only,
    _known_calls,
)


def families(transport: str | None = None) -> dict[str, tuple[Case, ...]]:
    """All cases by family; where *transport* is given, those it has handlers for."""
    found = (
        _FAMILIES
        if transport == "pyfuse3"
        else (*_FAMILIES, _data_calls, _inode_flags, _append_flag)
    )
    return {family.__name__.strip("_"): tuple(family()) for family in found}


def history(name: str, cases: Sequence[Case], dialect: Dialect = pieces.TRUSTED) -> History:
    """One history that plays *cases* one after the other, each below its own directory.

    In the middle of it the sides swap uppers, so that half of the cases run on what the other side
    has written.
    """
    depth = max(len(case.lowers) for case in cases)
    layers: list[list[Object]] = [[Object(b"", "dir", _MODE)] for _n in range(depth)]
    upper: list[Object] = [Object(b"", "dir", _MODE)]
    for case in cases:
        for index, objects in enumerate(case.lowers):
            home = Object(case.name.encode(), "dir", _MODE)
            layers[index] += [home, *objects]
        if case.upper:
            upper += [Object(case.name.encode(), "dir", _MODE), *case.upper]
    half = len(cases) // 2
    phases = tuple(
        tuple(op for case in part for op in (*case.ops, *_closing()))
        for part in (cases[:half], cases[half:])
        if part
    )
    return History(name, tuple(tuple(layer) for layer in layers), tuple(upper), phases)


def _closing() -> tuple[Op, ...]:
    return tuple(Op("root", "close", (slot,)) for slot in range(3))

"""Random histories from a seed: operations that mostly meet something.

The source starts from the names the layers hold and learns from the answers of the reference what
exists now, so that most calls succeed or fail for a reason worth comparing.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Sequence
from typing import Final

from tests.differential import pieces
from tests.differential.layers import LayerMaker
from tests.differential.looks import Look
from tests.differential.pieces import Dialect
from tests.differential.script import Arg, Data, History, Layer, Op
from tests.differential.worker import Answer

_BATCH: Final = 12
_SLOTS: Final = 6
_RENAME_FLAGS: Final = (0, 0, 0, 0, 0, 1, 2, 2, 4, 3)
_ACCESS: Final = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
_KINDS: Final = {
    "dir": stat.S_IFDIR,
    "file": stat.S_IFREG,
    "sparse": stat.S_IFREG,
    "link": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "sock": stat.S_IFSOCK,
    "chr": stat.S_IFCHR,
    "blk": stat.S_IFBLK,
}


def history(seed: int, op_count: int, dialect: Dialect) -> tuple[History, RandomSource]:
    """Layers of history *seed* and the source of its operations (none are made yet)."""
    rng = random.Random(seed)
    maker = LayerMaker(rng, dialect)
    layers = maker.stack(rng.choice((1, 2, 3, 3, 4)))
    upper = maker.upper()
    tail = op_count // 4 if rng.random() < 0.5 else 0
    counts = [op_count - tail, *([tail] if tail else [])]
    plan = History(f"seed {seed}", layers, upper, tuple(() for _count in counts), dialect.options)
    return plan, RandomSource(rng, plan, counts, maker.names, dialect)


class RandomSource:
    """Makes up operations; see machine.Source."""

    def __init__(
        self,
        rng: random.Random,
        plan: History,
        counts: Sequence[int],
        names: Sequence[bytes],
        dialect: Dialect,
    ) -> None:
        self.rng = rng
        self.left = list(counts)
        self.names = names
        self.dialect = dialect
        self.kinds: dict[bytes, int] = {b"": stat.S_IFDIR}
        self.keys: dict[bytes, set[bytes]] = {}
        self.gone: list[bytes] = []
        self.next: list[Op] = []
        for layer in (*reversed(plan.layers), plan.upper):
            self._learn_layer(layer)
        # Slot and how it was opened.
        self.open: dict[int, int] = {}
        self.slot_dirs: dict[int, bytes] = {}
        self.slot_kinds: dict[int, int] = {}
        self.slot_modes: dict[int, int] = {}
        self.cwd: bytes | None = None
        # Some histories never list a directory: then `impure` has to be equal to the last mark.
        self.lists = rng.random() < 0.7
        self._makers, self._weights = self._table()

    # --- machine.Source -------------------------------------------------------------------------

    def batch(self, phase: int) -> Sequence[Op]:
        count = min(_BATCH, self.left[phase])
        self.left[phase] -= count
        if not count:
            self.next.clear()
            # The machine closes everything between two phases.
            self.open.clear()
            self.slot_dirs.clear()
            self.cwd = None
        return [self.next.pop() if self.next else self._op() for _n in range(count)]

    def learn(self, ops: Sequence[Op], reference: Sequence[Answer]) -> None:
        for op, (number, _value, touched) in zip(ops, reference, strict=True):
            if not number:
                self._learn_success(op)
            for path, found in touched:
                if path[:1] == b"@" and path[1:].isdigit() and not isinstance(found, int):
                    self._learn_slot(op, int(path[1:]), found)
                if path[:1] in {b"@", b"."}:
                    continue
                self._set(path, 0 if isinstance(found, int) else found.kind)
        del self.gone[:-30]

    def _learn_layer(self, layer: Layer) -> None:
        for item in layer:
            opaque = any(value == b"y" for key, value in item.xattrs if key.endswith(b".opaque"))
            if opaque or item.kind == "whiteout":
                self._set(item.path, 0)
            if item.kind != "whiteout":
                self._set(item.path, _KINDS[item.kind])
            if item.xattrs:
                self.keys.setdefault(item.path, set()).update(key for key, _value in item.xattrs)

    def _set(self, path: bytes, kind: int) -> None:
        """Note what *path* is now, 0 for nothing."""
        before = self.kinds.pop(path, 0)
        if before == stat.S_IFDIR != kind:
            prefix = path + b"/"
            for below in [below for below in self.kinds if below.startswith(prefix)]:
                self.gone.append(below)
                del self.kinds[below]
        if kind:
            self.kinds[path] = kind
        elif before:
            self.gone.append(path)

    def _learn_success(self, op: Op) -> None:
        args = op.args
        if op.name in {"open", "tmpfile"}:
            assert isinstance(args[0], int)
            assert isinstance(args[2], int)
            self.open[args[0]] = args[2]
            self.slot_dirs.pop(args[0], None)
        elif op.name == "close":
            assert isinstance(args[0], int)
            self.open.pop(args[0], None)
            self.slot_dirs.pop(args[0], None)
        elif op.name == "chdir":
            self.cwd = args[0] if isinstance(args[0], bytes) else None
        elif op.name == "setxattr":
            assert isinstance(args[0], bytes)
            assert isinstance(args[1], bytes)
            self.keys.setdefault(args[0], set()).add(args[1])
        elif op.name == "rename" and args[2] in {0, 1}:
            self._move(args[0], args[1])

    def _learn_slot(self, op: Op, slot: int, found: Look) -> None:
        self.slot_kinds[slot] = found.kind
        self.slot_modes[slot] = found.mode
        if op.name == "open" and op.args[0] == slot and found.kind == stat.S_IFDIR:
            path = op.args[1]
            if isinstance(path, bytes) and path[:1] not in {b"@", b"."}:
                self.slot_dirs[slot] = path

    def _move(self, old: Arg, new: Arg) -> None:
        if not isinstance(old, bytes) or not isinstance(new, bytes):
            return
        prefix = old + b"/"
        for path in [path for path in self.kinds if path.startswith(prefix)]:
            self.kinds[new + path[len(old) :]] = self.kinds.pop(path)

    # --- choosing -------------------------------------------------------------------------------

    def _op(self) -> Op:
        weights = (60, 25, 15)[: len(self.dialect.callers)]
        caller = self.rng.choices(self.dialect.callers, weights)[0]
        maker = self.rng.choices(self._makers, self._weights)[0]
        name, *args = maker()
        return Op(caller, str(name), tuple(args))

    def _table(self) -> tuple[list[Callable[[], tuple[Arg, ...]]], list[int]]:
        rows: list[tuple[int, Callable[[], tuple[Arg, ...]]]] = [
            (9, self._open),
            (9, self._create),
            (3, self._open_dir),
            (3, lambda: ("close", self._slot())),
            (4, self._read),
            (7, self._write),
            (3, self._slot_change),
            (2, self._slot_xattr),
            (2, self._sync),
            (2, self._mapped),
            (1, self._copy),
            (1, self._lock),
            (8, lambda: ("mkdir", self._new(), self._mode_dir())),
            (2, self._mknod),
            (3, lambda: ("symlink", self._target(), self._new())),
            (11, lambda: ("unlink", self._file())),
            (7, lambda: ("rmdir", self._empty_dir())),
            (1, lambda: ("rmtree", self._dir(shallow=False))),
            (14, self._rename),
            (4, lambda: ("truncate", self._file(), self._size())),
            (7, lambda: ("chmod", self._any(), self._mode())),
            (5, self._chown),
            (7, self._utimens),
            (7, self._setxattr),
            (3, lambda: ("getxattr", *self._keyed(), self._bit())),
            (3, lambda: ("listxattr", self._any(), self._bit())),
            (4, lambda: ("removexattr", *self._keyed(), self._bit())),
            (2, lambda: ("readlink", self._link())),
            (2, lambda: ("stat", self._any())),
            (3, lambda: ("lstat", self._any())),
            (3, lambda: ("access", self._any(), self.rng.randrange(8), self._bit())),
            (1, lambda: ("statfs", self._any())),
            (4, lambda: ("cat", self._file())),
            (1, lambda: ("umask", self._pick((0o022, 0o077, 0o000, 0o027, 0o777)))),
            (1, lambda: ("chdir", self._dir())),
        ]
        if self.dialect.links:
            rows += [
                (5, lambda: ("link", self._file(), self._new(), self._pick((0, 0, 0x400)))),
                (1, lambda: ("link_fd", self._slot(), self._new())),
            ]
        if self.lists:
            rows += [
                (8, lambda: ("readdir", self._dir())),
                (1, lambda: ("readdir_seek", self._dir())),
                (1, lambda: ("readdir_unlink", self._dir(shallow=False))),
                (1, lambda: ("freaddir", self._dir_slot())),
            ]
        if self.dialect.all_calls:
            rows += [
                (3, self._fallocate),
                (1, lambda: ("lseek", self._slot(), self._offset(), self._pick((3, 4)))),
                (1, self._tmpfile),
                (2, self._flags),
            ]
        return [maker for _weight, maker in rows], [weight for weight, _maker in rows]

    def _pick(self, options: Sequence[int]) -> int:
        return self.rng.choice(options)

    def _bit(self) -> int:
        return self.rng.randrange(2)

    def _existing(self, *kinds: int) -> bytes | None:
        found = [path for path, kind in self.kinds.items() if path and kind in kinds]
        return self.rng.choice(found) if found else None

    def _disguised(self, path: bytes) -> bytes:
        """The same path by descriptor or working directory now and then."""
        head, slash, name = path.rpartition(b"/")
        if not slash or self.rng.random() > 0.15:
            return path
        if self.cwd == head:
            return b"./" + name
        for slot, where in self.slot_dirs.items():
            if where == head:
                return b"@%d/%b" % (slot, name)
        return path

    def _any(self) -> bytes:
        if self.rng.random() < 0.02:
            return b""
        if self.rng.random() < 0.1:
            return self._absent()
        return self._disguised(self.rng.choice(list(self.kinds)))

    def _file(self) -> bytes:
        roll = self.rng.random()
        path = None
        if roll < 0.72:
            path = self._existing(stat.S_IFREG)
        elif roll < 0.86:
            others = (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK)
            path = self._existing(*others)
        return self._disguised(path) if path else self._any()

    def _dir(self, *, shallow: bool = True) -> bytes:
        if shallow and self.rng.random() < 0.06:
            return b""
        path = self._existing(stat.S_IFDIR)
        if path is None or self.rng.random() < 0.05:
            return self._absent()
        return self._disguised(path)

    def _absent(self) -> bytes:
        """A name that was deleted before, or any name."""
        if self.gone and self.rng.random() < 0.6:
            return self.rng.choice(self.gone)
        parent = self._existing(stat.S_IFDIR)
        name = self.rng.choice(self.names)
        if self.rng.random() < 0.02:
            name = b"N" * 256
        return name if parent is None or self.rng.random() < 0.25 else parent + b"/" + name

    def _new(self) -> bytes:
        if self.rng.random() < 0.12:
            return self._any() or b"a"
        for _attempt in range(4):
            path = self._absent()
            if path not in self.kinds:
                return self._disguised(path)
        return path

    def _slot(self, *wanted: int) -> int:
        """A slot in use, mostly one that was opened in one of the access modes *wanted*.

        Never one in another mode: where there is none that fits it is a slot that is not open.
        """
        fit = [
            slot
            for slot, flags in self.open.items()
            if not wanted or (flags & os.O_ACCMODE in wanted and not flags & os.O_PATH)
        ]
        files = [slot for slot in fit if slot not in self.slot_dirs]
        if fit and self.rng.random() < 0.95:
            if not wanted:
                return self.rng.choice(fit)
            if files:
                return self.rng.choice(files)
        unused = [slot for slot in range(_SLOTS) if slot not in self.open]
        return self.rng.choice(unused or [_SLOTS])

    def _dir_slot(self) -> int:
        return self.rng.choice(list(self.slot_dirs)) if self.slot_dirs else self._slot()

    def _empty_dir(self) -> bytes:
        """A directory in which nothing is known, if there is one."""
        full = {path.rpartition(b"/")[0] for path in self.kinds}
        kinds = self.kinds.items()
        found = [path for path, kind in kinds if kind == stat.S_IFDIR and path not in full]
        if found and self.rng.random() < 0.6:
            return self._disguised(self.rng.choice(found))
        return self._dir()

    def _link(self) -> bytes:
        path = self._existing(stat.S_IFLNK)
        return self._disguised(path) if path and self.rng.random() < 0.8 else self._any()

    def _keyed(self) -> tuple[bytes, bytes]:
        """A path and an attribute it probably has."""
        found = [path for path in self.keys if path in self.kinds]
        if not found or self.rng.random() < 0.3:
            return self._any(), self._key()
        path = self.rng.choice(found)
        return self._disguised(path), self.rng.choice(sorted(self.keys[path]))

    def _size(self) -> int:
        return self._pick((0, 0, 1, 10, 4095, 4096, 5000, 100_000, 1_500_000))

    def _offset(self) -> int:
        return self._pick((0, 0, 0, 5, 100, 4090, 70_000, 131_072))

    def _data(self) -> Data:
        return (b"%d," % self.rng.randrange(1000), self._pick((0, 1, 1, 5, 100, 1500, 40_000)))

    def _mode(self) -> int:
        return self._pick((0o644, 0o600, 0o777, 0o4755, 0o2755, 0o6711, 0o1777, 0o000, 0o2664))

    def _mode_dir(self) -> int:
        return self._pick((0o755, 0o777, 0o700, 0o2777, 0o1777, 0o000))

    def _target(self) -> bytes:
        return self.rng.choice((b"a", b"../b", b"/proc/absent/x", b"x" * 255 + b"/y", b"c/d"))

    def _time(self) -> int | str:
        if self.rng.random() < 0.25:
            return self.rng.choice(("now", "omit"))
        return self._exact()

    def _exact(self) -> int:
        second = self._pick((0, 1, 999_999_999, 1_300_000_000, 1_699_999_998, 4_000_000_000))
        return second * 10**9 + self.rng.randrange(10**9)

    # --- calls ----------------------------------------------------------------------------------

    def _open(self) -> tuple[Arg, ...]:
        flags = self._pick(_ACCESS)
        for flag, chance in (
            (os.O_TRUNC, 0.12),
            (os.O_APPEND, 0.2),
            (os.O_NOFOLLOW, 0.1),
            (os.O_PATH, 0.04),
            (os.O_SYNC, 0.03),
            (os.O_CREAT, 0.1),
            (os.O_NOATIME, 0.03),
        ):
            if self.rng.random() < chance:
                flags |= flag
        return "open", self.rng.randrange(_SLOTS), self._file(), flags, 0o644

    def _create(self) -> tuple[Arg, ...]:
        flags = os.O_CREAT | self._pick((*_ACCESS, os.O_RDWR))
        flags |= self._pick((0, os.O_EXCL, os.O_TRUNC, os.O_EXCL, os.O_APPEND))
        return "open", self.rng.randrange(_SLOTS), self._new(), flags, self._mode()

    def _open_dir(self) -> tuple[Arg, ...]:
        flags = self._pick((os.O_RDONLY, os.O_PATH, os.O_DIRECTORY, os.O_DIRECTORY))
        return "open", self.rng.randrange(_SLOTS), self._dir(), flags, 0

    def _read(self) -> tuple[Arg, ...]:
        slot = self._slot(os.O_RDONLY, os.O_RDWR)
        count = self._pick((1, 10, 4096, 200_000))
        if self._bit():
            return "read", slot, count
        return "pread", slot, count, self._offset()

    def _write(self) -> tuple[Arg, ...]:
        slot = self._slot(os.O_WRONLY, os.O_RDWR) if self.rng.random() < 0.9 else self._slot()
        roll = self.rng.random()
        if roll < 0.45:
            return "write", slot, self._data()
        if roll < 0.8:
            return "pwrite", slot, self._data(), self._offset()
        return "ftruncate", slot, self._size()

    def _settable(self) -> int:
        """A slot of a file or directory.

        Not of a fifo or device: when that has been unlinked, the kernel copies it up to the name
        it had, over the whiteout.
        """
        fit = [
            slot for slot in self.open if self.slot_kinds.get(slot) in {stat.S_IFREG, stat.S_IFDIR}
        ]
        return self.rng.choice(fit) if fit and self.rng.random() < 0.97 else _SLOTS

    def _slot_change(self) -> tuple[Arg, ...]:
        slot = self._settable()
        kind = self.rng.randrange(5)
        if kind == 0:
            return "fchmod", slot, self._mode()
        if kind == 1:
            return "fchown", slot, *self._ids()
        if kind == 2:
            return "futimens", slot, self._time(), self._time()
        if kind == 3:
            if slot in self.slot_dirs:
                return "lseek", slot, 0, os.SEEK_SET  # other positions: known.KNOWN
            return "lseek", slot, self._offset(), self._pick((0, 1, 2))
        return "fstat", slot

    def _slot_xattr(self) -> tuple[Arg, ...]:
        slot, key = self._settable(), self._key()
        kind = self.rng.randrange(4)
        if kind == 0:
            return "fsetxattr", slot, key, self._value(key), self._pick((0, 0, 1, 2))
        if kind == 1:
            return "fgetxattr", slot, key
        if kind == 2:
            return "fremovexattr", slot, key
        return "flistxattr", slot

    def _sync(self) -> tuple[Arg, ...]:
        return self.rng.choice(("fsync", "fdatasync")), self._slot()

    def _mapped(self) -> tuple[Arg, ...]:
        if self._bit():
            # Not through O_RDONLY: the kernel maps the lower file of a descriptor that is older
            # than the copy-up, whatever size the file has now (SIGBUS, or old data).
            return "mmap_read", self._slot(os.O_RDWR)
        slot = self._slot(os.O_RDWR)
        if not self.dialect.devices and self.slot_modes.get(slot, 0) & 0o6000:
            return "fsync", slot  # known difference "mmap-write-clears"
        return "mmap_write", slot, self._data(), self._offset()

    def _copy(self) -> tuple[Arg, ...]:
        count = self._pick((10, 5000, 200_000))
        source, target = self._slot(os.O_RDWR), self._slot(os.O_WRONLY, os.O_RDWR)
        if not self.dialect.all_calls:
            # The FUSE client copies by reading (known difference): set the access time it leaves.
            self.next = [Op("root", "futimens", (source, self._exact(), "omit"))]
        return "copy_range", source, target, count, self._offset(), self._offset()

    def _fallocate(self) -> tuple[Arg, ...]:
        slot = self._slot(os.O_WRONLY, os.O_RDWR) if self.rng.random() < 0.9 else self._slot()
        # Not FALLOC_FL_COLLAPSE_RANGE and INSERT_RANGE: known difference "fallocate-ranges".
        mode = self._pick((0, 0, 1, 3, 3, 0x10, 0x11))
        length = self._pick((1, 4096, 8192, 100_000))
        return "fallocate", slot, mode, self._pick((0, 0, 5, 4096, 8192, 131_072)), length

    def _tmpfile(self) -> tuple[Arg, ...]:
        flags = self._pick((os.O_RDWR, os.O_RDWR, os.O_WRONLY)) | self._pick((0, 0, os.O_EXCL))
        return "tmpfile", self.rng.randrange(_SLOTS), self._dir(), flags, self._mode()

    def _flags(self) -> tuple[Arg, ...]:
        slot = self._settable()
        if self._bit():
            return "getflags", slot
        # S, d, A and none. Never i or a: see protected-open in docs/semantics.md.
        return "setflags", slot, self._pick((0x08, 0x40, 0x80, 0))

    def _lock(self) -> tuple[Arg, ...]:
        if self._bit():
            return "flock", self._slot(), self._pick((1, 2, 8))
        return "ofd_lock", self._slot(), self._pick((0, 1, 2)), self._offset(), self._offset()

    def _mknod(self) -> tuple[Arg, ...]:
        path, mode = self._new(), self._pick((0o644, 0o600, 0o2755))
        kinds = [(stat.S_IFIFO, 0, 0), (stat.S_IFSOCK, 0, 0), (stat.S_IFREG, 0, 0)]
        kinds += [(stat.S_IFCHR, 0, 0), (stat.S_IFCHR, 1, 3), (stat.S_IFBLK, 240, 3)]
        kind, major, minor = self.rng.choice(kinds)
        return "mknod", path, kind | mode, major, minor

    def _rename(self) -> tuple[Arg, ...]:
        flags = self._pick(_RENAME_FLAGS)
        source = self._file() if self.rng.random() < 0.55 else self._dir()
        meets = flags & 2 or self.rng.random() < 0.35
        target = self._any() if meets else self._new()
        return "rename", source or b"a", target or b"b", flags

    def _ids(self) -> tuple[int, int]:
        # Never both -1: see chown-nothing in docs/semantics.md.
        uid = self._pick((-1, -1, 0, 1000, 1001))
        return uid, self._pick((0, 1000, 2000, 2001) if uid == -1 else (-1, 0, 1000, 2000, 2001))

    def _chown(self) -> tuple[Arg, ...]:
        return self.rng.choice(("chown", "lchown")), self._any(), *self._ids()

    def _utimens(self) -> tuple[Arg, ...]:
        return "utimens", self._any(), self._time(), self._time(), self._bit()

    def _setxattr(self) -> tuple[Arg, ...]:
        key = self._key()
        flags = self._pick((0, 0, 0, 1, 2))
        return "setxattr", self._any(), key, self._value(key), flags, self._bit()

    def _key(self) -> bytes:
        common = (b"user.a", b"user.note", b"user.\xff", pieces.ACL_ACCESS, pieces.ACL_DEFAULT)
        if self.rng.random() < 0.7:
            return self.rng.choice(common)
        return self.rng.choice(
            (
                pieces.CAPABILITY,
                b"trusted.t",
                b"trusted.seal",
                b"security.odd",
                b"trusted.overlay.opaque",
                b"trusted.overlay.origin",
                b"trusted.overlay.overlay.x",
                b"trusted.overlay.",
                b"trusted.overlay",
                b"trusted.overlayx",
                b"user.overlay.opaque",
                b"user.overlay.overlay.opaque",
                b"user.",
                b"bogus.name",
                b"user." + b"k" * 250,
                b"user." + b"k" * 251,
            )
        )

    def _value(self, key: bytes) -> Data:
        if key in {pieces.ACL_ACCESS, pieces.ACL_DEFAULT}:
            return self._acl(), 1
        if key == pieces.CAPABILITY:
            return pieces.capability(1 << self.rng.randrange(12)), 1
        return b"v", self._pick((0, 1, 20, 300))

    def _acl(self) -> bytes:
        perm = [self.rng.randrange(8) for _n in range(5)]
        kind = self.rng.randrange(6)
        if kind == 0:
            return pieces.acl(*perm[:3])
        if kind == 1:
            return b""
        if kind == 2:
            return b"\2\0\0\0junk"
        named = ((1000, perm[3]), (1001, perm[4]))
        if kind == 3:
            return pieces.acl(*perm[:3], groups=((2000, perm[3]),), mask=perm[4])
        return pieces.acl(*perm[:3], users=named)

"""Random layers: few names, so that the layers collide, and every kind of object."""

from __future__ import annotations

import random
from typing import Final

from tests.differential import pieces
from tests.differential.pieces import Dialect
from tests.differential.script import Layer, Object

NAMES: Final = (b"a", b"b", b"c", b"d", b"e")
_MODES_DIR: Final = (0o755, 0o777, 0o777, 0o2777, 0o1777, 0o700, 0o770, 0o2755, 0o555)
_MODES_FILE: Final = (0o644, 0o666, 0o600, 0o664, 0o4755, 0o2755, 0o6777, 0o000, 0o444)
_OWNERS: Final = (0, 0, 1000, 1000, 1001)
_GROUPS: Final = (0, 1000, 2000, 2001)
_X_MARK: Final = b"x"
_BASE: Final = 1_000_000_000_000_000_000


class LayerMaker:
    """Random layers of one history; the same generator state gives the same layers."""

    def __init__(self, rng: random.Random, dialect: Dialect) -> None:
        self.rng = rng
        self.dialect = dialect
        odd = rng.sample(pieces.ODD_NAMES, 2)
        self.names = (*NAMES, *odd)

    def stack(self, depth: int) -> tuple[Layer, ...]:
        """*depth* layers, topmost first."""
        return tuple(self.layer() for _n in range(depth))

    def layer(self) -> Layer:
        """One layer whose root everybody may write to."""
        root = Object(b"", "dir", self.rng.choice((0o777, 0o777, 0o1777)))
        found = [self._timed(root)]
        self._fill(b"", 0, found)
        return tuple(found)

    def upper(self) -> Layer:
        """What an upper holds before its first mount: often nothing but a root."""
        if self.rng.random() < 0.6:
            return (Object(b"", "dir", 0o777),)
        return self.layer()

    def _timed(self, item: Object) -> Object:
        ns = _BASE + self.rng.randrange(10**17)
        return item._replace(mtime=ns, atime=ns - self.rng.randrange(10**15))

    def _fill(self, parent: bytes, depth: int, found: list[Object]) -> None:
        chance = (0.7, 0.5, 0.4, 0.3)[depth]
        for name in self.names:
            if self.rng.random() > chance:
                continue
            path = parent + b"/" + name if parent else name
            item = self._object(path, found, may_nest=depth < 3)
            if item is None:
                continue
            found.append(self._timed(item))
            if item.kind == "dir":
                self._fill(path, depth + 1, found)

    def _object(self, path: bytes, found: list[Object], *, may_nest: bool) -> Object | None:
        if may_nest and self.rng.random() < 0.45:
            return self._directory(path)
        kind = self.rng.choices(
            ("file", "symlink", "whiteout", "xwhiteout", "sparse", "link", "fifo", "sock", "node"),
            (50, 8, 12, 3, 3, 8, 2, 2, 3),
        )[0]
        maker = getattr(self, "_" + kind)
        item: Object | None = maker(path, found)
        return item

    def _owned(self, path: bytes, kind: str, modes: tuple[int, ...], content: object) -> Object:
        choice = self.rng.choice
        return Object(path, kind, choice(modes), choice(_OWNERS), choice(_GROUPS), content)

    def _directory(self, path: bytes) -> Object:
        item = self._owned(path, "dir", _MODES_DIR, None)
        xattrs = list(self._plain_xattrs())
        roll = self.rng.random()
        if roll < 0.08:
            xattrs.append((self.dialect.prefix + b"opaque", b"y"))
        elif roll < 0.12 and self.dialect.marked_directories:
            xattrs.append((self.dialect.prefix + b"opaque", b"x"))
        elif roll < 0.14:
            xattrs.append((self.dialect.prefix + b"overlay.opaque", b"y"))
        if self.rng.random() < 0.08:
            xattrs.append((pieces.ACL_DEFAULT, pieces.acl(7, 5, 0, users=((1000, 7),))))
        return item._replace(xattrs=tuple(xattrs))

    def _plain_xattrs(self) -> tuple[tuple[bytes, bytes], ...]:
        found = []
        if self.rng.random() < 0.15:
            found.append((b"user.note", b"v%d" % self.rng.randrange(9)))
        if self.dialect.trusted and self.rng.random() < 0.1:
            found.append((b"trusted.seal", b"\0\1"))
        return tuple(found)

    def _file(self, path: bytes, _found: list[Object]) -> Object:
        size = self.rng.choice((0, 1, 10, 100, 5000, 70000))
        data = (b"%d:" % self.rng.randrange(10**6)) * size
        item = self._owned(path, "file", _MODES_FILE, data[:size])
        xattrs = list(self._plain_xattrs())
        if self.rng.random() < 0.06:
            xattrs.append((pieces.CAPABILITY, pieces.capability(1 << 10)))
        if self.rng.random() < 0.08:
            rights = self.rng.choice(((1000, 6), (1001, 4), (1000, 0)))
            xattrs.append((pieces.ACL_ACCESS, pieces.acl(6, 4, 4, users=(rights,))))
        return item._replace(xattrs=tuple(xattrs))

    def _symlink(self, path: bytes, _found: list[Object]) -> Object:
        target = self.rng.choice((*self.names, b"../a", b"/proc/absent", b"a/b", b"t" * 300))
        return self._owned(path, "symlink", (0o777,), target)

    def _whiteout(self, path: bytes, _found: list[Object]) -> Object:
        return Object(path, "whiteout", self.rng.choice((0, 0, 0o644)))

    def _xwhiteout(self, path: bytes, found: list[Object]) -> Object | None:
        # Only where image tools put them: see unmarked-whiteout-listing in docs/semantics.md.
        parent = path.rpartition(b"/")[0]
        holder = next(item for item in found if item.path == parent)
        if self.dialect.marked_directories and (_X_MARK not in {v for _, v in holder.xattrs}):
            return None
        mark = (self.dialect.prefix + b"whiteout", b"")
        return Object(path, "file", 0o600, content=b"", xattrs=(mark,))

    def _sparse(self, path: bytes, _found: list[Object]) -> Object:
        size = self.rng.choice((1 << 20, 3 << 20))
        pieces_ = [(self.rng.randrange(size - 10), b"island")]
        return self._owned(path, "sparse", _MODES_FILE, (size, pieces_))

    def _link(self, path: bytes, found: list[Object]) -> Object | None:
        firsts = [o.path for o in found if o.kind in {"file", "symlink", "fifo"}]
        return Object(path, "link", content=self.rng.choice(firsts)) if firsts else None

    def _fifo(self, path: bytes, _found: list[Object]) -> Object:
        return self._owned(path, "fifo", (0o666, 0o600), None)

    def _sock(self, path: bytes, _found: list[Object]) -> Object:
        return self._owned(path, "sock", (0o666, 0o600), None)

    def _node(self, path: bytes, found: list[Object]) -> Object:
        if not self.dialect.devices:
            return self._fifo(path, found)
        kind, number = self.rng.choice((("chr", (1, 3)), ("chr", (1, 5)), ("blk", (240, 7))))
        return self._owned(path, kind, (0o666, 0o600), number)

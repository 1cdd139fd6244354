"""Rules of comparison (section 17 of the format): answers, merged views, upper directories."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from tests.differential import known
from tests.differential.leftovers import Stored, Upper, links_outside
from tests.differential.looks import Listed, Look, Seen, View
from tests.differential.script import Op, shorten, show
from tests.differential.worker import Answer

_PRIVATE: Final = (b"trusted.overlay.", b"user.overlay.")


class Difference(NamedTuple):
    """Something that is not equal. *kind*: call, view, upper, swap, work, lower, mount, hang,
    log; *where*: the operation or path; *reference* and *other*: what each side has."""

    kind: str
    where: str
    reference: object
    other: object
    op_index: int = -1

    def __str__(self) -> str:
        return (
            f"[{self.kind}] {shorten(self.where)}\n"
            f"    reference: {_text(self.reference)}\n"
            f"    other:     {_text(self.other)}"
        )


def _text(value: object) -> str:
    text = shorten(repr(value))
    return text if len(text) <= 1500 else text[:1500] + " ..."


def answers(
    ops: Sequence[Op],
    one: Sequence[Answer],
    two: Sequence[Answer],
    excused: Counter[str],
    transport: str | None,
) -> tuple[int, Difference] | None:
    """First difference between the answers to a batch, with its index in the batch.

    *transport* serves the other side.
    """
    for index, (op, left, raw) in enumerate(zip(ops, one, two, strict=True)):
        if left == raw:
            continue
        right = known.without_cached_reads(left, raw)
        if left == right:
            excused[known.READ_ATIME] += 1
            continue
        row = known.excuse(op, left, right, transport)
        if row is not None:
            excused[row.ident] += 1
            continue
        shown = _narrow(left, right)
        return index, Difference("call", show(op), *shown)
    return None


def _narrow(left: Answer, right: Answer) -> tuple[object, object]:
    """The part of two answers that differs."""
    if left[:2] != right[:2]:
        return left[:2], right[:2]
    first, second = dict(left[2]), dict(right[2])
    keys = [key for key in first if first[key] != second.get(key)]
    return (
        {key: fields(first[key], second[key]) for key in keys},
        {key: fields(second[key], first[key]) for key in keys},
    )


def fields(mine: Look | int, its: Look | int) -> object:
    """Fields of *mine* that differ from *its*."""
    if isinstance(mine, int) or isinstance(its, int):
        return mine
    pairs = zip(mine._fields, mine, its, strict=True)
    return {name: value for name, value, other in pairs if value != other}


K = TypeVar("K")
V = TypeVar("V")


def _tables(
    kind: str,
    one: Mapping[bytes, V],
    two: Mapping[bytes, V],
    narrow: Callable[[V, V], Any],
) -> list[Difference]:
    found = []
    for path in sorted(one.keys() | two.keys()):
        left, right = one.get(path), two.get(path)
        if left == right:
            continue
        if left is None or right is None:
            found.append(Difference(kind, repr(path), left or "absent", right or "absent"))
        else:
            found.append(Difference(kind, repr(path), narrow(left, right), narrow(right, left)))
    return found


def _part(mine: Any, its: Any) -> object:
    """Fields of a named tuple that differ; nested for the stat part."""
    if not hasattr(mine, "_fields") or type(mine) is not type(its):
        return mine
    return {
        name: _part(value, other) if name == "look" else value
        for name, value, other in zip(mine._fields, mine, its, strict=True)
        if value != other
    }


def views(kind: str, one: View, two: View) -> list[Difference]:
    """Differences between two merged views."""
    return _tables(kind, one, _with_known(one, two), _part)


def _with_known(one: View, two: View) -> View:
    """*two*, with the parts of *one* that differ only as the table of known differences has it."""
    found = dict(two)
    for path, seen in two.items():
        mine = one.get(path)
        if mine is None or mine == seen:
            continue
        found[path] = seen._replace(look=known.read_atime(mine.look, seen.look))
        if stat.S_ISDIR(seen.look.kind) and known.same_listing(_listed(mine), _listed(seen)):
            found[path] = found[path]._replace(content=mine.content)
    return found


def _listed(seen: Seen) -> Sequence[Listed]:
    return seen.content if isinstance(seen.content, tuple) else ()


def without_atime(view: View) -> View:
    """For views at different moments: reading a view changes access times of upper files."""
    return {path: seen._replace(look=seen.look._replace(atime=0)) for path, seen in view.items()}


def remounted(view: View, options: Sequence[str]) -> View:
    """*view* without what may differ after the next mount of the same upper.

    A lookup may mark a directory as impure: then stray whiteouts in it are not listed any more and
    entry numbers are right (9.3). With ``userxattr`` the origin of some or all objects that are no
    directories cannot be stored, so they lose the number of their lower with the mount.
    """
    forget = "userxattr" in options
    found: View = {}
    for path, seen in without_atime(view).items():
        if stat.S_ISDIR(seen.look.kind):
            names = tuple(entry[:2] for entry in _listed(seen) if not entry[2].startswith("errno"))
            found[path] = seen._replace(content=names)
        elif seen.look.kind:
            found[path] = _without_identity(seen) if forget else seen
    return found


def without_identity(view: View) -> View:
    """*view* without what tells that two names are one file."""
    return {path: _without_identity(seen) for path, seen in view.items()}


def _without_identity(seen: Seen) -> Seen:
    return seen._replace(look=seen.look._replace(lower_ino=0), first_name=b"")


def uppers(one: Upper, two: Upper, *, listed: bool) -> list[Difference]:
    """Differences between two upper directories.

    *listed*: a directory was listed through the mounts since they began, so a useless ``impure``
    may have been removed on either side (9.3).
    """
    left = _comparable(one, drop_useless_impure=listed)
    right = _comparable(two, drop_useless_impure=listed)
    for path, item in right.items():
        mine = left.get(path)
        if isinstance(mine, Stored) and isinstance(item, Stored):
            right[path] = item._replace(look=known.read_atime(mine.look, item.look))
    found = _tables("upper", left, right, _part)
    for name, upper in (("reference", one), ("other", two)):
        found += [
            Difference("upper", repr(path), name, f"{count} links not in the upper")
            for path, count in links_outside(upper).items()
        ]
    return found


def _comparable(found: Upper, *, drop_useless_impure: bool) -> dict[bytes, Stored | str]:
    return {
        path: item
        if isinstance(item, str)
        else item._replace(
            xattrs=_xattrs(
                path, item, keep_impure=not drop_useless_impure or has_origin_below(found, path)
            ),
            blocks=0,
        )
        for path, item in found.items()
    }


def _xattrs(path: bytes, item: Stored, *, keep_impure: bool) -> tuple[tuple[bytes, bytes], ...]:
    kept = []
    for key, value in item.xattrs:
        suffix = suffix_of(key)
        if suffix == b"impure" and not keep_impure:
            continue
        # The instance id is random: that there is one is all that can be equal.
        kept.append((key, b"<any>" if suffix == b"uuid" and not path else value))
    return tuple(kept)


def suffix_of(key: bytes) -> bytes:
    """Which mark of the format *key* is; empty for an ordinary attribute."""
    for prefix in _PRIVATE:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return b""


def has_origin_below(found: Upper, path: bytes) -> bool:
    """Does the mark `impure` of a directory say anything? An empty origin gives no number."""
    prefix = path + b"/" if path else b""
    return any(
        isinstance(item, Stored)
        and child.startswith(prefix)
        and child != path
        and b"/" not in child[len(prefix) :]
        and any(suffix_of(key) == b"origin" and value for key, value in item.xattrs)
        for child, item in found.items()
    )


def blocks(one: Upper, two: Upper) -> list[Difference]:
    """Files of the other upper which use much more space than the reference's (lost holes)."""
    found = []
    for path, item in two.items():
        mine = one.get(path)
        if isinstance(item, str) or not isinstance(mine, Stored):
            continue
        if item.blocks * 512 > mine.blocks * 512 + (1 << 20):
            found.append(Difference("upper", repr(path), mine.blocks, item.blocks))
    return found

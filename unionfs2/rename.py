"""rename(2) and renameat2(2): the operation with the most cases, after ovl_rename().

What the upper holds afterwards, by source and target, is the table in docs/semantics.md. The
decisions are taken first (``_Plan``), then ancestors and objects are copied up, marks are set,
and one renameat2 on the upper makes the change visible.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from . import copyup, merge, namespace, ondisk, protect
from . import nodes as nd
from . import syscalls as sc
from .nodes import Dir, Node
from .stack import Stack, oserror


class Place(NamedTuple):
    """A name in a merged directory."""

    parent: Dir
    name: bytes


def rename(stack: Stack, old: Place, new: Place, flags: int) -> None:
    """Move or exchange.

    Raises EXDEV for a lower or merged directory (redirect_dir is off), EINVAL for
    RENAME_WHITEOUT, EEXIST, ENOTEMPTY, ENOTDIR, EISDIR as renameat2(2).
    """
    source, target = check(stack, old, new, flags)
    if source is target:
        return  # two names of one file, or one name twice: nothing happens (rename(2))
    if flags & sc.RENAME_EXCHANGE:
        assert target is not None
        with copyup.room(stack, source, target, old.parent, new.parent):
            _exchange(stack, old, new, source, target)
    else:
        with copyup.room(stack, source, old.parent, new.parent):
            _move(stack, old, new, source, target)
    for place in (old, new):
        assert place.parent.upper is not None
        stack.recount_directory(place.parent.upper)


def check(stack: Stack, old: Place, new: Place, flags: int) -> tuple[Node, Node | None]:
    """Everything that can be refused before something is copied up; gives both objects."""
    if flags & ~(sc.RENAME_NOREPLACE | sc.RENAME_EXCHANGE):
        raise oserror(errno.EINVAL, old.name)
    _ = stack.w
    source, _st = stack.require(old.parent, old.name)
    found = stack.lookup(new.parent, new.name)
    target = found[0] if found is not None else None
    _check_nodes(stack, old, new, source, target, flags)
    return source, target


def _check_nodes(
    stack: Stack, old: Place, new: Place, source: Node, target: Node | None, flags: int
) -> None:
    exchange = bool(flags & sc.RENAME_EXCHANGE)
    if exchange and target is None:
        raise oserror(errno.ENOENT, new.name)
    if flags & sc.RENAME_NOREPLACE and target is not None:
        raise oserror(errno.EEXIST, new.name)
    if source is target:
        return
    protect.check_remove(stack, old.parent, source)
    if target is None:
        protect.check_add(stack, new.parent)
    else:
        protect.check_remove(stack, new.parent, target)
    if new.parent.flags & nd.DEAD:
        raise oserror(errno.ENOENT, new.name)
    _check_loop(source, new.parent, errno.EINVAL)
    if target is not None:
        _check_loop(target, old.parent, errno.EINVAL if exchange else errno.ENOTEMPTY)
    if target is not None and not exchange:
        if source.is_dir and not target.is_dir:
            raise oserror(errno.ENOTDIR, new.name)
        if target.is_dir and not source.is_dir:
            raise oserror(errno.EISDIR, new.name)
    _check_movable(source)
    if exchange and target is not None:
        _check_movable(target)


def _check_loop(moving: Node, into: Dir, number: int) -> None:
    here: Dir | None = into
    while here is not None:
        if here is moving:
            raise oserror(number, moving.name)
        here = here.parent


def _check_movable(node: Node) -> None:
    """Directories with anything below them do not move (ovl_can_move())."""
    if isinstance(node, Dir) and (node.lowers or node.upper is None):
        raise oserror(errno.EXDEV, node.name)


def _move(stack: Stack, old: Place, new: Place, source: Node, target: Node | None) -> None:
    """A rename that replaces what is at the new place."""
    marks: list[bytes] = []
    if isinstance(target, Dir) and not target.pure_upper:
        marks = merge.whiteouts_of_empty(stack, target)
    over_whiteout = target is None and stack.upper_whiteout(new.parent, new.name)
    hide = not source.in_upper or stack.lower_positive(old.parent, old.name)
    copyup.whole(stack, source)
    new_fd = copyup.directory(stack, new.parent).at()
    copyup.directory(stack, old.parent)
    if new.parent is not old.parent and source.flags & nd.ORIGIN:
        stack.mark_impure(new.parent)
    _mark_opaque(stack, source, old, new.parent)
    flags, clean = _flags(source, hide=hide, over_whiteout=over_whiteout)
    assert old.parent.upper is not None
    old_fd = old.parent.upper.at()
    replaced = _replaced(stack, new, target, over_whiteout=over_whiteout)
    new.parent.upper_names.arrives(new.name)
    with namespace.Keeping(stack, target, new.parent, new.name):
        if marks and isinstance(target, Dir):
            _clear(stack, target, marks)
        try:
            sc.rename(old.name, old_fd, new.name, new_fd, flags)
        except OSError:
            if marks and isinstance(target, Dir):
                _is_twin(stack, target, replaced)
            raise
    if clean:
        _unlink_quietly(old.name, old_fd)
    if replaced is not None and (target is not None or not hide):
        namespace.given_back(stack, target, replaced)
    if target is not None:
        namespace.dropped(stack, target, new.parent, new.name)
        if target.is_dir:
            target.flags |= nd.DEAD
    _moved(stack, source, old, new)


def _replaced(
    stack: Stack, new: Place, target: Node | None, *, over_whiteout: bool
) -> os.stat_result | None:
    """What of the upper goes when something is moved to *new*; None where nothing is counted."""
    if stack.ledger is None or new.parent.upper is None:
        return None
    if target is not None:
        return stack.stat(target)
    return sc.lstat_at(new.name, new.parent.upper.at()) if over_whiteout else None


def _flags(source: Node, *, hide: bool, over_whiteout: bool) -> tuple[int, bool]:
    """(renameat2 flags, whether a whiteout at the old place must go afterwards)."""
    if hide:
        return (sc.RENAME_EXCHANGE if over_whiteout else sc.RENAME_WHITEOUT), False
    if source.is_dir and over_whiteout:
        return sc.RENAME_EXCHANGE, True
    return 0, False


def _exchange(stack: Stack, old: Place, new: Place, source: Node, target: Node) -> None:
    copyup.whole(stack, source)
    copyup.whole(stack, target)
    copyup.directory(stack, new.parent)
    copyup.directory(stack, old.parent)
    if new.parent is not old.parent:
        if source.flags & nd.ORIGIN:
            stack.mark_impure(new.parent)
        if target.flags & nd.ORIGIN:
            stack.mark_impure(old.parent)
    _mark_opaque(stack, source, old, new.parent)
    _mark_opaque(stack, target, new, old.parent)
    assert old.parent.upper is not None
    assert new.parent.upper is not None
    sc.rename(old.name, old.parent.upper.at(), new.name, new.parent.upper.at(), sc.RENAME_EXCHANGE)
    old.parent.children.pop(old.name, None)
    new.parent.children.pop(new.name, None)
    _moved(stack, source, old, new)
    _moved(stack, target, new, old)


def _mark_opaque(stack: Stack, node: Node, place: Place, into: Dir) -> None:
    """A pure upper directory must not merge with what lies below its new place."""
    if not isinstance(node, Dir) or node.flags & nd.OPAQUE or not into.merged:
        return
    assert place.parent.upper is not None
    try:
        sc.setxattr_at(place.name, place.parent.upper.at(), stack.dialect.opaque, ondisk.OPAQUE_YES)
    except OSError as exc:
        # An upper without attributes cannot have it moved (ovl_set_opaque_xerr()).
        if exc.errno != errno.EOPNOTSUPP:
            raise
        raise oserror(errno.EXDEV, place.name) from None
    node.flags |= nd.OPAQUE
    if stack.ledger is not None:
        stack.recount_directory(place.parent.upper.child(place.name))


def _moved(stack: Stack, node: Node, old: Place, new: Place) -> None:
    if isinstance(node, Dir):
        assert node.upper is not None
        assert new.parent.upper is not None
        node.upper.move(new.parent.upper, new.name)
    if old.parent.children.get(old.name) is node:
        del old.parent.children[old.name]
    stack.nodes.place_moved(node, old, new)


def _clear(stack: Stack, node: Dir, marks: list[bytes]) -> None:
    """Exchange an upper directory that holds whiteouts only with an empty opaque twin.

    It can then be replaced in one step (ovl_clear_empty()).
    """
    assert node.upper is not None
    assert node.upper.parent is not None
    w = stack.w
    twin = w.names.next()
    sc.mkdir(twin, 0o700, dir_fd=w.work_fd)
    try:
        _make_twin(stack, node.upper.at(), twin)
        sc.rename(twin, w.work_fd, node.upper.name, node.upper.parent.at(), sc.RENAME_EXCHANGE)
    except OSError:
        namespace.discard_directory(stack, twin, [])
        raise
    node.upper.release()
    namespace.discard_directory(stack, twin, marks)


def _make_twin(stack: Stack, upper_fd: int, twin: bytes) -> None:
    st = os.stat(upper_fd)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = os.open(twin, flags, dir_fd=stack.w.work_fd)
    try:
        sc.fchown(fd, st.st_uid, st.st_gid)
        copyup.copy_xattrs(stack, sc.fd_path(upper_fd), sc.fd_path(fd), follow=True)
        sc.setxattr(sc.fd_path(fd), stack.dialect.opaque, ondisk.OPAQUE_YES)
        sc.fchmod(fd, stat.S_IMODE(st.st_mode))
        sc.futimes(fd, st.st_atime_ns, st.st_mtime_ns)
    finally:
        os.close(fd)


def _is_twin(stack: Stack, node: Dir, replaced: os.stat_result | None) -> None:
    """*node* is now an empty opaque directory of the upper: it has outlived the rename."""
    assert node.upper is not None
    assert stack.upper is not None
    node.lowers = ()
    node.whiteouts = node.impure = False
    node.index = None
    node.flags = node.flags & ~nd.ORIGIN | nd.OPAQUE
    st = os.stat(node.upper.at())
    if stack.ledger is not None and replaced is not None:
        stack.ledger.removed(replaced)
        stack.ledger.added(st)
    node.ino = stack.ino_of(st, stack.upper)
    stack.changed.append(node)


def _unlink_quietly(name: bytes, dir_fd: int) -> None:
    try:
        sc.unlink(name, dir_fd=dir_fd)
    except OSError:
        return  # a whiteout that hides nothing is harmless

"""Stop, or fail, at each single change of the disk: the old or the new state holds, never a third.

The n-th disk-changing call is made to fail, for n = 1, 2, 3 ... until the operation completes.
A *stop* is what a kill leaves: that call and all later ones do not happen, no clean-up either. An
*error* is answered to the core, which has to tidy up and go on.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.crash.cases import BUILT_NS, LOWER, UPPER, Case
from tests.support import probe
from tests.support.faults import Crash, inject
from tests.support.shell import Shell, View, view
from tests.support.tree import snapshot
from tests.support.unions import Union, Unions, open_fds
from unionfs2 import syscalls
from unionfs2.model import SetAttr
from unionfs2.union import UnionFS

_STEPS_MAX = 60
_NOW_NS = -1

pytestmark = pytest.mark.usefixtures("_quick_disk")


@pytest.fixture
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync is still a step, but nobody waits for the disk: what a kill leaves is in memory."""
    monkeypatch.setattr(syscalls, "fsync", lambda fd: None)


def settled(seen: View) -> View:
    """A view without what copying an object up, or a change beside it, may alter.

    Left out: times of directories, inode numbers (layers are built anew for every step), link
    counts of broken hard links and of directories. Times of other objects are either as built or
    "now".
    """
    out = {}
    for path, entry in seen.items():
        mtime = entry.mtime_ns
        if stat.S_ISDIR(entry.kind):
            mtime = 0
        elif mtime > BUILT_NS:
            mtime = _NOW_NS
        out[path] = replace(entry, mtime_ns=mtime, ino=0, nlink=0)
    return out


def states_between(old: View, new: View) -> Iterator[View]:
    """The allowed states: old and new, and for one changed object each mixture of its fields.

    Size and time, or several attributes of one call, cannot change on a disk in one step. A
    change of names can, and has to.
    """
    yield old
    yield new
    changed = [path for path in old if path in new and old[path] != new[path]]
    if old.keys() != new.keys() or len(changed) != 1:
        return
    (path,) = changed
    before, after = old[path], new[path]
    names = {n for n in vars(before) if getattr(before, n) != getattr(after, n)}
    if names & {"kind", "target"}:
        return
    choices = [[{n: getattr(side, n)} for side in (before, after)] for n in names - {"data"}]
    if "data" in names:  # together with its size, which may be the same
        choices = [c for c in choices if "size" not in c[0]]
        choices.append([{"data": side.data, "size": side.size} for side in (before, after)])
    for choice in choices:
        if "mtime_ns" in choice[0]:  # changing the size sets the time, before the time is set
            choice.append({"mtime_ns": _NOW_NS})
    for picked in itertools.product(*choices):
        fields: dict[str, Any] = {}
        for part in picked:
            fields.update(part)
        yield {**old, path: replace(before, **fields)}


def assert_allowed(seen: View, old: View, new: View, calls: list[str]) -> None:
    """*seen* is one of the allowed states; otherwise say how it differs from both."""
    if any(seen == state for state in states_between(old, new)):
        return
    lines = [f"a third state after {calls}"]
    for name, state in (("old", old), ("new", new)):
        lines += [
            f"{path!r}: {name} {state.get(path)}, seen {seen.get(path)}"
            for path in sorted(state.keys() | seen.keys())
            if state.get(path) != seen.get(path)
        ]
    pytest.fail("\n".join(lines))


def states_of(unions: Unions, case: Case) -> tuple[View, View]:
    """(view before, view after) of the operation, without any fault."""
    u = unions(case.part_of(LOWER), upper=case.part_of(UPPER))
    old = settled(view(u.fs))
    case.act(u.sh)
    u.reopen()
    return old, settled(view(u.fs))


def build(unions: Unions, case: Case) -> Union:
    u = unions(case.part_of(LOWER), upper=case.part_of(UPPER))
    view(u.fs, hold=True)
    return u


def errno_of(act: Callable[[Shell], object], sh: Shell) -> int:
    """What the operation answers; 0 when it succeeds."""
    try:
        act(sh)
    except OSError as exc:
        return exc.errno or errno.EIO
    return 0


def kinds_in_work(u: Union) -> list[str]:
    """What half-made objects are left; the whiteout that others are linked to may stay."""
    return [entry.kind for path, entry in snapshot(u.work / "work").items() if path != b"."]


def kill(fs: UnionFS) -> None:
    """Let go of *fs* as the end of its process would: descriptors close, nothing else happens."""
    with inject(fail_at=1, crash=True), contextlib.suppress(Crash):
        fs.close()
    fs._opened.close()


def open_numbers() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}


def close_new(before: set[int]) -> None:
    for fd in open_numbers() - before:
        with contextlib.suppress(OSError):
            os.close(fd)


def test_a_stop_leaves_the_old_or_the_new_state(unions: Unions, case: Case) -> None:
    old, new = states_of(unions, case)
    assert old != new or not case.name.startswith(("create", "unlink", "rename", "rmdir"))
    for step in range(1, _STEPS_MAX):
        before = open_numbers()
        u = build(unions, case)
        with inject(fail_at=step, crash=True) as faults, contextlib.suppress(Crash):
            case.act(u.sh)
        u.abandon(kill)
        close_new(before)
        assert_allowed(settled(view(u.fs)), old, new, faults.calls)
        assert u.in_work() == []
        assert_can_be_repeated(u, case, new)
        u.close()
        if not faults.fired:
            return
    pytest.fail(f"{case.name} still changes the disk after {_STEPS_MAX} steps")


def assert_can_be_repeated(u: Union, case: Case, new: View) -> None:
    """Whoever was interrupted tries again, and gets what was wanted."""
    if settled(view(u.fs)) != new:
        case.act(u.sh)
    assert settled(view(u.fs)) == new


def test_an_error_leaves_the_old_or_the_new_state(unions: Unions, case: Case) -> None:
    """At odd steps the caller tries again, at even ones it does something else."""
    old, new = states_of(unions, case)
    for step in range(1, _STEPS_MAX):
        error = errno.ENOSPC if step % 3 else errno.EIO
        fds = open_fds()
        u = build(unions, case)
        with inject(fail_at=step, error=error) as faults:
            answer = errno_of(case.act, u.sh)
        assert answer in (0, error), faults.calls
        assert answer or settled(view(u.fs)) == new, faults.calls
        assert not answer or set(kinds_in_work(u)) <= {"whiteout"}, faults.calls
        assert_allowed(settled(view(u.fs)), old, new, faults.calls)
        assert_agrees(u, faults.calls)
        if step % 2:
            assert_can_be_repeated(u, case, new)
        else:
            use(u.sh, case.paths)
        assert_agrees(u, faults.calls)
        assert_no_handles(u.fs)
        u.close()
        assert open_fds() == fds, faults.calls
        if not faults.fired:
            return
    pytest.fail(f"{case.name} still changes the disk after {_STEPS_MAX} steps")


def use(sh: Shell, paths: tuple[str, ...]) -> None:
    """Change what the operation was about in other ways, as far as it is there."""
    for path in paths:
        if not sh.exists(path):
            continue
        node = sh.node(path)
        if node.is_regular:
            sh.write(path, b"used")
        if node.is_dir:
            sh.mkdir(f"{path}/used", 0o700)
        if node.kind != stat.S_IFLNK:
            sh.chmod(path, 0o701)
        sh.setattr(path, SetAttr(mtime_ns=99))


def assert_agrees(u: Union, calls: list[str]) -> None:
    """What the live core believes is what a new one reads from the disk."""
    fresh = u.another(clean_work=False)
    ours, theirs = view(u.fs), view(fresh)
    if u.userxattr:
        ours, theirs = with_lasting_numbers(ours), with_lasting_numbers(theirs)
    assert ours == theirs, calls
    u.end(fresh)


def with_lasting_numbers(seen: View) -> View:
    """Without the inode numbers that hold for one mount only.

    Symlinks and special files have no origin in this dialect, and a server that cannot decode
    handles stores empty ones.
    """
    lasting = (stat.S_IFREG, stat.S_IFDIR) if probe.is_root() else ()
    return {p: e if e.kind in lasting else replace(e, ino=0) for p, e in seen.items()}


def assert_no_handles(fs: UnionFS) -> None:
    assert not fs.files
    assert not [node for node in fs.stack.nodes.by_id.values() if node.handles]


def test_a_stop_is_seen_at_all(unions: Unions) -> None:
    """The tools of this file notice a third state: a name that is gone before its copy is there."""
    u = unions(LOWER, upper=UPPER)
    old = settled(view(u.fs))
    u.sh.unlink("f")
    between = settled(view(u.fs))
    u.sh.create("f", b"new", 0o600)
    new = settled(view(u.fs))
    assert between not in list(states_between(old, new))
    assert len(list(states_between(old, new))) > 2
    assert Shell(u.another(clean_work=False)).read("f") == b"new"

"""The machine: one history on two sides, everything compared.

Order of one phase: calls in batches (both workers at the same time, answers compared after each
batch); then the uppers while still mounted; the merged views; unmount; work directories, lowers and
the uppers again. Then the sides swap uppers, and the views must be the ones from before.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol

from tests.differential import arena, compare, known, leftovers, objects, opened
from tests.differential.compare import Difference
from tests.differential.courier import Courier, WorkerDiedError, WorkerHangsError
from tests.differential.leftovers import Upper
from tests.differential.looks import View
from tests.differential.script import History, Op
from tests.differential.sides import MountError, Side, Stack
from tests.differential.worker import Answer

_BATCH: Final = 24

_UNAIDED: Final = Op("root", "unaided", (opened.IDENT,))

#: Calls which list directories through the mount, so that `impure` may go (9.3).
_LISTS: Final = frozenset({"readdir", "readdir_seek", "readdir_unlink", "freaddir", "rmtree"})


class Source(Protocol):
    """Where the operations of a history come from."""

    def batch(self, phase: int) -> Sequence[Op]:
        """Next operations of a phase; none when it is over."""

    def learn(self, ops: Sequence[Op], reference: Sequence[Answer]) -> None:
        """What the reference answered."""


class _Script:
    """Operations that are all known before."""

    def __init__(self, phases: Sequence[Sequence[Op]]) -> None:
        self._left = [list(phase) for phase in phases]

    def batch(self, phase: int) -> Sequence[Op]:
        part, self._left[phase] = self._left[phase][:_BATCH], self._left[phase][_BATCH:]
        return part

    def learn(self, ops: Sequence[Op], reference: Sequence[Answer]) -> None:
        """Nothing to learn: the script is fixed."""


class Outcome(NamedTuple):
    """Result of one history; *history* holds the operations as they were really made."""

    history: History
    differences: tuple[Difference, ...]
    op_count: int
    excused: Counter[str]


class _Stop(Exception):  # noqa: N818 - ends a history, is not an error of the machine
    """A difference after which going on means nothing."""

    def __init__(self, *differences: Difference) -> None:
        super().__init__(differences)
        self.differences = differences

    def moved(self, start: int) -> _Stop:
        """The same with operations counted from the start of the phase."""
        return _Stop(*(d._replace(op_index=start + d.op_index) for d in self.differences))


class _Bench(NamedTuple):
    """Directories of one history."""

    home: bytes
    lowers: tuple[bytes, ...]
    prints: tuple[dict[bytes, objects.Print], ...]
    lower_inos: frozenset[int]


class Machine:
    """Two sides and their workers, for any number of histories, one after the other.

    *place* is an empty directory on the file system to use. *rewrite*, for tests of the machine
    itself, changes operations on their way to the other side.
    """

    def __init__(
        self,
        reference: Side,
        other: Side,
        place: bytes,
        *,
        rewrite: Callable[[Op], Op] | None = None,
        limit_s: float = 30.0,
    ) -> None:
        self.sides = (reference, other)
        self.place = place
        self.rewrite = rewrite
        self.limit_s = limit_s
        self._couriers: list[Courier] = []
        self._count = 0

    def __enter__(self) -> Machine:
        self._hire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for side in self.sides:
            side.close()
        self._dismiss()

    def _hire(self) -> None:
        self._couriers = [Courier(self.limit_s) for _side in self.sides]

    def _dismiss(self) -> None:
        while self._couriers:
            self._couriers.pop().close()

    # --- one history ----------------------------------------------------------------------------

    def run(self, history: History, source: Source | None = None) -> Outcome:
        """Apply *history* (its operations, or those *source* makes up) to both sides."""
        job = _Job(self, history, source or _Script(history.phases))
        home = os.path.join(self.place, b"h%d" % self._count)
        self._count += 1
        differences: list[Difference] = []
        try:
            differences += job.play(home)
        except _Stop as stop:
            differences += stop.differences
        finally:
            self._leave(home)
        made = history._replace(phases=tuple(tuple(ops) for ops in job.made))
        return Outcome(made, tuple(differences), made.size, job.excused)

    def _leave(self, home: bytes) -> None:
        """Whatever happened: no mount, no worker in a mount, no directory stays."""
        stuck = False
        for courier in self._couriers:
            try:
                courier.ask("end")
            except (WorkerHangsError, WorkerDiedError, OSError):
                stuck = True
        for side in self.sides:
            side.abandon()
        if stuck:
            self._dismiss()
            self._hire()
        if os.path.isdir(home):
            arena.clear(home)
            os.rmdir(home)

    # --- both sides at once ---------------------------------------------------------------------

    def both(self, verb: str, *args: Sequence[Any]) -> tuple[Any, Any]:
        """Ask both workers; *args* hold one argument per side."""
        for index, courier in enumerate(self._couriers):
            courier.post(verb, *(arg[index] for arg in args))
        found: list[Any] = []
        broken: list[Difference] = []
        for side, courier in zip(self.sides, self._couriers, strict=True):
            try:
                found.append(courier.collect())
            except (WorkerHangsError, WorkerDiedError) as exc:
                at = exc.op_index if isinstance(exc, WorkerHangsError) else -1
                broken.append(Difference("hang", f"{verb} on {side.name}", "answer", str(exc), at))
        if broken:
            raise _Stop(*broken)
        return found[0], found[1]


class _Job:
    """One history on its way through the machine."""

    def __init__(self, machine: Machine, history: History, source: Source) -> None:
        self.machine = machine
        self.history = history
        self.source = source
        self.made: list[list[Op]] = [[] for _phase in history.phases]
        self.excused: Counter[str] = Counter()
        self.transport = machine.sides[1].transport
        self.listed = False
        self.swapped = False
        # Known difference "copy-up-at-first-write", once the worker has been told not to help:
        # what the kernel alone has brought up, and what of it the other side was given since.
        self.opens_unaided = False
        self.opened: frozenset[bytes] = frozenset()
        self.brought_up: frozenset[bytes] = frozenset()

    def play(self, home: bytes) -> list[Difference]:
        bench = self._prepare(home)
        found: list[Difference] = []
        for phase in range(len(self.history.phases)):
            self._mount(bench)
            self._calls(phase)
            self.machine.both("settle")
            found += self._stop_if(self._uppers(bench, listed=self.listed))
            self.listed = True  # reading the view lists everything
            before = self._views("view")
            self._unmount(bench)
            found += self._stop_if(self._uppers(bench, listed=True))
            leftovers.level_access_times(
                *(os.path.join(self._home(bench, index), b"upper") for index in (0, 1))
            )
            self.swapped = not self.swapped
            self.brought_up |= self.opened
            self._mount(bench)
            self._swapped_views(before)
            self._unmount(bench)
        return found

    def _stop_if(self, found: list[Difference]) -> list[Difference]:
        if found:
            raise _Stop(*found)
        return found

    # --- directories and mounts -----------------------------------------------------------------

    def _prepare(self, home: bytes) -> _Bench:
        os.mkdir(home, 0o755)
        lowers = tuple(os.path.join(home, b"l%d" % n) for n in range(len(self.history.layers)))
        for root, layer in zip(lowers, self.history.layers, strict=True):
            objects.build(root, layer)
        for side in (b"a", b"b"):
            os.mkdir(os.path.join(home, side), 0o755)
            for name in (b"work", b"target"):
                os.mkdir(os.path.join(home, side, name), 0o755)
            objects.build(os.path.join(home, side, b"upper"), self.history.upper)
        prints = tuple(objects.fingerprint(root) for root in lowers)
        inos = frozenset(self._lower_inos(prints))
        return _Bench(home, lowers, prints, inos)

    def _lower_inos(self, prints: Iterable[dict[bytes, objects.Print]]) -> Iterator[int]:
        # With userxattr only directories keep the number of their lower: what has no origin (in a
        # user namespace everything) keeps it as long as the kernel happens to remember.
        directories_only = "userxattr" in self.history.options
        for tree in prints:
            for path, found in tree.items():
                if path and (stat.S_ISDIR(found.st[1]) or not directories_only):
                    yield found.st[0]

    def _home(self, bench: _Bench, index: int) -> bytes:
        """Directory of the upper which side *index* uses now."""
        return os.path.join(bench.home, (b"a", b"b")[index ^ self.swapped])

    def _mount(self, bench: _Bench) -> None:
        failed: list[str] = ["", ""]
        targets = []
        for index, side in enumerate(self.machine.sides):
            own = self._home(bench, index)
            parts = [os.path.join(own, name) for name in (b"upper", b"work", b"target")]
            targets.append(parts[2])
            stack = Stack(bench.lowers, parts[0], parts[1], parts[2], self.history.options)
            try:
                side.mount(stack)
            except MountError as exc:
                failed[index] = str(exc)
        if any(failed):
            raise _Stop(Difference("mount", "mounting", failed[0] or "done", failed[1] or "done"))
        helps = known.idents(self.transport, holds_back=self.machine.sides[1].holds_back)
        self.machine.both("begin", targets, [bench.lower_inos] * 2, [helps] * 2)

    def _unmount(self, bench: _Bench) -> None:
        self.machine.both("end")
        found = []
        for index, side in enumerate(self.machine.sides):
            found += [Difference("log", side.name, "nothing", line) for line in side.unmount()]
            work = os.path.join(self._home(bench, index), b"work")
            found += [
                Difference("work", side.name, "clean", line)
                for line in leftovers.work_complaints(work)
            ]
        for root, before in zip(bench.lowers, bench.prints, strict=True):
            found += _changed(root, before)
        self._stop_if(found)

    # --- calls and looks ------------------------------------------------------------------------

    def _calls(self, phase: int) -> None:
        while ops := list(self.source.batch(phase)):
            self.listed = self.listed or any(op.name in _LISTS for op in ops)
            self.opens_unaided = self.opens_unaided or _UNAIDED in ops
            start = len(self.made[phase])
            self.made[phase] += ops
            rewrite = self.machine.rewrite
            other = [rewrite(op) for op in ops] if rewrite else ops
            try:
                one, two = self.machine.both("run", [_plain(ops), _plain(other)])
            except _Stop as stop:
                raise _Stop(
                    *(d._replace(op_index=start + d.op_index) for d in stop.differences)
                ) from None
            if self.opens_unaided:
                one = [opened.answer_without_links(answer) for answer in one]
                two = [opened.answer_without_links(answer) for answer in two]
            found = compare.answers(ops, one, two, self.excused, self.transport)
            if found is not None:
                index, difference = found
                del self.made[phase][start + index + 1 :]
                raise _Stop(difference._replace(op_index=start + index))
            self.source.learn(ops, one)

    def _views(self, kind: str) -> View:
        one, two = self.machine.both("view")
        if kind == "swap" or self.opens_unaided:
            # A side may show what the other side noted of reads: see known.read_atime().
            one, two = compare.without_atime(one), compare.without_atime(two)
        if self.opens_unaided:
            one, two = opened.view_without_links(one), opened.view_without_links(two)
        if "userxattr" in self.history.options:
            # Known difference "lost-identity".
            one, two = compare.without_identity(one), compare.without_identity(two)
        self._stop_if(compare.views(kind, one, two))
        view: View = one
        return view

    def _swapped_views(self, before: View) -> None:
        after = self._views("swap")
        self._stop_if(
            compare.views(
                "swap",
                compare.remounted(before, self.history.options),
                compare.remounted(after, self.history.options),
            )
        )

    def _uppers(self, bench: _Bench, *, listed: bool) -> list[Difference]:
        one, two = (
            leftovers.upper(os.path.join(self._home(bench, index), b"upper")) for index in (0, 1)
        )
        if self.opens_unaided:
            one, two = self._without_opens(bench, one, two)
        return compare.uppers(one, two, listed=listed) + compare.blocks(one, two)

    def _without_opens(self, bench: _Bench, one: Upper, two: Upper) -> tuple[Upper, Upper]:
        """Both uppers without what only an open has brought up, in the kernel's.

        The other side has such things of the phase before, whose upper was the kernel's.
        """
        mine = opened.untouched(one, two, bench.lowers)
        its = opened.untouched(two, one, bench.lowers) & self.brought_up
        self.excused[opened.IDENT] += len(mine | its)
        self.opened |= mine
        return opened.without(one, mine, two), opened.without(two, its, one)


def _plain(ops: Sequence[Op]) -> list[tuple[object, ...]]:
    return [tuple(op) for op in ops]


def _changed(root: bytes, before: dict[bytes, objects.Print]) -> list[Difference]:
    after = objects.fingerprint(root)
    if after == before:
        return []
    return [
        Difference("lower", repr(path), before.get(path), after.get(path))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]

"""One operation on copies of a prepared store, ended or failed at any of its steps."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.crash import store_cases
from tests.crash.store_cases import Case, State, Template
from tests.support import recorder
from tests.support.faults import inject
from unionfs2.driver import Driver
from unionfs2.errors import UnionFSError, sentence

_STEPS_MAX = 3000
#: How a process may end, or what else may go wrong, at a step.
MODES = ("kill", "cut", "error")


class Bench:
    """One operation on fresh copies of the template."""

    def __init__(self, template: Template, case: Case, place: Path) -> None:
        self.template, self.case, self.place = template, case, place
        self.home = place / "copy"
        with self.fresh():
            self.old = self.look()
        with self.fresh():
            # Without the seam: what the operation is about.
            with Driver.open(self.home) as driver:
                self.case.act(driver)
            self.new = self.look()

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        store_cases.copy_of(self.template, self.home)
        if self.case.name.startswith("prune"):
            store_cases.leave_rubbish(self.home)
        if self.case.name == "repair":
            store_cases.damage(self.home)
        try:
            yield
        finally:
            shutil.rmtree(self.home)

    def act(self) -> None:
        with Driver.open(self.home) as driver:
            self.case.act(driver)

    def look(self) -> State:
        """The state, as a repaired store has it: damage is part of one case."""
        with Driver.open(self.home) as driver:
            if self.case.name == "repair":
                driver.repair()
            return store_cases.state(driver)

    def assert_whole(self, where: object) -> None:
        """Open again: an allowed state, consistent, and nothing is left behind after prune."""
        # Temporary files of others are let be for a while: somebody may be at work.
        for path in self.home.rglob("*.tmp"):
            os.utime(path, (0, 0))
        with Driver.open(self.home) as driver:
            if driver.check():
                driver.repair()
            assert driver.check(deep=True) == [], where
            seen = store_cases.state(driver)
            self.assert_allowed(seen, where)
            driver.prune()
            own = self.home / ".unionfs2"
            left = [*(own / "staging").iterdir(), *(own / "trash").iterdir()]
            left += [path for path in self.home.rglob("*.tmp") if "quarantine" not in path.parts]
            assert left == [], where
            assert store_cases.state(driver) == seen, where

    def sweep(self, modes: tuple[str, ...], *, stride: int = 1) -> int:
        """Every *stride*-th step, the modes in turn (with stride 1: each of them at each step).

        Returns how many points were tried. AssertionError: something was lost.
        """
        tried = 0
        for number in range(_STEPS_MAX):
            step = number * stride + 1
            for mode in modes if stride == 1 else (modes[number % len(modes)],):
                tried += 1
                if not self.try_step(step, mode):
                    return tried
        raise AssertionError(f"{self.case.name} still changes the disk after {step} steps")

    def try_step(self, step: int, mode: str) -> bool:
        """End or fail at one step and look; False when the operation has fewer steps."""
        with self.fresh():
            if mode == "error":
                return self._fail(step)
            outcome = recorder.run_until(step, self.act, power=mode == "cut")
            assert outcome.error == "", (self.case.name, step, outcome.error)
            if not outcome.killed:
                # All that was reported done is there, without what was not synced.
                assert self.look() == self.new, (self.case.name, mode)
            self.assert_whole((self.case.name, step, mode))
            return outcome.killed

    def _fail(self, step: int) -> bool:
        number = errno.ENOSPC if step % 3 else errno.EIO
        raised = None
        with inject(fail_at=step, error=number) as faults:
            try:
                self.act()
            except (UnionFSError, OSError) as exc:
                raised = exc
        where = (self.case.name, step, faults.calls[max(step - 3, 0) : step], raised)
        if raised is not None:
            text = sentence(raised)
            assert text, where
            assert "\n" not in text, where
        self.assert_whole(where)
        return faults.fired

    def assert_allowed(self, seen: State, where: object) -> None:
        if seen in (self.old, self.new):
            return
        assert not self.case.atomic, (where, _differing(seen, self.old), _differing(seen, self.new))
        for key in seen.keys() | (self.old.keys() & self.new.keys()):
            allowed = [side[key] for side in (self.old, self.new) if key in side]
            if key == self.case.moved and key not in seen:
                continue
            assert key in seen, (where, f"{key} is lost")
            assert seen[key] in allowed, (where, key, seen[key], allowed)


def _differing(seen: State, other: State) -> list[str]:
    return sorted(k for k in seen.keys() | other.keys() if seen.get(k) != other.get(k))

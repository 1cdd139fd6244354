"""Kill a process before each single change that it makes to a store; then open the store again.

Three things can happen: a *kill* (all later changes do not take place), a *cut* of the power (file
content that was not synced is gone, too), an *error* of the disk, which the operation answers. Here
each case tries every fifth step, and the three in turn; ``./dev stress crash`` tries all.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.crash import store_cases
from tests.crash.store_bench import MODES, Bench
from tests.crash.store_cases import NAMES, Case, Template
from tests.support import recorder
from unionfs2 import syscalls

pytestmark = pytest.mark.needs("root", "trusted-xattr", "mknod-whiteout")

_STRIDE = 5


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return store_cases.make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def operation(request: pytest.FixtureRequest, template: Template) -> Case:
    return store_cases.cases(template)[request.param]


@pytest.mark.parametrize("operation", NAMES, indirect=True)
def test_an_end_at_a_step_loses_nothing(template: Template, operation: Case, home: Path) -> None:
    assert Bench(template, operation, home).sweep(MODES, stride=_STRIDE) > 0


# What no promise rests on: the lock file is for this boot only, trash and staging are rubbish.
_MAY_BE_LOST = ("/.unionfs2/lock", "/.unionfs2/staging", "/.unionfs2/trash", "/.unionfs2")


@pytest.mark.parametrize("operation", NAMES, indirect=True)
def test_what_is_reported_done_is_synced(template: Template, operation: Case, home: Path) -> None:
    """Each file and each directory that an operation changed, by itself."""
    bench = Bench(template, operation, home)
    with bench.fresh():
        outcome = recorder.run_until(0, bench.act)
        assert outcome.error == ""
        prefix = str(bench.home)
        left = [path.removeprefix(prefix) for path in outcome.unsynced]
        harmless = tuple(f"{path}/" for path in _MAY_BE_LOST[1:3])
        assert [p for p in left if p not in _MAY_BE_LOST and not p.startswith(harmless)] == []


def test_a_forgotten_sync_is_noticed(tmp_path: Path) -> None:
    """The tools of this file see a loss: content is gone and the directory is named."""

    def act() -> None:
        for name in (b"lost", b"kept"):
            path = os.path.join(os.fsencode(tmp_path), name)
            fd = syscalls.create_at(path, os.O_WRONLY | os.O_CREAT, 0o600)
            syscalls.pwrite(fd, b"text", 0)
            if name == b"kept":
                syscalls.fsync(fd)
            os.close(fd)

    outcome = recorder.run_until(0, act, power=True)
    assert outcome.unsynced == [str(tmp_path), str(tmp_path / "lost")]
    assert (tmp_path / "lost").read_bytes() == b""
    assert (tmp_path / "kept").read_bytes() == b"text"
    assert recorder.run_until(2, act, power=True).killed

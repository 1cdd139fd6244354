"""Fixtures and rules of the whole suite: abilities are probed, no mount outlives its test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.checks import LINT_FAILURES_VARIABLE
from tests.support import mounts, probe


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a misspelt UNIONFS2_REQUIRE before any test runs."""
    probe.required()


@pytest.fixture(scope="session", autouse=True)
def _session_mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sweep what an aborted run left; leave nothing mounted where pytest is about to delete."""
    root = tmp_path_factory.getbasetemp().resolve()
    mounts.sweep(root.parent)
    lock = mounts.claim(root)
    with pytest.MonkeyPatch.context() as patch:
        # Whoever lists mounts removes records that it does not understand: not those of this run.
        patch.setenv("UNIONFS2_STATE", str(tmp_path_factory.mktemp("records")))
        yield
    mounts.detach(root)
    os.close(lock)


@pytest.fixture(autouse=True)
def _no_mount_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a mount, and remove it before pytest deletes the directory.

    Requesting tmp_path here, when the test uses it at all, orders the clean-up: the test's own
    fixtures first, then this one, then the removal of the directory.
    """
    if "tmp_path" not in request.fixturenames:
        yield
        return
    tmp_path: Path = request.getfixturevalue("tmp_path")
    yield
    left = mounts.detach(tmp_path.resolve())
    if left:
        pytest.fail(f"mounts left behind: {left}", pytrace=False)


@pytest.fixture(autouse=True)
def _process_as_found() -> Iterator[None]:
    """Give back what serving a union changes for good in this process: umask and securebits.

    A later test that becomes another user would keep root's capabilities otherwise.
    """
    umask = os.umask(0o022)
    os.umask(umask)
    securebits = probe.get_securebits()
    yield
    os.umask(umask)
    if probe.get_securebits() != securebits:
        probe.set_securebits(securebits)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Honour ``@pytest.mark.needs(...)``, before any fixture of the test is set up."""
    for marker in item.iter_markers("needs"):
        probe.need(*marker.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Repeat failed static checks where the eye is: just above the closing line."""
    failures = os.environ.get(LINT_FAILURES_VARIABLE)
    if failures:
        terminalreporter.write_line(f"static checks failed, see above: {failures}", red=True)

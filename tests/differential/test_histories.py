"""Random histories on the kernel's overlay and on our FUSE mount: nothing may differ."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.differential import campaign, generate, pieces, sides
from tests.differential.machine import Machine
from tests.differential.pieces import Dialect
from tests.differential.sides import REPOSITORY, KernelSide, Side
from tests.support.transports import TRANSPORTS

_SEEDS = range(20260000, 20260020)

_on_each = pytest.mark.parametrize("transport", TRANSPORTS)


def _run(
    place: bytes,
    seeds: range,
    dialect: Dialect,
    transport: str,
    side: Callable[[str], Side] = sides.unionfs2_server,
    calls_of: str | None = None,
) -> int:
    """*calls_of*: the transport whose calls are made, when not those of *transport*."""
    made = 0
    with Machine(KernelSide(), side(transport), place) as machine:
        for seed in seeds:
            history = generate.history(seed, 400, dialect.on(calls_of or transport))
            outcome = machine.run(*history)
            finding = campaign.Finding(seed, outcome.history, outcome.differences, 0)
            assert not outcome.differences, campaign.describe(finding)
            made += outcome.op_count
    return made


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.needs("root", "fuse", "overlay", "trusted-xattr")
@_on_each
def test_histories_as_root_and_ordinary_callers(place: bytes, transport: str) -> None:
    assert _run(place, _SEEDS, pieces.TRUSTED, transport) == 400 * len(_SEEDS)


@pytest.mark.slow
@pytest.mark.needs("root", "fuse", "overlay", "trusted-xattr")
@_on_each
def test_histories_with_userxattr(place: bytes, transport: str) -> None:
    assert _run(place, range(5), pieces.USERXATTR, transport) == 2000


@pytest.mark.slow
@pytest.mark.needs("root", "fuse", "overlay", "trusted-xattr")
@_on_each
def test_histories_with_limits_that_nobody_reaches(place: bytes, transport: str) -> None:
    """Counting changes nothing, and the count at the end is what is there.

    Without fallocate: ext4 keeps the list of many extents in a block of the file, which it takes
    when it writes back, and nobody can count that before.
    """
    side = sides.unionfs2_limited
    made = _run(place, range(10), pieces.TRUSTED, transport, side, calls_of="pyfuse3")
    assert made == 4000


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.needs("userns-overlay", "private-fuse")
@_on_each
def test_histories_in_a_user_namespace(transport: str) -> None:
    """An ordinary user, root of its own namespace, against the kernel's overlay in there."""
    command = [sys.executable, "-m", "devtools.fuzz", "--userns", "--seed", "4000"]
    command += ["--transport", transport]
    done = subprocess.run(
        [*command, "--histories", "25", "--ops", "400"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=230,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "25 histories, 10000 operations, 0 differences" in done.stdout
